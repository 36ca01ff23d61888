"""The models that a run learns from beside its data: read, laid out as its own, and the same where it resumes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spdf_jax.config.run import RunConfig
from spdf_jax.data import holds_tokenizer, load_tokenizer
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.huggingface import load_model
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import parameter_shardings
from spdf_jax.training.phases import PhasePlan
from spdf_jax.training.restore import check_same_model, saved_run
from spdf_jax.training.sources import holds_run, named_folder, teacher_config
from spdf_jax.training.state import TrainState
from spdf_jax.training.stored_state import fingerprint


class Teacher(NamedTuple):
    """A model that a phase learns from.

    Attributes:
      place: as the config names it.
      model: as its folder has it.
      params: sharded as the run's own would be.
      fingerprint: of `params`.
    """

    place: str
    model: GPT
    params: Any
    fingerprint: str


def check_teachers(
    config: RunConfig, workdir: Path | None, plans: Sequence[PhasePlan], tokenizer: Tokenizer | None
) -> None:
    """Refuses teachers that could teach nothing, before any is read whole.

    Args:
      config: the run.
      workdir: its folder; None for a run that leaves none.
      plans: the phases to come.
      tokenizer: of the run; None where token files came without one: ids are then held to be the same.

    Raises:
      InputError: a teacher that is not there, of another vocabulary or tokenizer, or of a context that is too short.
    """
    for plan in plans:
        folder, key = _folder(plan, workdir), f"config.{plan.name}.distill.teacher"
        if folder is None:
            continue
        there, size = teacher_config(config, plan.name, workdir), config.model.vocab_size
        own = folder if holds_tokenizer(folder) else None
        if there.vocab_size != size or (tokenizer and own and _words(load_tokenizer(own)) != _words(tokenizer)):
            sizes = f"{there.vocab_size} tokens there, {size} here" if there.vocab_size != size else f"{size} others"
            raise InputError(
                f"{key}: {folder} has another vocabulary ({sizes}), and its distribution over tokens means nothing here; give "
                f"a teacher of the run's tokenizer, or name the teacher's by config.data.tokenizer"
            )
        if there.context < plan.seq_len:
            raise InputError(
                f"{key}: {folder} has a context of {there.context}, shorter than the sequences of {plan.seq_len}; set "
                f"config.{plan.name}.seq_len to at most that, or give another teacher"
            )
        if plan.config.distill.teacher.startswith(
            "cell:"
        ):  # as what plans count it, who do not know where its folder is
            check_same_model(folder, there, config.model, f"{plan.name}.distill.teacher")


def first_teacher(
    config: RunConfig,
    workdir: Path,
    plans: Sequence[PhasePlan],
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    record: Mapping[str, Any],
) -> tuple[Teacher | None, dict[str, str]]:
    """The teacher of the first of the phases to come, and the fingerprints of all teachers, by phase.

    Raises:
      InputError: as `check_teachers`, or another teacher than in the record of the checkpoint that the run goes on from.
    """
    check_teachers(config, workdir, plans, tokenizer)
    recorded = record.get("teachers", {})
    teacher, found = None, dict(recorded)
    for plan in reversed(plans):  # so that one alone is kept
        teacher = load_teacher(config, workdir, plan, mesh, teacher, recorded if "phase" in record else None)
        found |= {plan.name: teacher.fingerprint} if teacher else {}
    return teacher, found


def load_teacher(
    config: RunConfig,
    workdir: Path | None,
    plan: PhasePlan,
    mesh: Mesh,
    before: Teacher | None = None,
    recorded: Mapping[str, str] | None = None,
) -> Teacher | None:
    """The teacher of a phase; None where it has none.

    Args:
      config: the run.
      workdir: its folder; None for a run that leaves none.
      plan: the phase.
      mesh: where to put the parameters.
      before: one that is there already.
      recorded: fingerprints by phase, which it has to have; None for a run that begins.

    Raises:
      InputError: no such model there, or not the recorded one.
    """
    teacher = before if before and before.place == plan.config.distill.teacher else None
    if (folder := _folder(plan, workdir)) is None:
        teacher = None
    elif teacher is None:
        teacher = _read(plan, folder, mesh)
    here = teacher.fingerprint if teacher else ""
    if recorded is not None and (was := recorded.get(plan.name, "")) != here:
        raise InputError(
            f"config.{plan.name}.distill.teacher: {plan.config.distill.teacher!r} does not hold what this run learns from "
            f"(fingerprint {here[:12] or 'none'}, was {was[:12] or 'none'}); restore it, or choose another --workdir"
        )
    return teacher


def _folder(plan: PhasePlan, workdir: Path | None) -> Path | None:
    if plan.teacher is None:
        return None
    return named_folder(f"{plan.name}.distill.teacher", plan.config.distill.teacher, workdir)


def _read(plan: PhasePlan, folder: Path, mesh: Mesh) -> Teacher:
    if holds_run(folder, f"{plan.name}.distill.teacher"):
        saved = saved_run(folder, mesh)
        model, params = saved.model, saved.result.params
    else:
        there, params = load_model(folder)
        model = GPT(there)
    params = jax.device_put(params, parameter_shardings(mesh, params))
    state = TrainState(jnp.zeros((), jnp.int32), params, (), (), jax.random.key(0))
    return Teacher(plan.config.distill.teacher, model, params, fingerprint(state))


def _words(tokenizer: Tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab(with_added_tokens=True)
