"""What a run finds in its folder when it starts: nothing, or what it left there before."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from spdf_jax.cloud.spool import saved_steps
from spdf_jax.config.run import LoopConfig
from spdf_jax.errors import InputError
from spdf_jax.model.gpt import GPT
from spdf_jax.processes import device_name
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.clock import Clock
from spdf_jax.training.feed import Feed
from spdf_jax.training.loop import Run
from spdf_jax.training.loss_function import LossFunction
from spdf_jax.training.metrics import Tracker, last_alive, read_metrics
from spdf_jax.training.phases import PhasePlan, StepCost
from spdf_jax.training.provenance import lives
from spdf_jax.training.trackers import Followers
from spdf_jax.workdir import BEST, CHECKPOINTS, CONFIG_FILE, SUMMARY_FILE, sweep


def has_begun(workdir: Path) -> bool:
    """Whether a run has saved something there; without its config, nobody knows whose it is."""
    begun = bool(saved_steps(workdir / CHECKPOINTS))
    if (begun or (workdir / SUMMARY_FILE).exists()) and not (workdir / CONFIG_FILE).exists():
        raise InputError(f"{workdir / CONFIG_FILE}: gone, but a run is there; restore it, or choose another --workdir")
    return begun


@contextlib.contextmanager
def opened(workdir: Path, loop: LoopConfig, *, best: bool = False) -> Iterator[tuple[Checkpoints, Checkpoints | None]]:
    """The run's checkpoints, as many as `loop` says, and, if wanted, that of its best state; closed at the end.

    What killed processes left half-written in the workdir is removed first.
    """
    sweep(workdir)
    checkpoints = Checkpoints(workdir / CHECKPOINTS, loop.keep_checkpoints, loop.keep_every_steps)
    with contextlib.closing(checkpoints), contextlib.ExitStack() as stack:
        best_one = None
        if best:
            best_one = stack.enter_context(contextlib.closing(Checkpoints(workdir / BEST, keep=1)))
            best_one.sweep()
        checkpoints.sweep()
        yield checkpoints, best_one


def made_run(
    workdir: Path,
    loop: LoopConfig,
    mesh: Mesh,
    model: GPT | LossFunction,
    plans: list[PhasePlan],
    feeds: list[Feed],
    checkpoints: tuple[Checkpoints, Checkpoints | None],
    record: dict[str, Any],
    *,
    step: int,
    total: StepCost,
    clock: Clock,
    progress: bool,
) -> tuple[Run, list[list[float]]]:
    """What the loop needs to go on after `step`, with all that was counted so far.

    Args:
      workdir: its config is there.
      loop, mesh, model, plans, feeds: of the run.
      checkpoints: of `opened`.
      record: of the checkpoint that it goes on from; {} for none.
      step: of that.
      total: what the steps so far have cost.
      clock: of this start; the earlier ones are added.
      progress: show progress.

    Returns:
      The run, and `spdf_jax.training.provenance.lives` with this start at their end.
    """
    earlier = lives(workdir, last_alive(workdir))  # before the rows after the checkpoint are dropped
    clock.go_on(record, earlier)
    first_step, rows = plans[0].start, record.get("rows")
    where = {"resume_step": step, "total_steps": plans[-1].end, "first_step": first_step}
    tracker = Tracker(workdir, **where, progress=progress, durable=rows)
    run = Run(
        loop=loop,
        workdir=workdir,
        mesh=mesh,
        model=model,
        plans=plans,
        feeds=feeds,
        origin=record.get("origin", {}),
        checkpoints=checkpoints[0],
        best=checkpoints[1],
        tracker=tracker,
        followers=Followers(workdir, loop.tracker_names, (rows or {}).get("bytes", 0), tracker.message),
        total=total,
        clock=clock,
        evaluations=recorded_evaluations(workdir, step, record) if step > first_step else {},
        step=step,
    )
    return run, [*earlier, [clock.begun, clock.begun]]


def elsewhere(record: dict[str, Any]) -> str:
    """What to know where the steps so far were not computed on what is at hand."""
    here = device_name()
    before = record.get("device", here)  # absent: of an older version
    # XLA splits long float32 sums by the cores it may use, and any sum by devices: another number of them, another rounding.
    what = f" It was computed on {before} so far, and is on {here} now: it will not end with the same bits as on either alone."
    return what if before != here else ""


def recorded_evaluations(workdir: Path, step: int, record: dict[str, Any]) -> dict[tuple[str, int], float]:
    """Those up to a checkpoint, from its record; one of an older release leaves them to the rows."""
    if "evaluations" in record:
        return {(phase, step): loss for phase, step, loss in record["evaluations"]}
    rows = (row for row in read_metrics(workdir) if "val_loss" in row and row["step"] <= step)
    return {(row["phase"], row["step"]): row["val_loss"] for row in rows}
