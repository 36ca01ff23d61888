"""GPT-2 as transformers' ``models/gpt2/modeling_gpt2.py`` names and lays it out, and ours: one for the other.

One tensor a layer where ours are stacked, queries, keys and values side by side in ``c_attn``, linear weights (in, out) as
ours; only an untied head is (out, in).
"""

import re
from pathlib import Path
from typing import Any

from spdf_jax.errors import InputError
from spdf_jax.huggingface.configs import check_computed, check_expressible_as, count, described, rate, truth
from spdf_jax.huggingface.folder import Place
from spdf_jax.model.config import GPTConfig

#: Modules of one GPT-2 layer, and ours whose outputs stand side by side in them.
_MODULES = {
    "ln_1": ("ln_1",),
    "attn.c_attn": ("attn_q", "attn_k", "attn_v"),
    "attn.c_proj": ("attn_o",),
    "ln_2": ("ln_2",),
    "mlp.c_fc": ("mlp_up",),
    "mlp.c_proj": ("mlp_down",),
}

_KINDS = ("weight", "bias")

#: Fields of `GPTConfig` and their keys in config.json.
_COUNTS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_model": "n_embd",
    "vocab_size": "vocab_size",
    "context": "n_positions",
}

_RATES = {"dropout": "resid_pdrop", "layer_norm_eps": "layer_norm_epsilon", "init_std": "initializer_range"}

#: Transformers' names for our activations: the first is written, all are read.
ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "gelu_exact": ("gelu", "gelu_python"),
}

#: What a config.json may leave out, with transformers' defaults, and what our GPT computes, which must be so.
_DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}

_COMPUTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}  # reorder_and_upcast_attn may be either: it asks for a float32 softmax, and ours always is

#: Of every name but the head's, in a file; a file without it is read too.
PREFIX = "transformer."
TYPES = ("gpt2",)
#: Constants that older transformers saved among the weights.
LEFT_OUT = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")


def check_expressible(config: GPTConfig) -> None:
    """Raises `InputError` for a model that GPT-2 cannot be."""
    c, plain = config, GPTConfig()
    same = ("dconv", "shared_qk", "mlp_norm", "norm", "positions", "qk_norm", "gated")
    needed = {name: (getattr(plain, name),) for name in same} | {"activation": tuple(ACTIVATIONS)}
    check_expressible_as("GPT-2", c, needed | {"n_kv_head": (0, c.n_head), "d_head": (0, c.d_model / c.n_head)})


def _leaf(module: str, kind: str) -> str:
    """Our name of a module's ``weight`` or ``bias``."""
    if kind == "bias":
        return "bias"
    return "scale" if module.startswith("ln_") else "kernel"


def places(c: GPTConfig) -> dict[str, Place]:
    """Every tensor of the GPT-2 that `c` describes."""
    d, f = c.d_model, c.mlp_width
    weights = dict(zip(_MODULES, [(d,), (d, 3 * d), (d, d), (d,), (d, f), (f, d)], strict=True))
    found = {
        f"{n}.weight": Place((rows, d), (f"{n}/embedding",)) for n, rows in (("wte", c.vocab_size), ("wpe", c.context))
    }
    for i in range(c.n_layer):
        for module, ours in _MODULES.items():
            for kind, shape in zip(_KINDS, (weights[module], weights[module][-1:]), strict=True):
                leaves = tuple(f"blocks/{name}/{_leaf(module, kind)}" for name in ours)
                found[f"h.{i}.{module}.{kind}"] = Place(shape, leaves, i)
    found |= {f"ln_f.{kind}": Place((d,), (f"ln_f/{_leaf('ln_f', kind)}",)) for kind in _KINDS}
    head = {"lm_head.weight": Place((c.vocab_size, d), ("head/kernel",), transposed=True)}
    return found if c.tied_head else found | head


def config_json(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of the model."""
    content: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": dtype}
    content |= {key: getattr(config, field) for field, key in (_COUNTS | _RATES).items()}
    content |= {
        "n_ctx": config.context,
        "n_inner": config.d_ff or None,
    }  # n_ctx: of older readers, llama.cpp among them
    content |= {"activation_function": ACTIVATIONS[config.activation][0], "tie_word_embeddings": config.tied_head}
    return content | {"embd_pdrop": config.dropout, "attn_pdrop": 0.0} | _COMPUTED


def read_config(path: Path, content: dict[str, Any]) -> GPTConfig:
    """The model that `content` of the config.json at `path` describes, if our GPT is one."""
    content = _DEFAULTS | _COMPUTED | content
    check_computed(path, content, _COMPUTED)
    fields: dict[str, Any] = {field: count(path, key, content.get(key)) for field, key in _COUNTS.items()}
    fields |= {field: rate(path, key, content[key]) for field, key in _RATES.items()}
    ours = {theirs: name for name, names in ACTIVATIONS.items() for theirs in names}
    activation = content["activation_function"]
    if not isinstance(activation, str) or activation not in ours:
        raise InputError(f"{path}: activation_function is {activation!r}; give a model with one of {', '.join(ours)}")
    fields["activation"] = ours[activation]
    fields["tied_head"] = truth(path, "tie_word_embeddings", content["tie_word_embeddings"])
    fields["d_ff"] = 0 if content["n_inner"] is None else count(path, "n_inner", content["n_inner"])
    return described(path, fields)
