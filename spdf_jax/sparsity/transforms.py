"""The optax transform that keeps masked weights exactly zero.

The invariant lives in one place: the last transform of `sparse` overwrites the update of every masked weight, whatever the
optimiser in between proposed. A caller who forgets ``masks=`` gets a TypeError, not a dense model.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from spdf_jax.sparsity.inside import Inside, check_arguments
from spdf_jax.sparsity.masks import keep_where


def sparse(inner: optax.GradientTransformation, *, moving: bool = True) -> optax.GradientTransformationExtraArgs:
    """Wraps any optax optimiser: zero masked gradients -> `inner` -> keep masked weights zero.

    Clipping inside `inner` sees masked gradients, as MST's code does. Updates of masked weights are ``-params``, so the
    weights are exactly 0 after `optax.apply_updates` even if they were not before. Which optimisers work, with what, and which
    are refused: `experiments/README.md`.

    Args:
      inner: any optax transformation; its other keyword extras are passed on.
      moving: False allows what cannot go on when masks move (`reset_masked_state`), such as SM3's accumulators.

    Returns:
      A transformation whose ``update(grads, state, params, *, masks, **extra)`` requires `params` and `masks`: without
      `masks` it raises TypeError.

    Raises:
      InputError: at its first update, without `params`, with masks or gradients that do not fit, or when `inner` refuses.

    >>> import jax.numpy as jnp, optax
    >>> params, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    >>> tx = sparse(optax.sgd(0.5))
    >>> updates, _ = tx.update({"w": jnp.array([1.0, 1.0])}, tx.init(params), params, masks=masks)
    >>> optax.apply_updates(params, updates)["w"].tolist()
    [0.5, 0.0]
    """
    inside = Inside(inner, moving)

    def update(grads: Any, state: Any, params: Any = None, *, masks: Any = None, **extra: Any) -> tuple[Any, Any]:
        check_arguments(grads, params, masks)
        grads = jax.tree.map(keep_where, masks, grads)
        updates, state = inside.update(grads, state, params, masks, extra)
        return jax.tree.map(_hold_at_zero, masks, updates, params), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _hold_at_zero(mask: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
    return update if mask.ndim == 0 else jnp.where(mask, update, -param)  # not in the update's dtype: exact
