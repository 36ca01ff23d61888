"""Tasks as TensorFlow Datasets, prepared and read as array_record, without TensorFlow."""

from pathlib import Path
from typing import Any

from spdf_jax.data.examples import TASK_SPLITS, Example, Style, Task
from spdf_jax.errors import InputError

_VERSION = "1.0.0"


def write_tfds(task: Task, *, name: str, data_dir: str) -> str:
    """Writes a task as the TFDS dataset `name`, with the features context, references and category.

    Args:
      task: What to write.
      name: Lower case with underscores, as TFDS names are.
      data_dir: TFDS's data folder; the dataset becomes a folder in it.

    Returns:
      The dataset's folder, for `read_tfds`.

    Raises:
      InputError: The dataset is there already, or the folder cannot be written.
    """
    folder = Path(data_dir, name)
    if folder.exists():
        raise InputError(f"{folder}: is there already; remove it or choose another data_dir")
    try:
        _builder(name, data_dir, task).download_and_prepare()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error}); free space or choose another data_dir") from error
    return str(folder)


def read_tfds(path: str, style: Style) -> Task:
    """Reads a task that `write_tfds` wrote; only files are read, no dataset code runs.

    Args:
      path: The dataset's folder.
      style: How the task is scored.

    Returns:
      A task equal to the written one.

    Raises:
      InputError: There is no such dataset, or it is damaged.
    """
    folder = Path(path)
    prepare_it = "prepare it with prepare_tfds"
    if not (folder / _VERSION / "dataset_info.json").is_file():
        raise InputError(f"task.path={path!r}: no prepared dataset found; {prepare_it}")
    try:
        builder = _builder(folder.name, str(folder.parent), None)
        splits = {split: tuple(map(_example, builder.as_data_source(split=split))) for split in TASK_SPLITS}
    except Exception as error:  # TFDS, protobuf and array_record each raise their own for damaged files
        reason = " ".join(str(error).split())
        raise InputError(f"task.path={path!r}: not readable ({reason}); remove it and {prepare_it}") from error
    return Task(**splits, style=style)


def _builder(name: str, data_dir: str, task: Task | None) -> Any:
    """The TFDS builder that writes `task`, or reads what is there."""
    import tensorflow_datasets as tfds  # here, not above: only this source needs it, and it is slow to import

    # One class for both ways: a reader made from files alone would import the modules that those files name.
    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        VERSION = tfds.core.Version(_VERSION)
        # Else TFDS looks for checksums of downloads beside this module, and for that needs importlib_resources.
        url_infos = None

        def _info(self) -> Any:
            text = tfds.features.Text()
            features = {"context": text, "references": tfds.features.Sequence(text), "category": text}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            assert task is not None
            return {split: self._generate_examples(getattr(task, split)) for split in TASK_SPLITS}

        def _generate_examples(self, examples: tuple[Example, ...]) -> Any:
            for index, example in enumerate(examples):
                yield index, example._asdict()

    Builder.name = name
    return Builder(data_dir=data_dir, file_format="array_record")


def _example(row: dict[str, Any]) -> Example:
    references = tuple(reference.decode() for reference in row["references"])
    return Example(row["context"].decode(), references, row["category"].decode())
