"""The page about a sweep: its verdict and command, and the order of all panels."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib

from spdf_jax.cloud.spool import located
from spdf_jax.report.closer import write_curves
from spdf_jax.report.draw import STYLE
from spdf_jax.report.figures import write_figures
from spdf_jax.report.page import Panel, command_panel, write_page
from spdf_jax.report.sweep_cells import cells, signatures
from spdf_jax.report.sweep_circuits import answers, circuits
from spdf_jax.report.sweep_curves import curves
from spdf_jax.report.sweep_records import Sweep, read_sweep
from spdf_jax.report.sweep_table import main_charts, results
from spdf_jax.report.words import (
    COUNT_UNITS,
    COUNTED_NOTE,
    capitalised,
    duration,
    figure_text,
    quantity,
    target_name,
    when,
)
from spdf_jax.training.provenance import now


def write_sweep_report(
    workdir: Path, output: Path | None = None, *, running: bool | None = None, figures: bool = True
) -> Path:
    """Writes a sweep's `report.html` and `figures/`, atomically, from what its cells have recorded so far.

    Args:
      workdir: the sweep's folder; needs one cell that has begun, and shows the table once there is one.
      output: the folder to write into, by default `workdir`.
      running: whether the sweep is under way; by default its lock tells.
      figures: whether to write `figures/`, see `spdf_jax.report.figures`.

    Returns:
      The path of the page.

    Raises:
      InputError: the folder holds no cell that has begun, or a file in it cannot be read.
    """
    workdir, folder = located(workdir), located(output or workdir)
    sweep = read_sweep(workdir, running, beside=folder)
    with matplotlib.rc_context(STYLE):
        panels = [panel for make in _PANELS for panel in make(sweep)]
        if figures:
            write_figures(folder, panels)
    return write_page(
        folder / "report.html",
        title=sweep.title,
        status=f"{sweep.name}, {_status(sweep)}",
        verdict=verdict(sweep),
        note=" ".join(filter(None, [sweep.remark, _what_ran(sweep), _counted(sweep)])),
        panels=panels,
        curves=write_curves(folder, sweep.title, panels) if figures else None,
    )


def _counted(sweep: Sweep) -> str:
    return COUNTED_NOTE if any(run.max_sparsity for run in sweep.cells.values()) else ""


def _status(sweep: Sweep) -> str:
    if sweep.is_finished:
        return "finished"
    finished = sum(run.is_finished for run in sweep.cells.values())
    state = {True: "running", False: "interrupted", None: "unfinished"}[sweep.running]
    again = "; the same command goes on" if sweep.running is False else ""
    return f"{state}: {finished} of the {len(sweep.cells)} runs begun are finished as of {when(now())}{again}"


def verdict(sweep: Sweep) -> str:
    """What circuits were found; or the main score of the first row, the highest and the lowest."""
    if found := answers(sweep):
        return found
    header = next(iter(sweep.main_scores), None)
    if header is None:
        return f"No scores yet. Lowest validation loss so far: {lowest_losses(sweep)}."
    means = {row.label: mean for row in sweep.rows if (mean := row.values[header].mean) is not None}
    reference = sweep.rows[0]
    highest, lowest = (pick(means, key=means.__getitem__) for pick in (max, min))
    if means[highest] == means[lowest]:
        return f"{capitalised(header)}: {figure_text(means[highest])} in every row."
    ends = {"highest": highest, "lowest": lowest}
    text = f"{capitalised(header)}: "
    if reference.label in means:
        also = "".join(f" and {word}" for word, label in ends.items() if label == reference.label)
        text += f"{figure_text(means[reference.label], means[highest])} for “{reference.label}”, the reference{also}; "
    others = [
        f"{word} {_compared(sweep, label, means, reference.values[header].choice)}"
        for word, label in ends.items()
        if label != reference.label
    ]
    return f"{text}{', '.join(others)}."


def lowest_losses(sweep: Sweep) -> str:
    """Of each thing that a validation loss is over, the lowest, and where."""
    lowest: dict[str, tuple[float, str]] = {}
    for name, run in sweep.cells.items():
        for row in run.evaluation_rows:
            found = row["val_loss"], name
            lowest[run.task(row)] = min(lowest.get(run.task(row), found), found)
    texts = [f"{loss:.3f} over {target_name(task)} ({name})" for task, (loss, name) in sorted(lowest.items())]
    return ", ".join(texts) or "none"


def _compared(sweep: Sweep, label: str, means: Mapping[str, float], choice: str) -> str:
    """A row's figure, and its ratios to the first row's."""
    reference = sweep.rows[0]
    (row,) = [row for row in sweep.rows if row.label == label][:1]
    text = f"{figure_text(means[label], max(means.values()))} for “{label}”"
    ratios = [f"{means[label] / means[reference.label]:.2f} of the reference"] if means.get(reference.label) else []
    if (spent := reference.train_flops(choice)) > 0:
        ratios.append(f"{row.train_flops(choice) / spent:.2f} of its counted FLOPs")
    return f"{text} ({' at '.join(ratios)})" if ratios else text


def _what_ran(sweep: Sweep) -> str:
    kinds = Counter(" then ".join(run.config.get("phases", ())) or "no phase" for run in sweep.cells.values())
    numbers = [run.numbers for run in sweep.cells.values()]
    runs = ", ".join(f"{count} of {kind}" for kind, count in kinds.items())
    text = f"{len(numbers)} {'run' if len(numbers) == 1 else 'runs'}: {runs}."
    text += f" {quantity(sum(n.get('tokens', 0) for n in numbers), COUNT_UNITS)} training tokens"
    if seconds := sum(n.get("wall_seconds", 0) for n in numbers):
        finished = all("wall_seconds" in n for n in numbers)
        text += f"{', ' if finished else ' so far; those that are finished took '}{duration(seconds)}"
    devices = list(dict.fromkeys(n["device"] for n in numbers if "device" in n))
    return f"{text} on {', '.join(devices)}." if devices else f"{text}."


def run_again(sweep: Sweep) -> list[Panel]:
    """The command of the sweep, where it was started by one."""
    command = next((c for run in sweep.cells.values() if (c := run.config.get("command"))), "")
    remark = "It finishes what is unfinished here; for another sweep beside this one, give another --workdir."
    return [command_panel(command, remark)] if command else []


# Each takes the sweep and gives panels, none where nothing is recorded for them.
_PANELS: tuple[Callable[[Sweep], list[Panel]], ...] = (
    results,
    circuits,
    main_charts,
    curves,
    cells,
    signatures,
    run_again,
)
