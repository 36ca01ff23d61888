"""The loop as a whole: exact zeros in every checkpoint, the same bits after kill -9, nothing compiled twice, phases."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tiny import rows_without_clock, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.config.sweep import SUMMARY
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.training import checkpoint as checkpointing
from spdf_jax.training import loop, programs
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan, total_cost
from spdf_jax.tree import named_leaves
from spdf_jax.workdir import read_json


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def killed(text: Path, workdir: Path, moment: str) -> int:
    """Trains the tiny run in a process of its own, which dies; its exit status."""
    script = Path(__file__).with_name("tiny.py")
    return subprocess.run([sys.executable, script, workdir, text, moment], check=False).returncode


def checkpoint(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name, read by orbax alone."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore((workdir / "checkpoints" / str(step) / "state").absolute())
    return {name: np.asarray(jax.random.key_data(leaf) if name == "key" else leaf) for name, leaf in named_leaves(tree)}


def unpacked(arrays: dict[str, np.ndarray], name: str) -> np.ndarray:
    """The element mask of a parameter."""
    shape = arrays[f"params/{name}"].shape
    return np.unpackbits(arrays[f"masks/{name}"], axis=-1, count=shape[-1]).astype(bool)


class Whole(NamedTuple):
    """A run from its beginning to its end, and how many train and topology steps each phase compiled."""

    workdir: Path
    compiled: list[tuple[int, int]]


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    workdir, steps = tmp_path_factory.mktemp("run") / "whole", []
    original = loop.make_steps
    programs._kept_program.cache_clear()  # those of runs before it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_steps", lambda *args: steps.append(original(*args)) or steps[-1])
        jobs.train(spdf.resolve(tiny_config(text, text.parent / "cache")), workdir, progress=False)
    return Whole(workdir, [(made.train._cache_size(), made.topology._cache_size()) for made in steps])


@pytest.fixture
def uninterrupted(whole):
    return whole.workdir


def test_every_checkpoint_holds_exact_zeros_and_exact_counts(uninterrupted, text):
    config = spdf.resolve(tiny_config(text, text.parent / "cache"))
    pretrain = make_plan(config)[0]
    steps = sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir() if p.name.isdigit())
    assert steps == [10, 20, 30, 40, 50, 60, 70, 72]
    seen = set()
    for step in steps[:6]:
        arrays = checkpoint(uninterrupted, step)
        for name, count in pretrain.programme.counts(step).items():
            mask = unpacked(arrays, name)
            layers = mask.reshape(pretrain.programme.groups[name].count, -1)
            assert (layers.sum(1) == count).all()
            seen.add(count / layers.shape[1])
            state_of_leaf = [k for k in arrays if k.endswith(name) and not k.startswith("masks/")]
            assert len(state_of_leaf) == 3  # the weight and both moments
            for key in state_of_leaf:
                assert not arrays[key][~mask].any(), f"{key} at step {step}"
    assert min(seen) < 0.25
    assert max(seen) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save", "topology", "phase"])
def test_killed_run_ends_with_the_same_bits(moment, uninterrupted, text, tmp_path):
    assert killed(text, tmp_path, moment) == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    jobs.train(spdf.resolve(tiny_config(text, text.parent / "cache")), tmp_path, progress=False)
    whole, resumed = checkpoint(uninterrupted, 72), checkpoint(tmp_path, 72)
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    assert rows_without_clock(tmp_path) == rows_without_clock(uninterrupted)
    steps = [row["step"] for row in read_metrics(tmp_path) if "loss" in row]
    assert steps == list(range(1, 73))


def test_a_finished_run_says_so_and_changes_nothing(uninterrupted, text, capsys):
    before = (uninterrupted / "metrics.jsonl").read_bytes()
    summary = jobs.train(spdf.resolve(tiny_config(text, text.parent / "cache")), uninterrupted)
    assert "finished" in capsys.readouterr().out
    assert summary == read_json(uninterrupted / "summary.json", "")
    assert (uninterrupted / "metrics.jsonl").read_bytes() == before


def test_summary_has_every_key_and_the_planned_flops(uninterrupted, text):
    summary = json.loads((uninterrupted / "summary.json").read_text())
    wanted = "status experiment variant steps tokens val_loss sparsity train_flops dense_flops flops_reduction"
    assert set(f"{wanted} tokens_per_second wall_seconds device".split()) <= summary.keys()
    assert {name for name, value in summary.items() if isinstance(value, int | float)} <= {*SUMMARY, "crc32"}, (
        "columns of sweeps"
    )
    cost = total_cost(make_plan(spdf.resolve(tiny_config(text, text.parent / "cache"))))
    assert {name: summary[name] for name in cost._fields} == cost._asdict()
    assert cost.padded_tokens == cost.tokens
    assert summary["val_loss"] < summary["initial_val_loss"] - 1
    assert (uninterrupted / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_dropping_the_masks_changes_no_value_and_then_masked_weights_move(text, tmp_path):
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.finetune.steps = 10, 1
    set_sparsity(c.pretrain, rule="static", sparsity=0.8, sparsify_head=True)
    jobs.train(spdf.resolve(c), tmp_path, progress=False)
    sparse, dense = checkpoint(tmp_path, 10), checkpoint(tmp_path, 11)
    name = "blocks/mlp_up/kernel"
    mask = unpacked(sparse, name)
    assert not sparse[f"params/{name}"][~mask].any()
    assert dense[f"masks/{name}"].shape == ()
    # All move whose gradient is not exactly 0: that of a hidden unit is, when the mask cut all its outputs.
    reaches_output = np.broadcast_to(unpacked(sparse, "blocks/mlp_down/kernel").any(-1)[:, None, :], mask.shape)
    moved = dense[f"params/{name}"] != 0
    assert moved[~mask & reaches_output].all()
    assert (~mask & reaches_output).mean() > 0.7


def test_nothing_compiles_twice(whole):
    # One compilation an attention pattern, however often sparsity changes.
    assert whole.compiled == [(2, 2), (1, 0)]


def test_runs_of_equal_settings_share_their_programs(text):
    """So that one made again, resumed or watched in one process, or with another seed, compiles nothing."""

    def made(**settings):
        c = tiny_config(text, text.parent / "cache")
        c.update_from_flattened_dict(settings)
        config = spdf.resolve(c)
        plan = make_plan(config)[0]
        model = spdf.GPT(config.model)
        return programs.make_steps(model, plan.tx, plan.learning_rate, plan.programme.config.topology_rule)

    plain = made()
    assert made(seed=1) == plain
    assert made(**{"pretrain.steps": 50}) == plain, "its learning rate is constant"
    other = made(**{"pretrain.optimizer.beta1": 0.5})
    assert (other.train == plain.train, other.topology == plain.topology) == (False, False)
    assert other.evaluate == plain.evaluate
    rigl = made(**{"pretrain.sparsity.rule": "rigl"})
    assert (rigl.train == plain.train, rigl.topology == plain.topology) == (True, False)


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_gradient_accumulation_gives_the_same_run(text, tmp_path):
    losses = []
    for accumulate in (1, 4):
        c = tiny_config(text, text.parent / "cache")
        c.pretrain.steps, c.phases = 12, ("pretrain",)
        del c.finetune
        c.pretrain.grad_accumulation_steps = accumulate
        jobs.train(spdf.resolve(c), tmp_path / str(accumulate), progress=False)
        losses.append([row["loss"] for row in read_metrics(tmp_path / str(accumulate)) if "loss" in row])
    np.testing.assert_allclose(*losses, atol=2e-4)


def test_evaluate_gives_the_last_validation_loss(uninterrupted, text):
    result = evaluate_checkpoint(spdf.resolve(tiny_config(text, text.parent / "cache")), uninterrupted)
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert result["val_loss"] == pytest.approx(summary["val_loss"], abs=1e-6)
    assert 1 < result["perplexity_per_byte"] < result["perplexity"]


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_no_room_for_a_checkpoint_stops_before_writing_and_the_run_goes_on_later(text, tmp_path, monkeypatch):
    config = spdf.resolve(tiny_config(text, text.parent / "cache"))
    save = checkpointing.Checkpoints.save

    def full_from_step_30(self, state, record):
        if int(state.step) == 30:
            monkeypatch.setattr(checkpointing.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        save(self, state, record)

    monkeypatch.setattr(checkpointing.Checkpoints, "save", full_from_step_30)
    with pytest.raises(OSError, match="No space left on device") as caught:
        jobs.train(config, tmp_path, progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["10", "20"]
    monkeypatch.undo()
    assert jobs.train(config, tmp_path, progress=False)["status"] == "finished"


def test_a_disk_that_fills_while_a_save_is_written_is_named(tmp_path):
    checkpoints = checkpointing.Checkpoints(tmp_path)
    with pytest.raises(OSError, match="No space left on device") as caught, checkpoints._disk_named():
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 116 bytes: No space left on device [os_error_code='28']")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path))
    with pytest.raises(ValueError, match="something else"), checkpoints._disk_named():
        raise ValueError("something else")
    checkpoints.close()


def test_a_save_that_waits_for_the_one_before_it_prints_no_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ocp.checkpoint_manager, "_WAIT_FOR_PREV_SAVE_WARNING_THRESHOLD_SECS", -1.0)
    checkpoints = checkpointing.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave({"w": np.ones(2)})))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.slow
def test_going_sparse_with_the_optimiser_carried_over_leaves_no_moment_under_the_masks(text, tmp_path):
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.finetune.steps = 5, 1
    set_sparsity(c.pretrain)
    c.finetune.sparsity.rule, c.finetune.sparsity.sparsity, c.finetune.reset_optimizer = "static", 0.5, False
    jobs.train(spdf.resolve(c), tmp_path, progress=False)
    arrays, name = checkpoint(tmp_path, 6), "blocks/mlp_up/kernel"
    masked = ~unpacked(arrays, name)
    assert masked.sum() == masked.size // 2
    state_of_leaf = [k for k in arrays if k.endswith(name) and not k.startswith("masks/")]
    assert len(state_of_leaf) == 3
    for key in state_of_leaf:
        assert not arrays[key][masked].any(), key
        assert arrays[key][~masked].any(), key
