"""The page about a run: its verdict, numbers, command and settings, and the order of all panels."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup

from spdf_jax.report.draw import STYLE
from spdf_jax.report.losses import loss_by_flops, loss_by_step, loss_by_time
from spdf_jax.report.masks import churn_by_step, density_by_layer, mask_degrees, mask_pictures, sparsity_by_step
from spdf_jax.report.page import Panel, command_panel, template, write_page
from spdf_jax.report.records import Run, changed_settings, read_run
from spdf_jax.report.scores import evaluation_scores, exam_scores, generated_texts, zero_shot_scores
from spdf_jax.report.words import (
    COUNT_UNITS,
    COUNTED_NOTE,
    FLOP_UNITS,
    digits,
    duration,
    flops,
    percent,
    quantity,
    reduction,
    score_name,
    target_name,
    unit,
)

_LOSSES_IN_VERDICT = {"val_loss": "Validation", "loss": "Training"}
_SCORES_IN_VERDICT = ("bleu", "rouge_l", "nist", "perplexity_per_byte")


def write_report(workdir: Path) -> Path:
    """Writes `report.html`, atomically, from what the run in `workdir` has recorded so far.

    Args:
      workdir: the run's folder; needs `config.json` and `metrics.jsonl`, all else is shown where it is there.

    Returns:
      The path of the page.

    Raises:
      InputError: the folder holds no run, or a file in it cannot be read.
    """
    workdir = Path(workdir)
    run = read_run(workdir)
    cell = f", {workdir.name}" if workdir.parent.name == "cells" else ""  # of a sweep, whose runs share a name
    with matplotlib.rc_context(STYLE):
        panels = [panel for make in _PANELS if (panel := make(run)) is not None]
    return write_page(
        workdir / "report.html",
        title=f"{run.name}{cell}",
        status=run.status,
        verdict=verdict(run),
        note=COUNTED_NOTE if run.max_sparsity > 0 and "train_flops" in run.numbers else "",
        panels=panels,
    )


def verdict(run: Run) -> str:
    """A sentence or two: the loss, after how many tokens, for how many FLOPs, and the main scores."""
    numbers = run.numbers
    losses = [f"{kind} loss {numbers[key]:.2f}" for key, kind in _LOSSES_IN_VERDICT.items() if key in numbers]
    text = losses[0] if losses else "No validation loss yet"
    if not run.loss_unit and "steps" in numbers:
        text += f" after {numbers['steps']:,} steps, up to {percent(run.max_sparsity)} sparse"
    if run.evaluation_rows and (task := run.task(run.evaluation_rows[-1])):
        text += f" over {target_name(task)}"
    if "tokens" in numbers:
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
    scores = [f"{score_name(key)} {digits(run.scores[key])}" for key in _SCORES_IN_VERDICT if key in run.scores]
    return f"{text} Scored: {', '.join(scores)}." if scores else text


def main_numbers(run: Run) -> Panel | None:
    """The table of losses, costs and counts; None where there are none yet."""
    lines = list(_number_lines(run))
    return Panel("Numbers", Markup(_NUMBERS.render(lines=lines)), wide=True) if lines else None


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
        "val_loss": ("Validation loss", loss, best or "at the last evaluation"),
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
        "steps": ("Training steps", lambda v: f"{v:,}", "stopped early" if _stopped_early(run) else ""),
        "parameters": ("Parameters", lambda v: f"{v:,}", zeros),
        "tokens_per_second": ("Throughput", lambda v: f"{v:,.0f} tokens/s", "measured"),
        "wall_seconds": ("Wall-clock time", duration, "measured"),
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

    def made_with(start: Mapping[str, Any]) -> str:
        packages, commit = start["packages"], start["commit"]
        ours = f"spdf_jax {packages['spdf_jax']}" + (f" at commit {commit}" if commit else "")
        return f"{ours}, JAX {packages['jax']}, Python {start['python']}"

    def when(start: Mapping[str, Any]) -> str:
        return start["time"].replace("T", " ").removesuffix("+00:00") + " UTC"

    if run.starts:
        first, last, again = run.starts[0], run.starts[-1], len(run.starts) - 1
        yield "Begun", when(first), made_with(first)
        if again:
            times = "once" if again == 1 else f"{again} times"
            same = "with the same versions" if made_with(first) == made_with(last) else made_with(last)
            yield f"Resumed {times}", f"{when(last)}, after step {last['step']:,}", same


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
    remark = f"{seed}In its own workdir the command finds this run and has nothing left to do: give another --workdir."
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
    generated_texts,
    run_again,
    settings,
)
