"""How many weights each matrix keeps, as exact integers.

Sources: uniform, SPDF (arXiv 2303.10464, section 2); Erdos-Renyi, SET (Mocanu et al. 2018) with density
``eps * (n_in + n_out) / (n_in * n_out)``; ERK, RigL (arXiv 1911.11134), which counts the kernel's axes too. ``er_qkv`` is ER
as MST's code has it, where queries, keys and values lie side by side in one matrix, GPT-2's ``c_attn``: each of them has the
density of a matrix three times as wide.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from spdf_jax.errors import InputError
from spdf_jax.sparsity.patterns import parse_pattern

DISTRIBUTIONS = ("uniform", "er", "erk", "er_qkv")
# Kernels that lie side by side in GPT-2's ``c_attn``.
_QKV = re.compile(r"(^|/)attn_[qkv]/kernel$")
_beside = partial(_QKV.sub, r"\1attn_qkv/kernel")


@dataclass(frozen=True)
class MatrixGroup:
    """One sparse leaf: `count` weight matrices of `shape` each (count 1 unless layers are stacked)."""

    count: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Weights in one matrix."""
        return math.prod(self.shape)


def check_sparsity(sparsity: float, where: str = "sparsity") -> None:
    """Raises `InputError` unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise InputError(f"{where}: {sparsity} is outside [0, 1); it is the share of weights that are zero")


def target_counts(
    groups: Mapping[str, MatrixGroup], sparsity: float, distribution: str = "uniform", pattern: str = "unstructured"
) -> dict[str, int]:
    """Active weights of **one** matrix of every group, such as the pattern can have.

    Args:
      groups: the sparse leaves by name.
      sparsity: share of zeros over all groups together, in [0, 1); 1 - N/M or 0 for a pattern N:M.
      distribution: ``uniform`` (the same share in every matrix), ``er``, ``erk`` or ``er_qkv``.
      pattern: see `spdf_jax.sparsity.patterns`; blocks are counted whole.

    Returns:
      ``{name: active weights of one matrix}``. Uniform keeps ``N - round(sparsity * N)`` of N weights (or blocks).

    Raises:
      InputError: unknown distribution or pattern, sparsity out of range, a matrix that does not divide into the pattern,
        N:M with a distribution other than uniform.

    >>> target_counts({"w": MatrixGroup(12, (768, 3072))}, 0.75)
    {'w': 589824}
    >>> target_counts({"w": MatrixGroup(12, (768, 3072))}, 0.8, pattern="block128")
    {'w': 475136}
    """
    check_sparsity(sparsity)
    if distribution not in DISTRIBUTIONS:
        raise InputError(f"distribution: {distribution!r} is not one of {DISTRIBUTIONS}")
    parsed = parse_pattern(pattern)
    parsed.check_sparsity(sparsity)
    if parsed.m > 1 and distribution != "uniform":
        raise InputError(
            f"distribution: pattern {pattern} gives every matrix one density; use 'uniform', not {distribution!r}"
        )
    for name, group in groups.items():
        parsed.check_shape(group.shape, name, parsed.axis(name, group.shape))
    units = {name: group.size // parsed.unit_size for name, group in groups.items()}
    if distribution == "uniform":
        return {name: (n - round(sparsity * n)) * parsed.unit_size for name, n in units.items()}
    densities = _erdos_renyi(groups, 1 - sparsity, distribution)
    return {name: min(n, max(1, round(densities[name] * n))) * parsed.unit_size for name, n in units.items()}


def _erdos_renyi(groups: Mapping[str, MatrixGroup], density: float, distribution: str) -> dict[str, float]:
    """Solves for eps; matrices that would exceed density 1 become dense and the rest is solved again."""

    def raw(name: str) -> float:
        shape = groups[name].shape
        ends = shape if distribution == "erk" or len(shape) < 2 else shape[-2:]
        if distribution == "er_qkv" and _QKV.search(name):
            ends = (ends[0], sum(g.shape[-1] for other, g in groups.items() if _beside(other) == _beside(name)))
        return sum(ends) / math.prod(ends)

    dense: set[str] = set()
    budget = density * sum(g.count * g.size for g in groups.values())
    while True:
        rest = {name: g for name, g in groups.items() if name not in dense}
        left = budget - sum(groups[name].count * groups[name].size for name in dense)
        weight = sum(g.count * g.size * raw(name) for name, g in rest.items())
        eps = left / weight if weight else 0.0
        over = {name for name in rest if eps * raw(name) > 1}
        if not over:
            return {name: 1.0 if name in dense else eps * raw(name) for name in groups}
        dense |= over
