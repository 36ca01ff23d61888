"""What all benchmarks do alike: time what they compare in turn, name the machine, print Markdown tables, write JSON.

What is compared is compiled and warmed up before anything is timed, and timed in turn, with the order swapped in every repeat,
so that other work on the machine slows all of it alike. Compare ratios within one run, never seconds across two.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from spdf_jax.processes import keep_memory


@dataclass
class Timing:
    """Seconds of every repeat; processor time, of all cores, is touched less by other work than wall-clock time."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser that explains the benchmark by its docstring. Memory stays with the process, as it does in a run."""
    keep_memory()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="", help="file to write")
    return parser


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "numpy": np.__version__,
    }


def announce(text: str) -> None:
    """Prints the machine and what is to come."""
    m = machine()
    print(f"{m['processor']}, {m['cores']} cores, {m['device']};", end=" ")
    print(f"Python {m['python']}, JAX {m['jax']}, NumPy {m['numpy']}; {text}\n", flush=True)


def time_in_turn(ready: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Runs everything once, to compile and warm up, and then `repeats` times.

    Args:
      ready: what to time, by name; each waits for nothing and returns arrays, which are waited for here.
      repeats: how often.
    """
    timings = {name: Timing() for name in ready}
    for repeat in range(repeats + 1):
        for name in list(ready)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter(), time.process_time()
            jax.block_until_ready(ready[name]())
            if repeat:
                timings[name].wall.append(time.perf_counter() - start[0])
                timings[name].processor.append(time.process_time() - start[1])
    return timings


def times_faster(timing: Timing, reference: Timing) -> dict[str, Any]:
    """How many times faster than `reference`: of medians, of pairs (median, quartiles), of the fastest, by processor time."""
    pairs = sorted(r / t for r, t in zip(reference.wall, timing.wall, strict=True))
    return {
        "ms": 1e3 * statistics.median(timing.wall),
        "times_faster": statistics.median(reference.wall) / statistics.median(timing.wall),
        "of_pairs": statistics.median(pairs),
        "quartiles": [pairs[len(pairs) // 4], pairs[(3 * len(pairs)) // 4]],
        "of_fastest": min(reference.wall) / min(timing.wall),
        "processor": statistics.median(reference.processor) / statistics.median(timing.processor),
        "all_seconds": timing.wall,
    }


def print_head(*headers: str, left: int = 1) -> None:
    """The head of a Markdown table, all columns but `left` of them set right."""
    print(f"| {' | '.join(headers)} |")
    print("|" + " --- |" * left + " ---: |" * (len(headers) - left), flush=True)


def print_row(*cells: str) -> None:
    """A row of it."""
    print(f"| {' | '.join(cells)} |", flush=True)


def write_json(args: argparse.Namespace, **results: Any) -> None:
    """What was printed and more, with machine and options, where ``--json`` says."""
    if args.json:
        options = {name: str(value) for name, value in vars(args).items() if name != "json"}
        text = json.dumps({"machine": machine(), "options": options, **results}, indent=1)
        pathlib.Path(args.json).write_text(text + "\n")
