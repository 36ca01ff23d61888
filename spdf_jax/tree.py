"""Pytrees by name: readable leaf paths and ordered regex filters.

A *filter* decides per leaf, a *mask* per element. A filter is a sequence of ``(pattern, decision)`` pairs, searched in
order with `re.search` on the leaf's path; the first match wins. The decisions are

* ``"dense"``: never masked;
* ``"matrix"``: one weight tensor, masked as a whole;
* ``"stack"``: the leading axis counts layers, each slice is a weight matrix masked by itself (layer-scanned models);
* ``"matrices"``: a stack where there are three axes or more and the layers are not in a list (no index in the path, such as
  ``blocks/0/kernel``), else one matrix: what a filter for layers of either kind says.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu
import optax

from spdf_jax.errors import InputError

Filter = Sequence[tuple[str, str]]
DECISIONS = ("dense", "matrix", "stack", "matrices")

#: Every linear kernel inside the layers of `spdf_jax.GPT`; embeddings, norms, biases and head stay dense
#: (SPDF, section 2; arXiv 2303.10464). Matrices of another model that it does not name are refused, not left dense.
LINEAR_KERNELS: Filter = (
    (r"^blocks/.*kernel$", "matrices"),
    (r"^(wte|wpe|bigram)/embedding$|^head/kernel$|(^|/)(bias|scale|taps|sink)$", "dense"),
)
#: The same and the output head, tied (``wte/embedding``) or not: what the MST code does (hupihe/Mixed-Sparsity-Training).
LINEAR_KERNELS_AND_TIED_HEAD: Filter = ((r"^wte/embedding$", "matrix"), *LINEAR_KERNELS)
LINEAR_KERNELS_AND_HEAD: Filter = ((r"^head/kernel$", "matrix"), *LINEAR_KERNELS)


def path_name(path: Sequence[Any]) -> str:
    """A key path of `jax.tree_util` as ``"blocks/attn_q/kernel"``, whatever containers it runs through.

    Boxes around an array (`flax.nnx.Param`, Linen's partitioning metadata) end in ``.value``; the name leaves it out.
    """
    if len(path) > 1 and path[-1] == jtu.GetAttrKey("value"):
        path = path[:-1]
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def named_leaves(tree: Any) -> list[tuple[str, Any]]:
    """All leaves in tree order as ``(name, leaf)``."""
    return [(path_name(path), leaf) for path, leaf in jtu.tree_leaves_with_path(tree)]


def map_named(f: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function receives the leaf's name first."""
    return jtu.tree_map_with_path(lambda path, *leaves: f(path_name(path), *leaves), tree, *rest)


def match_filter(filter: Filter, params: Any) -> dict[str, str]:
    """The decision for every leaf of `params`.

    Args:
      filter: ordered ``(pattern, decision)`` pairs.
      params: any pytree of arrays (or of shapes).

    Returns:
      ``{leaf name: "dense" | "matrix" | "stack"}`` in tree order.

    Raises:
      InputError: an unknown decision; a pattern that matches no leaf; a leaf of two or more dimensions that no pattern
        matches (leaves of fewer dimensions are dense unless a pattern says otherwise).

    >>> import numpy as np
    >>> match_filter([("w$", "matrix")], {"w": np.ones((2, 3)), "b": np.ones(3)})
    {'b': 'dense', 'w': 'matrix'}
    """
    leaves = named_leaves(params)
    names = [name for name, _ in leaves]
    pairs = list(filter) if isinstance(filter, Sequence) and not isinstance(filter, str) else [None]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise InputError(f"filter: {filter!r} is no sequence of pairs such as ('kernel$', 'matrix')")
    for pattern, decision in filter:
        if decision not in DECISIONS:
            raise InputError(f"filter: decision {decision!r} of pattern {pattern!r} is not one of {DECISIONS}")
        if not any(re.search(pattern, name) for name in names):
            raise InputError(f"filter: pattern {pattern!r} matches no leaf; the leaves are {', '.join(names)}")
    decisions, unnamed = {}, []
    for name, leaf in leaves:
        shape = tuple(leaf.shape)
        found = next((decision for pattern, decision in filter if re.search(pattern, name)), None)
        if found is None and len(shape) >= 2:
            unnamed.append(f"{name!r} of shape {shape}")
        if found in ("stack", "matrices") and len(shape) < 2:
            raise InputError(f"filter: leaf {name!r} of shape {shape} has no layers to stack; use 'matrix'")
        if found == "matrices":
            found = "stack" if len(shape) >= 3 and not re.search(r"(^|/)\d+/", name) else "matrix"
        decisions[name] = found or "dense"
    if unnamed:
        raise InputError(
            f"filter: no pattern matches leaf {', '.join(unnamed)}; say 'matrix', 'stack' or 'dense' for each, or end the "
            f"filter with ('.*', 'dense')"
        )
    return decisions


def same_structure(tree: Any, other: Any) -> bool:
    """Whether two trees have one treedef."""
    return str(jax.tree.structure(tree)) == str(jax.tree.structure(other))


def check_same_structure(what: str, tree: Any, params: Any) -> None:
    """Raises `InputError` naming the first difference when `tree` has not the treedef of `params`."""
    if same_structure(tree, params):
        return
    ours, theirs = ({name for name, _ in named_leaves(t)} for t in (tree, params))
    missing, extra = sorted(theirs - ours), sorted(ours - theirs)
    if not missing and not extra:
        kinds = " and ".join(sorted({type(tree).__name__, type(params).__name__}))
        raise InputError(
            f"{what} must have the tree structure of the parameters; the leaves have the same names, but their containers "
            f"or the boxes around them differ ({kinds}). Bring both to one kind, such as by flax.nnx.as_pure or to_pure_dict"
        )
    raise InputError(
        f"{what} must have the tree structure of the parameters; missing {missing[:3]}, not in the parameters {extra[:3]}. "
        f"Make them with spdf_jax.init_masks(key, params, ...)"
    )


def is_absent(leaf: Any) -> bool:
    """Whether `optax.masked` or `partition` keeps nothing for a weight in this place of a tree."""
    return isinstance(leaf, optax.MaskedNode)


def along_state(tx: optax.GradientTransformation, state: Any, values: Any, elsewhere: Any) -> Any:
    """One value a weight tensor, laid along an optimiser's state: the only place that knows which state is whose.

    Found by following shapes (`optax.tree.map_params`), so it holds for any optax optimiser and any wrapper around it.

    Args:
      tx: the transformation that made `state`.
      state: its state (arrays or shapes).
      values: tree of the parameters' structure.
      elsewhere: for the leaves of the state that follow no parameter: counts, hyperparameters.

    Returns:
      A tree of the structure of `state`; where it repeats the tree of the parameters, `values`.

    >>> import jax.numpy as jnp
    >>> tx = optax.trace(0.9)
    >>> along_state(tx, tx.init({"w": jnp.ones(2)}), {"w": "momentum of w"}, "").trace
    {'w': 'momentum of w'}
    """

    def follow(leaf: Any, value: Any) -> Any:
        return leaf if is_absent(leaf) else value

    try:
        return optax.tree.map_params(
            tx, follow, state, values, transform_non_params=lambda _: elsewhere, is_leaf=is_absent
        )
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise InputError(
            f"the state of {optimizer_name(tx)} cannot be followed weight by weight: it is laid out otherwise than the tree of "
            f"the parameters; use an optimiser with element-wise state, or spdf_jax.sparse(..., moving=False) if the masks "
            f"never move"
        ) from error


def follow_shapes(tx: optax.GradientTransformation, params: Any) -> tuple[Any, Any]:
    """The shapes of an optimiser's state, and of each whether it is one number a weight (or one for a whole tensor).

    A shape may fit by accident, as that of a preconditioner of a square weight does: so the state is made for weights of two
    other shapes too, which it must fit as well.

    Args:
      tx: the transformation.
      params: parameters (arrays or shapes).

    Returns:
      Shapes and bools, trees of the structure of the state.

    >>> import jax.numpy as jnp
    >>> follow_shapes(optax.trace(0.9), {"w": jnp.ones((2, 2))})[1].trace
    {'w': True}
    """

    def made_for(more: Callable[[int, int], int]) -> tuple[Any, Any]:
        def reshaped(p: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(tuple(n + more(i, len(p.shape)) for i, n in enumerate(p.shape)), p.dtype)

        shapes = jax.tree.map(reshaped, params)
        state = jax.eval_shape(tx.init, shapes)
        along = along_state(tx, state, shapes, None)
        return state, jax.tree.map(lambda x, w: w is None or x.shape == w.shape or x.size == 1, state, along)

    state, fits = made_for(lambda i, rank: 0)
    for more in (lambda i, rank: 1 + i, lambda i, rank: rank - i):
        try:
            _, others = made_for(more)
        except (TypeError, ValueError):  # made for these very shapes: nothing to compare with
            continue
        if same_structure(others, fits):  # not where the shapes decide what is kept at all
            fits = jax.tree.map(lambda a, b: a and b, fits, others)
    return state, fits


def optimizer_name(tx: Any) -> str:
    """The constructors that made a transformation, as far as its functions tell.

    >>> optimizer_name(optax.adam(0.1))
    'scale_by_adam, scale'
    """
    found: dict[Any, str] = {}  # by function

    def walk(thing: Any) -> None:
        if isinstance(thing, optax.GradientTransformation):
            walk(thing.update)
        elif isinstance(thing, list | tuple):
            for part in thing:
                walk(part)
        elif "update" in getattr(thing, "__name__", "") and thing not in found:
            found[thing] = thing.__qualname__.split(".")[0]
            walk([cell.cell_contents for cell in getattr(thing, "__closure__", None) or ()])

    walk(tx)
    names = dict.fromkeys(name for name in found.values() if name not in ("chain", "with_extra_args_support"))
    return ", ".join(names) or "the optimiser"
