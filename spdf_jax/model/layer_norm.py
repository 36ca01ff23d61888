"""Layer normalisation whose backward pass is quick on a CPU too.

`flax.linen.LayerNorm` is the same function. Its gradients are sums of products over the axes of what was broadcast, which XLA's
CPU backend computes many times as slowly as contractions where a batch holds one sequence. Shape legend: `spdf_jax.model.gpt`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spdf_jax.sharding import target_platform


class LayerNorm(nn.Module):
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the last axis, statistics in float32 or wider.

    Attributes:
      epsilon: added to the variance.
      use_bias: whether there is one.
      dtype: of the result; parameters are float32.

    >>> LayerNorm().init_with_output(jax.random.key(0), jnp.array([[[1.0, 3.0]]]))[0].round(3).tolist()
    [[[-1.0, 1.0]]]
    """

    epsilon: float = 1e-5
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """x_BTD normalised, in `dtype`."""
        scale_D = self.param("scale", nn.initializers.ones, x_BTD.shape[-1:])
        y_BTD = _normalised(x_BTD, scale_D, self.epsilon)
        if self.use_bias:
            y_BTD += self.param("bias", nn.initializers.zeros, x_BTD.shape[-1:])[None, None]
        return y_BTD.astype(self.dtype)


# Computed again for the backward pass from x: storing what is between costs more than the arithmetic.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalised(x_BTD: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    x_BTD = x_BTD.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    mean_BT1 = x_BTD.mean(-1, keepdims=True)
    if target_platform() != "cpu":  # where one pass over x gives both sums, and fuses
        variance_BT1 = jnp.maximum(jnp.mean(x_BTD**2, -1, keepdims=True) - mean_BT1**2, 0)
        return (x_BTD - mean_BT1) * (jax.lax.rsqrt(variance_BT1 + epsilon) * scale_D[None, None])
    x_BTD -= mean_BT1
    inverse_BT = jax.lax.rsqrt(jnp.mean(x_BTD**2, -1) + epsilon)
    # Not as [B, T, 1] and [1, 1, D]: the gradients of those are the slow sums.
    return jnp.einsum("btd,bt->btd", x_BTD, inverse_BT) * jnp.broadcast_to(scale_D, x_BTD.shape)
