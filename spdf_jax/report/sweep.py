"""The page about a sweep: its table, its cells in the same figures, and how they differ."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.ticker import NullFormatter

from spdf_jax.config.run import flat
from spdf_jax.report.draw import DASHES, SERIES, SOFT_INK, STYLE, new_figure, svg
from spdf_jax.report.page import Panel, command_panel, template, write_page
from spdf_jax.report.records import Row, Run, Sweep, TableRow, Value, differing_settings, read_sweep
from spdf_jax.report.words import (
    COUNT_UNITS,
    COUNTED_NOTE,
    FLOP_UNITS,
    count_tick,
    decimals,
    duration,
    flops,
    quantity,
    score_name,
    setting,
    target_name,
    unit,
)

# Further apart than this, the ends of the curves share an axis only if it is logarithmic.
_LOG_RATIO = 10
_FAINT: dict[str, Any] = {"linewidth": 0.7, "alpha": 0.5, "zorder": 1.5}
_CLEAR: dict[str, Any] = {"linewidth": 1.2, "markersize": 4, "markeredgewidth": 0}
_MAX_MARKERS, _FEW_LINES = 8, 4
# Besides the colours, for who cannot tell those apart.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LARGE_UNITS = ((1e21, "Z"), (1e18, "E"), (1e15, "P"), *COUNT_UNITS[:-1])


def write_sweep_report(workdir: Path) -> Path:
    """Writes a sweep's `report.html`, atomically, from what its cells have recorded so far.

    Args:
        workdir: the sweep's folder; needs one cell that has begun, and shows the table once there is one.

    Returns:
        The path of the page.

    Raises:
        InputError: the folder holds no cell that has begun, or a file in it cannot be read.
    """
    sweep = read_sweep(Path(workdir))
    with matplotlib.rc_context(STYLE):
        panels = [panel for make in _PANELS for panel in make(sweep)]
    return write_page(
        Path(workdir) / "report.html",
        title=sweep.title,
        status=f"{sweep.name}, {_status(sweep)}",
        verdict=_verdict(sweep),
        note=" ".join(filter(None, [sweep.remark, _what_ran(sweep), _counted(sweep)])),
        panels=panels,
    )


# --- words -----------------------------------------------------------------------------------------------------------


def _counted(sweep: Sweep) -> str:
    return COUNTED_NOTE if any(run.max_sparsity for run in sweep.cells.values()) else ""


def _status(sweep: Sweep) -> str:
    if sweep.is_finished:
        return "finished"
    finished = sum("status" in run.numbers for run in sweep.cells.values())
    return f"unfinished: {finished} of the {len(sweep.cells)} runs begun are at their end"


def _verdict(sweep: Sweep) -> str:
    """The main score of the first row, the highest and the lowest."""
    header = next(iter(_main_scores(sweep)), None)
    if header is None:
        return f"No scores yet. Lowest validation loss so far: {_lowest_losses(sweep)}."
    means = {row.label: mean for row in sweep.rows if (mean := row.values[header].mean) is not None}
    reference = sweep.rows[0]
    highest, lowest = (pick(means, key=means.__getitem__) for pick in (max, min))
    if means[highest] == means[lowest]:
        return f"{_heading(header)}: {_figure(means[highest])} in every row."
    ends = {"highest": highest, "lowest": lowest}
    text = f"{_heading(header)}: "
    if reference.label in means:
        also = "".join(f" and {word}" for word, label in ends.items() if label == reference.label)
        text += f"{_figure(means[reference.label], means[highest])} for “{reference.label}”, the reference{also}; "
    others = [
        f"{word} {_compared(sweep, label, means, reference.values[header].choice)}"
        for word, label in ends.items()
        if label != reference.label
    ]
    return f"{text}{', '.join(others)}."


def _lowest_losses(sweep: Sweep) -> str:
    """Of each thing that a validation loss is over, the lowest, and where."""
    lowest: dict[str, tuple[float, str]] = {}
    for name, run in sweep.cells.items():
        for row in run.evaluation_rows:
            found = row["val_loss"], name
            lowest[run.task(row)] = min(lowest.get(run.task(row), found), found)
    texts = [f"{loss:.3f} over {target_name(task)} ({name})" for task, (loss, name) in sorted(lowest.items())]
    return ", ".join(texts) or "none"


def _compared(sweep: Sweep, label: str, means: Mapping[str, float], choice: str) -> str:
    """A row's figure, and its ratios to the first row's."""
    reference = sweep.rows[0]
    (row,) = [row for row in sweep.rows if row.label == label][:1]
    text = f"{_figure(means[label], max(means.values()))} for “{label}”"
    ratios = [f"{means[label] / means[reference.label]:.2f} of the reference"] if means.get(reference.label) else []
    if (spent := reference.train_flops(choice)) > 0:
        ratios.append(f"{row.train_flops(choice) / spent:.2f} of its counted FLOPs")
    return f"{text} ({' at '.join(ratios)})" if ratios else text


def _what_ran(sweep: Sweep) -> str:
    kinds = Counter(" then ".join(run.config.get("phases", ())) or "no phase" for run in sweep.cells.values())
    numbers = [run.numbers for run in sweep.cells.values()]
    runs = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    text = f"{len(numbers)} {'run' if len(numbers) == 1 else 'runs'}: {runs}."
    text += f" {quantity(sum(n.get('tokens', 0) for n in numbers), COUNT_UNITS)} training tokens"
    if seconds := sum(n.get("wall_seconds", 0) for n in numbers):
        text += f", {duration(seconds)}"
    devices = list(dict.fromkeys(n["device"] for n in numbers if "device" in n))
    return f"{text} on {', '.join(devices)}." if devices else f"{text}."


def _main_scores(sweep: Sweep) -> list[str]:
    """Of every choice that columns are of, the first column that has figures."""
    values = sweep.rows[0].values if sweep.rows else {}
    found = [h for h in values if any(row.values[h].mean is not None for row in sweep.rows)]
    return list({values[h].choice: h for h in reversed(found)}.values())[::-1]


def _heading(header: str) -> str:
    return header[:1].upper() + header[1:]


def _figure(value: float, largest: float | None = None, deviation: float = 0.0) -> str:
    """A figure, with the unit and the decimals of the largest of its column, and its deviation if it has one."""
    largest = largest or value
    scale, name = unit(largest, _LARGE_UNITS)
    places = max(decimals(largest / scale, 4), decimals(value / scale, 3))
    return f"{value / scale:,.{places}f}{name}" + (f" ± {deviation / scale:.{places}f}" if deviation else "")


# --- the table -------------------------------------------------------------------------------------------------------


def _table(sweep: Sweep) -> list[Panel]:
    if not sweep.rows:
        return []
    headers, reference = list(sweep.rows[0].values), sweep.rows[0]
    largest = {h: max(abs(row.values[h].mean or 0) for row in sweep.rows) for h in headers}
    rows = [
        {
            "label": row.label,
            "choice": row.choice,
            "cells": [(name, _href(sweep, name)) for name in row.cells],
            "figures": [_cell_texts(row.values[h], reference.values[h], largest[h]) for h in headers],
        }
        for row in sweep.rows
    ]
    seeds = max(value.seeds for row in sweep.rows for value in row.values.values())
    caption = "Small: times the first row." + (
        f" ±: standard deviation over {seeds} seeds, where it is not 0." if seeds > 1 else ""
    )
    if any(row.choice for row in sweep.rows):
        caption += " Each row took, among its choices of settings, that of the lowest validation loss; it is named."
    return [Panel("Results", Markup(_TABLE.render(headers=headers, rows=rows)), caption, wide=True)]


def _cell_texts(value: Value, reference: Value, largest: float) -> tuple[str, str]:
    """A figure, and its ratio to the first row's."""
    if value.mean is None:
        return "-", ""
    ratio = f"x {value.mean / reference.mean:.3f}" if reference.mean and value is not reference else ""
    return _figure(value.mean, largest, value.deviation), ratio


def _href(sweep: Sweep, cell: str) -> str:
    """The page of a cell, relative to the sweep's; "" where it has none."""
    return f"cells/{quote(cell)}/report.html" if cell in sweep.reports else ""


_LINK = """\
{% macro link(name, href) %}
{% if href %}
<a href="{{ href }}">{{ name | breakable }}</a>
{%- else %}
{{ name | breakable }}
{%- endif %}
{% endmacro %}
"""

_TABLE = template(
    _LINK
    + """\
<div class="scroll"><table class="figures">
  <thead><tr><th></th>
  {% for header in headers %}
  <th>{{ header }}</th>
  {% endfor %}
  </tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ row.label }}{% if row.choice %}<small>{{ row.choice }}</small>{% endif %}
    <small>
    {% for name, href in row.cells %}
    {{ link(name, href) }}
    {% endfor %}
    </small></th>
    {% for text, ratio in row.figures %}
    <td>{{ text }}<small>{{ ratio }}</small></td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
"""
)


def _main_charts(sweep: Sweep) -> list[Panel]:
    headers = _main_scores(sweep)
    return [_by_row(sweep, h) for h in headers] + [panel for h in headers if (panel := _trade_off(sweep, h))]


def _by_row(sweep: Sweep, header: str) -> Panel:
    figure, axes = new_figure(height_inches=0.7 + 0.42 * len(sweep.rows))
    _mark_reference(axes.axvline, sweep, header)
    for level, row in enumerate(sweep.rows):
        _plot_dot(axes, sweep, row, header, y=level)
        # Over its line, not beside the axis: labels are sentences, and the page may be a phone's.
        axes.annotate(row.label, (0, level - 0.32), xycoords=("axes fraction", "data"), fontsize=8.5, va="center")
    axes.set(xlabel=_axis_label(sweep, header), ylim=(len(sweep.rows) - 0.5, -0.75), yticks=range(len(sweep.rows)))
    axes.tick_params(left=False, labelleft=False)
    axes.spines.left.set_visible(False)
    axes.margins(x=0.08)
    caption = "Dotted: the first row. Bars: standard deviation over seeds, where it is not 0."
    return Panel(f"{_heading(header)} by row", svg(figure, f"{header} by row"), caption)


def _trade_off(sweep: Sweep, header: str) -> Panel | None:
    """A score against what it took, pre-training and all, where that differs."""
    costs = [row.train_flops(row.values[header].choice) for row in sweep.rows if row.values[header].mean is not None]
    if max(costs) <= 1.05 * min(costs):
        return None
    scale, name = unit(max(costs), FLOP_UNITS)
    figure, axes = new_figure(height_inches=0.7 + 0.42 * len(sweep.rows))
    _mark_reference(axes.axhline, sweep, header)
    for row in sweep.rows:
        _plot_dot(axes, sweep, row, header, x=row.train_flops(row.values[header].choice) / scale)
    axes.set(
        xlabel=f"training compute ({name}, counted)",
        ylabel=_axis_label(sweep, header),
        xlim=(0, 1.06 * max(costs) / scale),
    )
    series = _series(sweep, list(sweep.cells), sweep.rows[0].values[header].choice)
    key = Markup(_KEY.render(series=[one for one in series if not one.is_faint]))
    caption = "Counted FLOPs of each row with those of the run it started from."
    return Panel(f"{_heading(header)} over compute", key + svg(figure, f"{header} against training FLOPs"), caption)


def _axis_label(sweep: Sweep, header: str) -> str:
    """A score, with its unit if it is the validation loss, as the summaries of the first row tell."""
    row = sweep.rows[0]
    value = row.values[header]
    losses = [row.cells[name]["summary"].get("val_loss", math.nan) for name in row.groups[value.choice]]
    is_loss = value.mean is not None and math.isclose(value.mean, np.mean(losses))
    return f"{header} (nats/token)" if is_loss else header


def _mark_reference(line: Callable[..., Any], sweep: Sweep, header: str) -> None:
    if (mean := sweep.rows[0].values[header].mean) is not None:
        line(mean, color=SOFT_INK, linewidth=1, linestyle=":")


def _plot_dot(
    axes: Axes, sweep: Sweep, row: TableRow, header: str, *, x: float | None = None, y: float | None = None
) -> None:
    """A row's figure at one given coordinate, marked as its curves are, with its deviation along the other axis."""
    value = row.values[header]
    if value.mean is None:
        return
    cells = set(row.groups[value.choice])
    (line,) = (one for one in _series(sweep, list(sweep.cells), value.choice) if set(one.cells) == cells)
    bar: dict[str, Any] = {"xerr" if x is None else "yerr": value.deviation} if value.deviation else {}
    at = [value.mean if x is None else x], [value.mean if y is None else y]
    axes.errorbar(*at, **bar, fmt=line.marker, color=line.colour, markersize=6, capsize=3)


# --- curves ----------------------------------------------------------------------------------------------------------


class _Series(NamedTuple):
    """Cells that share a line in the key."""

    label: str
    cells: tuple[str, ...]
    colour: str
    dashes: tuple[float, ...]
    marker: str = ""
    is_faint: bool = False

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


class _AxisOf(NamedTuple):
    """A way to say how far training is."""

    label: str
    of: Callable[[Run, Sequence[Row]], np.ndarray | None]
    units: Sequence[tuple[float, str]]


def _column(key: str) -> Callable[[Run, Sequence[Row]], np.ndarray]:
    return lambda _, rows: np.array([row[key] for row in rows], float)


_AXES = (
    _AxisOf("training tokens", _column("tokens"), ((1, ""),)),
    _AxisOf("training compute ({}, counted)", _column("train_flops"), (*FLOP_UNITS, (1, "FLOP"))),
    _AxisOf("training time ({}, measured)", Run.training_seconds, ((3600, "hours"), (60, "minutes"), (1, "seconds"))),
)


def _curves(sweep: Sweep) -> list[Panel]:
    """A panel for every choice and everything that a validation loss is over: losses over other targets share no axis."""
    by_task: dict[str, dict[str, list[Row]]] = {}
    for name, run in sweep.cells.items():
        for row in run.evaluation_rows:
            by_task.setdefault(run.task(row), {}).setdefault(name, []).append(row)
    groups = _groups(sweep) or {"": set()}
    panels: dict[tuple[str, ...], Panel] = {}
    for task, choice in itertools.product(sorted(by_task), groups):
        others = set().union(*groups.values()) - groups[choice]
        rows = {name: found for name, found in by_task[task].items() if name not in others}
        if rows and (task, *rows) not in panels:
            panels[task, *rows] = _curves_of(sweep, task, choice, rows)
    return list(panels.values())


def _groups(sweep: Sweep) -> dict[str, set[str]]:
    """The cells of each choice that columns are of, over all rows."""
    groups: dict[str, set[str]] = {}
    for row in sweep.rows:
        for choice, cells in row.groups.items():
            groups.setdefault(choice, set()).update(cells)
    return groups


def _curves_of(sweep: Sweep, task: str, choice: str, rows: dict[str, list[Row]]) -> Panel:
    caption = f"Loss over {target_name(task)}, by the tokens, FLOPs and time of each run by itself."
    of_choice = f", {choice}" if choice else ""
    trained = {name: [row for row in found if row["step"] > 0] for name, found in rows.items()}
    if any(found[0]["step"] == 0 for found in rows.values()) and all(len(found) > 1 for found in trained.values()):
        rows, caption = trained, f"{caption} The evaluation at step 0 is left out."
    series = _series(sweep, list(rows), choice)
    figures = [
        svg(figure, f"validation loss over {target_name(task)}, {axis.label}{of_choice}")
        for axis in _AXES
        if (figure := _curves_figure(sweep, series, rows, axis)) is not None
    ]
    body = Markup(_KEY.render(series=series) + _CURVES.render(figures=figures))
    return Panel(f"Validation loss: {task or 'text'}{of_choice}", body, caption, wide=True)


def _curves_figure(
    sweep: Sweep, series: Sequence[_Series], rows: Mapping[str, Sequence[Row]], axis: _AxisOf
) -> Figure | None:
    found = {name: axis.of(sweep.cells[name], some) for name, some in rows.items()}
    xs = {name: x for name, x in found.items() if x is not None}
    ends = [x[-1] for x in xs.values() if x[-1] > 0]
    if not ends:
        return None
    scale, name = next((one for one in axis.units if max(ends) >= one[0]), axis.units[-1])
    is_log = max(ends) > _LOG_RATIO * min(ends)
    figure, axes = new_figure(height_inches=2.5 if len(series) <= _FEW_LINES else 3.6, width_inches=3.4)
    for place, one in enumerate(series):
        line: dict[str, Any] = {"color": one.colour, "linestyle": (0, one.dashes) if one.dashes else "-"}
        line |= _FAINT if one.is_faint else _CLEAR | {"marker": one.marker}
        for cell in (name for name in one.cells if name in xs):
            shown = xs[cell] > 0 if is_log else np.full(len(xs[cell]), True)
            losses = np.array([row["val_loss"] for row in rows[cell]])
            every = math.ceil(shown.sum() / _MAX_MARKERS)
            axes.plot(xs[cell][shown] / scale, losses[shown], markevery=(place % every, every), **line)
    axes.set(xlabel=axis.label.format(name), ylabel="loss (nats/token)")
    if is_log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, None)
    axes.xaxis.set_major_formatter(count_tick)
    return figure


def _series(sweep: Sweep, names: Sequence[str], choice: str) -> list[_Series]:
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
        series.append(_Series(label + seeds, cells, SERIES[i % len(SERIES)], dashes, marker))
    if chosen and others:
        series.append(_Series(f"not chosen ({len(others)})", others, SOFT_INK, (), is_faint=True))
    return series


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
_CURVES = template("""\
<div class="three">
  {% for figure in figures %}
  {{ figure }}
  {% endfor %}
</div>
""")


# --- cells -----------------------------------------------------------------------------------------------------------


def _cells(sweep: Sweep) -> list[Panel]:
    """The cells of each shape, that is, of the same phases, with what they set differently."""
    shapes: dict[tuple[str, ...], list[str]] = {}
    for name, run in sweep.cells.items():
        shapes.setdefault(tuple(run.config.get("phases", ())), []).append(name)
    panels = []
    for phases, names in shapes.items():
        keys = differing_settings([sweep.cells[name].config for name in names])
        body = Markup(_CELLS.render(keys=keys, rows=[_cell(sweep, name, keys) for name in names]))
        caption = "What each came to" + (
            ", and every setting in which they differ." if keys else "; their settings are the same."
        )
        panels.append(Panel(f"Runs: {' then '.join(phases) or 'no phase'}", body, caption, wide=True))
    return panels


def _cell(sweep: Sweep, name: str, keys: Sequence[str]) -> dict[str, Any]:
    run = sweep.cells[name]
    values = flat(run.config)
    numbers = {
        "val_loss": lambda v: f"{v:.4f}",
        "flops_reduction": lambda v: f"{v:.2f}x",
        "train_flops": flops,
        "wall_seconds": duration,
    }
    figures = [render(run.numbers[key]) if key in run.numbers else "-" for key, render in numbers.items()]
    status = "" if run.status == "finished" else run.status
    return {
        "name": name,
        "href": _href(sweep, name),
        "status": status,
        "figures": figures,
        "settings": [setting(values[key]) if key in values else "-" for key in keys],
    }


_CELLS = template(
    _LINK
    + """\
<div class="scroll"><table class="figures">
  <thead><tr><th>run</th><th>validation loss</th><th>FLOP reduction</th><th>counted FLOPs</th><th>time</th>
  {% for key in keys %}
  <th>{{ key | breakable }}</th>
  {% endfor %}
  </tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ link(row.name, row.href) }}{% if row.status %}<small>{{ row.status }}</small>{% endif %}</th>
    {% for text in row.figures %}
    <td>{{ text }}</td>
    {% endfor %}
    {% for text in row.settings %}
    <td>{{ text }}</td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
"""
)


def _signatures(sweep: Sweep) -> list[Panel]:
    """How the scores were computed, and why some were not; each said once."""
    evaluations = [record.get("evaluation", {}) for row in sweep.rows for record in row.cells.values()]
    lines = [
        (score_name(name), state, text)
        for kind, state in (("signatures", ""), ("absent", "absent"))
        for name, text in dict.fromkeys(pair for one in evaluations for pair in one.get(kind, {}).items())
    ]
    if not lines:
        return []
    return [Panel("How the scores are computed", Markup(_SIGNATURES.render(lines=lines)), wide=True)]


_SIGNATURES = template("""\
<table class="signatures">
  {% for name, state, text in lines %}
  <tr><th scope="row">{{ name }}<small>{{ state }}</small></th><td class="soft">{{ text }}</td></tr>
  {% endfor %}
</table>
""")


def _again(sweep: Sweep) -> list[Panel]:
    command = next((c for run in sweep.cells.values() if (c := run.config.get("command"))), "")
    remark = "It finishes what is unfinished here; for another sweep beside this one, give another --workdir."
    return [command_panel(command, remark)] if command else []


# Each takes the sweep and gives panels, none where nothing is recorded for them.
_PANELS: tuple[Callable[[Sweep], list[Panel]], ...] = (
    _table,
    _main_charts,
    _curves,
    _cells,
    _signatures,
    _again,
)
