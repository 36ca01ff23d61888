"""Studies: choices on a seed of their own, intervals on others, equal budgets, cells by what they are, a page of a record."""

import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from tiny import empty_figure, write_text
from tiny import tiny_config as tiny_run

import spdf_jax as spdf
from spdf_jax.config.study_cells import Cells
from spdf_jax.config.sweep import resolve_sweep
from spdf_jax.jobs import Request, study
from spdf_jax.jobs.report import run_recorded, run_sweep
from spdf_jax.model.flops import linear_size
from spdf_jax.planning.own_fit import fit_cells, main, measured_in, predictions
from spdf_jax.report.intervals import along, detectable, interval
from spdf_jax.report.study import verdict, write_study_report
from spdf_jax.report.study_records import read_study
from spdf_jax.workdir import lock, read_json, write_json

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "study.py"
RATES, SEEDS = (0.001, 0.003), (1, 2, 3)


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("study", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sweeps(experiment):
    """Of the studies, resolved once."""
    return {variant: resolve_sweep(experiment.get_config(variant)) for variant in ("mst", "wide", "moving")}


@pytest.fixture(autouse=True)
def _undrawn(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", empty_figure)


# --- what a few seeds can tell ----------------------------------------------------------------------------------------


def test_intervals_are_student_s():
    """t_0.975 of 4 degrees of freedom is 2.776445, t_0.8 is 0.940965 (any table)."""
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    error = math.sqrt(2.5 / 5)
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * error, rel=1e-6)
    assert (found.low, found.high) == (found.mean - found.half, found.mean + found.half)
    assert detectable(found) == pytest.approx((2.776445 + 0.940965) * error, rel=1e-6)
    assert interval([1.0, 1.0]).half == 0
    assert interval([1.0]).half == math.inf
    assert interval([]) is None


def test_between_runs_of_other_costs_the_loss_is_on_the_line_over_their_logarithm():
    costs, losses = [4.0, 1.0, 2.0], [4.0, 6.0, 5.0]
    assert along(costs, losses, math.sqrt(2)) == pytest.approx(5.5)
    assert along(costs, losses, 4.0) == 4.0
    assert along(costs, losses, 4.002) == 4.0, "a run as long to within a step"
    assert along(costs, losses, 5.0) is None
    assert along(costs, losses, 4.05, slack=0.02) == 4.0
    assert along(costs, losses, 4.1, slack=0.02) is None
    assert along(costs, losses, 0.5) is None


# --- a study of made-up losses -------------------------------------------------------------------------------------------


def cell(steps=10, rate=0.001, sparsity=0.0, source="", task=""):
    phase = "finetune" if task else "pretrain"
    c = spdf.default_config("toy", "cell", variants=("cell",), phases=(phase,))
    c.init_from, c[phase].steps, c[phase].optimizer.peak_learning_rate = source, steps, rate
    c[phase].optimizer.warmup_steps = 1
    if sparsity:
        c[phase].sparsity.rule, c[phase].sparsity.sparsity = "static", sparsity
    if task:
        c.finetune.task.name, c.finetune.task.path = task, "nowhere" if task == "e2e" else ""
    return c


def key(name, length, rate):
    return f"{name}_{length}_{rate:g}".replace(".", "p")


def toy(**about):
    """Dense at two lengths and static at one, whose rates are chosen at 10 steps."""
    cells, rows = {}, []
    for method, steps in (("dense", 10), ("dense", 20), ("static", 20)):
        pairs = {}
        for length in (10, steps):
            for rate in RATES:
                cells.setdefault(key(method, length, rate), cell(length, rate, 0.75 * (method == "static")))
            pairs[length] = tuple((f"rate {rate:g}", key(method, length, rate)) for rate in RATES)
        rows.append((f"{method}, {steps} steps", pairs[steps], pairs[10], method))
    how = {"seeds": SEEDS, "measure": "summary.val_loss", "unit": "nats/token", "reference": "dense"}
    how |= {"answers": (("static, 20 steps", "tokens"), ("static, 20 steps", "flops"))}
    names = {"variants": ("test",), "title": "Is static worse?", "remark": "Little is shown."}
    return spdf.sweep_config("toy", "test", **names, cells=cells, rows=rows, study=how | about)


def made_up(config):
    """0.003 is the better rate on seed 0 and the worse one on all others; longer is better; static is worse by 0.1."""
    (phase,) = config.phases.values()
    better = (phase.optimizer.peak_learning_rate == 0.003) == (config.seed == 0)
    sparse = not phase.sparsity.dense
    loss = 5 - 0.5 * math.log2(phase.steps / 10) + 0.1 * sparse - 0.3 * better + 0.01 * config.seed * (1 + sparse)
    flops = phase.steps * (6.0 if sparse else 10.0)
    seconds = {"training": phase.steps / 2}  # parts that took no time are left out
    return {
        "val_loss": loss, "steps": phase.steps, "tokens": 100 * phase.steps, "train_flops": flops,
        "dense_flops": 10.0 * phase.steps, "wall_seconds": phase.steps / 2 + 3, "seconds": seconds,
        "made_with": ["JAX 0.12, on 2 cores"],
    }  # fmt: skip


class Trained(list):
    """Stands in for training: cells by their names, and what was asked for."""

    def __call__(self, found, folder, code, request):
        self.append(folder.name)
        return made_up(found.config)


@pytest.fixture
def trained(monkeypatch):
    calls = Trained()
    monkeypatch.setattr(study, "_train", calls)
    return calls


def measured(config, workdir):
    sweep = resolve_sweep(config)
    return study.measure(sweep, sweep.study, Request(workdir, command="python"))


def test_the_choice_is_made_on_its_own_seed_and_measured_on_others(trained, tmp_path, capsys):
    record = measured(toy(), tmp_path / "toy-test")
    assert [row["choice"] for row in record["rows"]] == ["rate 0.003"] * 3, "though it is worse on every other seed"
    for row in record["rows"]:
        assert [name.rpartition("-")[2] for name in row["cells"]] == ["1", "2", "3"]
        assert all(name.endswith("-0") for name in row["tried"].values())
        assert not set(row["tried"].values()) & set(row["cells"])
    # Two methods x two rates to choose, three rows x three seeds, and one again; the shorter dense row's is dense's.
    assert len(trained) == len(set(trained)) == 4 + 9 + 1
    assert trained[-1] == f"{record['rows'][0]['cells'][0]}-again"
    assert record["cells"].keys() == set(trained[:-1]), "all cells are in the record"
    said = capsys.readouterr().out
    assert f"[1/13] {trained[0]}: dense, 10 steps, rate 0.001, seed 0\n" in said
    assert f"[13/13] {trained[-2]}: static, 20 steps, rate 0.003, seed 3; about 14 s left" in said


def test_differences_are_seed_by_seed_at_equal_tokens_flops_and_seconds(trained, tmp_path):
    measured(toy(), tmp_path / "toy-test")
    found = read_study(tmp_path / "toy-test")
    *_, static = found.rows
    # 0.1, and 0.01 a seed.
    tokens = found.difference(static, "tokens")
    assert tokens == pytest.approx((0.12, 4.302653 * 0.01 / math.sqrt(3), 3), rel=1e-6)
    # 120 of 200 FLOPs: log2(1.2) of the way from dense's 10 steps to its 20.
    assert found.difference(static, "flops").mean == pytest.approx(0.12 - 0.5 * (1 - math.log2(1.2)))
    assert found.difference(static, "seconds").mean == pytest.approx(0.12)
    assert found.difference(found.rows[0], "tokens") is None


def test_a_budget_that_the_reference_has_not_spent_has_no_answer(trained, tmp_path):
    config = toy(reference="static", answers=(("dense, 20 steps", "flops"),))
    measured(config, tmp_path / "toy-test")
    found = read_study(tmp_path / "toy-test")
    assert found.difference(found.rows[1], "flops") is None, "200 FLOPs, where static has 120"
    assert found.difference(found.rows[1], "tokens").mean == pytest.approx(-0.12)
    assert verdict(found).startswith("No answer yet")


def test_what_starts_from_a_choice_that_was_not_made_is_not_run(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study, "evaluate_checkpoint", lambda config, folder: write_scores(folder, config))
    config = toy()
    before = {rate: key("dense", 20, rate) for rate in RATES}
    tasks = {"restaurant": [], "e2e": []}
    for task, pairs in tasks.items():
        for rate, source in before.items():
            config.cells[key(task, 5, rate)] = cell(5, 0.003, source=f"cell:{source}", task=task)
            config.order = (*config.order, key(task, 5, rate))
            pairs.append((f"rate {rate:g}", key(task, 5, rate)))
        config.rows = (*config.rows, (task, tuple(pairs), (), "dense", task))
    config.study.measure = "evaluation.bleu"
    record = measured(config, tmp_path / "toy-test")
    *_, row = record["rows"]
    assert row["tried"].keys() == {"rate 0.003"}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert said[0].startswith("[1/18] "), "whichever will be chosen, one of its sources is gone on from"
    assert said[-1].startswith("[18/18] ")
    cells = Cells(resolve_sweep(config).cells)
    for name, seed in zip(row["cells"], SEEDS, strict=True):
        source, own = cells.chain(key("restaurant", 5, 0.003), seed)
        assert (source, own.name) == (cells.cell(before[0.003], seed), name)
        assert own.config.init_from == f"cell:{source.name}"
        assert trained.index(source.name) < trained.index(name)
    assert [record["cells"][name]["measure"] for name in row["cells"]] == [11.0, 12.0, 13.0]
    # Its data is not there: left out with a word, on the page too.
    assert record["left_out"].keys() == {"e2e"}
    assert "Left out: e2e: " in (tmp_path / "toy-test" / "report.html").read_text()


def write_scores(folder, config):
    folder.mkdir(parents=True)
    write_json(folder / "evaluation.json", {"bleu": 10.0 + config.seed})


def test_a_cell_that_another_study_is_at_is_waited_for(tmp_path, capsys, monkeypatch):
    """As two studies of one folder, started beside each other, come to a cell that both have."""
    other, waited = lock(tmp_path), []
    other.__enter__()

    def train_with(config, folder, *_, **__):
        with lock(folder):
            write_json(folder / "summary.json", {"val_loss": 4.0})
            write_json(folder / "provenance.json", {"starts": []})

    def wait(seconds):  # lock looks again at once, too
        waited.append(seconds)
        if waited.count(study._WAIT_SECONDS) == 2:
            other.__exit__(None, None, None)

    monkeypatch.setattr(study, "train_with", train_with)
    monkeypatch.setattr(study.time, "sleep", wait)
    found = Cells(resolve_sweep(toy()).cells).cell(key("dense", 10, 0.001), 1)
    assert study._train(found, tmp_path, {}, Request(tmp_path))["val_loss"] == 4.0
    assert waited.count(study._WAIT_SECONDS) == 2
    said = f"{tmp_path}: another study is at it; going on when it is done\n"
    assert capsys.readouterr().out == said, "once, however long it takes"


def test_a_machine_that_does_not_compute_the_same_twice_is_told(tmp_path, monkeypatch):
    def drifting(found, folder, code, request):
        return made_up(found.config) | ({"val_loss": 4.0000001} if folder.name.endswith("again") else {})

    monkeypatch.setattr(study, "_train", drifting)
    with pytest.raises(spdf.InputError, match=r"-again: the same cell gave a loss of 4\.0000001 where it was"):
        measured(toy(), tmp_path / "toy-test")


def test_one_cell_again_beside_its_recorded_loss(trained, tmp_path, capsys, monkeypatch):
    record = measured(toy(), tmp_path / "toy-test")
    name = record["rows"][2]["cells"][1]

    def again(only, **more):
        sweep = resolve_sweep(toy(only=only, record=str(tmp_path / "toy-test" / "study.json"), **more))
        study.run_again(sweep, sweep.study, Request(tmp_path / "again"))
        return capsys.readouterr().out

    assert f"{name}: validation loss 4.64, recorded 4.64: 0.0e+00 apart" in again(name)
    with pytest.raises(spdf.InputError, match=rf"no cell '{name}4' in this study; did you mean '{name}'"):
        again(f"{name}4")
    monkeypatch.setattr(study, "_train", lambda found, *_: {"val_loss": made_up(found.config)["val_loss"] + 2e-6})
    with pytest.raises(spdf.InputError, match=r"its loss is 2\.0e-06 from the recorded one"):
        again(name)


def test_a_cell_is_called_by_what_it_is(experiment):
    config = toy()
    before = Cells(resolve_sweep(config).cells)
    moved = ConfigDict(config)
    for name in moved.order:
        c = moved.cells[name]
        c.experiment, c.data.cache_dir, c.loop.log_every_steps, c.mesh.data = "other", "/elsewhere", 3, 1
    after = Cells(resolve_sweep(moved).cells)
    names = {key: before.cell(key, 1).name for key in config.order}
    assert {key: after.cell(key, 1).name for key in config.order} == names
    assert len(set(names.values())) == len(names)
    assert before.cell(key("dense", 10, 0.001), 2).name == names[key("dense", 10, 0.001)][:-1] + "2"
    moved.cells[key("dense", 10, 0.001)].data.unique_tokens = 500
    assert Cells(resolve_sweep(moved).cells).cell(key("dense", 10, 0.001), 1).name not in names.values()
    moved.cells[key("dense", 10, 0.001)].pretrain.batch_size = 8
    assert Cells(resolve_sweep(moved).cells).cell(key("dense", 10, 0.001), 1).name not in names.values()


def test_studies_share_cells(experiment, sweeps):
    mst, moving = (
        {(found := cells.cell(key, 1)).name: found.config for key in sweep.cells}
        for sweep in (sweeps["mst"], sweeps["moving"])
        if (cells := Cells(sweep.cells))
    )
    both = mst.keys() & moving.keys()
    assert len(both) == 2 * len(experiment.RATES), "dense and static at 75 %"
    assert all(mst[name] == moving[name] for name in both)
    assert len({sweep.study.cells_folder for sweep in sweeps.values()}) == 1


# --- the page ------------------------------------------------------------------------------------------------------------


def test_page_and_table_are_made_of_the_record_alone(trained, tmp_path, capsys):
    workdir = tmp_path / "toy-test"
    measured(toy(), workdir)
    page, table = (workdir / "report.html").read_text(), (workdir / "table.md").read_text()
    kept = tmp_path / "kept.json"
    (workdir / "study.json").rename(kept)
    for name in ("report.html", "table.md"):
        (workdir / name).unlink()
    with pytest.raises(spdf.InputError, match=r"no study was run there, and none is kept in .*nothing\.json; run it"):
        run_sweep(resolve_sweep(toy(record=str(tmp_path / "nothing.json"))), Request(workdir))
    run_sweep(resolve_sweep(toy(record=str(kept))), Request(workdir))
    assert ((workdir / "report.html").read_text(), (workdir / "table.md").read_text()) == (page, table)
    first = "At equal tokens “static, 20 steps” ends 0.120 nats/token above dense (95 % interval +0.095 to +0.145, 3 seeds)."
    assert first in page.replace("\N{NO-BREAK SPACE}", " ")
    assert "Made with JAX 0.12, on 2 cores." in page.replace("\N{NO-BREAK SPACE}", " ")
    assert table.startswith(f"# Is static worse?\n\n{first} At equal FLOPs")
    losses, spent = "| 4.640 ± 0.050 | +0.120 ± 0.025 | -0.248 ± 0.025 | +0.120 ± 0.025 |", "120 FLOP | 2.00k | 10 |"
    assert f"| static, 20 steps | rate 0.003 {losses} {spent}" in table
    for said in (
        "What these seeds can tell",
        "was run twice: the same loss to the bit",
        "Choices",
        "All cells",
        "--config.study.only",
    ):
        assert said in page
    write_json(workdir / "study.json", read_json(kept, ""))
    capsys.readouterr()
    run_recorded(Request(workdir))
    assert "Report: " in capsys.readouterr().out
    assert (workdir / "report.html").read_text() == page


def test_an_interval_that_holds_nothing_says_what_would_have_been_found(trained, tmp_path):
    record = measured(toy(), tmp_path / "toy-test")
    for name, loss in zip(record["rows"][2]["cells"], (4.5, 4.4, 4.55), strict=True):
        record["cells"][name]["val_loss"] = loss - 0.11
    write_json(tmp_path / "study.json", record)
    said = verdict(read_study(tmp_path))
    assert said.startswith("At equal tokens “static, 20 steps” ends where dense does, as far as 3 seeds tell: ")
    assert "they would most often have found" in said


@pytest.mark.parametrize("content", [{"rows": []}, {"rows": [{"row": "x"}], "cells": {}}, {"cells": 3}])
def test_a_file_that_is_no_record_is_refused(content, tmp_path):
    write_json(tmp_path / "study.json", content)
    with pytest.raises(spdf.InputError, match=r"study\.json: not of a study"):
        write_study_report(tmp_path, tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"seeds": (0, 1)}, "on 0 choices are made; measure on others"),
        ({"seeds": (1, 1)}, "must be two different seeds or more"),
        ({"seeds": (1,)}, "must be two different seeds or more"),
        ({"measure": "summary.loss"}, "config.study.measure: 'summary.loss', which no run leaves"),
        ({"reference": "dence"}, "no row is of 'dence'; did you mean 'dense'"),
        ({"answers": (("static, 20 step", "tokens"),)}, "did you mean 'static, 20 steps'"),
        (
            {"answers": (("static, 20 steps", "time"),)},
            "at equal 'time' is none of the rows at equal tokens, flops, seconds",
        ),
        ({"answer": ()}, "unknown key 'answer'; did you mean 'answers'"),
    ],
)
def test_a_study_that_cannot_be_made_is_refused(about, message):
    with pytest.raises(spdf.InputError) as caught:
        resolve_sweep(toy(**about))
    assert message in str(caught.value)


# --- the planner's law on a study's rows -----------------------------------------------------------------------------------


def test_the_law_is_fitted_to_all_rows_but_the_one_that_it_predicts(tmp_path, capsys):
    cells, rows = {}, []
    for i, (weights, tokens, sparsity) in enumerate(
        (w, d, s) for w in (1e5, 4e5) for d in (1e6, 4e6) for s in (0.0, 0.75)
    ):
        point = next(iter(measured_points([(weights, tokens, sparsity, 0.0)])))
        loss = 2 + 40 * capacity(point) + 300 * tokens**-0.3268
        cells[f"c{i}-1"] = {"val_loss": loss, "tokens": tokens}
        rows.append({"row": f"r{i}", "group": "", "weights": weights, "sparsity": sparsity, "cells": [f"c{i}-1"]})
    rows.append(rows[0] | {"row": "MST", "sparsity": None})  # the law is not about it
    record = {"title": "Toy", "rows": rows, "cells": cells}
    points = measured_in(record, "")
    assert len(points) == 8
    assert [math.exp(constant) for constant in fit_cells(points)[:3]] == pytest.approx([40, 300, 2], rel=1e-6)
    assert all(one.loss == pytest.approx(one.row.loss, rel=1e-9) for one in predictions(points))
    # One row that is off is predicted as the others say, and told by that.
    off = points[5]._replace(loss=points[5].loss + 1)
    found = predictions([*points[:5], off, *points[6:]])
    assert found[5].loss == pytest.approx(points[5].loss, rel=1e-9)
    assert predictions(points[:3]) == []
    with pytest.raises(spdf.InputError, match="2 rows do not determine 3 constants"):
        fit_cells(points[:2])
    write_json(tmp_path / "toy.json", record)
    main([str(tmp_path / "toy.json")])
    said = capsys.readouterr().out
    assert said.startswith("Toy: 0.000 nats/token apart\n")
    assert said.count("| +0.000 |") + said.count("| -0.000 |") == 8


def measured_points(rows):
    cells = {f"c{i}": {"val_loss": loss, "tokens": tokens} for i, (_, tokens, _, loss) in enumerate(rows)}
    facts = [
        {"row": "", "group": "", "weights": weights, "sparsity": sparsity, "cells": [f"c{i}"]}
        for i, (weights, _, sparsity, _) in enumerate(rows)
    ]
    return measured_in({"rows": facts, "cells": cells}, "")


def capacity(point):
    """(r^e + c (1 - r)^u) / (N r)^a, written again: e -.0097, u .8466, c -.2729, a .3268."""
    r = point.density
    return (r**-0.0097 - 0.2729 * (1 - r) ** 0.8466) / (point.parameters * r) ** 0.3268


# --- the studies -----------------------------------------------------------------------------------------------------------


def test_blocks_have_exactly_the_active_weights_of_the_dense_model(experiment, sweeps):
    sweep = sweeps["wide"]
    for sparsity, (width, hidden) in experiment.WIDE.items():
        assert width % 64 == hidden % 64 == 0
        (model,) = {c.model for c in sweep.cells.values() if c.model.d_model == width and c.model.mlp_width == hidden}
        assert (1 - sparsity) * linear_size(model) == linear_size(experiment.MIDDLE)
    once, often = ({c.data.unique_tokens for n, c in sweep.cells.items() if g in n} for g in ("once", "eight"))
    assert (once, often) == ({0}, {1000 * 4 * 128 // 8})


def test_the_shortest_and_longest_dense_runs_enclose_what_is_compared_with_them(sweeps):
    """Or there would be no answer at equal FLOPs."""
    for sweep in sweeps.values():
        flops = {row.label: spdf.run_cost(sweep.cells[row.choices[0][1]]).train_flops for row in sweep.rows}
        groups = {row.label: row.group for row in sweep.rows}
        for label, budget in sweep.study.answers:
            ends = [
                flops[row.label] for row in sweep.rows
                if (row.method, row.group) == (sweep.study.reference, groups[label])
            ]  # fmt: skip
            assert len(ends) > 1
            assert budget == "tokens" or min(ends) <= flops[label] <= max(ends), label


def test_tasks_and_text_are_read_from_where_the_command_says(experiment):
    config = experiment.get_config("spdf")
    config.webnlg, config.e2e = "a", "b"
    cells = resolve_sweep(config).cells.values()
    found = {(c.phases["finetune"].task.name, c.phases["finetune"].task.path) for c in cells if "finetune" in c.phases}
    assert found == {("restaurant", ""), ("webnlg", "a"), ("e2e", "b")}
    config = experiment.get_config("wide_text")
    config.text_path = "c.txt"
    assert {(c.data.source, c.data.path) for c in resolve_sweep(config).cells.values()} == {("text", "c.txt")}


def test_fine_tuning_goes_on_from_the_pretraining_of_its_seed_and_sparsity(experiment):
    sweep = resolve_sweep(experiment.get_config("spdf"))
    cells, seen = Cells(sweep.cells), 0
    for row in sweep.rows:
        for _, key in row.choices:
            *before, own = cells.chain(key, 3)
            if "finetune" in own.config.phases:
                (source,), seen = before, seen + 1
                sparsity = source.config.phases["pretrain"].sparsity.sparsity
                assert row.label.startswith(f"{100 * sparsity:g} %")
                assert own.config.phases["finetune"].sparsity.sparsity == (
                    sparsity if "sparse fine" in row.label else 0.0
                )
                assert own.config.init_from == f"cell:{source.name}"
                assert source.name.endswith("-3")
    assert seen == 3 * 5 * 2 * len(experiment.RATES)


# --- a real one ------------------------------------------------------------------------------------------------------------


def toy_study(text, cache, workdir):
    """An experiment file of a study that trains for seconds: dense and static, two rates, two seeds."""
    config = toy(seeds=(1, 2))
    for name in config.order:
        own, c = config.cells[name], tiny_run(text, cache)
        c.phases, c.experiment, c.variant, c.variants = ("pretrain",), "toy", "cell", ("cell",)
        del c.finetune
        sparse = own.pretrain.sparsity.to_dict()
        c.pretrain.update({"steps": own.pretrain.steps, "sparsity": sparse})
        c.pretrain.optimizer.peak_learning_rate = own.pretrain.optimizer.peak_learning_rate
        config.cells[name] = c
    return config


if __name__ == "__main__":  # killed as its cell of a number starts
    workdir, text, at = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    train, begun = study._train, []

    def killed(*arguments):
        begun.append(1)
        if len(begun) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train(*arguments)

    study._train = killed
    measured(toy_study(text, text.parent / "cache", workdir), workdir)


COUNTED = """
import os, sys
from spdf_jax.jobs import study
from spdf_jax.main import main

def count(*_):
    names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
    print("threads that compute:", names.count("tf_XLAEigen"), flush=True)
    os._exit(0)

study._train = count
main(sys.argv)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux alone lists the threads of a process")
def test_a_cell_is_computed_by_one_thread(tmp_path):
    """By more, on another number of cores, sums would have another order and losses other digits."""
    paths = ", ".join(f"Path({str(path)!r})" for path in (write_text(tmp_path / "text"), tmp_path / "cache", tmp_path))
    body = f"    return test_study.toy_study({paths})\n"
    file = tmp_path / "toy.py"
    file.write_text(f"from pathlib import Path\nimport test_study\n\ndef get_config(variant=''):\n{body}")
    command = [sys.executable, "-c", COUNTED, f"--config={file}", f"--workdir={tmp_path / 'toy-test'}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert "on 1 x cpu, 1 core" in ended.stdout, ended.stderr
    assert ended.stdout.endswith("threads that compute: 1\n")


@pytest.mark.slow
@pytest.mark.nightly
def test_a_study_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path, capsys):
    text, ends = write_text(tmp_path / "text"), []
    for name, kills in (("whole", ()), ("killed", (3, 8))):
        workdir = tmp_path / name / "toy-test"
        for at in kills:
            code = subprocess.run([sys.executable, __file__, workdir, text, str(at)], check=False).returncode
            assert code == -signal.SIGKILL
        capsys.readouterr()
        record = measured(toy_study(text, tmp_path / "cache", workdir), workdir)
        assert capsys.readouterr().out.count("nothing to do") == (7 if kills else 0)
        clock = ("seconds", "wall_seconds")
        ends.append({n: {k: v for k, v in c.items() if k not in clock} for n, c in record["cells"].items()})
        assert [one["choice"] for one in record["rows"]]
    assert ends[0] == ends[1]
    assert record["made_with"]
    assert len(ends[0]) == 4 + 6
    assert json.loads((tmp_path / "killed" / "toy-test" / "study.json").read_text())["repeated"]["val_loss"]
