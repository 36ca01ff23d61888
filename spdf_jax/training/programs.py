"""The steps of a phase as compiled programs, kept for whoever asks for equal ones."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import optax

from spdf_jax.sparsity.topology import Rule
from spdf_jax.training.loss_function import Model
from spdf_jax.training.state import TrainState
from spdf_jax.training.step import eval_step, topology_step, train_step


class Steps(NamedTuple):
    """Compiled functions of one phase; `pattern` and `width` are static keywords of all three.

    Attributes:
      train: ``(state, batch_ABT) -> (state, metrics)``; ``target_nnz`` too where the rule chooses masks at every step.
      topology: ``(state, batch_ABT, target_nnz, drop_fraction) -> (state, metrics)``.
      evaluate: ``(variables, batch_BT) -> (loss sum, weight sum)``, `TrainState.variables`.
    """

    train: Any
    topology: Any
    evaluate: Any


def make_steps(
    model: Model,
    tx: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array] | None,
    rule: Rule,
    shardings: TrainState | None = None,
    regrowth: str = "reset",
) -> Steps:
    """Compiles nothing yet: `jax.jit` does at the first call of each.

    Of equal arguments the same: a run made again in one process, in a notebook say, or resumed, or watched, compiles nothing.

    Args:
      model: `spdf_jax.GPT`, or a `LossFunction`.
      tx: from `spdf_jax.optim.make_optimizer`, or any that `spdf_jax.sparse` made.
      learning_rate: of the run's step; None where `tx` takes none.
      rule: of the topology steps.
      shardings: of the state; None leaves placement to JAX.
      regrowth: see `spdf_jax.optim.OptimizerConfig`.

    Returns:
      `Steps`.
    """
    how: Any = {"donate": "state", "out": (shardings, None) if shardings is not None else None}
    train: Any = (train_step, model, tx, learning_rate)
    if rule.choose_each_step:
        train = (_step_and_choose, *train[1:], rule)
    return Steps(
        train=_program(*train, **how),
        topology=_program(topology_step, model, tx, rule, regrowth, **how),
        evaluate=_program(eval_step, model),
    )


def _step_and_choose(
    model: Model,
    tx: Any,
    learning_rate: Any,
    rule: Rule,
    state: TrainState,
    batch_ABT: Any,
    target_nnz: Any,
    **how: Any,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """An optimiser step, and masks by what it made of the weights: of a rule that chooses them at every step."""
    assert rule.choose_each_step is not None, "one of these rules"
    state, metrics = train_step(model, tx, learning_rate, state, batch_ABT, **how)
    params, masks = rule.choose_each_step(state.params, state.masks, target_nnz, rule)
    return state.replace(params=params, masks=masks), metrics


def _program(step: Callable[..., Any], *bound: Any, donate: str = "", out: Any = None) -> Any:
    leaves, treedef = jax.tree.flatten(out)
    return _kept_program(step, bound, donate, treedef, tuple(leaves))


@lru_cache(maxsize=6)  # a run of two phases; the device holds them all
def _kept_program(step: Any, bound: tuple[Any, ...], donate: str, treedef: Any, leaves: tuple[Any, ...]) -> Any:
    how: Any = {"static_argnames": ("pattern", "width"), "donate_argnames": donate or ()}
    return jax.jit(partial(step, *bound), out_shardings=jax.tree.unflatten(treedef, leaves), **how)
