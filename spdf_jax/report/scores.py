"""Of the page about a run: the scores of its evaluation, tasks of lm-eval, exams, and generated texts."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from spdf_jax.evals.exams import PASS_OVER_PERCENT
from spdf_jax.report.draw import DENSE, INK, SOFT_INK, SPARSE, Plot, Table, new_figure, some
from spdf_jax.report.page import Panel, template
from spdf_jax.report.records import Run
from spdf_jax.report.words import digits, percent, score_name

_MAX_TEXTS = 10
_MAX_EXAM_BARS, _MAX_EXAM_LABEL = 40, 56


def evaluation_scores(run: Run) -> Panel | None:
    """The scores of the evaluation, each with how it is computed; None without an evaluation."""
    values = {key: value for key, value in run.scores.items() if isinstance(value, int | float) and key != "step"}
    if not values:
        return None
    parts = [name for name in ("seen", "unseen") if isinstance(run.scores.get(name), dict)]
    signatures, absent = run.scores.get("signatures", {}), run.scores.get("absent", {})
    rows = []
    for key, value in values.items():
        figures = [value, *(run.scores[part].get(key) for part in parts)]
        texts = ["" if figure is None else f"{figure:,.4f}" for figure in figures]
        rows.append((score_name(key), texts, signatures.get(key, "")))
    body = _SCORES.render(
        parts=parts,
        rows=rows,
        absent=[(score_name(key), why) for key, why in absent.items()],
        how=bool(absent) or any(key in signatures for key in values),
    )
    step = f"The state after step {run.scores['step']:,}. " if "step" in run.scores else ""
    of_task = (
        signatures and " Texts are decoded from the whole test set; the validation loss is over the validation set."
    )
    table = Table(
        ("score", "all", *parts), [(key, v, *(run.scores[p].get(key) for p in parts)) for key, v in values.items()]
    )
    return Panel("Scores", Markup(body), f"{step}{of_task or ''}".strip(), wide=True, table=table)


_SCORES = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th>score</th><th>{{ "all" if parts else "value" }}</th>
  {% for part in parts %}
  <th>{{ part }} categories</th>
  {% endfor %}
  {% if how %}
  <th>how it is computed</th>
  {% endif %}
  </tr></thead>
  {% for name, texts, signature in rows %}
  <tr><th scope="row">{{ name }}</th>
    {% for text in texts %}
    <td>{{ text }}</td>
    {% endfor %}
    {% if how %}
    <td class="name soft">{{ signature }}</td>
    {% endif %}
  </tr>
  {% endfor %}
  {% for name, why in absent %}
  <tr><th scope="row">{{ name }}</th><td>absent</td>
    {% for part in parts %}
    <td></td>
    {% endfor %}
    <td class="name soft">{{ why }}</td></tr>
  {% endfor %}
</table></div>
""")


def zero_shot_scores(run: Run) -> Panel | None:
    """The scores on tasks of lm-eval; None where none was run."""
    if "zero_shot" not in run.scores:
        return None
    found = run.scores["zero_shot"]
    tasks = [
        (name, [(score_name(metric), digits(value, 4)) for metric, value in task["metrics"].items()], task)
        for name, task in found["tasks"].items()
    ]
    caption = f"Tasks of lm-eval {found['lm_eval_version']} on local files."
    if ours := [name for name in ("sst2", "rte") if name in found["tasks"]]:
        caption += f" The prompts of {' and '.join(ours)} are this project's own: compare them between its runs only."
    keys = ("samples", "num_fewshot", "version")
    table = Table(
        ("task", "score", "value", *keys),
        [
            (name, metric, value, *(task[key] for key in keys))
            for name, task in found["tasks"].items()
            for metric, value in task["metrics"].items()
        ],
    )
    return Panel("Zero-shot", Markup(_ZERO_SHOT.render(tasks=tasks)), caption, wide=True, table=table)


_ZERO_SHOT = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th>task</th><th>score</th><th>value</th><th>texts</th><th>examples given</th></tr></thead>
  {% for name, figures, task in tasks %}
  {% for metric, value in figures %}
  <tr>
    {% if loop.first %}
    <th scope="row" rowspan="{{ figures | length }}">{{ name | breakable }}</th>
    {% endif %}
    <td>{{ metric }}</td><td>{{ value }}</td><td>{{ "{:,}".format(task.samples) }}</td><td>{{ task.num_fewshot }}</td>
  </tr>
  {% endfor %}
  {% endfor %}
</table></div>
""")


def exam_scores(run: Run) -> Panel | None:
    """The exams, a table and a chart, side by side where there is room; None where none was sat."""
    if "exams" not in run.scores:
        return None
    exams = run.scores["exams"]
    overall, rows = exams["overall"], exams["certifications"]
    by = {"length": "mean log-likelihood a token", "letter": "the likelihood of their letters"}[exams["mode"]]
    caption = (
        f"{overall['passed']:,} of {overall['certifications']:,} certifications passed, each at over {PASS_OVER_PERCENT} %"
        f" correct. Mean score {percent(overall['score'])}, guessing gives {percent(overall['guess_score'])}."
    )
    if overall["human_compared"]:
        caption += (
            f" On the {overall['human_compared']:,} with a human score: {percent(overall['human_compared_score'])},"
            f" people {percent(overall['human_score'])}."
        )
    questions = (
        exams["questions_file"] or "this project's own, without human scores: compare them between its runs only"
    )
    caption += f" Choices are compared by {by}. Questions: {questions}."
    chart = _exam_chart(exams)
    body = _EXAMS.render(
        rows=rows,
        percent=percent,
        with_people=overall["human_compared"] > 0,
        is_folded=len(rows) > _MAX_EXAM_BARS,
        chart=chart.inline,
    )
    return Panel("Exams", Markup(body), caption, wide=True, plots=(chart,))


_EXAMS = template("""\
<div class="grid">
{% if is_folded %}
<details><summary>All {{ "{:,}".format(rows | length) }} certifications</summary>
{% endif %}
<div class="scroll"><table class="figures">
  <thead><tr><th>certification</th><th>questions</th><th>score</th>
  {% if with_people %}
  <th>people</th>
  {% endif %}
  <th>passed</th></tr></thead>
  {% for row in rows %}
  <tr><th scope="row">{{ row.certification }}<small>{{ row.field }}</small></th>
    <td>{{ "{:,}".format(row.questions) }}</td><td>{{ percent(row.score) }}</td>
    {% if with_people %}
    <td>{{ "-" if row.human_score is none else percent(row.human_score) }}</td>
    {% endif %}
    <td>{{ "yes" if row.passed else "no" }}</td></tr>
  {% endfor %}
</table></div>
{% if is_folded %}
</details>
{% endif %}
{{ chart }}
</div>
""")


def _exam_chart(exams: Mapping[str, Any]) -> Plot:
    """A bar a certification under the heading of its field; of too many to draw, a bar a field."""
    is_by_field = len(exams["certifications"]) > _MAX_EXAM_BARS
    lines: list[tuple[str, Mapping[str, Any] | None]] = []  # a label and what its bar shows: nothing under a heading
    for field in exams["fields"]:
        title = f"{field['field']}: {field['passed']:,} of {field['certifications']:,} passed"
        lines.append((title, field if is_by_field else None))
        if not is_by_field:
            lines += [(one["certification"], one) for one in exams["certifications"] if one["field"] == field["field"]]
    figure, axes = new_figure(height_inches=0.8 + 0.32 * len(lines))
    for level, (label, one) in enumerate(lines):
        # Over its bar, not beside the axis: the page may be a phone's. The table has names in full.
        height, weight = (level - 0.18, "normal") if one else (level + 0.14, "bold")
        text = label if len(label) <= _MAX_EXAM_LABEL else f"{label[: _MAX_EXAM_LABEL - 1]}…"
        axes.text(0, height, text, fontsize=8, weight=weight, transform=axes.get_yaxis_transform())
    shown = [(level + 0.24, one) for level, (_, one) in enumerate(lines) if one]
    kinds = {"mean score": DENSE} if is_by_field else {"passed": SPARSE, "not passed": DENSE}
    for kind, colour in kinds.items():
        some = [bar for bar in shown if is_by_field or bar[1]["passed"] == (kind == "passed")]
        scores = [100 * one["score"] for _, one in some]
        axes.barh([level for level, _ in some], scores, height=0.26, color=colour, label=kind)
    for key, name, marker in (("guess_score", "guessing", "|"), ("human_score", "people", "o")):
        marks = [(100 * one[key], level) for level, one in shown if one[key] is not None]
        if marks:
            style: dict[str, Any] = {"marker": marker, "linestyle": "none", "color": INK, "fillstyle": "none"}
            axes.plot(*zip(*marks, strict=True), markersize=6, label=name, **style)
    label = f"passed at over {PASS_OVER_PERCENT} %"
    axes.axvline(PASS_OVER_PERCENT, color=SOFT_INK, linewidth=1, linestyle=":", label=label)
    axes.set(xlabel="questions answered right (%)", xlim=(0, 100), ylim=(len(lines) - 0.4, -0.6), yticks=[])
    axes.spines.left.set_visible(False)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3)
    keys = ("field", "certification", "questions", "score", "guess_score", "human_score", "passed")
    table = Table(keys, [[one[key] for key in keys] for one in exams["certifications"]])
    return Plot("scores of the exams", figure, "scores of the exams", table)


def generated_texts(run: Run) -> Panel | None:
    """Some of the generated texts with their inputs and references; None without any."""
    if not run.generations:
        return None
    shown = some(run.generations, _MAX_TEXTS)
    body = _TEXTS.render(texts=shown)
    caption = f"{len(shown)} of {len(run.generations):,}, evenly spread: input, generated text, one of the references."
    return Panel("Generated texts", Markup(body), caption, wide=True)


_TEXTS = template("""\
<ol class="texts">
  {% for one in texts %}
  <li><p class="soft">{{ one.context }}</p><p><strong>{{ one.text or "(nothing)" }}</strong></p>
    {% if one.references %}
    <p class="soft">Reference (of {{ one.references | length }}): {{ one.references[0] }}</p>
    {% endif %}
  </li>
  {% endfor %}
</ol>
""")
