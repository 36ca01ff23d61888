"""Pruning one matrix: the masks and weights of Wanda's and SparseGPT's authors, and what theirs do not do."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import spdf_jax as spdf
from spdf_jax.sparsity.one_shot import gram

SETTINGS = {"50": "unstructured", "70": "unstructured", "2:4": "2:4"}


@pytest.fixture(scope="module")
def recorded():
    """What ``recorded/one_shot.py`` recorded, our way round: of a layer and inputs of which one is always 0."""
    with np.load(Path(__file__).parent / "recorded" / "one_shot.npz") as file:
        found = dict(file)
    found["x"], found["w"] = found["x"].astype(np.float32) / 8, found["weight"].T
    return found


def layer(inputs, outputs, seed=0):
    """Weights, and the Hessian of inputs that say something of each other."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2 * inputs, inputs)) @ rng.normal(size=(inputs, inputs))
    x[:, 3] = 0
    return rng.normal(size=(inputs, outputs)).astype(np.float32), (x.T @ x).astype(np.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_sparsegpt_is_its_authors(recorded, name):
    theirs = recorded[f"sparsegpt {name}"].T
    w, mask = spdf.sparsegpt(recorded["w"], gram(recorded["x"]), np.count_nonzero(theirs), pattern=SETTINGS[name])
    np.testing.assert_array_equal(mask, theirs != 0)
    np.testing.assert_allclose(w, theirs, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_wanda_is_its_authors(recorded, name):
    w = recorded["w"]
    theirs = np.unpackbits(recorded[f"wanda {name}"]).reshape(w.T.shape).T.astype(bool)
    scores = spdf.wanda_scores(jnp.asarray(w), jnp.linalg.norm(recorded["x"], axis=0))
    mask = spdf.keep_largest(scores, theirs.sum(), pattern=SETTINGS[name], by_output=True)
    differing = np.argwhere(mask != theirs)
    assert all(scores[i, j] == 0 for i, j in differing), "up to ties, which are of the input that is always 0"
    assert len(differing) < w.size / 100


def in_float64(w, hessian, target, pattern, block=1, n=1, m=1):
    """SparseGPT by its equations, one input after the other, with an exact number of active weights."""
    w, hessian = w.astype(np.float64), hessian.astype(np.float64)
    dead = np.diagonal(hessian) == 0
    w[dead], hessian[dead, dead] = 0, 1
    hessian += 0.01 * np.mean(np.diagonal(hessian)) * np.eye(len(w))
    factor = np.linalg.cholesky(np.linalg.inv(hessian)).T
    scales, mask, rows = np.diagonal(factor)[:, None], np.ones(w.shape, bool), len(w) // block
    for i in range(len(w)):
        unit = max(block, m)
        step = unit * (128 // unit)
        if m == 1 and i % step == 0:
            scores = (w[i : i + step] / scales[i : i + step]) ** 2
            units = scores.reshape(len(scores) // block, block, -1, block).sum((1, 3))
            first, last = i // block, i // block + len(units)
            count = target // block**2 * last // rows - target // block**2 * first // rows
            kept = np.zeros(units.shape, bool)
            kept.flat[np.argsort(-units, axis=None, kind="stable")[:count]] = True
            mask[i : i + step] = kept.repeat(block, 0).repeat(block, 1)
        elif m > 1 and i % m == 0:
            scores = np.abs(w[i : i + m] / scales[i : i + m])
            np.put_along_axis(mask[i : i + m], np.argsort(scores, axis=0, kind="stable")[: m - n], False, 0)
        error = np.where(mask[i], 0, w[i] / factor[i, i])
        w[i + 1 :] -= np.outer(factor[i, i + 1 :], error)
    return np.where(mask, w, 0), mask


@pytest.mark.parametrize(
    ("inputs", "outputs", "target", "pattern", "how"),
    [
        (200, 24, 1777, "unstructured", {}),  # the last inputs are fewer than 128, and counts have a rest
        (48, 16, 256, "1:3", {"n": 1, "m": 3}),
        (160, 32, 7 * 256, "block16", {"block": 16}),
        (36, 12, 4 * 36, "block6", {"block": 6}),
    ],
)
def test_sparsegpt_follows_its_equations(inputs, outputs, target, pattern, how):
    w, hessian = layer(inputs, outputs)
    ours, mask = spdf.sparsegpt(w, hessian, target, pattern=pattern)
    wanted, wanted_mask = in_float64(w, hessian, target, pattern, **how)
    np.testing.assert_array_equal(mask, wanted_mask)
    np.testing.assert_allclose(ours, wanted, atol=1e-3 * np.abs(wanted).max())
    assert int(mask.sum()) == target
    assert not np.asarray(ours)[~np.asarray(mask)].any()


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block4"])
def test_a_dense_target_changes_nothing(pattern):
    w, hessian = layer(32, 8)
    ours, mask = spdf.sparsegpt(w, hessian, w.size, pattern=pattern)
    assert mask.all()
    np.testing.assert_array_equal(np.delete(ours, 3, 0), np.delete(w, 3, 0))  # of input 3, always 0, any weight will do


def test_what_is_left_of_a_layer_is_best_by_sparsegpt_and_worst_by_magnitude():
    w, hessian = layer(64, 32)
    target, norms = w.size // 2, np.sqrt(np.diagonal(hessian))
    by_magnitude = w * spdf.keep_largest(jnp.abs(w), target)
    by_wanda = w * spdf.keep_largest(spdf.wanda_scores(w, norms), target, by_output=True)
    by_sparsegpt, _ = spdf.sparsegpt(w, hessian, target)
    errors = [np.trace((w - x).T @ hessian @ (w - x)) for x in map(np.asarray, (by_sparsegpt, by_wanda, by_magnitude))]
    assert errors[0] < errors[1] < errors[2]


def test_every_output_keeps_as_many_and_the_rest_goes_where_the_next_score_is_largest():
    scores = jnp.array([[5.0, 1.0, 2.0], [4.0, 9.0, jnp.nan], [3.0, 0.0, 1.0]])
    assert spdf.keep_largest(scores, 4, by_output=True).tolist() == [
        [True, False, True],
        [True, True, False],
        [False, False, False],
    ]
    for target in range(10):
        assert int(spdf.keep_largest(scores, target, by_output=True).sum()) == target
    blocks = spdf.keep_largest(jnp.arange(48.0).reshape(6, 8), 24, pattern="block2", by_output=True)
    assert blocks.sum(0).tolist() == [2, 2, 2, 2, 4, 4, 4, 4]


@pytest.mark.parametrize("inputs", [1, 5, 19])
def test_above_its_diagonal_a_gram_is_the_product(inputs):
    x = jax.random.normal(jax.random.key(0), (9, inputs), jnp.bfloat16)
    whole = x.astype(jnp.float32)
    np.testing.assert_allclose(np.triu(gram(x)), np.triu(whole.T @ whole), rtol=1e-6, atol=1e-6)


def test_sparsegpt_reads_the_upper_triangle_alone():
    w, hessian = layer(32, 8)
    weights, mask = spdf.sparsegpt(w, hessian, 100)
    assert int(mask.sum()) == 100
    below = np.tri(32, k=-1, dtype=bool)
    of_half = spdf.sparsegpt(w, jnp.where(below, jnp.nan, hessian), 100)
    assert np.array_equal(of_half[0], weights)
    assert np.array_equal(of_half[1], mask)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w, h: spdf.sparsegpt(w, h[:3, :3], 4), "sparsegpt: a Hessian of shape (3, 3); (32, 32) is that"),
        (lambda w, h: spdf.sparsegpt(w, h, 4, pattern="2:5"), "axis -2 must be a multiple of 5"),
        (lambda w, h: spdf.keep_largest(w, 4, pattern="block3"), "does not divide into block3"),
        (lambda w, h: spdf.wanda_scores(w, h), "wanda_scores: input_norm of shape (32, 32)"),
    ],
)
def test_refusals(call, said):
    with pytest.raises(spdf.InputError) as refused:
        call(*map(jnp.asarray, layer(32, 8)))
    assert said in str(refused.value)
