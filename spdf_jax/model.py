"""GPT-2 and GPT-3 as one functional Flax (Linen) model.

Shape legend, used in every name: B batch, T tokens, S cached positions, V vocabulary, D d_model, F d_ff, H heads, K head width,
L layers. Parameters of all blocks are stacked on a leading layer axis (`nn.scan`), so compile time does not grow with depth.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spdf_jax.attention import attention
from spdf_jax.attention_patterns import attends
from spdf_jax.errors import InputError
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.sparsity.mupar import mup_scales


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
        if self.dtype not in ("float32", "bfloat16"):
            raise InputError(f"model.dtype: {self.dtype!r} is not 'float32' or 'bfloat16'")
        for name in ("n_layer", "n_head", "d_model", "vocab_size", "context"):
            if getattr(self, name) < 1:
                raise InputError(f"model.{name}: {getattr(self, name)} must be at least 1")
        mup_scales(self)  # raises where they are wrong

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.d_ff or 4 * self.d_model


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
    """Pre-norm transformer block; scanned over layers, so it maps a carry to (carry, None)."""

    config: GPTConfig
    pattern: str
    width: int
    deterministic: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array | None) -> tuple[jax.Array, None]:
        c = self.config
        x_BTD = x_BTD + self._dropout(self._attention(_layer_norm(c, "ln_1")(x_BTD), positions_BT))
        h_BTF = _linear(c, c.mlp_width, "mlp_up")(_layer_norm(c, "ln_2")(x_BTD))
        h_BTD = _linear(c, c.d_model, "mlp_down", residual=True)(nn.gelu(h_BTF))
        return x_BTD + self._dropout(h_BTD), None

    def _attention(self, x_BTD: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
        c = self.config
        heads = (c.n_head, c.d_model // c.n_head)
        q_BTHK, k_BTHK, v_BTHK = (
            _linear(c, c.d_model, f"attn_{name}")(x_BTD).reshape(*x_BTD.shape[:2], *heads) for name in "qkv"
        )
        q_BTHK = q_BTHK * mup_scales(c).query
        if positions_BT is None:
            y_BTHK = attention(q_BTHK, k_BTHK, v_BTHK, pattern=self.pattern, width=self.width)
        else:
            k_BSHK, v_BSHK = self._remember("k", k_BTHK, positions_BT), self._remember("v", v_BTHK, positions_BT)
            i_BHTS, j_BHTS = positions_BT[:, None, :, None], jnp.arange(k_BSHK.shape[1])[None, None, None]
            sees_BHTS = attends(self.pattern, i_BHTS, j_BHTS, self.width)
            y_BTHK = jax.nn.dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask=sees_BHTS)
        return _linear(c, c.d_model, "attn_o", residual=True)(y_BTHK.reshape(x_BTD.shape))

    def _remember(self, name: str, x_BTHK: jax.Array, positions_BT: jax.Array) -> jax.Array:
        if not self.has_variable("cache", name):
            raise InputError("positions_BT without a cache: pass empty_cache(...) as the variables' 'cache'")
        old_BSHK: jax.Array = self.get_variable("cache", name)
        new_BSHK = jax.vmap(lambda old, at, x: old.at[at].set(x))(old_BSHK, positions_BT, x_BTHK)
        self.put_variable("cache", name, new_BSHK)
        return new_BSHK

    def _dropout(self, x_BTD: jax.Array) -> jax.Array:
        if self.config.dropout == 0.0 or self.deterministic:
            return x_BTD
        return nn.Dropout(self.config.dropout, deterministic=False)(x_BTD)


class GPT(nn.Module):
    """Token ids to logits.

    Parameters: ``wte/embedding [V, D]``, ``wpe/embedding [context, D]``, ``blocks/{attn_q, attn_k, attn_v, attn_o, mlp_up,
    mlp_down}/kernel [L, in, out]`` with biases, ``blocks/{ln_1, ln_2}``, ``ln_f``, and ``head/kernel [D, V]`` when untied.

    With ``positions_BT``, the place of each token in its sequence, the tokens continue those of earlier calls: their keys and
    values go into the ``cache`` collection (`empty_cache`, ``mutable=["cache"]``), and each sees all cached positions up to its
    own. What lies past a sequence's end is overwritten before it is seen, so prompts padded on the right need no mask.

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
        pattern: str = "causal",
        width: int = 128,
        deterministic: bool = True,
    ) -> jax.Array:
        c = self.config
        if tokens_BT.shape[1] > c.context:
            raise InputError(f"sequence length {tokens_BT.shape[1]} exceeds model.context {c.context}")
        embed = nn.Embed(c.vocab_size, c.d_model, dtype=c.dtype, embedding_init=_truncated(c.init_std), name="wte")
        positions = nn.Embed(c.context, c.d_model, dtype=c.dtype, embedding_init=_truncated(c.init_std), name="wpe")
        x_BTD = embed(tokens_BT)
        x_BTD += positions(jnp.arange(tokens_BT.shape[1]))[None] if positions_BT is None else positions(positions_BT)
        if c.dropout and not deterministic:
            x_BTD = nn.Dropout(c.dropout, deterministic=False)(x_BTD)
        block = nn.remat(Block, prevent_cse=False) if c.remat else Block
        lift: Any = {"variable_axes": {"params": 0, "cache": 0}, "split_rngs": {"params": True, "dropout": True}}
        blocks = nn.scan(block, **lift, in_axes=nn.broadcast, length=c.n_layer)
        x_BTD, _ = blocks(c, pattern, width, deterministic, name="blocks")(x_BTD, positions_BT)
        x_BTD = _layer_norm(c, "ln_f")(x_BTD) * mup_scales(c).logits
        if c.tied_head:
            return embed.attend(x_BTD)
        return nn.Dense(c.vocab_size, use_bias=False, dtype=c.dtype, kernel_init=_truncated(c.init_std), name="head")(
            x_BTD
        )


def empty_cache(config: GPTConfig, batch_size: int, length: int) -> dict[str, Any]:
    """A cache of keys and values [L, B, S, H, K] for `GPT` called with positions.

    Args:
      config: the model's.
      batch_size: B, sequences.
      length: S, positions that a sequence may reach, prompt included.

    Returns:
      The ``cache`` collection, zeros in the compute dtype.

    >>> {name: leaf.shape for name, leaf in empty_cache(GPTConfig(), 8, 64)["blocks"].items()}
    {'k': (4, 8, 64, 4, 64), 'v': (4, 8, 64, 4, 64)}
    """
    shape = (config.n_layer, batch_size, length, config.n_head, config.d_model // config.n_head)
    return {"blocks": {name: jnp.zeros(shape, config.dtype) for name in "kv"}}


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


def _truncated(std: float) -> Any:
    return nn.initializers.truncated_normal(std)


def _linear(c: GPTConfig, features: int, name: str, *, residual: bool = False) -> nn.Dense:
    std = c.init_std * mup_scales(c).init / ((2 * c.n_layer) ** 0.5 if residual else 1)
    return nn.Dense(features, use_bias=c.use_bias, dtype=c.dtype, kernel_init=_truncated(std), name=name)


def _layer_norm(c: GPTConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=c.layer_norm_eps, use_bias=c.use_bias, dtype=c.dtype, name=name)
