"""Topologies of block-sparse matrices, and kernels stored as their live blocks alone.

The topology of a matrix is ``live [I, J]``, a bool a block: exactly K True in every column, so that every output block costs
the same, and exactly R = J K / I in every row, so that every input is read as often. The live blocks, column by column and in
it from top to bottom, are ``data [J, K, b, b]``, with which `spdf_jax.ops.block_linear` computes. Optimiser state follows them
and is as small.

Blocks move by *exchange*: two live blocks of different columns swap their input blocks, which leaves every count as it was. A
topology step drops the blocks of smallest score and lets them swap while the gradient of what grows gains by it: prune and grow
(`spdf_jax.sparsity.rules`) under the counts.

Shape legend: I input blocks, J output blocks, K live blocks an output block, b side of a block, L layers.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jax import lax

from spdf_jax.errors import InputError
from spdf_jax.ops.block_linear import live_inputs
from spdf_jax.sparsity.distributions import target_counts
from spdf_jax.sparsity.masks import dense_masks, matrix_groups
from spdf_jax.sparsity.patterns import Pattern, parse_pattern
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.sparsity.rules import Rule
from spdf_jax.sparsity.select import select_top_k
from spdf_jax.tree import Filter, along_state, map_named, named_leaves

# Random exchanges tried for every live block: enough to forget the regular start.
_SHUFFLES = 10


class BlockGrid(NamedTuple):
    """One matrix in I x J blocks of b x b, K of them live in every column."""

    side: int
    inputs: int
    outputs: int
    live: int


def block_grid(name: str, shape: tuple[int, ...], active: int, pattern: str) -> BlockGrid:
    """The grid of a matrix with `active` weights in blocks.

    Raises:
      InputError: it does not divide into the blocks, or `active` is not the same number of blocks in every column and row.

    >>> block_grid("w", (768, 3072), 768 * 3072 // 4, "block64")
    BlockGrid(side=64, inputs=12, outputs=48, live=3)
    """
    p = parse_pattern(pattern)
    if p.block == 1:
        raise InputError(
            f"sparsity.sparse_compute: 'blocks' needs a pattern of blocks such as 'block64', not {pattern!r}"
        )
    p.check_shape(shape, name)
    inputs, outputs = p.unit_shape(shape)
    live, left = divmod(active, p.unit_size * outputs)
    if left or live * outputs % inputs or not 0 < live <= inputs:
        step = inputs // math.gcd(inputs, outputs)  # K is a multiple of it where rows are whole
        density = active / math.prod(shape)
        below = min(max(step, int(density * inputs) // step * step), inputs - step)
        options = " or ".join(f"{1 - k / inputs:.6g} ({k} of {inputs})" for k in (below + step, below) if k)
        raise InputError(
            f"sparsity.sparsity: {name} in {inputs} x {outputs} blocks of {p.block} would keep {density * inputs:.4g} blocks a "
            f"column; sparse_compute 'blocks' needs the same whole number in every column and in every row. Use sparsity "
            f"{options}, or smaller blocks"
        )
    return BlockGrid(p.block, inputs, outputs, live)


def random_topology(key: jax.Array, grid: BlockGrid) -> jax.Array:
    """live_IJ, drawn by random exchanges from all that have these counts.

    >>> live_IJ = random_topology(jax.random.key(0), BlockGrid(64, 4, 8, 1))
    >>> live_IJ.sum(0).tolist(), live_IJ.sum(1).tolist()
    ([1, 1, 1, 1, 1, 1, 1, 1], [2, 2, 2, 2])
    """
    slots = grid.outputs * grid.live
    tries = jax.random.randint(key, (_SHUFFLES * slots, 2), 0, slots)

    def exchange_two(t: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        idx_N, live_IJ = state
        (a, b), column = tries[t], tries[t] // grid.live
        fits = ~live_IJ[idx_N[a], column[1]] & ~live_IJ[idx_N[b], column[0]]
        return lax.cond(fits, lambda: _swapped(idx_N, live_IJ, a, b, grid.live), lambda: state)

    _, live_IJ = lax.fori_loop(0, tries.shape[0], exchange_two, _regular(grid))
    return live_IJ


def best_topology(score_IJ: jax.Array, start_IJ: jax.Array, grid: BlockGrid) -> jax.Array:
    """live_IJ whose scores sum to as much as exchanges find, beginning with `start_IJ` if that has the counts."""
    reads = grid.outputs * grid.live // grid.inputs
    fits = (start_IJ.sum(0) == grid.live).all() & (start_IJ.sum(1) == reads).all()
    free_JK = jnp.ones((grid.outputs, grid.live), bool)
    return exchange(jnp.where(fits, start_IJ, _regular(grid)[1]), score_IJ, grid.live, free_JK, free_JK.size)


def exchange(
    live_IJ: jax.Array, score_IJ: jax.Array, live: int, free_JK: jax.Array, most: jax.Array | int
) -> jax.Array:
    """Exchanges pairs of free blocks, each time the pair that raises the sum of live scores most, while one does.

    Args:
      live_IJ: bool, K True in every column.
      score_IJ: of every block, live or not.
      live: K.
      free_JK: which of the live blocks may move, in the order of `live_inputs`.
      most: exchanges at most; may be traced.

    Returns:
      live_IJ with the same counts in every row and column.

    >>> live_IJ, score_IJ = jnp.eye(2, dtype=bool), jnp.array([[0.0, 1.0], [3.0, 2.0]])
    >>> exchange(live_IJ, score_IJ, 1, jnp.ones((2, 1), bool), 1).tolist()
    [[False, True], [True, False]]
    """
    score_IJ = jnp.nan_to_num(score_IJ.astype(jnp.float32))
    free_N = free_JK.reshape(-1)
    column_N = jnp.arange(free_N.size) // live

    def gain(idx_N: jax.Array, live_IJ: jax.Array) -> jax.Array:
        """[N, N] of every pair; -inf where one of the two new blocks is live already, or they are not free."""
        grown_IJ = jnp.where(live_IJ, -jnp.inf, score_IJ)
        grown_NN = jnp.repeat(grown_IJ[idx_N], live, axis=1)
        own_N = score_IJ[idx_N, column_N]
        gain_NN = grown_NN + grown_NN.T - own_N[:, None] - own_N[None]
        return jnp.where(free_N[:, None] & free_N[None], gain_NN, -jnp.inf)

    def step(state: Any) -> Any:
        idx_N, live_IJ, gain_NN, n = state
        a, b = jnp.divmod(jnp.argmax(gain_NN), free_N.size)
        idx_N, live_IJ = _swapped(idx_N, live_IJ, a, b, live)
        return idx_N, live_IJ, gain(idx_N, live_IJ), n + 1

    idx_N = live_inputs(live_IJ, live).reshape(-1)
    start = (idx_N, live_IJ, gain(idx_N, live_IJ), jnp.zeros((), jnp.int32))
    return lax.while_loop(lambda state: (jnp.max(state[2]) > 0) & (state[3] < most), step, start)[1]


def _regular(grid: BlockGrid) -> tuple[jax.Array, jax.Array]:
    """Windows that follow one another around the inputs: idx_N and live_IJ."""
    idx_N = jnp.arange(grid.outputs * grid.live, dtype=jnp.int32) % grid.inputs
    live_IJ = jnp.zeros((grid.inputs, grid.outputs), bool)
    return idx_N, live_IJ.at[idx_N, jnp.arange(idx_N.size) // grid.live].set(True)


def _swapped(
    idx_N: jax.Array, live_IJ: jax.Array, a: jax.Array, b: jax.Array, live: int
) -> tuple[jax.Array, jax.Array]:
    """Live blocks a and b with each other's inputs."""
    rows, columns = idx_N[jnp.array([a, b])], jnp.array([a, b]) // live
    live_IJ = live_IJ.at[rows, columns].set(False).at[rows[::-1], columns].set(True)
    return idx_N.at[jnp.array([a, b])].set(rows[::-1]), live_IJ


# --- kernels and their live blocks -----------------------------------------------------------------------------------


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


def as_blocks(key: jax.Array, tx: optax.GradientTransformation, state: Any, config: Any, filter: Filter) -> Any:
    """A `spdf_jax.TrainState` with live blocks alone in the place of whole kernels.

    Args:
      key: for what is drawn.
      tx: the optimiser of the state.
      state: of whole kernels, dense or under masks; see `init_topology` for what stays.
      config: `spdf_jax.sparsity.programme.SparsityConfig`: how many blocks, of what size, and how they are chosen.
      filter: which leaves.

    Returns:
      A state whose masks are all 0-d.
    """
    groups = matrix_groups(state.params, filter)
    counts = target_counts(groups, config.curve(0.0), config.distribution, config.pattern)
    grids = {name: block_grid(name, group.shape, counts[name], config.pattern) for name, group in groups.items()}
    topology = init_topology(key, state.params, grids, method=config.init, masks=state.masks)
    params, opt_state = to_blocks(tx, state.params, state.opt_state, topology, grids)
    return state.replace(params=params, masks=dense_masks(params), opt_state=opt_state, topology=topology)


def as_masks(tx: optax.GradientTransformation, state: Any) -> Any:
    """A `spdf_jax.TrainState` with whole kernels under element masks in the place of blocks, exactly 0 outside them.

    Args:
      tx: the optimiser of the state.
      state: with blocks or without.

    Returns:
      A state of the same values without blocks; the same state if there were none.

    >>> import spdf_jax as spdf
    >>> params = {"w": jnp.ones((2, 2))}
    >>> state = spdf.TrainState(jnp.zeros((), jnp.int32), params, spdf.dense_masks(params), (), jax.random.key(0))
    >>> as_masks(optax.identity(), state) is state  # no blocks
    True
    """
    if not state.topology:
        return state
    params, opt_state, masks = to_masks(tx, state.params, state.opt_state, state.topology)
    return state.replace(params=params, masks=masks, opt_state=opt_state, topology={})


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


def balanced_topologies(params: Any, topology: Any) -> dict[str, jax.Array]:
    """Whether every column and every row of every matrix has the live blocks that it should, by leaf."""
    leaves = dict(named_leaves(params))

    def balanced(data_LJKbb: jax.Array, live_LIJ: jax.Array) -> jax.Array:
        inputs, (_, outputs, live, *_) = live_LIJ.shape[1], data_LJKbb.shape
        return (live_LIJ.sum(1) == live).all() & (live_LIJ.sum(2) * inputs == outputs * live).all()

    return {name: balanced(leaves[name], live_LIJ) for name, live_LIJ in named_leaves(topology)}


def evolve_blocks(
    key: jax.Array,
    tx: optax.GradientTransformation,
    state: Any,
    grads: Any,
    *,
    drop_fraction: jax.Array,
    rule: Rule,
) -> Any:
    """Moves the live blocks of a `spdf_jax.TrainState`, as `spdf_jax.sparsity.rules.evolve` does masks.

    Of every matrix the blocks of smallest drop score are let go, and `gradient_share` of them exchange by the norm of the
    dense gradient, then the rest at random. A block that nothing could replace stays as it is.

    Args:
      key: each leaf draws from it and its own name.
      tx: the optimiser of the state.
      state: with data_LJKbb at the leaves of its topology.
      grads: dense gradient, kernel_LPQ there.
      drop_fraction: share of the live blocks let go; may be traced.
      rule: what to drop and grow.

    Returns:
      The state with new parameters, topology and optimiser state; blocks that are new start at 0, the state of each afresh.
    """
    leaves, dense_grads = dict(named_leaves(state.params)), dict(named_leaves(grads))
    move = partial(_evolve_matrix, drop_fraction=drop_fraction, rule=rule)
    live, sources = {}, {}
    for name, live_LIJ in named_leaves(state.topology):
        keys = jax.random.split(jax.random.fold_in(key, zlib.crc32(name.encode())), live_LIJ.shape[0])
        matrices = (keys, leaves[name], dense_grads[name], live_LIJ)
        live[name], sources[name] = lax.map(lambda matrix: move(*matrix), matrices)
    change = {name: partial(_moved, source_LJK=source_LJK) for name, source_LJK in sources.items()}
    params, opt_state = _convert(tx, state.params, state.opt_state, change)

    def stayed(name: str, leaf: jax.Array) -> jax.Array:
        if name not in sources:
            return jnp.array(True)
        return jnp.broadcast_to((sources[name] >= 0)[..., None, None], leaf.shape)

    opt_state = reset_masked_state(tx, opt_state, params, map_named(stayed, params))
    return state.replace(params=params, topology=traverse_util.unflatten_dict(live, sep="/"), opt_state=opt_state)


def _evolve_matrix(
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
