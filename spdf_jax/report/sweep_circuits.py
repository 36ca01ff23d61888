"""Of the page about a sweep: circuits of its runs, those of a sparse one beside those of the dense one of nearest loss."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import LogLocator, NullFormatter

from spdf_jax.report.circuit import CIRCUIT_PAGE
from spdf_jax.report.draw import SOFT_INK, Plot, Table, new_figure
from spdf_jax.report.page import Panel, link, template
from spdf_jax.report.sweep_curves import Series, key, series_of
from spdf_jax.report.sweep_records import Sweep, TableRow
from spdf_jax.report.words import capitalised, count_tick


def circuits(sweep: Sweep) -> list[Panel]:
    """A panel for every task that the runs' circuits were looked for of."""
    return [_of_task(sweep, name) for name in _tasks(sweep)]


def answers(sweep: Sweep) -> str:
    """Of each task the sparse run that needs the fewest nodes beside a dense one of its loss; "" where none was looked for."""
    texts, undone = list[tuple[float, str]](), []
    for name in _tasks(sweep):
        lines = [line for line in _lines(sweep, name) if line["nodes"] is not None and not line["is dense"]]
        if not lines:
            undone.append(name)
            continue
        best = max(lines, key=lambda line: (line["times as many"] or 0, -line["nodes"]))
        text, nearest = f"{name}: {best['nodes']:,} nodes do it in “{best['row']}”", best["dense of nearest loss"]
        of_dense = f"“{nearest}”, whose validation loss is nearest"
        if best["times as many"]:
            text += f", and {best['its nodes']:,}, {best['times as many']:.1f} times as many, in {of_dense}"
        elif nearest:
            text += f"; the whole of {of_dense}, does not"
        texts.append((best["times as many"] or 0, text))
    sentences = [text for _, text in sorted(texts, key=lambda one: -one[0])]
    if undone:
        sentences.append(f"{', '.join(undone)}: no weight-sparse run does {'it' if len(undone) == 1 else 'them'}")
    return capitalised(f"{'. '.join(sentences)}.") if sentences else ""


def _tasks(sweep: Sweep) -> list[str]:
    return list(
        dict.fromkeys(name for row in sweep.rows for cell in row.cells.values() for name in cell.get("circuit", {}))
    )


def _lines(sweep: Sweep, name: str) -> list[dict[str, Any]]:
    found = {row.label: (row, one) for row in sweep.rows if (one := _circuit(row, name))}
    return [_line(sweep, found, label) for label in found]


def _of_task(sweep: Sweep, name: str) -> Panel:
    lines = _lines(sweep, name)
    series = [one for one in series_of(sweep, list(sweep.cells), "") if not one.is_faint]
    plot = _curves(sweep, name, series) if any(line["nodes"] is not None for line in lines) else None
    header = (
        "row",
        "validation loss",
        "nodes",
        "weights",
        "task loss of the whole model",
        "of the circuit alone",
        "without it",
    )
    others = ("dense of nearest loss", "its loss", "its nodes", "times as many")
    table = Table((*header, *others), [[line[column] for column in (*header, *others)] for line in lines])
    caption = (
        "The smallest circuit found in each run, and beside it that of the dense run whose validation loss is nearest. "
        "-: the whole model does not do the task at the target, so there is no circuit to be found."
    )
    if plot:
        caption += " Below, the lowest task loss of all circuits tried with so many nodes; dotted: the target."
    rows = [[_text(line[column]) for column in (*header, *others)] for line in lines]
    for row, line in zip(rows, lines, strict=True):
        row[0] = link(row[0], line["page"])
    figure = plot.inline if plot else ""
    body = Markup(_TABLE.render(header=(*header, *others), rows=rows, key=key(series), figure=figure))
    return Panel(f"Circuits: {name}", body, caption, wide=True, plots=(plot,) if plot else (), table=table)


def _circuit(row: TableRow, name: str) -> Mapping[str, Any] | None:
    """Of the first run of a row."""
    return next((cell["circuit"][name] for cell in row.cells.values() if name in cell.get("circuit", {})), None)


def _loss(row: TableRow) -> float:
    return float(np.mean([cell["summary"]["val_loss"] for cell in row.cells.values()]))


def _is_dense(sweep: Sweep, row: TableRow) -> bool:
    return all(sweep.cells[name].max_sparsity == 0 for name in row.cells)


def _line(sweep: Sweep, found: Mapping[str, tuple[TableRow, Mapping[str, Any]]], label: str) -> dict[str, Any]:
    row, circuit = found[label]
    line: dict[str, Any] = {
        "row": label,
        "validation loss": _loss(row),
        "nodes": circuit.get("nodes"),
        "weights": circuit.get("edges"),
        "task loss of the whole model": circuit["whole"],
        "of the circuit alone": circuit.get("alone"),
        "without it": circuit.get("without"),
        "page": sweep.page_of(next(iter(row.cells))).replace("report.html", CIRCUIT_PAGE),
        "is dense": _is_dense(sweep, row),
    }
    line |= dict.fromkeys(("dense of nearest loss", "its loss", "its nodes", "times as many"))
    dense = [one for one, _ in found.values() if _is_dense(sweep, one)]
    if not dense or line["is dense"]:
        return line
    nearest = min(dense, key=lambda one: abs(_loss(one) - _loss(row)))
    nodes = found[nearest.label][1].get("nodes")
    line |= {"dense of nearest loss": nearest.label, "its loss": _loss(nearest), "its nodes": nodes}
    return line | {"times as many": nodes / circuit["nodes"] if nodes and circuit.get("nodes") else None}


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _curves(sweep: Sweep, name: str, series: list[Series]) -> Plot:
    figure, axes = new_figure()
    rows: list[tuple[str, float, float]] = []
    targets = set()
    for one in series:
        for cell in one.cells:
            record = next((row.cells[cell] for row in sweep.rows if cell in row.cells), {}).get("circuit", {}).get(name)
            if record is None:
                continue
            targets.add(record["target_loss"])
            points = [(nodes, loss) for nodes, loss in record["curve"] if nodes > 0]
            if points:
                axes.plot(*zip(*points, strict=True), drawstyle="steps-post", **one.style)
            rows += [(one.label, nodes, loss) for nodes, loss in record["curve"]]
    for target in targets:
        axes.axhline(target, color=SOFT_INK, linewidth=1, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(count_tick)
    axes.set(xlabel="nodes that are on", ylabel="task loss (nats)", ylim=(0, None))
    title = f"circuits of {name}: nodes and task loss"
    return Plot(
        title, figure, title, Table(("run", "nodes", "task loss (nats)"), rows), [one.key_line for one in series]
    )


_TABLE = template("""\
<div class="scroll"><table class="figures">
  <thead><tr>
  {% for text in header %}
  <th>{{ "" if loop.first else text }}</th>
  {% endfor %}
  </tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ row[0] }}</th>
    {% for text in row[1:] %}
    <td>{{ text }}</td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
{% if figure %}
<div class="two">{{ figure }}{{ key }}</div>
{% endif %}
""")
