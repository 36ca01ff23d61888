"""The average of a run's parameters over steps, which is then its result: evaluated, generated from and exported."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spdf_jax.sparsity.masks import keep_where


class AverageState(NamedTuple):
    """State of `averaged`.

    Attributes:
      updates: int32 scalar, so many so far; a topology step makes none.
      average: of the tree, shapes and dtypes of the parameters; 0 before the first update.
      inner: state of the optimiser.
    """

    updates: jax.Array
    average: Any
    inner: Any


@cache  # as `make_optimizer`: compiled steps are known by it
def averaged(tx: optax.GradientTransformationExtraArgs, decay: float) -> optax.GradientTransformationExtraArgs:
    """The optimiser, which follows the parameters that its updates lead to by an exponential average.

    The average of the first steps is their plain mean, until so many have come that `decay` forgets faster: nothing of the
    initial values is in it. It lies in the optimiser's state, and so does with a weight what moments do: a topology step sets
    it to 0 where weights are dropped, and that of one that grows back goes on from there, from 0 as the weight itself. It moves
    with live blocks, is split over devices as the parameters are, and begins anew where the optimiser does.

    Args:
      tx: the whole optimiser, what holds masked weights at 0 included.
      decay: weight of the average so far against 1 - decay of the parameters.

    Returns:
      A transformation that takes what `tx` does and makes the same updates.

    >>> from spdf_jax.sparsity.transforms import sparse
    >>> params, masks = {"w": jnp.array([4.0, 0.0])}, {"w": jnp.array([True, False])}
    >>> tx = averaged(sparse(optax.sgd(1.0)), 0.9)
    >>> state = tx.init(params)
    >>> for _ in range(3):  # 3, 2, 1
    ...     updates, state = tx.update({"w": jnp.ones(2)}, state, params, masks=masks)
    ...     params = optax.apply_updates(params, updates)
    >>> state.average["w"].tolist()
    [2.0, 0.0]
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), tx.init(params))

    def update(
        grads: Any, state: AverageState, params: Any = None, *, masks: Any, **extra: Any
    ) -> tuple[Any, AverageState]:
        changes, inner = tx.update(grads, state.inner, params, masks=masks, **extra)
        share = jnp.minimum(decay, state.updates / (state.updates + 1))

        def follow(mask: jax.Array, average: jax.Array, new: jax.Array) -> jax.Array:
            return keep_where(mask, (share * average + (1 - share) * new).astype(average.dtype))

        average = jax.tree.map(follow, masks, state.average, optax.apply_updates(params, changes))
        return changes, AverageState(state.updates + 1, average, inner)

    return optax.GradientTransformationExtraArgs(init, update)
