"""What a run or a sweep recorded, read from its folder."""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from spdf_jax.config.read import default_config, of_fit
from spdf_jax.config.run import LoopConfig, flat
from spdf_jax.errors import InputError, reading
from spdf_jax.report.words import setting
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.training.metrics import check_rows, read_metrics
from spdf_jax.workdir import (
    CHECKPOINTS,
    CONFIG_FILE,
    EVALUATION_FILE,
    GENERATIONS_FILE,
    METRICS_FILE,
    PICTURES_FOLDER,
    PROVENANCE_FILE,
    SUMMARY_FILE,
    in_use,
    read_json,
)

Row = Mapping[str, Any]
#: Connections into each output and out of each input of a matrix.
Degrees = tuple[np.ndarray, np.ndarray]

_NAMES = ("experiment", "variant", "variants", "phases", "command", "fit")


@dataclass(frozen=True)
class Run:
    """What a run recorded.

    `numbers` is `summary.json`, and before there is one, what the rows say so far; `scores` is `evaluation.json`.
    `starts` is of `provenance.json`; `pictures` (images of densities) and `degrees` are by step, then by leaf path.
    `running` is None where nobody knows; `saved_step` is that of the newest checkpoint, 0 before the first.
    """

    config: Mapping[str, Any]
    numbers: Mapping[str, Any]
    scores: Mapping[str, Any]
    generations: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    train_rows: Sequence[Row]
    evaluation_rows: Sequence[Row]
    topology_rows: Sequence[Row]
    pictures: Mapping[int, Mapping[str, np.ndarray]]
    degrees: Mapping[int, Mapping[str, Degrees]]
    running: bool | None = False
    saved_step: int = 0

    @property
    def name(self) -> str:
        """Experiment and variant."""
        return f"{self.config['experiment']}: {self.config['variant']}"

    @property
    def loss_unit(self) -> str:
        """Of its losses; "" of a model of the caller's own (`spdf_jax.fit`), which may be of anything."""
        return "" if of_fit(self.config) else "nats/token"

    @cached_property
    def all_rows(self) -> list[Row]:
        """Every row, by step."""
        return sorted([*self.train_rows, *self.evaluation_rows, *self.topology_rows], key=lambda row: row["step"])

    @cached_property
    def max_sparsity(self) -> float:
        """The highest sparsity any row saw; 0 for a run without masks."""
        return max((row["sparsity"] for row in self.all_rows), default=0.0)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is saved: no masks, and no attention pattern that skips work."""
        return self.max_sparsity <= 0 and self.numbers.get("flops_reduction", 1.0) < 1.005

    @property
    def is_finished(self) -> bool:
        """Whether it has its summary."""
        return "status" in self.numbers

    @property
    def failure(self) -> Mapping[str, Any] | None:
        """Step, time and reason, if that is how its last start ended."""
        return None if self.running or not self.starts else self.starts[-1].get("failure")

    @property
    def status(self) -> str:
        """Finished, or what became of it and how far, and what of its rows is lost."""
        state = {True: "running", False: "failed" if self.failure else "interrupted", None: "unfinished"}[self.running]
        step = self.failure["step"] if self.failure else self.numbers.get("steps")
        status = f"{state}, nothing logged yet" if step is None else f"{state}, at step {step:,}"
        if self.is_finished:
            status = str(self.numbers["status"])
        # Every run begins with an evaluation at step 0, but for one of `spdf_jax.fit` that has nothing to evaluate on.
        begins = self.all_rows and (self.loss_unit or self.evaluation_rows)
        first = self.all_rows[0]["step"] if begins else 0
        return f"{status}; the rows before step {first:,} are lost" if first else status

    def task(self, row: Row) -> str:
        """The task whose target tokens a row's loss is over; "" for text."""
        return str(self.config.get(row["phase"], {}).get("task", {}).get("name", ""))

    def training_seconds(self, rows: Sequence[Row]) -> np.ndarray | None:
        """The training time at each of the rows, from tokens and tokens per second; evaluations are not in it.

        None where the rows do not say. After a restart the first interval is taken at the rate of its second part.
        """
        rates = np.array([row.get("tokens_per_second", 0) for row in self.train_rows], float)
        if not rates.size or rates.min() <= 0:
            return None
        tokens = np.array([0, *(row["tokens"] for row in self.train_rows)], float)
        seconds = np.concatenate([[0], np.cumsum(np.diff(tokens) / rates)])
        return np.interp([row["tokens"] for row in rows], tokens, seconds)


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


def read_run(workdir: Path, running: bool | None = None) -> Run:
    """Reads a run's folder.

    Args:
      workdir: of the run.
      running: whether it runs; by default its lock tells.

    Raises:
      InputError: the folder holds no run, or a file in it cannot be read.
    """
    rows = read_metrics(workdir)
    summary = _read_json(workdir / SUMMARY_FILE) or {}
    if "rows" in summary:
        check_rows(workdir / METRICS_FILE, summary["rows"], "the finished run wrote")
    config = _read_json(workdir / CONFIG_FILE)
    if config is None or not {"experiment", "variant"} <= config.keys():
        raise InputError(
            f"{workdir / 'config.json'}: missing or without experiment and variant; give the --workdir of a run"
        )
    numbers = {**_numbers_so_far(rows), **summary}
    arrays = _read_arrays(workdir)
    return Run(
        config=config,
        numbers={key: number for key, number in numbers.items() if number is not None},
        scores=_read_json(workdir / EVALUATION_FILE) or {},
        generations=_read_generations(workdir / GENERATIONS_FILE),
        starts=(_read_json(workdir / PROVENANCE_FILE) or {}).get("starts", ()),
        train_rows=[row for row in rows if "loss" in row],
        evaluation_rows=[row for row in rows if "val_loss" in row],
        topology_rows=[row for row in rows if row.get("density")],
        pictures={step: {k: a for k, a in found.items() if a.ndim == 2} for step, found in arrays.items()},
        degrees={step: _degrees(found) for step, found in arrays.items()},
        running=in_use(workdir) if running is None else running,
        saved_step=max((int(p.name) for p in (workdir / CHECKPOINTS).glob("*") if p.name.isdecimal()), default=0),
    )


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
    table = _read_json(workdir / "table.json")
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


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value and default of everything in a config that is not at its default; names and command left out."""
    variant, phases = config["variant"], tuple(config.get("phases", ()))
    if of_fit(config):
        sections = {"sparsity": dataclasses.asdict(SparsityConfig()), "loop": dataclasses.asdict(LoopConfig())}
    else:
        sections = default_config(config["experiment"], variant, variants=(variant,), phases=phases).to_dict()
    defaults = flat(json.loads(json.dumps(sections)))
    ours = flat({key: value for key, value in config.items() if key not in _NAMES})
    return [
        (key, setting(value), setting(defaults[key]) if key in defaults else "none")
        for key, value in ours.items()
        if key not in defaults or defaults[key] != value
    ]


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which configs of the same sections differ; names and command left out."""
    flats = [flat({key: value for key, value in config.items() if key not in _NAMES}) for config in configs]
    keys = dict.fromkeys(key for values in flats for key in values)
    return [key for key in keys if any(values.get(key) != flats[0].get(key) for values in flats)]


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


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    return read_json(path, "restore the file or run the job again") if path.is_file() else None


def _read_generations(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with reading(f"{path}: not generated texts", "run --job evaluate again"):
        # Not splitlines: a text may hold other characters that count as line ends there.
        found = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        return [{key: one[key] for key in ("context", "text", "references")} for one in found]


def _read_arrays(workdir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Step -> name -> array, of all mask pictures and degrees."""
    arrays = {}
    for path in sorted((workdir / PICTURES_FOLDER).glob("step_*.npz")):
        with (
            reading(f"{path}: not a mask picture", "delete it and write the report again"),
            path.open("rb") as opened,
            np.load(opened, allow_pickle=False) as file,
        ):
            arrays[int(path.stem.removeprefix("step_"))] = {name: file[name] for name in file.files}
    return arrays


def _degrees(arrays: Mapping[str, np.ndarray]) -> dict[str, Degrees]:
    """Leaf -> (into each output, out of each input), from the arrays LEAF:in and LEAF:out."""
    leaves = [name.removesuffix(":in") for name, array in arrays.items() if name.endswith(":in") and array.ndim == 1]
    return {leaf: (arrays[f"{leaf}:in"], arrays[f"{leaf}:out"]) for leaf in leaves if f"{leaf}:out" in arrays}


def _numbers_so_far(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary's numbers, from the rows alone."""
    numbers: dict[str, Any] = {}
    for row in rows:
        numbers["steps"] = row["step"]
        counted = ("tokens", "padded_tokens", "topology_tokens")
        numbers |= {key: row[key] for key in (*counted, "sparsity", "tokens_per_second", "val_loss") if key in row}
        if "train_flops" in row:
            numbers |= {"train_flops": row["train_flops"], "dense_flops": row["dense_flops"]}
        if "val_loss" in row and row["step"] == 0:
            numbers["initial_val_loss"] = row["val_loss"]
    if "train_flops" in numbers and numbers["train_flops"] > 0:
        numbers["flops_reduction"] = numbers["dense_flops"] / numbers["train_flops"]
    return numbers
