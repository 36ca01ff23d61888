"""The page about runs that somebody wants to see beside each other, and its table for papers.

They are a sweep without a table: every run a cell, under the shortest name that tells it from the others.
"""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup

from spdf_jax.config.run import flat
from spdf_jax.errors import InputError
from spdf_jax.report.closer import write_curves
from spdf_jax.report.draw import STYLE, Table
from spdf_jax.report.figures import csv_text, write_figures
from spdf_jax.report.page import Panel, template, whole, write_page
from spdf_jax.report.records import Run, changed_settings, differing_settings, read_run
from spdf_jax.report.sweep import lowest_losses
from spdf_jax.report.sweep_curves import STEPS, curves, with_unit
from spdf_jax.report.sweep_records import Sweep, address
from spdf_jax.report.words import (
    COUNT_UNITS,
    COUNTED_NOTE,
    flops,
    made_with,
    percent,
    quantity,
    setting,
    target_name,
    when,
)
from spdf_jax.sparsity.optimizers import OWN_OPTIMIZERS
from spdf_jax.sparsity.rules import OWN_RULES
from spdf_jax.training.provenance import commit, now
from spdf_jax.workdir import CONFIG_FILE, METRICS_FILE, write_atomically


def write_comparison(sweep: Sweep, folder: Path) -> list[Path]:
    """Writes `report.html`, `compare.md`, `compare.csv`, `compare.tex` and `figures/`, each atomically.

    Args:
      sweep: of `read_runs`.
      folder: to write into.

    Returns:
      The paths of the files, the page first.
    """
    table = _Comparison.of(sweep)
    files = {"md": table.markdown(), "csv": csv_text(table.numbers), "tex": table.latex()}
    with matplotlib.rc_context(STYLE):
        panels = [table.panel(sweep), *curves(sweep, STEPS), *_origins(sweep)]
        figures = write_figures(folder, panels)
    curves_file = write_curves(folder, sweep.title, panels)
    page = write_page(
        folder / "report.html",
        title=sweep.title,
        status=f"compared {when(now())}{f' at commit {ours}' if (ours := commit()) else ''}",
        verdict=f"Lowest validation loss: {lowest_losses(sweep)}.",
        note=sweep.remark,
        panels=panels,
        curves=curves_file,
    )
    for suffix, content in files.items():
        write_atomically(folder / f"compare.{suffix}", content.encode())
    return [
        page,
        *(folder / f"compare.{suffix}" for suffix in files),
        *figures,
        *([curves_file] if curves_file else []),
    ]


def read_runs(workdirs: Sequence[Path], beside: Path) -> Sweep:
    """The runs as cells of a sweep without a table.

    Args:
      workdirs: of runs, finished or not, two or more.
      beside: the folder of the page that links to theirs.

    Raises:
      InputError: fewer than two folders, one given twice, one that holds no run, or a file that cannot be read.
    """
    if len(workdirs) < 2:
        raise InputError("--job compare: give the folders of two runs or more: --job compare runs/a runs/b")
    found: dict[Path, Path] = {}
    for workdir in workdirs:
        if same := found.get(workdir.resolve()):
            raise InputError(f"{workdir}: is given twice{'' if same == workdir else f', as {same} too'}; give it once")
        found[workdir.resolve()] = workdir
        if (workdir / "cells").is_dir():
            raise InputError(
                f"{workdir}: is a sweep, with a table of its own; give its runs, {workdir / 'cells' / '*'}"
            )
        if not ((workdir / CONFIG_FILE).is_file() and (workdir / METRICS_FILE).is_file()):
            raise InputError(f"{workdir}: no run is there; give the folders of runs, by their --workdir")
    names = dict(zip(short_names(list(found)), found.values(), strict=True))
    cells = {name: read_run(workdir) for name, workdir in names.items()}
    other_code = ", ".join(f"{rule!r}" for rule in rules_of_other_code(cells))
    remark = [
        different(names, cells),
        f"Under one name these runs have rules of different code: {other_code}." if other_code else "",
        COUNTED_NOTE if any(run.max_sparsity and "train_flops" in run.numbers for run in cells.values()) else "",
    ]
    return Sweep(
        title=f"{len(cells)} runs beside each other",
        remark=" ".join(filter(None, remark)),
        name="compare",
        rows=[],
        cells=cells,
        reports={n: address(workdir.resolve(), beside.resolve()) for n, workdir in names.items() if _has_page(workdir)},
    )


def _has_page(workdir: Path) -> bool:
    return (workdir / "report.html").is_file()


def short_names(paths: Sequence[Path]) -> list[str]:
    """Of different paths, the last parts of each, as few as tell all apart.

    >>> short_names([Path("/runs/a/dense"), Path("/runs/b/dense")])
    ['a/dense', 'b/dense']
    """
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(paths):
            break
    return names


def different(workdirs: Mapping[str, Path], runs: Mapping[str, Run]) -> str:
    """What keeps validation losses from being compared; "" where nothing does, as far as the folders tell."""
    tasks = {run.task(run.evaluation_rows[-1]) for run in runs.values() if run.evaluation_rows}
    runs = {name: run for name, run in runs.items() if run.loss_unit}  # those that are of text
    configs = [flat(run.config) for run in runs.values()]
    found = [key for key in differing_settings([run.config for run in runs.values()]) if key.startswith("data.")]
    found = [key for key in found if key not in ("data.cache_dir", "data.path", "data.processes", "data.token_dtype")]
    if len({config.get("model.vocab_size") for config in configs}) > 1:
        found.append("model.vocab_size")
    tokenizers = {zlib.crc32(path.read_bytes()) for n in runs if (path := workdirs[n] / "tokenizer.json").is_file()}
    if len(tokenizers) > 1:
        found.append("tokenizer.json")
    if {config.get("data.source") for config in configs} == {
        "token_files"
    }:  # which hold the tokens, whatever tells their text
        found = [key for key in found if key not in ("data.tokenizer", "tokenizer.json")]
    # The library's text is the running Python's; what else lies in a place, the loss of its token frequencies tells.
    if {config.get("data.source") for config in configs} == {"embedded"}:
        pythons = {run.starts[0]["python"] for run in runs.values() if run.starts}
        found += ["the Python whose library is the text"] if len(pythons) > 1 else []
    frequencies = [round(run.numbers["unigram_loss"], 9) for run in runs.values() if "unigram_loss" in run.numbers]
    if len(set(frequencies)) > 1:
        found.append("the loss of token frequencies alone")
    elif len(frequencies) < len(runs) and len({config.get("data.path") for config in configs}) > 1:
        found.append("data.path")
    said = "Losses are not comparable where they are over other text, or over other tokens of it. " if found else ""
    over = " and ".join(target_name(task) for task in sorted(tasks))
    return " ".join(
        filter(
            None,
            [
                f"{said}These runs differ in {', '.join(found)}." if found else "",
                f"The validation losses are over {over}: compare those over the same." if len(tasks) > 1 else "",
            ],
        )
    )


def rules_of_other_code(runs: Mapping[str, Run]) -> dict[str, dict[str, str]]:
    """Rules that have one name and not one code in all runs: by rule and run, the start of a hash of it, or "the library's".

    Optimisers likewise, as ``optimizer NAME``.

    A run of a release that recorded no such hash is in it only where a rule of that name is the library's.
    """
    found: dict[str, dict[str, str]] = {}
    for name, run in runs.items():
        settings = flat(run.config).items()
        names = {value for key, value in settings if re.search(r"(^|\.)sparsity\.rule$", key)}
        names |= {f"optimizer {value}" for key, value in settings if re.search(r"(^|\.)optimizer\.name$", key)}
        own = run.starts[0].get("rules", {}) if run.starts else {}
        for rule in sorted(names & {*own, *OWN_RULES, *(f"optimizer {name}" for name in OWN_OPTIMIZERS)}):
            found.setdefault(rule, {})[name] = own[rule][:8] if rule in own else "the library's"
    return {rule: codes for rule, codes in found.items() if len(set(codes.values())) > 1}


class _Column(NamedTuple):
    header: str
    of: Callable[[Run], Any]
    render: Callable[[Any, Any], str]  # a value, and the largest of the column


def _number(key: str) -> Callable[[Run], Any]:
    return lambda run: run.numbers.get(key)


def _both_flops(run: Run) -> float | None:
    before = run.numbers.get("before")
    return before["train_flops"] + run.numbers["train_flops"] if before and "train_flops" in run.numbers else None


_LOSS = "validation loss"
_COLUMNS = (
    _Column(_LOSS, _number("val_loss"), lambda v, _: f"{v:.4f}"),
    _Column("loss at step", lambda run: run.loss_step, lambda v, _: f"{v:,}"),
    _Column("training steps", _number("steps"), lambda v, _: f"{v:,}"),
    _Column("of these by the runs before", lambda run: run.first_step or None, lambda v, _: f"{v:,}"),
    _Column("training tokens", _number("tokens"), lambda v, most: quantity(v, COUNT_UNITS, most)),
    _Column("training FLOPs (counted)", _number("train_flops"), flops),
    _Column("FLOPs with the run before (counted)", _both_flops, flops),
    _Column("FLOP reduction", _number("flops_reduction"), lambda v, _: f"{v:.2f}x"),
    _Column("wall-clock time (s)", _number("wall_seconds"), lambda v, _: f"{v:,.0f}"),
    _Column("parameters", _number("parameters"), lambda v, _: f"{v:,}"),
    _Column("highest sparsity", lambda run: run.max_sparsity, lambda v, _: percent(v)),
)


class _Comparison(NamedTuple):
    """The table: what is in it as numbers and, by row, as texts; the first two columns are run and status."""

    numbers: Table
    texts: Sequence[Sequence[str]]

    @classmethod
    def of(cls, sweep: Sweep) -> "_Comparison":
        columns = [c for c in _COLUMNS if any(c.of(run) is not None for run in sweep.cells.values())]
        configs = {name: flat(run.config) for name, run in sweep.cells.items()}
        keys = _settings(list(sweep.cells.values()))
        codes = {f"code of rule {rule!r}": of for rule, of in rules_of_other_code(sweep.cells).items()}
        largest = [max(v for run in sweep.cells.values() if (v := column.of(run)) is not None) for column in columns]
        numbers, texts = [], []
        for name, run in sweep.cells.items():
            values = [column.of(run) for column in columns]
            settings = [setting(configs[name][key]) if key in configs[name] else None for key in keys]
            settings += [of.get(name) for of in codes.values()]
            numbers.append([name, run.status, *values, *settings])
            rendered = [
                "-" if v is None else c.render(v, most) for c, v, most in zip(columns, values, largest, strict=True)
            ]
            texts.append([name, run.status, *rendered, *(text or "-" for text in settings)])
        loss = with_unit(sweep.cells.values(), _LOSS)
        headers = [loss if column.header == _LOSS else column.header for column in columns]
        return cls(Table(["run", "status", *headers, *keys, *codes], numbers), texts)

    def panel(self, sweep: Sweep) -> Panel:
        rows = [(texts[0], sweep.page_of(texts[0]), texts[1], texts[2:]) for texts in self.texts]
        body = _TABLE.render(headers=self.numbers.header[2:], rows=rows)
        caption = (
            "The last figures of each run, and what the runs set differently. A loss of an earlier step than they are"
            " names its own. Wall-clock time is all of it, with compilation, evaluations and saving."
        )
        return Panel("Runs", Markup(body), caption, wide=True)

    def markdown(self) -> str:
        lines = [self.numbers.header, ["---"] * len(self.numbers.header), *self.texts]
        return "".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |\n" for line in lines)

    def latex(self) -> str:
        """A `tabular` that needs no package."""
        header, *rows = (" & ".join(map(_latex, line)) + r" \\" for line in (self.numbers.header, *self.texts))
        numbers = "r" * (len(self.numbers.header) - 2)
        lines = [rf"\begin{{tabular}}{{ll{numbers}}}", r"\hline", header, r"\hline", *rows, r"\hline", r"\end{tabular}"]
        return "\n".join(lines) + "\n"


def _settings(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs differ and that one of them sets; how a run is reported and where it lies left out."""
    changed = {key for run in runs for key, _, _ in changed_settings(run.config)}
    differing = differing_settings([run.config for run in runs])
    return [
        key for key in differing if key in changed and not key.startswith(("loop.", "data.cache_dir", "data.processes"))
    ]


_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}


def _latex(text: str) -> str:
    r"""A text as LaTeX prints it.

    >>> _latex("50 % of a_b")
    '50 \\% of a\\_b'
    """
    return "".join(_SPECIAL.get(c, rf"\{c}" if c in "&%$#_{}" else c) for c in text)


_TABLE = template("""\
<div class="scroll"><table class="figures">
  <thead><tr><th>run</th>
  {% for header in headers %}
  <th>{{ header | breakable }}</th>
  {% endfor %}
  </tr></thead>
  {% for name, address, status, texts in rows %}
  <tr><th scope="row">{{ name | link(address) }}{% if status != "finished" %}<small>{{ status }}</small>{% endif %}</th>
    {% for text in texts %}
    <td>{{ text }}</td>
    {% endfor %}
  </tr>
  {% endfor %}
</table></div>
""")


def _origins(sweep: Sweep) -> list[Panel]:
    """When each run was begun, with what, and by which command."""
    header = ("run", "begun", "made with", "device", "command")
    rows, runs = [], []
    for name, run in sweep.cells.items():
        first = run.starts[0] if run.starts else None
        begun = (when(first["time"]), made_with(first), first["device"]) if first else ("-", "-", "-")
        command = run.config.get("command")
        rows.append((name, *begun, command or "from Python"))
        origin = [
            f"Begun {begun[0]} on {begun[2]}, with {begun[1]}." if first else "",
            "" if command else "From Python.",
        ]
        runs.append((name, " ".join(filter(None, origin)), whole(command) if command else ""))
    body = _ORIGINS.render(runs=runs)
    return [Panel("Where they come from", Markup(body), wide=True, table=Table(header, rows))]


_ORIGINS = template("""\
{% for name, origin, command in runs %}
<h3>{{ name | breakable }}</h3>
<p class="soft command">{{ origin }}</p>
{{ command }}
{% endfor %}
""")
