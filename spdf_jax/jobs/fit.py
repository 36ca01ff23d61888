"""A run of any model: what ``--job train`` is for the GPT, for a loss over any pytree of parameters."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import optax

from spdf_jax import processes
from spdf_jax.cloud.spool import located
from spdf_jax.config.read import build_section
from spdf_jax.config.run import LoopConfig
from spdf_jax.errors import InputError
from spdf_jax.jobs.pages import accompanied, finished_page, write_run_page
from spdf_jax.processes import device_name
from spdf_jax.sharding import MeshConfig, make_mesh
from spdf_jax.sparsity.programme import Programme
from spdf_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from spdf_jax.training.clock import Clock
from spdf_jax.training.extension import set_end_aside
from spdf_jax.training.loop import Run, run_phase
from spdf_jax.training.loss_function import LossFunction
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.own_model import PHASE, check_same_fit, identity, own_feed, own_plan, own_state
from spdf_jax.training.phases import StepCost
from spdf_jax.training.provenance import add_start, fingerprint_of_rule, is_own
from spdf_jax.training.resume import elsewhere, has_begun, made_run, opened
from spdf_jax.training.state import TrainState, state_shardings
from spdf_jax.training.trackers import Followers, check_trackers
from spdf_jax.workdir import CONFIG_FILE, SUMMARY_FILE, lock, made_workdir, read_json, write_json


def fit(
    loss_fn: Callable[[Any, Any], Any],
    params: Any,
    batches: Callable[[int], Iterable[Any]],
    tx: optax.GradientTransformation,
    masks: Any,
    programme: Programme,
    workdir: Path | str,
    *,
    validation: Callable[[], Iterable[Any]] | None = None,
    key: jax.Array | None = None,
    devices: int = 1,
    progress: bool = True,
    **loop: Any,
) -> tuple[TrainState, dict[str, Any]]:
    """Trains any model with masks that move, by the steps, the loop and the checkpoints of `spdf_jax.train`.

    The same call again goes on from the last checkpoint, whatever ended it, and ends with the same bits; when the run is
    finished it returns what that came to. With a programme of more steps it goes on, too, if that says the same of those that
    were taken; so must a schedule in `tx`, which cannot be compared. A dense phase after it is a run of its own, from
    ``state.params`` with `spdf_jax.dense_masks` and ``make_programme(params, steps)``.

    Args:
      loss_fn: ``(params, batch) -> loss``, a scalar, or ``(sum of losses, sum of their weights)``. What it draws at random, it
        draws from a number or a key in the batch. State beside the parameters, such as running means, is not carried from step
        to step. Its code is not compared when a run goes on, nor are the numbers inside `tx`: its state's shapes are, and a
        rule of one's own that has changed is said.
      params: the parameters, a pytree of float arrays: a dict, `flax.nnx.State`, an Equinox module. They are not changed.
      batches: ``start_batch -> iterator`` over the batches from that number on, the same every time: pytrees of arrays. A
        step takes one, a topology step too.
      tx: any optax optimiser. The rule of the programme wraps it, as `spdf_jax.sparse` does; it may be wrapped already. A
        schedule in it counts its updates: a topology step makes none. Of a schedule-free one the average is validated, which
        is in ``state.variables``; ``state.params`` are where it steps.
      masks: those to begin with, see `spdf_jax.init_masks`; as many weights are active in them as in the programme at step 0.
      programme: from `spdf_jax.make_programme`, for as many steps as the run is to take.
      workdir: the folder in which everything is left, as by `spdf_jax.train`.
      validation: ``() -> iterator`` over batches whose mean loss is measured every ``eval_every_steps`` and at the end.
      key: of what topology steps draw; `jax.random.key(0)` by default.
      devices: among how many the first axis of every array of a batch is split; -1: all.
      progress: show progress.
      loop: any of a config's ``loop`` section, such as ``checkpoint_every_steps=1000``.

    Returns:
      ``(state, summary)``: ``state.params`` and ``state.masks`` are trees as given; ``summary`` is the content of
      ``summary.json``: ``loss`` of the last step, ``val_loss`` if there is a validation, ``wall_seconds`` and others.

    Raises:
      InputError: anything the caller can fix, a workdir of another run for one; existing files are untouched.

    >>> import tempfile, jax.numpy as jnp, spdf_jax as spdf
    >>> params, filter = {"w": jnp.ones((8, 8))}, [("w", "matrix")]
    >>> masks = spdf.init_masks(jax.random.key(0), params, sparsity=0.75, filter=filter)
    >>> programme = spdf.make_programme(params, 6, filter=filter, rule="rigl", sparsity=0.75, update_every_steps=2)
    >>> def loss_fn(params, x):
    ...     return jnp.mean((x @ params["w"] - x) ** 2)
    >>> def batches(start):
    ...     return (jax.random.normal(jax.random.key(i), (4, 8)) for i in range(start, 6))
    >>> given = (loss_fn, params, batches, optax.adam(0.1), masks, programme, tempfile.mkdtemp())
    >>> state, summary = fit(*given, progress=False)  # doctest: +ELLIPSIS
    step 6: loss ... Report: ...report.html
    >>> int(state.masks["w"].sum()), int((state.params["w"] != 0).sum()), summary["steps"]
    (16, 16, 6)
    """
    if jax.process_count() > 1:
        raise InputError(f"fit: runs in one process, and this is one of {jax.process_count()}; start it alone")
    clock = Clock()
    workdir, how = located(workdir), _loop_config(loop, validation is not None)
    check_trackers(how.tracker_names, workdir)
    mesh = make_mesh(MeshConfig(data=devices))
    plan = own_plan(tx, params, programme, how.eval_every_steps if validation is not None else 0)
    with jax.set_mesh(mesh):
        first = own_state(plan, params, masks, jax.random.key(0) if key is None else key, mesh)
        feed = own_feed(loss_fn, params, batches, validation, mesh.size)
    run_is = identity(plan, feed, first, how)
    with clock, made_workdir(workdir), lock(workdir), jax.set_mesh(mesh):
        has_begun(workdir)
        lengths = check_same_fit(run_is, plan, workdir)
        with opened(workdir, how) as found:
            state, record = _newest(found[0], first, state_shardings(mesh, plan.tx, first))
            step, config = int(state.step), {"experiment": PHASE, "variant": workdir.name, **run_is}
            if not lengths and (summary := _finished(workdir, step)):
                Followers(workdir, how.tracker_names, summary["rows"]["bytes"], print).close(finished=True)
                return state, summary
            if step:
                print(f"{workdir}: resuming after step {step} of {plan.end}.{elsewhere(record)}", flush=True)
            else:
                write_json(workdir / CONFIG_FILE, config)
            parts = (workdir, how, mesh, LossFunction(loss_fn), [plan], [feed], found, record)
            run, alive = made_run(*parts, step=step, total=StepCost(), clock=clock, progress=progress)
            rule = programme.config.rule
            own = {rule: fingerprint_of_rule(rule, {})} if is_own(rule) else {}
            add_start(workdir, "", step, own, alive, changed=lengths)
            if lengths:
                set_end_aside(workdir)
                write_json(workdir / CONFIG_FILE, config)
            with accompanied(run):
                state = run_phase(run, plan, state)
                processes.beat(0, 0)
                return state, _finish(run, state)


def _loop_config(loop: dict[str, Any], validates: bool) -> LoopConfig:
    config: LoopConfig = build_section("loop", LoopConfig, loop)
    if "eval_batch_size" in loop:
        raise InputError(
            "loop.eval_batch_size: would be ignored, since validation gives its batches as they are; leave it out"
        )
    if "eval_every_steps" in loop and not validates:
        raise InputError("loop.eval_every_steps: would be ignored without a validation; leave it out, or give one")
    return config


def _newest(checkpoints: Checkpoints, first: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state to go on from, and what is recorded with it."""
    while checkpoints.latest_step() is not None:
        try:
            record = checkpoints.record()
            return checkpoints.restore(jax.eval_shape(lambda: first), shardings), record
        except DamagedCheckpointError as damage:
            print(checkpoints.fall_back(damage), flush=True)
    return first, {}


def _finished(workdir: Path, step: int) -> dict[str, Any] | None:
    """The summary of a run that is finished, and whose result is there and sound; a missing report is made again."""
    if not (workdir / SUMMARY_FILE).exists():
        return None
    summary = read_json(workdir / SUMMARY_FILE, "delete it, and call fit again: the run makes it again")
    if summary.get("steps") != step:
        return None
    finished_page(workdir)
    print(f"{workdir}: this run is finished; nothing to do.", flush=True)
    return summary


def _finish(run: Run, state: TrainState) -> dict[str, Any]:
    run.checkpoints.wait()
    run.followers.saved()
    run.clock.spent("saving")
    (plan,), step = run.plans, int(state.step)
    summary: dict[str, Any] = {"status": "finished", "experiment": PHASE, "variant": run.workdir.name, "steps": step}
    losses = [row["loss"] for row in read_metrics(run.workdir) if "loss" in row]
    if losses:  # else the rows are gone
        summary["loss"] = losses[-1]
    if run.evaluations:
        evaluations = list(run.evaluations.values())
        summary |= {"val_loss": evaluations[-1], "initial_val_loss": evaluations[0]}
    summary |= {
        "sparsity": plan.programme.sparsity(step),
        "wall_seconds": run.clock.of_the_result,
        "seconds": run.clock.rounded(),
        "device": device_name(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "rows": run.tracker.make_durable(),
    }
    write_json(run.workdir / SUMMARY_FILE, summary)
    which = "validation loss" if "val_loss" in summary else "loss"
    found = summary.get("val_loss", summary.get("loss", float("nan")))
    run.tracker.message(f"step {step}: {which} {found:.4f}. Report: {write_run_page(run.workdir)}")
    return summary
