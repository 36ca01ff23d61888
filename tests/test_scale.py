"""The paper's model on this machine: two optimiser steps and one topology step of 124m, within memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import as_users, write_text

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_124m_trains_and_moves_its_masks_within_memory(tmp_path):
    """Step 2, counted from 0, is the topology step. Attention is sparse throughout: its programs compile once."""
    overrides = {
        "data.source": "text",
        "data.path": write_text(tmp_path / "text"),
        "data.cache_dir": tmp_path / "cache",
        "data.tokenizer_vocab_size": 280,
        "pretrain.steps": 3,
        "pretrain.optimizer.warmup_steps": 1,
        "pretrain.batch_size": 2,
        "pretrain.grad_accumulation_steps": 2,
        "pretrain.sparsity.schedule": "constant",  # three phases have no room in three steps
        "pretrain.sparsity.ramp_end": 0.1,
        "pretrain.sparsity.ultra_end": 0.75,
        "pretrain.sparsity.restoration_end": 0.9,
        "pretrain.sparsity.update_every_steps": 2,
        "pretrain.sparsity.attention_start": 0.0,
        "pretrain.sparsity.attention_end": 1.0,
        "loop.log_every_steps": 1,
        "loop.eval_batch_size": 1,
    }
    script = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('spdf_jax.main', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: code = end.code\n"
        "print('kilobytes', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss); sys.exit(code)"
    )
    arguments = ["spdf_jax.main", "--config", "experiments/gpt2_mst.py:124m", "--workdir", str(tmp_path / "run")]
    arguments += [f"--config.{key}={value}" for key, value in overrides.items()]
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        env=as_users(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split("kilobytes")[-1]) * 1024
    print(f"peak {peak / 1e9:.2f} GB")  # shown by pytest -rP
    assert peak <= 12e9
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 3
    assert losses[1] < losses[0]
    assert any("churn" in row for row in rows)
