"""Masks as plain pytrees: make, apply, look at, pack.

A mask tree has the treedef of its parameters. An element mask is bool with its parameter's shape; a dense leaf is a 0-d
``True``. Nothing else: no None, no wrapper.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.sparsity.select import select_top_k
from spdf_jax.tree import LINEAR_KERNELS, Filter, check_same_structure, map_named, match_filter, named_leaves


def matrix_groups(params: Any, filter: Filter) -> dict[str, MatrixGroup]:
    """The sparse leaves of `params` (arrays or shapes) as ``{name: MatrixGroup}``; see `spdf_jax.tree` for filters."""
    decisions = match_filter(filter, params)
    groups = {}
    for name, leaf in named_leaves(params):
        shape = tuple(leaf.shape)
        if decisions[name] == "stack":
            groups[name] = MatrixGroup(shape[0], shape[1:])
        elif decisions[name] == "matrix":
            groups[name] = MatrixGroup(1, shape)
    return groups


def init_masks(
    key: jax.Array,
    params: Any,
    *,
    sparsity: float,
    distribution: str = "uniform",
    filter: Filter = LINEAR_KERNELS,
    method: str = "random",
) -> Any:
    """Masks with an exact number of ones in every weight matrix.

    Args:
      key: PRNG key; each leaf's draw depends on it and the leaf's name only.
      params: pytree of arrays; only shapes matter unless ``method="magnitude"``.
      sparsity: share of zeros, in [0, 1).
      distribution: ``uniform`` | ``er`` | ``erk``.
      filter: which leaves, see `spdf_jax.tree`.
      method: ``random`` (SPDF) or ``magnitude`` (keep the largest absolute values).

    Returns:
      Mask tree of the treedef of `params`.

    Raises:
      InputError: bad sparsity, distribution, method or filter.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    >>> masks = init_masks(jax.random.key(0), params, sparsity=0.75, filter=[("w", "matrix")])
    >>> int(masks["w"].sum()), masks["b"].shape
    (16, ())
    """
    if method not in ("random", "magnitude"):
        raise InputError(f"init_masks: method {method!r} is not 'random' or 'magnitude'")
    groups = matrix_groups(params, filter)
    counts = target_counts(groups, sparsity, distribution)

    def make(name: str, leaf: jax.Array) -> jax.Array:
        if name not in groups:
            return jnp.array(True)
        shape = (groups[name].count, *groups[name].shape)
        if method == "random":
            scores = jax.random.bits(jax.random.fold_in(key, zlib.crc32(name.encode())), shape, jnp.uint32)
        else:
            scores = jnp.abs(leaf).reshape(shape)
        return jax.vmap(lambda s: select_top_k(s, counts[name]))(scores).reshape(leaf.shape)

    return map_named(make, params)


def dense_masks(params: Any) -> Any:
    """A 0-d True for every leaf: nothing is masked."""
    return jax.tree.map(lambda _: jnp.array(True), params)


def apply_masks(params: Any, masks: Any) -> Any:
    """`params` with every masked weight exactly 0.

    >>> import jax.numpy as jnp
    >>> apply_masks({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([True, False])})["w"].tolist()
    [3.0, 0.0]
    """
    check_same_structure("masks", masks, params)
    return jax.tree.map(keep_where, masks, params)


def keep_where(mask: jax.Array, value: jax.Array) -> jax.Array:
    """`value` where the mask is True, else an exact 0 (a product would keep NaN and the sign of zero)."""
    if mask.ndim == 0:
        return value
    if mask.shape != value.shape:
        raise InputError(f"masks: a mask of shape {mask.shape} does not fit its weight of shape {value.shape}")
    return jnp.where(mask, value, jnp.zeros((), value.dtype))


def active_counts(masks: Any, params: Any, filter: Filter) -> dict[str, jax.Array]:
    """Active weights of every sparse leaf, one int32 a matrix: ``{name: [count]}``."""
    groups = matrix_groups(params, filter)
    return {
        name: _per_matrix(mask, groups[name].count, groups[name].size)
        for name, mask in named_leaves(masks)
        if name in groups
    }


def _per_matrix(mask: jax.Array, count: int, size: int) -> jax.Array:
    if mask.ndim == 0:
        return jnp.full((count,), size, jnp.int32)
    return jnp.sum(mask.reshape(count, -1), axis=1, dtype=jnp.int32)


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
        head = f"{'leaf':<28}{'shape':<22}{'active':>12}{'of':>12}{'sparsity':>10}"
        head += f"{'dead rows':>11}{'dead cols':>11}{'churn':>8}"
        lines = [head]
        for r in self.rows:
            churn = "-" if r.churn is None else f"{r.churn:.3f}"
            lines.append(
                f"{r.name:<28}{r.shape!s:<22}{r.active:>12,}{r.size:>12,}{r.sparsity:>10.4f}"
                f"{r.dead_rows:>11,}{r.dead_columns:>11,}{churn:>8}"
            )
        return "\n".join([*lines, f"sparsity over masked leaves: {self.sparsity:.4f}"])


def mask_report(masks: Any, previous: Any = None) -> MaskReport:
    """Counts, sparsity, dead rows and columns, and churn against an earlier mask.

    Args:
      masks: mask tree; dense leaves (0-d) are left out.
      previous: mask tree to compare with; churn is the share of now active weights that were not active then.

    Returns:
      `MaskReport`; print it for a table.

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


def pack_masks(masks: Any) -> Any:
    """Element masks as uint8 with 8 weights a byte along the last axis; 0-d leaves stay bool."""
    return jax.tree.map(lambda m: m if m.ndim == 0 else jnp.packbits(m, axis=-1), masks)


def unpack_masks(packed: Any, params: Any) -> Any:
    """Inverse of `pack_masks`; `params` gives the shapes."""
    return jax.tree.map(
        lambda b, p: b if b.ndim == 0 else jnp.unpackbits(b, axis=-1, count=p.shape[-1]).astype(bool), packed, params
    )
