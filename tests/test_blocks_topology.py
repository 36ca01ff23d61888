"""Block topologies: exact counts in every row and column whatever moves, exact conversions, optimiser state that follows."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import OPTIMIZERS
from tiny import slow_but

from spdf_jax.errors import InputError
from spdf_jax.sparsity.block_topology import BlockGrid, best_topology, block_grid, exchange, random_topology
from spdf_jax.sparsity.blocks import (
    compress,
    element_masks,
    expand,
    expand_tree,
    init_topology,
    move_blocks,
    to_blocks,
    to_masks,
)
from spdf_jax.sparsity.mask_report import mask_report
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topology import Rule
from spdf_jax.training.state import TrainState

# One program each: op by op, every shape would compile some dozens of them.
compress = jax.jit(compress, static_argnums=2)
exchange = jax.jit(exchange, static_argnums=2)
expand, expand_tree = jax.jit(expand), jax.jit(expand_tree)
random_topology = jax.jit(random_topology, static_argnums=1)
to_blocks, to_masks = jax.jit(to_blocks, static_argnums=(0, 4)), jax.jit(to_masks, static_argnums=0)
GRIDS = [BlockGrid(2, *g) for g in ((4, 4, 1), (4, 8, 1), (8, 4, 2), (6, 4, 3), (3, 6, 2), (4, 6, 2), (5, 5, 5))]


def has_counts(live_IJ, grid):
    columns, rows = np.asarray(live_IJ).sum(0), np.asarray(live_IJ).sum(1)
    return (columns == grid.live).all() and (rows == grid.outputs * grid.live // grid.inputs).all()


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("grid", slow_but(GRIDS[:3], GRIDS), ids=str)
def test_random_topologies_have_exact_counts_and_differ(grid):
    lives = jax.vmap(lambda key: random_topology(key, grid))(jax.random.split(jax.random.key(0), 8))
    assert all(has_counts(live_IJ, grid) for live_IJ in lives)
    different = len({np.asarray(live_IJ).tobytes() for live_IJ in lives})
    assert different >= 4 or grid.live == grid.inputs


def test_random_topologies_read_every_pair_of_inputs_together():
    """The regular start groups inputs: (0, 1), (2, 3). Drawn at random, all pairs are about as common."""
    grid = BlockGrid(2, 4, 8, 2)
    lives = np.asarray(jax.vmap(lambda key: random_topology(key, grid))(jax.random.split(jax.random.key(0), 200)))
    together = np.einsum("nij,nkj->ik", lives, lives.astype(int)) / (200 * 8)
    pairs = [together[i, k] for i, k in itertools.combinations(range(4), 2)]
    assert 0.12 < min(pairs) < max(pairs) < 0.22  # 1/6 each


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(GRIDS[1:4]), st.integers(0, 99), st.integers(0, 6), st.floats(0, 1))
def test_exchange_keeps_the_counts_moves_free_blocks_only_and_gains(grid, seed, most, free_share):
    rng = np.random.default_rng(seed)
    live_IJ = random_topology(jax.random.key(seed), grid)
    score_IJ, free_JK = normal(seed, grid.inputs, grid.outputs), rng.random((grid.outputs, grid.live)) < free_share
    new_IJ = exchange(live_IJ, score_IJ, grid.live, jnp.asarray(free_JK), most)
    assert has_counts(new_IJ, grid)
    moved = np.asarray(new_IJ != live_IJ)
    assert moved.sum() <= 4 * most
    idx_JK = [np.flatnonzero(column) for column in np.asarray(live_IJ).T]
    held = [(idx_JK[j][k], j) for j, k in np.argwhere(~free_JK)]
    assert all(new_IJ[i, j] for i, j in held)
    before, after = (float(jnp.sum(jnp.where(live, score_IJ, 0))) for live in (live_IJ, new_IJ))
    assert after > before if moved.any() else after == before


def test_exchange_ends_where_no_pair_would_gain():
    grid, score_IJ = BlockGrid(2, 6, 6, 2), normal(0, 6, 6)
    live_IJ = np.asarray(best_topology(score_IJ, jnp.zeros((6, 6), bool), grid))
    assert has_counts(live_IJ, grid)
    cells, score = np.argwhere(live_IJ), np.asarray(score_IJ)
    for (i, j), (k, m) in itertools.combinations(cells, 2):
        if not live_IJ[i, m] and not live_IJ[k, j]:
            assert score[i, m] + score[k, j] <= score[i, j] + score[k, m] + 1e-6


def test_exchange_takes_the_best_pair_first():
    score_IJ = jnp.array([[0.0, 5, 1], [5, 0, 1], [1, 1, 0]])
    new_IJ = exchange(jnp.eye(3, dtype=bool), score_IJ, 1, jnp.ones((3, 1), bool), 1)
    assert new_IJ.astype(int).tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 1]]


def test_a_score_that_is_not_a_number_wins_no_place():
    score_IJ = jnp.array([[0.0, jnp.nan], [jnp.nan, 0.0]])
    assert (exchange(jnp.eye(2, dtype=bool), score_IJ, 1, jnp.ones((2, 1), bool), 9) == jnp.eye(2, dtype=bool)).all()


@pytest.mark.parametrize("grid", slow_but(GRIDS[:2], GRIDS[:4]), ids=str)
def test_compressed_kernels_expand_to_the_same_bits_and_back(grid):
    live_LIJ = jnp.stack([random_topology(jax.random.key(i), grid) for i in range(2)])
    b = grid.side
    data_LJKbb = normal(0, 2, grid.outputs, grid.live, b, b)
    kernel_LPQ = expand(data_LJKbb, live_LIJ)
    mask_LPQ = np.kron(np.asarray(live_LIJ), np.ones((1, b, b), bool))
    assert kernel_LPQ.shape == (2, grid.inputs * b, grid.outputs * b)
    assert ((kernel_LPQ != 0) == mask_LPQ).all()
    assert (compress(kernel_LPQ, live_LIJ, grid.live) == data_LJKbb).all()
    i, k = np.flatnonzero(np.asarray(live_LIJ[1])[:, 0])[-1], grid.live - 1  # the last block of a column, by hand
    assert (kernel_LPQ[1, i * b : i * b + b, :b] == data_LJKbb[1, 0, k]).all()


def test_magnitude_takes_the_largest_blocks():
    params = {"a": {"kernel": jnp.kron(jnp.array([[[9.0, 1], [2, 8]], [[1, 7], [6, 1]]]), jnp.ones((1, 3, 3)))}}
    grids = {"a/kernel": BlockGrid(3, 2, 2, 1)}
    topology = init_topology(jax.random.key(0), params, grids, method="magnitude")
    assert topology["a"]["kernel"].astype(int).tolist() == [[[1, 0], [0, 1]], [[0, 1], [1, 0]]]


@pytest.mark.parametrize(
    ("shape", "active", "pattern", "message"),
    [
        (
            (8, 8),
            16,
            "unstructured",
            "sparse_compute: 'blocks' needs a pattern of blocks such as 'block64', not 'unstru",
        ),
        ((8, 9), 16, "block4", r"w of shape \(8, 9\) does not divide into block4"),
        (
            (96, 96),
            14 * 64,
            "block8",
            r"w in 12 x 12 blocks of 8 would keep 1.167 .* sparsity 0.833333 \(2 of 12\) or 0.916667",
        ),
        (
            (12, 18),
            9 * 4,
            "block2",
            r"w in 6 x 9 blocks of 2 would keep 1 .* sparsity 0.333333 \(4 of 6\) or 0.666667 \(2 of 6\)",
        ),
        (
            (8, 8),
            16,
            "block4",
            r"would keep 0.5 blocks a column; .* Use sparsity 0 \(2 of 2\) or 0.5 \(1 of 2\), or smaller",
        ),
    ],
)
def test_what_blocks_cannot_have_is_refused_with_what_they_can(shape, active, pattern, message):
    with pytest.raises(InputError, match=message):
        block_grid("w", shape, active, pattern)


def test_rows_may_be_whole_where_columns_are_many():
    assert block_grid("w", (12, 18), 2 * 9 * 4, "block2") == BlockGrid(2, 6, 9, 2)  # 3 in every row


class Hashable(dict):
    __hash__ = object.__hash__


SMALL_GRIDS = Hashable({"a/kernel": BlockGrid(2, 4, 6, 2)})


def small_problem(seed=0):
    """A kernel of 2 layers and a bias, in blocks, with gradients of the dense kernel."""
    params = {"a": {"kernel": normal(seed, 2, 8, 12), "bias": normal(seed + 1, 2, 12)}}
    topology = init_topology(jax.random.key(seed), params, SMALL_GRIDS)
    grads = jax.tree.map(lambda p: normal(seed + 7, *p.shape), params)
    return params, topology, grads


@pytest.mark.parametrize(
    "name",
    [
        "adagrad",
        "multi_steps",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("lion", "adafactor", "schedule_free")),
    ],
)
def test_state_of_any_optimiser_becomes_blocks_and_comes_back(name):
    params, topology, grads = small_problem()
    tx = OPTIMIZERS[name]()

    @jax.jit
    def updated(params, grads, topology):
        masks = element_masks(to_blocks(tx, params, tx.init(params), topology, SMALL_GRIDS)[0], topology)
        masked, masked_grads = apply_masks(params, masks), apply_masks(grads, masks)
        _, opt_state = tx.update(masked_grads, tx.init(masked), masked)
        # Adafactor's of a gradient of 0 is not quite 0.
        return masks, masked, reset_masked_state(tx, opt_state, masked, masks)

    masks, masked, opt_state = updated(params, grads, topology)
    packed, packed_state = to_blocks(tx, masked, opt_state, topology, SMALL_GRIDS)
    assert packed["a"]["kernel"].shape == (2, 6, 2, 2, 2)
    expected = jax.eval_shape(tx.init, packed)
    assert jax.tree.map(jnp.shape, packed_state) == jax.tree.map(lambda leaf: leaf.shape, expected)
    again, again_state, again_masks = to_masks(tx, packed, packed_state, topology)
    for a, b in zip(*map(jax.tree.leaves, ((again, again_masks), (masked, masks))), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(*map(jax.tree.leaves, (again_state, opt_state)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_shared_by_a_row_is_refused():
    params, topology, _ = small_problem()
    tx = optax.adafactor(0.1, min_dim_size_to_factor=2)
    with pytest.raises(InputError, match=r"optimiser state of shape \(2, 8\) for a/kernel \(2, 8, 12\): it cannot be"):
        to_blocks(tx, params, tx.init(params), topology, SMALL_GRIDS)


ADAM = optax.adam(0.1)


@jax.jit
def start(params, topology):
    """The state in blocks after one update of the optimiser."""
    packed, _ = to_blocks(ADAM, params, ADAM.init(params), topology, SMALL_GRIDS)
    opt_state = ADAM.update(jax.tree.map(jnp.ones_like, packed), ADAM.init(packed), packed)[1]
    masks = jax.tree.map(lambda _: jnp.array(True), packed)
    return TrainState(jnp.zeros((), int), packed, masks, opt_state, jax.random.key(0), topology)


def small_state():
    """The small problem in blocks, and dense gradients."""
    params, topology, grads = small_problem()
    return start(params, topology), grads


@partial(jax.jit, static_argnums=4)
def move(key, old, grads, drop_fraction, rule):
    """The state with its live blocks moved, as `spdf_jax.training.step.move_topology` puts it together."""
    parts = (old.params, grads, old.topology, old.opt_state)
    params, topology, opt_state = move_blocks(key, ADAM, *parts, drop_fraction=drop_fraction, rule=rule)
    return old.replace(params=params, topology=topology, opt_state=opt_state)


def step(rule, drop_fraction):
    old, grads = small_state()
    return old, grads, move(jax.random.key(5), old, grads, drop_fraction, rule)


@pytest.mark.parametrize(
    "name",
    [
        "mst",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("rigl", "set", "mest", "sensitivity")),
    ],
)
def test_a_topology_step_keeps_the_counts_and_resets_what_is_new(name):
    old, _, new = step(RULES[name], 0.5)
    live, new_live = old.topology["a"]["kernel"], new.topology["a"]["kernel"]
    assert all(has_counts(new_live[i], BlockGrid(2, 4, 6, 2)) for i in range(2))
    stayed = np.kron(np.asarray(live & new_live), np.ones((1, 2, 2), bool))
    assert 0.4 * 2 * 48 < stayed.sum() < 2 * 48  # some of the half that was let go have moved
    moments, new_moments = old.opt_state[0], new.opt_state[0]
    for a, b in ((old.params, new.params), (moments.mu, new_moments.mu), (moments.nu, new_moments.nu)):
        a, b = expand_tree(a, old.topology)["a"], expand_tree(b, new.topology)["a"]
        np.testing.assert_array_equal(b["kernel"], np.where(stayed, a["kernel"], 0))
        np.testing.assert_array_equal(b["bias"], a["bias"])
    assert new_moments.count == moments.count


def test_rigl_drops_the_smallest_blocks_and_grows_the_largest_gradients():
    before, grads, after = step(RULES["rigl"], 0.5)
    whole = expand_tree(before.params, before.topology)
    weights, gradients = (np.square(t["a"]["kernel"]).reshape(2, 4, 2, 6, 2).sum((2, 4)) for t in (whole, grads))
    for layer in range(2):
        live, new = (np.asarray(state.topology["a"]["kernel"][layer]) for state in (before, after))
        gone = live & ~new
        assert gone.any()
        assert weights[layer][gone].max() < np.sort(weights[layer][live])[6]  # among the 6 smallest of 12
        assert gradients[layer][new & ~live].sum() > gradients[layer][gone].sum()


def test_nothing_moves_without_a_drop_fraction():
    before, _, after = step(RULES["mst"], 0.0)
    for a, b in zip(*(jax.tree.leaves(s.replace(key=None)) for s in (before, after)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_share_of_what_grows_is_random():
    rule = Rule(gradient_share=0.5)
    half, none = (step(r, 0.5)[2].topology["a"]["kernel"] for r in (rule, rule._replace(gradient_share=0.0)))
    assert (half != none).any()


def test_another_drop_fraction_compiles_nothing():
    state, grads = small_state()
    compiled = []
    for i in range(3):
        state = move(jax.random.key(i), state, grads, 0.3 / (i + 1), RULES["mst"])
        compiled.append(move._cache_size())
    assert len(set(compiled)) == 1


def test_the_report_reads_them_as_masks():
    state, _ = small_state()
    report = mask_report(state.element_masks())
    assert [(row.name, row.active, row.dead_rows, row.dead_columns) for row in report.rows] == [("a/kernel", 96, 0, 0)]
