"""Experiment trackers that follow a run: W&B, MLflow and Trackio, each behind one small interface, `Sink`.

``metrics.jsonl`` is the one source. A tracker gets a row once no restart can take it back, which is when a checkpoint that
counts it is whole, and is asked how many it holds whenever it is opened: what is stored is always the beginning of the file,
whatever was killed when. Each has a thread of its own, so that no network keeps the run waiting; what fails is said once, and
sent with the rows of the next checkpoint, or by the next start.
"""

import contextlib
import datetime
import importlib.util
import json
import os
import secrets
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from spdf_jax.cloud.spool import url
from spdf_jax.config.run import flat
from spdf_jax.errors import InputError, nearest, one_line
from spdf_jax.processes import is_first
from spdf_jax.training.metrics import scalars
from spdf_jax.workdir import CONFIG_FILE, METRICS_FILE, TRACKERS_FOLDER, read_json, write_json

Row = Mapping[str, Any]

#: How long a run that has ended waits for what is still to be sent; and one that ends before its time.
_END_SECONDS, _STOP_SECONDS = 120.0, 5.0


class Series(NamedTuple):
    """A run, as trackers know it.

    Attributes:
      id: of its own, the same at every start.
      project: the experiment.
      name: variant and workdir.
      config: settings by dotted keys.
      folder: for what a tracker keeps on this disk.
    """

    id: str
    project: str
    name: str
    config: Mapping[str, Any]
    folder: Path


class Sink(Protocol):
    """An open tracker. Whatever it raises is said, and it is opened again later."""

    def stored(self) -> int:
        """How many rows it holds: the first so many."""

    def send(self, first: int, rows: Sequence[Row]) -> None:
        """Appends rows, in order, the first of which is number `first`, counted from 0."""

    def close(self, finished: bool) -> None:
        """Stores all that was sent; `finished`: the run has reached its end."""


class _Wandb:
    """A row is a step of W&B's history, by its number, so that W&B refuses one that it holds; its axis is our ``step``."""

    def __init__(self, series: Series) -> None:
        import wandb

        settings = wandb.Settings(console="off", silent=True)
        self._series = series
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", series.project),
            id=series.id,
            name=series.name,
            config=dict(series.config),
            dir=series.folder,
            resume="allow",
            settings=settings,
        )
        self._run.define_metric("*", step_metric="step")

    def stored(self) -> int:
        if not self._run.offline:
            return int(self._run.starting_step)
        files = self._series.folder.glob(f"wandb/offline-run-*-{self._series.id}/*.wandb")
        return max((n for file in files for n in _offline_steps(file.read_bytes())), default=-1) + 1

    def send(self, first: int, rows: Sequence[Row]) -> None:
        for number, row in enumerate(rows, first):
            values = dict(scalars(row)) | {"step": row["step"]}
            if "time" in row:
                values["_timestamp"] = row["time"]
            self._run.log(values, step=number, commit=True)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _offline_steps(content: bytes) -> Iterator[int]:
    """Numbers of the rows in a file of an offline run, up to where a kill has torn it.

    Its format is LevelDB's log after a header of 7 bytes: blocks of 32 KiB, records in one part or in several.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        part = content[at + 7 : at + 7 + length]
        at += 7 + length
        if len(part) < length or not 1 <= kind <= 4:
            return
        record = part if kind in (1, 2) else record + part  # whole, first | middle, last
        if kind in (1, 4):
            for item in Record.FromString(record).history.item:
                if item.key == "_step" or list(item.nested_key) == ["_step"]:
                    yield int(json.loads(item.value_json))


class _MLflow:
    """A row is metrics at its step and time, of which the last, ``row``, counts the rows: the store takes none twice."""

    def __init__(self, series: Series) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", series.project)
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        tag = "spdf_jax.series"
        runs = self._client.search_runs([experiment], f"tags.`{tag}` = '{series.id}'")
        run = runs[0] if runs else self._client.create_run(experiment, tags={tag: series.id}, run_name=series.name)
        self._id = run.info.run_id
        if run.info.status != "RUNNING":
            self._client.update_run(self._id, "RUNNING")
        params = [Param(key, str(value)[:6000]) for key, value in series.config.items() if key not in run.data.params]
        for start in range(0, len(params), 100):  # a request takes no more
            self._client.log_batch(self._id, params=params[start : start + 100])

    def stored(self) -> int:
        return int(self._client.get_run(self._id).data.metrics.get("row", 0))

    def send(self, first: int, rows: Sequence[Row]) -> None:
        metrics = []
        for number, row in enumerate(rows, first + 1):
            kind = ("loss" in row) + 2 * ("val_loss" in row)  # rows of one step may be of one millisecond
            at = (round(1000 * row.get("time", 0.0)) + kind, row["step"])
            metrics += [self._metric(key, value, *at) for key, value in (*scalars(row), ("row", number))]
        for start in range(0, len(metrics), 1000):  # a request takes no more
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self, finished: bool) -> None:
        if finished:
            self._client.set_terminated(self._id, "FINISHED")


class _Trackio:
    """Trackio's own database on this disk; ``trackio sync`` brings it to a Space. Its logger drops what it cannot write."""

    def __init__(self, series: Series) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._store, self._series = SQLiteStorage, series
        self._project = os.environ.get("TRACKIO_PROJECT", series.project)
        self._store.validate_project_name(self._project)

    def stored(self) -> int:
        return int(self._store.get_log_count(self._project, self._series.name, run_id=self._series.id))

    def send(self, first: int, rows: Sequence[Row]) -> None:
        times = [datetime.datetime.fromtimestamp(row.get("time", 0.0), datetime.UTC).isoformat() for row in rows]
        self._store.bulk_log(
            self._project,
            self._series.name,
            [dict(scalars(row)) for row in rows],
            steps=[row["step"] for row in rows],
            timestamps=times,
            config=dict(self._series.config) if not first else None,
            run_id=self._series.id,
        )

    def close(self, finished: bool) -> None:
        pass


#: By their names in ``loop.trackers``, which are those of their packages.
SINKS: dict[str, Callable[[Series], Sink]] = {"wandb": _Wandb, "mlflow": _MLflow, "trackio": _Trackio}


def check_trackers(names: Sequence[str], workdir: Path | None = None) -> None:
    """Raises `InputError` for a tracker that there is not, that is not installed, or whose files would lie in a bucket."""
    if names and workdir and url(workdir):
        raise InputError(
            f"config.loop.trackers: their databases cannot be kept in a bucket, and the workdir is {workdir}; leave them out, "
            f"or choose a --workdir on a disk"
        )
    for name in names:
        if name not in SINKS:
            raise InputError(f"config.loop.trackers: no tracker {name!r}{nearest(name, list(SINKS))}")
        if importlib.util.find_spec(name) is None:
            raise InputError(f"config.loop.trackers: {name} is not installed: pip install -e '.[{name}]'")


class Followers:
    """The trackers of a run; without any, nothing. Process 0 alone has them.

    Args:
      workdir: the run's folder, its ``config.json`` in it.
      names: of the trackers.
      whole: bytes of ``metrics.jsonl`` that the checkpoint counts which the run goes on from.
      say: prints a line.
    """

    def __init__(self, workdir: Path, names: Sequence[str], whole: int, say: Callable[[str], None]) -> None:
        self._started = whole
        self._all = [_Follower(workdir, name, whole, say) for name in names if is_first()]

    def saving(self, rows: Mapping[str, int]) -> None:
        """A checkpoint has begun to be written that counts these rows: so the one before it is whole."""
        self._final(self._started)
        self._started = rows.get("bytes", 0)

    def saved(self) -> None:
        """All checkpoints so far are whole."""
        self._final(self._started)

    def close(self, finished: bool) -> None:
        """Sends what is left, for a while, and ends."""
        for follower in self._all:
            follower.end(finished)
        for follower in self._all:
            follower.wait(_END_SECONDS if finished else _STOP_SECONDS)

    def _final(self, size_bytes: int) -> None:
        for follower in self._all:
            follower.final(size_bytes)


class _Follower:
    """One tracker and its thread."""

    def __init__(self, workdir: Path, name: str, whole: int, say: Callable[[str], None]) -> None:
        self._workdir, self._name, self._say = workdir, name, say
        self._rows_path, self._folder = workdir / METRICS_FILE, workdir / TRACKERS_FOLDER
        self._sink: Sink | None = None
        self._size_bytes, self._sent_bytes, self._sent = whole, 0, 0
        self._failed = ""
        self._changed = threading.Condition()
        self._news, self._ending, self._finished = True, False, False
        self._thread = threading.Thread(target=self._follow, daemon=True, name=f"tracker {name}")
        self._thread.start()

    def final(self, size_bytes: int) -> None:
        with self._changed:
            self._size_bytes, self._news = max(size_bytes, self._size_bytes), True
            self._changed.notify()

    def end(self, finished: bool) -> None:
        with self._changed:
            self._ending, self._finished, self._news = True, finished, True
            self._changed.notify()

    def wait(self, seconds: float) -> None:
        self._thread.join(seconds)
        if self._thread.is_alive() or self._sent_bytes < self._size_bytes:
            self._say(f"{self._name}: the last rows are not sent yet; the same command sends them")

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._news)
                size_bytes, ending, self._news = self._size_bytes, self._ending, False
            try:
                self._catch_up(size_bytes)
                if ending and self._sink is not None:
                    self._sink.close(self._finished)
            except Exception as error:  # whatever is wrong with a tracker, the run is worth more
                self._sink = None
                if one_line(error) != self._failed:
                    self._failed = one_line(error)
                    self._say(f"{self._name}: {self._failed}; the run goes on, and its rows are sent later")
            if ending:
                return

    def _catch_up(self, size_bytes: int) -> None:
        """Sends the rows in the first `size_bytes` bytes of the file that are not sent yet."""
        if self._sink is None:
            self._open(size_bytes)
        if size_bytes <= self._sent_bytes:
            return
        assert self._sink is not None
        with self._rows_path.open("rb") as file:
            file.seek(self._sent_bytes)
            rows = [json.loads(line) for line in file.read(size_bytes - self._sent_bytes).splitlines()]
        self._sink.send(self._sent, rows)
        self._sent, self._sent_bytes = self._sent + len(rows), size_bytes

    def _open(self, size_bytes: int) -> None:
        """Opens the tracker, and finds what it holds; where that is more than the file, a new series begins."""
        path = self._folder / f"{self._name}.json"
        lines = self._rows_path.read_bytes()[:size_bytes].splitlines(keepends=True)
        with contextlib.suppress(InputError, KeyError):
            self._sink = self._opened(read_json(path, "")["id"])
        if self._sink is None or self._sink.stored() > len(lines):
            self._folder.mkdir(exist_ok=True)
            new = secrets.token_hex(6)
            write_json(path, {"id": new})
            self._sink = self._opened(new)
        self._sent = self._sink.stored()
        self._sent_bytes = sum(map(len, lines[: self._sent]))

    def _opened(self, series_id: str) -> Sink:
        config = read_json(self._workdir / CONFIG_FILE, "restore it")
        name = f"{config['variant']} {self._workdir.resolve().name}"
        known = {key: value for key, value in flat(config).items() if key not in ("command", "variants")}
        self._folder.mkdir(exist_ok=True)
        return SINKS[self._name](Series(series_id, config["experiment"], name, known, self._folder))
