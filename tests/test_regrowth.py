"""Optimiser state of weights that grow back: reset exactly where asked for any optimiser; SMET's Adam; the overshoot."""

from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optimizers import OPTIMIZERS, compiled, problem
from tiny import slow_but

from spdf_jax.errors import InputError
from spdf_jax.sharding import MeshConfig, make_mesh, optimizer_shardings, parameter_shardings
from spdf_jax.sparsity.masks import dense_masks
from spdf_jax.sparsity.optimizers import scale_by_smet_adam
from spdf_jax.sparsity.regrowth import adam_overshoot, reset_masked_state, scale_by_density
from spdf_jax.sparsity.transforms import sparse

SMET = {
    "smet": lambda: optax.chain(scale_by_smet_adam(warmup_steps=4), scale_by_density(1.0), optax.scale(-0.1)),
    "smet_masked": lambda: optax.masked(
        scale_by_smet_adam(), lambda params: jax.tree.map(lambda p: p.ndim > 1, params), mask_compatible_extra_args=True
    ),
}
WITH_SMET = OPTIMIZERS | SMET
# One of each way to hold state: beside the weights or in a wrapper, by label, by matrix, with counts of its own.
WAYS = (
    "adamw",
    "adafactor",
    "adagrad",
    "multi_steps",
    "inject_hyperparams",
    "masked",
    "partition",
    "muon",
    "prodigy",
    "smet",
)
every_optimizer = pytest.mark.parametrize("name", slow_but(WAYS, WITH_SMET))
# Tensors of the weight's shape in the state, where they are not two.
PER_WEIGHT = {
    "sgd_momentum": 1,
    "lion": 1,
    "adafactor_too_small_to_factor": 1,
    "adagrad": 1,
    "amsgrad": 3,
    "novograd": 1,
    "muon": 1,
    "schedule_free": 2,
    "prodigy": 4,
    "ademamix": 3,
    "multi_steps": 3,
    "partition_by_function": 1,
    "smet": 3,
    "smet_masked": 3,
}
# What a new weight starts from, where it is not 0.
INITIAL = {"adagrad": 0.25}


@cache
def optimizer(name):
    return compiled(sparse(WITH_SMET[name]()))


@cache
def trained(name, steps=3):
    params, masks, grads = problem()
    tx, everything = optimizer(name), jax.tree.map(jnp.ones_like, masks)
    state = tx.init(params)
    for i in range(steps):
        state = tx.update(grads(i), state, params, masks=everything)[1]
    return params, masks, state


@every_optimizer
def test_reset_zeroes_the_state_of_masked_weights_and_nothing_else(name):
    params, masks, state = trained(name)
    after = optimizer(name).reset(state, params, masks)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    inactive = ~np.asarray(masks["w"])
    followed = 0
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert old.dtype == new.dtype
        old, new = np.asarray(old), np.asarray(new)
        if old.shape == (6, 8):
            followed += 1
            assert (old[inactive] != INITIAL.get(name, 0)).all()
            assert (new[inactive] == INITIAL.get(name, 0)).all()
            np.testing.assert_array_equal(new[~inactive], old[~inactive])
        else:
            np.testing.assert_array_equal(new, old)
    assert followed == PER_WEIGHT.get(name, 2)


@every_optimizer
def test_masked_state_stays_as_it_was_reset_while_training_goes_on(name):
    """So that a weight which grows back later starts afresh, and checkpoints hold zeros."""
    tx = optimizer(name)
    params, masks, state = trained(name)
    _, _, grads = problem()
    params = jax.tree.map(lambda m, p: p if m.ndim == 0 else jnp.where(m, p, 0), masks, params)
    state = tx.reset(state, params, masks)
    for i in range(3):
        _, state = tx.update(grads(i), state, params, masks=masks)
    inactive = ~np.asarray(masks["w"])
    for leaf in jax.tree.leaves(state):
        if leaf.shape == (6, 8):
            # Adafactor adds 1e-30 to every squared gradient.
            np.testing.assert_allclose(np.asarray(leaf)[inactive], INITIAL.get(name, 0), rtol=0, atol=1e-29)


def test_reset_with_dense_masks_and_without_state_changes_nothing():
    tx = sparse(optax.adam(0.1))
    params, masks, state = trained("adam")
    jax.tree.map(np.testing.assert_array_equal, reset_masked_state(tx, state, params, dense_masks(params)), state)
    plain = sparse(optax.sgd(0.1))
    assert reset_masked_state(plain, plain.init(params), params, masks) == plain.init(params)


class Shapes(NamedTuple):
    noise: jax.Array
    preconditioner: Any


def test_state_is_followed_by_structure_and_not_by_a_shape_that_happens_to_fit():
    params, masks, _ = problem()
    tx = optax.GradientTransformation(
        lambda params: Shapes(jnp.ones((6, 8)), jax.tree.map(jnp.zeros_like, params)), lambda u, s, p=None: (u, s)
    )
    state = Shapes(jnp.ones((6, 8)), jax.tree.map(jnp.ones_like, params))
    after = reset_masked_state(tx, state, params, masks)
    assert bool((after.noise == 1).all())
    np.testing.assert_array_equal(after.preconditioner["w"], masks["w"])


def test_state_that_cannot_be_followed_is_refused_by_name():
    params = {"block": {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}}
    masks = {"block": {"kernel": jnp.ones((6, 8), bool), "bias": jnp.array(True)}}
    shampoo = optax.GradientTransformation(
        lambda params: Shapes(jnp.ones(()), jax.tree.map(lambda p: jnp.eye(p.shape[0]), params)),
        lambda u, s, p=None: (u, s),
    )
    tx = sparse(shampoo)
    with pytest.raises(InputError, match=r"preconditioner/block/kernel of .* has shape \(6, 6\).*\(6, 8\)"):
        reset_masked_state(tx, tx.init(params), params, masks)
    everything_dense = reset_masked_state(tx, tx.init(params), params, dense_masks(params))
    jax.tree.map(np.testing.assert_array_equal, everything_dense, tx.init(params))


def test_rows_and_columns_of_adafactor_stay_where_its_momentum_is_reset():
    params, masks, grads = problem()
    tx = sparse(optax.adafactor(0.1, min_dim_size_to_factor=2, momentum=0.9))
    _, state = tx.update(grads(0), tx.init(params), params, masks=dense_masks(params))
    after = reset_masked_state(tx, state, params, masks)
    factored, momentum = state[0], state[4].ema["w"]
    jax.tree.map(np.testing.assert_array_equal, after[0], factored)
    assert (factored.v_row["w"].shape, factored.v_col["w"].shape) == ((6,), (8,))
    assert float(factored.v_row["w"].min()) > 0
    np.testing.assert_array_equal(after[4].ema["w"], np.where(masks["w"], momentum, 0))


@pytest.mark.parametrize("side", [8, 127])
def test_a_shape_that_fits_a_square_weight_by_accident_is_told_apart(side):
    params, masks = {"w": jnp.ones((side, side))}, {"w": jnp.ones((side, side), bool)}
    shampoo = optax.GradientTransformation(
        lambda params: Shapes(jnp.ones(()), jax.tree.map(lambda p: jnp.zeros((p.shape[0],) * 2), params)),
        lambda u, s, p=None: (u, s),
    )
    for tx in (shampoo, optax.contrib.galore(0.1), optax.contrib.galore(0.1, rank=side)):
        with pytest.raises(InputError, match=rf"has shape \({side}, {side}\), its weight \({side}, {side}\)"):
            reset_masked_state(tx, tx.init(params), params, masks)
    for tx in (optax.adam(0.1), optax.adafactor(0.1, factored=False), optax.contrib.muon(0.1)):
        reset_masked_state(tx, tx.init(params), params, masks)


@pytest.mark.parametrize(
    "tx", [optax.sm3(0.1), optax.flatten(optax.adam(0.1)), optax.scale_by_lbfgs()], ids=["sm3", "flatten", "lbfgs"]
)
def test_state_laid_out_otherwise_than_the_parameters_is_refused_by_name(tx):
    params, masks, _ = problem()
    with pytest.raises(InputError, match=r"(sm3|flatten|lbfgs).* cannot be followed weight by weight"):
        reset_masked_state(tx, tx.init(params), params, masks)


FACTORED = {"adafactor_factored": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2)}


@pytest.mark.parametrize("name", slow_but(["adamw", "multi_steps", "smet", *FACTORED], [*WITH_SMET, *FACTORED]))
def test_state_is_laid_out_like_its_weights_on_eight_devices(name):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    tx = sparse((WITH_SMET | FACTORED)[name]())
    params, masks, grads = problem()
    # Under the GPT's names, so that the rules of the mesh apply; `w` and `b` name the labels of some optimisers.
    rename = {"w": "blocks/mlp_up/kernel", "b": "bias"}
    if name in ("masked", "partition"):
        labelled = {"masked": optax.masked(optax.adam(0.1), {"blocks/mlp_up/kernel": True, "bias": False})}
        labels = {"blocks/mlp_up/kernel": "a", "bias": "s"}
        labelled["partition"] = optax.partition({"a": optax.adam(0.1), "s": optax.sgd(0.1)}, labels)
        tx = sparse(labelled[name])
    stack = lambda tree: {  # noqa: E731
        rename[k]: jnp.stack([v, v]) if v.ndim == 2 else v for k, v in tree.items()
    }
    params, masks = stack(params), stack(masks)
    layout = parameter_shardings(mesh, params)
    shardings = optimizer_shardings(mesh, tx, jax.eval_shape(tx.init, params), params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    put = jax.device_put(params, layout)
    _, state = jax.jit(tx.update, out_shardings=(layout, shardings))(stack(grads(0)), state, put, masks=masks)
    state = jax.jit(lambda s, p, m: reset_masked_state(tx, s, p, m), out_shardings=shardings)(state, put, masks)
    like_weights = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == (2, 6, 8)]
    for leaf in like_weights:
        assert leaf.sharding == layout["blocks/mlp_up/kernel"]
        assert leaf.addressable_shards[0].data.shape == (2, 3, 4)
    # optax's muon takes two-dimensional weights only, and gives the rest to Adam.
    assert len(like_weights) == (PER_WEIGHT | {"muon": 2, "adafactor_factored": 0}).get(name, 2)
    for leaf in jax.tree.leaves(state):
        assert leaf.shape == (2, 6, 8) or leaf.sharding.is_fully_replicated


# --- SMET ------------------------------------------------------------------------------------------------------------


def updates_of(tx, params, masks, grads):
    """Updates of a sequence of gradients, and the last state."""
    state, updates = tx.init(params), []
    step = jax.jit(lambda g, s: tx.update(g, s, params, masks=masks))
    for g in grads:
        update, state = step(g, state)
        updates.append(update)
    return updates, state


@pytest.mark.parametrize("masks_of", [dense_masks, lambda p: jax.tree.map(lambda x: jnp.ones(x.shape, bool), p)])
def test_smet_without_warmup_is_adam_while_nothing_regrows(masks_of):
    params, _, grads = problem()
    gs = [grads(i) for i in range(5)]
    ours, state = updates_of(scale_by_smet_adam(0.8, 0.99, 1e-6, warmup_steps=1), params, masks_of(params), gs)
    theirs, adam = updates_of(
        optax.with_extra_args_support(optax.scale_by_adam(0.8, 0.99, 1e-6)), params, masks_of(params), gs
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), ours, theirs)
    jax.tree.map(np.testing.assert_array_equal, (state.mu, state.nu), (adam.mu, adam.nu))
    assert all((count == 5).all() and count.dtype == jnp.int32 for count in jax.tree.leaves(state.count))


def test_smet_by_hand():
    """b1 = .5, b2 = .75, W = 4; a weight masked for one step, then grown, beside one that was there all along.

    First weight, gradients 1, 1, 2: m = .5, .75, 1.375; v = .25, .4375, 1.328125; corrected by .5, .75, .875 and
    .25, .4375, .578125; ratios 1, 1, (1.375/.875)/sqrt(1.328125/.578125) = 1.03677; times 1/4, 2/4, 3/4.
    Second, masked at first, gradients -, 1, 2 at t = 1, 2: m = .5, 1.25; v = .25, 1.1875;
    ratios 1, (1.25/.75)/sqrt(1.1875/.4375) = 1.01163; times 1/4, 2/4.
    """
    params = {"w": jnp.zeros(2)}
    tx = scale_by_smet_adam(0.5, 0.75, 0.0, warmup_steps=4)
    first, both = {"w": jnp.array([True, False])}, {"w": jnp.array([True, True])}
    seen, state = [], tx.init(params)
    for grads, masks in (([1.0, 0.0], first), ([1.0, 1.0], both), ([2.0, 2.0], both)):
        update, state = tx.update({"w": jnp.array(grads)}, state, params, masks=masks)
        seen.append(update["w"].tolist())
    assert seen[0] == pytest.approx([0.25, 0.0])
    assert seen[1] == pytest.approx([0.5, 0.25])
    assert seen[2] == pytest.approx([0.75 * 1.03677, 0.5 * 1.01163], rel=1e-5)
    assert state.count["w"].tolist() == [3, 2]
    # The warm-up never touched the moments.
    assert state.mu["w"].tolist() == pytest.approx([1.375, 1.25])
    assert state.nu["w"].tolist() == pytest.approx([1.328125, 1.1875])


def test_a_dropped_weight_counts_from_one_again_and_one_regrown_at_once_counts_on():
    tx = sparse(scale_by_smet_adam(warmup_steps=10))
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.ones(3)}
    everything = {"w": jnp.ones(3, bool)}
    _, state = updates_of(tx, params, everything, [grads] * 7)
    # Weight 1 is dropped and grown later, weight 2 dropped and grown in one topology step: its mask never changed.
    without = {"w": jnp.array([True, False, True])}
    state = reset_masked_state(tx, state, params, without)
    assert state.count["w"].tolist() == [7, 0, 7]
    for masks in (without, without, everything):
        update, state = tx.update(grads, state, params, masks=masks)
    assert state.count["w"].tolist() == [10, 1, 10]
    assert update["w"].tolist() == pytest.approx([1.0, 0.1, 1.0], rel=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_smet_keeps_dtypes_and_stays_finite(dtype):
    params = {"w": jnp.ones((4, 4), dtype), "b": jnp.ones(4, dtype)}
    masks = {"w": jnp.eye(4, dtype=bool), "b": jnp.array(True)}
    tx = optax.chain(scale_by_smet_adam(warmup_steps=2), scale_by_density(0.5))
    updates, state = updates_of(tx, params, masks, [params] * 3)
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, state[0].mu, state[0].nu))} == {jnp.dtype(dtype)}
    # Density 1/4: twice the learning rate on the diagonal, none off it; the dense leaf is Adam's.
    np.testing.assert_allclose(np.asarray(updates[2]["w"], np.float32), 2 * np.eye(4), rtol=0.02)
    np.testing.assert_allclose(np.asarray(updates[2]["b"], np.float32), 1.0, rtol=0.02)


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, 1.0), (0.5, 2.0), (1.0, 4.0)])
def test_density_scales_each_sparse_leaf_by_its_own_density(exponent, expected):
    masks = {"quarter": jnp.eye(4, dtype=bool), "full": jnp.ones((2, 2), bool), "dense": jnp.array(True)}
    masks["empty"] = jnp.zeros((2, 3), bool)
    ones = {"quarter": jnp.ones((4, 4)), "full": jnp.ones((2, 2)), "dense": jnp.ones(3), "empty": jnp.zeros((2, 3))}
    tx = scale_by_density(exponent)
    for _ in range(2):  # nothing compounds
        updates, _ = tx.update(ones, tx.init(ones), masks=masks)
        scales = {name: sorted({float(x) for x in leaf.ravel()}) for name, leaf in updates.items()}
        assert scales == {"quarter": [expected], "full": [1.0], "dense": [1.0], "empty": [0.0]}


@pytest.mark.parametrize("make", [lambda: scale_by_smet_adam(warmup_steps=0), lambda: scale_by_density(-1.0)])
def test_bad_settings_are_refused(make):
    with pytest.raises(InputError, match="must"):
        make()


@pytest.mark.parametrize("make", [scale_by_smet_adam, lambda: scale_by_density(1.0)])
def test_masks_are_required(make):
    params = {"w": jnp.ones(2)}
    with pytest.raises(TypeError, match="masks"):
        make().update(params, make().init(params), params)


# --- the overshoot ---------------------------------------------------------------------------------------------------


def test_overshoot_by_its_published_values():
    steps = np.arange(1, 2000)
    slow, fast = (adam_overshoot(0.9, b2, steps) for b2 in (0.999, 0.95))
    assert (slow[0], slow.max(), steps[slow.argmax()]) == (
        pytest.approx(3.162, abs=1e-3),
        pytest.approx(6.6, abs=0.05),
        12,
    )
    assert fast.max() == pytest.approx(1.1, abs=0.01)
    assert slow[-1] == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("b2", [0.95, 0.99, 0.999])
def test_optax_adam_overshoots_by_exactly_that_after_a_reset_and_smet_does_not(b2):
    params, grads = {"w": jnp.zeros(2)}, {"w": jnp.full(2, 0.3)}
    grown, masks = {"w": jnp.array([True, False])}, {"w": jnp.ones(2, bool)}

    def after_regrowth(tx, state):
        state, seen = reset_masked_state(tx, state, params, grown), []
        update = jax.jit(lambda state: tx.update(grads, state, params, masks=masks))
        for _ in range(40):
            updates, state = update(state)
            seen.append(updates["w"])
        return np.array(seen)

    # Of a constant gradient, after very many steps.
    moments = {"mu": grads, "nu": jax.tree.map(jnp.square, grads)}
    adam = sparse(optax.scale_by_adam(0.9, b2))
    seen = after_regrowth(adam, optax.ScaleByAdamState(count=jnp.int32(1_000_000), **moments))
    np.testing.assert_allclose(seen[:, 0], 1.0, rtol=1e-4)
    np.testing.assert_allclose(seen[:, 1], adam_overshoot(0.9, b2, np.arange(1, 41)), rtol=1e-4)

    smet = sparse(scale_by_smet_adam(0.9, b2, warmup_steps=20))
    state = smet.init(params)._replace(count={"w": jnp.full(2, 1_000_000)}, **moments)
    seen = after_regrowth(smet, state)
    np.testing.assert_allclose(seen[:, 0], 1.0, rtol=1e-4)
    np.testing.assert_allclose(seen[:, 1], np.minimum(np.arange(1, 41) / 20, 1), rtol=1e-4)
    assert seen.max() <= 1 + 1e-4
