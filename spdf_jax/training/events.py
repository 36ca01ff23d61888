"""TensorBoard's event files, written without TensorFlow."""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter


class EventWriter:
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
