"""What a GPT is: its architecture as data."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

from spdf_jax.errors import InputError
from spdf_jax.fields import Count, CountOrZero, Line, OneOf, Range, Used, check_fields, used_with
from spdf_jax.model.places import check_places

MUP = Used(lambda model: model.mup_base_width > 0, "a mup_base_width above 0")
ROTARY = used_with("positions", "rotary")
BIASED = {"none": "", "qkv": "qkv", "all": "qkvo"}
STRETCHED = Used(lambda model: model.rotary_factor > 1, "a rotary_factor above 1")


@dataclass(frozen=True)
class GPTConfig:
    """Architecture.

    Attributes:
      n_layer: depth: how many layers, each attention and an MLP.
      n_head: attention heads of a layer; they share `d_model` evenly, unless `d_head` says otherwise.
      n_kv_head: heads of keys and values, each shared by as many heads of queries (arXiv 2305.13245); 0 means `n_head`.
      d_head: width of a head; 0 means ``d_model / n_head``.
      d_model: width: features of a token between layers.
      d_ff: MLP width; 0 means ``4 * d_model``.
      vocab_size: rows of the embedding; ids must stay below.
      context: longest sequence, in tokens.
      positions: ``learned``, added to the embedding, or ``rotary``: queries and keys turned, see `spdf_jax.model.rotary`.
      rotary_theta: base of its frequencies.
      rotary_factor: Llama 3's stretch of them: by this the lowest are divided; 1 for none.
      rotary_low_factor: those with fewer periods than this in `rotary_context` count as lowest.
      rotary_high_factor: those with more periods stay as they are; between, some of both.
      rotary_context: positions that the model was trained for before the stretch.
      tied_head: output head shares the embedding.
      use_bias: biases in linear layers and in layer norms.
      attention_bias: biases where `use_bias` gives none: ``none``, ``qkv`` (Qwen2) or ``all`` of attention's matrices.
      norm: ``layer_norm``, or ``rms_norm`` (`spdf_jax.model.rms_norm`).
      qk_norm: an RMS norm on each head's queries and keys (Qwen3).
      activation: of the MLP, ``gelu`` (GPT-2's, by tanh), ``gelu_exact`` (Cerebras-GPT), ``squared_relu``, ``relu``, ``silu``.
      gated: the MLP's hidden layer is ``activation(gate(x)) * up(x)``, with a third matrix (arXiv 2002.05202).
      activation_topk: places that keep a share of their channels, the largest by magnitude: ``mlp_neuron=0.25,attn_in=0.25``;
        `spdf_jax.model.places` has their names.
      attention_sink: a learned logit a head counts in the softmax, with a value of 0 (`spdf_jax.ops.attention_sink`).
      bigram: a table [V, V], from 0, of which a token adds its row to the logits.
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
      InputError: a value out of its range, a width that the heads do not divide, or options that exclude each other.

    >>> GPTConfig(n_layer=2, n_head=4, d_model=64).mlp_width
    256
    """

    n_layer: Count = 4
    n_head: Count = 4
    n_kv_head: CountOrZero = 0
    d_head: CountOrZero = 0
    d_model: Count = 256
    d_ff: CountOrZero = 0
    vocab_size: Count = 4096
    context: Count = 256
    positions: Annotated[str, OneOf(("learned", "rotary"))] = "learned"
    rotary_theta: Annotated[float, Range(above=0), ROTARY] = 10000.0
    rotary_factor: Annotated[float, Range(least=1), ROTARY] = 1.0
    rotary_low_factor: Annotated[float, Range(above=0), STRETCHED] = 1.0
    rotary_high_factor: Annotated[float, Range(above=0), STRETCHED] = 4.0
    rotary_context: Annotated[Count, STRETCHED] = 8192
    tied_head: bool = True
    use_bias: bool = True
    attention_bias: Annotated[str, OneOf(BIASED), Used(lambda model: not model.use_bias, "use_bias False")] = "none"
    norm: Annotated[str, OneOf(("layer_norm", "rms_norm"))] = "layer_norm"
    qk_norm: bool = False
    activation: Annotated[str, OneOf(("gelu", "gelu_exact", "relu", "squared_relu", "silu"))] = "gelu"
    gated: bool = False
    activation_topk: Line = ""
    attention_sink: bool = False
    bigram: bool = False
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
        if not self.d_head and self.d_model % self.n_head:
            raise InputError(f"model.d_model: {self.d_model} is not divisible by model.n_head {self.n_head}")
        if self.n_head % self.kv_heads:
            raise InputError(f"model.n_kv_head: {self.n_kv_head} does not divide model.n_head {self.n_head}")
        if self.positions == "rotary" and self.head_width % 2:
            raise InputError(f"model.positions: 'rotary' turns pairs, and heads are {self.head_width} wide; set d_head")
        if self.rotary_factor > 1 and self.rotary_low_factor >= self.rotary_high_factor:
            raise InputError(f"model.rotary_low_factor: {self.rotary_low_factor} must be below rotary_high_factor")
        if (self.dconv or self.shared_qk) and not self.kv_heads * self.head_width == self.d_model:
            raise InputError("model.dconv, shared_qk: for keys as wide as the model; leave n_kv_head, d_head at 0")
        check_places(self)

    @property
    def mlp_width(self) -> int:
        """F."""
        return self.d_ff or 4 * self.d_model

    @property
    def head_width(self) -> int:
        """K."""
        return self.d_head or self.d_model // self.n_head

    @property
    def attention_width(self) -> int:
        """H K, over all heads."""
        return self.n_head * self.head_width

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    def has_bias(self, name: str) -> bool:
        """Whether a linear layer, such as ``attn_q``, has one."""
        return self.use_bias or name in [f"attn_{x}" for x in BIASED[self.attention_bias]]

    @property
    def convolved(self) -> str:
        """Which of q, k, v are."""
        return ("kv" if self.shared_qk else "qkv") if self.dconv else ""


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
    return MuParScales(fan_in**-0.5, config.head_width**-0.5, config.mup_alpha / width, 1 / fan_in)
