"""The page says what the run recorded, loads nothing, and leaves out what was not recorded."""

import itertools
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.tracking import Tracker, mask_picture, save_mask_picture, write_json

LAYERS = 4
LEAVES = [f"blocks/{name}/kernel" for name in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/up", "mlp/down")]
STEPS = 400
TOKENS_PER_STEP = 8192
MAX_SPARSITY = 0.95


def mst_sparsity(step: int) -> float:
    """Cubic in until a fifth, held until a half, cubic out until four fifths, then dense."""
    progress = step / STEPS
    if progress < 0.2:
        return MAX_SPARSITY * (1 - (1 - progress / 0.2) ** 3)
    if progress < 0.5:
        return MAX_SPARSITY
    return MAX_SPARSITY * max(1 - (progress - 0.5) / 0.3, 0.0) ** 3


def make_rows(last_step: int, *, sparse: bool) -> list[dict]:
    rng = np.random.default_rng(0)
    rows: list[dict] = []
    train_flops = 0.0
    for step in range(last_step + 1):
        sparsity = mst_sparsity(step) if sparse else 0.0
        train_flops += (step > 0) * 5e12 * (1 - 0.86 * sparsity)
        loss = 3.6 + 4.9 * np.exp(-step / 60)
        row = {
            "step": step,
            "phase": "pretrain" if step <= 0.9 * STEPS else "finetune",
            "sparsity": sparsity,
            "train_flops": train_flops,
            "dense_flops": 5e12 * step,
            "tokens": TOKENS_PER_STEP * step,
        }
        if step:
            extras = {"learning_rate": 6e-4, "grad_norm": 0.8, "tokens_per_second": 6100.0}
            rows.append({**row, "loss": loss + 0.08 * rng.standard_normal(), **extras})
        if step % 50 == 0:
            rows.append({**row, "val_loss": loss + 0.05})
        if sparse and step % 10 == 0 and step <= 0.8 * STEPS:
            rows.append(topology_row(step, row["phase"], sparsity, rng))
    return rows


def topology_row(step: int, phase: str, sparsity: float, rng: np.random.Generator) -> dict:
    density = {leaf: (1 - sparsity * rng.uniform(0.9, 1, LAYERS)).tolist() for leaf in LEAVES}
    churn_mean = 0.15 * (1 + np.cos(np.pi * step / STEPS)) / 2
    churn = {leaf: (churn_mean * rng.uniform(0.7, 1.2, LAYERS)).tolist() for leaf in LEAVES}
    density["wte/embedding"], churn["wte/embedding"] = 1 - sparsity, churn_mean
    return {"step": step, "phase": phase, "sparsity": sparsity, "density": density, "churn": churn}


def make_config(**changes: object) -> dict:
    return {
        "experiment": "gpt2_mst",
        "variant": "mini",
        "command": "python -m spdf_jax.main --config experiments/gpt2_mst.py:mini",
        "phases": ["pretrain", "finetune"],
        "pretrain": {"steps": 360, "learning_rate": 6e-4, "sparsity": {"max": MAX_SPARSITY, "rule": "mixed"}},
        "finetune": {"steps": 40},
        "model": {"layers": LAYERS, "heads": 4, "width": 256, "context_tokens": 256},
        "data": {"source": "embedded", "vocabulary": 8192},
        **changes,
    }


def make_run(
    workdir: Path,
    *,
    last_step: int = STEPS,
    sparse: bool = True,
    rows: list[dict] | None = None,
    config: dict | None = None,
) -> Path:
    """The folder of a run, as training leaves it; without `summary.json` where it has not reached its end."""
    rows = make_rows(last_step, sparse=sparse) if rows is None else rows
    tracker = Tracker(workdir, resume_step=0, total_steps=STEPS, progress=False)
    for row in rows:
        tracker.log(row)
    tracker.close()
    write_json(workdir / "config.json", config or make_config())
    if sparse:
        save_pictures(workdir, last_step)
    if last_step == STEPS:
        write_json(workdir / "summary.json", make_summary(rows))
    return workdir


def save_pictures(workdir: Path, last_step: int) -> None:
    rng = np.random.default_rng(1)
    for step in range(0, last_step + 1, 80):
        rows_256 = np.linspace(0.3, 1.7, 256)[:, np.newaxis]
        shapes = dict.fromkeys(LEAVES, (256, 256)) | {"wte/embedding": (8192, 256)}
        density = 1 - mst_sparsity(step)
        masks = {
            leaf: rng.random(shape) < density * np.resize(rows_256, (shape[0], 1)) for leaf, shape in shapes.items()
        }
        save_mask_picture(workdir, step, {leaf: mask_picture(mask) for leaf, mask in masks.items()})


def make_summary(rows: list[dict]) -> dict:
    last = [row for row in rows if "tokens" in row][-1]
    return {
        "status": "finished",
        "experiment": "gpt2_mst",
        "variant": "mini",
        "steps": last["step"],
        "tokens": last["tokens"],
        "val_loss": 3.9123,
        "initial_val_loss": 8.55,
        "unigram_loss": 6.21,
        "sparsity": last["sparsity"],
        "train_flops": last["train_flops"],
        "dense_flops": last["dense_flops"],
        "flops_reduction": last["dense_flops"] / last["train_flops"],
        "tokens_per_second": 6100.0,
        "wall_seconds": 312.4,
        "device": "2-core CPU",
        "parameters": 5_300_000,
    }


PRETRAINED = {"0": 0.0, "50": 0.5, "75": 0.75}
CHOICES = ((1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1))  # rate, seed
SIGNATURE = "nrefs:var|case:lc|tok:13a|scale:0-100"


def sweep_cell(name: str, sparsity: float, rate: float = 0.0, seed: int = 0) -> tuple[dict, list[dict]]:
    """Config and rows of a pre-training, or with a rate of a fine-tuning."""
    phase = "finetune" if rate else "pretrain"
    c = spdf.default_config("table", "mini", variants=("mini",), phases=(phase,))
    c.seed = seed
    if rate:
        c.init_from, c.finetune.task.name, c.finetune.optimizer.peak_learning_rate = f"cell:{name}", "restaurant", rate
    else:
        c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = ("static", sparsity) if sparsity else ("dense", 0.0)
    config = spdf.resolve(c).as_dict() | {"command": "python -m spdf_jax.main --config experiments/table.py"}
    scale, floor = (20, 0.6) if rate else (200, 4.0)
    rows = []
    for step in range(0, 5 * scale + 1, scale):
        loss = floor + 0.4 * sparsity + 40 * rate + 0.01 * seed + 4 * np.exp(-step / scale)
        cost = {"train_flops": (1 - 0.8 * sparsity) * 5e12 * step, "dense_flops": 5e12 * step, "tokens": 4096 * step}
        row = {"step": step, "phase": phase, "sparsity": 0.0 if rate else sparsity, **cost}
        rows += [{**row, "loss": loss, "tokens_per_second": 4096.0}] if step else []
        rows.append({**row, "val_loss": loss + 0.1})
    return config, rows


def sweep_cells() -> dict[str, tuple[dict, list[dict]]]:
    cells = {f"pretrain_{name}": sweep_cell(name, sparsity) for name, sparsity in PRETRAINED.items()}
    for (name, sparsity), (rate, seed) in itertools.product(PRETRAINED.items(), CHOICES):
        cells[f"finetune_{name}_{rate:g}_{seed}"] = sweep_cell(f"pretrain_{name}", sparsity, rate, seed)
    return cells


def make_sweep(workdir: Path, *, finished: bool = True) -> Path:
    """The folder of a sweep: three pre-trainings, each fine-tuned with two rates and two seeds."""
    for name, (config, rows) in sweep_cells().items():
        cell = workdir / "cells" / name
        cell.mkdir(parents=True)
        write_json(cell / "config.json", config)
        (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if finished or name != "finetune_75_0.002_1":
            summary = make_summary(rows) | {"val_loss": rows[-1]["val_loss"]}
            if name.startswith("finetune"):
                summary["before"] = {"train_flops": 1e15 * (1 - 0.8 * PRETRAINED[name.split("_")[1]])}
            write_json(cell / "summary.json", summary)
            (cell / "report.html").write_text("a report")
    if finished:
        rows = [sweep_row(workdir, label, name, bleu) for label, name, bleu in SWEEP_ROWS]
        table = {"experiment": "table", "variant": "mini", "title": "SPDF on restaurant", "rows": rows}
        write_json(workdir / "table.json", table)
    return workdir


# The first two are one run: at 0 % there are no masks.
SWEEP_ROWS = (
    ("0 %, dense fine-tuning", "0", (40.0, 42.0)),
    ("0 %, sparse fine-tuning", "0", (40.0, 42.0)),
    ("50 %, dense fine-tuning", "50", (42.5, 42.5)),
    ("75 %, dense fine-tuning", "75", (30.0, 32.0)),
)


def sweep_row(workdir: Path, label: str, name: str, bleus: tuple[float, float]) -> dict:
    cells = {}
    for seed, bleu in enumerate(bleus):
        cell = f"finetune_{name}_0.001_{seed}"
        absent = {"meteor": "java is not there"}
        evaluation = {"bleu": bleu, "signatures": {"bleu": SIGNATURE}, "absent": absent}
        cells[cell] = {
            "summary": json.loads((workdir / "cells" / cell / "summary.json").read_text()),
            "evaluation": evaluation,
        }
    flops = cells[cell]["summary"]["before"]["train_flops"]
    values = {
        "BLEU": {"mean": sum(bleus) / 2, "deviation": statistics.stdev(bleus), "seeds": 2},
        "METEOR": {"mean": None, "deviation": 0.0, "seeds": 2},
        "pre-training FLOPs": {"mean": flops, "deviation": 0.0, "seeds": 2},
    }
    return {"row": label, "choice": "rate 0.001", "cells": cells, "values": values}


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_report(make_run(tmp_path_factory.mktemp("finished"))).read_text()


def test_the_verdict_comes_first_and_says_what_is_counted(page):
    assert "<h1>gpt2_mst: mini</h1>" in page
    assert (
        "Validation loss 3.91 after 3.28M tokens with 1.8x fewer training FLOPs than dense (1.14 vs 2.00 PFLOP);"
        " 5 min 12 s on 2-core CPU." in page
    )
    assert "FLOPs saved are counted, not seconds saved." in page


def test_every_panel_of_a_finished_run_is_there(page):
    assert titles(page) == [
        "Numbers",
        "Loss over steps",
        "Loss over compute",
        "Sparsity over steps",
        "Churn over steps",
        "Density by layer",
        "Masks",
        "Run it again",
    ]
    for text in (
        "8.5500 nats/token",
        "6.2100 nats/token",
        "95 % at its highest",
        "5,300,000",
        "2.00 PFLOP",
        "6,100 tokens/s",
    ):
        assert text in page
    for text in (
        "loss (nats/token)",
        "training compute (PFLOP, counted)",
        "pretrain",
        "finetune",
        "sparse, up to 95 %",
    ):
        assert text in page
    assert "start, step 0" in page
    assert "sparsest, step 80" in page
    assert "end, step 400" in page
    assert "python -m spdf_jax.main --config experiments/gpt2_mst.py:mini" in page
    assert "&#34;context_tokens&#34;: 256" in page


def test_the_page_loads_nothing(page):
    references = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
    assert references
    assert all(reference.startswith(("data:image/png;base64,", "#")) for reference in references)
    assert not re.findall(r"<script|<link|@import|<iframe", page)
    assert {match.split('"')[0] for match in re.findall(r"https?://[^\s<>]*", page)} <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert len(page) < 1_500_000


def test_ids_are_unique_and_the_page_is_reproducible(page, tmp_path):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert write_report(make_run(tmp_path)).read_text() == page
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))


def test_a_dense_run_has_no_mask_panels(tmp_path):
    page = write_report(make_run(tmp_path, sparse=False)).read_text()
    assert titles(page) == ["Numbers", "Loss over steps", "Loss over compute", "Run it again"]
    assert "trained dense for 2.00 PFLOP" in page
    assert "fewer training FLOPs" not in page
    assert "sparse, up to" not in page


def test_attention_that_skips_work_saves_without_masks(tmp_path):
    rows = [{**row, "train_flops": 0.9 * row["dense_flops"]} for row in make_rows(STEPS, sparse=False)]
    page = write_report(make_run(tmp_path, sparse=False, rows=rows)).read_text()
    assert "with 1.1x fewer training FLOPs than dense (1.80 vs 2.00 PFLOP)" in page
    assert titles(page) == ["Numbers", "Loss over steps", "Loss over compute", "Run it again"]


def test_mask_pictures_name_their_layer(tmp_path):
    workdir = make_run(tmp_path, last_step=100)
    save_mask_picture(workdir, 80, {"blocks/attn/q/kernel/3": np.full((2, 2), 0.25, np.float32)})
    page = write_report(workdir).read_text()
    assert "<code>attn/q, layer 3</code>" in page
    assert "not recorded" in page  # at step 0, which has other matrices
    assert "25 % present" in page


def test_a_run_under_way_is_reported_from_its_rows(tmp_path):
    page = write_report(make_run(tmp_path, last_step=120)).read_text()
    assert "unfinished, at step 120" in page
    assert "Validation loss 4.58 after 983k tokens with 3.2x fewer training FLOPs" in page
    assert "Masks" in titles(page)
    assert "Wall-clock" not in page


@pytest.mark.parametrize("kinds", [(), ("loss",), ("val_loss",), ("density",)])
def test_rows_of_one_kind_are_enough(tmp_path, kinds):
    rows = [row for row in make_rows(100, sparse=True) if any(kind in row for kind in kinds)]
    page = write_report(make_run(tmp_path, last_step=100, rows=rows)).read_text()
    assert ("Loss over steps" in titles(page)) == ("loss" in kinds or "val_loss" in kinds)
    assert ("Density by layer" in titles(page)) == ("density" in kinds)


def test_one_topology_row_is_enough(tmp_path):
    rows = [row for row in make_rows(100, sparse=True) if "density" not in row or row["step"] == 50]
    assert "Density by layer" in titles(write_report(make_run(tmp_path, rows=rows, last_step=100)).read_text())


def test_many_phases_and_long_names_fit(tmp_path):
    rows = [{**row, "phase": f"phase-{row['step'] // 15}-of-a-long-name"} for row in make_rows(100, sparse=True)]
    for row in rows:
        if "density" in row:
            row["density"] = {f"{'transformer/' * 9}{leaf}": density for leaf, density in row["density"].items()}
    page = write_report(make_run(tmp_path, rows=rows, last_step=100)).read_text()
    assert "phase-6-of-a-long-name" in page
    assert re.search(r"…[a-z/]*/attn/q<", page)


def test_names_are_escaped_everywhere(tmp_path):
    nasty = "<script>alert('$x$ & {{ 7 * 7 }}')</script>"
    rows = [{**row, "phase": nasty} if row["step"] > 50 else row for row in make_rows(100, sparse=True)]
    for row in rows:
        if "density" in row:
            row["density"] = {nasty: row["density"]["wte/embedding"]}
    config = make_config(experiment=nasty, variant=nasty, command=nasty, model={nasty: nasty})
    page = write_report(make_run(tmp_path, rows=rows, last_step=100, config=config)).read_text()
    assert "<script" not in page
    assert "&lt;script" in page
    assert "49" not in re.sub(r"<svg.*?</svg>|base64,[^\"]*", "", page, flags=re.DOTALL)


def test_long_runs_stay_small(tmp_path):
    rows = []
    for step in range(1, 20_001):
        flops = {"train_flops": 1e15 * step, "dense_flops": 4e15 * step, "tokens": step * 500_000, "sparsity": 0.75}
        extras = {"learning_rate": 6e-4, "grad_norm": 1.0, "tokens_per_second": 1e6}
        rows.append({"step": step, "phase": "pretrain", "loss": 10 / step**0.1, **flops, **extras})
    workdir = make_run(tmp_path, last_step=100, sparse=False, rows=[])
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(workdir).read_text()
    assert "means of 34 logged steps" in page
    assert len(page) < 300_000


def test_folders_without_a_readable_run_are_refused(tmp_path):
    with pytest.raises(InputError, match="no run is recorded"):
        write_report(tmp_path)
    make_run(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json: missing"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not JSON"):
        write_report(tmp_path)
    write_json(tmp_path / "config.json", make_config())
    (tmp_path / "mask_pictures" / "step_00000000.npz").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="not a mask picture"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_x(tmp_path):
    write_sweep_report(make_sweep(tmp_path))
