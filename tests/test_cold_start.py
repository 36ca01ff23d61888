"""The cold-start ablation: its cells, what it measures, its report; and the in-memory run that it looks through."""

import importlib.util
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tiny import NO_WINDOW, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.jobs import train as jobs
from spdf_jax.sharding import make_mesh
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan
from spdf_jax.training.state import abstract_state, state_shardings

pytestmark = pytest.mark.usefixtures("all_with_few_matrices")

spec = importlib.util.spec_from_file_location(
    "cold_start", Path(__file__).parent.parent / "experiments" / "cold_start.py"
)
cold_start = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cold_start)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def test_nine_cells_differ_in_beta2_and_regrowth_alone():
    cells = [spdf.resolve(cold_start.get_config(v)).as_dict() for v in cold_start.VARIANTS]
    settings = {(c["pretrain"]["optimizer"].pop("beta2"), c["pretrain"]["optimizer"].pop("regrowth")) for c in cells}
    assert settings == {(b, arm) for b in (0.95, 0.99, 0.999) for arm in ("reset", "keep", "smet")}
    for cell in cells:
        del cell["variant"]
        cell["pretrain"]["optimizer"].pop("regrowth_warmup_steps")  # of smet alone
    assert all(cell == cells[0] for cell in cells)
    assert cells[0]["experiment"] == "cold_start"


def small(variant, text):
    c = cold_start.get_config(variant)
    tiny = tiny_config(text, text.parent / "cache")
    c.model, c.data = tiny.model, tiny.data
    c.model.n_layer = 1
    c.pretrain.steps, c.pretrain.batch_size, c.pretrain.optimizer.warmup_steps = 35, 4, 4
    c.pretrain.sparsity.drop_fraction = 0.5
    c.loop.eval_every_steps, c.loop.eval_batch_size = 100, 8
    return spdf.resolve(c)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["reset", "smet"])
def test_a_cell_measures_the_first_updates_that_adam_and_smet_make(arm, text, monkeypatch):
    """The first update of a weight that grew: |m| / sqrt(v) is known for its one gradient, whatever it is.

    `reset`: the topology step 26 comes after 25 updates, so (1 - b1)/sqrt(1 - b2) over what is left of the global
    correction, (1 - b1^26)/sqrt(1 - b2^26). `smet`: 1/W. Decay adds nothing: the weights are still 0.
    """
    monkeypatch.setattr(cold_start, "FOLLOW_FROM_STEP", 20)
    cell = cold_start.run_cell(small(f"b999_{arm}", text))
    assert (len(cell["losses"]), list(cell["val_losses"]), cell["topology_steps"]) == (35, [35], [26])
    assert len(cell["regrown_update_rms"]) == 24
    assert 0.05 < cell["established_update_rms"] < 1
    assert json.loads(json.dumps(cell))["losses"] == cell["losses"]
    expected = {"reset": 3.1623 / ((1 - 0.9**26) / (1 - 0.999**26) ** 0.5), "smet": 1 / 25}[arm]
    assert cell["regrown_update_rms"][0] == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["reset", "keep"])
def test_a_topology_step_resets_what_left_or_came_or_keeps_everything(arm, text):
    run = itertools.islice(spdf.watch_training(small(f"b999_{arm}", text)), 27)  # step 26 is the topology step
    states = [jax.tree.map(np.array, (state.masks, state.opt_state)) for state, _ in run]
    (masks, before), (new_masks, after) = states[25:]
    was, now = (m["blocks"]["mlp_up"]["kernel"] for m in (masks, new_masks))
    stayed, came, left = was & now, now & ~was, was & ~now
    assert came.sum() == left.sum() >= 10
    for key in ("mu", "nu"):
        old, new = (optax.tree.get(s, key)["blocks"]["mlp_up"]["kernel"] for s in (before, after))
        np.testing.assert_array_equal(new[stayed], old[stayed])
        assert old[left].any()
        if arm == "keep":
            np.testing.assert_array_equal(new, old)
        else:
            assert not new[~stayed].any()
    assert optax.tree.get(after, "count") == optax.tree.get(before, "count") == 25


MADE_UP = {
    "losses": np.linspace(5, 4, 60),
    "val_losses": {"60": 4.1},
    "topology_steps": [26],
    "regrown_update_rms": np.linspace(2, 1, 24).tolist(),
    "established_update_rms": 0.25,
}


def test_the_comparison_has_a_row_a_cell_and_is_resumed(tmp_path, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(cold_start, "FOLLOW_FROM_STEP", 20)

    def run_cell(config):
        ran.append(config.variant)
        bump = 0.9 * (np.arange(60) >= 26) if config.variant == "b999_reset" else 0.0
        return MADE_UP | {"losses": (MADE_UP["losses"] + bump).tolist()}

    monkeypatch.setattr(cold_start, "run_cell", run_cell)
    cold_start.main(["--workdir", str(tmp_path), "--cells", "b95_keep"])
    assert ran == ["b95_keep"]
    assert not (tmp_path / "comparison.json").exists()
    for _ in range(2):
        cold_start.main(["--workdir", str(tmp_path)])
        assert sorted(ran) == sorted(cold_start.VARIANTS)  # no cell twice
    rows = json.loads((tmp_path / "comparison.json").read_text())
    assert [(r["beta2"], r["arm"]) for r in rows] == [(b, a) for b in (0.95, 0.99, 0.999) for a in cold_start.ARMS]
    row = rows[6]
    assert (row["update_rms_peak"], row["peak_at_step"], row["peak_over_established"]) == (2.0, 1, 8.0)
    assert row["analytic_peak"] == pytest.approx(6.57, abs=0.01)
    # One loss of nine jumps by 0.9: by 0.8 against their mean, and the others fall by 0.1.
    assert [r["loss_rise_after_topology"] for r in rows] == pytest.approx([-0.1] * 6 + [0.8] + [-0.1] * 2)
    assert (tmp_path / "comparison.md").read_text().count("\n| 0.9") == 9
    assert (tmp_path / "comparison.svg").stat().st_size > 10_000
    assert "| 0.999 | smet |" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_a_watched_run_is_the_run_itself_with_smet_s_counts_in_the_checkpoint(text, tmp_path):
    c = tiny_config(text, text.parent / "cache")
    c.model.n_layer, c.pretrain.steps, c.finetune.steps, c.loop.eval_every_steps = 1, 20, 4, 10
    c.pretrain.sparsity.update(NO_WINDOW)
    c.pretrain.optimizer.regrowth = c.finetune.optimizer.regrowth = "smet"
    c.pretrain.optimizer.density_exponent, c.finetune.reset_optimizer = 0.5, False
    config = spdf.resolve(c)
    jobs.train(config, tmp_path, progress=False)
    rows = read_metrics(tmp_path)
    losses, val_losses = [], {}
    updates = sum(make_plan(config)[0].programme.topology(step) is None for step in range(20))
    assert 0 < updates < 20
    for step, (state, metrics) in enumerate(spdf.watch_training(config)):
        assert int(state.step) == step
        losses += [metrics["loss"]] if metrics else []
        val_losses |= {step: metrics["val_loss"]} if "val_loss" in metrics else {}
        if step == 20:
            for mask, count in zip(
                jax.tree.leaves(state.masks), jax.tree.leaves(optax.tree.get(state.opt_state, "count")), strict=True
            ):
                assert count.dtype == np.int32
                assert int(count.max()) == updates
                assert mask.ndim == 0 or not bool(count[~mask].any())
                assert mask.ndim == 0 or 0 < int(count[mask].min()) < updates
    assert losses == [np.float32(r["loss"]) for r in rows if "loss" in r]
    assert val_losses == {r["step"]: r["val_loss"] for r in rows if "val_loss" in r and r["step"]}
    plan, mesh, model = make_plan(config)[-1], make_mesh(config.mesh), spdf.GPT(config.model)
    abstract = abstract_state(model, plan.tx, plan.config.sparsity, plan.filter)
    saved = Checkpoints(tmp_path / "checkpoints", 100).restore(abstract, state_shardings(mesh, plan.tx, abstract))
    jax.tree.map(np.testing.assert_array_equal, saved.replace(key=0), state.replace(key=0))


def test_state_of_another_kind_is_not_carried_over(text):
    c = tiny_config(text, text.parent / "cache")
    c.finetune.reset_optimizer, c.pretrain.optimizer.regrowth = False, "smet"
    with pytest.raises(
        spdf.InputError, match=r"finetune.reset_optimizer.*'smet' and rule 'dense' with 'adamw', 'reset'"
    ):
        spdf.resolve(c)
