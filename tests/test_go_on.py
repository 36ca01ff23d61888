"""To go on from a run: longer in its own folder, or from another's whole state; nothing is lost, seen twice or skipped.

As a program it trains a run in the place of a shorter one and dies by SIGKILL in a step, or where a function of
`spdf_jax.jobs.train` would be called: ``python test_go_on.py WORKDIR TEXT STEP|FUNCTION``.
"""

import dataclasses
import itertools
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from test_faults import assert_ends_as
from tiny import NO_WINDOW, die, few_matrices, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax import processes
from spdf_jax.config.sweep import Column, Row, SweepConfig
from spdf_jax.data import load_task, steps_per_epoch, train_batches
from spdf_jax.errors import Restart
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.jobs.sweep import train_cells
from spdf_jax.optim import OptimizerConfig, learning_rate_schedule
from spdf_jax.report import write_report
from spdf_jax.sharding import make_mesh
from spdf_jax.training import branch as branching
from spdf_jax.training import loop
from spdf_jax.training.branch import branch
from spdf_jax.training.extension import first_difference
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import Begin, make_plan
from spdf_jax.training.restore import begin_of, saved_run
from spdf_jax.training.watch import watch_training
from spdf_jax.workdir import lock, read_json, write_json

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def one_phase(text: Path, steps: int, rates: str = "wsd", **sparsity) -> ConfigDict:
    """A rate that warms up in 2 steps and, by `wsd`, falls in the last quarter; saved and evaluated every 4 steps."""
    c = tiny_config(text, text.parent / "cache")
    c.phases, c.model.n_layer, c.pretrain.steps = ("pretrain",), 1, steps
    del c["finetune"]
    o = c.pretrain.optimizer
    o.schedule, o.warmup_steps = rates, 2
    if rates == "wsd":
        o.decay_fraction = 0.25
    if sparsity.get("rule") == "topkast":
        o.regrowth = "keep"
    set_sparsity(c.pretrain, **(sparsity or {"rule": "static", "sparsity": 0.5}))
    c.loop.checkpoint_every_steps = c.loop.eval_every_steps = 4
    return c


def going_on(c: ConfigDict, folder: Path, step: int = 0) -> ConfigDict:
    c.init_from, c.init_what, c.init_step = str(folder), "state", step
    return c


def train(c: ConfigDict, workdir: Path) -> dict:
    return jobs.train(spdf.resolve(c), workdir, progress=False)


def train_until(step: int, c: ConfigDict, workdir: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "preempted", lambda done: done == step)
        with pytest.raises(Restart):
            train(c, workdir)


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def leaves(state) -> list[np.ndarray]:
    return jax.tree.leaves(jax.device_get(state.replace(key=jax.random.key_data(state.key))))


def assert_same_bits(ours, theirs) -> None:
    jax.tree.map(np.testing.assert_array_equal, leaves(ours), leaves(theirs))


@pytest.fixture(scope="module")
def parent(text, tmp_path_factory):
    """A finished run of 4 steps."""
    workdir = tmp_path_factory.mktemp("run") / "parent"
    train(one_phase(text, 4), workdir)
    return workdir


# --- warm-up, stable, decay ----------------------------------------------------------------------------------------------


def test_wsd_warms_up_stays_and_falls_as_linear_does():
    c = OptimizerConfig(peak_learning_rate=0.5, warmup_steps=2, schedule="wsd", decay_fraction=0.4, final_fraction=0.2)
    rates = learning_rate_schedule(c, 10, start=100)(jnp.arange(100, 110))
    expected = [0.25, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, *(0.5 * (1 - 0.8 * n / 4) for n in (1, 2, 3))]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)
    np.testing.assert_allclose(learning_rate_schedule(c, 10)(jnp.array(10)), 0.1, rtol=1e-6)
    for fraction, falling in ((0.0, 0), (1.0, 7), (0.1, 0), (0.2, 1)):
        rates = learning_rate_schedule(dataclasses.replace(c, decay_fraction=fraction), 10)(jnp.arange(2, 10))
        assert int((rates < 0.499).sum()) == falling, "the first step of the decay is the last at the peak"


# --- longer in place -----------------------------------------------------------------------------------------------------

RIGL = {"rule": "rigl", "sparsity": 0.5, "update_every_steps": 10}
RAMP = {"rule": "gmp", "schedule": "cubic", "sparsity": 0.5, "ramp_end": 0.5, "update_every_steps": 10}
PATTERN = {"attention_pattern": "local", "attention_width": 8, "attention_start": 0.5, "attention_end": 1.0}


@pytest.mark.parametrize(
    ("schedule", "sparsity", "taken", "steps", "why"),
    [
        ("constant", {}, 100, 200, ""),
        ("constant", {}, 50, 60, ""),
        ("wsd", {}, 76, 200, ""),
        ("wsd", {}, 77, 200, "step 77 was taken at the learning rate 0.00964, and would have been at 0.01"),
        ("wsd", {}, 70, 90, "step 70 was taken at the learning rate 0.01, and would have been at 0.009591"),
        ("wsd", {}, 69, 90, ""),
        ("cosine", {}, 10, 200, ""),
        ("cosine", {}, 12, 200, "step 12 was taken at the learning rate 0.009997, and would have been at 0.009999"),
        ("linear", {}, 12, 200, "step 12 was taken at the learning rate 0.0099, and would have been at 0.009953"),
        ("constant", {"rule": "topkast", "sparsity": 0.5, "update_every_steps": 10}, 100, 200, ""),
        ("constant", RIGL, 10, 200, ""),
        ("constant", RIGL, 11, 200, "at step 11 the topology step would have been different"),
        ("constant", RAMP, 10, 200, ""),
        ("constant", RAMP, 11, 200, "at step 11 the topology step would have been different"),
        ("constant", {"rule": "mst", "schedule": "three_phases", "sparsity": 0.5}, 100, 200, "topology step"),
        ("constant", {"rule": "static", "sparsity": 0.5, **PATTERN}, 50, 200, ""),
        ("constant", {"rule": "static", "sparsity": 0.5, **PATTERN}, 51, 200, "at step 51 the attention pattern would"),
    ],
)  # fmt: skip
def test_a_run_may_be_of_another_length_where_no_step_so_far_would_have_been_another(
    schedule, sparsity, taken, steps, why, text
):
    """By name, which the check knows nothing of: of a run of 100 steps."""

    def plan(steps):
        c = one_phase(text, steps, schedule, **({"rule": "static", "sparsity": 0.5} | sparsity))
        c.pretrain.optimizer.warmup_steps = 10
        return make_plan(spdf.resolve(c))

    found = first_difference(plan(100), plan(steps), taken)
    assert found == "" if not why else why in found


def test_of_two_phases_the_one_to_come_may_be_longer_and_the_one_that_is_over_may_not(text):
    def plan(first, second):
        c = tiny_config(text, text.parent / "cache")
        c.pretrain.steps, c.finetune.steps = first, second
        set_sparsity(c.pretrain, rule="static", sparsity=0.5)
        return make_plan(spdf.resolve(c))

    for taken, ours in ((40, plan(60, 20)), (60, plan(80, 12)), (70, plan(60, 20)), (72, plan(60, 20))):
        assert first_difference(plan(60, 12), ours, taken) == ""
    assert first_difference(plan(60, 12), plan(80, 12), 61) == "phase 'pretrain' is over, at step 60"


def test_where_a_phase_may_stop_early_an_evaluation_more_is_a_difference(text):
    def plan(steps):
        c = one_phase(text, steps)
        c.pretrain.patience_evaluations, c.pretrain.optimizer.decay_fraction = 2, 0.0
        return make_plan(spdf.resolve(c))

    assert first_difference(plan(8), plan(16), 8) == ""
    assert first_difference(plan(10), plan(16), 10) == "at step 10 the evaluation would have been different"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda c: c.pretrain.update(steps=8),
            "step 4 was taken at the learning rate 0.0055, and would have been at",
        ),
        (lambda c: c.pretrain.update(steps=3), "4 steps are taken already"),
    ],
)
def test_where_it_would_have_been_another_run_the_way_out_is_named_and_nothing_is_touched(change, why, text, tmp_path):
    workdir, c = tmp_path / "run", one_phase(text, 4)
    c.pretrain.optimizer.decay_fraction = 0.5
    train(c, workdir)
    before = files(workdir)
    change(c)
    with pytest.raises(spdf.InputError) as caught:
        train(c, workdir)
    said = str(caught.value)
    assert said.startswith(f"workdir {workdir}: pretrain.steps was 4, is {c.pretrain.steps}, but {why}")
    assert said.endswith(
        f"; give another --workdir and --config.init_from={workdir} --config.init_what=state, which goes on from a checkpoint "
        f"(--config.init_step) by a schedule of its own"
    )
    c.seed = 1  # no length at all
    with pytest.raises(
        spdf.InputError, match=r"holds a run of another config \(pretrain.steps was 4, .*; seed was 0, is 1\)"
    ):
        train(c, workdir)
    assert files(workdir) == before


def test_a_run_that_stopped_early_would_not_go_on(text, parent, tmp_path):
    shutil.copytree(parent, tmp_path, dirs_exist_ok=True)
    for name, change in (
        ("config", lambda c: c["pretrain"].update(patience_evaluations=2)),
        ("summary", lambda s: s.update(steps=3)),
    ):
        values = read_json(tmp_path / f"{name}.json", "")
        change(values)
        write_json(tmp_path / f"{name}.json", values)
    c = one_phase(text, 8)
    c.pretrain.patience_evaluations = 2
    with pytest.raises(
        spdf.InputError, match=r"pretrain.steps was 4, is 8, but the run stopped early, at step 3; give another"
    ):
        train(c, tmp_path)


def test_only_training_goes_on_longer(text, parent):
    """What a run came to is of the run that it was."""
    before = files(parent)
    for job in (evaluate_checkpoint, export):
        with pytest.raises(spdf.InputError, match=r"holds a run of another config \(pretrain.steps was 4, is 8\)"):
            job(spdf.resolve(one_phase(text, 8)), parent)
    assert files(parent) == before


MOVING = {"rule": "topkast", "sparsity": 0.5, "update_every_steps": 3}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """16 steps of masks that move."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    train(one_phase(text, 16, **MOVING), workdir)
    return workdir


@pytest.mark.slow
def test_half_a_run_and_the_other_half_are_the_run(whole, text, tmp_path, capsys):
    """By wsd: stopped at 8 of 12 steps, then 16; twice longer, too, and the same command again has nothing left to do."""
    moved = [row["churn"] for row in read_metrics(whole) if "churn" in row]
    assert len(moved) == 6
    assert any(any(values) for one in moved for values in one.values())
    train_until(8, one_phase(text, 12, **MOVING), tmp_path)
    train_until(12, one_phase(text, 20, **MOVING), tmp_path)
    train(one_phase(text, 16, **MOVING), tmp_path)
    assert_ends_as(tmp_path, whole)
    starts = read_json(tmp_path / "provenance.json", "")["starts"]
    assert [start.get("changed") for start in starts] == [
        None,
        {"pretrain.steps": [12, 20]},
        {"pretrain.steps": [20, 16]},
    ]
    page = (tmp_path / "report.html").read_text()
    assert "pretrain.steps from 12 to 20" in page
    assert "pretrain.steps from 20 to 16" in page
    capsys.readouterr()
    train(one_phase(text, 16, **MOVING), tmp_path)
    assert "this run is finished" in capsys.readouterr().out


def constant(text: Path, steps: int) -> ConfigDict:
    return one_phase(text, steps, "constant", **MOVING)


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """8 steps at one rate, evaluated."""
    workdir = tmp_path_factory.mktemp("run") / "finished"
    train(constant(text, 8), workdir)
    evaluate_checkpoint(spdf.resolve(constant(text, 8)), workdir)
    return workdir


@pytest.fixture(scope="module")
def longer(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "longer"
    train(constant(text, 16), workdir)
    return workdir


@pytest.mark.slow
def test_a_finished_run_goes_on_and_what_was_made_of_its_end_is_kept(finished, longer, text, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    summary = (tmp_path / "summary.json").read_bytes()
    command = "python -m spdf_jax.main --config mine.py"  # as it was, where the workdir alone is given to go on
    assert jobs.train(spdf.resolve(constant(text, 16)), tmp_path, command=command, progress=False)["steps"] == 16
    assert read_json(tmp_path / "config.json", "")["command"] == f"{command} --config.pretrain.steps=16"
    assert_ends_as(tmp_path, longer)
    assert (tmp_path / "summary.json.before_extension-1").read_bytes() == summary
    assert (tmp_path / "evaluation.json.before_extension-1").exists()
    assert not (tmp_path / "evaluation.json").exists()
    assert read_json(tmp_path / "config.json", "")["pretrain"]["steps"] == 16


@pytest.mark.slow
@pytest.mark.parametrize("moment", [9, 13, "set_end_aside", "write_config"])
def test_killed_while_it_goes_on_it_ends_with_the_same_bits(moment, finished, longer, text, tmp_path):
    """In a step, or as its folder is about to say that it is longer."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    program = [sys.executable, __file__, tmp_path, text, str(moment)]
    assert subprocess.run(program, check=False).returncode == -signal.SIGKILL
    assert (tmp_path / "summary.json").exists() == (moment == "set_end_aside")
    assert read_json(tmp_path / "config.json", "")["pretrain"]["steps"] == (16 if isinstance(moment, int) else 8)
    assert train(constant(text, 16), tmp_path)["steps"] == 16
    assert_ends_as(tmp_path, longer)


@pytest.mark.nightly
def test_the_last_phase_of_several_goes_on(text, tmp_path):
    """MST's masks have moved and are dropped by then."""

    def config(steps):
        c = tiny_config(text, text.parent / "cache")
        c.model.n_layer, c.pretrain.steps, c.finetune.steps, c.loop.checkpoint_every_steps = 1, 24, steps, 4
        c.loop.eval_every_steps = 4
        c.pretrain.sparsity.update(NO_WINDOW)
        return c

    train(config(8), tmp_path / "whole")
    train(config(4), tmp_path / "cut")
    train(config(8), tmp_path / "cut")
    assert_ends_as(tmp_path / "cut", tmp_path / "whole")


def test_a_model_of_one_s_own_goes_on_where_its_programme_says_the_same(tmp_path):
    params, filter = {"w": jnp.ones((8, 8))}, [("w", "matrix")]

    def fit(steps, workdir, rule="static", **how):
        programme = spdf.make_programme(params, steps, filter=filter, rule=rule, sparsity=0.5, **how)
        masks = spdf.init_masks(jax.random.key(0), params, sparsity=0.5, filter=filter)
        batches = lambda start: (jax.random.normal(jax.random.key(i), (4, 8)) for i in itertools.count(start))  # noqa: E731
        loss = lambda params, x: jnp.mean((x @ params["w"] - x) ** 2)  # noqa: E731
        return spdf.fit(loss, params, batches, optax.adam(0.1), masks, programme, workdir, progress=False)

    (whole, _), _ = fit(6, tmp_path / "whole"), fit(3, tmp_path / "cut")
    state, summary = fit(6, tmp_path / "cut")
    assert_same_bits(state, whole)
    assert summary["steps"] == 6
    assert fit(6, tmp_path / "cut")[1] == summary
    with pytest.raises(
        spdf.InputError, match=r"holds another run \(steps was 6, is 4, but 6 steps are taken already\)"
    ):
        fit(4, tmp_path / "cut")


# --- from another's state: where its data goes on --------------------------------------------------------------------------


@pytest.mark.parametrize("first_example", [8, 21, 64])
def test_batches_of_another_size_go_on_with_the_very_next_example(first_example):
    """Over several epochs of 10 windows, which batches straddle."""
    tokens = np.arange(41)

    def examples(count, **how):
        batches = itertools.islice(train_batches(tokens, seq_len=4, seed=3, **how), count)
        return np.concatenate([batch.tokens_BT for batch in batches])

    order = examples(100, batch_size=1)
    for batch_size in (1, 3, 7):
        found = examples(5, batch_size=batch_size, first_example=first_example)
        np.testing.assert_array_equal(found, order[first_example : first_example + 5 * batch_size])
        later = examples(2, batch_size=batch_size, first_example=first_example, start_batch=3)
        np.testing.assert_array_equal(later, found[3 * batch_size :])
    assert len(np.unique(order[:10, 0])) == 10
    assert set(order[:10, 0]) == set(order[10:20, 0])


def test_a_task_goes_on_batch_by_batch_or_at_the_end_of_an_epoch(text):
    c = tiny_config(text, text.parent / "cache")
    c.phases, c.finetune.task.name, c.finetune.epochs, c.finetune.steps = ("finetune",), "restaurant", 2, 600
    del c["pretrain"]
    pairs = sum(len(one.references) for one in load_task(spdf.resolve(c).phases["finetune"].task).train)
    before = spdf.resolve(c)
    epoch = steps_per_epoch(pairs, 4)

    def begin(batches, batch_size):
        record = {"step": batches, "phase": 0, "next_example": 4 * batches, "order": 2}
        of = branching.Parent(Path("there"), before, make_plan(before), record, SimpleNamespace())
        c.finetune.batch_size = batch_size
        return branching._begin_after(of, spdf.resolve(c))

    assert begin(3, 4) == Begin(3, 12, 2)
    assert begin(2 * epoch, 8) == Begin(2 * epoch, 2 * steps_per_epoch(pairs, 8) * 8, 2)
    with pytest.raises(
        spdf.InputError, match=rf"finetune.batch_size: 8 cuts .* than 4, of which there has seen 3 of {epoch} at"
    ):
        begin(3, 8)


def tokens_seen(c: ConfigDict, workdir: Path) -> np.ndarray:
    """All rows that a run trained on, in their order."""
    seen, one_step = [], loop.one_step

    def step(steps, plan, local, state, batch):
        seen.append(np.asarray(batch.tokens_BT).reshape(-1, batch.tokens_BT.shape[-1]))
        return one_step(steps, plan, local, state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "one_step", step)
        train(c, workdir)
    return np.concatenate(seen)


@pytest.mark.slow
def test_a_branch_sees_the_batches_after_its_parent_s_last_and_none_before(text, tmp_path):
    """At another rate; then in batches of another size, in micro-batches; several epochs in all."""
    order = tokens_seen(one_phase(text, 60), tmp_path / "whole")
    epoch = next(n for n in range(1, 240) if (order[n] == order[: n + 1]).all(-1).sum() > 1)
    assert epoch < 100, "two epochs and more"
    parent = tokens_seen(one_phase(text, 8), tmp_path / "parent")
    c = going_on(one_phase(text, 12), tmp_path / "parent", 4)
    c.pretrain.optimizer.peak_learning_rate = 3e-3
    rate = tokens_seen(c, tmp_path / "rate")
    c = going_on(one_phase(text, 20), tmp_path / "rate")
    c.pretrain.batch_size, c.pretrain.grad_accumulation_steps = 6, 2
    size = tokens_seen(c, tmp_path / "size")
    c = going_on(one_phase(text, 4), tmp_path / "size")
    last = tokens_seen(c, tmp_path / "last")
    np.testing.assert_array_equal(parent, order[:32])
    np.testing.assert_array_equal(rate, order[16 : 16 + 48])
    np.testing.assert_array_equal(size, order[64 : 64 + 120])
    np.testing.assert_array_equal(last, order[184 : 184 + 16])
    ancestors = read_json(tmp_path / "last" / "ancestors.json", "")["ancestors"]
    assert [(Path(one["workdir"]).name, one["step"]) for one in ancestors] == [
        ("parent", 4),
        ("rate", 16),
        ("size", 36),
    ]
    assert [row["step"] for one in ancestors for row in one["rows"] if "loss" in row] == list(range(1, 37))
    assert begin_of(tmp_path / "last") == Begin(36, 184, 0)
    assert read_json(tmp_path / "last" / "summary.json", "")["before"]["tokens"] == 184 * 32


# --- from another's state: all of it ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_branch_by_the_same_settings_is_the_run_that_went_on(whole, text, tmp_path):
    """Masks that move, in a folder of its own, also when its parent is gone; watched, evaluated and exported like any."""
    shutil.copytree(whole, tmp_path / "parent")

    c = going_on(one_phase(text, 4, **MOVING), tmp_path / "parent", 12)  # at a multiple of its topology steps
    c.pretrain.optimizer.warmup_steps, c.pretrain.optimizer.decay_fraction = 0, 1.0
    watched = [jax.device_get(state.params) for state, _ in watch_training(spdf.resolve(c))]
    train_until(14, c, tmp_path / "branch")
    shutil.rmtree(tmp_path / "parent")
    train(c, tmp_path / "branch")
    ours, theirs = saved_run(tmp_path / "branch"), saved_run(whole)
    assert_same_bits(ours.state, theirs.state)
    jax.tree.map(np.testing.assert_array_equal, watched[-1], jax.device_get(ours.state.params))
    rows = [row for row in read_metrics(tmp_path / "branch") if "loss" in row]
    assert [(row["step"], row["loss"]) for row in rows] == [
        (row["step"], row["loss"]) for row in read_metrics(whole) if "loss" in row and row["step"] > 12
    ]
    config = spdf.resolve(c)
    loss = evaluate_checkpoint(config, tmp_path / "branch")
    assert loss["val_loss"] == pytest.approx(read_json(whole / "summary.json", "")["val_loss"], abs=1e-6)
    assert (export(config, tmp_path / "branch") / "model.safetensors").exists()
    assert train(c, tmp_path / "branch")["steps"] == 16, "the same command has nothing left to do"


def test_what_a_branch_starts_with_is_what_its_parent_had(text, parent):
    """Every bit where the phase wants the masks as they are, while another run holds the parent; masks as asked where not."""
    config = spdf.resolve(going_on(one_phase(text, 8), parent))
    mesh = make_mesh(config.mesh)
    theirs = saved_run(parent).state
    with jax.set_mesh(mesh), lock(parent):
        found, plans = branch(config, None, make_plan(config), mesh)
    assert_same_bits(found.state, theirs)
    assert (plans[0].start, plans[0].end, plans[0].first_example) == (4, 12, 16)
    for sparsity, share in (({"rule": "dense"}, 0.0), ({"rule": "static", "sparsity": 0.75}, 0.75)):
        config = spdf.resolve(going_on(one_phase(text, 8, **sparsity), parent))
        with jax.set_mesh(mesh):
            state = branch(config, None, make_plan(config), mesh)[0].state
        mask = state.masks["blocks"]["mlp_up"]["kernel"]
        assert 1 - mask.mean() == share
        assert int(state.step) == 4
        count = [np.asarray(leaf) for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == ()]
        assert 4 in count, "Adam goes on counting"


REFUSED = {
    "seed": (lambda c: c.update(seed=1), r"^config.seed: 1 gives the data another order than 0, by which .* has read"),
    "seq_len": (lambda c: c.pretrain.update(seq_len=16), r"^config.pretrain.seq_len: 16 gives the data another order than 32"),
    "model": (lambda c: c.model.update(d_model=32), r"^config.init_from: .* holds another model: d_model 16 there, 32 here"),
    "step": (lambda c: c.update(init_step=3), r"checkpoints: no checkpoint at step 3, but at 4; choose one of these"),
    "nowhere": (lambda c: c.update(init_from="/nowhere"), r"^config.init_from: '/nowhere' is neither a run's workdir nor"),
    "regrowth": (
        lambda c: c.pretrain.optimizer.update(regrowth="smet"),
        r"^config.pretrain.reset_optimizer: False cannot carry the state over",
    ),
    "cell": (lambda c: c.update(init_from="cell:other"), r"^config.init_from: '.*other' is neither a run's workdir nor"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_go_on_is_refused_and_leaves_nothing(what, text, parent, tmp_path):
    change, says = REFUSED[what]
    c = going_on(one_phase(text, 8), parent)
    change(c)
    with pytest.raises(spdf.InputError, match=says):
        train(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(init_from=""), r"^config.init_what: 'state' of which run\? Name its workdir by config.init_from"),
        (lambda c: c.update(init_what="parameters", init_step=4), r"^config.init_step: 4 would be ignored, since it is for"),
        (lambda c: c.update(init_what="all"), r"^config.init_what: 'all' is not one of 'parameters', 'state'"),
    ],
)  # fmt: skip
def test_half_said_it_is_refused(change, says, text, parent):
    c = going_on(one_phase(text, 8), parent)
    change(c)
    with pytest.raises(spdf.InputError, match=says):
        spdf.resolve(c)


def test_other_data_and_damage_are_refused(text, parent, tmp_path):
    c = going_on(one_phase(text, 8), parent)
    c.data.path = str(write_text(tmp_path / "other"))
    (tmp_path / "other" / "train.txt").write_text("of something else " * 300)
    with pytest.raises(
        spdf.InputError, match=r"^config.data: init_what 'state' goes on in the data of .*, and this is other"
    ):
        train(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    harmed = tmp_path / "harmed"
    shutil.copytree(parent, harmed)
    c = going_on(one_phase(text, 8), harmed)
    (harmed / "metrics.jsonl").write_text("")
    with pytest.raises(
        spdf.InputError, match=r"metrics.jsonl: not the .* bytes of rows that its checkpoint at step 4 counts on"
    ):
        train(c, tmp_path / "run")
    for file in (harmed / "checkpoints" / "4" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(spdf.InputError, match=r"harmed/checkpoints: the checkpoint at step 4 is damaged"):
        train(c, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    folder = export(spdf.resolve(one_phase(text, 4)), parent, tmp_path / "gpt2")
    with pytest.raises(
        spdf.InputError, match=r"^config.init_what: '.*gpt2' holds parameters and no more; use 'parameters'"
    ):
        train(going_on(one_phase(text, 8), folder), tmp_path / "run")


@pytest.mark.nightly
def test_a_cell_of_a_sweep_branches_from_another(text, tmp_path):
    stable = one_phase(text, 8)
    stable.pretrain.optimizer.decay_fraction = 0.0
    down = one_phase(text, 4)
    down.init_from, down.init_what, down.init_step = "cell:stable", "state", 4
    down.pretrain.optimizer.warmup_steps, down.pretrain.optimizer.decay_fraction = 0, 1.0
    cells = {"stable": spdf.resolve(stable), "down": spdf.resolve(down)}
    rows = tuple(Row(name, ((name, name),)) for name in cells)
    names = {"experiment": "go_on", "variant": "test", "variants": ("test",), "title": "t", "remark": ""}
    sweep = SweepConfig(**names, cells=cells, rows=rows, columns=(Column("loss", "summary.val_loss"),))
    train_cells(sweep, tmp_path, progress=False)
    summary = read_json(tmp_path / "cells" / "down" / "summary.json", "")
    assert summary["steps"] == 8
    assert summary["before"]["tokens"] == 4 * 4 * 32


# --- what the page says ----------------------------------------------------------------------------------------------------


def test_a_page_has_the_runs_before_and_their_curves(parent, tmp_path):
    """From the run's own folder alone."""
    shutil.copytree(parent, tmp_path / "run")
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    rows = [row | {"step": row["step"] + 300} for row in read_metrics(run)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads((run / "config.json").read_text())
    del config["crc32"]
    config["begins"] = {"step": 300, "example": 1200, "order": 0}
    (run / "config.json").write_text(json.dumps(config))
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "304")
    earlier = [
        {"step": step, "phase": "pretrain", kind: 6.0 - step / 100}
        for step in (100, 200)
        for kind in ("loss", "val_loss")
    ]
    names = {"experiment": "tiny", "variant": "test", "what": "state"}
    before = [
        names | {"workdir": "/gone/a", "step": 200, "changed": {"pretrain.batch_size": [4, 8]}, "rows": earlier},
        names | {"workdir": "/gone/b", "step": 300, "changed": {}, "rows": []},
    ]
    (run / "ancestors.json").write_text(json.dumps({"ancestors": before}))
    page = write_report(run).read_text()
    text = " ".join(page.replace("<wbr>", "").split())
    assert "Ancestry" in text
    assert "/gone/a" in text
    assert "its state at step 200" in text
    assert "pretrain.batch_size: 4 to 8" in text
    assert "interrupted, at step 304 of 304 as of" in text
    assert "are lost" not in text
    curves = (run / "figures" / "loss_over_steps.csv").read_text().splitlines()
    assert any(line.startswith("validation of /gone/a,pretrain,,200") for line in curves), curves[:3]
    assert "gone on from its" not in text


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # as in the tests: whose compiled programs are then this process's too
    one_step, moment = loop.one_step, sys.argv[3]

    def stepping(steps, plan, local, state, batch):
        if str(plan.start + local) == moment:
            die()
        return one_step(steps, plan, local, state, batch)

    if moment.isdecimal():
        loop.one_step = stepping
    else:
        assert hasattr(jobs, moment)
        setattr(jobs, moment, lambda *_: die())
    with few_matrices():
        train(constant(Path(sys.argv[2]), 16), Path(sys.argv[1]))
