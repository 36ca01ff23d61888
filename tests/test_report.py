"""The page says what the run recorded, loads nothing, and leaves out what was not recorded."""

import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
from html import escape, unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.evals.exams import CertificationResult, ExamResults
from spdf_jax.report import write_report, write_sweep_report
from spdf_jax.report.records import changed_settings, read_run
from spdf_jax.training.mask_pictures import mask_picture, save_mask_picture
from spdf_jax.training.metrics import Tracker
from spdf_jax.workdir import write_json

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
        pictures = {leaf: mask_picture(mask) for leaf, mask in masks.items()}
        into = {f"{leaf}:in": mask.sum(axis=0) for leaf, mask in masks.items()}
        out = {f"{leaf}:out": mask.sum(axis=1) for leaf, mask in masks.items()}
        save_mask_picture(workdir, step, pictures | into | out)


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


def read(path: Path) -> str:
    """A page, with plain spaces for those that hold words together."""
    return path.read_text().replace("\N{NO-BREAK SPACE}", " ")


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return read(write_report(make_run(tmp_path_factory.mktemp("finished"))))


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
        "Loss over time",
        "Sparsity over steps",
        "Churn over steps",
        "Density by layer",
        "Masks",
        "Degrees",
        "Run it again",
        "Settings",
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
    assert read(write_report(make_run(tmp_path))) == page
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*"))


DENSE_TITLES = [
    "Numbers",
    "Loss over steps",
    "Loss over compute",
    "Loss over time",
    "Run it again",
    "Settings",
]


def test_a_dense_run_has_no_mask_panels(tmp_path):
    page = read(write_report(make_run(tmp_path, sparse=False)))
    assert titles(page) == DENSE_TITLES
    assert "trained dense for 2.00 PFLOP" in page
    assert "fewer training FLOPs" not in page
    assert "sparse, up to" not in page


def test_attention_that_skips_work_saves_without_masks(tmp_path):
    rows = [{**row, "train_flops": 0.9 * row["dense_flops"]} for row in make_rows(STEPS, sparse=False)]
    page = read(write_report(make_run(tmp_path, sparse=False, rows=rows)))
    assert "with 1.11x fewer training FLOPs than dense (1.80 vs 2.00 PFLOP)" in page
    assert titles(page) == DENSE_TITLES


def test_a_panel_without_a_neighbour_takes_the_whole_row(page, tmp_path):
    alone = r'<section class="card alone">\s*<div>\s*<h2>(.*?)</h2>'
    assert re.findall(alone, page) == []
    assert re.findall(alone, read(write_report(make_run(tmp_path, sparse=False)))) == ["Loss over time"]


def test_masks_that_do_not_change_have_no_sparsest_step(tmp_path):
    workdir = make_run(tmp_path, last_step=100, sparse=False, rows=make_rows(100, sparse=True))
    for step in (0, 60):
        save_mask_picture(workdir, step, {"blocks/up/kernel/0": np.full((2, 2), 0.25, np.float32)})
    page = read(write_report(workdir))
    assert re.findall(r"<span>(.*, step \d+)</span>", page) == ["start, step 0", "last, step 60"]
    save_mask_picture(workdir, 100, {"blocks/up/kernel/0": np.full((2, 2), 0.5, np.float32)})
    page = read(write_report(workdir))
    assert re.findall(r"<span>(.*, step \d+)</span>", page) == ["start and sparsest, step 0", "end, step 100"]


def test_mask_pictures_name_their_layer(tmp_path):
    workdir = make_run(tmp_path, last_step=100)
    save_mask_picture(workdir, 80, {"blocks/attn/q/kernel/3": np.full((2, 2), 0.25, np.float32)})
    page = read(write_report(workdir))
    assert "<code>attn/q, layer 3</code>" in page
    assert "not recorded" in page  # at step 0, which has other matrices
    assert "25 % present" in page


def test_a_run_under_way_is_reported_from_its_rows(tmp_path):
    page = read(write_report(make_run(tmp_path, last_step=120)))
    assert "unfinished, at step 120" in page
    assert "Validation loss 4.58 after 983k tokens with 3.2x fewer training FLOPs" in page
    assert "Masks" in titles(page)
    assert "Wall-clock" not in page


@pytest.mark.parametrize("kinds", [(), ("loss",), ("val_loss",), ("density",)])
def test_rows_of_one_kind_are_enough(tmp_path, kinds):
    rows = [row for row in make_rows(100, sparse=True) if any(kind in row for kind in kinds)]
    page = read(write_report(make_run(tmp_path, last_step=100, rows=rows)))
    assert ("Loss over steps" in titles(page)) == ("loss" in kinds or "val_loss" in kinds)
    assert ("Density by layer" in titles(page)) == ("density" in kinds)


def test_one_topology_row_is_enough(tmp_path):
    rows = [row for row in make_rows(100, sparse=True) if "density" not in row or row["step"] == 50]
    assert "Density by layer" in titles(read(write_report(make_run(tmp_path, rows=rows, last_step=100))))


def test_many_phases_and_long_names_fit(tmp_path):
    rows = [{**row, "phase": f"phase-{row['step'] // 15}-of-a-long-name"} for row in make_rows(100, sparse=True)]
    for row in rows:
        if "density" in row:
            row["density"] = {f"{'transformer/' * 9}{leaf}": density for leaf, density in row["density"].items()}
    page = read(write_report(make_run(tmp_path, rows=rows, last_step=100)))
    assert "phase-6-of-a-long-name" in page
    assert re.search(r"…[a-z/]*/attn/q<", page)


def test_names_are_escaped_everywhere(tmp_path):
    nasty = "<script>alert('$x$ & {{ 7 * 7 }}')</script>"
    rows = [{**row, "phase": nasty} if row["step"] > 50 else row for row in make_rows(100, sparse=True)]
    for row in rows:
        if "density" in row:
            row["density"] = {nasty: row["density"]["wte/embedding"]}
    config = make_config(experiment=nasty, variant=nasty, command=nasty, model={nasty: nasty})
    page = read(write_report(make_run(tmp_path, rows=rows, last_step=100, config=config)))
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
    page = read(write_report(workdir))
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
    with pytest.raises(InputError, match=r"config\.json: not readable JSON"):
        write_report(tmp_path)
    write_json(tmp_path / "config.json", make_config())
    (tmp_path / "mask_pictures" / "step_00000000.npz").write_bytes(b"not a picture")
    with pytest.raises(InputError, match="not a mask picture"):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


# --- a run fine-tuned on a task --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    """Pre-trained on text, then fine-tuned with early stopping, evaluated and scored."""
    workdir = tmp_path_factory.mktemp("finetuned")
    config, rows = sweep_cell("", 0.75)
    task_config, task_rows = sweep_cell("", 0.0, rate=1e-3)
    last = rows[-1]
    for row in task_rows[1:]:
        row["step"] += last["step"]
        row |= {key: row[key] + last[key] for key in ("train_flops", "dense_flops", "tokens")}
    config |= {"phases": ["pretrain", "finetune"], "finetune": task_config["finetune"]}
    make_run(workdir, config=config, rows=rows + task_rows[1:], sparse=False, last_step=0)
    summary = make_summary(rows + task_rows) | {"best_step": 1080, "val_loss": 0.8, "initial_val_loss": 8.1}
    del summary["unigram_loss"]
    write_json(workdir / "summary.json", summary)
    scores = {"step": 1080, "val_loss": 0.8, "perplexity": 2.2255, "bleu": 34.221, "seen": {"bleu": 36.0}}
    absent = {"meteor": "java <is> not there"}
    write_json(
        workdir / "evaluation.json",
        scores | {"unseen": {"bleu": 30.5}, "signatures": {"bleu": SIGNATURE}, "absent": absent},
    )
    texts = [{"context": f"name : Mill {i}", "text": f"<b>Mill {i}</b>", "references": ["A mill."]} for i in range(19)]
    (workdir / "generations.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return workdir


def test_a_finetuned_run_shows_scores_texts_and_its_best_step(finetuned):
    page = read(write_report(finetuned))
    assert "Validation loss 0.80 over the target tokens of restaurant" in page
    assert "Scored: BLEU 34.2." in page
    assert titles(page)[:3] == ["Numbers", "Scores", "Loss over steps"]
    assert "at the best evaluation, step 1,080" in page
    assert "stopped early" in page
    assert "best, kept" in page
    assert "over held-out text: not to be compared with the last" in page
    assert "Points: held-out text, then the target tokens of restaurant." in page
    scores = re.findall(r"<td>([^<]*)</td>", page[page.index("<h2>Scores") :])
    assert scores[:9] == ["0.8000", "", "", "2.2255", "", "", "34.2210", "36.0000", "30.5000"]
    assert SIGNATURE in page
    assert "java &lt;is&gt; not there" in page
    assert re.findall(r"&lt;b&gt;Mill (\d+)&lt;/b&gt;", page) == [str(i) for i in range(0, 19, 2)]
    assert "token frequencies alone" not in page


def test_what_a_run_started_from_is_counted_with_it(tmp_path):
    workdir = make_run(tmp_path, sparse=False)
    summary = json.loads((workdir / "summary.json").read_text())
    write_json(workdir / "summary.json", summary | {"before": {"train_flops": 1e15}})
    page = read(write_report(workdir))
    assert '<th scope="row">Counted FLOPs of the run before</th><td>1.00 PFLOP</td>' in page
    assert '<th scope="row">Both together</th><td>3.00 PFLOP</td>' in page


def test_unreadable_texts_are_refused(tmp_path):
    workdir = make_run(tmp_path, sparse=False)
    (workdir / "generations.jsonl").write_text('{"text": "no context"}\n')
    with pytest.raises(InputError, match=r"generations\.jsonl: not generated texts"):
        write_report(workdir)


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
    other = make_run(tmp_path / "no_rate", rows=rows, sparse=False)
    assert read_run(other).training_seconds(rows) is None
    assert "Loss over time" not in titles(read(write_report(other)))


def test_settings_are_those_that_differ_from_the_defaults():
    config, _ = sweep_cell("", 0.75)
    assert changed_settings(config) == [
        ("pretrain.sparsity.rule", "static", "dense"),
        ("pretrain.sparsity.sparsity", "0.75", "0.0"),
    ]
    assert ("model.of_another_version", "1", "none") in changed_settings(config | {"model": {"of_another_version": 1}})


def test_degrees_are_counted_neuron_by_neuron(tmp_path):
    workdir = make_run(tmp_path, last_step=100, sparse=False, rows=make_rows(100, sparse=True))
    mask = np.zeros((4, 6), bool)  # 4 inputs, 6 outputs
    mask[0], mask[1, :3] = True, True
    into, out = mask.sum(axis=0), mask.sum(axis=1)
    picture = {"blocks/up/kernel/0": mask_picture(mask)}
    save_mask_picture(workdir, 80, picture | {"blocks/up/kernel/0:in": into, "blocks/up/kernel/0:out": out})
    page = read(write_report(workdir))
    assert "in 1 to 2 of 4<br>out 0 to 6 of 6<br>2 without any" in page
    assert page.count("<img src") == 2  # the mask and the scale: degrees are no pictures
    assert "Without any weight, at the step with the most: 2 of 4 inputs of up, layer 0 (step 80)." in page


def test_tokens_without_a_weight_are_counted_at_the_step_that_has_most_of_them(tmp_path):
    workdir = make_run(tmp_path, last_step=100, sparse=False, rows=make_rows(100, sparse=True))
    for step, dead in ((0, 0), (40, 39), (100, 3)):
        into, out = np.full(8, 50), np.full(4096, 2)  # of the embedding: a column a channel, a row a token
        out[:dead] = 0
        save_mask_picture(workdir, step, {"wte/embedding:in": into, "wte/embedding:out": out})
    page = read(write_report(workdir))
    assert (
        "Without any weight, at the step with the most: 39 of 4,096 tokens of wte (step 40). A token without any weight has no"
        " embedding (head tied) and the logit 0." in page
    )


def test_bins_of_degrees_hold_as_many_possible_degrees_each(tmp_path):
    workdir = make_run(tmp_path, last_step=100, sparse=False, rows=make_rows(100, sparse=True))
    degrees = np.arange(1, 18)  # each once: flat, where 20 bins would leave some empty
    save_mask_picture(workdir, 80, {"up/kernel:in": degrees, "up/kernel:out": degrees})
    flat = "M0,75" + "".join(f"V0H{100 * i / 17:.4g}" for i in range(1, 18)) + "V75"
    assert re.findall(r'<path class="\w+" d="(.*?)"/>', read(write_report(workdir))) == [flat, flat]


# --- a run that sat exams --------------------------------------------------------------------------------------------


def exam_run(workdir: Path, exams: ExamResults, questions_file: str = "") -> str:
    """The page of a run whose checkpoint was evaluated on tasks of lm-eval and on exams."""
    make_run(workdir, sparse=False)
    metrics = {"lambada": {"perplexity": 227.26, "acc": 0.125}, "sst2": {"acc": 0.5}}
    tasks = {
        name: {"metrics": figures, "samples": 5153, "num_fewshot": shots, "version": 1}
        for (name, figures), shots in zip(metrics.items(), (0, 4), strict=True)
    }
    found = {"step": 400, "val_loss": 3.9123, "perplexity": 50.0}
    found["zero_shot"] = {"lm_eval_version": "0.4.13", "tasks": tasks}
    found["exams"] = exams.as_dict() | {"questions_file": questions_file}
    write_json(workdir / "evaluation.json", found)
    return read(write_report(workdir))


def table_cells(page: str, title: str) -> list[list[str]]:
    """The texts of the rows of a panel's table, header included."""
    table = page[page.index(f"<h2>{title}</h2>") :].split("</table>")[0]
    return [
        [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in table.split("<tr>")[1:]
    ]


BAKER = CertificationResult("Baker", "food", questions=10, correct=7, guess_score=0.25)
COOK = CertificationResult("Cook <b>", "food", questions=10, correct=8, guess_score=0.25, human_score=0.6)
CLERK = CertificationResult("Clerk", "office", questions=4, correct=1, guess_score=0.5)


@pytest.fixture(scope="module")
def exam_page(tmp_path_factory) -> str:
    return exam_run(tmp_path_factory.mktemp("exams"), ExamResults("length", (BAKER, CLERK, COOK)))


def test_exams_have_a_table_and_a_chart(exam_page):
    assert titles(exam_page)[:5] == ["Numbers", "Scores", "Zero-shot", "Exams", "Loss over steps"]
    assert table_cells(exam_page, "Exams") == [
        ["certification", "questions", "score", "people", "passed"],
        ["Baker food", "10", "70 %", "-", "no"],  # 70 % is not over 70 %
        ["Clerk office", "4", "25 %", "-", "no"],
        ["Cook &lt;b&gt; food", "10", "80 %", "60 %", "yes"],
    ]
    panel = exam_page[exam_page.index("<h2>Exams") : exam_page.index("<h2>Loss over steps")]
    assert "1 of 3 certifications passed, each at over 70 % correct." in panel
    assert "On the 1 with a human score: 80 %, people 60 %." in panel
    assert "without human scores" in panel
    assert "<details" not in panel
    chart = re.findall(r"<text [^>]*>(.*?)</text>", panel)
    assert [text for text in chart if not text.replace(".", "").isdigit()] == [
        "questions answered right (%)",
        "food: 1 of 2 passed",
        "Baker",
        "Cook &lt;b&gt;",
        "office: 0 of 1 passed",
        "Clerk",
        "guessing",
        "people",
        "passed at over 70 %",
        "passed",
        "not passed",
    ]


def test_tasks_of_lm_eval_have_a_table(exam_page):
    assert table_cells(exam_page, "Zero-shot") == [
        ["task", "score", "value", "texts", "examples given"],
        ["lambada", "perplexity", "227.3", "5,153", "0"],
        ["accuracy", "0.1250", "5,153", "0"],
        ["sst2", "accuracy", "0.5000", "5,153", "4"],
    ]
    assert "The prompts of sst2 are this project" in exam_page


def test_hundreds_of_exams_are_drawn_by_field_and_folded(tmp_path):
    many = [CertificationResult(f"exam {i}", f"field {i % 5}", 50, i % 50, 0.25) for i in range(200)]
    page = exam_run(tmp_path, ExamResults("letter", tuple(many)), questions_file="data/<mine>.jsonl")
    panel = page[page.index("<h2>Exams") : page.index("<h2>Loss over steps")]
    assert "<summary>All 200 certifications</summary>" in panel
    assert len(table_cells(page, "Exams")) == 201
    chart = panel[panel.index("<svg") :]
    assert "field 3: " in chart
    assert "exam 3" not in chart
    assert "mean score" in chart
    assert "people" not in panel
    assert "Questions: data/&lt;mine&gt;.jsonl." in panel


# --- sweeps ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def sweep_page(sweep) -> str:
    return read(write_sweep_report(sweep))


def test_a_sweep_says_in_words_what_came_out(sweep_page):
    assert "<h1>SPDF on restaurant</h1>" in sweep_page
    assert "table: mini, finished" in sweep_page
    assert (
        "BLEU: 41.00 for “0 %, dense fine-tuning”, the reference; highest 42.50 for “50 %, dense fine-tuning” (1.04 of"
        " the reference at 0.60 of its counted FLOPs), lowest 31.00 for “75 %, dense fine-tuning” (0.76 of the reference"
        " at 0.40 of its counted FLOPs)." in sweep_page
    )
    assert "15 runs: 12 of finetune, 3 of pretrain." in sweep_page


def test_a_sweep_whose_rows_are_alike_says_so(tmp_path):
    workdir = make_sweep(tmp_path)
    table = json.loads((workdir / "table.json").read_text())
    for row in table["rows"]:
        row["values"]["BLEU"]["mean"] = 0.0
    write_json(workdir / "table.json", table)
    assert "BLEU: 0 in every row." in read(write_sweep_report(workdir))


def test_a_reference_at_an_end_is_said_so_and_a_loss_has_its_unit(tmp_path, sweep_page):
    workdir = make_sweep(tmp_path)
    table = json.loads((workdir / "table.json").read_text())
    for row in table["rows"]:
        losses = [cell["summary"]["val_loss"] for cell in row["cells"].values()]
        row["values"] = {"loss": {"mean": statistics.mean(losses), "deviation": 0.0, "seeds": 2}}
    write_json(workdir / "table.json", table)
    page = read(write_sweep_report(workdir))
    assert "for “0 %, dense fine-tuning”, the reference and lowest; highest 1." in page
    assert page.count(">loss (nats/token)</text>") == 2 + 2 * 3  # by row and over compute, and the curves
    assert sweep_page.count(">BLEU</text>") == 2


def test_a_run_of_a_sweep_has_its_name(tmp_path):
    cells = make_sweep(tmp_path) / "cells"
    assert "<h1>table: mini, pretrain_50</h1>" in read(write_report(cells / "pretrain_50"))


def test_every_panel_of_a_sweep_is_there(sweep_page):
    assert titles(sweep_page) == [
        "Results",
        "BLEU by row",
        "BLEU over compute",
        "Validation loss: text",
        "Validation loss: restaurant",
        "Runs: finetune",
        "Runs: pretrain",
        "How the scores are computed",
        "Run it again",
    ]


def test_the_table_has_deviations_and_ratios_to_the_first_row(sweep_page):
    table = sweep_page[sweep_page.index("<h2>Results") : sweep_page.index("<h2>BLEU by row")]
    figures = re.findall(r"<td>([^<]*)<small>([^<]*)</small></td>", table)
    assert figures == [
        ("41.00 ± 1.41", ""),
        ("-", ""),
        ("1.000P", ""),
        ("41.00 ± 1.41", "x 1.000"),
        ("-", ""),
        ("1.000P", "x 1.000"),
        ("42.50", "x 1.037"),
        ("-", ""),
        ("0.600P", "x 0.600"),
        ("31.00 ± 1.41", "x 0.756"),
        ("-", ""),
        ("0.400P", "x 0.400"),
    ]


def test_a_sweep_links_its_runs_and_nothing_else(sweep, sweep_page):
    links = {link for link in re.findall(r'(?:src|href)="([^"#]+)', sweep_page) if not link.startswith("data:")}
    assert links == {f"cells/{name}/report.html" for name in sweep_cells()}
    assert all((sweep / link).is_file() for link in links)
    assert not re.findall(r"<script|<link|@import|<iframe", sweep_page)
    ids = re.findall(r' id="([^"]+)"', sweep_page)
    assert len(ids) == len(set(ids))


def test_one_run_in_two_rows_is_one_curve(sweep_page):
    rows = [
        "0 %, dense fine-tuning = 0 %, sparse fine-tuning (2 seeds)",
        "50 %, dense fine-tuning (2 seeds)",
        "75 %, dense fine-tuning (2 seeds)",
    ]
    keys = [re.findall(r"</svg>([^<]+)</li>", key) for key in sweep_page.split('<ul class="key">')[1:]]
    assert keys == [rows, ["pretrain_0", "pretrain_50", "pretrain_75"], [*rows, "not chosen (6)"]]


def test_runs_are_told_apart_by_what_they_set_differently(sweep_page):
    heads = re.findall(r"<th>([^<]*(?:<wbr>[^<]*)*)</th>", sweep_page[sweep_page.index("<h2>Runs: finetune") :])
    names = [head.replace("<wbr>", "") for head in heads]
    assert names[5:8] == ["seed", "init_from", "finetune.optimizer.peak_learning_rate"]
    assert names[13:] == ["pretrain.sparsity.rule", "pretrain.sparsity.sparsity"]


def test_signatures_and_reasons_are_said_once(sweep_page):
    section = sweep_page[sweep_page.index("<h2>How the scores") :]
    assert section.count(SIGNATURE) == 1
    assert section.count("java is not there") == 1


def test_a_sweep_under_way_shows_the_runs_that_are_there(tmp_path):
    workdir = make_sweep(tmp_path, finished=False)
    (workdir / "cells" / "not_begun").mkdir()
    page = read(write_sweep_report(workdir))
    assert "table: mini, unfinished: 14 of the 15 runs begun are finished" in page
    # 0.6 + 0.04 + 4 exp(-5) + 0.1, and so for text.
    assert "0.767 over the target tokens of restaurant (finetune_0_0.001_0)" in page
    assert "4.127 over held-out text (pretrain_0)" in page
    assert titles(page)[:2] == ["Validation loss: text", "Validation loss: restaurant"]
    assert "unfinished, at step 100" in page
    assert 'href="cells/finetune_75_0.002_1/' not in page
    assert "not_begun" not in page


def test_runs_of_very_different_lengths_share_a_logarithmic_axis(tmp_path):
    ticks = []
    for factor in (2, 1000):
        workdir = tmp_path / str(factor)
        for name, times in (("short", 1), ("long", factor)):
            config, rows = sweep_cell("", 0.0)
            rows = [row | {key: row[key] * times for key in ("step", "tokens", "train_flops")} for row in rows]
            (workdir / "cells" / name).mkdir(parents=True)
            write_json(workdir / "cells" / name / "config.json", config)
            (workdir / "cells" / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        page = read(write_sweep_report(workdir))
        ticks.append(set(re.findall(r">([\d.]+[kMB]?)</text>", page[: page.index("training compute")])))
    assert {"1M", "1B"} <= ticks[1]
    assert not {"100M", "1B"} & ticks[0]


def test_hundreds_of_runs_stay_readable_and_small(tmp_path):
    config, rows = sweep_cell("", 0.0)
    for i in range(100):
        (tmp_path / "cells" / f"run_{i:03}").mkdir(parents=True)
        write_json(tmp_path / "cells" / f"run_{i:03}" / "config.json", config | {"seed": i})
        lines = (json.dumps(row) + "\n" for row in rows)
        (tmp_path / "cells" / f"run_{i:03}" / "metrics.jsonl").write_text("".join(lines))
    page = read(write_sweep_report(tmp_path))
    styles = re.findall(r'<path d="M0,4H30" style="([^"]+)"', page)
    assert len(styles) == 100
    assert len(set(styles)) == 32  # colours x dashes, before they repeat
    assert len(page) < 1_500_000


def test_folders_without_a_readable_sweep_are_refused(tmp_path):
    with pytest.raises(InputError, match="no run has begun there"):
        write_sweep_report(tmp_path)
    make_sweep(tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    write_json(tmp_path / "table.json", {"rows": [{"row": "no cells"}]})
    with pytest.raises(InputError, match=r"table\.json: not a sweep's table"):
        write_sweep_report(tmp_path)
    write_json(tmp_path / "table.json", table)
    (tmp_path / "cells" / "finetune_0_0.001_0" / "config.json").unlink()
    with pytest.raises(InputError, match=r"cells that are not there \(finetune_0_0\.001_0\)"):
        write_sweep_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_names_in_a_sweep_are_escaped(tmp_path):
    nasty = "<script>alert('$x$')</script>"
    workdir = make_sweep(tmp_path)
    table = json.loads((workdir / "table.json").read_text())
    table["title"] = table["rows"][0]["row"] = table["rows"][0]["choice"] = nasty
    for row in table["rows"]:
        row["values"] = {nasty: row["values"]["BLEU"]}
    write_json(workdir / "table.json", table)
    page = read(write_sweep_report(workdir))
    assert "<script" not in page
    assert "&lt;script&gt;" in page


# --- in a browser ----------------------------------------------------------------------------------------------------

BROWSERS = (os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), "")
needs_browser = pytest.mark.skipif(not BROWSER, reason="needs Chromium or Chrome, in PATH or at $CHROME")


def browse(page: Path, *flags: str, size: str = "1000,800") -> tuple[str, list[str]]:
    """Opens a page in a headless browser of its own profile: what it prints, and what its console says."""
    quiet = ["headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars", "disable-sync"]
    quiet += ["disable-background-networking", "disable-component-update", f"user-data-dir={page.parent / 'profile'}"]
    command = [BROWSER, *(f"--{flag}" for flag in quiet), "--enable-logging=stderr", f"--window-size={size}", *flags]
    done = subprocess.run([*command, page.as_uri()], check=True, capture_output=True, text=True, timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE:" in line]


def measured(html: str, width: int, folder: Path) -> dict:
    """What a page is like in a frame of a width.

    The width that it `needs`, its `cards`, the `smallest` text of its figures in CSS pixels, which texts of a figure `overlap`
    or are `cut` at its edge, what it has `loaded`, and what the `console` says.
    """
    script = """
      const d = frame.contentDocument, overlap = [], cut = [];
      let smallest = Infinity;
      for (const svg of d.querySelectorAll(".plot svg")) {
        const box = svg.getBoundingClientRect();
        const texts = [...svg.querySelectorAll("text")].map(text => [text, text.getBoundingClientRect()]);
        texts.forEach(([text, a], i) => {
          const m = text.getScreenCTM();
          smallest = Math.min(smallest, Math.hypot(m.a, m.b) * parseFloat(getComputedStyle(text).fontSize));
          if (a.left < box.left - 1 || a.right > box.right + 1 || a.top < box.top - 1 || a.bottom > box.bottom + 1)
            cut.push(text.textContent);
          for (const [other, b] of texts.slice(i + 1))  // boxes are higher than letters
            if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
                && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
              overlap.push(text.textContent + " / " + other.textContent);
        });
      }
      const loaded = frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name);
      const needs = d.documentElement.scrollWidth, cards = d.querySelectorAll(".card").length;
      document.title = JSON.stringify({needs, cards, smallest, overlap, cut, loaded})"""
    frame = f'<iframe id=frame style="width:{width}px;height:800px;border:0" srcdoc="{escape(html)}"></iframe>'
    wrapper = folder / "wrapper.html"
    wrapper.write_text(
        f'<meta charset="utf-8"><title></title>{frame}<script>frame.onload = () => {{{script}}}</script>'
    )
    dom, console = browse(wrapper, "--dump-dom")
    (title,) = re.findall(r"<title>(.*?)</title>", dom)
    return json.loads(unescape(title)) | {"console": console}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, finetuned, sweep) -> dict[str, Path]:
    """A run or a sweep of each kind, with its page."""
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("mst", "dense", "static", "spdf", "exams")}
    rows = [row | {"phase": "pretrain"} for row in make_rows(STEPS, sparse=False)]
    static = [row | {"sparsity": 0.75, "train_flops": 0.4 * row["dense_flops"]} for row in rows]
    make_run(found["mst"])
    make_run(found["dense"], sparse=False, rows=rows)
    make_run(found["static"], sparse=False, rows=static)
    spdf = [
        row if row["step"] <= 300 else after | {"phase": "finetune"} for row, after in zip(static, rows, strict=True)
    ]
    make_run(found["spdf"], sparse=False, rows=spdf)
    for kind in ("static", "spdf"):
        save_pictures(found[kind], 0)
    exam_run(found["exams"], ExamResults("length", (BAKER, CLERK, COOK)))
    found |= {"finetuned": finetuned, "sweep": sweep}
    for kind, folder in found.items():
        (write_sweep_report if kind == "sweep" else write_report)(folder)
    return found


KINDS = ("mst", "dense", "static", "spdf", "finetuned", "exams", "sweep")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("kind", KINDS)
def test_a_page_fits_a_phone_and_a_desk(kind, width, folders, tmp_path):
    html = (folders[kind] / "report.html").read_text()
    found = measured(html, width, tmp_path)
    assert found.pop("smallest") > 7.5
    whole = {"overlap": [], "cut": [], "loaded": [], "console": []}
    assert found == whole | {"needs": width, "cards": html.count('<section class="card')}


@pytest.mark.slow
@needs_browser
def test_what_does_not_fit_is_noticed(folders, tmp_path):
    html = (folders["mst"] / "report.html").read_text()
    assert ">200<" in html
    html = html.replace(">200<", f">{'200 ' * 60}<", 1)  # the label of a tick
    bad = '<div style="width: 1500px"><img src="http://127.0.0.1:9/a.png"></div><script>nothing()</script><main'
    found = measured(html.replace("<main", bad), 1280, tmp_path)
    assert found["needs"] > 1500
    assert found["loaded"] == ["http://127.0.0.1:9/a.png"]
    assert "nothing is not defined" in "".join(found["console"])
    assert found["overlap"]
    assert found["cut"]


@pytest.mark.slow
@needs_browser
def test_a_page_is_drawn_by_day_and_by_night(folders, tmp_path):
    page = folders["sweep"] / "report.html"
    means = {}
    for scheme, flag in (("light", 1), ("dark", 0)):
        picture = tmp_path / f"{scheme}.png"
        browse(page, f"--screenshot={picture}", f"--blink-settings=preferredColorScheme={flag}", size="1000,1600")
        pixels = imread(picture)[..., :3]
        means[scheme] = pixels.mean()
        # Text, lines and the colours of the series, not one flat sheet.
        assert len(np.unique((pixels * 255).astype(np.uint8).reshape(-1, 3), axis=0)) > 200
        blue = np.abs(pixels - np.array([0x3B, 0x82, 0xC4]) / 255).max(axis=-1) < 0.02
        assert blue.sum() > 200
    assert means["light"] > 0.9
    assert means["dark"] < 0.2
