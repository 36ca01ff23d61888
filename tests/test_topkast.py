"""Top-KAST against its algorithm in plain NumPy, by hand on a matrix, and through the real loop."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import make_mesh
from spdf_jax.sparsity.masks import active_counts, apply_masks
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topkast import TopKastState, choose_by_magnitude, explore
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import restore_state
from spdf_jax.training.state import init_state
from spdf_jax.tree import map_named

KEY = jax.random.key(0)


def largest(values, k):
    """The k largest by magnitude, ties by lowest index."""
    order = np.argsort(-np.abs(values).ravel(), kind="stable")[:k]
    return np.isin(np.arange(values.size), order).reshape(values.shape)


@partial(jax.jit, static_argnames="exploration")
def choose(masks, state, count, exploration):
    return choose_by_magnitude(
        KEY,
        None,
        None,
        state.values,  # gradients, of no account
        masks,
        state,
        target_nnz={"w": jnp.array([count])},
        drop_fraction=0.0,
        rule=RULES["topkast"]._replace(exploration=exploration),
        regrowth="keep",
    )


def test_by_hand_the_four_largest_compute_and_the_next_three_are_explored():
    values = {"w": jnp.array([[9.0, -1, 2, 0], [-8, 3, 0, 0], [7, -4, 0, 0], [6, 5, 0, 0]]), "b": jnp.ones(2)}
    masks = {"w": jnp.ones((4, 4), bool), "b": jnp.array(True)}
    state = TopKastState((), values, {"w": jnp.zeros((4, 4), bool), "b": jnp.ones(2, bool)})
    params, new, state = choose(masks, state, 4, 3 / 16)
    assert new["w"].tolist() == [[True, False, False, False]] + [[True, False, False, False]] * 3
    assert params["w"].tolist() == [[9, 0, 0, 0], [-8, 0, 0, 0], [7, 0, 0, 0], [6, 0, 0, 0]]
    explored = {(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (2, 1), (1, 1)}  # 5, -4 and 3 are the next three
    assert {tuple(i) for i in np.argwhere(state.explored["w"]).tolist()} == explored
    assert state.explored["b"].all()


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_training_equals_the_algorithm_in_numpy(decay):
    """Momentum SGD on moving gradients; the sets are chosen anew every third step."""
    rng = np.random.default_rng(3)
    theta = rng.normal(size=(6, 8)).astype(np.float32)
    rate, momentum, count, wider = np.float32(0.1), np.float32(0.9), 12, 12 + 14
    tx = explore(optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum)))
    masks = {"w": jnp.asarray(largest(theta, count))}
    params, state = apply_masks({"w": jnp.asarray(theta)}, masks), tx.init({"w": jnp.asarray(theta)})
    velocity = np.zeros_like(theta)
    step = jax.jit(tx.update)
    overtaken = 0
    for t in range(12):
        if t % 3 == 0:
            params, masks, state = choose(masks, state, count, 0.3)
            forward, backward = largest(theta, count), largest(theta, wider)
        np.testing.assert_array_equal(masks["w"], forward)
        np.testing.assert_array_equal(state.explored["w"], backward)
        grads = rng.normal(size=theta.shape).astype(np.float32)
        updates, state = step({"w": jnp.asarray(grads)}, state, params, masks=masks)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params["w"], np.where(masks["w"], state.values["w"], 0))

        pull = decay * np.where(forward, theta, theta / np.float32(count / theta.size))
        velocity = momentum * velocity + np.where(backward, grads, 0) + pull
        theta = theta - rate * np.where(backward, velocity, 0)
        np.testing.assert_allclose(state.values["w"], theta, rtol=2e-5, atol=1e-6)
        overtaken += int((largest(theta, count) & ~forward).any())
    assert overtaken, "no explored weight ever overtook: the test shows nothing"


def test_outside_the_explored_set_no_value_moves_even_with_momentum():
    tx = explore(optax.adamw(0.1))
    values, masks = {"w": jnp.arange(1.0, 5.0)}, {"w": jnp.array([False, False, False, True])}
    state = tx.init(values)._replace(explored={"w": jnp.array([False, False, True, True])})
    params = apply_masks(values, masks)
    for _ in range(3):
        updates, state = tx.update({"w": jnp.ones(4)}, state, params, masks=masks)
        params = optax.apply_updates(params, updates)
    assert state.values["w"][:2].tolist() == [1.0, 2.0]
    assert (np.asarray(state.values["w"][2:]) < [3.0, 4.0]).all()
    assert params["w"][:3].tolist() == [0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("topkast") / "text")


def topkast_config(text):
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("pretrain",)
    del c["finetune"]
    c.pretrain.steps = 20
    c.pretrain.optimizer.regrowth = "keep"
    settings = {"sparsity": 0.8, "sparsify_head": True, "update_every_steps": 6, "exploration": 0.3}
    set_sparsity(c.pretrain, rule="topkast", **settings)
    return c


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_the_loop_keeps_sets_and_values_together(text):
    config = spdf.resolve(topkast_config(text))
    plan = make_plan(config)[0]
    before, moved, churn = None, False, []
    for i, (state, metrics) in enumerate(spdf.watch_training(config)):
        values, explored = state.opt_state.values, state.opt_state.explored
        counts = active_counts(state.masks, state.params, plan.filter)
        assert {name: set(np.asarray(n).tolist()) for name, n in counts.items()} == {
            name: {n} for name, n in plan.programme.counts(i).items()
        }
        # Two sums of the same numbers: XLA may contract one of them, so up to rounding; topology steps make them equal again.
        same = (
            np.testing.assert_array_equal
            if "churn" in metrics
            else partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
        )
        jax.tree.map(same, state.params, apply_masks(values, state.masks))
        if i >= 1:
            wider = active_counts(explored, state.params, plan.filter)
            expected = plan.programme.gradient_counts(1)
            for name, n in expected.items():
                assert set(np.asarray(wider[name]).tolist()) == {n}
        churn += [max(np.max(c) for c in metrics["churn"].values())] if "churn" in metrics else []
        now = jax.device_get((values, explored))
        if before is not None and i > 1 and plan.programme.topology(i - 1) is None:
            old, new, outside = (tree["blocks"]["mlp_up"]["kernel"] for tree in (before[0], now[0], now[1]))
            outside = ~outside
            np.testing.assert_array_equal(new[outside], old[outside])
            moved |= bool((new != old).any())
        before = now
    assert moved
    assert len(churn) == 4, "topology steps at 0, 6, 12 and 18"
    assert max(churn) > 0, "no explored weight ever overtook"


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_checkpoints_hold_the_explored_set_at_a_bit_a_weight(text, tmp_path):
    config = spdf.resolve(topkast_config(text))
    plan, mesh, model = make_plan(config)[0], make_mesh(config.mesh), GPT(config.model)
    sparsity = plan.config.sparsity
    state = init_state(model, plan.tx, sparsity, plan.filter, 0, mesh)
    explored = map_named(lambda name, m: m.at[..., 0].set(False), state.opt_state.explored)
    state = state.replace(opt_state=state.opt_state._replace(explored=explored))
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(state, {"step": 0, "phase": 0})
        checkpoints.wait()
        leaves = checkpoints.record()["leaves"]
        restored = restore_state(config, plan, mesh, checkpoints)
    assert leaves["params/blocks/mlp_up/kernel"][0] == [2, 16, 64]
    assert leaves["masks/blocks/mlp_up/kernel"][0] == [2, 16, 8]
    assert leaves["opt_state/explored/blocks/mlp_up/kernel"][0] == [2, 16, 8]
    jax.tree.map(np.testing.assert_array_equal, restored.opt_state, state.opt_state)
    assert restored.opt_state.explored["blocks"]["mlp_up"]["kernel"].dtype == bool


def test_flops_count_the_explored_gradients():
    c = spdf.default_config("x", "x", variants=("x",))
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity, c.pretrain.sparsity.exploration = "topkast", 0.8, 0.3
    c.pretrain.optimizer.regrowth = "keep"
    run = spdf.resolve(c)
    cost = make_plan(run)[0].cost(1)
    linear = 12 * run.model.n_layer * run.model.d_model**2
    saved = cost.tokens * 2 * linear * (3 - (0.2 + 0.2 + 0.5))
    assert cost.dense_flops - cost.train_flops == pytest.approx(saved, rel=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c.pretrain.optimizer, "regrowth", "reset"), "pretrain.optimizer.regrowth.*use 'keep'"),
        (lambda c: setattr(c.finetune, "reset_optimizer", False), "finetune.reset_optimizer.*keep different state"),
        (
            lambda c: (
                setattr(c.finetune.sparsity, "rule", "topkast"),
                setattr(c.finetune.optimizer, "regrowth", "keep"),
            ),
            "finetune.sparsity.rule.*after a dense phase",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(change, message, text):
    c = tiny_config(text, text.parent / "cache")
    set_sparsity(c.pretrain, rule="topkast", sparsity=0.8, update_every_steps=6)
    c.pretrain.optimizer.regrowth = "keep"
    change(c)
    with pytest.raises(spdf.InputError, match=message):
        spdf.resolve(c)
