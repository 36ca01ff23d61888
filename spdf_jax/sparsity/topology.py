"""Topology is which weights are live; a topology step moves it, by prune and grow: one function for every rule.

Source of the exact semantics: the MST code (hupihe/Mixed-Sparsity-Training); with ``gradient_share`` 1 it is RigL
(arXiv 1911.11134), with 0 SET (Mocanu et al. 2018).
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spdf_jax.errors import InputError
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.sparsity.patterns import parse_pattern
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.sparsity.transforms import sparse
from spdf_jax.tree import named_leaves

DropScore = Callable[[jax.Array, jax.Array], jax.Array]


def magnitude(weights: jax.Array, grads: jax.Array) -> jax.Array:
    """``|w|``: SET, RigL, MST, GMP, AC/DC."""
    return jnp.abs(weights)


class Rule(NamedTuple):
    """How topology moves. A new one is a value in `spdf_jax.RULES`: `spdf_jax.sparsity.rules` makes one and takes a step by it.

    >>> rule = Rule(gradient_share=1.0)  # RigL
    >>> rule.gradient_share, rule.drop_fraction, rule._replace(pattern="2:4").pattern
    (1.0, 0.3, '2:4')

    Attributes:
      moves: whether there are topology steps at all.
      drop_fraction: initial share of the active weights exchanged at a topology step (decays by cosine in a stage).
      gradient_share: share of the grown weights picked by largest ``|g|``; the rest uniformly at random.
      drop_score: the smallest scores are dropped; not negative, since a block's score is the sum of their squares.
      schedules: the schedules that it can follow; () means any.
      pattern: inside a leaf, see `spdf_jax.sparsity.patterns`; a run takes its config's.
      exploration: share of a matrix's weights that get gradients at every step without being active (Top-KAST's M).
      optimizer: what keeps masked weights at zero, around the optimiser: `spdf_jax.sparse`, or the rule's own.
      floor: weights that each output of a layer's kernel keeps at least; a run takes its config's.
      choose_each_step: chooses masks after every optimiser step, without topology steps: see `spdf_jax.sparsity.topk`.
      choose_masks: a topology step of the rule's own, which chooses all masks anew, at the very first step too; None stands
        for `move_masks`.
    """

    moves: bool = True
    drop_fraction: float = 0.3
    gradient_share: float = 0.0
    drop_score: DropScore = magnitude
    schedules: tuple[str, ...] = ()
    pattern: str = "unstructured"
    exploration: float = 0.0
    optimizer: Callable[[optax.GradientTransformation], optax.GradientTransformationExtraArgs] = sparse
    choose_masks: Callable[..., tuple[Any, Any, Any]] | None = None
    choose_each_step: Callable[..., tuple[Any, Any]] | None = None
    floor: int = 0

    def explored_count(self, active: Any, size: int) -> Any:
        """Weights of a matrix that get gradients when `active` of its `size` compute; whole units of the pattern."""
        unit = parse_pattern(self.pattern).unit_size
        explored = active + int(self.exploration * size) // unit * unit
        return min(explored, size) if isinstance(active, int) else jnp.minimum(explored, size)

    def grows_by_gradient(self, active: int, target: int, size: int, drop_fraction: float) -> bool:
        """Whether a topology step from `active` to `target` of a matrix's `size` weights needs the gradients of masked ones.

        Not where all that grows is drawn at random (SET, MEST), nothing grows (GMP), or everything does (AC/DC's dense turns).

        >>> from spdf_jax.sparsity.rules import RULES
        >>> [RULES[name].grows_by_gradient(100, 100, 400, 0.3) for name in ("rigl", "mst", "set", "mest")]
        [True, True, False, False]
        >>> [RULES["gmp"].grows_by_gradient(200, target, 400, 0.0) for target in (100, 400, 300)]
        [False, False, True]
        """
        if self.choose_masks is not None:
            return self.gradient_share > 0
        unit = parse_pattern(self.pattern).unit_size
        dropped = max(int(active // unit * drop_fraction), (active - target) // unit)
        return target < size and int(((target - active) // unit + dropped) * self.gradient_share) > 0


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
    pattern: str = "unstructured",
) -> jax.Array:
    """One topology step on one weight matrix (MST code; see the module's sources).

    Keeps the active weights of largest drop score, then activates others by largest ``|g|`` and at random. A weight dropped
    and regrown at once keeps its value, since the caller only multiplies by the new mask; others start at 0.

    In blocks the same happens to blocks. At N:M the drop is over the whole matrix; what grows is, by ``|g|`` and then at
    random, the best that the groups have room for, so that every group ends with exactly N.

    Args:
      key: PRNG key, used when ``gradient_share < 1``.
      weights: any shape; exactly 0 where inactive.
      grads: dense gradient of the same shape.
      mask: bool of the same shape.
      target_nnz: active weights afterwards, 0 <= target_nnz <= size; may be traced. A multiple of the block size; at N:M
        N/M of the weights, or all.
      drop_fraction: share of the active weights to exchange, in [0, 1]; may be traced. More is dropped where the target
        asks for it.
      gradient_share: in [0, 1]; 1 is RigL, 0 is SET, 3/4 is MST.
      drop_score: ``(weights, grads) -> scores``.
      pattern: ``unstructured`` | ``N:M`` | ``blockB``, see `spdf_jax.sparsity.patterns`.

    Returns:
      bool mask of the same shape with exactly `target_nnz` True. Ties go to the lowest index when kept or grown. A NaN
      score is the first to be dropped and the last to be grown.

    Raises:
      InputError: shapes that differ or do not divide into the pattern; a `target_nnz` (not traced) that it cannot have.

    >>> import jax, jax.numpy as jnp
    >>> w = jnp.array([4.0, -3.0, 0.5, 0.0]); g = jnp.array([0.0, 0.0, 0.0, 9.0]); m = w != 0
    >>> prune_and_grow(jax.random.key(0), w, g, m, target_nnz=3, drop_fraction=0.4, gradient_share=1.0).tolist()
    [True, True, False, True]
    """
    if not weights.shape == grads.shape == mask.shape:
        found = f"weights {weights.shape}, grads {grads.shape} and mask {mask.shape}"
        raise InputError(f"prune_and_grow: {found} must have one shape")
    p = parse_pattern(pattern)
    p.check_shape(weights.shape, "weights")
    if isinstance(target_nnz, int | np.integer):
        p.check_count(int(target_nnz), weights.size)
    active, target = p.pool_mask(mask), jnp.asarray(target_nnz, jnp.int32) // p.unit_size
    n = jnp.sum(active, dtype=jnp.int32)
    n_prune = jnp.clip(jnp.floor(n * jnp.asarray(drop_fraction, jnp.float32)).astype(jnp.int32), n - target, n)
    kept = p.select(p.pool(drop_score(weights, grads)), n - n_prune, target, among=active, taken=jnp.zeros_like(active))
    n_grow = target - jnp.sum(kept, dtype=jnp.int32)
    # The float product rounds up past 2^24; never more than n_grow.
    n_by_gradient = jnp.minimum(jnp.floor(n_grow * gradient_share).astype(jnp.int32), n_grow)
    new = kept
    if gradient_share > 0:
        new = new | p.select(p.pool(jnp.abs(grads)), n_by_gradient, target, among=~kept, taken=kept)
    if gradient_share < 1:
        scores = jax.random.bits(key, active.shape, jnp.uint32)
        new = new | p.select(scores, n_grow - n_by_gradient, target, among=~new, taken=new)
    return p.expand(new)


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
      rule: what to drop and grow, and in which pattern.

    Returns:
      New masks.

    Raises:
      InputError: an element mask without targets; a shape that does not divide into the pattern.

    >>> params = {"w": jnp.array([[4.0, -3.0, 0.5, 0.0]]), "b": jnp.zeros(1)}
    >>> grads = {"w": jnp.array([[0.0, 0.0, 0.0, 9.0]]), "b": jnp.ones(1)}
    >>> masks = {"w": params["w"] != 0, "b": jnp.array(True)}
    >>> how = {"target_nnz": {"w": jnp.array([3])}, "drop_fraction": jnp.array(0.4), "rule": Rule(gradient_share=1.0)}
    >>> prune_and_grow_tree(jax.random.key(0), params, grads, masks, **how)["w"].tolist()
    [[True, True, False, True]]
    """

    def update(name: str, w: jax.Array, g: jax.Array, mask: jax.Array) -> jax.Array:
        if not isinstance(target_nnz, Mapping) or name not in target_nnz:
            raise InputError(f"prune_and_grow_tree: target_nnz has no entry for {name!r}, which has an element mask")
        targets = target_nnz[name]
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), targets.shape[0])
        stacked = w.shape if targets.shape[0] > 1 else (1, *w.shape)
        p = parse_pattern(rule.pattern)
        axis = p.axis(name, stacked[1:])
        p.check_shape(stacked[1:], name, axis)

        def lay_out(x: jax.Array) -> jax.Array:
            return jnp.swapaxes(x.reshape(stacked), axis, -2)

        # One matrix at a time: keys, scores and random bits of a whole stack would take several times its room.
        new = jax.lax.map(
            lambda matrix: prune_and_grow(
                *matrix[:4],
                target_nnz=matrix[4],
                drop_fraction=drop_fraction,
                gradient_share=rule.gradient_share,
                drop_score=rule.drop_score,
                pattern=rule.pattern,
            ),
            (keys, lay_out(w), lay_out(g), lay_out(mask), targets),
        )
        return jnp.swapaxes(new, axis, -2).reshape(mask.shape)

    if not isinstance(rule, Rule):
        raise InputError(f"prune_and_grow_tree: rule {rule!r} is no spdf.Rule; give one, such as spdf.RULES['rigl']")
    leaves = [
        mask if mask.ndim == 0 else update(name, w, g, mask)
        for (name, mask), (_, w), (_, g) in zip(
            named_leaves(masks), named_leaves(params), named_leaves(grads), strict=True
        )
    ]
    return jax.tree.unflatten(jax.tree.structure(masks), leaves)


def move_masks(
    key: jax.Array,
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    masks: Any,
    opt_state: Any,
    *,
    target_nnz: Mapping[str, jax.Array],
    drop_fraction: jax.Array,
    rule: Rule,
    regrowth: str,
) -> tuple[Any, Any, Any]:
    """A whole topology step: masks, the parameters under them, and the optimiser state of what came and went.

    Args:
      key, params, grads, masks, target_nnz, drop_fraction, rule: see `prune_and_grow_tree`.
      tx: the optimiser, to follow its state.
      opt_state: its state.
      regrowth: see `spdf_jax.optim.OptimizerConfig`.

    Returns:
      New ``(params, masks, opt_state)``; weights that are new start at 0.
    """
    new = prune_and_grow_tree(key, params, grads, masks, target_nnz=target_nnz, drop_fraction=drop_fraction, rule=rule)
    if regrowth != "keep":  # one dropped and regrown at once stays active, and keeps its state
        stayed = jax.tree.map(jnp.logical_and, masks, new)
        opt_state = reset_masked_state(tx, opt_state, params, stayed)
    return apply_masks(params, new), new, opt_state


def fit_masks(key: jax.Array, params: Any, masks: Any, target_nnz: Mapping[str, jax.Array], pattern: str) -> Any:
    """Masks brought to other counts: pruned by magnitude, grown at random. What has its count already stays bit for bit.

    >>> import jax.numpy as jnp
    >>> params, masks = {"w": jnp.array([[5.0, 0, 3, 1]])}, {"w": jnp.array([[True, False, True, True]])}
    >>> fit_masks(jax.random.key(0), params, masks, {"w": jnp.array([2])}, "unstructured")["w"].tolist()
    [[True, False, True, False]]
    """
    rule = Rule(gradient_share=0.0, pattern=pattern)
    drop = jnp.zeros(())
    return prune_and_grow_tree(key, params, params, masks, target_nnz=target_nnz, drop_fraction=drop, rule=rule)
