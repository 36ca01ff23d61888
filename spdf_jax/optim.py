"""Optimiser chains and learning-rate schedules."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from spdf_jax.fields import REGROWTH, SPARSE_PHASE, Count, CountOrZero, OneOf, Range, Share, check_fields, used_with
from spdf_jax.model.mupar import scale_by_mup
from spdf_jax.sparsity import optimizers
from spdf_jax.sparsity.optimizers import ADAMS, used_by
from spdf_jax.sparsity.regrowth import scale_by_density
from spdf_jax.sparsity.transforms import sparse
from spdf_jax.tree import map_named


@dataclass(frozen=True)
class OptimizerConfig:
    """An optimiser with clipping and weight decay, and its learning-rate schedule.

    Attributes:
      name: ``adamw`` | ``muon`` | ``lion`` | ``adafactor`` | ``sgd`` | ``schedule_free_adamw``, or one of your own in
        `spdf_jax.OPTIMIZERS`; see "Optimisers of a run" in ``experiments/README.md``.
      peak_learning_rate: learning rate after warm-up.
      final_fraction: end of the schedule as a fraction of the peak.
      decay_fraction: share of the phase's steps, its last ones, over which ``wsd`` decays.
      warmup_steps: linear from 0.
      schedule: ``cosine`` | ``linear`` | ``constant`` | ``wsd``: warm-up, stable, decay as linear's (arXiv 2404.06395).
      beta1: Adam: what is kept of the mean of gradients, each step. Lion's first; SGD's momentum.
      beta2: Adam: what is kept of the mean of their squares, each step. Lion's second.
      eps: Adam: added to the root of that mean before it divides.
      momentum: Muon's, of the matrices in the layers.
      weight_decay: decoupled; on matrices and embeddings, not on biases and norms.
      clip_norm: global gradient norm, on masked gradients; 0 turns it off.
      clip_rms: the same of the gradient's root mean square over all weights (arXiv 2511.13653), in place of `clip_norm` 0.
      regrowth: where the moments of a weight that grows back start. ``reset``: at 0; ``smet``: at 0 with a step count and a
        warm-up of its own; ``keep``: as dropped, decayed since (for comparison: masked state is then not 0).
      regrowth_warmup_steps: steps of that warm-up, for ``smet``.
      density_exponent: learning rate of a sparse tensor x ``1 / density ** exponent``.
    """

    name: Annotated[str, OneOf(optimizers.OPTIMIZERS)] = "adamw"
    peak_learning_rate: Annotated[float, Range(above=0)] = 6e-4
    final_fraction: Annotated[Share, used_with("schedule", "cosine", "linear", "wsd")] = 0.1
    decay_fraction: Annotated[Share, used_with("schedule", "wsd")] = 0.2
    warmup_steps: CountOrZero = 100
    schedule: Annotated[str, OneOf(("cosine", "linear", "constant", "wsd"))] = "cosine"
    beta1: Annotated[float, Range(least=0, below=1), used_by("lion", "sgd", *ADAMS)] = 0.9
    beta2: Annotated[float, Range(least=0, below=1), used_by("lion", *ADAMS)] = 0.95
    eps: Annotated[float, Range(above=0), used_by(*ADAMS)] = 1e-8
    momentum: Annotated[float, Range(least=0, below=1), used_by("muon")] = 0.95
    weight_decay: Annotated[float, Range(least=0)] = 0.1
    clip_norm: Annotated[float, Range(least=0)] = 1.0
    clip_rms: Annotated[float, Range(least=0), used_with("clip_norm", 0.0)] = 0.0
    regrowth: Annotated[str, OneOf(("reset", "keep", "smet")), REGROWTH] = "reset"
    regrowth_warmup_steps: Annotated[Count, used_with("regrowth", "smet")] = 100
    density_exponent: Annotated[float, Range(least=0), SPARSE_PHASE] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "optimizer")
        optimizers.check_optimizer(self)


def learning_rate_schedule(
    config: OptimizerConfig, total_steps: int, start: int = 0
) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of a phase of `total_steps`, by the run's step; `start` come before it. Warm-up, then the schedule."""
    return _schedule(config, 0 if config.schedule == "constant" else total_steps, start)


@cache  # as `make_optimizer`
def _schedule(config: OptimizerConfig, total_steps: int, start: int) -> Callable[[jax.Array], jax.Array]:
    peak, final = config.peak_learning_rate, config.peak_learning_rate * config.final_fraction
    decay_steps = max(1, total_steps - config.warmup_steps)
    falling = max(1, round(config.decay_fraction * total_steps)) if config.schedule == "wsd" else decay_steps
    after = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_fraction),
        "constant": optax.constant_schedule(peak),
    }.get(config.schedule, optax.linear_schedule(peak, final, min(falling, decay_steps), max(0, decay_steps - falling)))
    # From peak / n, not 0: the very first update counts too.
    warmup = optax.linear_schedule(peak / max(1, config.warmup_steps), peak, max(1, config.warmup_steps - 1))
    schedule = optax.join_schedules([warmup, after], [config.warmup_steps])
    return lambda step: schedule(step - start)


def make_optimizer(
    config: OptimizerConfig,
    multipliers: Any = None,
    wrap: Callable[..., optax.GradientTransformationExtraArgs] = sparse,
) -> optax.GradientTransformationExtraArgs:
    """The chain of one phase: masked gradients -> clip -> Adam -> decoupled decay -> -learning_rate -> hold zeros.

    Args:
      config: the optimiser; another than Adam takes its place (`spdf_jax.sparsity.optimizers`).
      multipliers: learning-rate multipliers by leaf, for `scale_by_mup`; None for none.
      wrap: what masks the gradients and holds the zeros, see `spdf_jax.Rule.optimizer`.

    Returns:
      A transformation with the keyword extras ``masks`` and ``learning_rate``. The learning rate comes from outside because
      topology steps skip the optimiser: a count inside it would fall behind the run's step.
    """
    return _chain(config, optimizers.OPTIMIZERS[config.name], multipliers, wrap)


@cache  # compiled steps are known by it: of equal configs it must be one
def _chain(config: OptimizerConfig, factory: Any, multipliers: Any, wrap: Any) -> Any:
    clipping = config.clip_norm or config.clip_rms
    clip = _clip_by_global_norm(clipping, rms=config.clip_rms > 0) if clipping else optax.identity()
    step = [
        optimizers.direction(config),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed),
        scale_by_density(config.density_exponent),
        *([] if multipliers is None else [scale_by_mup(multipliers)]),
        _scale_by_given_learning_rate(),
    ]
    if config.name == optimizers.SCHEDULE_FREE:
        step = [optimizers.schedule_free(optax.chain(*step), config.beta1)]
    return wrap(optax.chain(clip, *step))


def _decayed(params: Any) -> Any:
    return map_named(lambda name, _: name.endswith(("kernel", "embedding")), params)


def _clip_by_global_norm(most: float, *, rms: bool = False) -> optax.GradientTransformation:
    # By one scalar, which XLA fuses into Adam; the quotient of `optax.clip_by_global_norm` is a pass of its own.
    norm = (lambda g: optax.tree.norm(g) / optax.tree.size(g) ** 0.5) if rms else optax.tree.norm
    return optax.stateless(lambda g, _: optax.tree.scale(jnp.minimum(1.0, most / norm(g)), g))


def _scale_by_given_learning_rate() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **extra: Any) -> tuple[Any, Any]:
        del params, extra
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
