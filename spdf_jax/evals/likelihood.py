"""How likely texts are under a model: continuations of contexts, and whole texts in rolling windows.

Shape legend: B windows in a batch, T positions in a window, V vocabulary.
"""

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh

from spdf_jax.data import Batch, length_buckets
from spdf_jax.data.tokenizer import Tokenizer, encode_plain
from spdf_jax.errors import InputError
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import batch_devices, batch_sharding, parameter_shardings, replicated


class Window(NamedTuple):
    """Ids that the model sees at once, and how many of them, at the end, it is scored on.

    Attributes:
      tokens: ids [at most ``context + 1``]; the last one is a target only.
      scored_tokens: how many; the first of `tokens` never is.
    """

    tokens: np.ndarray
    scored_tokens: int


class Perplexity(NamedTuple):
    """Exponentials of the mean negative log-likelihood; each mean is over all texts together.

    Attributes:
      per_token, per_word, per_byte: the perplexities; only the last two compare between tokenizers.
      tokens, words, utf8_bytes: what was counted; words are what blanks separate.
    """

    per_token: float
    per_word: float
    per_byte: float
    tokens: int
    words: int
    utf8_bytes: int


def log_likelihoods(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    pairs: Sequence[tuple[str, str]],
    *,
    batch_size: int,
    end_of_text: int,
    mesh: Mesh | None = None,
) -> list[tuple[float, int, bool]]:
    """The log-likelihood of continuations, each given its context.

    Tokens are those of EleutherAI's harness (``lm_eval/api/model.py``, ``TemplateLM``): blanks at the end of a context move to
    its continuation; both are encoded as one text, and its tokens past as many as the context alone has are the continuation.
    Where a merge crosses the border its token therefore counts as context: begin a continuation with its blank. A spelled end
    of text is ordinary text. A context too long loses its beginning; an empty one is `end_of_text`.

    Args:
      model: `spdf_jax.GPT`.
      params: its parameters, masks applied.
      tokenizer: the model's.
      pairs: (context, continuation).
      batch_size: most windows at once; changes no result but for rounding.
      end_of_text: id that stands for an empty context.
      mesh: `spdf_jax.sharding.make_mesh`; splits the batch over ``data`` and ``fsdp``. None: wherever `params` are.

    Returns:
      For each pair, in order: the sum of the continuation's log-probabilities in nats, its number of tokens, and whether each
      of them is the likeliest at its place.

    Raises:
      InputError: a continuation without tokens of its own or longer than the context, or an id outside the vocabulary.

    >>> from spdf_jax.data.tokenizer import train_tokenizer
    >>> from spdf_jax.model.config import GPTConfig
    >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=260, progress=False)
    >>> model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=260, context=16))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    >>> ((log_likelihood, tokens, _),) = log_likelihoods(
    ...     model, params, tokenizer, [("to be", " or")], batch_size=8, end_of_text=0
    ... )
    >>> tokens, abs(log_likelihood / tokens + math.log(260)) < 0.1  # untrained: every token is about as likely
    (3, True)
    """
    split = [_move_blanks(*pair) for pair in pairs]
    context_ids = encode_plain(tokenizer, [context for context, _ in split])
    whole_ids = encode_plain(tokenizer, [context + continuation for context, continuation in split])
    windows = []
    for index, (before, whole) in enumerate(zip(context_ids, whole_ids, strict=True)):
        scored = len(whole) - len(before)
        if not 1 <= scored <= model.config.context:
            raise InputError(
                f"pairs[{index}]: continuation {pairs[index][1]!r:.40} has {max(scored, 0)} tokens of its own, must be 1 to "
                f"model.context {model.config.context}: begin it at the start of a word, or shorten it"
            )
        tokens = whole if before else [end_of_text, *whole]
        windows.append(Window(np.array(tokens[-(model.config.context + 1) :], np.int32), scored))
    scores = _score_windows(model, params, windows, batch_size, mesh)
    return [(total, w.scored_tokens, greedy) for w, (total, greedy) in zip(windows, scores, strict=True)]


def rolling_log_likelihoods(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    batch_size: int,
    end_of_text: int,
    stride_tokens: int = 0,
    mesh: Mesh | None = None,
) -> list[tuple[float, int]]:
    """The log-likelihood of whole texts, every token scored exactly once, each text by itself after `end_of_text`.

    Args:
      model: `spdf_jax.GPT`.
      params: its parameters, masks applied.
      tokenizer: the model's.
      texts: of any length; an empty one has log-likelihood 0.
      batch_size: most windows at once; changes no result but for rounding.
      end_of_text: id that comes before each text.
      stride_tokens: see `rolling_windows`.
      mesh: as for `log_likelihoods`.

    Returns:
      For each text, in order: the sum of its tokens' log-probabilities in nats, and its number of tokens.

    Raises:
      InputError: a stride that does not fit, or an id outside the vocabulary.
    """
    ids = encode_plain(tokenizer, texts)
    cut = functools.partial(
        rolling_windows, end_of_text=end_of_text, seq_len=model.config.context, stride_tokens=stride_tokens
    )
    windows = [list(cut(tokens)) for tokens in ids]
    scores = iter(_score_windows(model, params, [w for of_text in windows for w in of_text], batch_size, mesh))
    totals = [math.fsum(next(scores)[0] for _ in of_text) for of_text in windows]
    return [(total, len(tokens)) for total, tokens in zip(totals, ids, strict=True)]


def rolling_windows(
    tokens: Sequence[int], *, end_of_text: int, seq_len: int, stride_tokens: int = 0
) -> Iterator[Window]:
    """Windows that together score every token once.

    The first scores up to `seq_len` tokens; each later one the next `stride_tokens`, seeing as much before them as fits: the
    last window reaches back, too. Those of EleutherAI's harness (``lm_eval/utils.py``), whose ``context_len`` is
    ``seq_len - stride_tokens + 1``. Windows in full are those of `spdf_jax.data.validation_batches` at the default stride.

    Args:
      tokens: ids of a text.
      end_of_text: id put before them.
      seq_len: most tokens that the model sees.
      stride_tokens: 1 to `seq_len`; 0 stands for `seq_len`, the fewest windows. A smaller one gives tokens more context.

    Yields:
      `Window`; none for no tokens.

    Raises:
      InputError: a stride outside its range.

    >>> for window in rolling_windows([1, 2, 3, 4, 5], end_of_text=0, seq_len=3):
    ...     print(window.tokens, window.scored_tokens)
    [0 1 2 3] 3
    [2 3 4 5] 2
    """
    stride = stride_tokens or seq_len
    if not 1 <= stride <= seq_len:
        raise InputError(
            f"stride_tokens: {stride_tokens} is outside 1 to {seq_len}, what the model sees; 0 is the longest"
        )
    stream = np.array([end_of_text, *tokens], np.int32)
    start, end = 0, min(seq_len, len(tokens))
    while start < end:
        yield Window(stream[max(end - seq_len, 0) : end + 1], end - start)
        start, end = end, min(end + stride, len(tokens))


def perplexity(texts: Sequence[str], scores: Sequence[tuple[float, int]]) -> Perplexity:
    """Perplexities of texts.

    Args:
      texts: what was scored.
      scores: of each its log-likelihood in nats and its tokens, as `rolling_log_likelihoods` gives them.

    Returns:
      `Perplexity`.

    Raises:
      InputError: not a word in all the texts.

    >>> perplexity(["ab cd"], [(-5 * math.log(2.0), 2)]).per_byte
    2.0
    """
    words, utf8_bytes = sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts)
    if not words:
        raise InputError(f"texts: there is no word in {len(texts)} of them to take a perplexity over; give some text")
    nats, tokens = -math.fsum(total for total, _ in scores), sum(n for _, n in scores)
    per_token, per_word, per_byte = (_exp(nats / n) for n in (tokens, words, utf8_bytes))
    return Perplexity(per_token, per_word, per_byte, tokens, words, utf8_bytes)


def _exp(x: float) -> float:
    """Infinity where it is too large: a long text without blanks is one word."""
    return math.exp(x) if x < 709 else math.inf


def _move_blanks(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _score_windows(
    model: GPT, params: Any, windows: Sequence[Window], batch_size: int, mesh: Mesh | None
) -> list[tuple[float, bool]]:
    """Of each window the scored tokens' summed log-probability, and whether all of them are the likeliest."""
    if batch_size < 1:
        raise InputError(f"batch_size: {batch_size} must be at least 1")
    largest = max((int(w.tokens.max()) for w in windows), default=0)
    if largest >= model.config.vocab_size:
        raise InputError(
            f"tokenizer: token {largest} is outside the vocabulary, 0 to {model.config.vocab_size - 1}: use the model's own"
        )
    devices = 1
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(mesh, params))
        devices = batch_devices(mesh)
    size = -(-batch_size // devices) * devices
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, window in enumerate(windows):
        by_length[next(n for n in length_buckets(model.config.context) if n >= len(window.tokens) - 1)].append(index)
    pending = []
    for length, indices in by_length.items():
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            batch = _batch([windows[i] for i in chosen], size, length)
            batch = jax.device_put(batch, None if mesh is None else batch_sharding(mesh, 2))
            pending.append((chosen, _score(model, mesh, params, batch)))
    found: dict[int, tuple[float, bool]] = {}
    for chosen, rows in pending:
        totals_B, greedy_B = jax.device_get(rows)
        found |= {i: (float(totals_B[row]), bool(greedy_B[row])) for row, i in enumerate(chosen)}
    return [found[index] for index in range(len(windows))]


def _batch(windows: Sequence[Window], size: int, length: int) -> Batch:
    """Rows padded on the right, where a causal model does not look from what is scored; empty rows fill up."""
    ids = np.zeros((size, length + 1), np.int32)
    weights_BT = np.zeros((size, length), np.float32)
    for row, (tokens, scored) in enumerate(windows):
        ids[row, : len(tokens)] = tokens
        weights_BT[row, len(tokens) - 1 - scored : len(tokens) - 1] = 1
    return Batch(ids[:, :-1], ids[:, 1:], weights_BT)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(model: GPT, mesh: Mesh | None, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
    logits_BTV: Any = model.apply({"params": params}, batch.tokens_BT)
    logits_BTV = logits_BTV.astype(jnp.float32)
    target_BT = jnp.take_along_axis(logits_BTV, batch.targets_BT[..., None], axis=-1)[..., 0]
    log_probs_BT = target_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    likeliest_BT = logits_BTV.argmax(-1) == batch.targets_BT
    rows = (log_probs_BT * batch.weights_BT).sum(-1), (likeliest_BT | (batch.weights_BT == 0)).all(-1)
    return rows if mesh is None else lax.with_sharding_constraint(rows, replicated(mesh))
