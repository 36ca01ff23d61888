"""The promises that every rule keeps in every pattern and distribution."""

import itertools
import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import DISTRIBUTIONS, MatrixGroup, target_counts
from spdf_jax.sparsity.masks import apply_masks, init_masks, matrix_groups
from spdf_jax.sparsity.patterns import PATTERNS, parse_pattern
from spdf_jax.sparsity.programme import SCHEDULES, Programme, SparsityConfig
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topology import prune_and_grow_tree

KEY = jax.random.key(0)
FILTER = [("stack", "stack")]
MOVING = [name for name, rule in RULES.items() if rule.moves]
SPECS = {"stack": PartitionSpec(None, "x", "y"), "bias": PartitionSpec()}
every_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@cache
def problem(pattern):
    """Weights and gradients whose matrices have 4 x 2 shards of whole blocks; halves of integers, so that ties decide."""
    b = max(parse_pattern(pattern).block, 8)
    rng = np.random.default_rng(b)
    shapes = {"stack": (2, 4 * b, 4 * b), "bias": (3,)}
    return [
        {name: np.round(4 * rng.normal(size=shape)).astype(np.float32) / 2 for name, shape in shapes.items()}
        for _ in range(2)
    ]


def levels(pattern):
    """Sparsities to go through: net pruning and net growth where the pattern has them, dense and back everywhere."""
    p = parse_pattern(pattern)
    own = 1 - p.n / p.m
    return (own, own, 0.0, own) if p.m > 1 else (0.5, 0.75, 0.75, 0.0, 0.6)


def distributions(pattern):
    return ("uniform",) if parse_pattern(pattern).m > 1 else DISTRIBUTIONS


def engine(rule, pattern):
    """The rule as the engine sees it: rules that differ in their schedules alone are one."""
    return RULES[rule]._replace(pattern=pattern, schedules=(), drop_fraction=0.0)


#: One rule for every distinct engine.
DISTINCT = list({engine(name, "unstructured"): name for name in reversed(MOVING)}.values())


def every_pair(rules):
    """Every rule and every pattern; of pairs, those that take another way: a pattern selects by gradient, at random, or both.

    What a rule drops by is a score to every pattern, and how large blocks and groups are is nothing to a rule: other pairs are
    slow.
    """
    ways = set(itertools.product(("set", "rigl", "mst"), ("2:4", "block32")))
    quick = ways | {(rule, "unstructured") for rule in rules}
    pairs = itertools.product(rules, PATTERNS)
    marked = [pytest.param(*pair, marks=() if pair in quick else pytest.mark.slow) for pair in pairs]
    return pytest.mark.parametrize(("rule", "pattern"), marked)


def check(masks, params, count, pattern):
    """Treedef, dtypes, exact counts, and the pattern itself."""
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert masks["bias"].shape == ()
    assert bool(masks["bias"])
    p, mask = parse_pattern(pattern), np.asarray(masks["stack"])
    assert mask.dtype == bool
    assert mask.shape == params["stack"].shape
    assert mask.sum((1, 2)).tolist() == [count, count]
    rows, columns = mask.shape[1:]
    if p.block > 1:
        blocks = mask.reshape(2, rows // p.block, p.block, columns // p.block, p.block)
        assert (blocks.any((2, 4)) == blocks.all((2, 4))).all()
    if p.m > 1:
        in_group = mask.reshape(2, rows // p.m, p.m, columns).sum(2)
        assert (in_group == (p.n if count < rows * columns else p.m)).all()


update = jax.jit(prune_and_grow_tree, static_argnames="rule")


def step(rule, pattern, seed, trees, count, drop_fraction):
    return update(
        jax.random.key(seed),
        *trees,
        target_nnz={"stack": np.full(2, count, np.int32)},
        drop_fraction=np.float32(drop_fraction),
        rule=engine(rule, pattern),
    )


@every_pair(MOVING)
def test_counts_are_exact_through_every_level_of_every_distribution_in_one_compilation(rule, pattern):
    params, grads = problem(pattern)
    groups, path = matrix_groups(params, FILTER), levels(pattern)
    compiled = update._cache_size()
    for distribution in distributions(pattern):
        masks = init_masks(KEY, params, sparsity=path[0], distribution=distribution, filter=FILTER, pattern=pattern)
        check(masks, params, target_counts(groups, path[0], distribution, pattern)["stack"], pattern)
        for i, sparsity in enumerate(path):
            count = target_counts(groups, sparsity, distribution, pattern)["stack"]
            trees = (apply_masks(params, masks), grads)
            masks = step(rule, pattern, i, (*trees, masks), count, RULES[rule].drop_fraction)
            check(masks, params, count, pattern)
            again = step(rule, pattern, i, (*trees, masks), count, 0)
            np.testing.assert_array_equal(again["stack"], masks["stack"])  # at drop 0 the present masks stay
    assert update._cache_size() <= compiled + 1


@every_pair(DISTINCT)
def test_the_key_decides_and_eight_devices_give_the_same_bits_as_one(rule, pattern):
    params, grads = problem(pattern)
    masks = init_masks(KEY, params, sparsity=levels(pattern)[0], filter=FILTER, pattern=pattern, method="magnitude")
    trees = (apply_masks(params, masks), grads, masks)
    count = int(masks["stack"][0].sum())
    first, again, other = (step(rule, pattern, seed, trees, count, 0.5)["stack"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(again, first)
    assert bool((other != first).any()) == (RULES[rule].gradient_share < 1)
    assert bool((first != masks["stack"]).any())

    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    sharded = step(rule, pattern, 1, [jax.device_put(tree, shardings) for tree in trees], count, 0.5)["stack"]
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_array_equal(sharded, first)


@every_pattern
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_masks_and_updates_can_be_planned_without_memory(method, pattern):
    shapes = {
        "stack": jax.ShapeDtypeStruct((96, 12288, 49152), jnp.bfloat16),  # 58 billion weights
        "head": jax.ShapeDtypeStruct((12288, 49152), jnp.bfloat16),
        "bias": jax.ShapeDtypeStruct((7,), jnp.float32),
    }
    sparsity = levels(pattern)[0]

    def plan(key, params):
        filter = [*FILTER, ("head", "matrix")]
        masks = init_masks(key, params, sparsity=sparsity, filter=filter, method=method, pattern=pattern)
        targets = {"stack": jnp.zeros(96, jnp.int32), "head": jnp.zeros(1, jnp.int32)}
        new = prune_and_grow_tree(
            key, params, params, masks, target_nnz=targets, drop_fraction=0.3, rule=engine("mst", pattern)
        )
        return masks, new

    for masks in jax.eval_shape(plan, KEY, shapes):
        assert masks["stack"] == jax.ShapeDtypeStruct((96, 12288, 49152), jnp.bool_)
        assert masks["head"].dtype == jnp.bool_
        assert masks["bias"].shape == ()


CURVES = {
    "constant": {},
    "linear": {"ramp_end": 0.5},
    "cubic": {"ramp_end": 0.5},
    "three_phases": {"ramp_end": 0.2, "ultra_end": 0.6, "restoration_end": 0.8},
    "table": {"table": True},
    "alternate": {"ramp_end": 0.2, "ultra_end": 0.8, "cycles": 2},
}


@every_pattern
@pytest.mark.parametrize("rule", RULES)
def test_every_combination_is_planned_exactly_or_refused(rule, pattern):
    p, own = parse_pattern(pattern), levels(pattern)[0]
    groups = {"stack": MatrixGroup(2, (384, 256)), "head": MatrixGroup(1, (512, 128))}
    assert set(CURVES) == set(SCHEDULES)
    for distribution, (schedule, curve) in itertools.product(DISTRIBUTIONS, CURVES.items()):
        settings = {"rule": rule, "pattern": pattern, "distribution": distribution, "schedule": schedule, **curve}
        settings |= {"sparsity": own, "update_every_steps": 5}
        if schedule == "table":
            settings["table"] = ((0.0, 0.0), (0.5, own))
        follows = not RULES[rule].schedules or schedule in RULES[rule].schedules
        fits = p.m == 1 or (distribution == "uniform" and schedule not in ("linear", "cubic", "three_phases"))
        if RULES[rule].choose_each_step:
            fits &= pattern == "unstructured" and distribution == "uniform"
        if not (follows and fits):
            with pytest.raises(InputError, match=r"sparsity\.(schedule|pattern|distribution)|distribution: pattern"):
                SparsityConfig(**settings)
            continue
        programme = Programme(SparsityConfig(**settings), groups, 100)
        for step in range(0, 101, 5):
            for name, count in programme.counts(step).items():
                p.check_count(count, groups[name].size)
            assert programme.sparsity(step) == pytest.approx(programme.level(step), abs=0.1)


@pytest.mark.parametrize(
    ("pattern", "shape"),
    [("2:4", (6, 8)), ("1:4", (8,)), ("block32", (32, 48)), ("block64", (96, 64)), ("block128", (4, 4))],
)
def test_matrices_that_do_not_divide_are_refused_by_name(pattern, shape):
    sparsity, w = levels(pattern)[0], jnp.ones(shape)
    with pytest.raises(InputError, match=f"w of shape .*{pattern}"):
        init_masks(KEY, {"w": w}, sparsity=sparsity, filter=[("w", "matrix")], pattern=pattern)
    with pytest.raises(InputError, match=f"w of shape .*{pattern}"):
        target_counts({"w": MatrixGroup(1, shape)}, sparsity, "uniform", pattern)
    with pytest.raises(InputError, match=f"of shape .*{pattern}"):
        prune_and_grow_tree(
            KEY,
            {"w": w},
            {"w": w},
            {"w": w > 0},
            target_nnz={"w": np.array([0])},
            drop_fraction=0.3,
            rule=engine("rigl", pattern),
        )


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|collective-permute|sort)(?:-start)?\(")


def weight_sized_traffic(text, shard_size):
    """Sorts, and collectives whose result has as many elements as a weight shard (a result is no smaller than its operand)."""
    found = []
    for result, operation in COLLECTIVE.findall(text):
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", result)]
        if operation == "sort" or max(sizes) >= shard_size:
            found.append((operation, result))
    return found


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.slow)], ids=["quickly", "as users compile"])
def compiled_both_ways(request):
    jax.config.update("jax_disable_most_optimizations", request.param)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.usefixtures("compiled_both_ways")
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block32"])
def test_the_compiled_sharded_update_neither_sorts_nor_gathers_weights(pattern):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    shapes = {"stack": (3, 256, 512), "head": (512, 256)}
    specs = SPECS | {"head": PartitionSpec("x", "y")}
    placed = {name: NamedSharding(mesh, specs[name]) for name in shapes}
    weights = {name: jax.ShapeDtypeStruct(shapes[name], jnp.float32, sharding=placed[name]) for name in shapes}
    masks = {name: jax.ShapeDtypeStruct(shapes[name], jnp.bool_, sharding=placed[name]) for name in shapes}
    counts = {"stack": jax.ShapeDtypeStruct((3,), jnp.int32), "head": jax.ShapeDtypeStruct((1,), jnp.int32)}
    run = jax.jit(prune_and_grow_tree, static_argnames="rule", out_shardings=placed)
    compiled = run.lower(
        KEY, weights, weights, masks, target_nnz=counts, drop_fraction=0.3, rule=engine("mst", pattern)
    ).compile()
    text = compiled.as_text()
    assert "all-reduce" in text  # the counts do cross devices
    assert weight_sized_traffic(text, 256 * 512 // 8) == []


def test_the_search_for_traffic_finds_what_it_looks_for():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x")))
    gather = jax.jit(lambda x: x + 1, out_shardings=NamedSharding(mesh, PartitionSpec())).lower(x).compile()
    assert {name for name, _ in weight_sized_traffic(gather.as_text(), 512)} == {"all-gather"}
    ordered = jax.jit(lambda x: jnp.sort(x, axis=1)).lower(x).compile()
    assert {name for name, _ in weight_sized_traffic(ordered.as_text(), 512)} == {"sort"}
