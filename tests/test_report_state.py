"""A page says what became of its run: it runs, it was interrupted, it failed and why; and its figures are the last ones."""

import fcntl
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from report_folders import make_finetuned, make_rows, make_run, make_sweep, read, table_cells, titles, write_lines
from tiny import NO_WINDOW, rows_without_clock, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax import processes, workdir
from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError, Restart
from spdf_jax.jobs import pages
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.pages import LivePage
from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.report.compare import read_runs, write_comparison
from spdf_jax.report.records import read_run
from spdf_jax.report.run import verdict
from spdf_jax.training import loop
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan
from spdf_jax.training.provenance import record_failure
from spdf_jax.workdir import in_use, lock, write_json

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")

TIME = r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"


def status(page: str) -> str:
    return re.findall(r'<p class="status(?: failed)?">(.*?)</p>', page)[0]


def note(page: str) -> str:
    return re.findall(r'<p class="note">(.*?)</p>', page)[0]


@pytest.fixture
def halfway(tmp_path) -> Path:
    """A run at step 120, whose last evaluation was at step 100 and whose newest checkpoint is of step 80."""
    run = make_run(tmp_path / "run", last_step=120)
    for step in (40, 80):
        (run / "checkpoints" / str(step)).mkdir(parents=True)
    (run / ".lock").touch()
    write_json(run / "provenance.json", {"starts": [START]})
    return run


START = {
    "step": 0,
    "time": "2026-11-30T08:00:01+00:00",
    "packages": {"spdf_jax": "0.2.0", "jax": "0.12"},
    "commit": "abc",
    "python": "3.13.1",
}


def test_nothing_is_drawn_over_steps_before_the_first(tmp_path):
    """In an evaluation before the first step a page has a loss to say, and no axis to put it on."""
    begun = [row | {"sparsity": 0.5} for row in make_rows(0, sparse=True) if "val_loss" in row]
    runs = [make_run(tmp_path / name, last_step=0, rows=begun) for name in "ab"]
    page = read(write_report(runs[0]))
    assert [title for title in titles(page) if title.startswith(("Loss", "Sparsity", "Churn"))] == []
    assert "Numbers" in titles(page)
    assert "8.55" in page
    assert write_comparison(read_runs(runs, tmp_path), tmp_path)
    assert titles(read(tmp_path / "report.html")) == ["Runs", "Where they come from"]
    one = read(write_report(make_run(tmp_path / "c", last_step=1)))
    assert {"Loss over steps", "Sparsity over steps"} <= set(titles(one))


def test_a_run_that_nobody_holds_was_interrupted(halfway):
    page = read(write_report(halfway))
    assert re.fullmatch(f"interrupted, at step 120 of 400 as of {TIME}", status(page))
    assert note(page).startswith("The same command resumes it from its checkpoint at step 80. FLOPs saved are counted")
    assert "In its own workdir the command goes on with this run" in page
    shutil.rmtree(halfway / "checkpoints")
    assert note(read(write_report(halfway))).startswith("Nothing is saved yet: the same command starts at step 0.")


def test_a_run_that_holds_its_folder_runs(halfway):
    with lock(halfway):
        page = read(write_report(halfway))
    assert re.fullmatch(f"running, at step 120 of 400 as of {TIME}", status(page))
    assert note(page).startswith("This page is written again as the run goes on: reload it.")
    assert not in_use(halfway)


def test_what_failed_says_why_until_it_is_started_again(halfway):
    record_failure(halfway, 123, "step 123: loss nan; lower the learning rate")
    page = read(write_report(halfway))
    assert status(page).startswith("failed, at step 123 of 400 as of ")
    assert '<p class="status failed">' in page
    assert re.match(f"It failed at {TIME}: step 123: loss nan; lower the learning rate. FLOPs", note(page))
    with lock(halfway):
        page = read(write_report(halfway))
        assert status(page).startswith("running, at step 120 of 400")
        assert '<p class="status">' in page
    starts = json.loads((halfway / "provenance.json").read_text())["starts"]
    write_json(halfway / "provenance.json", {"starts": [*starts, START | {"step": 80}]})
    assert status(read(write_report(halfway))).startswith("interrupted, at step 120 of 400")


def test_a_failure_that_cannot_be_kept_is_not_another_failure(tmp_path):
    record_failure(tmp_path, 3, "no room")
    assert not list(tmp_path.iterdir())


def test_on_a_disk_without_locks_nobody_knows(halfway, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    page = read(write_report(halfway))
    assert status(page).startswith("unfinished, at step 120 of 400 as of ")
    assert note(page).startswith("Its disk has no locks, so whether it runs nobody knows. The same command resumes it")
    assert status(read(write_report(halfway, running=True))).startswith("running, ")


def test_a_look_at_the_lock_keeps_no_run_from_starting(halfway, monkeypatch):
    looking = (halfway / ".lock").open()
    fcntl.flock(looking, fcntl.LOCK_SH)
    monkeypatch.setattr(workdir.time, "sleep", lambda _: looking.close())
    with lock(halfway):
        assert in_use(halfway)


def test_the_verdict_is_of_the_last_figures(halfway, tmp_path):
    rows = [row for row in make_rows(120, sparse=True) if row["step"] == 0 or "val_loss" not in row]
    found = {
        "newer than the evaluation": verdict(read_run(halfway)),
        "evaluated once": verdict(read_run(make_run(tmp_path / "once", last_step=120, rows=rows, sparse=False))),
        "evaluated last": verdict(read_run(make_run(tmp_path / "last", last_step=100, sparse=False))),
        "before training": verdict(read_run(make_run(tmp_path / "first", last_step=0, sparse=False))),
        "nothing": verdict(read_run(make_run(tmp_path / "none", last_step=0, rows=[], sparse=False))),
    }
    assert re.match(
        r"Training loss \d\.\d\d at step 120 \(validation loss 4.58 at step 100\) after 983k tokens with",
        found["newer than the evaluation"],
    )
    assert "(validation loss 8.55 at step 0) after 983k tokens" in found["evaluated once"]
    assert found["evaluated last"].startswith("Validation loss 4.58 after 819k tokens")
    assert found["before training"] == "Validation loss 8.55, before training."
    assert found["nothing"] == "No validation loss yet."


def test_wherever_a_run_ends_its_numbers_are_of_one_step(tmp_path):
    """Also where its last row counts no tokens, or its checkpoint is of a step that was not logged."""
    rows = [row for row in make_rows(75, sparse=True) if "loss" not in row or row["step"] % 15 == 0]
    assert {"density", "val_loss", "loss"} <= {key for row in rows for key in row}
    for end in range(1, len(rows) + 1):
        run = read_run(make_run(tmp_path, last_step=0, rows=rows[:end], sparse=False))
        counted = [row for row in rows[:end] if "tokens" in row][-1]
        same = {key: counted[key] for key in ("tokens", "train_flops", "dense_flops", "sparsity")}
        assert {key: run.numbers[key] for key in same} == same
        assert run.numbers["steps"] == counted["step"]
        assert run.last_step == rows[end - 1]["step"]
    (tmp_path / "checkpoints" / "77").mkdir(parents=True)
    page = read(write_report(tmp_path))
    assert status(page).startswith("interrupted, at step 77 of 400 as of ")
    assert "from its checkpoint at step 77" in note(page)
    assert re.search(r"Training loss [\d.]+ at step 75 \(validation loss [\d.]+ at step 50\) after 614k tokens", page)
    said = {label: (value, remark) for label, value, remark in table_cells(page, "Numbers")}
    assert said["Training steps"] == ("75", "of 400")
    assert said["Training tokens"] == ("614,400", "")
    assert said["Validation loss"][1] == "at the last evaluation, step 50"
    assert said["Throughput"][1] == "measured up to step 75, evaluations left out"
    assert "Of step 75, the last logged, unless a line names another." in page


@pytest.mark.parametrize("unfinished", [True, False])
def test_a_validation_loss_that_is_not_of_the_last_step_names_its_own(unfinished, tmp_path):
    run = make_finetuned(tmp_path)
    if unfinished:
        (run / "summary.json").unlink()
        rows = read_metrics(run)
        write_lines(run / "metrics.jsonl", [row for row in rows if row["step"] < 1100 or "val_loss" not in row])
    text = verdict(read_run(run))
    where = "at step 1,080" if unfinished else "at its best, step 1,080,"
    assert re.search(rf"alidation loss [\d.]+ over the target tokens of restaurant {where}", text)


@pytest.mark.parametrize(("loss", "said"), [(6.2, False), (6.21, True), (7.0, True)])
def test_a_model_that_beats_no_frequencies_is_said_not_to(loss, said, tmp_path):
    run = make_run(tmp_path, sparse=False)
    write_json(run / "summary.json", json.loads((run / "summary.json").read_text()) | {"val_loss": loss})
    assert ("That is no better than predicting every token by its frequency: 6.21." in verdict(read_run(run))) == said


def test_a_page_of_a_folder_that_cannot_be_written_goes_elsewhere(halfway, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in halfway.rglob("*")}
    page = write_report(halfway, tmp_path / "there")
    assert page == tmp_path / "there" / "report.html"
    assert (tmp_path / "there" / "figures" / "loss_over_steps.csv").is_file()
    assert {path: path.stat().st_mtime_ns for path in halfway.rglob("*")} == before


def test_a_sweep_under_way_runs_or_was_interrupted(tmp_path):
    make_sweep(tmp_path, finished=False)
    of = "14 of the 15 runs begun are finished as of"
    page = read(write_sweep_report(tmp_path))
    assert re.fullmatch(f"table: mini, interrupted: {of} {TIME}; the same command goes on", status(page))
    (tmp_path / ".lock").touch()
    with lock(tmp_path):
        assert re.fullmatch(f"table: mini, running: {of} {TIME}", status(read(write_sweep_report(tmp_path))))
    page = write_sweep_report(tmp_path, tmp_path / "there", figures=False)
    assert 'href="../cells/pretrain_0/report.html"' in read(page)


# --- how often -------------------------------------------------------------------------------------------------------


def test_pages_take_a_twentieth_of_the_time_and_end_nothing(monkeypatch):
    clock, written, said = [0.0], [], []

    def write() -> None:
        clock[0] += 3
        written.append(clock[0])
        if len(written) > 1:
            raise ValueError("a bug of the page")

    monkeypatch.setattr(pages.time, "monotonic", lambda: clock[0])
    page = LivePage(write, said.append)
    for _ in range(200):
        page.update()
        clock[0] += 1
    # The first when two seconds are a twentieth; with 3 spent and 3 to come, after 120 s, and so on.
    assert written == [43, 123, 183]
    assert said == ["the page is left as it was: a bug of the page"]


# --- of real runs ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def short(text: Path) -> RunConfig:
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.phases, c.loop.checkpoint_every_steps, c.loop.eval_every_steps = 12, ("pretrain",), 4, 6
    c.pretrain.sparsity.update(NO_WINDOW | {"update_every_steps": 4})
    del c.finetune
    return spdf.resolve(c)


def seen_pages(monkeypatch: pytest.MonkeyPatch, *, share: float) -> list[str]:
    """What the status of every page of a run will be, in order; pages may take `share` of its time."""
    seen, write = [], pages.write_run_page

    def writing(*arguments, **how) -> Path:
        page = write(*arguments, **how)
        seen.append(re.sub(f" as of {TIME}", "", status(read(page))))
        return page

    monkeypatch.setattr(pages, "SHARE_OF_TIME", share)
    monkeypatch.setattr(pages, "write_run_page", writing)
    monkeypatch.setattr(jobs, "write_run_page", writing)
    return seen


@pytest.mark.slow
def test_a_run_that_fails_says_so_until_it_is_finished(text, tmp_path, monkeypatch):
    config, one_step = short(text), loop.one_step

    def poisoned(steps, plan, local, state, batch):
        state, metrics = one_step(steps, plan, local, state, batch)
        return state, metrics | ({"loss": jnp.float32(np.nan)} if local == 6 else {})

    seen = seen_pages(monkeypatch, share=float("inf"))
    monkeypatch.setattr(loop, "one_step", poisoned)
    with pytest.raises(InputError, match="step 7: loss nan"):
        jobs.train(config, tmp_path, progress=False)
    assert seen == ["running, at step 0 of 12", "running, at step 6 of 12", "failed, at step 7 of 12"]
    assert "step 7: loss nan, gradient norm" in note(read(tmp_path / "report.html"))
    assert not (tmp_path / "figures").exists()
    monkeypatch.setattr(loop, "one_step", one_step)
    jobs.train(config, tmp_path, progress=False)
    assert seen[3:] == ["running, at step 6 of 12", "running, at step 12 of 12", "finished"]
    assert (tmp_path / "figures" / "loss_over_steps.svg").is_file()


@pytest.mark.slow
def test_pages_of_a_run_that_is_interrupted_change_none_of_its_rows(text, tmp_path, monkeypatch):
    config, run = short(text), tmp_path / "run"
    seen = seen_pages(monkeypatch, share=float("inf"))
    monkeypatch.setattr(processes, "preempted", lambda step: step == 9)
    with pytest.raises(Restart):
        jobs.train(config, run, progress=False)
    assert seen == ["running, at step 0 of 12", "running, at step 6 of 12", "interrupted, at step 9 of 12"]
    assert "from its checkpoint at step 9" in note(read(run / "report.html"))
    monkeypatch.setattr(processes, "preempted", lambda step: False)
    jobs.train(config, run, progress=False)
    monkeypatch.undo()
    jobs.train(config, tmp_path / "undisturbed", progress=False)
    assert rows_without_clock(run) == rows_without_clock(tmp_path / "undisturbed")


def test_of_masks_that_move_there_are_pictures_at_eighths(text, tmp_path):
    (plan,) = make_plan(short(text))
    assert plan.picture_steps >= {n * 12 // 8 for n in range(9)}
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("pretrain",)
    del c.finetune
    c.pretrain.sparsity.update({"rule": "static", "schedule": "constant", **NO_WINDOW})
    for key in ("ramp_end", "ultra_end", "restoration_end", "update_every_steps"):
        c.pretrain.sparsity[key] = spdf.default_config("a", "b", variants=("b",)).pretrain.sparsity[key]
    (plan,) = make_plan(spdf.resolve(c))
    assert plan.picture_steps == {0, 60}
