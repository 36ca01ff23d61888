"""The page about a study, and its table: all from its record, so that both are made again where no cell is left."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.ticker import LogLocator, NullFormatter

from spdf_jax.planning.own_fit import measured_in, predictions, typical_error
from spdf_jax.report.draw import DASHES, SERIES, SOFT_INK, STYLE, Plot, Table, new_figure
from spdf_jax.report.figures import write_figures
from spdf_jax.report.intervals import Interval, detectable
from spdf_jax.report.page import Panel, command_panel, plot_panel, template, write_page
from spdf_jax.report.study_records import BUDGETS, Study, StudyRow, read_study
from spdf_jax.report.words import COUNT_UNITS, FLOP_UNITS, count_tick, duration, flops, quantity, unit
from spdf_jax.workdir import write_atomically

_NAMES = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal seconds"}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def write_study_report(source: Path, folder: Path, *, figures: bool = True) -> str:
    """Writes `report.html`, `table.md` and `figures/`, each atomically, from a study's record alone.

    Args:
      source: ``study.json`` or the folder with it.
      folder: to write into.
      figures: whether to write `figures/`, see `spdf_jax.report.figures`.

    Returns:
      The table, and below it the path of the page.

    Raises:
      InputError: there is no such record.
    """
    study = read_study(source)
    text = table(study)
    with matplotlib.rc_context(STYLE):
        panels = [panel for make in _PANELS for panel in make(study)]
        if figures:
            write_figures(folder, panels)
    write_atomically(folder / "table.md", f"# {study.facts['title']}\n\n{verdict(study)}\n\n{text}\n".encode())
    page = write_page(
        folder / "report.html",
        title=study.facts["title"],
        status=f"{study.facts['experiment']}: {study.facts['variant']}, {_status(study)}",
        verdict=verdict(study),
        note=" ".join(filter(None, [study.facts["remark"], *_left_out(study), *_made_with(study)])),
        panels=panels,
    )
    return f"{text}\n\nReport: {page}"


def _status(study: Study) -> str:
    spent = duration(sum(cell["wall_seconds"] for cell in study.cells.values()))
    return f"{'finished' if 'repeated' in study.facts else 'unfinished'}: {len(study.cells)} cells, {spent}"


def _left_out(study: Study) -> list[str]:
    return [f"Left out: {label}: {why}." for label, why in study.facts.get("left_out", {}).items()]


def _made_with(study: Study) -> list[str]:
    made = study.facts.get("made_with", ())
    return [f"Made with {'; '.join(made)}."] if made else []


def verdict(study: Study) -> str:
    """The answer: what came out, with its interval, one sentence for each difference that the question is about."""
    said = [_sentence(study, label, budget) for label, budget in study.facts["answers"]]
    return " ".join(filter(None, said)) or "No answer yet: two seeds of the rows that it is about are needed."


def _sentence(study: Study, label: str, budget: str) -> str:
    row = next((row for row in study.rows if row.label == label), None)
    found = study.difference(row, budget) if row else None
    if found is None or found.seeds < 2:
        return ""
    amount, what, end = f"{abs(found.mean):.3f} {study.facts['unit']}", study.facts["reference"], _ends(found)
    place = f"At {_NAMES[budget]} “{label}” ends"
    if found.low <= 0 <= found.high:
        least = detectable(found)
        return (
            f"{place} where {what} does, as far as {found.seeds} seeds tell: {amount} {_side(found)} ({end}); a difference of "
            f"{least:.2g} they would most often have found."
        )
    return f"{place} {amount} {_side(found)} {what} ({end})."


def _side(found: Interval) -> str:
    return "above" if found.mean > 0 else "below"


def _ends(found: Interval) -> str:
    return f"95 % interval {found.low:+.3f} to {found.high:+.3f}, {found.seeds} seeds"


def interval_text(found: Interval | None, sign: str = "") -> str:
    """A mean with the half of its interval; "-" for none.

    >>> interval_text(Interval(-0.1234, 0.0211, 5), "+"), interval_text(Interval(3.0, math.inf, 1)), interval_text(None)
    ('-0.123 ± 0.021', '3.000', '-')
    """
    if found is None:
        return "-"
    return f"{found.mean:{sign}.3f}" + (f" ± {found.half:.3f}" if math.isfinite(found.half) else "")


def table(study: Study) -> str:
    """Every row, in Markdown: loss or score, differences at equal budgets, and what it took."""
    head = [
        "",
        "choice",
        study.facts["unit"],
        *(f"at {name}" for name in _NAMES.values()),
        "FLOPs",
        "tokens",
        "seconds",
    ]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join([row.label, *_texts(study, row)])} |" for row in _with_cells(study)]
    return "\n".join(lines)


def _with_cells(study: Study) -> list[StudyRow]:
    return [row for row in study.rows if row.cells]


def _texts(study: Study, row: StudyRow) -> list[str]:
    differences = [interval_text(study.difference(row, budget), "+") for budget in BUDGETS]
    spent = [flops(study.cost(row, "flops")), quantity(study.cost(row, "tokens"), COUNT_UNITS)]
    return [row.choice, interval_text(study.mean(row)), *differences, *spent, f"{study.cost(row, 'seconds'):.0f}"]


def _results(study: Study) -> list[Panel]:
    rows = _with_cells(study)
    header = ("row", "choice", *(f"{name}{part}" for name in ("mean", *BUDGETS) for part in ("", " (half of 95 %)")))
    numbers = [(row.label, row.choice, *_numbers(study, row)) for row in rows]
    head = [study.facts["unit"], *(f"difference at {name}" for name in _NAMES.values()), "FLOPs", "tokens", "seconds"]
    body = Markup(_TABLE.render(head=["choice", *head], rows=[(row.label, _texts(study, row)) for row in rows]))
    caption = (
        f"Means over seeds on which nothing was chosen, ± half of their 95 % interval (Student's t; each by itself: of twenty, "
        f"one misses). Differences are from {study.facts['reference']}, seed by seed; at equal FLOPs and seconds from its loss "
        f"there, between its runs of different lengths. -: it has none there. Seconds are of steps alone."
    )
    return [Panel("Results", body, caption, wide=True, table=Table(header, numbers))]


def _numbers(study: Study, row: StudyRow) -> list[float | None]:
    found = [study.mean(row), *(study.difference(row, budget) for budget in BUDGETS)]
    return [part for one in found for part in ((one.mean, one.half) if one else (None, None))]


_TABLE = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th></th>
  {% for text in head %}
  <th>{{ text }}</th>
  {% endfor %}
  </tr></thead>
  {% for label, texts in rows %}
  <tr><th scope="row">{{ label }}</th>
    {% for text in texts %}
    <td>{{ text }}</td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
""")


def _differences(study: Study) -> list[Panel]:
    """At each budget, the rows' differences from the reference with their intervals."""
    panels = []
    for budget, name in _NAMES.items():
        found = [(row, one) for row in study.rows if (one := study.difference(row, budget)) and one.seeds > 1]
        if not found:
            continue
        figure, axes = new_figure(height_inches=0.7 + 0.36 * len(found))
        axes.axvline(0, color=SOFT_INK, linewidth=1, linestyle=":")
        for level, (row, one) in enumerate(found):
            axes.errorbar([one.mean], [level], xerr=one.half, fmt="o", color=SERIES[1], markersize=5, capsize=3)
            axes.annotate(row.label, (0, level - 0.34), xycoords=("axes fraction", "data"), fontsize=8, va="center")
        axes.set(xlabel=f"difference ({study.facts['unit']})", ylim=(len(found) - 0.5, -0.75), yticks=[])
        axes.margins(x=0.08)
        rows = Table(("row", "difference", "half of 95 %", "seeds"), [(row.label, *one) for row, one in found])
        title = f"Difference from {study.facts['reference']} at {name}"
        panels.append(plot_panel(title, Plot(title, figure, title, rows), "Bars: 95 % intervals."))
    return panels


def _over_cost(study: Study) -> list[Panel]:
    """What is measured over FLOPs and seconds: a line a method of each group, through its rows of different lengths."""
    lines: dict[str, list[StudyRow]] = {}
    for row in _with_cells(study):
        lines.setdefault(f"{row.method}, {row.group}" if row.group else row.method, []).append(row)
    panels = []
    for budget, label, units in (
        ("flops", "training compute ({}, counted)", FLOP_UNITS),
        ("seconds", "training time (s)", ()),
    ):
        scale, name = (
            unit(max(study.cost(row, budget) for row in study.rows if row.cells), units) if units else (1.0, "")
        )
        figure, axes = new_figure(height_inches=3.4)
        points = []
        for i, (line, rows) in enumerate(lines.items()):
            shown = sorted((study.cost(row, budget) / scale, one) for row in rows if (one := study.mean(row)))
            style: dict[str, Any] = {"color": SERIES[i % len(SERIES)], "fmt": _MARKERS[i % len(_MARKERS)] + "-"}
            halves = [one.half if math.isfinite(one.half) else 0 for _, one in shown]
            drawn = axes.errorbar(
                [x for x, _ in shown], [one.mean for _, one in shown], halves, label=line, markersize=4, **style
            )
            drawn.lines[0].set_dashes(DASHES[i // len(SERIES) % len(DASHES)] or (None, None))
            points += [(line, x * scale, one.mean, half) for (x, one), half in zip(shown, halves, strict=True)]
        axes.set(xscale="log", xlabel=label.format(name), ylabel=study.facts["unit"])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(count_tick)
        figure.legend(loc="outside upper left", ncols=2, fontsize=7.5, borderpad=0)
        title = f"Over {'FLOPs' if budget == 'flops' else 'seconds'}"
        rows_ = Table(("line", budget, "mean", "half of 95 %"), points)
        panels.append(plot_panel(title, Plot(title, figure, title, rows_), "Bars: 95 % intervals."))
    return panels


def _choices(study: Study) -> list[Panel]:
    """What each choice was made by."""
    rows = []
    for row in study.rows:
        losses = {choice: study.cells[name]["val_loss"] for choice, name in row.tried.items()}
        rows.append((row.label, [f"{choice}: {loss:.3f}" for choice, loss in losses.items()], row.choice))
    at_end = [label for label, _, choice in rows if len(t := _tried(study, label)) > 2 and choice in (t[0], t[-1])]
    caption = "Validation losses on the seed that choices are made on, and on which nothing is measured."
    if at_end:
        caption += f" The best is at an end of what was tried, and a better one may lie beyond: {', '.join(at_end)}."
    shown = [(label, [", ".join(texts), choice]) for label, texts, choice in rows]
    body = Markup(_TABLE.render(head=["tried", "chosen"], rows=shown))
    numbers = [
        (row.label, choice, study.cells[name]["val_loss"], choice == row.choice)
        for row in study.rows
        for choice, name in row.tried.items()
    ]
    return [Panel("Choices", body, caption, wide=True, table=Table(("row", "choice", "loss", "chosen"), numbers))]


def _tried(study: Study, label: str) -> list[str]:
    return next(list(row.tried) for row in study.rows if row.label == label)


def _power(study: Study) -> list[Panel]:
    """What these seeds can tell, and what this machine's noise is."""
    lines = [
        f"{row.label}: {detectable(found):.2g} {study.facts['unit']}"
        for row in study.rows
        if (found := study.difference(row, "tokens")) and found.seeds > 1
    ]
    repeated = study.facts.get("repeated")
    noise = ""
    if repeated:
        first, second = repeated["seconds"]
        noise = (
            f"{repeated['cell']} was run twice: the same loss to the bit ({repeated['val_loss'][0]!r}); its seconds were "
            f"{first:.1f} and {second:.1f}, {abs(second / first - 1):.1%} apart: differences of seconds below that are noise."
        )
    body = Markup(_TEXTS.render(lines=lines, noise=noise))
    caption = "Differences at equal tokens that as many seeds, varying as these do, would find in 80 % of such studies."
    return [Panel("What these seeds can tell", body, caption)] if lines or noise else []


_TEXTS = template("""\
{% if noise %}
<p>{{ noise | held }}</p>
{% endif %}
<ul>
  {% for line in lines %}
  <li>{{ line }}</li>
  {% endfor %}
</ul>
""")


def _law(study: Study) -> list[Panel]:
    """The planner's law, fitted to all other rows, against what each measured."""
    panels = []
    for group in dict.fromkeys(row.group for row in study.rows):
        record = {"rows": [vars(row) | {"row": row.label} for row in study.rows], "cells": study.cells}
        found = predictions(measured_in(record, group))
        if not found:
            continue
        figure, axes = new_figure(height_inches=3.2)
        both = [loss for one in found for loss in (one.loss, one.row.loss)]
        axes.plot([min(both), max(both)], [min(both), max(both)], color=SOFT_INK, linewidth=1, linestyle=":")
        for i, density in enumerate(sorted({one.row.density for one in found}, reverse=True)):
            some = [one for one in found if one.row.density == density]
            style: dict[str, Any] = {
                "color": SERIES[i % len(SERIES)],
                "marker": _MARKERS[i % len(_MARKERS)],
                "linestyle": "",
            }
            axes.plot([one.loss for one in some], [one.row.loss for one in some], label=f"density {density:g}", **style)
        axes.set(xlabel="predicted (nats/token)", ylabel="measured (nats/token)")
        figure.legend(loc="outside upper left", ncols=3, borderpad=0)
        title = f"Predicted and measured losses{f': {group}' if group else ''}"
        numbers = [(*one.row, one.loss) for one in found]
        rows = Table(("row", "weights", "tokens", "density", "measured", "predicted"), numbers)
        caption = (
            f"The law of the planner (arXiv 2606.01155), its E, A and B fitted to all rows but the one predicted; typically "
            f"{typical_error(found):.3f} nats/token apart. Rows of one sparsity throughout."
        )
        panels.append(plot_panel(title, Plot(title, figure, title, rows), caption))
    return panels


def _all_cells(study: Study) -> list[Panel]:
    names = ("val_loss", "measure", "steps", "tokens", "train_flops", "seconds", "wall_seconds")
    of_row = {name: row.label for row in study.rows for name in (*row.tried.values(), *row.cells)}
    rows = [(name, of_row.get(name, ""), *(cell.get(key) for key in names)) for name, cell in study.cells.items()]
    texts = [(row[0], [row[1], *("-" if value is None else f"{value:.6g}" for value in row[2:])]) for row in rows]
    body = Markup("<details><summary>Show them</summary>{}</details>").format(
        Markup(_TABLE.render(head=["row", *names], rows=texts))
    )
    experiment = f"experiments/{study.facts['experiment']}.py:{study.facts['variant']}"
    caption = (
        f"None is left out. Any one again, beside its recorded loss: python -m spdf_jax.main --config {experiment} "
        f"--config.study.only=NAME --workdir runs/again"
    )
    return [Panel("All cells", body, caption, wide=True, table=Table(("cell", "row", *names), rows))]


def _command(study: Study) -> list[Panel]:
    command = study.facts.get("command", "")
    return [command_panel(command, "It goes on with what is unfinished, and makes the page again.")] if command else []


_PANELS: tuple[Callable[[Study], Sequence[Panel]], ...] = (
    _results,
    _differences,
    _over_cost,
    _choices,
    _power,
    _law,
    _all_cells,
    _command,
)
