"""`figures/`: what a page shows as files that stand by themselves."""

import csv
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread
from report_folders import STEPS, make_exam_run, make_rows, make_run, make_sweep, titles

from spdf_jax.report import closer, write_report, write_sweep_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with all panels, and its page."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    write_report(folder)
    return folder


def rows(folder, name: str) -> list[dict[str, str]]:
    with (folder / "figures" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_panel_with_a_figure_has_its_files(run):
    names = ["loss_over_steps", "loss_over_compute", "loss_over_time", "sparsity_over_steps", "churn_over_steps"]
    names += ["density_by_layer", "masks", "degrees"]
    expected = {f"{name}.{kind}" for name in names for kind in ("svg", "png", "csv")} | {"numbers.csv"}
    assert {path.name for path in (run / "figures").iterdir()} == expected


def test_a_figure_stands_by_itself_in_colours(run):
    for path in sorted((run / "figures").glob("*.svg")):
        text = path.read_text()
        assert "var(--" not in text, path
        root = ElementTree.fromstring(text)  # the page's own would lack what declares it
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("width").endswith("pt")
        assert root[0].get("fill") == "#ffffff"
    assert "#0f766e" in (run / "figures" / "loss_over_steps.svg").read_text()
    picture = imread(run / "figures" / "loss_over_steps.png")[..., :3]
    assert picture.shape[1] == 840
    assert np.allclose(picture[0, 0], 1), "on white"
    green = np.abs(picture - np.array([0x0F, 0x76, 0x6E]) / 255).max(axis=-1) < 0.02
    assert green.sum() > 200


def test_the_page_keeps_its_own_colours(run):
    page = (run / "report.html").read_text()
    figure = page[page.index("<h2>Loss over steps") : page.index("<h2>Loss over compute")]
    assert "var(--accent)" in figure
    assert "#0f766e" not in figure
    assert 'width="100%"' not in figure


def test_numbers_are_those_recorded(run):
    recorded = make_rows(STEPS, sparse=True)
    found = rows(run, "loss_over_compute")
    training = [row for row in recorded if "loss" in row]
    assert [float(row["nats/token"]) for row in found if row["loss"] == "training"] == [row["loss"] for row in training]
    assert [float(row["training FLOPs (counted)"]) for row in found[: len(training)]] == [
        row["train_flops"] for row in training
    ]
    assert [row["phase"] for row in found if row["loss"] == "validation"] == ["pretrain"] * 8 + ["finetune"]
    density = rows(run, "density_by_layer")
    topology = [row for row in recorded if "density" in row]
    assert len(density) == len(topology)
    assert float(density[3]["blocks/mlp_up/kernel/2"]) == topology[3]["density"]["blocks/mlp_up/kernel"][2]
    degrees = [row for row in rows(run, "degrees") if row["matrix"] == "blocks/attn_q/kernel/0" and row["step"] == "80"]
    for side in ("output", "input"):
        counts = [(int(r["connections"]), int(r["how many have so many"])) for r in degrees if r["of each"] == side]
        assert sum(count for _, count in counts) == 64
    numbers = {row["number"]: row["value"] for row in rows(run, "numbers")}
    assert numbers["parameters"] == "5300000"
    assert float(numbers["val_loss"]) == 3.9123


@pytest.mark.slow
def test_files_are_the_same_when_written_again(run):
    before = {path: path.read_bytes() for path in (run / "figures").iterdir()}
    write_report(run)
    assert {path: path.read_bytes() for path in (run / "figures").iterdir()} == before


def test_tables_of_scores_and_exams_are_files(tmp_path):
    write_report(make_exam_run(tmp_path))
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert {"scores", "zero_shot", "scores_of_the_exams"} <= names
    assert [row["certification"] for row in rows(tmp_path, "scores_of_the_exams")] == ["Baker", "Clerk", "Cook <b>"]


def test_a_sweep_has_files_of_its_table_charts_and_curves(tmp_path):
    page = write_sweep_report(make_sweep(tmp_path))
    assert "Results" in titles(page.read_text())
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    curves = {
        f"validation_loss_{task}_by_{axis}"
        for task in ("text", "restaurant")
        for axis in ("tokens", "flops", "seconds")
    }
    assert names == curves | {"results", "bleu_by_row", "bleu_over_compute", "runs_finetune", "runs_pretrain"}
    first = rows(tmp_path, "results")[0]
    assert (first["BLEU"], first["METEOR"], first["BLEU (seeds)"]) == ("41.0", "", "2")
    assert len(list(csv.reader(io.StringIO((tmp_path / "figures" / "bleu_by_row.csv").read_text())))) == 5


def test_what_a_page_says_once_each_file_says_by_itself(tmp_path):
    """Which line is which: the labels of a figure's own numbers are in it."""
    write_sweep_report(make_sweep(tmp_path))
    named = {}
    for path in sorted((tmp_path / "figures").glob("*.svg")):
        texts = " ".join(one.text for one in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text"))
        found = rows(tmp_path, path.stem)
        labels = {row.get("line", row.get("row", "")) for row in found}
        named[path.stem] = {label for label in labels if all(part in texts for part in label.split(" = "))}
        assert named[path.stem] == labels - {""}, path
    assert len(named["validation_loss_restaurant_by_tokens"]) == 4


def test_a_page_under_way_leaves_figures_to_the_end(tmp_path):
    page = write_report(make_run(tmp_path, last_step=100), figures=False)
    assert (
        re.search("<h2>Masks by step", page.read_text()) is None
    )  # two steps alone have pictures, and both have names
    assert not (tmp_path / "figures").exists()


def test_without_bokeh_there_is_no_file_of_curves_and_no_link_to_one(tmp_path, monkeypatch):
    monkeypatch.setattr(closer.importlib.util, "find_spec", lambda name: None)
    page = write_report(make_run(tmp_path, last_step=20, sparse=False))
    assert "curves.html" not in page.read_text()
    assert not (tmp_path / "curves.html").exists()
