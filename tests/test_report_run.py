"""The page of a run says what the run recorded, loads nothing, and leaves out what was not recorded."""

import json
import re
from functools import partial

import pytest
from report_folders import (
    STEPS,
    drawn,
    make_config,
    make_rows,
    make_run,
    read,
    sweep_cell,
    titles,
)

from spdf_jax import report
from spdf_jax.errors import InputError
from spdf_jax.report.records import changed_settings, read_run
from spdf_jax.report.run import main_numbers
from spdf_jax.report.settings import run_again
from spdf_jax.workdir import write_json

write_report = partial(report.write_report, figures=False)  # those are test_report_figures.py's


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(scope="module")
def page(finished) -> str:
    return read(write_report(finished))


@pytest.fixture(scope="module")
def dense_page(tmp_path_factory) -> str:
    return read(write_report(make_run(tmp_path_factory.mktemp("dense"), sparse=False)))


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
        "Masks by step",
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


def test_ids_are_unique_and_the_page_is_reproducible(finished, page):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert read(write_report(finished)) == page
    assert not list(finished.glob("*.tmp")) + list(finished.glob(".*"))


DENSE_TITLES = [
    "Numbers",
    "Loss over steps",
    "Loss over compute",
    "Loss over time",
    "Run it again",
    "Settings",
]


def test_a_dense_run_has_no_mask_panels(dense_page):
    assert titles(dense_page) == DENSE_TITLES
    assert "trained dense for 2.00 PFLOP" in dense_page
    assert "fewer training FLOPs" not in dense_page
    assert "sparse, up to" not in dense_page


def test_attention_that_skips_work_saves_without_masks(tmp_path):
    rows = [{**row, "train_flops": 0.9 * row["dense_flops"]} for row in make_rows(STEPS, sparse=False)]
    page = read(write_report(make_run(tmp_path, sparse=False, rows=rows)))
    assert "with 1.11x fewer training FLOPs than dense (1.80 vs 2.00 PFLOP)" in page
    assert titles(page) == DENSE_TITLES


def test_a_panel_without_a_neighbour_takes_the_whole_row(page, dense_page):
    alone = r'<section class="card alone">\s*<div>\s*<h2>(.*?)</h2>'
    assert re.findall(alone, page) == []
    assert re.findall(alone, dense_page) == ["Loss over time"]


def test_a_run_under_way_is_reported_from_its_rows(tmp_path):
    page = read(write_report(make_run(tmp_path, last_step=120)))
    assert "interrupted, at step 120 of 400" in page
    assert " at step 120 (validation loss 4.58 at step 100) after 983k tokens with 3.2x fewer training FLOPs" in page
    assert "<td>at the last evaluation, step 100</td>" in page
    assert "Masks" in titles(page)
    assert "Wall-clock" not in page


@pytest.mark.parametrize("kinds", [(), ("loss",), ("val_loss",), ("density",)])
def test_rows_of_one_kind_are_enough(tmp_path, kinds):
    rows = [row for row in make_rows(100, sparse=True) if any(kind in row for kind in kinds)]
    page = read(write_report(make_run(tmp_path, last_step=100, rows=rows)))
    assert ("Loss over steps" in titles(page)) == ("loss" in kinds or "val_loss" in kinds)
    assert ("Density by layer" in titles(page)) == ("density" in kinds)


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
    assert "49" not in re.sub(r"<svg.*?</svg>|base64,[^\"]*|as of .*? UTC", "", page, flags=re.DOTALL)


def test_long_runs_stay_small(tmp_path):
    rows = []
    for step in range(1, 5_001):
        flops = {"train_flops": 1e15 * step, "dense_flops": 4e15 * step, "tokens": step * 500_000, "sparsity": 0.75}
        extras = {"learning_rate": 6e-4, "grad_norm": 1.0, "tokens_per_second": 1e6}
        rows.append({"step": step, "phase": "pretrain", "loss": 10 / step**0.1, **flops, **extras})
    page = read(write_report(make_run(tmp_path, last_step=100, sparse=False, rows=rows)))
    assert "means of 9 logged steps" in page
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


def test_what_a_run_started_from_is_counted_with_it(tmp_path):
    workdir = make_run(tmp_path, sparse=False)
    summary = json.loads((workdir / "summary.json").read_text())
    write_json(workdir / "summary.json", summary | {"before": {"train_flops": 1e15}})
    numbers = drawn(main_numbers, read_run(workdir))
    assert '<th scope="row">Counted FLOPs of the run before</th><td>1.00 PFLOP</td>' in numbers
    assert '<th scope="row">Both together</th><td>3.00 PFLOP</td>' in numbers


def test_a_run_started_from_python_is_repeated_by_lines_that_work(tmp_path):
    config = make_config()
    del config["command"]
    panel = run_again(read_run(make_run(tmp_path, config=config, rows=[], last_step=0)))
    lines = panel.body.unescape().replace("<pre><code>", "").replace("</code></pre>", "").splitlines()
    assert lines[-1] == 'train(load_config(Path("config.json")), Path("again"))'
    exec("\n".join(lines[:-1]), names := {})
    assert {"Path", "load_config", "train"} <= names.keys()


def test_settings_are_those_that_differ_from_the_defaults():
    config, _ = sweep_cell("", 0.75)
    assert changed_settings(config) == [
        ("pretrain.steps", "1000", "600"),
        ("pretrain.sparsity.rule", "static", "dense"),
        ("pretrain.sparsity.sparsity", "0.75", "0.0"),
    ]
    assert ("model.of_another_version", "1", "none") in changed_settings(config | {"model": {"of_another_version": 1}})
