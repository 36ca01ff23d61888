"""Against transformers itself: the same logits both ways, the same ids, the same generated text, and no network."""

import dataclasses
import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import normalizers, pre_tokenizers

import spdf_jax as spdf
from spdf_jax.data.tokenizer import train_tokenizer
from spdf_jax.huggingface import gpt2, load_model, save_model
from spdf_jax.model import gpt as model_module

pytestmark = pytest.mark.slow

CONFIG = spdf.GPTConfig(n_layer=3, n_head=4, d_model=32, d_ff=80, vocab_size=300, context=24, dropout=0.1)
TEXTS = [
    "Sparse weights, dense weights; masks are data.",
    "  indented\n\tand naïve ünïcode 日本語 🙂 \r\n",
    "it's he 'll don ' t , .",
    "",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("a folder on this disk needs no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def random_params(config, seed=0):
    rng = np.random.default_rng(seed)
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = jax.eval_shape(spdf.GPT(config).init, jax.random.key(0), tokens_BT)["params"]
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def random_tokens(config):
    return np.random.default_rng(1).integers(0, config.vocab_size, (3, config.context))


def assert_same_logits(config, params, theirs, torch, masks=None):
    tokens_BT = random_tokens(config)
    masks = spdf.dense_masks(params) if masks is None else masks
    ours_BTV = np.asarray(spdf.forward(spdf.GPT(config), params, jnp.asarray(tokens_BT), masks=masks))
    with torch.no_grad():
        theirs_BTV = theirs.eval()(torch.tensor(tokens_BT)).logits.float().numpy()
    assert ours_BTV.std() > 0.1
    np.testing.assert_allclose(ours_BTV, theirs_BTV, atol=1e-4, rtol=0)


def opened(transformers, folder, **options):
    """The model, after checking that transformers found every tensor it wanted and no other."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert {key: list(names) for key, names in report.items() if names} == {}
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": False},
        {"use_bias": False},
        {"use_bias": False, "tied_head": False, "d_ff": 0},
        {"layer_norm_eps": 1e-2, "n_head": 1},
        {"mup_base_width": 8, "mup_density": 0.5, "mup_alpha": 2.0},
        {"activation": "gelu_exact"},
    ],
)
@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_transformers_computes_our_logits(tmp_path, torch, transformers, changes, sparsity):
    config = dataclasses.replace(CONFIG, **changes)
    params = random_params(config)
    masks = spdf.init_masks(jax.random.key(1), params, sparsity=sparsity) if sparsity else None
    save_model(tmp_path / "gpt2", config, params, masks=masks)
    assert_same_logits(config, params, opened(transformers, tmp_path / "gpt2"), torch, masks)


def their_model(transformers, torch, **changes):
    """Random in every tensor: transformers starts biases at 0 and norms at 1."""
    options = {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_inner": 80, "vocab_size": 300, "n_positions": 24}
    config = transformers.GPT2Config(**(options | {"bos_token_id": 0, "eos_token_id": 0} | changes))
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False}, {"n_inner": None}, {"n_head": 1}])
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}])
def test_we_compute_transformers_logits(tmp_path, torch, transformers, changes, options):
    model = their_model(transformers, torch, **changes)
    model.save_pretrained(tmp_path, **options)
    assert (tmp_path / "model.safetensors").exists() != bool(options)
    assert_same_logits(*load_model(tmp_path), model, torch)


@pytest.mark.parametrize("name", [name for names in gpt2.ACTIVATIONS.values() for name in names])
def test_every_activation_that_is_read_is_theirs(tmp_path, torch, transformers, name):
    model = their_model(transformers, torch, activation_function=name, n_layer=1, embd_pdrop=0.2)
    model.save_pretrained(tmp_path)
    config, params = load_model(tmp_path)
    assert config.activation == ("gelu_exact" if name in ("gelu", "gelu_python") else "gelu")
    assert_same_logits(config, params, model, torch)
    # The two forms are 5e-4 apart at most, which logits may hide.
    x = np.linspace(-5, 5, 1001, dtype=np.float32)
    theirs = model.transformer.h[0].mlp.act(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(model_module._ACTIVATIONS[config.activation](x), theirs, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_we_read_their_half_precision(tmp_path, torch, transformers, dtype):
    model = their_model(transformers, torch).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path)
    assert_same_logits(*load_model(tmp_path), model.float(), torch)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_they_read_our_half_precision(tmp_path, torch, transformers, dtype):
    save_model(tmp_path / "gpt2", CONFIG, random_params(CONFIG), dtype=dtype)
    model = opened(transformers, tmp_path / "gpt2", dtype="auto")
    assert model.dtype == getattr(torch, dtype)
    assert_same_logits(*load_model(tmp_path / "gpt2"), model.float(), torch)


def test_a_model_saved_without_its_head_has_no_prefix_and_loads(tmp_path, torch, transformers):
    model = their_model(transformers, torch)
    model.transformer.save_pretrained(tmp_path)
    assert_same_logits(*load_model(tmp_path), model, torch)


def test_their_config_comes_back_from_ours(tmp_path, torch, transformers):
    save_model(tmp_path / "ours", CONFIG, random_params(CONFIG), end_of_text_id=7)
    model = opened(transformers, tmp_path / "ours")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == 7
    model.save_pretrained(tmp_path / "theirs")
    config, params = load_model(tmp_path / "theirs")
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, random_params(CONFIG))


@pytest.mark.parametrize("of_its_own", ["", "prefix space", "normalizer"])
def test_auto_tokenizer_encodes_the_same_ids(tmp_path, transformers, of_its_own):
    tokenizer = train_tokenizer(TEXTS * 4, vocab_size=290, progress=False)
    if of_its_own == "prefix space":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif of_its_own == "normalizer":
        tokenizer.normalizer = normalizers.Lowercase()
    save_model(tmp_path / "gpt2", CONFIG, random_params(CONFIG), tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    for text in [*TEXTS, "one<|endoftext|>two"]:
        ids = tokenizer.encode(text).ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.eos_token) == (0, 0, "<|endoftext|>")
    assert theirs.model_max_length == CONFIG.context


def test_transformers_generates_what_our_model_says(tmp_path, torch, transformers):
    tokenizer = train_tokenizer(TEXTS * 4, vocab_size=290, progress=False)
    params = random_params(CONFIG)
    save_model(tmp_path / "gpt2", CONFIG, params, tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "gpt2")
    prompt = theirs("masks", return_tensors="pt")
    assert set(prompt) == {"input_ids", "attention_mask"}
    model = opened(transformers, tmp_path / "gpt2")
    generated = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    ids = prompt["input_ids"][0].tolist()
    for _ in range(8):
        logits_TV = spdf.GPT(CONFIG).apply({"params": params}, jnp.asarray([ids]))[0]
        ids.append(int(logits_TV[-1].argmax()))
        if ids[-1] == 0:
            break
    assert generated == ids
