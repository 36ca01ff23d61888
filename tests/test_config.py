"""Config: one place, typed, unknown keys refused with the nearest known one."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import spdf_jax as spdf
from spdf_jax import GPT
from spdf_jax.training.phases import make_plan
from spdf_jax.training.state import abstract_params


def base():
    return spdf.default_config("e", "v", variants=("v",), phases=("one", "two"))


def test_round_trip_to_json_holds_every_value():
    run = spdf.resolve(base())
    values = run.as_dict()
    assert json.loads(json.dumps(values)) == values
    assert values["phases"] == ["one", "two"]
    assert values["two"]["optimizer"]["beta2"] == 0.95


def changed(path, value):
    values = base().to_dict()
    *sections, key = path.split(".")
    node = values
    for section in sections:
        node = node[section]
    node[key] = value
    return ConfigDict(values)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("modle", {}, "unknown key 'modle'; did you mean 'model'"),
        ("model.n_layr", 2, "config.model: unknown key 'n_layr'; did you mean 'n_layer'"),
        ("one.optimizer.beta3", 2.0, "config.one.optimizer: unknown key 'beta3'; did you mean 'beta"),
        ("model.n_layer", 2.5, "config.model.n_layer: expected int, got 2.5"),
        ("model.tied_head", "yes", "config.model.tied_head: expected bool, got 'yes'"),
        ("model", 3, "config.model: the section is missing"),
        ("phases", (), "at least one phase"),
        ("one.steps", 0, "must be at least 1"),
        ("one.sparsity.sparsity", -0.1, "must be at least 0 and below 1"),
        ("one.sparsity.schedule", "quadratic", "'quadratic' is not one of"),
        ("one.optimizer.schedule", "exp", "'exp' is not"),
        ("one.optimizer.peak_learning_rate", 0.0, "must be above 0"),
    ],
)
def test_bad_values_are_named(path, value, message):
    with pytest.raises(spdf.InputError, match=message):
        spdf.resolve(changed(path, value))


def test_a_static_mask_cannot_follow_a_schedule():
    c = base()
    c.one.sparsity.rule, c.one.sparsity.schedule = "static", "cubic"
    with pytest.raises(spdf.InputError, match="rule 'static' cannot follow 'cubic'"):
        spdf.resolve(c)


def test_a_step_table_is_a_schedule():
    c = base()
    c.one.sparsity.rule, c.one.sparsity.schedule = "rigl", "table"
    c.one.sparsity.table = ((0.0, 0.5), (0.5, 0.9))
    curve = spdf.resolve(c).phases["one"].sparsity.curve
    assert [curve(p) for p in (0.0, 0.49, 0.5, 1.0)] == [0.5, 0.5, 0.9, 0.9]


def test_s_mupar_reaches_the_optimiser_and_must_agree_with_the_sparsity():
    c = base()
    c.phases = ("one",)
    del c.two
    c.one.sparsity.rule, c.one.sparsity.sparsity = "static", 0.75
    c.model.mup_base_width, c.model.mup_density = 32, 0.25
    plain = c.copy_and_resolve_references()
    plain.model.mup_base_width, plain.model.mup_density = 0, 1.0
    params = abstract_params(GPT(spdf.resolve(c).model))
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    steps = []
    for config in (c, plain):
        tx = make_plan(spdf.resolve(config))[0].tx

        @jax.jit
        def mean_updates(ones, tx=tx):
            updates, _ = tx.update(ones, tx.init(ones), ones, masks=spdf.dense_masks(ones), learning_rate=1.0)
            return jax.tree.map(jnp.mean, updates)

        steps.append(mean_updates(ones))
    ratio = jax.tree.map(lambda a, b: float(a / b), *steps)
    assert ratio["blocks"]["mlp_up"]["kernel"] == pytest.approx(32 / 256 / 0.25)
    assert ratio["wte"]["embedding"] == pytest.approx(1.0)
    c.model.mup_base_width = 128
    assert make_plan(spdf.resolve(c))
    c.model.mup_density = 0.5
    with pytest.raises(spdf.InputError, match=r"mup_density: 0\.5 must be the density of phase 'one', 0\.25"):
        spdf.resolve(c)


def test_s_mupar_learns_at_the_density_of_each_phase_and_starts_at_that_of_the_first():
    """SPDF: 75 % sparse, then dense; d_model 256 over a base of 32."""
    c = base()
    c.one.sparsity.rule, c.one.sparsity.sparsity = "static", 0.75
    c.model.mup_base_width, c.model.mup_density = 32, 0.25
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(GPT(spdf.resolve(c).model)))
    masks = spdf.dense_masks(ones)

    def update(plan):
        return jax.jit(plan.tx.update)(ones, plan.tx.init(ones), ones, masks=masks, learning_rate=1.0)[0]

    plain = c.copy_and_resolve_references()
    plain.model.mup_base_width, plain.model.mup_density = 0, 1.0
    for ours, theirs, density in zip(
        make_plan(spdf.resolve(c)), make_plan(spdf.resolve(plain)), (0.25, 1), strict=True
    ):
        updates, plain_updates = update(ours), update(theirs)
        ratio = jax.tree.map(lambda a, b: np.mean(a) / np.mean(b), updates, plain_updates)
        assert ratio["blocks"]["attn_o"]["kernel"] == pytest.approx(32 / 256 / density)
        assert ratio["wpe"]["embedding"] == pytest.approx(1.0)
    c.two.optimizer.density_exponent = 1.0
    with pytest.raises(spdf.InputError, match=r"two\.optimizer\.density_exponent: 1\.0 must be 0: S-muPar"):
        spdf.resolve(c)
    c.two.optimizer.density_exponent = 0.0
    c.init_from = "runs/sparse"  # nothing is drawn
    c.model.mup_density = 0.5
    assert spdf.resolve(c)
