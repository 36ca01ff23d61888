"""`report.html`: one page about a run, for someone who was not there.

Built only from what the run recorded, so it can be written during the run and again at any time after. The page loads
nothing: figures are inline SVG, mask pictures are PNG data URIs.
"""

import base64
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave

from spdf_jax.errors import InputError
from spdf_jax.tracking import PICTURES_FOLDER, read_metrics, write_atomically

_SPARSE, _DENSE, _INK, _SOFT_INK = "#0f766e", "#8a94a0", "#1f2933", "#52606d"
_DENSITY_COLOURS = LinearSegmentedColormap.from_list("density", ["#f1f5f4", "#5fb3a9", "#0f766e", "#05302d"])
# Densities of interest are small: the square root spreads 1 % to 10 % over a quarter of the colours.
_DENSITY_NORM = PowerNorm(0.5, vmin=0, vmax=1)
_FIGURE_STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#c5ccd3",
    "axes.grid": True,
    "axes.labelcolor": _INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "grid.color": "#e6eaed",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own typeface
    "text.color": _INK,
    "text.parse_math": False,  # names come from configs and may hold dollar signs
    "xtick.color": _SOFT_INK,
    "ytick.color": _SOFT_INK,
}
_FLOP_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"))
_COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_MAX_LINE_POINTS = 600
_MAX_PICTURED_LEAVES = 3

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Run:
    """What a run recorded.

    `numbers` is `summary.json`, and before there is one, what the rows say so far.
    """

    config: Mapping[str, Any]
    numbers: Mapping[str, Any]
    train_rows: Sequence[Row]
    evaluation_rows: Sequence[Row]
    topology_rows: Sequence[Row]
    pictures: Mapping[int, Mapping[str, np.ndarray]]

    @cached_property
    def all_rows(self) -> list[Row]:
        """Every row, by step."""
        return sorted([*self.train_rows, *self.evaluation_rows, *self.topology_rows], key=lambda row: row["step"])

    @cached_property
    def max_sparsity(self) -> float:
        """The highest sparsity any row saw; 0 for a run without masks."""
        return max((row["sparsity"] for row in self.all_rows), default=0.0)

    @property
    def is_dense(self) -> bool:
        """Whether nothing is saved: no masks, and no attention pattern that skips work."""
        return self.max_sparsity <= 0 and self.numbers.get("flops_reduction", 1.0) < 1.005


@dataclass(frozen=True)
class Panel:
    """One titled card of the page."""

    title: str
    body: Markup
    caption: str


def write_report(workdir: Path) -> Path:
    """Writes `report.html`, atomically, from what the run in `workdir` has recorded so far.

    Args:
        workdir: the run's folder; needs `config.json` and `metrics.jsonl`, all else is shown where it is there.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder holds no run, or a file in it cannot be read.
    """
    run = _read_run(Path(workdir))
    with matplotlib.rc_context(_FIGURE_STYLE):
        panels = [panel for make in _PANELS if (panel := make(run)) is not None]
    page = _TEMPLATE.render(
        title=f"{run.config['experiment']}: {run.config['variant']}",
        status=_status(run),
        verdict=_verdict(run),
        counted_note=_COUNTED_NOTE if run.max_sparsity > 0 else "",
        numbers=list(_number_lines(run)),
        panels=panels,
        command=run.config.get("command", ""),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
    )
    path = Path(workdir) / "report.html"
    write_atomically(path, page.encode())
    return path


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_run(workdir: Path) -> Run:
    rows = read_metrics(workdir)
    config = _read_json(workdir / "config.json")
    if config is None or not {"experiment", "variant"} <= config.keys():
        raise InputError(
            f"{workdir / 'config.json'}: missing or without experiment and variant; give the --workdir of a run"
        )
    numbers = {**_numbers_so_far(rows), **(_read_json(workdir / "summary.json") or {})}
    return Run(
        config=config,
        numbers={key: number for key, number in numbers.items() if number is not None},
        train_rows=[row for row in rows if "loss" in row],
        evaluation_rows=[row for row in rows if "val_loss" in row],
        topology_rows=[row for row in rows if row.get("density")],
        pictures=_read_pictures(workdir),
    )


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    if not path.is_file():
        return None
    try:
        obj = json.loads(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore the file or run the job again") from error
    if not isinstance(obj, dict):
        raise InputError(f"{path}: holds {type(obj).__name__}, not an object; restore the file or run the job again")
    return obj


def _read_pictures(workdir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Step -> leaf path -> density image."""
    pictures = {}
    for path in sorted((workdir / PICTURES_FOLDER).glob("step_*.npz")):
        try:
            with np.load(path, allow_pickle=False) as file:
                images = {leaf: file[leaf] for leaf in file.files}
                pictures[int(path.stem.removeprefix("step_"))] = images
        except (ValueError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a mask picture ({error}); delete it and write the report again") from error
    return pictures


def _numbers_so_far(rows: Sequence[Row]) -> dict[str, Any]:
    """The summary's numbers, from the rows alone."""
    numbers: dict[str, Any] = {}
    for row in rows:
        numbers["steps"] = row["step"]
        numbers |= {key: row[key] for key in ("tokens", "sparsity", "tokens_per_second", "val_loss") if key in row}
        if "train_flops" in row:
            numbers |= {"train_flops": row["train_flops"], "dense_flops": row["dense_flops"]}
        if "val_loss" in row and row["step"] == 0:
            numbers["initial_val_loss"] = row["val_loss"]
    if "train_flops" in numbers and numbers["train_flops"] > 0:
        numbers["flops_reduction"] = numbers["dense_flops"] / numbers["train_flops"]
    return numbers


# --- words -----------------------------------------------------------------------------------------------------------

_COUNTED_NOTE = (
    "FLOPs saved are counted, not seconds saved. The count is what a machine that skips zeros would do; here masks"
    " simulate sparsity and masked weights are still multiplied, so wall-clock time is no measure of the saving."
)


def _verdict(run: Run) -> str:
    """One sentence: how good, on how much, for what."""
    numbers = run.numbers
    text = f"Validation loss {numbers['val_loss']:.2f}" if "val_loss" in numbers else "No validation loss yet"
    if "tokens" in numbers:
        text += f" after {_quantity(numbers['tokens'], _COUNT_UNITS)} tokens"
    if "flops_reduction" in numbers:
        scale, unit = _unit(numbers["dense_flops"], _FLOP_UNITS)
        spent, dense = (_digits(numbers[key] / scale) for key in ("train_flops", "dense_flops"))
        if run.is_dense:
            text += f", trained dense for {spent} {unit}"
        else:
            reduction = f"{numbers['flops_reduction']:.1f}x"
            text += f" with {reduction} fewer training FLOPs than dense ({spent} vs {dense} {unit})"
    time = [_duration(numbers["wall_seconds"])] if "wall_seconds" in numbers else []
    time += [f"on {numbers['device']}"] if "device" in numbers else []
    return text + (f"; {' '.join(time)}." if time else ".")


def _status(run: Run) -> str:
    if "status" in run.numbers:
        return str(run.numbers["status"])
    return (
        f"unfinished, at step {run.numbers['steps']:,}" if "steps" in run.numbers else "unfinished, nothing logged yet"
    )


def _number_lines(run: Run) -> Iterator[tuple[str, str, str]]:
    """Label, value with its unit, and a remark, for each number there is."""
    formats: dict[str, tuple[str, Callable[[Any], str], str]] = {
        "val_loss": ("Validation loss", lambda v: f"{v:.4f} nats/token", "at the last evaluation"),
        "initial_val_loss": ("Validation loss before training", lambda v: f"{v:.4f} nats/token", "same tokens, step 0"),
        "unigram_loss": ("Loss of token frequencies alone", lambda v: f"{v:.4f} nats/token", "a model must beat this"),
        "sparsity": ("Sparsity at the last step", _percent, f"{_percent(run.max_sparsity)} at its highest"),
        "train_flops": ("Training FLOPs, counted", _flops, "multiplications by zero left out"),
        "dense_flops": ("The same tokens, dense", _flops, "same model without masks"),
        "flops_reduction": ("FLOP reduction", lambda v: f"{v:.2f}x", "counted, not measured in seconds"),
        "tokens": ("Training tokens", lambda v: f"{v:,}", ""),
        "steps": ("Training steps", lambda v: f"{v:,}", ""),
        "parameters": ("Parameters", lambda v: f"{v:,}", "zeros included"),
        "tokens_per_second": ("Throughput", lambda v: f"{v:,.0f} tokens/s", "measured"),
        "wall_seconds": ("Wall-clock time", _duration, "measured"),
        "device": ("Device", str, ""),
    }
    hidden = ("sparsity", "dense_flops", "flops_reduction") if run.is_dense else ()
    for key, (label, render, remark) in formats.items():
        if key in run.numbers and key not in hidden:
            yield label, render(run.numbers[key]), remark


def _unit(value: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit not over `value`."""
    return next((unit for unit in units if abs(value) >= unit[0]), (1.0, "FLOP" if units is _FLOP_UNITS else ""))


def _digits(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(2 - math.floor(math.log10(abs(value))), 0)}f}"


def _quantity(value: float, units: Sequence[tuple[float, str]]) -> str:
    scale, unit = _unit(value, units)
    return f"{_digits(value / scale)}{unit}" if scale > 1 else f"{value:,.0f}"


def _flops(value: float) -> str:
    scale, unit = _unit(value, _FLOP_UNITS)
    return f"{_digits(value / scale)} {unit}"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.3g} %"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- panels: each takes the run and gives a Panel, or None where the run recorded nothing for it ---------------------


def _loss_by_step(run: Run) -> Panel | None:
    if not run.train_rows and not run.evaluation_rows:
        return None
    figure, axes = _new_figure()
    colour = _run_colour(run)
    if run.train_rows:
        steps, losses = _thinned(run.train_rows, "step"), _thinned(run.train_rows, "loss")
        axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.45, label="training")
    _plot_validation(axes, [row["step"] for row in run.evaluation_rows], run.evaluation_rows, colour, "validation")
    _mark_unigram(axes, run)
    _mark_sparse_window(axes, run)
    _mark_phases(axes, run)
    axes.set(xlabel="step", ylabel="loss (nats/token)")
    axes.xaxis.set_major_formatter(_count_tick)
    axes.legend()
    every = math.ceil(len(run.train_rows) / _MAX_LINE_POINTS)
    line = "each logged step" if every <= 1 else f"means of {every} logged steps"
    caption = f"Line: training, {line}." if run.train_rows else ""
    caption += " Points: held-out text." if run.evaluation_rows else ""
    return Panel("Loss over steps", _svg(figure, "loss against steps"), caption.strip())


def _loss_by_flops(run: Run) -> Panel | None:
    rows = [*run.train_rows, *run.evaluation_rows]
    if not rows or max(row["dense_flops"] for row in rows) <= 0:
        return None
    scale, unit = _unit(max(row["dense_flops"] for row in rows), _FLOP_UNITS)
    figure, axes = _new_figure()
    if not run.is_dense:
        _plot_cost(axes, run, "dense_flops", scale, _DENSE, "same losses at the dense cost")
        _plot_cost(axes, run, "train_flops", scale, _SPARSE, "this run at its counted cost")
        _mark_reduction(axes, max(rows, key=lambda row: row["step"]), scale)
        caption = (
            "Coloured: at the cost for a machine that skips zeros. Grey: the same losses at the cost of a dense model"
            " (not a dense run)."
        )
    else:
        _plot_cost(axes, run, "train_flops", scale, _DENSE, "this run, dense")
        caption = "This run is dense: nothing is skipped."
    axes.set(xlabel=f"training compute ({unit}, counted)", ylabel="loss (nats/token)", xlim=(0, None))
    axes.legend()
    return Panel("Loss over compute", _svg(figure, "loss against training FLOPs"), caption)


def _plot_cost(axes: Axes, run: Run, key: str, scale: float, colour: str, label: str) -> None:
    """The losses against one of the two costs: a faint training line and validation points."""
    has_points = bool(run.evaluation_rows)
    axes.plot(
        _thinned(run.train_rows, key) / scale,
        _thinned(run.train_rows, "loss"),
        color=colour,
        linewidth=1,
        alpha=0.45 if has_points else 1,
        label=None if has_points else label,
    )
    costs = [row[key] / scale for row in run.evaluation_rows]
    _plot_validation(axes, costs, run.evaluation_rows, colour, label)


def _mark_reduction(axes: Axes, row: Row, scale: float) -> None:
    """An arrow, under the curves, from the dense cost of the last row to the counted one, where they differ."""
    if row["dense_flops"] < 1.05 * row["train_flops"]:
        return
    lowest, highest = axes.get_ylim()
    level = lowest - 0.04 * (highest - lowest)
    axes.set_ylim(lowest - 0.16 * (highest - lowest), highest)
    sparse, dense = row["train_flops"] / scale, row["dense_flops"] / scale
    arrow = {"arrowstyle": "->", "color": _INK, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(sparse, level), xytext=(dense, level), arrowprops=arrow)
    text = f"{row['dense_flops'] / max(row['train_flops'], 1):.1f}x fewer FLOPs"
    axes.text((sparse + dense) / 2, level - 0.02 * (highest - lowest), text, ha="center", va="top", fontsize=8.5)


def _sparsity_by_step(run: Run) -> Panel | None:
    if run.max_sparsity <= 0:
        return None
    figure, axes = _new_figure()
    steps, sparsities_percent = _thinned(run.all_rows, "step"), 100 * _thinned(run.all_rows, "sparsity")
    axes.plot(steps, sparsities_percent, color=_SPARSE, linewidth=1.6)
    axes.fill_between(steps, sparsities_percent, color=_SPARSE, alpha=0.14, linewidth=0)
    axes.set(xlabel="step", ylabel="sparsity (%)", ylim=(0, 105))
    _mark_phases(axes, run)
    axes.xaxis.set_major_formatter(_count_tick)
    caption = f"Share of the maskable weights that are zero; highest {_percent(run.max_sparsity)}."
    return Panel("Sparsity over steps", _svg(figure, "sparsity against steps"), caption)


def _churn_by_step(run: Run) -> Panel | None:
    rows = [row for row in run.topology_rows if row.get("churn")]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    churns_percent = [100 * np.concatenate([np.atleast_1d(v) for v in row["churn"].values()]) for row in rows]
    lows, means, highs = (np.array([reduce(churn) for churn in churns_percent]) for reduce in (np.min, np.mean, np.max))
    figure, axes = _new_figure()
    axes.fill_between(steps, lows, highs, color=_SPARSE, alpha=0.16, linewidth=0, label="lowest to highest matrix")
    axes.plot(steps, means, color=_SPARSE, linewidth=1.4, marker="o", markersize=2.5, label="mean over matrices")
    axes.set(xlabel="step", ylabel="new connections (% of those present)", ylim=(0, None))
    axes.xaxis.set_major_formatter(_count_tick)
    axes.legend()
    caption = "Of the connections after each topology step, the share that was not there before it."
    return Panel("Churn over steps", _svg(figure, "churn against steps"), caption)


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
    figure, axes = _new_figure(height_inches=float(np.clip(0.8 + 0.24 * bands[-1], 2.6, 6.4)))
    image = axes.pcolormesh(
        _cell_edges(steps),
        np.arange(bands[-1] + 1),
        np.stack(columns, axis=1),
        cmap=_DENSITY_COLOURS,
        norm=_DENSITY_NORM,
        rasterized=True,
    )
    axes.hlines(bands[1:-1], *axes.get_xlim(), color="white", linewidth=1.5)
    axes.set_yticks((bands[:-1] + bands[1:]) / 2, [_short_name(leaf) for leaf in layer_counts])
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="step")
    axes.xaxis.set_major_formatter(_count_tick)
    bar = figure.colorbar(
        image, ax=axes, label="density (%)", ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], aspect=30, pad=0.02
    )
    bar.ax.set_yticklabels(["0", "1", "5", "10", "25", "50", "100"])
    bar.outline.set_visible(False)
    caption = "Share of weights present, at each topology step. Each band is one weight matrix, its first layer on top."
    return Panel("Density by layer", _svg(figure, "density of each layer against steps"), caption)


def _mask_pictures(run: Run) -> Panel | None:
    """Small multiples: a few leaves down, start / sparsest / end across."""
    if not any(run.pictures.values()) or run.max_sparsity <= 0:
        return None
    steps = sorted(step for step, images in run.pictures.items() if images)
    mean_density = {step: float(np.mean([image.mean() for image in run.pictures[step].values()])) for step in steps}
    sparsest_step = min(steps, key=mean_density.__getitem__)
    # A dict by step: a sparsest step that is also the first or last is shown once, under both names.
    columns: dict[int, list[str]] = {}
    for name, step in (("start", steps[0]), ("sparsest", sparsest_step), ("end", steps[-1])):
        columns.setdefault(step, []).append(name)
    columns = dict(sorted(columns.items()))
    leaves = list(run.pictures[sparsest_step])
    chosen = np.unique(np.linspace(0, len(leaves) - 1, min(len(leaves), _MAX_PICTURED_LEAVES)).round().astype(int))
    rows = [
        (_short_name(leaf), [_picture_cell(run.pictures[step], leaf) for step in columns])
        for leaf in (leaves[index] for index in chosen)
    ]
    body = _PICTURES_TEMPLATE.render(
        columns=[f"{' and '.join(names)}, step {step:,}" for step, names in columns.items()],
        rows=rows,
        scale=_png_uri(np.linspace(0, 1, 256)[np.newaxis] ** 2),
    )
    caption = f"{len(chosen)} of {len(leaves)} recorded matrices, shrunk: a pixel is the share of weights present in its block."
    return Panel("Masks", Markup(body), caption)


def _picture_cell(pictures: Mapping[str, np.ndarray], leaf: str) -> dict[str, str] | None:
    """One small multiple; None where that step did not record the leaf."""
    if leaf not in pictures:
        return None
    return {"uri": _png_uri(pictures[leaf]), "density": _percent(float(pictures[leaf].mean()))}


_PANELS: tuple[Callable[[Run], Panel | None], ...] = (
    _loss_by_step,
    _loss_by_flops,
    _sparsity_by_step,
    _churn_by_step,
    _density_by_layer,
    _mask_pictures,
)


# --- drawing ---------------------------------------------------------------------------------------------------------


def _new_figure(height_inches: float = 3.1) -> tuple[Figure, Axes]:
    """A figure small enough that its text is still readable at a phone's width."""
    figure = Figure(figsize=(4.7, height_inches))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as an SVG element that can stand beside others in one page."""
    buffer = io.StringIO()
    # Ids hash the salt and what they name, so the same figure gives the same bytes and two figures never clash.
    with matplotlib.rc_context({"svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    head, body = svg.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page decides; the viewBox keeps the proportions
    return Markup(f'{head} role="img" aria-label="{description}">{body}')


def _png_uri(density: np.ndarray) -> str:
    """A density image as a PNG data URI."""
    buffer = io.BytesIO()
    imsave(buffer, _DENSITY_COLOURS(_DENSITY_NORM(density)), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _thinned(rows: Sequence[Row], key: str) -> np.ndarray:
    """A column of the rows, as means of equal runs of rows where there are more than a line can show."""
    values = np.array([row[key] for row in rows], float)
    run_length = math.ceil(len(values) / _MAX_LINE_POINTS)
    if run_length <= 1:
        return values
    starts = np.arange(0, len(values), run_length)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def _run_colour(run: Run) -> str:
    return _DENSE if run.is_dense else _SPARSE


def _plot_validation(axes: Axes, xs: Sequence[float], rows: Sequence[Row], colour: str, label: str) -> None:
    if rows:
        losses = [row["val_loss"] for row in rows]
        axes.plot(xs, losses, color=colour, linewidth=1.2, marker="o", markersize=3.5, label=label)


def _mark_unigram(axes: Axes, run: Run) -> None:
    """The loss of token frequencies, where the run recorded it."""
    if "unigram_loss" in run.numbers:
        loss = run.numbers["unigram_loss"]
        axes.axhline(loss, color=_SOFT_INK, linewidth=1, linestyle=":", label="token frequencies alone")


def _mark_phases(axes: Axes, run: Run) -> None:
    """Names above the axes and a line at each change, where there is more than one phase."""
    starts: dict[str, int] = {}
    for row in run.all_rows:
        starts.setdefault(_clipped(row["phase"]), row["step"])
    if len(starts) < 2:
        return
    left, right = axes.get_xlim()
    level_ends = [-math.inf] * len(starts)
    for name, step in starts.items():
        if step > 0:
            axes.axvline(step, color=_INK, linewidth=0.8, linestyle="--")
        # A name begins with its phase, unless it would run out of the figure; one with no room goes a line higher.
        width = 0.018 * len(name)
        position = max(min((step - left) / (right - left), 1 - width), 0.0)
        level = next(level for level, end in enumerate(level_ends) if end <= position)
        level_ends[level] = position + width
        axes.text(position, 1.02 + 0.06 * level, name, transform=axes.transAxes, fontsize=8.5, color=_SOFT_INK)
    axes.set_xlim(left, right)


def _mark_sparse_window(axes: Axes, run: Run) -> None:
    """Shades the steps with sparse weights."""
    label: str | None = f"sparse, up to {_percent(run.max_sparsity)}"
    for is_sparse, rows in itertools.groupby(run.all_rows, key=lambda row: row["sparsity"] > 0):
        if is_sparse:
            steps = [row["step"] for row in rows]
            axes.axvspan(steps[0], steps[-1], color=_SPARSE, alpha=0.1, linewidth=0, label=label)
            label = None


def _cell_edges(steps: Sequence[int]) -> np.ndarray:
    """Edges between the columns of a heatmap: each reaches to the next step, the last as far as the one before."""
    last_width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.array([*steps, steps[-1] + max(last_width, 1)], float)


def _count_tick(value: float, _position: float) -> str:
    """A step as an axis label: 400, 1.5k, 600k."""
    scale, unit = _unit(value, _COUNT_UNITS)
    return f"{value / scale:g}{unit}"


def _short_name(leaf: str) -> str:
    """A leaf path without the parts that say nothing: blocks/attn/q/kernel/3 -> attn/q, layer 3."""
    name = re.sub(r"^params/|^blocks/|/kernel(?=/|$)|/embedding(?=/|$)", "", leaf)
    return _clipped(re.sub(r"/(\d+)$", r", layer \1", name))


def _clipped(name: str, max_characters: int = 24) -> str:
    """The end of a name that is too long to stand in a figure."""
    return name if len(name) <= max_characters else f"…{name[1 - max_characters :]}"


# --- the page --------------------------------------------------------------------------------------------------------

_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)

_PICTURES_TEMPLATE = _ENVIRONMENT.from_string("""\
<div class="masks" style="--columns: {{ columns | length }}">
  {% for column in columns %}
  <span>{{ column }}</span>
  {% endfor %}
  {% for name, cells in rows %}
  <code>{{ name }}</code>
  {% for cell in cells %}
  {% if cell %}
  <figure>
    <img src="{{ cell.uri }}" alt="mask of {{ name }}">
    <figcaption>{{ cell.density }} present</figcaption>
  </figure>
  {% else %}
  <span>not recorded</span>
  {% endif %}
  {% endfor %}
  {% endfor %}
</div>
<div class="scale"><img src="{{ scale }}" alt=""><span>0 %</span><span>25 %</span><span>100 % present</span></div>
""")

_TEMPLATE = _ENVIRONMENT.from_string("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #1f2933; --soft: #52606d; --line: #dde2e6;
        --accent: #0f766e; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --card: #1c2228; --ink: #e4e7eb; --soft: #9aa5b1; --line: #323a42; --accent: #4fd1c5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 .6rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .25rem; font-size: 1.05rem; }
.status { margin: 0 0 .25rem; color: var(--accent); font-size: .85rem; font-weight: 600; }
.verdict { margin: 0 0 .75rem; max-width: 46rem; font-size: 1.2rem; line-height: 1.45; text-wrap: balance; }
.note { margin: 0 0 1.75rem; max-width: 46rem; padding-left: .9rem; border-left: 3px solid var(--accent);
        color: var(--soft); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.1rem; }
.card { min-width: 0; padding: 1.1rem 1.2rem; border: 1px solid var(--line); border-radius: 10px;
        background: var(--card); }
.wide { grid-column: 1 / -1; }
.caption { margin: 0 0 .7rem; color: var(--soft); font-size: .88rem; line-height: 1.45; }
/* Figures keep a light ground in both modes: their ink is dark. */
.plot { padding: .5rem; border-radius: 6px; background: #fff; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg text { font-family: inherit !important; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
         font-weight: normal; }
tr:last-child > * { border-bottom: 0; }
td:nth-child(2) { font-weight: 600; overflow-wrap: anywhere; }
td:nth-child(3) { padding-right: 0; color: var(--soft); font-size: .88rem; }
.masks { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 9.5rem)); gap: .4rem .8rem;
         color: #1f2933; font-size: .8rem; line-height: 1.35; }
.masks > code { grid-column: 1 / -1; margin-top: .5rem; font-weight: 600; overflow-wrap: anywhere; }
.masks figure { margin: 0; }
.masks img { display: block; width: 100%; aspect-ratio: 1; border: 1px solid #c5ccd3; image-rendering: pixelated; }
.masks figcaption, .masks > span { color: #52606d; }
.scale { display: grid; grid-template-columns: 1fr auto 1fr; margin-top: 1rem; color: #52606d;
         font-size: .8rem; }
.scale img { grid-column: 1 / -1; width: 100%; height: .6rem; }
.scale span:last-child { text-align: right; }
pre { margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .83rem; line-height: 1.45; }
summary { cursor: pointer; font-weight: 600; }
@media (max-width: 34rem) {
  body { padding: 1.25rem .75rem 3rem; }
  .card { padding: .9rem .8rem; }
  .plot { margin-left: -.4rem; margin-right: -.4rem; padding: .25rem; }
  td:nth-child(3) { display: none; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #ccc; --accent: #0f766e; }
  body { max-width: none; padding: 0; font-size: 11pt; }
  .grid { grid-template-columns: 1fr 1fr; }
  .card { break-inside: avoid; }
  .config { display: none; }
}
</style>
</head>
<body>
<header>
  <p class="status">{{ status }}</p>
  <h1>{{ title }}</h1>
  <p class="verdict">{{ verdict }}</p>
  {% if counted_note %}
  <p class="note">{{ counted_note }}</p>
  {% endif %}
</header>
<main class="grid">
  {% if numbers %}
  <section class="card wide">
    <h2>Numbers</h2>
    <table>
    {% for label, value, remark in numbers %}
      <tr><th scope="row">{{ label }}</th><td>{{ value }}</td><td>{{ remark }}</td></tr>
    {% endfor %}
    </table>
  </section>
  {% endif %}
  {% for panel in panels %}
  <section class="card">
    <h2>{{ panel.title }}</h2>
    <p class="caption">{{ panel.caption }}</p>
    <div class="plot">{{ panel.body }}</div>
  </section>
  {% endfor %}
  {% if command %}
  <section class="card wide">
    <h2>Run it again</h2>
    <pre><code>{{ command }}</code></pre>
  </section>
  {% endif %}
  <section class="card wide config">
    <details><summary>Resolved config</summary><pre><code>{{ config }}</code></pre></details>
  </section>
</main>
</body>
</html>
""")
