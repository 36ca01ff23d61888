"""Where documents come from: the embedded corpus, pinned libraries, text files, TensorFlow Datasets. Nothing here downloads.

A document belongs to one split, by where it lies or a stable hash of itself, so adding a document never moves another one.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spdf_jax.data.layout import Split, find_files, walk
from spdf_jax.data.text_files import file_documents
from spdf_jax.errors import InputError, reading

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
#: Libraries whose source is text to train on: version, as in `requirements.lock` for every Python, and the start of a hash of
#: that text.
LIBRARIES = {
    "matplotlib": ("3.11.2", "5f7c66aa06491583"),
    "fonttools": ("4.68.0", "2d2e553f54fe6c3c"),
    "tensorflow-datasets": ("4.9.10", "8ddce17bf32969ff"),
    "orbax-checkpoint": ("0.12.8", "6bbd099f392dcec9"),
    "optax": ("0.2.8", "1dece061c5ca403c"),
    "rich": ("15.0.0", "65c82dae588b6bd8"),
}


class Document(NamedTuple):
    """One text, the name it is split by, and its split."""

    name: str
    text: str
    split: Split


@dataclass(frozen=True)
class Corpus:
    """Documents that can be read any number of times.

    Attributes:
      where: What messages call this corpus.
      identity: Changes when a document, a name or the split changes.
      total_bytes: UTF-8 bytes of all documents, or None where counting would mean reading everything.
      read: Yields the texts of one split, in a fixed order.
      remark: What was left out on purpose, for the user to know; "" if nothing was.
    """

    where: str
    identity: str
    total_bytes: int | None
    read: Callable[[Split], Iterator[str]]
    remark: str = ""


def split_of(name: str, validation_fraction: float) -> Split:
    """The split of a document, from its name (or text) alone: the top `validation_fraction` of the hash range is validation."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return "validation" if int.from_bytes(digest[:8], "big") / 2**64 >= 1 - validation_fraction else "train"


def embedded_corpus(validation_fraction: float) -> Corpus:
    """The text of the running Python's own standard library, a document a file.

    Its `.py` files, `pydoc_data/topics.py` (the language reference) among them, outside installed packages and outside
    the library's tests; files that are not UTF-8 are left out. The text differs a little between Python versions.

    Args:
      validation_fraction: Share of the files, by hash of the relative path, that validates.

    Returns:
      The corpus, about 700 files and 12 MB.

    Raises:
      InputError: This Python carries no library source.
    """
    root = Path(sysconfig.get_path("stdlib"))

    def documents(_: Split | None) -> Iterator[Document]:
        for file in walk(root, skip=_NOT_LIBRARY):
            if file.suffix == ".py":
                name = file.relative_to(root).as_posix()
                try:
                    text = file.read_bytes().decode()
                except (UnicodeDecodeError, OSError):
                    continue
                yield Document(name, text, split_of(name, validation_fraction))

    return _scanned(f"the standard library's source in {root} (data.source='embedded')", documents)


def library_corpus(validation_fraction: float) -> Corpus:
    """The Python source of `LIBRARIES`, which come with this package: the same text for every Python and machine.

    A document is a file, outside of the libraries' tests, and is split by its text. Documents come in an order of hashes, so
    that the first of them are a sample of all (`data.unique_tokens`).

    Args:
      validation_fraction: Share of the files, by hash of their text, that validates.

    Returns:
      The corpus.

    Raises:
      InputError: A library is not there, in another version, or not as it was released.
    """
    found = [document for name, pin in LIBRARIES.items() for document in _library(name, *pin, validation_fraction)]
    found.sort(key=lambda document: hashlib.sha256(document.name.encode()).digest())
    return _scanned("the source of libraries (data.source='libraries')", lambda _: iter(found))


def _library(name: str, version: str, pinned: str, validation_fraction: float) -> list[Document]:
    fix = f"pip install --force-reinstall --no-deps {name}=={version}, or choose another data.source"
    try:
        there = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"data.source='libraries': {name} is not installed; {fix}") from None
    if there.version != version:
        raise InputError(f"data.source='libraries': {name} is {there.version}, and its text is {version}'s; {fix}")
    files = [file for file in there.files or () if file.suffix == ".py" and not _NOT_LIBRARY & set(file.parts)]
    documents, digest = [], hashlib.sha256()
    for file in sorted(files, key=lambda file: file.as_posix()):
        try:
            text = Path(str(file.locate())).read_bytes().decode()
        except (UnicodeDecodeError, OSError):
            continue  # of which the hash tells
        documents.append(Document(f"{name}/{file.as_posix()}", text, split_of(text, validation_fraction)))
        digest.update(f"{documents[-1].name}\0{text}\0".encode())
    if not digest.hexdigest().startswith(pinned):
        raise InputError(f"data.source='libraries': {name} {version} here is not as it was released; {fix}")
    return documents


def text_corpus(
    path: str,
    *,
    text_key: str,
    validation_fraction: float,
    train_files: str = "",
    validation_files: str = "",
    split_by: str = "text",
) -> Corpus:
    """Documents from a file or a folder of them: text, JSON lines, JSON, CSV, Parquet, Arrow, as they are or packed.

    A file of plain text is a document, and so is a row of any other. How they are split:

    - by `train_files` and `validation_files`, where given;
    - else, where names in a folder say it, as Hugging Face's do (`spdf_jax.data.layout`): by those; test files are not
      read, and where none is for validation, the training documents are split as below;
    - a single file of plain text: its last `validation_fraction`, from the start of a line, validates (as nanoGPT
      `data/shakespeare_char/prepare.py`);
    - else: by a hash of the text, so that the same text twice is in one split.

    Args:
      path: The file or folder; what is hidden in it, or in a `__pycache__`, is not looked at.
      text_key: Key or column of the text, where a file has such.
      validation_fraction: Share of the documents (or of the single file) that validates.
      train_files, validation_files: Patterns of names, see `DataConfig`.
      split_by: `name` hashes a document's file and line instead of its text.

    Returns:
      The corpus.

    Raises:
      InputError: Nothing at `path`, no text in it, a file that cannot be read, or a row without `text_key`.
    """
    sources, left_out = find_files(path, train_files, validation_files)
    undecided = [source for source in sources if source.split is None]
    in_two = undecided[0] if len(undecided) == 1 and undecided[0].file.kind == "text" else None

    def documents(split: Split | None) -> Iterator[Document]:
        for source in sources:
            if split and source.split not in (split, None):
                continue
            for which, text in file_documents(source.file, text_key):
                name = source.name + which
                if source is in_two:
                    head, tail = _cut_at_line(text, 1 - validation_fraction)
                    yield Document(name, head, "train")
                    yield Document(name, tail, "validation")
                else:
                    yield Document(
                        name, text, source.split or split_of(text if split_by == "text" else name, validation_fraction)
                    )

    corpus = _scanned(f"data.path={path!r}", documents)
    return dataclasses.replace(corpus, remark=f"{path}: not read: {', '.join(left_out)}" if left_out else "")


def tfds_corpus(
    name: str, *, data_dir: str, text_key: str, validation_fraction: float, split_by: str = "text"
) -> Corpus:
    """Documents of a prepared TensorFlow Dataset, an example a document; needs no TensorFlow.

    Validation is the dataset's `validation` split, or where it has none, a hash split of `train`.

    Args:
      name: As in `tfds.builder`: `dataset/config:version`. Only files are read: no dataset code runs, nothing is
        downloaded.
      data_dir: Where the dataset was prepared; "" is the TFDS default.
      text_key: The text feature.
      validation_fraction: Share of `train` held out where there is no `validation` split.
      split_by: What that is decided by: the example's `text`, or its `name`, which is its index.

    Returns:
      The corpus.

    Raises:
      InputError: The dataset is not prepared, not in a random-access format, or has no such split or text feature.
    """
    import tensorflow_datasets as tfds  # here, not above: only this source needs it, and it is slow to import

    where = f"data.tfds_name={name!r} in {data_dir or 'the default TFDS folder'}"
    prepare_it = (
        "prepare it once where its own requirements are installed, with "
        f"tfds.builder({name!r}, data_dir=..., file_format='array_record').download_and_prepare()"
    )
    _check_features(Path(data_dir or tfds.core.constants.DATA_DIR).expanduser() / re.split("[/:]", name)[0])
    try:
        builder = tfds.core.read_only_builder.builder_from_files(name, data_dir=data_dir or None)
    except (ValueError, OSError) as error:
        raise InputError(f"{where}: no prepared dataset found; {prepare_it}") from error
    splits = builder.info.splits
    if "train" not in splits:
        raise InputError(f"{where}: has no split 'train', only {sorted(splits)}; choose another dataset")
    if text_key not in builder.info.features:
        raise InputError(f"{where}: no feature data.text_key={text_key!r}; it has {sorted(builder.info.features)}")
    used = ["train", "validation"] if "validation" in splits else ["train"]
    unreadable = f"{where}: not readable by random access; {prepare_it}"
    if not builder.info.available_file_formats() & tfds.core.FileFormat.with_random_access():
        raise InputError(unreadable)  # prepared as tfrecord, which is read in order only
    try:
        sources = {split: builder.as_data_source(split=split) for split in used}
    except (ValueError, OSError) as error:
        raise InputError(unreadable) from error

    def read(split: Split) -> Iterator[str]:
        held_out = "validation" not in sources
        for index, example in enumerate(sources["train" if held_out else split]):
            try:
                text = example[text_key].decode()
            except (AttributeError, UnicodeDecodeError) as error:
                message = (
                    f"{where}: data.text_key={text_key!r} of example {index} is not UTF-8 text; choose another key"
                )
                raise InputError(message) from error
            hashed = text if split_by == "text" else f"train:{index}"
            if text.strip() and not (held_out and split_of(hashed, validation_fraction) != split):
                yield text

    # Reading a whole dataset at each start would take minutes; its own record of what it holds stands in.
    record = [[split, splits[split].num_bytes, splits[split].shard_lengths] for split in used]
    identity = json.dumps(["tfds", builder.info.full_name, record, text_key, validation_fraction, split_by])
    return Corpus(where, identity, total_bytes=None, read=read)


def _check_features(dataset: Path) -> None:
    """TFDS imports whatever module a `features.json` names: let it be one of its own features."""
    for file in sorted(dataset.rglob("features.json")):
        with reading(f"{file}: not JSON", "prepare the dataset anew"):
            named = list(_values(json.loads(file.read_bytes()), "pythonClassName"))
        foreign = sorted({str(n) for n in named if not str(n).startswith("tensorflow_datasets.core.features.")})
        if foreign:
            raise InputError(
                f"{file}: names code of its own, {', '.join(foreign)}, which is never run; prepare it anew"
            )


def _values(obj: Any, key: str) -> Iterator[Any]:
    if isinstance(obj, dict):
        yield from ([obj[key]] if key in obj else [])
        obj = list(obj.values())
    for part in obj if isinstance(obj, list) else []:
        yield from _values(part, key)


def _scanned(where: str, documents: Callable[[Split | None], Iterator[Document]]) -> Corpus:
    """The corpus of `documents`, identified by all that is in them; blank ones are left out.

    `documents` of a split may yield others, those of None are all.
    """

    def written(split: Split | None) -> Iterator[Document]:
        return (document for document in documents(split) if document.text.strip())

    digest, total_bytes = hashlib.sha256(), 0
    for name, text, split in written(None):
        text_bytes = text.encode()
        total_bytes += len(text_bytes)
        digest.update(f"{split}\0{name}\0{len(text_bytes)}\0".encode("utf-8", "surrogateescape") + text_bytes)
    if not total_bytes:
        raise InputError(f"{where}: no text found; point data.path at text files with data.source='text'")

    def read(split: Split) -> Iterator[str]:
        return (document.text for document in written(split) if document.split == split)

    return Corpus(where, digest.hexdigest(), total_bytes, read)


def _cut_at_line(text: str, fraction: float) -> tuple[str, str]:
    """The text in two, about at `fraction` of its length, before the start of a line where there is one."""
    middle = int(len(text) * fraction)
    cut = text.rfind("\n", 0, middle) + 1 or middle
    return text[:cut], text[cut:]
