"""Rules and patterns through the real loop: exact counts, exact zeros and a falling loss, from the first step to the last."""

import jax
import numpy as np
import pytest
from tiny import set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.sparsity.masks import active_counts, apply_masks
from spdf_jax.training.phases import make_plan

pytestmark = pytest.mark.usefixtures("all_with_few_matrices")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("rules") / "text")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rule", "pattern", "schedule", "sparsity"),
    [
        ("acdc", "unstructured", "alternate", 0.8),
        ("gmp", "block8", "cubic", 0.75),
        ("mest", "2:4", "constant", 0.5),
        ("sensitivity", "block4", "three_phases", 0.75),
        ("topkast", "1:4", "constant", 0.75),
    ],
)
def test_a_run_holds_its_programme(rule, pattern, schedule, sparsity, text):
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("pretrain",)
    del c["finetune"]
    c.pretrain.steps = 24
    c.pretrain.optimizer.regrowth = "keep" if rule == "topkast" else "reset"
    turns = {"ramp_end": 0.2, "ultra_end": 0.6, "restoration_end": 0.9, "cycles": 2}
    three, four = ("ramp_end", "ultra_end", "restoration_end"), ("ramp_end", "ultra_end", "cycles")
    of_schedule = {"constant": (), "cubic": ("ramp_end",), "three_phases": three, "alternate": four}
    used = {name: turns[name] for name in of_schedule[schedule]} | ({} if rule == "acdc" else {"update_every_steps": 3})
    set_sparsity(c.pretrain, rule=rule, pattern=pattern, schedule=schedule, sparsity=sparsity, **used)
    config = spdf.resolve(c)
    plan = make_plan(config)[0]
    losses, densities = [], set()
    for i, (state, metrics) in enumerate(spdf.watch_training(config)):
        expected = plan.programme.counts(i)
        for name, counts in active_counts(state.masks, state.params, plan.filter).items():
            assert np.asarray(counts).tolist() == [expected[name]] * counts.shape[0]
            densities.add(expected[name] / plan.programme.groups[name].size)
        jax.tree.map(np.testing.assert_array_equal, state.params, apply_masks(state.params, state.masks))
        losses += [float(metrics["loss"])] if metrics else []
    assert len(losses) == 24
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.3
    assert min(densities) == pytest.approx(1 - sparsity, abs=0.005)
    assert (len(densities) > 1) == (schedule != "constant")
