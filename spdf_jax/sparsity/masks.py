"""Masks as plain pytrees: make, apply, look at, pack, share.

A mask tree has the treedef of its parameters. An element mask is bool with its parameter's shape; a dense leaf is a 0-d
``True``. Nothing else: no None, no wrapper.
"""

import json
import math
import zlib
from os import PathLike
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import safe_open
from safetensors.numpy import save_file

from spdf_jax.errors import InputError, reading
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.sparsity.patterns import parse_pattern
from spdf_jax.tree import (
    LINEAR_KERNELS,
    Filter,
    check_same_structure,
    map_named,
    match_filter,
    named_leaves,
    same_structure,
)


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
    pattern: str = "unstructured",
) -> Any:
    """Masks with an exact number of ones in every weight matrix.

    Args:
      key: PRNG key; each leaf's draw depends on it and the leaf's name only.
      params: pytree of arrays; only shapes matter unless ``method="magnitude"``.
      sparsity: share of zeros, in [0, 1); 1 - N/M (or 0) for a pattern N:M.
      distribution: ``uniform`` | ``er`` | ``erk`` | ``er_qkv``, see `spdf_jax.sparsity.distributions`.
      filter: which leaves, see `spdf_jax.tree`.
      method: ``random`` (SPDF) or ``magnitude`` (keep the largest absolute values).
      pattern: ``unstructured`` | ``N:M`` | ``blockB``, see `spdf_jax.sparsity.patterns`.

    Returns:
      Mask tree of the treedef of `params`.

    Raises:
      InputError: bad sparsity, distribution, method, pattern or filter; a matrix that does not divide into the pattern.

    >>> import jax, jax.numpy as jnp
    >>> params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    >>> masks = init_masks(jax.random.key(0), params, sparsity=0.75, filter=[("w", "matrix")])
    >>> int(masks["w"].sum()), masks["b"].shape
    (16, ())
    """
    if method not in ("random", "magnitude"):
        raise InputError(f"init_masks: method {method!r} is not 'random' or 'magnitude'")
    groups = matrix_groups(params, filter)
    counts = target_counts(groups, sparsity, distribution, pattern)
    p = parse_pattern(pattern)

    def make(name: str, leaf: jax.Array) -> jax.Array:
        if name not in groups:
            return jnp.array(True)
        count, shape = groups[name].count, groups[name].shape
        target = counts[name] // p.unit_size

        def choose(scores: jax.Array) -> jax.Array:
            everything = jnp.ones(scores.shape, bool)
            return p.expand(p.select(scores, target, target, among=everything, taken=~everything))

        if method == "random":
            leaf_key = jax.random.fold_in(key, zlib.crc32(name.encode()))
            scores = jax.random.bits(leaf_key, (count, *p.unit_shape(shape)), jnp.uint32)
        else:
            scores = p.pool(jnp.abs(leaf).reshape(count, *shape))
        axis = p.axis(name, shape)
        chosen = jax.vmap(choose)(jnp.swapaxes(scores, axis, -2))
        return jnp.swapaxes(chosen, axis, -2).reshape(leaf.shape)

    return map_named(make, params)


def dense_masks(params: Any) -> Any:
    """A 0-d True for every leaf: nothing is masked.

    Args:
      params: pytree of arrays or shapes.

    Returns:
      Mask tree of the treedef of `params`.

    >>> import jax.numpy as jnp
    >>> dense_masks({"w": jnp.ones((2, 3))})["w"].shape
    ()
    """
    return jax.tree.map(lambda _: jnp.array(True), params)


def apply_masks(params: Any, masks: Any) -> Any:
    """`params` with every masked weight exactly 0.

    Args:
      params: pytree of arrays.
      masks: mask tree of the same treedef, see `init_masks`.

    Returns:
      The parameters, bit-equal where masks are True.

    Raises:
      InputError: masks of another tree structure, or a mask of another shape than its weight.

    >>> import jax.numpy as jnp
    >>> apply_masks({"w": jnp.array([3.0, 4.0])}, {"w": jnp.array([True, False])})["w"].tolist()
    [3.0, 0.0]
    """
    check_masks(masks, params)
    return jax.tree.map(keep_where, masks, params)


def check_masks(masks: Any, params: Any) -> None:
    """Raises `InputError` unless `masks` are a mask tree of `params`: of bool arrays, 0-d or of their shapes."""
    absent = any(isinstance(leaf, optax.MaskedNode) for leaf in jax.tree.leaves(params, is_leaf=_is_absent))
    if absent and not same_structure(masks, params):
        raise InputError(
            "masks: of all parameters, but optax.masked or partition gave only a part of these; put spdf_jax.sparse around "
            "them, sparse(optax.partition(...)), or give them mask_compatible_extra_args=True"
        )
    check_same_structure("masks", masks, params)
    for (name, mask), leaf in zip(named_leaves(masks), jax.tree.leaves(params), strict=True):
        if not hasattr(mask, "ndim") or not jnp.issubdtype(mask.dtype, jnp.bool_):
            kind = f"an array of {mask.dtype}" if hasattr(mask, "dtype") else repr(mask)[:60]
            raise InputError(f"masks: {name} is {kind}, not an array of bool; jnp.array(True) is for a dense leaf")
        if mask.ndim and mask.shape != leaf.shape:
            raise InputError(f"masks: {name} has a mask of shape {mask.shape}, its weight shape {leaf.shape}")


def _is_absent(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


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


def pack_masks(masks: Any) -> Any:
    """Element masks as uint8 with 8 weights a byte along the last axis; 0-d leaves stay bool."""
    return jax.tree.map(lambda m: m if m.ndim == 0 else jnp.packbits(m, axis=-1), masks)


def unpack_masks(packed: Any, params: Any) -> Any:
    """Inverse of `pack_masks`; `params` gives the shapes."""
    return jax.tree.map(
        lambda b, p: b if b.ndim == 0 else jnp.unpackbits(b, axis=-1, count=p.shape[-1]).astype(bool), packed, params
    )


#: Key and version of the metadata that makes a safetensors file a mask file.
MASK_FORMAT, MASK_FORMAT_VERSION = "spdf_jax.masks", 1


def save_masks(path: str | PathLike[str], masks: Any) -> None:
    """Writes masks to a safetensors file, one bit a weight, readable without this library.

    Each element mask is a uint8 tensor under its leaf's name: `numpy.packbits` of the mask in row-major order. The file's
    metadata hold one JSON text under ``spdf_jax.masks``: the format version, and for every leaf its shape and the CRC-32 of
    its bytes. Dense leaves have shape [] and no tensor.

    Args:
      path: written over if it exists; by convention ``*.safetensors``.
      masks: mask tree.

    Raises:
      InputError: two leaves of one name.

    >>> import tempfile, pathlib, jax, jax.numpy as jnp
    >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    >>> masks = init_masks(jax.random.key(0), params, sparsity=0.75, filter=[("w", "matrix")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(pathlib.Path(folder) / "masks.safetensors", masks)
    ...     loaded = load_masks(pathlib.Path(folder) / "masks.safetensors", params)
    >>> bool((loaded["w"] == masks["w"]).all()), loaded["b"].shape
    (True, ())
    """
    leaves = dict(named_leaves(masks))
    if len(leaves) < len(jax.tree.leaves(masks)):
        raise InputError("save_masks: two leaves have one name; rename one of them")
    packed = {name: np.packbits(np.asarray(mask).reshape(-1)) for name, mask in leaves.items() if mask.ndim}
    index = {
        name: {"shape": list(mask.shape), "crc32": zlib.crc32(packed[name].tobytes()) if name in packed else 0}
        for name, mask in leaves.items()
    }
    text = json.dumps({"version": MASK_FORMAT_VERSION, "leaves": index})
    save_file(packed, path, metadata={MASK_FORMAT: text})


def load_masks(path: str | PathLike[str], params: Any) -> Any:
    """Reads masks written by `save_masks`, for these parameters and no others.

    Args:
      path: a mask file.
      params: pytree of arrays or shapes.

    Returns:
      Mask tree of the treedef of `params`.

    Raises:
      InputError: no file, no mask file, a damaged one, one of another format version, or one of other parameters; names
        the leaf and the shapes.

    >>> import tempfile, pathlib, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(pathlib.Path(folder) / "masks.safetensors", {"w": jnp.array([[True, False]])})
    ...     load_masks(pathlib.Path(folder) / "masks.safetensors", {"w": jnp.ones((1, 2))})["w"].tolist()
    [[True, False]]
    """
    with (
        reading(f"{path}: not a readable mask file", "get the file again"),
        safe_open(path, framework="numpy") as file,
    ):
        index = _mask_index(path, file.metadata())
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    wanted = dict(named_leaves(params))
    missing, extra = sorted(wanted.keys() - index.keys()), sorted(index.keys() - wanted.keys())
    if missing or extra:
        raise InputError(
            f"{path}: masks of other parameters; without {', '.join(missing[:3]) or 'nothing'}, "
            f"with {', '.join(extra[:3]) or 'nothing'} besides"
        )

    def load(name: str, leaf: Any) -> jax.Array:
        shape, crc32 = index[name]
        if not shape:
            return jnp.array(True)
        if shape != tuple(leaf.shape):
            raise InputError(f"{path}: the mask of {name} has shape {shape}, the parameter {tuple(leaf.shape)}")
        data = packed.get(name)
        if data is None or data.shape != (-(-math.prod(shape) // 8),) or zlib.crc32(data.tobytes()) != crc32:
            raise InputError(f"{path}: the mask of {name}, shape {shape}, is damaged; get the file again")
        return jnp.asarray(np.unpackbits(data, count=math.prod(shape)).reshape(shape).astype(bool))

    return map_named(load, params)


def _mask_index(path: str | PathLike[str], metadata: dict[str, str] | None) -> dict[str, tuple[tuple[int, ...], int]]:
    """``{leaf name: (shape, crc32)}`` from a mask file's metadata."""
    if MASK_FORMAT not in (metadata or {}):
        raise InputError(f"{path}: a safetensors file, but not of masks; write them with spdf_jax.save_masks")
    with reading(f"{path}: the mask file's index is damaged", "get the file again"):
        index = json.loads((metadata or {})[MASK_FORMAT])
        if index["version"] != MASK_FORMAT_VERSION:
            raise InputError(
                f"{path}: mask format version {index['version']}; this library reads {MASK_FORMAT_VERSION}, update it"
            )
        found = {name: (tuple(leaf["shape"]), leaf["crc32"]) for name, leaf in index["leaves"].items()}
        if odd := [
            n for n, (shape, crc32) in found.items() if any(type(x) is not int or x < 0 for x in (*shape, crc32))
        ]:
            raise ValueError(f"{odd[0]}: shape and crc32 must be whole numbers, not {found[odd[0]]}")
        return found
