"""One topology step: literals by hand for SET, RigL and MST, and a plain NumPy reference for everything else."""

import os
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import MatrixGroup
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.sparsity.programme import Programme, SparsityConfig
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topology import Rule, prune_and_grow, prune_and_grow_tree

QUICK = settings(deadline=None, derandomize=True, max_examples=25)
MOVING = {name: rule for name, rule in RULES.items() if rule.moves}
KEY = jax.random.key(0)

step = jax.jit(prune_and_grow, static_argnames=("gradient_share", "drop_score"))
step_tree = jax.jit(prune_and_grow_tree, static_argnames="rule")

# Worked by hand. 8 of 16 active; drop_fraction 0.5 drops int(8 * 0.5) = 4: |w| = 0.25, 0.5, 1, 2 go, 3, 4, 5, 6 stay.
W = jnp.array([[4.0, 0.0, -1.0, 0.0], [0.0, 3.0, 0.0, -2.0], [0.5, 0.0, 0.0, 5.0], [0.0, -6.0, 0.25, 0.0]])
# Inactive after the drop, largest |g| first: (0,3) 8, (1,2) 7, (2,0) 6 just dropped, (3,2) 5 just dropped, (3,3) 4, ...
G = jnp.array([[9.0, 1.0, 0.0, -8.0], [2.0, 9.0, -7.0, 0.0], [6.0, 3.0, 0.0, 9.0], [0.0, 9.0, -5.0, 4.0]])
KEPT = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1], [0, 1, 0, 0]], bool)


def top(scores: np.ndarray, k: int, eligible: np.ndarray) -> np.ndarray:
    values = np.asarray(scores).astype(np.float64).ravel()
    candidates = np.flatnonzero(eligible)
    nan = np.isnan(values)[candidates]
    order = np.lexsort((candidates, -np.where(nan, 0.0, values[candidates]), nan))  # the last key sorts first
    out = np.zeros(values.size, bool)
    out[candidates[order[:k]]] = True
    return out.reshape(np.shape(scores))


def reference_step(w, g, mask, target_nnz, drop_fraction, gradient_share):
    """The MST code's topology step (hupihe/Mixed-Sparsity-Training) but for its random growth.

    Returns: kept weights, weights grown by gradient, how many are still to grow at random.
    """
    n = int(mask.sum())
    delta = n - target_nnz  # (S - (1 - n/N)) * N
    n_prune = max(int(np.float32(n) * np.float32(drop_fraction)), delta)
    n_grow = n_prune - delta
    kept = top(np.abs(w), n - n_prune, mask)
    n_grow = min(n_grow, int((~kept).sum()))
    by_gradient = int(n_grow * gradient_share)
    return kept, top(np.abs(g), by_gradient, ~kept), n_grow - by_gradient


def random_problem(shape, density=0.3, seed=1):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < density
    w, g = np.round(4 * rng.normal(size=(2, *shape))).astype(np.float32) / 2  # halves of small integers: ties decide
    return np.where(mask, w, 0), g, mask


def test_rigl_by_hand():
    """RigL, arXiv 1911.11134, algorithm 1: drop by |w|, grow all by |g|; here a just-dropped weight may return (MST's code)."""
    new = step(KEY, W, G, W != 0, target_nnz=8, drop_fraction=0.5, gradient_share=1.0)
    assert new.astype(int).tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0]]
    # (2,0) and (3,2) were dropped and regrown at once and keep 0.5 and 0.25; (0,3) and (1,2) are new and start at 0.
    after = apply_masks({"w": W}, {"w": new})["w"]
    assert after.tolist() == [[4, 0, 0, 0], [0, 3, 0, 0], [0.5, 0, 0, 5], [0, -6, 0.25, 0]]


def test_mst_by_hand():
    """MST's code: int(4 * 3/4) = 3 by |g|, 1 at random among the rest."""
    by_gradient = np.array([[0, 0, 0, 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
    new = np.asarray(step(KEY, W, G, W != 0, target_nnz=8, drop_fraction=0.5, gradient_share=0.75))
    assert (new & (KEPT | by_gradient)).sum() == 7
    assert new.sum() == 8


def test_mst_pruning_by_hand():
    """8 -> 5 active with zeta 0.25: delta 3 exceeds int(8 * 0.25) = 2, so 3 are dropped and nothing grows."""
    new = step(KEY, W, G, W != 0, target_nnz=5, drop_fraction=0.25, gradient_share=0.75)
    assert new.astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 1], [0, 1, 0, 0]]


def test_mst_restoration_by_hand():
    """8 -> 10 active with zeta 0.25: 2 dropped (0.5 and 0.25), 4 grown, int(4 * 3/4) = 3 of them by |g|: 8, 7, 6."""
    certain = np.array([[1, 0, 1, 1], [0, 1, 1, 1], [1, 0, 0, 1], [0, 1, 0, 0]], bool)
    new = np.asarray(step(KEY, W, G, W != 0, target_nnz=10, drop_fraction=0.25, gradient_share=0.75))
    assert (new & certain).sum() == 9
    assert new.sum() == 10


def test_set_by_hand_and_its_growth_is_uniform():
    """SET (Mocanu et al. 2018): drop the 4 smallest |w|, grow 4 anywhere; each of the 12 free places with chance 1/3."""
    keys = jax.random.split(jax.random.key(5), 2000)
    one = partial(prune_and_grow, target_nnz=8, drop_fraction=0.5, gradient_share=0.0)
    new = np.asarray(jax.jit(jax.vmap(one, (0, None, None, None)))(keys, W, G, W != 0))
    assert new[:, KEPT].all()
    assert (new.sum((1, 2)) == 8).all()
    share = new.mean(0)[~KEPT]
    assert np.abs(share - 1 / 3).max() < 4.5 * np.sqrt(1 / 3 * 2 / 3 / 2000)


def test_the_rules_are_those_of_their_sources():
    assert not RULES["static"].moves
    assert {name: (rule.gradient_share, rule.drop_fraction) for name, rule in MOVING.items()} == {
        "set": (0.0, 0.3),
        "rigl": (1.0, 0.3),
        "mst": (0.75, 0.3),  # r/(r + 1) with r = 3
        "mest": (0.0, 0.3),
        "sensitivity": (0.75, 0.3),
        "gmp": (1.0, 0.0),
        "acdc": (1.0, 0.0),
        "topkast": (0.0, 0.0),  # nothing is exchanged: the largest of all values compute
    }


FLOATS = st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 1.0078125, 2.0, -3.0, 1e-4, np.inf, -np.inf, np.nan])


@pytest.mark.parametrize("gradient_share", [0.0, 0.75, 1.0])
@pytest.mark.parametrize(("shape", "dtype"), [((4, 5), jnp.float32), ((2, 3, 7), jnp.bfloat16)], ids=["f32", "bf16"])
@QUICK
@given(data=st.data())
def test_equals_the_reference_on_anything(shape, dtype, gradient_share, data):
    mask = data.draw(st.just(np.zeros(shape, bool)) | st.just(np.ones(shape, bool)) | hnp.arrays(np.bool_, shape))
    w = np.where(mask, data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)), 0).astype(dtype)
    g = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)).astype(dtype)
    target = data.draw(st.sampled_from([0, int(mask.sum()), mask.size]) | st.integers(0, mask.size))
    zeta = data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]) | st.floats(0, 1, width=32))
    new = step(
        KEY, *map(jnp.asarray, (w, g, mask)), target_nnz=target, drop_fraction=zeta, gradient_share=gradient_share
    )
    kept, grown, at_random = reference_step(w, g, mask, target, zeta, gradient_share)
    new = np.asarray(new)
    assert new.dtype == bool
    assert new.sum() == target
    assert new[kept | grown].all()
    assert (new & ~kept & ~grown).sum() == at_random
    if gradient_share == 1.0:
        np.testing.assert_array_equal(new, kept | grown)


@pytest.mark.parametrize("rule", ["set", "rigl", "mst", "sensitivity"])  # the others differ in their schedules
def test_every_rule_hits_every_count_in_one_compilation(rule):
    traces = []

    @jax.jit
    def counted(key, w, g, mask, target_nnz, drop_fraction):
        traces.append(1)
        return prune_and_grow(
            key,
            w,
            g,
            mask,
            target_nnz=target_nnz,
            drop_fraction=drop_fraction,
            gradient_share=RULES[rule].gradient_share,
            drop_score=RULES[rule].drop_score,
        )

    w, g, mask = random_problem((6, 7))
    for target in range(43):
        for zeta in (0.0, 0.3, 1.0):
            assert np.asarray(counted(KEY, w, g, mask, np.int32(target), np.float32(zeta))).sum() == target
    assert len(traces) == 1


@pytest.mark.parametrize("rule", MOVING)
def test_nothing_moves_without_drop_and_with_the_present_count(rule):
    w, g, mask = random_problem((6, 7))
    now = int(mask.sum())
    new = step(KEY, w, g, mask, target_nnz=now, drop_fraction=0.0, gradient_share=RULES[rule].gradient_share)
    assert 0 < now < mask.size
    np.testing.assert_array_equal(new, mask)


@pytest.mark.parametrize("rule", MOVING)
def test_without_drop_pruning_only_removes_and_growth_only_adds(rule):
    w, g, mask = random_problem((6, 7), density=0.5)
    share = RULES[rule].gradient_share
    fewer = np.asarray(step(KEY, w, g, mask, target_nnz=5, drop_fraction=0.0, gradient_share=share))
    more = np.asarray(step(KEY, w, g, mask, target_nnz=35, drop_fraction=0.0, gradient_share=share))
    assert (fewer.sum(), more.sum()) == (5, 35)
    assert not (fewer & ~np.asarray(mask)).any()
    assert not (np.asarray(mask) & ~more).any()
    # Gradual magnitude pruning is just this: the largest stay.
    np.testing.assert_array_equal(fewer, top(np.abs(w), 5, np.asarray(mask)))


def test_the_key_decides_the_random_part_and_nothing_else():
    w, g, mask = random_problem((6, 7))
    now = int(mask.sum())

    def run(seed, share):
        new = step(jax.random.key(seed), w, g, mask, target_nnz=now, drop_fraction=0.5, gradient_share=share)
        return np.asarray(new)

    for share in (0.0, 0.75):
        np.testing.assert_array_equal(run(3, share), run(3, share))
        assert (run(3, share) != run(4, share)).any()
    np.testing.assert_array_equal(run(3, 1.0), run(4, 1.0))


@pytest.mark.parametrize(
    ("score", "dropped"),
    # |w| = 1, 2, 3, 4 and |g| = 8, 4, 1, 0.5. MEST with lambda 1: 9, 6, 4, 4.5; sensitivity |w / g|: 0.125, 0.5, 3, 8.
    [
        (lambda w, g: jnp.abs(w), 0),
        (RULES["mest"].drop_score, 2),
        (RULES["sensitivity"].drop_score, 0),
        (lambda w, g: -jnp.abs(w), 3),
    ],
    ids=["magnitude", "mest", "sensitivity", "any"],
)
def test_any_drop_score_may_be_given(score, dropped):
    w, g = jnp.array([1.0, -2.0, 3.0, -4.0]), jnp.array([8.0, -4.0, 1.0, 0.5])
    new = step(KEY, w, g, w != 0, target_nnz=3, drop_fraction=0.0, drop_score=score)
    assert np.flatnonzero(~np.asarray(new)).tolist() == [dropped]


def test_a_weight_of_zero_is_the_least_sensitive_even_where_its_gradient_is_zero():
    score = RULES["sensitivity"].drop_score(jnp.array([0.0, 0.0, 2.0, 1.0]), jnp.array([0.0, 3.0, 0.0, -4.0]))
    assert score.tolist() == [0.0, 0.0, np.inf, 0.25]


def test_gmp_and_acdc_move_by_their_schedules_alone():
    w, g, mask = random_problem((6, 7), density=0.5)
    for rule in (RULES["gmp"], RULES["acdc"]):
        grow = partial(step, drop_fraction=rule.drop_fraction, gradient_share=rule.gradient_share)
        np.testing.assert_array_equal(grow(KEY, w, g, mask, target_nnz=int(mask.sum())), mask)
        np.testing.assert_array_equal(grow(KEY, w, g, mask, target_nnz=5), top(np.abs(w), 5, mask))
        assert bool(grow(KEY, w, g, mask, target_nnz=42).all())


@pytest.mark.slow
def test_counts_stay_exact_beyond_the_integers_of_float32():
    # 2^24 + 3 is not a float32: it rounds to 2^24 + 4, and a share of 1 must not grow one too many.
    shape, target = (4097, 4096), 2**24 + 3
    zeros = jnp.zeros(shape, jnp.bfloat16)
    new = step(KEY, zeros, zeros, jnp.zeros(shape, bool), target_nnz=target, drop_fraction=0.3, gradient_share=1.0)
    assert int(new.sum()) == target


def test_shapes_must_agree():
    with pytest.raises(InputError, match=r"\(4, 4\).*\(4, 3\)"):
        prune_and_grow(KEY, W, G[:, :3], W != 0, target_nnz=1, drop_fraction=0.0)


def tree_problem():
    w, g, mask = random_problem((3, 8, 16))
    head = random_problem((8, 16), seed=2)
    params = {"stack": w, "head": head[0], "bias": np.ones(8, np.float32)}
    grads = {"stack": g, "head": head[1], "bias": np.ones(8, np.float32)}
    masks = {"stack": mask, "head": head[2], "bias": np.array(True)}
    targets = {"stack": np.array([0, 40, 128], np.int32), "head": np.array([50], np.int32)}
    return params, grads, masks, targets


def test_a_stack_is_treated_layer_by_layer():
    params, grads, masks, targets = tree_problem()
    new = step_tree(KEY, params, grads, masks, target_nnz=targets, drop_fraction=0.5, rule=Rule(gradient_share=1.0))
    for i, target in enumerate([0, 40, 128]):
        layer = (params["stack"][i], grads["stack"][i], masks["stack"][i])
        alone = step(KEY, *layer, target_nnz=target, drop_fraction=0.5, gradient_share=1.0)
        np.testing.assert_array_equal(new["stack"][i], alone)
    alone = step(
        KEY, params["head"], grads["head"], masks["head"], target_nnz=50, drop_fraction=0.5, gradient_share=1.0
    )
    np.testing.assert_array_equal(new["head"], alone)
    assert new["bias"].shape == ()
    assert bool(new["bias"])


def test_batched_calls_equal_single_calls_with_the_same_keys():
    params, grads, masks, targets = tree_problem()
    keys = jax.random.split(jax.random.key(9), 3)
    one = partial(step, drop_fraction=0.5, gradient_share=0.75)
    together = jax.vmap(lambda k, w, g, m, n: one(k, w, g, m, target_nnz=n))(
        keys, params["stack"], grads["stack"], masks["stack"], targets["stack"]
    )
    for i in range(3):
        layer = (params["stack"][i], grads["stack"][i], masks["stack"][i])
        np.testing.assert_array_equal(together[i], one(keys[i], *layer, target_nnz=targets["stack"][i]))


@pytest.mark.parametrize("rule", ["rigl", "mst"])  # SET's random growth is part of MST's
def test_trees_hit_each_matrix_s_own_count_and_draw_anew_for_each(rule):
    params, grads, masks, targets = tree_problem()
    params, masks = ({**tree, "stack": np.stack([tree["stack"][0]] * 3)} for tree in (params, masks))
    grads = {**grads, "stack": np.zeros_like(grads["stack"])}
    targets = {**targets, "stack": np.full(3, 60, np.int32)}
    run = partial(step_tree, target_nnz=targets, drop_fraction=0.3, rule=RULES[rule])
    new = run(KEY, params, grads, masks)
    assert new["stack"].sum((1, 2)).tolist() == [60] * 3
    assert int(new["head"].sum()) == 50
    assert jax.tree.structure(new) == jax.tree.structure(params)
    differ = [bool((new["stack"][0] != new["stack"][i]).any()) for i in (1, 2)]
    assert differ == [rule != "rigl"] * 2
    again, other = run(KEY, params, grads, masks), run(jax.random.key(1), params, grads, masks)
    assert bool((again["stack"] == new["stack"]).all())
    assert bool((other["stack"] != new["stack"]).any()) == (rule != "rigl")


def test_leaves_of_one_shape_grow_on_their_own():
    twins = [{"a": x, "b": x} for x in (W, jnp.zeros_like(G), W != 0)]
    targets = {"a": np.array([8], np.int32), "b": np.array([8], np.int32)}
    new = step_tree(KEY, *twins, target_nnz=targets, drop_fraction=0.5, rule=RULES["set"])
    assert new["a"].sum() == new["b"].sum() == 8
    assert bool((new["a"] != new["b"]).any())


@pytest.mark.parametrize("rule", ["rigl", "mst"])  # SET's random growth is part of MST's
def test_eight_devices_give_the_same_bits_as_one(rule):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    params, grads, masks, targets = tree_problem()
    specs = {"stack": PartitionSpec(None, "x", "y"), "head": PartitionSpec("x", "y"), "bias": PartitionSpec()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    placed = [jax.device_put(tree, shardings) for tree in (params, grads, masks)]
    for zeta in (0.3, 1.0):
        run = partial(step_tree, target_nnz=targets, drop_fraction=jnp.float32(zeta), rule=RULES[rule])
        alone, sharded = run(KEY, params, grads, masks), run(KEY, *placed)
        for name in ("stack", "head"):
            assert len(placed[0][name].sharding.device_set) == 8
            np.testing.assert_array_equal(sharded[name], alone[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "rigl"}, r"rule 'rigl' is no spdf\.Rule; give one, such as spdf\.RULES\['rigl'\]"),
        ({"target_nnz": 3}, r"target_nnz has no entry for 'w', which has an element mask"),
        ({"target_nnz": {"v": jnp.array([3])}}, r"target_nnz has no entry for 'w'"),
    ],
)
def test_what_a_step_cannot_be_told_is_refused_in_a_line(change, message):
    how = {"target_nnz": {"w": jnp.array([8])}, "drop_fraction": jnp.array(0.5), "rule": RULES["rigl"]}
    with pytest.raises(InputError, match=message):
        prune_and_grow_tree(KEY, {"w": W}, {"w": G}, {"w": W != 0}, **how | change)


def test_what_is_registered_as_a_rule_and_is_none_is_refused_where_it_is_used(monkeypatch):
    monkeypatch.setitem(RULES, "mine", lambda weights, grads: weights)
    with pytest.raises(InputError, match=r"sparsity\.rule: RULES\['mine'\] is <function .*>, which is no spdf\.Rule"):
        SparsityConfig(rule="mine", sparsity=0.5)


def scored(score, monkeypatch, **how):
    """What is said of a rule with a drop score, when a programme by it is made."""
    monkeypatch.setitem(RULES, "mine", Rule(gradient_share=0.5, drop_score=score))
    config = SparsityConfig(**{"rule": "mine", "sparsity": 0.5, "update_every_steps": 2} | how)
    groups = {"a": MatrixGroup(2, (8, 16)), "wte/embedding": MatrixGroup(1, (32, 8))}
    with pytest.raises(InputError) as caught:
        Programme(config, groups, 10)
    assert "\n" not in str(caught.value)
    return str(caught.value)


HERE = os.path.relpath(__file__)


def misspelt(w, g):
    return jnp.abs(w * h)  # noqa: F821


def branches(w, g):
    return w if w.sum() > 0 else g


def by_numpy(w, g):
    return jnp.asarray(np.abs(w))


def of_other_matrices(w, g):
    return w @ jnp.ones((16, 16))


def of_three(w, g, masks):
    return w


@pytest.mark.parametrize(
    ("score", "line", "said"),
    [
        (misspelt, "return jnp.abs(w * h)  # noqa: F821", "NameError: name 'h' is not defined"),
        (branches, "return w if w.sum() > 0 else g", "TracerBoolConversionError: Attempted boolean conversion"),
        (by_numpy, "return jnp.asarray(np.abs(w))", "TracerArrayConversionError: "),
        (of_other_matrices, "return w @ jnp.ones((16, 16))", "TypeError: dot_general requires contracting dimensions"),
    ],
)
def test_a_mistake_in_a_score_is_shown_with_its_line_before_any_step(score, line, said, monkeypatch):
    where = "(32, 8)" if score is of_other_matrices else "(8, 16)"
    message = scored(score, monkeypatch)
    number = score.__code__.co_firstlineno + 1
    start = f"sparsity.rule: the drop_score of 'mine' fails on weights and grads of shape {where}: "
    assert message.startswith(f"{start}{HERE}:{number}: {line}: {said}")


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (of_three, rf"{HERE}:\d+: of_three\(\) missing 1 required positional argument: 'masks'"),
        (partial(of_three, masks=0, g=1), rf"{HERE}:\d+: .*multiple values for argument 'g'"),
        (jnp.abs, "takes 1 positional argument but 2 were given"),
        (
            lambda w, g: w.mean(),
            r"gives float32\[\] for weights and grads of shape \(8, 16\); it must give a score a weight",
        ),
        (lambda w, g: w.T, r"gives float32\[16, 8\] for"),
        (lambda w, g: (w, g), r"gives float32\[8, 16\], float32\[8, 16\] for"),
        (lambda w, g: None, "gives nothing for"),
        (lambda w, g: w > g, "the drop_score of 'mine': scores: dtype bool cannot be ranked; use float32, bfloat16"),
        (lambda w, g: jnp.int32(w), "dtype int32 cannot be ranked"),
    ],
)
def test_a_score_that_is_none_is_refused_before_any_step(score, said, monkeypatch):
    assert re.search(said, scored(score, monkeypatch))


def test_a_score_is_tried_on_the_shapes_that_steps_give_it(monkeypatch):
    seen = []

    def score(w, g):
        seen.append(w.shape)
        return w.mean()

    def shapes(**how):
        seen.clear()
        scored(score, monkeypatch, **how)
        return seen[:]

    assert shapes() == [(8, 16)]
    monkeypatch.setattr("spdf_jax.sparsity.rules.jax.eval_shape", lambda f, w, *_: seen.append(w.shape) or w)
    monkeypatch.setitem(RULES, "mine", Rule(drop_score=score))
    groups = {"a": MatrixGroup(2, (8, 16)), "wte/embedding": MatrixGroup(1, (32, 8))}
    for how, expected in (
        ({"pattern": "2:4"}, [(8, 16), (8, 32)]),
        ({"pattern": "block4", "sparse_compute": "blocks"}, [(4, 1, 4, 4), (2, 4, 4, 4)]),
    ):
        seen.clear()
        Programme(SparsityConfig(rule="mine", sparsity=0.5, update_every_steps=2, **how), groups, 10)
        assert seen[::2] == expected, how


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"gradient_share": 75}, "the gradient_share of 'mine' is 75; it must be a number from 0 to 1"),
        ({"drop_fraction": "0.3"}, "the drop_fraction of 'mine' is '0.3'; it must be a number from 0 to 1"),
        ({"exploration": float("nan")}, "the exploration of 'mine' is nan; it must be a number from 0 to 1"),
        ({"drop_score": "magnitude"}, "the drop_score of 'mine' is 'magnitude'; it must be a function"),
        ({"optimizer": None}, "the optimizer of 'mine' is None; it must be a function"),
        ({"choose_masks": True}, "the choose_masks of 'mine' is True; it must be a function"),
    ],
)
def test_what_a_rule_cannot_be_is_refused_where_it_is_used(how, said, monkeypatch):
    monkeypatch.setitem(RULES, "mine", Rule(**how))
    with pytest.raises(InputError, match=re.escape(said)):
        SparsityConfig(rule="mine", sparsity=0.5)
