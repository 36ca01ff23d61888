"""`launch/slurm.sh` under a real SLURM, whose two nodes are this machine.

The cluster has a hosts file and processes of its own, by Linux's namespaces: nothing of this machine is changed, and all of it
ends with the shell that started it, which ends with the test.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from many import ROOT, finish, start
from test_faults import assert_ends_as
from test_processes import TINY
from tiny import write_text

from spdf_jax.processes import RESTART_CODE

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "unshare")
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")


def lacking() -> str:
    """What this machine lacks for such a cluster, or nothing."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)} (apt-get install slurm-wlm munge)"
    may = os.geteuid() == 0 and not subprocess.run([*UNSHARE, "true"], check=False).returncode
    return "" if may else "needs root, who may make namespaces"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacking()), reason=lacking()),
    pytest.mark.usefixtures("all_with_few_matrices"),  # as in the processes that are started
]

# This shell is the first process of its namespace: it ends with its standard input, and the kernel kills all others with it.
START = """
set -e
mount --bind hosts /etc/hosts
munged --foreground --force --socket=$PWD/munge --key-file=$PWD/key --seed-file=$PWD/seed --pid-file=$PWD/munged.pid \
  --log-file=$PWD/munged.log &
slurmctld -D -c &
for node in n1 n2; do slurmd -D -N $node & done
cat
"""
# cred_expire is also what a job that is queued again waits for.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 Gres=gpu:2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""


class Cluster(NamedTuple):
    """SLURM, running, with all its files in `folder`."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *command: str) -> str:
        """What one of SLURM's commands says."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True).stdout

    def job(self) -> dict[str, str]:
        """What SLURM knows of the only job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", "-o", "1")))

    def processes(self) -> dict[str, tuple[int, dict[str, str]]]:
        """Those that train: number in the job -> pid, environment."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                told = dict(re.findall(r"(\w+)=([^\0]*)", (process / "environ").read_text()))
                trains = (process / "cmdline").read_text().startswith("python\0-m\0spdf_jax.main\0")
                if trains and told.get("SLURM_CONF") == self.environment["SLURM_CONF"]:
                    found[told["SLURM_PROCID"]] = int(process.name), told
        return found


def until(condition: Callable[[], object], said: Callable[[], str], seconds: float = 300) -> None:
    """Waits; what was `said` is what the failure shows."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, said()
        time.sleep(0.05)


def write_cluster(folder: Path) -> None:
    """Files of two nodes with two GPUs each, which are other devices: nothing opens them."""
    host = socket.gethostname().partition(".")[0]
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [probe.getsockname()[1] for probe in probes]
    for gpu in ("gpu0", "gpu1"):
        os.mknod(folder / gpu, stat.S_IFCHR | 0o600, os.stat(os.devnull).st_rdev)
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=host, ports=ports))
    (folder / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={folder}/gpu[0-1]\n")
    (folder / "hosts").write_text(f"{Path('/etc/hosts').read_text()}\n127.0.0.1 {host} n1 n2\n")
    (folder / "key").write_bytes(secrets.token_bytes(1024))
    (folder / "key").chmod(0o400)
    (folder / "state").mkdir()


@pytest.fixture
def cluster(tmp_path) -> Iterator[Cluster]:
    running = Cluster(tmp_path / "slurm")
    running.folder.mkdir()
    write_cluster(running.folder)
    log, command = running.folder / "log", [*UNSHARE, "bash", "-c", START]
    with log.open("w") as file:
        streams = {"stdin": subprocess.PIPE, "stdout": file, "stderr": file}
        shell = subprocess.Popen(command, cwd=running.folder, env=running.environment, **streams)
    try:
        until(lambda: log.read_text().count("slurmd started on") == 2, log.read_text, 60)
        until(lambda: running.ask("sinfo", "--noheader", "--format=%T %D") == "idle 2\n", log.read_text, 60)
        yield running
    finally:
        shell.kill()  # and by --kill-child the first process
        shell.communicate()


def submit(cluster: Cluster, text: Path, workdir: Path, *arguments: str) -> Path:
    """Submits the tiny run as job 1, by the script; returns the file of its lines."""
    environment = cluster.environment | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT}/tests",
        "TINY_TEXT": str(text),
        "TINY_FEW_MATRICES": "1",
        "JAX_NUM_CPU_DEVICES": "1",
    }
    program = ["--config", f"{ROOT}/tests/tiny_experiment.py", "--workdir", str(workdir), *arguments]
    command = [ROOT / "launch/slurm.sh", "--nodes=2", "--gpus_per_node=2", "--restarts=1", "--", *program]
    submitted = subprocess.run(command, cwd=workdir.parent, env=environment, capture_output=True, text=True, check=True)
    assert submitted.stdout == "Submitted batch job 1\n"
    return workdir.parent / "slurm-1.out"


def test_a_job_that_loses_a_process_and_then_is_preempted_ends_with_the_bits_of_an_undisturbed_run(cluster, tmp_path):
    text, workdir = write_text(tmp_path / "text"), tmp_path / "run"
    arguments = (*TINY, "--config.mesh.fsdp=4", "--config.loop.checkpoint_every_steps=2", "--noquiet")
    ended = finish(start(4, 1, tmp_path / "undisturbed", text, *arguments))
    assert [end.code for end in ended] == [0] * 4, ended
    log = submit(cluster, text, workdir, *arguments)

    def saved() -> int:
        """The last step with a checkpoint."""
        return max((int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()), default=0)

    until(lambda: saved() or cluster.job()["JobState"] not in ("PENDING", "RUNNING"), log.read_text)
    processes = cluster.processes()
    os.kill(processes["1"][0], signal.SIGKILL)
    until(lambda: "exit code 137: starting again, restart 1 of 1\n" in log.read_text(), log.read_text)
    before = saved()
    until(lambda: saved() > before, log.read_text)
    cluster.ask("scancel", "--signal=TERM", "1")
    until(lambda: cluster.job()["Restarts"] == "1", log.read_text)
    until(lambda: cluster.job()["JobState"] in ("COMPLETED", "FAILED"), log.read_text)

    job, lines = cluster.job(), log.read_text()
    assert (job["JobState"], job["Restarts"], job["ExitCode"]) == ("COMPLETED", "1", "0:0"), lines
    codes = re.findall(r"^\d: process ended with exit code (\d+)$", lines, re.MULTILINE)
    assert [sorted(codes[i : i + 4]) for i in (0, 4, 8)] == [["137", "75", "75", "75"], ["75"] * 4, ["0"] * 4], lines
    assert len(codes) == 12
    assert lines.count("0: Running tiny, variant test, on 4 x cpu") == 3
    assert re.findall(r"resuming after step (\d+) of 16", lines)[0] == str(before)
    assert f"exit code {RESTART_CODE}: queueing job 1 again\n" in lines
    assert_ends_as(workdir, tmp_path / "undisturbed")

    for number, (_, told) in processes.items():
        assert (told["SLURM_STEP_NODELIST"], told["SLURM_NTASKS"]) == ("n[1-2]", "4")
        assert told["SLURMD_NODENAME"] == {"0": "n1", "1": "n1", "2": "n2", "3": "n2"}[number]
        assert told["CUDA_VISIBLE_DEVICES"] == "0,1"
        assert not {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"} & told.keys()
    assert len(processes) == 4
