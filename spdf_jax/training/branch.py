"""A run that goes on from another's whole state, ``init_what = "state"``: steps, data and what is drawn go on, too."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from spdf_jax.cloud.spool import stored
from spdf_jax.config.checks import check_transition
from spdf_jax.config.read import load_config
from spdf_jax.config.run import RunConfig
from spdf_jax.data import load_task, steps_per_epoch
from spdf_jax.errors import InputError
from spdf_jax.processes import from_first
from spdf_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from spdf_jax.training.clock import Clock
from spdf_jax.training.phases import Begin, PhasePlan, make_plan, recorded_cost
from spdf_jax.training.restore import (
    begin_of,
    check_same_model,
    enter_phase,
    restore_state,
)
from spdf_jax.training.resume import recorded_evaluations
from spdf_jax.training.sources import holds_run, source_folder
from spdf_jax.training.state import TrainState, as_masks
from spdf_jax.workdir import CHECKPOINTS, CONFIG_FILE


class Parent(NamedTuple):
    """The run that another goes on from, at one of its checkpoints."""

    folder: Path
    config: RunConfig
    plans: list[PhasePlan]
    record: dict[str, Any]
    state: TrainState

    @property
    def plan(self) -> PhasePlan:
        """The phase that the state is of."""
        return self.plans[min(self.record["phase"], len(self.plans) - 1)]


def _parent_of(config: RunConfig, workdir: Path | None, mesh: Mesh, step: int) -> Parent | None:
    """The run whose state `config` asks for, if it does. That may go on running meanwhile."""
    if config.init_what != "state":
        return None
    folder = source_folder(config, workdir)
    assert folder is not None, "configs are checked for it"
    if not holds_run(folder):
        raise InputError(f"config.init_what: {f'{folder}'!r} holds parameters and no more; use 'parameters'")
    there = load_config(folder / CONFIG_FILE)
    check_same_model(folder, there.model, config.model)
    plans = make_plan(there, begin_of(folder))
    while True:
        with contextlib.closing(Checkpoints(folder / CHECKPOINTS, there.loop.keep_checkpoints)) as checkpoints:
            newest = int(from_first(lambda: str(checkpoints.latest_step() or 0)))
            wanted = step or config.init_step or newest
            try:
                record = checkpoints.record(wanted)
                plan = plans[min(record["phase"], len(plans) - 1)]
                return Parent(folder, there, plans, record, restore_state(there, plan, mesh, checkpoints, wanted))
            except DamagedCheckpointError:
                if stored(folder / CHECKPOINTS / str(wanted)).is_dir() or jax.process_count() > 1:
                    raise
                # Else the run there goes on, and has put a newer one in its place: list again.


def branch(
    config: RunConfig, workdir: Path | None, plans: list[PhasePlan], mesh: Mesh, step: int = 0
) -> tuple[Parent | None, list[PhasePlan]]:
    """Where a run begins: its parent, if it goes on from one, and its plans as counted from there.

    Args:
      config: of the run.
      workdir: its folder; None for a run that leaves none.
      plans: of `config`, counted from 0.
      mesh: where to put the state.
      step: of the parent's checkpoint; 0: as the config says.

    Returns:
      ``(parent, plans)``; ``parent.state`` is what the first phase starts from: where that wants the masks as they are,
      every bit of the parent's.

    Raises:
      InputError: a parent that cannot be gone on from so, or settings by which nothing of it could go on.
    """
    parent = _parent_of(config, workdir, mesh, step)
    if parent is None:
        return None, plans
    plans = make_plan(config, _begin_after(parent, config))
    state, before, plan = parent.state, parent.plan, plans[0]
    same = _kept(before, parent.record["step"] - before.start) == _kept(plan, 0)
    if not same:
        plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, reset_optimizer=False))
        check_transition(before.config, plan.name, plan.config)
        state = as_masks(before.tx, state)
    there, here = (jax.eval_shape(tx.init, state.params) for tx in (before.tx, plan.tx))
    if there != here:
        raise InputError(
            f"config.{plan.name}.optimizer: keeps other state than that of {parent.folder}, which init_what 'state' goes on "
            f"from; choose the optimiser of that run, or init_what 'parameters'"
        )
    return parent._replace(state=state if same else enter_phase(state, plan, mesh)), plans


def _begin_after(parent: Parent, config: RunConfig) -> Begin:
    """Where `config`'s run begins; refuses settings by which the order of the data would be another."""
    (name, phase), *_ = config.phases.items()
    before, example = parent.plan, int(parent.record["next_example"])
    for key, there, here in (
        ("seed", parent.config.seed, config.seed),
        (f"{name}.seq_len", before.seq_len, config.seq_len(phase)),
    ):
        if there != here:
            raise InputError(
                f"config.{key}: {here} gives the data another order than {there}, by which {parent.folder} has read it so far; "
                f"set it as there, or use init_what 'parameters'"
            )
    if phase.task.name and phase.task.name == before.config.task.name and phase.batch_size != before.config.batch_size:
        pairs = sum(len(one.references) for one in load_task(phase.task).train)
        there, here = (steps_per_epoch(pairs, size) for size in (before.config.batch_size, phase.batch_size))
        epochs, batches = divmod(example // before.config.batch_size, there)
        if batches:
            raise InputError(
                f"config.{name}.batch_size: {phase.batch_size} cuts an epoch of the task into other batches than "
                f"{before.config.batch_size}, of which {parent.folder} has seen {batches} of {there} at step "
                f"{parent.record['step']}; keep that size, or choose by config.init_step a checkpoint at the end of an epoch"
            )
        example = epochs * here * phase.batch_size
    return Begin(parent.record["step"], example, parent.record.get("order", parent.record["phase"]))


def check_same_order(parent: Parent, fingerprint: str) -> None:
    """Raises `InputError` where the data of the first phase is not what the run before was reading."""
    was = parent.record["data_fingerprint"]
    if was != fingerprint:
        raise InputError(
            f"config.data: init_what 'state' goes on in the data of {parent.folder}, and this is other data (fingerprint "
            f"{fingerprint[:12]}, was {was[:12]}); give the text or task and the tokenizer of that run, or use init_what "
            f"'parameters'"
        )


def _kept(plan: PhasePlan, step: int) -> tuple[Any, ...]:
    """What a state holds at a step of a phase; between two that hold the same there is nothing to change."""
    programme, rule = plan.programme, plan.programme.config.topology_rule
    counts = programme.groups, dict(programme.counts(step)), programme.config.pattern, programme.config.blocks
    optimizer = plan.config.optimizer
    return *counts, rule.optimizer, optimizer.name, optimizer.regrowth, bool(plan.config.ema_decay)


def cost_so_far(parent: Parent) -> dict[str, Any]:
    """What the parent had cost at its checkpoint, and what it had gone on from: as `spdf_jax.training.restore.cost_before`."""
    record, earlier = parent.record, parent.record.get("origin", {}).get("before") or {}
    clock = Clock()
    clock.go_on(record, ())
    total = recorded_cost(record, parent.plans, record["step"])._asdict() | {"wall_seconds": clock.of_the_result}
    losses = recorded_evaluations(parent.folder, record["step"], record)
    costs = {key: total[key] + earlier.get(key, 0) for key in ("train_flops", "dense_flops", "tokens", "wall_seconds")}
    return costs | {"val_loss": list(losses.values())[-1]}
