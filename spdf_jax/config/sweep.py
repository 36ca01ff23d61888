"""A sweep as data: its runs, and the table that compares them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from spdf_jax.circuits.pairs import TASKS
from spdf_jax.config.read import build_section, resolve
from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError, nearest

#: Columns of a cell's curve, one entry an evaluation, see `spdf_jax.jobs.sweep`.
CURVE_COLUMNS = ("step", "tokens", "train_flops", "dense_flops", "val_loss", "seconds")


class Row(NamedTuple):
    """A row of a sweep's table: its label and ``(choice, cell)`` pairs; cells of one choice differ in their seed.

    The rest is a study's: `decided_by`, the pairs whose validation loss decides between the choices, by default those
    themselves; the `method` of the row; and its `group`, within which rows are compared.
    """

    label: str
    choices: tuple[tuple[str, str], ...]
    decided_by: tuple[tuple[str, str], ...] = ()
    method: str = ""
    group: str = ""


class Column(NamedTuple):
    """A column of a sweep's table.

    Attributes:
      header: above it.
      key: dotted, into a cell's ``summary``, ``evaluation`` or ``circuit`` (``circuit.TASK.nodes``). ``a/b`` is a quotient,
        ``a+b`` a sum, ``a@b=c`` a place on the cell's curve (`spdf_jax.jobs.sweep`): its column `a` where its column `b` first
        reaches what the key `c` is in row 1.
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
class StudyConfig:
    """What makes a sweep a study, see `spdf_jax.jobs.study`: its cells are of one seed, on which choices are made, and what was
    chosen is measured on others.

    Attributes:
      seeds: to measure on.
      measure: what: the key of a column.
      unit: of it, with what it is: "nats/token".
      reference: the method that others are compared with.
      answers: ``(row, budget)``: whose differences from the reference answer the question, at equal ``tokens``, ``flops`` or
        ``seconds``, the most important first.
      cells_folder: of all studies, beside the workdir.
      record: the file, kept with the experiment, of what a finished study measured; "" for none.
      only: the name of one cell to run again, by itself; "" for all.
    """

    seeds: tuple[int, ...]
    measure: str
    unit: str
    reference: str
    answers: tuple[tuple[str, str], ...]
    cells_folder: str
    record: str
    only: str


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
    study: StudyConfig | None = None


def sweep_config(
    experiment: str,
    variant: str,
    *,
    variants: tuple[str, ...],
    title: str,
    cells: Mapping[str, ConfigDict],
    rows: Sequence[tuple[Any, ...]],
    columns: Sequence[tuple[Any, ...]] = (),
    remark: str = "",
    study: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """A sweep for an experiment file to return, see `spdf_jax.jobs.sweep`.

    Args:
      experiment, variant, variants: as in `default_config`.
      title: of the table.
      cells: names to the configs of the runs, in the order in which they run.
      rows: ``(label, ((choice, cell), ...))``: among the choices the best by validation loss is shown, over its seeds. Of a
        study more, see `spdf_jax.config.sweep.Row`.
      columns: ``(header, key, format, relative, choice)``, the last three optional, see `spdf_jax.config.Column`.
      remark: what to keep in mind with the table; stands below it.
      study: what makes it a study, see `spdf_jax.config.sweep.StudyConfig`; its page takes the place of columns.

    Returns:
      A ConfigDict; ``--config.cells.NAME.section.key=value`` overrides a value of one cell.

    Raises:
      InputError: `variant` is not among `variants`.

    >>> from spdf_jax.config.read import default_config
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
    names: dict[str, Any] = {"experiment": experiment, "variant": variant, "variants": variants}
    names |= {"title": title, "remark": remark}
    order = tuple(cells)  # a ConfigDict sorts its keys
    if study is not None:
        names["study"] = {"cells_folder": f"{experiment}-cells", "record": "", "only": "", **study}
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
        named = {"init_from": cells[name].init_from} | {
            f"{phase}.distill.teacher": settings.distill.teacher for phase, settings in cells[name].phases.items()
        }
        for key, place in named.items():
            if (source := place.removeprefix("cell:")) != place and source not in list(cells)[:-1]:
                raise InputError(f"config.cells.{name}.{key}: no cell {source!r} before this one")
    rows = tuple(_row(*row) for row in config.rows)
    for row in rows:
        for _, cell in (*row.choices, *row.decided_by):
            if cell not in cells:
                raise InputError(f"config.rows: row {row.label!r} names cell {cell!r}{nearest(cell, list(cells))}")
    columns = tuple(Column(*column) for column in config.columns)
    for column in columns:
        _check_column(column, rows)
    names = config.experiment, config.variant, tuple(config.variants), config.title, config.remark
    study = None
    if "study" in config:
        study = _study(build_section("config.study", StudyConfig, config.study.to_dict()), rows, cells)
    return SweepConfig(*names, cells, rows, columns, study)


def _row(
    label: str,
    choices: Sequence[Sequence[str]],
    decided_by: Sequence[Sequence[str]] = (),
    method: str = "",
    group: str = "",
) -> Row:
    return Row(label, _pairs(choices), _pairs(decided_by), method, group)


def _pairs(choices: Sequence[Sequence[str]]) -> tuple[tuple[str, str], ...]:
    return tuple((choice, cell) for choice, cell in choices)


#: What two methods can have been given alike, see `StudyConfig.answers`.
BUDGETS = ("tokens", "flops", "seconds")


def _study(study: StudyConfig, rows: Sequence[Row], cells: Mapping[str, RunConfig]) -> StudyConfig:
    """The same, where it can be made.

    Raises:
      InputError: seeds that are none, or rows and budgets that are not there.
    """
    if len(set(study.seeds)) < max(len(study.seeds), 2) or min(study.seeds) < 0:
        raise InputError(f"config.study.seeds: {study.seeds} must be two different seeds or more, none below 0")
    if both := sorted({cell.seed for cell in cells.values()} & set(study.seeds)):
        raise InputError(
            f"config.study.seeds: on {both[0]} choices are made; measure on others, as that loss is the best of several"
        )
    if study.measure not in _KEYS:
        raise InputError(f"config.study.measure: {study.measure!r}, which no run leaves{_nearest_key(study.measure)}")
    if study.reference not in (methods := [row.method for row in rows]):
        raise InputError(
            f"config.study.reference: no row is of {study.reference!r}{nearest(study.reference, [*dict.fromkeys(methods)])}"
        )
    for label, budget in study.answers:
        if label not in (labels := [row.label for row in rows]) or budget not in BUDGETS:
            raise InputError(
                f"config.study.answers: {label!r} at equal {budget!r} is none of the rows at equal {', '.join(BUDGETS)}"
                f"{nearest(label, labels)}"
            )
    return study


#: What a column's key can be: a number of ``summary.json`` or ``evaluation.json``, there also of a part (``seen``).
SUMMARY = (
    *(
        "steps",
        "tokens",
        "padded_tokens",
        "topology_tokens",
        "train_flops",
        "dense_flops",
        "val_loss",
        "initial_val_loss",
    ),
    *("sparsity", "flops_reduction", "tokens_per_second", "wall_seconds", "parameters", "unigram_loss", "best_step"),
    *("before.train_flops", "before.dense_flops", "before.tokens", "before.wall_seconds", "before.val_loss"),
)
SCORES = ("bleu", "nist", "rouge_l", "cider", "meteor", "ter")
EVALUATION = (
    *("val_loss", "perplexity", "perplexity_per_byte", *SCORES),
    *(f"{part}.{score}" for part in ("seen", "unseen") for score in SCORES),
)
#: Of a task's circuit: how many, and the task losses of `spdf_jax.circuits.gates.Circuit`.
CIRCUIT = ("nodes", "edges", "whole", "alone", "without", "nothing")
_KEYS = (
    *(f"summary.{key}" for key in SUMMARY),
    *(f"evaluation.{key}" for key in EVALUATION),
    *(f"circuit.{task}.{key}" for task in TASKS for key in CIRCUIT),
)
_FREE_KEYS = ("evaluation.zero_shot.", "evaluation.exams.")  # as the tasks and exams are called


def _nearest_key(key: str) -> str:
    same_end = [known for known in _KEYS if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return nearest(same_end[0] if same_end else key, list(_KEYS))


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
        if names[-1] not in _KEYS and not names[-1].startswith(_FREE_KEYS):
            raise InputError(
                f"config.columns: {column.header!r} has key {names[-1]!r}, which no run leaves{_nearest_key(names[-1])}"
            )
