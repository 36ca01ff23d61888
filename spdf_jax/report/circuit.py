"""`circuit.html`: the circuits that `--job circuit` found, for a reader who has never seen one; from `circuit.json` alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.lines import Line2D

from spdf_jax.cloud.spool import located
from spdf_jax.errors import reading
from spdf_jax.report.circuit_graph import MOST_EDGES, drawn_nodes, graph, key_lines, name_of, size_curve
from spdf_jax.report.draw import SOFT_INK, SPARSE, STYLE, Table
from spdf_jax.report.figures import write_figures
from spdf_jax.report.page import Panel, plot_panel, template, write_page
from spdf_jax.report.words import percent
from spdf_jax.workdir import CIRCUIT_FILE, read_json

CIRCUIT_PAGE = "circuit.html"
_UNFOLDED_NODES, _MOST_LISTED, _MOST_NAMED = 24, 200, 5


def write_circuits(workdir: Path, output: Path | None = None) -> Path:
    """Writes `circuit.html` and its figures, atomically, from the `circuit.json` in a folder.

    Args:
      workdir: where that is.
      output: the folder to write into, by default `workdir`.

    Returns:
      The path of the page.

    Raises:
      InputError: no such file, or not as `--job circuit` wrote it.
    """
    file, folder = located(workdir) / CIRCUIT_FILE, located(output or workdir)
    fix = "make it again by --job circuit"
    record = read_json(file, fix)
    with reading(f"{file}: no circuits", fix), matplotlib.rc_context(STYLE):
        panels = [
            _how_to_read(record),
            *(panel for name, task in record["tasks"].items() for panel in _panels(record, name, task)),
        ]
        found = {name: task for name, task in record["tasks"].items() if task["found"]}
        title, status = f"Circuits of {record['name']}", f"the state after step {record['step']:,}"
        write_figures(folder, panels)
    return write_page(
        folder / CIRCUIT_PAGE,
        title=title,
        status=status,
        verdict=_verdict(record, found),
        note=_not_found(record),
        panels=panels,
    )


def _verdict(record: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if not found:
        return "No circuit was found: the model does none of the tasks."
    texts = [
        f"{len(task['circuit']['nodes']):,} of {record['nodes']:,} nodes {task['about']}" for task in found.values()
    ]
    return f"{'; '.join(texts)}."


def _not_found(record: Mapping[str, Any]) -> str:
    texts = [f"{name}: not found, since {task['why']}." for name, task in record["tasks"].items() if not task["found"]]
    return " ".join(texts)


def _how_to_read(record: Mapping[str, Any]) -> Panel:
    text = _HOW.render(target=record["target_loss"])
    return Panel("How to read this", Markup(text), wide=True)


_HOW = template("""\
<p>A language model guesses the next token. A <b>task</b> here is a choice between two: each of its pairs has two prompts that
differ in one place, and after each another token is right. <b>Task loss</b> is how badly the model chooses, in nats: 0 is
always right and sure, 0.69 is a coin.</p>
<p>A <b>node</b> is one channel inside the model: a number that it reads, computes or writes for every token. A node that is
<i>off</i> is held at its mean over text, so that it says nothing about the prompt. A <b>circuit</b> is the smallest set of
nodes found with which, all others off, the task loss is at most {{ target }}; the lines of its drawing are the model's weights
that are not 0. It explains the model if it does the task <b>alone</b>, and if the model <b>without</b> it does not.</p>
""")


def _panels(record: Mapping[str, Any], name: str, task: Mapping[str, Any]) -> list[Panel]:
    """A task's: figures and example, the curve, and of a circuit that was found its drawing and its nodes."""
    rows = _rows(record, task)
    table = Table(("figure", "value"), [row[:2] for row in rows])
    numbers = Panel(
        f"{name}: {task['about']}",
        Markup(_NUMBERS.render(rows=rows, prompts=task["example"], answers=task["answers"])),
        "" if task["found"] else f"Not found: {task['why']}.",
        table=table,
    )
    circuit = task.get("circuit")
    size = (len(circuit["nodes"]), task["measured"]["alone"]["loss"]) if circuit else None
    curve = plot_panel(
        f"{name}: how small can it be?",
        size_curve(f"{name}: nodes and task loss", task["curve"], record["target_loss"], size),
        "The lowest task loss of all circuits tried with so many nodes.",
    )
    return [numbers, curve, *(_circuit_panels(name, task, circuit) if circuit and circuit["nodes"] else [])]


def _rows(record: Mapping[str, Any], task: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    rows = []
    if circuit := task.get("circuit"):
        rows.append(("Nodes", f"{len(circuit['nodes']):,}", f"of {record['nodes']:,} in the model"))
        rows.append(("Weights between them", f"{len(circuit['edges']):,}", "that are not 0"))
    names = {
        "whole": ("Task loss of the whole model", ""),
        "alone": ("Of the circuit alone", "all other nodes at their means"),
        "without": ("Without the circuit", "its nodes at their means, all others as they are"),
        "nothing": ("Without any node", "all at their means"),
    }
    for which, (label, remark) in names.items():
        if which in task["measured"]:
            one = task["measured"][which]
            right = f"the right one likelier in {percent(one['accuracy'])} of prompts"
            rows.append((label, f"{one['loss']:.3f}", f"{remark}; {right}" if remark else right))
    pairs = task["pairs"]
    left = f"; {pairs['left_out']:,} left out, whose answers are no single tokens" if pairs["left_out"] else ""
    rows.append(("Pairs of prompts", f"{pairs['used']:,}", f"{pairs['from_library']:,} of held-out library code{left}"))
    return rows


_NUMBERS = template("""\
<table class="numbers short">
{% for label, value, remark in rows %}
  <tr><th scope="row">{{ label }}</th><td>{{ value }}</td><td>{{ remark }}</td></tr>
{% endfor %}
</table>
<div class="pair">
{% for prompt in prompts %}
<pre><code>{{ prompt }}<mark>{{ answers[loop.index0] }}</mark></code></pre>
{% endfor %}
</div>
""")


def _circuit_panels(name: str, task: Mapping[str, Any], circuit: Mapping[str, Any]) -> list[Panel]:
    plot, count = graph(f"{name}: the circuit", circuit, task["answers"]), len(circuit["nodes"])
    drawn = len(drawn_nodes(circuit))
    caption = (
        "From the tokens above to the answer below. Numbers are channels; a line is a weight, the thicker the larger."
    )
    if drawn < count:
        caption += f" Drawn are the {drawn:,} nodes of {count:,} that matter most"
        caption += f", and the {MOST_EDGES:,} heaviest weights at most." if len(circuit["edges"]) > MOST_EDGES else "."
    elif len(circuit["edges"]) > MOST_EDGES:
        caption += f" Drawn are the {MOST_EDGES:,} heaviest of {len(circuit['edges']):,} weights."
    key = Markup(_KEY.render(lines=[_key_entry(line) for line in key_lines(circuit)]))
    body = key + Markup('<div class="scroll"><div class="graph">{}</div></div>').format(plot.inline)
    drawing = Panel(f"{name}: the circuit", body, caption, wide=True, plots=(plot,))
    return [drawing, _nodes(name, circuit)]


def _key_entry(line: Line2D) -> dict[str, Any]:
    dotted, colour = line.get_linestyle() == ":", str(line.get_color())
    colour = {SPARSE: "var(--accent)", SOFT_INK: "var(--soft)"}.get(colour, colour)
    return {"label": line.get_label(), "colour": colour, "dot": line.get_marker() == "o", "dotted": dotted}


_KEY = template("""\
<ul class="key">
  {% for one in lines %}
  <li><svg viewBox="0 0 30 8" aria-hidden="true">
    {%- if one.dot -%}
    <circle cx="15" cy="4" r="4" fill="{{ one.colour }}"/>
    {%- else -%}
    <path d="M0,4H30" style="fill: none; stroke: {{ one.colour }}; stroke-width: 2
      {%- if one.dotted %}; stroke-dasharray: 2 3{% endif %}"/>
    {%- endif -%}
    </svg>{{ one.label }}</li>
  {% endfor %}
</ul>
""")


def _nodes(name: str, circuit: Mapping[str, Any]) -> Panel:
    """Every node with its weights and the tokens that move it most."""
    nodes = circuit["nodes"]
    into: dict[int, list[tuple[str, float]]] = {}
    out: dict[int, list[tuple[str, float]]] = {}
    for source, target, weight in circuit["edges"]:
        out.setdefault(source, []).append((name_of(nodes[target]), weight))
        into.setdefault(target, []).append((name_of(nodes[source]), weight))
    answers = {source: weight for source, _, weight in circuit["to_answers"]}
    order = sorted(range(len(nodes)), key=lambda i: -nodes[i]["effect"])
    listed = [
        {
            "name": name_of(nodes[i]),
            "effect": f"{nodes[i]['effect']:+.3f}",
            "mean": f"{nodes[i]['mean']:.2f}",
            "into": _weights(into.get(i, [])),
            "out": _weights(out.get(i, [])),
            "answer": f"{answers[i]:+.2f}" if i in answers else "",
            "contexts": [
                {part: _visible(one[part]) for part in ("before", "token", "after")} | {"value": f"{one['value']:.2f}"}
                for one in nodes[i]["contexts"]
            ],
        }
        for i in order[:_MOST_LISTED]
    ]
    caption = (
        "Those first without which the circuit loses most. Under each: its weights, and where in the training text it is "
        "furthest from its mean, with its value there."
    )
    if len(listed) < len(nodes):
        caption += f" The first {len(listed):,} of {len(nodes):,}; {CIRCUIT_FILE} has all."
    body = Markup(_NODES.render(first=listed[:_UNFOLDED_NODES], rest=listed[_UNFOLDED_NODES:]))
    rows = [
        (name_of(n), n["effect"], n["mean"], *(f"{c['before']}[{c['token']}]{c['after']}" for c in n["contexts"][:1]))
        for n in (nodes[i] for i in order)
    ]
    return Panel(
        f"{name}: its nodes", body, caption, wide=True, table=Table(("node", "effect (nats)", "mean", "text"), rows)
    )


def _weights(found: Sequence[tuple[str, float]]) -> str:
    heaviest = sorted(found, key=lambda one: -abs(one[1]))
    said = ", ".join(f"{weight:+.2f} {name}" for name, weight in heaviest[:_MOST_NAMED])
    return f"{said}, and {len(found) - _MOST_NAMED:,} more" if len(found) > _MOST_NAMED else said


def _visible(text: str) -> str:
    return text.replace("\r", "").replace("\n", "↵").replace("\t", "⇥")


_NODES = template("""\
{% macro one(node) %}
<li><h3>{{ node.name }}</h3>
  <p class="soft">{{ node.effect }} nats without it. Its mean is {{ node.mean }}.
    {% if node.into %} From {{ node.into }}.{% endif %}
    {% if node.out %} To {{ node.out }}.{% endif %}
    {% if node.answer %} To the first answer over the second: {{ node.answer }}.{% endif %}</p>
  {% for text in node.contexts %}
  <p class="context"><span class="soft">{{ text.value }}</span> <code>{{ text.before }}<mark>{{ text.token }}</mark>
    {{- text.after }}</code></p>
  {% endfor %}
</li>
{% endmacro %}
<ul class="nodes">
{% for node in first %}{{ one(node) }}{% endfor %}
</ul>
{% if rest %}
<details><summary>{{ "{:,}".format(rest | length) }} more</summary><ul class="nodes">
{% for node in rest %}{{ one(node) }}{% endfor %}
</ul></details>
{% endif %}
""")
