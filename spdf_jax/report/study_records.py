"""What a study measured, read from its ``study.json``, and how its rows compare at equal tokens, FLOPs and seconds.

A row is compared with the reference method's rows of its group, seed by seed, as seeds order the data alike. At equal tokens:
with the row of as many. At equal FLOPs or seconds: with the loss that the reference has there, on the line (over the logarithm
of cost) between its rows of different lengths, each with a learning-rate schedule of its own; outside of them there is none.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spdf_jax.errors import InputError, reading
from spdf_jax.report.intervals import Interval, along, interval
from spdf_jax.workdir import read_json

RECORD = "study.json"
#: What is given alike, as a cell's facts call it.
BUDGETS = {"tokens": "tokens", "flops": "train_flops", "seconds": "seconds"}
#: By how much a budget may be over the reference's last and count as that: within a step, or the noise of seconds.
_SLACK = {"tokens": 1e-3, "flops": 1e-3, "seconds": 0.02}


@dataclass(frozen=True)
class StudyRow:
    """A row: a method at a length, its choice and what else was tried, and its cells in the order of the seeds.

    `weights` are those of the layers' matrices, zeros included; `sparsity` is None where it is not one throughout.
    """

    label: str
    method: str
    group: str
    choice: str
    tried: Mapping[str, str]
    cells: Sequence[str]
    weights: int
    sparsity: float | None


@dataclass(frozen=True)
class Study:
    """A study; `cells` are the facts of each by its name, `facts` what is said of the study itself."""

    rows: Sequence[StudyRow]
    cells: Mapping[str, Mapping[str, Any]]
    facts: Mapping[str, Any]

    def values(self, row: StudyRow) -> dict[str, float]:
        """What the study measures, by seed; absent where a cell has none."""
        key = "measure" if self.facts["measure"].startswith("evaluation.") else "val_loss"
        found = {_seed(name): self.cells[name].get(key) for name in row.cells}
        return {seed: float(value) for seed, value in found.items() if value is not None}

    def mean(self, row: StudyRow) -> Interval | None:
        """Of what it measures, over seeds."""
        return interval(list(self.values(row).values()))

    def cost(self, row: StudyRow, budget: str) -> float:
        """Of a cell of the row, with those of the run that it started from; the mean over seeds."""
        key = BUDGETS[budget]
        return statistics.fmean(self.cells[name][key] + _before(self.cells[name], key) for name in row.cells)

    def references(self, row: StudyRow) -> list[StudyRow]:
        """The reference method's rows of the same group that have cells."""
        wanted = self.facts["reference"], row.group
        return [other for other in self.rows if (other.method, other.group) == wanted and other.cells]

    def difference(self, row: StudyRow, budget: str) -> Interval | None:
        """How much more a row has than the reference at an equal budget; None where that has no answer."""
        others, ours = self.references(row), self.values(row)
        if not ours or row in others:
            return None
        if budget == "tokens":
            others = [one for one in others if abs(self.cost(one, budget) / self.cost(row, budget) - 1) < 1e-3]
        costs = [self.cost(one, budget) for one in others]
        theirs = [self.values(one) for one in others]
        seeds = [seed for seed in ours if all(seed in values for values in theirs)]
        found = [
            ours[seed] - at
            for seed in (seeds if others else ())
            if (at := along(costs, [values[seed] for values in theirs], self.cost(row, budget), _SLACK[budget]))
            is not None
        ]
        return interval(found)


def _seed(name: str) -> str:
    return name.rpartition("-")[2]


def _before(cell: Mapping[str, Any], key: str) -> float:
    before = cell.get("before", {})
    return float(before.get("wall_seconds" if key == "seconds" else key, 0))


def read_study(path: Path) -> Study:
    """A study from its record.

    Args:
      path: of ``study.json``, or of the folder with it.

    Raises:
      InputError: it is not there, or is none.
    """
    file = path / RECORD if path.is_dir() else path
    fix = "give the file of a study, or run it"
    found = read_json(file, fix)
    with reading(f"{file}: not of a study", fix):
        rows = [
            StudyRow(
                row["row"],
                row["method"],
                row["group"],
                row["choice"],
                dict(row["tried"]),
                tuple(row["cells"]),
                int(row["weights"]),
                row["sparsity"],
            )
            for row in found["rows"]
        ]
        facts = {key: value for key, value in found.items() if key not in ("rows", "cells")}
        names = {name for row in rows for name in (*row.cells, *row.tried.values())}
        if not {"measure", "reference", "unit", "title", "answers"} <= facts.keys():
            raise KeyError("measure")
    if missing := sorted(names - found["cells"].keys()):
        raise InputError(f"{file}: names cells that are not in it ({missing[0]}, ...); {fix}")
    return Study(rows, found["cells"], facts)
