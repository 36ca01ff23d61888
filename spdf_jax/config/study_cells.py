"""The cells of a study under names that say what they are: a digest of the settings, and the seed.

Studies share a folder of cells: what one has trained, another finds there, and a cell's name tells anyone which run it is.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from spdf_jax.config.read import default_config
from spdf_jax.config.run import RunConfig, flat

#: What a run is called, where it lies or is computed, how it reports: its result is the same. The seed is beside the digest.
_LEFT_OUT = re.compile(
    r"(loop|mesh)\.|(experiment|variants?|seed|data\.(path|cache_dir|processes|tokenizer)|.+\.task\.path)$"
)
_EVALUATES = "loop.eval_every_steps"  # where a run may stop early


class Cell(NamedTuple):
    """A run of a study: its name, its config, and the key of the cell of the sweep that it is, with its own seed."""

    name: str
    config: RunConfig
    key: str


class Cells:
    """All cells that a study can have."""

    def __init__(self, cells: Mapping[str, RunConfig]) -> None:
        """Of a sweep's cells, in order: what one starts from is before it."""
        self._cells, self._digests = cells, dict[str, str]()
        for key, config in cells.items():
            self._digests[key] = self._digest(config)

    def _digest(self, config: RunConfig) -> str:
        defaults = _defaults(tuple(config.phases))
        values = {
            key: value
            for key, value in flat(config.as_dict()).items()
            if key == "phases"
            or (value != defaults[key] and (not _LEFT_OUT.match(key) or (key == _EVALUATES and _may_stop(config))))
        }
        if source := source_of(config):
            values["init_from"] = self._digests[source]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def cell(self, key: str, seed: int) -> Cell:
        """The cell `key` of the sweep, drawn by a seed; what it starts from is drawn by that, too."""
        config = dataclasses.replace(self._cells[key], seed=seed)
        if source := source_of(config):
            config = dataclasses.replace(config, init_from=f"cell:{self._digests[source]}-{seed}")
        return Cell(f"{self._digests[key]}-{seed}", config, key)

    def chain(self, key: str, seed: int) -> list[Cell]:
        """The same, after the cells that it starts from."""
        source = source_of(self._cells[key])
        return [*(self.chain(source, seed) if source else ()), self.cell(key, seed)]


def source_of(config: RunConfig) -> str:
    """The key of the cell that a cell starts from; "" where it starts from none."""
    source = config.init_from.removeprefix("cell:")
    return source if source != config.init_from else ""


@cache
def _defaults(phases: tuple[str, ...]) -> dict[str, Any]:
    """A setting at its default is not in the digest, so that one which comes to be changes no name."""
    config = default_config("", "", variants=("",), phases=phases)
    return flat(json.loads(json.dumps(config.to_dict())))


def _may_stop(config: RunConfig) -> bool:
    return any(phase.patience_evaluations for phase in config.phases.values())
