"""Published architectures by name."""

from typing import Any

from spdf_jax.model.config import GPTConfig


def _size(n_layer: int, n_head: int, d_model: int, **more: Any) -> GPTConfig:
    remat = "block" if n_layer > 12 else "none"
    defaults: dict[str, Any] = {"vocab_size": 50257, "context": 2048, "dtype": "bfloat16", "remat": remat}
    return GPTConfig(n_layer=n_layer, n_head=n_head, d_model=d_model, **(defaults | more))


def _llama(n_layer: int, n_head: int, d_model: int, d_ff: int, **more: Any) -> GPTConfig:
    shape: dict[str, Any] = {"d_ff": d_ff, "vocab_size": 32000, "context": 1024, "tied_head": False, "use_bias": False}
    llama: dict[str, Any] = {"norm": "rms_norm", "positions": "rotary", "activation": "silu", "gated": True}
    return _size(n_layer, n_head, d_model, layer_norm_eps=1e-6, **(shape | llama | more))


_MINI: dict[str, Any] = {"n_kv_head": 2, "vocab_size": 4096, "context": 256, "tied_head": True, "dtype": "float32"}

#: Published sizes. GPT-2: Radford et al. 2019 (context 1024); GPT-3: Brown et al. 2020, table 2.1; 125m, 1.3b: SPDF;
#: Llama's shape: jiaweizzhao/GaLore, ``configs`` (arXiv 2403.03507), which SMET (arXiv 2606.00888) trains too.
GPT_SIZES = {
    "mini": GPTConfig(),
    "124m": _size(12, 12, 768, context=1024),
    "125m": _size(12, 12, 768),
    "350m": _size(24, 16, 1024, context=1024),
    "774m": _size(36, 20, 1280, context=1024),
    "1.3b": _size(24, 16, 2048),
    "1.5b": _size(48, 25, 1600, context=1024),
    "6.7b": _size(32, 32, 4096),
    "llama_mini": _llama(4, 4, 256, 768, **_MINI),
    "llama_130m": _llama(12, 12, 768, 2048),
    "llama_350m": _llama(24, 16, 1024, 2736),
    "llama_1b": _llama(24, 32, 2048, 5461),
}
