"""The page of a sweep: what came out in words, its table, its charts and curves, its cells and how they differ."""

import json
import re
import shutil
import statistics
from functools import partial
from pathlib import Path

import matplotlib
import pytest
from matplotlib.text import Text
from report_folders import SIGNATURE, drawn, make_cell, make_sweep, read, sweep_cell, sweep_cells, titles

from spdf_jax import report
from spdf_jax.errors import InputError
from spdf_jax.report.draw import STYLE
from spdf_jax.report.sweep import verdict
from spdf_jax.report.sweep_curves import curves
from spdf_jax.report.sweep_records import read_sweep
from spdf_jax.report.sweep_table import main_charts
from spdf_jax.workdir import write_json

write_report, write_sweep_report = (
    partial(make, figures=False) for make in (report.write_report, report.write_sweep_report)
)


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
    assert "15 runs: 12 of finetune, 3 of pretrain. 17.2M training tokens, 1 h 18 min on 2-core CPU." in sweep_page
    assert not [label for label in re.findall('aria-label="([^"]*)"', sweep_page) if "{" in label]


def test_a_sweep_whose_rows_are_alike_says_so(tmp_path):
    workdir = make_sweep(tmp_path)
    table = json.loads((workdir / "table.json").read_text())
    for row in table["rows"]:
        row["values"]["BLEU"]["mean"] = 0.0
    write_json(workdir / "table.json", table)
    assert verdict(read_sweep(workdir)) == "BLEU: 0 in every row."


def test_a_reference_at_an_end_is_said_so_and_a_loss_has_its_unit(tmp_path, sweep_page):
    workdir = make_sweep(tmp_path)
    table = json.loads((workdir / "table.json").read_text())
    for row in table["rows"]:
        losses = [cell["summary"]["val_loss"] for cell in row["cells"].values()]
        row["values"] = {"loss": {"mean": statistics.mean(losses), "deviation": 0.0, "seeds": 2}}
    write_json(workdir / "table.json", table)
    sweep = read_sweep(workdir)
    assert "for “0 %, dense fine-tuning”, the reference and lowest; highest 1." in verdict(sweep)
    assert drawn(main_charts, sweep).count(">loss (nats/token)</text>") == 2  # by row and over compute
    assert sweep_page.count(">BLEU</text>") == 2
    assert sweep_page.count(">loss (nats/token)</text>") == 2 * 3  # the curves


def test_the_label_of_an_axis_is_whole_however_few_the_rows(tmp_path):
    workdir = make_sweep(tmp_path)
    table = json.loads((workdir / "table.json").read_text())
    table["rows"] = table["rows"][1:3]
    for row in table["rows"]:
        row["values"] = {"loss at equal FLOPs (nats/token), of the best seed": row["values"]["BLEU"]}
    write_json(workdir / "table.json", table)
    with matplotlib.rc_context(STYLE):
        plots = [plot for panel in main_charts(read_sweep(workdir)) for plot in panel.plots]
        assert len(plots) == 2
        for plot in plots:
            plot.figure.draw_without_rendering()
            (axes,) = plot.figure.axes
            for label in filter(Text.get_text, (axes.xaxis.label, axes.yaxis.label)):
                box = label.get_window_extent()
                assert plot.figure.bbox.x0 <= box.x0 <= box.x1 <= plot.figure.bbox.x1, label
                assert plot.figure.bbox.y0 <= box.y0 <= box.y1 <= plot.figure.bbox.y1, label


def test_a_run_of_a_sweep_has_its_name(tmp_path):
    cell = make_cell(tmp_path, "pretrain_50", sweep_cell("50", 0.5)[0], [])
    assert "<h1>table: mini, pretrain_50</h1>" in read(write_report(cell))


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
    assert "table: mini, interrupted: 14 of the 15 runs begun are finished as of " in page
    # 0.6 + 0.04 + 4 exp(-5) + 0.1, and so for text.
    assert "0.767 over the target tokens of restaurant (finetune_0_0.001_0)" in page
    assert "4.127 over held-out text (pretrain_0)" in page
    assert titles(page)[:2] == ["Validation loss: text", "Validation loss: restaurant"]
    assert "interrupted, at step 100 of 100" in page
    assert "17.2M training tokens so far; those that are finished took 1 h 12 min on 2-core CPU." in page
    assert 'href="cells/finetune_75_0.002_1/' not in page
    assert "not_begun" not in page


def test_runs_of_very_different_lengths_share_a_logarithmic_axis(tmp_path, sweep_page):
    config, rows = sweep_cell("", 0.0)
    for name, times in (("short", 1), ("long", 1000)):
        longer = [row | {key: row[key] * times for key in ("step", "tokens", "train_flops")} for row in rows]
        make_cell(tmp_path, name, config, longer)
    by_tokens = drawn(curves, read_sweep(tmp_path)).split("training compute")[0]
    ticks = set(re.findall(r">([\d.]+[kMB]?)</text>", by_tokens))
    assert {"1M", "1B"} <= ticks
    assert "0" not in ticks
    of_one_length = sweep_page[sweep_page.index("<h2>Validation loss: text") :].split("training compute")[0]
    assert ">0</text>" in of_one_length


def test_a_logarithmic_axis_of_a_decade_or_two_has_more_than_one_number(tmp_path):
    config, rows = sweep_cell("", 0.0)
    for name, times in (("short", 1), ("long", 13)):
        make_cell(tmp_path, name, config, [row | {key: row[key] * times for key in ("step", "tokens")} for row in rows])
    by_tokens = drawn(curves, read_sweep(tmp_path)).split("training compute")[0]
    ticks = re.findall(r">([\d.]+[kMB]?)</text>", by_tokens)
    assert "0" not in ticks, "the axis is logarithmic"
    assert len([tick for tick in ticks if tick[-1] in "kMB"]) >= 3


def test_dozens_of_runs_stay_readable_and_small(tmp_path):
    config, rows = sweep_cell("", 0.0)
    for i in range(40):
        make_cell(tmp_path, f"run_{i:03}", config | {"seed": i}, rows)
    page = read(write_sweep_report(tmp_path))
    styles = re.findall(r'<path d="M0,4H30" style="([^"]+)"', page)
    assert len(styles) == 40
    assert len(set(styles)) == 32  # colours x dashes, before they repeat
    assert len(page) < 600_000


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
    for cell in (workdir / "cells").glob("pretrain_*"):  # whose curves have no names but the folders'
        shutil.rmtree(cell)
    table = json.loads((workdir / "table.json").read_text())
    table["title"] = table["rows"][0]["row"] = table["rows"][0]["choice"] = nasty
    for row in table["rows"]:
        row["values"] = {nasty: row["values"]["BLEU"]}
    write_json(workdir / "table.json", table)
    page = read(write_sweep_report(workdir))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
