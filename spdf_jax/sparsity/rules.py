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

import functools
import inspect
import os
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError, line_of, one_line
from spdf_jax.sparsity.select import order_keys
from spdf_jax.sparsity.topk import every_weight, keep_largest_weights
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
    "topk": Rule(moves=False, optimizer=every_weight, choose_each_step=keep_largest_weights),
}
OWN_RULES = dict(RULES)  # this library's


def written_in(part: Any) -> tuple[str, int] | None:
    """The file and line at which a function is written; None of what is no function of Python's."""
    while isinstance(part, functools.partial):
        part = part.func
    code = getattr(inspect.unwrap(part), "__code__", None) if callable(part) else None
    return (code.co_filename, code.co_firstlineno) if code is not None else None


def own_files() -> set[str]:
    """Where the functions of the rules are written that are not this library's."""
    own = (rule for name, rule in RULES.items() if rule is not OWN_RULES.get(name) and isinstance(rule, Rule))
    return {place[0] for rule in own for part in rule if (place := written_in(part))}


def check_rule(name: str) -> None:
    """Refuses what is registered as a rule of the user's own and is none.

    Raises:
      InputError: no `Rule`, a share that is none, or what is to be a function and is none.
    """
    rule = RULES[name]
    if rule is OWN_RULES.get(name):
        return
    if not isinstance(rule, Rule):
        raise InputError(f"sparsity.rule: RULES[{name!r}] is {rule!r}, which is no spdf.Rule")
    for share in ("drop_fraction", "gradient_share", "exploration"):
        value = getattr(rule, share)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"sparsity.rule: the {share} of {name!r} is {value!r}; it must be a number from 0 to 1")
    for function in ("drop_score", "optimizer", "choose_masks", "choose_each_step"):
        value = getattr(rule, function)
        if not callable(value) and not (function.startswith("choose") and value is None):
            raise InputError(f"sparsity.rule: the {function} of {name!r} is {value!r}; it must be a function")


def check_score(name: str, rule: Rule, shapes: Iterable[tuple[int, ...]]) -> None:
    """Refuses a rule of the user's own by whose score no topology step could be taken, before one is.

    Args:
      name: of the rule in `RULES`.
      rule: that rule, as a run has it.
      shapes: of the matrices that its drop score is to be given.

    Raises:
      InputError: the drop score raises, shown with its line, or its result cannot be ranked.

    >>> check_score("mine", Rule(drop_score=lambda weights, grads: abs(weights).sum()), [(8, 8)])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    spdf_jax.errors.InputError: sparsity.rule: the drop_score of 'mine' gives float32[] for weights and grads of shape (8, ...
    """
    library = name in OWN_RULES and RULES[name] is OWN_RULES[name]
    if library or not rule.moves or rule.choose_masks is not None:
        return
    for shape in dict.fromkeys(shapes):
        weights = jax.ShapeDtypeStruct(shape, jnp.float32)
        path, line = written_in(rule.drop_score) or ("", 0)
        try:
            scores: Any = jax.eval_shape(rule.drop_score, weights, weights)
        except Exception as error:
            said = line_of(error, [path]) or f"{os.path.relpath(path)}:{line}: " * bool(path) + one_line(error)
            raise InputError(
                f"sparsity.rule: the drop_score of {name!r} fails on weights and grads of shape {shape}: {said}"
            ) from error
        if not isinstance(scores, jax.ShapeDtypeStruct) or scores.shape != shape:
            given = ", ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(scores)) or "nothing"
            raise InputError(
                f"sparsity.rule: the drop_score of {name!r} gives {given} for weights and grads of shape {shape}; it must give "
                f"a score a weight, in an array of that shape"
            )
        try:
            jax.eval_shape(order_keys, scores)
        except InputError as error:
            raise InputError(f"sparsity.rule: the drop_score of {name!r}: {error}") from None
