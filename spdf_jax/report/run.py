"""The page about a run: its verdict, numbers, command and settings, and the order of all panels."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
from markupsafe import Markup

from spdf_jax.cloud.spool import located
from spdf_jax.report.closer import write_curves
from spdf_jax.report.draw import STYLE, Table
from spdf_jax.report.figures import write_figures
from spdf_jax.report.losses import loss_by_flops, loss_by_step, loss_by_time
from spdf_jax.report.masks import churn_by_step, density_by_layer, sparsity_by_step
from spdf_jax.report.page import Panel, command_panel, template, write_page
from spdf_jax.report.pictures import mask_degrees, mask_pictures, masks_by_step
from spdf_jax.report.records import Run, changed_settings, read_run
from spdf_jax.report.scores import evaluation_scores, exam_scores, generated_texts, zero_shot_scores
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
    return f"{unknown}Nothing is saved yet: the same {same} starts at step 0."


def verdict(run: Run) -> str:
    """A sentence or two: the loss, after how many tokens, for how many FLOPs, and the main scores."""
    numbers = run.numbers
    text = _last_losses(run)
    if not run.loss_unit and "steps" in numbers:
        text += f" after {numbers['steps']:,} steps, up to {percent(run.max_sparsity)} sparse"
    if numbers.get("tokens"):
        text += f" after {quantity(numbers['tokens'], COUNT_UNITS)} tokens"
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
    return f"{text}, before training" if run.last_step == 0 else text


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
        "wall_seconds": ("Wall-clock time", duration, "measured; compilation, evaluations and saving included"),
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
    yield from _start_lines(run)
    if before := run.numbers.get("before"):
        yield "Counted FLOPs of the run before", flops(before["train_flops"]), "that this one started from"
        if "train_flops" in run.numbers:
            yield "Both together", flops(before["train_flops"] + run.numbers["train_flops"]), ""


def _start_lines(run: Run) -> Iterator[tuple[str, str, str]]:
    """When the run was begun and resumed, with which versions."""
    if run.starts:
        first, last, again = run.starts[0], run.starts[-1], len(run.starts) - 1
        yield "Begun", when(first["time"]), made_with(first)
        if again:
            times = "once" if again == 1 else f"{again} times"
            same = "with the same versions" if made_with(first) == made_with(last) else made_with(last)
            yield f"Resumed {times}", f"{when(last['time'])}, after step {last['step']:,}", same


def _last_evaluation(run: Run) -> str:
    at = "" if run.is_finished or not run.evaluation_rows else f", step {run.evaluation_rows[-1]['step']:,}"
    return f"at the last evaluation{at}"


def _steps_remark(run: Run) -> str:
    if run.is_finished:
        return "stopped early" if _stopped_early(run) else ""
    return f"of {run.planned_steps:,}" if run.planned_steps else ""


def _rate_remark(run: Run) -> str:
    """What the throughput is a mean over."""
    if run.is_finished:
        return "measured over the wall-clock time"
    last = f" up to step {run.train_rows[-1]['step']:,}" if run.train_rows else ""
    return f"measured{last}, evaluations left out"


def _padded(run: Run) -> bool:
    return run.numbers.get("padded_tokens", 0) > run.numbers.get("tokens", 0)


def _first_remark(run: Run) -> str:
    """What the loss before training is over, against that at the end."""
    if not run.evaluation_rows or not run.loss_unit:
        return "step 0"
    first, last = (target_name(run.task(run.evaluation_rows[i])) for i in (0, -1))
    return "same tokens, step 0" if first == last else f"over {first}: not to be compared with the last"


def _stopped_early(run: Run) -> bool:
    """The best evaluation was not the last."""
    rows = run.evaluation_rows
    return "best_step" in run.numbers and bool(rows) and run.numbers["best_step"] < rows[-1]["step"]


def run_again(run: Run) -> Panel | None:
    """The command of the run or, for one started from Python, the lines that repeat it; None where nothing recorded can."""
    if not run.loss_unit:
        return None
    seed = f"Seed {run.config['seed']}. " if "seed" in run.config else ""
    found = "finds this run and has nothing left to do" if run.is_finished else "goes on with this run"
    remark = f"{seed}In its own workdir the command {found}: give another --workdir to begin anew."
    if command := run.config.get("command"):
        return command_panel(command, remark)
    command = (
        "from pathlib import Path\nfrom spdf_jax.config.read import load_config\nfrom spdf_jax.jobs.train import train\n\n"
        'train(load_config(Path("config.json")), Path("again"))'
    )
    return command_panel(command, f"{seed}In Python, from the config.json beside this page.")


def settings(run: Run) -> Panel:
    """Every setting that is not at its default, and the whole config, folded."""
    changed = changed_settings(run.config)
    config = json.dumps(run.config, indent=2, ensure_ascii=False)
    body = _SETTINGS.render(changed=changed, config=config)
    return Panel("Settings", Markup(body), "What this run sets; everything else is at its default.", wide=True)


_SETTINGS = template("""\
{% if changed %}
<table class="numbers">
  <thead><tr><th>setting</th><th>here</th><th>default</th></tr></thead>
  {% for key, value, default in changed %}
  <tr><th scope="row">{{ key | breakable }}</th><td>{{ value | breakable }}</td><td>{{ default }}</td></tr>
  {% endfor %}
</table>
{% endif %}
<details><summary>Resolved config</summary><pre><code>{{ config }}</code></pre></details>
""")


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
    run_again,
    settings,
)
