"""Places inside a layer, sinks and bigrams: logits of the public inference code, what is kept, seen and switched off."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import drawn_params

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.huggingface import load_model, save_model
from spdf_jax.model.decoding import empty_cache
from spdf_jax.model.flops import parameter_count
from spdf_jax.model.places import PLACES, abs_top_k, place_widths
from spdf_jax.ops.attention_patterns import pattern_mask
from spdf_jax.ops.attention_sink import attention_with_sink

RECORDED = Path(__file__).parent / "recorded" / "circuit_sparsity.npz"
NAMES = ["plain", "no bias", "neurons", "everywhere", "residual", "sink", "bigram", "all"]
SMALL = spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, d_head=6, vocab_size=11, context=8, norm="rms_norm")
TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 0, 11)


def public_folder(name, folder):
    """A model that ``recorded/circuit_sparsity.py`` recorded, as files; and its tokens and logits."""
    with np.load(RECORDED) as file:
        found = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    config, tokens, logits = (found.pop(key) for key in ("config", "tokens", "logits"))
    (folder / "beeg_config.json").write_bytes(config.tobytes())
    save_file({key: value.astype(np.float32) / 64 for key, value in found.items()}, folder / "model.safetensors")
    return tokens.astype(np.int32), logits


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_public_code(name, tmp_path):
    tokens, logits = public_folder(name, tmp_path)
    config, params = load_model(tmp_path)
    assert parameter_count(config) == sum(leaf.size for leaf in jax.tree.leaves(params))
    np.testing.assert_allclose(spdf.GPT(config).apply({"params": params}, tokens), logits, atol=1e-4)


def test_a_folder_of_the_public_code_that_cannot_be_read(tmp_path):
    public_folder("all", tmp_path)
    said = json.loads((tmp_path / "beeg_config.json").read_text())
    for change, match in {
        "residual_activation_type": r"residual_activation_type is 'relu'; only 'identity' can be read",
        "d_pos_emb": r"d_pos_emb is 'relu'; only None can be read",
        "activation_type": r"activation_type is 'swish'",
        "n_expert": r"n_expert are unknown here",
        "afrac_loctypes": r"'attn_inn' is not one of .*; did you mean 'attn_in'",
        "afrac": r"attn_in=0\.001 keeps none of its 16 channels",
    }.items():
        value = {"activation_type": "swish", "afrac_loctypes": "attn_inn", "afrac": 0.001}.get(change, "relu")
        (tmp_path / "beeg_config.json").write_text(json.dumps(said | {change: value}))
        with pytest.raises(InputError, match=match):
            load_model(tmp_path)
    (tmp_path / "beeg_config.json").write_text(json.dumps(said))
    (tmp_path / "model.safetensors").rename(tmp_path / "final_model.pt")
    with pytest.raises(
        InputError, match=r"final_model\.pt only, a pickle, .* never opened; .*save_file\(.*weights_only=True"
    ):
        load_model(tmp_path)


def test_a_bias_on_the_logits_is_refused_unless_it_is_nothing(tmp_path):
    public_folder("plain", tmp_path)
    with np.load(RECORDED) as file:
        tensors = {k[6:]: file[k].astype(np.float32) for k in file.files if k.startswith("plain/") and "." in k}
    save_file(tensors | {"final_logits_bias": np.zeros(40, np.float32)}, tmp_path / "model.safetensors")
    load_model(tmp_path)
    save_file(tensors | {"final_logits_bias": np.ones(40, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="final_logits_bias is not 0"):
        load_model(tmp_path)


def test_exactly_k_are_kept_and_the_others_get_no_gradient():
    x = jnp.round(jax.random.normal(jax.random.key(0), (2, 3, 16)) * 2) / 2  # ties
    kept = abs_top_k(x, 4)
    order = np.argsort(-np.abs(np.asarray(x)), axis=-1, kind="stable")[..., :4]
    expected = np.zeros(x.shape, bool)
    np.put_along_axis(expected, order, values=True, axis=-1)
    np.testing.assert_array_equal(kept, np.where(expected, x, 0))
    gradient = jax.grad(lambda x: abs_top_k(x, 4).sum())(x)
    np.testing.assert_array_equal(gradient, expected)
    assert abs_top_k(x.astype(jnp.bfloat16), 4).dtype == jnp.bfloat16


@pytest.mark.parametrize(("pattern", "heads"), [("causal", 2), ("local_strided", 2), ("fixed", 1)])
def test_a_sink_is_one_more_slot_of_the_softmax(pattern, heads):
    keys = jax.random.split(jax.random.key(0), 4)
    q, dout = (jax.random.normal(key, (2, 9, 2, 4)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, 9, heads, 4)) for key in keys[2:])
    sink, segments = jnp.array([0.5, -1.0]), jnp.array([[0] * 4 + [1] * 5, [0] * 9])
    sees = pattern_mask(pattern, 9, 3)[None, None] & (segments[:, None, :, None] == segments[:, None, None])

    def plain(q, k, v, sink):
        k, v = (jnp.repeat(x, 2 // heads, 2) for x in (k, v))
        scores = jnp.where(sees, jnp.einsum("bthd,bshd->bhts", q, k) / 2, -jnp.inf)
        slot = jnp.broadcast_to(sink[None, :, None, None], (2, 2, 9, 1))
        shares = jax.nn.softmax(jnp.concatenate([scores, slot], -1), -1)[..., :-1]
        return jnp.einsum("bhts,bshd->bthd", shares, v)

    def ours(q, k, v, sink):
        return attention_with_sink(q, k, v, sink, pattern=pattern, width=3, segments_BT=segments)

    for f, g in zip(*(jax.vjp(attend, q, k, v, sink) for attend in (plain, ours)), strict=True):
        expected, found = (f, g) if not callable(f) else (f(dout), g(dout))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), expected, found)


def test_decoding_with_a_sink_a_bigram_and_places_is_the_model():
    config = spdf.GPTConfig(
        **{**SMALL.__dict__, "attention_sink": True, "bigram": True, "activation_topk": "mlp_neuron=0.25,attn_k=0.5"}
    )
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(2), x.shape) / 4, drawn_params(config))
    model = spdf.GPT(config)
    whole, cache = model.apply({"params": params}, TOKENS), empty_cache(config, 2, 8)
    for start, end in ((0, 5), (5, 8)):
        positions = jnp.broadcast_to(jnp.arange(start, end)[None], (2, end - start))
        variables = {"params": params, "cache": cache}
        logits, new = model.apply(variables, TOKENS[:, start:end], positions_BT=positions, mutable=["cache"])
        cache = new["cache"]
        np.testing.assert_allclose(logits, whole[:, start:end], atol=1e-5)


def test_every_place_is_seen_and_every_channel_can_be_switched_off():
    config = spdf.GPTConfig(**{**SMALL.__dict__, "activation_topk": "mlp_neuron=0.25"})
    model, params = spdf.GPT(config), drawn_params(config)
    params = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(2), x.shape) / 4, params)
    widths = place_widths(config)
    on, mean = ({place: jnp.full((2, widths[place]), value) for place in PLACES} for value in (1.0, 0.7))

    def run(gate):
        circuit = {place: {"gate": gate[place], "mean": mean[place]} for place in gate}
        return model.apply({"params": params, "circuit": {"blocks": circuit}}, TOKENS, mutable=["places"])

    def changed(gate):
        return run(gate)[0].std()

    run, slopes = jax.jit(run), jax.jit(jax.grad(changed))
    plain = model.apply({"params": params}, TOKENS)
    logits, seen = model.apply({"params": params}, TOKENS, mutable=["places"])
    np.testing.assert_array_equal(logits, plain)
    seen = seen["places"]["blocks"]
    assert jax.tree.map(jnp.shape, seen) == {place: (2, 2, 8, widths[place]) for place in PLACES}
    assert ((seen["mlp_neuron"] != 0).sum(-1) == 8).all()
    logits, seen = run(on)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5)
    seen, slope = seen["places"]["blocks"], slopes(on)
    for place in PLACES:
        switched_logits, switched = run(on | {place: on[place].at[1, 3].set(0)})
        switched = switched["places"]["blocks"][place]
        np.testing.assert_allclose(switched[1, ..., 3], 0.7)
        np.testing.assert_array_equal(switched[1, ..., :3], seen[place][1, ..., :3])
        np.testing.assert_array_equal(switched[0], seen[place][0])
        assert bool((switched_logits != logits).any())
        assert bool((slope[place] != 0).any())


@pytest.mark.parametrize(
    ("said", "match"),
    [
        ("mlp_neurons=0.25", r"'mlp_neurons' is not one of attn_in, .*; did you mean 'mlp_neuron'; write each place"),
        ("mlp_neuron", r"'mlp_neuron' has no share above 0 and at most 1"),
        ("mlp_neuron=nan", r"has no share above 0"),
        ("mlp_neuron=1.5", r"has no share above 0"),
        ("mlp_in=0.5,mlp_in=0.5", r"names 'mlp_in' twice"),
        ("mlp_in=0.5,", r"'' is not one of"),
        ("mlp_in=0.1", r"mlp_in=0\.1 keeps none of its 8 channels; give it a larger share"),
    ],
)
def test_what_cannot_be_kept_is_refused(said, match):
    with pytest.raises(InputError, match=rf"model\.activation_topk.*{match}"):
        spdf.GPTConfig(**{**SMALL.__dict__, "activation_topk": said})


@pytest.mark.parametrize("field", [{"activation_topk": "mlp_in=0.5"}, {"attention_sink": True}, {"bigram": True}])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_a_folder_of_transformers_cannot_say_it(field, norm, tmp_path):
    rotary = {"positions": "rotary", "activation": "silu", "gated": True} if norm == "rms_norm" else {"d_head": 4}
    config = spdf.GPTConfig(**{**SMALL.__dict__, "norm": norm, **rotary, **field})
    with pytest.raises(InputError, match=rf"export: model\.{next(iter(field))}"):
        save_model(tmp_path / "folder", config, drawn_params(config))
