"""Pruning a whole model once: every layer by what the pruned ones before it give, exact counts, on a mesh too."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import drawn_params

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from spdf_jax.tree import named_leaves

# As many tokens as features: logits can be what a layer is given.
CONFIG = spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=16, context=16, tied_head=False, remat="block")
MODEL = spdf.GPT(CONFIG)
HEAD_DENSE_ATTENTION_DENSE = ((r"^blocks/attn_.*kernel$", "dense"), *spdf.LINEAR_KERNELS)


@pytest.fixture(scope="module")
def params():
    """Drawn, and far from the small values by which layers hardly change what they are given."""
    drawn = drawn_params(CONFIG)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: 10 * p + jnp.asarray(rng.normal(0, 0.1, p.shape), p.dtype), drawn)


def tokens(seed=0, rows=4):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 16, (rows, 16)), jnp.int32)


def given_to_queries(params, layer, batch):
    """What a layer's queries are made of: the logits of a model that ends before that layer, with its norm, and a head that
    changes nothing."""
    blocks = jax.tree.map(lambda p: p[:layer], params["blocks"])
    norm = jax.tree.map(lambda p: p[layer], params["blocks"]["ln_1"])
    before = params | {"blocks": blocks, "ln_f": norm, "head": {"kernel": jnp.eye(16)}}
    if layer == 0:
        embedded = params["wte"]["embedding"][batch.tokens_BT] + params["wpe"]["embedding"][None]
        x = (embedded - embedded.mean(-1, keepdims=True)) / jnp.sqrt(embedded.var(-1, keepdims=True) + 1e-5)
        return x * norm["scale"][None, None] + norm["bias"][None, None]
    model = spdf.GPT(dataclasses.replace(CONFIG, n_layer=layer, remat="none"))
    return model.apply({"params": before}, batch.tokens_BT, segments_BT=batch.segments_BT)


def test_each_layer_is_pruned_by_what_the_pruned_ones_before_it_give(params):
    segments_BT = jnp.repeat(jnp.arange(4), 4)[None].repeat(4, 0)
    batches = [Batch(tokens(seed), tokens(seed), jnp.ones((4, 16)), segments_BT) for seed in (0, 1)]
    pruned, masks = spdf.prune_once(params, sparsity=0.5, method="wanda", model=MODEL, calibration=batches)
    for layer in (0, 1):
        x = jnp.concatenate([given_to_queries(pruned, layer, batch).reshape(-1, 16) for batch in batches])
        kernel = params["blocks"]["attn_q"]["kernel"][layer]
        scores = spdf.wanda_scores(kernel, jnp.linalg.norm(x, axis=0))
        wanted = spdf.keep_largest(scores, 128, by_output=True)
        np.testing.assert_array_equal(masks["blocks"]["attn_q"]["kernel"][layer], wanted)
        np.testing.assert_array_equal(pruned["blocks"]["attn_q"]["kernel"][layer], jnp.where(wanted, kernel, 0))


@pytest.mark.parametrize(
    ("method", "how"),
    [
        ("magnitude", {"distribution": "er", "pattern": "block4"}),
        ("wanda", {"pattern": "2:4"}),
        ("sparsegpt", {"distribution": "erk"}),
        ("sparsegpt", {"pattern": "block4", "filter": spdf.LINEAR_KERNELS_AND_HEAD}),
    ],
)
def test_counts_are_those_of_drawn_masks(params, method, how):
    calibration = iter([tokens()])
    pruned, masks = spdf.prune_once(params, sparsity=0.5, method=method, model=MODEL, calibration=calibration, **how)
    drawn = spdf.init_masks(jax.random.key(0), params, sparsity=0.5, **how)
    assert jax.tree.structure(masks) == jax.tree.structure(drawn)
    for (name, mask), (_, other), (_, leaf) in zip(*map(named_leaves, (masks, drawn, pruned)), strict=True):
        axes = (1, 2) if mask.ndim == 3 else None
        np.testing.assert_array_equal(mask.sum(axes), other.sum(axes), err_msg=name)
        assert mask.ndim == 0 or not np.asarray(leaf)[~np.asarray(mask)].any()
    if method == "magnitude":
        by_size = spdf.init_masks(jax.random.key(0), params, sparsity=0.5, method="magnitude", **how)
        jax.tree.map(np.testing.assert_array_equal, masks, by_size)


def test_shares_by_leaf_and_layer(params):
    shares = {"blocks/mlp_up/kernel": (0.25, 0.75), "blocks/mlp_down/kernel": 0.5}
    _, masks = spdf.prune_once(params, sparsity=shares, filter=HEAD_DENSE_ATTENTION_DENSE)
    assert masks["blocks"]["mlp_up"]["kernel"].sum((1, 2)).tolist() == [768, 256]
    assert masks["blocks"]["mlp_down"]["kernel"].sum((1, 2)).tolist() == [512, 512]
    assert masks["blocks"]["attn_q"]["kernel"].ndim == 0


def test_corrected_weights_keep_more_of_the_logits(params):
    dense = MODEL.apply({"params": params}, tokens())
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        pruned, _ = spdf.prune_once(params, sparsity=0.5, method=method, model=MODEL, calibration=tokens()[None])
        errors[method] = float(jnp.square(MODEL.apply({"params": pruned}, tokens()) - dense).mean())
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"]), errors


@pytest.mark.slow
def test_on_a_mesh(params):
    """Sums over tokens round otherwise there."""
    how = {"sparsity": 0.5, "method": "sparsegpt", "model": MODEL, "calibration": [tokens()]}
    alone, alone_masks = spdf.prune_once(params, **how)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params, parameter_shardings(mesh, params))
    with jax.set_mesh(mesh):
        pruned, masks = spdf.prune_once(split, **how)
    for (name, leaf), (_, there), (_, mask), (_, old) in zip(
        *map(named_leaves, (alone, pruned, masks, split)), strict=True
    ):
        np.testing.assert_allclose(leaf, there, atol=1e-3, err_msg=name)
        assert there.sharding.is_equivalent_to(old.sharding, old.ndim), name
        assert mask.ndim == 0 or mask.sharding.is_equivalent_to(old.sharding, old.ndim), name
    jax.tree.map(np.testing.assert_array_equal, masks, alone_masks)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"method": "wand"}, "prune_once: method 'wand' is not one of magnitude, wanda, sparsegpt"),
        ({"method": "wanda"}, "method 'wanda' needs a spdf.GPT as model and calibration=[tokens_BT, ...]"),
        ({"method": "wanda", "model": MODEL}, "needs a spdf.GPT as model and calibration"),
        ({"sparsity": 1.0}, "is outside [0, 1)"),
        ({"sparsity": {"blocks/mlp_up/kernel": 0.5}}, "names all sparse leaves and no others"),
        ({"distribution": "erk", "sparsity": {}}, "is for distribution 'uniform', not 'erk'"),
        ({"pattern": "2:4", "sparsity": 0.7}, "2:4 has sparsity 0.5"),
    ],
)
def test_refusals(params, how, said):
    with pytest.raises(spdf.InputError) as refused:
        spdf.prune_once(params, **({"sparsity": 0.5} | how))
    assert said in str(refused.value)


def test_shares_that_are_not_one_a_layer_are_refused(params):
    shares = {"blocks/mlp_up/kernel": (0.25, 0.75, 0.5), "blocks/mlp_down/kernel": 0.5}
    with pytest.raises(spdf.InputError, match="mlp_up/kernel: 3 shares for 2 layers; give one a layer"):
        spdf.prune_once(params, sparsity=shares, filter=HEAD_DENSE_ATTENTION_DENSE)


def test_inputs_that_are_not_seen_or_not_numbers_are_refused(params):
    how = {"sparsity": 0.5, "method": "wanda", "calibration": [tokens()]}
    tied = dataclasses.replace(CONFIG, tied_head=True)
    with pytest.raises(spdf.InputError, match="what wte/embedding is given is not seen"):
        spdf.prune_once(drawn_params(tied), model=spdf.GPT(tied), filter=spdf.LINEAR_KERNELS_AND_TIED_HEAD, **how)
    broken = params | {"wte": {"embedding": params["wte"]["embedding"].at[0, 3].set(jnp.nan)}}
    with pytest.raises(spdf.InputError, match="attn_k/kernel is given in layer 0 is not finite"):
        spdf.prune_once(broken, model=MODEL, **how)
