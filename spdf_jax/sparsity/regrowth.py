"""Optimiser state of weights that grow back: the reset for any optimiser, and SMET's Adam.

A weight that grows back with zero moments under the optimiser's global step count gets oversized first updates
(`adam_overshoot`). SMET (ICML 2026, arXiv 2606.00888) gives every weight its own step count. Three faults of its public
code are not copied: there the warm-up shrinks the moment itself and so compounds, the learning-rate scale compounds over
parameters, and weight decay is coupled.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spdf_jax.errors import InputError
from spdf_jax.sparsity.inside import check_followed
from spdf_jax.sparsity.masks import apply_masks, check_masks, keep_where
from spdf_jax.tree import along_state, same_structure


def reset_masked_state(tx: optax.GradientTransformation, state: Any, params: Any, masks: Any) -> Any:
    """Sets the optimiser's state of every masked weight back to what `tx.init` gives a zero weight: 0, for moments.

    Called at a topology change, so that a weight that grows back starts afresh. Whose state is whose is found by following
    shapes (`spdf_jax.tree.along_state`), whatever the optimiser. One number for a whole tensor is left alone.

    Args:
      tx: the transformation that made `state`.
      state: its state.
      params: parameters.
      masks: mask tree; False where the state is to be reset.

    Returns:
      The state, reset where masks are False and bit-equal elsewhere.

    Raises:
      InputError: state that is shared by some of a tensor's weights (Adafactor's factored moments), named; masks or a state
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


class SmetAdamState(NamedTuple):
    """Adam's moments with a step count a weight.

    Attributes:
      count: int32 of the weights' shapes: updates since a weight last grew; 0 where it is masked.
      mu: first moment.
      nu: second moment.
    """

    count: Any
    mu: Any
    nu: Any


def scale_by_smet_adam(
    b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, *, warmup_steps: int = 100
) -> optax.GradientTransformationExtraArgs:
    """Adam whose bias correction and warm-up follow each weight's own step t: 1 at the first update after it grew.

    The update of a weight is ``min(t / warmup_steps, 1) * mu_hat / (sqrt(nu_hat) + eps)``; the moments never see the
    warm-up. At the start of a run every weight of a sparse tensor is new and warms up. In a dense tensor (0-d mask) nothing
    ever grows: there is no warm-up and this is `optax.scale_by_adam`. Moments are zeroed by
    `reset_masked_state`, as for any optimiser.

    Args:
      b1, b2, eps: as Adam's.
      warmup_steps: W; 1 turns the warm-up off.

    Returns:
      A transformation with the keyword extra ``masks``; inside `optax.masked` or `partition` it needs their
      ``mask_compatible_extra_args=True``.

    Raises:
      InputError: `warmup_steps` below 1.

    >>> params, masks = {"w": jnp.zeros(2)}, {"w": jnp.array([True, False])}
    >>> tx = scale_by_smet_adam(warmup_steps=4)
    >>> updates, state = tx.update({"w": jnp.array([2.0, 0.0])}, tx.init(params), masks=masks)
    >>> updates["w"].round(4).tolist(), state.count["w"].tolist()
    ([0.25, 0.0], [1, 0])
    """
    if warmup_steps < 1:
        raise InputError(f"scale_by_smet_adam: warmup_steps {warmup_steps} must be at least 1 (1 is no warm-up)")

    def init(params: Any) -> SmetAdamState:
        moments = optax.tree.zeros_like(params)
        return SmetAdamState(optax.tree.zeros_like(params, jnp.int32), moments, moments)

    def update(
        updates: Any, state: SmetAdamState, params: Any = None, *, masks: Any, **extra: Any
    ) -> tuple[Any, SmetAdamState]:
        del params, extra
        count = jax.tree.map(lambda mask, t: keep_where(mask, t + 1), masks, state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        return jax.tree.map(direction, masks, count, mu, nu), SmetAdamState(count, mu, nu)

    def direction(mask: jax.Array, t: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        steps = jnp.maximum(t, 1).astype(jnp.float32)  # masked: no 0 / 0
        scaled = _unbiased(m, b1, steps) / (jnp.sqrt(_unbiased(v, b2, steps)) + eps)
        if mask.ndim:
            scaled = keep_where(mask, jnp.minimum(steps / warmup_steps, 1) * scaled)
        return scaled.astype(m.dtype)

    return optax.GradientTransformationExtraArgs(init, update)


def _unbiased(moment: jax.Array, decay: float, steps: jax.Array) -> jax.Array:
    """``moment / (1 - decay ** steps)`` in float32; expm1 is exact where 0.999 rounded to float32 is not."""
    return moment.astype(jnp.float32) / -jnp.expm1(steps * (math.log(decay) if decay else -math.inf))


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
