"""The job `train`: start, resume, finish."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spdf_jax import processes
from spdf_jax.cloud.spool import located
from spdf_jax.config.checks import check_devices
from spdf_jax.config.read import AnyConfig, resolve
from spdf_jax.config.run import RunConfig
from spdf_jax.data import TokenData, unigram_loss
from spdf_jax.errors import InputError
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.jobs.pages import accompanied, finished_page, write_run_page
from spdf_jax.model.flops import parameter_count
from spdf_jax.model.gpt import GPT
from spdf_jax.planning.describe import describe
from spdf_jax.processes import device_name
from spdf_jax.sharding import batch_devices, make_mesh
from spdf_jax.training.ancestry import ancestors, keep_lineage
from spdf_jax.training.branch import Parent, branch, cost_so_far
from spdf_jax.training.checkpoint import Checkpoints, DamagedCheckpointError
from spdf_jax.training.clock import Clock
from spdf_jax.training.early_stopping import best_evaluation, of_phase
from spdf_jax.training.extension import check_same_or_longer, set_end_aside, with_lengths
from spdf_jax.training.feed import Feed, load_data, make_feed, sources_read
from spdf_jax.training.loop import Run, run_phase
from spdf_jax.training.phases import PhasePlan, make_plan, recorded_cost
from spdf_jax.training.provenance import (
    Source,
    check_same_code,
    keep_identity,
    kept_start,
    read_code,
    record_start,
    write_config,
)
from spdf_jax.training.pruning import pruner
from spdf_jax.training.restore import (
    begin_of,
    check_same_data,
    check_same_origin,
    cost_before,
    enter_phase,
    first_state,
    initial_from,
    read_summary,
    restore_state,
    saved_run,
)
from spdf_jax.training.resume import elsewhere, has_begun, made_run, opened, recorded_evaluations
from spdf_jax.training.sources import source_folder
from spdf_jax.training.state import TrainState
from spdf_jax.training.stored_state import fingerprint
from spdf_jax.training.teachers import first_teacher, load_teacher
from spdf_jax.training.trackers import Followers, check_trackers
from spdf_jax.workdir import SUMMARY_FILE, lock, made_workdir, write_json


def run(config: RunConfig, request: Request) -> None:
    """`train`, which says what it is about to do once nothing refuses it any more."""
    code, command = kept_start(request.workdir) if request.alone else (read_code(config, request.file), request.command)
    keep_compiled(config.data)
    with request.training(config):
        processes.guard()
        train_with(config, request.workdir, code, command=command, progress=not request.quiet, announce=True)


def train(
    config: AnyConfig, workdir: Path | str, *, command: str = "", file: Path | str = "", progress: bool = True
) -> dict[str, Any]:
    """Runs, or resumes, all phases of a config, as ``--job train`` does.

    Args:
      config: the run: what `spdf_jax.resolve` returns, or what it takes.
      workdir: the folder in which everything is left: ``report.html``, ``metrics.jsonl``, ``summary.json``, ``checkpoints/``.
      command: how it was started, for the report.
      file: of the experiment, which the workdir keeps.
      progress: show progress.

    Returns:
      The content of ``summary.json``: ``val_loss`` (nats/token), ``tokens``, ``train_flops``, ``wall_seconds`` and others.

    Raises:
      InputError: anything the user can fix; existing files are untouched.

    ``summary = train(config, workdir="runs/mine")`` trains; the same call again resumes, or returns the summary of a finished
    run. Nothing is written before the whole config is sound:

    >>> import spdf_jax as spdf
    >>> config = spdf.default_config("mine", "mini", variants=("mini",))
    >>> config.pretrain.sparsity.rule, config.pretrain.sparsity.sparsity = "static", 1.0
    >>> train(config, workdir="runs/mine")
    Traceback (most recent call last):
    spdf_jax.errors.InputError: config.pretrain.sparsity.sparsity: 1.0 must be at least 0 and below 1; the default is 0.0
    """
    config = resolve(config)
    code = read_code(config, file)
    return train_with(config, located(workdir), code, command=command, progress=progress)


def train_with(
    config: RunConfig,
    workdir: Path,
    code: Mapping[str, Source],
    *,
    command: str,
    progress: bool,
    announce: bool = False,
) -> dict[str, Any]:
    """`train` with `spdf_jax.training.provenance.read_code` as it was at the start; `announce`: print the run's plan first."""
    clock, mesh, names = Clock(), make_mesh(config.mesh), config.loop.tracker_names
    check_trackers(names, workdir)
    check_devices(config, batch_devices(mesh))
    processes.agree("config", json.dumps(config.as_dict()), "start all of them with the same command and files")
    plans = make_plan(config)
    with clock, made_workdir(workdir), lock(workdir), jax.set_mesh(mesh):
        begun = has_begun(workdir)
        parent, plans = (None, make_plan(config, begin_of(workdir))) if begun else branch(config, workdir, plans, mesh)
        moved, lengths = check_same_or_longer(config, workdir, plans)
        if begun:
            check_same_code(config, workdir, code)
        finished = None if lengths else _finished(config, workdir, mesh)
        if finished and not moved:
            return _nothing_to_do(workdir, finished, names)
        tokens, tokenizer = load_data(config, workdir, plans, begun=begun, progress=progress)
        feeds = [make_feed(config, plan, tokens, tokenizer, mesh) for plan in plans]
        processes.agree("config.data", "".join(f.fingerprint for f in feeds), "give all of them the same data")
        lineage = [] if begun else ancestors(config, workdir, parent, feeds[0].fingerprint)
        stops_early = plans[-1].config.patience_evaluations > 0
        with opened(workdir, config.loop, best=stops_early) as (checkpoints, best):
            if best:
                _go_back_for_best(config, workdir, plans[-1], mesh, checkpoints, best)
            state, index, record = _first_state(config, workdir, feeds, plans, mesh, checkpoints, moved, parent)
            teacher, teachers = None, dict[str, str]()
            if not finished or any(key.endswith(".distill.teacher") for key in moved):
                teacher, teachers = first_teacher(config, workdir, plans[index:], mesh, tokenizer, record)
            if finished:
                return _nothing_to_do(workdir, finished, names)
            step, first_step = int(state.step), plans[0].start
            if step == first_step:
                keep_lineage(workdir, lineage)
            keep_identity(config, workdir, command, tokenizer, plans[0].begin, new=step == first_step)
            parts = (workdir, config.loop, mesh, GPT(config.model), plans, feeds, (checkpoints, best), record)
            total = recorded_cost(record, plans, step)
            run, alive = made_run(*parts, step=step, total=total, clock=clock, progress=progress)
            run.teacher, run.teachers = teacher, teachers
            if announce:  # nothing refuses the run any more
                run.tracker.message(describe(config))
                for name, read in sources_read(plans, tokens).items():
                    run.tracker.message(f"{name}: {read['share']:.4g} of the examples, {read['epochs']:.3g} epochs")
            if step > first_step:
                run.tracker.message(f"{workdir}: resuming after step {step} of {plans[-1].end}.{elsewhere(record)}")
            record_start(config, workdir, code, command, step, alive, first_step, lengths)
            if lengths:
                set_end_aside(workdir)
                write_config(config, workdir, with_lengths(command, lengths), plans[0].begin)
            return _run_phases(config, run, index, state, tokens)


def _run_phases(config: RunConfig, run: Run, index: int, state: TrainState, tokens: TokenData | None) -> dict[str, Any]:
    """Phases from `index` on, whose state it is, and the summary at their end."""
    with accompanied(run):
        for plan in run.plans[index:]:
            if plan.index > index:
                prune = pruner(config.model, plan, run.feeds[plan.index].train, run.mesh)
                state = enter_phase(state, plan, run.mesh, prune)
            run.teacher = load_teacher(config, run.workdir, plan, run.mesh, run.teacher, run.teachers)
            state = run_phase(run, plan, state)
        processes.beat(0, 0)
        return _finish(config, run, int(state.step), tokens)


def _nothing_to_do(workdir: Path, summary: dict[str, Any], trackers: list[str]) -> dict[str, Any]:
    Followers(workdir, trackers, summary.get("rows", {}).get("bytes", 0), print).close(finished=True)
    print(f"{workdir}: this run is finished (validation loss {summary['val_loss']:.4f}); nothing to do.")
    return summary


def _first_state(
    config: RunConfig,
    workdir: Path,
    feeds: list[Feed],
    plans: list[PhasePlan],
    mesh: Mesh,
    checkpoints: Checkpoints,
    moved: list[str],
    parent: Parent | None,
) -> tuple[TrainState, int, dict[str, Any]]:
    """The state to go on from, the phase it belongs to, and what is recorded with it."""
    source, prune = source_folder(config, workdir), pruner(config.model, plans[0], feeds[0].train, mesh)
    if checkpoints.latest_step() is None:
        parent = parent or branch(config, workdir, plans, mesh, plans[0].start)[0]
        before = cost_so_far(parent) if parent else cost_before(source) if source else None
        state = parent.state if parent else first_state(config, plans[0], mesh, source, prune)
        origin = {"fingerprint": fingerprint(state), "before": before} if source else {}
        return state, 0, {"origin": origin}
    try:
        record = checkpoints.record()
        if "init_from" in moved:
            parent, _ = branch(config, workdir, plans, mesh, plans[0].start)
            others = parent.state if parent else initial_from(source, config, plans[0], mesh, prune) if source else None
            check_same_origin(config, others, record)
        plan = plans[min(record["phase"], len(plans) - 1)]
        state = restore_state(config, plan, mesh, checkpoints)
    except DamagedCheckpointError as damage:
        print(checkpoints.fall_back(damage), flush=True)
        return _first_state(config, workdir, feeds, plans, mesh, checkpoints, moved, parent)
    check_same_data(config, record, [feed.fingerprint for feed in feeds], plan.index)
    if "origin" not in record:  # of an older version
        record["origin"] = {"before": cost_before(source) if source and source.is_dir() else None}
    return state, plan.index, record


def _go_back_for_best(
    config: RunConfig, workdir: Path, plan: PhasePlan, mesh: Mesh, checkpoints: Checkpoints, best: Checkpoints
) -> None:
    """Where the best state so far is damaged or gone, drops what was saved after it, so that the run makes it again.

    Raises:
      InputError: there is nothing before it to go back to.
    """
    newest, kept = checkpoints.latest_step(), best.latest_step()
    losses = of_phase(recorded_evaluations(workdir, newest, {}), plan.name) if newest is not None else {}
    if newest is None or not losses or (kept is not None and kept > newest):
        return
    wanted = best_evaluation(losses)
    try:
        if kept == wanted:
            restore_state(config, plan, mesh, best)
            return
    except DamagedCheckpointError:
        pass
    again = wanted + (wanted == plan.start)  # a phase that starts saves it
    before = [step for step in checkpoints.steps() if step < again]
    if not before:
        raise InputError(
            f"{best.directory}: the best state, at step {wanted}, is damaged or gone, and no checkpoint is from before it; "
            f"start again with another --workdir"
        )
    print(
        f"{best.directory}: the best state, at step {wanted}, is damaged or gone; going back to step {before[-1]}",
        flush=True,
    )
    best.drop_from(0)
    checkpoints.drop_from(again)


def _finish(config: RunConfig, run: Run, step: int, tokens: TokenData | None) -> dict[str, Any]:
    run.checkpoints.wait()
    run.followers.saved()
    last = run.plans[-1]
    run.clock.spent("saving")
    losses = of_phase(run.evaluations, last.name)
    result = best_evaluation(losses) if last.config.patience_evaluations else max(losses)
    summary: dict[str, Any] = {
        "status": "finished",
        "experiment": config.experiment,
        "variant": config.variant,
        "steps": step,
        **run.total._asdict(),
        "val_loss": losses[result],
        "initial_val_loss": next(iter(run.evaluations.values())),
        "sparsity": last.programme.sparsity(step - last.start),
        "flops_reduction": run.total.dense_flops / run.total.train_flops,
        "tokens_per_second": run.total.tokens / run.clock.of_the_result,
        "wall_seconds": run.clock.of_the_result,
        "seconds": run.clock.rounded(),
        "device": device_name(),
        "parameters": parameter_count(config.model),
        "rows": run.tracker.make_durable(),
    }
    yardstick = ""
    if not last.config.task.name and tokens is not None:
        summary["unigram_loss"] = unigram_loss(tokens.train, tokens.validation, config.model.vocab_size)
        yardstick = f"; predicting every token by its training frequency gives {summary['unigram_loss']:.3f}"
    if sources := sources_read(run.plans, tokens):
        summary["sources"] = sources
    if last.config.patience_evaluations:
        summary["best_step"] = result
    if before := run.origin.get("before"):
        summary["before"] = before
    write_json(run.workdir / SUMMARY_FILE, summary)
    same_data = {
        p.name for p, feed in zip(run.plans, run.feeds, strict=True) if feed.fingerprint == run.feeds[-1].fingerprint
    }
    first = next(loss for (phase, _), loss in run.evaluations.items() if phase in same_data)
    in_blocks = any(phase.sparsity.sparse_compute == "blocks" for phase in config.phases.values())
    why = (
        "blocks of zeros are skipped, for less than that in seconds"
        if in_blocks
        else "not saved in seconds: masks simulate sparsity"
    )
    run.tracker.message(
        f"validation loss {first:.3f} at first, {summary['val_loss']:.3f} at "
        f"{f'best (step {result})' if 'best_step' in summary else 'last'}{yardstick}.\n"
        f"{summary['flops_reduction']:.2f}x fewer training FLOPs than dense (counted, {why}). "
        f"Report: {write_run_page(run.workdir) if processes.is_first() else ''}"
    )
    return summary


def _finished(config: RunConfig, workdir: Path, mesh: Mesh) -> dict[str, Any] | None:
    """The summary of a run that is finished, and whose result is there and sound; a missing report is made again."""
    summary = read_summary(workdir)
    if summary is None:
        return None
    try:
        if int(saved_run(workdir, mesh, config).state.step) != summary.get("best_step", summary["steps"]):
            return None
    except DamagedCheckpointError:
        return None
    finished_page(workdir)
    return summary
