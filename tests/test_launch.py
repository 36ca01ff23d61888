"""The launch scripts: what they would run, to the letter, and what they do with failures, among stand-ins for the clouds."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import yaml
from tiny import NO_WINDOW_FLAGS, write_text

from spdf_jax.planning.tpu import GENERATIONS, tpu_name

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
USED = {
    "local.sh": ["--processes", "2"],
    "slurm.sh": ["--nodes", "2", "--gpus_per_node", "4"],
    "tpu_pod.sh": ["--topology", "v5e:16x16", "--zone", "europe-west4-b"],
    "gke_jobset.sh": ["--topology", "v5e:16x16", "--image", "registry/spdf_jax"],
}
TRAIN = ["--", "--config", "experiments/gpt2_mst.py:124m", "--workdir", "/shared/a run"]
TRAINS = "python -m spdf_jax.main --distributed --config experiments/gpt2_mst.py:124m --workdir '/shared/a run'"


def launch(script, *arguments, path=None, launch_folder=ROOT / "launch", timeout=60):
    environment = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}"} if path else None
    return subprocess.run(
        [launch_folder / script, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment
    )


def dry_run(script, *arguments):
    assert "--dry_run" in arguments, "a test starts nothing for real"
    result = launch(script, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout.replace(str(ROOT), "ROOT")


@pytest.mark.parametrize("script", USED)
def test_a_workdir_in_a_bucket_is_passed_on_as_it_is(script):
    printed = dry_run(script, *USED[script], "--dry_run", *TRAIN[:-1], "gs://bucket/runs/mst")
    assert "gs://bucket/runs/mst" in printed


def stand_in(folder, name, body):
    """A command of that name, for PATH, which notes how it was called."""
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name} $*" >>{folder}/calls\n{body}\n')
    file.chmod(0o755)


def calls(folder):
    return (folder / "calls").read_text().splitlines()


@contextmanager
def running(command, **options):
    """A process which, with those that it started, does not outlive the test."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_clean(script):
    subprocess.run(["bash", "-n", script], check=True)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "the extra 'test' brings it: pip install -c requirements.lock -e '.[test]'"
    result = subprocess.run([shellcheck, "-x", script.relative_to(ROOT)], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout == ""
    assert script.name == "common.sh" or re.search("^set -e?uo pipefail$", script.read_text(), re.MULTILINE)


@pytest.mark.parametrize("script", USED)
def test_help_names_every_flag(script):
    result = launch(script, "--help")
    text = (ROOT / "launch" / script).read_text()
    options, switches = re.search(r'^parse "(.*)" "(.*)" "\$@"$', text, re.MULTILINE).groups()
    named = re.findall(r"^--(\w+) ", result.stdout, re.MULTILINE)
    assert result.returncode == 0
    assert sorted(named) == sorted([*options.split(), *switches.split(), "dry_run"])


@pytest.mark.parametrize("script", ["report.sh", "tpu_worker.sh", "slurm_job.sh"])
def test_help_of_what_the_others_start(script):
    result = launch(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert re.match(rf"{script} [A-Z_. ]+: .*\n", result.stdout)
    assert "#" not in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("local.sh", [*TRAIN], "--processes is missing, for example --processes 2"),
        ("local.sh", ["--processes", "two", *TRAIN], "--processes two: a whole number of at least 1 is needed"),
        ("local.sh", ["--processes", "0", *TRAIN], "--processes 0: a whole number of at least 1 is needed"),
        ("local.sh", ["--processes"], "--processes needs a value"),
        ("local.sh", ["--processes", "2", "--platform", "tpu", *TRAIN], "--platform tpu: cpu or gpu is needed"),
        (
            "local.sh",
            ["--processes", "2"],
            "what to run is missing: -- and flags of spdf_jax.main, for example -- --config experiments/gpt2_mst.py",
        ),
        (
            "local.sh",
            ["--process", "2"],
            "unknown argument --process: --help lists the flags, and what to run follows --",
        ),
        ("slurm.sh", [*TRAIN], "--nodes is missing, for example --nodes 4"),
        *(
            (script, ["--name", "a\x07b", *TRAIN], "--name: a control character is in its value; leave it out")
            for script in ("slurm.sh", "tpu_pod.sh", "gke_jobset.sh")
        ),
        ("slurm.sh", ["--nodes=2", *TRAIN], "--gpus_per_node is missing, for example --gpus_per_node 8"),
        ("slurm.sh", [*USED["slurm.sh"], "--process_per=core", *TRAIN], "--process_per core: gpu or node is needed"),
        ("tpu_pod.sh", [*TRAIN], "--topology is missing, for example --topology v5e:16x16"),
        ("tpu_pod.sh", ["--topology=v5e:4x4", *TRAIN], "--zone is missing, for example --zone europe-west4-b"),
        (
            "tpu_pod.sh",
            ["--topology=v9:4x4", "--zone=z", *TRAIN],
            "--topology v9:4x4: v4, v5e, v5p, v6e or tpu7x, a colon and a shape are needed, for example v5e:16x16",
        ),
        (
            "tpu_pod.sh",
            ["--topology=tpu7x:2x2x1", "--zone=z", *TRAIN],
            "--topology tpu7x:2x2x1: such a pod is had through GKE: launch/gke_jobset.sh",
        ),
        ("gke_jobset.sh", [*TRAIN], "--topology is missing, for example --topology v5e:16x16"),
        (
            "gke_jobset.sh",
            ["--topology=v5e:4x4", *TRAIN],
            "--image is missing, for example --image europe-docker.pkg.dev/PROJECT/REPOSITORY/spdf_jax",
        ),
        (
            "gke_jobset.sh",
            ["--topology=v5p:4x4x", "--image=i", *TRAIN],
            "--topology v5p:4x4x: 4x4x is no shape; 16x16 and 4x4x4 are",
        ),
        (
            "gke_jobset.sh",
            ["--topology=v5e:4x4", "--image=i", "--chips_per_host=5", *TRAIN],
            "--chips_per_host 5: the 16 chips of v5e:4x4 cannot be divided so",
        ),
    ],
)
def test_what_the_user_must_fix(script, arguments, message):
    result = launch(script, *arguments)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"{script}: {message}\n")


def without(*missing, folder):
    """A PATH of few commands, which those are not among."""
    tools = (
        "bash",
        "env",
        "sed",
        "dirname",
        "cat",
        "seq",
        "tr",
        "mktemp",
        "tee",
        "rm",
        "date",
        "grep",
        "tail",
        "mkdir",
    )
    for tool in {*tools} - {*missing}:
        (folder / tool).symlink_to(shutil.which(tool))
    return {"PATH": str(folder)}


INSIDE = {"slurm_job.sh": ["launch", "3", "srun", "launch/report.sh", "python"]}


@pytest.mark.parametrize(
    ("script", "missing"),
    [
        ("slurm.sh", "sbatch"),
        ("tpu_pod.sh", "gcloud"),
        ("gke_jobset.sh", "kubectl"),
        ("local.sh", "python"),
        ("slurm_job.sh", "srun"),
    ],
)
def test_a_command_that_is_not_there_is_named_and_nothing_is_left(script, missing, tmp_path):
    commands, work = tmp_path / "commands", tmp_path / "work"
    commands.mkdir()
    shutil.copytree(ROOT / "launch", work / "launch")
    before = sorted(work.rglob("*"))
    result = subprocess.run(
        [work / "launch" / script, *INSIDE.get(script, [*USED.get(script, ()), *TRAIN])],
        capture_output=True, text=True, cwd=work, env=without(missing, folder=commands), timeout=60,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (2, "")
    assert re.fullmatch(rf"{re.escape(script)}: {missing} is not there: [^\n]+\n", result.stderr), result.stderr
    assert sorted(work.rglob("*")) == before


@pytest.mark.parametrize(
    ("script", "arguments"),
    [(script, []) for script in (*USED, "slurm_job.sh", "tpu_worker.sh", "report.sh")]
    + [(script, ["1"]) for script in (*USED, "slurm_job.sh", "tpu_worker.sh")],
)
def test_what_is_started_without_its_arguments_says_so_and_leaves_nothing(script, arguments, tmp_path):
    folder = shutil.copytree(ROOT / "launch", tmp_path / "launch")
    before = sorted(tmp_path.rglob("*"))
    result = launch(script, *arguments, launch_folder=folder)
    assert (result.returncode, result.stdout) == (2, "")
    said = "is missing: |unknown argument 1: "
    assert re.fullmatch(rf"{re.escape(script)}: [^\n]*({said})[^\n]+\n", result.stderr), result.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_local_dry_run():
    printed = re.sub(
        r"127.0.0.1:[12]\d{4}\b", "127.0.0.1:PORT", dry_run("local.sh", *USED["local.sh"], "--dry_run", *TRAIN)
    )
    assert printed == (
        "env JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 "
        f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 {TRAINS} &\n"
        "env JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=1 "
        f"JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=1 {TRAINS} &\n"
        "wait\n"
    )
    gpus = dry_run("local.sh", "--processes=2", "--platform=gpu", "--devices_per_process=4", "--dry_run", "--", "true")
    assert re.findall("JAX_PLATFORMS=(.*)", gpus) == [
        "cuda CUDA_VISIBLE_DEVICES=0,1,2,3 true &",
        "cuda CUDA_VISIBLE_DEVICES=4,5,6,7 true &",
    ]


def test_what_a_dry_run_prints_can_be_pasted():
    words = ["printf", "%s\n", "a b", "", "$HOME", "it's", 'say "so"', "*", "x;y", "two\nlines"]
    line = dry_run("local.sh", "--processes", "1", "--dry_run", "--", *words)
    pasted = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert pasted.stdout == "".join(f"{word}\n" for word in words[2:])


def test_slurm_dry_run():
    assert dry_run("slurm.sh", *USED["slurm.sh"], "--dry_run", *TRAIN) == (
        "sbatch --job-name=spdf-jax --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 --requeue --open-mode=append "
        "--signal=TERM@120 ROOT/launch/slurm_job.sh ROOT/launch 3 "
        f"srun --label --kill-on-bad-exit=0 --wait=300 ROOT/launch/report.sh {TRAINS}\n"
    )
    options = ["--process_per", "node", "--cpus_per_process", "16", "--name", "mst", "--restarts", "0"]
    assert dry_run("slurm.sh", *USED["slurm.sh"], *options, "--dry_run", *TRAIN) == (
        "sbatch --job-name=mst --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16 --requeue "
        "--open-mode=append --signal=TERM@120 ROOT/launch/slurm_job.sh ROOT/launch 0 "
        "srun --cpus-per-task=16 --label --kill-on-bad-exit=0 --wait=300 ROOT/launch/report.sh "
        f"env JAX_LOCAL_DEVICE_IDS=0,1,2,3 {TRAINS}\n"
    )


def test_tpu_pod_dry_run():
    printed = dry_run("tpu_pod.sh", *USED["tpu_pod.sh"], "--dry_run", "--", "--config", "experiments/gpt2_mst.py")
    ssh = (
        "gcloud compute tpus tpu-vm ssh spdf-jax --zone=europe-west4-b --worker=all --ssh-flag=-oServerAliveInterval=30"
    )
    assert re.sub(r"tpu_worker.sh \d+ ", "tpu_worker.sh RUN ", printed).splitlines() == [
        "gcloud compute tpus queued-resources create spdf-jax --node-id=spdf-jax --zone=europe-west4-b --type=v5litepod "
        "--topology=16x16 --runtime-version=v2-alpha-tpuv5-lite",
        "gcloud compute tpus queued-resources describe spdf-jax --zone=europe-west4-b '--format=value(state.state)'",
        f"{ssh} '--command=rm -rf spdf_jax/spdf_jax spdf_jax/experiments && mkdir -p spdf_jax'",
        "gcloud compute tpus tpu-vm scp --recurse ROOT/spdf_jax ROOT/experiments ROOT/launch ROOT/pyproject.toml "
        "ROOT/requirements.lock ROOT/README.md ROOT/LICENSE spdf-jax:spdf_jax/ --zone=europe-west4-b --worker=all",
        f"{ssh} '--command=cd spdf_jax && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv && "
        "python3 -m uv venv --quiet --allow-existing --python 3.13 && "
        "python3 -m uv pip install --quiet -c requirements.lock -e '\\''.[tpu,gcs]'\\'''",
        f"{ssh} '--command=bash spdf_jax/launch/tpu_worker.sh RUN python -m spdf_jax.main --distributed "
        "--config experiments/gpt2_mst.py'",
        "gcloud compute tpus queued-resources delete spdf-jax --zone=europe-west4-b --force --quiet",
    ]
    options = ["--topology=v5p:4x4x4", "--zone=z", "--spot", "--keep", "--name=mst", "--runtime_version=newest"]
    lines = dry_run("tpu_pod.sh", *options, "--dry_run", *TRAIN).splitlines()
    assert lines[0] == (
        "gcloud compute tpus queued-resources create mst --node-id=mst --zone=z --type=v5p --topology=4x4x4 "
        "--runtime-version=newest --spot"
    )
    assert "delete" not in lines[-1]


MANIFEST = """\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "mst"
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 7
    rules:
      - name: somethingToMend
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: 2
          completions: 2
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: spdf-jax, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              serviceAccountName: "trainer"
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
                cloud.google.com/gke-tpu-topology: 4x4
                cloud.google.com/gke-spot: "true"
              containers:
                - name: spdf-jax
                  image: "registry/spdf_jax:1"
                  command:
                    - "python"
                    - "-m"
                    - "spdf_jax.main"
                    - "--distributed"
                    - "--config"
                    - "a.py"
                    - "--prompt=\\"$$(x)\\" \\\\ \\n"
                  resources:
                    limits:
                      google.com/tpu: 8
"""
MANIFEST_OF = [
    *["--topology", "v5e:4x4", "--image", "registry/spdf_jax:1", "--chips_per_host", "8", "--spot", "--name", "mst"],
    *["--service_account", "trainer", "--restarts", "7"],
]
MANIFEST_RUNS = ["--", "--config", "a.py", '--prompt="$(x)" \\ \n']


def test_gke_dry_run_and_what_is_applied(tmp_path):
    printed = dry_run("gke_jobset.sh", *MANIFEST_OF, "--dry_run", *MANIFEST_RUNS)
    assert printed == f"kubectl apply -f - <<'EOF'\n{MANIFEST}EOF\n"
    stand_in(tmp_path, "kubectl", f"cat >{tmp_path}/applied")
    assert launch("gke_jobset.sh", *MANIFEST_OF, *MANIFEST_RUNS, path=tmp_path).returncode == 0
    assert calls(tmp_path) == ["kubectl apply -f -"]
    assert (tmp_path / "applied").read_text() == MANIFEST
    (container,) = yaml.safe_load(MANIFEST)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["command"][-1] == '--prompt="$$(x)" \\ \n'


@pytest.mark.parametrize(
    ("topology", "accelerator", "hosts", "chips_per_host"),
    [
        ("v4:2x2x4", "tpu-v4-podslice", 4, 4),
        ("v5e:1x1", "tpu-v5-lite-podslice", 1, 1),
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:4x4x4", "tpu-v5p-slice", 16, 4),
        ("v6e:8x16", "tpu-v6e-slice", 32, 4),
        ("tpu7x:4x4x4", "tpu7x", 16, 4),
    ],
)
def test_gke_topologies(topology, accelerator, hosts, chips_per_host):
    printed = dry_run("gke_jobset.sh", "--topology", topology, "--image", "i", "--dry_run", *TRAIN)
    job = yaml.safe_load("\n".join(printed.splitlines()[1:-1]))["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": topology.partition(":")[2],
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips_per_host}


@pytest.mark.slow
@pytest.mark.parametrize("options", [MANIFEST_OF, ["--topology=v6e:8x16", "--image=i"]])
def test_manifests_have_the_names_and_types_of_jobset_and_kubernetes(options):
    """By models that are made from what both publish: these drop what they do not know, and add what they miss."""
    models = pytest.importorskip("kubeflow_trainer_api.models")
    printed = dry_run("gke_jobset.sh", *options, "--dry_run", *TRAIN)
    manifest = yaml.safe_load("\n".join(printed.splitlines()[1:-1]))
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest
    manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["backOffLimit"] = 0
    assert models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() != manifest


def test_pods_by_their_number_are_those_of_the_plan():
    counts = [2**power for power in range(13)] + [3, 100]
    names = [f"{generation}-{count}" for generation in (*GENERATIONS, "v5litepod") for count in counts]
    # A subshell each, since what is no pod ends it.
    script = '. launch/common.sh; for name; do (read_topology "$name" && echo "$shape") 2>/dev/null || echo none; done'
    printed = subprocess.run(["bash", "-c", script, "-", *names], cwd=ROOT, capture_output=True, text=True, check=True)
    planned = [(tpu_name(name) or "v:none").partition(":")[2] for name in names]
    assert dict(zip(names, printed.stdout.split(), strict=True)) == dict(zip(names, planned, strict=True))
    assert len(set(planned)) == 18  # ten blocks, seven squares, and none


def test_local_marks_lines_and_says_who_is_who():
    program = (
        'echo "$JAX_PROCESS_ID of $JAX_NUM_PROCESSES on $JAX_NUM_CPU_DEVICES"; echo "$JAX_COORDINATOR_ADDRESS" >&2'
    )
    result = launch("local.sh", "--processes=3", "--devices_per_process=2", "--", "bash", "-c", program)
    assert result.returncode == 0
    assert sorted(result.stdout.splitlines()) == [f"[{i}] {i} of 3 on 2" for i in range(3)]
    addresses = [line.partition(" ")[2] for line in sorted(result.stderr.splitlines())]
    assert len(addresses) == 3
    assert len(set(addresses)) == 1


@pytest.mark.slow
def test_local_ends_the_others_and_returns_what_failed(tmp_path):
    # Process 1 does not end by itself, and says when it is ended; process 2 ends only when killed.
    program = f"""
        case $JAX_PROCESS_ID in
          0) until [[ -e {tmp_path}/1 && -e {tmp_path}/2 ]]; do sleep 0.05; done; exit 3 ;;
          1) trap 'echo saved; exit 75' TERM ;;
          2) trap '' TERM ;;
        esac
        touch {tmp_path}/$JAX_PROCESS_ID
        while :; do sleep 0.05; done"""
    result = launch("local.sh", "--processes=3", "--restarts=0", "--grace_seconds=1", "--", "bash", "-c", program)
    assert result.returncode == 3
    assert result.stdout == "[1] saved\n"
    assert [line for line in result.stderr.splitlines() if line.startswith("local.sh")] == [
        "local.sh: process 0: exit code 3",
        "local.sh: process 1: exit code 75",
        "local.sh: exit code 3, and --restarts 0 is used up",
    ]


@pytest.mark.parametrize(
    ("codes", "worst"), [((0, 0), 0), ((75, 0), 75), ((75, 1), 1), ((137, 75), 137), ((2, 75), 2), ((1, 2), 2)]
)
def test_the_worst_exit_code_decides(codes, worst):
    for order in (codes, codes[::-1]):
        worst_of = f". {ROOT}/launch/common.sh; worst {order[0]} {order[1]}"
        assert subprocess.run(["bash", "-c", worst_of], capture_output=True, text=True).stdout == f"{worst}\n"


def test_local_starts_again_what_was_preempted(tmp_path):
    """Ends with 75, crashes, then is done: the exit code is that of the last run, and each has a coordinator of its own."""
    program = f"""
        echo "$JAX_COORDINATOR_ADDRESS" >>{tmp_path}/ran
        case $(wc -l <{tmp_path}/ran) in 1) exit 75 ;; 2) exit 1 ;; *) echo done ;; esac"""
    result = launch("local.sh", "--processes=1", "--restarts=2", "--", "bash", "-c", program)
    assert (result.returncode, result.stdout) == (0, "[0] done\n")
    assert result.stderr.splitlines() == [
        "local.sh: process 0: exit code 75",
        "local.sh: exit code 75: starting again, restart 1 of 2",
        "local.sh: process 0: exit code 1",
        "local.sh: exit code 1: starting again, restart 2 of 2",
    ]
    assert len((tmp_path / "ran").read_text().split()) == 3


@pytest.mark.parametrize(("code", "runs"), [(2, 1), (75, 2), (1, 2)])
def test_local_gives_up(tmp_path, code, runs):
    program = f"echo ran >>{tmp_path}/ran; exit {code}"
    result = launch("local.sh", "--processes=1", "--restarts=1", "--", "bash", "-c", program)
    assert result.returncode == code
    assert len((tmp_path / "ran").read_text().split()) == runs


def test_local_passes_a_notice_on_and_does_not_start_again(tmp_path):
    program = f"trap 'exit 75' TERM; touch {tmp_path}/$JAX_PROCESS_ID; while :; do sleep 0.05; done"
    command = [ROOT / "launch" / "local.sh", "--processes=2", "--", "bash", "-c", program]
    with running(command) as process:
        wait_for(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75
    assert sorted(stderr.splitlines()) == ["local.sh: process 0: exit code 75", "local.sh: process 1: exit code 75"]


SRUN = """\
# Two tasks, each under report.sh, as the script asked; the highest exit code, as srun's.
read -r first second < <(sed -n "$(wc -l <{folder}/calls)p" {folder}/codes)
while [[ $1 != */report.sh ]]; do shift; done
highest=0
for code in $first $second; do
  "$1" bash -c "exit $code" || (($? <= highest)) || highest=$?
  highest=$((code > highest ? code : highest))
done
exit $highest"""


@pytest.mark.parametrize(
    ("codes", "returned", "starts", "requeued"),
    [
        (["0 0"], 0, 1, False),
        (["75 75"], 75, 1, True),
        (["75 2"], 2, 1, False),  # srun says 75
        (["137 75", "0 0"], 0, 2, False),
        (["1 0", "1 0"], 1, 2, False),
    ],
)
def test_slurm_job(tmp_path, codes, returned, starts, requeued):
    (tmp_path / "codes").write_text("\n".join(codes) + "\n")
    stand_in(tmp_path, "srun", SRUN.format(folder=tmp_path))
    stand_in(tmp_path, "scontrol", "")
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12"}
    command = [
        ROOT / "launch/slurm_job.sh",
        ROOT / "launch",
        "1",
        "srun",
        "--label",
        ROOT / "launch/report.sh",
        "train",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == returned
    srun = f"srun --label {ROOT}/launch/report.sh train"
    assert calls(tmp_path) == [srun] * starts + ["scontrol requeue Incomplete 12"] * requeued


@pytest.mark.parametrize(("answer", "said"), [("trap 'sleep 0.2; echo saved; exit 75' TERM", "saved\n"), (":", "")])
def test_report_waits_for_what_a_notice_ends(tmp_path, answer, said):
    """SLURM signals every process of a task: the one that reports must outlive the one that saves, or is too young to."""
    program = f"{answer}; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    command = [ROOT / "launch/report.sh", "bash", "-c", program]
    with running(command) as process:
        wait_for((tmp_path / "ready").exists)
        os.killpg(process.pid, signal.SIGTERM)
        stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert stdout == f"{said}process ended with exit code 75\n"


GCLOUD = """\
[[ ! -e {folder}/broken || "$*" != *" $(<{folder}/broken) "* ]] || exit 1
case "$*" in
  *" describe "*)
    # The next state; the last one stays.
    state=$(head -1 {folder}/states)
    (($(wc -l <{folder}/states) == 1)) || sed -i 1d {folder}/states
    if [[ $state == UNKNOWN ]]; then
      printf 'ERROR: (gcloud) You have no active account selected.\\nPlease run:\\n\\n  $ gcloud auth login\\n' >&2
      exit 1
    fi
    if [[ $state == ABSENT ]]; then
      echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource not found" >&2
      exit 1
    fi
    echo "$state" ;;
  *tpu_worker.sh*)
    read -r code <{folder}/codes
    sed -i 1d {folder}/codes
    echo "[0] process ended with exit code $code"
    exit "$code" ;;
esac"""


def on_tpu(tmp_path, states, codes, *flags):
    """Runs tpu_pod.sh where gcloud tells these states, and runs end with these codes. Returns it, and what it did."""
    (tmp_path / "states").write_text("\n".join(states) + "\n")
    (tmp_path / "codes").write_text("\n".join(map(str, codes)) + "\n")
    stand_in(tmp_path, "gcloud", GCLOUD.format(folder=tmp_path))
    stand_in(tmp_path, "sleep", "")
    result = launch("tpu_pod.sh", *USED["tpu_pod.sh"], *flags, *TRAIN, path=tmp_path)
    short = {
        " create ": "create",
        " delete ": "delete",
        " scp ": "copy",
        "uv pip install": "install",
        "tpu_worker.sh": "train",
    }
    did = [word for call in calls(tmp_path) for sign, word in short.items() if sign in call]
    return result, did


SET_UP = ["copy", "install"]


def test_tpu_pod_waits_runs_and_deletes(tmp_path):
    states = ["ABSENT", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    result, did = on_tpu(tmp_path, states, [0])
    assert result.returncode == 0
    assert did == ["create", *SET_UP, "train", "delete"]
    assert calls(tmp_path).count("sleep 30") == 3
    assert result.stderr.splitlines() == [f"tpu_pod.sh: queued resource spdf-jax: {s}" for s in states]


def test_tpu_pod_ends_where_gcloud_cannot_be_asked(tmp_path):
    result, did = on_tpu(tmp_path, ["UNKNOWN"], [])
    assert (result.returncode, did) == (2, [])
    assert result.stderr == (
        "tpu_pod.sh: gcloud cannot be asked for spdf-jax: ERROR: (gcloud) You have no active account selected. Please run: "
        "$ gcloud auth login\n"
    )


def test_tpu_pod_waits_for_gcloud_once_a_pod_was_known(tmp_path):
    result, did = on_tpu(tmp_path, ["ACCEPTED", "UNKNOWN", "UNKNOWN", "ACTIVE"], [0])
    assert (result.returncode, did) == (0, [*SET_UP, "train", "delete"])
    assert calls(tmp_path).count("sleep 30") == 3


def test_tpu_pod_uses_a_slice_that_is_there_and_keeps_it(tmp_path):
    result, did = on_tpu(tmp_path, ["ACTIVE"], [0], "--keep")
    assert result.returncode == 0
    assert did == [*SET_UP, "train"]


def test_tpu_pod_asks_again_for_a_slice_that_was_taken_away(tmp_path):
    states = ["ABSENT", "ACTIVE", "SUSPENDING", "SUSPENDED", "ABSENT", "ACTIVE", "SUSPENDED", "ABSENT", "ACTIVE"]
    result, did = on_tpu(tmp_path, states, [255, 75, 0], "--restarts=1")
    assert result.returncode == 0
    once = ["create", *SET_UP, "train", "delete"]
    assert did == once * 3


def test_tpu_pod_starts_again_on_the_same_slice(tmp_path):
    result, did = on_tpu(tmp_path, ["ACTIVE"], [75, 75, 1, 0], "--restarts=1")
    assert result.returncode == 0
    assert did == [*SET_UP, "train", "train", "train", "train", "delete"]
    assert "tpu_pod.sh: exit code 1: starting again, restart 1 of 1\n" in result.stderr


@pytest.mark.parametrize(("code", "runs"), [(2, 1), (1, 3)])
def test_tpu_pod_gives_up(tmp_path, code, runs):
    result, did = on_tpu(tmp_path, ["ACTIVE"], [code] * 3, "--restarts=2")
    assert result.returncode == code
    assert did == [*SET_UP, *["train"] * runs, "delete"]


def test_tpu_pod_gives_up_on_a_slice_that_never_comes(tmp_path):
    result, did = on_tpu(tmp_path, ["ABSENT", "FAILED"], [], "--restarts=0")
    assert result.returncode == 1
    assert did == ["create", "delete"]
    assert result.stderr.splitlines()[-1] == (
        "tpu_pod.sh: no pod (gcloud compute tpus queued-resources describe spdf-jax --zone=europe-west4-b says why), "
        "and --restarts 0 is used up"
    )


@pytest.mark.parametrize(("broken", "did"), [("create", ["create"] * 2), ("scp", ["copy"] * 2)])
def test_tpu_pod_gives_up_on_what_cannot_be_set_up(tmp_path, broken, did):
    (tmp_path / "broken").write_text(broken)
    result, done = on_tpu(tmp_path, ["ABSENT" if broken == "create" else "ACTIVE"], [], "--restarts=1")
    assert result.returncode == 1
    assert done == [*did, "delete"]
    assert result.stderr.endswith(", and --restarts 1 is used up\n")


@pytest.mark.slow
def test_tpu_worker_follows_one_run_through_connections(tmp_path):
    """A connection breaks and comes back: the command was started once. A new run ends the one before."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    program = (
        f"echo started; trap 'echo saved; exit 75' TERM; until [[ -e {tmp_path}/end ]]; do sleep 0.05; done; exit 3"
    )

    def run(name):
        return [tmp_path / "launch/tpu_worker.sh", name, "bash", "-c", program]

    def started(name):
        log = tmp_path / ".launch" / name / "log"
        return log.exists() and "started" in log.read_text()

    with running(run("1")):
        wait_for(lambda: started("1"))
    (tmp_path / "end").touch()
    again = subprocess.run(run("1"), capture_output=True, text=True, timeout=60)
    assert again.returncode == 3
    lines = [line.partition("] ")[2] for line in again.stdout.splitlines()]
    assert lines == ["started", "process ended with exit code 3"]

    (tmp_path / "end").unlink()
    with running(run("2")) as before:
        assert before.stdout.readline().endswith("] started\n")  # it follows the log
        after = launch("tpu_worker.sh", "3", "true", launch_folder=tmp_path / "launch")
        stdout, _ = before.communicate(timeout=60)
    assert after.returncode == 0
    assert "] saved\n" in stdout
    assert [folder.name for folder in (tmp_path / ".launch").iterdir()] == ["3"]


@pytest.mark.slow
def test_local_launch_trains(tmp_path):
    """Two processes train the tiny run. One is killed half-way; both start again and end the run."""
    workdir = tmp_path / "run"
    sizes = {"pretrain.steps": 20, "finetune.steps": 4, "loop.checkpoint_every_steps": 5}
    sizes |= {"pretrain.batch_size": 8, "finetune.batch_size": 8, "mesh.data": 2}
    program = ["--config", "tests/tiny_experiment.py", "--workdir", workdir, *NO_WINDOW_FLAGS]
    program += [f"--config.{name}={value}" for name, value in sizes.items()]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests"),
        "TINY_TEXT": str(write_text(tmp_path / "text")),
        "TINY_FEW_MATRICES": "1",
    }
    command = ["launch/local.sh", "--processes=2", "--restarts=1", "--", *program]
    with running(command, cwd=ROOT, env=environment) as launcher:
        wait_for(lambda: launcher.poll() is not None or (workdir / "checkpoints" / "5").exists(), 500)
        assert launcher.poll() is None, launcher.communicate()
        os.kill(child(launcher.pid, "JAX_PROCESS_ID=1"), signal.SIGKILL)
        stdout, stderr = launcher.communicate(timeout=500)
    assert launcher.returncode == 0, stderr
    assert "local.sh: process 1: exit code 137" in stderr
    assert "local.sh: exit code 137: starting again, restart 1 of 1" in stderr
    assert re.search(r"^\[0\] .*: resuming after step (5|10|15) of 24\.$", stdout, re.MULTILINE)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 25))
    assert json.loads((workdir / "summary.json").read_text())["status"] == "finished"


def child(parent, variable):
    """The child process with this variable in its environment."""
    for process in subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True
    ).stdout.split():
        if variable in Path(f"/proc/{process}/environ").read_text().split("\0"):
            return int(process)
    raise AssertionError(f"no child of {parent} has {variable}")
