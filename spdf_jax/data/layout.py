"""Which files of a folder are read, and for which split. What is not read is named: in a refusal, or as left out.

Names say the split as Hugging Face `datasets` takes them (`data_files.py`: folders, prefixes, words inside a name, synonyms):
`train/`, `validation-00000-of-00002.parquet`, `val.jsonl.zst`, `c4-train.00000-of-01024.json.gz`, `wiki.valid.tokens`.
"""

import contextlib
import fnmatch
import os
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from spdf_jax.data.text_files import PACKED_SUFFIXES, TextFile, text_file
from spdf_jax.errors import InputError

Split = Literal["train", "validation"]

_SPLIT_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD_ENDS = re.compile(r"[-._ 0-9]+")
# Beside data these are about it; in a folder of texts they are texts.
_ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|notice|citation|changelog|dataset_infos?|dataset_dict|state|(sha|md)\d+sums?)(\..*)?",
    re.I,
)
# Hugging Face `datasets` leaves such beside the data of `save_to_disk` where it maps or filters them: the same rows again.
_COMPUTED = re.compile(r"cache-[0-9a-f]{16}(_\d+_of_\d+)?\.arrow")


class Source(NamedTuple):
    """A file to read, its path in the folder, and the split that is said for all of it, if one is."""

    file: TextFile
    name: str
    split: Split | None


def find_files(path: str, train_files: str, validation_files: str) -> tuple[list[Source], list[str]]:
    """The files of `data.path`.

    Args:
      path: a file, or a folder that is searched to its depths, linked folders too.
      train_files, validation_files: patterns of names, see `DataConfig`.

    Returns:
      The files to read, sorted by name; and the names, with the reason, of those left out on purpose.

    Raises:
      InputError: nothing there, a file that cannot be read, or one whose split cannot be told; names the files.
    """
    root = Path(path)
    if root.is_dir():
        names = {file.relative_to(root).as_posix(): file for file in walk(root, skip={"__pycache__"})}
    elif root.exists():
        names = {root.name: root}
    else:
        raise InputError(f"data.path={path!r}: no such file or folder; give a text file or a folder of them")
    left_out: list[str] = []
    if root.is_dir() and not (train_files or validation_files):
        left_out = [f"{name} (computed from the data)" for name in names if _COMPUTED.fullmatch(Path(name).name)]
        names = {name: file for name, file in names.items() if not _COMPUTED.fullmatch(file.name)}
    if train_files or validation_files:
        splits = _chosen(path, list(names), train_files, validation_files)
    elif root.is_dir():
        splits = _named(path, list(names), left_out)
    else:
        splits = {root.name: "train"}
    _check_twins(path, names, splits)
    read = _once(names, [name for name, split in splits.items() if split != "test"])
    files = _readable(path, {name: names[name] for name in read})
    about = [name for name in files if _is_about(name)]
    data = any(files[name].kind != "text" for name in files if name not in about) or "state.json" in names
    if not (train_files or validation_files) and data:
        left_out += [f"{name} (about the data)" for name in about]
        files = {name: file for name, file in files.items() if name not in about}
    held_out = "validation" in splits.values()
    return [Source(file, name, splits[name] if held_out else None) for name, file in files.items()], left_out  # type: ignore[arg-type]


def split_words(name: str) -> set[str]:
    """The splits that a path names, in any of its parts.

    >>> split_words("data/train-00000-of-00002.parquet"), split_words("c4/en.valid.json"), split_words("trains/a.txt")
    ({'train'}, {'validation'}, set())
    """
    words = (word for part in Path(name.lower()).parts for word in _WORD_ENDS.split(part))
    return {_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS}


def walk(root: Path, *, skip: set[str]) -> list[Path]:
    """Every file under `root`, not in hidden folders or those named in `skip`, sorted by relative path."""

    found: list[Path] = []

    def visit(folder: Path, above: tuple[str, ...]) -> None:
        real = os.path.realpath(folder)
        if real in above:
            raise InputError(f"{folder}: a link to a folder that it lies in; remove it")
        try:
            entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be read ({error.strerror}); fix its permissions or move it away"
            ) from error
        for path in entries:
            if not path.is_dir():
                found.append(path)
            elif path.name not in skip:
                visit(path, (*above, real))

    visit(root, ())
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def _is_about(name: str) -> bool:
    return _ABOUT.fullmatch(Path(name).name) is not None


def _several(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _matching(path: str, field: str, names: list[str], patterns: str) -> list[str]:
    found: list[str] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        matches = fnmatch.filter(names, pattern)
        if not matches:
            raise InputError(
                f"data.{field}={patterns!r}: no file of {path} matches {pattern!r}; there are {_several(names)}"
            )
        found += matches
    return list(dict.fromkeys(found))


def _chosen(path: str, names: list[str], train_files: str, validation_files: str) -> dict[str, str]:
    """The splits as the user says them."""
    validation = _matching(path, "validation_files", names, validation_files)
    train = _matching(path, "train_files", names, train_files)
    if not train_files:
        train = [name for name in names if name not in validation]
    if both := [name for name in train if name in validation]:
        raise InputError(
            f"data.validation_files={validation_files!r}: {_several(both)} is in data.train_files, too; keep it to one"
        )
    return dict(sorted((dict.fromkeys(train, "train") | dict.fromkeys(validation, "validation")).items()))


def _named(path: str, names: list[str], left_out: list[str]) -> dict[str, str]:
    """The splits as names say them; where none says any, all is for training."""
    said = {name: split_words(name) for name in names}
    if not any(said.values()):
        return dict.fromkeys(names, "train")
    advice = "say which to read: data.train_files and data.validation_files ('*' is all)"
    if two := [name for name, splits in said.items() if len(splits) > 1]:
        raise InputError(f"data.path={path!r}: {_several(two)} names more than one split; {advice}")
    if none := [name for name, splits in said.items() if not splits and not _is_about(name)]:
        named = next(name for name in names if said[name])
        raise InputError(f"data.path={path!r}: {named} names its split, {_several(none)} does not; {advice}")
    splits = {name: splits.pop() for name, splits in said.items() if splits}
    if "train" not in splits.values():
        raise InputError(f"data.path={path!r}: no file named train beside {_several(list(splits))}; {advice}")
    left_out += [f"{name} (about the data)" for name in names if name not in splits]
    left_out += [f"{name} (for testing)" for name, split in splits.items() if split == "test"]
    return splits


def _readable(path: str, files: dict[str, Path]) -> dict[str, TextFile]:
    """How each file is to be read."""
    found, faults = {}, []
    for name, file in files.items():
        try:
            if not file.is_file():
                raise InputError(f"{file}: no file, or a link to nothing; remove it")
            found[name] = text_file(file)
        except InputError as fault:
            faults.append((name, fault))
    if faults:
        more = (
            f" ({len(faults)} files cannot be read: {_several([name for name, _ in faults])})"
            if len(faults) > 1
            else ""
        )
        choose = ", or name what to read in data.train_files" if Path(path).is_dir() else ""
        raise InputError(f"{faults[0][1]}{choose}{more}") from faults[0][1]
    return found


def _same_file(file: Path) -> tuple[int, ...] | Path:
    with contextlib.suppress(OSError):  # a link to nothing is refused when it is read
        status = file.stat()
        if status.st_size:
            return status.st_dev, status.st_ino
    return file


def _once(names: dict[str, Path], read: list[str]) -> list[str]:
    """Without the second of two names of one file."""
    first: dict[Any, str] = {}
    return [name for name in read if first.setdefault(_same_file(names[name]), name) == name]


def _check_twins(path: str, names: dict[str, Path], splits: dict[str, str]) -> None:
    """Raises `InputError` for one file in two splits, and for a file that is there packed and unpacked."""
    seen: dict[Any, str] = {}
    for name, split in splits.items():
        twin = seen.setdefault(_same_file(names[name]), name)
        if splits[twin] != split:
            raise InputError(f"data.path={path!r}: {twin} and {name} are one file in two splits; keep one of them")
        unpacked = next((name[: -len(suffix)] for suffix in PACKED_SUFFIXES if name.lower().endswith(suffix)), name)
        if (twin := seen.setdefault(unpacked, name)) != name:
            raise InputError(f"data.path={path!r}: {twin} and {name} are one file packed twice; keep one of them")
