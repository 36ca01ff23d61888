"""Workdirs of earlier releases: each was killed at some step, and must end where its own release ended."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from spdf_jax.config.read import load_config
from spdf_jax.jobs.train import train
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.restore import saved_run
from spdf_jax.tree import named_leaves

pytestmark = pytest.mark.usefixtures("no_figures")

GOLDEN = Path(__file__).parent / "golden"
RELEASES = sorted(folder.name for folder in GOLDEN.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("release", RELEASES)
def test_a_run_of_an_earlier_release_goes_on_to_the_same_end(release, tmp_path, monkeypatch):
    """MST from step 18, in its ultra-sparse phase, through restoration and the dense phase to step 46."""
    shutil.copytree(GOLDEN / release, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    workdir = Path("run")
    before = read_metrics(workdir)
    train(load_config(workdir / "config.json"), workdir, progress=False)
    rows = read_metrics(workdir)
    assert rows[: len(before)] == before
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 47))
    _check_rows(rows, [json.loads(line) for line in Path("later.jsonl").read_text().splitlines()])
    state = saved_run(workdir).state
    expected = np.load("final.npz")
    found = {
        f"{part}/{name}": leaf for part in ("params", "masks") for name, leaf in named_leaves(getattr(state, part))
    }
    assert sorted(found) == sorted(expected.files)
    for name, leaf in found.items():
        # Bits are the machine's and the compiler's own; what they stand for is not. A bias of keys shifts all scores of a
        # query alike: its gradient is rounding alone, which Adam makes steps of.
        atol = 1e-3 if name.endswith("attn_k/bias") else 1e-5
        np.testing.assert_allclose(jax.device_get(leaf), expected[name], rtol=0, atol=atol, err_msg=name)


def _check_rows(rows, expected):
    """Every topology step moved as many weights of every matrix as it did then; every evaluation came to the same loss."""
    moves = [(row["step"], row["churn"], row["density"]) for row in rows if "churn" in row and row["step"] > 18]
    assert moves == [(row["step"], row["churn"], row["density"]) for row in expected if "churn" in row]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    for row in expected:
        if "val_loss" in row:
            assert losses[row["step"]] == pytest.approx(row["val_loss"], abs=1e-5)
