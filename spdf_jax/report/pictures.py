"""Of the page about a run: pictures of its masks, at named steps and at all that have some, and histograms of degrees."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from spdf_jax.report.draw import (
    DENSITY_COLOURS,
    DENSITY_NORM,
    INK,
    SOFT_INK,
    SPARSE,
    Plot,
    Table,
    histogram_path,
    new_figure,
    png_uri,
    some,
)
from spdf_jax.report.page import Panel, template
from spdf_jax.report.records import Degrees, Run
from spdf_jax.report.words import percent, short_name

T = TypeVar("T")

_MAX_PICTURED_LEAVES, _MAX_BINS = 3, 20
# Pictures of matrices that are as sparse differ by this much: a pixel's share counts alike where its block is smaller.
_AS_SPARSE = 1.02


def mask_pictures(run: Run) -> Panel | None:
    """Small pictures of a few masks, at the start, where sparsest and at the end; None without masks."""
    found = _multiples(run, run.pictures, np.mean, _picture)
    if found is None:
        return None
    scale = _SCALE.render(scale=png_uri(np.linspace(0, 1, 256)[np.newaxis] ** 2))
    chosen = f"{len(found.leaves)} of {found.leaf_count}"
    caption = f"{chosen} recorded matrices, shrunk: a pixel is the share of weights present in its block."

    def plot(axes: Axes, image: np.ndarray) -> None:
        axes.imshow(DENSITY_COLOURS(DENSITY_NORM(image)), interpolation="nearest", aspect="auto")

    shares = [
        (leaf, step, float(image.mean())) for step, of_step in run.pictures.items() for leaf, image in of_step.items()
    ]
    table = Table(("matrix", "step", "share of weights present"), shares)
    plots = (Plot("masks", _grid(found, run.pictures, plot), "masks", table),)
    return Panel("Masks", Markup(found.html + scale), caption, plots=plots)


def masks_by_step(run: Run) -> Panel | None:
    """Pictures of the same masks at every step that has some, of which the page shows one; None where there are no others."""
    recorded = {step: found for step, found in run.pictures.items() if found}
    if run.max_sparsity <= 0 or not recorded or len(recorded) <= len(_named_steps(run, _density(recorded, np.mean))):
        return None
    leaves = some(list(recorded[max(recorded, key=lambda step: len(recorded[step]))]), _MAX_PICTURED_LEAVES)
    steps = [
        {"step": step, "cells": [(short_name(leaf), _picture(leaf, found[leaf])) for leaf in leaves if leaf in found]}
        for step, found in sorted(recorded.items())
    ]
    caption = "The masks of one step at a time: choose it by its number or, once one is chosen, by the arrow keys."
    return Panel("Masks by step", Markup(_BY_STEP.render(steps=steps, columns=len(leaves))), caption, wide=True)


# A slider of radio buttons, which need no script: a rule a step shows the masks whose button is checked.
_BY_STEP = template("""\
<fieldset class="slider" aria-label="masks by step" style="--columns: {{ columns }}">
  {% for one in steps %}
  <label><input type="radio" name="mask-step" value="{{ loop.index }}"{{ " checked" if loop.last }}>
    <span>{{ "{:,}".format(one.step) }}</span></label>
  {% endfor %}
  {% for one in steps %}
  <div class="multiples" data-step="{{ loop.index }}">
    {% for name, cell in one.cells %}
    <figure>{{ cell.body }}<figcaption>{{ name }}, step {{ "{:,}".format(one.step) }}: {{ cell.caption }}</figcaption></figure>
    {% endfor %}
  </div>
  {% endfor %}
</fieldset>
<style>
{% for one in steps %}
.slider:has(input[value="{{ loop.index }}"]:checked) > [data-step="{{ loop.index }}"] { display: grid; }
{% endfor %}
</style>
""")


def mask_degrees(run: Run) -> Panel | None:
    """Small histograms of the connections of each neuron, for a few masks at the same steps; None without masks."""
    found = _multiples(run, run.degrees, lambda pair: pair[0].mean() / len(pair[1]), _histograms)
    if found is None:
        return None
    caption = (
        "Filled: connections into each output. Line: connections out of each input. From the fewest (left) to the most"
        f" (right) of either; a wide spread means hubs.{_without_any(run.degrees)}"
    )

    def plot(axes: Axes, degrees: Degrees) -> None:
        shares, edges = _shares(degrees)
        counts = (np.histogram(share, edges)[0] for share in shares)
        into, out = (count / max(count.max(), 1) for count in counts)  # each as high as the other, as on the page
        axes.stairs(into, edges, fill=True, color=SPARSE, alpha=0.35)
        axes.stairs(out, edges, color=INK)

    counts = [
        (leaf, step, side, int(connections), int(count))
        for step, of_step in run.degrees.items()
        for leaf, both in of_step.items()
        for side, degrees in zip(("output", "input"), both, strict=True)
        for connections, count in zip(*np.unique(degrees, return_counts=True), strict=True)
    ]
    table = Table(("matrix", "step", "of each", "connections", "how many have so many"), counts)
    plots = (Plot("degrees", _grid(found, run.degrees, plot), "degrees", table),)
    return Panel("Degrees", Markup(found.html), caption, plots=plots)


class _Multiples(NamedTuple):
    """A few matrices down and named steps across, as HTML; of how many matrices they are."""

    html: str
    leaves: Sequence[str]
    columns: Mapping[int, str]
    leaf_count: int


def _grid(of: _Multiples, recorded: Mapping[int, Mapping[str, T]], draw: Callable[[Axes, T], None]) -> Figure:
    """The same as a figure."""
    figure, _ = new_figure(height_inches=0.4 + 1.4 * len(of.leaves), width_inches=0.4 + 1.6 * len(of.columns))
    figure.clear()
    every = figure.subplots(len(of.leaves), len(of.columns), squeeze=False)
    for leaf, row in zip(of.leaves, every, strict=True):
        row[0].set_ylabel(short_name(leaf))
        for step, axes in zip(of.columns, row, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.grid(False)
            axes.spines[:].set_visible(False)
            if leaf in recorded[step]:
                draw(axes, recorded[step][leaf])
    for axes, name in zip(every[0], of.columns.values(), strict=True):
        axes.set_title(name, fontsize=8.5, color=SOFT_INK)
    return figure


def _multiples(
    run: Run,
    recorded: Mapping[int, Mapping[str, T]],
    density_of: Callable[[T], Any],
    draw: Callable[[str, T], dict[str, Markup]],
) -> _Multiples | None:
    """None without masks."""
    recorded = {step: found for step, found in recorded.items() if found}
    if not recorded or run.max_sparsity <= 0:
        return None
    density = _density(recorded, density_of)
    columns, leaves = _named_steps(run, density), list(recorded[min(density, key=density.__getitem__)])
    chosen = some(leaves, _MAX_PICTURED_LEAVES)
    rows = [
        (short_name(leaf), [draw(leaf, recorded[step][leaf]) if leaf in recorded[step] else None for step in columns])
        for leaf in chosen
    ]
    return _Multiples(_MULTIPLES.render(columns=columns.values(), rows=rows), chosen, columns, len(leaves))


def _density(recorded: Mapping[int, Mapping[str, T]], density_of: Callable[[T], Any]) -> dict[int, float]:
    """The mean over all matrices, by step."""
    return {step: float(np.mean([density_of(one) for one in found.values()])) for step, found in recorded.items()}


def _without_any(degrees: Mapping[int, Mapping[str, Degrees]]) -> str:
    """How many inputs and outputs of each matrix have no weight left, at the step with the most; "" where all have some."""
    found, tokens = [], False
    for leaf in dict.fromkeys(leaf for of_step in degrees.values() for leaf in of_step):
        for side, plain, token_leaf in ((0, "outputs", "head/"), (1, "inputs", "wte/")):
            missing = {step: pairs[leaf][side] == 0 for step, pairs in degrees.items() if leaf in pairs}
            step = max(missing, key=lambda step: missing[step].sum())
            count, total, of_tokens = int(missing[step].sum()), missing[step].size, leaf.startswith(token_leaf)
            kind = "tokens" if of_tokens else plain
            found += [f"{count:,} of {total:,} {kind} of {short_name(leaf)} (step {step:,})"] if count else []
            tokens |= of_tokens and count > 0
    what = " A token without any weight has no embedding (head tied) and the logit 0." if tokens else ""
    return f" Without any weight, at the step with the most: {'; '.join(found)}.{what}" if found else ""


def _named_steps(run: Run, density: Mapping[int, float]) -> dict[int, str]:
    """Start, sparsest (where that changes) and end among the steps; one step is shown once, under all its names."""
    steps, least = sorted(density), min(density.values())
    sparsest = next(step for step in steps if density[step] <= _AS_SPARSE * least)
    last = "end" if run.is_finished and steps[-1] == run.numbers.get("steps") else "last"
    named = [("start", steps[0]), ("sparsest", sparsest), (last, steps[-1])]
    if max(density.values()) <= _AS_SPARSE * least:
        del named[1]
    names: dict[int, list[str]] = {}
    for name, step in named:
        names.setdefault(step, []).append(name)
    return {step: f"{' and '.join(names[step])}, step {step:,}" for step in sorted(names)}


def _picture(leaf: str, image: np.ndarray) -> dict[str, Markup]:
    """A mask, and its density."""
    body = Markup('<img src="{}" alt="mask of {}">').format(png_uri(image), short_name(leaf))
    return {"body": body, "caption": Markup(f"{percent(float(image.mean()))} present")}


def _histograms(leaf: str, degrees: Degrees) -> dict[str, Markup]:
    """In- and out-degrees as shares of those possible, over the same bins."""
    into, out = degrees
    shares, edges = _shares(degrees)
    paths = [
        Markup(f'<path class="{name}" d="{histogram_path(share, edges, 100, 75)}"/>')
        for name, share in zip(("into", "out"), shares, strict=True)
    ]
    body = Markup('<svg viewBox="0 -1 100 77" preserveAspectRatio="none" role="img" aria-label="degrees">{}{}</svg>')
    lines = [f"{name} {_range(d)} of {most:,}" for name, d, most in (("in", into, len(out)), ("out", out, len(into)))]
    unconnected = int((into == 0).sum() + (out == 0).sum())
    lines += [f"{unconnected:,} without any"] if unconnected else []
    return {"body": body.format(*paths), "caption": Markup("<br>".join(lines))}


def _shares(degrees: Degrees) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """In- and out-degrees as shares of those possible, and the edges of bins for both."""
    into, out = degrees
    shares = into / len(out), out / len(into)
    low, high = min(map(np.min, shares)), max(map(np.max, shares))
    # Bins hold as many possible degrees each, or there would be gaps that no neuron made.
    spacing = 1 / min(len(into), len(out))
    degrees_in_all = math.ceil((high - low) / spacing) + 1
    degrees_in_one = math.ceil(degrees_in_all / _MAX_BINS)
    bin_count = math.ceil(degrees_in_all / degrees_in_one)
    edges = low + spacing * (degrees_in_one * np.arange(bin_count + 1) - 0.5)
    return shares, edges


def _range(degrees: np.ndarray) -> str:
    low, high = int(degrees.min()), int(degrees.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


_MULTIPLES = template("""\
<div class="multiples" style="--columns: {{ columns | length }}">
  {% for column in columns %}
  <span>{{ column | held }}</span>
  {% endfor %}
  {% for name, cells in rows %}
  <code>{{ name }}</code>
  {% for cell in cells %}
  {% if cell %}
  <figure>
    {{ cell.body }}
    <figcaption>{{ cell.caption }}</figcaption>
  </figure>
  {% else %}
  <span>not recorded</span>
  {% endif %}
  {% endfor %}
  {% endfor %}
</div>
""")


_SCALE = template("""\
<div class="scale"><img src="{{ scale }}" alt=""><span>0 %</span><span>25 %</span><span>100 % present</span></div>
""")
