"""Masks as plain pytrees: make, apply, check.

A mask tree has the treedef of its parameters. An element mask is bool with its parameter's shape; a dense leaf is a 0-d
``True``. Nothing else: no None, no wrapper.
"""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.sparsity.patterns import parse_pattern
from spdf_jax.tree import (
    LINEAR_KERNELS,
    Filter,
    check_same_structure,
    is_absent,
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
    if not same_structure(masks, params) and any(map(is_absent, jax.tree.leaves(params, is_leaf=is_absent))):
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
