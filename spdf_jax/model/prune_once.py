"""A dense model made sparse at once: by magnitude, or layer by layer by what its linear layers are given (Wanda, SparseGPT).

Inputs are taken where `Linear` is called, whatever linear layers a transformer layer has, and the layers one after the other
where the model would scan over them: each sees what those before it make of the calibration tokens, pruned as they are by then.

Shape legend: B batch, T tokens, D d_model, L layers, N tokens of a batch, P inputs of a matrix, Q its outputs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial, reduce
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.model.gpt import GPT, Layer
from spdf_jax.model.linear import Linear
from spdf_jax.sharding import BATCH_AXES, WIDE_AXIS
from spdf_jax.sparsity.distributions import target_counts
from spdf_jax.sparsity.masks import apply_masks, keep_where, matrix_groups
from spdf_jax.sparsity.one_shot import PRUNING_METHODS, gram, keep_largest, sparsegpt, wanda_scores
from spdf_jax.sparsity.patterns import parse_pattern
from spdf_jax.tree import LINEAR_KERNELS, Filter, map_named, match_filter, named_leaves

#: What a leaf keeps: the same share of zeros in all, or by name, in all its matrices or in each.
Sparsity = float | Mapping[str, float | Sequence[float]]


def prune_once(
    params: Any,
    *,
    sparsity: Sparsity,
    method: str = "magnitude",
    model: GPT | None = None,
    calibration: Iterable[Any] = (),
    distribution: str = "uniform",
    pattern: str = "unstructured",
    filter: Filter = LINEAR_KERNELS,
) -> tuple[Any, Any]:
    """Prunes a trained model, and gives masks as any others: to hold, to move or to drop.

    Args:
      params: any pytree; for ``wanda`` and ``sparsegpt`` the parameters of `model`. On a mesh that ``jax.set_mesh`` set, tokens
        are split over the devices that split a batch, and a matrix's outputs over all of them.
      sparsity: share of zeros, in [0, 1), over all sparse leaves; or ``{leaf name: share}`` for each of them, a number or one a
        layer.
      method: ``magnitude``: the smallest absolute values of every matrix go; ``wanda`` (arXiv 2306.11695): the smallest of
        ``|w| * ||x||`` in every output; ``sparsegpt`` (arXiv 2301.00774): what matters least to the outputs, which the rest is
        corrected to keep.
      model: whose linear layers' inputs are to be seen; ``magnitude`` needs none.
      calibration: batches, each int tokens_BT, or with ``tokens_BT`` and ``segments_BT`` as `spdf_jax.GPT` takes them. The
        papers take 128 sequences of the training text.
      distribution: ``uniform`` | ``er`` | ``erk`` | ``er_qkv``, of a `sparsity` that is one number.
      pattern: ``unstructured`` | ``N:M`` | ``blockB``, see `spdf_jax.sparsity.patterns`.
      filter: which leaves, see `spdf_jax.tree`.

    Returns:
      ``(params, masks)``, of the treedef of `params`: exactly 0 where masks are False, elsewhere as they were but for
      ``sparsegpt``.

    Raises:
      InputError: an unknown method; sparsity, distribution, pattern or filter as `spdf_jax.init_masks` refuses them; no
        calibration tokens; a matrix whose inputs are not seen; inputs that are not finite.

    >>> import jax, spdf_jax as spdf
    >>> model = spdf.GPT(spdf.GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=11, context=4))
    >>> tokens_BT = jax.random.randint(jax.random.key(1), (2, 4), 0, 11)
    >>> params = model.init(jax.random.key(0), tokens_BT)["params"]
    >>> params, masks = prune_once(params, sparsity=0.5, method="wanda", model=model, calibration=[tokens_BT])
    >>> masks["blocks"]["mlp_up"]["kernel"][0].sum(0)[:4].tolist()
    [4, 4, 4, 4]
    """
    if method not in PRUNING_METHODS:
        raise InputError(f"prune_once: method {method!r} is not one of {', '.join(PRUNING_METHODS)}")
    matrices = _matrices(params, sparsity, distribution, pattern, filter)
    if method == "magnitude":
        return _by_magnitude(params, matrices, pattern)
    batches = [_Tokens(getattr(b, "tokens_BT", b), getattr(b, "segments_BT", None)) for b in calibration]
    if not isinstance(model, GPT) or not batches:
        raise InputError(
            f"prune_once: method {method!r} needs a spdf.GPT as model and calibration=[tokens_BT, ...]; for another model, "
            f"spdf.wanda_scores and spdf.sparsegpt take a matrix and what it is given"
        )
    return _by_inputs(model, params, batches, matrices, method, pattern)


class _Tokens(NamedTuple):
    tokens_BT: jax.Array
    segments_BT: jax.Array | None = None


class _Matrices(NamedTuple):
    """The matrices of a leaf: whether they are stacked, the shape of one, and how many weights each keeps."""

    stacked: bool
    shape: tuple[int, ...]
    targets: tuple[int, ...]


def _matrices(params: Any, sparsity: Sparsity, distribution: str, pattern: str, filter: Filter) -> dict[str, _Matrices]:
    groups, decisions = matrix_groups(params, filter), match_filter(filter, params)
    if not isinstance(sparsity, Mapping):
        counts = target_counts(groups, sparsity, distribution, pattern)
        targets = {name: (counts[name],) * group.count for name, group in groups.items()}
    elif distribution != "uniform" or sparsity.keys() != groups.keys():
        raise InputError(
            f"prune_once: sparsity by leaf is for distribution 'uniform', not {distribution!r}, and names all sparse leaves "
            f"and no others: {', '.join(groups)}; it names {', '.join(sparsity)}"
        )
    else:
        shares = {name: _shares(name, sparsity[name], group.count) for name, group in groups.items()}
        targets = {
            name: tuple(target_counts({name: groups[name]}, share, "uniform", pattern)[name] for share in of_leaf)
            for name, of_leaf in shares.items()
        }
    return {name: _Matrices(decisions[name] == "stack", group.shape, targets[name]) for name, group in groups.items()}


def _shares(name: str, given: float | Sequence[float], count: int) -> Sequence[float]:
    shares = given if isinstance(given, Sequence) else (given,) * count
    if len(shares) != count:
        raise InputError(f"prune_once: sparsity of {name}: {len(shares)} shares for {count} layers; give one a layer")
    return shares


def _by_magnitude(params: Any, matrices: Mapping[str, _Matrices], pattern: str) -> tuple[Any, Any]:
    p = parse_pattern(pattern)

    def keep(name: str, leaf: jax.Array) -> jax.Array:
        if name not in matrices:
            return jnp.array(True)
        _, shape, targets = matrices[name]
        axis = p.axis(name, shape)
        scores = jnp.swapaxes(jnp.abs(leaf).reshape(len(targets), *shape), axis, -2)
        kept = jax.vmap(partial(keep_largest, pattern=pattern))(scores, jnp.array(targets))
        return jnp.swapaxes(kept, axis, -2).reshape(leaf.shape)

    masks = map_named(keep, params)
    return apply_masks(params, masks), masks


def _by_inputs(
    model: GPT, params: Any, batches: Sequence[_Tokens], matrices: Mapping[str, _Matrices], method: str, pattern: str
) -> tuple[Any, Any]:
    model = model.clone(config=dataclasses.replace(model.config, remat="none"))  # nothing goes backward
    layer, place = _layer_of(model, params, batches[0])
    stack, prefix = reduce(lambda tree, key: tree[key], place, params), "".join(f"{key}/" for key in place)
    inside, outside = ([name for name in matrices if name.startswith(prefix) == within] for within in (True, False))
    pruned: dict[str, list[tuple[jax.Array, jax.Array]]] = {name: [] for name in matrices}

    def prune(names: list[str], leaves: Mapping[str, jax.Array], seen: Mapping[str, jax.Array]) -> None:
        for name in names:
            i = len(pruned[name])
            if name not in seen:
                raise InputError(
                    f"prune_once: what {name} is given is not seen, since it is no kernel of a linear layer; leave it dense by "
                    f"the filter, or use method 'magnitude'"
                )
            if not jnp.isfinite(seen[name]).all():
                raise InputError(
                    f"prune_once: what {name} is given in layer {i} is not finite; look at params and calibration"
                )
            pruned[name].append(_prune(leaves[name], seen[name], matrices[name].targets[i], method, pattern))

    given = [_given_to_layers(model, params, batch) for batch in batches]
    for i in range(jax.tree.leaves(stack)[0].shape[0]):
        weights = jax.tree.map(lambda leaf, i=i: leaf[i], stack)
        seen = _summed(_seen_in(layer, method, weights, args) for args in given)
        prune(inside, _named(weights, prefix), _named(seen, prefix))
        now = {name.removeprefix(prefix): pruned[name][i][0] for name in inside}
        weights = map_named(lambda name, w, now=now: now.get(name, w), weights)
        given = [(_output_of(layer, weights, args), *args[1:]) for args in given]
    if outside:
        ends = zip(batches, given, strict=True)
        prune(outside, _named(params), _summed(_seen_around(model, method, params, *end) for end in ends))

    def whole(name: str, leaf: jax.Array, part: int) -> jax.Array:
        parts = [found[part] for found in pruned[name]]
        return _stacked(leaf.sharding)(parts) if matrices[name].stacked else parts[0]

    masks = map_named(lambda name, leaf: whole(name, leaf, 1) if name in matrices else jnp.array(True), params)
    return map_named(lambda name, leaf: whole(name, leaf, 0) if name in matrices else leaf, params), masks


def _named(tree: Any, prefix: str = "") -> dict[str, Any]:
    return {prefix + name: leaf for name, leaf in named_leaves(tree)}


def _summed(trees: Iterable[Any]) -> Any:
    return reduce(partial(jax.tree.map, jnp.add), trees)


@cache
def _stacked(sharding: Any) -> Any:
    return jax.jit(jnp.stack, out_shardings=sharding)


def _apply(module: nn.Module, params: Any, args: Any, kinds: Any, answer: Callable[..., Any], **how: Any) -> Any:
    """A module's output, where `answer` speaks for modules of some kinds: ``answer(module, call, *what it is given)``."""

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if context.module.path and isinstance(context.module, kinds) and context.method_name == "__call__":
            return answer(context.module, call, *args)
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return module.apply({"params": params}, *args, **how)


def _layer_of(model: GPT, params: Any, batch: _Tokens) -> tuple[Layer, tuple[str, ...]]:
    """One of the layers that the model scans over, by itself, and where the parameters of all are."""
    found: list[Any] = []

    def answer(layer: Layer, _: Any, x: Any, *more: Any) -> Any:
        names = [f.name for f in dataclasses.fields(Layer) if f.name not in ("parent", "name")]
        found.append(({name: getattr(layer, name) for name in names}, layer.path))
        return x, None

    jax.eval_shape(lambda: _apply(model, params, [batch.tokens_BT], Layer, answer))
    fields, place = found[0]
    return Layer(**fields), place


@partial(jax.jit, static_argnums=0)
def _given_to_layers(model: GPT, params: Any, batch: _Tokens) -> tuple[Any, ...]:
    """What the first layer is given: x_BTD, and what all layers are given alike.

    Layers are called in a loop, out of which nothing comes but what they give: x_BTD itself, to whatever module is next.
    """
    alike: list[Any] = []
    first: list[jax.Array] = []

    def answer(module: nn.Module, call: Any, x: jax.Array, *more: Any) -> Any:
        if isinstance(module, Layer):
            alike.append(more)
            return x, None
        if alike:
            first.append(x)
        return call(x, *more)

    tokens_BT = _split(batch.tokens_BT, 0, BATCH_AXES)
    _apply(model, params, [tokens_BT], nn.Module, answer, segments_BT=batch.segments_BT)
    return first[0], *alike[0]


@partial(jax.jit, static_argnums=0)
def _output_of(layer: Layer, params: Any, args: Any) -> jax.Array:
    return layer.apply({"params": params}, *args)[0]


@partial(jax.jit, static_argnums=(0, 1))
def _seen_in(layer: Layer, method: str, params: Any, args: Any) -> dict[str, jax.Array]:
    """What the method has to know of the inputs of every linear layer, by its kernel's name."""
    seen: dict[str, jax.Array] = {}
    _apply(layer, params, args, Linear, partial(_see, method, seen))
    return seen


@partial(jax.jit, static_argnums=(0, 1))
def _seen_around(model: GPT, method: str, params: Any, batch: _Tokens, args: Any) -> dict[str, jax.Array]:
    """The same of what is no part of the layers, which give what they have given."""
    seen: dict[str, jax.Array] = {}

    def answer(module: nn.Module, call: Any, x: jax.Array, *more: Any) -> Any:
        return (args[0], None) if isinstance(module, Layer) else _see(method, seen, module, call, x, *more)

    _apply(model, params, [batch.tokens_BT], (Layer, Linear), answer, segments_BT=batch.segments_BT)
    return seen


def _see(method: str, seen: dict[str, jax.Array], module: nn.Module, call: Any, x: jax.Array) -> Any:
    name, x_NP = "/".join((*module.path, "kernel")), x.reshape(-1, x.shape[-1])
    found = gram(x_NP) if method == "sparsegpt" else jnp.sum(jnp.square(x_NP.astype(jnp.float32)), axis=0)
    seen[name] = seen[name] + found if name in seen else found
    return call(x)


@partial(jax.jit, static_argnums=(3, 4))
def _prune(
    w_PQ: jax.Array, seen: jax.Array, target: jax.Array | int, method: str, pattern: str
) -> tuple[jax.Array, jax.Array]:
    w_PQ = _split(w_PQ, 1, (*BATCH_AXES, WIDE_AXIS))  # outputs are pruned independently but for the choice of masks
    if method == "sparsegpt":
        return sparsegpt(w_PQ, seen, target, pattern=pattern)
    scores_PQ = wanda_scores(w_PQ, jnp.sqrt(seen))
    mask_PQ = keep_largest(scores_PQ, target, pattern=pattern, by_output=True)
    return keep_where(mask_PQ, w_PQ), mask_PQ


def _split(x: jax.Array, axis: int, mesh_axes: Sequence[str]) -> jax.Array:
    """`x` split along one axis over those of the mesh that divide it, and whole along the others; as it is without a mesh."""
    shape = jax.sharding.get_abstract_mesh().shape
    over: list[str] = []
    for name in mesh_axes:
        parts = math.prod(shape[other] for other in over) * shape.get(name, 1)
        over += [name] if shape.get(name, 1) > 1 and x.shape[axis] % parts == 0 else []
    if not over:
        return x
    return jax.lax.with_sharding_constraint(
        x, PartitionSpec(*(tuple(over) if i == axis else None for i in range(x.ndim)))
    )
