"""The jobs behind the command line: train (start, resume, finish) and evaluate."""

import contextlib
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spdf_jax.checkpoint import Checkpoints
from spdf_jax.config import RunConfig, check_devices
from spdf_jax.data import TokenData, prepare, unigram_loss
from spdf_jax.errors import InputError
from spdf_jax.flops import parameter_count
from spdf_jax.model import GPT
from spdf_jax.plan import PhasePlan, make_plan, total_cost
from spdf_jax.report import write_report
from spdf_jax.sharding import make_mesh
from spdf_jax.state import TrainState, abstract_state, init_state, start_phase, state_shardings
from spdf_jax.step import make_steps
from spdf_jax.tracking import Tracker, read_metrics, write_json
from spdf_jax.train import Run, evaluate, run_phase


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
                if data.tokenizer is not None:
                    data.tokenizer.save(str(workdir / "tokenizer.json"))
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
            reset = plan.config.reset_optimizer
            state = start_phase(state, plan.tx, plan.config.sparsity, plan.filter, run.mesh, reset_optimizer=reset)
        state = run_phase(run, plan, state)
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
        "device": f"{jax.device_count()} x {device.device_kind}"
        + (f", {os.cpu_count()} cores" if device.platform == "cpu" else ""),
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
    free = ("loop.", "mesh.", "command", "variants", "data.cache_dir")
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
