"""Task examples to tokens and batches: the loss counts target tokens only, rows of like length share a batch.

An example is context, end of text, " " + target, end of text; a pair is a context with one of its references.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from spdf_jax.data.examples import TASK_SPLITS, Example, Task, TaskSplit
from spdf_jax.data.pipeline import Batch, check_batching
from spdf_jax.data.tokenizer import encode_plain, end_of_text_id
from spdf_jax.errors import InputError

_BUCKET_FRACTIONS = (1 / 8, 3 / 16, 1 / 4, 1 / 2, 1)
_BUCKET_MULTIPLE = 8


class Pair(NamedTuple):
    """One context with one target.

    Attributes:
      tokens: int32 ids of context, end of text, target, end of text.
      target_start: Where the target starts in `tokens`.
    """

    tokens: np.ndarray
    target_start: int


class EncodedTask(NamedTuple):
    """A task in tokens.

    Attributes:
      train, validation, test: A pair for each reference of each example, in order.
      cut_contexts: Pairs whose context lost its end.
      cut_targets: Pairs whose target lost its end too: what it lost is never scored.
    """

    train: tuple[Pair, ...]
    validation: tuple[Pair, ...]
    test: tuple[Pair, ...]
    cut_contexts: int
    cut_targets: int


def encode_task(task: Task, tokenizer: Tokenizer, seq_len: int) -> EncodedTask:
    """Tokens of every pair, at most seq_len + 1 of them.

    Where a pair is longer, its context loses its end: what matters in an article comes first. A target that is too long
    even without context loses its end too, with the final end of text.

    Args:
      task: The examples.
      tokenizer: As `load_tokenizer` gives one; its end of text, spelled in an example, is ordinary text.
      seq_len: Positions T of the longest row.

    Returns:
      The pairs and how many were cut.

    Raises:
      InputError: `seq_len` is under 1.

    >>> from spdf_jax.data.tokenizer import train_tokenizer
    >>> example = Example("a[b]", ("c.", "d."))
    >>> task = Task((example,), (example,), (example,), style="e2e")
    >>> tokenizer = train_tokenizer([], vocab_size=257, progress=False)  # bytes, and end of text is 0
    >>> encode_task(task, tokenizer, seq_len=16).train[1]
    Pair(tokens=array([ 65,  59,  66,  61,   0, 221,  68,  14,   0], dtype=int32), target_start=5)
    """
    if seq_len < 1:
        raise InputError(f"seq_len={seq_len}: must be at least 1")
    end = end_of_text_id(tokenizer)
    splits: dict[TaskSplit, tuple[Pair, ...]] = {}
    cut_contexts = cut_targets = 0
    for split in TASK_SPLITS:
        examples = getattr(task, split)
        contexts = encode_plain(tokenizer, [example.context for example in examples])
        targets = iter(encode_plain(tokenizer, [f" {text}" for example in examples for text in example.references]))
        pairs = []
        for example, context in zip(examples, contexts, strict=True):
            for _ in example.references:
                target = [*next(targets), end]
                room = max(0, seq_len - len(target))  # of seq_len + 1, one is the end of the context
                cut_contexts += len(context) > room
                cut_targets += len(target) > seq_len
                tokens = np.array([*context[:room], end, *target[:seq_len]], np.int32)
                pairs.append(Pair(tokens, min(len(context), room) + 1))
        splits[split] = tuple(pairs)
    return EncodedTask(**splits, cut_contexts=cut_contexts, cut_targets=cut_targets)


def encode_prompts(examples: Sequence[Example], tokenizer: Tokenizer, *, max_tokens: int) -> list[list[int]]:
    """What to decode from: context and end of text, the context cut at its end as `encode_task` does.

    Args:
      examples: One prompt each.
      tokenizer: As in `encode_task`.
      max_tokens: Of a prompt: the model's context less the tokens to be decoded.

    Returns:
      The ids of every prompt.

    Raises:
      InputError: `max_tokens` is under 1.

    >>> from spdf_jax.data.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer([], vocab_size=257, progress=False)
    >>> encode_prompts([Example("abc", ("d",))], tokenizer, max_tokens=3)
    [[65, 66, 0]]
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens={max_tokens}: no room for a prompt; lower max_new_tokens or raise the context")
    contexts = encode_plain(tokenizer, [example.context for example in examples])
    return [[*context[: max_tokens - 1], end_of_text_id(tokenizer)] for context in contexts]


def decode_texts(tokens: Sequence[Sequence[int]], tokenizer: Tokenizer) -> list[str]:
    """Texts of decoded targets, without end of text and outer white space.

    Args:
      tokens: Ids of each target.
      tokenizer: What `encode_prompts` used.

    Returns:
      One text each.

    >>> from spdf_jax.data.tokenizer import train_tokenizer
    >>> decode_texts([[221, 68, 14, 0]], train_tokenizer([], vocab_size=257, progress=False))
    ['d.']
    """
    return [tokenizer.decode(list(ids), skip_special_tokens=True).strip() for ids in tokens]


def steps_per_epoch(n_pairs: int, batch_size: int) -> int:
    """Batches that hold every pair once, the last one perhaps not full.

    >>> steps_per_epoch(42061, 8)
    5258
    """
    return -(-n_pairs // batch_size)


def length_buckets(seq_len: int) -> tuple[int, ...]:
    """The lengths T a batch may be padded to: each costs one compilation, and steps of short rows cost less.

    >>> length_buckets(512)
    (64, 96, 128, 256, 512)
    """
    rounded = (-(-int(seq_len * fraction) // _BUCKET_MULTIPLE) * _BUCKET_MULTIPLE for fraction in _BUCKET_FRACTIONS)
    return tuple(sorted({min(max(length, _BUCKET_MULTIPLE), seq_len) for length in rounded}))


def task_batches(
    pairs: Sequence[Pair],
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Batches without end: every pair once an epoch of `steps_per_epoch` batches, each epoch in another order.

    A batch is padded on the right to the smallest of `length_buckets` that fits its longest row, with token 0 at weight
    0; rows that the last batch of an epoch lacks are all weight 0. To keep padding small, a shuffled epoch is sorted by
    bucket before it is cut into batches, and the batches are then shuffled: pairs of one bucket meet at random.

    Args:
      pairs: A split of `encode_task` for the same or a smaller `seq_len`.
      seq_len: Positions T of the longest row.
      batch_size: Rows B in a global batch, of all processes together.
      seed: Of the orders.
      start_batch: First batch to yield: as many as have been trained on.
      process_index: This process, which gets its contiguous rows of every batch.
      process_count: Processes that share a batch; all of them get the same T.

    Returns:
      An iterator over batches of batch_size / process_count rows.

    Raises:
      InputError: No pairs, a pair longer than `seq_len`, or a number does not fit.

    >>> batch = next(task_batches([Pair(np.arange(5), 3)], seq_len=8, batch_size=1, seed=0))
    >>> batch.targets_BT, batch.weights_BT
    (array([[1, 2, 3, 4, 0, 0, 0, 0]], dtype=int32), array([[0., 0., 1., 1., 0., 0., 0., 0.]], dtype=float32))
    """
    _check_pairs(pairs, seq_len, batch_size, process_index, process_count)
    if seed < 0 or start_batch < 0:
        raise InputError(f"seed={seed}, start_batch={start_batch}: neither may be negative")
    bucket_of = np.searchsorted(length_buckets(seq_len), [len(pair.tokens) - 1 for pair in pairs])
    n_steps = steps_per_epoch(len(pairs), batch_size)

    def read() -> Iterator[Batch]:
        epoch, first = divmod(start_batch, n_steps)
        while True:
            for rows in _epoch(bucket_of, batch_size, seed, epoch)[first:]:
                yield _batch([pairs[row] for row in rows], seq_len, batch_size, process_index, process_count)
            epoch, first = epoch + 1, 0

    return read()


def task_validation_batches(
    pairs: Sequence[Pair], *, seq_len: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Every pair exactly once, shortest first, padded as by `task_batches`.

    Args:
      pairs: A split of `encode_task` for the same or a smaller `seq_len`.
      seq_len: Positions T of the longest row.
      batch_size: Rows B in a global batch, of all processes together.
      process_index: This process, which gets its contiguous rows of every batch.
      process_count: Processes that share a batch; all of them get as many batches.

    Returns:
      An iterator over batches of batch_size / process_count rows.

    Raises:
      InputError: No pairs, a pair longer than `seq_len`, or a number does not fit.

    >>> pairs = [Pair(np.arange(n), 1) for n in (9, 3, 4)]
    >>> [batch.tokens_BT.shape for batch in task_validation_batches(pairs, seq_len=64, batch_size=2)]
    [(2, 8), (2, 8)]
    """
    _check_pairs(pairs, seq_len, batch_size, process_index, process_count)
    ordered = sorted(pairs, key=lambda pair: len(pair.tokens))
    return (
        _batch(ordered[start : start + batch_size], seq_len, batch_size, process_index, process_count)
        for start in range(0, len(ordered), batch_size)
    )


def _check_pairs(pairs: Sequence[Pair], seq_len: int, batch_size: int, process_index: int, process_count: int) -> None:
    check_batching(seq_len, batch_size, process_index, process_count)
    if not pairs:
        raise InputError("no pair of a context and a target; give examples with references")
    longest = max(len(pair.tokens) for pair in pairs)
    if longest > seq_len + 1:
        raise InputError(f"a pair of {longest} tokens is over seq_len={seq_len} and its last target; encode it shorter")


def _epoch(bucket_of: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The pairs of every batch of an epoch."""
    # Raw bits of PCG64 rather than a Generator's shuffle: NumPy guarantees their stream, so a resumed run finds its place.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    order = np.argsort(bits.random_raw(len(bucket_of)), kind="stable")
    # Longest first: the batch that is not full is then of the shortest rows, which are many.
    order = order[np.argsort(-bucket_of[order], kind="stable")]
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in np.argsort(bits.random_raw(len(batches)), kind="stable")]


def _batch(rows: Sequence[Pair], seq_len: int, batch_size: int, process_index: int, process_count: int) -> Batch:
    """This process's share of a global batch, padded to a bucket that all of its rows decide."""
    longest = max(len(pair.tokens) for pair in rows) - 1
    length = next(bucket for bucket in length_buckets(seq_len) if bucket >= longest)
    share_size = batch_size // process_count
    ids = np.zeros((share_size, length + 1), np.int32)
    weights_BT = np.zeros((share_size, length), np.float32)
    for i, pair in enumerate(rows[process_index * share_size : (process_index + 1) * share_size]):
        ids[i, : len(pair.tokens)] = pair.tokens
        weights_BT[i, pair.target_start - 1 : len(pair.tokens) - 1] = 1
    return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weights_BT)
