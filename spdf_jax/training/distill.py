"""The loss of a phase that has a teacher: what its steps are made of there, in the place of the model alone.

Source: Hinton et al. 2015 (arXiv 1503.02531), whose factor T^2 keeps the teacher's share of the gradient where T changes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spdf_jax.model.gpt import GPT
from spdf_jax.training.loss_function import LossFunction
from spdf_jax.training.step import cross_entropy


class Lesson(NamedTuple):
    """What a step with a teacher is compiled for, but for the teacher's parameters, which every call is given.

    Attributes:
      teacher: its model, which may be of another shape; it computes in the dtype of the one that it teaches.
      weight, temperature: of `spdf_jax.config.run.DistillConfig`.
    """

    teacher: GPT
    weight: float
    temperature: float


@dataclass(frozen=True, eq=False)
class Taught(LossFunction):
    """The loss of a GPT, `of`, that learns from a teacher, too: inside one step, which has the teacher's parameters."""

    lesson: Lesson
    teacher: Any

    def sums(self, variables: Any, batch: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        """Summed loss and summed weights of a batch; `options` are the student's alone."""
        teacher, weight, temperature = self.lesson
        logits_BTV = self.of.apply(variables, batch.tokens_BT, segments_BT=batch.segments_BT, **options)  # type: ignore[attr-defined]
        taught_BTV = teacher.apply({"params": self.teacher}, batch.tokens_BT, segments_BT=batch.segments_BT)
        own = cross_entropy(logits_BTV, batch.targets_BT, batch.weights_BT)
        divergence = jnp.sum(divergences(logits_BTV, taught_BTV, temperature) * batch.weights_BT)
        return (1 - weight) * own + weight * temperature**2 * divergence, jnp.sum(batch.weights_BT)


def taught(
    step: Callable[..., Any],
    bound: tuple[Any, ...],
    lesson: Lesson,
    model: GPT,
    state: Any,
    batch_ABT: Any,
    *targets: Any,
    teacher: Any,
    pattern: str,
    width: int,
) -> Any:
    """A step of `spdf_jax.training.step` whose loss has a teacher.

    Args:
      step: of the two.
      bound: its arguments between the model and the state.
      lesson: with what teacher, and how.
      model: that is trained.
      state, batch_ABT, targets, pattern, width: of the step.
      teacher: parameters, sharded as the model's.
    """
    config = replace(lesson.teacher.config, dtype=model.config.dtype, remat="none")  # nothing goes backward through it
    lesson = lesson._replace(teacher=lesson.teacher.clone(config=config))
    model_and_teacher = Taught(model, lesson, teacher)  # type: ignore[arg-type]
    return step(model_and_teacher, *bound, state, batch_ABT, *targets, pattern=pattern, width=width)


# Computed again for the backward pass, as `spdf_jax.training.step.cross_entropy`: float32 of every logit would be stored.
@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)
def divergences(logits_BTV: jax.Array, teacher_BTV: jax.Array, temperature: float) -> jax.Array:
    """KL(teacher || model) of every token's distribution, both softened.

    Args:
      logits_BTV: of the model, any float dtype; computed in float32.
      teacher_BTV: of the teacher.
      temperature: that divides both.

    Returns:
      float32, in nats, without the factor T^2.

    >>> teacher_BTV = jnp.log(jnp.array([[[0.5, 0.25, 0.25]]]))
    >>> round(float(divergences(jnp.zeros((1, 1, 3)), teacher_BTV, 1.0)[0, 0]), 4)  # ln 3 - 1.5 ln 2
    0.0589
    """
    theirs, ours = (jax.nn.log_softmax(x.astype(jnp.float32) / temperature, axis=-1) for x in (teacher_BTV, logits_BTV))
    return jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)
