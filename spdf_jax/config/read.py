"""Where configuration is read: ml_collections in, frozen dataclasses out, everything validated.

An experiment file has ``get_config(variant) -> ConfigDict``; it starts from `default_config` and overrides values. The
dataclasses' own defaults are the only defaults there are.
"""

import dataclasses
import json
import math
import os
import re
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ml_collections import ConfigDict, FieldReference

from spdf_jax.config.checks import check_effect, check_phase, check_transition, unused_settings
from spdf_jax.config.run import SCALARS, SECTIONS, PhaseConfig, RunConfig
from spdf_jax.errors import InputError, nearest, reading, unknown_key
from spdf_jax.fields import Place, requirements
from spdf_jax.model.config import GPTConfig
from spdf_jax.workdir import read_json

#: A run as an experiment file returns it, or resolved already.
AnyConfig: TypeAlias = ConfigDict | RunConfig


def default_config(
    experiment: str, variant: str, *, variants: tuple[str, ...], phases: tuple[str, ...] = ("pretrain",)
) -> ConfigDict:
    """A ConfigDict holding every default, with one section a phase, for experiment files to override.

    Args:
      experiment, variant: name the run and its default workdir.
      variants: all there are; the first is the one that runs anywhere.
      phases: names of the phases in order; each becomes a section.

    Returns:
      A ConfigDict with the sections of `RunConfig`; lengths are in steps or tokens, as their names say.

    Raises:
      InputError: `variant` is not among `variants`.

    >>> config = default_config("mine", "mini", variants=("mini",), phases=("pretrain", "finetune"))
    >>> config.finetune.optimizer.peak_learning_rate
    0.0006
    """
    if variant not in variants:
        raise InputError(f"--config: {experiment} has no variant {variant!r}{nearest(variant, list(variants))}")
    sections = {name: dataclasses.asdict(cls()) for name, cls in SECTIONS.items()}
    phase_sections = {name: dataclasses.asdict(PhaseConfig()) for name in phases}
    scalars = SCALARS | {"experiment": experiment, "variant": variant, "variants": variants}
    return ConfigDict({**scalars, **sections, "phases": phases, **phase_sections})


def shared_value(value: Any) -> Any:
    """A value for several places of a config: overriding one of them overrides all (`ml_collections.FieldReference`).

    Args:
      value: a number, a text, or anything else that a config may hold.

    Returns:
      What to assign in its place.

    >>> c = default_config("mine", "mini", variants=("mini",), phases=("pretrain", "finetune"))
    >>> c.pretrain.batch_size = c.finetune.batch_size = shared_value(32)
    >>> c.pretrain.batch_size = 64
    >>> c.finetune.batch_size
    64
    """
    return FieldReference(value)


def model_section(config: GPTConfig) -> ConfigDict:
    """A published size (`spdf_jax.GPT_SIZES`), or any other model, as the ``model`` section of an experiment.

    Args:
      config: the architecture.

    Returns:
      A ConfigDict of its fields.

    >>> import spdf_jax as spdf
    >>> model_section(spdf.GPT_SIZES["124m"]).n_layer
    12
    """
    return ConfigDict(dataclasses.asdict(config))


def resolve(config: AnyConfig) -> RunConfig:
    """Validates a ConfigDict into a `RunConfig`.

    Args:
      config: from `default_config`, with values overridden. What is resolved already is returned as it is.

    Returns:
      Frozen dataclasses; nothing is read, made or trained yet.

    Raises:
      InputError: an unknown key (names the nearest known one), a value of the wrong type or out of its range, a setting that
        the others make the run ignore, or a sweep, which is many runs.

    >>> c = default_config("mine", "mini", variants=("mini",))
    >>> c.pretrain.steps = 300
    >>> resolve(c).phases["pretrain"].steps
    300
    """
    if isinstance(config, RunConfig):
        return config
    if "cells" in config:
        raise InputError("config: a sweep, which is many runs; take one of its cells, config.cells.NAME")
    run = _built(config.to_dict())
    check_effect(run)
    return run


def _built(values: dict[str, Any]) -> RunConfig:
    phases = values.pop("phases", ())
    if not phases:
        raise InputError("config.phases: at least one phase is needed")
    _check_keys("config", values, [*SCALARS, *SECTIONS, *phases])
    for name in (*SECTIONS, *phases):
        if not isinstance(values.get(name), dict):
            raise InputError(f"config.{name}: the section is missing")
    hints, values = typing.get_type_hints(RunConfig), _expanded(RunConfig, values)
    run = RunConfig(
        **{name: _typed(f"config.{name}", hints[name], values[name]) for name in SCALARS},
        **{name: build_section(f"config.{name}", cls, values[name]) for name, cls in SECTIONS.items()},
        phases={name: build_section(f"config.{name}", PhaseConfig, values[name]) for name in phases},
    )
    for name, phase in run.phases.items():
        check_phase(run, name, phase)
    for before, (name, phase) in zip(run.phases.values(), list(run.phases.items())[1:], strict=False):
        check_transition(before, name, phase)
    return run


def load_config(path: Path) -> RunConfig:
    """The config of a run from the ``config.json`` that it left.

    Raises:
      InputError: no such file, or no such config.
    """
    fix = "restore it, or give the workdir of a run"
    values = read_json(path, fix)
    for of_the_start in ("command", "begins"):
        values.pop(of_the_start, None)
    if of_fit(values):
        raise InputError(
            f"{path}: of a run of spdf_jax.fit, whose model is its caller's; call that again to go on with it"
        )
    with reading(f"{path}: no config of a run", fix):
        values = _as_of_today(values)
        while unused := list(
            unused_settings(run := _built(dict(values)))
        ):  # had no effect, whatever it said; is refused by now
            for field_ in unused:
                *sections, name = field_.place.split(".")[1:]
                node = values
                for section in sections:
                    node = node[section]
                node[name] = field_.default
    return run


def of_fit(values: Mapping[str, Any]) -> bool:
    """Whether the content of a ``config.json`` is of `spdf_jax.fit`; any other names its phases, of which one may be "fit"."""
    return "fit" in values and "phases" not in values


#: What a run did before a field was there, by the field's place (``phase`` stands for every phase), where that is not the
#: field's default. Absent fields not listed here are at their defaults. Runs of every release stay usable.
BEFORE: dict[str, Any] = {
    "init_what": "parameters",
    "init_step": 0,
    "data.split_by": "name",
    "data.separate_documents": False,
    "evaluation": {},
    "circuit": {},
    "decode.no_repeat_counts_prompt": True,
}


def _as_of_today(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``config.json``, whichever release wrote it, with today's fields."""
    today = json.loads(json.dumps(values))
    for place, value in BEFORE.items():
        first, *path = place.split(".")
        for section in today.get("phases", ()) if first == "phase" else (first,):
            *folders, last = section, *path
            found = today
            for folder in folders:
                found = found.setdefault(folder, {})
            found.setdefault(last, value)
    if isinstance(today["model"].get("remat"), bool):  # from when it was no choice
        today["model"]["remat"] = "block" if today["model"]["remat"] else "none"
    return today


def _check_keys(where: str, values: Mapping[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise unknown_key(where, key, known)


def build_section(where: str, cls: type, values: Mapping[str, Any]) -> Any:
    """A dataclass of the values of a section.

    Raises:
      InputError: an unknown key, a value of the wrong type or out of its range.
    """
    hints = typing.get_type_hints(cls)
    _check_keys(where, values, list(hints))
    fields = {key: _typed(f"{where}.{key}", hints[key], value) for key, value in _expanded(cls, values).items()}
    try:
        return cls(**fields)
    except InputError as error:
        # It names its section, as it would outside of a config: the place says more.
        head, dot, rest = str(error).partition(".")
        said = f".{rest}" if dot and head in (where.rpartition(".")[2], "phase") else f": {error}"
        raise InputError(where + said) from None


def _expanded(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a section, ``~`` in its paths replaced."""
    places = {name for name, requirement in requirements(cls).items() if isinstance(requirement, Place)}
    return {k: os.path.expanduser(v) if k in places and isinstance(v, str) else v for k, v in values.items()}


def _typed(where: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a section, got {value!r}")
        return build_section(where, typing.cast(type, hint), value)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        items = items[:1] * len(value) if items[-1] is Ellipsis and isinstance(value, list | tuple) else items
        if not isinstance(value, list | tuple) or len(items) != len(value):
            raise InputError(f"{where}: expected {hint}, got {value!r}")
        return tuple(_typed(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(items, value, strict=True)))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value) if abs(value) < sys.float_info.max else math.inf * (1 if value > 0 else -1)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def in_our_words(said: str) -> str:
    """What ml_collections says where an experiment file sets a value of another type, as `resolve` would say it.

    >>> in_our_words("TypeError: Could not override field 'seed' (reference). 1.5 is of original type <class 'float'> and "
    ...     "cannot be casted to type <class 'int'>")
    'seed: expected int, got 1.5'
    """
    type_of = r"<class '(?:\w+\.)*(\w+)'>"
    wrong = (
        rf"TypeError: Could not override field '(\w+)' \(.*?\)\. (.*) is of original type {type_of} and .* {type_of}$"
    )
    found = re.search(wrong, said)
    if not found:
        return said
    key, value, given, wanted = found.groups()
    value = {"str": repr(value), "FieldReference": "a shared value of another type"}.get(given, value)
    return f"{said[: found.start()]}{key}: expected {wanted.replace('ConfigDict', 'a section')}, got {value}"


def no_number(said: str) -> InputError | None:
    """Of an override such as ``steps=1e3`` or ``sparsity=80%``, by what absl says of it; None where it is of something else.

    >>> print(no_number("flag --config.pretrain.steps=1e3: invalid literal for int() with base 10: '1e3'"))
    --config.pretrain.steps: '1e3' is no whole number; write 1000
    """
    found = re.search(r"flag (--config\.\S+?)=(.+?): (invalid literal for int|could not convert string to float)", said)
    if not found:
        return None
    kind = "whole number" if "int" in found[3].split() else "number"
    text = found[2].strip()
    try:
        number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        written = (
            f"{int(number)}" if kind != "number" and number.is_integer() else f"{number:g}" if kind == "number" else ""
        )
    except (OverflowError, ValueError):
        written = ""
    return InputError(f"{found[1]}: {found[2]!r} is no {kind}; {f'write {written}' if written else 'give one'}")
