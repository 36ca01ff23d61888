"""Every benchmark runs, at its smallest, and leaves its figures: what it measures is for a quiet machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import needs_libtpu

FOLDER = Path(__file__).parent.parent / "experiments" / "benchmarks"
SMALLEST = {
    "attention": ["--lengths", "64", "--batch", "1", "--repeats", "1"],
    "block_sparse": ["--layer", "--repeats", "1"],
    "compile_time": ["--layers", "1", "2", "--width", "64", "--context", "32", "--repeats", "1"],
    "encode_text": ["--megabytes", "1", "--format", "parquet"],
    "gpu": ["--dry_run"],
    "llama_step": ["--shapes", "2x64", "--repeats", "1"],
    "mask_overhead": ["--sizes", "mini", "--repeats", "1"],
    "pods": ["--only", "experiments/gpt2_static.py:124m --job plan --plan_topology v6e"],
    "prune_once": ["--inputs", "128", "--outputs", "64", "--sequences", "2", "--length", "32", "--repeats", "1"],
    "topk": ["--shapes", "2x64", "--floors", "1", "--density", "0.1", "--repeats", "1"],
    "topology": ["--layers", "2", "--width", "64", "--repeats", "1"],
    "train_step": ["--shapes", "4x256", "--repeats", "1"],
}
NIGHTLY = ("gpu", "pods")  # minutes: what they print is tested where it is made
NEEDED = {"pods": [needs_libtpu]}


def test_all_are_here():
    assert SMALLEST.keys() == {path.stem for path in FOLDER.glob("*.py")} - {"runner"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[getattr(pytest.mark, "nightly" if name in NIGHTLY else "slow"), *NEEDED.get(name, [])]
        )
        for name in SMALLEST
    ],
)
def test_a_benchmark_runs_and_leaves_its_figures(name, tmp_path):
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *SMALLEST[name], "--json", tmp_path / "figures.json"],
        env=os.environ | {"PYTHONPATH": str(FOLDER.parents[1])}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert any(line.startswith("| ") for line in done.stdout.splitlines()), "a Markdown table"
    assert json.loads((tmp_path / "figures.json").read_text())
