"""Where documents come from: the embedded corpus, text files, TensorFlow Datasets. Nothing here downloads.

A document belongs to one split, by a stable hash of its name, so adding a document never moves another one.
"""

import hashlib
import json
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spdf_jax.errors import InputError

Split = Literal["train", "validation"]

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
_NAMED_SPLITS: dict[str, Split] = {"train": "train", "validation": "validation", "val": "validation"}
_SNIFF_BYTES = 8192


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
    """

    where: str
    identity: str
    total_bytes: int | None
    read: Callable[[Split], Iterator[str]]


def split_of(name: str, validation_fraction: float) -> Split:
    """The split of a document, from its name alone: the top `validation_fraction` of the hash range is validation."""
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

    def documents() -> Iterator[Document]:
        for file in _walk(root, skip=_NOT_LIBRARY):
            if file.suffix == ".py":
                name = file.relative_to(root).as_posix()
                try:
                    text = file.read_bytes().decode()
                except (UnicodeDecodeError, OSError):
                    continue
                yield Document(name, text, split_of(name, validation_fraction))

    return _scanned(f"the standard library's source in {root} (data.source='embedded')", documents)


def text_corpus(path: str, *, text_key: str, validation_fraction: float) -> Corpus:
    """Documents from a text file or a folder of them, read as UTF-8.

    A file is a document, a line of a `.jsonl` file is a document. How they are split:

    - a folder with files named `train.*` and `validation.*` (or `val.*`) at its top: by those names; its other files
      are not read;
    - a single file of plain text, given or alone in its folder: its last `validation_fraction`, from the start of a
      line, validates (as nanoGPT `data/shakespeare_char/prepare.py`);
    - else: by a hash of the path relative to the folder, with the line number for `.jsonl`.

    In a folder, hidden files and binary ones (a zero byte near the start, git's rule) are not read.

    Args:
        path: The file or folder.
        text_key: The key of the text in a line of a `.jsonl` file.
        validation_fraction: Share of the documents (or of the single file) that validates.

    Returns:
        The corpus.

    Raises:
        InputError: Nothing at `path`, no text in it, a file that is not UTF-8 text, or a line without `text_key`.
    """
    root = Path(path)
    files = _text_files(root)

    def documents() -> Iterator[Document]:
        for file, split in files:
            name = file.name if file == root else file.relative_to(root).as_posix()
            if file.suffix.lower() == ".jsonl":
                for line_number, text in _json_lines(file, text_key):
                    line_name = f"{name}:{line_number}"
                    yield Document(line_name, text, split or split_of(line_name, validation_fraction))
            elif split is None and len(files) == 1:
                head, tail = _cut_at_line(_read_text(file), 1 - validation_fraction)
                yield Document(name, head, "train")
                yield Document(name, tail, "validation")
            else:
                yield Document(name, _read_text(file), split or split_of(name, validation_fraction))

    return _scanned(f"data.path={path!r}", documents)


def tfds_corpus(name: str, *, data_dir: str, text_key: str, validation_fraction: float) -> Corpus:
    """Documents of a prepared TensorFlow Dataset, an example a document; needs no TensorFlow.

    Validation is the dataset's `validation` split, or where it has none, a hash split of `train` by example index.

    Args:
        name: As in `tfds.builder`: `dataset/config:version`. Only files are read: no dataset code runs, nothing is
            downloaded.
        data_dir: Where the dataset was prepared; "" is the TFDS default.
        text_key: The text feature.
        validation_fraction: Share of `train` held out where there is no `validation` split.

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
    try:
        sources = {split: builder.as_data_source(split=split) for split in used}
    # NotImplementedError is TFDS's answer for tfrecord, which it reads in order only.
    except (NotImplementedError, ValueError, OSError) as error:
        raise InputError(f"{where}: not readable by random access; {prepare_it}") from error

    def read(split: Split) -> Iterator[str]:
        held_out = "validation" not in sources
        for index, example in enumerate(sources["train" if held_out else split]):
            if held_out and split_of(f"train:{index}", validation_fraction) != split:
                continue
            try:
                text = example[text_key].decode()
            except (AttributeError, UnicodeDecodeError) as error:
                message = (
                    f"{where}: data.text_key={text_key!r} of example {index} is not UTF-8 text; choose another key"
                )
                raise InputError(message) from error
            if text.strip():
                yield text

    # Reading a whole dataset at each start would take minutes; its own record of what it holds stands in.
    record = [[split, splits[split].num_bytes, splits[split].shard_lengths] for split in used]
    identity = json.dumps(["tfds", builder.info.full_name, record, text_key, validation_fraction])
    return Corpus(where, identity, total_bytes=None, read=read)


def _check_features(dataset: Path) -> None:
    """TFDS imports whatever module a `features.json` names: let it be one of its own features."""
    for file in sorted(dataset.rglob("features.json")):
        try:
            named = list(_values(json.loads(file.read_bytes()), "pythonClassName"))
        except ValueError as error:
            raise InputError(f"{file}: not JSON ({error}); prepare the dataset anew") from error
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


def _scanned(where: str, documents: Callable[[], Iterator[Document]]) -> Corpus:
    """The corpus of `documents`, identified by all that is in them; blank ones are left out."""

    def written() -> Iterator[Document]:
        return (document for document in documents() if document.text.strip())

    digest, total_bytes = hashlib.sha256(), 0
    for name, text, split in written():
        text_bytes = text.encode()
        total_bytes += len(text_bytes)
        digest.update(f"{split}\0{name}\0{len(text_bytes)}\0".encode("utf-8", "surrogateescape") + text_bytes)
    if not total_bytes:
        raise InputError(f"{where}: no text found; point data.path at text files with data.source='text'")

    def read(split: Split) -> Iterator[str]:
        return (document.text for document in written() if document.split == split)

    return Corpus(where, digest.hexdigest(), total_bytes, read)


def _walk(root: Path, *, skip: set[str]) -> list[Path]:
    """Every file under `root`, not in hidden folders or those named in `skip`, sorted by relative path."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in skip and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(filter(Path.is_file, found), key=lambda file: file.relative_to(root).as_posix())


def _text_files(root: Path) -> list[tuple[Path, Split | None]]:
    """The files to read, each with the split its name says, or None."""
    if root.is_file():
        return _all_text([(root, None)])
    if not root.is_dir():
        raise InputError(f"data.path={str(root)!r}: no such file or folder; give a text file or a folder of them")
    named: list[tuple[Path, Split | None]] = [
        (file, _NAMED_SPLITS[file.stem])
        for file in sorted(root.iterdir())
        if file.is_file() and file.suffix and file.stem in _NAMED_SPLITS
    ]
    if {split for _, split in named} == {"train", "validation"}:
        return _all_text(named)
    return [(file, None) for file in _walk(root, skip=set()) if not _is_binary(file)]


def _all_text(files: list[tuple[Path, Split | None]]) -> list[tuple[Path, Split | None]]:
    """The files as they are, each one text: a file that was asked for by name is never skipped."""
    for file, _ in files:
        if _is_binary(file):
            raise InputError(f"{file}: holds zero bytes, so it is not text; convert it to UTF-8 text or move it away")
    return files


def _is_binary(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return b"\0" in stream.read(_SNIFF_BYTES)
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); fix its permissions or move it away") from error


def _decode(raw: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start}); convert it to UTF-8 or move it away") from error


def _read_text(file: Path) -> str:
    return _decode(file.read_bytes(), str(file))


def _json_lines(file: Path, text_key: str) -> Iterator[tuple[int, str]]:
    """Line number, from 1, and text of every line of a `.jsonl` file that is not blank."""
    with file.open("rb") as stream:
        for line_number, raw in enumerate(stream, start=1):
            where = f"{file}:{line_number}"
            line = _decode(raw, where)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{where}: not a line of JSON ({error}); mend or remove the line") from error
            text = row[text_key] if isinstance(row, dict) and text_key in row else None
            if not isinstance(text, str):
                keys = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise InputError(f"{where}: no text under data.text_key={text_key!r}, found {keys}; set data.text_key")
            # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
            yield line_number, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _cut_at_line(text: str, fraction: float) -> tuple[str, str]:
    """The text in two, about at `fraction` of its length, before the start of a line where there is one."""
    middle = int(len(text) * fraction)
    cut = text.rfind("\n", 0, middle) + 1 or middle
    return text[:cut], text[cut:]
