"""`curves.html`: the curves of a page to look closer at, with values under the pointer, zoom and logarithmic axes.
A name in the key, clicked, hides its line.

Drawn by Bokeh, which the extra `interactive` brings; its script is in the file, which loads nothing. It is a file of its own:
the page itself has no script, and stays small.
"""

import importlib.util
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.lines import Line2D

from spdf_jax.report.draw import Plot
from spdf_jax.report.page import Panel
from spdf_jax.workdir import write_atomically

CURVES_FILE = "curves.html"
_SCALES = {"linear": ("linear", "linear"), "logarithmic x": ("log", "linear"), "logarithmic x and y": ("log", "log")}
_WIDTH_PIXELS, _HEIGHT_PIXELS, _KEY_LINE_PIXELS = 620, 420, 26


def write_curves(folder: Path, title: str, panels: Sequence[Panel]) -> Path | None:
    """Writes `curves.html`, atomically.

    Args:
      folder: to write into.
      title: of the page.
      panels: of it; what they draw as lines is shown.

    Returns:
      The path; None where Bokeh is not installed, or nothing is drawn as lines.
    """
    plots = [plot for panel in panels for plot in panel.plots if _lines(plot.figure.axes[0])]
    if not plots or importlib.util.find_spec("bokeh") is None:
        return None
    from bokeh.embed import file_html
    from bokeh.layouts import column, row
    from bokeh.models import TabPanel, Tabs
    from bokeh.resources import Resources

    shown = [Tabs(tabs=[TabPanel(child=_drawn(plot, *axes), title=n) for n, axes in _SCALES.items()]) for plot in plots]
    pairs = column(*(row(*shown[i : i + 2]) for i in range(0, len(shown), 2)))
    page = file_html(pairs, Resources(mode="inline"), title)
    write_atomically(folder / CURVES_FILE, page.encode())
    return folder / CURVES_FILE


def _lines(axes: Axes) -> list[Line2D]:
    """What is drawn from point to point, marks across the figure left out."""
    return [
        line
        for line in axes.get_lines()
        if line.get_transform() == axes.transData and line.get_linestyle() != "None" and len(line.get_xdata()) > 1  # type: ignore[arg-type]
    ]


def _drawn(plot: Plot, x_scale: Any, y_scale: Any) -> Any:
    """The lines of a figure, by Bokeh."""
    from bokeh.plotting import figure

    axes = plot.figure.axes[0]
    tooltips = [("line", "$name"), (axes.get_xlabel(), "@x{0,0.[0000]}"), (axes.get_ylabel(), "@y{0.[0000]}")]
    drawn = figure(
        title=plot.description,
        x_axis_type=x_scale,
        y_axis_type=y_scale,
        x_axis_label=axes.get_xlabel(),
        y_axis_label=axes.get_ylabel(),
        width=_WIDTH_PIXELS,
        height=_HEIGHT_PIXELS,
        tools="pan,wheel_zoom,box_zoom,reset,save,hover",
        active_scroll="wheel_zoom",
        tooltips=tooltips,
        output_backend="canvas",
    )
    for line in _lines(axes):
        x, y = (np.asarray(values, float) for values in (line.get_xdata(), line.get_ydata()))
        positive = ((x > 0) | (x_scale == "linear")) & ((y > 0) | (y_scale == "linear"))
        name = str(line.get_label())
        how: dict[str, Any] = {
            "name": "" if name.startswith("_") else name,
            "color": to_hex(line.get_color()),
            "alpha": line.get_alpha() or 1,
        }
        named = {"legend_label": how["name"]} if how["name"] else {}
        draw = partial(drawn.step, mode="before") if line.get_drawstyle() == "steps-pre" else drawn.line
        draw(x[positive], y[positive], line_width=1.5, **how, **named)
        if line.get_marker() not in ("", "None", None):
            drawn.scatter(x[positive], y[positive], size=6, **how)
    if drawn.legend:
        key = drawn.legend[0]
        key.ncols, key.click_policy, key.location, key.border_line_color = 2, "hide", "left", None
        drawn.add_layout(key, "below")
        drawn.height = _HEIGHT_PIXELS + _KEY_LINE_PIXELS * math.ceil(len(key.items) / key.ncols)
    return drawn
