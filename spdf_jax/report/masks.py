"""Of the page about a run: sparsity, churn and density over steps, pictures of masks, and histograms of degrees."""

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup

from spdf_jax.report.draw import (
    DENSITY_COLOURS,
    DENSITY_NORM,
    SPARSE,
    Plot,
    Table,
    cell_edges,
    column,
    histogram_path,
    legend,
    mark_phases,
    new_figure,
    png_uri,
    some,
    thinned,
)
from spdf_jax.report.page import Panel, plot_panel, template
from spdf_jax.report.records import Degrees, Run
from spdf_jax.report.words import count_tick, percent, short_name

T = TypeVar("T")

_MAX_PICTURED_LEAVES, _MAX_BINS = 3, 20


def sparsity_by_step(run: Run) -> Panel | None:
    """Sparsity over steps; None for a run without masks."""
    if run.max_sparsity <= 0:
        return None
    figure, axes = new_figure()
    steps, sparsities_percent = (thinned(column(run.all_rows, key)) for key in ("step", "sparsity"))
    sparsities_percent = 100 * sparsities_percent
    # A row says what its step computed with, so a value holds back to the row before.
    axes.step(steps, sparsities_percent, where="pre", color=SPARSE, linewidth=1.6)
    axes.fill_between(steps, sparsities_percent, step="pre", color=SPARSE, alpha=0.14, linewidth=0)
    axes.set(xlabel="step", ylabel="sparsity (%)", ylim=(0, 105))
    mark_phases(axes, run.all_rows)
    axes.xaxis.set_major_formatter(count_tick)
    caption = f"Share of the maskable weights that are zero; highest {percent(run.max_sparsity)}."
    table = Table(("step", "sparsity"), [(row["step"], row["sparsity"]) for row in run.all_rows])
    plot = Plot("sparsity over steps", figure, "sparsity against steps", table)
    return plot_panel("Sparsity over steps", plot, caption)


def churn_by_step(run: Run) -> Panel | None:
    """The share of new connections at each topology step; None where no topology step recorded any."""
    rows = [row for row in run.topology_rows if row.get("churn")]
    if not rows:
        return None
    steps = [row["step"] for row in rows]
    churns_percent = [100 * np.concatenate([np.atleast_1d(v) for v in row["churn"].values()]) for row in rows]
    lows, means, highs = (np.array([reduce(churn) for churn in churns_percent]) for reduce in (np.min, np.mean, np.max))
    figure, axes = new_figure()
    axes.fill_between(steps, lows, highs, color=SPARSE, alpha=0.16, linewidth=0, label="lowest to highest matrix")
    axes.plot(steps, means, color=SPARSE, linewidth=1.4, marker="o", markersize=2.5, label="mean over matrices")
    axes.set(xlabel="step", ylabel="new connections (%)", ylim=(0, None))
    axes.xaxis.set_major_formatter(count_tick)
    legend(figure)
    caption = "Of the connections after each topology step, the share that was not there before it."
    table = Table(("step", "lowest (%)", "mean (%)", "highest (%)"), list(zip(steps, lows, means, highs, strict=True)))
    plot = Plot("churn over steps", figure, "churn against steps", table)
    return plot_panel("Churn over steps", plot, caption)


def density_by_layer(run: Run) -> Panel | None:
    """The density of every matrix at each topology step, as a heatmap; None without topology steps."""
    if not run.topology_rows:
        return None
    steps = [row["step"] for row in run.topology_rows]
    # A leaf seen at any step gets its band; where a step does not name it, it is dense.
    layer_counts = {leaf: np.size(d) for row in run.topology_rows for leaf, d in row["density"].items()}
    columns = [
        np.concatenate([np.broadcast_to(row["density"].get(leaf, 1.0), n) for leaf, n in layer_counts.items()])
        for row in run.topology_rows
    ]
    bands = np.cumsum([0, *layer_counts.values()])
    figure, axes = new_figure(height_inches=float(np.clip(0.8 + 0.24 * bands[-1], 2.6, 3.4)))
    image = axes.pcolormesh(
        cell_edges(steps),
        np.arange(bands[-1] + 1),
        np.stack(columns, axis=1),
        cmap=DENSITY_COLOURS,
        norm=DENSITY_NORM,
        rasterized=True,
    )
    axes.hlines(bands[1:-1], *axes.get_xlim(), color="white", linewidth=1.5)
    axes.set_yticks((bands[:-1] + bands[1:]) / 2, [short_name(leaf) for leaf in layer_counts])
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(xlabel="step")
    axes.xaxis.set_major_formatter(count_tick)
    bar = figure.colorbar(
        image, ax=axes, label="density (%)", ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], aspect=30, pad=0.02
    )
    bar.ax.set_yticklabels(["0", "1", "5", "10", "25", "50", "100"])
    bar.outline.set_visible(False)
    caption = "Share of weights present, at each topology step. Each band is one weight matrix, its first layer on top."
    names = [f"{leaf}/{i}" if n > 1 else leaf for leaf, n in layer_counts.items() for i in range(n)]
    table = Table(("step", *names), [(step, *densities) for step, densities in zip(steps, columns, strict=True)])
    plot = Plot("density by layer", figure, "density of each layer against steps", table)
    return plot_panel("Density by layer", plot, caption)


def mask_pictures(run: Run) -> Panel | None:
    """Small pictures of a few masks, at the start, where sparsest and at the end; None without masks."""
    found = _multiples(run, run.pictures, np.mean, _picture)
    if found is None:
        return None
    multiples, some_of_all = found
    scale = _SCALE.render(scale=png_uri(np.linspace(0, 1, 256)[np.newaxis] ** 2))
    caption = f"{some_of_all} recorded matrices, shrunk: a pixel is the share of weights present in its block."
    return Panel("Masks", Markup(multiples + scale), caption)


def masks_by_step(run: Run) -> Panel | None:
    """Pictures of the same masks at every step that has some, of which the page shows one; None where there are no others."""
    recorded = {step: found for step, found in run.pictures.items() if found}
    if run.max_sparsity <= 0 or len(recorded) <= len(_named_steps(run, _density(recorded, np.mean))):
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
<fieldset class="slider" style="--columns: {{ columns }}">
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
    return Panel("Degrees", Markup(found[0]), caption)


def _multiples(
    run: Run,
    recorded: Mapping[int, Mapping[str, T]],
    density_of: Callable[[T], Any],
    draw: Callable[[str, T], dict[str, Markup]],
) -> tuple[str, str] | None:
    """A few matrices down and named steps across, as HTML, and "how many of how many"; None without masks."""
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
    return _MULTIPLES.render(columns=columns.values(), rows=rows), f"{len(chosen)} of {len(leaves)}"


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
    steps, sparsest = sorted(density), min(sorted(density), key=density.__getitem__)
    last = "end" if steps[-1] == run.numbers.get("steps") else "last"
    named = [("start", steps[0]), ("sparsest", sparsest), (last, steps[-1])]
    if density[sparsest] == max(density.values()):
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
    shares = into / len(out), out / len(into)
    low, high = min(map(np.min, shares)), max(map(np.max, shares))
    # Bins hold as many possible degrees each, or there would be gaps that no neuron made.
    spacing = 1 / min(len(into), len(out))
    degrees_in_all = math.ceil((high - low) / spacing) + 1
    degrees_in_one = math.ceil(degrees_in_all / _MAX_BINS)
    bin_count = math.ceil(degrees_in_all / degrees_in_one)
    edges = low + spacing * (degrees_in_one * np.arange(bin_count + 1) - 0.5)
    paths = [
        Markup(f'<path class="{name}" d="{histogram_path(share, edges, 100, 75)}"/>')
        for name, share in zip(("into", "out"), shares, strict=True)
    ]
    body = Markup('<svg viewBox="0 -1 100 77" preserveAspectRatio="none" role="img" aria-label="degrees">{}{}</svg>')
    lines = [f"{name} {_range(d)} of {most:,}" for name, d, most in (("in", into, len(out)), ("out", out, len(into)))]
    unconnected = int((into == 0).sum() + (out == 0).sum())
    lines += [f"{unconnected:,} without any"] if unconnected else []
    return {"body": body.format(*paths), "caption": Markup("<br>".join(lines))}


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
