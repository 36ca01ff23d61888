"""Masks in few bytes: one bit a weight, in a checkpoint or in a file to share."""

import json
import math
import zlib
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from spdf_jax.errors import InputError, reading
from spdf_jax.tree import map_named, named_leaves
from spdf_jax.workdir import write_atomically

#: Key and version of the metadata that makes a safetensors file a mask file.
MASK_FORMAT, MASK_FORMAT_VERSION = "spdf_jax.masks", 1


#: Of the masks of a model, in the folder of a Hugging Face model.
MASK_FILE = "masks.safetensors"


def pack_masks(masks: Any) -> Any:
    """Element masks as uint8 with 8 weights a byte along the last axis; 0-d leaves stay bool."""
    return jax.tree.map(lambda m: m if m.ndim == 0 else jnp.packbits(m, axis=-1), masks)


def unpack_masks(packed: Any, params: Any) -> Any:
    """Inverse of `pack_masks`; `params` gives the shapes."""
    return jax.tree.map(
        lambda b, p: b if b.ndim == 0 else jnp.unpackbits(b, axis=-1, count=p.shape[-1]).astype(bool), packed, params
    )


def save_masks(path: str | PathLike[str], masks: Any) -> None:
    """Writes masks to a safetensors file, one bit a weight, readable without this library.

    Each element mask is a uint8 tensor under its leaf's name: `numpy.packbits` of the mask in row-major order. The file's
    metadata hold one JSON text under ``spdf_jax.masks``: the format version, and for every leaf its shape and the CRC-32 of
    its bytes. Dense leaves have shape [] and no tensor.

    Args:
      path: replaced as a whole if it exists; by convention ``*.safetensors``.
      masks: mask tree.

    Raises:
      InputError: two leaves of one name.

    >>> import tempfile, pathlib, jax, jax.numpy as jnp
    >>> from spdf_jax.sparsity.masks import init_masks
    >>> params = {"w": jnp.ones((64, 64)), "b": jnp.ones(64)}
    >>> masks = init_masks(jax.random.key(0), params, sparsity=0.75, filter=[("w", "matrix")])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(pathlib.Path(folder) / "masks.safetensors", masks)
    ...     loaded = load_masks(pathlib.Path(folder) / "masks.safetensors", params)
    >>> bool((loaded["w"] == masks["w"]).all()), loaded["b"].shape
    (True, ())
    """
    leaves = dict(named_leaves(masks))
    if len(leaves) < len(jax.tree.leaves(masks)):
        raise InputError("save_masks: two leaves have one name; rename one of them")
    packed = {name: np.packbits(np.asarray(mask).reshape(-1)) for name, mask in leaves.items() if mask.ndim}
    index = {
        name: {"shape": list(mask.shape), "crc32": zlib.crc32(packed[name].tobytes()) if name in packed else 0}
        for name, mask in leaves.items()
    }
    text = json.dumps({"version": MASK_FORMAT_VERSION, "leaves": index})
    write_atomically(Path(path), save(packed, metadata={MASK_FORMAT: text}))


def load_masks(path: str | PathLike[str], params: Any) -> Any:
    """Reads masks written by `save_masks`, for these parameters and no others.

    Args:
      path: a mask file.
      params: pytree of arrays or shapes.

    Returns:
      Mask tree of the treedef of `params`.

    Raises:
      InputError: no file, no mask file, a damaged one, one of another format version, or one of other parameters; names
        the leaf and the shapes.

    >>> import tempfile, pathlib, jax.numpy as jnp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_masks(pathlib.Path(folder) / "masks.safetensors", {"w": jnp.array([[True, False]])})
    ...     load_masks(pathlib.Path(folder) / "masks.safetensors", {"w": jnp.ones((1, 2))})["w"].tolist()
    [[True, False]]
    """
    with (
        reading(f"{path}: not a readable mask file", "get the file again"),
        safe_open(path, framework="numpy") as file,
    ):
        index = _mask_index(path, file.metadata())
        packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    wanted = dict(named_leaves(params))
    missing, extra = sorted(wanted.keys() - index.keys()), sorted(index.keys() - wanted.keys())
    if missing or extra:
        raise InputError(
            f"{path}: masks of other parameters; without {', '.join(missing[:3]) or 'nothing'}, "
            f"with {', '.join(extra[:3]) or 'nothing'} besides"
        )

    def load(name: str, leaf: Any) -> jax.Array:
        shape, crc32 = index[name]
        if not shape:
            return jnp.array(True)
        if shape != tuple(leaf.shape):
            raise InputError(f"{path}: the mask of {name} has shape {shape}, the parameter {tuple(leaf.shape)}")
        data = packed.get(name)
        if data is None or data.shape != (-(-math.prod(shape) // 8),) or zlib.crc32(data.tobytes()) != crc32:
            raise InputError(f"{path}: the mask of {name}, shape {shape}, is damaged; get the file again")
        return jnp.asarray(np.unpackbits(data, count=math.prod(shape)).reshape(shape).astype(bool))

    return map_named(load, params)


def _mask_index(path: str | PathLike[str], metadata: dict[str, str] | None) -> dict[str, tuple[tuple[int, ...], int]]:
    """``{leaf name: (shape, crc32)}`` from a mask file's metadata."""
    if MASK_FORMAT not in (metadata or {}):
        raise InputError(f"{path}: a safetensors file, but not of masks; write them with spdf_jax.save_masks")
    with reading(f"{path}: the mask file's index is damaged", "get the file again"):
        index = json.loads((metadata or {})[MASK_FORMAT])
        if index["version"] != MASK_FORMAT_VERSION:
            raise InputError(
                f"{path}: mask format version {index['version']}; this library reads {MASK_FORMAT_VERSION}, update it"
            )
        found = {name: (tuple(leaf["shape"]), leaf["crc32"]) for name, leaf in index["leaves"].items()}
        if odd := [
            n for n, (shape, crc32) in found.items() if any(type(x) is not int or x < 0 for x in (*shape, crc32))
        ]:
            raise ValueError(f"{odd[0]}: shape and crc32 must be whole numbers, not {found[odd[0]]}")
        return found
