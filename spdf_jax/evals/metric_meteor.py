"""METEOR 1.5, by its own Java program: the jar that pycocoevalcap ships, where that package and Java are installed."""

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class MeteorAbsent(Exception):
    """METEOR cannot be had here; the message says why."""


def _command() -> list[str]:
    """How to start the program; raises `MeteorAbsent`."""
    try:
        package = importlib.util.find_spec("pycocoevalcap.meteor")
    except ModuleNotFoundError:
        package = None
    folders = (package and package.submodule_search_locations) or []
    jar = next((jar for folder in folders if (jar := Path(folder) / "meteor-1.5.jar").is_file()), None)
    if jar is None:
        raise MeteorAbsent("meteor-1.5.jar is not installed; pip install pycocoevalcap brings it")
    java = shutil.which("java")
    if java is None:
        raise MeteorAbsent("no java on the PATH; install a Java runtime, version 8 or newer")
    return [java, "-Xmx2G", "-Dfile.encoding=UTF-8", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]


def meteor_score(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 for English with normalisation, over the whole corpus.

    Source: Denkowski and Lavie, 2014; equal to pycocoevalcap 1.2 (`meteor.Meteor`) on the same texts.

    Args:
      hypotheses: one text an instance, tokens joined by spaces.
      references: one or more texts an instance.

    Returns:
      The score in [0, 1].

    Raises:
      MeteorAbsent: no Java, no jar, or the program failed.
    """
    command = _command()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        try:
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8"
            ) as process:
                statistics = [
                    _ask(process, "SCORE", *refs, hypothesis)
                    for hypothesis, refs in zip(hypotheses, references, strict=True)
                ]
                answers = [_ask(process, "EVAL", *statistics), *(_answer(process) for _ in hypotheses)]
            return float(answers[-1])  # one an instance, then the corpus'
        except (OSError, ValueError) as error:  # it died, or said something that is not a number
            errors.seek(0)
            why = (errors.read().strip() or str(error)).splitlines()[-1]
            raise MeteorAbsent(f"METEOR's Java program failed: {why}") from error


def _ask(process: subprocess.Popen[str], *fields: str) -> str:
    assert process.stdin is not None
    process.stdin.write(" ||| ".join(" ".join(field.replace("|||", " ").split()) for field in fields) + "\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    if not (line := process.stdout.readline()):
        raise OSError("it ended before it answered")
    return line.strip()
