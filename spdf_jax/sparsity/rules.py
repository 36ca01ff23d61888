"""Prune and grow: one function for every topology rule, and the rules as values.

Source of the exact semantics: the MST code (hupihe/Mixed-Sparsity-Training); with ``gradient_share`` 1 it is RigL
(arXiv 1911.11134), with 0 SET (Mocanu et al. 2018). A new rule is one more `Rule` in `RULES`.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError
from spdf_jax.sparsity.select import select_top_k
from spdf_jax.tree import named_leaves

DropScore = Callable[[jax.Array, jax.Array], jax.Array]


def magnitude(weights: jax.Array, grads: jax.Array) -> jax.Array:
    """``|w|``: SET, RigL, MST."""
    return jnp.abs(weights)


class Rule(NamedTuple):
    """How topology evolves.

    Attributes:
      evolves: whether there are topology steps at all.
      drop_fraction: initial share of the active weights exchanged at a topology step (decays by cosine in a stage).
      gradient_share: share of the grown weights picked by largest ``|g|``; the rest uniformly at random.
      drop_score: the smallest scores are dropped.
    """

    evolves: bool = True
    drop_fraction: float = 0.3
    gradient_share: float = 0.0
    drop_score: DropScore = magnitude


RULES: Mapping[str, Rule] = {
    "static": Rule(evolves=False),
    "set": Rule(gradient_share=0.0),
    "rigl": Rule(gradient_share=1.0),
    "mst": Rule(gradient_share=0.75),  # r/(r+1) with r = 3 in the authors' code
}


def prune_and_grow(
    key: jax.Array,
    weights: jax.Array,
    grads: jax.Array,
    mask: jax.Array,
    *,
    target_nnz: jax.Array | int,
    drop_fraction: jax.Array | float,
    gradient_share: float = 0.75,
    drop_score: DropScore = magnitude,
) -> jax.Array:
    """One topology update of one weight matrix.

    With n active weights now, ``n_prune = max(int(n * drop_fraction), n - target_nnz)`` of the smallest drop score are
    dropped, then ``n_grow = n_prune - (n - target_nnz)`` of everything inactive, the just dropped included, are
    activated: ``int(n_grow * gradient_share)`` by largest ``|grads|``, the rest uniformly at random. A weight dropped and
    regrown at once keeps its value; the caller zeroes the others (``where(new_mask, weights, 0)`` does both).

    Args:
      key: PRNG key of the random growth.
      weights: any shape, exactly 0 where the mask is False.
      grads: **dense** gradient, same shape.
      mask: bool, same shape.
      target_nnz: active weights afterwards, 0 <= target_nnz <= size; may be traced, so a schedule compiles once.
      drop_fraction: share of the active weights exchanged, in [0, 1]; may be traced.
      gradient_share: in [0, 1]; 1 is RigL, 0 is SET, 3/4 is MST.
      drop_score: ``(weights, grads) -> scores``.

    Returns:
      bool mask of the same shape with exactly `target_nnz` True. Ties go to the lowest index when kept or grown. A NaN
      score is the first to be dropped and the last to be grown.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([4.0, -3.0, 0.5, 0.0]); g = jnp.array([0.0, 0.0, 0.0, 9.0]); m = w != 0
    >>> prune_and_grow(jax.random.key(0), w, g, m, target_nnz=3, drop_fraction=0.4, gradient_share=1.0).tolist()
    [True, True, False, True]
    """
    if not weights.shape == grads.shape == mask.shape:
        raise InputError(
            f"prune_and_grow: weights {weights.shape}, grads {grads.shape} and mask {mask.shape} must have one shape"
        )
    n = jnp.sum(mask, dtype=jnp.int32)
    delta = n - jnp.asarray(target_nnz, jnp.int32)
    n_prune = jnp.clip(jnp.floor(n * jnp.asarray(drop_fraction, jnp.float32)).astype(jnp.int32), delta, n)
    n_grow = n_prune - delta
    # The float product rounds up past 2^24; never more than n_grow.
    n_by_gradient = jnp.minimum(jnp.floor(n_grow * gradient_share).astype(jnp.int32), n_grow)

    kept = select_top_k(drop_score(weights, grads), n - n_prune, eligible=mask)
    grown = select_top_k(jnp.abs(grads), n_by_gradient, eligible=~kept)
    new = kept | grown
    if gradient_share < 1:
        scores = jax.random.bits(key, weights.shape, jnp.uint32)
        new = new | select_top_k(scores, n_grow - n_by_gradient, eligible=~new)
    return new


def prune_and_grow_tree(
    key: jax.Array,
    params: Any,
    grads: Any,
    masks: Any,
    *,
    target_nnz: Mapping[str, jax.Array],
    drop_fraction: jax.Array,
    rule: Rule,
) -> Any:
    """`prune_and_grow` on every element mask of a tree, matrix by matrix.

    Args:
      key: PRNG key; each leaf draws from it and its own name.
      params, grads, masks: trees of one treedef; 0-d masks pass through.
      target_nnz: ``{leaf name: int32 [matrices]}``, one entry a matrix of the leaf.
      drop_fraction: scalar, shared.
      rule: what to drop and grow.

    Returns:
      New masks.
    """

    def update(name: str, w: jax.Array, g: jax.Array, mask: jax.Array) -> jax.Array:
        targets = target_nnz[name]
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), targets.shape[0])
        stacked = w.shape if targets.shape[0] == w.shape[0] else (1, *w.shape)
        new = jax.vmap(
            lambda k, w, g, m, n: prune_and_grow(
                k,
                w,
                g,
                m,
                target_nnz=n,
                drop_fraction=drop_fraction,
                gradient_share=rule.gradient_share,
                drop_score=rule.drop_score,
            )
        )(keys, w.reshape(stacked), g.reshape(stacked), mask.reshape(stacked), targets)
        return new.reshape(mask.shape)

    leaves = [
        mask if mask.ndim == 0 else update(name, w, g, mask)
        for (name, mask), (_, w), (_, g) in zip(
            named_leaves(masks), named_leaves(params), named_leaves(grads), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(masks), leaves)
