"""A run of twelve steps that is killed at named steps and started again: ``python twice.py WORKDIR TEXT CACHE HOW STEP ...``.

It forks a process a start, having imported everything and itself never used JAX. Each but the last dies by SIGKILL once it has
logged the row of its step. HOW are `short_run`'s settings, as JSON. Prints when each
start was forked and when it was gone, in seconds since 1970.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
from matplotlib.figure import Figure
from tiny import NO_WINDOW, empty_figure, few_matrices, tiny_config

import spdf_jax as spdf
from spdf_jax.config.run import RunConfig
from spdf_jax.jobs import train as jobs
from spdf_jax.training.metrics import Tracker

PAUSE_SECONDS = 1.0  # between a kill and the next start


def short_run(
    text: Path, cache: Path, pretrain: dict | None = None, data: dict | None = None, **loop: object
) -> RunConfig:
    """One phase of 12 steps, logged each, evaluated every six, saved every three, but for what the sections say."""
    c = tiny_config(text, cache)
    c.pretrain.steps, c.phases = 12, ("pretrain",)
    c.loop.update({"checkpoint_every_steps": 3, "eval_every_steps": 6} | loop)
    c.pretrain.update(pretrain or {})
    c.data.update(data or {})
    c.pretrain.sparsity.update(NO_WINDOW | {"update_every_steps": 3})
    del c.finetune
    return spdf.resolve(c)


def killed_at(workdir: Path, text: Path, cache: Path, steps: list[int], **how: object) -> list[list[float]]:
    """The run in `workdir`, from its first start to its end; when each start was forked and gone."""
    command = [sys.executable, __file__, *map(str, (workdir, text, cache)), json.dumps(how), *map(str, steps)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def _die_after(step: int) -> None:
    log = Tracker.log

    def logging(self: Tracker, row: dict) -> None:
        log(self, row)
        if row["step"] == step and "loss" in row:
            os.kill(os.getpid(), signal.SIGKILL)

    Tracker.log = logging


def _start(config: RunConfig, workdir: Path, step: int | None) -> list[float]:
    begun, pid = time.time(), os.fork()
    if not pid:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if step is not None:
                _die_after(step)
            jobs.train(config, workdir, progress=False)
            code = 0
        finally:
            if code:
                sys.excepthook(*sys.exc_info())
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == (0 if step is None else -signal.SIGKILL), code
    return [begun, time.time()]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # as in the tests: whose compiled programs are then this process's too
    Figure.savefig = empty_figure  # drawing takes longer than such a run
    workdir, text, cache = map(Path, sys.argv[1:4])
    with few_matrices():
        config = short_run(text, cache, **json.loads(sys.argv[4]))
        lives = []
        for step in [*map(int, sys.argv[5:]), None]:
            lives.append(_start(config, workdir, step))
            time.sleep(PAUSE_SECONDS if step is not None else 0)
    print(json.dumps(lives))
