"""Keys and values with fewer heads than queries (Ainslie et al. 2023, arXiv 2305.13245): each serves a group of query heads.

Shape legend: B batch, T positions, H heads, D head size.
"""

import jax
import jax.numpy as jnp

from spdf_jax.sharding import WIDE_AXIS


def for_each_head(k_BTHD: jax.Array, v_BTHD: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """Keys and values as many as there are heads of queries.

    Args:
      k_BTHD, v_BTHD: as `spdf_jax.ops.attention.attention` takes them.
      heads: of the queries, a multiple of theirs.

    Returns:
      (k_BTHD, v_BTHD) with `heads` heads.

    >>> k_BTHD, _ = for_each_head(*[jnp.arange(2.0).reshape(1, 1, 2, 1)] * 2, heads=4)
    >>> k_BTHD[0, 0, :, 0].tolist()
    [0.0, 0.0, 1.0, 1.0]
    """
    k_BTHD, v_BTHD = (jnp.repeat(x, heads // x.shape[2], 2) for x in (k_BTHD, v_BTHD))
    return k_BTHD, v_BTHD


def for_each_device(k_BTHD: jax.Array, v_BTHD: jax.Array, heads: int) -> tuple[jax.Array, jax.Array]:
    """`for_each_head` where the mesh that ``jax.set_mesh`` set splits the heads of queries, and could not split theirs."""
    split = jax.sharding.get_abstract_mesh().shape.get(WIDE_AXIS, 1)
    return (k_BTHD, v_BTHD) if heads % split or not k_BTHD.shape[2] % split else for_each_head(k_BTHD, v_BTHD, heads)
