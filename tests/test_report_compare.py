"""``--job compare``: any runs beside each other, in words, one table in three formats, curves and files."""

import csv
import html
import json
import re
from pathlib import Path

import pytest
from forks import command
from matplotlib.figure import Figure
from report_folders import make_config, make_run, make_summary, make_sweep, read, sweep_cell, titles, write_lines
from tiny import empty_figure

from spdf_jax.errors import InputError
from spdf_jax.jobs import Request, compare
from spdf_jax.report import closer
from spdf_jax.report.compare import read_runs, rules_of_other_code
from spdf_jax.report.records import read_run
from spdf_jax.workdir import read_json, write_json

START = {"time": "2026-11-30T08:00:01+00:00", "packages": {"spdf_jax": "0.2.0", "jax": "0.12"}, "commit": "abc+"}


def make(folder: Path, sparsity: float, *, rate: float = 0.0, finished: bool = True, **data: object) -> Path:
    """A run of a sparsity; fine-tuned if it has a rate."""
    config, rows = sweep_cell("", sparsity, rate=rate)
    config["data"] = config["data"] | data
    run = make_run(folder, config=config, rows=rows, sparse=False, last_step=0)
    start = START | {"step": 0, "python": "3.13.1", "device": "2-core CPU"}
    write_json(run / "provenance.json", {"starts": [start]})
    if finished:
        write_json(run / "summary.json", make_summary(rows) | {"val_loss": rows[-1]["val_loss"]})
    return run


def by_rule(folder: Path, rule: str, **rules: str) -> Path:
    """A run by a rule, with the fingerprints of those of its own."""
    run = make(folder, 0.5)
    config = read_json(run / "config.json", "")
    config["pretrain"]["sparsity"]["rule"] = rule
    write_json(run / "config.json", config)
    write_json(run / "provenance.json", {"starts": [START | {"python": "3.13.1", "device": "x"} | {"rules": rules}]})
    return run


def test_rules_of_one_name_and_other_code_are_said_and_told_apart(tmp_path, undrawn):
    runs = [
        by_rule(tmp_path / name, "mine", mine=code)
        for name, code in zip("abc", ("1" * 64, "1" * 64, "2" * 64), strict=True)
    ]
    runs += [by_rule(tmp_path / "of_no_record", "mine")]
    page = compared(tmp_path / "there", *runs)
    assert "Under one name these runs have rules of different code: 'mine'." in html.unescape(page)
    table = (tmp_path / "there" / "compare.csv").read_text().splitlines()
    column = table[0].split(",").index("code of rule 'mine'")
    assert [line.split(",")[column] for line in table[1:]] == ["11111111", "11111111", "22222222", ""]
    assert "rules of different code" not in compared(tmp_path / "same", *runs[:2])
    assert "code of rule" not in (tmp_path / "same" / "compare.md").read_text()
    # The library's own is another's than one that is put in its place; what is not of one name is no matter.
    own, library = by_rule(tmp_path / "own", "rigl", rigl="3" * 64), by_rule(tmp_path / "library", "rigl")
    assert rules_of_other_code(read_runs([own, library, runs[0]], tmp_path).cells) == {
        "rigl": {"own": "33333333", "library": "the library's"}
    }


@pytest.fixture
def undrawn(monkeypatch):
    """Figures that are empty, where nobody looks at them."""
    monkeypatch.setattr(Figure, "savefig", empty_figure)
    monkeypatch.setattr(closer, "_lines", lambda axes: [])


def compared(folder: Path, *runs: Path) -> str:
    compare.run(Request(Path(), output=folder, runs=runs))
    return read(folder / "report.html")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    """Of one text: dense, and sparse under a name that LaTeX must not read; the second is unfinished."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a" / "dense_0").mkdir(parents=True)
    found = [make(folder / "a" / "dense_0", 0.0), make(folder / "b" / "half|50%_0", 0.5, finished=False)]
    (found[0] / "report.html").write_text("a page")
    return found


@pytest.fixture(scope="module")
def there(runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("there") / "compare"
    compared(folder, *runs)
    return folder


def test_the_page_has_a_table_curves_and_where_the_runs_come_from(there, runs):
    page = read(there / "report.html")
    assert titles(page) == ["Runs", "Validation loss: text", "Where they come from"]
    assert "<h1>2 runs beside each other</h1>" in page
    assert re.search(r'class="status">compared 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC', page)
    assert "Lowest validation loss: 4.127 over held-out text (dense_0)." in page
    for label in ("step", "training tokens", "training compute (PFLOP, counted)", "training time (minutes, measured)"):
        assert f">{label}</text>" in page, label
    assert page.count(">loss (nats/token)</text>") == 4
    assert re.findall(r'<a href="(\.\.[^"]+)"', page) == [
        f"../../{runs[0].relative_to(runs[0].parents[2])}/report.html"
    ]
    assert "interrupted, at step 1,000 of 1,000" in page
    assert "2026-11-30 08:00:01 UTC" in page
    assert (
        "Begun 2026-11-30 08:00:01 UTC on 2-core CPU, with spdf_jax 0.2.0 at commit abc+, JAX 0.12, Python 3.13.1."
        in page
    )
    commands = [re.sub("<[^>]*>", "", one) for one in re.findall("<pre><code>(.*?)</code></pre>", page)]
    assert commands == [read_run(run).config["command"] for run in runs]
    assert "Wall-clock time is all of it" in page
    assert "Training time is without evaluations; compilation is in it." in page
    assert 'aria-label="validation loss over held-out text, training compute (PFLOP, counted)"' in page
    assert "Losses are not comparable" not in page
    assert not re.findall(r"<script|<link|@import|<iframe", page)


def test_the_table_is_one_in_three_formats(there):
    with (there / "compare.csv").open(newline="") as file:
        dense, half = csv.DictReader(file)
    assert (dense["run"], dense["status"]) == ("dense_0", "finished")
    assert float(dense["validation loss (nats/token)"]) == pytest.approx(4 + 4 * 2.718281828**-5 + 0.1)
    assert (float(dense["highest sparsity"]), float(half["highest sparsity"])) == (0, 0.5)
    assert float(half["training FLOPs (counted)"]) == pytest.approx(0.6 * 5e15)
    assert (dense["pretrain.sparsity.rule"], half["pretrain.sparsity.rule"]) == ("dense", "static")
    assert (dense["parameters"], half["parameters"]) == ("5300000", "")
    assert "seed" not in dense  # the same in both

    lines = (there / "compare.md").read_text().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].startswith("| dense_0 | finished | 4.1270 | 1,000 | 4.10M | 5.00 PFLOP | 1.00x | ")
    assert lines[3].startswith("| half&#124;50%_0 | interrupted, at step 1,000 of 1,000 | 4.3270 | ")

    table = (there / "compare.tex").read_text()
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 3
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1
    columns = re.match(r"\\begin\{tabular\}\{(l+r+)\}", table)[1]
    assert len(columns) == len(re.findall(r"(?<!\\)&", rows[0])) + 1
    assert r"half|50\%\_0 & interrupted" in rows[2]


def test_a_column_has_one_unit(tmp_path, undrawn):
    """That of its largest, so that rows can be read against each other."""
    runs = [make(tmp_path / "large", 0.0), make(tmp_path / "small", 0.0)]
    summary = json.loads((runs[1] / "summary.json").read_text())
    write_json(runs[1] / "summary.json", summary | {"train_flops": 6e13, "tokens": 41_000})
    compared(tmp_path / "there", *runs)
    _, _, large, small = (tmp_path / "there" / "compare.md").read_text().splitlines()
    assert " | 4.10M | 5.00 PFLOP | " in large
    assert " | 0.0410M | 0.0600 PFLOP | " in small


@pytest.mark.usefixtures("undrawn")
def test_a_loss_of_an_earlier_step_than_the_rest_names_its_own(tmp_path):
    ends = {}
    for name, step in (("at", 100), ("between", 115)):
        ends[name] = make_run(tmp_path / name, last_step=step, config=sweep_cell("", 0.0)[0], sparse=False)
    compared(tmp_path / "there", *ends.values())
    with (tmp_path / "there" / "compare.csv").open(newline="") as file:
        at, between = csv.DictReader(file)
    loss = ("validation loss (nats/token)", "loss at step", "training steps", "training tokens")
    assert [at[key] for key in loss[1:]] == ["", "100", "819200"]
    assert [between[key] for key in loss] == [at[loss[0]], "100", "115", "942080"]


@pytest.mark.usefixtures("undrawn")
def test_losses_of_text_and_of_a_callers_own_model_are_kept_apart(tmp_path):
    text, own = make(tmp_path / "text", 0.0), make(tmp_path / "own", 0.0)
    rows = [{"step": step, "phase": "fit", "sparsity": 0.0, "val_loss": 2.0 - step / 10} for step in (0, 10)]
    write_lines(own / "metrics.jsonl", rows)
    write_json(own / "config.json", {"experiment": "fit", "variant": "own", "steps": 10, "fit": {}})
    write_json(own / "summary.json", {"status": "finished", "steps": 10, "val_loss": 1.0})
    page = compared(tmp_path / "there", text, own)
    assert "Lowest validation loss: 4.127 over held-out text (text), 1.000 over what spdf.fit was given (own)." in page
    assert titles(page)[1:3] == ["Validation loss: text", "Validation loss: spdf.fit"]
    assert "are over held-out text and what spdf.fit was given: compare those over the same." in page
    assert "These runs differ" not in page


def test_curves_are_files_of_their_own(there):
    names = [f"validation_loss_text_by_{axis}" for axis in ("steps", "tokens", "flops", "seconds")]
    kinds = {path.name for path in (there / "figures").iterdir()}
    assert {f"{name}.{kind}" for name in names for kind in ("svg", "png", "csv")} <= kinds
    with (there / "figures" / f"{names[2]}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["run"] for row in rows} == {"dense_0", "half|50%_0"}
    assert max(float(row["FLOPs (counted)"]) for row in rows) == 5e15


def test_runs_that_share_a_name_are_told_apart(tmp_path):
    found = [make(tmp_path / side / "run", 0.0) for side in ("a", "b")]
    assert list(read_runs(found, tmp_path).cells) == ["a/run", "b/run"]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ({"data": {"source": "text", "path": "other"}}, r"These runs differ in data\.source, data\.path\."),
        ({"vocab": 300}, r"differ in model\.vocab_size\."),
        ({"tokenizer": "another"}, r"differ in tokenizer\.json\."),
        ({"python": "3.14.0"}, "differ in the Python whose library is the text"),
        ({"unigram": 5.0}, "differ in the loss of token frequencies alone"),
    ],
)
def test_losses_over_other_text_are_said_not_to_be_comparable(harm, message, tmp_path):
    runs = [make(tmp_path / name, 0.0, **harm.get("data", {}) if name == "b" else {}) for name in "ab"]
    for name, run in zip("ab", runs, strict=True):
        (run / "tokenizer.json").write_text(harm.get("tokenizer", "t") if name == "b" else "t")
    if "data" in harm:
        for run in runs:
            (run / "summary.json").unlink()  # and with it the loss of token frequencies
    config = json.loads((runs[1] / "config.json").read_text())
    config["model"]["vocab_size"] = harm.get("vocab", config["model"]["vocab_size"])
    write_json(runs[1] / "config.json", config)
    starts = json.loads((runs[1] / "provenance.json").read_text())["starts"]
    write_json(runs[1] / "provenance.json", {"starts": [starts[0] | {"python": harm.get("python", "3.13.1")}]})
    if "unigram" in harm:
        summary = json.loads((runs[1] / "summary.json").read_text())
        write_json(runs[1] / "summary.json", summary | {"unigram_loss": harm["unigram"]})
    assert re.search(rf"^Losses are not comparable .*{message}", read_runs(runs, tmp_path).remark)


def test_the_same_text_in_another_place_is_the_same_text(tmp_path):
    runs = [make(tmp_path / name, 0.0, source="text", path=f"texts/{name}") for name in "ab"]
    assert read_runs(runs, tmp_path).remark == ""


@pytest.mark.usefixtures("undrawn")
def test_steps_that_the_runs_before_took_are_told_apart(runs, tmp_path):
    branch = make(tmp_path / "branch", 0.0)
    config = json.loads((branch / "config.json").read_text())
    write_json(branch / "config.json", config | {"begins": {"step": 40}})
    page = compared(tmp_path / "compare", runs[0], branch)
    said = "The steps of a run that goes on from another count on from there."
    assert said in page
    with (tmp_path / "compare" / "compare.csv").open(newline="") as file:
        assert [row["of these by the runs before"] for row in csv.DictReader(file)] == ["", "40"]
    assert said not in compared(tmp_path / "compare", *runs)
    assert "by the runs before" not in (tmp_path / "compare" / "compare.md").read_text()


def test_token_files_are_the_same_tokens_whatever_tells_their_text(tmp_path):
    tokenizers = {"a": "", "b": "tokenizer.json"}
    runs = [
        make(tmp_path / name, 0.0, source="token_files", path="ids", tokenizer=of) for name, of in tokenizers.items()
    ]
    (runs[1] / "tokenizer.json").write_text("t")
    assert read_runs(runs, tmp_path).remark == ""


@pytest.mark.usefixtures("undrawn")
def test_losses_over_other_targets_share_no_curve(tmp_path):
    page = compared(tmp_path / "there", make(tmp_path / "pre", 0.5), make(tmp_path / "fine", 0.0, rate=1e-3))
    assert titles(page)[1:3] == ["Validation loss: text", "Validation loss: restaurant"] or titles(page)[1:3] == [
        "Validation loss: restaurant",
        "Validation loss: text",
    ]
    assert "are over held-out text and the target tokens of restaurant: compare those over the same." in page


def test_what_is_no_pair_of_runs_is_refused(runs, tmp_path):
    sweep = make_sweep(tmp_path / "sweep")
    for given, message in (
        ([], "give the folders of two runs or more"),
        (runs[:1], "give the folders of two runs or more"),
        ([runs[0], runs[1], runs[0].parent / "." / "dense_0"], "is given twice"),
        ([runs[0], runs[0].parent / ".." / "a" / "dense_0"], "dense_0: is given twice, as "),
        ([runs[0], tmp_path / "nothing"], "nothing: no run is there"),
        ([runs[0], sweep], r"sweep: is a sweep, with a table of its own; give its runs, .*cells/\*"),
    ):
        with pytest.raises(InputError, match=message):
            compared(tmp_path / "there", *given)


@pytest.mark.usefixtures("undrawn")
def test_nothing_of_others_is_overwritten_and_nothing_of_ours_is_left_behind(runs, tmp_path):
    folder = tmp_path / "there"
    folder.mkdir()
    (folder / "report.html").write_text("mine")
    with pytest.raises(InputError, match="there: holds something else than a comparison; choose another folder"):
        compared(folder, *runs)
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    (folder / "report.html").unlink()

    with pytest.raises(InputError, match="is given twice"):
        compared(tmp_path / "other", runs[0], runs[0])
    assert not (tmp_path / "other").exists()

    compared(folder, runs[0], make(tmp_path / "fine", 0.0, rate=1e-3))
    (folder / "figures" / "mine.svg").write_text("mine")
    assert (folder / "figures" / "validation_loss_restaurant_by_steps.svg").exists()
    compared(folder, *runs)
    left = {path.name for path in (folder / "figures").iterdir()}
    assert not [name for name in left if "restaurant" in name]
    assert "mine.svg" in left


@pytest.mark.usefixtures("undrawn")
def test_names_of_runs_are_escaped(tmp_path):
    nasty = "<script>alert('$x$')<"
    runs = [make_run(tmp_path / name, config=make_config(command=nasty, variant=nasty)) for name in ("a", nasty)]
    page = compared(tmp_path / "there", *runs)
    assert "<script" not in page
    assert "&lt;script" in page


def test_the_command_takes_workdirs_and_nothing_of_a_config(runs, tmp_path):
    there = tmp_path / "there"
    result = command("--job", "compare", *map(str, runs), "--output", str(there))
    assert (result.returncode, result.stderr, result.stdout) == (0, "", f"{there}/report.html\n")
    result = command(*map(str, runs), "--job=compare", f"--output={there}")
    assert (result.returncode, result.stderr) == (0, "")
    for arguments, message in (
        (["--job", "compare", str(runs[0])], "give the folders of two runs or more: --job compare runs/a runs/b"),
        (
            ["--job", "compare", *map(str, runs), "--workdir", "x"],
            "--workdir: --job compare takes the workdirs of runs",
        ),
        (
            ["--job", "compare", *map(str, runs), "--distributed"],
            "--distributed: --job compare is the work of one process",
        ),
    ):
        result = command(*arguments)
        assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
        assert message in result.stderr
