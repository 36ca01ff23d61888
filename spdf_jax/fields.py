"""What each field of a config section may hold: said once, beside the field's type, and held to in one place.

>>> from dataclasses import dataclass
>>> from typing import Annotated
>>> @dataclass(frozen=True)
... class Example:
...     rate: Annotated[float, Range(above=0)] = 0.1
...     width: Annotated[int, Range(least=8, special=0)] = 0
...     schedule: Annotated[str, OneOf(("cosine", "linear"))] = "cosine"
...
...     def __post_init__(self) -> None:
...         check_fields(self, "example")
>>> Example(rate=float("nan"))
Traceback (most recent call last):
    ...
spdf_jax.errors.InputError: example.rate: nan must be a number above 0; the default is 0.1
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, Protocol

from spdf_jax.errors import InputError, closest

#: The largest count: steps and seeds are 32-bit integers on devices.
LARGEST = 2**31 - 1


class Requirement(Protocol):
    """What a field's values must be."""

    def holds(self, value: Any) -> bool: ...
    def allowed(self) -> str:
        """For which values `holds` is True, in words."""
        ...

    def said_of(self, value: Any) -> str:
        """What is wrong with a value for which `holds` is False, to be read after the value."""
        ...


@dataclass(frozen=True)
class Range:
    """Finite numbers between limits.

    Attributes:
      least, above: below which, or at which and below, a number is too small.
      most, below: the same for too large.
      special: one more number, with a meaning of its own.
    """

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf
    special: int | None = None

    def holds(self, value: Any) -> bool:
        return value == self.special or (self.least <= value <= self.most and self.above < value < self.below)

    def allowed(self) -> str:
        return self._with_special(self._limits(0) or "a number")

    def said_of(self, value: Any) -> str:
        words = self._limits(value)
        kind = "" if words and abs(value) < math.inf else "a number " if words else "a finite number"
        return f"must be {self._with_special(kind + words)}"

    def _limits(self, value: float) -> str:
        """In words; the largest number that a device's integers hold only where `value` is over it."""
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        said = {
            word: limit for word, limit in limits.items() if math.isfinite(limit) and (limit < LARGEST or value > limit)
        }
        return " and ".join(f"{word} {limit}" for word, limit in said.items())

    def _with_special(self, others: str) -> str:
        return others if self.special is None else f"{self.special}, or {others}"


@dataclass(frozen=True)
class OneOf:
    """One of some words.

    Attributes:
      words: those; of a mapping its keys, as they are when a config is made.
      more: others.
    """

    words: Collection[str]
    more: tuple[str, ...] = ()

    def holds(self, value: Any) -> bool:
        return value in self.more or value in self.words

    def allowed(self) -> str:
        return ", ".join(f"`{word}`" for word in (*self.more, *self.words))

    def said_of(self, value: Any) -> str:
        known = [*self.more, *self.words]
        close = closest(value, known)
        return f"is not one of {', '.join(map(repr, known))}" + (f"; did you mean {close!r}" if close else "")


@dataclass(frozen=True)
class Text:
    """Any text in one line, since names and paths stand in messages, reports and commands."""

    def holds(self, value: Any) -> bool:
        return not any(ord(character) < 32 or ord(character) == 127 for character in value)

    def allowed(self) -> str:
        return ""

    def said_of(self, value: Any) -> str:
        return "must hold no control characters"


@dataclass(frozen=True)
class Used:
    """That a field counts under a condition only: set away from its default otherwise, a run would ignore it.

    Attributes:
      when: the condition, on the field's own section, or on what `of` names.
      by: what uses the field, to be read after "is for".
      of: ``section``, ``phase`` or ``run``.
    """

    when: Callable[[Any], bool]
    by: str
    of: str = "section"


def used_with(field: str, *values: Any) -> Used:
    """Used where another field of the section has one of some values."""
    return Used(lambda section: getattr(section, field) in values, f"{field} {' or '.join(map(repr, values))}")


@dataclass(frozen=True)
class Place(Text):
    """A path, or "" for none; where a config is read, ``~`` becomes the user's folder."""


# What an optimiser has for sparse phases.
REGROWTH = Used(
    lambda phase: phase.sparsity.topology_rule.moves or phase.optimizer.regrowth == "smet",
    "phases whose masks move",
    of="phase",
)
SPARSE_PHASE = Used(lambda phase: not phase.sparsity.dense, "sparse phases", of="phase")
Count = Annotated[int, Range(least=1, most=LARGEST)]
CountOrZero = Annotated[int, Range(least=0, most=LARGEST)]
Share = Annotated[float, Range(least=0, most=1)]
Line = Annotated[str, Text()]
FilePath = Annotated[str, Place()]


def requirements(section: type) -> Mapping[str, Requirement]:
    """The requirement of each field of a dataclass that has one."""
    hints = typing.get_type_hints(section, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if hasattr(extra, "holds")
    }


def check_fields(config: Any, section: str) -> None:
    """Raises `InputError` unless every field of a dataclass is what its `Annotated` type requires; of a tuple, all its parts.

    Args:
      config: a section's dataclass.
      section: its name in messages.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name, requirement in requirements(type(config)).items():
        for value in _parts(getattr(config, name)):
            if not requirement.holds(value):
                default = "" if defaults[name] is dataclasses.MISSING else f"; the default is {defaults[name]!r}"
                raise InputError(f"{section}.{name}: {value!r} {requirement.said_of(value)}{default}")


class Unused(NamedTuple):
    """A field that is set and would be ignored: its place, its value, its default, and what it is for."""

    place: str
    value: Any
    default: Any
    by: str


def unused_fields(place: str, section: Any, **around: Any) -> Iterator[Unused]:
    """Fields of a section, and of the sections in it, that are away from their default and used by nothing.

    Args:
      place: where the section stands.
      section: a dataclass.
      around: the ``phase`` and the ``run`` that it is of.

    Yields:
      `Unused` fields.

    >>> from spdf_jax.optim import OptimizerConfig
    >>> list(unused_fields("optimizer", OptimizerConfig(regrowth_warmup_steps=5), phase=None))
    [Unused(place='optimizer.regrowth_warmup_steps', value=5, default=100, by="regrowth 'smet'")]
    """
    owners = {**around, "section": section}
    defaults = {field.name: field.default for field in dataclasses.fields(section)}
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            yield from unused_fields(f"{place}.{name}", value, **around)
        for extra in getattr(hint, "__metadata__", ()):
            known = isinstance(extra, Used) and owners.get(extra.of) is not None
            if known and value != defaults[name] and not extra.when(owners[extra.of]):
                yield Unused(f"{place}.{name}", value, defaults[name], extra.by)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple):
        for part in value:
            yield from _parts(part)
    else:
        yield value
