"""Which blocks of a block-sparse matrix are live.

The topology of a matrix is ``live [I, J]``, a bool a block: exactly K True in every column, so that every output block costs
the same, and exactly R = J K / I in every row, so that every input is read as often.

Blocks move by *exchange*: two live blocks of different columns swap their input blocks, which leaves every count as it was.

Shape legend: I input blocks, J output blocks, K live blocks an output block, N all live blocks, L layers.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spdf_jax.errors import InputError
from spdf_jax.ops.block_linear import live_inputs
from spdf_jax.sparsity.patterns import parse_pattern
from spdf_jax.tree import named_leaves

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


def balanced_topologies(params: Any, topology: Any) -> dict[str, jax.Array]:
    """Whether every column and every row of every matrix has the live blocks that it should, by leaf."""
    leaves = dict(named_leaves(params))

    def balanced(data_LJKbb: jax.Array, live_LIJ: jax.Array) -> jax.Array:
        inputs, (_, outputs, live, *_) = live_LIJ.shape[1], data_LJKbb.shape
        return (live_LIJ.sum(1) == live).all() & (live_LIJ.sum(2) * inputs == outputs * live).all()

    return {name: balanced(leaves[name], live_LIJ) for name, live_LIJ in named_leaves(topology)}
