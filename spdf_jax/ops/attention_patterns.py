"""Causal attention patterns: what they attend to, and how much that is.

A pattern is defined on the distance ``d = i - j >= 0`` from a query at position i to a key at j, and a width w:

=================  ===================================================================================
``causal``         every d
``local``          d < w
``strided``        d mod w = 0
``local_strided``  either of the two
``fixed``          the own block of w positions, and the last position of every earlier block
=================  ===================================================================================

A pattern is also a union of *bands*: fold the positions, then attend ``near <= d < far`` within each folded row, which is
how `spdf_jax.ops.attention` computes it. Folding by residue modulo w makes ``strided`` dense; folding by block makes the own
block of ``fixed`` dense.

Shape legend: B batch, T positions, H heads, D head size; folded: G rows of L positions.

Source: Child et al. 2019 (arXiv 1904.10509) as in ``hupihe/Mixed-Sparsity-Training``.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spdf_jax.errors import InputError

PATTERNS = ("causal", "local", "strided", "local_strided", "fixed")


def attends(pattern: str, i: Any, j: Any, width: int) -> Any:
    """Whether a query at position i attends to a key at j: the definition, for integer arrays of NumPy or JAX that broadcast.

    >>> attends("local", np.array([5]), np.arange(6), 2).tolist()
    [False, False, False, False, True, True]
    """
    d = i - j
    kept = {
        "causal": d >= 0,
        "local": d < width,
        "strided": d % width == 0,
        "local_strided": (d < width) | (d % width == 0),
        "fixed": (i // width == j // width) | (j % width == width - 1),
    }
    return kept[pattern] & (d >= 0)


def pattern_mask(pattern: str, length: int, width: int) -> np.ndarray:
    """The definition of a pattern, as a dense mask for tests and pictures.

    Args:
      pattern: one of ``PATTERNS``.
      length: number of positions T.
      width: the pattern's width in positions.

    Returns:
      mask_TT, bool: whether query i (row) attends to key j (column).

    Raises:
      InputError: unknown pattern, length or width below 1.

    >>> pattern_mask("fixed", 5, 2).astype(int)
    array([[1, 0, 0, 0, 0],
           [1, 1, 0, 0, 0],
           [0, 1, 1, 0, 0],
           [0, 1, 1, 1, 0],
           [0, 1, 0, 1, 1]])
    """
    check_pattern(pattern, length, width)
    i, j = np.ogrid[:length, :length]
    return attends(pattern, i, j, width)


def attended_pairs(pattern: str, length: int, width: int) -> int:
    """Exact number of (query, key) pairs of a pattern, in closed form.

    Args:
      pattern: one of ``PATTERNS``.
      length: number of positions T.
      width: the pattern's width in positions.

    Returns:
      ``pattern_mask(pattern, length, width).sum()``, without the array.

    Raises:
      InputError: unknown pattern, length or width below 1.

    >>> attended_pairs("causal", 1024, 128), attended_pairs("local_strided", 1024, 128)
    (524800, 126528)
    """
    check_pattern(pattern, length, width)
    blocks, rest = divmod(length, width)
    reach = min(length, width)
    local = _triangle(reach) + (length - reach) * width
    strided = width * _triangle(blocks) + rest * (blocks + 1)
    return {
        "causal": _triangle(length),
        "local": local,
        "strided": strided,
        "local_strided": local + strided - length,  # the two share exactly d = 0
        "fixed": blocks * _triangle(width) + _triangle(rest) + width * _triangle(blocks - 1) + rest * blocks,
    }[pattern]


def causal_share(pattern: str, length: int, width: int) -> float:
    """Share of the causal triangle that a pattern attends to.

    Args:
      pattern: one of ``PATTERNS``.
      length: number of positions T.
      width: the pattern's width in positions.

    Returns:
      ``attended_pairs`` of the pattern over that of ``causal``, in (0, 1].

    Raises:
      InputError: unknown pattern, length or width below 1.

    >>> [round(causal_share(pattern, 1024, 128), 3) for pattern in PATTERNS]
    [1.0, 0.234, 0.009, 0.241, 0.133]
    """
    return attended_pairs(pattern, length, width) / attended_pairs("causal", length, width)


class Band(NamedTuple):
    """Attention over ``near <= d < far`` within each folded row; queries and keys may be folded differently.

    Attributes:
      fold_queries, fold_keys: linear functions x_BTHD -> x_BGLHD.
      near, far: distances in folded positions; without ``far``, all from ``near`` on.
    """

    fold_queries: Callable[[jax.Array], jax.Array]
    fold_keys: Callable[[jax.Array], jax.Array]
    near: int = 0
    far: int | None = None


def bands(pattern: str, width: int) -> list[Band]:
    """The pattern as disjoint bands. Folding pads the end of rows, so causality hides it from every real query.

    Args:
      pattern: one of ``PATTERNS``.
      width: the pattern's width in positions.

    Returns:
      The bands, of which the first attends to distance 0.

    >>> [(band.near, band.far) for band in bands("local_strided", 128)]
    [(0, 128), (1, None)]
    """
    # Distance 0 is in both halves of local_strided and leaves the second; fixed leaves out the query's own block.
    blocks = functools.partial(_fold_blocks, width=width)
    residues = functools.partial(_fold_residues, width=width)
    summaries = functools.partial(_fold_summaries, width=width)
    local = Band(_fold_nothing, _fold_nothing, far=width)
    return {
        "causal": [Band(_fold_nothing, _fold_nothing)],
        "local": [local],
        "strided": [Band(residues, residues)],
        "local_strided": [local, Band(residues, residues, near=1)],
        "fixed": [Band(blocks, blocks), Band(residues, summaries, near=1)],
    }[pattern]


def check_pattern(pattern: str, length: int, width: int) -> None:
    """Raises `InputError` for an unknown pattern, or a length or width below 1."""
    if pattern not in PATTERNS:
        raise InputError(f"attention pattern {pattern!r} is unknown: use one of {', '.join(PATTERNS)}")
    for name, value in (("length", length), ("width", width)):
        if value != int(value) or value < 1:
            raise InputError(f"attention {name} is {value!r}: it must be an integer of at least 1")


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _fold_nothing(x_BTHD: jax.Array) -> jax.Array:
    return x_BTHD[:, None]


def _fold_blocks(x_BTHD: jax.Array, width: int) -> jax.Array:
    """Row g holds block g."""
    B, T, H, D = x_BTHD.shape
    return jnp.pad(x_BTHD, ((0, 0), (0, -T % width), (0, 0), (0, 0))).reshape(B, -1, width, H, D)


def _fold_residues(x_BTHD: jax.Array, width: int) -> jax.Array:
    """Row g holds the positions that are g modulo the width, one of each block."""
    return _fold_blocks(x_BTHD, width).swapaxes(1, 2)


def _fold_summaries(x_BTHD: jax.Array, width: int) -> jax.Array:
    """Every row holds the last position of each block."""
    x_BGLHD = _fold_residues(x_BTHD, width)
    return jnp.broadcast_to(x_BGLHD[:, -1:], x_BGLHD.shape)
