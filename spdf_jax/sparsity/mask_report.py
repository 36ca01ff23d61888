"""What masks hold, in numbers and as a table."""

from typing import Any, NamedTuple

import numpy as np

from spdf_jax.tree import check_same_structure, named_leaves


class LeafReport(NamedTuple):
    """One row of `mask_report`. Rows and columns count over the last two axes, all layers together."""

    name: str
    shape: tuple[int, ...]
    size: int
    active: int
    sparsity: float
    dead_rows: int
    dead_columns: int
    churn: float | None


class MaskReport(NamedTuple):
    """Per-leaf rows and the total sparsity over masked leaves; `str()` gives a table."""

    rows: tuple[LeafReport, ...]
    sparsity: float

    def __str__(self) -> str:
        width = max([28, *(len(r.name) + 2 for r in self.rows)])
        head = f"{'leaf':<{width}}{'shape':<22}{'active':>12}{'of':>12}{'sparsity':>10}"
        head += f"{'dead rows':>11}{'dead cols':>11}{'churn':>8}"
        lines = [head]
        for r in self.rows:
            churn = "-" if r.churn is None else f"{r.churn:.3f}"
            lines.append(
                f"{r.name:<{width}}{r.shape!s:<22}{r.active:>12,}{r.size:>12,}{r.sparsity:>10.4f}"
                f"{r.dead_rows:>11,}{r.dead_columns:>11,}{churn:>8}"
            )
        return "\n".join([*lines, f"sparsity over masked leaves: {self.sparsity:.4f}"])


def mask_report(masks: Any, previous: Any = None) -> MaskReport:
    """Counts, sparsity, dead rows and columns, and churn against an earlier mask.

    Args:
      masks: mask tree; dense leaves (0-d) are left out.
      previous: mask tree to compare with; churn is the share of now active weights that were not active then.

    Returns:
      `MaskReport`; print it for a table, its `rows` are the data.

    Raises:
      InputError: `previous` has another tree structure.

    >>> import jax.numpy as jnp
    >>> mask_report({"w": jnp.array([[True, False], [True, False]])}).rows[0].dead_columns
    1
    """
    if previous is not None:
        check_same_structure("previous masks", previous, masks)
    earlier = dict(named_leaves(previous)) if previous is not None else {}
    rows = []
    for name, leaf in named_leaves(masks):
        if leaf.ndim == 0:
            continue
        mask = np.asarray(leaf)
        active = int(mask.sum())
        churn = None
        if name in earlier:
            churn = float((mask & ~np.asarray(earlier[name])).sum()) / max(active, 1)
        lines, columns = (int((~mask.any(axis)).sum()) for axis in ((-1, -2) if mask.ndim > 1 else (0, 0)))
        rows.append(LeafReport(name, mask.shape, mask.size, active, 1 - active / mask.size, lines, columns, churn))
    size = sum(r.size for r in rows)
    return MaskReport(tuple(rows), 1 - sum(r.active for r in rows) / size if size else 0.0)
