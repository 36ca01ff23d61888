"""A sweep: runs beside each other, each resumable by itself, and the table that compares them.

Cells run in order, each in ``WORKDIR/cells/NAME``; one may start from another (``init_from = "cell:NAME"``). A row of the table
takes, among its choices of hyperparameters, the one of lowest validation loss, and gives mean and deviation over its seeds.
"""

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

from spdf_jax.config import Row, SweepConfig
from spdf_jax.jobs import lock, make_workdir, train
from spdf_jax.plan import describe
from spdf_jax.report import write_sweep_report
from spdf_jax.tracking import write_atomically, write_json
from spdf_jax.use import evaluate_checkpoint

CELLS = "cells"


class Value(NamedTuple):
    """A figure of a row: over `seeds` runs, or absent (None)."""

    mean: float | None
    deviation: float
    seeds: int


def run_sweep(config: SweepConfig, workdir: Path, *, command: str = "", progress: bool = True) -> dict[str, Any]:
    """Runs, or resumes, all cells, evaluates those that were chosen, and writes ``table.json``, ``table.md``, ``report.html``.

    Args:
      config: the sweep.
      workdir: where everything is left.
      command: how it was started, for the reports.
      progress: show progress.

    Returns:
      The content of ``table.json``.

    Raises:
      InputError: anything the user can mend; cells that are finished stay.
    """
    make_workdir(workdir)
    with lock(workdir):
        summaries = {}
        for i, (name, cell) in enumerate(config.cells.items(), 1):
            print(f"[{i}/{len(config.cells)}] {name}", flush=True)
            summaries[name] = train(cell, workdir / CELLS / name, command=command, progress=progress)
        rows = []
        for row in config.rows:
            choice = _best_choice(row, summaries)
            chosen = [cell for label, cell in row.choices if label == choice]
            rows.append({"row": row.label, "choice": choice, "cells": {c: _record(config, workdir, c) for c in chosen}})
        write_table(config, workdir, rows)
        return json.loads((workdir / "table.json").read_text())


def write_table(config: SweepConfig, workdir: Path, rows: list[dict[str, Any]]) -> None:
    """Writes and prints the table of the rows' cells."""
    for row in rows:
        row["values"] = {c.header: _value(list(row["cells"].values()), c.key)._asdict() for c in config.columns}
    table = _markdown(config, rows)
    write_json(
        workdir / "table.json",
        {"experiment": config.experiment, "variant": config.variant, "title": config.title, "rows": rows},
    )
    write_atomically(workdir / "table.md", f"# {config.title}\n\n{table}\n".encode())
    print(f"\n{config.title}\n\n{table}\n\nReport: {write_sweep_report(workdir)}", flush=True)


def describe_sweep(config: SweepConfig) -> str:
    """The table of ``--job plan``, cell by cell."""
    return "\n\n".join(f"== {name}\n{describe(cell)}" for name, cell in config.cells.items())


def _best_choice(row: Row, summaries: dict[str, dict[str, Any]]) -> str:
    losses: dict[str, list[float]] = {}
    for label, cell in row.choices:
        losses.setdefault(label, []).append(summaries[cell]["val_loss"])
    return min(losses, key=lambda label: statistics.fmean(losses[label]))


def _record(config: SweepConfig, workdir: Path, cell: str) -> dict[str, Any]:
    """Summary and evaluation of a cell; evaluated once."""
    folder = workdir / CELLS / cell
    if not (folder / "evaluation.json").exists():
        print(f"evaluating {cell}", flush=True)
        evaluate_checkpoint(config.cells[cell], folder)
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "evaluation")}


def _value(records: list[dict[str, Any]], key: str) -> Value:
    """A figure over a row's cells; ``a/b`` is a quotient, ``a+b`` a sum, of dotted keys."""
    found = [v for v in (_figure(record, key) for record in records) if v is not None]
    if len(found) < len(records):
        return Value(None, 0.0, len(records))
    return Value(statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def _figure(record: dict[str, Any], key: str) -> float | None:
    for operator in "/+":
        if operator in key:
            left, right = (_figure(record, part) for part in key.split(operator, 1))
            if left is None or right is None:
                return None
            return left / right if operator == "/" else left + right
    value: Any = record
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) and math.isfinite(value) else None


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
    text = format(value.mean, spec) + (f" ± {format(value.deviation, spec)}" if value.seeds > 1 else "")
    reference = first["values"][header]["mean"]
    return f"{text} ({value.mean / reference:.3f})" if relative and reference else text
