"""Widening at equal active weights, the scaling-law planner, and S-muPar's coordinate check."""

import dataclasses
import math
import runpy
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import drawn_params

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.model.config import MuParScales, mup_scales
from spdf_jax.model.flops import linear_size
from spdf_jax.model.mupar import mup_multipliers, scale_by_mup
from spdf_jax.planning.scaling import best_density, dense_gain, plan, predicted_loss, table, widen
from spdf_jax.sparsity.masks import matrix_groups
from spdf_jax.training.state import abstract_params


@pytest.mark.parametrize("how", ["d_model", "d_ff"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75, 0.9])
@pytest.mark.parametrize("size", ["mini", "124m", "1.3b", "1.5b"])
def test_a_wider_model_has_the_active_weights_of_the_dense_one(size, sparsity, how):
    config = spdf.GPT_SIZES[size]
    wide = widen(config, sparsity, how)
    assert abs(wide.active_ratio - 1) < 0.01
    assert wide.config.d_model % config.n_head == 0
    untouched = {"d_model", "d_ff"} if how == "d_model" else {"d_ff"}
    changed = {f.name for f in dataclasses.fields(config) if getattr(config, f.name) != getattr(wide.config, f.name)}
    assert changed <= untouched


@pytest.mark.parametrize("how", ["d_model", "d_ff"])
@pytest.mark.parametrize("size", ["mini", "1.3b"])
def test_its_active_weights_counted_again_from_the_parameters_themselves(size, how):
    config, sparsity = spdf.GPT_SIZES[size], 0.75
    wide = widen(config, sparsity, how)
    params = abstract_params(spdf.GPT(wide.config))
    groups = matrix_groups(params, wide.filter)
    sparse = sum(group.count * group.size for group in groups.values())
    active = linear_size(wide.config) - sparsity * sparse
    assert active / linear_size(config) == pytest.approx(wide.active_ratio, rel=1e-12)


def test_widening_follows_sparse_ift_where_it_needs_no_rounding():
    """arXiv 2303.11525: d / sqrt(1/4) = 2 d, d_ff / (1/4) = 4 d_ff."""
    config = spdf.GPT_SIZES["1.3b"]
    assert (widen(config, 0.75).config.d_model, widen(config, 0.75).config.mlp_width) == (4096, 16384)
    assert widen(config, 0.75, "d_ff").config.mlp_width == 4 * 8192
    same = widen(config, 0.0).config
    assert (same.d_model, same.mlp_width) == (config.d_model, config.mlp_width)


@pytest.mark.parametrize(("sparsity", "how"), [(1.0, "d_model"), (-0.1, "d_ff"), (0.5, "depth")])
def test_widening_refuses_what_it_does_not_know(sparsity, how):
    with pytest.raises(InputError, match="widen"):
        widen(spdf.GPTConfig(), sparsity, how)


def equal_dense_by_bisection(active: float, tokens: float, density: float) -> float:
    """Dense parameters of the loss of a sparse model, from `predicted_loss` alone."""
    loss, low, high = predicted_loss(active / density, tokens, density), active / 10, active * 10
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if predicted_loss(middle, tokens) > loss else (low, middle)
    return low


@pytest.mark.parametrize(("density", "low", "high"), [(0.5, 1.55, 1.65), (0.25, 1.95, 2.2)])
@pytest.mark.parametrize("active", [1e7, 1e9])
def test_the_fit_gives_its_claims(active, density, low, high):
    """At equal active parameters and tokens, 50 % sparsity is worth ~1.6x the dense parameters and 75 % 2.0-2.2x."""
    gain = equal_dense_by_bisection(active, 1e10, density) / active
    assert low <= gain <= high
    assert gain == pytest.approx(dense_gain(density), rel=1e-6)


def test_the_loss_by_hand():
    """L = E + A / N^a + B / D^a with lnE .8536, lnA 5.2407, lnB 6.1030, a .3268, at N = D = e^20."""
    expected = math.exp(0.8536) + math.exp(5.2407 - 20 * 0.3268) + math.exp(6.1030 - 20 * 0.3268)
    assert predicted_loss(math.exp(20), math.exp(20)) == pytest.approx(expected, rel=1e-12)
    half = math.exp(0.8536) + math.exp(6.1030 - 20 * 0.3268)
    half += math.exp(5.2407 - 20 * 0.3268) * (0.5**-0.0097 - 0.2729 * 0.5**0.8466)
    assert predicted_loss(2 * math.exp(20), math.exp(20), 0.5) == pytest.approx(half, rel=1e-12)


def test_the_planner_spends_the_budget_and_finds_the_least_loss():
    best = best_density(1e20, 1e10, lowest=0.2)
    assert best.active == pytest.approx(1e20 / 6e10)
    assert best.raw == pytest.approx(best.active / best.density)
    assert best.loss <= min(plan(1e20, 1e10, density).loss for density in np.linspace(0.2, 1, 50)) + 1e-12
    # The fit's own minimum at equal active parameters, far outside what anybody trained.
    assert 0.03 < best_density(1e20, 1e10, lowest=0.001).density < 0.06


@pytest.mark.parametrize(
    "call",
    [
        lambda: predicted_loss(1e9, 1e10, 0.0),
        lambda: predicted_loss(0, 1e10),
        lambda: dense_gain(1.5),
        lambda: plan(0, 1e10, 0.5),
        lambda: plan(1e20, 1e10, 0.0),
        lambda: best_density(1e20, 1e10, lowest=0),
    ],
)
def test_the_planner_refuses_arguments_out_of_range(call):
    with pytest.raises(InputError):
        call()


def test_the_planner_runs_as_a_module_and_names_its_source(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scaling", "--flops", "1e20", "--tokens", "1e10"])
    monkeypatch.delitem(sys.modules, "spdf_jax.planning.scaling")
    runpy.run_module("spdf_jax.planning.scaling", run_name="__main__")
    out = capsys.readouterr().out
    assert out == table(1e20, 1e10) + "\n"
    assert "2606.01155" in out
    assert "Caveats" in out


BASE = 64
CONFIG = spdf.GPTConfig(n_layer=2, n_head=4, vocab_size=64, context=16, init_std=0.06)
LEARNING_RATE = 2e-4  # small enough that changes stay far from their ceiling, sqrt(2) for unrelated normalised vectors


def change_of_activations(width: int, density: float, *, mup: bool, steps: int = 5) -> float:
    """Root mean square change of the normalised output of all blocks over a few Adam steps."""
    config = dataclasses.replace(CONFIG, d_model=width)
    if mup:
        config = dataclasses.replace(config, mup_base_width=BASE, mup_density=density)
    model = spdf.GPT(config)
    adam = [optax.scale_by_adam(0.9, 0.95), scale_by_mup(partial(mup_multipliers, config)), optax.scale(-LEARNING_RATE)]
    tx = spdf.sparse(optax.chain(*adam))
    is_last = lambda module, _: module.name == "ln_f"  # noqa: E731

    @jax.jit  # one program a config: eager initialisation would compile every operation by itself
    def run(key):
        tokens_BT = jax.random.randint(key, (4, 9), 0, config.vocab_size)
        params = jax.jit(model.init)(jax.random.fold_in(key, 1), tokens_BT[:1, :1])["params"]
        masks = spdf.init_masks(jax.random.fold_in(key, 2), params, sparsity=1 - density)
        params = spdf.apply_masks(params, masks)

        def loss(params):
            logits_BTV, seen = model.apply(
                {"params": params}, tokens_BT[:, :-1], capture_intermediates=is_last, mutable="intermediates"
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
            return losses.mean(), seen["intermediates"]["ln_f"]["__call__"][0]

        def step(carry, _):
            params, state = carry
            grads, x_BTD = jax.grad(loss, has_aux=True)(params)
            updates, state = tx.update(grads, state, params, masks=masks)
            return (optax.apply_updates(params, updates), state), x_BTD

        _, x_SBTD = jax.lax.scan(step, (params, tx.init(params)), length=steps + 1)
        return jnp.sqrt(jnp.mean((x_SBTD[-1] - x_SBTD[0]) ** 2))

    return float(run(jax.random.key(0)))


@pytest.mark.slow
def test_coordinate_check_of_s_mupar():
    """Activations move alike at every width and density; without S-muPar they do not (2405.15743, figure 1)."""
    with_mup = [change_of_activations(width, density, mup=True) for width in (64, 128, 256) for density in (1.0, 0.25)]
    without = [change_of_activations(*size, mup=False) for size in ((64, 0.25), (256, 1.0))]
    assert max(with_mup) / min(with_mup) < 2
    assert max(without) / min(without) > 3


def test_s_mupar_is_off_by_default_and_then_changes_nothing():
    assert mup_scales(CONFIG) == MuParScales(1.0, 1.0, 1.0, 1.0)
    off = dataclasses.replace(CONFIG, mup_density=0.25, mup_alpha=3.0)
    tokens_BT = jnp.arange(6).reshape(1, 6)
    params = drawn_params(CONFIG)
    ours, plain = (jax.jit(spdf.GPT(config).apply)({"params": params}, tokens_BT) for config in (off, CONFIG))
    np.testing.assert_array_equal(ours, plain)
    assert set(jax.tree.leaves(mup_multipliers(off, params))) == {1.0}


def test_s_mupar_by_hand():
    """d = 256, base 64, density 1/4, alpha 2, 4 heads: m_d rho = 1; d = 512: m_d rho = 2, head width 128."""
    config = dataclasses.replace(CONFIG, d_model=256, mup_base_width=64, mup_density=0.25, mup_alpha=2.0)
    assert mup_scales(config) == MuParScales(1.0, 1 / 8, 0.5, 1.0)
    config = dataclasses.replace(config, d_model=512)
    assert mup_scales(config) == pytest.approx((2**-0.5, 128**-0.5, 0.25, 0.5))
    params = jax.jit(spdf.GPT(config).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    off = spdf.GPT(dataclasses.replace(config, mup_base_width=0))
    plain = jax.jit(off.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    expected = jax.tree.map(lambda p, m: p * m**0.5, plain, mup_multipliers(config, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), params, expected)
    multipliers = mup_multipliers(config, params)
    assert multipliers["blocks"]["attn_o"] == {"kernel": 0.5, "bias": 1.0}
    assert multipliers["wpe"]["embedding"] == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [("mup_base_width", -1), ("mup_density", 0.0), ("mup_density", 1.5), ("mup_alpha", 0.0)],
)
def test_s_mupar_names_a_bad_field(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(CONFIG, **{field: value})


def test_scale_by_mup_refuses_another_tree():
    tx = scale_by_mup({"w": 0.5})
    with pytest.raises(InputError, match="multipliers"):
        tx.update({"v": jnp.ones(2)}, tx.init(None))
