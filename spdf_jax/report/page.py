"""The page: a heading and cards, readable on paper, on a phone, and by day and night."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup, escape

from spdf_jax.report.draw import Plot, Table
from spdf_jax.workdir import write_atomically


@dataclass(frozen=True)
class Panel:
    """One titled card of the page; `plots` and `table` are what it shows, for `figures/`."""

    title: str
    body: Markup
    caption: str = ""
    wide: bool = False
    plots: Sequence[Plot] = ()
    table: Table | None = None


def plot_panel(title: str, plot: Plot, caption: str = "") -> Panel:
    """A card with one figure."""
    return Panel(title, plot.inline, caption, plots=(plot,))


def write_page(
    path: Path,
    *,
    title: str,
    status: str,
    verdict: str,
    note: str,
    panels: Sequence[Panel],
    curves: Path | None = None,
    failed: bool = False,
) -> Path:
    """Writes a page, atomically.

    Args:
      path: of the page.
      title: its heading.
      status: a few words above it.
      verdict: the sentence below it: what came out.
      note: what to keep in mind with it, or "".
      panels: its cards, in order.
      curves: the file beside it in which to look closer at its curves, if there is one.
      failed: whether its status is to stand out.

    Returns:
      The path.
    """
    texts = {"title": title, "status": status, "verdict": verdict, "note": note, "failed": failed}
    page = _PAGE.render(**texts, panels=panels, alone=_alone(panels), curves=curves)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page.encode())
    return path


def template(text: str) -> Template:
    """A template whose values are escaped and whose names must all be given."""
    return _ENVIRONMENT.from_string(text)


def breakable(name: str) -> Markup:
    """A dotted or underscored name that may go on in the next line.

    >>> breakable("model.n_layer")
    Markup('model.<wbr>n_<wbr>layer')
    """
    return Markup(str(escape(name)).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def link(name: str, address: str) -> Markup:
    """A name that leads to a page beside this one; just the name where there is none.

    >>> link("dense_0", "cells/dense_0/report.html")
    Markup('<a href="cells/dense_0/report.html">dense_<wbr>0</a>')
    """
    return Markup('<a href="{}">{}</a>').format(address, breakable(name)) if address else breakable(name)


def held(text: str) -> Markup:
    """A text whose numbers stay in one line with their units, steps with their number, and flags with their dashes.

    >>> held("51 s at step 40; give --workdir")
    Markup('51\\xa0s at step\\xa040; give <span class="flag">--workdir</span>')
    """
    units = r"(?<=\d) (?=%|(?:s|min|h|x|cores|\w?FLOP)\b)|(?<=\bstep) (?=\d)"
    escaped = re.sub(units, "\N{NO-BREAK SPACE}", str(escape(text)))
    return Markup(re.sub(r"(?<!\S)--\w[\w.]*", r'<span class="flag">\g<0></span>', escaped))


def command_panel(command: str, remark: str) -> Panel:
    """How to run it again."""
    return Panel("Run it again", whole(command), remark, wide=True)


def whole(command: str) -> Markup:
    """A command to read and to copy, all of it at any width: it goes on in the next line, between flags if it can.

    >>> whole("python x.py --quiet")
    Markup('<pre><code>python x.py <span>--quiet</span></code></pre>')
    """
    words = (Markup("<span>{}</span>").format(word) if word.startswith("--") else word for word in command.split(" "))
    return Markup("<pre><code>{}</code></pre>").format(Markup(" ").join(words))


def _alone(panels: Sequence[Panel]) -> set[int]:
    """The indices of panels that no other stands beside where two fit in a row."""
    groups = [list(group) for _, group in itertools.groupby(range(len(panels)), key=lambda i: panels[i].wide)]
    return {group[-1] for group in groups if len(group) % 2 == 1 and not panels[group[-1]].wide}


_ENVIRONMENT = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
_ENVIRONMENT.filters |= {"breakable": breakable, "held": held, "link": link}

_PAGE = template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --page: #f6f7f8; --card: #fff; --ink: #1f2933; --soft: #52606d; --line: #e3e7ea;
        --axis: #c5ccd3; --accent: #0f766e; --second: #c2570c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14181c; --card: #1c2228; --ink: #e4e7eb; --soft: #9aa5b1; --line: #323a42; --axis: #56616c;
          --accent: #4fd1c5; --second: #f59e5b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 2rem 1.25rem 4rem; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { margin: 0 0 .6rem; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 0 0 .25rem; font-size: 1.05rem; }
h3 { margin: 1rem 0 .3rem; font-size: .92rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
.status { margin: 0 0 .25rem; color: var(--accent); font-size: .85rem; font-weight: 600; overflow-wrap: anywhere; }
.failed { color: var(--second); }
.flag { white-space: nowrap; }
.verdict { margin: 0 0 .75rem; max-width: 46rem; font-size: 1.2rem; line-height: 1.45; text-wrap: balance;
           overflow-wrap: anywhere; }
header { margin-bottom: 1.75rem; }
.note { margin: 0; max-width: 46rem; padding-left: .9rem; border-left: 3px solid var(--accent);
        color: var(--soft); overflow-wrap: anywhere; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.1rem; }
.card { min-width: 0; padding: 1.1rem 1.2rem; border: 1px solid var(--line); border-radius: 10px;
        background: var(--card); }
.wide { grid-column: 1 / -1; }
@media (min-width: 56rem), print {
  .alone { display: grid; grid-column: 1 / -1; grid-template: auto 1fr / 1fr 1fr; gap: 0 1.1rem; }
  .alone > .plot { grid-area: 1 / 2 / span 2; }
}
.caption { margin: 0 0 .7rem; color: var(--soft); font-size: .88rem; line-height: 1.45; overflow-wrap: anywhere; }
.soft { color: var(--soft); font-size: .88rem; }
.command { margin: 0; }
.closer { margin: .75rem 0 0; }
.plot svg { display: block; width: 100%; height: auto; }
.plot svg text { font-family: inherit !important; }
.three { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); gap: .8rem; }
.two { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); gap: .8rem 1.6rem; }
.scroll + .two { margin-top: 1rem; }
.key { display: flex; flex-wrap: wrap; align-content: start; gap: .1rem 1.2rem; margin: 0 0 .7rem; padding: 0;
       font-size: .85rem; list-style: none; }
.key svg { width: 1.9rem; height: .6rem; margin-right: .4rem; vertical-align: middle; }
/* The first two hide the shades of the last two where there is nothing more to scroll to. */
.scroll { overflow-x: auto; background:
    linear-gradient(to right, var(--card) 40%, transparent) left / 1rem calc(100% + 2px) no-repeat local,
    linear-gradient(to left, var(--card) 40%, transparent) right / 1rem calc(100% + 2px) no-repeat local,
    linear-gradient(to right, var(--axis), transparent) left / .5rem 100% no-repeat,
    linear-gradient(to left, var(--axis), transparent) right / .5rem 100% no-repeat; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .34rem .8rem .34rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
         font-weight: normal; }
td:last-child, th:last-child { padding-right: 0; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: .85rem; line-height: 1.3; vertical-align: bottom; }
.numbers td:nth-child(2) { font-weight: 600; overflow-wrap: anywhere; }
.numbers td:nth-child(3) { color: var(--soft); font-size: .88rem; }
.figures { font-size: .92rem; }
.figures th[scope=row] { min-width: 12rem; overflow-wrap: anywhere; }
.figures td { white-space: nowrap; }
.signatures td { overflow-wrap: anywhere; }
.signatures th { white-space: nowrap; }
.figures .name { min-width: 14rem; white-space: normal; overflow-wrap: anywhere; }
.figures small, .signatures small { display: block; color: var(--soft); font-size: .8rem; line-height: 1.35; }
.multiples { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 9.5rem)); gap: .4rem .8rem;
             font-size: .8rem; line-height: 1.35; }
.multiples > code { grid-column: 1 / -1; margin-top: .5rem; font-weight: 600; overflow-wrap: anywhere; }
.multiples figure { margin: 0; }
.multiples img { display: block; width: 100%; aspect-ratio: 1; border: 1px solid var(--axis);
                 image-rendering: pixelated; }
.multiples svg { display: block; width: 100%; border-bottom: 1px solid var(--axis); }
.multiples figcaption, .multiples > span { color: var(--soft); }
.into { fill: var(--accent); fill-opacity: .35; stroke: none; }
.out { fill: none; stroke: var(--second); stroke-width: 1.5; vector-effect: non-scaling-stroke; }
.slider { margin: 0; padding: 0; border: 0; }
.slider label { display: inline-block; min-width: 2.6rem; margin: 0 .3rem .6rem 0; font-size: .8rem; text-align: center;
                cursor: pointer; }
.slider input { display: block; margin: 0 auto .1rem; accent-color: var(--accent); }
.slider .multiples { display: none; grid-template-columns: repeat(var(--columns), minmax(0, 18rem)); }
.scale { display: grid; grid-template-columns: 1fr auto 1fr; margin-top: 1rem; color: var(--soft);
         font-size: .8rem; }
.scale img { grid-column: 1 / -1; width: 100%; height: .6rem; }
.scale span:last-child { text-align: right; }
.texts { margin: 0; padding-left: 1.6rem; }
.texts li { margin: 0 0 .9rem; overflow-wrap: anywhere; break-inside: avoid; }
.texts p { margin: 0; white-space: pre-line; }
.texts strong { font-weight: 600; }
.short td:nth-child(2) { white-space: nowrap; }
.graph { min-width: 42rem; }
.nodes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); gap: 0 1.6rem; margin: 0;
         padding: 0; list-style: none; }
.nodes li { min-width: 0; overflow-wrap: anywhere; break-inside: avoid; }
.nodes p { margin: 0 0 .15rem; }
.context code, .pair code { white-space: pre-wrap; font-size: .8rem; }
mark { border-radius: 2px; background: color-mix(in srgb, var(--accent) 30%, transparent); color: inherit; }
pre { margin: .5rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .83rem; line-height: 1.45; }
pre span { display: inline-block; max-width: 100%; word-break: break-all; }
summary { margin-top: .8rem; cursor: pointer; font-weight: 600; }
@media (max-width: 34rem) {
  body { padding: 1.25rem .75rem 3rem; }
  .card { padding: .9rem .8rem; }
  .numbers tr { display: grid; grid-template: auto 1fr / 1fr 1fr; border-bottom: 1px solid var(--line); }
  .numbers th:first-child { grid-row: span 2; }
  .numbers tr:last-child { border-bottom: 0; }
  .numbers :is(td, th) { border-bottom: 0; }
  .numbers :is(td, th):nth-child(3) { grid-column: 2; padding-top: 0; overflow-wrap: anywhere; }
  .numbers td:nth-child(3):empty { display: none; }
  .figures .name { min-width: 6.5rem; }
  .figures th[scope=row] { min-width: 8rem; }
}
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #e3e7ea; --axis: #999; --accent: #0f766e;
          --second: #c2570c; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  .grid { grid-template-columns: 1fr 1fr; }
  .three { grid-template-columns: 1fr 1fr 1fr; }
  .two { grid-template-columns: 1fr 1fr; }
  .card { break-inside: avoid; }
  .wide:not(:has(.plot)) { break-inside: auto; }
  h2, .caption { break-after: avoid; }
  .scroll { overflow: visible; background: none; }
  .figures { font-size: .72rem; }
  .figures:has(th:nth-child(12)) { font-size: .58rem; }
  .figures td, .figures th { padding-right: .4rem; }
  .figures thead th { font-size: inherit; }
  .figures td { white-space: normal; overflow-wrap: anywhere; }
  .figures th[scope=row] { min-width: 5rem; }
  .figures .name { min-width: 0; }
  tr { break-inside: avoid; }
  .graph { min-width: 0; }
  details, .slider label, .closer { display: none; }
}
</style>
</head>
<body>
<header>
  <p class="status{{ ' failed' if failed }}">{{ status }}</p>
  <h1>{{ title }}</h1>
  <p class="verdict">{{ verdict | held }}</p>
  {% if note %}
  <p class="note">{{ note | held }}</p>
  {% endif %}
  {% if curves %}
  <p class="soft closer"><a href="{{ curves.name }}">Look closer at the curves</a>: values under the pointer, zoom,
    logarithmic axes.</p>
  {% endif %}
</header>
<main class="grid">
  {% for panel in panels %}
  <section class="card{{ ' wide' if panel.wide }}{{ ' alone' if loop.index0 in alone }}">
    <div>
      <h2>{{ panel.title }}</h2>
      {% if panel.caption %}
      <p class="caption">{{ panel.caption | held }}</p>
      {% endif %}
    </div>
    {{ panel.body }}
  </section>
  {% endfor %}
</main>
</body>
</html>
""")
