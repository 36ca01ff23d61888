"""What a fine-tuning task is made of: examples, each an input with all of its references, in three splits."""

import hashlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from spdf_jax.errors import InputError

Style = Literal["e2e", "webnlg", "dart", "perplexity"]
TaskSplit = Literal["train", "validation", "test"]
TASK_SPLITS: tuple[TaskSplit, ...] = ("train", "validation", "test")
THREE_WAYS: dict[TaskSplit, float] = {"train": 0.8, "validation": 0.1, "test": 0.1}


class Example(NamedTuple):
    """One input.

    Attributes:
      context: What the model is given, as text.
      references: Every text that is right for it; the same text twice counts twice.
      category: WebNLG's kind of subject; "" elsewhere.
    """

    context: str
    references: tuple[str, ...]
    category: str = ""


class Task(NamedTuple):
    """Examples by split, none without references, no input twice in a split.

    Attributes:
      train, validation, test: The splits, in the order of their source.
      style: How the test split is scored: by text metrics as E2E, WebNLG or DART do, or by perplexity only.
    """

    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    style: Style


def make_task(splits: dict[TaskSplit, Iterable[Example]], *, style: Style, where: str) -> Task:
    """Examples of one input put together, those without references left out.

    Args:
      splits: What was read; one input may come many times.
      style: How to score.
      where: What messages call the data.

    Returns:
      The task.

    Raises:
      InputError: A split has no example.

    >>> rows = [Example("a", ("x",)), Example("b", ()), Example("a", ("y",))]
    >>> make_task({"train": rows, "validation": rows, "test": rows}, style="e2e", where="rows").train
    (Example(context='a', references=('x', 'y'), category=''),)
    """
    grouped = {split: _grouped(splits[split]) for split in TASK_SPLITS}
    for split, examples in grouped.items():
        if not examples:
            raise InputError(f"{where}: no example with a reference in the {split} split; give more data")
    return Task(**grouped, style=style)


def split_of_input(context: str, shares: dict[TaskSplit, float]) -> TaskSplit:
    """The split of an input by a stable hash of it alone, so all its texts stay together and a new one moves no other.

    Args:
      context: The input.
      shares: Share of each split, one after another over the range of the hash; they add up to 1.

    Returns:
      The split.

    >>> [split_of_input(context, THREE_WAYS) for context in "fgh"]
    ['train', 'validation', 'train']
    """
    position = int.from_bytes(hashlib.sha256(context.encode()).digest()[:8], "big") / 2**64
    for split, share in shares.items():
        if position < share:
            return split
        position -= share
    return split  # the shares' sum was rounded


def seen_categories(task: Task) -> frozenset[str]:
    """Categories of the test split that training has seen too: WebNLG reports seen, unseen and all of them.

    Args:
      task: Any task; where there are no categories the one category "" is seen.

    Returns:
      The categories; a test example is seen if its category is among them.

    >>> seen, unseen = Example("a", ("x",), "City"), Example("b", ("y",), "Food")
    >>> seen_categories(Task((seen,), (seen,), (seen, unseen), "webnlg"))
    frozenset({'City'})
    """
    return frozenset(example.category for example in task.train) & {example.category for example in task.test}


def _grouped(examples: Iterable[Example]) -> tuple[Example, ...]:
    """One example an input, with the references of all of them and the first one's category."""
    by_context: dict[str, Example] = {}
    for example in examples:
        if example.references:
            first = by_context.setdefault(example.context, example._replace(references=()))
            by_context[example.context] = first._replace(references=first.references + example.references)
    return tuple(by_context.values())
