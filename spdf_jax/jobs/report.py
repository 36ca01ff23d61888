"""``--job report``: the page of a run or sweep, and its figures, written again from what it recorded."""

from collections.abc import Callable
from pathlib import Path

from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.errors import InputError
from spdf_jax.jobs import Request
from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.report.circuit import write_circuits
from spdf_jax.report.study import write_study_report
from spdf_jax.report.study_records import RECORD
from spdf_jax.workdir import CIRCUIT_FILE, check_writable


def run(config: RunConfig, request: Request) -> None:
    """Writes a run's page and prints its path."""
    del config
    _print_run(request)


def run_sweep(config: SweepConfig, request: Request) -> None:
    """Writes a sweep's page and prints its path; of a study that was not run there, of what is kept of it."""
    if config.study and not (request.workdir / RECORD).is_file():
        record = Path(config.study.record)
        if not record.is_file():
            raise InputError(
                f"{request.workdir / RECORD}: no study was run there, and none is kept in {record}; run it"
            )
        _print(lambda _, folder: write_study_report(record, folder or request.workdir), request)
        return
    _print(_write_study if config.study else write_sweep_report, request)


def run_recorded(request: Request) -> None:
    """Writes the page of whichever the workdir holds: of a run of `spdf_jax.fit`, too, which no config describes."""
    if (request.workdir / RECORD).is_file():
        _print(_write_study, request)
    elif (request.workdir / "cells").is_dir():
        _print(write_sweep_report, request)
    else:
        _print_run(request)


def _print_run(request: Request) -> None:
    """Its circuits have a page of their own."""
    _print(write_report, request)
    if (request.workdir / CIRCUIT_FILE).is_file():
        _print(write_circuits, request)


def _write_study(workdir: Path, output: Path | None) -> str:
    return write_study_report(workdir, output or workdir)


def _print(write: Callable[[Path, Path | None], Path | str], request: Request) -> None:
    if request.output is not None:
        check_writable(request.output)
    print(f"{write(request.workdir, request.output)}")
