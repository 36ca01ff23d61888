"""RMS normalisation (Zhang & Sennrich 2019, arXiv 1910.07467): Llama's norm, and of each head's queries and keys Qwen3's."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + epsilon) * scale`` over the last axis, statistics in float32 or wider.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the result; parameters are float32.

    >>> RMSNorm().init_with_output(jax.random.key(0), jnp.array([[[-3.0, 3.0]]]))[0].round(3).tolist()
    [[[-1.0, 1.0]]]
    """

    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] normalised, in `dtype`."""
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
        return _normalised(x, scale_D, self.epsilon).astype(self.dtype)


# Computed again for the backward pass from x; contractions, not products of what was broadcast: see
# `spdf_jax.model.layer_norm`.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _normalised(x: jax.Array, scale_D: jax.Array, epsilon: float) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    inverse = jax.lax.rsqrt(jnp.mean(x**2, -1) + epsilon)
    return jnp.einsum("...d,...->...d", x, inverse) * jnp.broadcast_to(scale_D, x.shape)
