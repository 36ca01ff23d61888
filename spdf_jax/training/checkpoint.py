"""Checkpoints of everything a run carries, by orbax: asynchronous, atomic, refused when they do not fit.

A checkpoint holds the state (masks packed to one bit a weight) and a small JSON record of what is not an array: phase, data
position and fingerprint, running totals, and a checksum of every array. A save that is cut short leaves the one before it
untouched; a checkpoint that does not read back as it was written is noticed, whatever mesh reads it.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path.atomicity_types import TMP_DIR_SUFFIX  # has no public name

from spdf_jax.cloud.spool import is_whole, sizes, stored, unanswered, url
from spdf_jax.errors import InputError, Restart, one_line
from spdf_jax.processes import RESTART_CODE, is_first, stop, wait_for_first
from spdf_jax.training.state import TrainState
from spdf_jax.training.stored_state import examined, is_mask, pack, plain, shapes, unpack
from spdf_jax.workdir import checksum, set_aside

# Metadata and index files of one checkpoint; about 60 kB were seen.
_CHECKPOINT_OVERHEAD_BYTES = 256 * 1024

# A save waits for the one before on purpose (`Checkpoints._check_room`); its seconds are the clock's, not a warning a save.
logging.getLogger("absl").addFilter(lambda record: "Waiting for previous save" not in str(record.msg))


class DamagedCheckpointError(InputError):
    """A checkpoint does not read back as it was written."""


class Checkpoints:
    """The checkpoints of one run, newest last.

    Args:
      directory: created if needed.
      keep: how many of the newest stay.
      keep_every_steps: those at a multiple of it stay too; 0: none.
    """

    def __init__(self, directory: Path, keep: int = 2, keep_every_steps: int = 0) -> None:
        self.directory, self._is_in_bucket = stored(directory), bool(url(directory))
        self._manager = ocp.CheckpointManager(
            self.directory if self._is_in_bucket else directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                keep_period=keep_every_steps or None,
                enable_async_checkpointing=True,
                lightweight_initialize=True,  # a damaged checkpoint is met where it is read, not here
            ),
            item_handlers={"state": ocp.StandardCheckpointHandler(), "record": ocp.JsonCheckpointHandler()},
        )

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none."""
        return self._manager.latest_step()

    def kept(self) -> str:
        """What a run that stops has, in words."""
        step = self.latest_step()
        return "Nothing was saved yet." if step is None else f"The checkpoint at step {step} is kept."

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Starts saving; the state may be donated right after. A step that is already saved is left alone.

        Raises:
          InputError: a number in the state is not finite, or a checkpoint of a later step is there; nothing is saved.
          OSError: no room for it, or the disk fails.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return
        packed = pack(state)
        finite, leaves = examined(packed)
        if not finite:
            raise InputError(
                f"step {step}: the loss is finite, but a parameter or a value of the optimiser is not; stopped. {self.kept()} "
                f"Lower the learning rate or look at the data, and use another --workdir"
            )
        record = record | {"leaves": leaves}
        record |= {"crc32": checksum(record)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(packed), record=ocp.args.JsonSave(record))
        with self._disk_named():
            self._check_room(packed)
            saved = self._manager.save(step, args=args)
        if not saved:  # orbax saves nothing at or before its newest step, and only returns False
            raise InputError(
                f"{self.directory}: the state at step {step} was not saved, because a checkpoint at step "
                f"{self.latest_step()} is there; move that away"
            )

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        return sorted(self._manager.all_steps())

    def drop_from(self, step: int) -> "Checkpoints":
        """These, without those of this step and later ones, which it deletes: of a time before a restart, that comes again."""
        for there in self._manager.all_steps():
            if there >= step:
                self._manager.delete(there)
        return self

    def record(self, step: int = 0) -> dict[str, Any]:
        """The JSON record of a checkpoint, by default the newest.

        Raises:
          InputError: there is none; `DamagedCheckpointError`: it is not what was written.
        """
        there = self.steps()
        if not there:
            raise InputError(f"{self.directory}: no checkpoint there; train first with --job train")
        if step and step not in there:
            raise InputError(
                f"{self.directory}: no checkpoint at step {step}, but at {', '.join(map(str, there))}; choose one of these "
                f"(config.loop.keep_checkpoints and keep_every_steps say which a run keeps)"
            )
        step = step or there[-1]
        with self._damage_named(step):
            record = self._manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if "crc32" in record and record.pop("crc32") != checksum(record):  # absent: of an older version
                raise ValueError("its record is not what was written")
            if record["step"] != step:
                raise ValueError(f"it is a copy of that at step {record['step']}")
        return record

    def restore(self, abstract: TrainState, shardings: TrainState, step: int = 0) -> TrainState:
        """A state, by default the newest, laid out on the mesh of `shardings` whatever mesh wrote it.

        Args:
          abstract: expected shapes and dtypes.
          shardings: where to put it.
          step: of which checkpoint; 0: the newest.

        Raises:
          InputError: no checkpoint; one of another model (names the shapes that differ); one without masks where the
            phase is sparse; `DamagedCheckpointError`: it is not what was written.
        """
        record = self.record(step)
        step = record["step"]
        packed = jax.eval_shape(pack, abstract)
        with self._damage_named(step):
            saved = record["leaves"] if "leaves" in record else shapes(self._manager.item_metadata(step)["state"])
        self._check(step, saved, shapes(jax.eval_shape(plain, packed)))
        # A packed mask's last axis is eight times shorter than its parameter's: restored whole, split when unpacked.
        layout = jax.tree.map(lambda x, s: shardings.step if is_mask(x) else s, abstract, shardings)
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), packed, layout)
        most = _most_bytes(packed)
        with self._damage_named(step):
            for name, size_bytes in sizes(self.directory / str(step)):
                if size_bytes > most:  # tensorstore would end the process for want of memory
                    raise ValueError(f"{name}: larger than the whole state")
            args = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            restored = self._manager.restore(step, args=args)["state"]
            changed = [n for n, leaf in examined(restored)[1].items() if "leaves" in record and leaf != saved[n]]
            if changed:
                raise ValueError(f"{', '.join(changed[:3])}: not what was written")
        return unpack(restored, abstract, shardings)

    def fall_back(self, damage: DamagedCheckpointError) -> str:
        """Sets the newest checkpoint aside for the one before it, and says so.

        A run of many processes ends here, to be started again: not all of them may have noticed.

        Raises:
          InputError: there is none before it.
        """
        *_, before, newest = (None, *sorted(self._manager.all_steps()))
        if before is None:
            raise InputError(f"{damage}, but there is none; start again with another --workdir") from damage
        aside = set_aside(self.directory / str(newest), "damaged")
        message = f"{damage}, at step {before}. The damaged one is kept as {aside.name}"
        if jax.process_count() > 1:
            stop(RESTART_CODE, f"{message}. Give the same command again")
        self._manager.reload()
        return message

    def wait(self) -> None:
        """Until everything started is on disk, for all processes; raises what went wrong."""
        with self._disk_named():
            self._manager.wait_until_finished()
        wait_for_first()

    def close(self) -> None:
        """Waits and releases."""
        with self._disk_named():
            self._manager.close()

    def sweep(self) -> None:
        """Removes what a killed save has left. Only where no other process saves here."""
        if not is_first():
            return
        for left in self.directory.glob(f"*{TMP_DIR_SUFFIX}*"):
            shutil.rmtree(left, ignore_errors=True)
        for left in self.directory.glob("*") if self._is_in_bucket else ():
            if left.name.isdecimal() and not is_whole(left):
                left.rmtree()  # type: ignore[attr-defined]  # of etils

    def _check_room(self, packed: TrainState) -> None:
        """Refuses to start what cannot end: a disk found full or read-only half-way costs minutes, or pages of tracebacks."""
        self._manager.wait_until_finished()  # the save before has taken its room
        if self._is_in_bucket:
            return
        tempfile.TemporaryFile(dir=self.directory).close()  # raises where no file can be made
        if shutil.disk_usage(self.directory).free < _most_bytes(packed):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextlib.contextmanager
    def _disk_named(self) -> Iterator[None]:
        """What a disk refuses reaches us from tensorstore as a ValueError with the number in its text, often a save later."""
        try:
            yield
        except (ValueError, OSError) as error:
            if self._is_in_bucket:
                unanswered(f"{self.directory}: the bucket did not take a checkpoint ({one_line(error)})", error)
            if isinstance(error, TimeoutError):  # orbax waits by the wall clock
                message = (
                    f"{self.directory}: a save took too long, or the clock was set meanwhile; the same command resumes"
                )
                if jax.process_count() > 1:
                    stop(RESTART_CODE, message)
                raise Restart(message) from error
            number = error.errno if isinstance(error, OSError) else _os_error(str(error))
            if number is None:
                raise
            raise OSError(number, os.strerror(number), str(self.directory)) from error

    @contextlib.contextmanager
    def _damage_named(self, step: int) -> Iterator[None]:
        """Files that are cut, changed or gone reach us as exceptions of many kinds from the libraries that read them."""
        if not isinstance(sys.unraisablehook, _WithoutLateReads):
            sys.unraisablehook = _WithoutLateReads(sys.unraisablehook)
        try:
            yield
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, jax.errors.JaxRuntimeError) or (
                isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
            ):
                raise
            raise DamagedCheckpointError(
                f"{self.directory}: the checkpoint at step {step} is damaged ({' '.join(str(cause).split())[:300]}); "
                f"--job train falls back to the one before it"
            ) from error

    def _check(self, step: int, saved_leaves: dict[str, list[Any]], wanted_leaves: dict[str, list[Any]]) -> None:
        saved, wanted = ({name: tuple(leaf[0]) for name, leaf in x.items()} for x in (saved_leaves, wanted_leaves))
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


def _most_bytes(packed: TrainState) -> float:
    """What a checkpoint of this state takes at most."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda x: x.replace(key=jax.random.key_data(x.key)), packed))
    return 1.1 * sum(x.size * x.dtype.itemsize for x in arrays) + _CHECKPOINT_OVERHEAD_BYTES


class _WithoutLateReads:
    """An unraisable hook: where one read fails, those beside it end later, and complain of a closed loop in their threads."""

    def __init__(self, hook: Callable[["sys.UnraisableHookArgs"], Any]) -> None:
        self.hook = hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            self.hook(unraisable)


def _os_error(text: str) -> int | None:
    """The number in what tensorstore says of a system call that failed."""
    found = re.search(r"os_error_code='(\d+)'", text)
    return int(found[1]) if found else None
