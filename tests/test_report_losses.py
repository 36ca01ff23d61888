"""The losses of a run: phases by name, and training time from what was logged."""

import numpy as np
from report_folders import drawn, make_rows, make_run

from spdf_jax.report.losses import loss_by_step, loss_by_time
from spdf_jax.report.records import read_run


def test_many_phases_and_long_names_fit(tmp_path):
    rows = [{**row, "phase": f"phase-{row['step'] // 15}-of-a-long-name"} for row in make_rows(100, sparse=True)]
    panel = drawn(loss_by_step, read_run(make_run(tmp_path, rows=rows, last_step=100, sparse=False)))
    assert "phase-6-of-a-long-name" in panel


def test_training_time_is_tokens_over_rate(tmp_path):
    base = {"phase": "pretrain", "sparsity": 0.0, "train_flops": 1, "dense_flops": 1}
    rows = [
        base | {"step": 10, "tokens": 100, "loss": 1.0, "tokens_per_second": 100.0},
        base | {"step": 20, "tokens": 300, "loss": 1.0, "tokens_per_second": 50.0},
        base | {"step": 15, "tokens": 200, "val_loss": 1.0},
    ]
    run = read_run(make_run(tmp_path, rows=rows, sparse=False))
    np.testing.assert_allclose(run.training_seconds(run.train_rows), [1, 5])
    np.testing.assert_allclose(run.training_seconds(run.evaluation_rows), [3])
    rows[1]["tokens_per_second"] = 0.0
    other = read_run(make_run(tmp_path / "no_rate", rows=rows, sparse=False))
    assert other.training_seconds(rows) is None
    assert loss_by_time(other) is None
