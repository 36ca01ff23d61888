"""Primer: against a model written in NumPy, causal, decoded with a cache, counted, and its taps dense."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_flops import config as experiment
from test_model import in_steps
from tiny import drawn_params

import spdf_jax as spdf
from spdf_jax.huggingface import save_model
from spdf_jax.model.decoding import DecodeConfig, empty_cache
from spdf_jax.model.flops import parameter_count, step_flops
from spdf_jax.model.generate import generate
from spdf_jax.model.mupar import mup_multipliers
from spdf_jax.model.primer import DConv
from spdf_jax.optim import _decayed
from spdf_jax.sharding import MeshConfig, batch_sharding, make_mesh, parameter_shardings
from spdf_jax.training.phases import make_plan, total_cost
from spdf_jax.training.state import abstract_params
from spdf_jax.tree import named_leaves

PLAIN = spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=13, context=12, init_std=0.3)
EZ = dataclasses.replace(PLAIN, activation="squared_relu", dconv=True)
FULL = dataclasses.replace(EZ, shared_qk=True, mlp_norm="post")
SLOW = pytest.mark.slow
BOTH = pytest.mark.parametrize("config", [EZ, FULL], ids=["ez", "full"])
EITHER = {  # where one says all, the other is slow
    "ez": pytest.mark.parametrize("config", [EZ, pytest.param(FULL, marks=SLOW)], ids=["ez", "full"]),
    "full": pytest.mark.parametrize("config", [pytest.param(EZ, marks=SLOW), FULL], ids=["ez", "full"]),
}
OPTIONS = {
    "plain": PLAIN,
    "ez": EZ,
    "full": FULL,
    "shared": dataclasses.replace(PLAIN, shared_qk=True),
    "mixed": dataclasses.replace(PLAIN, dconv=True, mlp_norm="post", use_bias=False, tied_head=False),
}


@cache
def make(config, batch=2):
    """A model whose every parameter is drawn, taps, biases and norms too."""
    tokens_BT = jax.random.randint(jax.random.key(1), (batch, config.context), 0, config.vocab_size)
    rng = np.random.default_rng(0)
    params = jax.device_get(drawn_params(config))
    params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.1, leaf.shape).astype("float32"), params)
    return spdf.GPT(config), jax.device_put(params), tokens_BT


@partial(jax.jit, static_argnums=0)
def whole(model, params, tokens_BT):
    """Logits without a cache, in one compiled call."""
    return model.apply({"params": params}, tokens_BT)


def numpy_taps(x_TD, taps_3D):
    """Channel by channel: all outputs of the full convolution that are not ahead of the input."""
    columns = [np.convolve(x, taps)[: len(x)] for x, taps in zip(x_TD.T, taps_3D.T, strict=True)]
    return np.stack(columns, 1)


def numpy_norm(x_TD, p, eps):
    """As the paper writes Primer's; that it is layer norm is what the comparison shows."""
    centred = x_TD - x_TD.mean(-1, keepdims=True)
    variance = (x_TD * centred).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * p["scale"] + p.get("bias", 0)


def numpy_linear(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def numpy_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_attention(c, x_TD, p):
    T, K = len(x_TD), c.d_model // c.n_head
    k = numpy_linear(x_TD, p["attn_k"])
    v = numpy_linear(x_TD, p["attn_v"])
    if c.dconv:
        k, v = numpy_taps(k, p["dconv_k"]["taps"]), numpy_taps(v, p["dconv_v"]["taps"])
    q = numpy_linear(k if c.shared_qk else x_TD, p["attn_q"])
    if c.dconv and not c.shared_qk:
        q = numpy_taps(q, p["dconv_q"]["taps"])
    heads = []
    for h in range(c.n_head):
        one = slice(h * K, (h + 1) * K)
        scores = q[:, one] @ k[:, one].T / np.sqrt(K)
        scores[np.triu_indices(T, 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, one])
    return numpy_linear(np.concatenate(heads, 1), p["attn_o"])


def numpy_model(c, params, tokens_T):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x_TD = params["wte"]["embedding"][tokens_T] + params["wpe"]["embedding"][: len(tokens_T)]
    for i in range(c.n_layer):
        p = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        x_TD = x_TD + numpy_attention(c, numpy_norm(x_TD, p["ln_1"], c.layer_norm_eps), p)
        h_TD = numpy_norm(x_TD, p["ln_2"], c.layer_norm_eps) if c.mlp_norm == "pre" else x_TD
        h_TF = numpy_linear(h_TD, p["mlp_up"])
        h_TF = np.maximum(h_TF, 0) ** 2 if c.activation == "squared_relu" else numpy_gelu(h_TF)
        h_TD = numpy_linear(h_TF, p["mlp_down"])
        x_TD = x_TD + (numpy_norm(h_TD, p["ln_2"], c.layer_norm_eps) if c.mlp_norm == "post" else h_TD)
    x_TD = numpy_norm(x_TD, params["ln_f"], c.layer_norm_eps)
    return x_TD @ (params["wte"]["embedding"].T if c.tied_head else params["head"]["kernel"])


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=() if name in ("full", "mixed") else SLOW)
        for name, config in OPTIONS.items()
    ],
)
def test_logits_equal_those_of_a_model_in_numpy(config):
    model, params, tokens_BT = make(config)
    logits_BTV = whole(model, params, tokens_BT)
    for tokens_T, logits_TV in zip(np.asarray(tokens_BT), logits_BTV, strict=True):
        np.testing.assert_allclose(logits_TV, numpy_model(config, params, tokens_T), rtol=1e-4, atol=1e-4)


def test_taps_are_a_causal_convolution_of_each_channel():
    rng = np.random.default_rng(0)
    x_BTD, taps_3D = rng.normal(size=(3, 9, 5)), rng.normal(size=(3, 5))
    y_BTD = DConv("float32").apply({"params": {"taps": jnp.asarray(taps_3D)}}, jnp.asarray(x_BTD))
    for x_TD, y_TD in zip(x_BTD, y_BTD, strict=True):
        np.testing.assert_allclose(y_TD, numpy_taps(x_TD, taps_3D), atol=1e-5)


def test_taps_start_as_stated_and_are_those_of_the_options():
    for config, names in ((PLAIN, ""), (EZ, "qkv"), (FULL, "kv")):
        params = jax.jit(spdf.GPT(config).init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(params))  # would compile every step twice
        taps = {name: np.asarray(leaf) for name, leaf in named_leaves(params) if "dconv" in name}
        assert set(taps) == {f"blocks/dconv_{name}/taps" for name in names}
        for leaf in taps.values():
            expected_3 = np.array([0.5, 0.5 / 3, 0.5 / 3], np.float32)
            np.testing.assert_array_equal(leaf, np.broadcast_to(expected_3[None, :, None], (2, 3, 16)))


@EITHER["full"]
def test_no_logit_depends_on_a_later_token(config):
    model, params, tokens_BT = make(config, batch=1)

    def logits(wpe_TD):
        return model.apply({"params": params | {"wpe": {"embedding": wpe_TD}}}, tokens_BT)[0].sum(-1)

    reach_TT = np.abs(jax.jit(jax.jacobian(logits))(params["wpe"]["embedding"])).sum(-1) > 0
    np.testing.assert_array_equal(reach_TT, np.tri(12, dtype=bool))


@EITHER["ez"]
def test_nothing_leaks_from_a_packed_document_into_the_next(config):
    # Every position has a token of its own, so that the gradient by the embedding tells them apart.
    model, params, _ = make(dataclasses.replace(config, vocab_size=24, tied_head=False))
    tokens_BT = jnp.arange(24).reshape(2, 12)
    segments_BT = jnp.array([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1], [3, 3, 8, 5, 5, 5, 5, 5, 5, 5, 5, 2]])

    def logits(wte_VD):
        return model.apply({"params": params | {"wte": {"embedding": wte_VD}}}, tokens_BT, segments_BT=segments_BT).sum(
            -1
        )

    reach_BTV = np.abs(jax.jit(jax.jacobian(logits))(params["wte"]["embedding"])).sum(-1) > 0
    expected_BTV = np.zeros((2, 12, 24), bool)
    for b, segments_T in enumerate(np.asarray(segments_BT)):
        same_TT = segments_T[:, None] == segments_T
        expected_BTV[b, :, 12 * b : 12 * (b + 1)] = np.tri(12, dtype=bool) & same_TT
    np.testing.assert_array_equal(reach_BTV, expected_BTV)


def test_taps_of_a_packed_document_are_those_of_the_document_alone():
    rng = np.random.default_rng(1)
    x_BTD = jnp.asarray(rng.normal(size=(1, 8, 4)), jnp.float32)
    params = {"taps": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)}
    packed = DConv("float32").apply({"params": params}, x_BTD, None, jnp.array([[0, 0, 0, 1, 2, 2, 2, 2]]))
    alone = [DConv("float32").apply({"params": params}, x_BTD[:, a:b]) for a, b in ((0, 3), (3, 4), (4, 8))]
    np.testing.assert_array_equal(packed, jnp.concatenate(alone, 1))


@EITHER["full"]
@pytest.mark.parametrize("lengths", [(3, 7), *(pytest.param(n, marks=SLOW) for n in [(1, 2), (12, 1)])])
def test_cached_logits_equal_those_of_the_whole_sequence(config, lengths):
    model, params, tokens_BT = make(config)
    whole_BTV = whole(model, params, tokens_BT)
    np.testing.assert_allclose(in_steps(model, params, tokens_BT, lengths, length=12), whole_BTV, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_the_cache_goes_on_over_calls_of_any_length():
    model, params, tokens_BT = make(EZ)
    state, parts = {"cache": empty_cache(EZ, 2, 12)}, []

    @jax.jit
    def call(state, tokens_BT, positions_BT):
        return model.apply({"params": params} | state, tokens_BT, positions_BT=positions_BT, mutable=["cache"])

    for start, stop in ((0, 1), (1, 5), (5, 9), (9, 10), (10, 11), (11, 12)):
        positions_BT = jnp.broadcast_to(jnp.arange(start, stop)[None], (2, stop - start))
        part, state = call(state, tokens_BT[:, start:stop], positions_BT)
        parts.append(part)
    whole_BTV = whole(model, params, tokens_BT)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole_BTV, atol=1e-5, rtol=1e-5)


@pytest.mark.slow  # beams are decoded quickly
@BOTH
def test_greedy_decoding_is_the_argmax_loop_of_the_plain_model(config):
    model, params, _ = make(config)
    plain = jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT))
    prompts = [[4], [1, 2], [3, 1, 4], [7, 7, 5, 0, 2, 11, 6]]
    found = generate(model, params, prompts, DecodeConfig(max_new_tokens=5), end_tokens=[])
    for prompt, generation in zip(prompts, found, strict=True):
        row = list(prompt)
        for _ in range(5):
            padded_BT = np.array([[*row, *[0] * (12 - len(row))]])
            row.append(int(plain(padded_BT)[0, len(row) - 1].argmax()))
        assert generation.tokens == row[len(prompt) :]


@EITHER["full"]
def test_beams_take_their_parents_taps_along(config):
    model, params, _ = make(config)
    prompts = np.random.default_rng(0).integers(0, 13, (12, 5))
    settings = DecodeConfig(method="beam", beam_size=3, max_new_tokens=7)
    found = generate(model, params, prompts.tolist(), settings, end_tokens=[])
    rows_BT = np.array([[*prompt, *generation.tokens] for prompt, generation in zip(prompts, found, strict=True)])
    log_probs_BTV = np.asarray(jax.nn.log_softmax(whole(model, params, rows_BT)))
    chosen_BT = np.take_along_axis(log_probs_BTV[:, 4:-1], rows_BT[:, 5:, None], -1)[..., 0]
    np.testing.assert_allclose([g.log_probability for g in found], chosen_BT.sum(1), rtol=1e-5)


@EITHER["full"]
def test_layouts_over_devices_give_the_same_logits(config):
    model, params, tokens_BT = make(config, batch=4)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    laid_out = jax.device_put(params, parameter_shardings(mesh, params))
    tokens = jax.device_put(tokens_BT, batch_sharding(mesh, 2))
    np.testing.assert_allclose(whole(model, laid_out, tokens), whole(model, params, tokens_BT), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS)
def test_parameter_count_is_that_of_the_model(config):
    sizes = {name: leaf.size for name, leaf in named_leaves(abstract_params(spdf.GPT(config)))}
    assert sum(sizes.values()) == parameter_count(config)


@pytest.mark.parametrize(("config", "convolutions"), [(EZ, 3), (FULL, 2)])
def test_every_tap_is_one_multiplication_and_one_addition_a_token_forward_and_two_backward(config, convolutions):
    taps = 12 * 3 * 2 * (3 * convolutions) * 16 * 2  # tokens x passes x FLOPs x taps x channels x layers
    assert spdf.train_flops(config) - spdf.train_flops(PLAIN) == taps
    assert spdf.train_flops(config, sparsity=0.9) - spdf.train_flops(PLAIN, sparsity=0.9) == pytest.approx(taps)
    of_a_step = {"seq_len": 12, "sequences": 5, "active": {"blocks/mlp_up/kernel": 100}}
    assert step_flops(config, **of_a_step) - step_flops(PLAIN, **of_a_step) == 5 * taps


def test_projections_are_sparse_and_taps_are_neither_sparse_nor_decayed_nor_scaled():
    config = dataclasses.replace(EZ, mup_base_width=8, mup_density=0.25)
    _, params, _ = make(config)
    masks = spdf.init_masks(jax.random.key(2), params, sparsity=0.75)
    multipliers = mup_multipliers(config, params)
    for name in "qkv":
        assert int(masks["blocks"][f"attn_{name}"]["kernel"].sum()) == 2 * 16 * 16 // 4
        assert masks["blocks"][f"dconv_{name}"]["taps"].shape == ()
        assert not _decayed(params)["blocks"][f"dconv_{name}"]["taps"]
        assert multipliers["blocks"][f"attn_{name}"]["kernel"] == 2.0
        assert multipliers["blocks"][f"dconv_{name}"]["taps"] == 1.0
    masked = spdf.apply_masks(params, masks)
    np.testing.assert_array_equal(masked["blocks"]["dconv_q"]["taps"], params["blocks"]["dconv_q"]["taps"])


def test_bfloat16_computes_in_it_and_keeps_float32_taps():
    model, params, tokens_BT = make(dataclasses.replace(EZ, init_std=0.02))
    half = spdf.GPT(dataclasses.replace(model.config, dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract_params(half))} == {"float32"}
    logits_BTV = whole(half, params, tokens_BT)
    assert logits_BTV.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits_BTV.astype(jnp.float32), whole(model, params, tokens_BT), atol=0.06, rtol=0.05)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(empty_cache(half.config, 1, 4))} == {"bfloat16"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "squared_relu"}, r"model\.activation 'squared_relu' cannot .* only model\.activation 'gelu'"),
        ({"dconv": True}, r"model\.dconv True cannot .* only model\.dconv False"),
        ({"shared_qk": True, "mlp_norm": "post"}, r"model\.shared_qk True, model\.mlp_norm 'post' cannot"),
    ],
)
def test_gpt2_cannot_express_any_part_of_primer(changes, message, tmp_path):
    config = dataclasses.replace(PLAIN, **changes)
    with pytest.raises(spdf.InputError, match=message):
        save_model(tmp_path / "out", config, abstract_params(spdf.GPT(config)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("variant", ["mini", "full"])
def test_the_study_compares_equal_flops(variant):
    sweep = experiment("primer_study", variant)
    flops = {name: total_cost(make_plan(run)).train_flops for name, run in sweep.cells.items()}
    assert max(flops.values()) / min(flops.values()) < 1.01
    assert len({run.seed for run in sweep.cells.values()}) == 3
    assert len(flops) == {"mini": 6, "full": 9}[variant]
