"""Of the page about a run: its training and validation losses over steps, compute and time."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from spdf_jax.report.draw import (
    DENSE,
    INK,
    MAX_LINE_POINTS,
    SOFT_INK,
    SPARSE,
    Plot,
    Table,
    column,
    legend,
    mark_phases,
    new_figure,
    steps_along,
    thinned,
)
from spdf_jax.report.page import Panel, plot_panel
from spdf_jax.report.records import Row, Run
from spdf_jax.report.words import FLOP_UNITS, TIME_UNITS, count_tick, percent, reduction, target_name, unit


def loss_by_step(run: Run) -> Panel | None:
    """Losses over steps, with the sparse window, the phases and the best evaluation; None without losses of steps."""
    if not (run.train_rows or run.evaluation_rows) or run.all_rows[-1]["step"] == run.first_step:
        return None
    figure, axes = new_figure()
    colour = DENSE if run.is_dense else SPARSE
    before = [one for one in run.ancestors if one["rows"]]
    _plot_before(axes, before)
    _plot_losses(axes, run, lambda rows: column(rows, "step"), colour, "validation", "training")
    _mark_best(axes, run)
    _mark_unigram(axes, run)
    _mark_sparse_window(axes, run)
    mark_phases(axes, [*(row for one in before for row in one["rows"]), *run.all_rows])
    axes.set(ylabel=f"loss ({run.loss_unit})" if run.loss_unit else "loss")
    steps_along(axes)
    axes.xaxis.set_major_formatter(count_tick)
    legend(figure)
    every = math.ceil(len(run.train_rows) / MAX_LINE_POINTS)
    line = "each logged step" if every <= 1 else f"means of {every} logged steps"
    captions = [f"Line: training, {line}."] if run.train_rows else []
    tasks = list(dict.fromkeys(run.task(row) for row in run.evaluation_rows))
    if tasks and not run.loss_unit:
        captions.append("Points: validation.")
    elif tasks:
        captions.append(f"Points: {', then '.join(target_name(task) for task in tasks)}.")
    if before:
        captions.append("Darker: the runs before, each up to where it was gone on from.")
    table = _table(run, "step", lambda rows: column(rows, "step"))
    earlier = [
        (f"{kind} of {one['workdir']}", row["phase"], "", row["step"], None, row[key])
        for one in before
        for kind, key in (("training", "loss"), ("validation", "val_loss"))
        for row in one["rows"]
        if key in row
    ]
    plot = Plot("loss over steps", figure, "loss against steps", table._replace(rows=[*earlier, *table.rows]))
    return plot_panel("Loss over steps", plot, " ".join(captions))


def loss_by_flops(run: Run) -> Panel | None:
    """Losses over counted FLOPs, and over those of the same steps dense; None without a count."""
    rows = [*run.train_rows, *run.evaluation_rows]
    if max((row.get("dense_flops", 0) for row in rows), default=0) <= 0:
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
    table = _table(run, "training FLOPs (counted)", lambda rows: column(rows, "train_flops"))
    drawn = Plot("loss over compute", figure, "loss against training FLOPs", table)
    return plot_panel("Loss over compute", drawn, caption)


def loss_by_time(run: Run) -> Panel | None:
    """Losses over measured training time; None where it was not recorded."""
    ends = run.training_seconds(run.train_rows[-1:])
    if ends is None:
        return None
    scale, name = unit(ends[0] / 2, TIME_UNITS)  # two of a unit or more: not "1 to 1.2 hours"
    figure, axes = new_figure()

    def time(rows: Sequence[Row]) -> np.ndarray:
        return np.zeros(0) if (seconds := run.training_seconds(rows)) is None else seconds / scale

    _plot_losses(axes, run, time, DENSE if run.is_dense else SPARSE, "validation", "training")
    axes.set(xlabel=f"training time ({name}, measured)", ylabel="loss (nats/token)", xlim=(0, None))
    legend(figure)
    caption = "Time by the logged tokens a second: compilation is in it, evaluations are not."
    if run.max_sparsity > 0:
        caption += " Masks save no time; sparse_compute=blocks does."
    table = _table(run, "training time (s)", lambda rows: scale * time(rows))
    plot = Plot("loss over time", figure, "loss against training time", table)
    return plot_panel("Loss over time", plot, caption)


def _table(run: Run, x: str, xs: Callable[[Sequence[Row]], np.ndarray]) -> Table:
    """Every logged loss over `x`, with what the same steps cost a dense model."""
    rows: list[Sequence[Any]] = []
    for kind, key, some in (("training", "loss", run.train_rows), ("validation", "val_loss", run.evaluation_rows)):
        for at, row in zip(xs(some), some, strict=True):
            rows.append((kind, row["phase"], run.task(row), at, row.get("dense_flops"), row[key]))
    return Table(("loss", "phase", "task", x, "FLOPs of the same steps, dense", "nats/token"), rows)


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


def _plot_before(axes: Axes, before: Sequence[Mapping[str, Any]]) -> None:
    """Losses of the runs that a run goes on from, and a line where each was left."""
    label: str | None = "runs before"
    for one in before:
        train, evaluated = ([row for row in one["rows"] if key in row] for key in ("loss", "val_loss"))
        steps, losses = (thinned(column(train, key)) for key in ("step", "loss"))
        axes.plot(steps, losses, color=SOFT_INK, linewidth=1, alpha=0.45)
        steps, losses = (column(evaluated, key) for key in ("step", "val_loss"))
        axes.plot(steps, losses, color=SOFT_INK, linewidth=1.2, marker="o", markersize=3.5, label=label)
        axes.axvline(one["step"], color=SOFT_INK, linewidth=0.8, linestyle=":")
        label = None


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
    text = f"{reduction(row['dense_flops'] / max(row['train_flops'], 1))} fewer FLOPs"
    # Under a short arrow at the right edge the text ends with the arrow.
    centre, right = (sparse + dense) / 2, axes.get_xlim()[1]
    at, side = (dense, "right") if centre > 0.8 * right else (centre, "center")
    axes.text(at, level - 0.035 * (highest - lowest), text, ha=side, va="top", fontsize=8.5)
