"""Of the page about a sweep: its cells with the settings in which they differ, and how their scores are computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from spdf_jax.config.run import flat
from spdf_jax.report.draw import Table
from spdf_jax.report.page import Panel, template
from spdf_jax.report.records import differing_settings
from spdf_jax.report.sweep_records import Sweep
from spdf_jax.report.words import duration, flops, score_name, setting

#: Of a figure, and the largest of its column.
_FIGURES: dict[str, Callable[[float, float], str]] = {
    "val_loss": lambda value, _: f"{value:.4f}",
    "flops_reduction": lambda value, _: f"{value:.2f}x",
    "train_flops": flops,
    "wall_seconds": lambda value, _: duration(value),
}


def cells(sweep: Sweep) -> list[Panel]:
    """The cells of each shape, that is, of the same phases, with what they set differently."""
    shapes: dict[tuple[str, ...], list[str]] = {}
    for name, run in sweep.cells.items():
        shapes.setdefault(tuple(run.config.get("phases", ())), []).append(name)
    panels = []
    for phases, names in shapes.items():
        keys = differing_settings([sweep.cells[name].config for name in names])
        largest = {key: max((sweep.cells[n].numbers.get(key, 0) for n in names), default=0) for key in _FIGURES}
        rows = [_cell(sweep, name, keys, largest) for name in names]
        body = Markup(_CELLS.render(keys=keys, rows=rows))
        figures = [
            [*(run.numbers.get(key) for key in ("steps", *_FIGURES)), run.loss_step]
            for run in map(sweep.cells.__getitem__, names)
        ]
        table = Table(
            ("run", "status", "steps", *_FIGURES, "val_loss_step", *keys),
            [
                (name, sweep.cells[name].status, *numbers, *row["settings"])
                for name, numbers, row in zip(names, figures, rows, strict=True)
            ],
        )
        caption = "The result of each run" + (
            ", and every setting in which they differ." if keys else "; their settings are the same."
        )
        title = f"Runs: {' then '.join(phases) or 'no phase'}"
        panels.append(Panel(title, body, caption, wide=True, table=table))
    return panels


def _cell(sweep: Sweep, name: str, keys: Sequence[str], largest: Mapping[str, float]) -> dict[str, Any]:
    run = sweep.cells[name]
    values = flat(run.config)
    figures = [
        render(run.numbers[key], largest[key]) if key in run.numbers else "-" for key, render in _FIGURES.items()
    ]
    if run.loss_step is not None:
        figures[0] += f" at step {run.loss_step:,}"
    status = "" if run.status == "finished" else run.status
    return {
        "name": name,
        "address": sweep.page_of(name),
        "status": status,
        "figures": figures,
        "settings": [setting(values[key]) if key in values else "-" for key in keys],
    }


_CELLS = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th>run</th><th>validation loss</th><th>FLOP reduction</th><th>counted FLOPs</th><th>wall-clock time</th>
  {% for key in keys %}
  <th>{{ key | breakable }}</th>
  {% endfor %}
  </tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ row.name | link(row.address) }}{% if row.status %}<small>{{ row.status }}</small>{% endif %}</th>
    {% for text in row.figures %}
    <td>{{ text }}</td>
    {% endfor %}
    {% for text in row.settings %}
    <td>{{ text }}</td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
""")


def signatures(sweep: Sweep) -> list[Panel]:
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
