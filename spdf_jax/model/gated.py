"""The gated MLP's hidden layer (Shazeer 2020, arXiv 2002.05202) and SiLU. Shape legend: `spdf_jax.model.gpt`."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp


# Computed again for the backward pass from what they are given, as the other activations are.
@partial(jax.checkpoint, prevent_cse=False)
def silu(x: jax.Array) -> jax.Array:
    """``x sigmoid(x)`` in the dtype of `x`, computed in float32 or wider.

    >>> silu(jnp.array([0.0, 100.0])).tolist()
    [0.0, 100.0]
    """
    return jax.nn.silu(x.astype(jnp.promote_types(x.dtype, jnp.float32))).astype(x.dtype)


@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def gated(activation: Callable[[jax.Array], jax.Array], gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """``activation(gate) * up``.

    >>> gated(jax.nn.relu, jnp.array([-1.0, 2.0]), jnp.array([3.0, 3.0])).tolist()
    [0.0, 6.0]
    """
    return activation(gate_BTF) * up_BTF
