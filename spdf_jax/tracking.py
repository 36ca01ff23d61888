"""What a run writes down as it goes: `metrics.jsonl`, TensorBoard events, mask pictures and the progress line.

A row is one JSON object a line, of one of three kinds told apart by a key: a train row has `loss`, an evaluation row
`val_loss`, a topology row `density`. Everything here is plain files and plain numbers; nothing needs TensorFlow.
"""

import io
import json
import os
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter
from tqdm import tqdm

from spdf_jax.errors import InputError, reading
from spdf_jax.processes import is_first
from spdf_jax.tree import named_leaves
from spdf_jax.workdir import (
    METRICS_FILE,
    PICTURES_FOLDER,
    PROFILE_FOLDER,
    TENSORBOARD_FOLDER,
    plain,
    set_aside,
    write_atomically,
)

# A row's kind is the first of these keys it holds.
_KINDS = ("loss", "val_loss", "density")


class Tracker:
    """Writes a run's rows, exactly once each, however often the run is killed and started again. Only process 0 writes."""

    def __init__(
        self,
        workdir: Path,
        *,
        resume_step: int,
        total_steps: int,
        progress: bool = True,
        durable: Mapping[str, int] | None = None,
    ) -> None:
        """Opens `metrics.jsonl` for appending, after dropping every row of a step after `resume_step`.

        Rows after step 0 where there is no checkpoint are set aside under another name, and this is said.

        Args:
            workdir: the run's folder; made if it is not there.
            resume_step: the step of the restored checkpoint; 0 for a fresh run, which keeps rows of step 0 only.
            total_steps: the run's last step, over all phases.
            progress: whether to show a progress bar (on a terminal) or occasional lines (elsewhere).
            durable: what `make_durable` returned for that checkpoint.

        Raises:
            InputError: the folder cannot be written, a row in it cannot be read, or rows that the checkpoint counts are not as
                they were.
        """
        self._workdir = Path(workdir)
        self._progress = _make_progress(progress and is_first(), resume_step, total_steps)
        if not is_first():
            return
        metrics_path = self._workdir / METRICS_FILE
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            kept_rows = self._kept_rows(metrics_path, resume_step, durable)
            # Unbuffered: a row is with the operating system when `log` returns, and a failed write leaves no remainder.
            self._metrics = metrics_path.open("ab", buffering=0)
            self._durable = durable_rows(metrics_path.read_bytes())
            self._events = _EventWriter(self._workdir / TENSORBOARD_FOLDER, resume_step)
        except OSError as error:
            message = f"workdir {self._workdir}: cannot write there ({error}); free it or choose another with --workdir"
            raise InputError(message) from error
        # A run killed between logging and saving logs the rows of its resume step again: those are already here.
        self._already_logged = {_identity(row) for row in kept_rows if row["step"] == resume_step}

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends one row, mirrors its numbers to TensorBoard and tells the progress line.

        A row of the resume step that an earlier start already wrote (same step, phase and kind) is skipped.

        Args:
            row: the row; numpy and JAX scalars and arrays are written as plain numbers.

        Raises:
            ValueError: a number in the row is not finite; nothing is written.
            OSError: the disk is full; `metrics.jsonl` is left as it was.
        """
        plain_row = plain(row, "row")
        if not is_first() or _identity(plain_row) in self._already_logged:
            return
        self._append(json.dumps(plain_row).encode() + b"\n")
        self._events.scalars(plain_row["step"], dict(_scalars(plain_row)))
        self._progress.log(plain_row)

    def make_durable(self) -> dict[str, int]:
        """Has the disk keep all rows so far, before a checkpoint counts on them; returns their bytes and checksum."""
        if not is_first():
            return {}
        os.fsync(self._metrics.fileno())
        return dict(self._durable)

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`."""
        self._progress.advance(step)

    def message(self, text: str) -> None:
        """Prints a line of text to standard output without breaking the progress bar."""
        self._progress.message(text)

    def close(self) -> None:
        """Closes the files and the progress bar; closing twice is harmless."""
        self._progress.close()
        if is_first():
            self._events.close()
            self._metrics.close()

    def _append(self, line: bytes) -> None:
        """Appends `line` whole or, if the disk refuses, not at all."""
        size_bytes = os.fstat(self._metrics.fileno()).st_size
        remaining = memoryview(line)
        try:
            while remaining:
                remaining = remaining[self._metrics.write(remaining) :]
        except OSError:
            self._metrics.truncate(size_bytes)
            raise
        self._durable = durable_rows(line, self._durable)

    def _kept_rows(self, path: Path, resume_step: int, durable: Mapping[str, int] | None) -> list[dict[str, Any]]:
        """The rows that a start at `resume_step` goes on from; the file then holds these and no others."""
        if not path.exists():
            if durable and durable["bytes"]:
                self.message(f"{path}: gone, and with it the rows up to step {resume_step}; going on without them.")
            return []
        if durable:
            check_rows(path, durable, f"the checkpoint at step {resume_step} counts on")
            kept = path.read_bytes()[: durable["bytes"]]
        elif resume_step == 0 and (steps := [row["step"] for row in read_rows(path) if row["step"] > 0]):
            aside = set_aside(path, "set_aside")
            self.message(
                f"{path}: has rows up to step {max(steps)}, but no checkpoint is there: starting at step 0. The rows are kept "
                f"as {aside.name}"
            )
            return []
        else:
            kept = b"".join(line + b"\n" for line, row in _read_lines(path) if row["step"] <= resume_step)
        if kept != path.read_bytes():
            write_atomically(path, kept)
        return read_rows(path)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Reads the rows of `metrics.jsonl`, in order; a last line torn by a kill is left out.

    Args:
        workdir: the run's folder.

    Returns:
        The rows.

    Raises:
        InputError: there is no such file, or a line before the last is not a row.
    """
    path = Path(workdir) / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file, so no run is recorded there; give the --workdir of a run")
    return read_rows(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, see `read_metrics`."""
    return [row for _, row in _read_lines(path)]


def durable_rows(content: bytes, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """The size of rows and their checksum, that of `content` after what `before` says."""
    before = before or {"bytes": 0, "crc32": 0}
    return {"bytes": before["bytes"] + len(content), "crc32": zlib.crc32(content, before["crc32"])}


def check_rows(path: Path, durable: Mapping[str, int], whose: str) -> None:
    """Refuses a file that does not begin with the rows that were durable when something was written that counts on them."""
    with reading(f"{path}: cannot be read", "restore the file"), path.open("rb") as file:
        found = file.read(durable["bytes"])
    if durable_rows(found) != dict(durable):
        raise InputError(
            f"{path}: not the {durable['bytes']:,} bytes of rows that {whose} ({len(found):,} are there, or others); restore "
            f"the file, or move it away to go on without them"
        )


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
        elif mask.ndim == 2:
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


def traced(steps: Iterable[int], span: range, workdir: Path) -> Iterator[int]:
    """`steps` as they are; a profile of those in `span` is left in ``WORKDIR/profile``, for TensorBoard and xprof."""
    tracing = False
    try:
        for step in steps:
            if tracing and step >= span.stop:
                jax.block_until_ready(jax.live_arrays())  # steps are dispatched ahead of what they compute
                jax.profiler.stop_trace()
                tracing = False
            if step in span and not tracing and is_first():
                jax.profiler.start_trace(Path(workdir) / PROFILE_FOLDER)
                tracing = True
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                yield step
    finally:
        if tracing:
            jax.profiler.stop_trace()


# --- rows ------------------------------------------------------------------------------------------------------------


def _identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What no two rows of a run share: step, phase and kind."""
    return row["step"], row["phase"], next((kind for kind in _KINDS if kind in row), None)


def _read_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each row with the line it was read from."""
    with reading(f"{path}: cannot be read", "restore the file"):
        *lines, last = path.read_bytes().split(b"\n")  # `last` has no end, and is empty unless a kill has torn it
    rows = []
    for number, line in enumerate([*lines, last], start=1):
        # Of what a kill or a crash leaves of the last line, none is a row: its beginning, or zeros of its length.
        if not line.strip(b"\0") or (number > len(lines) and _is_torn(line)):
            continue
        with reading(
            f"{path}: line {number} is not a row with a step and a phase", "restore the file or delete that line"
        ):
            row = json.loads(line)
            if type(row["step"]) is not int or not isinstance(row["phase"], str):
                raise TypeError("step must be a whole number, phase a text")
            rows.append((line, row))
    return rows


def _is_torn(line: bytes) -> bool:
    """Whether a line is the beginning of an object; two objects that have lost the end of line between them are not."""
    try:
        json.JSONDecoder().raw_decode(line.decode())
    except (ValueError, RecursionError):
        return True
    return False


def _scalars(value: Any, tag: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested row with its tag, as `density/blocks/attn/q/kernel/0`; strings and the step left out."""
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if (tag, key) != ("", "step")]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, int | float):
        yield tag, float(value)
        return
    else:
        return
    for key, item in items:
        yield from _scalars(item, f"{tag}/{key}" if tag else key)


# --- TensorBoard -----------------------------------------------------------------------------------------------------


class _EventWriter:
    """A TensorBoard event file.

    Built on tensorboard's RecordWriter and not its EventFileWriter: that one imports TensorFlow where it is installed,
    and hands records to a thread, so that a full disk is noticed steps later.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        folder.mkdir(exist_ok=True)
        is_restart = any("tfevents" in path.name for path in folder.iterdir())
        before = [int(n) for path in folder.iterdir() if (n := path.name.partition(".tfevents.")[2][:20]).isdecimal()]
        # TensorBoard reads a folder's files in the order of their names, also where the clock was set back between them.
        now = max([time.time_ns(), *(number + 1 for number in before)])
        self._file = (folder / f"events.out.tfevents.{now:020d}.{os.getpid()}").open("wb")
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        if is_restart:  # TensorBoard forgets events of this step and later
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._write(event_pb2.Event(step=resume_step + 1, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one event with a value for each tag."""
        summary = summary_pb2.Summary()
        for tag, value in values.items():
            summary.value.add(tag=tag, simple_value=value)
        self._write(event_pb2.Event(step=step, summary=summary))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: event_pb2.Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._file.flush()


# --- progress --------------------------------------------------------------------------------------------------------


class _Silent:
    """No progress, only messages; also the interface of the two below."""

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def message(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None:
        pass


class _Bar(_Silent):
    """One tqdm line on a terminal."""

    def __init__(self, resume_step: int, total_steps: int) -> None:
        layout = "{percentage:3.0f}%|{bar:10}| {n_fmt}/{total_fmt} | {remaining} left{desc}"
        how: dict[str, Any] = {"bar_format": layout, "dynamic_ncols": True, "miniters": 1, "file": sys.stdout}
        self._bar = tqdm(total=total_steps, initial=resume_step, **how)

    def log(self, row: Mapping[str, Any]) -> None:
        if "loss" in row:
            self._bar.set_description_str(f" | {_train_text(row)}", refresh=False)
        elif "val_loss" in row:
            self.message(f"step {row['step']:,} | {_evaluation_text(row)}")

    def advance(self, step: int) -> None:
        self._bar.update(step - self._bar.n)

    def message(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        self._bar.close()


class _Lines(_Silent):
    """A line every tenth of the run and at every evaluation, for logs and pipes."""

    def __init__(self, resume_step: int, total_steps: int) -> None:
        self._start_step, self._total_steps = resume_step, max(total_steps, 1)
        self._start_seconds = time.monotonic()
        self._tenths_shown = resume_step * 10 // self._total_steps

    def log(self, row: Mapping[str, Any]) -> None:
        step = row["step"]
        position = f"step {step:,}/{self._total_steps:,} | {row['phase']}"
        tenths = step * 10 // self._total_steps
        if "val_loss" in row:
            self.message(f"{position} | {_evaluation_text(row)}")
        elif "loss" in row and tenths > self._tenths_shown:
            self._tenths_shown = tenths
            self.message(f"{position} | {_train_text(row)} | {self._time_left_text(step)} left")

    def _time_left_text(self, step: int) -> str:
        """At the mean pace since this start."""
        steps_done = max(step - self._start_step, 1)
        seconds_left = (time.monotonic() - self._start_seconds) / steps_done * (self._total_steps - step)
        return str(tqdm.format_interval(seconds_left))


def _make_progress(progress: bool, resume_step: int, total_steps: int) -> _Silent:
    if not progress:
        return _Silent()
    return (_Bar if sys.stdout.isatty() else _Lines)(resume_step, total_steps)


def _train_text(row: Mapping[str, Any]) -> str:
    """The numbers of a train row that a person watches, in ASCII for any terminal."""
    flops_reduction = row["dense_flops"] / max(row["train_flops"], 1)
    return (
        f"loss {row['loss']:.3f} | {row['sparsity']:.0%} sparse | {flops_reduction:.1f}x fewer FLOPs"
        f" | {row['tokens_per_second']:,.0f} tokens/s"
    )


def _evaluation_text(row: Mapping[str, Any]) -> str:
    return f"validation loss {row['val_loss']:.4f} | {row['tokens'] / 1e6:,.2f}M tokens"
