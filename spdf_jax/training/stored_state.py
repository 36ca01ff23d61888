"""A state as checkpoints hold it: masks packed to one bit a weight, and a checksum of every array, the same on every mesh."""

import hashlib
import json
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.sparsity.mask_files import pack_masks, unpack_masks
from spdf_jax.training.state import TrainState
from spdf_jax.tree import named_leaves


def is_mask(leaf: jax.Array) -> bool:
    """Whether a leaf is stored in bits."""
    return leaf.ndim > 0 and leaf.dtype == bool


def pack(state: TrainState) -> TrainState:
    """With every mask in bits: those of an optimiser too, such as Top-KAST's explored set."""
    return jax.tree.map(lambda leaf: pack_masks(leaf) if is_mask(leaf) else leaf, state)


def unpack(packed: TrainState, abstract: TrainState, shardings: TrainState) -> TrainState:
    """Inverse of `pack`, laid out by `shardings`; `abstract` gives the shapes."""
    leaves, wanted, layout = (jax.tree.leaves(tree) for tree in (packed, abstract, shardings))
    where = [i for i, leaf in enumerate(wanted) if is_mask(leaf)]
    to_masks = _unpacking(*(tuple(each[i] for i in where) for each in (wanted, layout)))
    for i, mask in zip(where, to_masks([leaves[i] for i in where]), strict=True):
        leaves[i] = mask
    return jax.tree.unflatten(jax.tree.structure(packed), leaves)


@lru_cache(maxsize=4)
def _unpacking(wanted: tuple[Any, ...], layout: tuple[Any, ...]) -> Any:
    return jax.jit(lambda bits: unpack_masks(bits, [*wanted]), out_shardings=[*layout])


def plain(packed: TrainState) -> TrainState:
    """With the key as the integers that orbax writes."""
    return packed.replace(key=jax.random.key_data(packed.key))


def shapes(tree: Any) -> dict[str, list[Any]]:
    """``{leaf name: [shape]}``."""
    return {name: [list(leaf.shape)] for name, leaf in named_leaves(tree)}


def examined(packed: TrainState) -> tuple[bool, dict[str, list[Any]]]:
    """Whether all numbers are finite, and ``{leaf name: [shape, checksum]}``."""
    finite, checksums = jax.device_get(_examine(packed))
    return bool(finite), {name: [*shape, int(checksums[name])] for name, shape in shapes(plain(packed)).items()}


def fingerprint(state: TrainState) -> str:
    """A hash of every number of a state, the same on every mesh."""
    return hashlib.sha256(json.dumps(examined(pack(state))[1], sort_keys=True).encode()).hexdigest()


@jax.jit
def _examine(packed: TrainState) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The numbers of `examined`."""
    leaves = named_leaves(plain(packed))
    finite = [jnp.all(jnp.isfinite(leaf)) for _, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return jnp.all(jnp.stack(finite)), {name: _checksum(leaf) for name, leaf in leaves}


def _checksum(array: jax.Array) -> jax.Array:
    """Sum of a hash of every element with its place, modulo 2^32: the same on every mesh, and computed where the shards are.

    The hash is one-to-one in the element (multiply by odd, xor with a shift), so that no change of one element goes unseen.
    """
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    bits = array if array.dtype == bool else jax.lax.bitcast_convert_type(array, unsigned)
    mixed = bits.astype(jnp.uint32)
    for axis in range(array.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        mixed = (mixed ^ place) * jnp.uint32(0x9E3779B1)
        mixed = mixed ^ (mixed >> 15)
    return jnp.sum(mixed, dtype=jnp.uint32)
