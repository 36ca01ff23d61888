"""Optimiser state of weights that grow back: the reset for any optimiser.

A weight that grows back with zero moments under the optimiser's global step count gets oversized first updates
(`adam_overshoot`), which SMET's Adam does not (`spdf_jax.sparsity.optimizers`).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spdf_jax.errors import InputError
from spdf_jax.sparsity.inside import check_followed
from spdf_jax.sparsity.masks import apply_masks, check_masks
from spdf_jax.tree import along_state, same_structure


def reset_masked_state(tx: optax.GradientTransformation, state: Any, params: Any, masks: Any) -> Any:
    """Sets the optimiser's state of every masked weight back to what `tx.init` gives a zero weight: 0, for moments.

    Called at a topology change, so that a weight that grows back starts afresh. Whose state is whose is found by following
    shapes (`spdf_jax.tree.along_state`), whatever the optimiser. One number for a whole tensor is left alone, and for a row or
    a column of Adafactor's.

    Args:
      tx: the transformation that made `state`.
      state: its state.
      params: parameters.
      masks: mask tree; False where the state is to be reset.

    Returns:
      The state, reset where masks are False and bit-equal elsewhere.

    Raises:
      InputError: state that is shared by some of a tensor's weights otherwise (SM3's accumulators), named; masks or a state
        that are not of these parameters.

    >>> import jax.numpy as jnp
    >>> tx, params = optax.trace(0.9), {"w": jnp.array([1.0, 2.0])}
    >>> reset_masked_state(tx, optax.TraceState(params), params, {"w": jnp.array([True, False])}).trace["w"].tolist()
    [1.0, 0.0]
    """
    check_masks(masks, params)
    fresh = tx.init(apply_masks(params, masks))
    if not same_structure(state, fresh):
        raise InputError(
            "reset_masked_state: the state is not one of this tx and these parameters. flax.nnx.Optimizer boxes its own: "
            "new = reset_masked_state(tx, *map(nnx.as_pure, (optimizer.opt_state, params, masks))), then "
            "nnx.update(optimizer.opt_state, nnx.state(new))"
        )
    check_followed(tx, params, masks)

    def reset(value: Any, new: Any, mask: Any) -> Any:
        return jnp.where(mask, value, new) if mask.ndim and value.shape == mask.shape else value

    return jax.tree.map(reset, state, fresh, along_state(tx, state, masks, np.True_))


def scale_by_density(exponent: float) -> optax.GradientTransformationExtraArgs:
    """Multiplies the updates of each tensor by ``1 / density ** exponent``, its density read from its mask.

    Args:
      exponent: 0 (nothing changes), 1/2 or 1 in SMET.

    Returns:
      A stateless transformation with the keyword extra ``masks``. Dense tensors pass unchanged.

    Raises:
      InputError: a negative exponent.

    >>> masks = {"w": jnp.array([True, False, False, False])}
    >>> scale_by_density(0.5).update({"w": jnp.ones(4)}, optax.EmptyState(), masks=masks)[0]["w"].tolist()
    [2.0, 2.0, 2.0, 2.0]
    """
    if exponent < 0:
        raise InputError(f"scale_by_density: exponent {exponent} must not be negative")

    def scale(mask: jax.Array, update: jax.Array) -> jax.Array:
        if mask.ndim == 0 or exponent == 0:
            return update
        density = jnp.mean(jnp.mean(mask, axis=-1))  # row by row: one float32 sum would stop counting at 2^24
        density = jnp.maximum(density, 1 / mask.size)  # an empty mask: nothing to update, nothing to divide by
        return (update * density**-exponent).astype(update.dtype)

    def update(updates: Any, state: Any, params: Any = None, *, masks: Any, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        return jax.tree.map(scale, masks, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def adam_overshoot(b1: float, b2: float, step: Any) -> Any:
    """Update of a regrown weight in units of the learning rate, for a constant gradient, under a large global step count.

    With moments zeroed at growth and no bias correction left, Adam's k-th update is ``(1 - b1^k) / sqrt(1 - b2^k)``; with
    correction by the weight's own step it would be 1.

    Args:
      b1, b2: Adam's.
      step: k >= 1, a number or an array.

    Returns:
      The factor, of the kind of `step`.

    >>> [round(adam_overshoot(0.9, 0.999, k), 1) for k in (1, 12, 1000)]
    [3.2, 6.6, 1.3]
    """
    return (1 - b1**step) / (1 - b2**step) ** 0.5
