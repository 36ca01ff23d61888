"""GPT-2 as transformers' ``models/gpt2/modeling_gpt2.py`` names and lays it out, and ours: one for the other.

One tensor a layer where ours are stacked, queries, keys and values side by side in ``c_attn``, linear weights (in, out) as
ours; only an untied head is (out, in).
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig, mup_scales
from spdf_jax.tree import named_leaves

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
#: Constants that older transformers saved among the weights.
CAUSAL_MASKS = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")


def check_expressible(config: GPTConfig) -> None:
    """Raises `InputError` for a model that GPT-2 cannot be."""
    plain = GPTConfig()
    other = [n for n in ("dconv", "shared_qk", "mlp_norm") if getattr(config, n) != getattr(plain, n)]
    other += ["activation"] if config.activation not in ACTIVATIONS else []
    if other:
        found, needed = (", ".join(f"model.{n} {getattr(c, n)!r}" for n in other) for c in (config, plain))
        raise InputError(f"export: {found} cannot be said in a GPT-2 folder, only {needed}; export a model trained so")


def _leaf(module: str, kind: str) -> str:
    """Our name of a module's ``weight`` or ``bias``."""
    if kind == "bias":
        return "bias"
    return "scale" if module.startswith("ln_") else "kernel"


def tensor_shapes(c: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the GPT-2 that `c` describes."""
    d, f = c.d_model, c.mlp_width
    weights = dict(zip(_MODULES, [(d,), (d, 3 * d), (d, d), (d,), (d, f), (f, d)], strict=True))
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (c.vocab_size, d), "wpe.weight": (c.context, d)}
    for i in range(c.n_layer):
        for module, shape in weights.items():
            shapes |= {f"h.{i}.{module}.weight": shape, f"h.{i}.{module}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    return shapes if c.tied_head else shapes | {"lm_head.weight": (c.vocab_size, d)}


def stored_name(name: str) -> str:
    """Of a tensor, in a file as transformers writes it."""
    return name if name.startswith("lm_head.") else PREFIX + name


def to_tensors(config: GPTConfig, params: Any) -> dict[str, np.ndarray]:
    """Our parameters by GPT-2's names."""
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(jax.device_get(params))}
    scales = mup_scales(config)
    for prefix, factor in (("blocks/attn_q/", scales.query), ("ln_f/", scales.logits)):
        leaves |= {name: leaf * np.float32(factor) for name, leaf in leaves.items() if name.startswith(prefix)}
    shapes, tensors = tensor_shapes(config), {}
    for name, leaf in (("wte", "wte/embedding"), ("wpe", "wpe/embedding"), ("ln_f", "ln_f/scale")):
        tensors[f"{name}.weight"] = leaves[leaf]
    tensors["ln_f.bias"] = leaves.get("ln_f/bias", np.zeros(config.d_model, np.float32))
    if not config.tied_head:
        tensors["lm_head.weight"] = leaves["head/kernel"].T
    for module, ours in _MODULES.items():
        for kind in _KINDS:
            names = [f"blocks/{name}/{_leaf(module, kind)}" for name in ours]
            if names[0] in leaves:
                stacked = np.concatenate([leaves[n] for n in names], axis=-1)
            else:
                stacked = np.zeros((config.n_layer, *shapes[f"h.0.{module}.bias"]), np.float32)
            tensors |= {f"h.{i}.{module}.{kind}": stacked[i] for i in range(config.n_layer)}
    return tensors


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
    for key, needed in ({"model_type": "gpt2"} | _COMPUTED).items():
        if content.get(key) != needed:
            raise InputError(f"{path}: {key} is {content.get(key)!r}; only {needed!r} can be read, give such a model")
    fields: dict[str, Any] = {field: _count(path, key, content.get(key)) for field, key in _COUNTS.items()}
    fields |= {field: _rate(path, key, content[key]) for field, key in _RATES.items()}
    ours = {theirs: name for name, names in ACTIVATIONS.items() for theirs in names}
    activation = content["activation_function"]
    if not isinstance(activation, str) or activation not in ours:
        raise InputError(f"{path}: activation_function is {activation!r}; give a model with one of {', '.join(ours)}")
    fields["activation"] = ours[activation]
    if not isinstance(content["tie_word_embeddings"], bool):
        raise InputError(f"{path}: tie_word_embeddings is {content['tie_word_embeddings']!r}; it must be true or false")
    fields["tied_head"] = content["tie_word_embeddings"]
    fields["d_ff"] = 0 if content["n_inner"] is None else _count(path, "n_inner", content["n_inner"])
    try:
        return GPTConfig(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _count(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:  # a bool is an int too
        raise InputError(f"{path}: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def _rate(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise InputError(f"{path}: {key} is {value!r}; it must be a number from 0 to 1")
    return float(value)


def to_params(config: GPTConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Our parameters from a reader of GPT-2's tensors."""
    params: dict[str, Any] = {name: {"embedding": jnp.asarray(read(f"{name}.weight"))} for name in ("wte", "wpe")}
    params["ln_f"] = {_leaf("ln_f", kind): jnp.asarray(read(f"ln_f.{kind}")) for kind in _KINDS}
    params["blocks"] = {name: {} for ours in _MODULES.values() for name in ours}
    for module, ours in _MODULES.items():
        for kind in _KINDS:
            stacked = np.stack([read(f"h.{i}.{module}.{kind}") for i in range(config.n_layer)])
            for name, part in zip(ours, np.split(stacked, len(ours), axis=-1), strict=True):
                params["blocks"][name][_leaf(module, kind)] = jnp.asarray(part)
    if not config.tied_head:
        params["head"] = {"kernel": jnp.asarray(read("lm_head.weight").T)}
    return params
