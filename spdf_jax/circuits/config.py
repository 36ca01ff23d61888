"""What ``--job circuit`` looks for."""

from dataclasses import dataclass
from typing import Annotated

from spdf_jax.circuits.pairs import TASKS
from spdf_jax.fields import Count, OneOf, Range, check_fields


@dataclass(frozen=True)
class CircuitConfig:
    """Circuits to look for by ``--job circuit``. May change after a run, as `decode` may.

    Attributes:
      tasks: some of `spdf_jax.circuits.pairs.TASKS`; none named: all for which the run's tokenizer has the tokens.
      pairs: of prompts, a task; gates are learned on half of them, and the others measure.
      target_loss: nats between the two tokens at which a task counts as done, in both halves.
      search_steps: of learning the gates, in each search.
      searches: how many, each with a seed of its own; the smallest circuit of all is kept.
    """

    tasks: Annotated[tuple[str, ...], OneOf(TASKS)] = ()
    pairs: Annotated[int, Range(least=20, most=10_000)] = 200
    target_loss: Annotated[float, Range(above=0, most=0.6)] = 0.15
    search_steps: Count = 200
    searches: Annotated[int, Range(least=1, most=100)] = 2

    def __post_init__(self) -> None:
        check_fields(self, "circuit")
