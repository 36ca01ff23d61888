"""Questions of professional exams: a set of our own that ships with the package, and others by path.

A file has one JSON object a line:

    {"certification": "Python Associate", "field": "information technology", "question": "What is 7 // 2?",
     "choices": ["3", "3.5"], "answer": "A", "human_score": 0.81}

``answer`` is the letter of the right choice or its position counted from 0. ``human_score`` may be left out: the share that
people get right, from 0 to 1, the same in all lines of a certification that give it.
"""

import dataclasses
import json
import string
from pathlib import Path
from typing import Any

from spdf_jax.errors import InputError

SHIPPED_QUESTIONS = Path(__file__).with_name("exam_questions.jsonl")

LETTERS = string.ascii_uppercase

_REQUIRED = ("certification", "field", "question", "choices", "answer")


@dataclasses.dataclass(frozen=True)
class Question:
    """One multiple-choice question.

    Attributes:
      certification: the exam it belongs to.
      field: the exam's field of work.
      question: what is asked.
      choices: two or more, all different.
      answer: position of the right choice, from 0.
      human_score: share of the certification's questions that people get right, if known.
    """

    certification: str
    field: str
    question: str
    choices: tuple[str, ...]
    answer: int
    human_score: float | None = None


def read_questions(path: Path | str = SHIPPED_QUESTIONS) -> tuple[Question, ...]:
    """Reads a set of exams from JSON lines, as the module's docstring describes them; empty lines are skipped.

    Args:
      path: the file; by default the set of our own that ships with the package.

    Returns:
      The questions, in order.

    Raises:
      InputError: the file cannot be read or holds no question; or, with the line's number: it is not JSON or not UTF-8, a
        key is missing, unknown or has a value of the wrong kind, there are fewer than 2 or more than 26 choices or two
        equal ones, the answer is none of them, a question comes twice in a certification, or a certification has two
        fields or two human scores.

    >>> len(read_questions())
    144
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"exams {path}: cannot be read ({error.strerror}); give a file of JSON lines") from error
    questions: list[Question] = []
    known: dict[Any, tuple[Any, int]] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            question = _parse_question(line)
            _check_agrees(question, number, known)
        except InputError as error:
            raise InputError(f"exams {path}: line {number}: {error}") from error
        questions.append(question)
    if not questions:
        raise InputError(f"exams {path}: holds no question; give a file with one JSON object a line")
    return tuple(questions)


def _parse_question(line: bytes) -> Question:
    """The question of one line, checked by itself."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); write one object a line") from error
    if not isinstance(row, dict):
        raise InputError(f"a JSON {type(row).__name__}, not an object; write one object a line")
    missing = [key for key in _REQUIRED if key not in row]
    unknown = [key for key in row if key not in (*_REQUIRED, "human_score")]
    if missing or unknown:
        problems = [f"{kind} {', '.join(keys)}" for kind, keys in (("no", missing), ("unknown", unknown)) if keys]
        raise InputError(f"{' and '.join(problems)}; the keys are {', '.join(_REQUIRED)} and, if known, human_score")
    certification, field, question = (_text(row[key], key) for key in ("certification", "field", "question"))
    choices = _parse_choices(row["choices"])
    answer = _parse_answer(row["answer"], len(choices))
    return Question(certification, field, question, choices, answer, _parse_human_score(row.get("human_score")))


def _text(value: Any, where: str) -> str:
    """`value` without blanks around it, if it is a text that can be encoded."""
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where} {value!r} must be a text that is not empty; put it in quotes")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} {value!r} holds half of a surrogate pair; write the character itself") from error
    return value.strip()


def _parse_choices(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not 2 <= len(value) <= len(LETTERS):
        raise InputError(f"choices {value!r} must be a list of 2 to {len(LETTERS)} texts; add or remove some")
    choices = tuple(_text(choice, f"choices[{index}]") for index, choice in enumerate(value))
    for index, choice in enumerate(choices):
        if choice in choices[:index]:
            raise InputError(f"choices[{index}] {choice!r} comes twice; make every choice different")
    return choices


def _parse_answer(value: Any, n_choices: int) -> int:
    """The position that a letter or a position stands for."""
    if isinstance(value, str) and len(value.strip()) == 1:
        position = LETTERS.find(value.strip().upper())
    elif isinstance(value, int) and not isinstance(value, bool):
        position = value
    else:
        position = -1
    if not 0 <= position < n_choices:
        allowed = f"a letter from A to {LETTERS[n_choices - 1]} or a position from 0 to {n_choices - 1}"
        raise InputError(f"answer {value!r} is none of the {n_choices} choices; give {allowed}")
    return position


def _parse_human_score(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"human_score {value!r} must be a share from 0 to 1; write 70 % as 0.7")
    return float(value)


def _check_agrees(question: Question, number: int, known: dict[Any, tuple[Any, int]]) -> None:
    """Holds a question against the lines before it; `known` keeps what was said first, and in which line."""
    name = question.certification
    for key, value in (("field", question.field), ("human_score", question.human_score)):
        first, line = known.setdefault((name, key), (value, number)) if value is not None else (value, number)
        if value != first:
            raise InputError(f"{key} {value!r} of {name!r} was {first!r} in line {line}; give it one for all its lines")
    # Exams repeat a wording such as "Which statement is true?"; with the same choices it is the same question.
    identity = (name, _folded(question.question), frozenset(map(_folded, question.choices)))
    _, line = known.setdefault(identity, (None, number))
    if line != number:
        raise InputError(f"question {question.question!r} of {name!r} is already in line {line}; remove one of the two")


def _folded(text: str) -> str:
    """What stays of a text when blanks are set aside."""
    return " ".join(text.split())
