"""Curves over training progress p in [0, 1]: sparsity, and the share of weights that a topology step exchanges."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import check_sparsity


class Curve(NamedTuple):
    """Sparsity as a function of progress; where its stages start (the drop fraction restarts there); and what lies in slopes.

    >>> three_phases(0.9, 0.1, 0.75, 0.9).turns
    (0.1, 0.75, 0.9)
    """

    value: Callable[[float], float]
    stages: tuple[float, ...] = (0.0,)
    ramps: tuple[tuple[float, float], ...] = ()

    def __call__(self, progress: float) -> float:
        return self.value(progress)

    @property
    def turns(self) -> tuple[float, ...]:
        """Where the curve jumps or bends, besides 0; it is constant after the last one."""
        return tuple(sorted({*self.stages, *(end for ramp in self.ramps for end in ramp)} - {0.0}))

    def stage(self, progress: float) -> tuple[float, float]:
        """Start and end of the stage that holds `progress`."""
        ends = (*self.stages[1:], 1.0)
        return max((s, e) for s, e in zip(self.stages, ends, strict=True) if s <= progress or s == 0.0)


def constant(sparsity: float) -> Curve:
    """The same sparsity throughout (SPDF, SET, RigL)."""
    check_sparsity(sparsity)
    return Curve(lambda p: sparsity)


def linear(sparsity: float, start: float = 0.0, end: float = 1.0) -> Curve:
    """From 0 at `start` to `sparsity` at `end` in a straight line (Gao et al. 2025, arXiv 2511.13653).

    >>> linear(0.75, 0.0, 0.5)(0.25)
    0.375
    """
    check_sparsity(sparsity)
    _check_order("linear", (0.0, start, end, 1.0))
    slopes = _slopes((start, end))
    return Curve(lambda p: sparsity * min(1.0, (p - start) / (end - start) if slopes else 1.0), ramps=slopes)


def cubic(sparsity: float, start: float = 0.0, end: float = 1.0) -> Curve:
    """Gradual magnitude pruning's ramp: ``s (1 - (1 - (p - start)/(end - start))^3)`` (Zhu & Gupta, arXiv 1710.01878)."""
    check_sparsity(sparsity)
    _check_order("cubic", (0.0, start, end, 1.0))
    return Curve(lambda p: sparsity * _cubic_in(p, start, end), ramps=_slopes((start, end)))


def three_phases(sparsity: float, warmup_end: float, ultra_end: float, restoration_end: float) -> Curve:
    """MST: cubic rise from 0 on [0, warmup_end], hold to ultra_end, its mirror image down to 0 at restoration_end.

    A warm-up or a restoration without length is a jump; whatever the boundaries, it ends dense.

    Source: Hu et al., TMLR 2025 (arXiv 2408.11746), abstract; the paper's own values are not public, so these are ours.
    """
    check_sparsity(sparsity)
    _check_order("three_phases", (0.0, warmup_end, ultra_end, restoration_end, 1.0))

    def value(p: float) -> float:
        if p >= restoration_end:
            return 0.0
        if p <= ultra_end:
            return sparsity * _cubic_in(p, 0.0, warmup_end)
        # Mirror image in time: slow to leave ultra-sparsity is what a reversed cubic_in gives.
        return sparsity * _cubic_in(ultra_end + restoration_end - p, ultra_end, restoration_end)

    stages = tuple(dict.fromkeys((0.0, warmup_end, ultra_end, restoration_end)))
    return Curve(value, stages, _slopes((0.0, warmup_end), (ultra_end, restoration_end)))


def step_table(table: Mapping[float, float]) -> Curve:
    """``{progress: sparsity}``, each value holding from its progress to the next (the MST code's form)."""
    points = sorted((float(p), float(s)) for p, s in table.items())
    if not points or points[0][0] != 0.0:
        raise InputError(f"step_table: needs an entry at progress 0, got {dict(table)}")
    _check_order("step_table", (*(p for p, _ in points), 1.0))
    for p, s in points:
        check_sparsity(s, f"step_table at progress {p}")
    return Curve(lambda p: next(s for q, s in reversed(points) if q <= max(p, 0.0)), tuple(p for p, _ in points))


def alternate(sparsity: float, warmup_end: float, alternation_end: float, cycles: int) -> Curve:
    """AC/DC: dense to `warmup_end`, then `cycles` times sparse and dense in equal turns, sparse from `alternation_end` on.

    Source: Peste et al., NeurIPS 2021 (arXiv 2106.12379), algorithm 1.

    >>> curve = alternate(0.9, 0.2, 0.6, cycles=2)
    >>> [curve(p) for p in (0.1, 0.25, 0.35, 0.45, 0.55, 0.65, 1.0)]
    [0.0, 0.9, 0.0, 0.9, 0.0, 0.9, 0.9]
    """
    check_sparsity(sparsity)
    _check_order("alternate", (0.0, warmup_end, alternation_end, 1.0))
    if cycles < 1:
        raise InputError(f"alternate: cycles {cycles} must be at least 1")
    if warmup_end == alternation_end:
        raise InputError(f"alternate: from {warmup_end:g} to {alternation_end:g} no turn has room; let it end later")
    turn = (alternation_end - warmup_end) / (2 * cycles)
    # Rounded, so that 0.2 + 0.1 is the 0.3 that a step divided by all steps gives.
    turns = {round(warmup_end + i * turn, 12): 0.0 if i % 2 else sparsity for i in range(2 * cycles)}
    return step_table({0.0: 0.0} | turns | {alternation_end: sparsity})


def cosine_drop_fraction(initial: float, progress: float, start: float, end: float) -> float:
    """``initial/2 (1 + cos(pi (p - start)/(end - start)))``: RigL's decay, restarted at each stage by MST."""
    if end <= start:
        return 0.0
    return initial / 2 * (1 + math.cos(math.pi * min(1.0, max(0.0, (progress - start) / (end - start)))))


def turning_steps(curve: Curve, total_steps: int, update_every_steps: int, name: str) -> list[int]:
    """Where a schedule turns, in steps of a phase, and the quarters of ramps that the interval would make jumps of.

    Raises:
      InputError: a phase too short for them; `name` is what the schedule is called.

    >>> turning_steps(three_phases(0.9, 0.1, 0.75, 0.9), 1000, 100, "three_phases")
    [25, 50, 75, 100, 750, 787, 825, 862, 900]
    """
    at = {0.0: 0}
    for turn in curve.turns:
        near = math.ceil(turn * total_steps)  # which the product's rounding may put one off
        at[turn] = min(total_steps - 1, next(t for t in (near - 1, near, near + 1) if t / total_steps >= turn))
    crowded = [(p, q) for p, q in pairwise(at) if at[q] <= at[p]]
    crowded += [(p, q) for p, q in curve.ramps if at[q] < at[p] + 2]
    for p, q in crowded:
        raise InputError(
            f"sparsity.schedule: {name!r} has no room from {p:g} to {q:g} of a phase of {total_steps} steps; make the "
            f"phase longer, or its turns fewer or further apart"
        )
    quarters = {
        at[p] + n * (at[q] - at[p]) // 4
        for p, q in curve.ramps
        if at[q] - at[p] < 2 * update_every_steps
        for n in (1, 2, 3)
    }
    return sorted({*at.values(), *quarters} - {0})


def _cubic_in(p: float, start: float, end: float) -> float:
    if p >= end:
        return 1.0
    return 1 - (1 - (p - start) / (end - start)) ** 3 if p > start else 0.0


def _slopes(*ramps: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    return tuple((start, end) for start, end in ramps if start < end)


def _check_order(where: str, points: tuple[float, ...]) -> None:
    if list(points) != sorted(points):
        raise InputError(f"{where}: progress points must rise within [0, 1], got {points[1:-1]}")
