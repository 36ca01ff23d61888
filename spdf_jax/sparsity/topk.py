"""Masks chosen anew after every optimiser step: each matrix keeps its largest weights by magnitude (Gao et al. 2025).

Gradients and moments are dense, so that a weight that was zeroed may come back at any step. Nothing is carried from step to
step but the masks: the threshold is found from the weights alone, exactly, in a few passes over a matrix while it lies in the
cache. It starts from the threshold of a sample and goes on by interpolation between counts, three a pass, where
`spdf_jax.sparsity.select` asks for two bits of it a pass: weights are spread smoothly, and random bits need not be. Under
sharding only counts and the sample cross devices, so the result is the same bits on every mesh.

Shape legend: P inputs, Q outputs of a matrix.

Source: arXiv 2511.13653 (weight-sparse training); no code of it is public.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spdf_jax.errors import InputError
from spdf_jax.sparsity.inside import check_arguments
from spdf_jax.sparsity.masks import keep_where
from spdf_jax.sparsity.select import _count_at_least, _first, _kth_largest, order_keys
from spdf_jax.sparsity.topology import Rule
from spdf_jax.tree import named_leaves

#: What has neurons: the outputs of these matrices.
NEURONS = r"^blocks/.*kernel$"
#: Keys of a sample; what has not many times as many needs none.
_SAMPLE, _SMALL = 1 << 12, 1 << 15
_LARGEST = jnp.iinfo(jnp.int32).max


def every_weight(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser that moves masked weights, too: who takes its steps chooses masks after each, and applies them.

    >>> import optax
    >>> tx, params, masks = every_weight(optax.sgd(0.5)), {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    >>> tx.update({"w": jnp.array([1.0, 1.0])}, tx.init(params), params, masks=masks)[0]["w"].tolist()
    [-0.5, -0.5]
    """
    inner = optax.with_extra_args_support(inner)

    def update(grads: Any, state: Any, params: Any = None, *, masks: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_arguments(grads, params, masks)
        return inner.update(grads, state, params, masks=masks, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def check_floor(floor: int, kept: Mapping[str, tuple[tuple[int, ...], int]]) -> None:
    """Refuses a floor that matrices have no room for.

    Args:
      floor: weights that each output of a layer's kernel keeps at least.
      kept: ``{leaf name: (shape of a matrix, weights that it keeps where it is sparsest)}``.

    Raises:
      InputError: more than it keeps, or than an output has.

    >>> check_floor(4, {"blocks/mlp_up/kernel": ((64, 256), 512)})
    Traceback (most recent call last):
    spdf_jax.errors.InputError: sparsity.floor_per_neuron: 4 for each of 256 outputs of blocks/mlp_up/kernel are more than the \
512 weights that it keeps; use at most 2, or a lower sparsity
    """
    for name, (shape, count) in kept.items():
        if re.search(NEURONS, name) and floor * shape[-1] > count:
            raise InputError(
                f"sparsity.floor_per_neuron: {floor} for each of {shape[-1]} outputs of {name} are more than the {count} "
                f"weights that it keeps; use at most {count // shape[-1]}, or a lower sparsity"
            )


def keep_largest_weights(params: Any, masks: Any, target_nnz: Mapping[str, jax.Array], rule: Rule) -> tuple[Any, Any]:
    """Masks of the largest weights of every sparse matrix, and the parameters under them.

    Args:
      params: pytree of arrays, not 0 where masked.
      masks: mask tree; only which leaves are sparse matters.
      target_nnz: ``{leaf name: int32 [matrices]}``: active weights of each afterwards; may be traced.
      rule: its `floor` is for outputs of matrices in the layers.

    Returns:
      ``(params, masks)``: exactly `target_nnz` active, ties by lowest index.

    Raises:
      InputError: an element mask without targets.

    >>> params = {"w": jnp.array([[4.0, -3.0], [0.5, 5.0]])}
    >>> masks = {"w": jnp.ones((2, 2), bool)}
    >>> keep_largest_weights(params, masks, {"w": jnp.array([2])}, Rule())[0]["w"].tolist()
    [[4.0, 0.0], [0.0, 5.0]]
    """

    def choose(name: str, w: jax.Array, mask: jax.Array) -> jax.Array:
        if mask.ndim == 0:
            return mask
        if name not in target_nnz:
            raise InputError(f"keep_largest_weights: target_nnz has no entry for {name!r}, which has an element mask")
        targets = target_nnz[name]
        floor = rule.floor if re.search(NEURONS, name) else 0
        stacked = w.shape if targets.shape[0] > 1 else (1, *w.shape)
        # One matrix at a time, which then stays in the cache.
        new = jax.lax.map(lambda matrix: largest(*matrix, floor=floor), (w.reshape(stacked), targets))
        return new.reshape(w.shape)

    named = zip(named_leaves(params), jax.tree.leaves(masks), strict=True)
    new = jax.tree.unflatten(jax.tree.structure(masks), [choose(name, w, mask) for (name, w), mask in named])
    return jax.tree.map(lambda mask, w: keep_where(mask, w), new, params), new


def largest(weights: jax.Array, k: jax.Array | int, *, floor: int = 0) -> jax.Array:
    """Marks the `k` largest weights by magnitude, ties by lowest index in row-major order; NaN as 0.

    Args:
      weights: of a matrix, floats of any shape.
      k: how many, from `floor` times the outputs to the size; may be traced.
      floor: at least so many of each output (each index of the last axis), its own largest.

    Returns:
      bool of the shape of `weights` with exactly `k` True.

    >>> largest(jnp.array([[1.0, 5.0], [-2.0, 5.0], [0.0, 6.0]]), 3).tolist()
    [[False, True], [False, True], [False, True]]
    >>> largest(jnp.array([[1.0, 5.0], [-2.0, 5.0], [0.0, 6.0]]), 3, floor=1).tolist()
    [[False, True], [True, False], [False, True]]
    """
    keys = jnp.maximum(order_keys(jnp.abs(weights)).astype(jnp.int32), 0)
    if floor:
        keys_PQ = keys.reshape(-1, keys.shape[-1])
        # Larger than any magnitude, and below the bound at which the search starts.
        keys = jnp.where(_largest_of_each_output(keys_PQ, floor), _LARGEST - 1, keys_PQ).reshape(keys.shape)
    k = jnp.asarray(k, jnp.int32)
    if keys.size <= _SMALL:
        threshold, above = _kth_largest(keys, k)
        return (keys > threshold) | _first(keys == threshold, k - above)
    keys = jax.lax.optimization_barrier(keys)  # read many times
    found = _search(keys, k)

    def with_ties() -> jax.Array:
        return (keys >= found.high) | _first(keys == found.low, k - found.above)

    return jax.lax.cond(found.reach == k, lambda: keys >= found.low, with_ties)


def _largest_of_each_output(keys_PQ: jax.Array, count: int) -> jax.Array:
    """Marks the `count` largest of each column, ties by lowest row: one after the other, for they are few."""
    P, Q = keys_PQ.shape
    rounds, least_1Q = range(min(count, P)), jnp.full((1, Q), _LARGEST)
    for _ in rounds:
        least_1Q = jnp.max(jnp.where(keys_PQ < least_1Q, keys_PQ, -1), axis=0, keepdims=True)

    def with_ties() -> jax.Array:
        rows_P1, key_1Q, row_1Q = jnp.arange(P)[:, None], jnp.full((1, Q), _LARGEST), jnp.full((1, Q), -1)
        marked_PQ = jnp.zeros(keys_PQ.shape, bool)
        for _ in rounds:
            left_PQ = (keys_PQ < key_1Q) | ((keys_PQ == key_1Q) & (rows_P1 > row_1Q))
            key_1Q = jnp.max(jnp.where(left_PQ, keys_PQ, -1), axis=0, keepdims=True)
            row_1Q = jnp.min(jnp.where(left_PQ & (keys_PQ == key_1Q), rows_P1, P), axis=0, keepdims=True)
            marked_PQ |= rows_P1 == row_1Q
        return marked_PQ

    reach_Q = jnp.sum(keys_PQ >= least_1Q, axis=0, dtype=jnp.int32)
    return jax.lax.cond(jnp.all(reach_Q == len(rounds)), lambda: keys_PQ >= least_1Q, with_ties)


class _Bracket(NamedTuple):
    """``low < high``: `reach` keys are at least `low`, k or more; `above` are at least `high`, fewer than k."""

    low: jax.Array
    high: jax.Array
    reach: jax.Array
    above: jax.Array
    rounds: jax.Array
    probes: tuple[jax.Array, ...]


def _search(keys: jax.Array, k: jax.Array) -> _Bracket:
    """A bracket of which either `reach` is k, or `low` and `high` are neighbours: then ties at `low` are to be cut."""

    def narrow(b: _Bracket) -> _Bracket:
        low, high, reach, above = b.low, b.high, b.reach, b.above
        for probe, count in zip(b.probes, _count_at_least(keys, list(b.probes)), strict=True):
            up, down = (count >= k) & (probe > low), (count < k) & (probe < high)
            low, reach = jnp.where(up, probe, low), jnp.where(up, count, reach)
            high, above = jnp.where(down, probe, high), jnp.where(down, count, above)
        width, between = (high - low).astype(jnp.float32), (reach - above).astype(jnp.float32)
        share = (reach - k).astype(jnp.float32) / between
        # As many keys as lie between are spread evenly there, but for chance: two of its standard deviations, and a key or so.
        chance = 2 * jnp.sqrt(share * (1 - share) / between) + 1 / between
        by_count = [jnp.clip(share + step * chance, 0, 1) for step in (-1.0, 0.0, 1.0)]
        # Where they are not, quarters end it: a bracket of 2^31 in 16 rounds of these.
        shares = [jnp.where(b.rounds % 4 == 3, i / 4, by_count[i - 1]) for i in (1, 2, 3)]
        # In int32: a float32 has no room for all of them. The clip sees to it that each round narrows.
        probes = tuple(jnp.clip(low + (s * width).astype(jnp.int32), low + 1, high - 1) for s in shares)
        return _Bracket(low, high, reach, above, b.rounds + 1, probes)

    def open_(b: _Bracket) -> jax.Array:
        return (b.reach != k) & (b.high - b.low > 1)

    low, high, zero = jnp.zeros((), jnp.int32), jnp.full((), _LARGEST), jnp.zeros((), jnp.int32)
    size = jnp.full((), keys.size, jnp.int32)
    return jax.lax.while_loop(open_, narrow, _Bracket(low, high, size, zero, zero, _first_probes(keys, k)))


def _first_probes(keys: jax.Array, k: jax.Array) -> tuple[jax.Array, ...]:
    """Thresholds around that of a sample in rows and columns, between which nearly always the whole's own lies."""
    stride = max(1, keys.size // _SAMPLE)
    if keys.ndim > 1:
        stride = max(1, round(stride**0.5))
        keys_of = keys[..., ::stride, ::stride]
    else:
        keys_of = keys[::stride]
    rank = k.astype(jnp.float32) * (keys_of.size / keys.size)
    chance = 4 * jnp.sqrt(rank) + 1
    ranks_2 = jnp.clip(rank + jnp.array([1.0, -1.0]) * chance, 1, keys_of.size).astype(jnp.int32)
    low, high = jax.vmap(lambda rank: _kth_largest(keys_of, rank)[0])(ranks_2)
    # Between what was kept before and what was 0 there is a gap, wide as numbers of their bits go: its middle is in it.
    return tuple(jnp.clip(probe, 1, _LARGEST - 1) for probe in (low, low + (high - low) // 2, high))
