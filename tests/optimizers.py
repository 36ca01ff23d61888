"""The optimisers that the contract tests of masked training run over, and a small problem for them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spdf_jax.sparsity.regrowth import reset_masked_state

UNWRAPPED = {
    "sgd_momentum": lambda: optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optax.adam(0.1),
    "adamw": lambda: optax.adamw(0.1, weight_decay=0.5),
    "lion": lambda: optax.lion(0.1, weight_decay=0.5),
    "rmsprop": lambda: optax.rmsprop(0.1, momentum=0.9),
}
OPTIMIZERS = UNWRAPPED | {
    "adafactor": lambda: optax.adafactor(0.1, factored=False, momentum=0.9),
    "adafactor_too_small_to_factor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=128),
    "adagrad": lambda: optax.adagrad(0.1, initial_accumulator_value=0.25),
    "amsgrad": lambda: optax.amsgrad(0.1),
    "lamb": lambda: optax.lamb(0.1),
    "novograd": lambda: optax.novograd(0.1),
    "muon": lambda: optax.contrib.muon(0.1),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(0.1, warmup_steps=2),
    "prodigy": lambda: optax.contrib.prodigy(0.1),
    "ademamix": lambda: optax.contrib.ademamix(0.1),
    "low_precision_moments": lambda: optax.adam(0.1, mu_dtype=jnp.bfloat16),
    "schedule": lambda: optax.adam(optax.linear_schedule(0.1, 0.2, 5)),
    "chain": lambda: optax.chain(optax.clip(1.0), optax.ema(0.9), optax.scale_by_rms(), optax.scale(-0.1)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=0.1, weight_decay=0.5),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adam(0.1), {"w": True, "b": False}),
    "partition": lambda: optax.partition({"a": optax.adam(0.1), "s": optax.sgd(0.1)}, {"w": "a", "b": "s"}),
    "partition_by_function": lambda: optax.partition(
        {"matrix": optax.sgd(0.1, momentum=0.9), "vector": optax.adam(0.1)},
        lambda params: jax.tree.map(lambda p: "vector" if p.ndim == 1 else "matrix", params),
    ),
}


class Compiled(NamedTuple):
    """An optimiser whose every function is one program."""

    init: Callable[..., Any]
    update: Callable[..., Any]
    reset: Callable[..., Any]


def compiled(tx: optax.GradientTransformation) -> Compiled:
    return Compiled(jax.jit(tx.init), jax.jit(tx.update), jax.jit(partial(reset_masked_state, tx)))


def problem():
    """Parameters that are **not** zero where masked, a mask, and a generator of gradients."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(6, 8)), jnp.float32), "b": jnp.ones(8)}
    masks = {"w": jnp.asarray(rng.random((6, 8)) < 0.5), "b": jnp.array(True)}

    def grads(i):
        rng = np.random.default_rng(i + 1)
        return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)

    return params, masks, grads
