"""A study: a sweep whose choices are made on one seed and measured on others, see `spdf_jax.config.sweep.StudyConfig`.

Each row's choice is the one of lowest validation loss among cells of the sweep's own seed; then, seed by seed, all rows at
their choices. Cells lie in a folder that studies share, each in a folder named by what it is (`spdf_jax.config.study_cells`);
every one is resumable by itself, and so is the study. On a CPU a cell is computed by one thread: anyone's sums have our
order, and two studies run beside each other on two cores. The first measured cell is run twice: losses must be equal to the
bit, and seconds differ by what this machine's noise is. What came out is ``study.json``, of which page and table are made.
"""

import math
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax

from spdf_jax import processes
from spdf_jax.cloud.spool import url
from spdf_jax.config.run import RunConfig
from spdf_jax.config.study_cells import Cell, Cells, source_of
from spdf_jax.config.sweep import Row, StudyConfig, SweepConfig
from spdf_jax.errors import InputError, InUseError, closest
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.pages import LivePage
from spdf_jax.jobs.train import train_with
from spdf_jax.model.flops import linear_size
from spdf_jax.report.study import write_study_report
from spdf_jax.report.study_records import RECORD, read_study
from spdf_jax.report.words import duration, made_with
from spdf_jax.training.feed import check_there
from spdf_jax.training.phases import run_cost
from spdf_jax.training.provenance import Source, read_code
from spdf_jax.workdir import EVALUATION_FILE, PROVENANCE_FILE, SUMMARY_FILE, lock, made_workdir, read_json, write_json

AGAIN = "again"  # after the name of the cell that is run twice
_WAIT_SECONDS = 5.0


def run_study(config: SweepConfig, study: StudyConfig, request: Request) -> None:
    """Runs, or resumes, a study, or one cell of it again.

    Raises:
      InputError: anything the user can fix; cells that are finished stay.
    """
    processes.one_thread()
    if jax.process_count() > 1:
        raise InputError("a study's cells are for one process each; start it without --distributed")
    if url(request.workdir):
        raise InputError(f"workdir {request.workdir}: a study needs a disk, on which studies share cells")
    with request.training(config):
        keep_compiled(next(iter(config.cells.values())).data)
        processes.guard()
        if study.only:
            run_again(config, study, request)
        else:
            measure(config, study, request)


def measure(config: SweepConfig, study: StudyConfig, request: Request) -> dict[str, Any]:
    """All of it; returns the content of ``study.json``."""
    workdir = request.workdir
    rows, left_out = _possible(config)
    folder = workdir.parent / study.cells_folder
    run = _Running(config, study, request, folder, rows)
    with made_workdir(workdir), lock(workdir):
        page = LivePage(partial(write_study_report, workdir, workdir, figures=False), partial(print, flush=True))
        said = {"left_out": left_out, "command": request.command}
        for row in rows:
            run.choose(row)
        for i, seed in enumerate(study.seeds):
            for row in rows:
                run.measure(row, seed)
                write_json(workdir / RECORD, run.record() | said | run.results(study.seeds[: i + 1]))
                page.update()
        record = run.record() | said | run.results(study.seeds) | {"repeated": run.repeat()}
        write_json(workdir / RECORD, record)
        print(f"\n{write_study_report(workdir, workdir)}", flush=True)
    return record


def _possible(config: SweepConfig) -> tuple[list[Row], dict[str, str]]:
    """The rows whose data is there, and why the others' is not.

    Raises:
      InputError: there is none of the first row.
    """
    rows, left_out, there = [], dict[str, str](), set[str]()
    for row in config.rows:
        try:
            for _, key in (*row.decided_by, *row.choices):
                cell = config.cells[key]
                read = repr((cell.data, [phase.task for phase in cell.phases.values()]))
                if read not in there:  # released files are read whole
                    check_there(cell)
                there.add(read)
            rows.append(row)
        except InputError as error:
            if not rows:
                raise InputError(f"config.cells.{key}: {error}") from None
            left_out[row.label] = str(error)
            print(f"left out: {row.label}: {error}", flush=True)
    return rows, left_out


class _Running:
    """A study under way."""

    def __init__(
        self, config: SweepConfig, study: StudyConfig, request: Request, folder: Path, rows: list[Row]
    ) -> None:
        self._config, self._study, self._request, self._folder, self._rows = config, study, request, folder, rows
        self._cells = Cells(config.cells)
        self._code = {key: read_code(cell, request.file) for key, cell in config.cells.items()}
        self._dropped: set[str] = set()
        self._choice: dict[str, str] = {}
        self._losses: dict[str, dict[str, float]] = {}
        self._done: dict[str, dict[str, Any]] = {}
        self._work = {key: _work(config, key) for key in config.cells}
        self._spent: dict[str, tuple[float, float]] = {}  # seconds and work, by what it was on

    def choose(self, row: Row) -> None:
        """Runs the cells that decide, but for those that start from what was not chosen."""
        deciding = [
            (choice, key) for choice, key in row.decided_by or row.choices if not self._starts_from(key, self._dropped)
        ]
        losses = {
            choice: self._run(key, self._config.cells[key].seed, row, choice)["val_loss"] for choice, key in deciding
        }
        best = best_choice(losses)
        self._choice[row.label], self._losses[row.label] = best, losses
        self._dropped |= {key for choice, key in (*row.choices, *row.decided_by) if choice != best}

    def _starts_from(self, key: str, dropped: set[str]) -> bool:
        return source_of(self._config.cells[key]) in dropped

    def measure(self, row: Row, seed: int) -> None:
        """Runs, and scores, the cell that was chosen."""
        key = dict(row.choices)[self._choice[row.label]]
        summary = self._run(key, seed, row, self._choice[row.label])
        cell = self._cells.cell(key, seed)
        if self._study.measure.startswith("evaluation.") and _task(cell.config):
            scores = self._folder / cell.name / EVALUATION_FILE
            if not scores.exists():
                evaluate_checkpoint(cell.config, scores.parent)
            summary |= {"evaluation": read_json(scores, "delete it, and the same command makes it again")}

    def _run(self, key: str, seed: int, row: Row, choice: str) -> dict[str, Any]:
        """The summary of a cell, which is run unless it is there, after what it starts from."""
        for cell in self._cells.chain(key, seed):
            if cell.name not in self._done:
                done, total, left = self._progress()
                print(f"[{done + 1}/{total}] {cell.name}: {row.label}, {choice}, seed {seed}{left}", flush=True)
                self._done[cell.name] = _train(cell, self._folder / cell.name, self._code[cell.key], self._request)
                seconds, work = self._spent.get(_task(cell.config), (0.0, 0.0))
                seconds += self._done[cell.name]["wall_seconds"]
                self._spent[_task(cell.config)] = seconds, work + self._work[cell.key]
        return self._done[cell.name]

    def _progress(self) -> tuple[int, int, str]:
        """Cells done and in all, and how long the others take if they are as fast for their FLOPs as those."""
        planned, dropped = dict[str, str](), set(self._dropped)
        for row in self._rows:
            pairs = [(c, key) for c, key in row.decided_by or row.choices if not self._starts_from(key, dropped)]
            choice = self._choice.get(row.label, pairs[0][0])  # any, where it is yet to be made
            dropped |= {key for c, key in (*row.choices, *row.decided_by) if c != choice}
            chosen = dict(row.choices)[choice]
            for key, seeds in (
                *((key, (self._config.cells[key].seed,)) for _, key in pairs),
                (chosen, self._study.seeds),
            ):
                planned |= {c.name: c.key for seed in seeds for c in self._cells.chain(key, seed)}
        keys = [key for name, key in planned.items() if name not in self._done]
        seconds = math.fsum(self._work[key] * self._rate(_task(self._config.cells[key])) for key in keys)
        return (
            len(self._done),
            max(len(planned), len(self._done) + 1),
            f"; about {duration(seconds)} left" if seconds else "",
        )

    def _rate(self, task: str) -> float:
        """Seconds a FLOP of what was on a task so far, or of all where nothing was: its batches are shorter than counted."""
        spent = [self._spent[task]] if task in self._spent else list(self._spent.values())
        work = math.fsum(one for _, one in spent)
        return math.fsum(seconds for seconds, _ in spent) / work if work else 0.0

    def repeat(self) -> dict[str, Any]:
        """The first measured cell beside itself, run again.

        Raises:
          InputError: they differ: this machine does not compute the same twice.
        """
        row = self._rows[0]
        cell = self._cells.cell(dict(row.choices)[self._choice[row.label]], self._study.seeds[0])
        print(f"{cell.name}: again, to see whether it comes out the same", flush=True)
        folder = self._folder / f"{cell.name}-{AGAIN}"
        both = [self._done[cell.name], _train(cell, folder, self._code[cell.key], self._request)]
        losses = [summary["val_loss"] for summary in both]
        if losses[0] != losses[1]:
            raise InputError(
                f"{folder}: the same cell gave a loss of {losses[1]!r} where it was {losses[0]!r}; find out why (other "
                f"versions, another machine, memory that fails) before any difference here is believed"
            )
        return {"cell": cell.name, "val_loss": losses, "seconds": [training_seconds(summary) for summary in both]}

    def record(self) -> dict[str, Any]:
        """What the study is."""
        fields = ("experiment", "variant", "title", "remark")
        of_study = ("measure", "unit", "reference", "answers")
        return {name: getattr(self._config, name) for name in fields} | {
            name: getattr(self._study, name) for name in of_study
        }

    def results(self, seeds: tuple[int, ...]) -> dict[str, Any]:
        """What came out so far: rows, and all cells that were run."""
        rows = []
        for row in self._rows:
            key = dict(row.choices)[self._choice[row.label]]
            names = [self._cells.cell(key, seed).name for seed in seeds]
            decided = {
                c: self._cells.cell(k, self._config.cells[k].seed).name for c, k in row.decided_by or row.choices
            }
            facts = {"row": row.label, "method": row.method, "group": row.group, "choice": self._choice[row.label]}
            tried = {choice: decided[choice] for choice in self._losses[row.label]}
            model = {"weights": linear_size(self._config.cells[key].model), "sparsity": _held(self._config, key)}
            rows.append(facts | model | {"tried": tried, "cells": [name for name in names if name in self._done]})
        made = [said for summary in self._done.values() for said in summary["made_with"]]
        found = {"rows": rows, "made_with": list(dict.fromkeys(made))}
        return found | {"cells": {name: _facts(summary, self._study) for name, summary in self._done.items()}}


def best_choice(losses: Mapping[str, float]) -> str:
    """The choice of the lowest loss; of equal ones the first.

    >>> best_choice({"0.001": 3.2, "0.003": 3.1, "0.01": 3.1})
    '0.003'
    """
    return min(losses, key=lambda choice: losses[choice])


def training_seconds(summary: Mapping[str, Any]) -> float:
    """Of steps alone: neither start nor compiling nor evaluation nor saving."""
    return math.fsum(summary["seconds"].get(part, 0.0) for part in ("training", "topology", "data"))


def _facts(summary: Mapping[str, Any], study: StudyConfig) -> dict[str, Any]:
    names = ("val_loss", "steps", "tokens", "train_flops", "dense_flops", "wall_seconds")
    before = summary.get("before") or {}
    facts = {name: summary[name] for name in names} | {"seconds": training_seconds(summary)}
    if before:
        facts["before"] = {name: before[name] for name in ("tokens", "train_flops", "wall_seconds")}
    section, _, name = study.measure.partition(".")
    if section == "evaluation" and section in summary:
        facts["measure"] = summary[section].get(name)
    return facts


def _held(config: SweepConfig, key: str) -> float | None:
    """The sparsity of a cell that holds one throughout, over text; None of others."""
    phases = list(config.cells[key].phases.values())
    if (
        len(phases) > 1
        or phases[0].task.name
        or (not phases[0].sparsity.dense and phases[0].sparsity.schedule != "constant")
    ):
        return None
    return 0.0 if phases[0].sparsity.dense else phases[0].sparsity.sparsity


def _work(config: SweepConfig, key: str) -> float:
    """FLOPs that are computed: where zeros are masks, those of the dense model."""
    try:
        cost = run_cost(config.cells[key])
    except InputError:  # its data is not there, and it is left out
        return 0.0
    skips = any(phase.sparsity.sparse_compute == "blocks" for phase in config.cells[key].phases.values())
    return float(cost.train_flops if skips else cost.dense_flops)


def _task(config: RunConfig) -> str:
    return list(config.phases.values())[-1].task.name


def _train(cell: Cell, folder: Path, code: Mapping[str, Source], request: Request) -> dict[str, Any]:
    """The summary of a cell that is run, or goes on, or is finished; one that another study is at is waited for."""
    is_said = False
    while True:
        try:
            train_with(cell.config, folder, code, command=request.command, progress=not request.quiet)
            break
        except InUseError:
            if not is_said:
                print(f"{folder}: another study is at it; going on when it is done", flush=True)
            is_said = True
            time.sleep(_WAIT_SECONDS)
    fix = "delete it, and the same command makes it again"
    starts = read_json(folder / PROVENANCE_FILE, fix)["starts"]
    made = list(dict.fromkeys(f"{made_with(start)}, on {start['device']}" for start in starts))
    return read_json(folder / SUMMARY_FILE, fix) | {"made_with": made}


def run_again(config: SweepConfig, study: StudyConfig, request: Request) -> None:
    """Runs one cell, after those that it starts from, in ``WORKDIR/cells``, and says its loss beside the recorded one.

    Raises:
      InputError: the study can have no such cell, or its loss is not the recorded one.
    """
    cells = Cells(config.cells)
    seeds = {key: (cell.seed, *study.seeds) for key, cell in config.cells.items()}
    chains = {cells.cell(key, seed).name: (key, seed) for key in seeds for seed in seeds[key]}
    if study.only not in chains:
        near = closest(study.only, chains)
        meant = f"; did you mean {near!r}?" if near else ""
        raise InputError(f"config.study.only: no cell {study.only!r} in this study{meant or '; its page lists them'}")
    for cell in cells.chain(*chains[study.only]):
        code = read_code(cell.config, request.file)
        summary = _train(cell, request.workdir / "cells" / cell.name, code, request)
    recorded = read_study(Path(study.record)).cells.get(study.only) if Path(study.record).is_file() else None
    said = f"{study.only}: validation loss {summary['val_loss']!r}"
    if recorded is None:
        print(f"{said}; nothing is recorded of it", flush=True)
        return
    difference = abs(summary["val_loss"] - recorded["val_loss"])
    print(f"{said}, recorded {recorded['val_loss']!r}: {difference:.1e} apart", flush=True)
    if difference > 1e-6:
        raise InputError(
            f"{study.only}: its loss is {difference:.1e} from the recorded one; compare versions (--version, "
            f"requirements.lock), cores and processor with those in {study.record}"
        )
