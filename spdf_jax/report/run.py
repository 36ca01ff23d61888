"""The page about one run."""

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from spdf_jax.evals.exams import PASS_OVER_PERCENT
from spdf_jax.report.draw import (
    DENSE,
    DENSITY_COLOURS,
    DENSITY_NORM,
    INK,
    MAX_LINE_POINTS,
    SOFT_INK,
    SPARSE,
    STYLE,
    cell_edges,
    column,
    histogram_path,
    legend,
    new_figure,
    png_uri,
    svg,
    thinned,
)
from spdf_jax.report.page import Panel, command_panel, template, write_page
from spdf_jax.report.records import Row, Run, changed_settings, read_run
from spdf_jax.report.words import (
    COUNT_UNITS,
    COUNTED_NOTE,
    FLOP_UNITS,
    clipped,
    count_tick,
    digits,
    duration,
    flops,
    percent,
    quantity,
    score_name,
    short_name,
    target_name,
    unit,
)

_MAX_PICTURED_LEAVES = 3
_MAX_BINS = 20
_MAX_TEXTS = 10
_MAX_EXAM_BARS, _MAX_EXAM_LABEL = 40, 56
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
        verdict=_verdict(run),
        note=COUNTED_NOTE if run.max_sparsity > 0 else "",
        panels=panels,
    )


# --- words -----------------------------------------------------------------------------------------------------------


def _verdict(run: Run) -> str:
    """A sentence or two: how good, on how much, for what."""
    numbers = run.numbers
    text = f"Validation loss {numbers['val_loss']:.2f}" if "val_loss" in numbers else "No validation loss yet"
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
            # A reduction of 6 % must not read "1.1x", nor one of 0.6 % as none.
            reduction = f"{numbers['flops_reduction']:.{1 if numbers['flops_reduction'] >= 1.2 else 2}f}x"
            text += f" with {reduction} fewer training FLOPs than dense ({spent} vs {dense} {name})"
    time = [duration(numbers["wall_seconds"])] if "wall_seconds" in numbers else []
    time += [f"on {numbers['device']}"] if "device" in numbers else []
    text += f"; {' '.join(time)}." if time else "."
    scores = [f"{score_name(key)} {digits(run.scores[key])}" for key in _SCORES_IN_VERDICT if key in run.scores]
    return f"{text} Scored: {', '.join(scores)}." if scores else text


def _number_lines(run: Run) -> Iterator[tuple[str, str, str]]:
    """Label, value with its unit, and a remark, for each number there is."""
    zeros, left_out = ("", "") if run.is_dense else ("zeros included", "multiplications by zero left out")
    best = f"at the best evaluation, step {run.numbers['best_step']:,}" if "best_step" in run.numbers else ""
    formats: dict[str, tuple[str, Callable[[float], str], str]] = {
        "val_loss": ("Validation loss", lambda v: f"{v:.4f} nats/token", best or "at the last evaluation"),
        "initial_val_loss": ("Validation loss before training", lambda v: f"{v:.4f} nats/token", _first_remark(run)),
        "unigram_loss": ("Loss of token frequencies alone", lambda v: f"{v:.4f} nats/token", "a model must beat this"),
        "sparsity": ("Sparsity at the last step", percent, f"{percent(run.max_sparsity)} at its highest"),
        "train_flops": ("Training FLOPs, counted", flops, left_out),
        "dense_flops": ("The same tokens, dense", flops, "same model without masks"),
        "flops_reduction": ("FLOP reduction", lambda v: f"{v:.2f}x", "counted, not measured in seconds"),
        "tokens": ("Training tokens", lambda v: f"{v:,}", "read from the data" if _padded(run) else ""),
        "padded_tokens": (
            "Positions computed",
            lambda v: f"{v:,}",
            "what fills rows up included; the FLOPs are of these",
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
    if before := run.numbers.get("before"):
        yield "Counted FLOPs of the run before", flops(before["train_flops"]), "that this one started from"
        if "train_flops" in run.numbers:
            yield "Both together", flops(before["train_flops"] + run.numbers["train_flops"]), ""


def _padded(run: Run) -> bool:
    return run.numbers.get("padded_tokens", 0) > run.numbers.get("tokens", 0)


def _first_remark(run: Run) -> str:
    """What the loss before training is over, against that at the end."""
    if not run.evaluation_rows:
        return "step 0"
    first, last = (target_name(run.task(run.evaluation_rows[i])) for i in (0, -1))
    return "same tokens, step 0" if first == last else f"over {first}: not to be compared with the last"


def _stopped_early(run: Run) -> bool:
    """The best evaluation was not the last."""
    rows = run.evaluation_rows
    return "best_step" in run.numbers and bool(rows) and run.numbers["best_step"] < rows[-1]["step"]


def _numbers(run: Run) -> Panel | None:
    lines = list(_number_lines(run))
    return Panel("Numbers", Markup(_NUMBERS.render(lines=lines)), wide=True) if lines else None


_NUMBERS = template("""\
<table class="numbers">
{% for label, value, remark in lines %}
  <tr><th scope="row">{{ label }}</th><td>{{ value }}</td><td>{{ remark }}</td></tr>
{% endfor %}
</table>
""")


# --- losses ----------------------------------------------------------------------------------------------------------


def _loss_by_step(run: Run) -> Panel | None:
    if not run.train_rows and not run.evaluation_rows:
        return None
    figure, axes = new_figure()
    colour = DENSE if run.is_dense else SPARSE
    _plot_losses(axes, run, lambda rows: column(rows, "step"), colour, "validation", "training")
    _mark_best(axes, run)
    _mark_unigram(axes, run)
    _mark_sparse_window(axes, run)
    _mark_phases(axes, run)
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    axes.xaxis.set_major_formatter(count_tick)
    legend(figure)
    every = math.ceil(len(run.train_rows) / MAX_LINE_POINTS)
    line = "each logged step" if every <= 1 else f"means of {every} logged steps"
    captions = [f"Line: training, {line}."] if run.train_rows else []
    tasks = list(dict.fromkeys(run.task(row) for row in run.evaluation_rows))
    if tasks:
        captions.append(f"Points: {', then '.join(target_name(task) for task in tasks)}.")
    return Panel("Loss over steps", svg(figure, "loss against steps"), " ".join(captions))


def _loss_by_flops(run: Run) -> Panel | None:
    rows = [*run.train_rows, *run.evaluation_rows]
    if not rows or max(row["dense_flops"] for row in rows) <= 0:
        return None
    scale, name = unit(max(row["dense_flops"] for row in rows), FLOP_UNITS)
    figure, axes = new_figure()

    def plot(key: str, colour: str, label: str) -> None:
        _plot_losses(axes, run, lambda rows: column(rows, key) / scale, colour, label)

    if not run.is_dense:
        plot("dense_flops", DENSE, "at the dense cost")
        plot("train_flops", SPARSE, "at the counted cost")
        _mark_reduction(axes, max(rows, key=lambda row: row["step"]), scale)
        caption = (
            "Coloured: at the cost for a machine that skips zeros. Grey: the same losses at the cost of a dense model"
            " (not a dense run)."
        )
    else:
        plot("train_flops", DENSE, "this run, dense")
        caption = "This run is dense: nothing is skipped."
    axes.set(xlabel=f"training compute ({name}, counted)", ylabel="loss (nats/token)", xlim=(0, None))
    legend(figure)
    return Panel("Loss over compute", svg(figure, "loss against training FLOPs"), caption)


def _loss_by_time(run: Run) -> Panel | None:
    ends = run.training_seconds(run.train_rows[-1:])
    if ends is None:
        return None
    scale, name = next(
        s for s in ((3600, "hours"), (60, "minutes"), (1, "seconds")) if ends[0] >= 2 * s[0] or s[0] == 1
    )
    figure, axes = new_figure()

    def time(rows: Sequence[Row]) -> np.ndarray:
        return np.zeros(0) if (seconds := run.training_seconds(rows)) is None else seconds / scale

    _plot_losses(axes, run, time, DENSE if run.is_dense else SPARSE, "validation", "training")
    axes.set(xlabel=f"training time ({name}, measured)", ylabel="loss (nats/token)", xlim=(0, None))
    legend(figure)
    caption = "Time by the logged tokens a second: compilation is in it, evaluations are not."
    if run.max_sparsity > 0:
        caption += " Masks save none of it; sparse_compute=blocks does."
    return Panel("Loss over time", svg(figure, "loss against training time"), caption)


def _plot_losses(
    axes: Axes, run: Run, xs: Callable[[Sequence[Row]], np.ndarray], colour: str, label: str, train_label: str = ""
) -> None:
    """Training as a faint line and validation as points, each broken where the losses are over something else."""
    has_points = bool(run.evaluation_rows)
    text = (train_label or None) if has_points else (train_label or label)
    for _, group in itertools.groupby(run.train_rows, key=run.task):
        rows = list(group)
        losses = thinned(column(rows, "loss"))
        axes.plot(thinned(xs(rows)), losses, color=colour, linewidth=1, alpha=0.45 if has_points else 1, label=text)
        text = None
    for index, (_, group) in enumerate(itertools.groupby(run.evaluation_rows, key=run.task)):
        rows, name = list(group), None if index else label
        axes.plot(
            xs(rows),
            column(rows, "val_loss"),
            color=colour,
            linewidth=1.2,
            marker="o",
            markersize=3.5,
            label=name,
            clip_on=False,
        )


def _mark_best(axes: Axes, run: Run) -> None:
    """A ring around the evaluation whose state was kept, where training could stop early."""
    best = [row for row in run.evaluation_rows if row["step"] == run.numbers.get("best_step")]
    if best:
        style: dict[str, Any] = {"marker": "o", "markersize": 9, "fillstyle": "none", "linestyle": "none", "color": INK}
        axes.plot([best[-1]["step"]], [best[-1]["val_loss"]], label="best, kept", **style)


def _mark_unigram(axes: Axes, run: Run) -> None:
    """The loss of token frequencies, where the run recorded it."""
    if "unigram_loss" in run.numbers:
        loss = run.numbers["unigram_loss"]
        axes.axhline(loss, color=SOFT_INK, linewidth=1, linestyle=":", label="token frequencies alone")


def _mark_sparse_window(axes: Axes, run: Run) -> None:
    """Shades the steps with sparse weights."""
    label: str | None = f"sparse, up to {percent(run.max_sparsity)}"
    for is_sparse, rows in itertools.groupby(run.all_rows, key=lambda row: row["sparsity"] > 0):
        if is_sparse:
            steps = [row["step"] for row in rows]
            axes.axvspan(steps[0], steps[-1], color=SPARSE, alpha=0.1, linewidth=0, label=label)
            label = None


def _mark_phases(axes: Axes, run: Run) -> None:
    """Names above the axes and a line at each change, where there is more than one phase."""
    # A phase's first row comes after its first step; it begins where the one before was last seen.
    seen: dict[str, list[int]] = {}
    for row in run.all_rows:
        seen.setdefault(clipped(row["phase"]), []).append(row["step"])
    if len(seen) < 2:
        return
    starts = dict(zip(seen, [0, *(steps[-1] for steps in seen.values())], strict=False))
    left, right = axes.get_xlim()
    level_ends = [-math.inf] * len(starts)
    for name, step in starts.items():
        if step > 0:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle="--")
        # A name begins with its phase, unless it would run out of the figure; one with no room goes a line higher.
        width = 0.02 * len(name)
        position = max(min((step - left) / (right - left), 1 - width), 0.0)
        level = next(level for level, end in enumerate(level_ends) if end <= position)
        level_ends[level] = position + width
        axes.text(position, 1.02 + 0.06 * level, name, transform=axes.transAxes, fontsize=8.5, color=SOFT_INK)
    axes.set_xlim(left, right)


def _mark_reduction(axes: Axes, row: Row, scale: float) -> None:
    """An arrow, under the curves, from the dense cost of the last row to the counted one, where they differ."""
    if row["dense_flops"] < 1.05 * row["train_flops"]:
        return
    lowest, highest = axes.get_ylim()
    level = lowest - 0.04 * (highest - lowest)
    axes.set_ylim(lowest - 0.18 * (highest - lowest), highest)
    sparse, dense = row["train_flops"] / scale, row["dense_flops"] / scale
    arrow = {"arrowstyle": "->", "color": INK, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(sparse, level), xytext=(dense, level), arrowprops=arrow)
    reduction = row["dense_flops"] / max(row["train_flops"], 1)
    text = f"{reduction:.{1 if reduction >= 1.2 else 2}f}x fewer FLOPs"
    # Under a short arrow at the right edge the text ends with the arrow.
    centre, right = (sparse + dense) / 2, axes.get_xlim()[1]
    at, side = (dense, "right") if centre > 0.8 * right else (centre, "center")
    axes.text(at, level - 0.035 * (highest - lowest), text, ha=side, va="top", fontsize=8.5)


# --- masks -----------------------------------------------------------------------------------------------------------


def _sparsity_by_step(run: Run) -> Panel | None:
    if run.max_sparsity <= 0:
        return None
    figure, axes = new_figure()
    steps, sparsities_percent = (thinned(column(run.all_rows, key)) for key in ("step", "sparsity"))
    sparsities_percent = 100 * sparsities_percent
    # A row says what its step computed with, so a value holds back to the row before.
    axes.step(steps, sparsities_percent, where="pre", color=SPARSE, linewidth=1.6)
    axes.fill_between(steps, sparsities_percent, step="pre", color=SPARSE, alpha=0.14, linewidth=0)
    axes.set(xlabel="step", ylabel="sparsity (%)", ylim=(0, 105))
    _mark_phases(axes, run)
    axes.xaxis.set_major_formatter(count_tick)
    caption = f"Share of the maskable weights that are zero; highest {percent(run.max_sparsity)}."
    return Panel("Sparsity over steps", svg(figure, "sparsity against steps"), caption)


def _churn_by_step(run: Run) -> Panel | None:
    rows = [row for row in run.topology_rows if row.get("churn")]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    churns_percent = [100 * np.concatenate([np.atleast_1d(v) for v in row["churn"].values()]) for row in rows]
    lows, means, highs = (np.array([reduce(churn) for churn in churns_percent]) for reduce in (np.min, np.mean, np.max))
    figure, axes = new_figure()
    axes.fill_between(steps, lows, highs, color=SPARSE, alpha=0.16, linewidth=0, label="lowest to highest matrix")
    axes.plot(steps, means, color=SPARSE, linewidth=1.4, marker="o", markersize=2.5, label="mean over matrices")
    axes.set(xlabel="step", ylabel="new connections (%)", ylim=(0, None))
    axes.xaxis.set_major_formatter(count_tick)
    legend(figure)
    caption = "Of the connections after each topology step, the share that was not there before it."
    return Panel("Churn over steps", svg(figure, "churn against steps"), caption)


def _density_by_layer(run: Run) -> Panel | None:
    if not run.topology_rows:
        return None
    steps = [row["step"] for row in run.topology_rows]
    # A leaf seen at any step gets its band; where a step does not name it, it is dense.
    layer_counts = {leaf: np.size(d) for row in run.topology_rows for leaf, d in row["density"].items()}
    columns = [
        np.concatenate([np.broadcast_to(row["density"].get(leaf, 1.0), n) for leaf, n in layer_counts.items()])
        for row in run.topology_rows
    ]
    bands = np.cumsum([0, *layer_counts.values()])
    figure, axes = new_figure(height_inches=float(np.clip(0.8 + 0.24 * bands[-1], 2.6, 3.4)))
    image = axes.pcolormesh(
        cell_edges(steps),
        np.arange(bands[-1] + 1),
        np.stack(columns, axis=1),
        cmap=DENSITY_COLOURS,
        norm=DENSITY_NORM,
        rasterized=True,
    )
    axes.hlines(bands[1:-1], *axes.get_xlim(), color="white", linewidth=1.5)
    axes.set_yticks((bands[:-1] + bands[1:]) / 2, [short_name(leaf) for leaf in layer_counts])
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="step")
    axes.xaxis.set_major_formatter(count_tick)
    bar = figure.colorbar(
        image, ax=axes, label="density (%)", ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], aspect=30, pad=0.02
    )
    bar.ax.set_yticklabels(["0", "1", "5", "10", "25", "50", "100"])
    bar.outline.set_visible(False)
    caption = "Share of weights present, at each topology step. Each band is one weight matrix, its first layer on top."
    return Panel("Density by layer", svg(figure, "density of each layer against steps"), caption)


def _mask_pictures(run: Run) -> Panel | None:
    """Small multiples: a few leaves down, start / sparsest / end across."""
    pictures = {step: images for step, images in run.pictures.items() if images}
    if not pictures or run.max_sparsity <= 0:
        return None
    density = {step: float(np.mean([image.mean() for image in images.values()])) for step, images in pictures.items()}
    columns, leaves = _named_steps(run, density), list(pictures[min(density, key=density.__getitem__)])
    chosen = _some(leaves, _MAX_PICTURED_LEAVES)
    rows = [(short_name(leaf), [_picture(pictures[step].get(leaf), leaf) for step in columns]) for leaf in chosen]
    scale = _SCALE.render(scale=png_uri(np.linspace(0, 1, 256)[np.newaxis] ** 2))
    body = _MULTIPLES.render(columns=columns.values(), rows=rows) + scale
    caption = f"{len(chosen)} of {len(leaves)} recorded matrices, shrunk: a pixel is the share of weights present in its block."
    return Panel("Masks", Markup(body), caption)


def _mask_degrees(run: Run) -> Panel | None:
    """Small multiples of histograms: connections of each neuron."""
    degrees = {step: found for step, found in run.degrees.items() if found}
    if not degrees or run.max_sparsity <= 0:
        return None
    density = {
        step: float(np.mean([into.mean() / len(out) for into, out in found.values()]))
        for step, found in degrees.items()
    }
    columns, leaves = _named_steps(run, density), list(degrees[min(density, key=density.__getitem__)])
    chosen = _some(leaves, _MAX_PICTURED_LEAVES)
    rows = [(short_name(leaf), [_histograms(degrees[step].get(leaf)) for step in columns]) for leaf in chosen]
    caption = (
        "Filled: connections into each output. Line: connections out of each input. From the fewest (left) to the most"
        f" (right) of either; a wide spread means hubs.{_without_any(degrees)}"
    )
    return Panel("Degrees", Markup(_MULTIPLES.render(columns=columns.values(), rows=rows)), caption)


def _without_any(degrees: Mapping[int, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> str:
    """What has no weight left in each recorded matrix, at the recorded step where that is the most; "" where all have some."""
    found, tokens = [], False
    for leaf in dict.fromkeys(leaf for of_step in degrees.values() for leaf in of_step):
        for side, plain, token_leaf in ((0, "outputs", "head/"), (1, "inputs", "wte/")):
            missing = {step: pairs[leaf][side] == 0 for step, pairs in degrees.items() if leaf in pairs}
            step = max(missing, key=lambda step: missing[step].sum())
            count, total, of_tokens = int(missing[step].sum()), missing[step].size, leaf.startswith(token_leaf)
            kind = "tokens" if of_tokens else plain
            found += [f"{count:,} of {total:,} {kind} of {short_name(leaf)} (step {step:,})"] if count else []
            tokens |= of_tokens and count > 0
    what = " A token without any has no embedding (head tied) and the logit 0." if tokens else ""
    return f" Without any, where most: {'; '.join(found)}.{what}" if found else ""


def _named_steps(run: Run, density: Mapping[int, float]) -> dict[int, str]:
    """Start, sparsest (where that changes) and end among the steps; one step is shown once, under all its names."""
    steps, sparsest = sorted(density), min(sorted(density), key=density.__getitem__)
    last = "end" if steps[-1] == run.numbers.get("steps") else "last"
    named = [("start", steps[0]), ("sparsest", sparsest), (last, steps[-1])]
    if density[sparsest] == max(density.values()):
        del named[1]
    names: dict[int, list[str]] = {}
    for name, step in named:
        names.setdefault(step, []).append(name)
    return {step: f"{' and '.join(names[step])}, step {step:,}" for step in sorted(names)}


def _some(items: Sequence[str], most: int) -> list[str]:
    """At most so many items, evenly spread."""
    indices = np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))
    return [items[i] for i in indices]


def _picture(image: np.ndarray | None, leaf: str) -> dict[str, Markup] | None:
    """One small multiple; None where that step did not record the leaf."""
    if image is None:
        return None
    body = Markup('<img src="{}" alt="mask of {}">').format(png_uri(image), short_name(leaf))
    return {"body": body, "caption": Markup(f"{percent(float(image.mean()))} present")}


def _histograms(degrees: tuple[np.ndarray, np.ndarray] | None) -> dict[str, Markup] | None:
    """In- and out-degrees as shares of those possible, over the same bins."""
    if degrees is None:
        return None
    into, out = degrees
    shares = into / len(out), out / len(into)
    low, high = min(s.min() for s in shares), max(s.max() for s in shares)
    # Bins hold as many possible degrees each, or there would be gaps that no neuron made.
    spacing = 1 / min(len(into), len(out))
    degrees_in_all = math.ceil((high - low) / spacing) + 1
    degrees_in_one = math.ceil(degrees_in_all / _MAX_BINS)
    bin_count = math.ceil(degrees_in_all / degrees_in_one)
    edges = low + spacing * (degrees_in_one * np.arange(bin_count + 1) - 0.5)
    paths = [
        Markup(f'<path class="{name}" d="{histogram_path(share, edges, 100, 75)}"/>')
        for name, share in zip(("into", "out"), shares, strict=True)
    ]
    body = Markup('<svg viewBox="0 -1 100 77" preserveAspectRatio="none" role="img" aria-label="degrees">{}{}</svg>')
    lines = [f"{name} {_range(d)} of {most:,}" for name, d, most in (("in", into, len(out)), ("out", out, len(into)))]
    unconnected = int((into == 0).sum() + (out == 0).sum())
    lines += [f"{unconnected:,} without any"] if unconnected else []
    return {"body": body.format(*paths), "caption": Markup("<br>".join(lines))}


def _range(degrees: np.ndarray) -> str:
    low, high = int(degrees.min()), int(degrees.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


_MULTIPLES = template("""\
<div class="multiples" style="--columns: {{ columns | length }}">
  {% for column in columns %}
  <span>{{ column | held }}</span>
  {% endfor %}
  {% for name, cells in rows %}
  <code>{{ name }}</code>
  {% for cell in cells %}
  {% if cell %}
  <figure>
    {{ cell.body }}
    <figcaption>{{ cell.caption }}</figcaption>
  </figure>
  {% else %}
  <span>not recorded</span>
  {% endif %}
  {% endfor %}
  {% endfor %}
</div>
""")
_SCALE = template("""\
<div class="scale"><img src="{{ scale }}" alt=""><span>0 %</span><span>25 %</span><span>100 % present</span></div>
""")


# --- scores, texts, settings -----------------------------------------------------------------------------------------


def _scores(run: Run) -> Panel | None:
    values = {key: value for key, value in run.scores.items() if isinstance(value, int | float) and key != "step"}
    if not values:
        return None
    parts = [name for name in ("seen", "unseen") if isinstance(run.scores.get(name), dict)]
    signatures, absent = run.scores.get("signatures", {}), run.scores.get("absent", {})
    rows = []
    for key, value in values.items():
        figures = [value, *(run.scores[part].get(key) for part in parts)]
        texts = ["" if figure is None else f"{figure:.4f}" for figure in figures]
        rows.append((score_name(key), texts, signatures.get(key, "")))
    body = _SCORES.render(parts=parts, rows=rows, absent=[(score_name(key), why) for key, why in absent.items()])
    step = f"The state after step {run.scores['step']:,}. " if "step" in run.scores else ""
    of_task = (
        signatures and " Texts are decoded from the whole test set; the validation loss is over the validation set."
    )
    return Panel("Scores", Markup(body), f"{step}{of_task or ''}".strip(), wide=True)


_SCORES = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th>score</th><th>all</th>
  {% for part in parts %}
  <th>{{ part }} categories</th>
  {% endfor %}
  <th>how it is computed</th></tr></thead>
  {% for name, texts, signature in rows %}
  <tr><th scope="row">{{ name }}</th>
    {% for text in texts %}
    <td>{{ text }}</td>
    {% endfor %}
    <td class="name soft">{{ signature }}</td></tr>
  {% endfor %}
  {% for name, why in absent %}
  <tr><th scope="row">{{ name }}</th><td>absent</td>
    {% for part in parts %}
    <td></td>
    {% endfor %}
    <td class="name soft">{{ why }}</td></tr>
  {% endfor %}
</table></div>
""")


def _zero_shot(run: Run) -> Panel | None:
    if "zero_shot" not in run.scores:
        return None
    found = run.scores["zero_shot"]
    tasks = [
        (name, [(score_name(metric), digits(value, 4)) for metric, value in task["metrics"].items()], task)
        for name, task in found["tasks"].items()
    ]
    caption = f"Tasks of lm-eval {found['lm_eval_version']} on local files."
    if ours := [name for name in ("sst2", "rte") if name in found["tasks"]]:
        caption += f" The prompts of {' and '.join(ours)} are this project's: compare between its runs."
    return Panel("Zero-shot", Markup(_ZERO_SHOT.render(tasks=tasks)), caption, wide=True)


_ZERO_SHOT = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th>task</th><th>score</th><th>value</th><th>texts</th><th>examples given</th></tr></thead>
  {% for name, figures, task in tasks %}
  {% for metric, value in figures %}
  <tr>
    {% if loop.first %}
    <th scope="row" rowspan="{{ figures | length }}">{{ name | breakable }}</th>
    {% endif %}
    <td>{{ metric }}</td><td>{{ value }}</td><td>{{ "{:,}".format(task.samples) }}</td><td>{{ task.num_fewshot }}</td>
  </tr>
  {% endfor %}
  {% endfor %}
</table></div>
""")


def _exams(run: Run) -> Panel | None:
    """A table and a chart, side by side where there is room."""
    if "exams" not in run.scores:
        return None
    exams = run.scores["exams"]
    overall, rows = exams["overall"], exams["certifications"]
    by = {"length": "mean log-likelihood a token", "letter": "the likelihood of their letters"}[exams["mode"]]
    caption = (
        f"{overall['passed']:,} of {overall['certifications']:,} certifications passed, each at over {PASS_OVER_PERCENT} %"
        f" correct. Mean score {percent(overall['score'])}, guessing gives {percent(overall['guess_score'])}."
    )
    if overall["human_compared"]:
        caption += (
            f" On the {overall['human_compared']:,} with a human score: {percent(overall['human_compared_score'])},"
            f" people {percent(overall['human_score'])}."
        )
    questions = exams["questions_file"] or "this project's own, which nobody sat: compare between its runs"
    caption += f" Choices are compared by {by}. Questions: {questions}."
    body = _EXAMS.render(
        rows=rows,
        percent=percent,
        with_people=overall["human_compared"] > 0,
        is_folded=len(rows) > _MAX_EXAM_BARS,
        chart=_exam_chart(exams),
    )
    return Panel("Exams", Markup(body), caption, wide=True)


_EXAMS = template("""\
<div class="grid">
{% if is_folded %}
<details><summary>All {{ "{:,}".format(rows | length) }} certifications</summary>
{% endif %}
<div class="scroll"><table class="figures">
  <thead><tr><th>certification</th><th>questions</th><th>score</th>
  {% if with_people %}
  <th>people</th>
  {% endif %}
  <th>passed</th></tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ row.certification }}<small>{{ row.field }}</small></th>
    <td>{{ "{:,}".format(row.questions) }}</td><td>{{ percent(row.score) }}</td>
    {% if with_people %}
    <td>{{ "-" if row.human_score is none else percent(row.human_score) }}</td>
    {% endif %}
    <td>{{ "yes" if row.passed else "no" }}</td></tr>
  {% endfor %}
</table></div>
{% if is_folded %}
</details>
{% endif %}
{{ chart }}
</div>
""")


def _exam_chart(exams: Mapping[str, Any]) -> Markup:
    """A bar a certification under the heading of its field; of too many to draw, a bar a field."""
    is_by_field = len(exams["certifications"]) > _MAX_EXAM_BARS
    lines: list[tuple[str, Mapping[str, Any] | None]] = []  # a label and what its bar shows: nothing under a heading
    for field in exams["fields"]:
        title = f"{field['field']}: {field['passed']:,} of {field['certifications']:,} passed"
        lines.append((title, field if is_by_field else None))
        if not is_by_field:
            lines += [(one["certification"], one) for one in exams["certifications"] if one["field"] == field["field"]]
    figure, axes = new_figure(height_inches=0.8 + 0.32 * len(lines))
    for level, (label, one) in enumerate(lines):
        # Over its bar, not beside the axis: the page may be a phone's. The table has names in full.
        height, weight = (level - 0.18, "normal") if one else (level + 0.14, "bold")
        text = label if len(label) <= _MAX_EXAM_LABEL else f"{label[: _MAX_EXAM_LABEL - 1]}…"
        axes.text(0, height, text, fontsize=8, weight=weight, transform=axes.get_yaxis_transform())
    shown = [(level + 0.24, one) for level, (_, one) in enumerate(lines) if one]
    kinds = {"mean score": DENSE} if is_by_field else {"passed": SPARSE, "not passed": DENSE}
    for kind, colour in kinds.items():
        some = [bar for bar in shown if is_by_field or bar[1]["passed"] == (kind == "passed")]
        scores = [100 * one["score"] for _, one in some]
        axes.barh([level for level, _ in some], scores, height=0.26, color=colour, label=kind)
    for key, name, marker in (("guess_score", "guessing", "|"), ("human_score", "people", "o")):
        marks = [(100 * one[key], level) for level, one in shown if one[key] is not None]
        if marks:
            style: dict[str, Any] = {"marker": marker, "linestyle": "none", "color": INK, "fillstyle": "none"}
            axes.plot(*zip(*marks, strict=True), markersize=6, label=name, **style)
    label = f"passed at over {PASS_OVER_PERCENT} %"
    axes.axvline(PASS_OVER_PERCENT, color=SOFT_INK, linewidth=1, linestyle=":", label=label)
    axes.set(xlabel="questions answered right (%)", xlim=(0, 100), ylim=(len(lines) - 0.4, -0.6), yticks=[])
    axes.spines.left.set_visible(False)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3)
    return svg(figure, "scores of the exams")


def _texts(run: Run) -> Panel | None:
    if not run.generations:
        return None
    indices = [int(i) for i in _some([str(i) for i in range(len(run.generations))], _MAX_TEXTS)]
    body = _TEXTS.render(texts=[run.generations[i] for i in indices])
    caption = (
        f"{len(indices)} of {len(run.generations):,}, evenly spread: input, generated text, one of the references."
    )
    return Panel("Generated texts", Markup(body), caption, wide=True)


_TEXTS = template("""\
<ol class="texts">
  {% for one in texts %}
  <li><p class="soft">{{ one.context }}</p><p><strong>{{ one.text or "(nothing)" }}</strong></p>
    {% if one.references %}
    <p class="soft">Reference (of {{ one.references | length }}): {{ one.references[0] }}</p>
    {% endif %}
  </li>
  {% endfor %}
</ol>
""")


def _again(run: Run) -> Panel | None:
    seed = f"Seed {run.config['seed']}. " if "seed" in run.config else ""
    remark = f"{seed}In its own workdir the command finds this run and has nothing left to do: give another --workdir."
    if command := run.config.get("command"):
        return command_panel(command, remark)
    command = (
        "from pathlib import Path\nfrom spdf_jax.config.read import load_config\nfrom spdf_jax.jobs.train import train\n\n"
        'train(load_config(Path("config.json")), Path("again"))'
    )
    return command_panel(command, f"{seed}In Python, from the config.json beside this page.")


def _settings(run: Run) -> Panel | None:
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
    _numbers,
    _scores,
    _zero_shot,
    _exams,
    _loss_by_step,
    _loss_by_flops,
    _loss_by_time,
    _sparsity_by_step,
    _churn_by_step,
    _density_by_layer,
    _mask_pictures,
    _mask_degrees,
    _texts,
    _again,
    _settings,
)
