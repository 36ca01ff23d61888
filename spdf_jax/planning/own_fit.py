"""The planner's scaling law fitted to cells of our own: what it would have predicted of each, against what was measured.

``python -m spdf_jax.planning.own_fit experiments/results/*.json`` prints it for studies that are kept there. Of the law's eight
constants five, the exponents and what density does, stay as published; E, A and B are fitted, by least squares with none below
0: a few dozen small runs determine no more. A prediction of a row is by the fit to all others, and so of what it has not seen.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from spdf_jax.errors import InputError
from spdf_jax.planning.scaling import FIT, Fit, predicted_loss
from spdf_jax.workdir import read_json

_FITTED = 3  # constants


class Measured(NamedTuple):
    """A row of a study: raw weights of the layers, tokens, density, and its validation loss, the mean over seeds."""

    label: str
    parameters: float
    tokens: float
    density: float
    loss: float


class Predicted(NamedTuple):
    """What the fit to all other rows says of a row."""

    row: Measured
    loss: float


def measured_in(record: Mapping[str, Any], group: str) -> list[Measured]:
    """The rows of a study that the law is about: of one sparsity throughout, over text.

    Args:
      record: content of a ``study.json``.
      group: of its rows, within which losses can be compared.

    Returns:
      One of each row that has cells.
    """
    points = []
    for row in record["rows"]:
        if row["group"] == group and row["sparsity"] is not None and row["cells"]:
            cells = [record["cells"][name] for name in row["cells"]]
            loss = float(np.mean([cell["val_loss"] for cell in cells]))
            points.append(Measured(row["row"], row["weights"], cells[0]["tokens"], 1 - row["sparsity"], loss))
    return points


def fit_cells(points: Sequence[Measured], shape: Fit = FIT) -> Fit:
    """The law through measured losses: E, A and B fitted, the other constants those of `shape`.

    Args:
      points: three or more, of two model sizes or densities and two lengths at least.
      shape: whose exponents to take.

    Returns:
      `Fit`; a constant that is 0 has a logarithm of -inf.

    Raises:
      InputError: too few points.

    >>> law = Fit(math.log(40), math.log(300), math.log(2), *FIT[3:])
    >>> rows = [(n, d, r) for n in (1e5, 4e5) for d in (1e6, 4e6) for r in (1.0, 0.25)]
    >>> points = [Measured("", *row, predicted_loss(*row, law)) for row in rows]
    >>> [round(math.exp(value), 3) for value in fit_cells(points)[:3]]
    [40.0, 300.0, 2.0]
    """
    if len(points) < _FITTED:
        raise InputError(f"fit_cells: {len(points)} rows do not determine {_FITTED} constants; give more")
    rows = np.array([_terms(point, shape) for point in points])
    scale = rows.mean(0)
    constants, _ = nnls(rows / scale, np.array([point.loss for point in points]))
    with np.errstate(divide="ignore"):
        ln_e, ln_a, ln_b = (float(value) for value in np.log(constants / scale))
    return shape._replace(ln_e=ln_e, ln_a=ln_a, ln_b=ln_b)


def _terms(point: Measured, shape: Fit) -> tuple[float, float, float]:
    """What E, A and B are multiplied by in the loss of a point."""
    alone = shape._replace(ln_e=-math.inf, ln_a=0.0, ln_b=-math.inf)
    capacity = predicted_loss(point.parameters, point.tokens, point.density, alone)
    return 1.0, capacity, point.tokens**-shape.beta


def predictions(points: Sequence[Measured], shape: Fit = FIT) -> list[Predicted]:
    """Of each row, by the fit to all others; none of rows that are too few for that."""
    if len(points) <= _FITTED:
        return []
    others = [fit_cells([*points[:i], *points[i + 1 :]], shape) for i in range(len(points))]
    return [
        Predicted(point, predicted_loss(point.parameters, point.tokens, point.density, fit))
        for point, fit in zip(points, others, strict=True)
    ]


def typical_error(found: Sequence[Predicted]) -> float:
    """The root mean square of predictions' errors, in nats/token."""
    return math.sqrt(np.mean([(one.loss - one.row.loss) ** 2 for one in found]))


def table(found: Sequence[Predicted]) -> str:
    """Predicted and measured losses, in Markdown."""
    lines = [
        "| row | weights | density | tokens | predicted | measured | apart |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in found:
        row = one.row
        lines.append(
            f"| {row.label} | {row.parameters:.3g} | {row.density:g} | {row.tokens:.3g} | {one.loss:.3f} | {row.loss:.3f} | "
            f"{one.loss - row.loss:+.3f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m spdf_jax.planning.own_fit experiments/results/mst.json``."""
    parser = argparse.ArgumentParser(description="The scaling law fitted to a study's own rows: predicted, measured.")
    parser.add_argument("records", nargs="+", type=Path, help="study.json of studies, or where they are kept")
    for path in parser.parse_args(argv).records:
        record = read_json(path, "give the record of a study")
        for group in dict.fromkeys(row["group"] for row in record["rows"]):
            found = predictions(measured_in(record, group))
            if found:
                of_group = f" ({group})" if group else ""
                print(f"{record['title']}{of_group}: {typical_error(found):.3f} nats/token apart\n\n{table(found)}\n")


if __name__ == "__main__":
    main()
