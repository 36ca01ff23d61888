"""Workdirs of earlier releases: each was killed at some step, and must end where its own release ended."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from orbax.checkpoint.experimental import v1

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


@pytest.mark.parametrize("release", RELEASES)
def test_the_next_api_of_orbax_reads_what_an_earlier_release_saved(release):
    """The V1 API, which becomes orbax's own with 1.0: every leaf to the bit, masks (packed, eight to a byte) among them."""
    folder = next((GOLDEN / release / "run" / "checkpoints").iterdir()).absolute()
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder / "state").item_metadata.tree
        target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=_here()), shapes)
        expected = dict(named_leaves(checkpointer.restore(folder / "state", target)))
    found = dict(named_leaves(v1.load(folder, target, checkpointable_name="state")))
    assert found.keys() == expected.keys()
    assert any(name.startswith("masks/") and leaf.dtype == np.uint8 for name, leaf in found.items())
    for name, leaf in found.items():
        assert leaf.dtype == expected[name].dtype
        np.testing.assert_array_equal(_bits(leaf), _bits(expected[name]), err_msg=name, strict=True)


def _bits(leaf):
    return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jax.device_get(leaf)


def _here():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _check_rows(rows, expected):
    """Every topology step moved as many weights of every matrix as it did then; every evaluation came to the same loss."""
    moves = [(row["step"], row["churn"], row["density"]) for row in rows if "churn" in row and row["step"] > 18]
    assert moves == [(row["step"], row["churn"], row["density"]) for row in expected if "churn" in row]
    losses = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    for row in expected:
        if "val_loss" in row:
            assert losses[row["step"]] == pytest.approx(row["val_loss"], abs=1e-5)
