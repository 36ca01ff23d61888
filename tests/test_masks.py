"""Masks: exact counts in every matrix, exact zeros, one bit a weight, and numbers that a reader can check."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open
from safetensors.numpy import save_file

from spdf_jax.errors import InputError
from spdf_jax.sparsity.distributions import DISTRIBUTIONS, MatrixGroup, target_counts
from spdf_jax.sparsity.mask_files import load_masks, pack_masks, save_masks, unpack_masks
from spdf_jax.sparsity.mask_report import mask_report
from spdf_jax.sparsity.masks import active_counts, apply_masks, dense_masks, init_masks, matrix_groups
from spdf_jax.tree import named_leaves

QUICK = settings(deadline=None, derandomize=True, max_examples=25)
FILTER = [("stack", "stack"), ("head", "matrix"), (".*", "dense")]


def make_params():
    rng = np.random.default_rng(7)
    shapes = {"stack": (3, 10, 14), "head": (6, 25), "embedding": (5, 4), "bias": (9,)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def test_groups_follow_the_filter():
    assert matrix_groups(make_params(), FILTER) == {"stack": MatrixGroup(3, (10, 14)), "head": MatrixGroup(1, (6, 25))}


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_every_layer_holds_its_exact_count(sparsity, distribution, method):
    params = make_params()
    masks = init_masks(
        jax.random.key(0), params, sparsity=sparsity, distribution=distribution, filter=FILTER, method=method
    )
    counts = target_counts(matrix_groups(params, FILTER), sparsity, distribution)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert masks["stack"].sum((1, 2)).tolist() == [counts["stack"]] * 3
    assert int(masks["head"].sum()) == counts["head"]
    for name in ("stack", "head"):
        assert masks[name].dtype == bool
        assert masks[name].shape == params[name].shape
    for name in ("embedding", "bias"):
        assert masks[name].shape == ()
        assert bool(masks[name])
    assert {name: n.tolist() for name, n in active_counts(masks, params, FILTER).items()} == {
        "stack": [counts["stack"]] * 3,
        "head": [counts["head"]],
    }


def test_active_counts_of_dense_leaves_are_their_size():
    params = make_params()
    counts = active_counts(dense_masks(params), params, FILTER)
    assert {name: n.tolist() for name, n in counts.items()} == {"stack": [140] * 3, "head": [150]}


def test_magnitude_keeps_the_largest_of_each_layer():
    params = make_params()
    masks = init_masks(jax.random.key(0), params, sparsity=0.8, filter=FILTER, method="magnitude")
    for layer, mask in zip(np.abs(params["stack"]), np.asarray(masks["stack"]), strict=True):
        assert mask.sum() == 28
        assert layer[mask].min() > layer[~mask].max()


def test_random_masks_depend_on_the_key_and_the_name_alone():
    params = make_params()
    first, again, other = (init_masks(jax.random.key(k), params, sparsity=0.5, filter=FILTER) for k in (0, 0, 1))
    alone = init_masks(jax.random.key(0), {"head": params["head"]}, sparsity=0.5, filter=[("head", "matrix")])
    jitted = jax.jit(lambda k, p: init_masks(k, p, sparsity=0.5, filter=FILTER))(jax.random.key(0), params)
    for tree in (again, jitted):
        assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(tree), strict=True))
    assert bool((alone["head"] == first["head"]).all())
    assert not bool((other["stack"] == first["stack"]).all())
    assert not bool((first["stack"][0] == first["stack"][1]).all())


def test_leaves_of_one_shape_get_masks_of_their_own():
    params = {"a": jnp.zeros((6, 25)), "b": jnp.zeros((6, 25))}
    masks = init_masks(jax.random.key(0), params, sparsity=0.5, filter=[(".*", "matrix")])
    assert masks["a"].sum() == masks["b"].sum() == 75
    assert bool((masks["a"] != masks["b"]).any())


def test_random_masks_take_every_weight_equally_often():
    params = {"w": jnp.zeros((400, 4, 6))}
    masks = init_masks(jax.random.key(3), params, sparsity=0.75, filter=[("w", "stack")])
    share = np.asarray(masks["w"]).mean(0)
    # 400 draws at 1/4: standard deviation 0.0217; 4.5 of them for the largest of 24.
    assert np.abs(share - 0.25).max() < 4.5 * 0.0217


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparsity": 1.0}, "outside"),
        ({"distribution": "gauss"}, "'gauss'"),
        ({"method": "best"}, "'best'"),
        ({"filter": [("stack", "stack")]}, "no pattern matches leaf"),
    ],
)
def test_bad_settings_are_refused_by_name(change, message):
    with pytest.raises(InputError, match=message):
        init_masks(jax.random.key(0), make_params(), **{"sparsity": 0.5, "filter": FILTER, **change})


def test_apply_masks_makes_exact_zeros_even_of_nan_and_keeps_the_rest():
    params = {"w": jnp.array([[jnp.nan, jnp.inf, -2.0], [3.0, -0.0, jnp.nan]]), "b": jnp.ones(2)}
    masks = {"w": jnp.array([[False, False, False], [True, True, True]]), "b": jnp.array(True)}
    out = apply_masks(params, masks)
    assert out["w"][0].tolist() == [0.0, 0.0, 0.0]
    assert not np.signbit(out["w"][0]).any()
    np.testing.assert_array_equal(out["w"][1], params["w"][1])
    np.testing.assert_array_equal(apply_masks(params, dense_masks(params))["w"], params["w"])
    assert out["b"].tolist() == [1.0, 1.0]


def test_apply_masks_refuses_another_tree_and_another_shape():
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(InputError, match="tree structure"):
        apply_masks(params, {"v": jnp.ones((2, 3), bool)})
    with pytest.raises(InputError, match=r"\(1, 3\).*\(2, 3\)"):
        apply_masks(params, {"w": jnp.ones((1, 3), bool)})


@QUICK
@given(mask=st.sampled_from([(13,), (5, 8), (3, 2, 17)]).flatmap(lambda shape: hnp.arrays(np.bool_, shape)))
def test_packing_is_lossless(mask):
    masks, params = {"w": mask, "b": np.array(True)}, {"w": np.zeros(mask.shape), "b": np.zeros(3)}
    masks = jax.tree.map(jnp.asarray, masks)
    packed = pack_masks(masks)
    back = unpack_masks(packed, params)
    assert packed["w"].dtype == jnp.uint8
    assert back["w"].dtype == bool
    np.testing.assert_array_equal(back["w"], mask)
    assert back["b"].shape == ()
    assert bool(back["b"])


@pytest.mark.parametrize("shape", [(12, 768, 768), (768, 3072), (64, 161)])
def test_packed_masks_take_at_most_1_05_bits_a_weight(shape):
    packed = pack_masks({"w": jnp.ones(shape, bool)})["w"]
    assert 1.0 <= 8 * packed.nbytes / np.prod(shape) <= 1.05


def test_report_on_a_mask_worked_by_hand():
    now = {"w": jnp.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], bool), "b": jnp.array(True)}
    before = {"w": jnp.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]], bool), "b": jnp.array(True)}
    report = mask_report(now, before)
    assert [row.name for row in report.rows] == ["w"]
    row = report.rows[0]
    # Active at (0,0) (0,3) (2,0) (3,0); row 1 and columns 1 and 2 are dead; (0,3) and (3,0) are new.
    assert (row.active, row.size, row.sparsity, row.dead_rows, row.dead_columns, row.churn) == (4, 16, 0.75, 1, 2, 0.5)
    assert report.sparsity == 0.75
    assert mask_report(now).rows[0].churn is None
    assert mask_report(now, {"w": jnp.array(True), "b": jnp.array(True)}).rows[0].churn == 0.0


def test_report_totals_run_over_masked_leaves_only_and_the_table_shows_them():
    masks = {"a": jnp.zeros((2, 4, 4), bool).at[0].set(True), "b": jnp.ones((4, 4), bool), "c": jnp.array(True)}
    report = mask_report(masks)
    assert report.sparsity == pytest.approx(16 / 48)
    assert [(r.name, r.dead_rows, r.dead_columns) for r in report.rows] == [("a", 4, 4), ("b", 0, 0)]
    assert "0.3333" in str(report).splitlines()[-1]
    assert len(str(report).splitlines()) == 4
    assert mask_report({"c": jnp.array(True)}).sparsity == 0.0


def test_report_refuses_masks_of_another_model():
    with pytest.raises(InputError, match="previous masks"):
        mask_report({"w": jnp.ones((2, 2), bool)}, {"v": jnp.ones((2, 2), bool)})


@QUICK
@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 2**31 - 1))
def test_reported_sparsity_is_the_share_of_zeros_in_the_masked_weights(sparsity, seed):
    params = {"w": jnp.ones((8, 12))}
    masks = init_masks(jax.random.key(seed), params, sparsity=sparsity, filter=[("w", "matrix")])
    zeros = float((apply_masks(params, masks)["w"] == 0).mean())
    assert mask_report(masks).sparsity == pytest.approx(zeros)
    assert abs(zeros - sparsity) <= 0.5 / 96 + 1e-9
    assert [name for name, _ in named_leaves(masks)] == ["w"]


@pytest.fixture
def mask_file(tmp_path):
    params = {"big": jnp.ones((3, 131, 67)), "list": [jnp.ones((5, 3)), jnp.ones(4)]}
    masks = init_masks(jax.random.key(0), params, sparsity=0.5, filter=[("big", "stack"), ("list/0", "matrix")])
    path = tmp_path / "masks.safetensors"
    save_masks(path, masks)
    return path, params, masks


def test_saved_masks_come_back_bit_for_bit_at_one_bit_a_weight(mask_file):
    path, params, masks = mask_file
    for target in (params, jax.eval_shape(lambda: params)):
        loaded = load_masks(path, target)
        assert jax.tree.structure(loaded) == jax.tree.structure(params)
        for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(masks), strict=True):
            assert a.dtype == b.dtype == bool
            np.testing.assert_array_equal(a, b)
    large = path.with_name("large.safetensors")
    save_masks(large, {"w": np.ones((512, 161), bool)})
    assert 8 * large.stat().st_size <= 1.05 * 512 * 161
    with safe_open(path, framework="numpy") as file:  # as a stranger would read it
        stranger = np.unpackbits(file.get_tensor("big"), count=3 * 131 * 67).reshape(3, 131, 67)
        assert json.loads(file.metadata()["spdf_jax.masks"])["leaves"]["big"]["shape"] == [3, 131, 67]
    np.testing.assert_array_equal(stranger, masks["big"])


def test_masks_of_other_parameters_are_refused_by_name_and_shape(mask_file):
    path, params, _ = mask_file
    with pytest.raises(InputError, match=r"big has shape \(3, 131, 67\), the parameter \(3, 67, 131\)"):
        load_masks(path, {**params, "big": jnp.ones((3, 67, 131))})
    with pytest.raises(InputError, match="without head, with big besides"):
        load_masks(path, {"head": params["big"], "list": params["list"]})
    with pytest.raises(InputError, match="two leaves have one name"):
        save_masks(path, {"a/b": np.ones(3, bool), "a": {"b": np.ones(3, bool)}})


def test_every_damaged_byte_is_refused_or_harmless(mask_file):
    path, params, masks = mask_file
    whole = path.read_bytes()
    for position in (*range(0, len(whole), 41), *range(8)):
        damaged = bytearray(whole)
        damaged[position] ^= 0x04
        path.write_bytes(damaged)
        try:
            loaded = load_masks(path, params)
        except InputError:
            continue
        assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(masks), strict=True))
    damaged = bytearray(whole)
    damaged[-1000] ^= 1  # in the middle of the largest mask
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"mask of big, shape \(3, 131, 67\), is damaged"):
        load_masks(path, params)


def test_files_that_are_no_mask_files_are_refused(mask_file):
    path, params, _ = mask_file
    whole = path.read_bytes()
    for text, message in ((whole[:-5], "not a readable"), (b"", "not a readable"), (b"PK" * 99, "not a readable")):
        path.write_bytes(text)
        with pytest.raises(InputError, match=message):
            load_masks(path, params)
    with pytest.raises(InputError, match="nowhere"):
        load_masks(path.with_name("nowhere"), params)
    save_file({"big": np.zeros(3, np.uint8)}, path)
    with pytest.raises(InputError, match="not of masks"):
        load_masks(path, params)
    for index, message in (
        ({"version": 2, "leaves": {}}, "version 2; this library reads 1"),
        ([], "index is damaged"),
        ({"version": 1, "leaves": {"big": {}}}, "index is damaged"),
    ):
        save_file({"big": np.zeros(3, np.uint8)}, path, metadata={"spdf_jax.masks": json.dumps(index)})
        with pytest.raises(InputError, match=message):
            load_masks(path, params)
