"""A sweep: runs beside each other, each resumable by itself, and the table that compares them.

Cells run in order, each in ``WORKDIR/cells/NAME``; one may start from another (``init_from = "cell:NAME"``). A row of the table
takes, among its choices of hyperparameters, the one of lowest validation loss, and gives mean and deviation over its seeds; a
column may also name the choice that it is of.

A figure comes from what a cell left: ``summary`` (`summary.json`), ``evaluation`` (`evaluation.json`) and ``circuit``
(`circuit.json`), which are made where a column asks for them, and ``curve``: the evaluations in its `metrics.jsonl` over the
target of the last one, as a list a column (`CURVE_COLUMNS`; ``seconds`` are of training, evaluations left out).
"""

import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from spdf_jax import processes
from spdf_jax.cloud.spool import url
from spdf_jax.config.sweep import CURVE_COLUMNS, Row, SweepConfig
from spdf_jax.errors import InputError
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.jobs.circuit import circuits, sizes
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.pages import sweep_page
from spdf_jax.jobs.study import run_study
from spdf_jax.jobs.train import train_with
from spdf_jax.processes import wait_for_first
from spdf_jax.report import write_sweep_report
from spdf_jax.report.records import read_run
from spdf_jax.training.feed import check_there
from spdf_jax.training.provenance import read_code
from spdf_jax.workdir import CIRCUIT_FILE, lock, made_workdir, read_json, write_atomically, write_json

CELLS = "cells"


class Value(NamedTuple):
    """A figure of a row: over the `seeds` runs of a choice, or absent (None)."""

    mean: float | None
    deviation: float
    seeds: int
    choice: str = ""


def run_sweep(config: SweepConfig, request: Request) -> None:
    """`train_cells`, or a study."""
    if config.study:
        run_study(config, config.study, request)
        return
    with request.training(config):
        keep_compiled(next(iter(config.cells.values())).data)
        processes.guard()
        train_cells(config, request.workdir, command=request.command, file=request.file, progress=not request.quiet)


def train_cells(
    config: SweepConfig, workdir: Path, *, command: str = "", file: str = "", progress: bool = True
) -> dict[str, Any]:
    """Runs, or resumes, all cells, evaluates those that were chosen, and writes ``table.json``, ``table.md``, ``report.html``.

    Args:
      config: the sweep.
      workdir: where everything is left.
      command: how it was started, for the reports.
      file: of the experiment, which every cell keeps.
      progress: show progress.

    Returns:
      The content of ``table.json``.

    Raises:
      InputError: anything the user can fix; cells that are finished stay.
    """
    if url(workdir) and jax.process_count() > 1:  # all of them read what the first has just written
        raise InputError(f"workdir {workdir}: a sweep of many processes needs a disk that all of them share")
    # All at once: a cell may begin hours after what it is made of was executed.
    code = {name: read_code(cell, file) for name, cell in config.cells.items()}
    with made_workdir(workdir), lock(workdir):
        for name, cell in config.cells.items():
            try:
                check_there(cell)
            except InputError as error:
                raise InputError(f"config.cells.{name}: {error}") from None
        if not (workdir / "table.json").exists():  # what the page so far is headed by
            write_json(workdir / "table.json", _names(config) | {"rows": []})
        summaries = {}
        with sweep_page(workdir) as page:
            for i, (name, cell) in enumerate(config.cells.items(), 1):
                print(f"[{i}/{len(config.cells)}] {name}", flush=True)
                folder = workdir / CELLS / name
                summaries[name] = train_with(cell, folder, code[name], command=command, progress=progress)
                page.update()
        write_table(config, workdir, [_row(config, workdir, row, summaries) for row in config.rows])
        return read_json(workdir / "table.json", "run the sweep again")


def _names(config: SweepConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in ("experiment", "variant", "title", "remark")}


def write_table(config: SweepConfig, workdir: Path, rows: list[dict[str, Any]]) -> None:
    """Writes and prints the table of the rows' cells."""
    first = rows[0] if rows else {}
    for row in rows:
        row["values"] = {
            c.header: _value(_records(row, c.choice), c.key, _records(first, c.choice), c.choice)._asdict()
            for c in config.columns
        }
    table = _markdown(config, rows) + (f"\n\n{config.remark}" if config.remark else "")
    write_json(workdir / "table.json", _names(config) | {"rows": rows})
    write_atomically(workdir / "table.md", f"# {config.title}\n\n{table}\n".encode())
    wait_for_first()
    print(f"\n{config.title}\n\n{table}\n\nReport: {write_sweep_report(workdir)}", flush=True)


def _best_choice(row: Row, summaries: dict[str, dict[str, Any]]) -> str:
    losses: dict[str, list[float]] = {}
    for label, cell in row.choices:
        losses.setdefault(label, []).append(summaries[cell]["val_loss"])
    return min(losses, key=lambda label: statistics.fmean(losses[label]))


def _row(config: SweepConfig, workdir: Path, row: Row, summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row's cells by the choices that its columns are of, with what they left."""
    best = _best_choice(row, summaries)
    choices = dict.fromkeys(column.choice for column in config.columns)
    groups = {choice: [cell for label, cell in row.choices if label == (choice or best)] for choice in choices}
    cells = dict.fromkeys(cell for group in groups.values() for cell in group)
    scored = [cell for column in config.columns if "evaluation." in column.key for cell in groups[column.choice]]
    records = {cell: _record(config, workdir, cell, evaluated=cell in scored) for cell in cells}
    return {"row": row.label, "choice": best if "" in groups else "", "groups": groups, "cells": records}


def _record(config: SweepConfig, workdir: Path, cell: str, *, evaluated: bool) -> dict[str, Any]:
    """What a cell left; evaluated once, if a column of it asks for that."""
    folder = workdir / CELLS / cell
    names = ["summary"]
    if evaluated:
        names.append("evaluation")
        if not (folder / "evaluation.json").exists():
            print(f"evaluating {cell}", flush=True)
            evaluate_checkpoint(config.cells[cell], folder)
    is_of_circuits = any("circuit." in column.key for column in config.columns)
    if is_of_circuits and not (folder / CIRCUIT_FILE).exists():
        print(f"looking for the circuits of {cell}", flush=True)
        circuits(config.cells[cell], folder)
    wait_for_first()
    fix = "delete it, and the same command makes it again"
    record = {name: read_json(folder / f"{name}.json", fix) for name in names} | {"curve": _curve(folder)}
    return record | ({"circuit": sizes(read_json(folder / CIRCUIT_FILE, fix))} if is_of_circuits else {})


def _curve(folder: Path) -> dict[str, list[float]]:
    run = read_run(folder)
    rows = [row for row in run.evaluation_rows if run.task(row) == run.task(run.evaluation_rows[-1])]
    seconds = run.training_seconds(rows)
    curve = {name: [row[name] for row in rows] for name in CURVE_COLUMNS if name != "seconds"}
    return curve if seconds is None else curve | {"seconds": seconds.tolist()}


def _records(row: dict[str, Any], choice: str) -> list[dict[str, Any]]:
    return [row["cells"][cell] for cell in row["groups"][choice]]


def _value(records: list[dict[str, Any]], key: str, first: list[dict[str, Any]], choice: str) -> Value:
    """A figure over a row's cells, each beside the cell of `first` in its place: row 1's of the same seed."""
    found = [_figure(record, key, first[min(i, len(first) - 1)]) for i, record in enumerate(records)]
    figures = [figure for figure in found if figure is not None]
    if len(figures) < len(found):
        return Value(None, 0.0, len(found), choice)
    return Value(statistics.fmean(figures), statistics.stdev(figures) if len(figures) > 1 else 0.0, len(found), choice)


def _figure(record: dict[str, Any], key: str, first: dict[str, Any]) -> float | None:
    """A cell's figure, see `Column.key`."""
    for operator in "/+":
        if operator in key:
            left, right = (_figure(record, part, first) for part in key.split(operator, 1))
            if left is None or right is None:
                return None
            return left / right if operator == "/" else left + right
    if "@" in key:
        wanted, along, level = re.split("[@=]", key)
        curve, target = record["curve"], _figure(first, level, first)
        if target is None or not {wanted, along} <= curve.keys():
            return None
        return reached(curve[wanted], curve[along], target)
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def reached(values: Sequence[float], along: Sequence[float], level: float) -> float | None:
    """What `values` is where `along` first reaches `level`, on the line between two points of a curve; None if it never does.

    >>> reached([0, 100, 200], [7.0, 5.0, 4.5], 4.75), reached([0, 100, 200], [7.0, 5.0, 4.5], 4.0)
    (150.0, None)
    """
    sign = 1 if along[-1] > along[0] else -1
    there = next((i for i, value in enumerate(along) if sign * (value - level) >= 0), None)
    if there is None:
        return None
    near = slice(max(there - 1, 0), there + 1)
    return float(np.interp(sign * level, [sign * value for value in along[near]], values[near]))


def _markdown(config: SweepConfig, rows: list[dict[str, Any]]) -> str:
    headers = ["", *(column.header for column in config.columns)]
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for row in rows:
        texts = [
            _text(Value(**row["values"][c.header]), c.format, c.relative, rows[0], c.header) for c in config.columns
        ]
        choice = f" ({row['choice']})" if row["choice"] else ""
        lines.append(f"| {row['row']}{choice} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _text(value: Value, spec: str, relative: bool, first: dict[str, Any], header: str) -> str:
    if value.mean is None:
        return "-"
    text = format(value.mean, spec) + (f" ± {format(value.deviation, spec)}" if value.deviation else "")
    reference = first["values"][header]["mean"]
    return f"{text} ({value.mean / reference:.3f})" if relative and reference else text
