"""Of the page about a run: sparsity, churn and density over steps."""

import numpy as np

from spdf_jax.report.draw import (
    DENSITY_COLOURS,
    DENSITY_NORM,
    SPARSE,
    Plot,
    Table,
    cell_edges,
    column,
    legend,
    mark_phases,
    new_figure,
    steps_along,
    thinned,
)
from spdf_jax.report.page import Panel, plot_panel
from spdf_jax.report.records import Run
from spdf_jax.report.words import count_tick, percent, short_name


def sparsity_by_step(run: Run) -> Panel | None:
    """Sparsity over steps; None for a run without masks or steps."""
    if run.max_sparsity <= 0 or run.all_rows[-1]["step"] == 0:
        return None
    figure, axes = new_figure()
    steps, sparsities_percent = (thinned(column(run.all_rows, key)) for key in ("step", "sparsity"))
    sparsities_percent = 100 * sparsities_percent
    # A row says what its step computed with, so a value holds back to the row before.
    axes.step(steps, sparsities_percent, where="pre", color=SPARSE, linewidth=1.6)
    axes.fill_between(steps, sparsities_percent, step="pre", color=SPARSE, alpha=0.14, linewidth=0)
    axes.set(ylabel="sparsity (%)", ylim=(0, 105))
    steps_along(axes)
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
    axes.set(ylabel="new connections (%)", ylim=(0, None))
    steps_along(axes)
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
    steps_along(axes)
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
