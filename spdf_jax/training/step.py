"""The two steps of training, and evaluation. `spdf_jax.training.programs` compiles them.

`train_step` is the hot path and knows nothing of topology; `topology_step` runs every hundred steps or so, takes its targets
as arrays (so a moving schedule compiles nothing) and, as MST's code does, spends its batch on the dense gradient alone: the
optimiser is skipped.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from spdf_jax.data import Batch
from spdf_jax.sparsity.blocks import compress_tree, expand_tree, move_blocks
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.sparsity.topology import Rule, move_masks
from spdf_jax.training.loss_function import LossFunction, Model
from spdf_jax.training.state import TrainState
from spdf_jax.tree import named_leaves


def train_step(
    model: Model,
    tx: optax.GradientTransformationExtraArgs,
    learning_rate: Callable[[jax.Array], jax.Array] | None,
    state: TrainState,
    batch_ABT: Batch,
    *,
    pattern: str,
    width: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step. The parameters are already exactly 0 where masked, so the forward pass needs no masks."""
    loss, grads = loss_and_grads(model, state, batch_ABT, pattern=pattern, width=width)
    rate = {} if learning_rate is None else {"learning_rate": learning_rate(state.step)}
    updates, opt_state = tx.update(grads, state.opt_state, state.params, masks=state.masks, **rate)
    params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, **rate, "grad_norm": optax.tree.norm(apply_masks(grads, state.masks))}
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics


def topology_step(
    model: Model,
    tx: optax.GradientTransformationExtraArgs,
    rule: Rule,
    regrowth: str,
    state: TrainState,
    batch_ABT: Batch,
    target_nnz: Mapping[str, jax.Array],
    drop_fraction: jax.Array,
    *,
    pattern: str,
    width: int,
) -> tuple[TrainState, dict[str, Any]]:
    """Moves the masks of every sparse matrix by the rule, given the dense gradient of this batch; the optimiser rests.

    Kernels stored as blocks are made whole for that gradient; their counts stay.
    """
    whole = state.replace(params=expand_tree(state.params, state.topology), topology={})
    loss, grads = loss_and_grads(model, whole, batch_ABT, pattern=pattern, width=width)
    new = move_topology(tx, rule, regrowth, state, grads, target_nnz, drop_fraction)
    # Of weights, or of blocks where kernels are stored so.
    old, live = (dict(named_leaves(s.masks)) | dict(named_leaves(s.topology)) for s in (state, new))

    def count(active: jax.Array, matrices: int) -> jax.Array:
        return jnp.sum(active.reshape(matrices, -1), axis=1)

    metrics = {
        "loss": loss,
        "learning_rate": jnp.zeros(()),
        "grad_norm": optax.tree.norm(apply_masks(compress_tree(grads, state.topology, state.params), state.masks)),
        "churn": {
            name: count(live[name] & ~old[name], nnz.size) / jnp.maximum(count(live[name], nnz.size), 1)
            for name, nnz in target_nnz.items()
        },
    }
    return new.replace(step=state.step + 1), metrics


def move_topology(
    tx: optax.GradientTransformationExtraArgs,
    rule: Rule,
    regrowth: str,
    state: TrainState,
    grads: Any,
    target_nnz: Mapping[str, jax.Array],
    drop_fraction: jax.Array,
) -> TrainState:
    """The state with its masks, or live blocks, moved by the rule, given the dense gradient."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, state.step), 1)
    if state.topology:
        parts = (state.params, grads, state.topology, state.opt_state)
        params, topology, opt_state = move_blocks(key, tx, *parts, drop_fraction=drop_fraction, rule=rule)
        return state.replace(params=params, topology=topology, opt_state=opt_state)
    how: Any = {"target_nnz": target_nnz, "drop_fraction": drop_fraction, "rule": rule, "regrowth": regrowth}
    move, parts = rule.choose_masks or move_masks, (state.params, grads, state.masks, state.opt_state)
    params, masks, opt_state = move(key, tx, *parts, **how)
    return state.replace(params=params, masks=masks, opt_state=opt_state)


def loss_and_grads(
    model: Model, state: TrainState, batch_ABT: Any, *, pattern: str, width: int
) -> tuple[jax.Array, Any]:
    """Mean loss over all tokens of all micro-batches, and its **dense** gradient with respect to the masked parameters."""
    key = jax.random.fold_in(state.key, state.step)

    def sums(params: Any, batch_BT: Any, i: jax.Array) -> tuple[jax.Array, jax.Array]:
        variables = {"params": params, "topology": state.topology}
        how: Any = {"pattern": pattern, "width": width, "rngs": {"dropout": jax.random.fold_in(key, i)}}
        return _sums(model, variables, batch_BT, deterministic=False, **how)

    accumulate = jax.tree.leaves(batch_ABT)[0].shape[0]
    value_and_grad = jax.value_and_grad(sums, has_aux=True)
    if accumulate == 1:
        batch_BT = jax.tree.map(lambda x: x[0], batch_ABT)
        (loss, weight), grads = value_and_grad(state.params, batch_BT, jnp.zeros((), jnp.int32))
    else:

        def add(total: Any, micro: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, value_and_grad(state.params, *micro)), None

        zero = ((jnp.zeros(()), jnp.zeros(())), jax.tree.map(jnp.zeros_like, state.params))
        ((loss, weight), grads), _ = jax.lax.scan(add, zero, (batch_ABT, jnp.arange(accumulate)))
    return loss / weight, jax.tree.map(lambda g: (g / weight).astype(g.dtype), grads)


def eval_step(model: Model, variables: Any, batch_BT: Any, *, pattern: str, width: int) -> tuple[jax.Array, jax.Array]:
    """Summed loss and summed weights of one batch."""
    return _sums(model, variables, batch_BT, pattern=pattern, width=width)


def _sums(model: Model, variables: Any, batch_BT: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
    """Summed loss and summed weights: the one place that knows what a model makes of a batch."""
    if isinstance(model, LossFunction):
        return model.sums(variables, batch_BT, **options)
    logits_BTV = model.apply(variables, batch_BT.tokens_BT, segments_BT=batch_BT.segments_BT, **options)
    return cross_entropy(logits_BTV, batch_BT.targets_BT, batch_BT.weights_BT), jnp.sum(batch_BT.weights_BT)


def cross_entropy(logits_BTV: Any, targets_BT: Any, weights_BT: Any) -> jax.Array:
    """Sum of weighted next-token losses, in nats.

    Args:
      logits_BTV: any float dtype; computed in float32.
      targets_BT: int token ids.
      weights_BT: float32; 0 leaves a token out.

    Returns:
      float32 scalar; divide by ``weights_BT.sum()`` for the mean.

    >>> float(cross_entropy(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.array([[1.0, 0.0]])))  # ln 4
    1.3862943649291992
    """
    return jnp.sum(_token_losses(logits_BTV, targets_BT) * weights_BT)


# Computed again for the backward pass: float32 of every logit would be stored. A sum over a one-hot vector where an index would
# do: its gradient is one pass, the index's a scatter.
@partial(jax.checkpoint, prevent_cse=False)
def _token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    wide_BTV = logits_BTV.astype(jnp.float32)
    target_BTV = jax.nn.one_hot(targets_BT, wide_BTV.shape[-1], dtype=bool)
    return jax.nn.logsumexp(wide_BTV, axis=-1) - jnp.sum(wide_BTV, axis=-1, where=target_BTV)
