"""The files of the harness's tasks: read from a user's folder, checked, written as the definitions in `tasks/` want them.

    DATA_DIR/lambada.jsonl             {"text": "..."} a line; or .txt, a passage a line
    DATA_DIR/ptb.txt, wikitext.txt     the file is one text; or .jsonl, a text a line
    DATA_DIR/one_billion_words.txt     a sentence a line; or .jsonl
    DATA_DIR/sst2/train.tsv, dev.tsv   as GLUE releases them: sentence, label; or .jsonl with the same keys
    DATA_DIR/rte/train.tsv, dev.tsv    as GLUE releases them: sentence1, sentence2, label; or .jsonl

Only data is read from there: a task definition may name code to run, so definitions come from this package alone.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from spdf_jax.errors import InputError

_DEFINITIONS = Path(__file__).with_name("tasks")


class _Source(NamedTuple):
    """What a task's files hold: texts, one a file or one a line, or fields and a label out of two."""

    text_is_line: bool = True
    fields: tuple[str, ...] = ("text",)
    labels: tuple[str, ...] = ()


_SOURCES = {
    "lambada": _Source(),
    "ptb": _Source(text_is_line=False),
    "wikitext": _Source(text_is_line=False),
    "one_billion_words": _Source(),
    "sst2": _Source(fields=("sentence",), labels=("negative", "positive")),
    "rte": _Source(fields=("sentence1", "sentence2"), labels=("entailment", "not_entailment")),
}
TASKS = tuple(_SOURCES)


def write_task(name: str, data_dir: Path, folder: Path, num_fewshot: int | None = None) -> None:
    """Writes a task's definition and its data into a folder, for lm-eval's ``TaskManager(include_path=folder)``.

    Args:
      name: one of `TASKS`.
      data_dir: the user's folder, see the module's docstring.
      folder: an empty one, or one with other tasks.
      num_fewshot: labelled examples before each question, in the place of the definition's; None keeps it.

    Raises:
      InputError: an unknown task, examples for a task that has none, a file that is missing or malformed (with its line).

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "ptb.txt").write_text("a b c")
    >>> write_task("ptb", folder, folder / "tasks")
    >>> (folder / "tasks" / "ptb" / "test.jsonl").read_text()
    '{"text": "a b c"}\\n'
    """
    if name not in _SOURCES:
        raise InputError(f"tasks: {name!r} is unknown: use some of {', '.join(TASKS)}")
    definition = yaml.safe_load((_DEFINITIONS / f"{name}.yaml").read_text())
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"num_fewshot: {num_fewshot} must be at least 0")
    if num_fewshot is not None and definition["num_fewshot"]:  # 0 there: the task is a zero-shot one
        definition["num_fewshot"] = num_fewshot
    home = folder.resolve() / name
    home.mkdir(parents=True)
    files = definition["dataset_kwargs"]["data_files"]
    for split, file in files.items():
        rows = list(_rows(name, split, data_dir))
        (home / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[split] = str(home / file)
    definition["dataset_kwargs"]["cache_dir"] = str(home / "cache")
    (home / f"{name}.yaml").write_text(json.dumps(definition))  # YAML reads JSON


def _rows(name: str, split: str, data_dir: Path) -> Iterator[dict[str, Any]]:
    """Checked rows of a split."""
    source = _SOURCES[name]
    stem, plain = (f"{name}/{split}", ".tsv") if source.labels else (name, ".txt")
    file = next((f for suffix in (".jsonl", plain) if (f := data_dir / f"{stem}{suffix}").is_file()), None)
    if file is None:
        raise InputError(
            f"{data_dir / stem}: neither {stem}.jsonl nor {stem}{plain} is there; task {name} reads one of them"
        )
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    found = 0
    for number, row in _parse(file, text, source):
        try:
            yield _check(name, source, row)
        except InputError as error:
            raise InputError(f"{file}: line {number}: {error}") from error
        found += 1
    if not found:
        raise InputError(f"{file}: holds nothing; task {name} needs at least one line")


def _parse(file: Path, text: str, source: _Source) -> Iterator[tuple[int, Any]]:
    """Line numbers and raw rows; lines of blanks are left out."""
    if file.suffix == ".txt" and not source.text_is_line:
        if text.strip():
            yield 1, {"text": text}
        return
    # Not splitlines: a text may hold other characters that count as line ends there.
    lines = [(number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if file.suffix == ".tsv" and lines:
        header = lines.pop(0)[1].split("\t")
    for number, line in lines:
        if file.suffix == ".txt":
            yield number, {"text": line}
        elif file.suffix == ".tsv":
            yield number, dict(zip(header, line.split("\t"), strict=False))
        else:
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{file}: line {number}: not JSON ({error}); write one object a line") from error


def _check(name: str, source: _Source, row: Any) -> dict[str, Any]:
    """The fields that the task reads, its label as a number."""
    wanted = (*source.fields, *(["label"] if source.labels else []))
    if not isinstance(row, dict) or any(key not in row for key in wanted):
        raise InputError(f"must be an object or a row with {', '.join(wanted)}")
    for key in source.fields:
        if not isinstance(row[key], str) or not row[key].strip():
            raise InputError(f"{key} {row[key]!r:.40} must be a text that is not empty")
    checked = {key: row[key] for key in source.fields}
    if name == "lambada":
        checked["text"] = " ".join(checked["text"].split())
        if " " not in checked["text"]:
            raise InputError(f"text {checked['text']!r:.40} has one word; a last word needs some before it")
    if source.labels:
        label = str(row["label"])
        numbers = {str(i): i for i in range(len(source.labels))} | {text: i for i, text in enumerate(source.labels)}
        if label not in numbers:
            raise InputError(f"label {label!r:.40} must be one of {', '.join(numbers)}")
        checked["label"] = numbers[label]
    return checked
