"""Of the page about a sweep: validation losses of its cells over tokens, compute and time, in lines with one key.

The key is the page's: a row of the table has one colour and one marker in the charts of `sweep_table` too.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import LogLocator, NullFormatter

from spdf_jax.report.draw import DASHES, SERIES, SOFT_INK, Plot, Table, column, new_figure, steps_along
from spdf_jax.report.page import Panel, template
from spdf_jax.report.records import Row, Run
from spdf_jax.report.sweep_records import Sweep
from spdf_jax.report.words import FLOP_UNITS, TIME_UNITS, count_tick, target_name, unit

# Further apart than this, the ends of the curves share an axis only if it is logarithmic.
_LOG_RATIO = 10
_FAINT: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.5, "zorder": 1.5}
_CLEAR: dict[str, Any] = {"linewidth": 1.2, "markersize": 4, "markeredgewidth": 0}
_MAX_MARKERS, _FEW_LINES = 8, 4
# Besides the colours, for readers who cannot tell those apart.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


class Series(NamedTuple):
    """Cells that share a line in the key."""

    label: str
    cells: tuple[str, ...]
    colour: str
    dashes: tuple[float, ...]
    marker: str = ""
    is_faint: bool = False

    @property
    def style(self) -> dict[str, Any]:
        """Of its lines, for matplotlib."""
        line: dict[str, Any] = {"color": self.colour, "linestyle": (0, self.dashes) if self.dashes else "-"}
        return line | (_FAINT if self.is_faint else _CLEAR | {"marker": self.marker})

    @property
    def key_line(self) -> Line2D:
        """The line and the marker in the key of a file."""
        return Line2D([], [], label=self.label, **self.style)

    @property
    def key_style(self) -> str:
        """The line of the key, as CSS."""
        dashes = " ".join(f"{2 * length:g}" for length in self.dashes) or "none"
        width, opacity = (1.5, 0.5) if self.is_faint else (3, 1)
        style = f"stroke: {self.colour}; stroke-width: {width}; stroke-dasharray: {dashes}; opacity: {opacity}"
        return f"fill: none; {style}"

    @property
    def key_marker(self) -> str:
        """The marker in the key, as the `d` of an SVG path."""
        if not self.marker:
            return ""
        marker = MarkerStyle(self.marker)
        outline = np.array(marker.get_path().transformed(marker.get_transform()).to_polygons()[0])
        return "M" + "L".join(f"{15 + 7 * x:.3g},{4 - 7 * y:.3g}" for x, y in outline) + "Z"


def series_of(sweep: Sweep, names: Sequence[str], choice: str) -> list[Series]:
    """A series a row of the table, over the seeds of its choice; cells of no row each by itself or, beside rows, all as one."""
    labels: dict[tuple[str, ...], list[str]] = {}
    for row in sweep.rows:
        if cells := tuple(name for name in row.groups.get(choice, ()) if name in names):
            labels.setdefault(cells, []).append(row.label)
    chosen = {name for cells in labels for name in cells}
    others = tuple(name for name in names if name not in chosen)
    found = [(" = ".join(rows), cells) for cells, rows in labels.items()] or [(name, (name,)) for name in others]
    series = []
    for i, (label, cells) in enumerate(found):
        seeds = f" ({len(cells)} seeds)" if len(cells) > 1 else ""
        dashes, marker = DASHES[i // len(SERIES) % len(DASHES)], _MARKERS[i % len(_MARKERS)]
        series.append(Series(label + seeds, cells, SERIES[i % len(SERIES)], dashes, marker))
    if chosen and others:
        series.append(Series(f"not chosen ({len(others)})", others, SOFT_INK, (), is_faint=True))
    return series


def key(series: Sequence[Series]) -> Markup:
    """The lines and markers of the series, with their labels."""
    return Markup(_KEY.render(series=series))


_KEY = template("""\
<ul class="key">
  {% for one in series %}
  <li><svg viewBox="0 0 30 8" aria-hidden="true"><path d="M0,4H30" style="{{ one.key_style }}"/>
    {%- if one.marker -%}
    <path d="{{ one.key_marker }}" fill="{{ one.colour }}"/>
    {%- endif -%}
    </svg>{{ one.label }}</li>
  {% endfor %}
</ul>
""")


class Axis(NamedTuple):
    """A way to say how far training is: its name in files, its label with room for a unit."""

    name: str
    label: str
    of: Callable[[Run, Sequence[Row]], np.ndarray | None]
    units: Sequence[tuple[float, str]]


def _column(key: str) -> Callable[[Run, Sequence[Row]], np.ndarray | None]:
    """None where rows lack it: those of a caller's own model count no tokens and no FLOPs."""
    return lambda _, rows: column(rows, key) if all(key in row for row in rows) else None


def with_unit(runs: Iterable[Run], loss: str) -> str:
    """What a loss is called, with its unit where all runs have the same."""
    units = {run.loss_unit for run in runs}
    return f"{loss} ({min(units)})" if len(units) == 1 and any(units) else loss


STEPS = Axis("steps", "step", _column("step"), ((1.0, ""),))
_AXES = (
    Axis("tokens", "training tokens", _column("tokens"), ((1.0, ""),)),
    Axis("FLOPs (counted)", "training compute ({}, counted)", _column("train_flops"), FLOP_UNITS),
    Axis("seconds (measured)", "training time ({}, measured)", Run.training_seconds, TIME_UNITS),
)


def curves(sweep: Sweep, *before: Axis) -> list[Panel]:
    """A panel for every choice and everything that a validation loss is over: losses over other targets share no axis.

    Args:
      sweep: whose cells.
      before: axes besides tokens, FLOPs and time, which they go before.
    """
    by_task: dict[str, dict[str, list[Row]]] = {}
    for name, run in sweep.cells.items():
        for row in run.evaluation_rows:
            by_task.setdefault(run.task(row), {}).setdefault(name, []).append(row)
    groups = _groups(sweep) or {"": set()}
    panels: dict[tuple[str, ...], Panel | None] = {}
    for task, choice in itertools.product(sorted(by_task), groups):
        others = set().union(*groups.values()) - groups[choice]
        rows = {name: found for name, found in by_task[task].items() if name not in others}
        if rows and (task, *rows) not in panels:
            panels[task, *rows] = _curves_of(sweep, task, choice, rows, (*before, *_AXES))
    return [panel for panel in panels.values() if panel is not None]


def _groups(sweep: Sweep) -> dict[str, set[str]]:
    """The cells of each choice that columns are of, over all rows."""
    groups: dict[str, set[str]] = {}
    for row in sweep.rows:
        for choice, cells in row.groups.items():
            groups.setdefault(choice, set()).update(cells)
    return groups


def _curves_of(sweep: Sweep, task: str, choice: str, rows: dict[str, list[Row]], axes: Sequence[Axis]) -> Panel | None:
    """None where nothing is on any axis: no run has taken a step."""
    of_choice = f", {choice}" if choice else ""
    trained = {name: [row for row in found if row["step"] > 0] for name, found in rows.items()}
    left_out = ""
    if any(found[0]["step"] == 0 for found in rows.values()) and all(len(found) > 1 for found in trained.values()):
        rows, left_out = trained, " The evaluation at step 0 is left out."
    series = series_of(sweep, list(rows), choice)
    title = f"Validation loss: {task or 'text'}{of_choice}"
    drawn = {axis: figure for axis in axes if (figure := _curves_figure(sweep, series, rows, axis)) is not None}
    if not drawn:
        return None
    plots = [
        Plot(
            f"{title} by {axis.name.split(' ')[0]}",
            figure,
            f"validation loss over {target_name(task)}, {figure.axes[0].get_xlabel()}{of_choice}",
            _table(sweep, series, rows, axis),
            [one.key_line for one in series],
        )
        for axis, figure in drawn.items()
    ]
    *others, last = [axis.name.split(" ")[0].replace("seconds", "time") for axis in drawn]
    by = " and ".join(filter(None, [", ".join(others), last]))
    caption = f"Loss over {target_name(task)}, by the {by} of each run by itself.{left_out}"
    if "step" in by and any(sweep.cells[name].first_step for name in rows):
        caption += " The steps of a run that goes on from another count on from there."
    if "time" in by:
        caption += " Training time is without evaluations; compilation is in it."
    body = key(series) + Markup(_CURVES.render(figures=[plot.inline for plot in plots]))
    return Panel(title, body, caption, wide=True, plots=plots)


def _table(sweep: Sweep, series: Sequence[Series], rows: Mapping[str, Sequence[Row]], axis: Axis) -> Table:
    lines: list[Sequence[Any]] = []
    for one in series:
        for cell in one.cells:
            if (xs := axis.of(sweep.cells[cell], rows[cell])) is not None:
                lines += [(one.label, cell, x, row["val_loss"]) for x, row in zip(xs, rows[cell], strict=True)]
    return Table(("line", "run", axis.name, with_unit([sweep.cells[name] for name in rows], "validation loss")), lines)


_CURVES = template("""\
<div class="{{ 'three' if figures | length % 2 else 'two' }}">
  {% for figure in figures %}
  {{ figure }}
  {% endfor %}
</div>
""")


def _curves_figure(
    sweep: Sweep, series: Sequence[Series], rows: Mapping[str, Sequence[Row]], axis: Axis
) -> Figure | None:
    found = {name: axis.of(sweep.cells[name], some) for name, some in rows.items()}
    xs = {name: x for name, x in found.items() if x is not None}
    ends = [x[-1] for x in xs.values() if x[-1] > 0]
    if not ends:
        return None
    scale, name = unit(max(ends), axis.units)
    is_log = max(ends) > _LOG_RATIO * min(ends)
    figure, axes = new_figure(height_inches=2.5 if len(series) <= _FEW_LINES else 3.6, width_inches=3.4)
    for place, one in enumerate(series):
        for cell in (name for name in one.cells if name in xs):
            shown = xs[cell] > 0 if is_log else np.full(len(xs[cell]), True)
            losses = column(rows[cell], "val_loss")
            every = math.ceil(shown.sum() / _MAX_MARKERS)
            axes.plot(xs[cell][shown] / scale, losses[shown], markevery=(place % every, every), label=cell, **one.style)
    axes.set(xlabel=axis.label.format(name), ylabel=with_unit([sweep.cells[name] for name in rows], "loss"))
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        first, last = axes.get_xlim()
        if last < 300 * first:  # or powers of ten would be a number or two
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    else:
        axes.set_xlim(0, None)
        if axis is STEPS:
            steps_along(axes)
    axes.xaxis.set_major_formatter(count_tick)
    return figure
