"""What ``--job evaluate`` measures."""

from dataclasses import dataclass
from typing import Annotated

from spdf_jax.errors import InputError
from spdf_jax.evals.exams import MODES
from spdf_jax.evals.task_data import TASKS
from spdf_jax.fields import (
    LARGEST,
    FilePath,
    OneOf,
    Range,
    Used,
    check_fields,
    used_with,
)

_TASKS = Used(lambda evaluation: bool(evaluation.tasks), "evaluations with tasks")


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``--job evaluate`` measures besides perplexity and a task's scores. May change after a run, as `decode` may.

    Attributes:
      tasks: of lm-eval, some of `spdf_jax.evals.task_data.TASKS`; needs the extra ``eval``.
      data_dir: the folder of their files, see `spdf_jax.evals.task_data`.
      num_fewshot: labelled examples before each question, for tasks that take some; -1: as each task says.
      exams: whether to sit the professional exams.
      exam_questions: the file of their questions, see `spdf_jax.evals.exam_questions`; "" stands for the package's own set.
      exam_mode: how choices are scored, ``length`` or ``letter``, see `spdf_jax.evals.exams.take_exams`.
    """

    tasks: Annotated[tuple[str, ...], OneOf(TASKS)] = ()
    data_dir: Annotated[FilePath, _TASKS] = ""
    num_fewshot: Annotated[int, Range(least=0, most=LARGEST, special=-1), _TASKS] = -1
    exams: bool = False
    exam_questions: Annotated[FilePath, used_with("exams", True)] = ""
    exam_mode: Annotated[str, OneOf(MODES), used_with("exams", True)] = "length"

    def __post_init__(self) -> None:
        check_fields(self, "evaluation")
        if self.tasks and not self.data_dir:
            raise InputError(f"evaluation.data_dir: '' must name the folder with the files of {', '.join(self.tasks)}")
