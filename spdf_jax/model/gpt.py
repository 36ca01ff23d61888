"""GPT-2, GPT-3, Primer, Llama, Qwen and weight-sparse transformers as one functional Flax (Linen) model.

Shape legend, used in every name: B batch, T tokens, S cached positions, V vocabulary, D d_model, F d_ff, H heads, K head width,
L layers. Parameters of all layers are stacked on a leading axis (`nn.scan`), so compile time does not grow with depth.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig, mup_scales
from spdf_jax.model.gated import gated, silu
from spdf_jax.model.layer_norm import LayerNorm
from spdf_jax.model.linear import Linear, dense_linear
from spdf_jax.model.places import at_place
from spdf_jax.model.primer import DConv, squared_relu
from spdf_jax.model.rms_norm import RMSNorm
from spdf_jax.model.rotary import turned
from spdf_jax.ops.attention import attention
from spdf_jax.ops.attention_backends import SPLASH_OUTPUT
from spdf_jax.ops.attention_cached import cached_attention
from spdf_jax.ops.attention_sink import attention_with_sink
from spdf_jax.ops.block_linear import BLOCK_OUTPUT
from spdf_jax.sharding import split_wide


# Computed again for the backward pass from what it is given: storing all between costs more than the arithmetic.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=0)
def _gelu(approximate: bool, x_BTF: jax.Array) -> jax.Array:
    # In float32 or wider: where a processor has no other arithmetic, each of its dozen operations would be rounded by itself.
    return nn.gelu(x_BTF.astype(jnp.promote_types(x_BTF.dtype, jnp.float32)), approximate).astype(x_BTF.dtype)


_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(_gelu, True),
    "gelu_exact": partial(_gelu, False),
    "relu": nn.relu,
    "squared_relu": squared_relu,
    "silu": silu,
}
_policies = jax.checkpoint_policies
# What the backward pass finds stored of a layer, by `GPTConfig.remat`.
_STORED = {
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _policies.save_only_these_names(SPLASH_OUTPUT, BLOCK_OUTPUT)
    ),
    "mlp": _policies.save_only_these_names("mlp_hidden", SPLASH_OUTPUT),
    "block": _policies.nothing_saveable,
}


class Layer(nn.Module):
    """One layer, attention and MLP; `nn.scan` goes over all of them, so it maps a carry to (carry, None)."""

    config: GPTConfig
    pattern: str
    width: int
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *places_BT: jax.Array | None) -> tuple[jax.Array, None]:
        c, at = self.config, self._at
        x_BTD = at("resid_post_attn", x_BTD + self._dropout(self._attention(_norm(c, "ln_1")(x_BTD), *places_BT)))
        ln_2, activation = _norm(c, "ln_2"), _ACTIVATIONS[c.activation]
        h_BTD = at("mlp_in", ln_2(x_BTD) if c.mlp_norm == "pre" else x_BTD)
        h_BTF = checkpoint_name(_linear(c, c.mlp_width, "mlp_up")(h_BTD), "mlp_hidden")
        if c.gated:
            gate_BTF = checkpoint_name(_linear(c, c.mlp_width, "mlp_gate")(h_BTD), "mlp_hidden")
            activation = partial(gated, activation, gate_BTF)
        h_BTD = _linear(c, c.d_model, "mlp_down", residual=True)(at("mlp_neuron", activation(h_BTF)))
        h_BTD = at("mlp_out", ln_2(h_BTD) if c.mlp_norm == "post" else h_BTD)
        return at("resid_post_mlp", x_BTD + self._dropout(h_BTD)), None

    def _at(self, place: str, x_BTF: jax.Array) -> jax.Array:
        special = self.config.activation_topk or self.has_variable("circuit", place)
        return at_place(self, place, x_BTF) if special or self.is_mutable_collection("places") else x_BTF

    def _attention(self, x_BTD: jax.Array, *places_BT: jax.Array | None) -> jax.Array:
        c, (positions_BT, segments_BT), x_BTD = self.config, places_BT, self._at("attn_in", x_BTD)

        def project(name: str, x_BTD: jax.Array) -> jax.Array:
            y_BTD = _linear(c, (c.n_head if name == "q" else c.kv_heads) * c.head_width, f"attn_{name}")(x_BTD)
            y_BTD = DConv(c.dtype, name=f"dconv_{name}")(y_BTD, *places_BT) if name in c.convolved else y_BTD
            return self._at(f"attn_{name}", y_BTD).reshape(*x_BTD.shape[:2], -1, c.head_width)

        k_BTHK, v_BTHK = project("k", x_BTD), project("v", x_BTD)
        q_BTHK = project("q", k_BTHK.reshape(x_BTD.shape) if c.shared_qk else x_BTD)
        if c.qk_norm:
            q_BTHK, k_BTHK = _norm(c, "q_norm")(q_BTHK), _norm(c, "k_norm")(k_BTHK)
        if c.positions == "rotary":
            q_BTHK, k_BTHK = turned(c, q_BTHK, positions_BT), turned(c, k_BTHK, positions_BT)
        q_BTHK = q_BTHK * mup_scales(c).query
        attend = attention if positions_BT is None and not c.attention_sink else partial(self._attend, positions_BT)
        y_BTHK = attend(q_BTHK, k_BTHK, v_BTHK, segments_BT=segments_BT, pattern=self.pattern, width=self.width)
        attn_o = _linear(c, c.d_model, "attn_o", residual=True)
        return self._at("attn_out", attn_o(y_BTHK.reshape(*x_BTD.shape[:2], -1)))

    def _attend(self, positions_BT: Any, q: jax.Array, k: Any, v: Any, *, segments_BT: Any, **how: Any) -> jax.Array:
        """With a sink, over a cache, or both."""
        c, zeros = self.config, nn.initializers.zeros
        sink_H = self.param("sink", zeros, (c.n_head,)) if c.attention_sink else None
        if sink_H is not None and positions_BT is None:
            return attention_with_sink(q, k, v, sink_H, segments_BT=segments_BT, **how)
        y_BTHK, cache = cached_attention(q, k, v, self.get_variable("cache", "kv"), positions_BT, sink_H, **how)
        self.put_variable("cache", "kv", cache)
        return y_BTHK

    def _dropout(self, x_BTD: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x_BTD)


class GPT(nn.Module):
    """Token ids to logits.

    Parameters: ``wte/embedding [V, D]``, ``wpe/embedding [context, D]``, ``blocks/{attn_q, attn_k, attn_v, attn_o, mlp_up,
    mlp_down}/kernel [L, in, out]`` with biases, ``blocks/{ln_1, ln_2}``, ``ln_f``, ``head/kernel [D, V]`` when untied, and
    with `dconv` ``blocks/dconv_{q, k, v}/taps [L, 3, D]``, but no ``dconv_q`` with `shared_qk`. Rotary positions have no
    ``wpe``; a gated MLP has ``mlp_gate``, `qk_norm` ``blocks/{q_norm, k_norm}/scale [L, K]``, `attention_sink` ``blocks/sink
    [L, H]``, `bigram` ``bigram/embedding [V, V]``. With a ``circuit``, or ``places`` mutable: `spdf_jax.model.places`.

    With ``positions_BT``, the place of each token in its sequence, the tokens continue those of earlier calls: their keys and
    values go into the ``cache`` collection (`spdf_jax.model.decoding.empty_cache`, ``mutable=["cache"]``), and each sees all
    cached positions up to its own. Padding, on the right of a prompt, is at position -1: nothing of it is kept.

    With kernels as live blocks and a ``topology`` collection (`spdf_jax.sparsity.blocks`), the layers compute those alone.

    With ``segments_BT``, integer ids of the documents packed into each sequence, nothing passes from one to another.

    Attributes:
      config: `spdf_jax.GPTConfig`.
      pattern, width: attention where a call does not say, as `spdf_jax.ops.attention.attention` takes them.

    ``model.apply({"params": params}, tokens_BT)`` returns logits_BTV in the compute dtype; a sequence longer than the context
    raises InputError. Source: GPT-2 (Radford et al. 2019), GPT-3 (Brown et al. 2020), Primer (So et al. 2021).

    >>> import jax, spdf_jax as spdf
    >>> model = spdf.GPT(spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=11, context=4))
    >>> params = model.init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"]
    >>> params["blocks"]["attn_q"]["kernel"].shape
    (2, 8, 8)
    """

    config: GPTConfig
    pattern: str = "causal"
    width: int = 128

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        pattern: str | None = None,
        width: int | None = None,
        deterministic: bool = True,
    ) -> jax.Array:
        c, pattern, width = self.config, pattern or self.pattern, width or self.width
        if tokens_BT.shape[1] > c.context:
            raise InputError(f"sequence length {tokens_BT.shape[1]} exceeds model.context {c.context}")
        if positions_BT is not None and ("cache" not in self.variables or segments_BT is not None):
            raise InputError("positions_BT: they need empty_cache(...) as the variables' 'cache', and no segments_BT")
        # Rounded after the look-up, so that a frequent token's gradient is summed in float32, as every sum over tokens is.
        normal = nn.initializers.normal(c.init_std)
        embed = nn.Embed(c.vocab_size, c.d_model, embedding_init=normal, name="wte")
        x_BTD = embed(tokens_BT)
        if c.positions == "learned":
            wpe = nn.Embed(c.context, c.d_model, embedding_init=normal, name="wpe")
            x_BTD += wpe(jnp.arange(tokens_BT.shape[1]))[None] if positions_BT is None else wpe(positions_BT)
        x_BTD = nn.Dropout(c.dropout, deterministic=deterministic)(x_BTD.astype(c.dtype))
        layer = Layer if c.remat == "none" else nn.remat(Layer, prevent_cse=False, policy=_STORED[c.remat])
        lift: Any = {
            "variable_axes": dict.fromkeys(("params", "topology", "cache", "circuit", "places"), 0),
            "split_rngs": {"params": True, "dropout": True},
        }
        layers = nn.scan(layer, **lift, in_axes=nn.broadcast, length=c.n_layer)
        x_BTD, _ = layers(c, pattern, width, deterministic, name="blocks")(x_BTD, positions_BT, segments_BT)
        x_BTD = _norm(c, "ln_f")(x_BTD) * mup_scales(c).logits
        head = Linear(c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=normal, name="head")
        logits_BTV = dense_linear(x_BTD, embed.embedding, transposed=True) if c.tied_head else head(x_BTD)
        if c.bigram:
            bigram = nn.Embed(c.vocab_size, c.vocab_size, embedding_init=nn.initializers.zeros, name="bigram")
            logits_BTV += bigram(tokens_BT).astype(c.dtype)
        return split_wide(logits_BTV)


def _linear(c: GPTConfig, features: int, name: str, *, residual: bool = False) -> Linear:
    std = c.init_std * mup_scales(c).init / ((2 * c.n_layer) ** 0.5 if residual else 1)
    return Linear(features, c.has_bias(name), c.dtype, nn.initializers.normal(std), name=name)


def _norm(c: GPTConfig, name: str) -> nn.Module:
    if c.norm == "rms_norm" or name in ("q_norm", "k_norm"):
        return RMSNorm(c.layer_norm_eps, c.dtype, name=name)
    return LayerNorm(c.layer_norm_eps, c.use_bias, c.dtype, name=name)
