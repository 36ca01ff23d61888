"""The weight-sparse transformers of Gao et al. 2025 as their authors' inference code names and lays them out, and ours.

Its folders hold ``beeg_config.json`` and the weights as a pickle, which is never opened: written once as ``model.safetensors``,
they are read. Linear weights are (out, in), queries, keys and values one below the other.

Source: ``openai/circuit_sparsity``, ``circuit_sparsity/inference/gpt.py``.
"""

import re
from pathlib import Path
from typing import Any

from spdf_jax.errors import InputError
from spdf_jax.huggingface.configs import check_computed, count, described, rate, truth
from spdf_jax.huggingface.folder import Place
from spdf_jax.model.config import GPTConfig

CONFIG_FILE = "beeg_config.json"
#: Modules of a layer, and ours whose outputs stand side by side in them.
_MODULES = {
    "attn.c_attn": ("attn_q", "attn_k", "attn_v"),
    "attn.c_proj": ("attn_o",),
    "mlp.c_fc": ("mlp_up",),
    "mlp.c_proj": ("mlp_down",),
}
_COUNTS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_model": "d_model",
    "vocab_size": "vocab_size",
    "context": "block_size",
}
_ACTIVATIONS = {"gelu": "gelu_exact", "relu": "relu"}
#: What a config may leave out, with the defaults of its authors' code.
_DEFAULTS = {
    "block_size": 1024,
    "vocab_size": 50304,
    "n_layer": 12,
    "n_head": 12,
    "d_model": 768,
    "d_head": None,
    "d_mlp": None,
    "dropout": 0.0,
    "bias": True,
    "ln_bias": True,
    "rms_norm": False,
    "activation_type": "gelu",
    "afrac": None,
    "afrac_loctypes": "attn_in,attn_out,mlp_in,mlp_out",
    "tied_unembed": True,
    "enable_bigram_table": False,
    "sink": False,
}
#: What our GPT computes, which must be so; and what changes no logit.
_COMPUTED = {"residual_activation_type": "identity", "d_pos_emb": None, "use_tied_aux_matrix": False}
_OTHERS = (
    *("tokenizer_name", "debug_nans", "grad_checkpointing", "learnable_bigram_table", "dropout_cat_pos_emb"),
    *("sinusoidal_cat_pos_emb", "enable_sparse_kernels", "flash"),
)
_EPSILON = {"rms_norm": 2.0**-23, "layer_norm": 1e-5}

PREFIX = "transformer."
LEFT_OUT = re.compile(r"^h\.\d+\.attn\.bias$")
#: A constant that its authors' code adds to the logits, where it is not 0.
LOGITS_BIAS = "final_logits_bias"


def read_config(path: Path, content: dict[str, Any]) -> GPTConfig:
    """The model that `content` of the config at `path` describes, if our GPT is one."""
    if "n_mlp" in content:
        content = {"d_mlp": content["n_mlp"], **{key: value for key, value in content.items() if key != "n_mlp"}}
    unknown = sorted(content.keys() - _DEFAULTS.keys() - _COMPUTED.keys() - set(_OTHERS))
    if unknown:
        raise InputError(f"{path}: {', '.join(unknown)} are unknown here; give a model of openai/circuit_sparsity")
    content = _DEFAULTS | _COMPUTED | content
    check_computed(path, content, _COMPUTED)
    fields: dict[str, Any] = {field: count(path, key, content[key]) for field, key in _COUNTS.items()}
    for field, key in {"d_head": "d_head", "d_ff": "d_mlp"}.items():
        fields[field] = 0 if content[key] is None else count(path, key, content[key])
    flags = {key: truth(path, key, content[key]) for key in ("bias", "ln_bias", "rms_norm", "tied_unembed", "sink")}
    norm = "rms_norm" if flags["rms_norm"] else "layer_norm"
    activation = content["activation_type"]
    if activation not in _ACTIVATIONS:
        raise InputError(
            f"{path}: activation_type is {activation!r}; give a model with one of {', '.join(_ACTIVATIONS)}"
        )
    fields |= {"norm": norm, "layer_norm_eps": _EPSILON[norm], "activation": _ACTIVATIONS[activation]}
    fields |= {"dropout": rate(path, "dropout", content["dropout"]), "attention_sink": flags["sink"]}
    # Of a model without some of its biases, those are zeros.
    fields |= {
        "use_bias": flags["bias"] or (flags["ln_bias"] and norm == "layer_norm"),
        "tied_head": flags["tied_unembed"],
    }
    fields["bigram"] = truth(path, "enable_bigram_table", content["enable_bigram_table"])
    if content["afrac"] is not None:
        share, places = rate(path, "afrac", content["afrac"]), content["afrac_loctypes"]
        if not isinstance(places, str):
            raise InputError(f"{path}: afrac_loctypes is {places!r}; it must be names such as 'attn_in,mlp_neuron'")
        fields["activation_topk"] = ",".join(f"{place}={share!r}" for place in places.split(","))
    return described(path, fields)


def absent(content: dict[str, Any], name: str) -> bool:
    """Whether a model of this config has no such tensor, which is zeros in ours: biases of one kind beside those of another."""
    kind = "ln_bias" if "ln_" in name else "bias"
    return name.endswith(".bias") and not content.get(kind, True)


def places(c: GPTConfig) -> dict[str, Place]:
    """Every tensor of the model that `c` describes."""
    d, f, heads = c.d_model, c.mlp_width, c.attention_width
    shapes = dict(zip(_MODULES, [(3 * heads, d), (d, heads), (f, d), (d, f)], strict=True))
    found = {
        f"{n}.weight": Place((rows, d), (f"{n}/embedding",)) for n, rows in (("wte", c.vocab_size), ("wpe", c.context))
    }
    for i in range(c.n_layer):
        for module, names in _MODULES.items():
            kernels, biases = (tuple(f"blocks/{name}/{kind}" for name in names) for kind in ("kernel", "bias"))
            found[f"h.{i}.{module}.weight"] = Place(shapes[module], kernels, i, transposed=True)
            if c.use_bias:
                found[f"h.{i}.{module}.bias"] = Place(shapes[module][:1], biases, i)
        for name in ("ln_1", "ln_2"):
            found |= _norm(c, f"h.{i}.{name}", f"blocks/{name}", i)
        if c.attention_sink:
            found[f"h.{i}.attn.attn_imp.sink_logit"] = Place((c.n_head,), ("blocks/sink",), i)
    found |= _norm(c, "ln_f", "ln_f", None)
    if not c.tied_head:
        found["lm_head.weight"] = Place((c.vocab_size, d), ("head/kernel",), transposed=True)
    if c.bigram:
        found["bigram_table"] = Place((c.vocab_size, c.vocab_size), ("bigram/embedding",))
    return found


def _norm(c: GPTConfig, name: str, ours: str, layer: int | None) -> dict[str, Place]:
    kinds = {"weight": "scale"} | ({"bias": "bias"} if c.use_bias and c.norm == "layer_norm" else {})
    return {f"{name}.{kind}": Place((c.d_model,), (f"{ours}/{leaf}",), layer) for kind, leaf in kinds.items()}
