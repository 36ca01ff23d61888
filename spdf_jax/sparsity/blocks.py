"""Kernels stored as their live blocks alone, of a topology ``live [I, J]`` (`spdf_jax.sparsity.block_topology`).

The live blocks, column by column and in it from top to bottom, are ``data [J, K, b, b]``, with which
`spdf_jax.ops.block_linear` computes. Optimiser state follows them and is as small.

A topology step drops the blocks of smallest score and lets them exchange while the gradient of what grows gains by it: prune
and grow (`spdf_jax.sparsity.topology`) under the counts.

Shape legend: I input blocks, J output blocks, K live blocks an output block, b side of a block, L layers.
"""

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import lax

from spdf_jax.errors import InputError
from spdf_jax.ops.block_linear import live_inputs
from spdf_jax.sparsity.block_topology import BlockGrid, best_topology, exchange, random_topology
from spdf_jax.sparsity.patterns import Pattern
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.sparsity.select import select_top_k
from spdf_jax.sparsity.topology import Rule
from spdf_jax.tree import along_state, map_named, named_leaves


def compress(kernel_LPQ: jax.Array, live_LIJ: jax.Array, live: int) -> jax.Array:
    """The live blocks of a kernel, ``data_LJKbb``; the inverse of `expand` on a kernel that is 0 elsewhere."""
    layers, inputs, outputs = live_LIJ.shape
    b = kernel_LPQ.shape[1] // inputs
    blocks_LIJbb = kernel_LPQ.reshape(layers, inputs, b, outputs, b).swapaxes(2, 3)
    take = jax.vmap(lambda blocks_IJbb, live_IJ: blocks_IJbb[live_inputs(live_IJ, live), jnp.arange(outputs)[:, None]])
    return take(blocks_LIJbb, live_LIJ)


def expand(data_LJKbb: jax.Array, live_LIJ: jax.Array) -> jax.Array:
    """``kernel_LPQ`` with exact zeros outside the live blocks.

    >>> data_LJKbb, live_LIJ = jnp.array([5.0, 7.0]).reshape(1, 2, 1, 1, 1), jnp.eye(2, dtype=bool)[None]
    >>> expand(data_LJKbb, live_LIJ).tolist(), bool((compress(expand(data_LJKbb, live_LIJ), live_LIJ, 1) == data_LJKbb).all())
    ([[[5.0, 0.0], [0.0, 7.0]]], True)
    """
    layers, inputs, outputs = live_LIJ.shape
    b = data_LJKbb.shape[-1]
    blocks_LIJbb = jax.vmap(_block_of)(data_LJKbb, live_LIJ)
    return blocks_LIJbb.swapaxes(2, 3).reshape(layers, inputs * b, outputs * b)


def _block_of(data_JKbb: jax.Array, live_IJ: jax.Array) -> jax.Array:
    """blocks_IJbb, 0 where they are not live."""
    rank_IJ = jnp.cumsum(live_IJ, axis=0) - 1
    blocks_IJbb = data_JKbb[jnp.arange(live_IJ.shape[1])[None], rank_IJ]
    return jnp.where(live_IJ[:, :, None, None], blocks_IJbb, jnp.zeros((), data_JKbb.dtype))


# --- trees -----------------------------------------------------------------------------------------------------------
# A topology tree, nested dicts, holds live_LIJ at the places of the parameters that are stored as blocks and nothing else.


def init_topology(
    key: jax.Array, params: Any, grids: Mapping[str, BlockGrid], *, method: str = "random", masks: Any = None
) -> Any:
    """A topology tree.

    Args:
      key: each leaf's draw depends on it and the leaf's name only.
      params: nested dicts with dense kernels [L, P, Q]; values matter for ``magnitude`` only.
      grids: of the kernels by name, see `block_grid`.
      method: ``random``, or ``magnitude``: the blocks of largest norm, as far as exchanges find them.
      masks: mask tree that `params` are under. Where it holds an element mask, its blocks stay if they have the counts of the
        grid; if not, those of largest norm are taken.

    >>> params = {"a": {"kernel": jnp.ones((2, 8, 8))}}
    >>> topology = init_topology(jax.random.key(0), params, {"a/kernel": BlockGrid(2, 4, 4, 2)})
    >>> topology["a"]["kernel"].shape, topology["a"]["kernel"].sum(1)[0].tolist()
    ((2, 4, 4), [2, 2, 2, 2])
    """
    leaves, topology = dict(named_leaves(params)), {}
    found = dict(named_leaves(masks)) if masks is not None else {}
    for name, grid in grids.items():
        pattern, layers = Pattern(grid.side), leaves[name].shape[0]
        if name in found and found[name].ndim:
            start_LIJ = pattern.pool_mask(found[name])
        else:
            start_LIJ = jnp.zeros((layers, grid.inputs, grid.outputs), bool)
            if method == "random":
                keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), layers)
                topology[name] = jax.vmap(partial(random_topology, grid=grid))(keys)
                continue
        best = partial(best_topology, grid=grid)
        topology[name] = lax.map(lambda matrix, best=best: best(*matrix), (pattern.pool(leaves[name]), start_LIJ))
    return traverse_util.unflatten_dict(topology, sep="/")


def to_blocks(
    tx: optax.GradientTransformation, params: Any, opt_state: Any, topology: Any, grids: Mapping[str, BlockGrid]
) -> tuple[Any, Any]:
    """Parameters and optimiser state with their live blocks alone; what lies outside is dropped."""
    lives = dict(named_leaves(topology))
    pack = {name: partial(compress, live_LIJ=lives[name], live=grid.live) for name, grid in grids.items()}
    return _convert(tx, params, opt_state, pack)


def to_masks(tx: optax.GradientTransformation, params: Any, opt_state: Any, topology: Any) -> tuple[Any, Any, Any]:
    """The same as dense arrays, exactly 0 outside the live blocks, where the optimiser's state is as `tx` starts it.

    Inverse of `to_blocks` where all was so.

    Returns:
      ``(params, opt_state, masks)``.
    """
    lives = dict(named_leaves(topology))
    unpack = {name: partial(expand, live_LIJ=live_LIJ) for name, live_LIJ in lives.items()}
    masks = element_masks(params, topology)
    params, opt_state = _convert(tx, params, opt_state, unpack)
    return params, reset_masked_state(tx, opt_state, params, masks), masks


def expand_tree(params: Any, topology: Any) -> Any:
    """Parameters as dense arrays, exactly 0 outside the live blocks."""
    lives = dict(named_leaves(topology))
    return map_named(lambda name, leaf: expand(leaf, lives[name]) if name in lives else leaf, params)


def compress_tree(tree: Any, topology: Any, like: Any) -> Any:
    """The live blocks alone of a tree of dense arrays, such as gradients; `like` gives their number."""
    lives = dict(named_leaves(topology))
    return map_named(
        lambda name, leaf, data: compress(leaf, lives[name], data.shape[2]) if name in lives else leaf, tree, like
    )


def element_masks(params: Any, topology: Any) -> Any:
    """The mask tree of `spdf_jax.init_masks` that says the same: an element mask for every kernel stored as blocks."""
    lives = dict(named_leaves(topology))
    return map_named(
        lambda name, leaf: Pattern(leaf.shape[-1]).expand(lives[name]) if name in lives else jnp.array(True), params
    )


def move_blocks(
    key: jax.Array,
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    topology: Any,
    opt_state: Any,
    *,
    drop_fraction: jax.Array,
    rule: Rule,
) -> tuple[Any, Any, Any]:
    """A whole topology step of live blocks, as `spdf_jax.sparsity.topology.move_masks` is one of masks.

    Of every matrix the blocks of smallest drop score are let go, and `gradient_share` of them exchange by the norm of the
    dense gradient, then the rest at random. A block that nothing could replace stays as it is.

    Args:
      key: each leaf draws from it and its own name.
      tx: the optimiser, to follow its state.
      params: with data_LJKbb at the leaves of `topology`.
      grads: dense gradient, kernel_LPQ there.
      topology: live_LIJ of every kernel stored as blocks.
      opt_state: the optimiser's state.
      drop_fraction: share of the live blocks let go; may be traced.
      rule: what to drop and grow.

    Returns:
      New ``(params, topology, opt_state)``; blocks that are new start at 0, the state of each afresh.
    """
    leaves, dense_grads = dict(named_leaves(params)), dict(named_leaves(grads))
    move = partial(_move_matrix, drop_fraction=drop_fraction, rule=rule)
    live, sources = {}, {}
    for name, live_LIJ in named_leaves(topology):
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), live_LIJ.shape[0])
        matrices = (keys, leaves[name], dense_grads[name], live_LIJ)
        live[name], sources[name] = lax.map(lambda matrix: move(*matrix), matrices)
    change = {name: partial(_moved, source_LJK=source_LJK) for name, source_LJK in sources.items()}
    params, opt_state = _convert(tx, params, opt_state, change)

    def stayed(name: str, leaf: jax.Array) -> jax.Array:
        if name not in sources:
            return jnp.array(True)
        return jnp.broadcast_to((sources[name] >= 0)[..., None, None], leaf.shape)

    opt_state = reset_masked_state(tx, opt_state, params, map_named(stayed, params))
    return params, traverse_util.unflatten_dict(live, sep="/"), opt_state


def _move_matrix(
    key: jax.Array, data_JKbb: jax.Array, grad_PQ: jax.Array, live_IJ: jax.Array, *, drop_fraction: Any, rule: Rule
) -> tuple[jax.Array, jax.Array]:
    """New live_IJ, and which old block each new one was, -1 for none: source_JK."""
    J, K, b, _ = data_JKbb.shape
    grad_JKbb = compress(grad_PQ[None], live_IJ[None], K)[0]
    score_JK = jnp.sum(jnp.square(rule.drop_score(data_JKbb, grad_JKbb).astype(jnp.float32)), (2, 3))
    n_drop = jnp.floor(J * K * jnp.asarray(drop_fraction, jnp.float32)).astype(jnp.int32)
    free_JK = ~select_top_k(score_JK, J * K - n_drop)
    n_by_gradient = jnp.floor(n_drop * rule.gradient_share).astype(jnp.int32)
    new_IJ = exchange(live_IJ, Pattern(b).pool(jnp.abs(grad_PQ)), K, free_JK, n_by_gradient // 2)
    if rule.gradient_share < 1:
        free_IJ = _block_of(free_JK[:, :, None, None], live_IJ)[:, :, 0, 0]
        still_JK = (free_IJ & new_IJ)[live_inputs(new_IJ, K), jnp.arange(J)[:, None]]
        new_IJ = exchange(new_IJ, jax.random.uniform(key, new_IJ.shape), K, still_JK, n_drop)
    same_JKK = live_inputs(new_IJ, K)[:, :, None] == live_inputs(live_IJ, K)[:, None]
    return new_IJ, jnp.where(same_JKK.any(2), jnp.argmax(same_JKK, 2), -1)


def _moved(data_LJKbb: jax.Array, source_LJK: jax.Array) -> jax.Array:
    """Every block from where it was, 0 where it is new."""
    source_LJK11 = source_LJK[..., None, None]
    moved_LJKbb = jnp.take_along_axis(data_LJKbb, jnp.maximum(source_LJK11, 0), 2)
    return jnp.where(source_LJK11 >= 0, moved_LJKbb, jnp.zeros((), data_LJKbb.dtype))


def _convert(
    tx: optax.GradientTransformation,
    params: Any,
    opt_state: Any,
    change: Mapping[str, Callable[[jax.Array], jax.Array]],
) -> tuple[Any, Any]:
    """Applies a function to every weight that has one, and to the optimiser state that follows it."""

    def follow(name: str, leaf: Any) -> Callable[[jax.Array], jax.Array]:
        def apply(value: jax.Array) -> jax.Array:
            if value.shape == leaf.shape:
                return change[name](value)
            if value.size == 1:  # one number for the whole tensor
                return value
            raise InputError(
                f"optimiser state of shape {value.shape} for {name} {leaf.shape}: it cannot be followed block by block; use an "
                f"optimiser with element-wise state (Adafactor: factored=False)"
            )

        return apply if name in change else _unchanged

    functions = map_named(follow, params)
    along = along_state(tx, opt_state, functions, _unchanged)
    return tuple(
        jax.tree.map(lambda f, value: f(value), f, values) for f, values in ((functions, params), (along, opt_state))
    )


def _unchanged(value: jax.Array) -> jax.Array:
    return value
