"""The rows that a run writes as it goes: `metrics.jsonl`, and from it TensorBoard events and the progress line.

A row is one JSON object a line, of one of three kinds told apart by a key: a train row has `loss`, an evaluation row
`val_loss`, a topology row `density`. `time` is in seconds since 1970. Everything here is plain files and plain numbers; nothing
needs TensorFlow.
"""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spdf_jax.cloud.spool import located, publish
from spdf_jax.errors import InputError, reading
from spdf_jax.processes import is_first
from spdf_jax.training.events import EventWriter
from spdf_jax.training.progress import make_progress
from spdf_jax.workdir import (
    METRICS_FILE,
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
        first_step: int = 0,
        progress: bool = True,
        durable: Mapping[str, int] | None = None,
    ) -> None:
        """Opens `metrics.jsonl` for appending, after dropping every row of a step after `resume_step`.

        Rows after the first step where there is no checkpoint are set aside under another name, and this is said.

        Args:
          workdir: the run's folder; made if it is not there.
          resume_step: the step of the restored checkpoint; `first_step` for a fresh run, which keeps rows of that step only.
          total_steps: the run's last step, over all phases.
          first_step: that at which it begins: not 0 where it goes on from another run's.
          progress: whether to show a progress bar (on a terminal) or occasional lines (elsewhere).
          durable: what `make_durable` returned for that checkpoint.

        Raises:
          InputError: the folder cannot be written, a row in it cannot be read, or rows that the checkpoint counts are not as
            they were.
        """
        self._workdir = located(workdir)
        self._progress = make_progress(progress and is_first(), resume_step, total_steps)
        if not is_first():
            return
        metrics_path = self._workdir / METRICS_FILE
        try:
            self._workdir.mkdir(parents=True, exist_ok=True)
            kept_rows = self._kept_rows(metrics_path, resume_step, first_step, durable)
            # Unbuffered: a row is with the operating system when `log` returns, and a failed write leaves no remainder.
            self._metrics = metrics_path.open("ab", buffering=0)
            self._durable = durable_rows(metrics_path.read_bytes())
            self._events = EventWriter(self._workdir / TENSORBOARD_FOLDER, resume_step)
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
        self._events.scalars(plain_row["step"], dict(scalars(plain_row)))
        self._progress.log(plain_row)

    def make_durable(self) -> dict[str, int]:
        """Has the disk keep all rows so far, before a checkpoint counts on them; returns their bytes and checksum."""
        if not is_first():
            return {}
        os.fsync(self._metrics.fileno())
        publish(self._workdir)
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

    def _kept_rows(
        self, path: Path, resume_step: int, first_step: int, durable: Mapping[str, int] | None
    ) -> list[dict[str, Any]]:
        """The rows that a start at `resume_step` goes on from; the file then holds these and no others."""
        if not path.exists():
            if durable and durable["bytes"]:
                self.message(f"{path}: gone, and with it the rows up to step {resume_step}; going on without them.")
            return []
        if durable:
            kept = check_rows(path, durable, f"the checkpoint at step {resume_step} counts on")
        elif resume_step == first_step and (
            steps := [row["step"] for row in read_rows(path) if row["step"] > first_step]
        ):
            aside = set_aside(path, "set_aside")
            self.message(
                f"{path}: has rows up to step {max(steps)}, but no checkpoint is there: starting at step {first_step}. The "
                f"rows are kept as {aside.name}"
            )
            return []
        else:
            kept = b"".join(line + b"\n" for line, row in _read_lines(path) if row["step"] <= resume_step)
        if len(kept) != path.stat().st_size:  # `kept` is the file, or the file without some of its lines
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
    path = located(workdir) / METRICS_FILE
    if not path.is_file():
        raise InputError(f"{path}: no such file, so no run is recorded there; give the --workdir of a run")
    return read_rows(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, see `read_metrics`."""
    return [row for _, row in _read_lines(path)]


def last_alive(workdir: Path) -> float:
    """When the last row was logged there that can be read, in seconds since 1970; 0 where none says so."""
    path = Path(workdir) / METRICS_FILE
    for line in reversed(path.read_bytes().split(b"\n") if path.is_file() else []):
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            return float(json.loads(line)["time"])
    return 0.0


def durable_rows(content: bytes, before: Mapping[str, int] | None = None) -> dict[str, int]:
    """The size of rows and their checksum, that of `content` after what `before` says."""
    before = before or {"bytes": 0, "crc32": 0}
    return {"bytes": before["bytes"] + len(content), "crc32": zlib.crc32(content, before["crc32"])}


def check_rows(path: Path, durable: Mapping[str, int], whose: str) -> bytes:
    """The rows that were durable when something was written that counts on them; refuses a file that does not begin so."""
    with reading(f"{path}: cannot be read", "restore the file"), path.open("rb") as file:
        found = file.read(durable["bytes"])
    if durable_rows(found) != dict(durable):
        raise InputError(
            f"{path}: not the {durable['bytes']:,} bytes of rows that {whose} ({len(found):,} are there, or others); restore "
            f"the file, or move it away to go on without them"
        )
    return found


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


def scalars(value: Any, tag: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a nested row with its tag, as `density/blocks/attn_q/kernel/0`; left out are strings, step and time."""
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if tag or key not in ("step", "time")]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, int | float):
        yield tag, float(value)
        return
    else:
        return
    for key, item in items:
        yield from scalars(item, f"{tag}/{key}" if tag else key)
