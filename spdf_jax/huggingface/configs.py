"""What is read from a config.json, and which of our models a family of theirs can express."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig

#: What no model of theirs has.
_NOWHERE_ELSE: Mapping[str, Collection[Any]] = {
    "activation_topk": ("",),
    "attention_sink": (False,),
    "bigram": (False,),
}


def check_expressible_as(family: str, config: GPTConfig, needed: Mapping[str, Collection[Any]]) -> None:
    """Raises `InputError` where a field of `config` has none of the values that a family of models needs it to have."""
    needed = {**_NOWHERE_ELSE, **needed}
    other = {name: next(iter(values)) for name, values in needed.items() if getattr(config, name) not in values}
    if other:
        found = ", ".join(f"model.{name} {getattr(config, name)!r}" for name in other)
        only = ", ".join(f"model.{name} {value!r}" for name, value in other.items())
        raise InputError(f"export: {found} cannot be said in a {family} folder, only {only}; export a model trained so")


def check_computed(path: Path, content: Mapping[str, Any], computed: Mapping[str, Any]) -> None:
    """Raises `InputError` where a config asks for what our GPT does not compute."""
    for key, needed in computed.items():
        if content.get(key) != needed:
            raise InputError(f"{path}: {key} is {content.get(key)!r}; only {needed!r} can be read, give such a model")


def described(path: Path, fields: Mapping[str, Any]) -> GPTConfig:
    """The model of these fields, if it is one."""
    try:
        return GPTConfig(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def count(path: Path, key: str, value: Any) -> int:
    """A whole number of at least 1."""
    if type(value) is not int or value < 1:  # a bool is an int too
        raise InputError(f"{path}: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def rate(path: Path, key: str, value: Any, most: float = 1) -> float:
    """A number from 0 to `most`."""
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise InputError(f"{path}: {key} is {value!r}; it must be a number from 0 to {most:g}")
    return float(value)


def truth(path: Path, key: str, value: Any) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{path}: {key} is {value!r}; it must be true or false")
    return value
