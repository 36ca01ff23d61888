"""From a config to the examples of a fine-tuning task."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from spdf_jax.data.examples import Style, Task
from spdf_jax.data.restaurant import restaurant_task
from spdf_jax.data.task_files import RELEASES, read_task_files
from spdf_jax.data.tfds_tasks import read_tfds, write_tfds
from spdf_jax.errors import InputError
from spdf_jax.fields import CountOrZero, FilePath, OneOf, Range, check_fields, used_with

_Examples = Annotated[int, Range(least=1, most=100_000)]  # of `restaurant`, far under the number of different inputs
_GENERATED = used_with("name", "restaurant")
_STYLES: dict[str, Style] = {"restaurant": "e2e", **{name: release.style for name, release in RELEASES.items()}}


@dataclass(frozen=True)
class TaskConfig:
    """What to fine-tune on and to score.

    Attributes:
      name: "" is no task; `restaurant` is generated and needs no file; `e2e`, `webnlg`, `dart` and `curation` read
        the released files; `tfds` reads what `prepare_tfds` wrote.
      path: e2e, webnlg, dart, curation: the folder of the released files, or one file; a split
        that has no file is made as `task_files` says. tfds: the dataset's folder.
      train_examples: restaurant: inputs to train on.
      validation_examples: restaurant: inputs to measure the loss on while it trains.
      test_examples: restaurant: inputs that ``--job evaluate`` scores.
      seed: restaurant: of the examples.
    """

    name: Annotated[str, OneOf(("", *_STYLES, "tfds"))] = ""
    path: Annotated[FilePath, used_with("name", *RELEASES, "tfds")] = ""
    train_examples: Annotated[_Examples, _GENERATED] = 2000
    validation_examples: Annotated[_Examples, _GENERATED] = 200
    test_examples: Annotated[_Examples, _GENERATED] = 200
    seed: Annotated[CountOrZero, _GENERATED] = 0

    def __post_init__(self) -> None:
        check_fields(self, "task")
        if self.name not in ("", "restaurant") and not self.path:
            raise InputError(f"task.path is empty: task.name={self.name!r} needs the place of its files there")


@functools.cache
def load_task(config: TaskConfig) -> Task:
    """Reads or generates a task; the same config again gives the same task from memory, without reading.

    Args:
      config: Which task, and where it lies.

    Returns:
      Its examples by split, references grouped by input.

    Raises:
      InputError: No task is named, or its files are missing or malformed.

    >>> task = load_task(TaskConfig("restaurant", train_examples=8, validation_examples=4, test_examples=2))
    >>> len(task.train), len(task.validation), len(task.test), task.style
    (8, 4, 2, 'e2e')
    """
    if config.name == "restaurant":
        return restaurant_task(
            train_examples=config.train_examples,
            validation_examples=config.validation_examples,
            test_examples=config.test_examples,
            seed=config.seed,
        )
    if config.name in RELEASES:
        return read_task_files(config.name, config.path)
    if config.name == "tfds":
        dataset = Path(config.path).resolve().name
        if dataset not in _STYLES:
            raise InputError(
                f"task.path={config.path!r}: ends in {dataset!r}, not in {', '.join(_STYLES)}; prepare it with prepare_tfds"
            )
        return read_tfds(config.path, _STYLES[dataset])
    raise InputError(f"task.name is empty: choose one of {', '.join(_STYLES)}, tfds")


def prepare_tfds(config: TaskConfig, data_dir: str) -> TaskConfig:
    """Writes a task as a TFDS dataset in array_record, without TensorFlow; the dataset is named as the task.

    Args:
      config: The task.
      data_dir: TFDS's data folder, in which `<task>/1.0.0` is made.

    Returns:
      The config whose `load_task` equals that of `config`.

    Raises:
      InputError: The task cannot be read, is a TFDS dataset itself, or the dataset is there already.
    """
    if config.name == "tfds":
        raise InputError(f"task.path={config.path!r}: is prepared already; load it as it is")
    return TaskConfig("tfds", write_tfds(load_task(config), name=config.name, data_dir=data_dir))
