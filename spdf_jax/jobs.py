"""The job `train`: start, resume, finish."""

import contextlib
import dataclasses
import fcntl
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spdf_jax import processes
from spdf_jax.checkpoint import Checkpoints, DamagedCheckpointError
from spdf_jax.config import RunConfig, check_devices, load_config
from spdf_jax.data import TokenData, load_tokenizer, prepare, unigram_loss
from spdf_jax.data.tokenizer import Tokenizer, vocabulary_size
from spdf_jax.errors import InputError
from spdf_jax.feed import Feed, make_feed
from spdf_jax.flops import parameter_count
from spdf_jax.model import GPT
from spdf_jax.plan import PhasePlan, make_plan, total_cost
from spdf_jax.report import write_report
from spdf_jax.report.words import flat
from spdf_jax.restore import BEST, CHECKPOINTS, enter_phase, initial_from, restore_state, source_folder
from spdf_jax.sharding import device_name, make_mesh
from spdf_jax.state import TrainState, init_state
from spdf_jax.tracking import Tracker, read_metrics, write_json
from spdf_jax.train import Run, best_evaluation, run_phase


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
    processes.agree("config", json.dumps(config.as_dict()), "start all of them with the same command and files")
    plans = make_plan(config)
    make_workdir(workdir)
    with lock(workdir), jax.set_mesh(mesh):
        finished = _finished(config, workdir)
        if finished:
            print(f"{workdir}: this run is finished (validation loss {finished['val_loss']:.4f}); nothing to do.")
            return finished
        tokens, tokenizer = load_data(config, workdir, progress)
        feeds = [make_feed(config, plan, tokens, tokenizer, mesh) for plan in plans]
        processes.agree("config.data", "".join(f.fingerprint for f in feeds), "give all of them the same data")
        checkpoints = Checkpoints(workdir / CHECKPOINTS, config.loop.keep_checkpoints)
        best = Checkpoints(workdir / BEST, keep=1) if plans[-1].config.patience_evaluations else None
        try:
            state, index, record = _first_state(config, workdir, feeds, plans, mesh, checkpoints)
            step = int(state.step)
            if record is None:
                write_json(workdir / "config.json", config.as_dict() | {"command": command})
                if tokenizer is not None and processes.is_first():
                    tokenizer.save(str(workdir / "tokenizer.json"))
            else:
                print(f"{workdir}: resuming after step {step} of {plans[-1].end}.")
            tracker = Tracker(workdir, resume_step=step, total_steps=plans[-1].end, progress=progress)
            run = Run(
                config=config,
                workdir=workdir,
                mesh=mesh,
                model=GPT(config.model),
                plans=plans,
                feeds=feeds,
                checkpoints=checkpoints,
                best=best,
                tracker=tracker,
                total=total_cost(plans, step),
                seconds=record["seconds"] if record else 0.0,
                evaluations=_evaluations(workdir, step) if record else [],
            )
            try:
                for plan in plans[index:]:
                    if plan.index > index:
                        state = enter_phase(state, plan, mesh)
                    state = run_phase(run, plan, state)
                processes.beat(0, 0)
                return _finish(run, int(state.step), tokens)
            finally:
                tracker.close()
        finally:
            checkpoints.close()
            if best:
                best.close()


def _first_state(
    config: RunConfig, workdir: Path, feeds: list[Feed], plans: list[PhasePlan], mesh: Mesh, checkpoints: Checkpoints
) -> tuple[TrainState, int, dict[str, Any] | None]:
    """The state to go on from, the phase it belongs to, and its record (None for a new run)."""
    if checkpoints.latest_step() is None:
        plan, model = plans[0], GPT(config.model)
        if source := source_folder(config, workdir):
            return initial_from(source, config, plan, mesh), 0, None
        return init_state(model, plan.tx, plan.config.sparsity, plan.filter, config.seed, mesh), 0, None
    try:
        record = checkpoints.record()
        plan = plans[min(record["phase"], len(plans) - 1)]
        state = restore_state(config, plan, mesh, checkpoints)
    except DamagedCheckpointError as damage:
        print(checkpoints.fall_back(damage), flush=True)
        return _first_state(config, workdir, feeds, plans, mesh, checkpoints)
    _check_same_run(config, workdir)
    fingerprint = feeds[plan.index].fingerprint
    if record["data_fingerprint"] != fingerprint:
        raise InputError(
            f"config.data: the data is not what this run was trained on so far (fingerprint {fingerprint[:12]}, "
            f"was {record['data_fingerprint'][:12]}); restore it, or start again with another --workdir"
        )
    return state, plan.index, record


def _evaluations(workdir: Path, step: int) -> list[tuple[int, float]]:
    rows = (row for row in read_metrics(workdir) if "val_loss" in row and row["step"] <= step)
    return [(row["step"], row["val_loss"]) for row in rows]


def _finish(run: Run, step: int, tokens: TokenData | None) -> dict[str, Any]:
    run.checkpoints.wait()
    last = run.plans[-1]
    seconds = run.seconds + time.perf_counter() - run.clock
    best = best_evaluation(run.evaluations, last) if last.config.patience_evaluations else run.evaluations[-1]
    summary: dict[str, Any] = {
        "status": "finished",
        "experiment": run.config.experiment,
        "variant": run.config.variant,
        "steps": step,
        "tokens": run.total.tokens,
        "val_loss": best[1],
        "initial_val_loss": run.evaluations[0][1],
        "sparsity": last.programme.sparsity(step - last.start),
        "train_flops": run.total.train_flops,
        "dense_flops": run.total.dense_flops,
        "flops_reduction": run.total.dense_flops / run.total.train_flops,
        "tokens_per_second": run.total.tokens / seconds,
        "wall_seconds": seconds,
        "device": device_name(),
        "parameters": parameter_count(run.config.model),
    }
    yardstick = ""
    if not last.config.task.name and tokens is not None:
        summary["unigram_loss"] = unigram_loss(tokens.train, tokens.validation, run.config.model.vocab_size)
        yardstick = f"; predicting every token by its training frequency gives {summary['unigram_loss']:.3f}"
    if last.config.patience_evaluations:
        summary["best_step"] = best[0]
    folder = source_folder(run.config, run.workdir)
    if folder and (folder / "summary.json").is_file():
        source = json.loads((folder / "summary.json").read_text())
        summary["before"] = {k: source[k] for k in ("train_flops", "dense_flops", "tokens", "wall_seconds", "val_loss")}
    write_json(run.workdir / "summary.json", summary)
    in_blocks = any(phase.sparsity.sparse_compute == "blocks" for phase in run.config.phases.values())
    why = (
        "blocks of zeros are skipped, for less than that in seconds"
        if in_blocks
        else "not saved in seconds: masks simulate sparsity"
    )
    run.tracker.message(
        f"validation loss {summary['initial_val_loss']:.3f} at first, {summary['val_loss']:.3f} at "
        f"{f'best (step {best[0]})' if 'best_step' in summary else 'last'}{yardstick}.\n"
        f"{summary['flops_reduction']:.2f}x fewer training FLOPs than dense (counted, {why}). "
        f"Report: {write_report(run.workdir) if processes.is_first() else ''}"
    )
    return summary


def load_data(config: RunConfig, workdir: Path, progress: bool) -> tuple[TokenData | None, Tokenizer | None]:
    """The text, if a phase models it or makes the tokenizer, and the tokenizer: that of ``init_from`` if it has one."""
    source = source_folder(config, workdir)
    inherited = (source or workdir) / "tokenizer.json"
    inherits = source is not None and inherited.is_file() and not config.data.tokenizer
    data = dataclasses.replace(config.data, tokenizer=str(inherited)) if inherits else config.data
    tokens = None
    if not inherits or not all(phase.task.name for phase in config.phases.values()):
        tokens = prepare(data, progress=progress)
    tokenizer = tokens.tokenizer if tokens else load_tokenizer(data.tokenizer)
    size = tokens.vocab_size if tokens else vocabulary_size(tokenizer) if tokenizer else 0
    if size > config.model.vocab_size:
        read_as = f", or config.data.token_dtype if these are no {tokens.train.dtype} ids" if tokens else ""
        raise InputError(
            f"config.data: token id {size - 1} is at or over config.model.vocab_size {config.model.vocab_size}; "
            f"set config.model.vocab_size to at least {size}{read_as if data.source == 'token_files' else ''}"
        )
    if tokenizer is None and any(phase.task.name for phase in config.phases.values()):
        raise InputError(
            "config.data.tokenizer: token files came without one, and a task needs one; name its tokenizer.json"
        )
    return tokens, tokenizer


def make_workdir(workdir: Path) -> None:
    """Makes the folder, and checks that all processes see the same one: each saves its part of a checkpoint there."""
    made = processes.from_first(lambda: str(_made_at(workdir)))
    lock_file = workdir / ".lock"
    if not lock_file.exists() or str(lock_file.stat().st_mtime_ns) != made:
        raise InputError(
            f"workdir {workdir}: process 0 has made it, but process {jax.process_index()} does not see it; choose a --workdir "
            f"on a disk that all processes share"
        )


def _made_at(workdir: Path) -> int:
    """When the lock file was made: nobody ever writes to it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".lock").open("a").close()
    except OSError as error:
        raise InputError(
            f"workdir {workdir}: cannot write there ({error.strerror}); choose another --workdir"
        ) from None
    return (workdir / ".lock").stat().st_mtime_ns


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run; the kernel lets go however process 0 ends."""
    if not processes.is_first():
        yield
        return
    with (workdir / ".lock").open("a") as file:
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
    saved, ours = (flat(c) for c in (load_config(path).as_dict(), config.as_dict()))
    free = ("loop.", "mesh.", "decode.", "evaluation.", "model.remat", "variants", "data.cache_dir")
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
