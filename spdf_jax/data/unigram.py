"""What a model that knows nothing but frequencies would lose: the yardstick of a first training run."""

import math

import numpy as np

from spdf_jax.data.token_files import in_chunks
from spdf_jax.errors import InputError


def unigram_loss(train_tokens: np.ndarray, validation_tokens: np.ndarray, vocab_size: int) -> float:
    """Loss of a model that knows only how often each token occurs: what any trained model has to beat.

    Args:
      train_tokens: 1-D ids to count; one is added to every count, so that no token has probability zero.
      validation_tokens: 1-D ids; all but the first are targets.
      vocab_size: Ids the model can predict.

    Returns:
      Nats per validation target.

    Raises:
      InputError: A token id is at or over `vocab_size`.

    >>> round(unigram_loss(np.array([0, 0, 1, 0]), np.array([2, 0, 2, 1]), vocab_size=3), 4)  # of 4/7, 1/7 and 2/7
    1.2528
    """
    log_probability = np.log(_counts(train_tokens, vocab_size) + 1) - math.log(len(train_tokens) + vocab_size)
    target_counts = _counts(validation_tokens[1:], vocab_size)
    return float(-(target_counts @ log_probability) / target_counts.sum())


def _counts(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """How often each id occurs, read a chunk at a time."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for chunk in in_chunks(tokens):
        chunk_counts = np.bincount(chunk, minlength=vocab_size)
        if len(chunk_counts) > vocab_size:
            raise InputError(f"token id {len(chunk_counts) - 1} is not under vocab_size={vocab_size}; raise vocab_size")
        counts += chunk_counts
    return counts
