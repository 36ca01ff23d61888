"""The topology rules by name, and how to add one.

A new rule is one more `spdf_jax.Rule` in `RULES`; the training loop, the steps and the configuration know it by its name.
Dropping by ``|w g|``, the first-order change of the loss (Molchanov et al. 2017, arXiv 1611.06440), and growing half by
gradient:

>>> import jax, jax.numpy as jnp
>>> from spdf_jax.sparsity.masks import init_masks
>>> from spdf_jax.sparsity.programme import SparsityConfig
>>> from spdf_jax.sparsity.topology import prune_and_grow_tree
>>> def first_order(weights, grads):
...     return jnp.abs(weights * grads)
>>> RULES["mine"] = Rule(drop_score=first_order, gradient_share=0.5)

It trains under ``config.pretrain.sparsity.rule = "mine"``, with every schedule, distribution and pattern:

>>> config = SparsityConfig(rule="mine", sparsity=0.5, pattern="2:4")

One topology step by hand: half of the 32 active weights go, as many come back, and 2 of every 4 stay active.

>>> params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
>>> grads = {"kernel": jax.random.normal(jax.random.key(1), (8, 8))}
>>> masks = init_masks(jax.random.key(2), params, sparsity=0.5, filter=[("kernel", "matrix")], pattern="2:4")
>>> new = prune_and_grow_tree(
...     jax.random.key(3), params, grads, masks,
...     target_nnz={"kernel": jnp.array([32])}, drop_fraction=0.5, rule=config.topology_rule,
... )
>>> int(new["kernel"].sum()), bool((new["kernel"] != masks["kernel"]).any())
(32, True)
>>> bool((new["kernel"].reshape(2, 4, 8).sum(1) == 2).all())
True
>>> del RULES["mine"]
"""

import jax
import jax.numpy as jnp

from spdf_jax.sparsity.topkast import choose_by_magnitude, explore
from spdf_jax.sparsity.topology import Rule


def magnitude_and_gradient(weights: jax.Array, grads: jax.Array) -> jax.Array:
    """``|w| + lambda |g|`` (MEST, arXiv 2110.14032). lambda = 1 is our choice; another one is another function."""
    return jnp.abs(weights) + jnp.abs(grads)


def sensitivity(weights: jax.Array, grads: jax.Array) -> jax.Array:
    """``|w / g|``, offered by MST's code; a weight of 0 scores 0 whatever its gradient."""
    return jnp.where(weights == 0, jnp.zeros((), weights.dtype), jnp.abs(weights / grads))


RULES: dict[str, Rule] = {
    "static": Rule(moves=False, schedules=("constant",)),
    "set": Rule(gradient_share=0.0),
    "rigl": Rule(gradient_share=1.0),
    "mst": Rule(gradient_share=0.75),  # r/(r+1) with r = 3 in the authors' code
    "mest": Rule(gradient_share=0.0, drop_score=magnitude_and_gradient),
    "sensitivity": Rule(gradient_share=0.75, drop_score=sensitivity),
    # Nothing is exchanged: the schedule alone prunes, and AC/DC's dense turns bring everything back.
    "gmp": Rule(drop_fraction=0.0, gradient_share=1.0, schedules=("cubic", "table")),
    "acdc": Rule(drop_fraction=0.0, gradient_share=1.0, schedules=("alternate",)),
    "topkast": Rule(drop_fraction=0.0, exploration=0.3, optimizer=explore, choose_masks=choose_by_magnitude),
}
OWN_RULES = dict(RULES)  # this library's
