"""The average of a run's parameters: what it is, that masks hold in it, and that it is what a run is judged and exported by."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_faults import assert_ends_as
from tiny import NO_WINDOW, set_sparsity, tiny_config, write_text
from twice import killed_at, short_run

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.huggingface import load_model
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.optim import make_optimizer
from spdf_jax.planning.pod_plan import phase_state
from spdf_jax.sharding import make_mesh
from spdf_jax.sparsity.block_topology import BlockGrid
from spdf_jax.sparsity.blocks import expand_tree, init_topology, move_blocks, to_blocks
from spdf_jax.training.average import AverageState, averaged
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import enter_phase, saved_run
from spdf_jax.training.state import TrainState, as_masks, state_shardings
from spdf_jax.tree import named_leaves

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def config(text, decay=0.5):
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("pretrain",)
    del c.finetune
    c.pretrain.ema_decay = decay
    c.pretrain.sparsity.update(NO_WINDOW)
    return c


def test_the_average_is_a_mean_at_first_and_exponential_then():
    params, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    tx = averaged(spdf.sparse(optax.sgd(1.0)), 0.75)
    state, seen, wanted = tx.init(params), [], 0.0
    for step in range(8):
        changes, state = tx.update({"w": jnp.array([-float(step), 3.0])}, state, params, masks=masks)
        params = optax.apply_updates(params, changes)
        seen.append(float(params["w"][0]))
        wanted = np.mean(seen) if step < 4 else 0.75 * wanted + 0.25 * seen[-1]
        assert state.average["w"].tolist() == pytest.approx([wanted, 0])


def test_a_weight_that_grows_back_starts_from_zero_in_the_average():
    params, masks = {"w": jnp.array([4.0, 2.0])}, {"w": jnp.array([True, True])}
    tx = averaged(spdf.sparse(optax.sgd(1.0)), 0.5)

    def step(params, state, masks):
        changes, state = tx.update({"w": jnp.array([0.0, -2.0])}, state, params, masks=masks)
        return optax.apply_updates(params, changes), state

    params, state = step(params, tx.init(params), masks)
    dropped = {"w": jnp.array([True, False])}
    fresh = spdf.reset_masked_state(tx, state, params, dropped)
    assert fresh.average["w"].tolist() == [4, 0]
    assert int(fresh.updates) == 1
    # Of an optimiser whose state is kept (`regrowth = "keep"`): what is read has no zeros but these, and the next update none.
    kept = TrainState(jnp.zeros((), jnp.int32), spdf.apply_masks(params, dropped), dropped, state, KEY)
    assert kept.averaged().params["w"].tolist() == [4, 0]
    params, state = step(kept.params, state, dropped)
    assert state.average["w"].tolist() == [4, 0]
    params, state = step(params, state, masks)  # grown back: 0 + 2
    assert params["w"].tolist() == [4, 2]
    assert state.average["w"].tolist() == [4, 1]


def test_before_the_first_update_the_result_is_the_parameters():
    params = {"w": jnp.ones((2, 2))}
    tx = averaged(spdf.sparse(optax.adam(0.1)), 0.9)
    state = TrainState(jnp.zeros((), jnp.int32), params, spdf.dense_masks(params), tx.init(params), KEY)
    np.testing.assert_array_equal(state.averaged().params["w"], params["w"])


def test_the_average_moves_with_live_blocks():
    grid = BlockGrid(2, 4, 4, 2)
    params = {"a": {"kernel": jax.random.normal(KEY, (1, 8, 8))}}
    tx = averaged(spdf.sparse(optax.adam(0.1)), 0.9)
    topology = init_topology(KEY, params, {"a/kernel": grid})
    small, opt_state = to_blocks(tx, params, tx.init(params), topology, {"a/kernel": grid})
    opt_state = opt_state._replace(average=small, updates=jnp.array(5))
    grads = {"a": {"kernel": jax.random.normal(jax.random.key(1), (1, 8, 8))}}
    how = {"drop_fraction": jnp.array(0.5), "rule": spdf.RULES["rigl"]}
    moved, live, state = move_blocks(KEY, tx, small, grads, topology, opt_state, **how)
    assert (live["a"]["kernel"] != topology["a"]["kernel"]).any()
    np.testing.assert_array_equal(state.average["a"]["kernel"], moved["a"]["kernel"])  # new blocks are 0 in both
    masks = spdf.dense_masks(moved)
    whole = as_masks(tx, TrainState(jnp.zeros((), jnp.int32), moved, masks, state, KEY, live))
    np.testing.assert_array_equal(whole.averaged().params["a"]["kernel"], expand_tree(moved, live)["a"]["kernel"])


def test_it_is_off_by_default_and_costs_nothing_then(text):
    (plan,) = make_plan(spdf.resolve(config(text, 0.0)))
    rule = plan.programme.config.topology_rule
    assert plan.tx is make_optimizer(plan.config.optimizer, None, rule.optimizer)
    (a,), (b,) = (make_plan(spdf.resolve(config(text))) for _ in range(2))
    assert a.tx is b.tx  # one program


def test_it_is_counted_and_laid_out_as_the_parameters_are(text):
    found = {}
    for decay in (0.0, 0.5):
        c = config(text, decay)
        c.mesh.data, c.mesh.fsdp = 2, 4
        c = spdf.resolve(c)
        (plan,), mesh = make_plan(c), make_mesh(c.mesh)
        state = phase_state(c, plan, mesh)
        found[decay] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))
    shardings = state_shardings(mesh, plan.tx, state)
    assert shardings.opt_state.average == shardings.params
    assert any("fsdp" in str(s.spec) for s in jax.tree.leaves(shardings.params))
    assert found[0.5] - found[0.0] == 4 + sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))


def test_a_phase_goes_on_from_the_result_or_with_the_optimiser_from_the_parameters(text):
    c = config(text)
    c.pretrain.sparsity.update(dict.fromkeys(("ramp_end", "ultra_end", "restoration_end"), 0.0))
    set_sparsity(c.pretrain)
    c = spdf.resolve(c)
    (plan,), mesh = make_plan(c), make_mesh(c.mesh)
    with jax.set_mesh(mesh):
        params = {"w": jnp.ones((4, 4))}
        follows = AverageState(jnp.array(3), {"w": jnp.full((4, 4), 7.0)}, optax.EmptyState())
        tx = averaged(spdf.sparse(optax.identity()), 0.5)
        state = TrainState(jnp.array(9, jnp.int32), params, spdf.dense_masks(params), follows, KEY)
        for reset, value in ((True, 7), (False, 1)):
            phase = dataclasses.replace(plan.config, reset_optimizer=reset)
            entered = enter_phase(state, dataclasses.replace(plan, config=phase, tx=tx), mesh)
            assert (entered.params["w"] == value).all()
            assert int(entered.opt_state.updates) == (0 if reset else 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrain.ema_decay": 1.0}, r"config\.pretrain\.ema_decay: 1\.0 must be"),
        (
            {"pretrain.ema_decay": 0.9, "finetune.reset_optimizer": False},
            r"config\.finetune\.reset_optimizer: .* 0\.9 before and 0\.0 here",
        ),
        ({"loop.keep_every_steps": 15}, r"config\.loop.keep_every_steps: 15 must be a multiple of .* 10"),
    ],
)
def test_what_does_not_fit_is_refused(text, change, message):
    c = tiny_config(text, text.parent / "cache")
    c.update_from_flattened_dict(change)
    with pytest.raises(InputError, match=message):
        spdf.resolve(c)


def test_a_rule_that_looks_after_the_state_itself_is_refused_an_average(text):
    c = config(text)
    set_sparsity(c.pretrain, rule="topkast", sparsity=0.5, update_every_steps=5)
    c.pretrain.optimizer.regrowth = "keep"
    with pytest.raises(InputError, match=r"config\.pretrain\.ema_decay: rule 'topkast'"):
        spdf.resolve(c)


@pytest.mark.nightly
@pytest.mark.usefixtures("few_matrices")  # as in the program
def test_a_run_is_judged_and_exported_by_its_average_and_resumes_to_the_same_bits(text, tmp_path):
    c = short_run(text, text.parent / "cache", pretrain={"ema_decay": 0.8}, keep_checkpoints=1, keep_every_steps=6)
    summary = jobs.train(c, tmp_path / "whole", progress=False)
    saved = saved_run(tmp_path / "whole")
    moves = sum("density" in row for row in read_metrics(tmp_path / "whole"))
    assert 0 < moves == 12 - int(saved.state.opt_state.updates)  # topology steps make none
    differing = 0
    for (name, weights), (_, average), (_, mask) in zip(
        *(named_leaves(tree) for tree in (saved.state.params, saved.result.params, saved.state.masks)), strict=True
    ):
        assert not np.any(np.asarray(average) * ~np.asarray(mask)), name
        differing += int((weights != average).sum())
    assert differing > 1000
    assert evaluate_checkpoint(c, tmp_path / "whole")["val_loss"] == summary["val_loss"]
    export(c, tmp_path / "whole")
    _, exported = load_model(tmp_path / "whole" / "huggingface")
    for (name, ours), (_, theirs) in zip(named_leaves(saved.result.params), named_leaves(exported), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    assert sorted(int(p.name) for p in (tmp_path / "whole" / "checkpoints").iterdir()) == [6, 12]
    killed_at(
        tmp_path / "killed", text, text.parent / "cache", [5, 11],
        pretrain={"ema_decay": 0.8}, keep_checkpoints=1, keep_every_steps=6,
    )  # fmt: skip
    assert_ends_as(tmp_path / "killed", tmp_path / "whole")
    ours, theirs = (saved_run(tmp_path / name).result.params for name in ("killed", "whole"))
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    record = json.loads((tmp_path / "whole/checkpoints/12/record/metadata").read_text())
    assert {name.split("/")[1] for name in record["leaves"] if name.startswith("opt_state/")} == {
        "updates",
        "average",
        "inner",
    }
