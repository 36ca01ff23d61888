"""S-muPar: initialisation and learning rates that carry over from a narrow dense model to a wide sparse one.

Source: Dey et al. 2024 (arXiv 2405.15743). With ``m_d = d_model / base width`` and density rho, hidden matrices start with
``sigma / sqrt(m_d rho)`` and learn with ``eta / (m_d rho)``, logits are multiplied by ``alpha / m_d``, attention scores are
scaled by ``1 / head width`` instead of its root. Embeddings, norms and biases stay as they are. Derived for random static masks
of one density in every matrix. Off unless `mup_base_width` is set in `spdf_jax.GPTConfig`.

Where the masks drop (SPDF), the network is the same function: factors on logits and queries follow the width alone, and stay.
Hidden matrices then learn with ``eta / m_d``, as a dense matrix does: every phase takes rho from its own sparsity, and
`mup_density` is that of the first phase, for which the parameters are drawn.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from spdf_jax.model.config import GPTConfig, mup_scales
from spdf_jax.tree import LINEAR_KERNELS, Filter, check_same_structure, map_named, match_filter


def mup_multipliers(config: GPTConfig, params: Any, filter: Filter = LINEAR_KERNELS) -> Any:
    """Adam's learning-rate multiplier of every leaf: ``1 / (m_d rho)`` for hidden matrices, 1 elsewhere.

    Args:
      config: `spdf_jax.GPTConfig`.
      params: parameters or their shapes.
      filter: what is not dense under it is a hidden matrix.

    Returns:
      Tree of floats of the treedef of `params`.

    >>> import jax, spdf_jax as spdf
    >>> config = spdf.GPTConfig(d_model=128, mup_base_width=64, mup_density=0.25)
    >>> params = jax.eval_shape(spdf.GPT(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))["params"]
    >>> multipliers = mup_multipliers(config, params)
    >>> multipliers["blocks"]["mlp_up"], multipliers["wte"]
    ({'bias': 1.0, 'kernel': 2.0}, {'embedding': 1.0})
    """
    rate = mup_scales(config).learning_rate
    decisions = match_filter(filter, params)
    return map_named(lambda name, _: 1.0 if decisions[name] == "dense" else rate, params)


def scale_by_mup(multipliers: Any) -> optax.GradientTransformation:
    """Multiplies every leaf's update; belongs after Adam and decoupled weight decay, before the learning rate.

    Scaling the decay with the learning rate is what AdamW with a learning rate a tensor does. Do not combine with another
    scaling by density (`OptimizerConfig.density_exponent`): the multiplier holds ``1 / rho`` already.

    Args:
      multipliers: tree of floats, or a function that makes it from the updates, which have the treedef of the parameters.

    Returns:
      A transformation without state.

    Raises:
      InputError: at its update, when the multipliers have another tree structure.

    >>> import jax.numpy as jnp
    >>> tx = scale_by_mup({"w": 0.5, "b": 1.0})
    >>> updates, _ = tx.update({"w": jnp.ones(2), "b": jnp.ones(2)}, tx.init(None))
    >>> updates["w"].tolist(), updates["b"].tolist()
    ([0.5, 0.5], [1.0, 1.0])
    """
    make: Callable[[Any], Any] = multipliers if callable(multipliers) else lambda _: multipliers

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        factors = make(updates)
        check_same_structure("scale_by_mup: multipliers", factors, updates)
        # A weak-typed float keeps the update's dtype.
        return jax.tree.map(lambda u, factor: u if factor == 1 else factor * u, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
