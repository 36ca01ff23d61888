"""What can go wrong with a run, and the test that shows that nothing is lost and what is said.

| fault | test |
|---|---|
| kill -9 in a save, after a topology step, between phases | `test_train.py::test_killed_run_ends_with_the_same_bits` |
| kill -9 of one process of several | `test_processes.py::test_one_killed_process_ends_all_and_the_same_command_...` |
| SIGTERM, Ctrl-C | `test_a_signal_saves_...`, `test_ctrl_c_...`, `test_a_preempted_run_...` here |
| a report never written, a mask picture cut | `test_a_finished_run_has_its_report`, `test_a_cut_mask_picture_...` here |
| a finished run's result damaged | `test_a_finished_run_whose_...` here, `test_finetune.py::test_a_best_state_...` |
| a checkpoint rotated away while it is read | `test_a_checkpoint_that_is_rotated_away_...` here |
| SIGTERM to one process of several | `test_processes.py::test_sigterm_to_one_process_...` |
| a file of a checkpoint cut, changed by a bit, gone | `test_a_damaged_checkpoint_...`, `test_where_no_checkpoint_...` here |
| full disk | `test_main.py::test_a_full_disk_exits_2_and_keeps_the_last_checkpoint`, `test_train.py::test_no_room_for_...` |
| workdir that cannot be written | `test_a_read_only_disk_...` here, `test_main.py::test_workdir_that_cannot_be_made` |
| loss that is not finite | `test_a_loss_that_is_not_finite_...` here |
| finite loss, parameters that are not | `test_parameters_that_are_not_finite_are_never_saved` here |
| token out of range | `test_a_token_over_the_vocabulary_...` here, `test_main.py::test_token_id_over_the_vocabulary` |
| data replaced between runs | `test_main.py::test_data_replaced_between_runs` |
| data missing in one process of several | `test_processes.py::test_data_that_one_process_lacks_stops_all_with_its_message` |
| two runs in one workdir | `test_main.py::test_a_second_run_in_a_workdir_in_use_is_refused` |
| a step that hangs | `test_what_hangs_is_ended_with_its_stacks`, `test_every_step_and_every_validation_batch_...` here |
| another number of cores than before | `test_a_run_that_goes_on_on_another_number_of_cores_...` here |
| an exception in one process of several | `test_processes.py::test_an_exception_in_one_process_ends_the_others` |
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from tiny import NO_WINDOW, needs_mount, rows_without_clock, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax import processes
from spdf_jax import workdir as workdir_files
from spdf_jax.errors import Restart
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.processes import device_name
from spdf_jax.report import write_report
from spdf_jax.training import checkpoint as checkpointing
from spdf_jax.training import loop, resume, stored_state
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.restore import saved_run

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def short(text: Path):
    """One phase of 12 steps, saved every four, with few programs to compile."""
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.loop.checkpoint_every_steps, c.phases = 12, 4, ("pretrain",)
    c.pretrain.sparsity.update_every_steps = 3
    c.pretrain.sparsity.update(NO_WINDOW)
    del c.finetune
    return c


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The short run from its beginning to its end."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    jobs.train(spdf.resolve(short(text)), workdir, progress=False)
    return workdir


def saved(workdir: Path) -> list[np.ndarray]:
    """Every array of a run's result."""
    state = saved_run(workdir).state
    return jax.tree.leaves(jax.device_get(state.replace(key=jax.random.key_data(state.key))))


def assert_ends_as(workdir: Path, whole: Path) -> None:
    for ours, theirs in zip(saved(workdir), saved(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert rows_without_clock(workdir) == rows_without_clock(whole)


# --- the end before the end -------------------------------------------------------------------------------------------


def command(workdir: Path, text: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [
            sys.executable,
            "-c",  # as a terminal starts it: SIGINT is ignored where tests run in the background
            "import signal, sys; from spdf_jax import main; signal.signal(signal.SIGINT, signal.default_int_handler); "
            "main.processes.end(main.main(sys.argv))",
            "--config",
            "tests/tiny_experiment.py",
            "--workdir",
            workdir,
            *arguments,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TINY_TEXT": str(text)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_with_75_and_one_message(number, text, tmp_path):
    started = command(tmp_path, text, "--quiet", "--config.loop.checkpoint_every_steps=1000")
    metrics = tmp_path / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 4:
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(number)
    _, errors = started.communicate()
    (step,) = (p.name for p in (tmp_path / "checkpoints").iterdir())
    assert started.returncode == processes.RESTART_CODE == 75
    first = "interrupted: saving after this step; once more ends at once\n" if number == signal.SIGINT else ""
    assert errors == f"{first}preempted: saved at step {step}; the same command resumes\n"
    assert read_metrics(tmp_path)[-1]["step"] == int(step)


@pytest.mark.slow
def test_ctrl_c_before_a_step_and_a_second_one_in_a_step_end_at_once_in_a_line(text, tmp_path):
    said = "interrupted; the same command goes on from the last checkpoint, if the run has saved one\n"
    started = command(tmp_path / "early", text)
    assert started.stdout.readline().startswith("Running tiny")
    started.send_signal(signal.SIGINT)
    assert (started.communicate()[1], started.returncode) == (said, 130)
    # A step that takes its time: without a first one there is nothing to save, and saving is not waited for.
    started = command(tmp_path / "late", text, "--config.model.d_model=768")
    metrics = tmp_path / "late" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 2:
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    first = started.stderr.readline()
    started.send_signal(signal.SIGINT)
    assert (first + started.communicate()[1], started.returncode) == (
        f"interrupted: saving after this step; once more ends at once\n{said}",
        130,
    )
    assert not [path for path in (tmp_path / "late" / "checkpoints").iterdir() if path.name.isdecimal()]


def test_what_a_thread_is_at_does_not_hold_the_end_of_a_second_ctrl_c(monkeypatch):
    """It may read a batch of gigabytes, for which the interpreter's own end would wait."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with pytest.raises(SystemExit):
        processes.end(0)
    assert codes == []
    with pytest.raises(SystemExit):  # since this `_exit` does not end
        processes.end(130)
    assert codes == [130]


def test_ctrl_c_saves_once_there_is_something_to_save_and_ends_at_once_the_second_time():
    program = """
import signal
from spdf_jax import processes

def interrupted():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return True
    return False

signal.signal(signal.SIGINT, signal.SIG_IGN)
processes.guard()
print(interrupted())  # a shell has it ignored
for steps in (), (6,):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    processes.guard()
    for step in steps:
        processes.beat(step, 0)
    print(interrupted(), processes.preempted(6), interrupted())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True", "False", "True", "False", "True", "True"]
    assert result.stderr == "interrupted: saving after this step; once more ends at once\n"


def test_a_preempted_run_ends_with_the_same_bits(whole, text, tmp_path, monkeypatch):
    config = spdf.resolve(short(text))
    for stop in (5, 8):  # between checkpoints, and where there is one anyway
        monkeypatch.setattr(processes, "preempted", lambda step, stop=stop: step == stop)
        with pytest.raises(Restart, match=f"^preempted: saved at step {stop}; the same command resumes$"):
            jobs.train(config, tmp_path, progress=False)
        assert int(saved_run(tmp_path).state.step) == stop
    monkeypatch.undo()
    jobs.train(config, tmp_path, progress=False)
    assert_ends_as(tmp_path, whole)


@pytest.mark.slow
def test_what_hangs_is_ended_with_its_stacks():
    program = """
import time
from spdf_jax import processes
def a_step_that_hangs():
    processes.beat(7, 1)
    time.sleep(100)
processes.guard()
processes.beat(6, 0)  # 0: as long as it likes
time.sleep(2.5)
a_step_that_hangs()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == processes.RESTART_CODE
    assert "in a_step_that_hangs" in result.stderr
    assert result.stderr.splitlines()[-1] == (
        "step 7: nothing has moved for 1 s (config.loop.watchdog_seconds); where each thread was is above; "
        "the same command resumes from the last checkpoint"
    )


def test_every_step_and_every_validation_batch_beats(text, tmp_path, monkeypatch):
    c = short(text)
    c.pretrain.steps, c.loop.watchdog_seconds, c.loop.eval_batch_size = 5, 77, 1
    set_sparsity(c.pretrain, rule="static", sparsity=0.8, sparsify_head=True)
    beats = []
    monkeypatch.setattr(processes, "beat", lambda *beat: beats.append(beat))
    jobs.train(spdf.resolve(c), tmp_path, progress=False)
    assert set(beats[:-1]) == {(step, 77) for step in range(6)}
    assert beats.count((0, 77)) == beats.count((5, 77)) - 1 > 1  # the validation batches; step 5 beats itself, too
    assert beats[-1] == (0, 0)  # what comes after the last step may take its time


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def largest(folder: Path, pattern: str) -> Path:
    return max((p for p in folder.glob(pattern) if p.is_file()), key=lambda p: p.stat().st_size)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def change_step(file: Path) -> None:
    file.write_text(file.read_text().replace('"next_example": 48', '"next_example": 49'))


def array_bytes(step_folder: Path) -> tuple[Path, int]:
    """The file and the place in it of the token embedding. Files beside hold what an index no longer points at: how much, and
    in which of them, is a matter of time, and damage to it changes nothing."""
    state = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{step_folder / 'state'}/"}).result()
    value = state.read("params.wte.embedding/0.0").result().value
    (found,) = (p for p in step_folder.glob("state/ocdbt.process_0/d/*") if value in p.read_bytes())
    return found, found.read_bytes().index(value) + len(value) // 2


def cut_array(step_folder: Path) -> None:
    file, place = array_bytes(step_folder)
    file.write_bytes(file.read_bytes()[:place])


def flip_array(step_folder: Path) -> None:
    file, place = array_bytes(step_folder)
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)


def to(pattern: str, harm: Callable[[Path], None]) -> Callable[[Path], None]:
    return lambda step_folder: harm(largest(step_folder, pattern))


DAMAGES = {
    "a bit of an array": flip_array,
    "a digit of the record": to("record/metadata", change_step),
}
MORE_DAMAGES = {
    "array cut": cut_array,
    "a bit of the index": to("state/d/*", flip),
    "arrays gone": lambda step_folder: array_bytes(step_folder)[0].unlink(),
    "index cut": to("state/d/*", cut),
    "record cut": to("record/metadata", cut),
    "list of arrays cut": to("state/_METADATA", cut),
    "a copy of another": lambda step_folder: (
        shutil.rmtree(step_folder),
        shutil.copytree(step_folder.with_name("8"), step_folder),
    ),
}


@pytest.fixture
def interrupted(whole, tmp_path):
    """As the short run was before it said that it was finished."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    return tmp_path


@pytest.mark.parametrize("damage", [*DAMAGES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_DAMAGES)])
def test_a_damaged_checkpoint_is_noticed_set_aside_and_the_one_before_it_gone_on_from(
    damage, whole, interrupted, text, capfd
):
    folder = interrupted / "checkpoints"
    (DAMAGES | MORE_DAMAGES)[damage](folder / "12")
    with pytest.raises(spdf.InputError, match="the checkpoint at step 12 is damaged"):
        saved_run(interrupted)
    capfd.readouterr()
    jobs.train(spdf.resolve(short(text)), interrupted, progress=False)
    said = capfd.readouterr()
    (aside,) = folder.glob("*.damaged-*")
    line, resuming, *_ = said.out.splitlines()
    start, end = (
        f"{folder}: the checkpoint at step 12 is damaged (",
        (f"); --job train falls back to the one before it, at step 8. The damaged one is kept as {aside.name}"),
    )
    assert line.startswith(start)
    assert line.endswith(end)
    assert resuming == f"{interrupted}: resuming after step 8 of 12."
    assert aside.name.startswith("12.")
    assert "Traceback" not in said.err
    shutil.rmtree(aside)
    assert_ends_as(interrupted, whole)


def test_a_run_that_goes_on_on_another_number_of_cores_says_so(interrupted, text, capsys, monkeypatch):
    """XLA splits sums of 65,536 and more over them."""
    monkeypatch.setattr(resume, "device_name", lambda: "8 x cpu, 1001 cores")
    jobs.train(spdf.resolve(short(text)), interrupted, progress=False)
    resuming = capsys.readouterr().out.splitlines()[0]
    assert resuming == (
        f"{interrupted}: resuming after step 12 of 12. It was computed on {device_name()} so far, and is on "
        f"8 x cpu, 1001 cores now: it will not end with the same bits as on either alone."
    )


def test_where_no_process_is_kept_to_some_cores_all_count(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert device_name() == "8 x cpu, 5 cores"


@pytest.fixture
def kept_to_one_core(monkeypatch):
    """Where the system can keep a process to some cores, it does; elsewhere it is as if it had."""
    if not hasattr(os, "sched_setaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
        yield
        return
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    yield
    os.sched_setaffinity(0, every)
    assert device_name().startswith(f"8 x cpu, {len(every)} core")


@pytest.mark.usefixtures("kept_to_one_core")
def test_the_cores_counted_are_those_that_the_process_may_use():
    assert device_name() == "8 x cpu, 1 core"


def test_where_no_checkpoint_is_sound_nothing_is_moved(interrupted, text):
    folder = interrupted / "checkpoints"
    shutil.rmtree(folder / "4")
    shutil.rmtree(folder / "8")
    flip_array(folder / "12")
    with pytest.raises(spdf.InputError, match="but there is none; start again with another --workdir"):
        jobs.train(spdf.resolve(short(text)), interrupted, progress=False)
    assert [p.name for p in folder.iterdir()] == ["12"]


def contents(workdir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(workdir)): p.read_bytes() for p in sorted(workdir.rglob("*")) if p.is_file()}


def refused(config, workdir: Path) -> str:
    """What a start says that changes no file."""
    before = contents(workdir)
    with pytest.raises(spdf.InputError) as caught:
        jobs.train(spdf.resolve(config), workdir, progress=False)
    assert contents(workdir) == before
    return str(caught.value)


@pytest.fixture
def halfway(interrupted):
    """As the short run was after step 8."""
    shutil.rmtree(interrupted / "checkpoints" / "12")
    return interrupted


def test_a_checkpoint_copied_under_a_higher_number_does_not_stand_in_the_way_of_later_ones(
    halfway, whole, text, capsys
):
    folder = halfway / "checkpoints"
    shutil.copytree(folder / "8", folder / "1000")
    jobs.train(spdf.resolve(short(text)), halfway, progress=False)
    assert capsys.readouterr().out.startswith(
        f"{folder}: the checkpoint at step 1000 is damaged (it is a copy of that at step 8); --job train falls back to the one "
        f"before it, at step 8. The damaged one is kept as 1000.damaged-1\n"
    )
    assert {p.name for p in folder.iterdir()} == {"4", "8", "12", "1000.damaged-1"}
    shutil.rmtree(folder / "1000.damaged-1")
    assert_ends_as(halfway, whole)


def test_a_save_that_orbax_refuses_is_an_error(whole, interrupted):
    state = saved_run(whole).state
    checkpoints = checkpointing.Checkpoints(interrupted / "checkpoints")
    with pytest.raises(spdf.InputError, match="the state at step 5 was not saved, because a checkpoint at step 12 is"):
        checkpoints.save(state.replace(step=jnp.int32(5)), {"step": 5})
    checkpoints.drop_from(8)  # as for the best one of a time that comes again
    checkpoints.save(state.replace(step=jnp.int32(5)), {"step": 5})
    checkpoints.close()
    assert {p.name for p in (interrupted / "checkpoints").iterdir()} == {"4", "5"}


# --- a folder that has lost something ---------------------------------------------------------------------------------


def test_without_checkpoints_another_config_is_refused_and_the_same_sets_the_rows_aside(
    interrupted, whole, text, capsys
):
    shutil.rmtree(interrupted / "checkpoints")
    other = short(text)
    other.seed = 1
    (interrupted / "checkpoints").mkdir()
    assert "holds a run of another config (seed was 0, is 1)" in refused(other, interrupted)
    rows = (interrupted / "metrics.jsonl").read_bytes()
    jobs.train(spdf.resolve(short(text)), interrupted, progress=False)
    assert (
        f"{interrupted}/metrics.jsonl: has rows up to step 12, but no checkpoint is there: starting at step 0. "
        f"The rows are kept as metrics.jsonl.set_aside-1\n"
    ) in capsys.readouterr().out
    assert (interrupted / "metrics.jsonl.set_aside-1").read_bytes() == rows
    assert_ends_as(interrupted, whole)


@pytest.mark.parametrize("finished", [False, True])
def test_without_its_config_a_run_is_refused(finished, whole, halfway, text):
    if finished:
        shutil.copy(whole / "summary.json", halfway)
    (halfway / "config.json").unlink()
    assert "config.json: gone, but a run is there; restore it" in refused(short(text), halfway)


@pytest.mark.parametrize("harm", ["emptied", "cut", "joined", "one digit"])
def test_rows_that_are_not_those_of_the_checkpoint_are_refused(harm, halfway, text):
    path = halfway / "metrics.jsonl"
    rows = path.read_bytes()
    lines = rows.splitlines(keepends=True)
    digit = rows.index(b'"loss": ') + 12
    harmed = {
        "emptied": b"",
        "cut": b"".join(lines[:5]),
        "joined": b"".join(lines[:5]).removesuffix(b"\n") + b"".join(lines[5:]),
        "one digit": rows[:digit] + bytes([rows[digit] ^ 1]) + rows[digit + 1 :],
    }
    path.write_bytes(harmed[harm])
    assert "bytes of rows that the checkpoint at step 8 counts on" in refused(short(text), halfway)


def test_without_rows_a_run_goes_on_says_so_and_knows_its_first_loss(halfway, whole, text, capsys):
    (halfway / "metrics.jsonl").unlink()
    summary = jobs.train(spdf.resolve(short(text)), halfway, progress=False)
    assert "metrics.jsonl: gone, and with it the rows up to step 8; going on without them.\n" in capsys.readouterr().out
    assert summary["initial_val_loss"] == json.loads((whole / "summary.json").read_text())["initial_val_loss"]
    assert read_metrics(halfway)[0]["step"] == 9
    assert "the rows before step 9 are lost" in (halfway / "report.html").read_text()


def test_a_report_of_a_finished_run_refuses_other_rows(whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    with pytest.raises(spdf.InputError, match="bytes of rows that the finished run wrote"):
        write_report(tmp_path)


def test_what_killed_processes_left_is_swept_and_what_is_in_use_stays(halfway, text, monkeypatch):
    left = [".evaluation.json.123.tmp", ".huggingface-x1/gpt2/model.safetensors", ".report.html.ab.tmp/report.html"]
    left += ["mask_pictures/.step.npz.9.tmp", "checkpoints/12.orbax-checkpoint-tmp/state/x"]
    for name in left:
        (halfway / name).parent.mkdir(parents=True, exist_ok=True)
        (halfway / name).write_text("half")
    monkeypatch.setattr(jobs, "run_phase", lambda run, plan, state: state)
    monkeypatch.setattr(jobs, "_finish", lambda *_: {})
    with workdir_files.temporary_beside(halfway / "summary.json") as ours:
        ours.write_text("half")
        jobs.train(spdf.resolve(short(text)), halfway, progress=False)
        assert ours.exists()
        there = [p.relative_to(halfway) for p in halfway.rglob("*") if p.name.endswith(("tmp", "half"))]
        assert [p.name for p in there] == [ours.parent.name]
    assert not (halfway / ".huggingface-x1").exists()


def test_of_what_no_one_can_catch_only_late_reads_go_unsaid():
    heard = []
    hook = checkpointing._WithoutLateReads(heard.append)
    late, other = (SimpleNamespace(exc_value=RuntimeError(text)) for text in ("Event loop is closed", "another"))
    hook(late)
    hook(other)
    assert heard == [other]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_a_checksum_tells_one_changed_bit_and_two_swapped_elements(dtype):
    rng = np.random.default_rng(0)
    bits = jnp.dtype("uint8" if dtype == "bool" else f"uint{8 * jnp.dtype(dtype).itemsize}")
    words = rng.integers(2 if dtype == "bool" else 2 ** (8 * bits.itemsize), size=(3, 5, 8)).astype(bits)

    def checksum(words):
        array = (
            words.astype(bool)
            if dtype == "bool"
            else jax.lax.bitcast_convert_type(jnp.asarray(words), jnp.dtype(dtype))
        )
        return int(stored_state._checksum(jnp.asarray(array)))

    whole = checksum(words)
    for bit in range(1 if dtype == "bool" else 8 * bits.itemsize):
        for place in ((0, 0, 0), (2, 4, 7), (1, 2, 3)):
            changed = words.copy()
            changed[place] ^= bits.type(1 << bit)
            assert checksum(changed) != whole
    swapped = words.copy()
    swapped[0, 0, 0], swapped[2, 3, 4] = swapped[2, 3, 4], swapped[0, 0, 0]
    assert (checksum(swapped) == whole) == (words[0, 0, 0] == words[2, 3, 4])


def test_a_checkpoint_without_checksums_is_still_read(interrupted, whole):
    """As versions before wrote it."""
    record = interrupted / "checkpoints" / "12" / "record" / "metadata"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({k: v for k, v in content.items() if k not in ("leaves", "crc32")}))
    for ours, theirs in zip(saved(interrupted), saved(whole), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_finished_run_whose_result_is_damaged_is_not_finished(whole, text, tmp_path, capfd):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    flip_array(tmp_path / "checkpoints" / "12")
    config = spdf.resolve(short(text))
    with pytest.raises(spdf.InputError, match=r"step 12 is damaged .*; --job train falls back to the one before it"):
        evaluate_checkpoint(config, tmp_path)
    assert jobs.train(config, tmp_path, progress=False)["steps"] == 12
    assert "resuming after step 8 of 12" in capfd.readouterr().out
    assert_ends_as(tmp_path, whole)


def test_a_checkpoint_that_is_rotated_away_while_it_is_read_is_no_damage(whole, text, tmp_path, monkeypatch):
    """As a job that still runs does it; the newest that is left is then another."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "summary.json").unlink()
    restore = checkpointing.Checkpoints.restore

    def rotated(self, *args):
        shutil.rmtree(tmp_path / "checkpoints" / "12", ignore_errors=True)
        return restore(self, *args)

    monkeypatch.setattr(checkpointing.Checkpoints, "restore", rotated)
    assert int(saved_run(tmp_path).state.step) == 8


# --- what a finished run leaves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["was missing", "is of before its end"])
def test_a_finished_run_has_its_report(why, whole, text, tmp_path, capsys):
    """Killed after summary.json: before the first page or, with the page of a run that goes on, before the last."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.html").unlink()
    (tmp_path / ".report.html.x.tmp").mkdir()
    before = {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    if why != "was missing":
        (tmp_path / "report.html").write_text("running")
        os.utime(tmp_path / "report.html", ns=(0, (tmp_path / "summary.json").stat().st_mtime_ns - 1))
    jobs.train(spdf.resolve(short(text)), tmp_path, progress=False)
    assert (tmp_path / "report.html").read_bytes() == (whole / "report.html").read_bytes()
    assert {p: p.read_bytes() for p in before} == before
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}: its report {why}, and is written again: {tmp_path / 'report.html'}"
    assert not list(tmp_path.glob(".*.tmp")), "what the kill left is gone"
    assert said[1].endswith("; nothing to do.")


def test_a_cut_mask_picture_is_named_until_it_is_gone(whole, text, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.html").unlink()
    picture = sorted((tmp_path / "mask_pictures").iterdir())[0]
    cut(picture)
    for _ in range(2):
        with pytest.raises(
            spdf.InputError, match=rf"{picture.name}: not a mask picture .*; delete it and write the rep"
        ):
            jobs.train(spdf.resolve(short(text)), tmp_path, progress=False)
    picture.unlink()
    jobs.train(spdf.resolve(short(text)), tmp_path, progress=False)
    assert (tmp_path / "report.html").is_file()


# --- what must not be saved, and where nothing can be -------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(whole, text, tmp_path, monkeypatch):
    config, one_step = spdf.resolve(short(text)), loop.one_step

    def poisoned(steps, plan, local, state, batch):
        state, metrics = one_step(steps, plan, local, state, batch)
        return state, metrics | ({"loss": jnp.float32(np.nan)} if local == 6 else {})

    monkeypatch.setattr(loop, "one_step", poisoned)
    with pytest.raises(spdf.InputError, match=r"step 7: loss nan.*checkpoint at step 4 is kept"):
        jobs.train(config, tmp_path, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    monkeypatch.undo()
    jobs.train(config, tmp_path, progress=False)
    assert_ends_as(tmp_path, whole)


def test_where_nothing_was_saved_no_checkpoint_is_said_to_be_kept(text, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "one_step", lambda *a: (a[-2], {"loss": jnp.float32(np.nan), "grad_norm": np.float32(1)}))
    with pytest.raises(
        spdf.InputError, match=r"^step 1: loss nan, gradient norm 1.0; stopped. Nothing was saved yet. Lower"
    ):
        jobs.train(spdf.resolve(short(text)), tmp_path, progress=False)


def test_parameters_that_are_not_finite_are_never_saved(whole, text, tmp_path, monkeypatch):
    """The loss of a step is of the parameters before it: that of step 8 is finite, what the step left is not."""
    config, one_step = spdf.resolve(short(text)), loop.one_step

    def poisoned(steps, plan, local, state, batch):
        state, metrics = one_step(steps, plan, local, state, batch)
        if local == 7:
            bias = state.params["ln_f"]["bias"]
            state = state.replace(params=state.params | {"ln_f": state.params["ln_f"] | {"bias": bias * np.nan}})
        return state, metrics

    monkeypatch.setattr(loop, "one_step", poisoned)
    with pytest.raises(spdf.InputError, match=r"step 8: the loss is finite, but a parameter .*checkpoint at step 4 is"):
        jobs.train(config, tmp_path, progress=False)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    monkeypatch.undo()
    jobs.train(config, tmp_path, progress=False)
    assert_ends_as(tmp_path, whole)


def test_a_token_over_the_vocabulary_of_the_model_is_named(text, tmp_path):
    ids = np.arange(400, dtype=np.uint16) % 300
    ids.tofile(tmp_path / "train.bin")
    (ids + (ids == 299) * 7).astype(np.uint16).tofile(tmp_path / "val.bin")
    c = short(text)
    c.data.source, c.data.path, c.model.vocab_size = "token_files", str(tmp_path), 300
    with pytest.raises(spdf.InputError) as caught:
        jobs.train(spdf.resolve(c), tmp_path / "run", progress=False)
    assert str(caught.value) == (
        "config.data: token id 306 is at or over config.model.vocab_size 300; set config.model.vocab_size to at least 307, "
        "or config.data.token_dtype if these are no uint16 ids"
    )


@needs_mount
def test_a_read_only_disk_is_named(text, tmp_path):
    run = f"{sys.executable} -m spdf_jax.main --config tests/tiny_experiment.py --quiet --workdir {tmp_path}/run"
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o ro tmpfs {tmp_path} && exec {run}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TINY_TEXT": str(text)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        f"error: workdir {tmp_path}/run: cannot write there (Read-only file system); choose another --workdir\n"
    )


# --- profiles ---------------------------------------------------------------------------------------------------------


# Of jaxlib 0.12 itself where Python is 3.12 or newer, while it makes a type: an error there would end the process.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__ attribute:DeprecationWarning")
@pytest.mark.slow
def test_a_profile_holds_the_steps_that_were_asked_for(text, tmp_path):
    c = short(text)
    c.pretrain.steps, c.loop.profile_steps = 6, "2:4"
    set_sparsity(c.pretrain, rule="static", sparsity=0.8)
    jobs.train(spdf.resolve(c), tmp_path, progress=False)
    (trace,) = tmp_path.glob("profile/plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    events = [e for plane in planes for line in plane.lines for e in line.events if e.name.startswith("train")]
    assert {dict(e.stats)["step_num"] for e in events if "step_num" in dict(e.stats)} == {3, 4}


@pytest.mark.parametrize("value", ["5", "5:5", "7:5", "a:b", "1:2:3", "-1:4", ":4"])
def test_a_profile_of_nothing_is_refused(value, text):
    c = short(text)
    c.loop.profile_steps = value
    with pytest.raises(spdf.InputError, match=r"config\.loop\.profile_steps: .* must be A:B with 0 <= A < B"):
        spdf.resolve(c)


def test_loop_numbers_that_cannot_be_are_refused(text):
    for name, value in (("watchdog_seconds", -1), ("log_every_steps", 0), ("checkpoint_every_steps", 0)):
        c = short(text)
        c.loop[name] = value
        with pytest.raises(spdf.InputError, match=rf"config\.loop\.{name}: {value} must"):
            spdf.resolve(c)
