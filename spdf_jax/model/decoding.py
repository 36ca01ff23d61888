"""The strategies of decoding, each one compiled loop: token by token (greedy, sampled), and beam search.

Shape legend: B prompts, N beams, C candidates, R rows of the model (B, or B * N), S positions of prompt and continuation,
V vocabulary.
"""

import dataclasses
import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from spdf_jax.fields import Count, CountOrZero, OneOf, Range, Used, check_fields, used_with
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.gpt import GPT
from spdf_jax.model.primer import TAPS
from spdf_jax.sharding import replicated

METHODS = ("greedy", "sample", "beam")


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How to continue a prompt. The defaults for beams are those of SPDF's fine-tuning, from LoRA (Hu et al. 2022, table 11).

    Attributes:
      method: ``greedy``, ``sample`` or ``beam``.
      max_new_tokens: longest continuation, its end token included.
      beam_size: beams; for ``beam``.
      length_penalty: a continuation of n tokens scores its log-probability / n^length_penalty.
      no_repeat_ngram: no n-gram of this many tokens occurs twice in a continuation; 0 allows all.
      no_repeat_counts_prompt: nor one of the prompt's, as in ``transformers``. Not for data-to-text, where the prompt's phrases
        are to be copied, and whose papers count the continuation alone (microsoft/LoRA, ``examples/NLG/src/gpt2_beam.py``).
      temperature: divides the logits; for ``sample``.
      top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this; for ``sample``.
      batch_size: most prompts decoded at once; changes no result but for rounding.
      seed: what ``sample`` draws from.
    """

    method: Annotated[str, OneOf(METHODS)] = "greedy"
    max_new_tokens: Count = 64
    beam_size: Annotated[Count, used_with("method", "beam")] = 10
    length_penalty: Annotated[float, Range(), used_with("method", "beam")] = 0.9
    no_repeat_ngram: CountOrZero = 0
    no_repeat_counts_prompt: Annotated[bool, Used(lambda c: c.no_repeat_ngram > 0, "a no_repeat_ngram above 0")] = False
    temperature: Annotated[float, Range(above=0), used_with("method", "sample")] = 1.0
    top_p: Annotated[float, Range(above=0, most=1), used_with("method", "sample")] = 1.0
    batch_size: Count = 16
    seed: Annotated[CountOrZero, used_with("method", "sample")] = 0

    def __post_init__(self) -> None:
        check_fields(self, "decode")


def empty_cache(config: GPTConfig, batch_size: int, length: int) -> dict[str, Any]:
    """The ``cache`` collection for `GPT` called with positions.

    Args:
      config: the model's.
      batch_size: B, sequences.
      length: S, positions that a sequence may reach, prompt included.

    Returns:
      Zeros in the compute dtype: keys and values [L, B, S, kv_heads, K], of each convolution the last two inputs [L, B, 2, D].

    >>> jax.tree.map(jnp.shape, empty_cache(GPTConfig(), 8, 64))
    {'blocks': {'kv': ((4, 8, 64, 4, 64), (4, 8, 64, 4, 64))}}
    """
    c = config
    shape = (c.n_layer, batch_size, length, c.kv_heads, c.head_width)
    cache: dict[str, Any] = {"kv": (jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))}
    for name in c.convolved:
        cache[f"dconv_{name}"] = {"last": jnp.zeros((c.n_layer, batch_size, TAPS - 1, c.d_model), c.dtype)}
    return {"blocks": cache}


class Program(NamedTuple):
    """What a compiled program is specific to."""

    model: GPT
    config: DecodeConfig
    ends: tuple[int, ...]
    bucket: int
    mesh: Mesh | None


class Rows(NamedTuple):
    """Continuations; lengths count the prompt."""

    tokens_BS: jax.Array
    lengths_B: jax.Array
    log_probs_B: jax.Array
    scores_B: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def decode(
    program: Program, params: Any, tokens_BS: jax.Array, lengths_B1: jax.Array, indices_B1: jax.Array, key: jax.Array
) -> Rows:
    """Continues prompts of `lengths_B1` tokens, padded to the program's bucket; what is sampled depends on a prompt's index."""
    p = program
    B, S = tokens_BS.shape
    # The last token of each prompt is left to the first step, which spares logits for all positions here.
    at_BT = jnp.arange(p.bucket)[None]
    positions_BT = jnp.where(at_BT < lengths_B1 - 1, at_BT, -1)
    _, cache = _apply(p, params, empty_cache(p.model.config, B, S), tokens_BS[:, : p.bucket], positions_BT)
    if p.config.method == "beam":
        rows = _beam_search(p, params, cache, tokens_BS, lengths_B1[:, 0])
    else:
        keys_B = jax.vmap(jax.random.fold_in, (None, 0))(key, indices_B1[:, 0])
        rows = _one_by_one(p, params, cache, tokens_BS, lengths_B1[:, 0], keys_B)
    return rows if p.mesh is None else lax.with_sharding_constraint(rows, replicated(p.mesh))


class _Walk(NamedTuple):
    step: jax.Array
    rows: Rows
    done_B: jax.Array
    cache: Any


def _one_by_one(
    p: Program, params: Any, cache: Any, tokens_BS: jax.Array, lengths_B: jax.Array, keys_B: jax.Array
) -> Rows:
    """Greedy and sampled decoding."""
    (B, S), first_B = tokens_BS.shape, lengths_B
    zeros_B = jnp.zeros(B, jnp.float32)

    def advance(w: _Walk) -> _Walk:
        tokens_BS, lengths_B, log_probs_B, _ = w.rows
        next_BV, cache = _next_log_probs(p, params, w.cache, tokens_BS, lengths_B, first_B)
        if p.config.method == "greedy":
            token_B = next_BV.argmax(-1)
        else:
            token_B = jax.vmap(lambda key, next_V: _draw(p.config, jax.random.fold_in(key, w.step), next_V))(
                keys_B, next_BV
            )
        log_probs_B = jnp.where(w.done_B, log_probs_B, log_probs_B + _pick(next_BV, token_B))
        tokens_BS = _write(tokens_BS, jnp.where(w.done_B, S, lengths_B), token_B)
        lengths_B = lengths_B + ~w.done_B
        scores_B = log_probs_B / _penalty(p.config, lengths_B - first_B)
        rows = Rows(tokens_BS, lengths_B, log_probs_B, scores_B)
        return _Walk(w.step + 1, rows, w.done_B | _ends(p, token_B), cache)

    start = _Walk(jnp.int32(0), Rows(tokens_BS, lengths_B, zeros_B, zeros_B), jnp.zeros(B, bool), cache)
    return lax.while_loop(lambda w: (w.step < p.config.max_new_tokens) & ~w.done_B.all(), advance, start).rows


class _Beams(NamedTuple):
    """Live beams by falling log-probability, all of one length; finished ones by falling score, -inf where there is none."""

    step: jax.Array
    tokens_BNS: jax.Array
    log_probs_BN: jax.Array
    finished: Rows  # every field with an axis N after B
    done_B: jax.Array
    cache: Any


def _beam_search(p: Program, params: Any, cache: Any, tokens_BS: jax.Array, lengths_B: jax.Array) -> Rows:
    B, S = tokens_BS.shape
    N, V = p.config.beam_size, p.model.config.vocab_size
    # So many that N of them go on even if every end token of every beam is among them.
    C = min(max(2, 1 + len(p.ends)) * N, N * V)

    def advance(b: _Beams) -> _Beams:
        length_B, count = lengths_B + b.step, b.step + 1
        rows = b.tokens_BNS.reshape(B * N, S), jnp.repeat(length_B, N), jnp.repeat(lengths_B, N)
        next_RV, cache = _next_log_probs(p, params, b.cache, *rows)
        totals_BNV = b.log_probs_BN[..., None] + next_RV.reshape(B, N, V)
        log_probs_BC, flat_BC = lax.top_k(totals_BNV.reshape(B, N * V), C)
        parent_BC, token_BC = flat_BC // V, flat_BC % V
        tokens_BCS = jax.vmap(_write, (1, None, 1), 1)(_pick(b.tokens_BNS, parent_BC), length_B, token_BC)
        ended_BC = _ends(p, token_BC) | (count == p.config.max_new_tokens)

        # A candidate outside the best N goes on if it can, but may not finish.
        may_finish_BC = ended_BC & (jnp.arange(C) < N)[None] & ~b.done_B[:, None]
        scores_BC = jnp.where(may_finish_BC, log_probs_BC / _penalty(p.config, count), -jnp.inf)
        candidates = Rows(tokens_BCS, jnp.broadcast_to(length_B[:, None] + 1, (B, C)), log_probs_BC, scores_BC)
        everything = jax.tree.map(lambda old, new: jnp.concatenate([old, new], 1), b.finished, candidates)
        best_BN = lax.top_k(everything.scores_B, N)[1]
        finished = jax.tree.map(lambda x: _pick(x, best_BN), everything)

        live_BN, kept_BN = lax.top_k(jnp.where(ended_BC, -jnp.inf, log_probs_BC), N)
        cache = jax.tree.map(functools.partial(_reorder, parent_BN=_pick(parent_BC, kept_BN)), cache)
        # Whether the best live beam would still enter if it ended here: a guess where a longer one scores better.
        hopeless_B = live_BN[:, 0] / _penalty(p.config, count) <= finished.scores_B[:, -1]
        return _Beams(count, _pick(tokens_BCS, kept_BN), live_BN, finished, b.done_B | hopeless_B, cache)

    tokens_BNS = jnp.repeat(tokens_BS[:, None], N, 1)
    none_BN = jnp.full((B, N), -jnp.inf, jnp.float32)
    finished = Rows(tokens_BNS, jnp.repeat(lengths_B[:, None], N, 1), none_BN, none_BN)
    start = _Beams(
        jnp.int32(0),
        tokens_BNS,
        none_BN.at[:, 0].set(0.0),  # the beams are equal at first: only one may have children
        finished,
        jnp.zeros(B, bool),
        jax.tree.map(lambda x: jnp.repeat(x, N, 1), cache),
    )
    end = lax.while_loop(lambda b: (b.step < p.config.max_new_tokens) & ~b.done_B.all(), advance, start)
    return jax.tree.map(lambda x: x[:, 0], end.finished)


def _apply(p: Program, params: Any, cache: Any, tokens_RT: jax.Array, positions_RT: jax.Array) -> tuple[jax.Array, Any]:
    variables = {"params": params, "cache": cache}
    logits_RTV, new = p.model.apply(variables, tokens_RT, positions_BT=positions_RT, mutable=["cache"])
    return logits_RTV, new["cache"]


def _next_log_probs(
    p: Program, params: Any, cache: Any, tokens_RS: jax.Array, lengths_R: jax.Array, prompts_R: jax.Array
) -> tuple[jax.Array, Any]:
    """Log-probabilities of the token after each row, float32, -inf where it would repeat an n-gram."""
    last_R1 = (lengths_R - 1)[:, None]
    logits_RTV, cache = _apply(p, params, cache, jnp.take_along_axis(tokens_RS, last_R1, 1), last_R1)
    log_probs_RV = jax.nn.log_softmax(logits_RTV[:, 0].astype(jnp.float32))
    if p.config.no_repeat_ngram:
        since_R = jnp.zeros_like(prompts_R) if p.config.no_repeat_counts_prompt else prompts_R
        repeats_RV = _repeats(tokens_RS, since_R, lengths_R, p.config.no_repeat_ngram, log_probs_RV.shape[-1])
        log_probs_RV = jnp.where(repeats_RV, -jnp.inf, log_probs_RV)
    return log_probs_RV, cache


def _repeats(tokens_RS: jax.Array, since_R: jax.Array, lengths_R: jax.Array, n: int, vocab_size: int) -> jax.Array:
    """Whether a token after each row would complete an n-gram that the row holds from `since_R` on, bool [R, V]."""
    R, S = tokens_RS.shape
    starts = max(S - n + 1, 0)
    at_1S = jnp.arange(starts)[None]
    found = (at_1S >= since_R[:, None]) & (at_1S + n <= lengths_R[:, None])
    for i in range(n - 1):
        suffix_R1 = jnp.take_along_axis(tokens_RS, jnp.maximum(lengths_R - (n - 1) + i, 0)[:, None], 1)
        found &= tokens_RS[:, i : i + starts] == suffix_R1
    completing = jnp.where(found, tokens_RS[:, n - 1 :], vocab_size)  # out of range: dropped
    return jax.vmap(lambda row_V, at: row_V.at[at].set(True))(jnp.zeros((R, vocab_size), bool), completing)


def _draw(config: DecodeConfig, key: jax.Array, log_probs_V: jax.Array) -> jax.Array:
    """A token by temperature, then nucleus (Holtzman et al. 2020, arXiv 1904.09751, section 3.1)."""
    logits_V = log_probs_V / config.temperature
    if config.top_p == 1:
        return jax.random.categorical(key, logits_V)
    falling_V, order_V = lax.top_k(logits_V, len(logits_V))
    probs_V = jax.nn.softmax(falling_V)
    mass_before_V = jnp.cumsum(probs_V) - probs_V
    return order_V[jax.random.categorical(key, jnp.where(mass_before_V < config.top_p, falling_V, -jnp.inf))]


def _ends(p: Program, tokens: jax.Array) -> jax.Array:
    return jnp.isin(tokens, jnp.array(p.ends, tokens.dtype))


def _penalty(config: DecodeConfig, generated_tokens: jax.Array) -> jax.Array:
    return generated_tokens.astype(jnp.float32) ** config.length_penalty


def _pick(x: jax.Array, indices: jax.Array) -> jax.Array:
    """x[b, indices[b]] for every b."""
    return jax.vmap(lambda row, at: row[at])(x, indices)


def _write(tokens_BS: jax.Array, positions_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Puts a token into every row; a position out of range writes nothing."""
    return jax.vmap(lambda row_S, at, token: row_S.at[at].set(token))(tokens_BS, positions_B, token_B)


def _reorder(x: jax.Array, *, parent_BN: jax.Array) -> jax.Array:
    """A cache leaf [L, B * N, ...] whose beams become those of their parents."""
    L, _, *rest = x.shape
    picked = jax.vmap(lambda x_LN, at_N: x_LN[:, at_N], (1, 0), 1)(x.reshape(L, *parent_BN.shape, *rest), parent_BN)
    return picked.reshape(x.shape)
