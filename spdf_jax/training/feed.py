"""What a phase is fed: windows of a token stream, or the examples of a task."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from jax.sharding import Mesh

from spdf_jax.config import RunConfig
from spdf_jax.data import (
    Batch,
    TokenData,
    document_end,
    document_ids,
    encode_task,
    load_task,
    task_batches,
    task_validation_batches,
    train_batches,
    validation_batches,
)
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.processes import data_share
from spdf_jax.training.phases import PhasePlan


class Feed(NamedTuple):
    """The batches of one phase, this process's rows of them.

    Attributes:
      train: ``start_batch -> endless batches``, the same from there on whatever came before.
      validation: all validation targets once.
      test: all test targets of a task once; None for text.
      fingerprint: changes when the data changes; a run does not go on with other data.
    """

    train: Callable[[int], Iterator[Batch]]
    validation: Callable[[], Iterator[Batch]]
    test: Callable[[], Iterator[Batch]] | None
    fingerprint: str


def make_feed(
    config: RunConfig, plan: PhasePlan, tokens: TokenData | None, tokenizer: Tokenizer | None, mesh: Mesh
) -> Feed:
    """The feed of a phase.

    Args:
      config: the run.
      plan: the phase.
      tokens: the text to model, needed where the phase has no task.
      tokenizer: needed where it has one.
      mesh: where the batches go; says which rows are this process's.
    """
    share = dict(zip(("process_index", "process_count"), data_share(mesh), strict=True))
    train = {"seq_len": plan.seq_len, "batch_size": plan.config.batch_size, "seed": config.seed + plan.index} | share
    validation = {"seq_len": plan.seq_len, "batch_size": config.loop.eval_batch_size} | share
    if not plan.config.task.name:
        assert tokens is not None, "jobs load what a phase needs"
        end = document_end(config.data, tokens)
        return Feed(
            lambda start: _packed(end, train_batches(tokens.train, start_batch=start, **train)),
            lambda: _packed(end, validation_batches(tokens.validation, **validation)),
            None,
            tokens.fingerprint,
        )
    assert tokenizer is not None, "jobs load what a phase needs"
    pairs = encode_task(load_task(plan.config.task), tokenizer, plan.seq_len)
    digest = hashlib.sha256()
    for pair in (*pairs.train, *pairs.validation):
        digest.update(pair.tokens.tobytes() + b"|")
    return Feed(
        lambda start: task_batches(pairs.train, start_batch=start, **train),
        partial(task_validation_batches, pairs.validation, **validation),
        partial(task_validation_batches, pairs.test, **validation),
        digest.hexdigest(),
    )


def _packed(end: int | None, batches: Iterator[Batch]) -> Iterator[Batch]:
    return (batch._replace(segments_BT=document_ids(batch.tokens_BT, end)) for batch in batches)
