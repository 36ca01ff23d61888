"""The same weights in Hugging Face transformers decode to the same tokens."""

import jax
import numpy as np
import pytest

import spdf_jax as spdf
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.model.generate import generate

pytestmark = [
    pytest.mark.slow,
    # Both libraries warn on import, about things of theirs.
    pytest.mark.filterwarnings("default::DeprecationWarning"),
    pytest.mark.filterwarnings("default::FutureWarning"),
]

CONFIG = spdf.GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=61, context=64, init_std=0.25)
END_TOKENS = [7, 20, 33]
MAX_NEW = 24


def ours(seed):
    model = spdf.GPT(CONFIG)
    params = model.init(jax.random.key(seed), np.zeros((1, 4), int))["params"]
    rng = np.random.default_rng(seed)
    lengths = 1, 3, 8, 13, 36, 40  # two when padded
    prompts = [rng.integers(0, CONFIG.vocab_size, size=n).tolist() for n in lengths]
    return model, params, prompts


def theirs(params):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.set_num_threads(1)  # the cores have other tests to run, and threads of a model this small wait for each other
    c = CONFIG
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.context, n_embd=c.d_model, n_layer=c.n_layer, n_head=c.n_head
        )
    ).eval()
    named = {
        "wte.weight": params["wte"]["embedding"],
        "wpe.weight": params["wpe"]["embedding"],
        "ln_f.weight": params["ln_f"]["scale"],
        "ln_f.bias": params["ln_f"]["bias"],
    }
    blocks = params["blocks"]
    for i in range(c.n_layer):
        for ln in ("ln_1", "ln_2"):
            named[f"h.{i}.{ln}.weight"] = blocks[ln]["scale"][i]
            named[f"h.{i}.{ln}.bias"] = blocks[ln]["bias"][i]
        for leaf, name in (("kernel", "weight"), ("bias", "bias")):
            named[f"h.{i}.attn.c_attn.{name}"] = np.concatenate([blocks[f"attn_{x}"][leaf][i] for x in "qkv"], -1)
            for me, other in (("attn_o", "attn.c_proj"), ("mlp_up", "mlp.c_fc"), ("mlp_down", "mlp.c_proj")):
                named[f"h.{i}.{other}.{name}"] = blocks[me][leaf][i]
    tensors = {f"transformer.{name}": torch.tensor(np.array(leaf)) for name, leaf in named.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied
    return model


def decode_theirs(model, prompt, **options):
    torch = pytest.importorskip("torch")
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=MAX_NEW,
        do_sample=False,
        eos_token_id=END_TOKENS,
        pad_token_id=END_TOKENS[0],
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    tokens = found.sequences[0, len(prompt) :].tolist()
    cut = next((i for i, token in enumerate(tokens) if token in END_TOKENS), len(tokens))
    score = float(found.sequences_scores[0]) if "sequences_scores" in found else None
    return tokens[:cut], score


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({"method": "greedy"}, {"num_beams": 1}),
        ({"method": "greedy", "no_repeat_ngram": 3}, {"num_beams": 1, "no_repeat_ngram_size": 3}),
        ({"method": "beam", "beam_size": 4, "length_penalty": 1.0}, {"num_beams": 4, "length_penalty": 1.0}),
        (
            {"method": "beam", "beam_size": 4, "length_penalty": 0.8, "no_repeat_ngram": 4},
            {"num_beams": 4, "length_penalty": 0.8, "no_repeat_ngram_size": 4},
        ),
        (
            {"method": "beam", "beam_size": 10, "length_penalty": 0.9, "no_repeat_ngram": 2},
            {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 2},
        ),
        (
            {"method": "beam", "beam_size": 3, "length_penalty": -1.0},  # favours short ones: stops early
            {"num_beams": 3, "length_penalty": -1.0},
        ),
        ({"method": "beam", "beam_size": 2, "length_penalty": 2.5}, {"num_beams": 2, "length_penalty": 2.5}),
    ],
)
def test_tokens_and_scores_equal_those_of_transformers(seed, settings, options):
    model, params, prompts = ours(seed)
    reference = theirs(params)
    config = DecodeConfig(max_new_tokens=MAX_NEW, batch_size=3, no_repeat_counts_prompt=True, **settings)
    found = generate(model, params, prompts, config, end_tokens=END_TOKENS)
    for prompt, mine in zip(prompts, found, strict=True):
        tokens, score = decode_theirs(reference, prompt, early_stopping=False, **options)
        assert mine.tokens == tokens
        if score is not None:
            assert mine.score == pytest.approx(score, rel=1e-5, abs=1e-4)


def test_the_comparison_sees_ends_and_repeats():
    """Some continuations end early and some at the limit, and the n-gram rule changes some."""
    lengths, changed = set(), 0
    for seed in (0, 1):
        model, params, prompts = ours(seed)
        greedy = {"method": "greedy", "max_new_tokens": MAX_NEW, "batch_size": 3, "no_repeat_counts_prompt": True}
        free, ruled = (
            generate(model, params, prompts, DecodeConfig(**greedy, no_repeat_ngram=n), end_tokens=END_TOKENS)
            for n in (0, 3)
        )
        lengths |= {len(g.tokens) for g in free}
        changed += sum(a.tokens != b.tokens for a, b in zip(free, ruled, strict=True))
    assert MAX_NEW in lengths
    assert len(lengths) >= 3
    assert changed >= 3
