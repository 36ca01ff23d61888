"""Checkpoints of everything a run carries, by orbax: asynchronous, atomic, refused when they do not fit.

A checkpoint holds the state (masks packed to one bit a weight) and a small JSON record of what is not an array: phase, data
position and fingerprint, running totals. A save that is cut short leaves the one before it untouched.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from spdf_jax.errors import InputError
from spdf_jax.sparsity.masks import active_counts, pack_masks, unpack_masks
from spdf_jax.sparsity.programme import Programme
from spdf_jax.state import TrainState
from spdf_jax.tree import Filter, named_leaves

# Metadata and index files of one checkpoint; about 60 kB were seen.
_CHECKPOINT_OVERHEAD_BYTES = 256 * 1024


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
      directory: created if needed.
      keep: how many of the newest stay.
    """

    def __init__(self, directory: Path, keep: int = 2) -> None:
        self.directory = directory
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Starts saving; the state may be donated right after. A step that is already saved is left alone."""
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        packed = _pack(state)
        args = ocp.args.Composite(state=ocp.args.StandardSave(packed), record=ocp.args.JsonSave(record))
        with self._full_disk_named():
            self._check_room(packed)
            self._manager.save(step, args=args)

    def record(self) -> dict[str, Any]:
        """The JSON record of the newest checkpoint.

        Raises:
          InputError: there is none.
        """
        if self.latest_step() is None:
            raise InputError(f"{self.directory}: no checkpoint there; train first with --job train")
        restored = self._manager.restore(self.latest_step(), args=ocp.args.Composite(record=ocp.args.JsonRestore()))
        return restored["record"]

    def restore(self, abstract: TrainState, shardings: TrainState) -> TrainState:
        """The newest state, laid out on the mesh of `shardings` whatever mesh wrote it.

        Args:
          abstract: expected shapes and dtypes.
          shardings: where to put it.

        Raises:
          InputError: no checkpoint; one of another model (names the shapes that differ); one without masks where the
            phase is sparse.
        """
        step = self.latest_step()
        if step is None:
            raise InputError(f"{self.directory}: no checkpoint there; train first with --job train")
        packed = jax.eval_shape(_pack, abstract)
        self._check(step, packed)
        # A packed mask's last axis is eight times shorter than its parameter's: restored whole, split when unpacked.
        layout = shardings.replace(masks=jax.tree.map(lambda _: shardings.step, shardings.masks))
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), packed, layout)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
        unpack = jax.jit(unpack_masks, out_shardings=shardings.masks)
        return restored.replace(masks=unpack(restored.masks, restored.params))

    def wait(self) -> None:
        """Until everything started is on disk; raises what went wrong."""
        with self._full_disk_named():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and releases."""
        with self._full_disk_named():
            self._manager.close()

    def _check_room(self, packed: TrainState) -> None:
        """Refuses to start what cannot end: a full disk found half-way costs pages of tracebacks from other threads."""
        self._manager.wait_until_finished()  # the save before has taken its room
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(packed.replace(key=jax.random.key_data(packed.key))))
        if shutil.disk_usage(self.directory).free < 1.1 * needed + _CHECKPOINT_OVERHEAD_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _full_disk_named(self) -> Iterator[None]:
        """A full disk reaches us from tensorstore as a ValueError, often from the save before."""
        try:
            yield
        except (ValueError, OSError) as error:
            if "No space left on device" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory)) from error

    def _check(self, step: int, packed: TrainState) -> None:
        metadata = self._manager.item_metadata(step)["state"]
        saved = {name: tuple(leaf.shape) for name, leaf in named_leaves(metadata)}
        plain_key = jax.eval_shape(lambda s: s.replace(key=jax.random.key_data(s.key)), packed)
        wanted = {name: tuple(leaf.shape) for name, leaf in named_leaves(plain_key)}
        masks = [
            name for name, shape in wanted.items() if name.startswith("masks/") and shape and saved.get(name) == ()
        ]
        if masks:
            raise InputError(
                f"{self.directory}: the checkpoint at step {step} has no masks for "
                f"{', '.join(m[6:] for m in masks[:3])}, but the phase is sparse; "
                f"start it with --workdir of its own, or make the phase dense"
            )
        differing = [
            f"{name} {saved.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
            for name in sorted(saved.keys() | wanted.keys())
            if saved.get(name) != wanted.get(name)
        ]
        if differing:
            raise InputError(
                f"{self.directory}: the checkpoint at step {step} is of another model: {'; '.join(differing[:3])}"
                f"{f'; and {len(differing) - 3} more' if len(differing) > 3 else ''}. "
                f"Use the config it was made with, or another --workdir"
            )


def _pack(state: TrainState) -> TrainState:
    return state.replace(masks=pack_masks(state.masks))


def check_invariants(programme: Programme, filter: Filter, state: TrainState, phase_start: int) -> None:
    """Masks hold the exact target counts, and every masked weight is exactly 0; anything else is a bug, and is not saved.

    Raises:
      RuntimeError: naming the leaf.
    """
    if not programme.groups:
        return
    local = int(state.step) - phase_start
    counts = jax.device_get(_counts(state.masks, state.params, filter))
    nonzero = jax.device_get(_nonzero_where_masked(state.params, state.masks))
    for name, target in programme.counts(local).items():
        if not (counts[name] == target).all():
            raise RuntimeError(f"{name}: masks hold {counts[name]} active weights, the programme says {target}")
        if nonzero[name]:
            raise RuntimeError(f"{name}: {nonzero[name]} masked weights are not zero")


_counts = jax.jit(active_counts, static_argnums=2)


@jax.jit
def _nonzero_where_masked(params: Any, masks: Any) -> dict[str, jax.Array]:
    return {
        name: jnp.sum((value != 0) & ~mask)
        for (name, value), (_, mask) in zip(named_leaves(params), named_leaves(masks), strict=True)
    }
