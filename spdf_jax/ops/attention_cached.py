"""Attention of new tokens over all that came before them, for decoding.

Shape legend: B batch, T new tokens, S cached positions, H heads, K head width.
"""

import jax
import jax.numpy as jnp

from spdf_jax.ops.attention_patterns import attends
from spdf_jax.ops.attention_sink import sink_slot


def cached_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    positions_BT: jax.Array,
    sink_H: jax.Array | None = None,
    *,
    pattern: str,
    width: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes keys and values to their positions, and lets every query see all positions up to its own.

    Args:
      q_BTHK, k_BTHK, v_BTHK: of the new tokens; keys and values may have fewer heads, as for `attention`.
      cache: (keys, values), BSHK each, of the heads that these have.
      positions_BT: of the new tokens, below S; -1 is nowhere: such keys and values are not kept, and such outputs mean nothing.
      sink_H: as `spdf_jax.ops.attention_sink.attention_with_sink` takes it.
      pattern, width: as `spdf_jax.ops.attention.attention` takes them.

    Returns:
      (out_BTHK, new cache).

    >>> x_BTHK = jnp.ones((1, 3, 2, 4))
    >>> cache = jnp.zeros((1, 5, 2, 4)), jnp.zeros((1, 5, 2, 4))
    >>> out, (k, _) = cached_attention(x_BTHK, x_BTHK, x_BTHK, cache, jnp.array([[0, 1, -1]]), pattern="causal", width=1)
    >>> out.shape, k[0, :, 0, 0].tolist()
    ((1, 3, 2, 4), [1.0, 1.0, 0.0, 0.0, 0.0])
    """
    k_BSHK, v_BSHK = (jax.vmap(_write)(*part, positions_BT) for part in zip(cache, (k_BTHK, v_BTHK), strict=True))
    i_BHTS, j_BHTS = positions_BT[:, None, :, None], jnp.arange(k_BSHK.shape[1])[None, None, None]
    sees_BHTS = attends(pattern, i_BHTS, j_BHTS, width)
    k, v, sees, bias = k_BSHK, v_BSHK, sees_BHTS, None
    if sink_H is not None:
        k, v, sees, bias = sink_slot(k, v, sees, sink_H, q_BTHK.dtype)
    return jax.nn.dot_product_attention(q_BTHK, k, v, bias, sees), (k_BSHK, v_BSHK)


def _write(old_SHK: jax.Array, new_THK: jax.Array, positions_T: jax.Array) -> jax.Array:
    return old_SHK.at[positions_T].set(new_THK, mode="drop", wrap_negative_indices=False)
