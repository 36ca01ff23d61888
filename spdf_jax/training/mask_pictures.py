"""Small pictures of masks, saved as a run goes: how dense they are where, and how many weights each input and output keeps."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from spdf_jax.tree import named_leaves
from spdf_jax.workdir import PICTURES_FOLDER, write_atomically


def save_mask_picture(workdir: Path, step: int, pictures: Mapping[str, np.ndarray]) -> None:
    """Saves the density images of one step as `mask_pictures/step_<step>.npz`, atomically.

    Args:
      workdir: the run's folder.
      step: the step the masks are of.
      pictures: leaf path -> 2-D density image and 1-D degrees, as `picture_of` makes them.
    """
    folder = Path(workdir) / PICTURES_FOLDER
    folder.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    images: dict[str, Any] = {path: np.asarray(image, np.float32) for path, image in pictures.items()}
    np.savez_compressed(buffer, **images)
    write_atomically(folder / f"step_{step:08d}.npz", buffer.getvalue())


def save_mask_pictures(workdir: Path, step: int, masks: Any) -> None:
    """Pictures of the first and last layer of an attention and an MLP matrix, and of the head if it is masked."""
    pictures: dict[str, np.ndarray] = {}
    for name, mask in named_leaves(masks):
        if mask.ndim == 3 and name.startswith(("blocks/attn_q", "blocks/mlp_up")):
            for layer in sorted({0, mask.shape[0] - 1}):
                pictures |= picture_of(f"{name}/{layer}", _whole(mask[layer]))
        elif mask.ndim == 2 and not name.endswith("bias"):  # a line a layer
            pictures |= picture_of(name, _whole(mask))
    save_mask_picture(workdir, step, pictures)


def _whole(array: jax.Array) -> np.ndarray:
    """An array wherever its shards are; all processes that hold some take part."""
    return multihost_utils.process_allgather(array, tiled=True)


def picture_of(path: str, mask: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of a mask to be drawn: its picture, and by ``:in`` and ``:out`` the active weights a column and a row.

    >>> {name: array.tolist() for name, array in picture_of("w", np.array([[True, False, True]])).items()}
    {'w': [[1.0, 0.0, 1.0]], 'w:in': [1, 0, 1], 'w:out': [2]}
    """
    return {path: mask_picture(mask), f"{path}:in": mask.sum(axis=0), f"{path}:out": mask.sum(axis=1)}


def mask_picture(mask: np.ndarray, max_side: int = 64) -> np.ndarray:
    """Shrinks a mask to a small image of local densities.

    Args:
      mask: a 2-D bool mask.
      max_side: the most pixels a side of the image may have.

    Returns:
      A float32 image in [0, 1]: each pixel the mean of its block of the mask. Blocks of the last row and column may
      be smaller and are averaged over what they hold.

    Raises:
      ValueError: the mask is not 2-D, or empty.

    >>> mask_picture(np.array([[True, False, True]]), max_side=2)
    array([[0.5, 1. ]], dtype=float32)
    """
    mask = np.asarray(mask, bool)
    if mask.ndim != 2 or mask.size == 0:
        raise ValueError(
            f"mask of shape {mask.shape}: a picture needs two dimensions, neither of them 0; take one layer"
        )
    total = mask
    for axis, side in enumerate(mask.shape):
        starts = np.arange(0, side, -(-side // max_side))
        total = np.add.reduceat(total, starts, axis=axis, dtype=np.int64)
    block_sizes = [np.diff(np.append(np.arange(0, side, -(-side // max_side)), side)) for side in mask.shape]
    return (total / np.outer(*block_sizes)).astype(np.float32)
