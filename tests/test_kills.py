"""`kill -9` at seeded moments of everything that writes, and started again: at the end all is as if nothing had happened.

As a program (``python test_kills.py FOLDER TEXT SEED KILLS``) it makes every product once undisturbed and again under kills,
each just before a call that touches the file system, as Python's audit events name them, or up to 20 ms after, which is in the
middle of what libraries write by themselves. It forks a child a start, having imported everything and itself never used JAX.
"""

import gc
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
from matplotlib.figure import Figure
from tiny import NO_WINDOW, empty_figure, few_matrices, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import Column, Row, SweepConfig
from spdf_jax.data import prepare
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.jobs.sweep import train_cells
from spdf_jax.report import write_report
from spdf_jax.workdir import read_json

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "tempfile.mkdtemp"}
#: Of the kills, how many hundredths each product gets.
SHARES = {"train": 12, "sweep": 4, "cache": 32, "evaluate": 8, "export": 12, "report": 32}


def config(text: Path, cache: Path, seed: int = 0) -> RunConfig:
    """One phase of 12 steps, saved every three."""
    c = tiny_config(text, cache)
    c.seed, c.pretrain.steps, c.phases, c.loop.checkpoint_every_steps, c.loop.eval_every_steps = (
        seed,
        12,
        ("pretrain",),
        3,
        6,
    )
    c.pretrain.sparsity.update_every_steps = 3
    c.pretrain.sparsity.update(NO_WINDOW)
    del c.finetune
    return spdf.resolve(c)


def sweep(text: Path, cache: Path) -> SweepConfig:
    cells = {f"s{seed}": config(text, cache, seed) for seed in (1, 2)}
    rows = tuple(Row(name, ((name, name),)) for name in cells)
    columns = (Column("loss", "summary.val_loss"),)
    names = {"experiment": "kills", "variant": "test", "variants": ("test",), "title": "t", "remark": ""}
    return SweepConfig(**names, cells=cells, rows=rows, columns=columns)


def works(folder: Path, text: Path, cache: Path) -> dict[str, Callable[[], object]]:
    """What makes each product in `folder`."""
    own = config(text, folder / "cache")
    return {
        "cache": lambda: prepare(own.data, progress=False),
        "train": lambda: jobs.train(config(text, cache), folder, progress=False),
        "sweep": lambda: train_cells(sweep(text, cache), folder, progress=False),
        "evaluate": lambda: evaluate_checkpoint(config(text, cache), folder),
        "export": lambda: (folder / "huggingface").exists() or export(config(text, cache), folder),
        "report": lambda: write_report(folder),
    }


def child(work: Callable[[], object], folder: Path, at: int, delay_seconds: float) -> tuple[int, int]:
    """Does `work` in a child, killed at its call of number `at` under `folder`; how it ended, and its calls if it did."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writing)
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), int(said or 0)
    calls = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal calls
        if event in EVENTS and str(folder) in str(arguments[:1]):
            calls += 1
            if calls == at and delay_seconds:
                threading.Timer(delay_seconds, os.kill, [os.getpid(), signal.SIGKILL]).start()
            elif calls == at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.addaudithook(hook)
        work()
        os.write(writing, str(calls).encode())
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def kill_all(root: Path, text: Path, seed: int, kills: int) -> int:
    """Makes every product, undisturbed in ``root/NAME-0`` and killed in ``-1``, ``-2``, ...; returns the number of kills."""
    rng, total = random.Random(seed), 0
    for name, share in SHARES.items():

        def fresh(number: int, name: str = name) -> tuple[Path, Callable[[], object]]:
            folder = root / f"{name}-{number}"
            if name in ("evaluate", "export", "report"):
                shutil.copytree(root / "train-0", folder)
                (folder / "report.html").unlink()
            return folder, works(folder, text, root / "cache-0" / "cache")[name]

        folder, work = fresh(0)
        code, calls = child(work, folder, 0, 0)
        assert code == 0, name
        number, killed, done = 0, 0, True
        while killed < -(-kills * share // 100):
            if done:
                number += 1
                folder, work = fresh(number)
            code, _ = child(work, folder, rng.randint(1, calls), rng.choice([0, rng.uniform(0, 0.02)]))
            assert code in (0, -signal.SIGKILL), f"{name}-{number} after {killed} kills: {code}"
            done, killed = code == 0, killed + (code != 0)
        assert done or child(work, folder, 0, 0)[0] == 0
        total += killed
    return total


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")  # as in the program
def test_a_hundred_kills_change_no_bit(tmp_path, capsys):
    text = write_text(tmp_path / "text")
    program = [sys.executable, __file__, str(tmp_path), str(text), "0", "100"]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    with capsys.disabled():
        print(f" {result.stdout.strip()} ", end="")
    assert int(result.stdout.split()[0]) >= 100
    assert_all_as_undisturbed(tmp_path)


def assert_all_as_undisturbed(root: Path) -> None:
    from test_faults import assert_ends_as

    for name in SHARES:
        right, *folders = sorted(root.glob(f"{name}-*"), key=lambda p: int(p.name.partition("-")[2]))
        assert folders
        for folder in folders:
            if name == "cache":
                files = [p.relative_to(right) for p in right.glob("cache/*/*")]
                assert len(files) == 4
                for file in files:
                    assert (folder / file).read_bytes() == (right / file).read_bytes(), folder
            elif name == "sweep":
                for cell in ("s1", "s2"):
                    assert_ends_as(folder / "cells" / cell, right / "cells" / cell)
                ours, theirs = (read_json(f / "table.json", "") for f in (folder, right))
                assert [row["values"] for row in ours["rows"]] == [row["values"] for row in theirs["rows"]]
            elif name == "export":
                there = sorted(p.name for p in (right / "huggingface").iterdir())
                assert sorted(p.name for p in (folder / "huggingface").iterdir()) == there
                for file in there:
                    assert (folder / "huggingface" / file).read_bytes() == (right / "huggingface" / file).read_bytes()
            elif name == "evaluate":
                assert read_json(folder / "evaluation.json", "") == read_json(right / "evaluation.json", "")
            elif name == "report":
                assert (folder / "report.html").read_bytes() == (right / "report.html").read_bytes()
            else:
                assert_ends_as(folder, right)
                assert not list(folder.glob(".*.tmp"))
                assert not list(folder.glob("checkpoints/*.orbax-checkpoint-tmp"))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # as in the tests: whose compiled programs are then this process's too
    Figure.savefig = empty_figure  # drawing takes longer than such a run
    gc.freeze()  # as conftest.py
    gc.set_threshold(100_000, 20, 100)
    with few_matrices():
        print(f"{kill_all(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))} kills")
