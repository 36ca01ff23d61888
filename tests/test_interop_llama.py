"""Llama, Qwen2 and Qwen3 against transformers itself: the same logits both ways, the same decoding, for drawn shapes."""

import json
import random

import jax
import numpy as np
import pytest
from test_interop_huggingface import assert_same_logits, opened, random_params

import spdf_jax as spdf
from spdf_jax.huggingface import load_model, save_model
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.model.generate import generate

pytestmark = [
    pytest.mark.slow,
    # Both libraries warn on import, about things of theirs.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]
DRAWN = range(20)


def drawn(seed):
    """A family and its options as transformers names them: every option takes each of its values in some of the draws."""
    draw = random.Random(seed)
    family = ("llama", "qwen2", "qwen3")[seed % 3]
    heads = draw.choice([1, 2, 4, 6])
    options = {
        "hidden_size": heads * draw.choice([4, 8]),
        "intermediate_size": draw.choice([20, 33]),
        "num_hidden_layers": draw.choice([1, 3]),
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice([n for n in (1, 2, 3, 4, 6) if heads % n == 0]),
        "vocab_size": draw.choice([61, 128]),
        "max_position_embeddings": 24,
        "rms_norm_eps": draw.choice([1e-6, 1e-2]),
        "tie_word_embeddings": draw.random() < 0.5,
        "rope_parameters": {"rope_type": "default", "rope_theta": draw.choice([10000.0, 50.0])},
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if family == "qwen3" or draw.random() < 0.5:
        options["head_dim"] = draw.choice([2, 6, 16])
    if family == "llama":
        biases = [(False, False), (True, False), (True, True)]
        options["attention_bias"], options["mlp_bias"] = draw.choice(biases)
    if family == "qwen3":
        options["attention_bias"] = draw.random() < 0.5
    if draw.random() < 0.5:
        options["rope_parameters"] |= {
            "rope_type": "llama3",
            "factor": draw.choice([2.0, 8.0]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": draw.choice([8, 64]),
        }
    return family, options


def their_model(transformers, torch, seed):
    """Random in every tensor: transformers starts biases at 0 and norms at 1."""
    family, options = drawn(seed)
    config = transformers.AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


def our_config(torch, transformers, folder, seed):
    their_model(transformers, torch, seed).save_pretrained(folder)
    return load_model(folder)[0]


def test_every_option_is_drawn():
    draws = [drawn(seed) for seed in DRAWN]
    assert {family for family, _ in draws} == {"llama", "qwen2", "qwen3"}
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias", "num_hidden_layers", "rms_norm_eps"):
        assert len({options[key] for _, options in draws if key in options}) == 2, key
    assert {options["rope_parameters"]["rope_type"] for _, options in draws} == {"default", "llama3"}
    assert {o["num_attention_heads"] > o["num_key_value_heads"] > 1 for _, o in draws} == {True, False}
    assert any(o.get("head_dim", 0) * o["num_attention_heads"] > o["hidden_size"] for _, o in draws)


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.nightly] * (n > 7)) for n in DRAWN])
def test_we_compute_their_logits_and_they_ours(tmp_path, torch, transformers, seed):
    model = their_model(transformers, torch, seed)
    model.save_pretrained(tmp_path / "theirs", **({"max_shard_size": "20KB"} if seed % 2 else {}))
    config, params = load_model(tmp_path / "theirs")
    assert_same_logits(config, params, model, torch)

    params = random_params(config, seed)
    masks = spdf.init_masks(jax.random.key(1), params, sparsity=0.5) if seed % 4 == 0 else None
    save_model(tmp_path / "ours", config, params, masks=masks)
    assert_same_logits(config, params, opened(transformers, tmp_path / "ours"), torch, masks)
    assert load_model(tmp_path / "ours")[0] == config
    content = json.loads((tmp_path / "ours/config.json").read_text())
    assert content["model_type"] == drawn(seed)[0] or seed % 3 == 0
    assert "sparsity_config" not in json.dumps(content)


@pytest.mark.parametrize(
    "changes", [{"mup_base_width": 8, "mup_density": 0.5, "mup_alpha": 2.0}, {"mup_base_width": 8, "qk_norm": True}]
)
def test_mupar_is_multiplied_in(tmp_path, torch, transformers, changes):
    config = spdf.GPTConfig(n_layer=2, n_head=4, n_kv_head=2, d_model=16, vocab_size=61, context=24, use_bias=False)
    llama = {"norm": "rms_norm", "positions": "rotary", "activation": "silu", "gated": True}
    config = spdf.GPTConfig(**(vars(config) | llama | changes))
    params = random_params(config)
    save_model(tmp_path / "ours", config, params)
    assert_same_logits(config, params, opened(transformers, tmp_path / "ours"), torch)


@pytest.mark.parametrize("seed", [1, *[pytest.param(n, marks=pytest.mark.nightly) for n in (2, 3)]])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"method": "greedy"}, {"num_beams": 1}),
        ({"method": "beam", "beam_size": 4, "length_penalty": 0.8}, {"num_beams": 4, "length_penalty": 0.8}),
    ],
)
def test_the_same_decoding(tmp_path, torch, transformers, seed, settings, options):
    torch.set_num_threads(1)
    model = their_model(transformers, torch, seed)
    model.save_pretrained(tmp_path)
    config, params = load_model(tmp_path)
    prompts = [np.random.default_rng(seed).integers(1, config.vocab_size, size=n).tolist() for n in (1, 5, 9)]
    decode = DecodeConfig(max_new_tokens=12, batch_size=2, **settings)
    found = generate(spdf.GPT(config), params, prompts, decode, end_tokens=[7])
    for prompt, mine in zip(prompts, found, strict=True):
        theirs = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=[7],
            pad_token_id=7,
            early_stopping=False,
            **options,
        )[0, len(prompt) :].tolist()
        assert mine.tokens == theirs[: theirs.index(7) if 7 in theirs else None]
