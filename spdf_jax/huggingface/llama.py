"""Llama, Qwen2 and Qwen3 as transformers' ``models/{llama,qwen2,qwen3}`` name and lay them out, and ours.

One tensor a layer where ours are stacked, linear weights (out, in), ours (in, out). The three differ in biases (Qwen2 has them
on queries, keys and values alone) and in norms of each head's queries and keys (Qwen3).
"""

import re
from pathlib import Path
from typing import Any

from spdf_jax.errors import InputError
from spdf_jax.huggingface.configs import check_computed, check_expressible_as, count, described, rate, truth
from spdf_jax.huggingface.folder import Place
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.flops import matrix_outputs

#: Modules of one layer that are matrices, and ours.
_MATRICES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_o",
    "mlp.gate_proj": "mlp_gate",
    "mlp.up_proj": "mlp_up",
    "mlp.down_proj": "mlp_down",
}
#: Those that are norms.
_NORMS = {"input_layernorm": "ln_1", "post_attention_layernorm": "ln_2"}
_HEAD_NORMS = {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}

#: Fields of `GPTConfig` and their keys in config.json.
_COUNTS = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "d_model": "hidden_size",
    "d_ff": "intermediate_size",
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
}
_RATES = {"layer_norm_eps": "rms_norm_eps", "init_std": "initializer_range"}
#: The same within ``rope_parameters``, of the type ``llama3``.
_STRETCH = {
    "rotary_factor": "factor",
    "rotary_low_factor": "low_freq_factor",
    "rotary_high_factor": "high_freq_factor",
    "rotary_context": "original_max_position_embeddings",
}
_LARGEST_THETA = 1e12

#: ``model_type`` and the model's class; what a config.json may leave out, with transformers' defaults.
TYPES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_DEFAULTS = {
    "num_key_value_heads": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": None,
}
#: What our GPT computes, which must be so.
_COMPUTED = {"hidden_act": "silu", "use_sliding_window": False}

PREFIX = "model."
#: Constants that older transformers saved among the weights.
LEFT_OUT = re.compile(r"^layers\.\d+\.self_attn\.rotary_emb\.inv_freq$")


def _type(config: GPTConfig) -> str:
    return "qwen3" if config.qk_norm else "qwen2" if config.attention_bias == "qkv" and not config.use_bias else "llama"


def check_expressible(config: GPTConfig) -> None:
    """Raises `InputError` for a model that none of the three can be."""
    needed: dict[str, Any] = {
        "norm": ("rms_norm",),
        "positions": ("rotary",),
        "activation": ("silu",),
        "gated": (True,),
    }
    needed |= {"mlp_norm": ("pre",), "dconv": (False,), "shared_qk": (False,)}
    if config.qk_norm:
        needed |= {"use_bias": (False,), "attention_bias": ("none", "all")}
    check_expressible_as(TYPES[_type(config)].removesuffix("ForCausalLM"), config, needed)
    if config.d_model % config.n_head:
        raise InputError(
            f"export: model.d_model {config.d_model} is not divisible by model.n_head {config.n_head}, which transformers "
            f"wants even of heads of their own width; export a model of such heads"
        )


def places(c: GPTConfig) -> dict[str, Place]:
    """Every tensor of the model that `c` describes."""
    d = c.d_model
    found = {"embed_tokens.weight": Place((c.vocab_size, d), ("wte/embedding",))}
    widths, inward = matrix_outputs(c), ("attn_o", "mlp_down")
    for i in range(c.n_layer):
        for module, name in _MATRICES.items():
            out, into = (d, widths[name]) if name in inward else (widths[name], d)
            found[f"layers.{i}.{module}.weight"] = Place((out, into), (f"blocks/{name}/kernel",), i, transposed=True)
            if c.has_bias(name):
                found[f"layers.{i}.{module}.bias"] = Place((out,), (f"blocks/{name}/bias",), i)
        for module, name in (_NORMS | (_HEAD_NORMS if c.qk_norm else {})).items():
            width = d if module in _NORMS else c.head_width
            found[f"layers.{i}.{module}.weight"] = Place((width,), (f"blocks/{name}/scale",), i)
    found["norm.weight"] = Place((d,), ("ln_f/scale",))
    head = {"lm_head.weight": Place((c.vocab_size, d), ("head/kernel",), transposed=True)}
    return found if c.tied_head else found | head


def config_json(config: GPTConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of the model."""
    c, kind = config, _type(config)
    content: dict[str, Any] = {"architectures": [TYPES[kind]], "model_type": kind, "dtype": dtype}
    content |= {key: getattr(c, field) for field, key in (_COUNTS | _RATES).items()}
    content |= {"intermediate_size": c.mlp_width, "num_key_value_heads": c.kv_heads, "head_dim": c.head_width}
    content |= {"hidden_act": "silu", "tie_word_embeddings": c.tied_head, "attention_dropout": 0.0}
    if kind != "qwen2":
        content["attention_bias"] = c.has_bias("attn_q")
    if kind == "llama":
        content["mlp_bias"] = c.use_bias
    stretch = {"rope_type": "llama3"} | {key: getattr(c, field) for field, key in _STRETCH.items()}
    stretch = stretch if c.rotary_factor > 1 else {"rope_type": "default"}
    # Twice: transformers 5 reads the first, older readers the others.
    return content | {
        "rope_parameters": stretch | {"rope_theta": c.rotary_theta},
        "rope_theta": c.rotary_theta,
        "rope_scaling": stretch if c.rotary_factor > 1 else None,
    }


def read_config(path: Path, content: dict[str, Any]) -> GPTConfig:
    """The model that `content` of the config.json at `path` describes, if our GPT is one."""
    kind = content["model_type"]
    own = {"head_dim": 128, "num_key_value_heads": 32} if kind == "qwen3" else {}
    own = {"num_key_value_heads": 32} if kind == "qwen2" else own
    content = _DEFAULTS | own | _COMPUTED | content
    check_computed(path, content, _COMPUTED)
    layers = content.get("layer_types")
    if layers is not None and (not isinstance(layers, list) or any(layer != "full_attention" for layer in layers)):
        raise InputError(
            f"{path}: layer_types has others than 'full_attention', which cannot be read; give such a model"
        )
    fields: dict[str, Any] = {field: count(path, key, content.get(key)) for field, key in _COUNTS.items()}
    fields |= {field: rate(path, key, content[key]) for field, key in _RATES.items()}
    fields |= _heads(path, content, fields) | _biases(path, kind, content) | _rotary(path, content)
    fields["tied_head"] = truth(path, "tie_word_embeddings", content["tie_word_embeddings"])
    fields |= {
        "norm": "rms_norm",
        "positions": "rotary",
        "activation": "silu",
        "gated": True,
        "qk_norm": kind == "qwen3",
    }
    return described(path, fields)


def _heads(path: Path, content: dict[str, Any], fields: dict[str, Any]) -> dict[str, int]:
    """Those fields that differ from what 0 stands for."""
    found = {}
    for field, key, plain in (
        ("n_kv_head", "num_key_value_heads", fields["n_head"]),
        ("d_head", "head_dim", fields["d_model"] / fields["n_head"]),
    ):
        value = plain if content[key] is None else count(path, key, content[key])
        found[field] = 0 if value == plain else value
    return found


def _biases(path: Path, kind: str, content: dict[str, Any]) -> dict[str, Any]:
    attention, mlp = (truth(path, key, content[key]) for key in ("attention_bias", "mlp_bias"))
    if kind == "qwen2":
        return {"use_bias": False, "attention_bias": "qkv"}
    if kind == "llama" and mlp:
        if not attention:
            raise InputError(
                f"{path}: mlp_bias is True without attention_bias, which cannot be read; give another model"
            )
        return {"use_bias": True}
    return {"use_bias": False, "attention_bias": "all" if attention else "none"}


def _rotary(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """From ``rope_parameters``, or from ``rope_theta`` and ``rope_scaling`` of before transformers 5."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters is {rope!r}; it must be an object")
    rope = {"rope_theta": content.get("rope_theta") or 10000.0} | rope
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{path}: rope_type is {kind!r}; give a model with 'default' or 'llama3'")
    if rope.get("partial_rotary_factor", content.get("partial_rotary_factor") or 1.0) != 1.0:
        raise InputError(f"{path}: partial_rotary_factor is not 1, which cannot be read; give such a model")
    fields: dict[str, Any] = {"rotary_theta": rate(path, "rope_theta", rope["rope_theta"], _LARGEST_THETA)}
    if kind == "llama3":
        rope = {"original_max_position_embeddings": content.get("max_position_embeddings")} | rope
        fields |= {field: rate(path, key, rope.get(key), _LARGEST_THETA) for field, key in _STRETCH.items()}
        fields["rotary_context"] = count(path, _STRETCH["rotary_context"], rope[_STRETCH["rotary_context"]])
    return fields
