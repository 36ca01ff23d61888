"""``--job report``: the page of a run or sweep, and its figures, written again from what it recorded."""

from collections.abc import Callable
from pathlib import Path

from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.jobs import Request
from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.report.circuit import write_circuits
from spdf_jax.workdir import CIRCUIT_FILE, check_writable


def run(config: RunConfig, request: Request) -> None:
    """Writes a run's page and prints its path."""
    del config
    _print_run(request)


def run_sweep(config: SweepConfig, request: Request) -> None:
    """Writes a sweep's page and prints its path."""
    del config
    _print(write_sweep_report, request)


def run_recorded(request: Request) -> None:
    """Writes the page of whichever the workdir holds: of a run of `spdf_jax.fit`, too, which no config describes."""
    if (request.workdir / "cells").is_dir():
        _print(write_sweep_report, request)
    else:
        _print_run(request)


def _print_run(request: Request) -> None:
    """Its circuits have a page of their own."""
    _print(write_report, request)
    if (request.workdir / CIRCUIT_FILE).is_file():
        _print(write_circuits, request)


def _print(write: Callable[[Path, Path | None], Path], request: Request) -> None:
    if request.output is not None:
        check_writable(request.output)
    print(f"{write(request.workdir, request.output)}")
