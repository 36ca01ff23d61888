"""Causal attention in five patterns, each of which skips what it does not attend to, forward and backward.

A pattern is a union of bands (`spdf_jax.ops.attention_patterns.bands`). A band is computed in tiles, those outside it never;
bands and tiles are merged by their log-sum-exp. Only the output and the log-sum-exp are kept for the backward pass, which
computes the probabilities again: memory is linear in the length. Accelerators' own kernels take over where they can
(`spdf_jax.ops.attention_backends`).

Shape legend: B batch, T positions, H heads, D head size; folded: G rows of L positions, cut into blocks of C.

Sources: patterns, Child et al. 2019 (arXiv 1904.10509) as in ``hupihe/Mixed-Sparsity-Training``; tiles and backward
pass, Dao et al. 2022 (arXiv 2205.14135, algorithms 1 and 4).
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spdf_jax.errors import InputError
from spdf_jax.ops.attention_backends import choose_backend
from spdf_jax.ops.attention_groups import for_each_head
from spdf_jax.ops.attention_kernels import cudnn_attention, splash_attention
from spdf_jax.ops.attention_patterns import Band, bands, check_pattern
from spdf_jax.sharding import target_platform

# Stands for -inf in scores and log-sum-exps: exp gives exactly 0 beside a real score, and no difference is NaN.
_NOWHERE = -1e30

# Blocks of up to (reach, side): a quarter of the reach or so keeps the half-used tiles on the diagonal few, and a tile near the
# cache's size.
_BLOCKS = ((128, 64), (512, 128), (math.inf, 256))

# Positions up to which one tile holds all that a block meets, which spares merging; beyond, it would outgrow the cache.
_SLAB = 512

# Sequences x heads at a time when sequences are short, again for the cache: 1.3 to 1.7 times faster at 256 on CPU.
_SHORT_ROWS = 24


def attention(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    *,
    pattern: str = "causal",
    width: int = 128,
    segments_BT: jax.Array | None = None,
    backend: str = "auto",
) -> jax.Array:
    """Multi-head attention in a causal pattern, computing only what the pattern attends to.

    Scores are scaled by 1/sqrt(D); the softmax is taken in float32 or wider. Reverse-mode differentiable only.

    Args:
      q_BTHD: queries, floats.
      k_BTHD, v_BTHD: keys and values, same shape and dtype; or of fewer heads, each for as many of q's that follow each other.
      pattern: one of `spdf_jax.ops.attention_patterns.PATTERNS`.
      width: the pattern's width in positions; ``causal`` has none and ignores it.
      segments_BT: integer ids of the documents packed into each sequence: positions attend within equal ids only.
      backend: one of `spdf_jax.ops.attention_backends.BACKENDS`; ``auto`` chooses by where the program will run.

    Returns:
      out_BTHD in the dtype of the inputs.

    Raises:
      InputError: unknown pattern, width below 1, inputs not as said here, or a backend that cannot compute them.

    >>> x_BTHD = jnp.ones((1, 6, 2, 4))
    >>> attention(x_BTHD, x_BTHD, x_BTHD, pattern="local", width=2).shape
    (1, 6, 2, 4)
    """
    _check(q_BTHD, k_BTHD, v_BTHD, segments_BT)
    check_pattern(pattern, q_BTHD.shape[1], width)
    backend = choose_backend(backend, pattern, q_BTHD, segments_BT is not None)
    if backend == "cudnn":
        return cudnn_attention(q_BTHD, k_BTHD, v_BTHD, segments_BT, pattern=pattern, width=width)
    if backend == "splash":
        return splash_attention(q_BTHD, k_BTHD, v_BTHD, segments_BT, pattern=pattern, width=width)
    if k_BTHD.shape != q_BTHD.shape:
        k_BTHD, v_BTHD = for_each_head(k_BTHD, v_BTHD, q_BTHD.shape[2])
    return _attention(q_BTHD, k_BTHD, v_BTHD, segments_BT, pattern, width)


def _check(q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, segments_BT: jax.Array | None) -> None:
    q, k, v = shapes = q_BTHD.shape, k_BTHD.shape, v_BTHD.shape
    if len(q) != 4 or not k == v == (*q[:2], *k[2:3], q[3]) or 0 in (*q, *k) or q[2] % k[2]:
        raise InputError(f"q, k, v have shapes {shapes}: give all three [B, T, H, D], none 0; k, v may share heads")
    if not (q_BTHD.dtype == k_BTHD.dtype == v_BTHD.dtype and jnp.issubdtype(q_BTHD.dtype, jnp.floating)):
        raise InputError(f"q, k, v are {q_BTHD.dtype}, {k_BTHD.dtype}, {v_BTHD.dtype}: give one floating-point dtype")
    s, shape = segments_BT, q_BTHD.shape[:2]
    if s is not None and (s.shape != shape or not jnp.issubdtype(s.dtype, jnp.integer)):
        raise InputError(f"segments are {s.dtype} {s.shape}: give one integer a position, {shape}")


_Index = int | jax.Array  # of a block: an int where the loop over blocks is written out
_Slab = tuple[_Index, int]  # first block, number of blocks


class _Tiles(NamedTuple):
    """How a band is cut into tiles, a slab of blocks of queries by one of keys."""

    queries: Callable[[jax.Array], jax.Array]  # x_BTHD -> x_BGHLD, linear
    keys: Callable[[jax.Array], jax.Array]
    near: int
    far: int
    block: int
    blocks: int
    back: int  # how many blocks before its own a query block reaches
    segments: tuple[jax.Array, ...]  # of queries and of keys, BG1L1, or none

    def keys_of(self, i: _Index) -> _Slab:
        """What query block i attends to, and in a compiled loop maybe more."""
        if isinstance(i, int):
            return max(i - self.back, 0), min(i, self.back) + 1
        return jnp.maximum(i - self.back, 0), self.back + 1

    def queries_of(self, j: _Index) -> _Slab:
        """What attends to key block j, and in a compiled loop maybe more."""
        if isinstance(j, int):
            return j, min(self.blocks - 1 - j, self.back) + 1
        return jnp.minimum(j, self.blocks - 1 - self.back), self.back + 1

    def cut(self, x_BGHLD: jax.Array, slab: _Slab, axis: int = -2) -> jax.Array:
        return lax.dynamic_slice_in_dim(x_BGHLD, slab[0] * self.block, slab[1] * self.block, axis=axis)

    def add(self, x_BGHLD: jax.Array, slab: _Slab, part: jax.Array) -> jax.Array:
        part = self.cut(x_BGHLD, slab) + part
        return lax.dynamic_update_slice_in_dim(x_BGHLD, part, slab[0] * self.block, axis=-2)

    def scan(self, step: Callable, carry: Any) -> tuple[Any, Any]:
        """``lax.scan`` of (carry, block) -> (carry, arrays_BGHCD) over all blocks, arrays joined to BGHLD."""
        if self.blocks * self.block > _SLAB:
            carry, parts = lax.scan(step, carry, jnp.arange(self.blocks))
            return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], -1, x.shape[-1]), parts)
        parts = []
        for i in range(self.blocks):
            carry, part = step(carry, i)
            parts.append(part)
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x, -2), *parts)

    def scores(self, q: jax.Array, k_BGHDL: jax.Array, queries: _Slab, keys: _Slab) -> jax.Array:
        """Scaled scores of one tile, last axes query and key; outside the band or the segment they are ``_NOWHERE``."""
        scores = _matmul(self.cut(q, queries), self.cut(k_BGHDL, keys, -1)) * q.shape[-1] ** -0.5
        rows, columns = (self.block * blocks for _, blocks in (queries, keys))
        distance = (queries[0] - keys[0]) * self.block + jnp.arange(rows)[:, None] - jnp.arange(columns)[None]
        kept = jnp.broadcast_to((distance >= self.near) & (distance < self.far), scores.shape)
        if self.segments:
            kept &= self.cut(self.segments[0], queries) == self.cut(self.segments[1], keys).mT
        return jnp.where(kept, scores, _NOWHERE)


def _tiles(band: Band, shape: tuple[int, ...], segments_BT: jax.Array | None) -> _Tiles:
    length = jax.eval_shape(band.fold_queries, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[2]
    far = min(length, band.far or length)
    blocks = -(-length // next(side for reach, side in _BLOCKS if far <= reach))
    block = -(-length // blocks)  # all blocks nearly full
    padding = ((0, 0), (0, 0), (0, 0), (0, blocks * block - length), (0, 0))

    def tiling(fold: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return lambda x_BTHD: jnp.pad(fold(x_BTHD).swapaxes(2, 3), padding)

    queries, keys = tiling(band.fold_queries), tiling(band.fold_keys)
    back = min(blocks - 1, (far + block - 2) // block)
    segments = () if segments_BT is None else tuple(tile(segments_BT[:, :, None, None]) for tile in (queries, keys))
    return _Tiles(queries, keys, band.near, far, block, blocks, back, segments)


def _untile(tile: Callable, x_BGHLD: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The transpose of a tiling. For queries, a permutation and padding, it is also the inverse."""
    return jax.linear_transpose(tile, jax.ShapeDtypeStruct(shape, x_BGHLD.dtype))(x_BGHLD)[0]


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Product of the last two axes, batched over the others, in at least float32."""
    return jnp.matmul(a, b, preferred_element_type=_wide(a))


def _columns(x_BGHLD: jax.Array) -> jax.Array:
    """x_BGHDL, copied once: a CPU multiplies fastest, and half precision natively, where no factor is to be transposed."""
    return lax.optimization_barrier(x_BGHLD.mT)


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _merge(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention over two disjoint sets of keys from (output, log-sum-exp) over each."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    return out_a * jnp.exp(lse_a - lse) + out_b * jnp.exp(lse_b - lse), lse


def _band_forward(
    band: Band, q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(out_BTHD, lse_BTH1) of one band."""
    tiles = _tiles(band, q_BTHD.shape, segments_BT)
    q, k, v = tiles.queries(q_BTHD), _columns(tiles.keys(k_BTHD)), tiles.keys(v_BTHD)

    def tile(i: _Index, keys: _Slab) -> tuple[jax.Array, jax.Array]:
        s = tiles.scores(q, k, (i, 1), keys)
        top = s.max(-1, keepdims=True)
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        return _matmul(p.astype(v.dtype), tiles.cut(v, keys)) / total, top + jnp.log(total)

    def query_block(_: None, i: _Index) -> tuple[None, tuple[jax.Array, jax.Array]]:
        if (tiles.back + 1) * tiles.block <= _SLAB:
            return None, tile(i, tiles.keys_of(i))
        q_i = tiles.cut(q, (i, 1))
        nothing = jnp.zeros_like(q_i, _wide(q)), jnp.full_like(q_i[..., :1], _NOWHERE, _wide(q))
        return None, lax.fori_loop(tiles.keys_of(i)[0], i + 1, lambda j, done: _merge(done, tile(i, (j, 1))), nothing)

    _, (out, lse) = tiles.scan(query_block, None)
    return _untile(tiles.queries, out, q_BTHD.shape), _untile(tiles.queries, lse, (*q_BTHD.shape[:3], 1))


def _band_backward(
    band: Band,
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    segments_BT: jax.Array | None,
    dout_BTHD: jax.Array,
    lse_BTH1: jax.Array,
    delta_BTH1: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv)_BTHD of one band, given the log-sum-exp over all bands and delta = sum_D out * dout."""
    tiles = _tiles(band, q_BTHD.shape, segments_BT)
    q, dout, lse, delta = map(tiles.queries, (q_BTHD, dout_BTHD, lse_BTH1, delta_BTH1))
    k, v = map(tiles.keys, (k_BTHD, v_BTHD))
    q_BGHDL, k_BGHDL, v_BGHDL, dout_BGHDL = map(_columns, (q, k, v, dout))
    scale = q.shape[-1] ** -0.5

    def tile(dq: jax.Array, queries: _Slab, j: _Index) -> tuple[jax.Array, jax.Array, jax.Array]:
        p = jnp.exp(tiles.scores(q, k_BGHDL, queries, (j, 1)) - tiles.cut(lse, queries))
        dp = _matmul(tiles.cut(dout, queries), tiles.cut(v_BGHDL, (j, 1), -1))
        ds = (p * (dp - tiles.cut(delta, queries)) * scale).astype(q.dtype)
        dq = tiles.add(dq, queries, _matmul(ds, tiles.cut(k, (j, 1))))
        # Transposed gradients of keys and values spare transposing p and ds: 1.1 to 1.4 times faster in all on CPU.
        q_DC, dout_DC = tiles.cut(q_BGHDL, queries, -1), tiles.cut(dout_BGHDL, queries, -1)
        return dq, _matmul(q_DC, ds), _matmul(dout_DC, p.astype(q.dtype))

    def key_block(dq: jax.Array, j: _Index) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        def add_tile(i: jax.Array, grads: tuple[jax.Array, jax.Array, jax.Array]) -> tuple:
            dq, dk_BGHDC, dv_BGHDC = tile(grads[0], (i, 1), j)
            return dq, grads[1] + dk_BGHDC, grads[2] + dv_BGHDC

        if (tiles.back + 1) * tiles.block <= _SLAB:
            dq, dk_BGHDC, dv_BGHDC = tile(dq, tiles.queries_of(j), j)
        else:
            zeros_BGHDC = jnp.zeros_like(tiles.cut(k, (j, 1)).mT, _wide(q))
            stop = jnp.minimum(j + tiles.back, tiles.blocks - 1) + 1
            dq, dk_BGHDC, dv_BGHDC = lax.fori_loop(j, stop, add_tile, (dq, zeros_BGHDC, zeros_BGHDC))
        # Without the barrier XLA may turn the product itself around, and its CPU then has no kernel for half precision.
        return dq, tuple(x_BGHDC.mT for x_BGHDC in lax.optimization_barrier((dk_BGHDC, dv_BGHDC)))

    dq, (dk, dv) = tiles.scan(key_block, jnp.zeros_like(q, _wide(q)))
    shape = q_BTHD.shape
    return _untile(tiles.queries, dq, shape), _untile(tiles.keys, dk, shape), _untile(tiles.keys, dv, shape)


def _in_chunks(compute: Callable, q_BTHD: jax.Array, *args: Any) -> Any:
    """``compute`` of arrays with a leading batch axis, of short sequences on one CPU a few at a time."""
    B, T, H, _ = q_BTHD.shape
    # Split over devices, the batch stays whole: a loop over it would gather it.
    if T > _SLAB or jax.device_count() > 1 or target_platform() != "cpu":
        return compute(q_BTHD, *args)
    # Each head by itself: from arrays of sequences and heads, cutting a tile takes as long as multiplying it.
    chunks = next(n for n in range(1, B * H + 1) if B * H % n == 0 and (B * H // n <= _SHORT_ROWS or n == B * H))

    def split(x: jax.Array) -> jax.Array:
        if x.ndim == 2:  # the documents' ids
            return jnp.repeat(x, H, 0).reshape(chunks, -1, T)
        return x.swapaxes(1, 2).reshape(chunks, -1, T, 1, x.shape[-1])

    parts = lax.map(lambda part: compute(*part), jax.tree.map(split, (q_BTHD, *args)))
    return jax.tree.map(lambda x: x.reshape(B, H, T, -1).swapaxes(1, 2), parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(
    q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, segments_BT: jax.Array | None, pattern: str, width: int
) -> jax.Array:
    return _attention_forward(q_BTHD, k_BTHD, v_BTHD, segments_BT, pattern, width)[0]


def _attention_forward(
    q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, segments_BT: jax.Array | None, pattern: str, width: int
) -> tuple[jax.Array, tuple]:
    def compute(*inputs: Any) -> tuple[jax.Array, jax.Array]:
        out_BTHD, lse_BTH1 = functools.reduce(_merge, [_band_forward(band, *inputs) for band in bands(pattern, width)])
        return out_BTHD.astype(q_BTHD.dtype), lse_BTH1

    inputs = q_BTHD, k_BTHD, v_BTHD, segments_BT
    out_BTHD, lse_BTH1 = _in_chunks(compute, *inputs)
    return out_BTHD, (*inputs, out_BTHD, lse_BTH1)


def _attention_backward(pattern: str, width: int, saved: tuple, dout_BTHD: jax.Array) -> tuple:
    *inputs, out_BTHD, lse_BTH1 = saved
    # As a contraction: a CPU sums the products of two arrays many times as slowly.
    delta_BTH1 = jnp.einsum("bthd,bthd->bth", *(x.astype(lse_BTH1.dtype) for x in (out_BTHD, dout_BTHD)))[..., None]

    def compute(*args: Any) -> list[jax.Array]:
        parts = [_band_backward(band, *args) for band in bands(pattern, width)]
        return [functools.reduce(jnp.add, part).astype(dout_BTHD.dtype) for part in zip(*parts, strict=True)]

    return *_in_chunks(compute, *inputs, dout_BTHD, lse_BTH1, delta_BTH1), None


_attention.defvjp(_attention_forward, _attention_backward)
