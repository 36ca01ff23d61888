"""A run's rows are written exactly once, whatever kills it; nothing half-written is ever seen."""

import resource
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spdf_jax.errors import InputError
from spdf_jax.training.mask_pictures import mask_picture, save_mask_picture
from spdf_jax.training.metrics import Tracker, read_metrics
from spdf_jax.workdir import read_json, write_json

TOTAL_STEPS = 40


def counters(step: int) -> dict:
    return {
        "step": step,
        "phase": "pretrain",
        "sparsity": 0.75,
        "train_flops": 2.0e9 * step,
        "dense_flops": 5.0e9 * step,
        "tokens": 512 * step,
    }


def train_row(step: int) -> dict:
    extras = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens_per_second": 2000.0}
    return {**counters(step), "loss": 6 - 0.05 * step, **extras}


def evaluation_row(step: int) -> dict:
    return {**counters(step), "val_loss": 6 - 0.04 * step}


def topology_row(step: int) -> dict:
    density = {"blocks/attn_q/kernel": [0.25, 0.3], "wte/embedding": [0.2]}
    churn = {"blocks/attn_q/kernel": [0.1, 0.2], "wte/embedding": [0.05]}
    return {"step": step, "phase": "pretrain", "sparsity": 0.75, "density": density, "churn": churn}


def run_steps(workdir: Path, first_step: int, last_step: int, *, progress: bool = False) -> None:
    """A start of the run that logs what a whole run logs at these steps, resumed at the step before."""
    tracker = Tracker(workdir, resume_step=max(first_step - 1, 0), total_steps=TOTAL_STEPS, progress=progress)
    for step in range(first_step, last_step + 1):
        tracker.advance(step)
        if step > 0:
            tracker.log(train_row(step))
        if step % 10 == 0:
            tracker.log(evaluation_row(step))
        if step % 5 == 0:
            tracker.log(topology_row(step))
    tracker.close()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name)


def scalar_events(workdir: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(workdir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_rows_read_back_as_written(tmp_path):
    run_steps(tmp_path, 0, 5)
    assert read_metrics(tmp_path) == [
        evaluation_row(0),
        topology_row(0),
        *[train_row(step) for step in range(1, 6)],
        topology_row(5),
    ]


@pytest.mark.parametrize("torn", [b"", b'{"step": 31, "phase": "pre', b'{"step": 31, "phase": "\xc3', b"\0\0\0\0\n"])
def test_resuming_writes_every_row_exactly_once(tmp_path, torn):
    run_steps(tmp_path / "whole", 0, TOTAL_STEPS)
    run_steps(tmp_path / "restarted", 0, 30)
    with (tmp_path / "restarted" / "metrics.jsonl").open("ab") as file:
        file.write(torn)
    run_steps(tmp_path / "restarted", 21, 25)
    run_steps(tmp_path / "restarted", 24, TOTAL_STEPS)
    whole, restarted = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "restarted")]
    assert restarted == whole
    assert files_in(tmp_path / "restarted") == ["metrics.jsonl"]


def test_a_complete_last_row_without_newline_is_kept(tmp_path):
    run_steps(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    run_steps(tmp_path, 5, 6)
    assert [row["step"] for row in read_metrics(tmp_path) if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_a_fresh_start_keeps_step_zero_and_does_not_repeat_it(tmp_path):
    run_steps(tmp_path, 0, 7)
    run_steps(tmp_path, 0, 1)
    assert read_metrics(tmp_path) == [evaluation_row(0), topology_row(0), train_row(1)]


def test_a_row_of_the_resume_step_lost_before_the_restart_is_written(tmp_path):
    run_steps(tmp_path, 0, 9)
    tracker = Tracker(tmp_path, resume_step=9, total_steps=TOTAL_STEPS, progress=False)
    tracker.log(train_row(9))  # already there
    tracker.log(evaluation_row(9))  # was not
    tracker.close()
    assert read_metrics(tmp_path)[-2:] == [train_row(9), evaluation_row(9)]


def test_a_damaged_line_before_the_last_is_the_users_to_fix(tmp_path):
    run_steps(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    damaged = path.read_bytes().replace(b'"step": 1,', b'"step" 1,')
    path.write_bytes(damaged)
    with pytest.raises(InputError, match="line 3 is not a row"):
        Tracker(tmp_path, resume_step=3, total_steps=TOTAL_STEPS)
    with pytest.raises(InputError, match="line 3 is not a row"):
        read_metrics(tmp_path)
    assert path.read_bytes() == damaged


def test_folders_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: cannot write there"):
        Tracker(tmp_path / "file", resume_step=0, total_steps=TOTAL_STEPS)
    with pytest.raises(InputError, match="no run is recorded"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), np.float32("-inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, bad):
    run_steps(tmp_path, 0, 2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    tracker = Tracker(tmp_path, resume_step=2, total_steps=TOTAL_STEPS, progress=False)
    with pytest.raises(ValueError, match=r"row\.loss"):
        tracker.log({**train_row(3), "loss": bad})
    with pytest.raises(ValueError, match=r"row\.density\.wte\[1\]"):
        tracker.log({**topology_row(3), "density": {"wte": [0.5, bad]}})
    tracker.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    write_json(tmp_path / "summary.json", {"val_loss": 3.0})
    with pytest.raises(ValueError, match="val_loss"):
        write_json(tmp_path / "summary.json", {"val_loss": bad})
    assert read_json(tmp_path / "summary.json", "") == {"val_loss": 3.0}
    assert files_in(tmp_path) == ["metrics.jsonl", "summary.json"]


def test_a_full_disk_leaves_whole_rows_only(tmp_path):
    run_steps(tmp_path, 0, 3)
    tracker = Tracker(tmp_path, resume_step=3, total_steps=TOTAL_STEPS, progress=False)
    size_bytes = (tmp_path / "metrics.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes + 20, limits[1]))  # the next row is cut after 20 bytes
    try:
        with pytest.raises(OSError, match="large"):
            tracker.log(train_row(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    tracker.log(train_row(4))
    tracker.close()
    assert read_metrics(tmp_path)[-2:] == [train_row(3), train_row(4)]


def test_numpy_numbers_become_plain_ones(tmp_path):
    tracker = Tracker(tmp_path, resume_step=0, total_steps=TOTAL_STEPS, progress=False)
    tracker.log({**train_row(1), "step": np.int32(1), "loss": np.float32(2.5), "grad_norm": np.ones(())})
    tracker.log({**topology_row(2), "density": {"wte": np.array([0.25, 0.5])}})
    tracker.close()
    first, second = read_metrics(tmp_path)
    assert (first["step"], first["loss"], first["grad_norm"]) == (1, 2.5, 1.0)
    assert second["density"] == {"wte": [0.25, 0.5]}


@pytest.mark.parametrize("set_back_seconds", [0, 3600])
def test_tensorboard_reads_the_same_numbers_and_forgets_what_a_restart_redid(set_back_seconds, tmp_path, monkeypatch):
    run_steps(tmp_path, 0, 30)
    seconds, nanoseconds = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: seconds() - set_back_seconds)
    monkeypatch.setattr(time, "time_ns", lambda: nanoseconds() - set_back_seconds * 10**9)
    run_steps(tmp_path, 21, TOTAL_STEPS)
    losses = scalar_events(tmp_path, "loss")
    assert [step for step, _ in losses] == list(range(1, TOTAL_STEPS + 1))
    np.testing.assert_allclose([loss for _, loss in losses], [6 - 0.05 * step for step, _ in losses], rtol=1e-6)
    assert [step for step, _ in scalar_events(tmp_path, "val_loss")] == [0, 10, 20, 30, 40]
    assert scalar_events(tmp_path, "density/blocks/attn_q/kernel/1")[0] == (0, pytest.approx(0.3))
    assert scalar_events(tmp_path, "churn/wte/embedding/0")[-1] == (40, pytest.approx(0.05))


def test_json_keeps_its_order_and_replaces_whole_files(tmp_path):
    path = tmp_path / "summary.json"
    content = {"b": 1, "a": {"c": np.float64(0.5), "ü": [True, None]}}
    write_json(path, content)
    assert path.read_text() == (
        '{\n  "b": 1,\n  "a": {\n    "c": 0.5,\n    "ü": [\n      true,\n      null\n    ]\n  },\n  "crc32": 3282878176\n}\n'
    )
    assert read_json(path, "") == content
    write_json(path, {})
    assert read_json(path, "") == {}
    assert files_in(tmp_path) == ["summary.json"]


def test_progress_off_a_terminal_is_a_few_lines(tmp_path, capsys):
    run_steps(tmp_path, 0, TOTAL_STEPS, progress=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 + 5  # every tenth of the run, and five evaluations
    assert lines[1].startswith("step 4/40 | pretrain | loss 5.800 | 75% sparse | 2.5x fewer FLOPs | 2,000 tokens/s | ")


def test_progress_on_a_terminal_is_one_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run_steps(tmp_path, 0, 20, progress=True)
    shown = capsys.readouterr().out
    assert "20/40" in shown
    assert "2.5x fewer FLOPs | 2,000 tokens/s" in shown
    assert shown.count("validation loss") == 3


@pytest.mark.parametrize(("shape", "max_side"), [((7, 5), 3), ((64, 64), 64), ((1, 200), 64), ((130, 65), 64)])
def test_mask_pictures_are_block_means(shape, max_side):
    mask = np.random.default_rng(0).random(shape) < 0.3
    picture = mask_picture(mask, max_side)
    heights, widths = [-(-side // max_side) for side in shape]
    expected = [
        [mask[top : top + heights, left : left + widths].mean() for left in range(0, shape[1], widths)]
        for top in range(0, shape[0], heights)
    ]
    assert picture.dtype == np.float32
    assert max(picture.shape) <= max_side
    np.testing.assert_allclose(picture, expected, rtol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3)])
def test_a_picture_needs_two_dimensions(shape):
    with pytest.raises(ValueError, match="two dimensions"):
        mask_picture(np.ones(shape, bool))


def test_mask_pictures_are_saved_whole(tmp_path):
    pictures = {"blocks/attn_q/kernel": np.full((2, 3), 0.5), "wte/embedding": np.ones((1, 1), np.float32)}
    save_mask_picture(tmp_path, 120, pictures)
    assert files_in(tmp_path) == ["step_00000120.npz"]
    with np.load(tmp_path / "mask_pictures" / "step_00000120.npz", allow_pickle=False) as saved:
        assert {path: saved[path].dtype for path in saved.files} == dict.fromkeys(pictures, np.dtype(np.float32))
        np.testing.assert_array_equal(saved["blocks/attn_q/kernel"], pictures["blocks/attn_q/kernel"])
