"""Exact selection of the k largest scores without sorting and without gathering.

Floats are viewed as integers of the same order; the k-th largest is then found two bits a round from the top, each round
asking only "how many are >= t" of three thresholds at once. Ties go to the lowest index. Under sharding only counts cross
devices, so the result is the same bits on every mesh. `argsort` and `top_k` move whole weight matrices and are 100 times
slower at these sizes.
"""

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError


def order_keys(scores: jax.Array) -> jax.Array:
    """Signed integers in the order of `scores`; the smallest integer stays free for "not eligible".

    float32 becomes int32, 16-bit floats int16, uint32 keeps its upper 31 bits. NaN ranks below everything, -inf included:
    a score that is not a number never wins a place.
    """
    if scores.dtype == jnp.uint32:
        return (scores >> 1).astype(jnp.int32)
    if not jnp.issubdtype(scores.dtype, jnp.floating) or scores.dtype.itemsize not in (2, 4):
        raise InputError(f"scores: dtype {scores.dtype} cannot be ranked; use float32, bfloat16, float16 or uint32")
    integer = jnp.int32 if scores.dtype.itemsize == 4 else jnp.int16
    scores = jnp.where(scores == 0, jnp.zeros((), scores.dtype), scores)  # -0.0 ties with 0.0; XLA would drop a "+ 0"
    bits = jax.lax.bitcast_convert_type(scores, integer)
    keys = jnp.where(bits >= 0, bits, bits ^ jnp.iinfo(integer).max)
    return jnp.where(jnp.isnan(scores), jnp.iinfo(integer).min + 1, keys)


@jax.jit
def select_top_k(scores: jax.Array, k: jax.Array | int, eligible: jax.Array | None = None) -> jax.Array:
    """Marks the `k` largest of the eligible scores, ties by lowest index in row-major order.

    Args:
      scores: any shape, floating point or uint32.
      k: how many, 0 <= k; may be traced. More than are eligible selects all that are.
      eligible: bool of the shape of `scores`; None means all.

    Returns:
      bool of the shape of `scores` with exactly ``min(k, eligible.sum())`` True.

    >>> select_top_k(jnp.array([1.0, 3.0, 3.0, 2.0]), 2).tolist()
    [False, True, True, False]
    >>> select_top_k(jnp.zeros(4), 3).tolist()
    [True, True, True, False]
    """
    keys = order_keys(scores)
    lowest = jnp.iinfo(keys.dtype).min
    if eligible is not None:
        keys = jnp.where(eligible, keys, lowest)
    # Read many times: XLA would fuse the making of the scores, a random generator's say, into some of the readers.
    keys = jax.lax.optimization_barrier(keys)
    k = jnp.asarray(k, jnp.int32)
    threshold, n_above = _kth_largest(keys, k)
    return (keys > threshold) | _first((keys == threshold) & (keys > lowest), k - n_above)


def _kth_largest(keys: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest t with at least k keys >= t, found two bits a round, and the number of keys above it.

    With k = 0 nothing lies above it; with more than there are keys it is the smallest integer.
    """
    bits = jnp.iinfo(keys.dtype).bits

    def round_(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The threshold grows from the smallest integer by at most 3 * 2^(bits - 2) + 3 * 2^(bits - 4) + ...: no overflow.
        threshold, n_above = found
        step = jnp.left_shift(jnp.ones((), keys.dtype), (bits - 2 - 2 * i).astype(keys.dtype))
        counts = jnp.stack(_count_at_least(keys, [threshold + step, threshold + 2 * step, threshold + 3 * step]))
        # Counts fall as thresholds rise: how many of them reach k is the two bits looked for, and the largest that does not
        # is that of the lowest threshold known to be too high, which in the end is t + 1.
        reach = counts >= k
        return (
            threshold + step * jnp.sum(reach, dtype=keys.dtype),
            jnp.maximum(n_above, jnp.max(jnp.where(reach, 0, counts))),
        )

    lowest = jnp.full((), jnp.iinfo(keys.dtype).min, keys.dtype)
    return jax.lax.fori_loop(0, bits // 2, round_, (lowest, jnp.zeros((), jnp.int32)))


def _count_at_least(keys: jax.Array, thresholds: list[jax.Array]) -> tuple[jax.Array, ...]:
    """How many keys reach each threshold. One reduction of several operands reads the keys once; several sums read them
    once each on XLA's CPU backend, and three counts a pass are what it still vectorises (a sum each: 10 times slower).
    """
    reached = tuple((keys >= t).astype(jnp.int32) for t in thresholds)
    zeros = (jnp.zeros((), jnp.int32),) * len(thresholds)
    return jax.lax.reduce(
        reached, zeros, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), tuple(range(keys.ndim))
    )


def _first(flags: jax.Array, n: jax.Array) -> jax.Array:
    """The first n True of `flags` in row-major order, by counts a row and a column: no prefix sum over all elements."""
    rows = flags.reshape(-1, flags.shape[-1]) if flags.ndim > 1 else flags.reshape(1, -1)
    in_row = jnp.sum(rows, axis=1, dtype=jnp.int32)
    quota = jnp.clip(n - (jnp.cumsum(in_row) - in_row), 0, in_row)
    whole, cut = quota == in_row, (quota > 0) & (quota < in_row)  # at most one row is cut
    rank = jnp.cumsum(jnp.any(rows & cut[:, None], axis=0))
    within = rank <= jnp.sum(jnp.where(cut, quota, 0))
    return (rows & (whole[:, None] | (cut[:, None] & within[None, :]))).reshape(flags.shape)
