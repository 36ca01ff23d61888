"""GPT: shapes and published sizes, causality by gradients, masks in the forward pass, options, the cache."""

import dataclasses
from functools import cache, partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import drawn_params, slow_but

import spdf_jax as spdf
from spdf_jax.model import layer_norm
from spdf_jax.model.decoding import empty_cache
from spdf_jax.model.flops import parameter_count
from spdf_jax.model.layer_norm import LayerNorm
from spdf_jax.model.linear import dense_linear
from spdf_jax.ops.attention_patterns import PATTERNS
from spdf_jax.training.state import abstract_params

SLOW = pytest.mark.slow
TINY = spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=50, context=12)


def make(config=TINY, **changes):
    return _made(dataclasses.replace(config, **changes))


@cache
def _made(config):
    model = spdf.GPT(config)
    tokens_BT = jax.random.randint(jax.random.key(1), (2, config.context), 0, config.vocab_size)
    return model, drawn_params(config), tokens_BT


@partial(jax.jit, static_argnames=("model", "pattern", "width", "deterministic"))  # op by op it is dozens of programs
def apply(model, params, tokens_BT, **how):
    return model.apply({"params": params}, tokens_BT, **how)


@pytest.mark.parametrize("changes", [{}, {"tied_head": False}, {"use_bias": False}, {"d_ff": 24}])
def test_parameter_count_is_that_of_the_model(changes):
    config = dataclasses.replace(TINY, **changes)
    params = abstract_params(spdf.GPT(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameter_count(config)


@pytest.mark.parametrize(
    ("size", "millions"),
    [  # GPT-2's checkpoints to the decimal; GPT-3's and SPDF's papers round
        ("124m", 124.44),
        ("350m", 354.82),
        ("774m", 774.03),
        ("1.5b", 1557.61),
        ("125m", 125),
        ("1.3b", 1300),
        ("6.7b", 6700),
    ],
)
def test_published_sizes(size, millions):
    tolerance = 0.01 if isinstance(millions, float) else 0.02 * millions
    assert parameter_count(spdf.GPT_SIZES[size]) / 1e6 == pytest.approx(millions, abs=tolerance)


@pytest.mark.parametrize("pattern", ["causal", "local_strided"])
def test_no_logit_depends_on_a_later_token(pattern):
    model, params, tokens_BT = make()

    @jax.jit
    @jax.grad
    def gradient(wpe_TD, t):
        changed = params | {"wpe": {"embedding": wpe_TD}}
        return apply(model, changed, tokens_BT, pattern=pattern, width=4)[0, t].sum()

    for t in (0, 5, 11):
        depends = np.abs(np.asarray(gradient(params["wpe"]["embedding"], t))).sum(1) > 0
        assert not depends[t + 1 :].any()
        assert depends[t]
        if pattern == "causal":
            assert depends[: t + 1].all()


def test_forward_needs_masks_and_applies_them():
    model, params, tokens_BT = make()
    masks = spdf.init_masks(jax.random.key(2), params, sparsity=0.5)
    zeroed = jax.tree.map(lambda m, p: p * m, masks, params)
    np.testing.assert_array_equal(
        jax.jit(spdf.forward, static_argnums=0)(model, params, tokens_BT, masks=masks), apply(model, zeroed, tokens_BT)
    )
    with pytest.raises(TypeError, match="masks"):
        spdf.forward(model, params, tokens_BT)
    with pytest.raises(spdf.InputError, match="tree structure"):
        spdf.forward(model, params, tokens_BT, masks={"wte": masks["wte"]})


@pytest.mark.parametrize("remat", ["block", *(pytest.param(which, marks=SLOW) for which in ("dots", "mlp"))])
def test_layer_scan_with_and_without_remat_agree_in_values_and_gradients(remat):
    model, params, tokens_BT = make()
    remat = spdf.GPT(dataclasses.replace(TINY, remat=remat))

    @partial(jax.jit, static_argnums=0)
    def loss(model, params):
        return jax.value_and_grad(lambda params: (apply(model, params, tokens_BT) ** 2).mean())(params)

    ours, plain = loss(remat, params), loss(model, params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), plain, ours)


def test_bfloat16_keeps_float32_parameters_and_is_close():
    model, params, tokens_BT = make()
    half = spdf.GPT(dataclasses.replace(TINY, dtype="bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_params(half))} == {jnp.dtype("float32")}
    logits = apply(half, params, tokens_BT)
    assert logits.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits.astype(jnp.float32), apply(model, params, tokens_BT), atol=0.02)


def test_dropout_acts_in_training_only():
    model, params, tokens_BT = make(dropout=0.5)
    still = apply(model, params, tokens_BT)
    np.testing.assert_array_equal(still, apply(model, params, tokens_BT))
    dropped = apply(model, params, tokens_BT, deterministic=False, rngs={"dropout": jax.random.key(3)})
    assert np.abs(np.asarray(dropped - still)).max() > 0


def test_residual_projections_start_smaller():
    model = spdf.GPT(spdf.GPTConfig(n_layer=8, n_head=2, d_model=64, vocab_size=50, context=12))
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    std = {name: float(params["blocks"][name]["kernel"].std()) for name in ("attn_q", "attn_o", "mlp_up", "mlp_down")}
    assert std["attn_o"] / std["attn_q"] == pytest.approx(1 / 4, rel=0.05)
    assert std["mlp_down"] / std["mlp_up"] == pytest.approx(1 / 4, rel=0.05)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 15}, "d_model: 15 is not divisible by model.n_head 2"),
        ({"dropout": 1.0}, "dropout: 1.0"),
        ({"dtype": "float16"}, "dtype: 'float16'"),
        ({"n_layer": 0}, "n_layer: 0"),
        ({"activation": "swish"}, "activation: 'swish' is not one of 'gelu', 'gelu_exact', 'relu', 'squared_relu'"),
        ({"mlp_norm": "both"}, "mlp_norm: 'both' is not one of 'pre', 'post'"),
    ],
)
def test_impossible_architectures_are_refused(changes, message):
    with pytest.raises(spdf.InputError, match=message):
        dataclasses.replace(TINY, **changes)


def test_a_sequence_over_the_context_is_refused():
    model, params, _ = make()
    with pytest.raises(spdf.InputError, match=r"sequence length 13 exceeds model\.context 12"):
        model.apply({"params": params}, jnp.zeros((1, 13), int))


def in_steps(model, params, tokens_BT, prompt_tokens, length, **options):
    """Logits by a cache: prompts padded with garbage in one call, then each sequence goes on from its own end."""
    batch, total = tokens_BT.shape
    lengths_B, at = jnp.array(prompt_tokens), jnp.arange(max(prompt_tokens))
    padded_BT = jnp.where(at[None] < lengths_B[:, None], tokens_BT[:, : len(at)], 7)
    positions_BT = jnp.where(at[None] < lengths_B[:, None], at[None], -1)

    @jax.jit
    def call(cache, tokens_BT, positions_BT):
        variables = {"params": params, "cache": cache}
        return model.apply(variables, tokens_BT, positions_BT=positions_BT, mutable=["cache"], **options)

    logits_BTV, state = call(empty_cache(model.config, batch, length), padded_BT, positions_BT)
    found_BTV = np.full((batch, total, model.config.vocab_size), np.nan, logits_BTV.dtype)
    for b, n in enumerate(prompt_tokens):
        found_BTV[b, :n] = logits_BTV[b, :n]
    for step in range(total - min(prompt_tokens)):
        at_B = np.array(prompt_tokens) + step
        live_B = at_B < total
        token_B1 = np.asarray(tokens_BT)[np.arange(batch), np.where(live_B, at_B, 0)][:, None]
        logits_BTV, state = call(state["cache"], token_B1, np.where(live_B, at_B, -1)[:, None])
        found_BTV[live_B, at_B[live_B]] = logits_BTV[live_B, 0]
    return found_BTV


@pytest.mark.parametrize(  # the others are parts of the second
    "pattern", slow_but(["causal", "local_strided"], PATTERNS)
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"use_bias": False, "tied_head": False, "remat": "block", "mup_base_width": 8},
            marks=SLOW,
        ),
    ],
)
def test_cached_logits_equal_those_of_the_whole_sequence(pattern, changes):
    model, params, tokens_BT = make(init_std=0.3, **changes)
    whole_BTV = apply(model, params, tokens_BT, pattern=pattern, width=3)
    cached_BTV = in_steps(model, params, tokens_BT, (3, 7), length=12, pattern=pattern, width=3)
    np.testing.assert_allclose(cached_BTV, whole_BTV, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_cache_is_as_long_as_asked_and_in_the_compute_dtype():
    model, params, tokens_BT = make(dtype="bfloat16")
    whole_BTV = apply(model, params, tokens_BT[:, :6])
    cached_BTV = in_steps(model, params, tokens_BT[:, :6], (1, 2), length=6)
    assert {(leaf.shape, leaf.dtype.name) for leaf in jax.tree.leaves(empty_cache(model.config, 2, 6))} == {
        ((2, 2, 6, 2, 8), "bfloat16")
    }
    np.testing.assert_allclose(cached_BTV.astype(np.float32), whole_BTV.astype(jnp.float32), atol=0.02)


def test_positions_without_a_cache_are_refused():
    model, params, tokens_BT = make()
    with pytest.raises(spdf.InputError, match="positions_BT: they need empty_cache"):
        model.apply({"params": params}, tokens_BT, positions_BT=tokens_BT, mutable=["cache"])


def test_padding_leaves_nothing_in_the_cache():
    model, params, tokens_BT = make()
    positions_BT = jnp.where(jnp.arange(12)[None] < jnp.array([[3], [0]]), jnp.arange(12)[None], -1)
    variables = {"params": params, "cache": empty_cache(model.config, 2, 12)}
    _, state = model.apply(variables, tokens_BT, positions_BT=positions_BT, mutable=["cache"])
    for leaf in jax.tree.leaves(state["cache"]):
        written_LBS = np.abs(np.asarray(leaf)).sum((3, 4)) > 0
        np.testing.assert_array_equal(written_LBS, np.broadcast_to(np.arange(12) < [[3], [0]], (2, 2, 12)))


@pytest.mark.parametrize("pattern", ["causal", "local"])
def test_packed_documents_do_not_see_each_other(pattern):
    model, params, tokens_BT = make(init_std=0.3)
    segments_BT = jnp.broadcast_to(jnp.arange(12)[None] // 5, (2, 12))

    def logits(tokens_BT):
        return apply(model, params, tokens_BT, segments_BT=segments_BT, pattern=pattern, width=4)

    other_BT = tokens_BT.at[:, :5].set((tokens_BT[:, :5] + 1) % 50)
    np.testing.assert_array_equal(logits(tokens_BT)[:, 5:], logits(other_BT)[:, 5:])
    assert not np.array_equal(logits(tokens_BT)[:, :5], logits(other_BT)[:, :5])
    whole_BTV = apply(model, params, tokens_BT, pattern=pattern, width=4)
    np.testing.assert_allclose(logits(tokens_BT)[:, :5], whole_BTV[:, :5], atol=1e-5)


def test_segments_have_no_place_beside_a_cache():
    model, params, tokens_BT = make()
    variables = {"params": params, "cache": empty_cache(model.config, 2, 12)}
    with pytest.raises(spdf.InputError, match="no segments_BT"):
        model.apply(variables, tokens_BT, positions_BT=tokens_BT, segments_BT=tokens_BT, mutable=["cache"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dense_layer_has_the_gradients_of_a_product(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (3, 5, 8), (8, 4), (3, 5, 4)
    x_BTP, w_PQ, dy_BTQ = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    y_BTQ, pullback = jax.vjp(dense_linear, x_BTP, w_PQ)
    plain_BTQ, plain_pullback = jax.vjp(jnp.matmul, x_BTP, w_PQ)
    np.testing.assert_array_equal(y_BTQ, plain_BTQ)
    for grad, plain in zip(pullback(dy_BTQ), plain_pullback(dy_BTQ), strict=True):
        assert grad.dtype == dtype
        tolerance = {"float32": 1e-6, "bfloat16": 2e-2}[dtype]
        np.testing.assert_allclose(grad.astype(jnp.float32), plain.astype(jnp.float32), tolerance, tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "use_bias"), [((1, 5, 16), True), ((3, 4, 8), False)])
@pytest.mark.parametrize("platform", ["cpu", "tpu"])  # each has a form of its own
def test_layer_normalisation_has_the_values_and_gradients_of_flax(platform, shape, dtype, use_bias, monkeypatch):
    monkeypatch.setattr(layer_norm, "target_platform", lambda: platform)
    ours, flaxs = (norm(epsilon=1e-3, use_bias=use_bias, dtype=dtype) for norm in (LayerNorm, nn.LayerNorm))
    x_BTD, dy_BTD = (jax.random.normal(jax.random.key(i), shape).astype(dtype) for i in (0, 1))
    shapes, theirs = (jax.eval_shape(norm.init, jax.random.key(2), x_BTD)["params"] for norm in (ours, flaxs))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, theirs)
    start = {"scale": 1, "bias": 0}
    params = {name: jnp.asarray(start[name] + np.arange(shape[-1]) / 7, leaf.dtype) for name, leaf in shapes.items()}

    @partial(jax.jit, static_argnums=0)
    def outcome(norm):
        y_BTD, pullback = jax.vjp(lambda params, x_BTD: norm.apply({"params": params}, x_BTD), params, x_BTD)
        return y_BTD, pullback(dy_BTD)

    tolerance = 1e-5 if dtype == "float32" else 3e-2
    chex.assert_trees_all_equal_dtypes(outcome(ours), outcome(flaxs))
    chex.assert_trees_all_close(outcome(ours), outcome(flaxs), rtol=tolerance, atol=tolerance)


def test_the_backward_pass_finds_no_more_stored_than_products_need():
    model, params, tokens_BT = make(d_ff=48)

    def stored(params):
        return jax.vjp(lambda p: model.apply({"params": p}, tokens_BT), params)[1]

    arrays = jax.tree.leaves(jax.eval_shape(stored, params))
    hidden, norms = (sum(a.shape == (2, 2, 12, width) for a in arrays) for width in (48, 16))
    assert hidden == 2  # before and after the activation, of all layers
    assert norms == 5  # what the two norms and the projections of q, k, v, of the output and of the MLP are given
    assert not any(a.shape == (2, 2, 12, 1) for a in arrays), "means and variances are computed again"
