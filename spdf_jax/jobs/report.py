"""``--job report``: the page of a run or sweep, written again from what it recorded."""

from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.jobs import Request
from spdf_jax.report import write_report, write_sweep_report


def run(config: RunConfig, request: Request) -> None:
    """Writes a run's page and prints its path."""
    del config
    print(write_report(request.workdir))


def run_sweep(config: SweepConfig, request: Request) -> None:
    """Writes a sweep's page and prints its path."""
    del config
    print(write_sweep_report(request.workdir))
