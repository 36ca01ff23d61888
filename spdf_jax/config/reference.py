"""Every key of a config, from the dataclasses that hold them: ``--help_config [SECTION]``, and a table in the docs."""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from spdf_jax.config.run import SCALARS, SECTIONS, DistillConfig, PhaseConfig, RunConfig
from spdf_jax.data import TaskConfig
from spdf_jax.errors import InputError, nearest
from spdf_jax.fields import requirements
from spdf_jax.optim import OptimizerConfig
from spdf_jax.sparsity.programme import SparsityConfig

#: Between which `table` stands in the docs.
START, END = "<!-- keys: written by python -m spdf_jax.config.reference -->\n", "<!-- end of keys -->"
#: Name of a section in `reference`, where its keys stand in a config, and the dataclass that says what they are.
PLACES: dict[str, tuple[str, type]] = {
    "run": ("config", RunConfig),
    **{name: (f"config.{name}", cls) for name, cls in SECTIONS.items()},
    "phase": ("config.PHASE", PhaseConfig),
    "sparsity": ("config.PHASE.sparsity", SparsityConfig),
    "optimizer": ("config.PHASE.optimizer", OptimizerConfig),
    "task": ("config.PHASE.task", TaskConfig),
    "distill": ("config.PHASE.distill", DistillConfig),
}


class Key(NamedTuple):
    """A key of a config.

    Attributes:
      place: ``config.model.n_layer``; ``PHASE`` stands for ``pretrain``, ``finetune`` or what a phase is called.
      default: as Python writes it.
      allowed: its values, in words; "" where any of its type will do.
      about: what it is.
    """

    place: str
    default: str
    allowed: str
    about: str


def keys(section: str) -> Iterator[Key]:
    """The keys of a section of `PLACES`, in the order of its dataclass; sections in it have their own."""
    place, cls = PLACES[section]
    said, required = _attributes(cls), requirements(cls)
    defaults = SCALARS if cls is RunConfig else {f.name: f.default for f in dataclasses.fields(cls)}
    for name, default in defaults.items():
        if default is dataclasses.MISSING:  # a section
            continue
        values = required[name].allowed() if name in required else "True or False" if isinstance(default, bool) else ""
        yield Key(f"{place}.{name}", repr(default), values, said[name])


def reference(section: str = "") -> str:
    """The text of ``--help_config``.

    Args:
      section: of `PLACES`, by its name or as it stands in a config (``pretrain.optimizer``); "" for all.

    Raises:
      InputError: no such section.

    >>> print(reference("mesh").splitlines()[0])
    config.mesh.data = -1  (-1, or at least 1)
    """
    asked = section.removeprefix("config.").rpartition(".")[2]
    asked = {"pretrain": "phase", "finetune": "phase"}.get(asked, asked)
    if asked and asked not in PLACES:
        raise InputError(f"--help_config: no section {section!r}{nearest(asked, list(PLACES))}")
    lines = []
    for name in [asked] if asked else PLACES:
        for key in keys(name):
            allowed = f"  ({key.allowed})" if key.allowed else ""
            about = textwrap.fill(key.about, 116, initial_indent="    ", subsequent_indent="    ")
            lines += [f"{key.place} = {key.default}{allowed}", about]
    return "\n".join(lines)


def table() -> str:
    """The keys as a Markdown table, for the docs."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    rows = [
        f"| `{key.place.removeprefix('config.')}` | `{cell(key.default)}` | {cell(key.allowed)} | {cell(key.about)} |"
        for section in PLACES
        for key in keys(section)
    ]
    return "\n".join(["| key | default | values | what |", "| --- | --- | --- | --- |", *rows])


def write_into(file: Path) -> None:
    """Puts `table` between the two marks of a Markdown file."""
    head, _, rest = file.read_text().partition(START)
    file.write_text(head + START + table() + "\n" + END + rest.partition(END)[2])


def _attributes(cls: type) -> dict[str, str]:
    """What a dataclass's docstring says of each of its fields."""
    text = inspect.getdoc(cls) or ""
    block = re.search(r"^Attributes:\n((?: .*\n?|\n)+)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=  \S)", block[1].rstrip() if block else ""):
        names, _, about = entry.partition(": ")
        plain = re.sub(r"\s+", " ", re.sub(r"``?", "`", about)).strip()
        found |= dict.fromkeys((name.strip() for name in names.split(",")), plain)
    return found


if __name__ == "__main__":
    write_into(Path("experiments/README.md"))
