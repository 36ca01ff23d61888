"""A workdir in a bucket: all that a run does there ends as on a disk, whatever fails, and no two runs write there."""

import dataclasses
import json
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from many import finish, start
from storage import BUCKET, Storage, begun, ended, needs_storage, serving
from tiny import NO_WINDOW, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.cloud import lease, spool
from spdf_jax.config.sweep import Column, Row, SweepConfig
from spdf_jax.errors import InputError
from spdf_jax.jobs.sweep import train_cells
from spdf_jax.training import loop
from spdf_jax.training.metrics import read_metrics
from spdf_jax.workdir import in_use, read_json

#: The main job, of seconds.
MAIN_JOB = (
    "--config=experiments/gpt2_mst.py",
    "--config.model.n_layer=1",
    "--config.model.n_head=2",
    "--config.model.d_model=32",
    "--config.model.context=64",
    "--config.pretrain.steps=18",
    "--config.pretrain.batch_size=4",
    "--config.pretrain.sparsity.update_every_steps=3",
    "--config.pretrain.optimizer.warmup_steps=4",
    "--config.loop.log_every_steps=1",
    "--config.loop.eval_every_steps=9",
    "--config.loop.checkpoint_every_steps=6",
    "--config.mesh.data=1",
    "--config.decode.max_new_tokens=8",
)


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    with serving() as storage:
        yield storage


@pytest.fixture
def here(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """The storage, for this process, which then knows nothing of it."""
    for name, value in storage.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(lease, "LEASE_SECONDS", 4.0)
    monkeypatch.setattr(spool, "_known", {})
    monkeypatch.setattr(spool, "_filled", set())
    monkeypatch.setattr(spool, "_spool", None)
    yield storage
    storage.fails = storage.loses_answer = lambda method, path: False


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text")


def short(text: Path, seed: int = 0):
    c = tiny_config(text, text.parent / "cache")
    c.seed, c.phases, c.pretrain.steps, c.pretrain.sparsity.update_every_steps = seed, ("pretrain",), 12, 3
    c.loop.checkpoint_every_steps = c.loop.eval_every_steps = 6
    c.pretrain.sparsity.update(NO_WINDOW)
    del c.finetune
    return spdf.resolve(c)


def sweep(text: Path) -> SweepConfig:
    cells = {f"s{seed}": short(text, seed) for seed in (1, 2)}
    rows = tuple(Row(name, ((name, name),)) for name in cells)
    names = {"experiment": "cloud", "variant": "test", "variants": ("test",), "title": "t", "remark": ""}
    return SweepConfig(**names, cells=cells, rows=rows, columns=(Column("loss", "summary.val_loss"),))


def same_bits(ours: Path, theirs: Path) -> None:
    """The newest checkpoints of two runs hold the same state."""
    states = [spdf.saved_run(place).state for place in (ours, theirs)]
    leaves = [jax.tree.leaves(state.replace(key=jax.random.key_data(state.key))) for state in states]
    assert len(leaves[0]) == len(leaves[1])
    for one, other in zip(*leaves, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def rows(place: Path | str) -> list[dict]:
    """What a run has logged, but for readings of the clock."""
    clock = ("tokens_per_second", "time", "seconds")
    return [{name: value for name, value in row.items() if name not in clock} for row in read_metrics(place)]


# --- without storage -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["gs://", "gs://bucket", "gs://bucket/", "gs://bucket/../run", Path("gs://bucket")])
def test_what_names_no_folder_of_a_bucket_is_refused(place):
    with pytest.raises(InputError, match=r"names no folder of a bucket; write gs://BUCKET/FOLDER$"):
        spool.located(place)


def test_without_the_packages_one_line_says_which_extra_brings_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(InputError, match=r"^gs://bucket/run: needs packages for it; pip install 'spdf_jax\[gcs\]'$"):
        spool.located("gs://bucket/run")


@pytest.mark.parametrize("place", ["runs/mine", "runs/a:/b", Path("runs/mine")])
def test_a_folder_of_a_disk_is_what_it_was(place):
    assert spool.located(place) == Path(place)
    assert type(spool.located(place)) is type(Path(place))
    assert spool.url(Path(place)) == ""
    assert spool.stored(Path(place)) == Path(place)
    spool.publish(Path(place))  # nothing


# --- the spool -------------------------------------------------------------------------------------------------------


@needs_storage
@pytest.mark.slow
def test_files_are_sent_as_they_change_in_the_order_in_which_they_were_written(here, monkeypatch):
    monkeypatch.setattr(spool, "_APPEND_BYTES", 10)
    folder = spool.located(f"gs://{BUCKET}/spool")
    folder.mkdir(parents=True)
    assert f"{folder / 'a'}" == f"gs://{BUCKET}/spool/a"
    for at, name in enumerate(("z", "sub/y", ".hidden", "checkpoints/x", "a.jsonl")):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"0123456789")
        os.utime(folder / name, (at, at))
    here.seen.clear()
    spool.publish(folder)
    assert list(here.objects("spool")) == ["a.jsonl", "sub/y", "z"]
    generations = here.objects("spool")
    assert generations["z"] < generations["sub/y"] < generations["a.jsonl"]
    assert sum(method == "POST" for method, _ in here.seen) == 3

    here.seen.clear()
    spool.publish(folder)
    assert not here.seen

    with (folder / "a.jsonl").open("ab") as file:
        file.write(b"more")
    (folder / "z").rename(folder / "z.aside")
    spool.publish(folder)
    assert any("a.jsonl/compose" in path for _, path in here.seen)
    assert here.read("spool/a.jsonl") == b"0123456789more"
    assert list(here.objects("spool")) == ["a.jsonl", "sub/y", "z.aside"]

    (folder / "a.jsonl").write_bytes(b"others, longer than those")  # no end of what was there
    spool.publish(folder)
    assert here.read("spool/a.jsonl") == b"others, longer than those"

    here.write("spool/new", b"of another process")
    here.write("spool/a.jsonl", b"too")
    spool.fill(folder)
    assert (folder / "new").read_bytes() == b"of another process"
    assert (folder / "a.jsonl").read_bytes() == b"too"


@needs_storage
@pytest.mark.nightly
def test_an_end_whose_answer_was_lost_is_not_put_there_twice(here, monkeypatch):
    monkeypatch.setattr(spool, "_APPEND_BYTES", 10)
    folder = spool.located(f"gs://{BUCKET}/twice")
    folder.mkdir(parents=True)
    (folder / "rows").write_bytes(b"0123456789")
    spool.publish(folder)
    for _ in range(3):
        with (folder / "rows").open("ab") as file:
            file.write(b"more")
        # The bucket has done it, and the answer is lost: the request is made again.
        asked = set[str]()
        here.loses_answer = lambda method, path, asked=asked: (
            "compose" in path and not (path in asked or asked.add(path))
        )
        spool.publish(folder)
        assert here.read("twice/rows") == (folder / "rows").read_bytes()


@needs_storage
@pytest.mark.nightly
def test_a_bucket_that_is_not_there_is_refused_in_one_line(here):
    with pytest.raises(
        InputError, match=r"^gs://no-such-bucket/run: the bucket refuses \(404 .*choose another --workdir$"
    ):
        spool.located("gs://no-such-bucket/run")


# --- the lease -------------------------------------------------------------------------------------------------------


@needs_storage
@pytest.mark.slow
def test_of_many_that_want_it_at_once_one_gets_the_lease(here, monkeypatch):
    monkeypatch.setattr(lease, "LEASE_SECONDS", 2.0)
    folder = spool.located(f"gs://{BUCKET}/many")
    for _ in range(3):  # a new one, one that was let go of, and again
        won, lost, together, over = [], [], threading.Barrier(8), threading.Event()

        def take(number, won=won, lost=lost, together=together, over=over):
            together.wait()
            try:
                with lease._Lease(folder).kept():
                    won.append(number)
                    over.wait()
            except InputError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=take, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        while len(won) + len(lost) < 8:
            time.sleep(0.05)
        over.set()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        refused = rf"workdir gs://{BUCKET}/many: another run is using it \(process .*\); wait .*"
        assert all(re.fullmatch(refused, said) for said in lost)


@needs_storage
@pytest.mark.nightly
def test_a_lease_is_taken_over_when_it_is_old_and_not_before(here):
    folder = spool.located(f"gs://{BUCKET}/old")
    here.write("old/.lock", json.dumps({"owner": "one that was killed", "token": "x"}).encode())
    began = time.monotonic()
    with lease._Lease(folder).kept():
        assert time.monotonic() - began > 3
        assert in_use(folder)
        assert lease.lease_of(folder)["owner"].startswith(f"process {os.getpid()} on ")
    assert not in_use(folder)
    began = time.monotonic()
    with lease._Lease(folder).kept():  # let go of, it is had at once
        assert time.monotonic() - began < 3


@needs_storage
@pytest.mark.nightly
def test_a_renewal_whose_answer_was_lost_is_still_ours(here, monkeypatch):
    monkeypatch.setattr(lease, "_end_without", lambda folder, why: pytest.fail(why))
    folder = spool.located(f"gs://{BUCKET}/renewed")
    with lease._Lease(folder).kept():
        numbers = iter(range(1000))
        here.loses_answer = lambda method, path: ".lock" in path and method == "POST" and next(numbers) % 2 == 0
        time.sleep(2 * lease.LEASE_SECONDS)
        here.loses_answer = lambda method, path: False
        assert in_use(folder)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk(storage: Storage, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The main job on a disk."""
    folder = tmp_path_factory.mktemp("disk") / "run"
    code, _, errors = ended(begun(storage, *MAIN_JOB, f"--workdir={folder}"))
    assert code == 0, errors
    return folder


def killing(storage: Storage, process, at: int) -> None:
    """Kills a process in the middle of a save: when it makes its request of number `at` for something of a checkpoint."""
    numbers = iter(range(100_000))

    def fails(method: str, path: str) -> bool:
        if method == "POST" and "checkpoints/" in path and next(numbers) == at:
            process.send_signal(signal.SIGKILL)
            time.sleep(0.2)  # what it was about to send is not sent
            return True
        return False

    storage.fails = fails


@needs_storage
@pytest.mark.nightly
def test_the_main_job_ends_in_a_bucket_as_on_a_disk_through_kills_and_failures(storage, on_disk, tmp_path, monkeypatch):
    workdir = f"gs://{BUCKET}/main"
    draw, kills = random.Random(0), 0
    for _ in range(3):
        process = begun(storage, *MAIN_JOB, f"--workdir={workdir}")
        killing(storage, process, draw.randrange(4, 40))
        kills += ended(process)[0] == -signal.SIGKILL
    numbers = iter(range(1_000_000))
    refused = []

    def fails(method: str, path: str) -> bool:
        if next(numbers) % 7 == 3:
            refused.append((method, path))
            return True
        return False

    storage.fails = fails
    code, output, errors = ended(begun(storage, *MAIN_JOB, f"--workdir={workdir}"))
    storage.fails = lambda method, path: False
    print(f"{kills} kills in the middle of saves, then {len(refused)} answers of 503; {output.splitlines()[-1]}")
    assert (code, kills) == (0, 3), errors
    assert any("checkpoints/" in path for _, path in refused)
    assert any("metrics.jsonl" in path or "upload" in path for _, path in refused)

    fetched = storage.fetch("main", tmp_path / "fetched")
    same_bits(fetched, on_disk)
    assert rows(fetched) == rows(on_disk)
    ours, theirs = (
        {
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file()
            and not {"checkpoints", "tensorboard"} & set(path.parts)
            and ".set_aside-" not in path.name  # rows of before the first checkpoint, as on a disk
        }
        for folder in (fetched, on_disk)
    )
    assert ours == theirs
    for name in ("tokenizer.json", "code/gpt2_mst.py", "mask_pictures/step_00000018.npz", "figures/masks.csv"):
        assert (fetched / name).read_bytes() == (on_disk / name).read_bytes()
    checkpoints = [{path.name for path in (folder / "checkpoints").iterdir()} for folder in (fetched, on_disk)]
    assert checkpoints[0] == checkpoints[1]
    assert f"gs://{BUCKET}/main" in (fetched / "report.html").read_text()
    events = [len(list((folder / "tensorboard").iterdir())) for folder in (fetched, on_disk)]
    assert events[0] >= events[1] == 1

    finished = storage.objects("main")
    code, output, errors = ended(begun(storage, *MAIN_JOB, f"--workdir={workdir}"))
    assert (code, f"{workdir}: this run is finished" in output) == (0, True), errors
    after = storage.objects("main")
    assert {name for name in finished.keys() | after.keys() if finished.get(name) != after.get(name)} <= {".lock"}


@needs_storage
@pytest.mark.nightly
def test_an_average_is_kept_there_through_a_kill(storage, tmp_path):
    job = (
        *MAIN_JOB,
        "--config.pretrain.ema_decay=0.8",
        "--config.loop.keep_checkpoints=1",
        "--config.loop.keep_every_steps=12",
    )
    code, _, errors = ended(begun(storage, *job, f"--workdir={tmp_path / 'disk'}"))
    assert code == 0, errors
    workdir = f"gs://{BUCKET}/average"
    process = begun(storage, *job, f"--workdir={workdir}")
    killing(storage, process, 25)
    assert ended(process)[0] == -signal.SIGKILL
    storage.fails = lambda method, path: False
    code, output, errors = ended(begun(storage, *job, f"--workdir={workdir}"))
    assert code == 0, errors
    fetched = storage.fetch("average", tmp_path / "fetched")
    same_bits(fetched, tmp_path / "disk")
    assert rows(fetched) == rows(tmp_path / "disk")
    averages, last = (
        [jax.tree.leaves(getattr(spdf.saved_run(place), what).params) for place in (fetched, tmp_path / "disk")]
        for what in ("result", "state")
    )
    for one, other in zip(*averages, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert any((np.asarray(one) != np.asarray(other)).any() for one, other in zip(averages[0], last[0], strict=True))
    checkpoints = [
        {path.name for path in (folder / "checkpoints").iterdir()} for folder in (fetched, tmp_path / "disk")
    ]
    assert checkpoints == [{"12", "18"}] * 2
    answers = []
    for place in (str(tmp_path / "disk"), workdir):
        for more in (("--job=evaluate",), ("--job=export",)):
            code, output, errors = ended(begun(storage, f"--workdir={place}", *more))
            assert code == 0, errors
            answers.append(output.replace(place, "WORKDIR"))
    assert answers[:2] == answers[2:]


@needs_storage
@pytest.mark.nightly
def test_every_job_works_there_and_answers_as_on_a_disk(storage, on_disk, tmp_path):
    for path in on_disk.rglob("*"):
        if path.is_file() and path.name != ".lock":
            storage.write(f"jobs/{path.relative_to(on_disk).as_posix()}", path.read_bytes())
    # On a disk orbax renames what is whole; in a bucket it leaves an object there last.
    for step in (on_disk / "checkpoints").iterdir():
        for place in (step, *(path for path in step.iterdir() if path.is_dir())):
            storage.write(f"jobs/{place.relative_to(on_disk).as_posix()}/commit_success.txt", b"")
    workdir = f"gs://{BUCKET}/jobs"
    answers = {}
    for job, *more in (
        ("evaluate",),
        ("export",),
        ("generate", "--prompt=the", "--config.decode.max_new_tokens=8"),
        ("report",),
    ):
        for place in (str(on_disk), workdir):
            code, output, errors = ended(begun(storage, f"--workdir={place}", f"--job={job}", *more))
            assert code == 0, errors
            answers[job, place] = output.replace(place, "WORKDIR")
        assert answers[job, str(on_disk)] == answers[job, workdir]
    fetched = storage.fetch("jobs", tmp_path / "fetched")
    assert (fetched / "evaluation.json").read_bytes() == (on_disk / "evaluation.json").read_bytes()
    names = {path.name for path in (on_disk / "huggingface").iterdir()}
    assert names == {path.name for path in (fetched / "huggingface").iterdir()}
    for name in names:
        assert (fetched / "huggingface" / name).read_bytes() == (on_disk / "huggingface" / name).read_bytes()

    output = f"gs://{BUCKET}/compared"
    code, said, errors = ended(begun(storage, "--job=compare", workdir, str(on_disk), f"--output={output}"))
    assert (code, said.splitlines()[-1]) == (0, f"{output}/report.html"), errors
    assert {"report.html", "compare.md", "compare.csv", "compare.tex", "compare.json"} <= storage.objects(
        "compared"
    ).keys()
    code, said, errors = ended(begun(storage, "--job=compare", workdir, str(on_disk), f"--output={output}"))
    assert code == 0, errors


@needs_storage
@pytest.mark.slow
def test_of_two_runs_at_once_one_is_refused_and_the_other_ends_as_alone(storage, on_disk, tmp_path):
    both = [begun(storage, *MAIN_JOB, f"--workdir=gs://{BUCKET}/both") for _ in range(2)]
    (won, _, said), (lost, _, refused) = sorted(map(ended, both), key=lambda end: end[0])
    assert (won, lost) == (0, 2), said + refused
    assert re.search(rf"error: workdir gs://{BUCKET}/both: another run is using it \(process \d+ on ", refused)
    fetched = storage.fetch("both", tmp_path / "fetched")
    same_bits(fetched, on_disk)
    assert rows(fetched) == rows(on_disk)


def at_its_first_checkpoint(storage, name):
    """The main job in a folder of the bucket, running, its first checkpoint whole."""
    process = begun(storage, *MAIN_JOB, f"--workdir=gs://{BUCKET}/{name}")
    while "checkpoints/6/commit_success.txt" not in storage.objects(name):
        assert process.poll() is None, ended(process)
        time.sleep(0.1)
    return process


@needs_storage
@pytest.mark.nightly
def test_a_run_that_has_lost_its_lease_ends_and_writes_nothing_more(storage, on_disk, tmp_path):
    workdir = f"gs://{BUCKET}/lost"
    first = at_its_first_checkpoint(storage, "lost")
    first.send_signal(signal.SIGSTOP)  # as a machine that sleeps, or is cut off
    code, _, errors = ended(begun(storage, *MAIN_JOB, f"--workdir={workdir}"))
    assert code == 0, errors
    before = storage.objects("lost")
    first.send_signal(signal.SIGCONT)
    code, _, errors = ended(first)
    assert code == 75, errors
    assert re.search(
        r"workdir gs://bucket/lost: its lease is lost \(.*\), and another run may be writing there", errors
    )
    assert storage.objects("lost") == before
    fetched = storage.fetch("lost", tmp_path / "fetched")
    same_bits(fetched, on_disk)
    assert rows(fetched) == rows(on_disk)


@needs_storage
@pytest.mark.nightly
def test_where_the_bucket_answers_no_more_the_run_ends_to_be_started_again(storage, on_disk, tmp_path):
    workdir = f"gs://{BUCKET}/silent"
    process = at_its_first_checkpoint(storage, "silent")
    storage.fails = lambda method, path: True
    code, _, errors = ended(process)
    storage.fails = lambda method, path: False
    assert code == 75, errors
    assert "Traceback" not in errors
    assert "the same command goes on from the last checkpoint" in errors
    code, output, errors = ended(begun(storage, *MAIN_JOB, f"--workdir={workdir}"))
    assert code == 0, errors
    assert "resuming after step" in output
    same_bits(storage.fetch("silent", tmp_path / "fetched"), on_disk)


@needs_storage
@pytest.mark.nightly
def test_a_damaged_checkpoint_is_set_aside_there(here, text, tmp_path, all_with_few_matrices, no_figures):
    config = short(text)
    spdf.train(config, tmp_path / "disk", progress=False)
    spdf.train(config, f"gs://{BUCKET}/damaged", progress=False)
    state = [name for name in here.objects("damaged") if name.startswith("checkpoints/12/state/d/")]
    largest = max(state, key=lambda name: len(here.read(f"damaged/{name}")))
    here.write(f"damaged/{largest}", b"cut")
    spdf.train(config, f"gs://{BUCKET}/damaged", progress=False)
    assert any(name.startswith("checkpoints/12.damaged-1/") for name in here.objects("damaged"))
    same_bits(f"gs://{BUCKET}/damaged", tmp_path / "disk")
    assert rows(f"gs://{BUCKET}/damaged") == rows(tmp_path / "disk")


@needs_storage
@pytest.mark.nightly
def test_a_sweep_and_a_run_that_starts_from_one_of_its_cells(here, text, tmp_path, all_with_few_matrices, no_figures):
    tables = {}
    for place in (tmp_path / "disk", spool.located(f"gs://{BUCKET}/sweep")):
        train_cells(sweep(text), place, progress=False)
        spool.publish_all()
        tables[place] = json.loads((place / "table.json").read_text())["rows"]
    assert len({json.dumps(sorted(row["values"].items())) for table in tables.values() for row in table[:1]}) == 1
    assert {"table.json", "table.md", "report.html", "cells/s1/summary.json", "cells/s2/summary.json"} <= here.objects(
        "sweep"
    ).keys()
    same_bits(f"gs://{BUCKET}/sweep/cells/s2", tmp_path / "disk" / "cells" / "s2")

    ends = []
    for source, place in ((tmp_path / "disk", tmp_path / "from"), (f"gs://{BUCKET}/sweep", f"gs://{BUCKET}/from")):
        spdf.train(dataclasses.replace(short(text), init_from=f"{source}/cells/s1"), place, progress=False)
        ends.append(place)
    same_bits(*ends)


def steady(text: Path, **changes):
    """A run that can be gone on from at step 6, or what goes on from it."""
    c = tiny_config(text, text.parent / "cache")
    c.phases, c.pretrain.steps, c.loop.keep_every_steps = ("pretrain",), 12, 6
    c.loop.checkpoint_every_steps = c.loop.eval_every_steps = 6
    set_sparsity(c.pretrain, rule="rigl", sparsity=0.5, update_every_steps=3)
    c.pretrain.optimizer.schedule, c.pretrain.optimizer.warmup_steps = "constant", 2
    del c.finetune
    c.update(changes)
    return c


def of_another_rate(text: Path, source: Path | str):
    """The second half, at another rate."""
    c = steady(text, init_from=str(source), init_what="state", init_step=6)
    c.pretrain.steps, c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 6, 1e-3, 0
    return c


@needs_storage
@pytest.mark.nightly
def test_a_run_goes_on_from_a_state_wherever_either_lies(here, text, tmp_path, all_with_few_matrices, no_figures):
    parents = [tmp_path / "disk", f"gs://{BUCKET}/parent"]
    for parent in parents:
        spdf.train(steady(text), parent, progress=False)
    children = []
    for number, parent in enumerate([parents[0], *parents, parents[1]]):
        children.append(f"gs://{BUCKET}/child{number}" if number % 2 else tmp_path / f"child{number}")
        spdf.train(of_another_rate(text, parent), children[-1], progress=False)
        spdf.train(of_another_rate(text, parent), children[-1], progress=False)  # is finished
    first, *others = children
    assert rows(first)[-1]["step"] == 12
    spool.publish_all()
    for other in others:
        same_bits(other, first)
        assert rows(other) == rows(first)
    kept = [read_json(spool.located(child) / "ancestors.json", "")["ancestors"] for child in children]
    assert [one[0]["workdir"] for one in kept] == [str(parent) for parent in (parents[0], *parents, parents[1])]
    assert [one[0] | {"workdir": ""} for one in kept] == [kept[0][0] | {"workdir": ""}] * 4
    assert "ancestors.json" in here.objects("child1")


@needs_storage
@pytest.mark.nightly
def test_the_best_state_is_kept_there_and_made_again_where_it_is_damaged(
    here, text, tmp_path, monkeypatch, all_with_few_matrices, no_figures
):
    """As tests of early stopping in `test_finetune.py` have it on a disk."""
    losses = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2}
    c = steady(text)
    c.pretrain.steps, c.pretrain.patience_evaluations, c.loop.eval_every_steps = 40, 2, 2
    c.loop.checkpoint_every_steps, c.loop.keep_checkpoints = 3, 2
    c.loop.keep_every_steps = 0
    evaluate_and_log, save = loop._evaluate_and_log, loop._save
    saved: list[int] = []

    def evaluating(run, plan, steps, state, done):
        monkeypatch.setattr(loop, "evaluate", lambda *_: losses[done])
        evaluate_and_log(run, plan, steps, state, done)

    def saving(run, checkpoints, plan, state):
        save(run, checkpoints, plan, state)
        saved.append(int(state.step))
        if len(saved) == 5:  # what was begun is on its way
            checkpoints.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_evaluate_and_log", evaluating)
    monkeypatch.setattr(loop, "_save", saving)
    for place in (tmp_path / "disk", f"gs://{BUCKET}/best"):
        saved.clear()
        with pytest.raises(KeyboardInterrupt):
            spdf.train(c, place, progress=False)
        summary = spdf.train(c, place, progress=False)
        assert (summary["steps"], summary["best_step"], summary["val_loss"]) == (8, 4, 3.0)
        assert int(spdf.saved_run(place).state.step) == 4
    same_bits(f"gs://{BUCKET}/best", tmp_path / "disk")
    assert rows(f"gs://{BUCKET}/best") == rows(tmp_path / "disk")

    def kept() -> set[str]:
        return {name.split("/")[1] for name in here.objects("best") if name.startswith("best/")}

    assert kept() == {"4"}
    state = [name for name in here.objects("best") if name.startswith("best/4/state/d/")]
    largest = max(state, key=lambda name: len(here.read(f"best/{name}")))
    here.write(f"best/{largest}", b"cut")
    assert spdf.train(c, f"gs://{BUCKET}/best", progress=False)["best_step"] == 4
    assert kept() == {"4"}
    same_bits(f"gs://{BUCKET}/best", tmp_path / "disk")


@needs_storage
@pytest.mark.nightly
def test_a_run_of_any_model(here, tmp_path, no_figures):
    params, filter = {"w": jax.numpy.ones((8, 8))}, [("w", "matrix")]
    masks = spdf.init_masks(jax.random.key(0), params, sparsity=0.75, filter=filter)
    programme = spdf.make_programme(params, 6, filter=filter, rule="rigl", sparsity=0.75, update_every_steps=2)

    def loss_fn(params, x):
        return jax.numpy.mean((x @ params["w"] - x) ** 2)

    def batches(start):
        return (jax.random.normal(jax.random.key(i), (4, 8)) for i in range(start, 6))

    states = []
    for place in (tmp_path / "disk", f"gs://{BUCKET}/fit", f"gs://{BUCKET}/fit"):
        state, summary = spdf.fit(loss_fn, params, batches, optax.adam(0.1), masks, programme, place, progress=False)
        states.append(np.asarray(state.params["w"]))
        assert summary["steps"] == 6
    np.testing.assert_array_equal(states[0], states[1])
    np.testing.assert_array_equal(states[0], states[2])


@needs_storage
@pytest.mark.nightly
def test_two_processes_train_in_one_bucket(here, text, tmp_path):
    for workdir in (tmp_path / "disk", f"gs://{BUCKET}/two"):
        arguments = ("--config.pretrain.steps=12", "--config.finetune.steps=2", "--config.mesh.data=2")
        for process in finish(start(2, 1, workdir, text, *arguments)):
            assert process.code == 0, process.errors
    same_bits(here.fetch("two", tmp_path / "fetched"), tmp_path / "disk")
    assert rows(tmp_path / "fetched") == rows(tmp_path / "disk")


@needs_storage
@pytest.mark.nightly
def test_a_run_that_is_refused_leaves_nothing_there(here, text):
    c = short(text)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, path=str(text / "not there")))
    with pytest.raises(InputError, match="not there"):
        spdf.train(c, f"gs://{BUCKET}/refused", progress=False)
    c = short(text)
    c = dataclasses.replace(c, loop=dataclasses.replace(c.loop, trackers="wandb"))
    with pytest.raises(
        InputError, match=r"^config\.loop\.trackers: their databases cannot be kept in a bucket, .* gs://bucket/"
    ):
        spdf.train(c, f"gs://{BUCKET}/refused", progress=False)
    assert not here.objects("refused")
