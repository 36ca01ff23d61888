"""Pairs of Python prompts that differ in one place, so that another token comes next.

A pair is made by a template, or is held-out code of the running Python's own library with one place changed. Either way both of
its prompts are read up to where the wanted token comes: ``x = "abc`` and ``x = 'abc``.
"""

import io
import itertools
import keyword
import random
import re
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple


class Pair(NamedTuple):
    """Two prompts, what comes after each, and where they are from: ``template`` or ``library``."""

    prompts: tuple[str, str]
    answers: tuple[str, str]
    source: str


class Task(NamedTuple):
    """Makes pairs.

    Attributes:
      about: what the model has to know, in words.
      answers: the text that comes next after the first prompt of a pair, and after its second.
      template: draws two prompts.
      library: yields two prompts for every fit place in a file of code.
    """

    about: str
    answers: tuple[str, str]
    template: Callable[[random.Random], tuple[str, str]]
    library: Callable[[str], Iterator[tuple[str, str]]]


_NAMES = (
    *(
        "name",
        "value",
        "key",
        "path",
        "result",
        "data",
        "line",
        "text",
        "item",
        "index",
        "args",
        "mode",
        "node",
        "func",
    ),
    *("message", "other", "size", "start", "end", "filename", "module", "code", "source", "target", "prefix", "header"),
)
_WORDS = (
    *(
        "error",
        "read",
        "write",
        "open",
        "close",
        "string",
        "file",
        "default",
        "unknown",
        "type",
        "object",
        "not",
        "list",
    ),
    *(
        "format",
        "invalid",
        "missing",
        "method",
        "class",
        "test",
        "import",
        "table",
        "window",
        "option",
        "status",
        "host",
    ),
)
_CALLED = ("len", "str", "list", "int", "set", "repr", "sorted", "tuple")
_HEADS = (
    "",
    "def {0}({1}):\n    ",
    "for {1} in {2}:\n    ",
    "if {1} is None:\n    ",
    "class {0}:\n    def {1}(self):\n        ",
    "{2} = None\n",
    "try:\n    ",
    "{1} = {2} + 1\n",
)


def _head(rng: random.Random) -> str:
    return rng.choice(_HEADS).format(*rng.sample(_NAMES, 3))


def _quotes(rng: random.Random) -> tuple[str, str]:
    frame = rng.choice(
        ("{0} = ", "return ", "self.{0} = ", "if {0} == ", "{0} = {1} + ", "{0} += ", "yield ", "{0} = not ")
    )
    before = _head(rng) + frame.format(*rng.sample(_NAMES, 2))
    said = " ".join(rng.choices(_WORDS, k=rng.randint(1, 3)))
    return f'{before}"{said}', f"{before}'{said}"


def _brackets(rng: random.Random) -> tuple[str, str]:
    frame = rng.choice(("{0} = {1}", "return {0}", "self.{0} = {1}", "{0} = self.{1}", "{0} += {1}", "yield {1}"))
    before = _head(rng) + frame.format(*rng.sample(_NAMES, 2))
    inside = rng.choice(("{0}", "{0} + 1", "{0} - {1}", "self.{0}", "{0}, {1}", "{0}.{1}", "{0}, 0")).format(
        *rng.sample(_NAMES, 2)
    )
    return f"{before}({inside}", f"{before}[{inside}"


def _call_depth(rng: random.Random) -> tuple[str, str]:
    frame = rng.choice(("{0} = {1}(", "return {0}(", "self.{0} = {1}(", "{0} = self.{1}(", "yield {1}(", "{0}({1}, "))
    before = _head(rng) + frame.format(*rng.sample(_NAMES, 2))
    inside = rng.choice(("{0}", "{0}, {1}", "{0} + 1", "self.{0}", "{0}.{1}", "{0}, 0")).format(*rng.sample(_NAMES, 2))
    return f"{before}{inside}", f"{before}{rng.choice(_CALLED)}({inside}"


def _list_depth(rng: random.Random) -> tuple[str, str]:
    frame = rng.choice(("{0} = ", "return ", "self.{0} = ", "{0} += ", "yield ", "for {0} in "))
    before = _head(rng) + frame.format(*rng.sample(_NAMES, 2))
    inside = ", ".join(rng.choices((*_NAMES, *map(str, range(10))), k=rng.randint(1, 4)))
    return f"{before}[{inside}", f"{before}[[{inside}"


def _set_or_string(rng: random.Random) -> tuple[str, str]:
    name, item, items, other = rng.sample(_NAMES, 4)
    loop = rng.choice(
        (
            "for {1} in {2}:\n{4}    ",
            "if {1}:\n{4}    ",
            "while {1}:\n{4}    ",
            "{3} = {1}\n{4}",
            "for {1} in self.{2}:\n{4}    ",
        )
    )
    indent = rng.choice(("", "    "))
    head = f"def {rng.choice(_WORDS)}({items}):\n" if indent else ""
    after = f"\n{indent}" + loop.format(name, item, items, other, indent) + name
    made = rng.choice(('""', "''"))
    return f"{head}{indent}{name} = set(){after}", f"{head}{indent}{name} = {made}{after}"


def _tokens(text: str) -> list[tokenize.TokenInfo]:
    """Of a file that Python would not read, none."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return []


_LINES_BEFORE, _LONGEST_INSIDE = 3, 40
_ENDS = (tokenize.NEWLINE, tokenize.NL)


def _up_to(lines: Sequence[str], token: tokenize.TokenInfo) -> str:
    """Some lines before a token, and the part of its own before it."""
    row, column = token.start
    return "".join(lines[max(row - 1 - _LINES_BEFORE, 0) : row - 1]) + lines[row - 1][:column]


def _quotes_in(text: str) -> Iterator[tuple[str, str]]:
    """Strings at the end of a line."""
    lines, found = text.splitlines(keepends=True), _tokens(text)
    for token, after in itertools.pairwise(found):
        fits = token.type == tokenize.STRING and re.fullmatch(r"""(["'])([^"'\\\n]{1,40})\1""", token.string)
        if fits and after.type in _ENDS:
            before = _up_to(lines, token)
            yield f'{before}"{fits[2]}', f"{before}'{fits[2]}"


def _closed_at_once(text: str, opening: str) -> Iterator[tuple[tokenize.TokenInfo, str, str]]:
    """Brackets without others inside that close at the end of their line: the token before, the text before, what is inside."""
    lines, found = text.splitlines(keepends=True), _tokens(text)
    opened = -1
    for i, token in enumerate(found):
        if token.type != tokenize.OP or token.string not in "()[]{}":
            continue
        if token.string in "([{":
            opened = i
            continue
        first, opened = opened, -1
        if first < 0 or found[first].string not in opening or found[first].start[0] != token.start[0]:
            continue
        inside = lines[token.start[0] - 1][found[first].end[1] : token.start[1]]
        if found[i + 1].type in _ENDS and len(inside) <= _LONGEST_INSIDE and re.fullmatch(r"[^'\"]*\w", inside):
            yield found[first - 1], _up_to(lines, found[first]), inside


def _brackets_in(text: str) -> Iterator[tuple[str, str]]:
    """Calls and subscripts."""
    for previous, before, inside in _closed_at_once(text, "(["):
        if previous.type == tokenize.NAME and not keyword.iskeyword(previous.string):
            yield f"{before}({inside}", f"{before}[{inside}"


def _call_depth_in(text: str) -> Iterator[tuple[str, str]]:
    """Calls."""
    for i, (previous, before, inside) in enumerate(_closed_at_once(text, "(")):
        if previous.type == tokenize.NAME and not keyword.iskeyword(previous.string):
            yield f"{before}({inside}", f"{before}({_CALLED[i % len(_CALLED)]}({inside}"


def _list_depth_in(text: str) -> Iterator[tuple[str, str]]:
    """Lists."""
    for previous, before, inside in _closed_at_once(text, "["):
        if previous.string in "=,(:" or keyword.iskeyword(previous.string):
            yield f"{before}[{inside}", f"{before}[[{inside}"


_MADE, _GROWS = re.compile(r"( *)(\w+) = (set\(\)|''|\"\")\n"), re.compile(r" *(\w+)(\.add\(| \+= )")
_MOST_LINES_BETWEEN = 6


def _set_or_string_in(text: str) -> Iterator[tuple[str, str]]:
    """Names that are made a set or a string, and then grow."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        if not (made := _MADE.fullmatch(line)):
            continue
        indent, name, value = made.groups()
        for j in range(i + 1, min(i + 2 + _MOST_LINES_BETWEEN, len(lines))):
            grows = _GROWS.match(lines[j])
            if grows and grows[1] == name and (value == "set()") == (grows[2] == ".add("):
                after = "".join(lines[i + 1 : j]) + lines[j][: grows.end(1)]
                other = value if value != "set()" else '""'
                yield f"{indent}{name} = set()\n{after}", f"{indent}{name} = {other}\n{after}"
                break


#: By name, as ``config.circuit.tasks`` takes them.
TASKS: dict[str, Task] = {
    "quote": Task("close a string with the quote that opened it", ('"', "'"), _quotes, _quotes_in),
    "bracket": Task("close a bracket with the kind that opened it", (")", "]"), _brackets, _brackets_in),
    "call_depth": Task("close as many calls as were opened", (")", "))"), _call_depth, _call_depth_in),
    "list_depth": Task("close as many lists as were opened", ("]", "]]"), _list_depth, _list_depth_in),
    "set_or_string": Task(
        "go on with .add( after the name of a set, with += after that of a string",
        (".", " +="),
        _set_or_string,
        _set_or_string_in,
    ),
}


def library_pairs(name: str, texts: Iterator[str]) -> list[Pair]:
    """All pairs of a task in some files of code, each once, in their order.

    Args:
      name: of `TASKS`.
      texts: of the files.

    >>> [pair.prompts for pair in library_pairs("quote", iter(['x = "abc"\\n']))]
    [('x = "abc', "x = 'abc")]
    """
    task = TASKS[name]
    found = dict.fromkeys(prompts for text in texts for prompts in task.library(text))
    return [Pair(prompts, task.answers, "library") for prompts in found]


def template_pairs(name: str, seed: int) -> Iterator[Pair]:
    """Pairs of a task from its templates, without an end; some come again.

    Args:
      name: of `TASKS`.
      seed: of what is drawn.

    >>> pair = next(template_pairs("list_depth", seed=0))
    >>> pair.answers, pair.prompts[1].count("[") - pair.prompts[0].count("[")
    ((']', ']]'), 1)
    """
    task, rng = TASKS[name], random.Random(seed)
    while True:
        yield Pair(task.template(rng), task.answers, "template")
