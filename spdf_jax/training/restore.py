"""Where a state comes from that this process did not make: the run's own checkpoint, another run's, a Hugging Face folder."""

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spdf_jax.cloud.spool import located, stored
from spdf_jax.config.checks import check_transition
from spdf_jax.config.read import load_config
from spdf_jax.config.run import RunConfig, flat
from spdf_jax.errors import InputError, reading
from spdf_jax.huggingface import load_model
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import make_mesh, parameter_shardings
from spdf_jax.sparsity.mask_files import MASK_FILE, load_masks
from spdf_jax.sparsity.masks import apply_masks, dense_masks
from spdf_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from spdf_jax.training.phases import Begin, PhasePlan, make_plan
from spdf_jax.training.pruning import Pruner, as_it_is
from spdf_jax.training.sources import holds_run
from spdf_jax.training.state import TrainState, abstract_state, as_masks, init_state, start_phase, state_shardings
from spdf_jax.training.stored_state import fingerprint
from spdf_jax.workdir import BEST, CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE, read_json

#: What of a config may change between restarts and after the end: how the run reports, where and how it is computed, what is
#: made of it; and where that lies which it reads. That the same lies there, fingerprints tell.
_FREE = re.compile(r"(loop|mesh|decode|evaluation|circuit)\.|(variants|model\.remat|data\.(cache_dir|processes))$")
#: What a run is called: the same settings under another name are the same run.
_NAMES = re.compile(r"(experiment|variant)$")
_PLACES = re.compile(r"(init_from|data\.(path|mixture|tokenizer)|[^.]+\.(task\.path|distill\.teacher))$")

#: What a ``summary.json`` says of the run, where another goes on from it.
_COSTS = ("train_flops", "dense_flops", "tokens", "wall_seconds", "val_loss")


class SavedRun(NamedTuple):
    """The end of a run: its best state if its last phase may stop early, its newest otherwise; blocks as masks."""

    config: RunConfig
    plan: PhasePlan
    state: TrainState

    @property
    def result(self) -> TrainState:
        """The state to evaluate, generate from and export: `state`, with the average of its parameters if the run keeps one."""
        return self.state.averaged()

    @property
    def model(self) -> GPT:
        """It attends as in the last step that made the state, whatever it is used for."""
        return GPT(self.config.model, *self.plan.attention_after(int(self.state.step)))


def differing(config: RunConfig, workdir: Path) -> tuple[list[str], dict[str, tuple[Any, Any]]]:
    """In what a config is not that of the run in a folder: places, and what is another run by its value there and here."""
    path = workdir / CONFIG_FILE
    if not path.exists():
        return [], {}
    saved, ours = (flat(c.as_dict()) for c in (load_config(path), config))
    keys = [
        key for key in sorted(saved.keys() | ours.keys()) if saved.get(key) != ours.get(key) and not _FREE.match(key)
    ]
    others = {key: (saved.get(key), ours.get(key)) for key in keys if not _PLACES.match(key)}
    return [key for key in keys if _PLACES.match(key)], {} if all(map(_NAMES.match, others)) else others


def check_same_run(config: RunConfig, workdir: Path) -> list[str]:
    """Refuses the folder of a run of another config; a folder without a run is anyone's.

    Args:
      config: of the command.
      workdir: whose ``config.json`` says what the run there is.

    Returns:
      The keys of places that differ, such as ``data.path``: to be accepted where the same lies there.

    Raises:
      InputError: another config, with what differs.
    """
    places, others = differing(config, workdir)
    if others:
        said = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in others.items()]
        raise InputError(
            f"workdir {workdir}: holds a run of another config ({'; '.join(said[:4])}); choose another --workdir, or give "
            f"the config of that run"
        )
    return places


def check_same_data(config: RunConfig, record: dict[str, Any], fingerprints: list[str], phase: int) -> None:
    """Raises `InputError` where phases to come, or the one that goes on, have other data than recorded in a checkpoint."""
    was = record.get("data_fingerprints", [])[phase:] or [record["data_fingerprint"]]  # one: of an older version
    for before, here in zip(was, fingerprints[phase:], strict=False):
        if before != here:
            embedded = "go on with the Python that it began with: its library is the text (data.source='embedded')"
            raise InputError(
                f"config.data: the data is not what this run was trained on so far (fingerprint {here[:12]}, "
                f"was {before[:12]}); {embedded if config.data.source == 'embedded' else 'restore it'}, or start again with "
                f"another --workdir"
            )


def check_same_origin(config: RunConfig, first: TrainState | None, record: dict[str, Any]) -> None:
    """Refuses an ``init_from`` that is neither where this run started from, nor the same in another place.

    Args:
      config: of the run.
      first: the first state that it would start with from there.
      record: of its newest checkpoint.
    """
    was = record.get("origin", {}).get("fingerprint")
    if first is None or was is None or fingerprint(first) != was:
        raise InputError(
            f"config.init_from: {config.init_from!r} does not hold what this run started from; give the config of this run, or "
            f"choose another --workdir"
        )


def saved_run(workdir: Path, mesh: Mesh | None = None, config: RunConfig | None = None) -> SavedRun:
    """Loads the result of a run.

    Args:
      workdir: the run's folder.
      mesh: where to put the state; by default that of the config.
      config: the run's own, but for what may change after a run, such as `decode`; by default its ``config.json``.

    Returns:
      ``(config, plan, state)``: parameters are ``state.params``, masks ``state.masks``; see `spdf_jax.TrainState`. Where
      ``ema_decay`` or a schedule-free optimiser keeps averages, they are ``.result.params``, and what `train` measured is
      theirs. The notebook ``4_read_a_run.ipynb`` looks at one.

    Raises:
      InputError: no checkpoint there, or a run of another config.

    >>> saved_run(Path("runs/of_nobody"))
    Traceback (most recent call last):
    spdf_jax.errors.InputError: runs/of_nobody/checkpoints: no checkpoint there; train first with --job train
    """
    return saved_run_and_record(workdir, mesh, config)[0]


def saved_run_and_record(
    workdir: Path, mesh: Mesh | None = None, config: RunConfig | None = None
) -> tuple[SavedRun, dict[str, Any]]:
    """`saved_run`, and the record of its checkpoint."""
    workdir = located(workdir)
    while True:
        best = any(stored(workdir / BEST).glob("[0-9]*"))
        folder = stored(workdir / (BEST if best else CHECKPOINTS))
        if not folder.is_dir():
            raise InputError(f"{folder}: no checkpoint there; train first with --job train")
        if config is None:
            config = load_config(workdir / CONFIG_FILE)
        else:
            check_same_run(config, workdir)
        mesh, plans = mesh or make_mesh(config.mesh), make_plan(config, begin_of(workdir))
        with contextlib.closing(Checkpoints(workdir / folder.name, config.loop.keep_checkpoints)) as checkpoints:
            step = checkpoints.latest_step()
            try:
                record = checkpoints.record()
                plan = plans[min(record["phase"], len(plans) - 1)]
                state = restore_state(config, plan, mesh, checkpoints)
                state = as_masks(plan.tx, state)
                return SavedRun(config, plan, state), record
            except DamagedCheckpointError:
                if (folder / str(step)).is_dir():
                    raise
                # Else a job that still runs has put a newer one in its place: list again.


def restore_state(
    config: RunConfig, plan: PhasePlan, mesh: Mesh, checkpoints: Checkpoints, step: int = 0
) -> TrainState:
    """The state of a phase at a step, by default the newest, laid out on `mesh`."""
    abstract = abstract_state(GPT(config.model), plan.tx, plan.config.sparsity, plan.filter)
    return checkpoints.restore(abstract, state_shardings(mesh, plan.tx, abstract), step)


def begin_of(workdir: Path) -> Begin:
    """Where the run in a folder begins, as its ``config.json`` says."""
    path, fix = workdir / CONFIG_FILE, "restore it, or give the workdir of a run"
    begins = read_json(path, fix).get("begins", {}) if path.exists() else {}
    with reading(f"{path}: does not say where the run begins", fix):
        return Begin(**begins)


def first_state(
    config: RunConfig, plan: PhasePlan, mesh: Mesh, source: Path | None, prune: Pruner = as_it_is
) -> TrainState:
    """The state before the first step of a run: drawn, or that of `source`, see `spdf_jax.training.sources`.

    Raises:
      InputError: see `initial_from`.
    """
    if source is None:
        return init_state(GPT(config.model), plan.tx, plan.config.sparsity, plan.filter, config.seed, mesh)
    return initial_from(source, config, plan, mesh, prune)


def initial_from(folder: Path, config: RunConfig, plan: PhasePlan, mesh: Mesh, prune: Pruner = as_it_is) -> TrainState:
    """The first state of a run that goes on from another, as the phase wants it: dense, as sparse as there, or between.

    Raises:
      InputError: nothing there to go on from, another model, or optimiser state that cannot be carried over.
    """
    phase = plan.config
    key = jax.random.key(config.seed)
    if holds_run(folder):
        source, _ = saved_run_and_record(folder, mesh)  # `start_phase` takes the average where it resets
        check_same_model(folder, source.config.model, config.model)
        check_transition(source.plan.config, plan.name, phase)
        state = source.state.replace(step=jnp.zeros((), jnp.int32), key=key)
    else:
        model_config, params = load_model(folder, mesh=mesh)
        check_same_model(folder, model_config, config.model)
        if not phase.reset_optimizer:
            raise InputError(f"config.{plan.name}.reset_optimizer: {folder} holds no optimiser state; set it to True")
        masks = load_masks(folder / MASK_FILE, params) if (folder / MASK_FILE).exists() else dense_masks(params)
        params, masks = (jax.device_put(x, parameter_shardings(mesh, x)) for x in (apply_masks(params, masks), masks))
        if phase.sparsity.topology_rule.choose_masks and any(mask.ndim for mask in jax.tree.leaves(masks)):
            raise InputError(
                f"config.{plan.name}.sparsity.rule: {phase.sparsity.rule!r} ranks all weights, and {folder} has masks, outside "
                f"which they are 0; go on from a dense model"
            )
        state = TrainState(jnp.zeros((), jnp.int32), params, masks, plan.tx.init(params), key)
    return enter_phase(state, plan, mesh, prune)


def cost_before(folder: Path) -> dict[str, Any] | None:
    """What the run cost from which another goes on; None where nothing says it: of an unfinished run, a Hugging Face folder.

    Raises:
      InputError: a ``summary.json`` that no run left.
    """
    summary = read_summary(folder) if holds_run(folder) else None
    return {name: summary[name] for name in _COSTS} if summary else None


def read_summary(workdir: Path) -> dict[str, Any] | None:
    """The ``summary.json`` of a finished run; None where there is none yet.

    Raises:
      InputError: it is not as a run leaves it.
    """
    path, fix = workdir / SUMMARY_FILE, "delete it, and train there: the run makes it again"
    if not path.exists():
        return None
    summary = read_json(path, fix)
    if not all(isinstance(summary.get(name), int | float) for name in (*_COSTS, "steps")):
        raise InputError(f"{path}: not the summary of a finished run; {fix}")
    return summary


def enter_phase(state: TrainState, plan: PhasePlan, mesh: Mesh, prune: Pruner = as_it_is) -> TrainState:
    """`start_phase` as the plan says: from the result of the phase before, or, with its optimiser, from its parameters.

    Before it, `prune` (`spdf_jax.training.pruning.pruner`), where there is anything to prune.
    """
    phase = plan.config
    return start_phase(prune(state), plan.tx, phase.sparsity, plan.filter, mesh, reset_optimizer=phase.reset_optimizer)


def check_same_model(folder: Path, there: GPTConfig, here: GPTConfig, key: str = "init_from") -> None:
    """Refuses another model, in the folder that the config's `key` names, than ours.

    Fields that change neither a parameter nor what it means may differ.
    """
    free = {"dropout", "dtype", "remat", "init_std", "mup_density"}
    free |= {"context"} if here.positions == "rotary" else set()
    theirs, ours = (
        dataclasses.asdict(dataclasses.replace(c, d_ff=c.mlp_width, n_kv_head=c.kv_heads, d_head=c.head_width))
        for c in (there, here)
    )
    differing = [
        f"{name} {theirs[name]} there, {ours[name]} here"
        for name in ours
        if name not in free and theirs[name] != ours[name] and getattr(there, name) != getattr(here, name)
    ]
    if differing:
        raise InputError(
            f"config.{key}: {folder} holds another model: {'; '.join(differing)}. Set config.model as there"
        )
