"""What holds of every state that is saved, whatever trained it."""

from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.sparsity.block_topology import balanced_topologies
from spdf_jax.sparsity.masks import active_counts
from spdf_jax.sparsity.programme import Programme
from spdf_jax.training.state import TrainState
from spdf_jax.tree import Filter, named_leaves


def check_invariants(programme: Programme, filter: Filter, state: TrainState, phase_start: int) -> None:
    """Masks hold the exact target counts, and every masked weight is exactly 0; anything else is a bug, and is not saved.

    Raises:
      RuntimeError: naming the leaf.
    """
    if not programme.groups:
        return
    local = int(state.step) - phase_start
    counts = jax.device_get(_counts(state.masks, state.params, filter))
    nonzero = jax.device_get(_nonzero_where_masked(state.params, state.masks))
    for name, target in programme.counts(local).items():
        if not (counts[name] == target).all():
            raise RuntimeError(f"{name}: masks hold {counts[name]} active weights, the programme says {target}")
        if nonzero[name]:
            raise RuntimeError(f"{name}: {nonzero[name]} masked weights are not zero")
    for name, balanced in jax.device_get(_balanced(state.params, state.topology)).items():
        if not balanced:
            raise RuntimeError(f"{name}: its live blocks are not the same number in every column and row")


_counts = jax.jit(active_counts, static_argnums=2)

_balanced = jax.jit(balanced_topologies)


@jax.jit
def _nonzero_where_masked(params: Any, masks: Any) -> dict[str, jax.Array]:
    return {
        name: jnp.sum((value != 0) & ~mask)
        for (name, value), (_, mask) in zip(named_leaves(params), named_leaves(masks), strict=True)
    }
