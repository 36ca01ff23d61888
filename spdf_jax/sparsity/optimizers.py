"""The optimisers of a run by name, and how to add one.

Each is a *direction*: what optax calls ``scale_by_...``, from a gradient to what a step goes against. Clipping, weight decay,
the learning rate and the masks are the run's (`spdf_jax.optim.make_optimizer`), the same around every direction. One of your
own is one more entry of `OPTIMIZERS`, a function of the phase's `spdf_jax.optim.OptimizerConfig`:

>>> OPTIMIZERS["mine"] = lambda config: optax.scale_by_belief(config.beta1, config.beta2)

It trains under ``config.pretrain.optimizer.name = "mine"``, with every rule, schedule and mesh:

>>> from spdf_jax.optim import OptimizerConfig, make_optimizer
>>> tx, params = make_optimizer(OptimizerConfig(name="mine")), {"w": jnp.ones(2)}
>>> masks = {"w": jnp.array([True, False])}
>>> updates, _ = tx.update({"w": jnp.ones(2)}, tx.init(params), params, masks=masks, learning_rate=0.5)
>>> after = optax.apply_updates(params, updates)["w"]
>>> bool(after[0] < 1), float(after[1])
(True, 0.0)
>>> del OPTIMIZERS["mine"]
"""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from spdf_jax.errors import InputError
from spdf_jax.fields import Used
from spdf_jax.sparsity import rules
from spdf_jax.sparsity.masks import keep_where
from spdf_jax.tree import LINEAR_KERNELS, map_named

#: From the settings of a phase to a direction.
Factory = Callable[[Any], optax.GradientTransformation]
SCHEDULE_FREE = "schedule_free_adamw"
ADAMS = ("adamw", "muon", SCHEDULE_FREE)  # Adam's settings count in these


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

    SMET (ICML 2026, arXiv 2606.00888) gives every weight its own step count. Three faults of its public code are not copied:
    there the warm-up shrinks the moment itself and so compounds, the learning-rate scale compounds over parameters, and weight
    decay is coupled.

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


def scale_by_hidden_muon(momentum: float, beta1: float, beta2: float, eps: float) -> optax.GradientTransformation:
    """Muon on the matrices inside the layers, Adam on all else: embeddings, head, biases, norms.

    A matrix's update is its Nesterov momentum with all singular values brought near 1 (five Newton-Schulz steps), layer by
    layer. Times ``0.2 sqrt(max(fan in, fan out))`` (Liu et al. 2025, arXiv 2502.16982, section 2.2) its entries are of the size
    of AdamW's, so that one learning rate and one weight decay do for both.

    **Under masks** the orthogonal matrix is made from the momentum of the active weights, zeros elsewhere, and masked
    afterwards, so that it is orthogonal no more. Of random masks at 75 %, two thirds to nine tenths of its squared norm stay; a
    step turns towards the plain momentum (cosine 0.9 and more, where a dense one of low rank has 0.3), and an active weight
    moves nearly ``1 / sqrt(density)`` times as far as in a dense matrix: a sparse phase may want a lower rate. It still goes
    along the momentum, never against it. Newton-Schulz steps are of the whole matrix, whatever its zeros, and the FLOP counter,
    which counts the model alone, does not see them.

    Args:
      momentum: of the matrices.
      beta1, beta2, eps: Adam's, of all else.

    Returns:
      A transformation; its state is one number a weight, and Adam's second where that steps.

    >>> params = {"blocks": {"kernel": jnp.eye(4)[None]}, "wte": {"embedding": jnp.eye(4)}}
    >>> tx = scale_by_hidden_muon(0.95, 0.9, 0.95, 1e-8)
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> round(float(updates["blocks"]["kernel"].max()), 1), updates["wte"]["embedding"][0].round(1).tolist()
    (0.3, [1.0, 0.0, 0.0, 0.0])
    """

    def labels(params: Any) -> Any:
        hidden = LINEAR_KERNELS[0][0]
        return map_named(lambda name, _: "matrix" if re.search(hidden, name) else "other", params)

    def axes(updates: Any) -> Any:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), updates)

    def as_large_as_adams(update: jax.Array) -> jax.Array:
        return 0.2 * max(update.shape[-2:]) ** 0.5 * update

    muon = contrib.scale_by_muon(beta=momentum, weight_dimension_numbers=axes)
    sized = optax.stateless(lambda updates, _: jax.tree.map(as_large_as_adams, updates))
    return optax.partition(
        {"matrix": optax.chain(muon, sized), "other": optax.scale_by_adam(beta1, beta2, eps)}, labels
    )


def scale_by_adafactor() -> optax.GradientTransformation:
    """Adafactor without momentum (Shazeer & Stern 2018, arXiv 1804.04235): relative steps, second moments by row and column.

    Rows and columns of tensors of which two axes are 128 or longer, one number a weight of others. At a topology step rows and
    columns stay as they are: no weight has a share of them that could be reset, and one that grows is measured by its
    neighbours in the row and the column, as every other. Means over a tensor (a matrix of all layers) count its zeros; where
    these are spread evenly that cancels, as it makes a step's divisor and a tensor's size smaller alike.

    Returns:
      A transformation.

    >>> tx, params = scale_by_adafactor(), {"w": jnp.full((256, 128), 0.5)}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> float(updates["w"].mean().round(2)), state[0].v_row["w"].shape, state[0].v_col["w"].shape
    (0.5, (128,), (256,))
    """
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def schedule_free(step: optax.GradientTransformation, beta1: float) -> optax.GradientTransformationExtraArgs:
    """Schedule-free learning (Defazio et al. 2024, arXiv 2405.15682) around a step without momentum.

    Gradients are taken at the parameters y; the steps move z, kept in the state; what is evaluated, exported and fine-tuned is
    their average x, of which ``y = beta1 x + (1 - beta1) z``: `spdf_jax.TrainState.averaged`.

    Args:
      step: from gradients to what is added to the parameters.
      beta1: above 0.

    Returns:
      `optax.contrib.schedule_free` with the learning rate as the keyword extra ``learning_rate``.

    >>> tx, params = schedule_free(optax.scale(-0.5), 0.9), {"w": jnp.ones(2)}
    >>> updates, state = tx.update(params, tx.init(params), params, learning_rate=0.5)
    >>> optax.contrib.schedule_free_eval_params(state, optax.apply_updates(params, updates))["w"].tolist()
    [0.5, 0.5]
    """

    def at(learning_rate: Any) -> optax.GradientTransformationExtraArgs:
        return contrib.schedule_free(step, learning_rate, beta1)

    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **extra: Any) -> tuple[Any, Any]:
        return at(learning_rate).update(updates, state, params, learning_rate=learning_rate, **extra)

    return optax.GradientTransformationExtraArgs(at(0.0).init, update)


def _adam(config: Any) -> optax.GradientTransformation:
    adam = config.beta1, config.beta2, config.eps
    if config.regrowth == "smet":
        return scale_by_smet_adam(*adam, warmup_steps=config.regrowth_warmup_steps)
    return optax.scale_by_adam(*adam)


OPTIMIZERS: dict[str, Factory] = {
    "adamw": _adam,
    "muon": lambda c: scale_by_hidden_muon(c.momentum, c.beta1, c.beta2, c.eps),
    "lion": lambda c: optax.scale_by_lion(c.beta1, c.beta2),
    "adafactor": lambda c: scale_by_adafactor(),
    "sgd": lambda c: optax.trace(c.beta1),
    # As optax.contrib.schedule_free_adamw: no momentum inside, since averaging takes its place.
    SCHEDULE_FREE: lambda c: optax.scale_by_rms(c.beta2, c.eps, eps_in_sqrt=False, bias_correction=True),
}
OWN_OPTIMIZERS = dict(OPTIMIZERS)  # this library's
#: What reads a whole matrix or the size of one, of which live blocks alone are not enough.
WHOLE = ("muon", "adafactor")
#: What reads values of parameters, which Top-KAST gives otherwise than they are.
READS_VALUES = ("adafactor", SCHEDULE_FREE)


def used_by(*names: str) -> Used:
    """Used by some of this library's optimisers, and maybe by any other."""
    return Used(lambda config: config.name in names or is_own(config.name), f"name {' or '.join(map(repr, names))}")


def is_own(name: str) -> bool:
    """Whether an optimiser is not this library's, or no more what it is there."""
    return OPTIMIZERS.get(name) is not OWN_OPTIMIZERS.get(name)


def own_files() -> set[str]:
    """Where the optimisers and the functions of the rules are written that are not this library's."""
    own = (factory for name, factory in OPTIMIZERS.items() if is_own(name))
    return rules.own_files() | {place[0] for factory in own if (place := rules.written_in(factory))}


def check_optimizer(config: Any) -> None:
    """Refuses settings of an `spdf_jax.optim.OptimizerConfig` that do not go with its `name`.

    Raises:
      InputError: SMET's moments without Adam; a schedule-free optimiser with a schedule, or without averaging.
    """
    name = config.name
    if config.regrowth == "smet" and name != "adamw":
        raise InputError(f"optimizer.regrowth: 'smet' is Adam's and {name!r} is not; use 'reset', or name 'adamw'")
    if name == SCHEDULE_FREE and config.schedule != "constant":
        raise InputError(
            f"optimizer.schedule: {config.schedule!r} lowers the learning rate of {name!r}, which averages its steps instead; "
            f"use 'constant'"
        )
    if name == SCHEDULE_FREE and config.beta1 == 0:
        raise InputError(f"optimizer.beta1: 0.0 leaves {name!r} nothing to average; use 0.9")


def direction(config: Any) -> optax.GradientTransformation:
    """What an `spdf_jax.optim.OptimizerConfig` names.

    Raises:
      InputError: an optimiser of the user's own that is no function to a transformation, or whose updates do not go along the
        gradient, as those of ``optax.adam(1e-3)`` do not, which is a whole optimiser.

    >>> from spdf_jax.optim import OptimizerConfig
    >>> OPTIMIZERS["mine"] = lambda config: optax.adam(1e-3)
    >>> direction(OptimizerConfig(name="mine"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    spdf_jax.errors.InputError: optimizer.name: the updates of OPTIMIZERS['mine'] go against the gradient; give a direction, ...
    >>> del OPTIMIZERS["mine"]
    """
    factory, what = OPTIMIZERS[config.name], f"optimizer.name: OPTIMIZERS[{config.name!r}]"
    if not is_own(config.name):
        return factory(config)
    if not callable(factory) or isinstance(factory, optax.GradientTransformation):
        raise InputError(
            f"{what} is {factory!r}, not a function of the phase's optimizer section; write lambda config: ..."
        )
    made = factory(config)
    if not isinstance(made, optax.GradientTransformation):
        raise InputError(f"{what} gives {made!r}, which is no optax transformation such as optax.scale_by_adam()")
    params = {"blocks": {"kernel": jnp.ones((1, 2, 2))}}
    try:
        masks, tx = jax.tree.map(lambda p: jnp.array(True), params), optax.with_extra_args_support(made)
        updates, _ = tx.update(params, tx.init(params), params, masks=masks, learning_rate=jnp.ones(()))
    except Exception:  # made for the model's own parameters: it is met there, with its line
        return made
    if optax.tree.vdot(updates, params) < 0:
        raise InputError(
            f"optimizer.name: the updates of OPTIMIZERS[{config.name!r}] go against the gradient; give a direction, such as "
            f"optax.scale_by_adam() for optax.adam: the run has its own learning rate, weight decay and clipping"
        )
    return made
