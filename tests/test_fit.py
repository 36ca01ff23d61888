"""`spdf_jax.fit`: any model through the loop of the main job, with the bits of that, whatever interrupts it.

As a program it trains a small NNX model and dies by SIGKILL after its third topology step: ``python test_fit.py WORKDIR``.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_any_pytree import LinenModel, NnxModel
from tiny import die, rows_without_clock, set_sparsity, slow_but, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.config.read import load_config
from spdf_jax.jobs import Request, compare
from spdf_jax.jobs import train as jobs
from spdf_jax.sharding import make_mesh
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.training import loop
from spdf_jax.training.feed import load_data, make_feed
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import saved_run
from spdf_jax.training.step import cross_entropy
from spdf_jax.tree import map_named, named_leaves
from spdf_jax.workdir import read_json

KEY = jax.random.key(0)
STEPS = 12
RIGL = {"rule": "rigl", "sparsity": 0.75, "update_every_steps": 3}
FILTER = [("(kernel|weight)$", "matrix"), (".*", "dense")]


def batches(start: int):
    """Endless; each drawn by its number."""
    number = start
    while True:
        yield {"x": np.random.default_rng(number).normal(size=(4, 8)).astype(np.float32)}
        number += 1


def mean_squared(forward):
    return lambda params, batch: jnp.mean((forward(params, batch["x"]) - batch["x"]) ** 2)


def of_nnx():
    graph, params = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param)
    return params, mean_squared(lambda params, x: nnx.merge(graph, params)(x))


def of_equinox():
    model = eqx.nn.MLP(8, 8, width_size=16, depth=1, use_bias=False, use_final_bias=False, key=KEY)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, mean_squared(lambda params, x: jax.vmap(eqx.combine(params, static))(x))


def of_linen():
    model = LinenModel()
    params = model.init(KEY, jnp.zeros((1, 8)))["params"]
    return params, mean_squared(lambda params, x: model.apply({"params": params}, x))


def of_lists():
    kernels = jax.random.normal(KEY, (2, 8, 8))
    params = [{"kernel": kernels[0], "scale": jnp.ones(())}, ({"kernel": kernels[1]}, None)]
    return params, mean_squared(lambda p, x: jax.nn.relu(x @ p[0]["kernel"]) @ p[1][0]["kernel"] * p[0]["scale"])


def train(made, workdir: Path, **changes: Any):
    """The small run, of the model that `made` is, but for what `changes` say."""
    params, loss_fn = made
    sparsity = RIGL | changes.pop("sparsity", {})
    given = {
        "loss_fn": loss_fn,
        "params": params,
        "batches": batches,
        "tx": optax.adam(1e-2),
        "masks": spdf.init_masks(KEY, params, sparsity=0.75, filter=FILTER),
        "programme": spdf.make_programme(params, STEPS, filter=FILTER, **sparsity),
        "progress": False,
        "checkpoint_every_steps": 5,
        "log_every_steps": 1,
        "keep_checkpoints": 10,
    }
    return spdf.fit(workdir=workdir, **given | changes)


def assert_same_bits(ours: Any, theirs: Any) -> None:
    ours, theirs = (dict(named_leaves(jax.device_get(tree))) for tree in (ours, theirs))
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        np.testing.assert_array_equal(leaf, theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The small run of an NNX model, with its workdir, state and summary."""
    workdir = tmp_path_factory.mktemp("fit") / "whole"
    return workdir, *train(of_nnx(), workdir, validation=lambda: [next(batches(99))], eval_every_steps=6)


def test_it_leaves_what_a_run_of_main_leaves(whole):
    workdir, state, summary = whole
    assert {path.name for path in workdir.iterdir()} >= {
        "checkpoints", "config.json", "metrics.jsonl", "provenance.json", "report.html", "summary.json", "tensorboard",
        "mask_pictures",
    }  # fmt: skip
    assert summary == read_json(workdir / "summary.json", "")
    rows = read_metrics(workdir)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, STEPS + 1))
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 6, 12]
    assert [row["step"] for row in rows if "churn" in row] == [4, 7, 10]
    assert all(value > 0 for row in rows if "churn" in row for value in row["churn"]["up/kernel"])
    assert summary["loss"] == [row["loss"] for row in rows if "loss" in row][-1]
    assert summary["val_loss"] < summary["initial_val_loss"]
    assert not {"tokens", "train_flops", "learning_rate"} & {
        key for row in rows for key in row
    }  # nobody has counted them
    masks, params = (dict(named_leaves(tree)) for tree in (state.masks, state.params))
    assert [int(masks[name].sum()) for name in ("up/kernel", "layers/0/kernel")] == [32, 32]
    assert not any(np.asarray(params[name])[~np.asarray(masks[name])].any() for name in masks)
    page = (workdir / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f"Validation loss {summary['val_loss']:.2f} after 12 steps, up to 75 % sparse" in page
    assert "nats" not in page
    assert "FLOP" not in page


def test_runs_are_set_beside_each_other(whole, tmp_path):
    """By steps: their losses have no unit, and nobody has counted tokens or FLOPs."""
    shutil.copytree(whole[0], tmp_path / "copy")
    compare.run(Request(Path(), output=tmp_path / "there", runs=(whole[0], tmp_path / "copy")))
    header, *_ = (tmp_path / "there" / "compare.md").read_text().splitlines()
    assert header.startswith(
        "| run | status | validation loss | training steps | wall-clock time (s) | parameters | highest sparsity |"
    )
    page = (tmp_path / "there" / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert re.findall(r">(step|training [^<]*)</text>", page) == ["step"]
    assert "by the steps of each run by itself" in page
    assert "nats" not in page
    assert "FLOP" not in page


def test_the_same_call_again_returns_the_finished_run(whole, capsys):
    workdir, state, summary = whole
    before = (workdir / "metrics.jsonl").read_bytes()
    again, same = train(of_nnx(), workdir, validation=lambda: [next(batches(99))])
    assert capsys.readouterr().out == f"{workdir}: this run is finished; nothing to do.\n"
    assert same == summary
    assert type(again.params) is type(state.params)
    assert_same_bits(again.params, state.params)
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_what_was_given_stays_as_it_is_and_a_batch_may_hold_a_key(tmp_path):
    params, loss_fn = of_lists()
    masks = spdf.init_masks(KEY, params, sparsity=0.75, filter=FILTER)
    before = jax.device_get((params, masks))

    def dropped(params, batch):
        kept = jax.random.bernoulli(batch["key"], 0.9, batch["x"].shape)
        return loss_fn(params, {"x": batch["x"] * kept})

    def keyed(start):
        return (batch | {"key": jax.random.key(n)} for n, batch in zip(itertools.count(start), batches(start)))

    state, summary = train((params, dropped), tmp_path, masks=masks, batches=keyed)
    assert_same_bits((params, masks), before)
    assert jax.tree.structure(state.params) == jax.tree.structure(params)
    page = (tmp_path / "report.html").read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert f"Training loss {summary['loss']:.2f} after 12 steps, up to 75 % sparse" in page
    assert '<p class="status">finished</p>' in page


def stopped(monkeypatch, step: int) -> None:
    """Makes the loop end before step `step`, counted from 0, as an exception in a loader would."""
    one_step = loop.one_step

    def stopping(steps, plan, local, state, batch):
        if local == step:
            raise OSError("the disk is gone")
        return one_step(steps, plan, local, state, batch)

    monkeypatch.setattr(loop, "one_step", stopping)


@pytest.mark.parametrize("make", slow_but([of_nnx], [of_nnx, of_equinox, of_linen, of_lists]))
def test_a_run_that_was_interrupted_ends_with_the_same_bits(make, whole, tmp_path, monkeypatch, capsys):
    if make is of_nnx:
        right, state = whole[:2]
        how = {"validation": lambda: [next(batches(99))], "eval_every_steps": 6}
    else:
        right, how = tmp_path / "whole", {}
        state, _ = train(make(), right)
    stopped(monkeypatch, 8)
    workdir = tmp_path / "interrupted"
    with pytest.raises(OSError, match="the disk is gone"):
        train(make(), workdir, **how)
    monkeypatch.undo()
    capsys.readouterr()
    resumed, _ = train(make(), workdir, **how)
    assert capsys.readouterr().out.startswith(f"{workdir}: resuming after step 5 of 12.\n")
    assert_same_bits((resumed.params, resumed.masks, resumed.opt_state), (state.params, state.masks, state.opt_state))
    assert rows_without_clock(workdir) == rows_without_clock(right)


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(whole, tmp_path):
    as_here = os.environ | {"JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    program = [sys.executable, __file__, tmp_path]
    assert subprocess.run(program, env=as_here, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    assert [path.name for path in (tmp_path / "checkpoints").glob("[0-9]*")] == ["5"]
    resumed, _ = train(of_nnx(), tmp_path, validation=lambda: [next(batches(99))], eval_every_steps=6)
    workdir, state, _ = whole
    assert_same_bits((resumed.params, resumed.masks, resumed.opt_state), (state.params, state.masks, state.opt_state))
    assert rows_without_clock(tmp_path) == rows_without_clock(workdir)


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before_it(whole, tmp_path, capsys):
    right, state, summary = whole
    workdir = tmp_path / "run"
    shutil.copytree(right, workdir)
    (workdir / "checkpoints" / "12" / "record" / "metadata").write_text("{")
    resumed, again = train(of_nnx(), workdir, validation=lambda: [next(batches(99))], eval_every_steps=6)
    damage, resuming = capsys.readouterr().out.splitlines()[:2]
    assert "the checkpoint at step 12 is damaged" in damage
    assert damage.endswith(", at step 10. The damaged one is kept as 12.damaged-1")
    assert resuming == f"{workdir}: resuming after step 10 of 12."
    assert_same_bits((resumed.params, resumed.masks, resumed.opt_state), (state.params, state.masks, state.opt_state))
    assert (again["loss"], again["val_loss"]) == (summary["loss"], summary["val_loss"])


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(spdf.RULES))
def test_every_rule_trains_a_model_that_it_does_not_know(rule, tmp_path):
    how: dict[str, Any] = {"rule": rule, "sparsity": 0.75}
    if rule == "acdc":
        how |= {"schedule": "alternate", "cycles": 2}
    elif rule != "static":
        how |= {"schedule": (spdf.RULES[rule].schedules or ("constant",))[0]}
        how |= {} if spdf.RULES[rule].choose_each_step else {"update_every_steps": 3}
    params, loss_fn = of_lists()
    programme = spdf.make_programme(params, 40, filter=FILTER, **how)
    masks = spdf.init_masks(KEY, params, sparsity=programme.level(0), filter=FILTER)
    state, _ = train((params, loss_fn), tmp_path, masks=masks, programme=programme)
    counts = {name: int(mask.sum()) for name, mask in named_leaves(state.masks) if mask.ndim}
    assert counts == dict(programme.counts(40))


@pytest.mark.slow
def test_devices_share_a_batch(whole, tmp_path):
    how = {"validation": lambda: [next(batches(99))], "eval_every_steps": 6}
    state, summary = train(of_nnx(), tmp_path, devices=2, **how)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state.params)} == {2}
    assert summary["val_loss"] == pytest.approx(whole[2]["val_loss"], rel=1e-5)


# --- the same bits as the main job ------------------------------------------------------------------------------------


def gpt_config(text: Path):
    """One phase of 12 steps whose masks move at every third, with an optimiser that optax can write down."""
    c = tiny_config(text, text.parent / "cache")
    c.phases, c.pretrain.steps, c.loop.checkpoint_every_steps = ("pretrain",), STEPS, 5
    c.pretrain.optimizer.warmup_steps, c.pretrain.optimizer.clip_norm = 1, 0.0
    set_sparsity(c.pretrain, rule="mst", sparsity=0.8, update_every_steps=3)
    del c.finetune
    return spdf.resolve(c)


class NnxGPT(nnx.Module):
    """The GPT as a module of NNX that holds its parameters."""

    def __init__(self, params):
        for name, branch in params.items():
            setattr(self, name, nnx.data(jax.tree.map(nnx.Param, branch)))


class EquinoxGPT(eqx.Module):
    """The GPT as a module of Equinox that holds its parameters."""

    blocks: dict
    ln_f: dict
    wpe: dict
    wte: dict
    model: spdf.GPT = eqx.field(static=True)


def nnx_gpt(model, params):
    graph, split = nnx.split(NnxGPT(params), nnx.Param)
    return split, lambda split: nnx.to_pure_dict(nnx.state(nnx.merge(graph, split), nnx.Param))


def equinox_gpt(model, params):
    split, static = eqx.partition(EquinoxGPT(**params, model=model), eqx.is_inexact_array)

    def whole(split):
        module = eqx.combine(split, static)
        return {name: getattr(module, name) for name in params}

    return split, whole


@pytest.fixture(scope="module")
def main_run(all_with_few_matrices, tmp_path_factory):
    """The main job, and what it was made of: config, first state, feed."""
    root = tmp_path_factory.mktemp("main")
    config = gpt_config(write_text(root / "text"))
    first = jax.device_get(next(spdf.watch_training(config))[0])
    jobs.train(config, root / "run", progress=False)
    (plan,), mesh = make_plan(config), make_mesh(config.mesh)
    feed = make_feed(config, plan, *load_data(config, None, [plan], begun=False, progress=False), mesh)
    return config, plan, first, feed, root / "run"


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [nnx_gpt, equinox_gpt, lambda model, params: (params, lambda params: params)])
def test_the_gpt_as_a_foreign_model_ends_with_the_bits_of_main(wrap, main_run, tmp_path):
    config, plan, first, feed, workdir = main_run
    model, optimizer = spdf.GPT(config.model), plan.config.optimizer
    params, unwrapped = wrap(model, first.params)

    def loss_fn(params, batch):
        variables = {"params": unwrapped(params)}
        logits_BTV = model.apply(variables, batch.tokens_BT, segments_BT=batch.segments_BT)
        return cross_entropy(logits_BTV, batch.targets_BT, batch.weights_BT), batch.weights_BT.sum()

    def decayed(params):
        return map_named(lambda name, _: name.endswith(("kernel", "embedding")), params)

    tx = optax.chain(
        optax.scale_by_adam(optimizer.beta1, optimizer.beta2, optimizer.eps),
        optax.add_decayed_weights(optimizer.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(optimizer.peak_learning_rate),
    )
    masks = jax.tree.unflatten(
        jax.tree.structure(params), [dict(named_leaves(first.masks))[n] for n, _ in named_leaves(params)]
    )
    sparsity = dataclasses.asdict(plan.config.sparsity)
    programme = spdf.make_programme(params, STEPS, filter=plan.filter, **sparsity)
    state, summary = spdf.fit(
        loss_fn, params, feed.train, tx, masks, programme, tmp_path,
        validation=feed.validation, key=first.key, progress=False, log_every_steps=1,
    )  # fmt: skip
    right = saved_run(workdir).state
    moved = [
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (first.masks, jax.device_get(right.masks))), strict=True)
    ]
    assert sum(moved) >= 2
    assert_same_bits((state.params, state.masks), (right.params, right.masks))
    ours, theirs = ([row["loss"] for row in read_metrics(folder) if "loss" in row] for folder in (tmp_path, workdir))
    assert ours == theirs
    assert summary["val_loss"] == read_json(workdir / "summary.json", "")["val_loss"]


# --- what is refused --------------------------------------------------------------------------------------------------


def others():
    """Changes to the small run, and what is said of them."""
    params, _ = of_nnx()

    def masks(**how):
        return spdf.init_masks(KEY, params, **{"sparsity": 0.75, "filter": FILTER} | how)

    def ends(start):
        return iter([next(batches(number)) for number in range(start, 7)])

    def restarts(start):
        return batches(0)

    def programme(params=params, filter=FILTER, **how):
        return spdf.make_programme(params, STEPS, filter=filter, **RIGL | how)

    other = programme({"w": jnp.ones((8, 8))}, [("w", "matrix")])
    dense = spdf.make_programme(params, STEPS)
    every = SparsityConfig().update_every_steps
    in_blocks = programme(rule="static", pattern="block4", update_every_steps=every)
    return {
        "no tx": ({"tx": 0.1}, "tx: a float, not an optax transformation"),
        "no programme": ({"programme": RIGL}, "programme: .* is none; make it with spdf_jax.make_programme"),
        "another's programme": ({"programme": other}, "programme: made for other parameters"),
        "masks of another tree": (
            {"masks": {"up": jnp.ones((8, 16), bool)}},
            "masks must have the tree structure of the parameters",
        ),
        "masks of another count": (
            {"masks": masks(sparsity=0.5)},
            r"masks: layers/0/kernel has \[64\] active weights, and the programme begins with 32 in each matrix; make them "
            r"with spdf_jax.init_masks\(key, params, sparsity=0.75, distribution='uniform', pattern='unstructured', filter=",
        ),
        "dense masks": (
            {"masks": spdf.dense_masks(params)},
            "masks: layers/0/kernel has no element mask, and the programme says that it is sparse; make them with",
        ),
        "masks for a dense programme": (
            {"programme": dense},
            "masks: layers/0/kernel has an element mask, and the programme says that it is dense; make them with "
            "spdf_jax.dense_masks",
        ),
        "masks in no blocks": ({"programme": in_blocks}, "masks: layers/0/kernel is not in the pattern 'block4'"),
        "an integer": (
            {"params": {"n": jnp.ones(3, int)}},
            r"params: n is int32\[3\], not an array of floats; split off",
        ),
        "no parameter": ({"params": {}}, "params: no array is in this tree"),
        "a vector of losses": (
            {"loss_fn": lambda params, batch: batch["x"][:, 0]},
            r"loss_fn: returned float32\[4\]; it must return a float, the mean loss",
        ),
        "a loss and more": (
            {"loss_fn": lambda params, batch: (batch["x"].sum(), {})},
            r"loss_fn: returned float32\[\] and a dict; it must",
        ),
        "a list": ({"batches": [1]}, "batches: a list, and must be a function start_batch -> iterator"),
        "no iterator": (
            {"batches": lambda start: 3},
            "batches: the function returned a int, not an iterator over batches",
        ),
        "no arrays": ({"batches": lambda start: iter([{}])}, "batches: a batch is {}, which holds no array"),
        "no batch": ({"batches": lambda start: iter([])}, r"batches: batches\(0\) ends after 0"),
        "batches from the beginning": (
            {"batches": restarts},
            r"batches: batches\(1\) does not begin with the second batch of batches\(0\)",
        ),
        "uneven batches": ({"devices": 3}, r"batches: x has shape \(4, 8\), and 3 devices cannot share its first axis"),
        "too many devices": ({"devices": 99}, "mesh: .* asks for 99 devices, 8 are there"),
        "a misspelt key": ({"log_every": 1}, "loop: unknown key 'log_every'; did you mean 'log_every_steps'"),
        "a size of what is given": ({"eval_batch_size": 8}, r"loop\.eval_batch_size: would be ignored"),
        "an interval of nothing": (
            {"eval_every_steps": 8},
            r"loop\.eval_every_steps: would be ignored without a validation",
        ),
        "no validation": ({"validation": list}, "validation: no batch came; give at least one"),
        "batches that end": ({"batches": ends}, r"batches: batches\(0\) ends after 7, before the programme does"),
    }


@pytest.mark.parametrize("case", others())
def test_a_bad_argument_is_one_line(case, tmp_path):
    changes, says = others()[case]
    with pytest.raises(spdf.InputError, match=f"^{says}") as refused:
        train(of_nnx(), tmp_path / "new" / "run", **changes)
    assert "\n" not in str(refused.value)
    if case not in ("no validation", "batches that end"):  # found out on the way
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"rule": "rigle"}, r"sparsity\.rule: 'rigle' is not one of .*; did you mean 'rigl'"),
        ({"sparsty": 0.5}, "sparsity: unknown key 'sparsty'; did you mean 'sparsity'"),
        ({"sparsity": 0.0}, r"sparsity\.sparsity: 0\.0 leaves rule 'rigl' no zeros to place"),
        ({"ramp_end": 0.5}, r"sparsity\.ramp_end: 0\.5 would be ignored"),
        ({"sparsify_head": True}, r"sparsity\.sparsify_head: True is for spdf_jax\.GPT alone; the filter says"),
        ({"init": "magnitude"}, r"sparsity\.init: 'magnitude' is for spdf_jax\.GPT alone; spdf_jax\.init_masks"),
        ({"steps": 0}, "steps: 0 is no length of a run; give a whole number of at least 1"),
        ({"steps": 2}, r"sparsity\.rule: 'rigl' would never change a mask in 2 steps"),
        ({"filter": [("nothing", "matrix")]}, "filter: pattern 'nothing' matches no leaf"),
    ],
)
def test_a_programme_that_cannot_be_is_one_line(how, says):
    given = {"params": {"w": jnp.ones((8, 8))}, "steps": STEPS, "filter": [("w", "matrix")]} | RIGL
    with pytest.raises(spdf.InputError, match=f"^{says}"):
        spdf.make_programme(**given | how)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda made: {"sparsity": {"rule": "set"}}, "sparsity.rule was rigl, is set"),
        (lambda made: {"tx": optax.sgd(1e-2)}, "fit.optimizer_state.0/count was int32\\[\\], is absent"),
        (lambda made: {"params": jax.tree.map(lambda p: p + 1, made[0])}, "fit.initial_values was "),
        (lambda made: {"key": jax.random.key(7)}, "fit.initial_values was "),
        (lambda made: {"batches": lambda start: batches(start + 1)}, "fit.first_batch was "),
    ],
)
def test_another_run_in_the_same_workdir_is_refused(change, says, whole):
    workdir, made = whole[0], of_nnx()
    files = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(spdf.InputError, match=f"^workdir .*: holds another run \\({says}.*; choose another workdir"):
        train(made, workdir, **change(made))
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == files


def test_jobs_of_the_gpt_refuse_its_workdir_and_it_theirs(whole, tmp_path):
    with pytest.raises(spdf.InputError, match=r"of a run of spdf_jax\.fit, whose model is its caller's"):
        saved_run(whole[0])
    values = load_config(Path(__file__).parent / "golden" / "0.1.0" / "run" / "config.json").as_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(spdf.InputError, match=r"^workdir .*: holds a run of spdf_jax\.GPT; choose another workdir$"):
        train(of_nnx(), tmp_path)


if __name__ == "__main__":
    workdir, moves, one_step = Path(sys.argv[1]), [], loop.one_step

    def dying(steps, plan, local, state, batch):
        result = one_step(steps, plan, local, state, batch)
        moves.append(plan.programme.topology(local) is not None)
        if sum(moves) == 3:
            while not (workdir / "checkpoints" / "5").exists():
                time.sleep(0.01)
            die()
        return result

    loop.one_step = dying
    train(of_nnx(), workdir, validation=lambda: [next(batches(99))], eval_every_steps=6)
