"""GPT-2, GPT-3 and Primer as one functional Flax (Linen) model.

Shape legend, used in every name: B batch, T tokens, S cached positions, V vocabulary, D d_model, F d_ff, H heads, K head width,
L layers. Parameters of all blocks are stacked on a leading layer axis (`nn.scan`), so compile time does not grow with depth.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spdf_jax.attention import attention
from spdf_jax.attention_cached import cached_attention
from spdf_jax.errors import InputError
from spdf_jax.primer import DConv, squared_relu
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.sparsity.mupar import mup_scales

_ACTIVATIONS = {"gelu": nn.gelu, "squared_relu": squared_relu}
_truncated = nn.initializers.truncated_normal


@dataclass(frozen=True)
class GPTConfig:
    """Architecture.

    Attributes:
      n_layer, n_head, d_model: depth, heads, width.
      d_ff: MLP width; 0 means ``4 * d_model``.
      vocab_size: rows of the embedding; ids must stay below.
      context: longest sequence (learned positions).
      tied_head: output head shares the embedding.
      use_bias: biases in linear layers and norms.
      activation: of the MLP, ``gelu`` or ``squared_relu``.
      dconv: convolve queries, keys and values over three positions, see `spdf_jax.primer`; with squared ReLU, Primer-EZ.
      shared_qk: queries are a projection of the (convolved) keys instead of the input. With all of these, Primer.
      mlp_norm: ``pre``: x + mlp(norm(x)); ``post``: x + norm(mlp(x)), as in Primer.
      dropout: rate on the embedding and on both residual branches, in [0, 1).
      dtype: compute dtype, ``float32`` or ``bfloat16``; parameters are float32.
      layer_norm_eps: epsilon.
      init_std: truncated normal; residual output projections get ``init_std / sqrt(2 n_layer)``.
      remat: recompute each block in the backward pass instead of storing its activations.
      mup_base_width, mup_density, mup_alpha: S-muPar, see `spdf_jax.sparsity.mupar`; a base width of 0 turns it off.
    """

    n_layer: int = 4
    n_head: int = 4
    d_model: int = 256
    d_ff: int = 0
    vocab_size: int = 4096
    context: int = 256
    tied_head: bool = True
    use_bias: bool = True
    activation: str = "gelu"
    dconv: bool = False
    shared_qk: bool = False
    mlp_norm: str = "pre"
    dropout: float = 0.0
    dtype: str = "float32"
    layer_norm_eps: float = 1e-5
    init_std: float = 0.02
    remat: bool = False
    mup_base_width: int = 0
    mup_density: float = 1.0
    mup_alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.d_model % self.n_head:
            raise InputError(f"model.d_model: {self.d_model} is not divisible by model.n_head {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.dropout: {self.dropout} is outside [0, 1)")
        choices = {"dtype": ("float32", "bfloat16"), "activation": tuple(_ACTIVATIONS), "mlp_norm": ("pre", "post")}
        for name, (a, b) in choices.items():
            if getattr(self, name) not in (a, b):
                raise InputError(f"model.{name}: {getattr(self, name)!r} is not {a!r} or {b!r}")
        for name in ("n_layer", "n_head", "d_model", "vocab_size", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}: {getattr(self, name)} must be at least 1")
        mup_scales(self)  # raises where they are wrong

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.d_ff or 4 * self.d_model

    @property
    def convolved(self) -> str:
        """Which of q, k, v are."""
        return ("kv" if self.shared_qk else "qkv") if self.dconv else ""


def _size(n_layer: int, n_head: int, d_model: int, **more: Any) -> GPTConfig:
    defaults: dict[str, Any] = {"vocab_size": 50257, "context": 2048, "dtype": "bfloat16", "remat": n_layer > 12}
    return GPTConfig(n_layer=n_layer, n_head=n_head, d_model=d_model, **(defaults | more))


#: Published sizes. GPT-2: Radford et al. 2019 (context 1024); GPT-3: Brown et al. 2020, table 2.1; 125m, 1.3b: SPDF.
GPT_SIZES = {
    "mini": GPTConfig(),
    "124m": _size(12, 12, 768, context=1024),
    "125m": _size(12, 12, 768),
    "350m": _size(24, 16, 1024, context=1024),
    "774m": _size(36, 20, 1280, context=1024),
    "1.3b": _size(24, 16, 2048),
    "1.5b": _size(48, 25, 1600, context=1024),
    "6.7b": _size(32, 32, 4096),
}


class Block(nn.Module):
    """Transformer block; scanned over layers, so it maps a carry to (carry, None)."""

    config: GPTConfig
    pattern: str
    width: int
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, *places_BT: jax.Array | None) -> tuple[jax.Array, None]:
        c = self.config
        x_BTD = x_BTD + self._dropout(self._attention(_layer_norm(c, "ln_1")(x_BTD), *places_BT))
        ln_2 = _layer_norm(c, "ln_2")
        h_BTF = _linear(c, c.mlp_width, "mlp_up")(ln_2(x_BTD) if c.mlp_norm == "pre" else x_BTD)
        h_BTD = _linear(c, c.d_model, "mlp_down", residual=True)(_ACTIVATIONS[c.activation](h_BTF))
        return x_BTD + self._dropout(ln_2(h_BTD) if c.mlp_norm == "post" else h_BTD), None

    def _attention(self, x_BTD: jax.Array, *places_BT: jax.Array | None) -> jax.Array:
        c, (positions_BT, segments_BT) = self.config, places_BT

        def project(name: str, x_BTD: jax.Array) -> jax.Array:
            y_BTD = _linear(c, c.d_model, f"attn_{name}")(x_BTD)
            y_BTD = DConv(c.dtype, name=f"dconv_{name}")(y_BTD, *places_BT) if name in c.convolved else y_BTD
            return y_BTD.reshape(*x_BTD.shape[:2], c.n_head, c.d_model // c.n_head)

        if c.shared_qk:
            k_BTHK = project("k", x_BTD)
            q_BTHK = project("q", k_BTHK.reshape(x_BTD.shape))
        else:
            q_BTHK, k_BTHK = project("q", x_BTD), project("k", x_BTD)
        v_BTHK = project("v", x_BTD)
        q_BTHK = q_BTHK * mup_scales(c).query
        how: Any = {"pattern": self.pattern, "width": self.width}
        if positions_BT is None:
            y_BTHK = attention(q_BTHK, k_BTHK, v_BTHK, segments_BT=segments_BT, **how)
        else:
            y_BTHK, cache = cached_attention(
                q_BTHK, k_BTHK, v_BTHK, self.get_variable("cache", "kv"), positions_BT, **how
            )
            self.put_variable("cache", "kv", cache)
        return _linear(c, c.d_model, "attn_o", residual=True)(y_BTHK.reshape(x_BTD.shape))

    def _dropout(self, x_BTD: jax.Array) -> jax.Array:
        return nn.Dropout(self.config.dropout, deterministic=self.deterministic)(x_BTD)


class GPT(nn.Module):
    """Token ids to logits.

    Parameters: ``wte/embedding [V, D]``, ``wpe/embedding [context, D]``, ``blocks/{attn_q, attn_k, attn_v, attn_o, mlp_up,
    mlp_down}/kernel [L, in, out]`` with biases, ``blocks/{ln_1, ln_2}``, ``ln_f``, ``head/kernel [D, V]`` when untied, and
    with `dconv` ``blocks/dconv_{q, k, v}/taps [L, 3, D]``, but no ``dconv_q`` with `shared_qk`.

    With ``positions_BT``, the place of each token in its sequence, the tokens continue those of earlier calls: their keys and
    values go into the ``cache`` collection (`spdf_jax.generate.empty_cache`, ``mutable=["cache"]``), and each sees all cached
    positions up to its own. Padding, on the right of a prompt, is at position -1: nothing of it is kept.

    With ``segments_BT``, integer ids of the documents packed into each sequence, nothing passes from one to another.

    >>> import jax, spdf_jax as spdf
    >>> model = spdf.GPT(spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=11, context=4))
    >>> params = model.init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"]
    >>> params["blocks"]["attn_q"]["kernel"].shape
    (2, 8, 8)
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens_BT: jax.Array,
        *,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        pattern: str = "causal",
        width: int = 128,
        deterministic: bool = True,
    ) -> jax.Array:
        c = self.config
        if tokens_BT.shape[1] > c.context:
            raise InputError(f"sequence length {tokens_BT.shape[1]} exceeds model.context {c.context}")
        if positions_BT is not None and ("cache" not in self.variables or segments_BT is not None):
            raise InputError("positions_BT: they need empty_cache(...) as the variables' 'cache', and no segments_BT")
        embed = nn.Embed(c.vocab_size, c.d_model, dtype=c.dtype, embedding_init=_truncated(c.init_std), name="wte")
        positions = nn.Embed(c.context, c.d_model, dtype=c.dtype, embedding_init=_truncated(c.init_std), name="wpe")
        x_BTD = embed(tokens_BT)
        x_BTD += positions(jnp.arange(tokens_BT.shape[1]))[None] if positions_BT is None else positions(positions_BT)
        x_BTD = nn.Dropout(c.dropout, deterministic=deterministic)(x_BTD)
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        lift: Any = {"variable_axes": {"params": 0, "cache": 0}, "split_rngs": {"params": True, "dropout": True}}
        blocks = nn.scan(block, **lift, in_axes=nn.broadcast, length=c.n_layer)
        x_BTD, _ = blocks(c, pattern, width, deterministic, name="blocks")(x_BTD, positions_BT, segments_BT)
        x_BTD = _layer_norm(c, "ln_f")(x_BTD) * mup_scales(c).logits
        if c.tied_head:
            return embed.attend(x_BTD)
        head = nn.Dense(c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=_truncated(c.init_std), name="head")
        return head(x_BTD)


def forward(model: nn.Module, params: Any, tokens_BT: jax.Array, *, masks: Any, **options: Any) -> Any:
    """Logits of a model under masks.

    Args:
      model: `GPT`, or any Linen module called on tokens.
      params: its parameters.
      tokens_BT: int ids.
      masks: mask tree, see `spdf_jax.init_masks`; `spdf_jax.dense_masks(params)` for none.
      **options: passed to the model: ``pattern``, ``width``, ``deterministic``, ``rngs``.

    Returns:
      logits_BTV in the compute dtype.

    >>> import jax, spdf_jax as spdf
    >>> model = spdf.GPT(spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=11, context=4))
    >>> tokens_BT = jax.numpy.zeros((1, 4), int)
    >>> params = model.init(jax.random.key(0), tokens_BT)["params"]
    >>> spdf.forward(model, params, tokens_BT, masks=spdf.init_masks(jax.random.key(1), params, sparsity=0.75)).shape
    (1, 4, 11)
    """
    return model.apply({"params": apply_masks(params, masks)}, tokens_BT, **options)


def _linear(c: GPTConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    std = c.init_std * mup_scales(c).init / ((2 * c.n_layer) ** 0.5 if residual else 1)
    return nn.Dense(features, use_bias=c.use_bias, dtype=c.dtype, kernel_init=_truncated(std), name=name)


def _layer_norm(c: GPTConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.layer_norm_eps, use_bias=c.use_bias, dtype=c.dtype, name=name)
