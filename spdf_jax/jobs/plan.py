"""``--job plan``: what a config will do, without doing it."""

from collections.abc import Iterable

from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.jobs import Request
from spdf_jax.planning.describe import describe
from spdf_jax.planning.pod_plan import describe_pod
from spdf_jax.planning.search import search


def run(config: RunConfig, request: Request) -> None:
    """Prints the table of a run, or of its steps compiled for the pod asked for, in one layout or in every one."""
    for line in _lines(config, request):
        print(line, flush=True)


def run_sweep(config: SweepConfig, request: Request) -> None:
    """Prints the same of each cell."""
    for i, (name, cell) in enumerate(config.cells.items()):
        print(f"== {name}" if i == 0 else f"\n== {name}")
        run(cell, request)


def _lines(config: RunConfig, request: Request) -> Iterable[str]:
    if request.plan_search:
        return search(config, request.plan_topology)
    return [describe_pod(config, request.plan_topology) if request.plan_topology else describe(config)]
