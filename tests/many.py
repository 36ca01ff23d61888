"""The tiny run in several processes: real ones, each with some simulated devices, joined by sockets.

Few matrices are sparse: a topology step asks its hundred counts of each, one after the other, and on two cores four processes
answer each in some milliseconds.
"""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
#: The first update by Adam is the sign of each gradient; at the tiny run's own rate, rounding at zero would show in the losses.
FINETUNE_RATE = 1e-3


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    output: str
    errors: str


def start(
    count: int, devices: int, workdir: Path, text: Path, *arguments: str, only: dict[int, dict[str, str]] | None = None
) -> list[subprocess.Popen]:
    """Starts the command line `count` times with `devices` devices each.

    `arguments` follow ``--config tests/tiny_experiment.py``; `only` sets ``cwd`` and environment variables of single processes.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    started = []
    for index in range(count):
        env = os.environ | {
            "PYTHONPATH": str(Path(__file__).parent),
            "TINY_TEXT": str(text),
            "TINY_FEW_MATRICES": "1",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        special = (only or {}).get(index, {})
        command = [
            sys.executable,
            "-m",
            "spdf_jax.main",
            "--distributed",
            "--config",
            f"{ROOT}/tests/tiny_experiment.py",
        ]
        started.append(
            subprocess.Popen(
                [*command, "--workdir", str(workdir), *arguments],
                cwd=special.get("cwd", ROOT),
                env=env | {name: value for name, value in special.items() if name != "cwd"},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return started


def finish(started: list[subprocess.Popen]) -> list[Ended]:
    """Waits for all; gloo and JAX's own log lines on standard error are left in."""
    return [Ended(process.returncode, *streams) for process in started if (streams := process.communicate())]


def wait_for_step(workdir: Path, step: int, started: list[subprocess.Popen]) -> None:
    """Until `metrics.jsonl` has a row of this step or a later one; a process that ends before is an error."""
    file = workdir / "metrics.jsonl"
    while not file.exists() or max(map(int, re.findall(rb'"step": (\d+)', file.read_bytes())), default=0) < step:
        for process in started:
            if process.poll() is not None:
                raise RuntimeError(f"ended with {process.returncode} before step {step}: {process.communicate()}")
        time.sleep(0.02)
