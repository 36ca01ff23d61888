"""A run that is to be longer, or shorter, than planned: it goes on where nothing that it did would have been different."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from spdf_jax.cloud.spool import saved_steps
from spdf_jax.config.read import load_config
from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError
from spdf_jax.processes import is_first
from spdf_jax.training.phases import PhasePlan, make_plan
from spdf_jax.training.restore import begin_of, check_same_run, differing, read_summary
from spdf_jax.workdir import CHECKPOINTS, CONFIG_FILE, EVALUATION_FILE, GENERATIONS_FILE, SUMMARY_FILE, set_aside

_LENGTHS = re.compile(r"[^.]+\.(steps|epochs)$")


def check_same_or_longer(
    config: RunConfig, workdir: Path, plans: Sequence[PhasePlan]
) -> tuple[list[str], dict[str, tuple[int, int]]]:
    """As `spdf_jax.training.restore.check_same_run`, but lets lengths differ that nothing so far depended on.

    Args:
      config: of the command.
      workdir: where the run is.
      plans: of `config`.

    Returns:
      The keys of places that differ, and the lengths that do: ``{"pretrain.steps": (100, 200)}``.

    Raises:
      InputError: another config, or another length by which a step that was taken would have been another.
    """
    places, others = differing(config, workdir)
    lengths = {key: values for key, values in others.items() if _LENGTHS.match(key)}
    if not lengths or any(key not in lengths and key not in ("experiment", "variant") for key in others):
        return check_same_run(config, workdir), {}
    summary, planned = read_summary(workdir), make_plan(load_config(workdir / CONFIG_FILE), begin_of(workdir))
    if summary is not None and summary["steps"] < planned[-1].end:
        why = f"the run stopped early, at step {summary['steps']}"
    else:
        why = why_not(workdir, planned, plans)
    if why:
        said = "; ".join(f"{key} was {was}, is {now}" for key, (was, now) in lengths.items())
        raise InputError(
            f"workdir {workdir}: {said}, but {why}; give another --workdir and --config.init_from={workdir} "
            f"--config.init_what=state, which goes on from a checkpoint (--config.init_step) by a schedule of its own"
        )
    return places, lengths


def why_not(workdir: Path, planned: Sequence[PhasePlan], plans: Sequence[PhasePlan]) -> str:
    """Why the run in a folder, `planned` so far, cannot go on by `plans`; "" where it can."""
    taken = max(saved_steps(workdir / CHECKPOINTS), default=0)
    if plans[-1].end <= taken:
        return f"{taken} steps are taken already"
    return first_difference(planned, plans, taken)


def first_difference(planned: Sequence[PhasePlan], plans: Sequence[PhasePlan], taken: int) -> str:
    """What would have been different in the first `taken` steps of a run by other plans, in words; "" for nothing.

    Compared is, at each of these steps, all that a length can change: the phase, the learning rate, the masks it begins with,
    what a topology step aims for, the attention pattern, and, of a phase that may stop early, when it is evaluated.
    """
    for before, after in zip(planned, plans, strict=True):
        steps = min(before.end, taken) - before.start
        if steps <= 0:
            break
        if (after.start, min(after.end, taken)) != (before.start, before.start + steps):
            return f"phase {before.name!r} is over, at step {before.end}"
        rates = [
            np.asarray(plan.learning_rate(jnp.arange(before.start, before.start + steps)))
            for plan in (before, after)
            if plan.learning_rate
        ]
        if rates and (rates[0] != rates[-1]).any():
            at = int(np.argmax(rates[0] != rates[-1]))
            there, here = (f"{float(rate[at]):.4g}" for rate in rates)
            return f"step {before.start + at + 1} was taken at the learning rate {there}, and would have been at {here}"
        for step in range(steps + 1):
            for what, value in _SCHEDULED.items():
                # After the last step there are masks, and nothing is done yet.
                if (step < steps or what == "the sparsity") and value(before, step) != value(after, step):
                    return f"at step {before.start + step + 1} {what} would have been different"
    return ""


_SCHEDULED: dict[str, Any] = {
    "the sparsity": lambda plan, step: plan.programme.counts(step),
    "the topology step": lambda plan, step: plan.programme.topology(step),
    "the attention pattern": lambda plan, step: plan.programme.attention(step),
    "the evaluation": lambda plan, step: (
        bool(plan.config.patience_evaluations) and plan.evaluates_after(plan.start + step + 1)
    ),
}


def set_end_aside(workdir: Path) -> None:
    """Puts what was made of the end of a run, which is its end no more, under other names."""
    for name in (EVALUATION_FILE, GENERATIONS_FILE, SUMMARY_FILE):
        if is_first() and (workdir / name).exists():
            aside = set_aside(workdir / name, "before_extension")
            print(f"{workdir / name}: of the end so far, is kept as {aside.name}", flush=True)


def with_lengths(command: str, lengths: Mapping[str, tuple[int, int]]) -> str:
    """The command that made a run, so that it says how long that is by now: by a workdir alone it is gone on with as begun.

    >>> with_lengths("python -m spdf_jax.main --config mine.py", {"pretrain.steps": (100, 200)})
    'python -m spdf_jax.main --config mine.py --config.pretrain.steps=200'
    """
    flags = [f"--config.{key}={now}" for key, (_, now) in lengths.items()]
    return " ".join([command, *(flag for flag in flags if flag not in command.split())]) if command else ""
