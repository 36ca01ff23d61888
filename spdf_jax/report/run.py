"""The page about a run: its verdict, numbers, and the order of all panels."""

from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
from markupsafe import Markup

from spdf_jax.cloud.spool import located
from spdf_jax.report.ancestry import ancestry
from spdf_jax.report.closer import write_curves
from spdf_jax.report.draw import STYLE, Table
from spdf_jax.report.figures import write_figures
from spdf_jax.report.losses import loss_by_flops, loss_by_step, loss_by_time
from spdf_jax.report.masks import churn_by_step, density_by_layer, sparsity_by_step
from spdf_jax.report.page import Panel, template, write_page
from spdf_jax.report.pictures import mask_degrees, mask_pictures, masks_by_step
from spdf_jax.report.records import Run, read_run
from spdf_jax.report.scores import evaluation_scores, exam_scores, generated_texts, zero_shot_scores
from spdf_jax.report.settings import run_again, settings
from spdf_jax.report.words import (
    COUNT_UNITS,
    COUNTED_NOTE,
    FLOP_UNITS,
    digits,
    duration,
    flops,
    made_with,
    percent,
    quantity,
    reduction,
    score_name,
    target_name,
    unit,
    when,
)
from spdf_jax.training.clock import NOT_OF_THE_RESULT, PARTS
from spdf_jax.training.provenance import now

_SCORES_IN_VERDICT = ("bleu", "rouge_l", "nist", "perplexity_per_byte")


def write_report(
    workdir: Path, output: Path | None = None, *, running: bool | None = None, figures: bool = True
) -> Path:
    """Writes `report.html` and `figures/`, atomically, from what the run in `workdir` has recorded so far.

    Args:
      workdir: the run's folder; needs `config.json` and `metrics.jsonl`, all else is shown where it is there.
      output: the folder to write into, by default `workdir`.
      running: whether the run is under way; by default its lock tells.
      figures: whether to write `figures/`, see `spdf_jax.report.figures`.

    Returns:
      The path of the page.

    Raises:
      InputError: the folder holds no run, or a file in it cannot be read.
    """
    workdir, folder = located(workdir), located(output or workdir)
    run = read_run(workdir, running)
    cell = f", {workdir.name}" if workdir.parent.name == "cells" else ""  # of a sweep, whose runs share a name
    title, counted = f"{run.name}{cell}", run.max_sparsity > 0 and "train_flops" in run.numbers
    with matplotlib.rc_context(STYLE):
        panels = [panel for make in _PANELS if (panel := make(run)) is not None]
        if figures:
            write_figures(folder, panels)
    return write_page(
        folder / "report.html",
        title=title,
        status=run.status if run.is_finished else f"{run.status} as of {when(now())}",
        verdict=verdict(run),
        note=" ".join(filter(None, [_what_next(run), COUNTED_NOTE if counted else ""])),
        panels=panels,
        curves=write_curves(folder, title, panels) if figures and not cell else None,
        failed=run.failure is not None and not run.is_finished,
    )


def _what_next(run: Run) -> str:
    """Of an unfinished run: what becomes of it."""
    if run.is_finished:
        return ""
    if run.failure:
        return f"It failed at {when(run.failure['time'])}: {run.failure['why']}".rstrip(".") + "."
    if run.running:
        return "This page is written again as the run goes on: reload it."
    same = "command" if run.loss_unit else "call"
    unknown = "Its disk has no locks, so whether it runs nobody knows. " if run.running is None else ""
    if run.saved_step:
        return f"{unknown}The same {same} resumes it from its checkpoint at step {run.saved_step:,}."
    return f"{unknown}Nothing is saved yet: the same {same} starts at step {run.first_step:,}."


def verdict(run: Run) -> str:
    """A sentence or two: the loss, after how many tokens, for how many FLOPs, and the main scores."""
    numbers = run.numbers
    text = _last_losses(run)
    if not run.loss_unit and "steps" in numbers:
        text += f" after {numbers['steps']:,} steps, up to {percent(run.max_sparsity)} sparse"
    if numbers.get("tokens"):
        text += f" after {quantity(numbers['tokens'], COUNT_UNITS)} tokens"
        if run.first_step and "before" in numbers:
            text += f", and {quantity(numbers['before']['tokens'], COUNT_UNITS)} of the runs before,"
    if "flops_reduction" in numbers:
        scale, name = unit(numbers["dense_flops"], FLOP_UNITS)
        spent, dense = (digits(numbers[key] / scale) for key in ("train_flops", "dense_flops"))
        if run.is_dense:
            text += f", trained dense for {spent} {name}"
        else:
            text += f" with {reduction(numbers['flops_reduction'])} fewer training FLOPs than dense ({spent} vs {dense} {name})"
    time = [duration(numbers["wall_seconds"])] if "wall_seconds" in numbers else []
    time += [f"on {numbers['device']}"] if "device" in numbers else []
    text += f"; {' '.join(time)}." if time else "."
    if "unigram_loss" in numbers and numbers["val_loss"] >= numbers["unigram_loss"]:
        text += f" That is no better than predicting every token by its frequency: {numbers['unigram_loss']:.2f}."
    scores = [f"{score_name(key)} {digits(run.scores[key])}" for key in _SCORES_IN_VERDICT if key in run.scores]
    return f"{text} Scored: {', '.join(scores)}." if scores else text


def _last_losses(run: Run) -> str:
    """The validation loss, before it the training loss where that is newer, each with its step where it is not of the end."""
    if "val_loss" not in run.numbers:  # which a run of `spdf_jax.fit` may end without
        ended = run.is_finished and "loss" in run.numbers
        text = f"Training loss {run.numbers['loss']:.2f}" if ended else "No validation loss yet"
    else:
        text = f"Validation loss {run.numbers['val_loss']:.2f}"
    if run.loss_unit and run.evaluation_rows and (task := run.task(run.evaluation_rows[-1])):
        text += f" over {target_name(task)}"
    if run.loss_step is not None:
        text += f" at its best, step {run.loss_step:,}," if run.is_finished else f" at step {run.loss_step:,}"
    if run.is_finished:
        return text
    last, evaluated = (rows[-1]["step"] if rows else -1 for rows in (run.train_rows, run.evaluation_rows))
    if last > evaluated:
        text = f"Training loss {run.train_rows[-1]['loss']:.2f} at step {last:,} ({text[0].lower()}{text[1:]})"
    return f"{text}, before training" if run.last_step == run.first_step else text


def main_numbers(run: Run) -> Panel | None:
    """The table of losses, costs and counts; None where there are none yet."""
    lines = list(_number_lines(run))
    table = Table(("number", "value"), [(k, v) for k, v in run.numbers.items() if isinstance(v, int | float | str)])
    logged = run.numbers.get("steps")
    caption = (
        ""
        if run.is_finished or logged is None
        else f"Of step {logged:,}, the last logged, unless a line names another."
    )
    return Panel("Numbers", Markup(_NUMBERS.render(lines=lines)), caption, wide=True, table=table) if lines else None


_NUMBERS = template("""\
<table class="numbers">
{% for label, value, remark in lines %}
  <tr><th scope="row">{{ label }}</th><td>{{ value }}</td><td>{{ remark }}</td></tr>
{% endfor %}
</table>
""")


def _number_lines(run: Run) -> Iterator[tuple[str, str, str]]:
    """Label, value with its unit, and a remark, for each number there is."""
    zeros, left_out = ("", "") if run.is_dense else ("zeros included", "multiplications by zero left out")
    best = f"at the best evaluation, step {run.numbers['best_step']:,}" if "best_step" in run.numbers else ""

    def loss(value: float) -> str:
        return f"{value:.4f} {run.loss_unit}".rstrip()

    formats: dict[str, tuple[str, Callable[[float], str], str]] = {
        "val_loss": ("Validation loss", loss, best or _last_evaluation(run)),
        "initial_val_loss": ("Validation loss before training", loss, _first_remark(run)),
        "loss": ("Training loss", loss, "at the last step"),
        "unigram_loss": ("Loss of token frequencies alone", loss, "a model must beat this"),
        "sparsity": ("Sparsity at the last step", percent, f"{percent(run.max_sparsity)} at its highest"),
        "train_flops": ("Training FLOPs, counted", flops, left_out),
        "dense_flops": ("The same tokens, dense", flops, "same model without masks"),
        "flops_reduction": ("FLOP reduction", lambda v: f"{v:.2f}x", "counted, not measured in seconds"),
        "tokens": ("Training tokens", lambda v: f"{v:,}", "read from the data" if _padded(run) else ""),
        "padded_tokens": (
            "Positions computed",
            lambda v: f"{v:,}",
            "padding included; the FLOPs are of these",
        ),
        "topology_tokens": (
            "Tokens of topology steps",
            lambda v: f"{v:,}",
            "of the training tokens; they update no weight",
        ),
        "steps": ("Training steps", lambda v: f"{v:,}", _steps_remark(run)),
        "parameters": ("Parameters", lambda v: f"{v:,}", zeros),
        "tokens_per_second": ("Throughput", lambda v: f"{v:,.0f} tokens/s", _rate_remark(run)),
        "wall_seconds": ("Wall-clock time", duration, _time_remark(run)),
        "device": ("Device", str, ""),
    }
    hidden: tuple[str, ...] = ("sparsity", "dense_flops", "flops_reduction") if run.is_dense else ()
    if not _padded(run):
        hidden += ("padded_tokens",)
    if not run.numbers.get("topology_tokens"):
        hidden += ("topology_tokens",)
    for key, (label, render, remark) in formats.items():
        if key in run.numbers and key not in hidden:
            yield label, render(run.numbers[key]), remark
    for name, read in run.numbers.get("sources", {}).items():
        yield f"Examples from {name}", percent(read["share"]), f"{digits(read['epochs'], 3)} epochs of it"
    yield from _start_lines(run)
    if before := run.numbers.get("before"):
        runs, together = ("runs", "All") if len(run.ancestors) > 1 and run.first_step else ("run", "Both")
        yield f"Counted FLOPs of the {runs} before", flops(before["train_flops"]), "that this one started from"
        if "train_flops" in run.numbers:
            yield f"{together} together", flops(before["train_flops"] + run.numbers["train_flops"]), ""


def _start_lines(run: Run) -> Iterator[tuple[str, str, str]]:
    """When the run was begun and resumed, with which versions."""
    if run.starts:
        first, last, again = run.starts[0], run.starts[-1], len(run.starts) - 1
        yield "Begun", when(first["time"]), made_with(first)
        if again:
            times = "once" if again == 1 else f"{again} times"
            same = "with the same versions" if made_with(first) == made_with(last) else made_with(last)
            yield f"Resumed {times}", f"{when(last['time'])}, after step {last['step']:,}", same
        for start in run.starts:
            for key, (was, is_now) in start.get("changed", {}).items():
                yield (
                    "Extended",
                    f"{key} from {was:,} to {is_now:,}",
                    f"{when(start['time'])}, after step {start['step']:,}",
                )


def _last_evaluation(run: Run) -> str:
    at = "" if run.is_finished or not run.evaluation_rows else f", step {run.evaluation_rows[-1]['step']:,}"
    return f"at the last evaluation{at}"


def _steps_remark(run: Run) -> str:
    if run.is_finished:
        return (
            "stopped early"
            if _stopped_early(run)
            else f"the first {run.first_step:,} by the runs before" * bool(run.first_step)
        )
    return f"of {run.planned_steps:,}" if run.planned_steps else ""


def _rate_remark(run: Run) -> str:
    """What the throughput is a mean over."""
    if run.is_finished:
        return "measured over the wall-clock time"
    last = f" up to step {run.train_rows[-1]['step']:,}" if run.train_rows else ""
    return f"measured{last}, evaluations left out"


def _time_remark(run: Run) -> str:
    """What is in the wall-clock time."""
    left_out = sum(run.numbers.get("seconds", {}).get(part, 0.0) for part in NOT_OF_THE_RESULT)
    lost = f"; {duration(left_out)} of restarts are not" if left_out else ""
    return f"measured; compilation, evaluations and saving included{lost}"


def _padded(run: Run) -> bool:
    return run.numbers.get("padded_tokens", 0) > run.numbers.get("tokens", 0)


def _first_remark(run: Run) -> str:
    """What the loss before training is over, against that at the end."""
    if not run.evaluation_rows or not run.loss_unit:
        return f"step {run.first_step:,}"
    first, last = (target_name(run.task(run.evaluation_rows[i])) for i in (0, -1))
    return (
        f"same tokens, step {run.first_step:,}" if first == last else f"over {first}: not to be compared with the last"
    )


def _stopped_early(run: Run) -> bool:
    """The best evaluation was not the last."""
    rows = run.evaluation_rows
    return "best_step" in run.numbers and bool(rows) and run.numbers["best_step"] < rows[-1]["step"]


def time_parts(run: Run) -> Panel | None:
    """Where the wall-clock time went; None where it was not recorded."""
    parts: dict[str, float] = run.numbers.get("seconds", {})
    total = sum(parts.values())
    if not total:
        return None
    rows = [(*PARTS.get(part, (part, "")), parts[part]) for part in dict.fromkeys([*PARTS, *parts]) if part in parts]
    lines = [
        (
            name,
            duration(seconds) if seconds >= 10 else f"{digits(seconds, 2)} s",
            f"{100 * seconds / total:.1f} %: {what}",
        )
        for name, what, seconds in rows
    ]
    until = "the end" if run.is_finished else "the last evaluation"
    caption = (
        f"{duration(total)} from the first start to {until}. Steps are dispatched ahead of what they compute: each part is "
        f"what the run waited for."
    )
    table = Table(("part", "seconds", "share"), [(name, seconds, seconds / total) for name, _, seconds in rows])
    return Panel("Where the time went", Markup(_NUMBERS.render(lines=lines)), caption, wide=True, table=table)


# Each takes the run and gives a Panel, or None where the run recorded nothing for it.
_PANELS: tuple[Callable[[Run], Panel | None], ...] = (
    main_numbers,
    evaluation_scores,
    zero_shot_scores,
    exam_scores,
    loss_by_step,
    loss_by_flops,
    loss_by_time,
    sparsity_by_step,
    churn_by_step,
    density_by_layer,
    mask_pictures,
    mask_degrees,
    masks_by_step,
    generated_texts,
    time_parts,
    ancestry,
    run_again,
    settings,
)
