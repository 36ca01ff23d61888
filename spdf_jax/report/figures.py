"""`figures/`: what a page shows, for papers. Every figure as SVG and PNG in its own colours, every figure and table as CSV."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path

from spdf_jax.report.draw import Table
from spdf_jax.report.page import Panel
from spdf_jax.workdir import FIGURES_FOLDER, write_atomically


def write_figures(folder: Path, panels: Sequence[Panel]) -> list[Path]:
    """Writes the files of all panels into `figures/`, each atomically.

    Args:
      folder: in which `figures/` is, or is made.
      panels: of the page.

    Returns:
      The paths of the files.
    """
    files: dict[str, bytes] = {}
    for panel in panels:
        if panel.table is not None:
            files[f"{file_name(panel.title)}.csv"] = csv_text(panel.table).encode()
        for plot in panel.plots:
            name = file_name(plot.name)
            files[f"{name}.svg"], files[f"{name}.png"] = plot.document.encode(), plot.png
            files[f"{name}.csv"] = csv_text(plot.table).encode()
    (folder / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    paths = [folder / FIGURES_FOLDER / name for name in files]
    for path, content in zip(paths, files.values(), strict=True):
        write_atomically(path, content)
    return paths


def file_name(title: str) -> str:
    """Of a figure, or of the table of a panel.

    >>> file_name("Loss over steps: text, 2:4")
    'loss_over_steps_text_2_4'
    """
    return re.sub(r"\W+", "_", title.lower()).strip("_")[:100]


def csv_text(table: Table) -> str:
    """A table as CSV: numbers in full, in no unit but what the header says.

    >>> csv_text(Table(["run", "loss"], [["a, b", 0.125], ["c", None]]))
    'run,loss\\n"a, b",0.125\\nc,\\n'
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table.header)
    writer.writerows([cell.item() if hasattr(cell, "item") else cell for cell in row] for row in table.rows)
    return buffer.getvalue()
