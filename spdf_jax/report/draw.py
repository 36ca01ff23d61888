"""Figures: as inline SVG in the page's colours, and as files in their own."""

import base64
import contextlib
import io
import math
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from spdf_jax.report.records import Row
from spdf_jax.report.words import clipped

T = TypeVar("T")

SPARSE, DENSE, INK, SOFT_INK = "#0f766e", "#8a94a0", "#1f2933", "#52606d"
_AXIS, _GRID, _GROUND = "#c5ccd3", "#e6eaed", "#ffffff"
#: Lines of a sweep: each stands out by 3:1 or more on the light page and on the dark one.
SERIES = ("#7b8794", "#3b82c4", "#d9730d", "#2e9e5b", "#d64545", "#8e63ce", "#a0703c", "#d0579a")
#: Beyond the colours, lines repeat them dashed: matplotlib's pattern, in points.
DASHES: tuple[tuple[float, ...], ...] = ((), (4, 2), (1, 1.5), (6, 2, 1, 2))
# The page decides what these are, so that figures follow its light or dark scheme.
_THEME = {
    SPARSE: "var(--accent)",
    INK: "var(--ink)",
    SOFT_INK: "var(--soft)",
    _AXIS: "var(--axis)",
    _GRID: "var(--line)",
    _GROUND: "var(--card)",
}
DENSITY_COLOURS = LinearSegmentedColormap.from_list("density", ["#f1f5f4", "#5fb3a9", "#0f766e", "#07433e"])
# Densities of interest are small: the square root spreads 1 % to 10 % over a quarter of the colours.
DENSITY_NORM = PowerNorm(0.5, vmin=0, vmax=1)
STYLE: dict[Any, Any] = {
    "axes.edgecolor": _AXIS,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.fontsize": 8.5,
    "legend.edgecolor": "none",
    "legend.facecolor": _GROUND,
    "legend.framealpha": 0.85,
    "svg.fonttype": "none",  # text stays text: small, selectable, in the page's own typeface
    "text.color": INK,
    "text.parse_math": False,  # names come from configs and may hold dollar signs
    "xtick.color": SOFT_INK,
    "ytick.color": SOFT_INK,
}
MAX_LINE_POINTS = 600
_DPI = 200  # pixels an inch
_KEY_CHARACTERS, _KEY_LINE_INCHES = 40, 0.17


def new_figure(height_inches: float = 2.9, width_inches: float = 4.2) -> tuple[Figure, Axes]:
    """A figure small enough that its text is still readable at a phone's width."""
    figure = Figure(figsize=(width_inches, height_inches))
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def steps_along(axes: Axes) -> None:
    """Steps along x, numbered at whole ones."""
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))


def legend(figure: Figure) -> None:
    """The key, above the axes: inside them it would cover lines or shades."""
    figure.legend(loc="outside upper left", ncols=2, borderpad=0)


def mark_phases(axes: Axes, rows: Sequence[Row]) -> None:
    """Names of the phases of rows by step, above the axes, and a line at each change; nothing for one phase."""
    # A phase's first row comes after its first step; it begins where the one before was last seen.
    seen: dict[str, list[int]] = {}
    for row in rows:
        seen.setdefault(clipped(row["phase"]), []).append(row["step"])
    if len(seen) < 2:
        return
    starts = dict(zip(seen, [0, *(steps[-1] for steps in seen.values())], strict=False))
    left, right = axes.get_xlim()
    level_ends = [-math.inf] * len(starts)
    for name, step in starts.items():
        if step > 0:
            axes.axvline(step, color=INK, linewidth=0.8, linestyle="--")
        # A name begins with its phase, unless it would run out of the figure; one with no room goes a line higher.
        width = 0.02 * len(name)
        position = max(min((step - left) / (right - left), 1 - width), 0.0)
        level = next(level for level, end in enumerate(level_ends) if end <= position)
        level_ends[level] = position + width
        axes.text(position, 1.02 + 0.06 * level, name, transform=axes.transAxes, fontsize=8.5, color=SOFT_INK)
    axes.set_xlim(left, right)


class Table(NamedTuple):
    """Numbers and names by row, for CSV; None for what is absent."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Plot:
    """A figure: the name of its files, what it shows in words, and the numbers that it shows.

    `key` is what a page says once for several figures, and each of their files by itself.
    """

    name: str
    figure: Figure
    description: str
    table: Table
    key: Sequence[Line2D] = ()

    @cached_property
    def svg(self) -> str:
        """An SVG element in colours of its own."""
        return self._svg()

    def _svg(self) -> str:
        buffer = io.StringIO()
        # Ids hash the salt and what they name, so the same figure gives the same bytes and two figures never clash.
        with matplotlib.rc_context({"svg.hashsalt": self.description}):
            self.figure.savefig(buffer, format="svg", dpi=_DPI, metadata={"Date": None})
        text = buffer.getvalue()
        return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)

    @property
    def png(self) -> bytes:
        """A picture on white."""
        buffer = io.BytesIO()
        with self._with_key():
            self.figure.savefig(buffer, format="png", dpi=_DPI, facecolor=_GROUND, metadata={"Software": None})
        return buffer.getvalue()

    @property
    def inline(self) -> Markup:
        """The SVG in the page's colours; it can stand beside others, of other descriptions, in one page."""
        text = re.sub(r'<g id="[^"]*">', "<g>", self.svg)
        for colour, name in _THEME.items():
            text = re.sub(rf"(?<=: ){colour}\b", name, text)
        head, body = text.split(">", 1)
        head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page decides; the viewBox keeps the proportions
        return Markup(f'<div class="plot">{head} role="img" aria-label="{escape(self.description)}">{body}</div>')

    @property
    def document(self) -> str:
        """The SVG as a file, on white."""
        with self._with_key():
            head, body = (self._svg() if self.key else self.svg).split(">", 1)
        return (
            f'<?xml version="1.0" encoding="utf-8"?>\n{head}><rect width="100%" height="100%" fill="{_GROUND}"/>{body}'
        )

    @contextlib.contextmanager
    def _with_key(self) -> Iterator[None]:
        """The figure higher by its key."""
        if not self.key:
            yield
            return
        labels = [textwrap.fill(str(line.get_label()), _KEY_CHARACTERS) for line in self.key]
        height, lines = self.figure.get_figheight(), sum(label.count("\n") + 1 for label in labels)
        drawn = self.figure.legend(self.key, labels, loc="outside upper left", borderpad=0, handlelength=3)
        self.figure.set_figheight(height + _KEY_LINE_INCHES * lines)
        try:
            yield
        finally:
            drawn.remove()
            self.figure.set_figheight(height)


def png_uri(density: np.ndarray) -> str:
    """A density image as a PNG data URI."""
    buffer = io.BytesIO()
    imsave(buffer, DENSITY_COLOURS(DENSITY_NORM(density)), format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def histogram_path(values: np.ndarray, edges: np.ndarray, width: float, height: float) -> str:
    """The outline of a histogram as the `d` of an SVG path, as high as the box at its highest bin.

    >>> histogram_path(np.array([0.5, 1.5, 1.6]), np.array([0, 1, 2]), 10, 8)
    'M0,8V4H5V0H10V8'
    """
    counts = np.histogram(values, edges)[0]
    heights = height * (1 - counts / max(counts.max(), 1))
    rights = np.linspace(0, width, len(counts) + 1)[1:]
    return (
        f"M0,{height:g}" + "".join(f"V{y:.4g}H{x:.4g}" for x, y in zip(rights, heights, strict=True)) + f"V{height:g}"
    )


def thinned(values: Sequence[float] | np.ndarray) -> np.ndarray:
    """The values, as means of equal runs of them where there are more than a line can show."""
    values = np.asarray(values, float)
    run_length = math.ceil(len(values) / MAX_LINE_POINTS)
    if run_length <= 1:
        return values
    starts = np.arange(0, len(values), run_length)
    return np.add.reduceat(values, starts) / np.diff(np.append(starts, len(values)))


def some(items: Sequence[T], most: int) -> list[T]:
    """At most so many items, evenly spread.

    >>> some("abcde", 3)
    ['a', 'c', 'e']
    """
    indices = np.unique(np.linspace(0, len(items) - 1, min(len(items), most)).round().astype(int))
    return [items[i] for i in indices]


def column(rows: Sequence[Row], key: str) -> np.ndarray:
    """A column of the rows."""
    return np.array([row[key] for row in rows], float)


def cell_edges(steps: Sequence[int]) -> np.ndarray:
    """Edges between the columns of a heatmap: each reaches to the next step, the last as far as the one before.

    >>> cell_edges([0, 10, 30])
    array([ 0., 10., 30., 50.])
    """
    last_width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return np.array([*steps, steps[-1] + max(last_width, 1)], float)
