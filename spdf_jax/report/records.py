"""What a run recorded, read from its folder."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from spdf_jax.cloud.spool import saved_steps
from spdf_jax.config.read import default_config, of_fit
from spdf_jax.config.run import LoopConfig, flat
from spdf_jax.errors import InputError, reading
from spdf_jax.report.words import OF_FIT, setting
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.training.metrics import check_rows, read_metrics
from spdf_jax.workdir import (
    ANCESTORS_FILE,
    CHECKPOINTS,
    CONFIG_FILE,
    EVALUATION_FILE,
    GENERATIONS_FILE,
    METRICS_FILE,
    PICTURES_FOLDER,
    PROVENANCE_FILE,
    SUMMARY_FILE,
    in_use,
    read_json,
)

Row = Mapping[str, Any]
#: Connections into each output and out of each input of a matrix.
Degrees = tuple[np.ndarray, np.ndarray]

_NAMES = ("experiment", "variant", "variants", "phases", "command", "begins", "fit")


@dataclass(frozen=True)
class Run:
    """What a run recorded.

    `numbers` is `summary.json`, and before there is one, what the rows say so far: counts are all of step `numbers["steps"]`,
    the last that was logged or evaluated; `scores` is `evaluation.json`.
    `starts` is of `provenance.json`; `pictures` (images of densities) and `degrees` are by step, then by leaf path.
    `running` is None where nobody knows; `saved_step` is that of the newest checkpoint, 0 before the first.
    `ancestors` are those of `ancestors.json`: the runs that this one goes on from.
    """

    config: Mapping[str, Any]
    numbers: Mapping[str, Any]
    scores: Mapping[str, Any]
    generations: Sequence[Mapping[str, Any]]
    starts: Sequence[Mapping[str, Any]]
    train_rows: Sequence[Row]
    evaluation_rows: Sequence[Row]
    topology_rows: Sequence[Row]
    pictures: Mapping[int, Mapping[str, np.ndarray]]
    degrees: Mapping[int, Mapping[str, Degrees]]
    running: bool | None = False
    saved_step: int = 0
    ancestors: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """Experiment and variant."""
        return f"{self.config['experiment']}: {self.config['variant']}"

    @property
    def loss_unit(self) -> str:
        """Of its losses; "" of a model of the caller's own (`spdf_jax.fit`), which may be of anything."""
        return "" if of_fit(self.config) else "nats/token"

    @cached_property
    def all_rows(self) -> list[Row]:
        """Every row, by step."""
        return sorted([*self.train_rows, *self.evaluation_rows, *self.topology_rows], key=lambda row: row["step"])

    @cached_property
    def max_sparsity(self) -> float:
        """The highest sparsity any row saw; 0 for a run without masks."""
        return max((row["sparsity"] for row in self.all_rows), default=0.0)

    @cached_property
    def last_step(self) -> int | None:
        """The last step that anything tells of: a row, which may count no tokens, or a checkpoint; None before all."""
        return max([*(row["step"] for row in self.all_rows), *filter(None, [self.saved_step])], default=None)

    @property
    def first_step(self) -> int:
        """Before its first: not 0 where it goes on with another's count of steps."""
        return int(self.config.get("begins", {}).get("step", 0))

    @property
    def planned_steps(self) -> int:
        """The last of all phases, if none stops early; 0 where the config does not say."""
        phases = (
            [self.config] if of_fit(self.config) else [self.config.get(p, {}) for p in self.config.get("phases", ())]
        )
        steps = sum(int(phase.get("steps", 0)) for phase in phases)
        return steps and self.first_step + steps

    @property
    def loss_step(self) -> int | None:
        """The step of `val_loss`, where that is not the last."""
        if not self.evaluation_rows:
            return None
        step, last = self.evaluation_rows[-1]["step"], self.numbers["steps"] if self.is_finished else self.last_step
        step = int(self.numbers.get("best_step", step))
        return step if step != last else None

    @property
    def is_dense(self) -> bool:
        """Whether nothing is saved: no masks, and no attention pattern that skips work."""
        return self.max_sparsity <= 0 and self.numbers.get("flops_reduction", 1.0) < 1.005

    @property
    def is_finished(self) -> bool:
        """Whether it has its summary."""
        return "status" in self.numbers

    @property
    def failure(self) -> Mapping[str, Any] | None:
        """Step, time and reason, if that is how its last start ended."""
        return None if self.running or not self.starts else self.starts[-1].get("failure")

    @property
    def status(self) -> str:
        """Finished, or what became of it and how far, and what of its rows is lost."""
        state = {True: "running", False: "failed" if self.failure else "interrupted", None: "unfinished"}[self.running]
        step = self.failure["step"] if self.failure else self.last_step
        of = f" of {self.planned_steps:,}" if self.planned_steps else ""
        status = f"{state}, nothing logged yet" if step is None else f"{state}, at step {step:,}{of}"
        if self.is_finished:
            status = str(self.numbers["status"])
        # Every run is evaluated before its first step, but for one of `spdf_jax.fit` that has nothing to evaluate on.
        begins = self.all_rows and (self.loss_unit or self.evaluation_rows)
        first = self.all_rows[0]["step"] if begins else self.first_step
        return f"{status}; the rows before step {first:,} are lost" if first > self.first_step else status

    def task(self, row: Row) -> str:
        """The task whose target tokens a row's loss is over; "" for text, `OF_FIT` where it is over neither."""
        if of_fit(self.config):
            return OF_FIT
        return str(self.config.get(row["phase"], {}).get("task", {}).get("name", ""))

    def training_seconds(self, rows: Sequence[Row]) -> np.ndarray | None:
        """The training time at each of the rows, from tokens and tokens per second; evaluations are not in it.

        None where the rows do not say. After a restart the first interval is taken at the rate of its second part.
        """
        rates = np.array([row.get("tokens_per_second", 0) for row in self.train_rows], float)
        if not rates.size or rates.min() <= 0:
            return None
        tokens = np.array([0, *(row["tokens"] for row in self.train_rows)], float)
        seconds = np.concatenate([[0], np.cumsum(np.diff(tokens) / rates)])
        return np.interp([row["tokens"] for row in rows], tokens, seconds)


def read_run(workdir: Path, running: bool | None = None) -> Run:
    """Reads a run's folder.

    Args:
      workdir: of the run.
      running: whether it runs; by default its lock tells.

    Raises:
      InputError: the folder holds no run, or a file in it cannot be read.
    """
    rows = read_metrics(workdir)
    summary = optional_json(workdir / SUMMARY_FILE) or {}
    if "rows" in summary:
        check_rows(workdir / METRICS_FILE, summary["rows"], "the finished run wrote")
    config = optional_json(workdir / CONFIG_FILE)
    if config is None or not {"experiment", "variant"} <= config.keys():
        raise InputError(
            f"{workdir / 'config.json'}: missing or without experiment and variant; give the --workdir of a run"
        )
    first_step = int(config.get("begins", {}).get("step", 0))
    numbers = {**_numbers_so_far(rows, first_step), **summary}
    arrays = _read_arrays(workdir)
    return Run(
        config=config,
        numbers={key: number for key, number in numbers.items() if number is not None},
        scores=optional_json(workdir / EVALUATION_FILE) or {},
        generations=_read_generations(workdir / GENERATIONS_FILE),
        starts=(optional_json(workdir / PROVENANCE_FILE) or {}).get("starts", ()),
        train_rows=[row for row in rows if "loss" in row],
        evaluation_rows=[row for row in rows if "val_loss" in row],
        topology_rows=[row for row in rows if row.get("density")],
        pictures={step: {k: a for k, a in found.items() if a.ndim == 2} for step, found in arrays.items()},
        degrees={step: _degrees(found) for step, found in arrays.items()},
        running=in_use(workdir) if running is None else running,
        saved_step=max(saved_steps(workdir / CHECKPOINTS), default=0),
        ancestors=(optional_json(workdir / ANCESTORS_FILE) or {}).get("ancestors", ()),
    )


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Key, value and default of everything in a config that is not at its default; names and command left out."""
    variant, phases = config["variant"], tuple(config.get("phases", ()))
    if of_fit(config):
        sections = {"sparsity": dataclasses.asdict(SparsityConfig()), "loop": dataclasses.asdict(LoopConfig())}
    else:
        sections = default_config(config["experiment"], variant, variants=(variant,), phases=phases).to_dict()
    defaults = flat(json.loads(json.dumps(sections)))
    ours = flat({key: value for key, value in config.items() if key not in _NAMES})
    return [
        (key, setting(value), setting(defaults[key]) if key in defaults else "none")
        for key, value in ours.items()
        if key not in defaults or defaults[key] != value
    ]


def differing_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which configs of the same sections differ; names and command left out."""
    flats = [flat({key: value for key, value in config.items() if key not in _NAMES}) for config in configs]
    keys = dict.fromkeys(key for values in flats for key in values)
    return [key for key in keys if any(values.get(key) != flats[0].get(key) for values in flats)]


def optional_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file."""
    return read_json(path, "restore the file or run the job again") if path.is_file() else None


def _read_generations(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with reading(f"{path}: not generated texts", "run --job evaluate again"):
        # Not splitlines: a text may hold other characters that count as line ends there.
        found = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
        return [{key: one[key] for key in ("context", "text", "references")} for one in found]


def _read_arrays(workdir: Path) -> dict[int, dict[str, np.ndarray]]:
    """Step -> name -> array, of all mask pictures and degrees."""
    arrays = {}
    for path in sorted((workdir / PICTURES_FOLDER).glob("step_*.npz")):
        with (
            reading(f"{path}: not a mask picture", "delete it and write the report again"),
            path.open("rb") as opened,
            np.load(opened, allow_pickle=False) as file,
        ):
            arrays[int(path.stem.removeprefix("step_"))] = {name: file[name] for name in file.files}
    return arrays


def _degrees(arrays: Mapping[str, np.ndarray]) -> dict[str, Degrees]:
    """Leaf -> (into each output, out of each input), from the arrays LEAF:in and LEAF:out."""
    leaves = [name.removesuffix(":in") for name, array in arrays.items() if name.endswith(":in") and array.ndim == 1]
    return {leaf: (arrays[f"{leaf}:in"], arrays[f"{leaf}:out"]) for leaf in leaves if f"{leaf}:out" in arrays}


def _numbers_so_far(rows: Sequence[Row], first_step: int) -> dict[str, Any]:
    """The summary's numbers, from the rows alone."""
    numbers: dict[str, Any] = {}
    for row in rows:
        if (
            "density" in row
        ):  # which counts nothing: its step beside the tokens of an earlier one would be of no step at all
            continue
        numbers["steps"] = row["step"]
        counted = ("tokens", "padded_tokens", "topology_tokens")
        numbers |= {
            key: row[key] for key in (*counted, "sparsity", "tokens_per_second", "val_loss", "seconds") if key in row
        }
        if "train_flops" in row:
            numbers |= {"train_flops": row["train_flops"], "dense_flops": row["dense_flops"]}
        if "val_loss" in row and row["step"] == first_step:
            numbers["initial_val_loss"] = row["val_loss"]
    if "train_flops" in numbers and numbers["train_flops"] > 0:
        numbers["flops_reduction"] = numbers["dense_flops"] / numbers["train_flops"]
    return numbers
