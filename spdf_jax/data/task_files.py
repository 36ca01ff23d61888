"""Reads the released files of E2E, WebNLG, DART and the Curation Corpus. They are data: no XML entity is ever expanded.

A folder may lack splits: with a training and a development file, the inputs of the latter are halved into validation
and test; one file alone is split 80/10/10 by input.
"""

import csv
import io
import json
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spdf_jax.data.examples import TASK_SPLITS, THREE_WAYS, Example, Style, Task, TaskSplit, make_task, split_of_input
from spdf_jax.errors import InputError

_HALVES: dict[TaskSplit, float] = {"validation": 0.5, "test": 0.5}


class _Release(NamedTuple):
    """How a data set is published: its layouts, in each the file names by split; the first pattern that matches counts.

    What a pattern with ``**/`` matches is read whole; any other is of one file.
    """

    style: Style
    read: Callable[[Path], Iterator[Example]]
    layouts: tuple[dict[TaskSplit, tuple[str, ...]], ...]


def read_task_files(name: str, path: str) -> Task:
    """The task in a folder of released files, or in one file of them.

    Args:
      name: A key of `RELEASES`.
      path: The folder or the file.

    Returns:
      The task, references grouped by input.

    Raises:
      InputError: No such file, no name that fits, or a malformed one: with its line, and what to do.
    """
    release, where = RELEASES[name], f"task.path={path!r}"
    examples = {
        split: [example for file in files for example in release.read(file)]
        for split, files in _files(release, Path(path), where).items()
    }
    if len(examples) == 1:
        (alone,) = examples.values()
        examples = _split(alone, THREE_WAYS)
    elif "test" not in examples:
        examples |= _split(examples["validation"], _HALVES)
    return make_task(dict(examples), style=release.style, where=where)


def _split(examples: list[Example], shares: dict[TaskSplit, float]) -> dict[TaskSplit, list[Example]]:
    split_examples: dict[TaskSplit, list[Example]] = {split: [] for split in shares}
    for example in examples:
        split_examples[split_of_input(example.context, shares)].append(example)
    return split_examples


def _files(release: _Release, root: Path, where: str) -> dict[TaskSplit, list[Path]]:
    """The files of every split that has some."""
    if root.is_file():
        return {"train": [root]}
    if not root.is_dir():
        raise InputError(f"{where}: no such file or folder; put the released files there")
    expected = " or ".join(
        ", ".join(pattern for split in TASK_SPLITS for pattern in layout.get(split, ())) for layout in release.layouts
    )
    there = [found for layout in release.layouts if (found := _found(layout, root, where))]
    if not there:
        raise InputError(f"{where}: none of the released files is there; expected {expected}")
    if len(there) > 1:
        names = " and ".join(str(next(iter(found.values()))[0].relative_to(root)) for found in there)
        raise InputError(f"{where}: {names} are of two releases; keep the files of one there")
    (found,) = there
    if len(found) > 1 and not {"train", "validation"} <= found.keys():
        names = ", ".join(str(file.relative_to(root)) for files in found.values() for file in files)
        raise InputError(f"{where}: only {names}; add the training and development files of {expected}")
    return found


def _found(layout: dict[TaskSplit, tuple[str, ...]], root: Path, where: str) -> dict[TaskSplit, list[Path]]:
    found: dict[TaskSplit, list[Path]] = {}
    for split, patterns in layout.items():
        pattern = next((pattern for pattern in patterns if any(root.glob(pattern))), None)
        if pattern is not None:
            found[split] = sorted(root.glob(pattern))
            if len(found[split]) > 1 and "**" not in pattern:
                names = ", ".join(file.name for file in found[split])
                raise InputError(f"{where}: more than one file for {split} ({names}); keep one of them there")
    return found


def _read_e2e(file: Path) -> Iterator[Example]:
    """The E2E challenge's CSV: https://github.com/tuetschek/e2e-dataset; cleaned: https://github.com/tuetschek/e2e-cleaning."""
    for line, (context, reference) in _csv_rows(file, ("mr", "ref")):
        if not (context and reference):
            raise InputError(f"{file}:{line}: an empty mr or ref; fix or remove the row")
        yield Example(context, (reference,))


def _read_curation(file: Path) -> Iterator[Example]:
    """Articles and summaries, pairs with an empty side dropped (SPDF, supplement)."""
    for _, (context, reference) in _csv_rows(file, ("article_content", "summary"), ("article", "summary")):
        if context and reference:
            yield Example(context, (reference,))


def _read_dart(file: Path) -> Iterator[Example]:
    """DART's JSON: https://github.com/Yale-LILY/dart; relations lower-cased, as LoRA's and prefix-tuning's inputs."""
    try:
        rows = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON ({error}); fetch it again") from error
    if not isinstance(rows, list):
        raise InputError(f"{file}: a {type(rows).__name__}, not a list; give a file of DART's release")
    for number, row in enumerate(rows, start=1):
        try:
            triples = [(_clean(s), _clean(relation).lower(), _clean(o)) for s, relation, o in row["tripleset"]]
            references = tuple(filter(None, (_clean(annotation["text"]) for annotation in row["annotations"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            message = "expected {'tripleset': [[subject, relation, object], ...], 'annotations': [{'text': ...}]}"
            raise InputError(f"{file}: item {number}: {message}; fix or remove the item") from error
        if not triples:
            raise InputError(f"{file}: item {number}: an empty tripleset; fix or remove the item")
        yield Example(_linearised(triples), references)


def _read_webnlg(file: Path) -> Iterator[Example]:
    """The WebNLG challenge's XML: https://gitlab.com/shimorina/webnlg-dataset; English texts marked good, or not at all."""
    text = _text(file)
    # Entities can only be declared in a DOCTYPE, and as `text` is not decoded again none can hide in an encoding.
    if "<!DOCTYPE" in text:
        raise InputError(f"{file}: has a DOCTYPE, whose entities are never expanded; remove it")
    try:
        root = ET.fromstring(text)
    except ET.ParseError as error:
        raise InputError(f"{file}:{error.position[0]}: not well-formed XML ({error}); fetch it again") from error
    entries = list(root.iter("entry"))
    if not entries:
        raise InputError(f"{file}: no <entry> in it; give a file in the WebNLG challenge's layout")
    for number, entry in enumerate(entries, start=1):
        where = f"{file}: entry {number} (eid {entry.get('eid')})"
        triples = [_split_triple(triple.text or "", where) for triple in entry.iterfind("modifiedtripleset/mtriple")]
        if not triples:
            raise InputError(f"{where}: no modifiedtripleset/mtriple; fix or remove the entry")
        good = (
            _clean("".join(lex.itertext()))
            for lex in entry.iterfind("lex")
            if lex.get("comment", "") in ("good", "") and lex.get("lang", "en") in ("en", "")
        )
        yield Example(_linearised(triples), tuple(filter(None, good)), entry.get("category") or "")


def _split_triple(text: str, where: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(" | "))
    if len(parts) != 3:
        raise InputError(f"{where}: triple {text!r} is not 'subject | relation | object'; fix or remove the entry")
    return parts


def _linearised(triples: Sequence[tuple[str, ...]]) -> str:
    """Triples as LoRA's inputs write them (Hu et al. 2022)."""
    return " | ".join(" : ".join(triple) for triple in triples)


def _csv_rows(file: Path, *choices: tuple[str, str]) -> Iterator[tuple[int, tuple[str, str]]]:
    """Number of a row's last line, and its values in the first choice of two columns that the file has."""
    reader = csv.reader(io.StringIO(_text(file), newline=""), strict=True)
    before = csv.field_size_limit(2**31 - 1)  # an article can be longer than the module's 128 KiB
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = next((columns for columns in choices if set(columns) <= set(header)), None)
        if columns is None:
            wanted = " or ".join(",".join(columns) for columns in choices)
            raise InputError(f"{file}:1: columns {header}, but {wanted} are needed; give the released file")
        first, second = map(header.index, columns)
        for row in reader:
            if len(row) == len(header):
                yield reader.line_num, (_clean(row[first]), _clean(row[second]))
            elif row:
                message = f"{len(row)} fields under {len(header)} columns; quote or remove the row"
                raise InputError(f"{file}:{reader.line_num}: {message}")
    except csv.Error as error:
        raise InputError(f"{file}:{reader.line_num}: not CSV ({error}); fix or remove the row") from error
    finally:
        csv.field_size_limit(before)


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 (byte {error.start}); convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read ({error.strerror}); fix its permissions") from error


def _clean(text: Any) -> str:
    """Without outer white space, and without half surrogate pairs, which JSON can spell and UTF-8 cannot hold."""
    return text.strip().encode("utf-16", "surrogatepass").decode("utf-16", "replace")


RELEASES: dict[str, _Release] = {
    "e2e": _Release(
        "e2e",
        _read_e2e,
        (
            {
                "train": ("trainset*.csv",),
                "validation": ("devset*.csv",),
                # The challenge's testset.csv has inputs only.
                "test": ("testset_w_refs*.csv", "testset*.csv"),
            },
            {  # cleaned; no-ol: without what overlaps with the test set
                "train": ("train-fixed.no-ol.csv", "train-fixed.csv"),
                "validation": ("devel-fixed.no-ol.csv", "devel-fixed.csv"),
                "test": ("test-fixed.csv",),
            },
        ),
    ),
    "webnlg": _Release(
        "webnlg",
        _read_webnlg,
        (
            {"train": ("train*.xml",), "validation": ("dev*.xml",), "test": ("test*.xml",)},
            {
                "train": ("train/**/*.xml",),
                "validation": ("dev/**/*.xml",),
                # Beside these lie their inputs alone, parts of them, and tests of semantic parsing.
                "test": ("test/rdf-to-text-*-with-refs-en.xml", "test/testdata_with_lex.xml", "test/*triples/**/*.xml"),
            },
        ),
    ),
    "dart": _Release(
        "dart", _read_dart, ({"train": ("*train*.json",), "validation": ("*dev*.json",), "test": ("*test*.json",)},)
    ),
    "curation": _Release("perplexity", _read_curation, ({"train": ("*.csv",)},)),
}
