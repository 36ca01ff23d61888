"""A model of the caller's own, in the place of `spdf_jax.GPT`: all that a step asks of it is its loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclass(frozen=True, eq=False)
class LossFunction:
    """A loss over any pytree of parameters. Two are equal where `of` is one object, which need not be hashable.

    Attributes:
      of: ``(params, batch) -> loss``, a scalar, or ``(loss sum, weight sum)``; see `spdf_jax.fit`.

    >>> [float(x) for x in LossFunction(lambda params, batch: params * batch).sums({"params": 2.0}, jnp.ones(()))]
    [2.0, 1.0]
    """

    of: Callable[[Any, Any], Any]

    def sums(self, variables: Any, batch: Any, **_: Any) -> tuple[jax.Array, jax.Array]:
        """Summed loss and summed weights of a batch; `variables` as of `spdf_jax.TrainState`."""
        found = self.of(variables["params"], batch)
        loss, weight = found if isinstance(found, tuple) else (found, 1.0)
        return jnp.asarray(loss, jnp.float32), jnp.asarray(weight, jnp.float32)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LossFunction) and self.of is other.of

    def __hash__(self) -> int:
        return id(self.of)


#: What steps are made of.
Model: TypeAlias = nn.Module | LossFunction
