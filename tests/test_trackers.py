"""What a tracker stores is the beginning of metrics.jsonl, whatever is killed when, and no tracker ends a run."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tiny import write_text
from twice import killed_at

from spdf_jax.errors import InputError
from spdf_jax.training import trackers
from spdf_jax.training.metrics import read_metrics, scalars
from spdf_jax.training.trackers import Followers, Series, check_trackers
from spdf_jax.workdir import write_json

ROWS = [{"step": n, "phase": "pretrain", "time": 1e9 + n, "loss": n / 8} for n in range(8)]


class Files:
    """A tracker whose series are files, a row a line; `broken` counts how many calls are still to fail."""

    broken, opened = 0, 0

    def __init__(self, series: Series) -> None:
        type(self).opened += 1
        self._fail()
        self.path = series.folder / f"{series.id}.rows"
        self.path.touch()

    def _fail(self):
        if Files.broken:
            Files.broken -= 1
            raise ConnectionError("no network\nat all")

    def stored(self):
        return len(self.path.read_bytes().splitlines())

    def send(self, first, rows):
        assert first == self.stored()
        for row in rows:
            with self.path.open("ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
            self._fail()

    def close(self, finished):
        pass


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(Files, "broken", 0)
    monkeypatch.setattr(Files, "opened", 0)
    monkeypatch.setattr(trackers, "SINKS", {"files": Files})
    monkeypatch.setattr(trackers, "_STOP_SECONDS", 60.0)
    write_json(tmp_path / "config.json", {"experiment": "mine", "variant": "mini"})
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    return tmp_path


def write(workdir: Path, count: int) -> int:
    """The file as it is when so many rows are logged, appended or cut; its bytes."""
    content = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS[:count])
    with (workdir / "metrics.jsonl").open("ab") as file:
        file.write(content[file.tell() :])
        file.truncate(len(content))
    return len(content)


def stored(workdir: Path) -> list[list[dict]]:
    files = sorted((workdir / "trackers").glob("*.rows"), key=lambda path: path.stat().st_mtime_ns)
    return [[json.loads(line) for line in file.read_bytes().splitlines()] for file in files]


def said_by(workdir: Path, whole: int, act) -> list[str]:
    said = []
    followers = Followers(workdir, ["files"], whole, said.append)
    act(followers)
    followers.close(finished=True)
    return said


def test_a_row_is_sent_once_the_checkpoint_that_counts_it_is_whole(workdir):
    followers = Followers(workdir, ["files"], 0, print)
    followers.saving({"bytes": write(workdir, 3)})
    write(workdir, 5)  # rows that no checkpoint counts yet
    followers.close(finished=False)
    assert stored(workdir) == [[]]  # a kill now would take the first three back
    followers = Followers(workdir, ["files"], 0, print)
    followers.saving({"bytes": write(workdir, 3)})
    followers.saving({"bytes": write(workdir, 6)})
    followers.close(finished=False)
    assert stored(workdir) == [ROWS[:3]]
    followers = Followers(workdir, ["files"], write(workdir, 6), print)
    followers.saving({"bytes": write(workdir, 8)})
    followers.saved()
    followers.close(finished=True)
    assert stored(workdir) == [ROWS]


@pytest.mark.parametrize("calls_before", range(10))
def test_whenever_it_dies_the_next_start_sends_the_rest_and_nothing_twice(workdir, calls_before):
    size = write(workdir, 8)

    class Dying(Files):
        """Dies after so many calls, as its process would."""

        left = calls_before

        def _fail(self):
            if not Dying.left:
                raise SystemExit
            Dying.left -= 1

    trackers.SINKS["files"] = Dying
    threading.excepthook, hook = (lambda _: None), threading.excepthook
    try:
        said_by(workdir, size, lambda _: None)
    finally:
        threading.excepthook = hook
    first = stored(workdir) if (workdir / "trackers").exists() else []
    assert sum(map(len, first)) == min(calls_before, 8)
    trackers.SINKS["files"] = Files
    assert said_by(workdir, size, lambda _: None) == []
    assert stored(workdir) == [ROWS]


def test_what_fails_is_said_once_and_sent_later(workdir):
    Files.broken = 3
    sizes, asked = [write(workdir, n) for n in (2, 4, 6, 8)], []

    def act(followers):
        for size in sizes:
            (follower,) = followers._all
            opened = Files.opened
            follower.final(size)
            while not follower._sent_bytes and Files.opened == opened and Files.broken:
                pass
            asked.append(size)

    said = said_by(workdir, 0, act)
    assert said == ["files: no network at all; the run goes on, and its rows are sent later"]
    assert stored(workdir) == [ROWS]


def test_what_is_not_sent_at_the_end_is_said_and_sent_by_the_same_command(workdir):
    Files.broken, size = 99, write(workdir, 8)
    *_, last = said_by(workdir, size, lambda _: None)
    assert last == "files: the last rows are not sent yet; the same command sends them"
    Files.broken = 0
    assert said_by(workdir, size, lambda _: None) == []
    assert stored(workdir) == [ROWS]


def test_a_tracker_that_hangs_does_not_keep_the_run(workdir, monkeypatch):
    monkeypatch.setattr(trackers, "_END_SECONDS", 0.05)
    free = threading.Event()
    monkeypatch.setattr(Files, "stored", lambda self: free.wait() and 0)
    said = said_by(workdir, write(workdir, 8), lambda _: None)
    free.set()
    assert said == ["files: the last rows are not sent yet; the same command sends them"]


def test_where_the_rows_are_gone_a_new_series_begins(workdir):
    said_by(workdir, write(workdir, 8), lambda _: None)
    said_by(workdir, write(workdir, 2), lambda _: None)
    assert stored(workdir) == [ROWS, ROWS[:2]]


def test_a_damaged_file_of_its_series_begins_a_new_one(workdir):
    said_by(workdir, write(workdir, 4), lambda _: None)
    (workdir / "trackers" / "files.json").write_text("{")
    said_by(workdir, write(workdir, 8), lambda _: None)
    assert stored(workdir) == [ROWS[:4], ROWS]


def test_without_trackers_there_is_neither_a_thread_nor_a_folder(workdir):
    before = threading.active_count()
    followers = Followers(workdir, [], 0, print)
    followers.saving({"bytes": 4})
    assert threading.active_count() == before
    followers.close(finished=True)
    assert not (workdir / "trackers").exists()


def test_a_tracker_that_is_not_there_is_refused_in_one_line(monkeypatch):
    with pytest.raises(InputError, match=r"config\.loop\.trackers: no tracker 'wandbb'; did you mean 'wandb'\?"):
        check_trackers(["wandbb"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError, match=r"^config\.loop\.trackers: wandb is not installed: pip install -e '\.\[wandb\]'$"
    ):
        check_trackers(["wandb"])


# --- the packages themselves ------------------------------------------------------------------------------------------


def read_wandb(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    """Of all starts of the run in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    folders = sorted((workdir / "trackers" / "wandb").glob("offline-run-*"))
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # one series
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        for record in records_of(file, Record):
            values = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            if values:
                number = values.pop("_step")
                assert number not in found, f"row {number} twice"
                found[number] = (values.pop("step"), {k: v for k, v in values.items() if not k.startswith("_")})
    assert list(found) == list(range(len(found)))
    return list(found.values())


def records_of(file: Path, record_type):
    content, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        whole = whole * (kind not in (1, 2)) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield record_type.FromString(whole)


def read_mlflow(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    """Rows of one step are told apart by their time."""
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["pretrain.steps"] == "12"
    found = {}
    for name in run.data.metrics:
        for metric in client.get_metric_history(run.info.run_id, name):
            values = found.setdefault((metric.step, metric.timestamp), {})
            assert values.setdefault(name, metric.value) == metric.value, f"{name} twice"
    rows = sorted(found.items(), key=lambda item: item[1]["row"])
    assert [values.pop("row") for _, values in rows] == list(range(1, len(rows) + 1))
    return [(step, values) for (step, _), values in rows]


def read_trackio(workdir: Path) -> list[tuple[int, dict[str, float]]]:
    from trackio.sqlite_storage import SQLiteStorage

    (run,) = SQLiteStorage.get_run_records("tiny")
    logs = SQLiteStorage.get_logs("tiny", run["name"], run_id=run["id"])
    return [
        (log.pop("step"), {key: value for key, value in log.items() if not key.startswith("_") and key != "timestamp"})
        for log in logs
    ]


READERS = {"wandb": read_wandb, "mlflow": read_mlflow, "trackio": read_trackio}
INSTALLED = [name for name in READERS if importlib.util.find_spec(name) and importlib.util.find_spec("sqlalchemy")]


# Each is an extra of its own, of 40 to 110 MB with what it brings; Trackio wants an older Pillow than the lock has. So CI
# installs none, and the tests above go through a tracker of theirs instead.
@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs a tracker: pip install -e '.[wandb,mlflow,trackio]'")
def test_the_stored_series_are_the_rows_after_two_kills(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # MLflow makes a database in many steps, and one that is killed half-way stays so: the run then goes on without it.
    subprocess.run([sys.executable, "-c", "import mlflow; mlflow.MlflowClient()"], check="mlflow" in INSTALLED)
    text, run = write_text(tmp_path / "text"), tmp_path / "run"
    killed_at(run, text, tmp_path / "cache", [8, 11], trackers=",".join(INSTALLED))
    wanted = [(row["step"], dict(scalars(row))) for row in read_metrics(run)]
    for name in INSTALLED:
        found = in_a_process_of_its_own(name, run)
        assert found == wanted, name
        with capsys.disabled():
            print(f" {name}: {len(found)} rows", end="")


def in_a_process_of_its_own(name: str, run: Path) -> list[tuple[int, dict[str, float]]]:
    """Where a package's own warnings are no errors, and its environment is read anew."""
    program = "import json, sys, test_trackers as t; print(json.dumps(t.READERS[sys.argv[1]](t.Path(sys.argv[2]))))"
    how = {"capture_output": True, "text": True, "check": False, "cwd": Path(__file__).parent}
    done = subprocess.run([sys.executable, "-c", program, name, str(run)], env=dict(os.environ), **how)
    assert done.returncode == 0, done.stderr
    return [(step, values) for step, values in json.loads(done.stdout.splitlines()[-1])]
