"""What no section can check alone: settings that exclude each other, and settings that nothing uses."""

from spdf_jax.config.run import SECTIONS, PhaseConfig, RunConfig
from spdf_jax.errors import InputError, nearest
from spdf_jax.fields import (
    Unused,
    unused_fields,
)
from spdf_jax.sparsity.one_shot import CALIBRATED_METHODS
from spdf_jax.sparsity.optimizers import READS_VALUES, WHOLE
from spdf_jax.sparsity.programme import SparsityConfig


def unused_settings(run: RunConfig) -> list[Unused]:
    found = [unused_fields(f"config.{name}", getattr(run, name), run=run) for name in SECTIONS]
    found += [unused_fields(f"config.{name}", phase, run=run, phase=phase) for name, phase in run.phases.items()]
    return [unused for some in found for unused in some]


def check_effect(run: RunConfig) -> None:
    """Raises `InputError` where a setting would be ignored, or would leave nothing of what another one asks for."""
    if run.variant not in run.variants:
        near = nearest(run.variant, list(run.variants))
        raise InputError(f"config.variant: {run.experiment} has no variant {run.variant!r}{near}")
    check_used(unused_settings(run))
    if run.init_step and run.init_what != "state":
        check_used([Unused("config.init_step", run.init_step, 0, "runs with init_what 'state'")])
    if run.init_what == "state" and not run.init_from:
        raise InputError(
            "config.init_what: 'state' of which run? Name its workdir by config.init_from, or use 'parameters'"
        )
    for index, (name, phase) in enumerate(run.phases.items()):
        check_zeros(f"config.{name}.sparsity", phase.sparsity)
        if index == 0 and not phase.reset_optimizer and not run.init_from:
            raise InputError(
                f"config.{name}.reset_optimizer: False has nothing to carry over, without a phase before or init_from; use True"
            )
        if not phase.epochs:
            check_length(name, phase)


def check_used(unused: list[Unused]) -> None:
    """Raises `InputError` if there is any."""
    if unused:
        first, *others = unused
        likewise = ", ".join(f"{other.place} at {other.default!r}" for other in others)
        raise InputError(
            f"{first.place}: {first.value!r} would be ignored, since it is for {first.by}; leave it at {first.default!r}"
            + (f" (likewise {likewise})" if likewise else "")
        )


def check_zeros(place: str, sparsity: SparsityConfig) -> None:
    """Raises `InputError` where a rule has no zeros to place."""
    if not sparsity.dense and not any(map(sparsity.curve.value, (0.0, *sparsity.curve.turns))):
        raise InputError(
            f"{place}.sparsity: {sparsity.sparsity} leaves rule {sparsity.rule!r} no zeros to place; set a "
            f"share of zeros, 0.75 for one, or rule 'dense'"
        )


def check_length(name: str, phase: PhaseConfig) -> None:
    """Raises `InputError` unless phase `name`, its length known in steps, has room for what it is to do."""
    if phase.optimizer.warmup_steps > phase.steps:
        warmup, longer = phase.optimizer.warmup_steps, f"config.{name}.{'epochs' if phase.epochs else 'steps'}"
        raise InputError(
            f"config.{name}.optimizer.warmup_steps: a warm-up of {warmup} steps is longer than its phase of {phase.steps}, "
            f"and would never arrive at the learning rate; set it to {phase.steps // 10}, or raise {longer}"
        )


def check_phase(run: RunConfig, name: str, phase: PhaseConfig) -> None:
    if phase.epochs and not phase.task.name:
        raise InputError(
            f"config.{name}.epochs: {phase.epochs} epochs of what? Set config.{name}.task.name, or steps instead"
        )
    if phase.patience_evaluations and name != list(run.phases)[-1]:
        raise InputError(f"config.{name}.patience_evaluations: only the last phase may stop early; set it to 0 here")
    if run.seq_len(phase) > run.model.context:
        raise InputError(
            f"config.{name}.seq_len: {phase.seq_len} exceeds config.model.context {run.model.context}; "
            f"shorten the sequences or enlarge the context"
        )
    if phase.sparsity.init in CALIBRATED_METHODS:
        _check_calibrated(run, name, phase)
    for check in (_check_mup, _check_rule, _check_blocks):
        check(run, name, phase)
    if phase.batch_size % phase.grad_accumulation_steps:
        raise InputError(
            f"config.{name}.batch_size: {phase.batch_size} is not divisible by grad_accumulation_steps "
            f"{phase.grad_accumulation_steps}"
        )


def _check_mup(run: RunConfig, name: str, phase: PhaseConfig) -> None:
    if run.model.mup_base_width and phase.optimizer.density_exponent:
        raise InputError(
            f"config.{name}.optimizer.density_exponent: {phase.optimizer.density_exponent} must be 0: S-muPar scales the "
            f"learning rate by 1/density itself"
        )
    if run.model.mup_base_width and phase.optimizer.name != "adamw":
        raise InputError(
            f"config.{name}.optimizer.name: S-muPar's learning rates are Adam's, not those of {phase.optimizer.name!r}; "
            f"use 'adamw', or config.model.mup_base_width 0"
        )
    drawn = name == next(iter(run.phases)) and not run.init_from
    if run.model.mup_base_width and drawn and abs(run.model.mup_density - phase.sparsity.density) > 1e-9:
        raise InputError(
            f"config.model.mup_density: {run.model.mup_density} must be the density of phase {name!r}, "
            f"{phase.sparsity.density:g}, for which the parameters are drawn"
        )


def _check_rule(_: RunConfig, name: str, phase: PhaseConfig) -> None:
    optimizer = phase.optimizer.name
    if phase.sparsity.topology_rule.choose_masks and phase.optimizer.regrowth != "keep":
        raise InputError(
            f"config.{name}.optimizer.regrowth: rule {phase.sparsity.rule!r} looks after the optimiser's state itself; use "
            f"'keep', not {phase.optimizer.regrowth!r}"
        )
    if phase.ema_decay and optimizer == "schedule_free_adamw":
        raise InputError(
            f"config.{name}.ema_decay: {optimizer!r} averages by itself, and its average is the result; set ema_decay to 0"
        )
    if phase.sparsity.topology_rule.choose_masks and phase.ema_decay:
        raise InputError(
            f"config.{name}.ema_decay: rule {phase.sparsity.rule!r} looks after the optimiser's state itself, and knows "
            f"nothing of an average in it; set ema_decay to 0"
        )
    if phase.sparsity.topology_rule.choose_masks and optimizer in READS_VALUES:
        raise InputError(
            f"config.{name}.optimizer.name: {optimizer!r} reads the parameters themselves, and rule {phase.sparsity.rule!r} "
            f"keeps values that do not compute beside them; use 'adamw', 'muon', 'lion' or 'sgd', or another rule"
        )
    if phase.sparsity.topology_rule.choose_each_step:
        averages = "ema_decay" if phase.ema_decay else f"optimizer.name {optimizer!r}"
        if phase.ema_decay or optimizer == "schedule_free_adamw":
            raise InputError(
                f"config.{name}.{averages}: averages weights as the optimiser leaves them, of which rule "
                f"{phase.sparsity.rule!r} then zeroes most; set ema_decay to 0 and optimizer.name to another, such as 'adamw'"
            )
        if phase.optimizer.regrowth == "smet":
            raise InputError(
                f"config.{name}.optimizer.regrowth: 'smet' counts the steps of active weights, and rule "
                f"{phase.sparsity.rule!r} has dense moments; use 'reset'"
            )


def _check_blocks(_: RunConfig, name: str, phase: PhaseConfig) -> None:
    optimizer = phase.optimizer.name
    if phase.sparsity.blocks and optimizer in WHOLE:
        raise InputError(
            f"config.{name}.optimizer.name: {optimizer!r} looks at whole matrices, of which sparse_compute 'blocks' stores "
            f"live blocks alone; use sparse_compute 'masked', or 'adamw', 'lion', 'sgd' or 'schedule_free_adamw'"
        )
    if phase.sparsity.blocks and (phase.optimizer.regrowth != "reset" or phase.optimizer.density_exponent):
        raise InputError(
            f"config.{name}.optimizer: sparse_compute 'blocks' keeps nothing of weights that are not live, and no masks to "
            f"read a density from; use regrowth 'reset' and density_exponent 0, or sparse_compute 'masked'"
        )


def _check_calibrated(run: RunConfig, name: str, phase: PhaseConfig) -> None:
    init, first = phase.sparsity.init, name == next(iter(run.phases))
    if first and not run.init_from:
        raise InputError(
            f"config.{name}.sparsity.init: {init!r} prunes what was trained, and phase {name!r} starts from drawn parameters; "
            f"name a dense run or a Hugging Face folder by config.init_from, or use 'random'"
        )
    if first and run.init_what == "state":
        raise InputError(
            f"config.{name}.sparsity.init: {init!r} starts something new, and init_what 'state' goes on with all of a run; use "
            f"init_what 'parameters'"
        )
    if phase.task.name:
        raise InputError(
            f"config.{name}.sparsity.init: {init!r} looks at text, and phase {name!r} reads a task; prune in a phase of text "
            f"before it, or by --job prune"
        )
    if phase.sparsity.sparsify_head and run.model.tied_head:
        raise InputError(
            f"config.{name}.sparsity.sparsify_head: {init!r} prunes linear layers, and a tied head is the embedding too; "
            f"set it to False, or use init 'magnitude'"
        )
    if not phase.reset_optimizer:
        raise InputError(
            f"config.{name}.reset_optimizer: False carries over the state of weights that {init!r} prunes or corrects; use True"
        )


def check_transition(before: PhaseConfig, name: str, phase: PhaseConfig) -> None:
    """Raises `InputError` where phase `name` cannot follow the phase before."""
    state = {
        (p.optimizer.name, p.optimizer.regrowth == "smet", p.sparsity.topology_rule.optimizer) for p in (before, phase)
    }
    if not phase.reset_optimizer and len(state) > 1:
        raise InputError(
            f"config.{name}.reset_optimizer: False cannot carry the state over, since rule {before.sparsity.rule!r} with "
            f"optimizer.name {before.optimizer.name!r}, regrowth {before.optimizer.regrowth!r} and rule "
            f"{phase.sparsity.rule!r} with {phase.optimizer.name!r}, {phase.optimizer.regrowth!r} keep different state; make "
            f"them alike, or reset"
        )
    if not phase.reset_optimizer and bool(before.ema_decay) != bool(phase.ema_decay):
        raise InputError(
            f"config.{name}.reset_optimizer: False carries the average of ema_decay over with the state, and it is "
            f"{before.ema_decay} before and {phase.ema_decay} here; set both or none, or reset"
        )
    if phase.sparsity.init in CALIBRATED_METHODS and not before.sparsity.dense:
        raise InputError(
            f"config.{name}.sparsity.init: {phase.sparsity.init!r} prunes a dense model, and the phase before has masks, which "
            f"go on; leave it at 'random', or put it after a dense phase"
        )
    if phase.sparsity.topology_rule.choose_masks and not before.sparsity.dense:
        raise InputError(
            f"config.{name}.sparsity.rule: {phase.sparsity.rule!r} ranks all weights, and after a sparse phase the masked ones "
            f"are 0; put it first, or after a dense phase"
        )


def check_devices(run: RunConfig, data_devices: int) -> None:
    """Raises `InputError` unless every micro-batch splits evenly over the devices that share the batch."""
    for name, phase in run.phases.items():
        micro = phase.batch_size // phase.grad_accumulation_steps
        if micro % data_devices:
            raise InputError(
                f"config.{name}.batch_size: {micro} sequences a micro-batch are not divisible by {data_devices} devices; "
                f"use a multiple of {data_devices * phase.grad_accumulation_steps} or fewer devices (config.mesh)"
            )
    if run.loop.eval_batch_size % data_devices:
        raise InputError(
            f"config.loop.eval_batch_size: {run.loop.eval_batch_size} is not divisible by {data_devices} devices"
        )
