"""A circuit drawn as a graph, from the tokens above to the answers below: a row for every layer and kind of node."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from spdf_jax.report.draw import INK, SERIES, SOFT_INK, SPARSE, Plot, Table, legend, new_figure
from spdf_jax.report.words import count_tick

#: Of each place: what its nodes are, in words, and their colour.
KINDS: dict[str, tuple[str, str]] = {
    "attn_in": ("read by attention", SERIES[0]),
    "attn_q": ("query", SERIES[1]),
    "attn_k": ("key", SERIES[5]),
    "attn_v": ("value", SERIES[3]),
    "attn_out": ("written by attention", SERIES[6]),
    "mlp_in": ("read by the MLP", SERIES[0]),
    "mlp_neuron": ("neuron", SERIES[4]),
    "mlp_out": ("written by the MLP", SERIES[6]),
}
NEGATIVE = SERIES[2]
_ROWS = (("attn_in",), ("attn_q", "attn_k", "attn_v"), ("attn_out",), ("mlp_in",), ("mlp_neuron",), ("mlp_out",))
_ROW_NAMES = (
    "attention reads",
    "queries, keys, values",
    "attention writes",
    "the MLP reads",
    "neurons",
    "the MLP writes",
)
_READS, _WRITES = ("attn_in", "mlp_in"), ("attn_out", "mlp_out")
MOST_NODES, MOST_EDGES, _MOST_WEIGHTS, _MOST_VOTES = 120, 240, 30, 24
# In points.
_WIDTH, _ROW_HEIGHT, _RADIUS, _LEFT, _RIGHT, _IN_A_ROW, _STUB = 600, 58, 9, 118, 14, 22, 20
_FONT, _SMALL = 8, 7
_MIDDLE = (_LEFT + _WIDTH - _RIGHT) / 2


class _Place(NamedTuple):
    x: float
    y: float


def name_of(node: Mapping[str, Any]) -> str:
    """What a node is called.

    >>> name_of({"place": "mlp_neuron", "layer": 1, "channel": 17})
    'neuron 17, layer 1'
    """
    return f"{KINDS[node['place']][0]} {node['channel']}, layer {node['layer']}"


def drawn_nodes(circuit: Mapping[str, Any]) -> list[int]:
    """The numbers of the nodes that are drawn: all, or those that matter most."""
    by_effect = sorted(range(len(circuit["nodes"])), key=lambda i: -abs(circuit["nodes"][i]["effect"]))
    return sorted(by_effect[:MOST_NODES])


def graph(title: str, circuit: Mapping[str, Any], answers: Sequence[str]) -> Plot:
    """The drawing.

    Args:
      title: of the figure.
      circuit: as ``circuit.json`` has it.
      answers: the two texts that a task chooses between.

    Returns:
      A figure with every node of `drawn_nodes` and the heaviest `MOST_EDGES` weights between them.
    """
    nodes, shown = circuit["nodes"], drawn_nodes(circuit)
    edges = sorted(circuit["edges"], key=lambda edge: -abs(edge[2]))
    edges = [edge for edge in edges if edge[0] in shown and edge[1] in shown][:MOST_EDGES]
    joined = [pair for pair in circuit["joined"] if pair[0] in shown and pair[1] in shown]
    links = [(source, target) for source, target, *_ in (*edges, *joined)]
    rows = _rows(nodes, shown)
    at, height = _placed(nodes, rows, links)
    figure, axes = new_figure(height_inches=height / 72, width_inches=_WIDTH / 72)
    figure.set_layout_engine("none")
    axes.set_position((0, 0, 1, 1))
    axes.set(xlim=(0, _WIDTH), ylim=(height, 0))
    axes.set_axis_off()
    start, end = _Place(_MIDDLE, 20), _Place(_MIDDLE, height - 16)
    first: list[list[int]] = next((part for (_, kinds), part in rows.items() if kinds[0] in _READS), [[]])
    written = {target for source, target in joined if nodes[source]["place"] in _WRITES}
    for i in shown:
        if nodes[i]["place"] in _READS and i not in written:
            # From the tokens, too; but further down, a line from there would cross all that is between.
            above = start if any(i in part for part in first) else _Place(at[i].x, at[i].y - _STUB)
            _line(axes, above, at[i], SOFT_INK, 0.7, dashes=(1, 2))
    for source, target in joined:
        _line(axes, at[source], at[target], SOFT_INK, 0.7, dashes=(1, 2))
    heaviest = max((abs(weight) for *_, weight in edges), default=1.0)
    for source, target, weight in reversed(edges):
        _line(axes, at[source], at[target], SPARSE if weight > 0 else NEGATIVE, 0.5 + 2 * abs(weight) / heaviest)
    votes = sorted((edge for edge in circuit["to_answers"] if edge[0] in shown), key=lambda edge: -abs(edge[2]))[
        :_MOST_VOTES
    ]
    for source, _, weight in votes:
        width = 0.5 + 2 * abs(weight) / abs(votes[0][2])
        _line(axes, at[source], end, SPARSE if weight > 0 else NEGATIVE, width)
    _write(axes, start, "the tokens of the prompt")
    _write(axes, end, f"next:  {answers[0].strip()}  rather than  {answers[1].strip()}")
    for (layer, kinds), parts in rows.items():
        y = min(at[i].y for part in parts for i in part)
        text = f"layer {layer}:\n{_ROW_NAMES[_ROWS.index(kinds)]}"
        axes.text(4, y, text, fontsize=_FONT, color=SOFT_INK, va="center", linespacing=1.3)
    for i in shown:
        colour = KINDS[nodes[i]["place"]][1]
        axes.plot(*at[i], marker="o", markersize=2 * _RADIUS, color=colour, markeredgewidth=0, zorder=3)
        axes.text(
            *at[i], f"{nodes[i]['channel']}", fontsize=_SMALL, color="#ffffff", ha="center", va="center", zorder=4
        )
    if len(edges) <= _MOST_WEIGHTS:
        taken = [*at.values(), start, end]
        for source, target, weight in edges:
            _label(axes, at[source], at[target], f"{weight:+.2f}", taken)
    return Plot(title, figure, title, _table(nodes, circuit))


def key_lines(circuit: Mapping[str, Any]) -> list[Line2D]:
    """What colours and lines mean, of those that there are."""
    places = {node["place"] for node in circuit["nodes"]}
    kinds: dict[str, str] = {}  # a colour to what it stands for
    for place, (said, colour) in KINDS.items():
        if place in places:
            kinds[colour] = {SERIES[0]: "read from the residual", SERIES[6]: "written to it"}.get(colour, said)
    found = [
        Line2D([], [], linestyle="none", marker="o", color=colour, label=said, markersize=7)
        for colour, said in kinds.items()
    ]
    found.append(Line2D([], [], color=SPARSE, label="weight above 0"))
    found.append(Line2D([], [], color=NEGATIVE, label="weight below 0"))
    return [
        *found,
        Line2D([], [], color=SOFT_INK, linestyle=":", label="the same channel, or query and key: no weight"),
    ]


def _rows(
    nodes: Sequence[Mapping[str, Any]], shown: Sequence[int]
) -> dict[tuple[int, tuple[str, ...]], list[list[int]]]:
    """The nodes of each layer and stage, in as many lines as they need."""
    rows: dict[tuple[int, tuple[str, ...]], list[list[int]]] = {}
    for layer in sorted({nodes[i]["layer"] for i in shown}):
        for kinds in _ROWS:
            some = [i for i in shown if nodes[i]["layer"] == layer and nodes[i]["place"] in kinds]
            if some:
                rows[layer, kinds] = [some[k : k + _IN_A_ROW] for k in range(0, len(some), _IN_A_ROW)]
    return rows


def _placed(
    nodes: Sequence[Mapping[str, Any]],
    rows: Mapping[tuple[int, tuple[str, ...]], list[list[int]]],
    links: Sequence[tuple[int, int]],
) -> tuple[dict[int, _Place], float]:
    """Where each node is, near those above that lead to it; and the height of all."""
    at: dict[int, _Place] = {}
    y = 62.0
    for (_, kinds), parts in rows.items():
        for part in parts:
            above = {i: [at[source].x for source, target in links if target == i and source in at] for i in part}
            order = sorted(
                part, key=lambda i: (kinds.index(nodes[i]["place"]), np.mean(above[i]) if above[i] else _MIDDLE, i)
            )
            space = min((_WIDTH - _RIGHT - _LEFT) / len(order), 90)
            left = _MIDDLE - space * (len(order) - 1) / 2
            at |= {i: _Place(left + space * k, y) for k, i in enumerate(order)}
            y += _ROW_HEIGHT / 2 if part is not parts[-1] else _ROW_HEIGHT
    return at, y + 10


def _line(axes: Axes, start: _Place, end: _Place, colour: str, width: float, dashes: tuple[float, ...] = ()) -> None:
    style: Any = (0, dashes) if dashes else "-"
    axes.plot([start.x, end.x], [start.y, end.y], color=colour, linewidth=width, linestyle=style, zorder=1, alpha=0.8)


def _write(axes: Axes, at: _Place, text: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "facecolor": "#ffffff", "edgecolor": SOFT_INK, "linewidth": 0.8}
    axes.text(*at, text, fontsize=_FONT, color=INK, ha="center", va="center", bbox=box, zorder=4)


def _label(axes: Axes, start: _Place, end: _Place, text: str, taken: list[_Place]) -> None:
    """A weight on its line, where there is room for it."""
    for share in (0.5, 0.35, 0.65, 0.42, 0.58):
        at = _Place(start.x + share * (end.x - start.x), start.y + share * (end.y - start.y))
        if all(abs(at.x - other.x) > 28 or abs(at.y - other.y) > 12 for other in taken):
            box = {"boxstyle": "square,pad=0.1", "facecolor": "#ffffff", "edgecolor": "none"}
            axes.text(*at, text, fontsize=_SMALL, color=SOFT_INK, ha="center", va="center", bbox=box, zorder=2)
            taken.append(at)
            return


def _table(nodes: Sequence[Mapping[str, Any]], circuit: Mapping[str, Any]) -> Table:
    """The weights."""
    rows = [(name_of(nodes[source]), name_of(nodes[target]), weight) for source, target, weight in circuit["edges"]]
    return Table(("from", "to", "weight"), rows)


def size_curve(title: str, curve: Sequence[Sequence[float]], target_loss: float, found: Sequence[float] | None) -> Plot:
    """Circuit size against task loss.

    Args:
      title: of the figure.
      curve: ``(nodes, loss)``, the smallest first; none with as few nodes has a lower loss.
      target_loss: at which the task counts as done.
      found: the circuit that was kept.
    """
    figure, axes = new_figure()
    points = [(nodes, loss) for nodes, loss in curve]
    steps = [*points[:1], *(corner for a, b in pairwise(points) for corner in ((b[0], a[1]), b))]
    if steps:
        axes.plot(*zip(*steps, strict=True), color=SPARSE, linewidth=1.4)
        axes.plot(*zip(*points, strict=True), color=SPARSE, linestyle="none", marker="o", markersize=3)
    axes.axhline(target_loss, color=SOFT_INK, linewidth=1, linestyle=":", label=f"target: {target_loss:g}")
    if found is not None:
        axes.plot(*found, color=NEGATIVE, linestyle="none", marker="o", markersize=7, label="the circuit below")
    axes.set_xscale("symlog", linthresh=1)
    most = max((nodes for nodes, _ in curve), default=1)
    every = (1, 10, 100, 1000, 10_000, 100_000) if most > 100 else (1, 2, 5, 10, 20, 50, 100)
    axes.set_xticks([0, *(tick for tick in every if tick <= 1.5 * most)])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(count_tick)
    axes.set(xlabel="nodes that are on", ylabel="task loss (nats)", ylim=(0, None))
    legend(figure)
    return Plot(title, figure, title, Table(("nodes", "task loss (nats)"), curve))
