"""The optimiser chain of a phase: learning rate at its corners, decay on matrices only, clipping on masked gradients."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spdf_jax.errors import InputError
from spdf_jax.optim import OptimizerConfig, learning_rate_schedule, make_optimizer
from spdf_jax.sparsity.masks import dense_masks


def rates(total_steps, **config):
    schedule = learning_rate_schedule(OptimizerConfig(peak_learning_rate=1e-3, **config), total_steps)
    return lambda step: float(schedule(jnp.int32(step)))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_is_linear_and_moves_from_the_very_first_step(schedule):
    rate = rates(1000, warmup_steps=100, schedule=schedule)
    assert [rate(0), rate(49), rate(99), rate(100)] == pytest.approx([1e-5, 5e-4, 1e-3, 1e-3], rel=1e-4)


@pytest.mark.parametrize(
    ("schedule", "quarter", "half", "end"),
    # From 1e-3 to a tenth over the 900 steps after the warm-up; cosine: 0.1 + 0.9 (1 + cos(pi x))/2.
    [
        ("cosine", 1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, 5.5e-4, 1e-4),
        ("linear", 7.75e-4, 5.5e-4, 1e-4),
        ("constant", 1e-3, 1e-3, 1e-3),
    ],
)
def test_the_rate_falls_to_its_final_fraction(schedule, quarter, half, end):
    rate = rates(1000, warmup_steps=100, schedule=schedule, final_fraction=0.1)
    assert [rate(325), rate(550), rate(1000), rate(1200)] == pytest.approx([quarter, half, end, end])
    assert rate(999) == pytest.approx(end, rel=0.011)  # the last step taken, one before the end


@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_short_warmups_start_at_the_peak(warmup_steps):
    rate = rates(10, warmup_steps=warmup_steps, schedule="linear", final_fraction=0.0)
    assert rate(0) == pytest.approx(1e-3)
    assert rate(10) == pytest.approx(0.0, abs=1e-9)


def test_the_rate_never_rises_after_the_warmup_and_stays_positive():
    schedule = learning_rate_schedule(OptimizerConfig(warmup_steps=20), 200)
    values = np.asarray(jax.vmap(schedule)(jnp.arange(200)))
    assert (np.diff(values[:20]) > 0).all()
    assert (np.diff(values[20:]) <= 0).all()
    assert values.min() > 0
    assert values.max() == pytest.approx(6e-4)


PARAMS = {
    "blocks": {
        "mlp_up": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)},
        "ln": {"scale": jnp.full(3, 2.0), "bias": jnp.full(3, 2.0)},
    },
    "wte": {"embedding": jnp.full((4, 3), 2.0)},
}


def one_update(config, grads, params=PARAMS, masks=None, learning_rate=0.01):
    tx = make_optimizer(config)
    masks = dense_masks(params) if masks is None else masks
    update = jax.jit(
        lambda grads, masks: tx.update(grads, tx.init(params), params, masks=masks, learning_rate=learning_rate)
    )
    return update(grads, masks)[0]


def test_weight_decay_moves_matrices_and_embeddings_but_no_norms_and_biases():
    updates = one_update(OptimizerConfig(weight_decay=0.1), jax.tree.map(jnp.zeros_like, PARAMS))
    decay = -0.01 * 0.1 * 2.0
    np.testing.assert_allclose(updates["blocks"]["mlp_up"]["kernel"], decay, rtol=1e-6)
    np.testing.assert_allclose(updates["wte"]["embedding"], decay, rtol=1e-6)
    for still in (updates["blocks"]["mlp_up"]["bias"], *updates["blocks"]["ln"].values()):
        np.testing.assert_array_equal(still, 0.0)


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, [0.6, 0.8]), (0.0, [3.0, 4.0]), (10.0, [3.0, 4.0])])
def test_clipping_by_the_norm_of_the_active_gradients(clip_norm, expected):
    # With eps far above the gradients Adam's first update is -learning_rate * g / eps: linear, so that clipping shows.
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.0, eps=1e6)
    params = {"kernel": jnp.zeros(4)}
    masks = {"kernel": jnp.array([True, True, False, False])}
    updates = one_update(config, {"kernel": jnp.array([3.0, 4.0, 1e3, 1e3])}, params, masks, learning_rate=1e6)
    np.testing.assert_allclose(updates["kernel"], [*(-np.array(expected)), 0.0, 0.0], rtol=1e-4)


def test_the_chain_is_adamw():
    """Against optax.adamw (Loshchilov & Hutter, arXiv 1711.05101) on a matrix, over several rates."""
    config = OptimizerConfig(beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.3, clip_norm=0.5)
    params = theirs = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)}
    tx = make_optimizer(config)
    state = tx.init(params)
    schedule = optax.linear_schedule(0.1, 0.2, 4)
    adamw = optax.chain(
        optax.clip_by_global_norm(0.5), optax.adamw(schedule, b1=0.8, b2=0.9, eps=1e-6, weight_decay=0.3)
    )
    their_state = adamw.init(params)
    start = params["kernel"]
    for i in range(4):
        grads = {"kernel": jnp.asarray(np.random.default_rng(i + 1).normal(size=(3, 4)), jnp.float32)}
        updates, state = tx.update(grads, state, params, masks=dense_masks(params), learning_rate=schedule(i))
        params = optax.apply_updates(params, updates)
        updates, their_state = adamw.update(grads, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        np.testing.assert_allclose(params["kernel"], theirs["kernel"], rtol=1e-6)
    assert float(jnp.abs(params["kernel"] - start).min()) > 0.01


def test_masked_weights_stay_zero_under_decay_and_the_default_chain():
    masks = {"kernel": jnp.array([True, False, True, False])}
    params = {"kernel": jnp.ones(4)}
    updates = one_update(OptimizerConfig(), {"kernel": jnp.ones(4)}, params, masks)
    after = np.asarray(optax.apply_updates(params, updates)["kernel"])
    assert (after[[1, 3]] == 0.0).all()
    assert (after[[0, 2]] < 1.0).all()


@pytest.mark.parametrize("missing", ["masks", "learning_rate"])
def test_both_extras_are_required(missing):
    tx = make_optimizer(OptimizerConfig())
    extras = {"masks": dense_masks(PARAMS), "learning_rate": 0.1}
    del extras[missing]
    with pytest.raises(TypeError, match=missing):
        jax.eval_shape(lambda: tx.update(PARAMS, tx.init(PARAMS), PARAMS, **extras))


@pytest.mark.parametrize("regrowth", ["reset", "keep"])
def test_reset_and_keep_differ_at_topology_steps_only(regrowth):
    config = OptimizerConfig(regrowth=regrowth)
    plain, ours = make_optimizer(OptimizerConfig()).init(PARAMS), make_optimizer(config).init(PARAMS)
    assert jax.tree.structure(ours) == jax.tree.structure(plain)


def test_smet_is_adam_on_dense_leaves_and_warms_up_sparse_ones_scaled_by_density():
    params = {"a": {"kernel": jnp.ones((2, 4))}, "b": {"kernel": jnp.ones((2, 4))}}
    grads = jax.tree.map(lambda p: 0.3 * p, params)
    masks = {"a": {"kernel": jnp.array([[True, False, False, False]] * 2)}, "b": {"kernel": jnp.array(True)}}
    settings = {"weight_decay": 0.0, "clip_norm": 0.0}
    adam = one_update(OptimizerConfig(**settings), grads, params, masks)
    config = OptimizerConfig(**settings, regrowth="smet", regrowth_warmup_steps=8, density_exponent=0.5)
    smet = one_update(config, grads, params, masks)
    np.testing.assert_allclose(smet["b"]["kernel"], adam["b"]["kernel"], rtol=1e-4)
    # Density 1/4: twice the rate; the first of eight warm-up steps.
    np.testing.assert_allclose(smet["a"]["kernel"][:, 0], adam["a"]["kernel"][:, 0] * 2 / 8, rtol=1e-4)
    np.testing.assert_array_equal(smet["a"]["kernel"][:, 1:], -1.0)  # held at zero


@pytest.mark.parametrize(
    "change",
    [
        {"schedule": "exponential"},
        {"peak_learning_rate": 0.0},
        {"regrowth": "maybe"},
        {"regrowth_warmup_steps": 0},
        {"density_exponent": -0.5},
    ],
)
def test_bad_settings_are_refused_by_name(change):
    with pytest.raises(InputError, match=f"optimizer.{next(iter(change))}"):
        OptimizerConfig(**change)
