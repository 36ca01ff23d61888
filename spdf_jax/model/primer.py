"""Primer's parts: squared ReLU and the causal depthwise convolution of multi-DConv-head attention.

Source: So et al. 2021 (arXiv 2109.08668) and ``google-research/google-research``, ``primer/t5_models.py``. The two alone are
Primer-EZ. Full Primer also projects queries from the convolved keys and puts the norm of the MLP behind it (`GPTConfig`).
Its norm, (x - mu) / sqrt(mean(x (x - mu)) + eps), needs no code: mean(mu (x - mu)) is 0, so it is layer norm.

Shape legend: B batch, T tokens, S = T and the tokens before them, D channels; 2 and 3 are counts.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

#: Positions that a tap reaches, its own included.
TAPS = 3


def squared_relu(x: jax.Array) -> jax.Array:
    """max(x, 0)^2 (Primer, section 4).

    >>> squared_relu(jnp.array([-2.0, 0.5, 3.0])).tolist()
    [0.0, 0.25, 9.0]
    """
    return jnp.square(nn.relu(x))


class DConv(nn.Module):
    """Causal depthwise convolution: ``y_t = w_0 x_t + w_1 x_(t-1) + w_2 x_(t-2)``, other taps w for every channel.

    Parameters: ``taps [3, D]``, starting at 1/2, 1/6, 1/6. Not called a kernel, so that they stay dense and do not decay.

    Decoding, the ``cache`` collection holds the last two inputs of each row (``last [B, 2, D]``), zeros at first.

    Attributes:
      dtype: compute dtype.

    >>> x_BTD = jnp.array([1.0, 0.0, 0.0, 0.0, 6.0])[None, :, None]
    >>> y_BTD, variables = DConv("float32").init_with_output(jax.random.key(0), x_BTD)
    >>> [round(float(y), 3) for y in y_BTD[0, :, 0]]
    [0.5, 0.167, 0.167, 0.0, 3.0]
    """

    dtype: str

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array | None = None, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        """Args:
          x_BTD: floats.
          positions_BT: as `spdf_jax.GPT` takes them: inputs of earlier calls precede these, padding is at -1.
          segments_BT: as `spdf_jax.GPT` takes them: an input of another segment counts as 0.

        Returns:
          y_BTD in the compute dtype.
        """
        B, _, D = x_BTD.shape
        taps_3D = self.param("taps", _init, (TAPS, D))
        last_B2D = jnp.zeros((B, TAPS - 1, D), x_BTD.dtype)
        if positions_BT is not None:
            last_B2D = self.get_variable("cache", "last")
        x_BSD = jnp.concatenate([last_B2D, x_BTD], 1)
        if positions_BT is not None:
            # Padding is on the right: the last two of a row lie just before it.
            count_B = jnp.sum(positions_BT >= 0, 1)
            self.put_variable("cache", "last", jax.vmap(_two_from)(x_BSD, count_B))
        return _convolved(taps_3D, x_BSD, segments_BT).astype(self.dtype)


# In float32 or wider, in which the taps' gradients are sums over tokens; computed again for the backward pass from x_BSD.
@partial(jax.checkpoint, prevent_cse=False)
def _convolved(taps_3D: jax.Array, x_BSD: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    x_BSD = x_BSD.astype(taps_3D.dtype)
    T = x_BSD.shape[1] - (TAPS - 1)
    y_BTD = taps_3D[0][None, None] * x_BSD[:, TAPS - 1 :]
    for distance in range(1, TAPS):
        before_BTD = x_BSD[:, TAPS - 1 - distance :][:, :T]
        if segments_BT is not None:
            before_BTD = jnp.where(_same(segments_BT, distance)[..., None], before_BTD, 0)
        y_BTD += taps_3D[distance][None, None] * before_BTD
    return y_BTD


def _init(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
    return jnp.full(shape, 0.5 / TAPS, jnp.float32).at[0].set(0.5)


def _two_from(x_SD: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_SD, start, TAPS - 1)


def _same(segments_BT: jax.Array, distance: int) -> jax.Array:
    """Whether each position is in the segment of the one `distance` before it; before the first there is only zero anyway."""
    return segments_BT == jnp.roll(segments_BT, distance, 1)
