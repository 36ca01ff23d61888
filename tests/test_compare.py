"""The comparison of all methods: budgets that are equal, and a table that reads the curves right."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from tiny import write_text

import spdf_jax as spdf
from spdf_jax.config.sweep import resolve_sweep
from spdf_jax.jobs.sweep import train_cells
from spdf_jax.model.flops import linear_size
from spdf_jax.workdir import write_json

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "compare.py"
TOKENS, FLOPS = "equal tokens", "equal FLOPs"


@pytest.fixture
def compare():
    """The experiment file, freshly read: tests may change its constants."""
    spec = importlib.util.spec_from_file_location("compare", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tokens_are_equal_and_flops_to_within_a_step(compare):
    sweep = resolve_sweep(compare.get_config())
    assert len(sweep.rows) == 8
    costs = {name: spdf.run_cost(run) for name, run in sweep.cells.items() if run.seed == 0}
    steps = {name: sum(phase.steps for phase in sweep.cells[name].phases.values()) for name in costs}
    assert sweep.rows[0].label == "dense"
    budget = costs["dense_0"]
    for row in sweep.rows:
        assert [choice for choice, _ in row.choices] == [TOKENS] * 2 + [FLOPS] * 2
        at_tokens, at_flops = (next(cell for c, cell in row.choices if c == choice) for choice in (TOKENS, FLOPS))
        assert costs[at_tokens].tokens == budget.tokens
        spent = costs[at_flops].train_flops
        assert abs(spent - budget.train_flops) <= 0.6 * spent / steps[at_flops]
    assert costs["smaller_dense_0"].train_flops == pytest.approx(costs["static_0"].train_flops, rel=0.02)
    wide, dense = (linear_size(sweep.cells[name].model) for name in ("wide_sparse_0", "dense_0"))
    assert 0.25 * wide == pytest.approx(dense, rel=0.01)


def test_cells_of_the_small_variant_may_be_copied_into_the_large_one(compare):
    small, large = (resolve_sweep(compare.get_config(variant)).cells for variant in ("mini", "seeds"))
    assert len(small) == 30
    assert small.keys() < large.keys()
    assert {name: large[name] for name in small} == small
    with pytest.raises(spdf.InputError, match="no variant 'min'; did you mean 'mini'"):
        compare.get_config("min")


CURVES = {  # validation loss after every 50 steps
    "dense_0": [7.0, 6.0, 5.0],
    "dense_1": [7.0, 6.0, 5.5],
    "rigl_0": [7.0, 6.5, 6.0],
    "rigl_1": [7.0, 6.5, 6.25],
    "rigl_flops_0": [7.0, 6.0, 5.5, 4.5],
    "rigl_flops_1": [7.0, 6.5, 6.0, 5.5],
    "static_flops_0": [7.0, 6.0, 5.5, 4.5],
    "static_flops_1": [7.0, 6.0, 5.6, 5.51],
}
ROWS = (
    ("dense", [(TOKENS, "dense_0"), (FLOPS, "dense_0"), (TOKENS, "dense_1"), (FLOPS, "dense_1")]),
    ("RigL", [(TOKENS, "rigl_0"), (FLOPS, "rigl_flops_0"), (TOKENS, "rigl_1"), (FLOPS, "rigl_flops_1")]),
    ("static", [(TOKENS, "rigl_0"), (FLOPS, "static_flops_0"), (FLOPS, "static_flops_1")]),
)
COLUMNS = (
    ("loss", "summary.val_loss", ".3f", True, TOKENS),
    ("tokens", "summary.tokens", ".3g", True, FLOPS),
    ("to the dense loss", "train_flops@val_loss=summary.val_loss", ".3g", True, FLOPS),
    ("seconds", "seconds@val_loss=summary.val_loss", ".1f", False, FLOPS),
    ("loss at its FLOPs", "val_loss@train_flops=summary.train_flops", ".3f", False, FLOPS),
)


def cell_config(name: str):
    c = spdf.default_config("compare", "mini", variants=("mini",))
    c.seed, c.pretrain.steps = int(name[-1]), 50 * (len(CURVES[name]) - 1)
    return c


def make_sweep(**more):
    names = {"variants": ("mini",), "title": "All of them", "remark": "Little is shown."}
    cells = {name: cell_config(name) for name in CURVES}
    return spdf.sweep_config("compare", "mini", **{"cells": cells, "rows": ROWS, "columns": COLUMNS} | names | more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Cells that have come to their end, a hundred tokens and, dense, ten FLOPs a step, ten steps a second."""
    workdir = tmp_path_factory.mktemp("sweep")
    for name, losses in CURVES.items():
        cell = workdir / "cells" / name
        cell.mkdir(parents=True)
        write_json(cell / "config.json", spdf.resolve(cell_config(name)).as_dict() | {"command": "python"})
        rows = []
        for step, loss in zip(range(0, 51 * len(losses), 50), losses, strict=False):
            flops = (10 if name.startswith("dense") else 6) * step
            row = {"step": step, "phase": "pretrain", "sparsity": 0.0, "tokens": 100 * step}
            row |= {"train_flops": flops, "dense_flops": 10 * step}
            rows += [row | {"loss": loss, "tokens_per_second": 1000.0}] if step else []
            rows.append(row | {"val_loss": loss})
        (cell / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        last = {key: row[key] for key in ("tokens", "train_flops", "dense_flops")}
        write_json(cell / "summary.json", {"status": "finished", "val_loss": losses[-1], "steps": step} | last)
    with pytest.MonkeyPatch.context() as patch:  # no cell has a checkpoint to be finished by
        patch.setattr(
            "spdf_jax.jobs.sweep.train_with",
            lambda cell, folder, *_, **__: json.loads((folder / "summary.json").read_text()),
        )
        train_cells(resolve_sweep(make_sweep()), workdir, progress=False)
    return workdir


def test_a_column_is_of_its_choice_and_a_place_on_the_curve_is_read_between_evaluations(finished):
    table = json.loads((finished / "table.json").read_text())
    values = {row["row"]: {header: v["mean"] for header, v in row["values"].items()} for row in table["rows"]}
    assert values["dense"] == {
        "loss": 5.25,
        "tokens": 10_000,
        "to the dense loss": 1000,  # each seed comes to its own loss at its end
        "seconds": 10,
        "loss at its FLOPs": 5.25,
    }
    # Seed 0 passes 5.0 half-way from step 100 to 150, at 6 FLOPs a step; seed 1 comes to 5.5 at its end.
    assert values["RigL"]["loss"] == 6.125
    assert values["RigL"]["to the dense loss"] == pytest.approx((6 * 125 + 6 * 150) / 2)
    assert values["RigL"]["seconds"] == pytest.approx((12.5 + 15) / 2)
    assert values["RigL"]["loss at its FLOPs"] is None  # 900 of 1,000 FLOPs
    # One of its seeds never comes to the dense loss.
    assert values["static"]["to the dense loss"] is None
    assert table["rows"][1]["choice"] == ""
    assert table["rows"][1]["groups"] == {TOKENS: ["rigl_0", "rigl_1"], FLOPS: ["rigl_flops_0", "rigl_flops_1"]}
    assert not list(finished.glob("cells/*/evaluation.json")), "evaluated although no column asks for it"


def test_the_table_in_words(finished):
    lines = (finished / "table.md").read_text().splitlines()
    assert lines[0] == "# All of them"
    assert lines[5].startswith("| RigL | 6.125 ± 0.177 (1.167) | 1.5e+04 (1.500) | 825 ± 106 (0.825) | 13.8 ± 1.8 |")
    assert lines[6].startswith("| static | 6.000 (1.143) | 1.5e+04 (1.500) | - | - | - |")
    assert lines[-1] == "Little is shown."


def test_the_page_shows_all_methods_at_both_budgets(finished):
    page = (finished / "report.html").read_text()
    assert "Loss: 5.250 for “dense”, the reference and lowest; highest 6.125 for “RigL”" in page
    assert "Little is shown." in page
    for choice in (TOKENS, FLOPS):
        panel = page[page.index(f"<h2>Validation loss: text, {choice}</h2>") :]
        panel = panel[: panel.index("</section>")]
        assert [label in panel for label in ("</svg>dense", "</svg>RigL", "</svg>static")] == [True] * 3
        assert "training tokens" in panel
        assert "training compute (FLOP, counted)" in panel
        assert len(set(re.findall(r'<path d="(M[^"]*Z)" fill', panel))) == 3, "markers tell lines apart"


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (
            ("loss", "summary.val_loss", ".3f", True, "equal time"),
            "choice 'equal time', which row 'dense' does not have",
        ),
        (("x", "flops@val_loss=summary.val_loss"), "key 'flops@val_loss=summary.val_loss'; a place on the curve"),
        (("x", "summary.val_loss/tokens@val_loss"), "key 'tokens@val_loss'; a place on the curve is written A@B=KEY"),
        (("x", "summary.val_los"), "key 'summary.val_los', which no run leaves; did you mean 'summary.val_loss'"),
        (("x", "bleu"), "key 'bleu', which no run leaves; did you mean"),
        (("x", "tokens@val_loss=summary.loss"), "key 'summary.loss', which no run leaves"),
    ],
)
def test_a_column_that_cannot_be_filled_is_refused_before_anything_runs(column, message):
    with pytest.raises(spdf.InputError) as caught:
        resolve_sweep(make_sweep(columns=[column]))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [("finetune.task.path", "nowhere"), ("data.path", "nowhere"), ("data.tokenizer", "nowhere.json")],
)
def test_data_that_a_later_cell_lacks_is_noticed_before_the_first_step(place, value, tmp_path):
    cells = {}
    for name in ("dense_0", "late_0"):
        cells[name] = spdf.default_config("compare", "mini", variants=("mini",), phases=("pretrain", "finetune"))
        cells[name].finetune.task.name, cells[name].finetune.task.path = "e2e", str(tmp_path)
    cells["dense_0"].finetune.task.update({"name": "restaurant", "path": ""})
    late = cells["late_0"]
    late.finetune.task.update({"name": "restaurant", "path": ""})
    if place.startswith("finetune"):
        late.finetune.task.update({"name": "e2e", "path": value})
    elif place == "data.path":
        late.data.source, late.data.path = "text", value
    else:
        late.data.tokenizer = value
    sweep = resolve_sweep(
        make_sweep(cells=cells, rows=[("dense", [("", "dense_0")])], columns=[("loss", "summary.val_loss")])
    )
    with pytest.raises(spdf.InputError, match=r"config\.cells\.late_0: .*nowhere.*(not|no) "):
        train_cells(sweep, tmp_path / "new" / "sweep", progress=False)
    assert not (tmp_path / "new").exists(), "a run that is refused leaves nothing"


@pytest.mark.slow
def test_it_runs_and_goes_on_cell_by_cell(compare, tmp_path, capsys):
    """Two of the methods, made small."""
    text = write_text(tmp_path / "text")
    compare.METHODS, compare.SEEDS, compare.STEPS, compare.BATCH = ("dense", "SPDF"), {"mini": 1}, 64, 8
    compare.MODEL = spdf.GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=300, context=32)
    config = compare.get_config()
    for name in config.order:
        data, loop = config.cells[name].data, config.cells[name].loop
        data.source, data.path, data.cache_dir = "text", str(text), str(tmp_path / "cache")
        loop.eval_every_steps = 10
    sweep = resolve_sweep(config)
    assert list(sweep.cells) == ["dense_0", "spdf_0", "spdf_flops_0"]
    table = train_cells(sweep, tmp_path / "run", progress=False)
    (dense, spdf_row) = (row["values"] for row in table["rows"])
    assert dense["loss at equal tokens"]["mean"] < 5.7
    assert dense["FLOPs to the dense loss"]["mean"] <= dense["their FLOPs"]["mean"]
    assert dense["seconds to the dense loss"]["mean"] > 0
    assert spdf_row["their FLOPs"]["mean"] < 0.8 * dense["their FLOPs"]["mean"]
    assert spdf_row["their tokens"]["mean"] > 1.2 * dense["their tokens"]["mean"]
    (tmp_path / "run" / "cells" / "spdf_0" / "summary.json").unlink()
    capsys.readouterr()
    again = train_cells(sweep, tmp_path / "run", progress=False)
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert [row["values"]["loss at equal tokens"] for row in again["rows"]] == [
        row["values"]["loss at equal tokens"] for row in table["rows"]
    ]
