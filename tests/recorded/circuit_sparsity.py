"""Records ``circuit_sparsity.npz``: small models of random weights, and the logits that the public inference code gives them.

``git clone https://github.com/openai/circuit_sparsity`` (recorded at 8a029a3) and, with PyTorch:
``python tests/recorded/circuit_sparsity.py circuit_sparsity tests/recorded/circuit_sparsity.npz``.
"""

import importlib
import json
import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch

TOKENS = (2, 12)
SMALL = {"block_size": 12, "vocab_size": 40, "n_layer": 2, "n_head": 2, "d_model": 16, "d_mlp": 48}
EVERYWHERE = "attn_in,attn_q,attn_k,attn_v,attn_out,mlp_in,mlp_neuron,mlp_out,resid_post_attn,resid_post_mlp"
#: Name to what a model's ``beeg_config.json`` says besides `SMALL`.
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False, "ln_bias": False, "tied_unembed": False, "activation_type": "relu"},
    "neurons": {"rms_norm": True, "afrac": 0.25, "afrac_loctypes": "mlp_neuron"},
    "everywhere": {"rms_norm": True, "afrac": 0.3, "afrac_loctypes": EVERYWHERE, "d_head": 5},
    "residual": {"afrac": 0.5, "afrac_loctypes": "resid_post_attn,resid_post_mlp,attn_k", "ln_bias": False},
    "sink": {"rms_norm": True, "bias": False, "sink": True, "d_head": 4},
    "bigram": {"enable_bigram_table": True, "learnable_bigram_table": True, "tied_unembed": False},
    "all": {
        "rms_norm": True,
        "afrac": 0.25,
        "afrac_loctypes": EVERYWHERE,
        "d_head": 8,
        "sink": True,
        "enable_bigram_table": True,
        "tied_unembed": False,
        "activation_type": "relu",
        "n_layer": 3,
    },
}


def public_code(folder: str) -> ModuleType:
    """Its module of the model, without what it fetches files with."""
    for name in ("blobfile", "tiktoken", "tiktoken.load"):
        sys.modules[name] = ModuleType(name)
    sys.modules["tiktoken.load"].read_file_cached = None  # type: ignore[attr-defined]
    sys.path.insert(0, folder)
    return importlib.import_module("circuit_sparsity.inference.gpt")


def main(folder: str, file: str) -> None:
    code, rng = public_code(folder), np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}
    for name, said in CONFIGS.items():
        config = SMALL | {"grad_checkpointing": False, "flash": True} | said
        model = code.GPT(code.GPTConfig(**config)).eval()
        state = model.state_dict()
        for key, tensor in state.items():
            if key == "final_logits_bias":
                continue
            # Multiples of 1/64, so that a byte is enough to keep one.
            steps = rng.integers(-60, 61, tensor.shape).astype(np.int8)
            if key == "lm_head.weight" and config.get("tied_unembed", True):
                steps = found[f"{name}/transformer.wte.weight"]
            found[f"{name}/{key}"] = steps
            tensor.copy_(torch.tensor(steps.astype(np.float32) / 64))
        tokens = rng.integers(0, config["vocab_size"], TOKENS)
        with torch.no_grad():
            logits, _, _ = model(torch.tensor(tokens))
        found[f"{name}/tokens"], found[f"{name}/logits"] = tokens.astype(np.uint8), logits.numpy()
        found[f"{name}/config"] = np.frombuffer(json.dumps(config).encode(), np.uint8)
    np.savez_compressed(file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
