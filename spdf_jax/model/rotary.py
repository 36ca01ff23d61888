"""Rotary positions (Su et al. 2021, arXiv 2104.09864): queries and keys turned by angles that grow with their position.

A head's first half is turned with its second, as in ``transformers`` (``models/llama/modeling_llama.py``), not neighbours as in
the paper: the same model under another order of a head's features. Scores depend on distances alone, so documents packed into
one sequence need no positions of their own. The stretch of frequencies for longer contexts is Llama 3's
(``modeling_rope_utils.py``). Shape legend: `spdf_jax.model.gpt`; P pairs, K / 2.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from spdf_jax.model.config import GPTConfig


def frequencies(config: GPTConfig) -> np.ndarray:
    """Radians a position by which each pair of a head's features is turned.

    Args:
      config: with `positions` ``rotary``.

    Returns:
      frequencies_P, float64, falling.

    >>> frequencies(GPTConfig(n_head=1, d_model=4, positions="rotary")).tolist()
    [1.0, 0.01]
    """
    c = config
    plain_P = c.rotary_theta ** -(np.arange(0, c.head_width, 2) / c.head_width)
    if c.rotary_factor == 1:
        return plain_P
    periods_P = c.rotary_context * plain_P / (2 * np.pi)
    kept_P = np.clip((periods_P - c.rotary_low_factor) / (c.rotary_high_factor - c.rotary_low_factor), 0, 1)
    return plain_P * (kept_P + (1 - kept_P) / c.rotary_factor)


def turned(config: GPTConfig, x_BTHK: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """Queries or keys as their positions turn them, computed in float32 or wider.

    Args:
      config: of the model.
      x_BTHK: floats.
      positions_BT: of the tokens; None: 0, 1, ... in every sequence.

    Returns:
      x_BTHK in its dtype.

    >>> config = GPTConfig(n_head=1, d_model=4, positions="rotary")
    >>> turned(config, jnp.ones((1, 2, 1, 4)), None)[0, :, 0].round(2).tolist()[0]
    [1.0, 1.0, 1.0, 1.0]
    """
    if positions_BT is None:
        positions_BT = jnp.arange(x_BTHK.shape[1])[None]
    return _turned(x_BTHK, positions_BT, tuple(frequencies(config).tolist()))


# Computed again for the backward pass from the positions: sines stored of every layer would be more than they cost.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def _turned(x_BTHK: jax.Array, positions_BT: jax.Array, frequencies_P: tuple[float, ...]) -> jax.Array:
    wide = jnp.promote_types(x_BTHK.dtype, jnp.float32)
    angles_BTHP = positions_BT[:, :, None, None].astype(wide) * jnp.array(frequencies_P, wide)[None, None, None]
    cos_BTHP, sin_BTHP = jnp.cos(angles_BTHP), jnp.sin(angles_BTHP)
    a_BTHP, b_BTHP = jnp.split(x_BTHK.astype(wide), 2, -1)
    turned = a_BTHP * cos_BTHP - b_BTHP * sin_BTHP, b_BTHP * cos_BTHP + a_BTHP * sin_BTHP
    return jnp.concatenate(turned, -1).astype(x_BTHK.dtype)
