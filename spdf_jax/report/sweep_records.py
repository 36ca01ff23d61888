"""What a sweep recorded, read from its folder: its table and its runs."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from spdf_jax.errors import InputError, reading
from spdf_jax.report.records import Run, optional_json, read_run
from spdf_jax.workdir import CONFIG_FILE, METRICS_FILE, in_use


class Value(NamedTuple):
    """A figure of a table: mean and deviation over as many seeds of a choice; no mean where it is absent."""

    mean: float | None
    deviation: float
    seeds: int
    choice: str = ""


@dataclass(frozen=True)
class TableRow:
    """A row of a sweep's table: label, the choice it took, its cells' records (summary, evaluation) and its figures.

    `groups` are its cells by the choices that figures are of; "" is the choice it took.
    """

    label: str
    choice: str
    cells: Mapping[str, Mapping[str, Any]]
    groups: Mapping[str, Sequence[str]]
    values: Mapping[str, Value]

    def train_flops(self, choice: str) -> float:
        """Counted FLOPs of a cell of a choice, with those of the run that it started from; the mean over seeds."""
        summaries = [self.cells[name]["summary"] for name in self.groups[choice]]
        return float(np.mean([s["train_flops"] + s.get("before", {}).get("train_flops", 0) for s in summaries]))


@dataclass(frozen=True)
class Sweep:
    """What a sweep recorded: its table (no rows before the end) and its cells, by name."""

    title: str
    remark: str
    name: str
    rows: Sequence[TableRow]
    cells: Mapping[str, Run]
    reports: Mapping[str, str]
    running: bool | None = False

    @property
    def is_finished(self) -> bool:
        """Whether there is a table, and every cell is finished."""
        return bool(self.rows) and all(run.is_finished for run in self.cells.values())

    @property
    def main_scores(self) -> list[str]:
        """Of every choice that columns are of, the first column that has figures."""
        values = self.rows[0].values if self.rows else {}
        found = [h for h in values if any(row.values[h].mean is not None for row in self.rows)]
        return list({values[h].choice: h for h in reversed(found)}.values())[::-1]

    def page_of(self, cell: str) -> str:
        """The address of a cell's page, relative to the sweep's; "" where it has none."""
        return self.reports.get(cell, "")


def address(workdir: Path, beside: Path) -> str:
    """Of the page of a run, on a page in the folder `beside`.

    >>> address(Path("runs/my 1"), Path("runs/compare"))
    '../my%201/report.html'
    """
    return quote(Path(os.path.relpath(workdir / "report.html", beside)).as_posix())


def read_sweep(workdir: Path, running: bool | None = None, *, beside: Path | None = None) -> Sweep:
    """Reads a sweep's folder, finished or not: the cells that are there, and the table if there is one.

    Args:
      workdir: of the sweep.
      running: whether it runs; by default its lock tells.
      beside: the folder of the page that links to those of the cells, by default `workdir`.

    Raises:
      InputError: the folder holds no cell that has begun, or a file in it cannot be read.
    """
    folders = sorted(path.parent for path in (workdir / "cells").glob(f"*/{METRICS_FILE}"))
    begun = [folder for folder in folders if (folder / CONFIG_FILE).is_file()]
    if not begun:
        raise InputError(f"{workdir / 'cells'}: no run has begun there; give the --workdir of a sweep, or start it")
    cells = {folder.name: read_run(folder) for folder in begun}
    table = optional_json(workdir / "table.json")
    name = next(iter(cells.values())).name
    return Sweep(
        title=str(table["title"]) if table and "title" in table else name,
        remark=str(table["remark"]) if table and "remark" in table else "",
        name=name,
        rows=_read_rows(workdir / "table.json", table, cells) if table else [],
        cells=cells,
        reports={
            folder.name: address(folder, beside or workdir) for folder in begun if (folder / "report.html").is_file()
        },
        running=in_use(workdir) if running is None else running,
    )


def _read_rows(path: Path, table: Mapping[str, Any], cells: Mapping[str, Run]) -> list[TableRow]:
    with reading(f"{path}: not a sweep's table", "delete it and run the sweep again"):
        rows = [
            TableRow(
                row["row"],
                row["choice"],
                {name: record for name, record in row["cells"].items() if record["summary"]["train_flops"] >= 0},
                row.get("groups") or {"": list(row["cells"])},
                {header: Value(**value) for header, value in row["values"].items()},
            )
            for row in table["rows"]
        ]
    if missing := {name for row in rows for name in row.cells} - cells.keys():
        raise InputError(f"{path}: names cells that are not there ({', '.join(sorted(missing))}); run the sweep again")
    return rows
