"""Top-KAST: always sparse forward, a little less sparse backward (Jayakumar et al., NeurIPS 2020, arXiv 2106.03517).

Every weight keeps a value. The D largest of a matrix compute; the M next to them get gradients too and may overtake; the
others wait. Both sets are chosen anew, by magnitude, at every topology step.

Parameters here are exactly 0 where masked, so the values that do not compute live in the optimiser's state, beside its
moments: they are saved, sharded and resumed with it. Dropping the masks leaves them behind.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spdf_jax.sparsity.masks import apply_masks, keep_where
from spdf_jax.sparsity.topology import Rule, prune_and_grow_tree
from spdf_jax.sparsity.transforms import sparse
from spdf_jax.tree import check_same_structure, named_leaves


class TopKastState(NamedTuple):
    """State of `explore`.

    Attributes:
      inner: the optimiser's.
      values: of every weight, those that do not compute included; the parameters are these under the masks, to the bit after
        a topology step and to rounding until the next.
      explored: bool of the weights' shapes: which of them get gradients, a superset of the mask.
    """

    inner: Any
    values: Any
    explored: Any


def explore(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimiser as `spdf_jax.sparse` does, but updates all explored weights, behind the parameters' back.

    Weights that are explored but masked are pulled to 0 by 1/density times the weight decay of the others (section 2.3), so
    that one of them overtakes by its gradient only. Outside the explored set nothing moves; moments there see gradients of 0.

    Args:
      inner: any optax transformation; give it the parameters *before* they are masked at `init`.

    Returns:
      A transformation whose ``update(grads, state, params, *, masks, **extra)`` wants the dense gradient.

    >>> import jax.numpy as jnp, optax
    >>> values, masks = {"w": jnp.array([3.0, 1.0])}, {"w": jnp.array([True, False])}
    >>> tx = explore(optax.sgd(0.5))
    >>> updates, state = tx.update({"w": jnp.array([1.0, 1.0])}, tx.init(values), apply_masks(values, masks), masks=masks)
    >>> optax.apply_updates(apply_masks(values, masks), updates)["w"].tolist(), state.values["w"].tolist()
    ([2.5, 0.0], [2.5, 0.5])
    """
    inner = optax.with_extra_args_support(inner)
    hold_at_zero = sparse(optax.identity())

    def init(params: Any) -> TopKastState:
        return TopKastState(inner.init(params), params, jax.tree.map(lambda p: jnp.ones(p.shape, bool), params))

    def update(grads: Any, state: TopKastState, params: Any = None, *, masks: Any, **extra: Any) -> tuple[Any, Any]:
        check_same_structure("masks", masks, params)
        grads = jax.tree.map(keep_where, state.explored, grads)
        pulled = jax.tree.map(_pulled, state.values, masks)
        updates, inner_state = inner.update(grads, state.inner, pulled, masks=state.explored, **extra)
        # Added to two trees: without the barrier, each sum would be fused with the making of the updates in its own way.
        updates = jax.lax.optimization_barrier(jax.tree.map(keep_where, state.explored, updates))
        values = optax.apply_updates(state.values, updates)
        held, _ = hold_at_zero.update(updates, optax.EmptyState(), params, masks=masks)
        return held, TopKastState(inner_state, values, state.explored)

    return optax.GradientTransformationExtraArgs(init, update)


def choose_by_magnitude(
    key: jax.Array,
    tx: optax.GradientTransformation,
    params: Any,
    grads: Any,
    masks: Any,
    opt_state: TopKastState,
    *,
    target_nnz: Mapping[str, jax.Array],
    drop_fraction: jax.Array,
    rule: Rule,
    regrowth: str,
) -> tuple[Any, Any, TopKastState]:
    """Top-KAST's topology step: the D and D + M largest values of every matrix; see `spdf_jax.sparsity.topology.move_masks`."""
    del tx, params, drop_fraction, regrowth
    all_active = jax.tree.map(lambda mask: jnp.ones(mask.shape, bool), masks)

    def largest(counts: Mapping[str, jax.Array]) -> Any:
        return prune_and_grow_tree(
            key, opt_state.values, grads, all_active, target_nnz=counts, drop_fraction=jnp.zeros(()), rule=rule
        )

    sizes = {name: mask.size // target_nnz[name].shape[0] for name, mask in named_leaves(masks) if mask.ndim}
    wider = {name: rule.explored_count(n, sizes[name]) for name, n in target_nnz.items()}
    explored = jax.tree.map(jnp.broadcast_to, largest(wider), jax.tree.map(jnp.shape, opt_state.explored))
    masks = largest(target_nnz)
    return apply_masks(opt_state.values, masks), masks, opt_state._replace(explored=explored)


def _pulled(values: jax.Array, mask: jax.Array) -> jax.Array:
    density = jnp.maximum(jnp.mean(mask, dtype=jnp.float32), 1 / mask.size)
    return values if mask.ndim == 0 else jnp.where(mask, values, values / density.astype(values.dtype))
