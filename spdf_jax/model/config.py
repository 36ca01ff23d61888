"""What a GPT is: its architecture as data, and the published sizes."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from spdf_jax.errors import InputError
from spdf_jax.fields import Count, CountOrZero, OneOf, Range, Used, check_fields

MUP = Used(lambda model: model.mup_base_width > 0, "a mup_base_width above 0")


@dataclass(frozen=True)
class GPTConfig:
    """Architecture.

    Attributes:
      n_layer: depth: how many layers, each attention and an MLP.
      n_head: attention heads of a layer; they share `d_model` evenly.
      d_model: width: features of a token between layers.
      d_ff: MLP width; 0 means ``4 * d_model``.
      vocab_size: rows of the embedding; ids must stay below.
      context: longest sequence (learned positions).
      tied_head: output head shares the embedding.
      use_bias: biases in linear layers and norms.
      activation: of the MLP, ``gelu`` (GPT-2's tanh approximation), ``gelu_exact`` (Cerebras-GPT) or ``squared_relu``.
      dconv: convolve queries, keys and values over three positions, see `spdf_jax.model.primer`; with squared ReLU, Primer-EZ.
      shared_qk: queries are a projection of the (convolved) keys instead of the input. With all of these, Primer.
      mlp_norm: ``pre``: x + mlp(norm(x)); ``post``: x + norm(mlp(x)), as in Primer.
      dropout: rate on the embedding and on both residual branches, in [0, 1).
      dtype: compute dtype, ``float32`` or ``bfloat16``; parameters are float32.
      layer_norm_eps: added to a variance before a norm divides by its root.
      init_std: standard deviation of the normal distribution, not truncated, that embeddings and matrices are drawn from, as in
        GPT-2 and in MST's code; residual output projections get ``init_std / sqrt(2 n_layer)``.
      remat: what the backward pass computes again instead of finding it stored. ``none``: nothing; ``dots``: all of a layer
        but its matrix products and splash attention; ``mlp``: all but the MLP's hidden layer and splash attention; ``block``:
        all of it. Fewer bytes, more FLOPs, same values.
      mup_base_width: S-muPar (`spdf_jax.model.mupar`): the width of the model that was tuned; 0 turns S-muPar off.
      mup_density: S-muPar: density of the first phase, by which a matrix starts.
      mup_alpha: S-muPar: factor on the logits, tuned at the base width.

    Raises:
      InputError: a value out of its range, or a width that the heads do not divide.

    >>> GPTConfig(n_layer=2, n_head=4, d_model=64).mlp_width
    256
    """

    n_layer: Count = 4
    n_head: Count = 4
    d_model: Count = 256
    d_ff: CountOrZero = 0
    vocab_size: Count = 4096
    context: Count = 256
    tied_head: bool = True
    use_bias: bool = True
    activation: Annotated[str, OneOf(("gelu", "gelu_exact", "squared_relu"))] = "gelu"
    dconv: bool = False
    shared_qk: bool = False
    mlp_norm: Annotated[str, OneOf(("pre", "post"))] = "pre"
    dropout: Annotated[float, Range(least=0, below=1)] = 0.0
    dtype: Annotated[str, OneOf(("float32", "bfloat16"))] = "float32"
    layer_norm_eps: Annotated[float, Range(above=0, most=1)] = 1e-5
    init_std: Annotated[float, Range(above=0, most=1)] = 0.02
    remat: Annotated[str, OneOf(("none", "dots", "mlp", "block"))] = "none"
    mup_base_width: CountOrZero = 0
    mup_density: Annotated[float, Range(above=0, most=1), MUP] = 1.0
    mup_alpha: Annotated[float, Range(above=0), MUP] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "model")
        if self.d_model % self.n_head:
            raise InputError(f"model.d_model: {self.d_model} is not divisible by model.n_head {self.n_head}")

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.d_ff or 4 * self.d_model

    @property
    def convolved(self) -> str:
        """Which of q, k, v are."""
        return ("kv" if self.shared_qk else "qkv") if self.dconv else ""


def _size(n_layer: int, n_head: int, d_model: int, **more: Any) -> GPTConfig:
    remat = "block" if n_layer > 12 else "none"
    defaults: dict[str, Any] = {"vocab_size": 50257, "context": 2048, "dtype": "bfloat16", "remat": remat}
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


class MuParScales(NamedTuple):
    """Factors on what the model would be without S-muPar; all 1 when it is off.

    Attributes:
      init: on the initial standard deviation of hidden matrices.
      query: on queries, before attention's own ``1 / sqrt(head width)``.
      logits: on the output.
      learning_rate: on Adam's learning rate of hidden matrices.
    """

    init: float = 1.0
    query: float = 1.0
    logits: float = 1.0
    learning_rate: float = 1.0


def mup_scales(config: GPTConfig) -> MuParScales:
    """The factors of a model.

    Args:
      config: `spdf_jax.GPTConfig`; `mup_base_width` 0 turns S-muPar off.

    Returns:
      `MuParScales`.

    >>> import spdf_jax as spdf
    >>> config = spdf.GPTConfig(d_model=256, n_head=4, mup_base_width=64, mup_density=0.25)
    >>> mup_scales(config)
    MuParScales(init=1.0, query=0.125, logits=0.25, learning_rate=1.0)
    """
    if not config.mup_base_width:
        return MuParScales()
    width = config.d_model / config.mup_base_width
    fan_in = width * config.mup_density
    head_width = config.d_model // config.n_head
    return MuParScales(fan_in**-0.5, head_width**-0.5, config.mup_alpha / width, 1 / fan_in)
