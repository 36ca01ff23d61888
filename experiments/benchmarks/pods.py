"""What one step takes on TPU and GPU pods that are not there: a plan a row, by the row's own command.

    pip install -c requirements.lock -e '.[tpu,plan_gpu]'
    python experiments/benchmarks/pods.py

GPT-2 small, GPT-3 XL and Llama 1B under static masks, on pods of several kinds, laid out to fit. A row takes up to some
minutes on 2 cores, and nothing is timed, whatever else runs: the times are estimates from the compiled program
(``spdf_jax/planning/tpu.py``, ``gpu.py``), held against no device.
"""

import re
import subprocess
import sys

from runner import announce, arguments, print_head, print_row, write_json

SMALL, XL = "experiments/gpt2_static.py:124m", "experiments/gpt3_xl_spdf.py"
LLAMA = "experiments/llama_spdf.py:1b"
# 128 devices and more share a batch of 512; the experiment's own 480 do not divide by them.
LARGER = ("--config.pretrain.batch_size=512", "--config.loop.eval_batch_size=512")
ROWS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (SMALL, "h100:8", ()),
    (SMALL, "h200:8", ()),
    (SMALL, "b200:8", ()),
    (SMALL, "v5e:4x4", ("--config.pretrain.grad_accumulation_steps=3",)),
    (SMALL, "v6e:16x16", LARGER),
    (SMALL, "v5p:8x8x8", LARGER),
    (SMALL, "tpu7x:4x4x4", LARGER),
    (XL, "h100:8", ("--config.mesh.fsdp=8", "--config.pretrain.grad_accumulation_steps=2")),
    (XL, "h200:8", ("--config.mesh.fsdp=8",)),
    (XL, "b200:8", ("--config.mesh.fsdp=8",)),
    (XL, "v5e:4x4", ("--config.pretrain.grad_accumulation_steps=8",)),
    (XL, "v6e:16x16", ()),
    (XL, "v5p:8x8x8", ("--config.mesh.fsdp=8",)),
    (XL, "tpu7x:4x4x4", ()),
    (LLAMA, "v5e:4x4", ("--config.mesh.data=4", "--config.mesh.fsdp=4", "--config.model.remat=mlp")),
)
#: What a plan says of the train step, by what it is in a row.
SAID = {
    "mesh": r"mesh data (\d+) x fsdp (\d+)",
    "gib": r"memory a device +([\d.]+) GiB of ([\d.]+) GiB: (fits|DOES NOT FIT)",
    "ms": r"time, estimated +([\d.]+) ms: computing ([\d.]+), [^,]+ ([\d.]+), waiting for collectives ([\d.]+)",
    "used": r"utilisation +([\d.]+)%.*, ([\d.]+)% with half",
}


def command(config: str, pod: str, flags: tuple[str, ...]) -> list[str]:
    """What prints the plan of a row, ``python`` left out."""
    return ["-m", "spdf_jax.main", "--config", config, "--job", "plan", "--plan_topology", pod, *flags]


def plan(config: str, pod: str, flags: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Runs it, and takes out what it says of the train step."""
    done = subprocess.run([sys.executable, *command(config, pod, flags)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{pod}: {done.stderr.strip().splitlines()[-1]}")
    return {name: found.groups() for name, text in SAID.items() if (found := re.search(text, done.stdout))}


def main():
    """Prints a row a plan."""
    parser = arguments(__doc__)
    parser.add_argument("--only", default="", help="rows whose command holds this")
    args = parser.parse_args()
    announce("compiled for what is not there")
    print_head(
        "config", "pod", "data x fsdp", "GiB a device", "ms a step", "computing", "attention", "waiting", "utilisation",
        "half of attention", left=3,
    )  # fmt: skip
    rows = []
    for config, pod, flags in ROWS:
        line = " ".join(("python", *command(config, pod, flags)))
        if args.only not in line:
            continue
        said = plan(config, pod, flags)
        (data, fsdp), (gib, holds, fits) = said["mesh"], said["gib"]
        times, used = said.get("ms", ("",) * 4), said.get("used", ("",) * 2)
        name = config.removeprefix("experiments/")
        memory = f"{gib} of {holds}" if fits == "fits" else f"{gib} of {holds}: DOES NOT FIT"
        print_row(f"`{name}`", pod, f"{data} x {fsdp}", memory, *times, *(f"{share} %" for share in used))
        rows.append({"command": line, "said": said})
    print("\nEach row's command:\n")
    print(*(f"    {row['command']}" for row in rows), sep="\n")
    write_json(args, rows=rows)


if __name__ == "__main__":
    main()
