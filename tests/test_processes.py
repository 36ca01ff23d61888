"""Many processes make one run: the same numbers as one, one end for all of them, and nothing that waits in vain."""

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from many import FINETUNE_RATE, ROOT, finish, start, wait_for_step
from tiny import NO_WINDOW, NO_WINDOW_FLAGS, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax import processes
from spdf_jax.jobs import train as jobs
from spdf_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from spdf_jax.training import mask_pictures
from spdf_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")  # as in the processes that are started

STEPS = (
    "--config.pretrain.steps=12",
    "--config.finetune.steps=4",
    "--config.pretrain.sparsity.update_every_steps=3",
    "--config.loop.checkpoint_every_steps=6",
)
BATCH = ("--config.pretrain.batch_size=8", "--config.finetune.batch_size=8")
ALL_DEVICES = ("--config.mesh.data=1", "--config.mesh.fsdp=-1")
RATE = (f"--config.finetune.optimizer.peak_learning_rate={FINETUNE_RATE}",)
TINY = (*STEPS, *BATCH, *RATE, *ALL_DEVICES, *NO_WINDOW_FLAGS, "--quiet")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """Losses of the same run in one process on one device."""
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.finetune.steps, c.pretrain.batch_size, c.finetune.batch_size = 12, 4, 8, 8
    c.pretrain.sparsity.update_every_steps = 3
    c.finetune.optimizer.peak_learning_rate = FINETUNE_RATE
    c.pretrain.sparsity.update(NO_WINDOW)
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    jobs.train(spdf.resolve(c), workdir, progress=False)
    return losses(workdir)


def losses(workdir: Path) -> dict[tuple[int, str], float]:
    """Every loss of a run, of training and validation, by step and kind."""
    found = {}
    for row in read_metrics(workdir):
        for kind in ("loss", "val_loss"):
            if kind in row:
                assert (row["step"], kind) not in found
                found[row["step"], kind] = row[kind]
    return found


def assert_same_losses(workdir: Path, alone: dict[tuple[int, str], float]) -> None:
    together = losses(workdir)
    assert together.keys() == alone.keys()
    for key, loss in alone.items():
        assert together[key] == pytest.approx(loss, abs=1e-4), key


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nobody_to_join_is_said_at_once():
    command = [sys.executable, "-m", "spdf_jax.main", "--distributed", "--config", "experiments/gpt2_mst.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: --distributed: cannot join the other processes (")
    assert "JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_number_of_processes_that_is_none(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(spdf.InputError, match="JAX_NUM_PROCESSES='two': must be a whole number"):
        processes.initialise()


# mesh, processes -> the share of the batch that each process loads, and how many shares there are
SHARES = {
    "data": ((8, 1, 1), 2, [0, 1], 2),
    "parameters": ((1, 8, 1), 4, [0, 1, 2, 3], 4),
    "all axes": ((2, 2, 2), 2, [0, 1], 2),
    "tensor within a process": ((2, 2, 2), 4, [0, 1, 2, 3], 4),
    "tensor over two processes": ((2, 1, 4), 4, [0, 0, 1, 1], 2),
    "tensor over all": ((1, 1, 8), 4, [0, 0, 0, 0], 1),
}


def pretend(monkeypatch, count: int, index: int) -> None:
    """As if the eight devices were those of `count` processes, and this one were `index`."""
    real = processes.batch_sharding

    def sharding(mesh, rank):
        rows = real(mesh, rank).devices_indices_map((mesh.shape["data"] * mesh.shape["fsdp"], 1))
        fake = [(SimpleNamespace(process_index=d.id * count // 8), row) for d, row in rows.items()]
        return SimpleNamespace(devices_indices_map=lambda shape: SimpleNamespace(items=lambda: fake))

    monkeypatch.setattr(processes, "batch_sharding", sharding)
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: index)


@pytest.mark.parametrize("case", SHARES)
def test_processes_that_hold_the_same_rows_load_the_same_share(case, monkeypatch):
    sizes, count, shares, n_shares = SHARES[case]
    mesh = make_mesh(MeshConfig(*sizes))
    for index, share in enumerate(shares):
        with monkeypatch.context() as patch:
            pretend(patch, count, index)
            assert processes.data_share(mesh) == (share, n_shares)


def test_a_mesh_that_leaves_a_process_out_is_refused(monkeypatch):
    mesh = make_mesh(MeshConfig(4, 1, 1))
    pretend(monkeypatch, 2, 0)
    with pytest.raises(spdf.InputError, match="data 4, fsdp 1 and tensor 1 do not share out 8 devices of 2 processes"):
        processes.data_share(mesh)


def test_a_process_of_other_code_is_refused(tmp_path, monkeypatch):
    ours = processes.code_version()
    shutil.copytree(ROOT / "spdf_jax", tmp_path / "spdf_jax", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(processes, "__file__", str(tmp_path / "spdf_jax" / "processes.py"))
    assert processes.code_version() == ours
    with (tmp_path / "spdf_jax" / "training" / "step.py").open("a") as file:
        file.write("# other\n")
    assert processes.code_version() != ours
    monkeypatch.setattr(processes, "from_first", lambda make: ours)
    with pytest.raises(spdf.InputError, match="code: process 0 has another than process 0; install the same"):
        processes.agree("code", processes.code_version(), "install the same")


@pytest.mark.slow
def test_of_two_processes_the_one_of_other_code_says_so_and_both_end(text, tmp_path):
    shutil.copytree(ROOT / "spdf_jax", tmp_path / "other" / "spdf_jax")
    with (tmp_path / "other" / "spdf_jax" / "training" / "step.py").open("a") as file:
        file.write("# other\n")
    ended = finish(start(2, 1, tmp_path / "run", text, *TINY, only={1: {"cwd": str(tmp_path / "other")}}))
    assert ended[1].code == 2
    assert "error: code: process 1 has another than process 0; install the same version of spdf_jax" in ended[1].errors
    assert ended[0].code != 0
    assert not (tmp_path / "run" / "config.json").exists()


def test_alone_everything_is_agreed():
    assert processes.is_first()
    assert processes.from_first(lambda: "mine") == "mine"
    processes.wait_for_first()
    processes.agree("config", "a", "start again")
    assert processes.data_share(make_mesh(MeshConfig(2, 2, 2))) == (0, 1)


def test_masks_of_pictures_are_whole_whatever_their_sharding():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    mask = np.random.default_rng(0).random((3, 8, 16)) < 0.5
    masks = {"blocks": {"attn_q": {"kernel": mask}}}
    placed = jax.device_put(masks, parameter_shardings(mesh, masks))
    np.testing.assert_array_equal(mask_pictures._whole(placed["blocks"]["attn_q"]["kernel"][2]), mask[2])


# --- several ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_train_as_one_and_two_resume_and_evaluate_what_they_left(text, alone, tmp_path):
    whole = tmp_path / "run"
    ended = finish(start(4, 1, whole, text, *TINY, "--noquiet"))
    assert [end.code for end in ended] == [0] * 4, ended
    assert_same_losses(whole, alone)
    assert {p.name for p in (whole / "checkpoints").iterdir()} == {"6", "12", "16"}
    assert ["validation loss" in end.output for end in ended] == [True] + [False] * 3  # process 0 alone talks
    for name in ("config.json", "summary.json", "report.html", "tokenizer.json", "mask_pictures/step_00000012.npz"):
        assert (whole / name).is_file(), name

    # Stopped in the middle: as it was after step 6, with rows of later steps to drop.
    (whole / "summary.json").unlink()
    for step in ("12", "16"):
        shutil.rmtree(whole / "checkpoints" / step)
    ended = finish(start(2, 2, whole, text, *TINY))
    assert [end.code for end in ended] == [0, 0], ended
    assert_same_losses(whole, alone)

    ended = finish(start(2, 2, whole, text, *TINY, "--job", "evaluate"))
    assert [end.code for end in ended] == [0, 0], ended
    (val_loss,) = re.findall(r"val_loss ([\d.]+)", ended[0].output)
    assert float(val_loss) == pytest.approx(alone[16, "val_loss"], abs=2e-4)


@pytest.mark.slow
def test_a_run_that_ended_in_every_way_ends_as_if_nothing_had_been(text, alone, tmp_path):
    """A bug in process 1 alone, SIGTERM to it alone, `kill -9` of it and of process 0: each ends both, and the same command
    goes on."""
    run, arguments = tmp_path / "run", (*TINY, "--config.loop.checkpoint_every_steps=2")
    (tmp_path / "sitecustomize.py").write_text(
        "import spdf_jax.training.loop as train\n"
        "one_step = train.one_step\n"
        "def breaking(steps, plan, local, state, batch):\n"
        "    if local == 3: raise KeyError('a bug')\n"
        "    return one_step(steps, plan, local, state, batch)\n"
        "train.one_step = breaking\n"
    )
    path = f"{tmp_path}:{Path(__file__).parent}"
    begun = time.monotonic()
    ended = finish(start(2, 1, run, text, *arguments, only={1: {"PYTHONPATH": path}}))
    assert time.monotonic() - begun < 120
    assert [end.code for end in ended] == [1, 1], ended
    assert "Traceback" in ended[1].errors
    assert "process 1 of 2 stopped: KeyError: 'a bug'" in ended[0].errors

    started = start(2, 1, run, text, *arguments)
    wait_for_step(run, 5, started)
    started[1].terminate()
    ended = finish(started)
    assert [end.code for end in ended] == [processes.RESTART_CODE] * 2, ended
    saved = max(int(p.name) for p in (run / "checkpoints").iterdir())
    assert f"preempted: saved at step {saved}; the same command resumes\n" in ended[0].errors
    assert "preempted: saved" not in ended[1].errors  # one message

    for victim, step in ((1, saved + 2), (0, saved + 4)):
        started = start(2, 1, run, text, *arguments)
        wait_for_step(run, step, started)
        started[victim].kill()
        killed = time.monotonic()
        ended = finish(started)
        assert time.monotonic() - killed < 60
        assert ended[victim].code == -signal.SIGKILL
        assert ended[1 - victim].code == processes.RESTART_CODE, ended[1 - victim].errors
        assert "another process of this run is gone; the same command resumes" in ended[1 - victim].errors

    ended = finish(start(2, 1, run, text, *arguments))
    assert [end.code for end in ended] == [0, 0], ended
    assert_same_losses(run, alone)


@pytest.mark.slow
def test_data_that_one_process_lacks_stops_all_with_its_message(text, tmp_path):
    arguments = (*TINY, "--config.data.path=text", f"--config.data.cache_dir={tmp_path}/cache")
    started = start(2, 2, tmp_path / "run", text, *arguments, only={0: {"cwd": str(text.parent)}, 1: {"cwd": "/"}})
    begun = time.monotonic()
    ended = finish(started)
    assert time.monotonic() - begun < 60
    assert [end.code for end in ended] == [2, 2], ended
    assert ended[1].errors.startswith("error: ")
    assert "process 1 of 2 stopped: error: " in ended[0].errors
    assert "text" in ended[0].errors


@pytest.mark.slow
def test_processes_with_different_configs_stop(text, tmp_path):
    other = write_text(tmp_path / "other")
    ended = finish(start(2, 2, tmp_path / "run", text, *TINY, only={1: {"TINY_TEXT": str(other)}}))
    assert [end.code for end in ended] == [2, 2], ended
    message = "config: process 1 has another than process 0; start all of them with the same command and files"
    assert all(message in end.errors for end in ended)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(text, tmp_path):
    homes = {index: {"cwd": str(tmp_path / str(index))} for index in range(2)}
    for home in homes.values():
        Path(home["cwd"]).mkdir()
    ended = finish(start(2, 2, Path("run"), text, *TINY, only=homes))
    assert [end.code for end in ended] == [2, 2], ended
    assert "but process 1 does not see it; choose a --workdir on a disk that all processes share" in ended[1].errors
