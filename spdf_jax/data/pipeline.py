"""Tokens to batches. The stream is cut every `seq_len` tokens; window n holds tokens n*seq_len to (n+1)*seq_len.

Window n has seq_len + 1 tokens, so its last one, a target only, is the first input of window n + 1.
"""

import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from spdf_jax.data.mixture import Mixture, turn, windows_of
from spdf_jax.errors import InputError

# Reading a window is a small copy from a memory map: few threads keep ahead of any step, few batches wait in memory.
_READ_OPTIONS = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class Batch(NamedTuple):
    """Inputs and next tokens; float32 weights, 0 where a target is padding; ids of documents to be kept apart, if any are."""

    tokens_BT: np.ndarray
    targets_BT: np.ndarray
    weights_BT: np.ndarray
    segments_BT: np.ndarray | None = None


class _Windows:
    """Random access to the windows of a token stream, each a copy of seq_len + 1 tokens."""

    def __init__(self, tokens: np.ndarray, seq_len: int):
        self._tokens = tokens
        self._seq_len = seq_len

    def __len__(self) -> int:
        return windows_of(self._tokens, self._seq_len)

    def __getitem__(self, index: int) -> np.ndarray:
        start = int(index) * self._seq_len
        return np.array(self._tokens[start : start + self._seq_len + 1], dtype=np.int32)


def train_batches(
    tokens: np.ndarray,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    start_batch: int = 0,
    first_example: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Shuffled training batches without end, every window once an epoch and each epoch in another order.

    Global batch n holds examples n*batch_size to (n+1)*batch_size of one endless order from `first_example` on, whatever
    `process_count` is; a batch may span two epochs. Reading is by random access: starting at `start_batch` costs nothing.

    Args:
      tokens: 1-D ids, best memory-mapped; read window by window. Of a `Mixture` each source has epochs of its own.
      seq_len: Positions T in an example.
      batch_size: Examples B in a global batch, of all processes together.
      seed: Of the order.
      start_batch: First batch to yield: as many as have been trained on.
      first_example: Of batch 0: as many as were trained on before, perhaps in batches of another size.
      process_index: This process, which gets its contiguous rows of every batch.
      process_count: Processes that share a batch.

    Returns:
      An iterator over batches of batch_size / process_count rows.

    Raises:
      InputError: The data is shorter than one window, or a number does not fit.

    >>> batch = next(train_batches(np.arange(3), seq_len=2, batch_size=1, seed=0))
    >>> batch.tokens_BT, batch.targets_BT
    (array([[0, 1]], dtype=int32), array([[1, 2]], dtype=int32))
    """
    check_batching(seq_len, batch_size, process_index, process_count)
    if min(seed, start_batch, first_example) < 0:
        raise InputError(f"seed={seed}, start_batch={start_batch}, first_example={first_example}: none may be negative")
    example = _examples(tokens, seq_len, seed)
    share_size = batch_size // process_count

    def read(batch_index: int) -> Batch:
        first = first_example + batch_index * batch_size + process_index * share_size
        windows = np.stack([example(index) for index in range(first, first + share_size)])
        return Batch(windows[:, :-1].copy(), windows[:, 1:].copy(), np.ones((share_size, seq_len), np.float32))

    # Not `examples.batch()[...]`: the length of an endless dataset in batches of one overflows in grain 0.2.18.
    return iter(grain.MapDataset.range(start_batch, sys.maxsize).map(read).to_iter_dataset(_READ_OPTIONS))


def _examples(tokens: np.ndarray, seq_len: int, seed: int) -> Callable[[int], np.ndarray]:
    """Any example of an endless order."""
    if not isinstance(tokens, Mixture):
        return _shuffled(tokens, seq_len, seed, "training data")
    shares = list(tokens.shares.values())
    orders = [
        _shuffled(part, seq_len, (seed, 1 + n), f"data.mixture: the training data of {name!r},")
        for n, (name, part) in enumerate(zip(tokens.shares, tokens.parts, strict=True))
    ]

    def example(index: int) -> np.ndarray:
        source, place = turn(shares, index)
        return orders[source](place)

    return example


def _shuffled(tokens: np.ndarray, seq_len: int, seed: int | tuple[int, int], what: str) -> Callable[[int], np.ndarray]:
    if len(tokens) < seq_len + 1:
        raise InputError(
            f"{what} of {len(tokens)} tokens is shorter than one example of seq_len={seq_len} and its last "
            "target; lower seq_len or give more text"
        )
    # grain shuffles epoch e by seed + e: unmixed, seed 1 would start with the second epoch of seed 0.
    mixed_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    examples = grain.MapDataset.source(_Windows(tokens, seq_len)).shuffle(mixed_seed).repeat()
    return lambda index: examples[index]


def validation_batches(
    tokens: np.ndarray, *, seq_len: int, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """The whole validation set in order, every token but the first a target exactly once.

    What the last window and the last batch lack is padded with token 0 at weight 0, so that all batches have one shape
    and all processes the same number of them.

    Args:
      tokens: 1-D ids, best memory-mapped.
      seq_len: Positions T in an example.
      batch_size: Examples B in a global batch, of all processes together.
      process_index: This process, which gets its contiguous rows of every batch.
      process_count: Processes that share a batch.

    Returns:
      An iterator over batches of batch_size / process_count rows.

    Raises:
      InputError: Fewer than two tokens, or a number does not fit.

    >>> [batch.targets_BT.tolist() for batch in validation_batches(np.arange(8), seq_len=2, batch_size=2)]
    [[[1, 2], [3, 4]], [[5, 6], [7, 0]]]
    """
    check_batching(seq_len, batch_size, process_index, process_count)
    if len(tokens) < 2:
        raise InputError(
            f"validation data of {len(tokens)} tokens has no target for seq_len={seq_len}; give more validation text"
        )
    return _validation_batches(tokens, seq_len, batch_size, process_index, process_count)


def check_batching(seq_len: int, batch_size: int, process_index: int, process_count: int) -> None:
    """Raises `InputError` for sizes that cannot be, or a batch that its processes cannot share."""
    if seq_len < 1 or batch_size < 1:
        raise InputError(f"seq_len={seq_len}, batch_size={batch_size}: both must be at least 1")
    if not 0 <= process_index < process_count:
        raise InputError(f"process_index={process_index} must be at least 0 and under process_count={process_count}")
    if batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} is not divisible by process_count={process_count}; choose a multiple of it"
        )


def _validation_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, process_index: int, process_count: int
) -> Iterator[Batch]:
    n_targets = len(tokens) - 1
    share_size = batch_size // process_count
    batch_tokens, share_tokens = batch_size * seq_len, share_size * seq_len
    for batch_start in range(0, n_targets, batch_tokens):
        start = batch_start + process_index * share_tokens
        n_real = min(max(n_targets - start, 0), share_tokens)
        padded = np.zeros((3, share_tokens), dtype=np.int32)
        padded[0, :n_real] = tokens[start : start + n_real]
        padded[1, :n_real] = tokens[start + 1 : start + 1 + n_real]
        padded[2, :n_real] = 1
        tokens_BT, targets_BT, weights_BT = padded.reshape(3, share_size, seq_len)
        yield Batch(tokens_BT, targets_BT, weights_BT.astype(np.float32))
