"""Where a state comes from that this run did not make: its own checkpoint, another run's, a Hugging Face folder."""

import contextlib
import dataclasses
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spdf_jax.checkpoint import Checkpoints
from spdf_jax.config import RunConfig, check_transition, load_config
from spdf_jax.errors import InputError
from spdf_jax.gpt_config import GPTConfig
from spdf_jax.huggingface import load_gpt2
from spdf_jax.model import GPT
from spdf_jax.plan import PhasePlan, make_plan
from spdf_jax.sharding import make_mesh, parameter_shardings
from spdf_jax.sparsity.blocks import as_masks
from spdf_jax.sparsity.masks import dense_masks
from spdf_jax.state import TrainState, abstract_state, start_phase, state_shardings

#: Folders of a workdir: the newest checkpoints, and the best one of a phase that may stop early.
CHECKPOINTS, BEST = "checkpoints", "best"


class SavedRun(NamedTuple):
    """What a run has come to: its best state if its last phase may stop early, its newest otherwise; blocks as masks."""

    config: RunConfig
    plan: PhasePlan
    state: TrainState


def saved_run(workdir: Path, mesh: Mesh | None = None, config: RunConfig | None = None) -> SavedRun:
    """Loads what a run has come to.

    Args:
      workdir: the run's folder.
      mesh: where to put the state; by default that of the config.
      config: in the place of the run's own ``config.json``.

    Returns:
      ``(config, plan, state)``: parameters are ``state.params``, masks ``state.masks``; see `spdf_jax.TrainState`. The notebook
      ``4_read_a_run.ipynb`` looks at one.

    Raises:
      InputError: no checkpoint there, or one of another model than the config's.

    >>> saved_run(Path("runs/of_nobody"))
    Traceback (most recent call last):
    spdf_jax.errors.InputError: runs/of_nobody/checkpoints: no checkpoint there; train first with --job train
    """
    best = any((workdir / BEST).glob("[0-9]*"))
    folder = workdir / (BEST if best else CHECKPOINTS)
    if not folder.is_dir():
        raise InputError(f"{folder}: no checkpoint there; train first with --job train")
    config = config or load_config(workdir / "config.json")
    mesh, plans = mesh or make_mesh(config.mesh), make_plan(config)
    with contextlib.closing(Checkpoints(folder, config.loop.keep_checkpoints)) as checkpoints:
        plan = plans[min(checkpoints.record()["phase"], len(plans) - 1)]
        return SavedRun(config, plan, as_masks(plan.tx, restore_state(config, plan, mesh, checkpoints)))


def restore_state(config: RunConfig, plan: PhasePlan, mesh: Mesh, checkpoints: Checkpoints) -> TrainState:
    """The newest state of a phase, laid out on `mesh`."""
    abstract = abstract_state(GPT(config.model), plan.tx, plan.config.sparsity, plan.filter)
    return checkpoints.restore(abstract, state_shardings(mesh, plan.tx, abstract))


def source_folder(config: RunConfig, workdir: Path) -> Path | None:
    """Where ``config.init_from`` points for a run in `workdir`; None for nowhere."""
    if config.init_from.startswith("cell:"):
        return workdir.parent / config.init_from.removeprefix("cell:")
    return Path(config.init_from) if config.init_from else None


def initial_from(folder: Path, config: RunConfig, plan: PhasePlan, mesh: Mesh) -> TrainState:
    """The first state of a run that goes on from another, as the phase wants it: dense, as sparse as there, or between.

    Raises:
      InputError: nothing there to go on from, another model, or optimiser state that cannot be carried over.
    """
    phase = plan.config
    key = jax.random.key(config.seed)
    if any((folder / name).is_dir() for name in (BEST, CHECKPOINTS)):
        source = saved_run(folder, mesh)
        _check_same_model(folder, source.config.model, config.model)
        check_transition(source.plan.config, plan.name, phase)
        state = source.state.replace(step=jnp.zeros((), jnp.int32), key=key)
    elif (folder / "config.json").is_file():
        model_config, params = load_gpt2(folder)
        _check_same_model(folder, model_config, config.model)
        if not phase.reset_optimizer:
            raise InputError(f"config.{plan.name}.reset_optimizer: {folder} holds no optimiser state; set it to True")
        params = jax.device_put(params, parameter_shardings(mesh, params))
        state = TrainState(jnp.zeros((), jnp.int32), params, dense_masks(params), plan.tx.init(params), key)
    else:
        raise InputError(
            f"config.init_from: {str(folder)!r} is neither a run's workdir nor a Hugging Face GPT-2 folder; train one first"
        )
    return enter_phase(state, plan, mesh)


def enter_phase(state: TrainState, plan: PhasePlan, mesh: Mesh) -> TrainState:
    """`start_phase` as the plan says."""
    phase = plan.config
    return start_phase(state, plan.tx, phase.sparsity, plan.filter, mesh, reset_optimizer=phase.reset_optimizer)


def _check_same_model(folder: Path, there: GPTConfig, here: GPTConfig) -> None:
    """Fields that change neither a parameter nor what it means may differ."""
    free = {"dropout", "dtype", "remat", "init_std", "mup_density"}
    theirs, ours = (dataclasses.asdict(dataclasses.replace(c, d_ff=c.mlp_width)) for c in (there, here))
    differing = [
        f"{name} {theirs[name]} there, {ours[name]} here"
        for name in ours
        if name not in free and theirs[name] != ours[name]
    ]
    if differing:
        raise InputError(
            f"config.init_from: {folder} holds another model: {'; '.join(differing)}. Set config.model as there"
        )
