"""Exact selection: the k largest, ties by lowest index, the same bits on one device and on eight."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.select import order_keys, select_top_k
from spdf_jax.sparsity.topology import prune_and_grow_tree

QUICK = settings(deadline=None, derandomize=True, max_examples=25)
select = jax.jit(select_top_k)

# Few shapes and dtypes, so that jit compiles few programs; bfloat16 takes the 16-bit road, odd sizes cut rows anywhere.
KINDS = [((37,), jnp.float32), ((5, 7), jnp.bfloat16), ((2, 3, 5), jnp.float16), ((4, 8), jnp.uint32)]
# 1.0078125 is bfloat16's next number after 1, 65504 float16's largest. Subnormals are left out: CPUs and GPUs flush them to
# zero, NumPy does not.
FLOATS = st.sampled_from(
    [0.0, -0.0, 0.5, -0.5, 1.0, -1.0, 1.0078125, 2.0, 65504.0, -65504.0, 1e-4, np.inf, -np.inf, np.nan, -np.nan]
)
INTEGERS = st.sampled_from([0, 1, 2, 3, 12345678, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2, 2**32 - 1])


def reference(scores: np.ndarray, k: int, eligible: np.ndarray) -> np.ndarray:
    """What `select_top_k` means: a stable sort, largest first, NaN last."""
    values = scores.astype(np.float64).ravel()
    candidates = np.flatnonzero(eligible)
    nan = np.isnan(values)[candidates]
    order = np.lexsort((candidates, -np.where(nan, 0.0, values[candidates]), nan))  # the last key sorts first
    out = np.zeros(scores.size, bool)
    out[candidates[order[: max(k, 0)]]] = True
    return out.reshape(scores.shape)


@pytest.mark.parametrize(("shape", "dtype"), KINDS, ids=lambda v: getattr(v, "__name__", str(v)))
@QUICK
@given(data=st.data())
def test_equals_a_stable_sort_for_any_values_any_k_and_any_eligibility(shape, dtype, data):
    if dtype == jnp.uint32:
        scores = data.draw(hnp.arrays(np.uint32, shape, elements=INTEGERS))
        ranked = scores >> 1  # 31 bits take part
    else:
        scores = data.draw(hnp.arrays(np.float32, shape, elements=FLOATS)).astype(dtype)
        ranked = scores
    size = scores.size
    k = data.draw(st.sampled_from([0, 1, size - 1, size, size + 5]) | st.integers(0, size))
    eligible = data.draw(st.just(np.ones(shape, bool)) | st.just(np.zeros(shape, bool)) | hnp.arrays(np.bool_, shape))
    got = select(jnp.asarray(scores), k, jnp.asarray(eligible))
    assert got.dtype == bool
    np.testing.assert_array_equal(got, reference(ranked, k, eligible))
    assert int(got.sum()) == min(k, int(eligible.sum()))


def collective_sizes(hlo: str) -> list[int]:
    """Elements of everything that a compiled program sends between devices."""
    kinds = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    results = re.findall(rf"= (.*?) (?:{kinds})(?:-start)?\(", hlo)
    return [
        math.prod(int(n) for n in dims.split(",") if n)
        for result in results
        for dims in re.findall(r"\[([\d,]*)\]", result)
    ]


def test_no_eligibility_means_all_and_eager_equals_jit():
    scores = np.random.default_rng(0).normal(size=(9, 11)).astype(np.float32)
    expected = reference(scores, 40, np.ones((9, 11), bool))
    np.testing.assert_array_equal(select_top_k(scores, 40), expected)
    np.testing.assert_array_equal(select(scores, 40), expected)


@pytest.mark.parametrize("k", [0, 1, 5, 12, 13, 24])
def test_equal_scores_are_taken_in_row_major_order(k):
    expected = (np.arange(24) < k).reshape(4, 6)
    np.testing.assert_array_equal(select(jnp.zeros((4, 6)), k), expected)
    np.testing.assert_array_equal(select(jnp.full((4, 6), -jnp.inf), k), expected)
    np.testing.assert_array_equal(select(jnp.full((4, 6), jnp.nan), k), expected)


def test_a_nan_never_wins_a_place_from_a_number():
    scores = jnp.array([jnp.nan, -jnp.inf, 3.0, -jnp.nan, jnp.inf])
    assert select(scores, 3).tolist() == [False, True, True, False, True]


def test_negative_zero_ties_with_zero():
    assert select(jnp.array([-0.0, 0.0, -0.0, 0.0]), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_order_keys_rise_strictly_with_the_scores_and_leave_the_lowest_integer_free(dtype):
    top = float(jnp.finfo(dtype).max)
    rising = jnp.array([jnp.nan, -jnp.inf, -top, -1.0, -0.5, 0.0, 0.5, 1.0, top, jnp.inf], dtype)
    keys = np.asarray(order_keys(rising)).astype(np.int64)
    assert (np.diff(keys) > 0).all()
    assert keys[0] > np.iinfo(order_keys(rising).dtype).min


@pytest.mark.parametrize("dtype", [jnp.int32, bool, jnp.int8, jnp.complex64])
def test_scores_that_cannot_be_ranked_are_refused(dtype):
    with pytest.raises(InputError, match="dtype"):
        select_top_k(jnp.ones(4, dtype), 2)


def test_one_compilation_serves_every_k():
    traces = []

    @jax.jit
    def counted(scores, k):
        traces.append(1)
        return select_top_k(scores, k)

    scores = np.random.default_rng(1).normal(size=(6, 6)).astype(np.float32)
    counts = [int(counted(scores, jnp.int32(k)).sum()) for k in range(37)]
    assert counts == list(range(37))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (("x", "y"), jnp.float32),
        (("y", "x"), jnp.bfloat16),
        ((None, ("x", "y")), jnp.float32),
        ((("x", "y"), None), jnp.bfloat16),
    ],
    ids=str,
)
def test_eight_devices_select_the_same_bits_as_one_and_gather_no_matrix(spec, dtype):
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    rng = np.random.default_rng(2)
    # Halves of small integers: any one of them comes hundreds of times, so the ties cross every shard boundary.
    scores = (np.round(2 * rng.normal(size=(64, 32))) / 2).astype(dtype)
    scores[3, 5] = np.nan
    eligible = rng.random(scores.shape) < 0.8
    placed = jax.device_put((scores, eligible), NamedSharding(mesh, PartitionSpec(*spec)))
    compiled = select.lower(placed[0], jnp.int32(0), placed[1]).compile()
    for k in (0, 1, 700, int(eligible.sum())):
        expected = reference(scores, k, eligible)
        np.testing.assert_array_equal(select(scores, k, eligible), expected)
        np.testing.assert_array_equal(compiled(placed[0], jnp.int32(k), placed[1]), expected)
    assert len(placed[0].sharding.device_set) == 8
    # What crosses devices is counts and one value a row or a column, never an array of the matrix' size.
    assert 1 <= max(collective_sizes(compiled.as_text())) <= 64


def test_a_tree_is_updated_matrix_by_matrix_in_little_room():
    """Scratch memory of the whole update <= 2.5 x the largest leaf; in a vmap over layers random bits alone take more."""
    shapes = {"up": (8, 64, 256), "down": (8, 256, 64), "out": (8, 64, 64)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    masks = {name: jax.ShapeDtypeStruct(shape, bool) for name, shape in shapes.items()}

    def update(weights, grads, masks):
        targets = {name: jnp.full((8,), 1000) for name in shapes}
        key = jax.random.key(0)
        return prune_and_grow_tree(key, weights, grads, masks, target_nnz=targets, drop_fraction=0.3, rule=RULES["mst"])

    compiled = jax.jit(update).lower(tree, tree, masks).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2.5 * 4 * math.prod(shapes["up"])
