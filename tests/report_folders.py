"""Folders of runs and sweeps with the files that training leaves in them, written by hand, and the texts of a page."""

import functools
import itertools
import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

import spdf_jax as spdf
from spdf_jax.evals.exams import CertificationResult, ExamResults
from spdf_jax.report.circuit_graph import KINDS
from spdf_jax.report.draw import STYLE
from spdf_jax.report.records import Run
from spdf_jax.report.sweep_records import Sweep
from spdf_jax.training.mask_pictures import save_mask_pictures
from spdf_jax.workdir import write_json

LAYERS = 4
LEAVES = [f"blocks/{name}/kernel" for name in ("attn_q", "attn_k", "attn_v", "attn_o", "mlp_up", "mlp_down")]
STEPS = 400
TOKENS_PER_STEP = 8192
MAX_SPARSITY = 0.95

# --- runs ------------------------------------------------------------------------------------------------------------


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
    density["wte/embedding"], churn["wte/embedding"] = [1 - sparsity], [churn_mean]
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


def write_lines(path: Path, objects: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))


def make_run(
    workdir: Path,
    *,
    last_step: int = STEPS,
    sparse: bool = True,
    rows: list[dict] | None = None,
    config: dict | None = None,
) -> Path:
    """The folder of a run; with `summary.json` where it has reached its end, and with mask pictures if it is `sparse`."""
    rows = make_rows(last_step, sparse=sparse) if rows is None else rows
    workdir.mkdir(parents=True, exist_ok=True)
    write_lines(workdir / "metrics.jsonl", rows)
    write_json(workdir / "config.json", config or make_config())
    if sparse:
        save_pictures(workdir, last_step)
    if last_step == STEPS:
        write_json(workdir / "summary.json", make_summary(rows))
    return workdir


def save_pictures(workdir: Path, last_step: int) -> None:
    """Of masks whose later inputs have more weights."""
    rng = np.random.default_rng(1)
    for step in range(0, last_step + 1, 80):

        def mask(*shape: int, step: int = step) -> np.ndarray:
            row_densities = (1 - mst_sparsity(step)) * np.linspace(0.3, 1.7, shape[-2])[:, np.newaxis]
            return rng.random(shape) < row_densities

        blocks = {"attn_q": {"kernel": mask(LAYERS, 64, 64)}, "mlp_up": {"kernel": mask(LAYERS, 64, 256)}}
        save_mask_pictures(workdir, step, {"blocks": blocks, "wte": {"embedding": mask(512, 64)}})


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


SIGNATURE = "nrefs:var|case:lc|tok:13a|scale:0-100"


def make_finetuned(workdir: Path) -> Path:
    """A run pre-trained on text, then fine-tuned on a task with early stopping, evaluated and scored."""
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
    write_lines(workdir / "generations.jsonl", texts)
    return workdir


BAKER = CertificationResult("Baker", "food", questions=10, correct=7, guess_score=0.25)
COOK = CertificationResult("Cook <b>", "food", questions=10, correct=8, guess_score=0.25, human_score=0.6)
CLERK = CertificationResult("Clerk", "office", questions=4, correct=1, guess_score=0.5)
EXAMS = ExamResults("length", (BAKER, CLERK, COOK))


def make_exam_run(workdir: Path, exams: ExamResults = EXAMS, questions_file: str = "") -> Path:
    """A run whose checkpoint was evaluated on tasks of lm-eval and on exams."""
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
    return workdir


# --- sweeps ----------------------------------------------------------------------------------------------------------

PRETRAINED = {"0": 0.0, "50": 0.5, "75": 0.75}
CHOICES = ((1e-3, 0), (1e-3, 1), (2e-3, 0), (2e-3, 1))  # rate, seed


def sweep_cell(name: str, sparsity: float, rate: float = 0.0, seed: int = 0) -> tuple[dict, list[dict]]:
    """Config and rows of a pre-training, or with a rate of a fine-tuning."""
    phase = "finetune" if rate else "pretrain"
    c = spdf.default_config("table", "mini", variants=("mini",), phases=(phase,))
    scale, floor = (20, 0.6) if rate else (200, 4.0)
    c.seed, c[phase].steps = seed, 5 * scale
    if rate:
        c.init_from, c.finetune.task.name, c.finetune.optimizer.peak_learning_rate = f"cell:{name}", "restaurant", rate
    else:
        c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = ("static", sparsity) if sparsity else ("dense", 0.0)
    config = spdf.resolve(c).as_dict() | {"command": "python -m spdf_jax.main --config experiments/table.py"}
    rows = []
    for step in range(0, 5 * scale + 1, scale):
        loss = floor + 0.4 * sparsity + 40 * rate + 0.01 * seed + 4 * np.exp(-step / scale)
        cost = {"train_flops": (1 - 0.8 * sparsity) * 5e12 * step, "dense_flops": 5e12 * step, "tokens": 4096 * step}
        row = {"step": step, "phase": phase, "sparsity": 0.0 if rate else sparsity, **cost}
        rows += [{**row, "loss": loss, "tokens_per_second": 4096.0}] if step else []
        rows.append({**row, "val_loss": loss + 0.1})
    return config, rows


@functools.cache
def sweep_cells() -> dict[str, tuple[dict, list[dict]]]:
    cells = {f"pretrain_{name}": sweep_cell(name, sparsity) for name, sparsity in PRETRAINED.items()}
    for (name, sparsity), (rate, seed) in itertools.product(PRETRAINED.items(), CHOICES):
        cells[f"finetune_{name}_{rate:g}_{seed}"] = sweep_cell(f"pretrain_{name}", sparsity, rate, seed)
    return cells


def make_cell(workdir: Path, name: str, config: dict, rows: list[dict]) -> Path:
    """The folder of a cell that has not reached its end."""
    return make_run(workdir / "cells" / name, config=config, rows=rows, sparse=False, last_step=0)


def make_sweep(workdir: Path, *, finished: bool = True) -> Path:
    """The folder of a sweep: three pre-trainings, each fine-tuned with two rates and two seeds."""
    for name, (config, rows) in sweep_cells().items():
        cell = make_cell(workdir, name, config, rows)
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


def make_circuit_sweep(workdir: Path) -> Path:
    """The folder of a sweep whose table has circuits of one task: two sparse runs, and a dense one that does not do it."""
    make_sweep(workdir)
    rows = []
    for label, cell, nodes in (("1/2", "pretrain_50", 40), ("1/4", "pretrain_75", 10), ("dense", "pretrain_0", 120)):
        summary = json.loads((workdir / "cells" / cell / "summary.json").read_text())
        one = {
            "nodes": nodes,
            "edges": 3 * nodes,
            "whole": 0.05,
            "alone": 0.149,
            "without": 1.5,
            "nothing": 0.7,
            "target_loss": 0.15,
        }
        one["curve"] = [[0, 0.7], [nodes // 2, 0.3], [nodes, 0.149], [1000, 0.05]]
        failed = {"whole": 0.6, "nothing": 0.7, "target_loss": 0.15, "curve": [[0, 0.7], [1000, 0.6]]}
        circuit = {"quote": one, "bracket": failed if cell == "pretrain_0" else one}
        values = {"nodes": {"mean": float(nodes), "deviation": 0.0, "seeds": 1}}
        record = {"summary": summary, "circuit": circuit}
        rows.append({"row": label, "choice": "", "groups": {"": [cell]}, "cells": {cell: record}, "values": values})
    write_json(workdir / "table.json", {"experiment": "table", "variant": "mini", "title": "Circuits", "rows": rows})
    return workdir


def circuit_record() -> dict:
    """Of ``circuit.json``: a circuit of few nodes, one of more than are drawn, and a task that the model does not do."""
    rng = np.random.default_rng(0)
    text = {
        "before": '    raise ValueError(\n        "the value of',
        "token": " the",
        "after": ' header is "',
        "value": 1.5,
    }
    into = {"attn_q": "attn_in", "attn_k": "attn_in", "attn_v": "attn_in", "attn_out": "attn_v"}
    into |= {"mlp_neuron": "mlp_in", "mlp_out": "mlp_neuron"}

    def circuit(most: int) -> dict:
        places = [(layer, place) for layer in range(2) for place in KINDS]
        nodes = [
            {
                "place": place,
                "layer": layer,
                "channel": int(f),
                "effect": float(rng.exponential(0.1)),
                "mean": 0.1,
                "contexts": [text] * 3,
            }
            for layer, place in places
            for f in sorted(rng.choice(2048, rng.integers(1, most), replace=False))
        ]
        numbered = list(enumerate(nodes))
        edges = [
            (i, j, float(rng.normal()))
            for i, one in numbered
            for j, other in numbered
            if one["layer"] == other["layer"] and into.get(other["place"]) == one["place"]
        ]
        last = [(i, 0, float(rng.normal())) for i, one in numbered if one["place"] == "mlp_out"]
        return {"nodes": nodes, "edges": edges, "joined": [(0, len(nodes) - 1)], "to_answers": last}

    def task(most: int) -> dict:
        found, measured = (
            most > 0,
            {"whole": {"loss": 0.05, "accuracy": 0.98}, "nothing": {"loss": 0.7, "accuracy": 0.5}},
        )
        task = {"about": "close a string with the quote that opened it", "answers": ['"', "'"], "found": found}
        task |= {"pairs": {"used": 200, "from_library": 100, "left_out": 44}, "why": "" if found else "it does not"}
        task |= {"example": ['def f(x):\n    return "abc', "def f(x):\n    return 'abc"], "measured": measured}
        task["curve"] = [[0, 0.7], [5, 0.5], [100, 0.14], [3000, 0.05]]
        if found:
            task["circuit"] = circuit(most)
            measured |= {"alone": {"loss": 0.149, "accuracy": 0.97}, "without": {"loss": 1.5, "accuracy": 0.4}}
        return task

    tasks = {"quote": task(4), "bracket": task(30), "list_depth": task(0)}
    return {"name": "made: by hand", "step": 3, "nodes": 4096, "target_loss": 0.15, "tasks": tasks}


# --- pages -----------------------------------------------------------------------------------------------------------


def plain_spaces(html: str) -> str:
    """With plain spaces for those that hold words together."""
    return html.replace("\N{NO-BREAK SPACE}", " ")


def read(path: Path) -> str:
    return plain_spaces(path.read_text())


def drawn(make_panels: Callable[[Any], Any], recorded: Run | Sweep) -> str:
    """What one function of the report puts on the page: titles, captions and bodies; "" for nothing."""
    with matplotlib.rc_context(STYLE):
        made = make_panels(recorded) or []
    panels = made if isinstance(made, list) else [made]
    return plain_spaces("".join(f"<h2>{panel.title}</h2>{panel.caption}{panel.body}" for panel in panels))


def titles(page: str) -> list[str]:
    return re.findall(r"<h2>(.*?)</h2>", page)


def table_cells(page: str, title: str) -> list[list[str]]:
    """The texts of the rows of a panel's table, header included."""
    table = page[page.index(f"<h2>{title}</h2>") :].split("</table>")[0]
    return [
        [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in table.split("<tr>")[1:]
    ]
