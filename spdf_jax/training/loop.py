"""The loop over one phase: batches in, steps dispatched, metrics, evaluation, pictures and checkpoints out."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spdf_jax import processes
from spdf_jax.config.run import LoopConfig
from spdf_jax.errors import InputError, Restart
from spdf_jax.model.gpt import GPT
from spdf_jax.processes import device_name
from spdf_jax.sharding import batch_sharding
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.clock import Clock
from spdf_jax.training.early_stopping import best_evaluation, of_phase, stops_early
from spdf_jax.training.feed import Feed
from spdf_jax.training.invariants import check_invariants
from spdf_jax.training.loss_function import LossFunction
from spdf_jax.training.mask_pictures import save_mask_pictures
from spdf_jax.training.metrics import Tracker
from spdf_jax.training.phases import PhasePlan, StepCost, task_tokens
from spdf_jax.training.programs import Steps, make_steps
from spdf_jax.training.state import TrainState, state_shardings
from spdf_jax.training.trackers import Followers
from spdf_jax.workdir import PROFILE_FOLDER


class NonFiniteLossError(InputError):
    """The loss is NaN or infinite; the last good checkpoint is kept."""


@dataclass
class Run:
    """What every part of the loop needs, and the counters that move."""

    loop: LoopConfig
    workdir: Path
    mesh: Mesh
    model: GPT | LossFunction
    plans: list[PhasePlan]
    feeds: list[Feed]
    origin: dict[str, Any]  # of a run that goes on from another: what of, see `jobs`
    checkpoints: Checkpoints
    best: Checkpoints | None  # of the phase that stops early
    tracker: Tracker
    followers: Followers
    total: StepCost
    clock: Clock  # over all restarts
    evaluations: dict[tuple[str, int], float]  # validation loss by phase and step, over all restarts
    last_log: tuple[float, int] = (0.0, 0)
    step: int = 0  # the last whose metrics were fetched
    write_page: Callable[[], None] = lambda: None  # after an evaluation


def run_phase(run: Run, plan: PhasePlan, state: TrainState) -> TrainState:
    """Steps of one phase. Step n + 1 is dispatched before the metrics of step n are fetched."""
    loop, first = run.loop, int(state.step)
    steps = make_phase_steps(run.model, plan, run.mesh, state)
    run.clock.spent("starting")
    if first == plan.start and plan.eval_every_steps and starts_anew(run.feeds, plan):
        _evaluate_and_log(run, plan, steps, state, first)
    run.last_log = (time.perf_counter(), run.total.tokens)
    _save_pictures(run, plan, state, first if first < plan.end else -1)
    pending: tuple[int, StepCost, Any] | None = None
    numbers = traced(_watched(range(first, plan.end), loop.watchdog_seconds), loop.profiled_steps, run.workdir)
    feed = run.feeds[plan.index]
    timed = feed._replace(train=lambda start: run.clock.waiting(feed.train(start)))
    taken = take_steps(plan, timed, run.mesh, steps, state, numbers, run.evaluations)
    for step, state, metrics, cost in taken:
        run.clock.computing = metrics["loss"]
        if pending is not None:
            _fetch_and_log(run, plan, *pending)
        pending = (step, cost, metrics)
        done = step + 1
        evaluate, preempted = plan.evaluates_after(done), processes.preempted(done)
        save = preempted or done == plan.end or done % loop.checkpoint_every_steps == 0
        if evaluate or save:
            # Only a state whose loss is known to be finite is evaluated or saved.
            _fetch_and_log(run, plan, *pending)
            pending = None
        if evaluate:
            _evaluate_and_log(run, plan, steps, state, done)
        if save:
            _save(run, run.checkpoints, plan, state)
        if preempted:
            run.checkpoints.wait()
            run.followers.saved()
            raise Restart(f"preempted: saved at step {done}; the same command resumes")
        _save_pictures(run, plan, state, done)
    return state


def make_phase_steps(model: GPT | LossFunction, plan: PhasePlan, mesh: Mesh, state: TrainState) -> Steps:
    """The compiled steps of a phase, for states laid out as `state` is (arrays or shapes)."""
    shardings = state_shardings(mesh, plan.tx, state)
    rule, regrowth = plan.programme.config.topology_rule, plan.config.optimizer.regrowth
    return make_steps(model, plan.tx, plan.learning_rate, rule, shardings, regrowth)


def take_steps(
    plan: PhasePlan,
    feed: Feed,
    mesh: Mesh,
    steps: Steps,
    state: TrainState,
    numbers: Iterable[int],
    evaluations: Mapping[tuple[str, int], float],
) -> Iterator[tuple[int, TrainState, dict[str, Any], StepCost]]:
    """The steps of a phase, for `run_phase` and `spdf_jax.watch_training` alike.

    Args:
      plan, feed, steps: of the phase.
      mesh: where batches go.
      state: before the first step taken; donated, as every one that is given out is when the next is asked for.
      numbers: steps of the run to take, counted from 0.
      evaluations: validation losses by phase and step, to which who takes the steps adds: they may end the phase early.

    Yields:
      ``(step, state, metrics, cost)``: the state after the step, and its metrics, still on the devices.
    """
    batches = device_batches(feed, mesh, plan, int(state.step) - plan.start)
    for step in numbers:
        if stops_early(of_phase(evaluations, plan.name), plan.config.patience_evaluations):
            return
        batch_ABT, local = next(batches), step - plan.start
        state, metrics = one_step(steps, plan, local, state, batch_ABT)
        if plan.config.task.name:
            metrics |= {"tokens": task_tokens(batch_ABT.weights_BT)}
        yield step, state, metrics, plan.cost(local, batch_ABT.tokens_BT.shape[-1] if plan.seq_len else 0)


def _watched(numbers: Iterable[int], seconds: int) -> Iterator[int]:
    """Tells the watchdog that another step begins."""
    for step in numbers:
        processes.beat(step + 1, seconds)
        yield step


def _save_pictures(run: Run, plan: PhasePlan, state: TrainState, done: int) -> None:
    """Pictures of the masks after `done` steps of the run, where the plan has them."""
    if done - plan.start in plan.picture_steps:
        save_mask_pictures(run.workdir, done, state.element_masks())
        run.clock.spent("reporting")


def one_step(steps: Steps, plan: PhasePlan, local: int, state: TrainState, batch_ABT: Any) -> tuple[TrainState, Any]:
    """Dispatches step `local` of a phase: a topology step or an optimiser step."""
    pattern, width = plan.programme.attention(local)
    target = plan.programme.topology(local)

    def target_nnz(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {name: np.full((plan.programme.groups[name].count,), n, np.int32) for name, n in counts.items()}

    if target is None:
        chosen = plan.programme.config.topology_rule.choose_each_step is not None
        targets = [target_nnz(plan.programme.counts(local + 1))] if chosen else []
        return steps.train(state, batch_ABT, *targets, pattern=pattern, width=width)
    drop_fraction = np.float32(target.drop_fraction)
    return steps.topology(state, batch_ABT, target_nnz(target.counts), drop_fraction, pattern=pattern, width=width)


def device_batches(feed: Feed, mesh: Mesh, plan: PhasePlan, start_batch: int) -> Iterator[Any]:
    """Endless ``[A, B, ...]`` batches on the mesh; each process loads its rows only."""
    accumulate = plan.config.grad_accumulation_steps

    def load(x: Any) -> jax.Array:
        rows = x.reshape(accumulate, -1, *x.shape[1:]) if x.ndim else x[None]
        return jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim, axis=1), rows)

    for batch in feed.train(start_batch):
        yield jax.tree.map(load, batch)


def starts_anew(feeds: Sequence[Feed], plan: PhasePlan) -> bool:
    """Whether nothing comparable was measured before a phase: it is the first, on other data, or seeks the best of its own."""
    before = feeds[max(plan.index - 1, 0)].fingerprint
    return plan.index == 0 or before != feeds[plan.index].fingerprint or plan.config.patience_evaluations > 0


def _fetch_and_log(run: Run, plan: PhasePlan, step: int, cost: StepCost, metrics: dict[str, Any]) -> None:
    """Metrics of one step: fetched, checked, counted, and written when it is a step to log."""
    metrics = jax.device_get(metrics)
    run.clock.spent("topology" if "churn" in metrics else "training")
    run.step = step + 1
    if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["grad_norm"]):
        raise NonFiniteLossError(
            f"step {step + 1}: loss {metrics['loss']}, gradient norm {metrics['grad_norm']}; stopped. "
            f"{run.checkpoints.kept()} Lower the learning rate or look at the data, and use another --workdir"
        )
    local, done = step - plan.start, step + 1
    run.total = run.total.plus(cost.of_tokens(int(metrics["tokens"])) if "tokens" in metrics else cost)
    run.tracker.advance(done)
    row = {"step": done, "phase": plan.name, "time": round(time.time(), 3)}
    if done % run.loop.log_every_steps == 0 or done == plan.end:
        now = time.perf_counter()
        rate = (run.total.tokens - run.last_log[1]) / (now - run.last_log[0])
        run.last_log = (now, run.total.tokens)
        names = ("loss", "learning_rate", "grad_norm") if plan.learning_rate else ("loss", "grad_norm")
        # The sparsity that this step computed with; the masks of a topology step count from the next one.
        row_of_step = {name: float(metrics[name]) for name in names} | {"sparsity": plan.programme.sparsity(local)}
        counted = run.total._asdict() | {"tokens_per_second": round(rate, 1)} if plan.seq_len else {}
        run.tracker.log(row | row_of_step | counted)
    if "churn" in metrics:
        counts = plan.programme.counts(local + 1)
        density = {n: [c / plan.programme.groups[n].size] * plan.programme.groups[n].count for n, c in counts.items()}
        churn = {name: [round(float(c), 6) for c in values] for name, values in metrics["churn"].items()}
        run.tracker.log(row | {"sparsity": plan.programme.sparsity(local + 1), "density": density, "churn": churn})


def _evaluate_and_log(run: Run, plan: PhasePlan, steps: Steps, state: TrainState, done: int) -> None:
    started = time.perf_counter()

    def validation() -> Iterator[Any]:
        for batch in run.feeds[plan.index].validation():
            processes.beat(done, run.loop.watchdog_seconds)
            yield batch

    loss = evaluate(validation(), run.mesh, steps, state.variables, *plan.attention_after(done))
    run.evaluations[plan.name, done] = loss
    run.clock.spent("evaluation")
    row = {"step": done, "phase": plan.name, "time": round(time.time(), 3)}
    row |= {"val_loss": loss, "sparsity": plan.programme.sparsity(done - plan.start)}
    run.tracker.log(row | (run.total._asdict() if plan.seq_len else {}) | {"seconds": run.clock.rounded()})
    if plan.config.patience_evaluations and best_evaluation(of_phase(run.evaluations, plan.name)) == done:
        assert run.best is not None, "a phase that may stop early has where to keep its best state"
        _save(run, run.best.drop_from(done), plan, state)
        run.best.wait()  # before a checkpoint that comes after it
    run.write_page()
    run.clock.spent("reporting")
    run.last_log = (run.last_log[0] + time.perf_counter() - started, run.last_log[1])  # tokens/s is of training


def evaluate(batches: Iterator[Any], mesh: Mesh, steps: Steps, variables: Any, pattern: str, width: int) -> float:
    """Mean loss over all batches of a validation or test set; of the GPT in nats a target."""

    def load(x: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(batch_sharding(mesh, x.ndim, axis=0), x)

    sums = [steps.evaluate(variables, jax.tree.map(load, batch), pattern=pattern, width=width) for batch in batches]
    # Batch sums are float32; adding them up in Python keeps the total exact enough for any set.
    losses, weights = zip(*jax.device_get(sums), strict=True)
    return sum(map(float, losses)) / sum(map(float, weights))


def _save(run: Run, checkpoints: Checkpoints, plan: PhasePlan, state: TrainState) -> None:
    check_invariants(plan.programme, plan.filter, state, plan.start)
    step = int(state.step)
    run.clock.spent("saving")
    record = {
        "phase": plan.index,
        "step": step,
        "next_example": plan.first_example + (step - plan.start) * plan.config.batch_size,
        "order": plan.order,
        "data_fingerprint": run.feeds[plan.index].fingerprint,
        "data_fingerprints": [feed.fingerprint for feed in run.feeds],
        "origin": run.origin,
        "sparsity": plan.programme.sparsity(step - plan.start),
        "clock": run.clock.recorded(),
        "device": device_name(),
        "evaluations": [[*place, loss] for place, loss in run.evaluations.items()],
        "rows": run.tracker.make_durable(),
        **run.total._asdict(),
    }
    checkpoints.save(state, record)
    if checkpoints is run.checkpoints:
        run.followers.saving(record["rows"])
    run.clock.spent("saving")


def traced(steps: Iterable[int], span: range, workdir: Path) -> Iterator[int]:
    """`steps` as they are; a profile of those in `span` is left in ``WORKDIR/profile``, for TensorBoard and xprof."""
    tracing = False
    try:
        for step in steps:
            if tracing and step >= span.stop:
                jax.block_until_ready(jax.live_arrays())  # steps are dispatched ahead of what they compute
                jax.profiler.stop_trace()
                tracing = False
            if step in span and not tracing and processes.is_first():
                jax.profiler.start_trace(Path(workdir) / PROFILE_FOLDER)
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                yield step
    finally:
        if tracing:
            jax.profiler.stop_trace()
