"""A model called under masks."""

from typing import Any

import flax.linen as nn
import jax

from spdf_jax.sparsity.masks import apply_masks


def forward(model: nn.Module, params: Any, tokens_BT: jax.Array, *, masks: Any, **options: Any) -> Any:
    """Logits of a model under masks.

    Args:
      model: `GPT`, or any Linen module called on tokens.
      params: its parameters.
      tokens_BT: int ids.
      masks: mask tree, see `spdf_jax.init_masks`; `spdf_jax.dense_masks(params)` for none.
      **options: passed to the model: ``pattern``, ``width``, ``deterministic``, ``rngs``.

    Returns:
      logits_BTV in the compute dtype.

    Raises:
      InputError: masks that do not fit the parameters, or a sequence longer than the model's context.

    >>> import jax, spdf_jax as spdf
    >>> model = spdf.GPT(spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=11, context=4))
    >>> tokens_BT = jax.numpy.zeros((1, 4), int)
    >>> params = model.init(jax.random.key(0), tokens_BT)["params"]
    >>> spdf.forward(model, params, tokens_BT, masks=spdf.init_masks(jax.random.key(1), params, sparsity=0.75)).shape
    (1, 4, 11)
    """
    return model.apply({"params": apply_masks(params, masks)}, tokens_BT, **options)
