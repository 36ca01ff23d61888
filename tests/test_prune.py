"""A dense run pruned once: as a folder (`--job prune`), and as the start of a phase (`init`), whose masks are as any others."""

import json
from itertools import islice

import jax
import numpy as np
import pytest
from tiny import set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.jobs import Request, prune
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.export import export
from spdf_jax.sharding import make_mesh
from spdf_jax.training import watch
from spdf_jax.training.feed import load_data, make_feed
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import initial_from, saved_run
from spdf_jax.tree import named_leaves

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")
UP = "blocks/mlp_up/kernel"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("prune") / "text")


def one_phase(text, **sparsity):
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("finetune",)
    del c["pretrain"]
    c.model.n_layer, c.finetune.steps = 1, 2
    set_sparsity(c.finetune, **sparsity)
    return c


@pytest.fixture(scope="module")
def dense(text, tmp_path_factory):
    """Two dense steps."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    jobs.train(spdf.resolve(one_phase(text)), workdir, progress=False)
    return workdir


def from_dense(text, source, **sparsity):
    how = {"rule": "static", "sparsity": 0.5, "init": "sparsegpt", "calibration_sequences": 8}
    c = one_phase(text, **(how | sparsity))
    c.init_from = str(source)
    return c


def leaf_array(tree, name=UP):
    return dict(named_leaves(tree))[name]


def leaf(tree, name=UP):
    return np.asarray(leaf_array(tree, name))


def started(config):
    """The first state of a run, as `watch_training` has it."""
    return next(watch.watch_training(spdf.resolve(config)))[0]


def train_batches(config):
    """Of the first phase."""
    plans, mesh = make_plan(config), make_mesh(config.mesh)
    tokens, tokenizer = load_data(config, None, plans, begun=False, progress=False)
    return make_feed(config, plans[0], tokens, tokenizer, mesh).train(0)


def test_a_phase_starts_from_what_its_init_makes_of_a_dense_run(text, dense):
    config = spdf.resolve(from_dense(text, dense))
    state, source = started(config), saved_run(dense).state
    params, masks = spdf.prune_once(
        source.params,
        sparsity=0.5,
        method="sparsegpt",
        model=spdf.GPT(config.model),
        calibration=islice(train_batches(config), 2),
        filter=make_plan(config)[0].filter,
    )
    jax.tree.map(np.testing.assert_array_equal, state.masks, masks)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    assert (leaf(params)[leaf(masks)] != leaf(source.params)[leaf(masks)]).any(), "corrected"


def test_the_masks_of_a_run_from_a_pruned_folder_are_the_folders(text, dense, tmp_path, capsys):
    config = from_dense(text, dense)
    prune.run(spdf.resolve(config), Request(tmp_path / "run", output=tmp_path / "pruned"))
    assert capsys.readouterr().out == f"{tmp_path / 'pruned'}\n"
    assert not (tmp_path / "run").exists(), "nothing is left where nothing was asked for"
    held = started(from_dense(text, tmp_path / "pruned", init="random", calibration_sequences=128))
    state = started(config)
    jax.tree.map(np.testing.assert_array_equal, held.masks, state.masks)
    jax.tree.map(np.testing.assert_array_equal, held.params, state.params)
    config = one_phase(text)
    config.init_from = str(tmp_path / "pruned")
    dropped = started(config)
    assert {mask.ndim for mask in jax.tree.leaves(dropped.masks)} == {0}
    np.testing.assert_array_equal(leaf(dropped.params), leaf(state.params))


@pytest.mark.slow
def test_a_model_of_llama_s_shape_is_pruned_into_its_family_s_folder_and_goes_on(text, tmp_path):
    shape = {
        "norm": "rms_norm",
        "positions": "rotary",
        "gated": True,
        "activation": "silu",
        "use_bias": False,
        "n_kv_head": 1,
    }

    def llama(c):
        c.model.update(shape)
        return spdf.resolve(c)

    jobs.train(llama(one_phase(text)), tmp_path / "dense", progress=False)
    folder = prune.prune(llama(from_dense(text, tmp_path / "dense")), tmp_path / "run")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    jobs.train(
        llama(from_dense(text, folder, init="random", calibration_sequences=128)), tmp_path / "sparse", progress=False
    )
    state = saved_run(tmp_path / "sparse").state
    for name in (UP, UP.replace("up", "gate")):
        assert leaf(state.masks, name).mean() == 0.5
        assert not leaf(state.params, name)[~leaf(state.masks, name)].any()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["static", "rigl"])
def test_masks_are_held_or_move_and_are_exported_with_the_weights(text, dense, tmp_path, rule):
    config = from_dense(text, dense, init="wanda", rule=rule, pattern="2:4")
    config.finetune.sparsity.update_every_steps = 2 if rule == "rigl" else 100
    config.finetune.steps = 6
    jobs.train(spdf.resolve(config), tmp_path / "run", progress=False)
    first, last = started(config), saved_run(tmp_path / "run")
    mask = leaf(last.state.masks)
    assert (mask.reshape(1, -1, 4, mask.shape[-1]).sum(2) == 2).all()
    assert (mask == leaf(first.masks)).all() == (rule == "static")
    assert not leaf(last.state.params)[~mask].any()
    folder = export(last.config, tmp_path / "run")
    loaded = spdf.load_masks(folder / "masks.safetensors", last.state.params)
    jax.tree.map(np.testing.assert_array_equal, loaded, last.state.masks)
    assert "sparsity_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.slow
def test_it_starts_alike_on_a_mesh(text, dense):
    config = from_dense(text, dense)
    alone = started(config)
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = 1, 4, 2
    split = started(config)
    assert not leaf_array(split.params).sharding.is_fully_replicated
    jax.tree.map(np.testing.assert_array_equal, split.masks, alone.masks)
    np.testing.assert_allclose(leaf(split.params), leaf(alone.params), atol=1e-4)


@pytest.mark.slow
def test_a_second_phase_prunes_the_first_one(text, tmp_path):
    c = tiny_config(text, text.parent / "cache")
    set_sparsity(c.pretrain)
    c.model.n_layer, c.pretrain.steps, c.finetune.steps = 1, 6, 2
    set_sparsity(c.finetune, rule="static", sparsity=0.75, init="wanda", calibration_sequences=4)
    jobs.train(spdf.resolve(c), tmp_path, progress=False)
    mask = leaf(saved_run(tmp_path).state.masks)
    assert set(mask.sum(1).ravel().tolist()) == {4}, "of 16 inputs, for every output"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_from": ""}, "prunes what was trained, and phase 'finetune' starts from drawn parameters"),
        ({"init_what": "state"}, "init_what 'state' goes on with all of a run"),
        ({"finetune.reset_optimizer": False}, "carries over the state of weights that 'sparsegpt' prunes"),
        ({"finetune.sparsity.sparsify_head": True}, "a tied head is the embedding too"),
        ({"finetune.task.name": "restaurant"}, "looks at text, and phase 'finetune' reads a task"),
        (
            {"finetune.sparsity.init": "magnitude"},
            "calibration_sequences: 8 would be ignored, since it is for an init out of",
        ),
    ],
)
def test_what_could_not_be_pruned_is_refused_before_anything_runs(text, dense, change, said):
    config = from_dense(text, dense)
    config.update_from_flattened_dict(change)
    with pytest.raises(spdf.InputError) as refused:
        spdf.resolve(config)
    assert said in str(refused.value)


def test_masks_go_on_and_are_not_pruned_again(text, dense, tmp_path):
    c = tiny_config(text, text.parent / "cache")
    set_sparsity(c.pretrain, rule="static", sparsity=0.5)
    set_sparsity(c.finetune, rule="static", sparsity=0.5, init="wanda")
    with pytest.raises(spdf.InputError, match="prunes a dense model, and the phase before has masks"):
        spdf.resolve(c)
    prune.prune(spdf.resolve(from_dense(text, dense, init="magnitude", calibration_sequences=128)), tmp_path)
    again = spdf.resolve(from_dense(text, tmp_path / "pruned"))
    with pytest.raises(spdf.InputError, match="what the phase starts from has masks, which go on"):
        started(again)
    topkast = from_dense(
        text, tmp_path / "pruned", rule="topkast", init="random", calibration_sequences=128, update_every_steps=1
    )
    topkast.finetune.optimizer.regrowth = "keep"
    topkast = spdf.resolve(topkast)
    with pytest.raises(spdf.InputError, match=r"'topkast' ranks all weights, and .* has masks"):
        initial_from(tmp_path / "pruned", topkast, make_plan(topkast)[0], make_mesh(topkast.mesh))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"init_from": "", "finetune.sparsity.init": "magnitude"},
            "--job prune: what? Name the workdir of a dense run",
        ),
        ({"finetune.sparsity.init": "random"}, "--job prune: how? Set config.finetune.sparsity.init"),
        ({"init_from": "of_nobody", "finetune.sparsity.init": "magnitude"}, "is neither a run's workdir nor"),
    ],
)
def test_the_job_says_what_it_lacks(text, dense, tmp_path, change, said):
    config = from_dense(text, dense, calibration_sequences=128)
    config.update_from_flattened_dict(change)
    with pytest.raises(spdf.InputError) as refused:
        prune.prune(spdf.resolve(config), tmp_path / "run")
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_what_is_there_is_not_replaced(text, dense, tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "notes.txt").write_text("mine")
    with pytest.raises(spdf.InputError, match="is there already, and not as it was exported"):
        prune.prune(spdf.resolve(from_dense(text, dense)), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["pruned", "notes.txt"]


def test_masks_that_were_harmed_or_are_of_another_model_are_refused(text, dense, tmp_path):
    prune.prune(spdf.resolve(from_dense(text, dense, init="magnitude", calibration_sequences=128)), tmp_path)
    config = spdf.resolve(from_dense(text, tmp_path / "pruned", init="random", calibration_sequences=128))
    file = tmp_path / "pruned" / "masks.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(spdf.InputError, match=r"masks.safetensors: the mask of .* is damaged; get the file again"):
        started(config)
    spdf.save_masks(file, {"w": np.ones((2, 2), bool)})
    with pytest.raises(spdf.InputError, match=r"masks.safetensors: masks of other parameters"):
        started(config)
