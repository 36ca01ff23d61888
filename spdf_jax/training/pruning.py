"""What a phase's ``init`` makes of a dense model that it goes on from: masks, and weights corrected for them."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.gpt import GPT
from spdf_jax.model.prune_once import prune_once
from spdf_jax.sharding import batch_sharding
from spdf_jax.sparsity.one_shot import CALIBRATED_METHODS
from spdf_jax.training.phases import PhasePlan
from spdf_jax.training.state import TrainState

#: From the state before a phase to the one that `spdf_jax.training.state.start_phase` is to go on with.
Pruner = Callable[[TrainState], TrainState]


def as_it_is(state: TrainState) -> TrainState:
    """The same state."""
    return state


def pruner(model: GPTConfig, plan: PhasePlan, train: Callable[[int], Iterator[Any]], mesh: Mesh) -> Pruner:
    """What a phase does to a dense state at its start, if its ``init`` looks at text; else nothing.

    Args:
      model: of the run.
      plan: the phase.
      train: its batches, as `spdf_jax.training.feed.Feed` has them.
      mesh: where the state is.
    """
    sparsity = plan.config.sparsity

    def on_mesh(rows: Any) -> jax.Array:
        return jax.make_array_from_process_local_data(batch_sharding(mesh, rows.ndim, axis=0), rows)

    def prune(state: TrainState) -> TrainState:
        if state.topology or any(mask.ndim for mask in jax.tree.leaves(state.masks)):
            raise InputError(
                f"config.{plan.name}.sparsity.init: {sparsity.init!r} prunes a dense model, and what the phase starts from has "
                f"masks, which go on; leave it at 'random'"
            )
        state = state.averaged().replace(opt_state=optax.EmptyState())
        batches = islice(train(0), -(-sparsity.calibration_sequences // plan.config.batch_size))
        params, masks = prune_once(
            state.params,
            sparsity=sparsity.curve(0.0),
            method=sparsity.init,
            model=GPT(model, *plan.programme.attention(0)),
            calibration=[jax.tree.map(on_mesh, batch) for batch in batches],
            distribution=sparsity.distribution,
            pattern=sparsity.pattern,
            filter=plan.filter,
        )
        return state.replace(params=params, masks=masks)

    return prune if sparsity.init in CALIBRATED_METHODS and not sparsity.dense else as_it_is
