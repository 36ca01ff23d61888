"""Next-token cross-entropy."""

from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(logits_BTV: Any, targets_BT: Any, weights_BT: Any) -> jax.Array:
    """Sum of weighted token losses, in nats.

    Args:
      logits_BTV: any float dtype; computed in float32.
      targets_BT: int token ids.
      weights_BT: float32; 0 leaves a token out.

    Returns:
      float32 scalar; divide by ``weights_BT.sum()`` for the mean.

    >>> import jax.numpy as jnp
    >>> float(cross_entropy(jnp.zeros((1, 2, 4)), jnp.zeros((1, 2), int), jnp.array([[1.0, 0.0]])))  # ln 4
    1.3862943649291992
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_logit_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum((log_z_BT - target_logit_BT) * weights_BT)
