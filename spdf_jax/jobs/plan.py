"""``--job plan``: what a config will do, without doing it."""

from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.jobs import Request
from spdf_jax.planning.describe import describe
from spdf_jax.planning.pod_plan import describe_pod


def run(config: RunConfig, request: Request) -> None:
    """Prints the table of a run, or of its steps compiled for the pod asked for."""
    print(describe_pod(config, request.plan_topology) if request.plan_topology else describe(config))


def run_sweep(config: SweepConfig, request: Request) -> None:
    """Prints the table of each cell."""
    del request
    print("\n\n".join(f"== {name}\n{describe(cell)}" for name, cell in config.cells.items()))
