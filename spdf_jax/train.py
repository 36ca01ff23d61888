"""The loop: phases, steps, evaluation, checkpoints, tracking; and the jobs that read what it leaves behind."""

import contextlib
import fcntl
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from spdf_jax.checkpoint import Checkpoints
from spdf_jax.config import RunConfig, check_devices
from spdf_jax.data import Batch, TokenData, prepare, train_batches, unigram_loss, validation_batches
from spdf_jax.errors import InputError
from spdf_jax.flops import parameter_count
from spdf_jax.model import GPT
from spdf_jax.plan import PhasePlan, StepCost, make_plan, total_cost
from spdf_jax.report import write_report
from spdf_jax.sharding import batch_sharding, make_mesh
from spdf_jax.sparsity.masks import active_counts
from spdf_jax.state import TrainState, abstract_state, init_state, start_phase, state_shardings
from spdf_jax.step import Steps, make_steps
from spdf_jax.tracking import Tracker, mask_picture, read_metrics, save_mask_picture, write_json
from spdf_jax.tree import named_leaves


class NonFiniteLossError(InputError):
    """The loss is NaN or infinite; the last good checkpoint is kept."""


@dataclass
class Run:
    """What every part of the loop needs, and the counters that move."""

    config: RunConfig
    workdir: Path
    data: TokenData
    mesh: Mesh
    model: GPT
    plans: list[PhasePlan]
    checkpoints: Checkpoints
    tracker: Tracker
    total: StepCost
    seconds: float  # of training, over all restarts
    clock: float = field(default_factory=time.perf_counter)
    last_log: tuple[float, int] = (0.0, 0)


def train(config: RunConfig, workdir: Path, *, command: str = "", progress: bool = True) -> dict[str, Any]:
    """Runs, or resumes, all phases of a config.

    Args:
      config: the run.
      workdir: where everything is left; see the README.
      command: how it was started, for the report.
      progress: show progress.

    Returns:
      The content of ``summary.json``.

    Raises:
      InputError: anything the user can mend; existing files are untouched.
    """
    mesh = make_mesh(config.mesh)
    check_devices(config, mesh.shape["data"] * mesh.shape["fsdp"])
    _make_workdir(workdir)
    with _lock(workdir):
        finished = _finished(config, workdir)
        if finished:
            print(f"{workdir}: this run is finished (validation loss {finished['val_loss']:.4f}); nothing to do.")
            return finished
        data = _load_data(config, progress)
        plans = make_plan(config)
        model = GPT(config.model)
        checkpoints = Checkpoints(workdir / "checkpoints", config.loop.keep_checkpoints)
        try:
            state, index, record = _first_state(config, workdir, data, plans, model, mesh, checkpoints)
            step = int(state.step)
            if record is None:
                write_json(workdir / "config.json", config.as_dict() | {"command": command})
            else:
                print(f"{workdir}: resuming after step {step} of {plans[-1].end}.")
            tracker = Tracker(workdir, resume_step=step, total_steps=plans[-1].end, progress=progress)
            total, seconds = total_cost(plans, step), record["seconds"] if record else 0.0
            run = Run(config, workdir, data, mesh, model, plans, checkpoints, tracker, total, seconds)
            try:
                return _run_phases(run, state, index)
            finally:
                tracker.close()
        finally:
            checkpoints.close()


def _run_phases(run: Run, state: TrainState, index: int) -> dict[str, Any]:
    for plan in run.plans[index:]:
        if plan.index > index:
            state = start_phase(
                state, plan.tx, plan.config.sparsity, plan.filter, reset_optimizer=plan.config.reset_optimizer
            )
        state = _run_phase(run, plan, state)
    return _finish(run)


def _first_state(
    config: RunConfig,
    workdir: Path,
    data: TokenData,
    plans: list[PhasePlan],
    model: GPT,
    mesh: Mesh,
    checkpoints: Checkpoints,
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """The state to go on from, the phase it belongs to, and its record (None for a new run)."""
    if checkpoints.latest_step() is None:
        plan = plans[0]
        return init_state(model, plan.tx, plan.config.sparsity, plan.filter, config.seed, mesh), 0, None
    record = checkpoints.record()
    plan = plans[min(record["phase"], len(plans) - 1)]
    abstract = abstract_state(model, plan.tx, plan.config.sparsity, plan.filter)
    state = checkpoints.restore(abstract, state_shardings(mesh, plan.tx, abstract))
    _check_same_run(config, workdir)
    if record["data_fingerprint"] != data.fingerprint:
        raise InputError(
            f"config.data: the data is not what this run was trained on so far (fingerprint {data.fingerprint[:12]}, "
            f"was {record['data_fingerprint'][:12]}); restore it, or start again with another --workdir"
        )
    return state, plan.index, record


def _run_phase(run: Run, plan: PhasePlan, state: TrainState) -> TrainState:
    """Steps of one phase. Step n + 1 is dispatched before the metrics of step n are fetched."""
    loop, programme = run.config.loop, plan.programme
    shardings = state_shardings(run.mesh, plan.tx, state)
    steps = make_steps(run.model, plan.tx, plan.learning_rate, programme.config.topology_rule, shardings)
    first = int(state.step)
    batches = _device_batches(run, plan, first - plan.start)
    pictures = _picture_steps(plan)
    if first == 0:
        _evaluate_and_log(run, plan, steps, state, 0)
    run.last_log = (time.perf_counter(), run.total.tokens)
    pending: tuple[int, Any] | None = None
    for step in range(first, plan.end):
        local = step - plan.start
        if local in pictures:
            _save_pictures(run, state, step)
        state, metrics = _one_step(steps, plan, local, state, next(batches))
        if pending is not None:
            _fetch_and_log(run, plan, *pending)
        pending = (step, metrics)
        done = step + 1
        evaluate, save = (
            done % n == 0 or done == plan.end for n in (loop.eval_every_steps, loop.checkpoint_every_steps)
        )
        if evaluate or save:
            # Only a state whose loss is known to be finite is evaluated or saved.
            _fetch_and_log(run, plan, *pending)
            pending = None
        if evaluate:
            _evaluate_and_log(run, plan, steps, state, done)
        if save:
            _save(run, plan, state)
    if plan.end - plan.start in pictures and first < plan.end:
        _save_pictures(run, state, plan.end)
    return state


def _one_step(steps: Steps, plan: PhasePlan, local: int, state: TrainState, batch_ABT: Batch) -> tuple[TrainState, Any]:
    pattern, width = plan.programme.attention(local)
    target = plan.programme.topology(local)
    if target is None:
        return steps.train(state, batch_ABT, pattern=pattern, width=width)
    target_nnz = {name: np.full((plan.programme.groups[name].count,), n, np.int32) for name, n in target.counts.items()}
    drop_fraction = np.float32(target.drop_fraction)
    return steps.topology(state, batch_ABT, target_nnz, drop_fraction, pattern=pattern, width=width)


def _device_batches(run: Run, plan: PhasePlan, start_batch: int) -> Iterator[Batch]:
    """Endless ``[A, B, T]`` batches on the mesh; each process loads its rows only."""
    accumulate = plan.config.grad_accumulation_steps
    sharding = batch_sharding(run.mesh, rank=3)
    for batch in train_batches(
        run.data.train,
        seq_len=plan.seq_len,
        batch_size=plan.config.batch_size,
        seed=run.config.seed + plan.index,
        start_batch=start_batch,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        micro = (x.reshape(accumulate, -1, x.shape[-1]) for x in batch)
        yield Batch(*(jax.make_array_from_process_local_data(sharding, x) for x in micro))


def _fetch_and_log(run: Run, plan: PhasePlan, step: int, metrics: dict[str, Any]) -> None:
    """Metrics of one step: fetched, checked, counted, and written when it is a step to log."""
    metrics = jax.device_get(metrics)
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise NonFiniteLossError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; stopped. The checkpoint at step "
            f"{run.checkpoints.latest_step()} is kept. Lower the learning rate or look at the data, and use another --workdir"
        )
    local, done = step - plan.start, step + 1
    run.total = run.total.plus(plan.cost(local))
    run.tracker.advance(done)
    row = {"step": done, "phase": plan.name}
    if done % run.config.loop.log_every_steps == 0 or done == plan.end:
        now = time.perf_counter()
        rate = (run.total.tokens - run.last_log[1]) / (now - run.last_log[0])
        run.last_log = (now, run.total.tokens)
        scalars = {name: float(metrics[name]) for name in ("loss", "learning_rate", "grad_norm")}
        # The sparsity that this step computed with; the masks of a topology step count from the next one.
        run.tracker.log(
            row
            | scalars
            | {"sparsity": plan.programme.sparsity(local)}
            | _cost_columns(run.total)
            | {"tokens_per_second": round(rate, 1)}
        )
    if "churn" in metrics:
        counts = plan.programme.counts(local + 1)
        density = {n: [c / plan.programme.groups[n].size] * plan.programme.groups[n].count for n, c in counts.items()}
        churn = {name: [round(float(c), 6) for c in values] for name, values in metrics["churn"].items()}
        run.tracker.log(row | {"sparsity": plan.programme.sparsity(local + 1), "density": density, "churn": churn})


def _cost_columns(total: StepCost) -> dict[str, int]:
    return {"train_flops": total.train_flops, "dense_flops": total.dense_flops, "tokens": total.tokens}


def _evaluate_and_log(run: Run, plan: PhasePlan, steps: Steps, state: TrainState, done: int) -> None:
    started = time.perf_counter()
    pattern, width = plan.programme.attention(max(0, done - plan.start - 1))
    loss = evaluate(run.config, run.data, run.mesh, steps, state.params, plan.seq_len, pattern, width)
    row = {"step": done, "phase": plan.name, "val_loss": loss, "sparsity": plan.programme.sparsity(done - plan.start)}
    run.tracker.log(row | _cost_columns(run.total))
    run.last_log = (run.last_log[0] + time.perf_counter() - started, run.last_log[1])  # tokens/s is of training


def evaluate(
    config: RunConfig,
    data: TokenData,
    mesh: Mesh,
    steps: Steps,
    params: Any,
    seq_len: int,
    pattern: str,
    width: int,
) -> float:
    """Mean loss in nats a token over the whole validation set, every token once."""
    sharding = batch_sharding(mesh, rank=2)
    sums = []
    for batch in validation_batches(
        data.validation,
        seq_len=seq_len,
        batch_size=config.loop.eval_batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    ):
        batch_BT = Batch(*(jax.make_array_from_process_local_data(sharding, x) for x in batch))
        sums.append(steps.evaluate(params, batch_BT, pattern=pattern, width=width))
    # Batch sums are float32; adding them up in Python keeps the total exact enough for any set.
    losses, weights = zip(*jax.device_get(sums), strict=True)
    return sum(map(float, losses)) / sum(map(float, weights))


def _save(run: Run, plan: PhasePlan, state: TrainState) -> None:
    check_invariants(plan, state)
    now = time.perf_counter()
    run.seconds, run.clock = run.seconds + now - run.clock, now
    step = int(state.step)
    record = {
        "phase": plan.index,
        "step": step,
        "next_example": (step - plan.start) * plan.config.batch_size,
        "data_fingerprint": run.data.fingerprint,
        "sparsity": plan.programme.sparsity(step - plan.start),
        "seconds": run.seconds,
        **_cost_columns(run.total),
    }
    run.checkpoints.save(state, record)


def check_invariants(plan: PhasePlan, state: TrainState) -> None:
    """Masks hold the exact target counts, and every masked weight is exactly 0; anything else is a bug, and is not saved.

    Raises:
      RuntimeError: naming the leaf.
    """
    if not plan.programme.groups:
        return
    local = int(state.step) - plan.start
    counts = jax.device_get(_counts(state.masks, state.params, plan.filter))
    nonzero = jax.device_get(_nonzero_where_masked(state.params, state.masks))
    for name, target in plan.programme.counts(local).items():
        if not (counts[name] == target).all():
            raise RuntimeError(f"{name}: masks hold {counts[name]} active weights, the programme says {target}")
        if nonzero[name]:
            raise RuntimeError(f"{name}: {nonzero[name]} masked weights are not zero")


_counts = jax.jit(active_counts, static_argnums=2)


@jax.jit
def _nonzero_where_masked(params: Any, masks: Any) -> dict[str, jax.Array]:
    return {
        name: jnp.sum((value != 0) & ~mask)
        for (name, value), (_, mask) in zip(named_leaves(params), named_leaves(masks), strict=True)
    }


def _finish(run: Run) -> dict[str, Any]:
    run.checkpoints.wait()
    last = run.plans[-1]
    evaluations = [row for row in read_metrics(run.workdir) if "val_loss" in row]
    device = jax.devices()[0]
    seconds = run.seconds + time.perf_counter() - run.clock
    summary = {
        "status": "finished",
        "experiment": run.config.experiment,
        "variant": run.config.variant,
        "steps": last.end,
        "tokens": run.total.tokens,
        "val_loss": evaluations[-1]["val_loss"],
        "initial_val_loss": evaluations[0]["val_loss"],
        "unigram_loss": unigram_loss(run.data.train, run.data.validation, run.config.model.vocab_size),
        "sparsity": last.programme.sparsity(last.config.steps),
        "train_flops": run.total.train_flops,
        "dense_flops": run.total.dense_flops,
        "flops_reduction": run.total.dense_flops / run.total.train_flops,
        "tokens_per_second": run.total.tokens / seconds,
        "wall_seconds": seconds,
        "device": f"{jax.device_count()} x {device.platform} {device.device_kind}",
        "parameters": parameter_count(run.config.model),
    }
    write_json(run.workdir / "summary.json", summary)
    run.tracker.message(
        f"validation loss {summary['initial_val_loss']:.3f} at first, {summary['val_loss']:.3f} at last; predicting every "
        f"token by its training frequency gives {summary['unigram_loss']:.3f}.\n"
        f"{summary['flops_reduction']:.2f}x fewer training FLOPs than dense (counted, not saved in seconds: masks simulate "
        f"sparsity). Report: {write_report(run.workdir)}"
    )
    return summary


def _picture_steps(plan: PhasePlan) -> set[int]:
    """Phase steps before which masks are pictured: the first, the first of the sparsest, the end."""
    if not plan.programme.groups:
        return set()
    every = range(plan.config.steps + 1)
    return {0, max(every, key=lambda step: (plan.programme.sparsity(step), -step)), plan.config.steps}


def _save_pictures(run: Run, state: TrainState, step: int) -> None:
    """First and last layer of an attention and an MLP matrix, and the head if it is masked."""
    pictures = {}
    for name, mask in named_leaves(state.masks):
        if mask.ndim == 3 and name.startswith(("blocks/attn_q", "blocks/mlp_up")):
            for layer in sorted({0, mask.shape[0] - 1}):
                pictures[f"{name}/{layer}"] = mask_picture(np.asarray(mask[layer]))
        elif mask.ndim == 2:
            pictures[name] = mask_picture(np.asarray(mask))
    save_mask_picture(run.workdir, step, pictures)


def evaluate_checkpoint(config: RunConfig, workdir: Path) -> dict[str, Any]:
    """Perplexity of the newest checkpoint over the whole validation set, per token and per UTF-8 byte.

    Prints one line and writes ``evaluation.json``.

    Raises:
      InputError: no checkpoint there, or one of another model.
    """
    if not (workdir / "checkpoints").is_dir():
        raise InputError(f"{workdir / 'checkpoints'}: no checkpoint there; train first with --job train")
    mesh = make_mesh(config.mesh)
    check_devices(config, mesh.shape["data"] * mesh.shape["fsdp"])
    data = _load_data(config, progress=True)
    plans, model = make_plan(config), GPT(config.model)
    checkpoints = Checkpoints(workdir / "checkpoints", config.loop.keep_checkpoints)
    state, index, _ = _first_state(config, workdir, data, plans, model, mesh, checkpoints)
    checkpoints.close()
    plan = plans[index]
    steps = make_steps(model, plan.tx, plan.learning_rate, plan.programme.config.topology_rule)
    pattern, width = plan.programme.attention(int(state.step) - plan.start - 1)
    loss = evaluate(config, data, mesh, steps, state.params, plan.seq_len, pattern, width)
    result: dict[str, Any] = {"step": int(state.step), "val_loss": loss, "perplexity": math.exp(loss)}
    if data.validation_bytes:
        tokens = data.validation.shape[0] - 1
        result["perplexity_per_byte"] = math.exp(loss * tokens / data.validation_bytes)
    write_json(workdir / "evaluation.json", result)
    print(
        ", ".join(
            f"{key} {value:.4f}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
        )
    )
    return result


def _load_data(config: RunConfig, progress: bool) -> TokenData:
    data = prepare(config.data, progress=progress)
    if data.vocab_size > config.model.vocab_size:
        raise InputError(
            f"config.data: token id {data.vocab_size - 1} is at or over config.model.vocab_size {config.model.vocab_size}; "
            f"set config.model.vocab_size to at least {data.vocab_size}"
        )
    return data


def _make_workdir(workdir: Path) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".lock").touch()
    except OSError as error:
        raise InputError(
            f"workdir {workdir}: cannot write there ({error.strerror}); choose another --workdir"
        ) from None


@contextlib.contextmanager
def _lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this process; the kernel lets go however the process ends."""
    with (workdir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"workdir {workdir}: another run is using it; wait for it to end, or choose another --workdir"
            ) from None
        yield


def _finished(config: RunConfig, workdir: Path) -> dict[str, Any] | None:
    path = workdir / "summary.json"
    if not path.exists():
        return None
    _check_same_run(config, workdir)
    return json.loads(path.read_text())


def _check_same_run(config: RunConfig, workdir: Path) -> None:
    """Refuses to continue a run under another config; `loop` and `mesh` alone may differ."""
    path = workdir / "config.json"
    if not path.exists():
        return
    saved, ours = (_flat(c) for c in (json.loads(path.read_text()), config.as_dict()))
    free = ("loop.", "mesh.", "command", "data.cache_dir")
    differing = [
        f"{key} was {saved.get(key)!r}, is {ours.get(key)!r}"
        for key in sorted(saved.keys() | ours.keys())
        if saved.get(key) != ours.get(key) and not key.startswith(free)
    ]
    if differing:
        raise InputError(
            f"workdir {workdir}: holds a run of another config ({'; '.join(differing[:4])}); choose another --workdir, or run "
            f"with the same config to resume"
        )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix[:-1]: values}
    return {k: v for key, value in values.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
