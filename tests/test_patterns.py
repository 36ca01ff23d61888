"""Patterns: one step by hand in each, and a plain NumPy reference for everything else."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.sparsity.masks import init_masks
from spdf_jax.sparsity.patterns import CONTRACTION_AXES, PATTERNS, parse_pattern
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topology import prune_and_grow, prune_and_grow_tree

QUICK = settings(deadline=None, derandomize=True, max_examples=25)
SLOW = pytest.mark.slow
SHARES = (0.0, 0.75, 1.0)
KEY = jax.random.key(0)
FLOATS = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 1.0078125, 2.0, -3.0, 1e-4, np.inf, -np.inf, np.nan])

step = jax.jit(prune_and_grow, static_argnames=("gradient_share", "drop_score", "pattern"))
step_tree = jax.jit(prune_and_grow_tree, static_argnames="rule")
pool_in_threes = jax.jit(parse_pattern("block3").pool)


def initial(params, **how):
    """`init_masks` as one program."""
    return jax.jit(partial(init_masks, **how))(KEY, params)


def top(scores, k, eligible):
    """The k largest eligible scores, NaN last, ties by lowest index."""
    values, candidates = np.asarray(scores, np.float64).ravel(), np.flatnonzero(eligible)
    nan = np.isnan(values)[candidates]
    order = np.lexsort((candidates, -np.where(nan, 0.0, values[candidates]), nan))
    out = np.zeros(values.size, bool)
    out[candidates[order[:k]]] = True
    return out.reshape(np.shape(scores))


def in_groups(x, m):
    """``[groups of one column, m]``, a copy."""
    return np.moveaxis(x.reshape(x.shape[0] // m, m, -1), 1, 2).reshape(-1, m)


def out_of_groups(x, shape, m):
    return np.moveaxis(x.reshape(shape[0] // m, shape[1], m), 2, 1).reshape(shape)


def test_two_of_four_by_hand():
    """Contraction runs down the column, so the groups are rows 0-3 and 4-7. zeta 1/2 drops the 2 smallest of all 4: -1, 2."""
    w = jnp.array([[5.0, -1.0, 0.0, 0.0, 0.0, 0.0, 4.0, 2.0]]).T
    g = jnp.array([[9.0, 1.0, 6.0, 7.0, 3.0, 8.0, 9.0, 2.0]]).T
    # Room for one in each group: by |g| row 3 (7) of 2, 3 and 1, and row 5 (8) of 4, 5 and 7.
    new = step(KEY, w, g, w != 0, target_nnz=4, drop_fraction=0.5, gradient_share=1.0, pattern="2:4")
    assert np.flatnonzero(new).tolist() == [0, 3, 5, 6]
    # Half by gradient: the better of the two that fit is row 5; the other group fills its place at random.
    half = np.asarray(step(KEY, w, g, w != 0, target_nnz=4, drop_fraction=0.5, gradient_share=0.5, pattern="2:4"))
    assert half[[0, 5, 6], 0].all()
    assert half[:4].sum() == half[4:].sum() == 2


def test_two_of_four_drops_over_the_whole_matrix():
    """Both smallest lie in the first group: it is renewed whole, the second keeps its two."""
    w = jnp.array([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 4.0, 2.0]]).T
    g = jnp.array([[0.0, 0.0, 6.0, 7.0, 9.0, 9.0, 0.0, 0.0]]).T
    new = step(KEY, w, g, w != 0, target_nnz=4, drop_fraction=0.5, gradient_share=1.0, pattern="2:4")
    assert np.flatnonzero(new).tolist() == [2, 3, 6, 7]


def test_blocks_by_hand():
    """2 x 2 blocks of squared sums 1+4 = 5, 0, 0, 4*0.25 = 1; zeta 1/2 drops one of two: the last. |g|: 4, 1, 9 * 4, 0."""
    w = jnp.array([[1.0, -2.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5], [0.0, 0.0, -0.5, 0.5]])
    g = jnp.array([[1.0, 1.0, 0.0, -1.0], [1.0, 1.0, 0.0, 0.0], [3.0, 3.0, 0.0, 0.0], [3.0, -3.0, 0.0, 0.0]])
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]], bool)  # a weight of 0 may be active
    new = step(KEY, w, g, mask, target_nnz=8, drop_fraction=0.5, gradient_share=1.0, pattern="block2")
    assert new.astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(
    ("pattern", "dtype", "gradient_share"),
    [
        *[("2:4", jnp.float32, share) for share in SHARES],
        ("1:4", jnp.bfloat16, 0.75),
        *[pytest.param("1:4", jnp.bfloat16, share, marks=SLOW) for share in (0.0, 1.0)],
        *[pytest.param("3:5", jnp.float32, share, marks=SLOW) for share in SHARES],
    ],
)
@QUICK
@given(data=st.data())
def test_n_of_m_equals_the_reference_on_anything(pattern, dtype, gradient_share, data):
    p, shape = parse_pattern(pattern), (2 * parse_pattern(pattern).m, 3)
    order = in_groups(data.draw(hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=16))), p.m)
    mask = out_of_groups(np.stack([top(row, p.n, np.ones(p.m, bool)) for row in order]), shape, p.m)
    mask = data.draw(st.sampled_from([mask, np.ones(shape, bool), np.zeros(shape, bool)]))
    w = np.where(mask, data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)), 0).astype(dtype)
    g = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)).astype(dtype)
    limit = data.draw(st.sampled_from([p.n, p.m]))
    target, zeta = mask.size // p.m * limit, data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    args = {"target_nnz": target, "drop_fraction": zeta, "gradient_share": gradient_share, "pattern": pattern}
    new = np.asarray(step(KEY, *map(jnp.asarray, (w, g, mask)), **args))

    n = int(mask.sum())
    n_prune = min(max(int(np.float32(n) * np.float32(zeta)), n - target), n)
    scores = np.where(mask, np.abs(w.astype(np.float32)), np.nan)
    room = [top(s, limit, m) for s, m in zip(in_groups(scores, p.m), in_groups(mask, p.m), strict=True)]
    kept = top(scores, n - n_prune, mask & out_of_groups(np.stack(room), shape, p.m))
    free = [
        top(s, limit - k.sum(), ~k)
        for s, k in zip(in_groups(np.abs(g.astype(np.float32)), p.m), in_groups(kept, p.m), strict=True)
    ]
    by_gradient = int((target - kept.sum()) * gradient_share)
    grown = top(np.abs(g.astype(np.float32)), by_gradient, out_of_groups(np.stack(free), shape, p.m))
    assert (in_groups(new, p.m).sum(1) == limit).all()
    assert new[kept | grown].all()
    assert new.sum() == target
    if gradient_share == 1.0:
        np.testing.assert_array_equal(new, kept | grown)


@pytest.mark.parametrize("gradient_share", SHARES)
@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.bfloat16, marks=SLOW)])
@QUICK
@given(data=st.data())
def test_blocks_are_the_unstructured_step_on_sums_of_squares(dtype, gradient_share, data):
    b, units = 3, (3, 4)
    shape = (units[0] * b, units[1] * b)
    chosen = data.draw(st.just(np.zeros(units, bool)) | st.just(np.ones(units, bool)) | hnp.arrays(np.bool_, units))
    mask = np.repeat(np.repeat(chosen, b, 0), b, 1)
    w = np.where(mask, data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)), 0).astype(dtype)
    g = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)).astype(dtype)
    target, zeta = data.draw(st.integers(0, chosen.size)), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    shared = {"drop_fraction": zeta, "gradient_share": gradient_share}
    args = {"target_nnz": target * b * b, "pattern": f"block{b}", **shared}
    new = np.asarray(step(KEY, *map(jnp.asarray, (w, g, mask)), **args))
    # The engine's own sums: near-ties must go the same way.
    pooled = [pool_in_threes(np.abs(x)) for x in (w, g)]
    alone = step(KEY, *pooled, jnp.asarray(chosen), target_nnz=target, **shared)
    np.testing.assert_array_equal(new, np.repeat(np.repeat(np.asarray(alone), b, 0), b, 1))


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "block8"])
def test_initial_masks_by_magnitude_keep_the_best_that_fits(pattern):
    w = np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32)
    mask = initial(
        {"w": w},
        sparsity=0.75 if pattern != "2:4" else 0.5,
        filter=[("w", "matrix")],
        method="magnitude",
        pattern=pattern,
    )["w"]
    p = parse_pattern(pattern)
    if p.m > 1:
        best = np.stack([top(row, p.n, np.ones(4, bool)) for row in in_groups(np.abs(w), 4)])
        np.testing.assert_array_equal(mask, out_of_groups(best, w.shape, 4))
    else:
        norms = np.square(w).reshape(4, 8, 2, 8).sum((1, 3))
        np.testing.assert_array_equal(np.asarray(mask)[::8, ::8], top(norms, 2, np.ones_like(norms, bool)))


def test_random_masks_take_every_place_of_a_group_equally_often():
    mask = initial({"w": jnp.zeros((4, 4000))}, sparsity=0.5, filter=[("w", "matrix")], pattern="2:4")["w"]
    share = np.asarray(mask).mean(1)
    assert np.abs(share - 0.5).max() < 4.5 * np.sqrt(0.25 / 4000)
    pairs = np.asarray(mask)[0] & np.asarray(mask)[1]  # one of six pairs
    assert abs(pairs.mean() - 1 / 6) < 4.5 * np.sqrt(5 / 36 / 4000)


def test_leading_axes_are_layers_of_the_pattern_too():
    w = jax.random.normal(KEY, (3, 8, 4))
    new = step(KEY, w, w, w > 9, target_nnz=48, drop_fraction=0.0, gradient_share=1.0, pattern="2:4")
    assert (new.reshape(3, 2, 4, 4).sum(2) == 2).all()


# Shapes of leaves as models lay them out, and the axis that a product sums over, counted from the last.
LAYOUTS = {
    "blocks/mlp_up/kernel": ("stack", (3, 8, 6), -2),  # spdf_jax.GPT: [layer, in, out]
    "layers/0/kernel": ("matrix", (8, 6), -2),
    "head/kernel": ("matrix", (8, 7), -2),  # untied head [in, vocabulary]
    "wte/embedding": ("matrix", (7, 8), -1),  # tied head [vocabulary, in]
    "layers/0/weight": ("matrix", (6, 8), -1),  # Equinox [out, in]
    "layers/weight": ("stack", (3, 6, 8), -1),
    "attention/query/kernel": ("matrix", (8, 3, 2), -3),  # Flax [in, heads, width]
    "blocks/attention/key/kernel": ("stack", (2, 8, 3, 5), -3),
    "attention/out/kernel": ("matrix", (3, 4, 5), -2),  # Flax [heads, width, out]
    "one/kernel": ("stack", (1, 8, 6), -2),  # a stack of one layer
}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_the_groups_of_every_layout_lie_along_the_axis_that_is_summed_over(method):
    rng = np.random.default_rng(0)
    params, grads = (
        {name: rng.normal(size=shape).astype(np.float32) for name, (_, shape, _) in LAYOUTS.items()} for _ in range(2)
    )
    filter = [(f"^{name}$", decision) for name, (decision, _, _) in LAYOUTS.items()]
    masks = initial(params, sparsity=0.5, filter=filter, method=method, pattern="2:4")

    def groups(mask, axis):
        """Sizes of groups of four along an axis, for all others."""
        moved = np.moveaxis(np.asarray(mask), axis, -1)
        return moved.reshape(*moved.shape[:-1], -1, 4).sum(-1)

    # Dense for a while, back to 2:4 by rule, then on.
    counts = {name: np.asarray(mask).reshape(len(mask), -1).sum(1) for name, mask in masks.items()}
    targets = {
        name: counts[name].astype(np.int32) if LAYOUTS[name][0] == "stack" else counts[name].sum(keepdims=True)
        for name in LAYOUTS
    }
    rule = RULES["mst"]._replace(pattern="2:4")
    full = {name: np.ones_like(params[name], bool) for name in LAYOUTS}
    back = step_tree(KEY, params, grads, full, target_nnz=targets, drop_fraction=0.0, rule=rule)
    kept = {name: np.where(mask, params[name], 0) for name, mask in masks.items()}
    moved = step_tree(KEY, kept, grads, masks, target_nnz=targets, drop_fraction=0.5, rule=rule)
    for name, (_, _, axis) in LAYOUTS.items():
        for mask in (masks[name], back[name], moved[name]):
            assert (groups(mask, axis) == 2).all(), name
        assert (np.asarray(moved[name]) != np.asarray(masks[name])).any()


def test_axes_that_no_name_gives_away_are_asked_for_and_can_be_said():
    params = {"mixer/kernel": jnp.ones((8, 3, 5))}
    how = {"sparsity": 0.5, "filter": [("kernel", "matrix")], "pattern": "2:4"}
    with pytest.raises(InputError, match=r"mixer/kernel with shape \(8, 3, 5\): which axis.*CONTRACTION_AXES"):
        init_masks(KEY, params, **how)
    CONTRACTION_AXES.insert(0, ("mixer/kernel", -3))
    try:
        mask = init_masks(KEY, params, **how)["mixer/kernel"]
    finally:
        del CONTRACTION_AXES[0]
    assert (np.asarray(mask).reshape(2, 4, 15).sum(1) == 2).all()


def test_a_tied_head_is_refused_by_its_width_and_not_by_its_vocabulary():
    tied = {"wte/embedding": MatrixGroup(1, (50257, 768))}
    assert target_counts(tied, 0.5, "uniform", "2:4") == {"wte/embedding": 50257 * 384}
    with pytest.raises(InputError, match=r"wte/embedding of shape \(48, 50\).* axis -1 must be a multiple of 4\."):
        target_counts({"wte/embedding": MatrixGroup(1, (48, 50))}, 0.5, "uniform", "2:4")
    with pytest.raises(InputError, match=r"head/kernel of shape \(50, 48\).* axis -2 must be a multiple of 4\."):
        target_counts({"head/kernel": MatrixGroup(1, (50, 48))}, 0.5, "uniform", "2:4")


@pytest.mark.parametrize("name", PATTERNS)
def test_names_are_read_and_written_alike(name):
    assert str(parse_pattern(name)) == name


@pytest.mark.parametrize(
    "name", ["", "2:2", "0:4", "4:2", "1:64", "2:4:8", "block", "block1", "block0", "rows", "-1:4"]
)
def test_names_that_are_no_patterns_are_refused(name):
    with pytest.raises(InputError, match="pattern"):
        parse_pattern(name)


@pytest.mark.parametrize(("pattern", "target"), [("2:4", 24), ("block4", 24), ("unstructured", 65), ("1:4", -16)])
def test_counts_that_the_pattern_cannot_have_are_refused(pattern, target):
    w = jnp.ones((8, 8))
    with pytest.raises(InputError, match=f"{pattern} cannot have {target} active of 64"):
        prune_and_grow(KEY, w, w, w > 0, target_nnz=target, drop_fraction=0.0, pattern=pattern)
