"""The core takes any pytree: a plain dict, and the parameters of Linen, NNX and Equinox models."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.tree import named_leaves

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 8))


def plain_dict():
    up, down = jax.random.normal(KEY, (8, 16)), jax.random.normal(KEY, (16, 8))
    params = {"layers": [{"kernel": up, "bias": jnp.zeros(16)}, {"kernel": down, "bias": jnp.zeros(8)}]}

    def forward(params):
        up, down = params["layers"]
        bias = (jnp.broadcast_to(layer["bias"], (4, n)) for layer, n in ((up, 16), (down, 8)))
        return jax.nn.relu(X @ up["kernel"] + next(bias)) @ down["kernel"] + next(bias)

    return params, forward, ["layers/0/kernel", "layers/1/kernel"]


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(8, use_bias=False)(nn.relu(nn.Dense(16, use_bias=False)(x)))


def linen():
    model = LinenModel()
    params = model.init(KEY, X)["params"]
    return params, lambda params: model.apply({"params": params}, X), ["Dense_0/kernel", "Dense_1/kernel"]


class NnxBlocks(nnx.Module):
    """Layers of its own in a list named as the stacked layers of `spdf_jax.GPT`."""

    def __init__(self, rngs):
        attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 64, rngs=rngs), nnx.Linear(64, 8, rngs=rngs), attention])


def test_the_default_filter_masks_the_matrices_of_a_list_whole():
    params = nnx.state(NnxBlocks(nnx.Rngs(0)), nnx.Param)
    masks = spdf.init_masks(KEY, params, sparsity=0.9)
    rows = {row.name: row for row in spdf.mask_report(masks).rows}
    assert {name: (row.shape, row.active) for name, row in rows.items()} == {
        "blocks/0/kernel": ((8, 64), 51),
        "blocks/1/kernel": ((64, 8), 51),
        **{f"blocks/2/{name}/kernel": ((8, 2, 4), 6) for name in ("key", "query", "value")},
        "blocks/2/out/kernel": ((2, 4, 8), 6),
    }
    # Drawn over the whole matrix: the rows of one differ in their counts.
    assert len(set(np.asarray(masks["blocks"][0]["kernel"].get_value()).sum(1).tolist())) > 1


def test_the_default_filter_says_which_matrices_of_a_foreign_model_it_does_not_know():
    class Foreign(NnxBlocks):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    params = nnx.state(Foreign(nnx.Rngs(0)), nnx.Param)
    with pytest.raises(InputError, match=r"leaf 'down/kernel' of shape \(16, 8\), 'up/kernel' of shape \(8, 16\); say"):
        spdf.init_masks(KEY, params, sparsity=0.9)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 8, use_bias=False, rngs=rngs)])

    def __call__(self, x):
        return self.layers[0](nnx.relu(self.up(x)))


def nnx_state():
    graph, params = nnx.split(NnxModel(nnx.Rngs(0)), nnx.Param)
    return params, lambda params: nnx.merge(graph, params)(X), ["layers/0/kernel", "up/kernel"]


def equinox():
    model = eqx.nn.MLP(8, 8, width_size=16, depth=1, use_bias=False, use_final_bias=False, key=KEY)
    params, static = eqx.partition(model, eqx.is_array)
    return params, lambda params: jax.vmap(eqx.combine(params, static))(X), ["layers/0/weight", "layers/1/weight"]


@pytest.mark.parametrize("make", [plain_dict, linen, nnx_state, equinox])
def test_masks_optimiser_topology_and_report_follow_the_tree_as_it_is(make, tmp_path):
    params, forward, sparse_names = make()
    filter = [(r"(kernel|weight)$", "matrix")]
    masks = spdf.init_masks(KEY, params, sparsity=0.75, filter=filter)
    assert jax.tree.structure(masks) == jax.tree.structure(params)
    assert [row.name for row in spdf.mask_report(masks).rows] == sparse_names
    params = spdf.apply_masks(params, masks)
    tx = spdf.sparse(optax.adam(1e-2))
    state = jax.jit(tx.init)(params)

    @jax.jit
    def train(params, state, masks):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((forward(p) - X) ** 2))(params)
        updates, state = tx.update(grads, state, params, masks=masks)
        return optax.apply_updates(params, updates), state, loss, grads

    losses = []
    for _ in range(30):
        params, state, loss, grads = train(params, state, masks)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    targets = {name: jnp.array([32]) for name in sparse_names}
    prune_and_grow = jax.jit(spdf.prune_and_grow_tree, static_argnames="rule")
    new = prune_and_grow(KEY, params, grads, masks, target_nnz=targets, drop_fraction=0.5, rule=spdf.RULES["mst"])
    assert jax.tree.structure(new) == jax.tree.structure(params)
    report = spdf.mask_report(new, masks)
    assert [(row.active, row.size) for row in report.rows] == [(32, 128)] * 2
    assert all(row.churn > 0 for row in report.rows)
    for (_, mask), (_, value) in zip(named_leaves(masks), named_leaves(params), strict=True):
        assert not np.any(np.where(mask, 0, value))
    spdf.save_masks(tmp_path / "m.safetensors", new)
    loaded = spdf.load_masks(tmp_path / "m.safetensors", params)
    assert all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(new), strict=True))


def test_the_state_of_nnx_optimizer_is_reset_by_what_its_refusal_says():
    model = NnxModel(nnx.Rngs(0))
    masks = spdf.init_masks(KEY, nnx.state(model, nnx.Param), sparsity=0.5, filter=[("kernel$", "matrix")])
    tx = spdf.sparse(optax.adam(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
    optimizer.update(model, grads, masks=masks)
    params = nnx.state(model, nnx.Param)
    for (_, mask), (_, value) in zip(named_leaves(masks), named_leaves(params), strict=True):
        assert not np.asarray(value)[~np.asarray(mask)].any()
    moved = jax.tree.map(lambda mask: ~mask, masks)
    with pytest.raises(InputError, match=r"nnx\.Optimizer boxes its own: new = reset_masked_state"):
        spdf.reset_masked_state(tx, optimizer.opt_state, params, moved)
    new = spdf.reset_masked_state(tx, *map(nnx.as_pure, (optimizer.opt_state, params, moved)))
    nnx.update(optimizer.opt_state, nnx.state(new))
    mu = np.asarray(nnx.as_pure(optimizer.opt_state)[0].mu["up"]["kernel"])
    assert not mu[~np.asarray(moved["up"]["kernel"].get_value())].any()
    assert not mu.any()  # what was active is masked now, and the rest had none
    optimizer.update(model, grads, masks=moved)


def test_an_nnx_state_and_a_dict_are_told_apart_in_words():
    params = nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)
    masks = spdf.init_masks(KEY, params, sparsity=0.5, filter=[("kernel$", "matrix")])
    pure = nnx.to_pure_dict(params)
    tx = spdf.sparse(optax.adam(1e-2))
    with pytest.raises(InputError, match=r"containers or the boxes around them differ \(State and dict\)"):
        tx.update(pure, tx.init(pure), pure, masks=masks)
