"""``--job report``: the page of a run or sweep, and its figures, written again from what it recorded."""

from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.jobs import Request
from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.workdir import check_writable


def run(config: RunConfig, request: Request) -> None:
    """Writes a run's page and prints its path."""
    del config
    if request.output is not None:
        check_writable(request.output)
    print(write_report(request.workdir, request.output))


def run_sweep(config: SweepConfig, request: Request) -> None:
    """Writes a sweep's page and prints its path."""
    del config
    if request.output is not None:
        check_writable(request.output)
    print(write_sweep_report(request.workdir, request.output))
