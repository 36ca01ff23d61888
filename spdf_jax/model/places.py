"""Named places inside a layer: where activations are made sparse (AbsTopK), looked at, and replaced by their means.

The names and what happens at each are those of the inference code of Gao et al. 2025 (arXiv 2511.13653),
``openai/circuit_sparsity``, ``circuit_sparsity/inference/gpt.py``. A channel of a place is what its authors call a node.

A call may look at all places, and switch channels off: ``model.apply({"params": params, "circuit": {"blocks": {place: {"gate":
gate_LF, "mean": mean_LF}}}}, tokens_BT, mutable=["places"])`` puts at each place named ``gate x + (1 - gate) mean`` and gives
back ``{"places": {"blocks": {place: x_LBTF}}}``, of every place what went on from it. Without either, neither costs anything.

Shape legend: `spdf_jax.model.gpt`; here F is the width of a place.
"""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError, closest
from spdf_jax.sparsity.select import select_top_k

#: In the order in which a layer comes by them: the attention's inputs, all heads' queries, keys and values, what attention adds
#: to the residual, the residual then; the same of the MLP, whose neurons are what its activation function gives.
PLACES = (
    "attn_in",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_out",
    "resid_post_attn",
    "mlp_in",
    "mlp_neuron",
    "mlp_out",
    "resid_post_mlp",
)
_FORM = "write each place with the share that it keeps, as in mlp_neuron=0.25,attn_in=0.25"


def place_widths(config: Any) -> dict[str, int]:
    """The places of a layer, and how many channels each has.

    Args:
      config: `spdf_jax.GPTConfig`.

    Returns:
      ``{place: F}`` in the order of a layer.

    >>> import spdf_jax as spdf
    >>> place_widths(spdf.GPTConfig(d_model=64, n_head=4, d_head=8, n_kv_head=2))["attn_k"]
    16
    """
    widths = dict.fromkeys(PLACES, config.d_model)
    kv = config.kv_heads * config.head_width
    return widths | {"attn_q": config.attention_width, "attn_k": kv, "attn_v": kv, "mlp_neuron": config.mlp_width}


@cache
def kept_shares(activation_topk: str) -> dict[str, float]:
    """The share of channels that each place keeps for a token, of those that `GPTConfig.activation_topk` names.

    Raises:
      InputError: not of that form, an unknown place, one named twice, or a share outside (0, 1].

    >>> kept_shares("mlp_neuron=0.25, attn_in=0.5")
    {'mlp_neuron': 0.25, 'attn_in': 0.5}
    """
    shares: dict[str, float] = {}
    for part in activation_topk.split(",") if activation_topk else ():
        place, _, said = (word.strip() for word in part.partition("="))
        try:
            share = float(said)
        except ValueError:
            share = 0.0
        problem = ""
        if place not in PLACES:
            close = closest(place, PLACES)
            problem = f"{place!r} is not one of {', '.join(PLACES)}" + (f"; did you mean {close!r}" if close else "")
        elif place in shares:
            problem = f"names {place!r} twice; give it one share"
        elif not 0 < share <= 1:
            problem = f"{part.strip()!r} has no share above 0 and at most 1"
        if problem:
            raise InputError(f"model.activation_topk={activation_topk!r}: {problem}; {_FORM}")
        shares[place] = share
    return shares


def check_places(config: Any) -> None:
    """Raises `InputError` where `activation_topk` of a config cannot be read, or leaves a place without a channel."""
    widths = place_widths(config)
    for place, share in kept_shares(config.activation_topk).items():
        if int(share * widths[place]) == 0:
            raise InputError(
                f"model.activation_topk: {place}={share:g} keeps none of its {widths[place]} channels; give it a larger share"
            )


def abs_top_k(x_BTF: jax.Array, k: int) -> jax.Array:
    """The `k` largest by magnitude along the last axis, exactly, ties by lowest index; 0 elsewhere, and no gradient there.

    >>> abs_top_k(jnp.array([[[1.0, -3.0, 2.0, -2.0]]]), 2).tolist()
    [[[0.0, -3.0, 2.0, 0.0]]]
    """
    scores_NF = jnp.abs(jax.lax.stop_gradient(x_BTF)).reshape(-1, x_BTF.shape[-1])
    kept_NF = jax.vmap(select_top_k, (0, None))(scores_NF, k)
    return jnp.where(kept_NF.reshape(x_BTF.shape), x_BTF, jnp.zeros((), x_BTF.dtype))


def at_place(layer: Any, place: str, x_BTF: jax.Array) -> jax.Array:
    """What goes on from a place of a layer, see the head of this module.

    Args:
      layer: `spdf_jax.model.gpt.Layer`, while it is called.
      place: one of ``PLACES``.
      x_BTF: what comes to it.

    Returns:
      x_BTF of the same shape and dtype.
    """
    share = kept_shares(layer.config.activation_topk).get(place, 1.0)
    if share < 1:
        x_BTF = abs_top_k(x_BTF, int(share * x_BTF.shape[-1]))
    if layer.has_variable("circuit", place):
        circuit = layer.get_variable("circuit", place)
        gate, mean = (circuit[name].astype(x_BTF.dtype)[None, None] for name in ("gate", "mean"))
        x_BTF = gate * x_BTF + (1 - gate) * mean
    if layer.is_mutable_collection("places") and not layer.is_initializing():
        layer.put_variable("places", place, x_BTF)
    return x_BTF
