"""What a machine that skips zeros would compute.

Source: SPDF (arXiv 2303.10464) and its appendix: forward + backward of a sequence of S tokens is
``3 S (2 nnz_linear + 4 S d L a + 2 nnz_head)`` with ``nnz_linear = 12 L d^2 (1 - s)`` for an MLP of 4 d. Attention is counted
full (S^2), times the share ``a`` of the causal triangle that a sparse pattern attends to. Documents kept apart count as one
stream does: scores between two of them are computed and left out. The input look-up is free. A tap of Primer's convolutions
multiplies once a token, as a weight does. Counts are exact integers: a resumed run continues its totals to the last FLOP.
"""

from collections.abc import Mapping

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.primer import TAPS
from spdf_jax.ops.attention_patterns import causal_share


def matrix_outputs(config: GPTConfig) -> dict[str, int]:
    """Of every matrix of a layer, by name, how wide it is at its other side than ``d_model``."""
    q, kv = config.attention_width, config.kv_heads * config.head_width
    attention = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_o": q}
    names = ("mlp_up", "mlp_down", "mlp_gate")[: 3 if config.gated else 2]
    return attention | dict.fromkeys(names, config.mlp_width)


def linear_size(config: GPTConfig) -> int:
    """Weights of the matrices in all layers: of GPT-2 ``L (4 D^2 + 2 D F)``, 12 L D^2 for F = 4 D."""
    return config.n_layer * config.d_model * sum(matrix_outputs(config).values())


def taps_size(config: GPTConfig) -> int:
    """Taps of Primer's convolutions, which are never sparse: ``9 L D`` with queries, keys and values convolved."""
    return config.n_layer * len(config.convolved) * TAPS * config.d_model


def head_size(config: GPTConfig) -> int:
    """Weights of the output head, tied or not."""
    return config.d_model * config.vocab_size


def parameter_count(config: GPTConfig) -> int:
    """All parameters."""
    c, d = config, config.d_model
    norms = (2 * c.n_layer + 1) * d * (2 if c.use_bias and c.norm == "layer_norm" else 1)
    norms += 2 * c.n_layer * c.head_width if c.qk_norm else 0
    outputs = matrix_outputs(c) | {"attn_o": d, "mlp_down": d}
    biases = c.n_layer * sum(width for name, width in outputs.items() if c.has_bias(name))
    embeddings = (c.vocab_size + (c.context if c.positions == "learned" else 0)) * d
    head = 0 if config.tied_head else head_size(config)
    others = c.n_layer * c.n_head * c.attention_sink + c.vocab_size**2 * c.bigram
    return linear_size(config) + taps_size(config) + norms + biases + embeddings + head + others


def train_flops(
    config: GPTConfig,
    *,
    seq_len: int = 0,
    sparsity: float = 0.0,
    head_sparsity: float = 0.0,
    attention_share: float = 1.0,
    include_head: bool = True,
) -> float:
    """FLOPs of one training sequence, forward and backward.

    Args:
      config: the architecture.
      seq_len: tokens; 0 means the model's context.
      sparsity: share of zeros over the matrices in all layers.
      head_sparsity: share of zeros in the output head.
      attention_share: share of the causal triangle attended to.
      include_head: count the output head.

    Returns:
      FLOPs a sequence, by the formula of SPDF at the head of `spdf_jax.model.flops`.

    Raises:
      InputError: a share outside [0, 1].

    >>> import spdf_jax as spdf
    >>> f"{train_flops(spdf.GPT_SIZES['1.3b'], sparsity=0.75):.3g}"  # the paper's table says 7.46e12
    '7.45e+12'
    """
    if not (0 <= sparsity <= 1 and 0 <= head_sparsity <= 1 and 0 <= attention_share <= 1):
        raise InputError("train_flops: sparsity, head_sparsity and attention_share must lie in [0, 1]")
    s = seq_len or config.context
    attention = 4 * s * config.attention_width * config.n_layer * attention_share
    head = 2 * head_size(config) * (1 - head_sparsity) if include_head else 0.0
    return 3 * s * (2 * linear_size(config) * (1 - sparsity) + 2 * taps_size(config) + attention + head)


def step_flops(
    config: GPTConfig,
    *,
    seq_len: int,
    sequences: int,
    active: Mapping[str, int],
    pattern: str = "causal",
    width: int = 128,
    gradient: Mapping[str, int] | None = None,
) -> int:
    """Exact FLOPs of one step on real masks.

    Args:
      config: the architecture.
      seq_len: tokens a sequence.
      sequences: sequences in the step.
      active: active weights of every sparse leaf, all layers together; leaves left out count dense.
      pattern: attention pattern.
      width: its width.
      gradient: weights whose gradient is needed, as `active`, where these are not the active ones (one product of three):
        all of them at a topology step that grows by it, the explored ones of Top-KAST.

    Returns:
      FLOPs.
    """
    nnz = _active_weights(config, active)
    weights = 2 * (2 * nnz + (nnz if gradient is None else _active_weights(config, gradient)))
    attention = round(3 * 4 * seq_len * config.attention_width * config.n_layer * causal_share(pattern, seq_len, width))
    return sequences * seq_len * (weights + attention)


def _active_weights(config: GPTConfig, active: Mapping[str, int]) -> int:
    head_name = "wte/embedding" if config.tied_head else "head/kernel"
    added = ("wte/embedding", "wpe/embedding")  # not multiplied by, as no bias is
    in_layers = {n: k for n, k in active.items() if n != head_name and n not in added and not n.endswith("/bias")}
    missing = sum(_leaf_size(config, name) - k for name, k in in_layers.items())
    return linear_size(config) + taps_size(config) - missing + active.get(head_name, head_size(config))


def _leaf_size(config: GPTConfig, name: str) -> int:
    width = matrix_outputs(config).get(name.removeprefix("blocks/").removesuffix("/kernel"))
    if width is None:
        raise InputError(f"step_flops: leaf {name!r} is no linear layer of this model")
    return config.n_layer * config.d_model * width
