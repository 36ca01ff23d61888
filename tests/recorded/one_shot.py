"""Records ``one_shot.npz``: what the code of Wanda's and SparseGPT's authors makes of one linear layer and its inputs.

``git clone https://github.com/IST-DASLab/sparsegpt`` (recorded at 147d215) and ``https://github.com/locuslab/wanda`` (8e8fc87),
and, with PyTorch and transformers: ``python tests/recorded/one_shot.py sparsegpt wanda tests/recorded/one_shot.npz``.
"""

import importlib
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

INPUTS, OUTPUTS, TOKENS = 256, 32, 384
#: Name to share of zeros, N and M of what is pruned.
SETTINGS = {"50": (0.5, 0, 0), "70": (0.7, 0, 0), "2:4": (0.5, 2, 4)}


def layer_of(weight: np.ndarray) -> torch.nn.Linear:
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def by_sparsegpt(folder: str, x: np.ndarray, weight: np.ndarray, sparsity: float, n: int, m: int) -> np.ndarray:
    sys.path.insert(0, folder)
    sys.modules["quant"] = ModuleType("quant")  # of weights, and not asked for
    torch.cuda.synchronize = lambda: None
    layer = layer_of(weight)
    pruner = importlib.import_module("sparsegpt").SparseGPT(layer)
    pruner.add_batch(torch.tensor(x)[None], None)
    pruner.fasterprune(sparsity, prunen=n, prunem=m)
    sys.path.pop(0)
    return layer.weight.data.numpy()


def by_wanda(folder: str, x: np.ndarray, weight: np.ndarray, sparsity: float, n: int, m: int) -> np.ndarray:
    sys.path.insert(0, folder)
    data = ModuleType("lib.data")
    data.get_loaders = lambda *args, **how: (None, None)  # whose texts it would fetch
    sys.modules["lib.data"] = data
    prune = importlib.import_module("lib.prune")
    x_NTD = torch.tensor(x)[None]
    prune.prepare_calibration_input = lambda *args: (x_NTD, torch.zeros(1, len(x), len(weight)), None, None)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = layer_of(weight)

        def forward(self, x: torch.Tensor, **_: None) -> tuple[torch.Tensor]:
            return (self.linear(x),)

    layer = Layer()
    config, layers = SimpleNamespace(use_cache=False), SimpleNamespace(layers=[layer])
    model = SimpleNamespace(config=config, model=layers, seqlen=len(x), hf_device_map={})
    args = SimpleNamespace(nsamples=1, seed=0, sparsity_ratio=sparsity, use_variant=False)
    prune.prune_wanda(args, model, None, torch.device("cpu"), prune_n=n, prune_m=m)
    sys.path.pop(0)
    return layer.linear.weight.data.numpy()


def main(sparsegpt: str, wanda: str, file: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(-20, 20, (TOKENS, INPUTS)).astype(np.int8)
    x += np.roll(x, 3, axis=1)  # inputs that say something of each other
    x[:, 7] = 0
    weight = rng.normal(0, 0.1, (OUTPUTS, INPUTS)).astype(np.float32)
    found = {"x": x, "weight": weight}
    for name, how in SETTINGS.items():
        inputs = x.astype(np.float32) / 8
        found[f"sparsegpt {name}"] = by_sparsegpt(sparsegpt, inputs, weight, *how)
        found[f"wanda {name}"] = np.packbits(by_wanda(wanda, inputs, weight, *how) != 0)
    np.savez_compressed(file, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
