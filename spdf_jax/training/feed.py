"""What a phase is fed: windows of a token stream, or the examples of a task."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import Mesh

from spdf_jax.config.run import RunConfig
from spdf_jax.data import (
    Batch,
    Mixture,
    TokenData,
    document_end,
    document_ids,
    encode_task,
    holds_tokenizer,
    load_task,
    load_tokenizer,
    parts_of,
    prepare,
    task_batches,
    task_validation_batches,
    train_batches,
    validation_batches,
)
from spdf_jax.data.tokenizer import Tokenizer, vocabulary_size
from spdf_jax.errors import InputError
from spdf_jax.processes import data_share
from spdf_jax.training.phases import PhasePlan
from spdf_jax.training.sources import holds_run, source_folder

#: What to do about ids without a tokenizer.
NAME_TOKENIZER = "name it by --config.data.tokenizer=FILE"


class Feed(NamedTuple):
    """The batches of one phase, this process's rows of them: `Batch`, or what a model of the caller's own takes.

    Attributes:
      train: ``start_batch -> endless batches``, the same from there on whatever came before.
      validation: all validation targets once.
      test: all test targets of a task once; None for text.
      fingerprint: changes when the data changes; a run does not go on with other data.
    """

    train: Callable[[int], Iterator[Any]]
    validation: Callable[[], Iterator[Any]]
    test: Callable[[], Iterator[Any]] | None
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
    train = {"seq_len": plan.seq_len, "batch_size": plan.config.batch_size, "seed": config.seed + plan.order} | share
    validation = {"seq_len": plan.seq_len, "batch_size": config.loop.eval_batch_size} | share
    if not plan.config.task.name:
        assert tokens is not None, "jobs load what a phase needs"
        end = document_end(config.data, tokens)
        return Feed(
            lambda start: _packed(
                end, train_batches(tokens.train, start_batch=start, first_example=plan.first_example, **train)
            ),
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
        lambda start: task_batches(
            pairs.train, start_batch=start + plan.first_example // plan.config.batch_size, **train
        ),
        partial(task_validation_batches, pairs.validation, **validation),
        partial(task_validation_batches, pairs.test, **validation),
        digest.hexdigest(),
    )


def _packed(end: int | None, batches: Iterator[Batch]) -> Iterator[Batch]:
    return (batch._replace(segments_BT=document_ids(batch.tokens_BT, end)) for batch in batches)


def load_data(
    config: RunConfig, workdir: Path | None, plans: Sequence[PhasePlan], *, begun: bool = True, progress: bool
) -> tuple[TokenData | None, Tokenizer | None]:
    """The text, where a phase models it or the tokenizer is made of it, and the tokenizer.

    Args:
      config: the run.
      workdir: its folder; None for a run that leaves none.
      plans: the phases to be fed.
      begun: whether the run has saved anything: its tokenizer is then its own, whatever lies elsewhere by now.
      progress: show progress.

    Raises:
      InputError: data or tokenizer that are not there, not the run's, or do not fit the model.
    """
    place = _tokenizer_place(config, workdir, begun)
    tokens, tasks = None, [plan.name for plan in plans if plan.config.task.name]
    if not place or len(tasks) < len(plans):
        tokens = prepare(dataclasses.replace(config.data, tokenizer=place), progress=progress)
    tokenizer = tokens.tokenizer if tokens else load_tokenizer(place)
    size = tokens.vocab_size if tokens else vocabulary_size(tokenizer) if tokenizer else 0
    if size > config.model.vocab_size:
        read_as = f", or config.data.token_dtype if these are no {tokens.train.dtype} ids" if tokens else ""
        raise InputError(
            f"config.data: token id {size - 1} is at or over config.model.vocab_size {config.model.vocab_size}; "
            f"set config.model.vocab_size to at least {size}{read_as if config.data.source == 'token_files' else ''}"
        )
    if tokenizer is None and tasks:
        raise InputError(f"config.data.tokenizer: token files came without one, and a task needs one; {NAME_TOKENIZER}")
    return tokens, tokenizer


def sources_read(plans: Sequence[PhasePlan], tokens: TokenData | None) -> dict[str, dict[str, float]]:
    """Of a mixture: each source's share of the examples, and how many epochs of it the phases that model text have."""
    if tokens is None or not isinstance(mixture := tokens.train, Mixture):
        return {}
    text = [plan for plan in plans if not plan.config.task.name]
    passes = [mixture.epochs(plan.seq_len, plan.config.batch_size * (plan.end - plan.start)) for plan in text]
    total = sum(mixture.shares.values())
    return {
        name: {"share": share / total, "epochs": sum(epochs[name] for epochs in passes)}
        for name, share in mixture.shares.items()
    }


def check_there(config: RunConfig) -> None:
    """Refuses a run whose text, tokenizer or task cannot be read where the config says, as far as that costs no time.

    Raises:
      InputError: what is not there, or is no such thing.
    """
    for phase in config.phases.values():
        if phase.task.name:
            load_task(phase.task)
    places = [("mixture" if name else "path", part.path) for name, part in parts_of(config.data).items()]
    for key, place in (*places, ("tokenizer", config.data.tokenizer)):
        if place and not Path(place).exists():
            raise InputError(f"config.data.{key}: {place!r} is not there")


def run_tokenizer(config: RunConfig, workdir: Path) -> Tokenizer | None:
    """The tokenizer of a run that was: its own, or, where token files came without one, what ``config.data.tokenizer`` names.

    Raises:
      InputError: it is not the run's, or has more tokens than the model.
    """
    place = _tokenizer_place(config, workdir, begun=True)
    if not place and config.data.source != "token_files":
        raise InputError(f"{workdir / 'tokenizer.json'}: missing; restore it")
    if not place:
        return None
    tokenizer = load_tokenizer(place)
    if (size := vocabulary_size(tokenizer)) > config.model.vocab_size:
        raise InputError(
            f"config.data.tokenizer: {place} has {size} tokens, more than the model's {config.model.vocab_size}: it is not the "
            f"one that its token files were made with"
        )
    return tokenizer


def _tokenizer_place(config: RunConfig, workdir: Path | None, begun: bool) -> str:
    """Where the run's tokenizer lies: in its folder, where the config says, or in ``init_from``; "": it comes with the data."""
    given, own = config.data.tokenizer, workdir / "tokenizer.json" if workdir else None
    if begun and own and own.is_file():
        if given and Path(given).exists() and load_tokenizer(given).to_str() != load_tokenizer(own).to_str():
            raise InputError(
                f"config.data.tokenizer: {given!r} is not the tokenizer of the run in {workdir}, which is {own}; name that one"
            )
        return str(own)
    source = source_folder(config, workdir)
    if given or source is None:
        return given
    holds_run(source)
    if holds_tokenizer(source):
        return str(source)
    if config.data.source == "token_files":  # whose ids are the source's
        return ""
    raise InputError(
        f"config.data.tokenizer: {source}, where this run starts from, holds none, and its ids mean nothing under another; "
        f"name the one that it was trained with, a tokenizer.json or a folder with vocab.json and merges.txt"
    )
