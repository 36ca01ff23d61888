"""Rule ``topk``: after every step exactly the largest weights, a floor for every neuron, the same bits whatever the mesh."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tiny import set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.optim import OptimizerConfig, make_optimizer
from spdf_jax.planning.pod_plan import lower_steps
from spdf_jax.sharding import MeshConfig, make_mesh
from spdf_jax.sparsity.distributions import MatrixGroup
from spdf_jax.sparsity.masks import active_counts, dense_masks
from spdf_jax.sparsity.programme import Programme, SparsityConfig
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topk import keep_largest_weights, largest
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import saved_run
from spdf_jax.tree import named_leaves

chosen = jax.jit(largest, static_argnames="floor")
GROUPS = {"blocks/mlp_up/kernel": MatrixGroup(2, (64, 256)), "blocks/mlp_up/bias": MatrixGroup(2, (256,))}


def by_sorting(weights, k, floor=0):
    magnitudes = np.where(np.isnan(weights), 0, np.abs(weights))
    columns, first = magnitudes.reshape(-1, magnitudes.shape[-1]), np.zeros(weights.shape, bool)
    order = np.argsort(-columns, axis=0, kind="stable")[:floor]
    np.put_along_axis(first.reshape(columns.shape), order, values=True, axis=0)
    kept = np.zeros(weights.size, bool)
    kept[np.lexsort((np.arange(weights.size), -magnitudes.ravel(), ~first.ravel()))[:k]] = True
    return kept.reshape(weights.shape)


@pytest.mark.parametrize("shape", [(96, 40), (37,)])
@pytest.mark.parametrize("kind", ["smooth", "ties", "nearly all 0", "heavy tails, NaN and infinity"])
def test_the_largest_are_those_of_a_sort(shape, kind):
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if kind == "ties":
        w = np.round(2 * w) / 2
    elif kind == "nearly all 0":
        w[np.abs(w) < 2] = 0
    elif kind != "smooth":
        w = np.sign(w) * np.exp2(20 * w).astype(np.float32)
        w.ravel()[:2] = np.nan, np.inf
    for floor in (0, 2) if len(shape) > 1 else (0,):
        for k in {0, 1, w.size // 100, w.size // 7, w.size - 1, w.size} - set(range(floor * shape[-1])):
            np.testing.assert_array_equal(chosen(w, k, floor=floor), by_sorting(w, k, floor))


def test_masks_are_the_same_bits_on_every_mesh():
    params = {
        "blocks": {
            "mlp_up": {"kernel": jax.random.normal(jax.random.key(0), (2, 64, 256)), "bias": jnp.ones((2, 256))}
        },
        "norm": jnp.ones(3),
    }
    params = jax.tree.map(lambda x: jnp.round(x * 64) / 64, params)  # ties decide
    masks = jax.tree.map(lambda x: jnp.ones(x.shape, bool) if x.ndim > 1 else jnp.array(True), params)
    counts = {"blocks/mlp_up/kernel": np.array([600, 600]), "blocks/mlp_up/bias": np.array([2, 2])}
    choose = jax.jit(functools.partial(keep_largest_weights, rule=RULES["topk"]._replace(floor=2)))
    expected, _ = choose(params, masks, counts)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    axes = {3: (None, "x", "y"), 2: (None, "y")}
    sharded = jax.tree.map(
        lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes.get(x.ndim, ())))), params
    )
    found, new = choose(sharded, masks, counts)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    kernel = np.asarray(new["blocks"]["mlp_up"]["kernel"])
    assert kernel.sum((1, 2)).tolist() == [600, 600]
    assert kernel.sum(1).min() == 2


def test_what_has_no_target_is_refused():
    with pytest.raises(InputError, match="no entry for 'w'"):
        keep_largest_weights({"w": jnp.ones(2)}, {"w": jnp.ones(2, bool)}, {}, RULES["topk"])


def test_counts_fall_in_a_straight_line_and_stay():
    config = SparsityConfig("topk", 0.9, schedule="linear", ramp_end=0.5, floor_per_neuron=2)
    programme = Programme(config, GROUPS, total_steps=100)
    counts = [programme.counts(step)["blocks/mlp_up/kernel"] for step in range(101)]
    assert counts[::10] == [16384 - round(min(0.9, 0.9 * step / 50) * 16384) for step in range(0, 101, 10)]
    assert counts[50:] == [1638] * 51
    assert all(programme.topology(step) is None for step in range(100))
    assert programme.gradient_counts(99) == {name: group.size for name, group in GROUPS.items()}, "gradients are dense"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (
            {"floor_per_neuron": 7},
            r"7 for each of 256 outputs of blocks/mlp_up/kernel .* use at most 6, or a lower sparsity",
        ),
        ({"pattern": "2:4", "sparsity": 0.5, "schedule": "constant"}, r"pattern: '2:4' does not go with rule 'topk'"),
        ({"distribution": "erk"}, r"distribution: 'erk' does not go with rule 'topk'; use 'uniform'"),
        (
            {"rule": "static", "schedule": "constant", "leaves": "all", "distribution": "erk"},
            "does not go with leaves 'all'",
        ),
    ],
)
def test_what_cannot_be_is_refused(settings, match):
    with pytest.raises(InputError, match=rf"sparsity\..*{match}"):
        Programme(SparsityConfig(**{"rule": "topk", "sparsity": 0.9, "schedule": "linear", **settings}), GROUPS, 100)


def test_masked_weights_move_and_clipping_is_by_the_root_mean_square():
    params, masks = {"w": jnp.array([1.0, 0.0, 0.0, 0.0])}, {"w": jnp.array([True, False, False, False])}
    how = {"name": "sgd", "beta1": 0.0, "weight_decay": 0.0, "clip_norm": 0.0, "clip_rms": 1.0, "density_exponent": 0.5}
    tx = make_optimizer(OptimizerConfig(**how), wrap=RULES["topk"].optimizer)
    for scale, expected in ((1.0, 1.0), (10.0, 1.0), (0.1, 0.1)):  # of a root mean square of as much
        grads = {"w": scale * jnp.array([1.0, -1.0, 1.0, -1.0])}
        updates, _ = tx.update(grads, tx.init(params), params, masks=masks, learning_rate=0.5)
        np.testing.assert_allclose(updates["w"], -expected * np.array([1, -1, 1, -1]), rtol=1e-6)  # 0.5 * (1/4)^-0.5
    with pytest.raises(TypeError):
        tx.update(grads, tx.init(params), params, learning_rate=0.5)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("topk") / "text")


def sparse_run(text, steps=16):
    """All weights of a model with AbsTopK, a sink and a bigram table, from dense to a tenth in half of the steps."""
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("pretrain",)
    del c["finetune"]
    c.model.norm, c.model.attention_sink, c.model.bigram = "rms_norm", True, True
    c.model.activation_topk, c.model.tied_head = "mlp_neuron=0.25,attn_in=0.5", False
    c.pretrain.steps, c.loop.checkpoint_every_steps, c.loop.eval_every_steps = steps, 4, 8
    how = {"schedule": "linear", "ramp_end": 0.5, "leaves": "all", "floor_per_neuron": 1}
    set_sparsity(c.pretrain, rule="topk", sparsity=0.9, **how)
    c.pretrain.optimizer.clip_norm, c.pretrain.optimizer.clip_rms = 0.0, 1.0
    return c


@pytest.mark.slow
def test_a_run_holds_exact_counts_and_the_floor_after_every_step(text):
    config = spdf.resolve(sparse_run(text))
    plan = make_plan(config)[0]
    losses, before, revived = [], None, 0
    for i, (state, metrics) in enumerate(spdf.watch_training(config)):
        for name, counts in active_counts(state.masks, state.params, plan.filter).items():
            assert np.asarray(counts).tolist() == [plan.programme.counts(i)[name]] * counts.shape[0]
        masks = {name: np.asarray(mask) for name, mask in named_leaves(state.masks)}
        for (name, w), mask in zip(named_leaves(state.params), masks.values(), strict=True):
            assert not np.asarray(w)[~np.broadcast_to(mask, w.shape)].any()
            if name.startswith("blocks/") and name.endswith("kernel"):
                assert mask.sum(-2).min() >= 1
        dense = {name for name, mask in masks.items() if mask.ndim == 0}
        assert dense == {"blocks/ln_1/scale", "blocks/ln_2/scale", "blocks/sink", "bigram/embedding", "ln_f/scale"}
        revived += sum(int((mask & ~before[name]).sum()) for name, mask in masks.items() if mask.ndim) if before else 0
        before = masks
        losses += [float(metrics["loss"])] if metrics else []
    assert len(losses) == 16
    assert np.mean(losses[-3:]) < losses[0]
    assert revived > 0, "a weight that was zeroed may come back"


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_to_the_same_bits_and_has_its_page(text, tmp_path):
    config = sparse_run(text)
    spdf.train(config, str(tmp_path / "run"), progress=False)
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "run", cut)
    (cut / "summary.json").unlink()
    for step in (12, 16):
        shutil.rmtree(cut / "checkpoints" / str(step))
    spdf.train(config, str(cut), progress=False)
    whole, resumed = (saved_run(folder).state for folder in (tmp_path / "run", cut))
    for name in ("params", "masks", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(whole, name), getattr(resumed, name))
    page = (cut / "report.html").read_text()
    assert "topk" in page
    assert "mlp_up, layer 1, step 16: 9.96 % present" in page


@pytest.mark.slow
def test_the_step_is_planned_on_a_mesh(text):
    config = spdf.resolve(sparse_run(text))
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    ((name, lowered),) = lower_steps(config, make_plan(config)[0], mesh)
    assert name == "train step"
    assert lowered.compile().memory_analysis() is not None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pretrain.update({"ema_decay": 0.9}), "ema_decay: averages weights as the optimiser leaves them"),
        (lambda c: c.pretrain.optimizer.update({"name": "schedule_free_adamw"}), "averages weights as the optimiser"),
        (lambda c: c.pretrain.optimizer.update({"regrowth": "smet"}), "'smet' counts the steps of active weights"),
        (lambda c: c.pretrain.optimizer.update({"clip_norm": 1.0}), r"clip_rms.* clip_norm 0\.0"),
        (lambda c: c.pretrain.sparsity.update({"sparsify_head": True}), "sparsify_head.* leaves 'kernels'"),
        (
            lambda c: c.pretrain.sparsity.update({"rule": "static", "schedule": "constant", "ramp_end": 0.1}),
            "floor_per_neuron.* 'topk'",
        ),
    ],
)
def test_a_config_that_cannot_be_is_refused(change, match, text):
    c = sparse_run(text)
    change(c)
    with pytest.raises(InputError, match=match):
        spdf.resolve(c)


def test_a_dense_leaf_stays_dense():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    _, masks = keep_largest_weights(params, dense_masks(params), {}, RULES["topk"])
    assert jax.tree.map(jnp.ndim, masks) == {"w": 0, "b": 0}
    assert isinstance(RULES["topk"].optimizer(optax.sgd(0.1)), optax.GradientTransformationExtraArgs)
