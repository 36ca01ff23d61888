"""``--job prune``: what a run would start from, a dense model pruned by its first phase's ``init``, as a folder."""

from pathlib import Path

import jax

from spdf_jax.config.checks import check_devices
from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError
from spdf_jax.huggingface import check_expressible
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.jobs.export import check_replaceable, write_export
from spdf_jax.sharding import batch_devices, make_mesh
from spdf_jax.training.feed import load_data, make_feed
from spdf_jax.training.phases import make_plan
from spdf_jax.training.pruning import pruner
from spdf_jax.training.restore import initial_from
from spdf_jax.training.sources import source_folder
from spdf_jax.workdir import check_writable


def run(config: RunConfig, request: Request) -> None:
    """`prune`."""
    keep_compiled(config.data)
    prune(config, request.workdir, request.output)


def prune(config: RunConfig, workdir: Path, output: Path | None = None) -> Path:
    """Writes the first state of a run as `spdf_jax.jobs.export` would, trains nothing, and prints the folder's path.

    Args:
      config: the run, whose ``init_from`` names the dense model, a run's workdir or a Hugging Face folder, and whose first
        phase says how it is pruned.
      workdir: of that run, in which nothing else is touched.
      output: what to write, by default ``WORKDIR/pruned``. ``init_from`` takes it, with its masks.

    Returns:
      The folder.

    Raises:
      InputError: nothing to prune, or no word of how; what a run would be refused for; a folder that is there already and not
        as it was exported; what no exported model can be.
    """
    name, phase = next(iter(config.phases.items()))
    source = source_folder(config, workdir)
    if source is None or config.init_what != "parameters":
        raise InputError(
            "--job prune: what? Name the workdir of a dense run or a Hugging Face folder by config.init_from, and leave "
            "init_what at 'parameters'"
        )
    if phase.sparsity.dense or phase.sparsity.init == "random" or not phase.sparsity.curve(0.0):
        raise InputError(
            f"--job prune: how? Set config.{name}.sparsity.init to 'magnitude', 'wanda' or 'sparsegpt', with a rule, such as "
            f"'static', and a sparsity from the first step on"
        )
    if phase.sparsity.blocks:
        raise InputError(f"--job prune: writes whole matrices; set config.{name}.sparsity.sparse_compute to 'masked'")
    folder = output or workdir / "pruned"
    check_replaceable(folder)
    check_expressible(config.model)
    mesh, (plan, *_) = make_mesh(config.mesh), make_plan(config)
    check_devices(config, batch_devices(mesh))
    with jax.set_mesh(mesh):
        tokens, tokenizer = load_data(config, workdir, [plan], begun=False, progress=False)
        feed = make_feed(config, plan, tokens, tokenizer, mesh)
        state = initial_from(source, config, plan, mesh, pruner(config.model, plan, feed.train, mesh))
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_writable(folder.parent)
    write_export(folder, config.model, state, tokenizer)
    return folder
