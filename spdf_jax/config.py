"""The one place where configuration is read: ml_collections in, frozen dataclasses out, everything validated.

An experiment file has ``get_config(variant) -> ConfigDict``; it starts from `default_config` and overrides values. The
dataclasses' own defaults are the only defaults there are.
"""

import dataclasses
import difflib
import json
import math
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from ml_collections import ConfigDict, FieldReference

from spdf_jax.data import DataConfig, TaskConfig
from spdf_jax.errors import InputError, reading
from spdf_jax.evals.exams import MODES
from spdf_jax.evals.task_data import TASKS
from spdf_jax.fields import (
    LARGEST,
    Count,
    CountOrZero,
    Line,
    OneOf,
    Range,
    Text,
    Unused,
    Used,
    check_fields,
    unused_fields,
    used_with,
)
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.generate import DecodeConfig
from spdf_jax.optim import OptimizerConfig
from spdf_jax.sharding import MeshConfig
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.workdir import read_json


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a run.

    Attributes:
      steps: length, topology steps included.
      batch_size: sequences a step, over all devices and micro-batches.
      seq_len: tokens a sequence; 0 means the model's context.
      task: what to fine-tune on; without a name, the text of ``config.data`` is modelled.
      epochs: passes over the task's training pairs, in place of `steps`; evaluation is then at the end of each.
      patience_evaluations: stop when as many evaluations have not beaten the best, whose state is kept in ``best/`` and is
        the run's result; 0 trains to the end. In the last phase only.
      grad_accumulation_steps: micro-batches a step.
      reset_optimizer: start with fresh optimiser state; False carries it over from the phase before.
      optimizer, sparsity: see there.
    """

    steps: Annotated[Count, Used(lambda phase: not phase.epochs, "phases without epochs")] = 600
    batch_size: Count = 16
    seq_len: CountOrZero = 0
    grad_accumulation_steps: Count = 1
    reset_optimizer: bool = True
    task: TaskConfig = field(default_factory=TaskConfig)
    epochs: CountOrZero = 0
    patience_evaluations: CountOrZero = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)

    def __post_init__(self) -> None:
        check_fields(self, "phase")


@dataclass(frozen=True)
class LoopConfig:
    """How often a run reports and saves. May change between restarts, see `spdf_jax.training.restore.check_same_run`.

    Attributes:
      log_every_steps, eval_every_steps, checkpoint_every_steps: intervals; evaluation and checkpoints also happen at the end
        of every phase.
      eval_batch_size: sequences a validation batch.
      keep_checkpoints: how many of the newest stay.
      watchdog_seconds: a command whose step, evaluation or save does not move for so long ends with 75, to be given again;
        compilation counts, too. 0: never.
      profile_steps: ``A:B`` leaves a profile of the steps after step A, up to step B, in ``profile/``; "" does not.
    """

    log_every_steps: Count = 10
    eval_every_steps: Count = 100
    checkpoint_every_steps: Count = 200
    eval_batch_size: Count = 32
    keep_checkpoints: Count = 2
    watchdog_seconds: CountOrZero = 600
    profile_steps: Line = ""

    def __post_init__(self) -> None:
        check_fields(self, "loop")
        first, _, last = self.profile_steps.partition(":")
        if self.profile_steps and not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InputError(
                f"loop.profile_steps: {self.profile_steps!r} must be A:B with 0 <= A < B, for example 100:105"
            )

    @property
    def profiled_steps(self) -> range:
        """Steps, counted from 0, that are profiled."""
        first, _, last = self.profile_steps.partition(":")
        return range(int(first), int(last)) if last else range(0)


_TASKS = Used(lambda evaluation: bool(evaluation.tasks), "evaluations with tasks")


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``--job evaluate`` measures besides perplexity and a task's scores. May change after a run, as `decode` may.

    Attributes:
      tasks: of lm-eval, some of `spdf_jax.evals.task_data.TASKS`; needs the extra ``eval``.
      data_dir: the folder of their files, see `spdf_jax.evals.task_data`.
      num_fewshot: labelled examples before each question, for tasks that take some; -1: as each task says.
      exams: whether to sit the professional exams.
      exam_questions: the file of their questions, see `spdf_jax.evals.exams`; "" stands for the package's own set.
      exam_mode: how choices are scored, ``length`` or ``letter``, see `spdf_jax.evals.exams.take_exams`.
    """

    tasks: Annotated[tuple[str, ...], OneOf(TASKS)] = ()
    data_dir: Annotated[Line, _TASKS] = ""
    num_fewshot: Annotated[int, Range(least=0, most=LARGEST, special=-1), _TASKS] = -1
    exams: bool = False
    exam_questions: Annotated[Line, used_with("exams", True)] = ""
    exam_mode: Annotated[str, OneOf(MODES), used_with("exams", True)] = "length"

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        if self.tasks and not self.data_dir:
            raise InputError(f"evaluation.data_dir: '' must name the folder with the files of {', '.join(self.tasks)}")


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      experiment, variant, variants: names; the variant is one of `variants`.
      seed: of everything drawn.
      init_from: where the parameters (and masks) come from: the workdir of another run, a folder of a Hugging Face GPT-2, or
        ``cell:NAME``, the workdir NAME beside this run's; "" draws them.
      phases: names to configs, in the order in which they run.
      model, data, mesh, loop, decode, evaluation: see there.
    """

    experiment: Line
    variant: Line
    variants: Annotated[tuple[str, ...], Text()]
    seed: CountOrZero
    init_from: Line
    model: GPTConfig
    data: DataConfig
    mesh: MeshConfig
    loop: LoopConfig
    decode: DecodeConfig
    evaluation: EvaluationConfig
    phases: Mapping[str, PhaseConfig]

    def __post_init__(self) -> None:
        check_fields(self, "config")

    def seq_len(self, phase: PhaseConfig) -> int:
        """Tokens a sequence in `phase`."""
        return phase.seq_len or self.model.context

    def separates_documents(self, phase: PhaseConfig) -> bool:
        """Whether documents share a sequence in `phase` and nothing passes between them; a task's pairs share none."""
        return self.data.separate_documents and not phase.task.name

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, in the layout of the experiment files: phase names under ``phases``, each phase by its name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "phases"}
        values = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}  # type: ignore[arg-type]
        phases = {name: dataclasses.asdict(phase) for name, phase in self.phases.items()}
        return json.loads(json.dumps(values | {"phases": list(self.phases)} | phases))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict by dotted keys.

    >>> flat({"model": {"n_layer": 2}, "seed": 0})
    {'model.n_layer': 2, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


_SECTIONS: dict[str, type] = {
    "model": GPTConfig,
    "data": DataConfig,
    "mesh": MeshConfig,
    "loop": LoopConfig,
    "decode": DecodeConfig,
    "evaluation": EvaluationConfig,
}
_SCALARS: dict[str, Any] = {"experiment": "", "variant": "", "variants": (), "seed": 0, "init_from": ""}


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
    sections = {name: dataclasses.asdict(cls()) for name, cls in _SECTIONS.items()}
    phase_sections = {name: dataclasses.asdict(PhaseConfig()) for name in phases}
    scalars = _SCALARS | {"experiment": experiment, "variant": variant, "variants": variants}
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


#: Columns of a cell's curve, one entry an evaluation, see `spdf_jax.jobs.sweep`.
CURVE_COLUMNS = ("step", "tokens", "train_flops", "dense_flops", "val_loss", "seconds")


class Row(NamedTuple):
    """A row of a sweep's table: its label and ``(choice, cell)`` pairs; cells of one choice differ in their seed."""

    label: str
    choices: tuple[tuple[str, str], ...]


class Column(NamedTuple):
    """A column of a sweep's table.

    Attributes:
      header: above it.
      key: dotted, into a cell's ``summary`` or ``evaluation``. ``a/b`` is a quotient, ``a+b`` a sum, ``a@b=c`` a place on the
        cell's curve (`spdf_jax.jobs.sweep`): its column `a` where its column `b` first comes to what the key `c` is in row 1.
      format: of the figure.
      relative: whether to add the ratio to row 1.
      choice: of which choice of a row the figure is; "" takes the best one by validation loss.
    """

    header: str
    key: str
    format: str = ".3f"
    relative: bool = False
    choice: str = ""


@dataclass(frozen=True)
class SweepConfig:
    """Runs and the table that compares them, see `spdf_jax.jobs.sweep`."""

    experiment: str
    variant: str
    variants: tuple[str, ...]
    title: str
    remark: str
    cells: Mapping[str, RunConfig]
    rows: tuple[Row, ...]
    columns: tuple[Column, ...]


def sweep_config(
    experiment: str,
    variant: str,
    *,
    variants: tuple[str, ...],
    title: str,
    cells: Mapping[str, ConfigDict],
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    columns: Sequence[tuple[Any, ...]],
    remark: str = "",
) -> ConfigDict:
    """A sweep for an experiment file to return, see `spdf_jax.jobs.sweep`.

    Args:
      experiment, variant, variants: as in `default_config`.
      title: of the table.
      cells: names to the configs of the runs, in the order in which they run.
      rows: ``(label, ((choice, cell), ...))``: among the choices the best by validation loss is shown, over its seeds.
      columns: ``(header, key, format, relative, choice)``, the last three optional, see `spdf_jax.config.Column`.
      remark: what to keep in mind with the table; stands below it.

    Returns:
      A ConfigDict; ``--config.cells.NAME.section.key=value`` overrides a value of one cell.

    Raises:
      InputError: `variant` is not among `variants`.

    >>> cell = default_config("mine", "mini", variants=("mini",))
    >>> sweep = sweep_config(
    ...     "mine", "mini", variants=("mini",), title="Mine", cells={"dense_0": cell}, rows=[("dense", [("", "dense_0")])],
    ...     columns=[("loss", "summary.val_loss")],
    ... )
    >>> sweep.cells.dense_0.pretrain.steps
    600
    """
    if variant not in variants:
        raise InputError(f"--config: {experiment} has no variant {variant!r}{nearest(variant, list(variants))}")
    names = {"experiment": experiment, "variant": variant, "variants": variants, "title": title, "remark": remark}
    order = tuple(cells)  # a ConfigDict sorts its keys
    return ConfigDict({**names, "order": order, "cells": dict(cells), "rows": tuple(rows), "columns": tuple(columns)})


def resolve_sweep(config: ConfigDict) -> SweepConfig:
    """Validates a sweep, every cell of it, before anything runs.

    Raises:
      InputError: in a cell (named), a row of a cell that is not there, or a column that cannot be filled.
    """
    cells = {}
    for name in config.order:
        try:
            cells[name] = resolve(config.cells[name])
        except InputError as error:
            raise InputError(f"config.cells.{name}: {error}") from None
        source = cells[name].init_from.removeprefix("cell:")
        if source != cells[name].init_from and source not in list(cells)[:-1]:
            raise InputError(f"config.cells.{name}.init_from: no cell {source!r} before this one")
    rows = tuple(Row(label, tuple((choice, cell) for choice, cell in choices)) for label, choices in config.rows)
    for row in rows:
        for _, cell in row.choices:
            if cell not in cells:
                raise InputError(f"config.rows: row {row.label!r} names cell {cell!r}{nearest(cell, list(cells))}")
    columns = tuple(Column(*column) for column in config.columns)
    for column in columns:
        _check_column(column, rows)
    names = config.experiment, config.variant, tuple(config.variants), config.title, config.remark
    return SweepConfig(*names, cells, rows, columns)


def _check_column(column: Column, rows: Sequence[Row]) -> None:
    for row in rows:
        choices = list(dict.fromkeys(choice for choice, _ in row.choices))
        if column.choice and column.choice not in choices:
            raise InputError(
                f"config.columns: {column.header!r} is of choice {column.choice!r}, which row {row.label!r} does not have"
                f"{nearest(column.choice, choices)}"
            )
    for part in re.split("[/+]", column.key):
        names = re.split("[@=]", part)
        if len(names) > 1 and not (len(names) == 3 and "@" in part and set(names[:2]) <= set(CURVE_COLUMNS)):
            raise InputError(
                f"config.columns: {column.header!r} has key {part!r}; a place on the curve is written A@B=KEY, A and B among "
                f"{', '.join(CURVE_COLUMNS)}"
            )


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


def resolve(config: ConfigDict) -> RunConfig:
    """Validates a ConfigDict into a `RunConfig`.

    Args:
      config: from `default_config`, with values overridden.

    Returns:
      Frozen dataclasses; nothing is read, made or trained yet.

    Raises:
      InputError: an unknown key (names the nearest known one), a value of the wrong type or out of its range, or a setting
        that the others make the run ignore.

    >>> c = default_config("mine", "mini", variants=("mini",))
    >>> c.pretrain.steps = 300
    >>> resolve(c).phases["pretrain"].steps
    300
    """
    run = _built(config.to_dict())
    _check_effect(run)
    return run


def _built(values: dict[str, Any]) -> RunConfig:
    phases = values.pop("phases", ())
    if not phases:
        raise InputError("config.phases: at least one phase is needed")
    _check_keys("config", values, [*_SCALARS, *_SECTIONS, *phases])
    for name in (*_SECTIONS, *phases):
        if not isinstance(values.get(name), dict):
            raise InputError(f"config.{name}: the section is missing")
    hints = typing.get_type_hints(RunConfig)
    run = RunConfig(
        **{name: _typed(f"config.{name}", hints[name], values[name]) for name in _SCALARS},
        **{name: _build(f"config.{name}", cls, values[name]) for name, cls in _SECTIONS.items()},
        phases={name: _build(f"config.{name}", PhaseConfig, values[name]) for name in phases},
    )
    for name, phase in run.phases.items():
        _check_phase(run, name, phase)
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
    values.pop("command", None)
    with reading(f"{path}: no config of a run", fix):
        values = _as_of_today(values)
        while unused := list(
            _unused(run := _built(dict(values)))
        ):  # had no effect, whatever it said; is refused by now
            for field_ in unused:
                *sections, name = field_.place.split(".")[1:]
                node = values
                for section in sections:
                    node = node[section]
                node[name] = field_.default
    return run


#: What a run did before a field was there, by the field's place (``phase`` stands for every phase), where that is not the
#: field's default. Absent fields not listed here are at their defaults. Runs of every release stay usable.
BEFORE: dict[str, Any] = {
    "data.split_by": "name",
    "data.separate_documents": False,
    "evaluation": {},
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


def _unused(run: RunConfig) -> list[Unused]:
    found = [unused_fields(f"config.{name}", getattr(run, name), run=run) for name in _SECTIONS]
    found += [unused_fields(f"config.{name}", phase, run=run, phase=phase) for name, phase in run.phases.items()]
    return [unused for some in found for unused in some]


def _check_effect(run: RunConfig) -> None:
    """Raises `InputError` where a setting would be ignored, or would leave nothing of what another one asks for."""
    if run.variant not in run.variants:
        near = nearest(run.variant, list(run.variants))
        raise InputError(f"config.variant: {run.experiment} has no variant {run.variant!r}{near}")
    if unused := _unused(run):
        first, *others = unused
        likewise = ", ".join(f"{other.place} at {other.default!r}" for other in others)
        raise InputError(
            f"{first.place}: {first.value!r} would be ignored, since it is for {first.by}; leave it at {first.default!r}"
            + (f" (likewise {likewise})" if likewise else "")
        )
    for index, (name, phase) in enumerate(run.phases.items()):
        sparsity = phase.sparsity
        if not sparsity.dense and not any(map(sparsity.curve.value, (0.0, *sparsity.curve.turns))):
            raise InputError(
                f"config.{name}.sparsity.sparsity: {sparsity.sparsity} leaves rule {sparsity.rule!r} no zeros to place; set a "
                f"share of zeros, 0.75 for one, or rule 'dense'"
            )
        if index == 0 and not phase.reset_optimizer and not run.init_from:
            raise InputError(
                f"config.{name}.reset_optimizer: False has nothing to carry over, without a phase before or init_from; use True"
            )
        if not phase.epochs:
            check_length(name, phase)


def check_length(name: str, phase: PhaseConfig) -> None:
    """Raises `InputError` unless phase `name`, its length known in steps, has room for what it is to do."""
    if phase.optimizer.warmup_steps > phase.steps:
        raise InputError(
            f"config.{name}.optimizer.warmup_steps: {phase.optimizer.warmup_steps} of {phase.steps} steps would end before the "
            f"learning rate has arrived; use {phase.steps // 10} or so"
        )


def _check_phase(run: RunConfig, name: str, phase: PhaseConfig) -> None:
    if phase.epochs and not phase.task.name:
        raise InputError(
            f"config.{name}.epochs: {phase.epochs} epochs of what? Set config.{name}.task.name, or steps instead"
        )
    if phase.patience_evaluations and name != list(run.phases)[-1]:
        raise InputError(f"config.{name}.patience_evaluations: only the last phase may stop early; set it to 0 here")
    if run.seq_len(phase) > run.model.context:
        raise InputError(
            f"config.{name}.seq_len: {phase.seq_len} exceeds config.model.context {run.model.context}; "
            f"shorten the sequences or enlarge the context"
        )
    if run.model.mup_base_width and phase.optimizer.density_exponent:
        raise InputError(
            f"config.{name}.optimizer.density_exponent: {phase.optimizer.density_exponent} must be 0: S-muPar scales the "
            f"learning rate by 1/density itself"
        )
    drawn = name == next(iter(run.phases)) and not run.init_from
    if run.model.mup_base_width and drawn and abs(run.model.mup_density - phase.sparsity.density) > 1e-9:
        raise InputError(
            f"config.model.mup_density: {run.model.mup_density} must be the density of phase {name!r}, "
            f"{phase.sparsity.density:g}, for which the parameters are drawn"
        )
    if phase.sparsity.topology_rule.evolve and phase.optimizer.regrowth != "keep":
        raise InputError(
            f"config.{name}.optimizer.regrowth: rule {phase.sparsity.rule!r} looks after the optimiser's state itself; use "
            f"'keep', not {phase.optimizer.regrowth!r}"
        )
    if phase.sparsity.blocks and (phase.optimizer.regrowth != "reset" or phase.optimizer.density_exponent):
        raise InputError(
            f"config.{name}.optimizer: sparse_compute 'blocks' keeps nothing of weights that are not live, and no masks to "
            f"read a density from; use regrowth 'reset' and density_exponent 0, or sparse_compute 'masked'"
        )
    if phase.batch_size % phase.grad_accumulation_steps:
        raise InputError(
            f"config.{name}.batch_size: {phase.batch_size} is not divisible by grad_accumulation_steps "
            f"{phase.grad_accumulation_steps}"
        )


def check_transition(before: PhaseConfig, name: str, phase: PhaseConfig) -> None:
    """Raises `InputError` where phase `name` cannot follow the phase before."""
    state = {(p.optimizer.regrowth == "smet", p.sparsity.topology_rule.optimizer) for p in (before, phase)}
    if not phase.reset_optimizer and len(state) > 1:
        raise InputError(
            f"config.{name}.reset_optimizer: False cannot carry the state over, since rule {before.sparsity.rule!r} with "
            f"optimizer.regrowth {before.optimizer.regrowth!r} and rule {phase.sparsity.rule!r} with "
            f"{phase.optimizer.regrowth!r} keep different state; make them alike, or reset"
        )
    if phase.sparsity.topology_rule.evolve and not before.sparsity.dense:
        raise InputError(
            f"config.{name}.sparsity.rule: {phase.sparsity.rule!r} ranks all weights, and after a sparse phase the masked ones "
            f"are 0; put it first, or after a dense phase"
        )


def check_devices(run: RunConfig, data_devices: int) -> None:
    """Raises `InputError` unless every micro-batch splits evenly over the devices that share the batch."""
    for name, phase in run.phases.items():
        micro = phase.batch_size // phase.grad_accumulation_steps
        if micro % data_devices:
            raise InputError(
                f"config.{name}.batch_size: {micro} sequences a micro-batch are not divisible by {data_devices} devices; "
                f"use a multiple of {data_devices * phase.grad_accumulation_steps} or fewer devices (config.mesh)"
            )
    if run.loop.eval_batch_size % data_devices:
        raise InputError(
            f"config.loop.eval_batch_size: {run.loop.eval_batch_size} is not divisible by {data_devices} devices"
        )


def nearest(key: str, known: list[str]) -> str:
    """`` (did you mean 'model'?)`` or nothing."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"


def _check_keys(where: str, values: Mapping[str, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def _build(where: str, cls: type, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    _check_keys(where, values, list(hints))
    fields = {key: _typed(f"{where}.{key}", hints[key], value) for key, value in values.items()}
    try:
        return cls(**fields)
    except InputError as error:
        # It names its section, as it would outside of a config: the place says more.
        head, dot, rest = str(error).partition(".")
        said = f".{rest}" if dot and head in (where.rpartition(".")[2], "phase") else f": {error}"
        raise InputError(where + said) from None


def _typed(where: str, hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected a section, got {value!r}")
        return _build(where, typing.cast(type, hint), value)
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
