"""Of the page about a sweep: the table of its results, and charts of the main scores by row and over compute."""

import math
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from spdf_jax.report.draw import SOFT_INK, Plot, Table, new_figure
from spdf_jax.report.page import Panel, plot_panel, template
from spdf_jax.report.sweep_curves import key, series_of
from spdf_jax.report.sweep_records import Sweep, TableRow, Value
from spdf_jax.report.words import FLOP_UNITS, capitalised, figure_text, unit

_LABEL_CHARACTERS = 26  # along the lowest figure


def results(sweep: Sweep) -> list[Panel]:
    """The table, with links to the cells of each row and ratios to the first one."""
    if not sweep.rows:
        return []
    headers, reference = list(sweep.rows[0].values), sweep.rows[0]
    largest = {h: max(abs(row.values[h].mean or 0) for row in sweep.rows) for h in headers}
    counts = {h for h in headers if all(_is_count(row.values[h]) for row in sweep.rows)}
    rows = [
        {
            "label": row.label,
            "choice": row.choice,
            "cells": [(name, sweep.page_of(name)) for name in row.cells],
            "figures": [_cell_texts(row.values[h], reference.values[h], largest[h], h in counts) for h in headers],
        }
        for row in sweep.rows
    ]
    seeds = max(value.seeds for row in sweep.rows for value in row.values.values())
    caption = "Small: ratio to the first row." + (
        f" ±: standard deviation over {seeds} seeds, where it is not 0." if seeds > 1 else ""
    )
    if any(row.choice for row in sweep.rows):
        caption += " Each row shows, of its choices of settings, the one of the lowest validation loss, and names it."
    table = Table(
        ("row", "choice", *(f"{h}{part}" for h in headers for part in ("", " (deviation)", " (seeds)"))),
        [(row.label, row.choice, *(part for h in headers for part in row.values[h][:3])) for row in sweep.rows],
    )
    return [Panel("Results", Markup(_TABLE.render(headers=headers, rows=rows)), caption, wide=True, table=table)]


def _is_count(value: Value) -> bool:
    """Of nodes or steps, say, and from one run."""
    return value.mean is None or (value.mean.is_integer() and not value.deviation)


def _cell_texts(value: Value, reference: Value, largest: float, is_count: bool) -> tuple[str, str]:
    """A figure, and its ratio to the first row's."""
    if value.mean is None:
        return "-", ""
    ratio = f"x {value.mean / reference.mean:.3f}" if reference.mean and value is not reference else ""
    if is_count and largest < 1e6:
        return f"{value.mean:,.0f}", ratio
    return figure_text(value.mean, largest, value.deviation), ratio


_TABLE = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th></th>
  {% for header in headers %}
  <th>{{ header }}</th>
  {% endfor %}
  </tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ row.label }}{% if row.choice %}<small>{{ row.choice }}</small>{% endif %}
    <small>
    {% for name, address in row.cells %}
    {{ name | link(address) }}
    {% endfor %}
    </small></th>
    {% for text, ratio in row.figures %}
    <td>{{ text }}<small>{{ ratio }}</small></td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
""")


def main_charts(sweep: Sweep) -> list[Panel]:
    """The main scores by row, then over compute where that differs."""
    headers = sweep.main_scores
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
    values = [(row.label, *row.values[header][:3]) for row in sweep.rows]
    table = Table(("row", header, "deviation", "seeds"), values)
    plot = Plot(f"{header} by row", figure, f"{header} by row", table)
    return plot_panel(f"{capitalised(header)} by row", plot, caption)


def _trade_off(sweep: Sweep, header: str) -> Panel | None:
    """A score against what it took, pre-training and all, where that differs."""
    costs = [row.train_flops(row.values[header].choice) for row in sweep.rows if row.values[header].mean is not None]
    if max(costs) <= 1.05 * min(costs):
        return None
    scale, name = unit(max(costs), FLOP_UNITS)
    label = textwrap.fill(_axis_label(sweep, header), _LABEL_CHARACTERS)
    figure, axes = new_figure(height_inches=max(0.7 + 0.42 * len(sweep.rows), 2.6))
    _mark_reference(axes.axhline, sweep, header)
    for row in sweep.rows:
        _plot_dot(axes, sweep, row, header, x=row.train_flops(row.values[header].choice) / scale)
    axes.set(
        xlabel=f"training compute ({name}, counted)",
        ylabel=label,
        xlim=(0, 1.06 * max(costs) / scale),
    )
    series = series_of(sweep, list(sweep.cells), sweep.rows[0].values[header].choice)
    caption = "Counted FLOPs of each row with those of the run it started from."
    table = Table(
        ("row", "training FLOPs (counted)", header, "deviation", "seeds"),
        [(row.label, row.train_flops(row.values[header].choice), *row.values[header][:3]) for row in sweep.rows],
    )
    series = [one for one in series if not one.is_faint]
    lines = [one.key_line for one in series]
    plot = Plot(f"{header} over compute", figure, f"{header} against training FLOPs", table, lines)
    body = key(series) + plot.inline
    return Panel(f"{capitalised(header)} over compute", body, caption, plots=(plot,))


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
    (line,) = (one for one in series_of(sweep, list(sweep.cells), value.choice) if set(one.cells) == cells)
    bar: dict[str, Any] = {"xerr" if x is None else "yerr": value.deviation} if value.deviation else {}
    at = [value.mean if x is None else x], [value.mean if y is None else y]
    axes.errorbar(*at, **bar, fmt=line.marker, color=line.colour, markersize=6, capsize=3)
