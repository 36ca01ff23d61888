"""Every second of a run is in one part of its clock, whatever killed it."""

import json
import time

import jax
import jax.numpy as jnp
import pytest
from report_folders import make_rows, make_run, make_summary
from tiny import write_text
from twice import PAUSE_SECONDS, killed_at

from spdf_jax.report.records import read_run
from spdf_jax.report.run import time_parts
from spdf_jax.training import clock as module
from spdf_jax.training.clock import NOT_OF_THE_RESULT, PARTS, Clock
from spdf_jax.training.metrics import last_alive, read_metrics
from spdf_jax.training.provenance import add_start, lives, record_failure
from spdf_jax.workdir import read_json, write_json


@pytest.fixture
def ticks(monkeypatch):
    """A clock that stands still: `ticks(seconds)` moves it."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: 1000.0 + now[0])
    return lambda seconds: now.__setitem__(0, now[0] + seconds)


def spent(clock: Clock) -> dict[str, float]:
    return {part: seconds for part, seconds in clock.seconds.items() if seconds}


def test_what_passes_is_of_the_part_that_it_was_spent_on(ticks):
    clock = Clock()
    for part, seconds in (("starting", 3), ("training", 2), ("topology", 1), ("training", 4)):
        ticks(seconds)
        clock.spent(part)
    assert spent(clock) == {"starting": 3, "training": 6, "topology": 1}
    assert (clock.elapsed, clock.of_the_result) == (10, 10)


def test_compiling_is_apart_and_counted_once(ticks):
    with Clock() as clock:
        for seconds, event, duration in (
            (1, "core/compile/jaxpr_trace_duration", 1.0),  # 0..1, inside the next
            (1, "core/compile/jaxpr_trace_duration", 2.0),  # 0..2
            (3, "core/compile/backend_compile_duration", 3.0),  # 2..5
            (0, "orbax/write/async/total_duration_secs", 4.0),  # none
        ):
            ticks(seconds)
            jax.monitoring.record_event_duration_secs(f"/jax/{event}", duration)
        ticks(1)
        clock.spent("training")
    jax.monitoring.record_event_duration_secs(
        "/jax/core/compile/backend_compile_duration", 1.0
    )  # of who comes after it
    ticks(2)
    clock.spent("training")
    assert spent(clock) == {"compiling": 5, "training": 3}


def test_what_jax_compiles_is_heard():
    with Clock() as clock:
        jax.jit(lambda x: jnp.sin(x) + time.time())(jnp.ones(3)).block_until_ready()
        clock.spent("training")
    assert clock.seconds["compiling"] > 0


@pytest.mark.parametrize(("computing", "waited"), [(None, 8), (True, 8), (False, 0)])
def test_a_wait_for_data_counts_where_nothing_was_computed(ticks, computing, waited):
    class Computing:
        def is_ready(self):
            return computing

    def batches():
        for batch in range(4):
            ticks(2)
            yield batch

    clock = Clock()
    clock.computing = None if computing is None else Computing()
    for _ in clock.waiting(batches()):
        ticks(1)
    clock.spent("training")
    assert spent(clock) == ({"training": 4} | {"data": 8} if waited else {"training": 12})


def test_starts_that_were_killed_are_lost_after_the_checkpoint_and_between_them_nothing_is():
    clock = Clock()
    clock.begun = 200.0
    record = {"clock": {"at": 110.0, "seconds": {"starting": 4.0, "training": 6.0}}}
    # The checkpoint at 110 s is of the first start; the second saved nothing.
    clock.go_on(record, [[100.0, 113.0], [150.0, 157.0]])
    assert spent(clock) == {"starting": 4, "training": 6, "lost": 3 + 7, "stopped": 37 + 43}
    assert (clock.elapsed, clock.of_the_result) == (100, 10)


def test_what_was_killed_before_its_first_checkpoint_is_lost_whole():
    clock = Clock()
    clock.begun = 200.0
    clock.go_on({}, [[100.0, 120.0], [130.0, 130.0]])
    assert spent(clock) == {"lost": 20, "stopped": 80}


def test_a_first_start_and_one_after_an_older_release_have_lost_nothing():
    clock = Clock()
    clock.go_on({}, [])
    assert spent(clock) == {}
    clock.go_on({"seconds": 12.5}, [])
    assert spent(clock) == {"earlier": 12.5}


def test_a_workdir_says_when_each_start_began_and_was_last_alive(tmp_path):
    assert (lives(tmp_path, last_alive(tmp_path)), last_alive(tmp_path)) == ([], 0)
    add_start(tmp_path, "", 0, lives=[[100.0, 100.0]])
    rows = [{"step": step, "phase": "pretrain", "time": 100.0 + step} for step in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 4, "ti')
    assert lives(tmp_path, last_alive(tmp_path)) == [[100, 103]]
    record_failure(tmp_path, 4, "no reason")
    assert lives(tmp_path, 0) == [[100, 100]]  # still there
    (tmp_path / "provenance.json").write_text("{")
    assert lives(tmp_path, 103) == []


def test_the_page_has_every_part_of_the_time_and_their_shares(tmp_path):
    seconds = {"starting": 3.0, "compiling": 30.0, "training": 60.0, "lost": 5.0, "stopped": 2.0}
    run = make_run(tmp_path, sparse=False)
    write_json(run / "summary.json", make_summary(make_rows(400, sparse=False)) | {"seconds": seconds})
    panel = time_parts(read_run(run))
    assert panel.caption.startswith("1 min 40 s from the first start to the end.")
    assert [(row[1], row[2]) for row in panel.table.rows] == [(s, s / 100) for s in seconds.values()]
    for part in seconds:
        assert f'<th scope="row">{PARTS[part][0]}</th>' in panel.body
    assert time_parts(read_run(make_run(tmp_path / "older"))) is None


@pytest.mark.slow
def test_the_parts_sum_to_the_wall_clock_of_a_run_that_was_killed_twice(tmp_path, capsys):
    text, run = write_text(tmp_path / "text"), tmp_path / "run"
    starts = killed_at(run, text, tmp_path / "cache", [5, 11])
    seconds = read_json(run / "summary.json", "")["seconds"]
    wall = (run / "summary.json").stat().st_mtime - starts[0][0]
    with capsys.disabled():
        print(f" {sum(seconds.values()):.2f} of {wall:.2f} s: {seconds} ", end="")
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.02)
    assert {
        "starting",
        "compiling",
        "training",
        "topology",
        "evaluation",
        "saving",
        *NOT_OF_THE_RESULT,
    } <= seconds.keys()
    # Both are at least what was waited for, and what passed between the last save and the kill is no more than a start.
    assert seconds["stopped"] >= 2 * PAUSE_SECONDS
    assert seconds["lost"] < sum(end - begun for begun, end in starts[:2])
    evaluated = [row for row in read_metrics(run) if "val_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 6, 12]
    sums = [sum(row["seconds"].values()) for row in evaluated]
    assert sums == sorted(sums)
    for row, elapsed in zip(evaluated, sums, strict=True):  # a row of any start says when it was
        assert row["time"] - starts[0][0] == pytest.approx(elapsed, abs=0.02 * wall)
