"""What an optimiser inside `spdf_jax.sparse` is told, and what it must be able to do, found out before its first step.

It sees the problem of the active weights alone: gradients and functions under the masks. Two things are tried, not looked up by
name: by the shapes of its state, that this can be followed weight by weight; on a small tree of ones, that a weight whose
gradients were 0 so far, as those of one that grows, does not begin with an update without bound.
"""

import functools
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spdf_jax.errors import InputError
from spdf_jax.sparsity.masks import apply_masks, check_masks, keep_where
from spdf_jax.tree import (
    along_state,
    check_same_structure,
    follow_shapes,
    map_named,
    named_leaves,
    optimizer_name,
    same_structure,
)

# Times the largest update of a weight that was there before: Adam's overshoot is 7, that of a division by nothing 1e5 and more.
_LARGEST_FIRST_UPDATE = 1e3
# What is known of the other arguments of an update: enough to make them for the trial.
_KNOWN = {"value", "grad", "value_fn", "grad_fn", "obj_fn"}
# Adafactor's: no weight has a share of a row's or a column's mean that could be reset, and one that grows is measured by it as
# its neighbours are, so that it may stay.
_SHARED = re.compile(r"(^|/)v_(row|col)(/|$)")
_REFUSALS = (TypeError, ValueError, AttributeError, KeyError, IndexError, ZeroDivisionError)


class Inside:
    """One optimiser inside `spdf_jax.sparse`, and what has been found out about it, once for every tree of parameters.

    Args:
      inner: the optimiser.
      moving: whether masks will move.
    """

    def __init__(self, inner: optax.GradientTransformation, moving: bool) -> None:
        self.inner, self.moving, self.name = optax.with_extra_args_support(inner), moving, optimizer_name(inner)
        self._copies: dict[Any, Any] = {}

    def update(self, grads: Any, state: Any, params: Any, masks: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
        """Its update for masked gradients; copies of the parameters in its state are held at zero as these are."""
        shapes = [
            (p.shape, str(p.dtype), m.ndim > 0) for p, m in zip(*map(jax.tree.leaves, (params, masks)), strict=True)
        ]
        key = (str(jax.tree.structure(params)), *shapes, *extra)
        if key not in self._copies:
            self._copies[key] = self._rehearse(params, masks, extra)
        if isinstance(state, optax.LookaheadState):
            raise InputError(
                "sparse: lookahead steps on pairs of parameters (LookaheadParams), and masks are of one tree; give sparse its "
                "fast optimiser, keep the slow parameters beside it (optax.incremental_update) and apply the masks to them"
            )
        try:
            updates, new_state = _update(self.inner, grads, state, params, masks, extra)
        except InputError:
            raise
        except _REFUSALS as error:
            forgotten = "required keyword-only argument" in str(error)
            kind = TypeError if forgotten else InputError
            raise kind(f"sparse: {self.name} cannot update these parameters: {_one_line(error)}") from error
        if self.moving and not same_structure(state, new_state):
            raise InputError(
                f"the state of {self.name} cannot be followed weight by weight: it changes its structure at "
                f"an update; use sparse(..., moving=False) if the masks never move"
            )
        state = new_state
        self._check_updates(updates, params)
        if copies := self._copies[key]:
            along = along_state(self.inner, state, masks, np.True_)
            leaves = zip(jax.tree.leaves(along), jax.tree.leaves(state), copies, strict=True)
            held = [
                keep_where(mask, leaf) if copy and mask.shape == leaf.shape else leaf for mask, leaf, copy in leaves
            ]
            state = jax.tree.unflatten(jax.tree.structure(state), held)
        return updates, state

    def _check_updates(self, updates: Any, params: Any) -> None:
        what = f"sparse: the updates of {self.name}"
        check_same_structure(what, updates, params)
        for (name, update), weight in zip(named_leaves(updates), jax.tree.leaves(params), strict=True):
            if jnp.shape(update) != weight.shape:
                raise InputError(
                    f"{what} have shape {jnp.shape(update)} for {name}, a weight of shape {weight.shape}; gradients of single "
                    f"examples go through it before sparse: sparse(...).update(their sum, ...)"
                )

    def _rehearse(self, params: Any, masks: Any, extra: dict[str, Any]) -> list[bool]:
        """Refuses what cannot go on when masks move. Which leaves of the state are copies of the parameters; [] for none."""
        if self.moving and any(mask.ndim for mask in jax.tree.leaves(masks)):
            check_followed(self.inner, params, masks)
        ones = jax.tree.map(lambda p: np.ones([min(n, 2) for n in p.shape], p.dtype), params)
        small = jax.tree.map(lambda m, p: np.ones(p.shape if m.ndim else (), bool), masks, ones)
        tries_growth = self.moving and extra.keys() <= _KNOWN
        # In a thread of its own nothing is being traced and no mesh is set: those of a pod that is not there compute nothing.
        with ThreadPoolExecutor(1) as aside:
            copies = aside.submit(self._try_out, ones, small, tries_growth).result()
        return copies if any(copies) else []

    def _try_out(self, ones: Any, masks: Any, tries_growth: bool) -> list[bool]:
        """Which leaves of the state of a small problem follow the parameters' values; and `_check_growth`, if asked for."""
        ones, masks = jax.tree.map(jnp.asarray, (ones, masks))
        if tries_growth:
            self._check_growth(ones, masks)
        try:
            states = [self.inner.init(tree) for tree in (ones, jax.tree.map(jnp.zeros_like, ones))]
        except _REFUSALS:  # arrays of the real shapes inside it
            return []
        return [_differ(a, b) for a, b in zip(*map(jax.tree.leaves, states), strict=True)]

    def _check_growth(self, ones: Any, masks: Any) -> None:
        """Raises `InputError` if a weight whose gradients were 0 takes an update out of proportion to the others'."""
        names = [name for name, mask in named_leaves(masks) if mask.ndim and mask.shape[-1] > 1]
        quiet = jax.tree.map(lambda m, p: p.at[..., -1].set(0) if m.ndim and m.shape[-1] > 1 else p, masks, ones)
        largest: dict[str, list[float]] = {name: [0.0, 0.0] for name in names}
        try:
            state = self.inner.init(quiet)
            for grads in (*[quiet] * 3, *[ones] * 4):
                updates, state = _update(self.inner, grads, state, quiet, masks, _linear_problem(grads))
                for name, update in named_leaves(updates):
                    if name in largest:
                        both = (np.abs(np.asarray(u, np.float32)).max() for u in (update[..., :-1], update[..., -1:]))
                        largest[name] = [float(max(pair)) for pair in zip(largest[name], both, strict=True)]
        except _REFUSALS:  # arrays of the real shapes inside it, or arguments of its own: it cannot be tried here
            return
        for name, (others, grown) in largest.items():
            if others > 0 and not grown <= _LARGEST_FIRST_UPDATE * others:
                raise InputError(
                    f"sparse: {self.name} divides by what a weight's past gradients were: one of {name} that "
                    f"grows, whose were 0, took an update {grown / others:.0e} times the others'. Use another optimiser "
                    f"(optax.contrib.adopt with its clipping), or sparse(..., moving=False) if the masks never move"
                )


def check_followed(tx: optax.GradientTransformation, params: Any, masks: Any) -> None:
    """Raises `InputError` if state of a masked tensor cannot be followed weight by weight, by name.

    >>> params, masks = {"w": jnp.ones((8, 8))}, {"w": jnp.ones((8, 8), bool)}
    >>> check_followed(optax.adam(0.1), params, masks)
    """
    shapes, follows = follow_shapes(tx, params)

    def check(name: str, leaf: Any, follow: bool, mask: Any) -> None:
        if mask.ndim and not (follow or _SHARED.search(name)):
            raise InputError(
                f"optimiser state {name} of {optimizer_name(tx)} has shape {leaf.shape}, its weight {mask.shape}: it cannot be "
                f"followed weight by weight; use an optimiser with element-wise state, or "
                f"sparse(..., moving=False) if the masks never move"
            )

    map_named(check, shapes, follows, along_state(tx, shapes, masks, np.True_))


def check_arguments(grads: Any, params: Any, masks: Any) -> None:
    """Raises TypeError without masks, `InputError` for anything else that does not fit."""
    if masks is None:
        raise TypeError(
            "sparse(...).update() missing 1 required keyword-only argument: 'masks': tx.update(grads, state, params, "
            "masks=masks). Flax's TrainState.apply_gradients cannot pass it on: call state.tx.update(grads, state.opt_state, "
            "state.params, masks=masks), then state.replace(step=state.step + 1, opt_state=opt_state, "
            "params=optax.apply_updates(state.params, updates))"
        )
    if params is None:
        raise InputError("sparse(...).update needs params: tx.update(grads, state, params, masks=masks)")
    check_masks(masks, params)
    check_same_structure("gradients", grads, params)


def _update(inner: Any, grads: Any, state: Any, params: Any, masks: Any, extra: dict[str, Any]) -> tuple[Any, Any]:
    """Its update with masks, or without them where it takes no arguments but its own (SAM, line searches)."""
    extra = extra | {name: _WRAPPERS[name](extra[name], masks) for name in _WRAPPERS.keys() & extra.keys()}
    try:
        return inner.update(grads, state, params, masks=masks, **extra)
    except TypeError as error:
        if "masks" not in str(error) or "nexpected keyword argument" not in str(error):
            raise
    return inner.update(grads, state, params, **extra)


def _value_under(function: Callable[..., Any], masks: Any) -> Callable[..., Any]:
    """Values are those of the masked weights; gradients stay dense, for line searches keep them for topology steps."""

    @functools.wraps(function)
    def call(params: Any, *args: Any, **extra: Any) -> Any:
        masked = apply_masks(params, masks)
        straight = jax.tree.map(lambda p, m: p + jax.lax.stop_gradient(m - p), params, masked)
        return function(straight, *args, **extra)

    return call


def _input_under(function: Callable[..., Any], masks: Any) -> Callable[..., Any]:
    return lambda params, *args, **extra: function(apply_masks(params, masks), *args, **extra)


def _gradient_under(function: Callable[..., Any], masks: Any) -> Callable[..., Any]:
    return lambda params, *args, **extra: apply_masks(function(apply_masks(params, masks), *args, **extra), masks)


# Functions that optax's transformations ask for: line searches, Sophia, SAM.
_WRAPPERS = {"value_fn": _value_under, "obj_fn": _input_under, "grad_fn": _gradient_under}


def _linear_problem(grads: Any) -> dict[str, Any]:
    """Everything that optax's transformations may ask for, of a loss whose gradient is `grads` everywhere."""

    def value(params: Any) -> jax.Array:
        return optax.tree.vdot(grads, params)

    return {
        "value": jnp.ones(()),
        "grad": grads,
        "value_fn": value,
        "obj_fn": value,
        "grad_fn": lambda params, step: grads,
    }


def _differ(a: Any, b: Any) -> bool:
    if jnp.issubdtype(getattr(a, "dtype", jnp.float32), jax.dtypes.prng_key):
        return False
    return bool((np.asarray(a) != np.asarray(b)).any())


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
