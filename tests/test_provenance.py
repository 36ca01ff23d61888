"""A run keeps the code and versions that made it, and does not go on with other code where it uses it."""

import json
import re
from pathlib import Path

import pytest
from forks import command
from tiny import tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.jobs import train as jobs
from spdf_jax.report import write_report
from spdf_jax.sparsity.rules import OWN_RULES
from spdf_jax.training import provenance
from spdf_jax.training.provenance import code_files, fingerprint_of_code, own_rules, record_start

pytestmark = pytest.mark.usefixtures("no_figures")

EXPERIMENT = '''"""A rule of one's own."""

import jax.numpy as jnp

import spdf_jax as spdf
from tiny import tiny_config
from pathlib import Path


def score(weights, grads):
    """How much a weight matters."""
    return jnp.abs(weights * grads)


spdf.RULES["mine"] = spdf.Rule(gradient_share=0.5, drop_score=score)


def get_config(variant="mine"):
    text = Path("TEXT")
    c = tiny_config(text, text.parent / "cache")
    c.variants, c.variant = ("mine", "theirs"), variant or "mine"
    c.pretrain.steps, c.phases = 8, ("pretrain",)
    del c.finetune
    c.pretrain.sparsity.update({"rule": "mine" if variant != "theirs" else "rigl", "schedule": "constant"})
    for name in ("attention_start", "attention_end"):
        c.pretrain.sparsity[name] = 0.0
    c.pretrain.sparsity.update({"attention_pattern": "causal", "attention_width": 128})
    c.pretrain.sparsity.update({"ramp_end": 0.1, "ultra_end": 0.75})
    return c
'''


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture
def experiment(text, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(EXPERIMENT.replace("TEXT", str(text)))
    return file


def short(text: Path):
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.phases = 8, ("pretrain",)
    del c.finetune
    c.pretrain.sparsity.update(
        {"rule": "dense", **dict.fromkeys(("sparsity", "attention_start", "attention_end"), 0.0)}
    )
    c.pretrain.sparsity.update({"schedule": "constant", "attention_pattern": "causal", "attention_width": 128})
    c.pretrain.sparsity.update({"ramp_end": 0.1, "ultra_end": 0.75, "sparsify_head": False, "update_every_steps": 100})
    return spdf.resolve(c)


def starts(workdir: Path) -> list[dict]:
    return json.loads((workdir / "provenance.json").read_text())["starts"]


def test_every_start_is_kept_and_told(text, tmp_path, monkeypatch):
    config = short(text)
    jobs.train(config, tmp_path, command="first", progress=False)
    (first,) = starts(tmp_path)
    assert (first["step"], first["command"]) == (0, "first")
    assert first["packages"]["spdf_jax"] == spdf.__version__
    monkeypatch.setattr(provenance, "commit", lambda: "abc+")
    record_start(config, tmp_path, None, "second", 4)
    assert [start["step"] for start in starts(tmp_path)] == [0, 4]
    page = write_report(tmp_path).read_text()
    assert re.search(r"Begun</th><td>20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC</td><td>spdf_jax ", page)
    assert re.search(r"Resumed once</th><td>[^<]+ UTC, after step 4</td><td>spdf_jax \S+ at commit abc\+, JAX ", page)


@pytest.mark.parametrize("harm", [None, b"{", b'{"other": 1}'])
def test_a_list_of_starts_that_is_gone_or_damaged_begins_anew(harm, text, tmp_path):
    if harm is not None:
        (tmp_path / "provenance.json").write_bytes(harm)
    record_start(short(text), tmp_path, None, "again", 4)
    assert [start["step"] for start in starts(tmp_path)] == [4]


def test_code_is_the_same_whatever_its_comments_and_layout(tmp_path):
    files = [tmp_path / f"{i}.py" for i in range(5)]
    for file, code in zip(
        files,
        ('def f(x):\n    """A."""\n    return x + 1\n', "def f(x):  # b\n\n    return (x + 1)\n",
         "def f(x):\n    return x + 2\n", "def f(", "def f(x"),
        strict=True,
    ):  # fmt: skip
        file.write_text(code)
    same, too, other, broken, broken_otherwise = map(fingerprint_of_code, files)
    assert same == too
    assert len({same, other, broken, broken_otherwise}) == 4


def test_code_of_a_rule_is_found_where_it_is_written(text, monkeypatch):
    config = short(text)
    assert list(own_rules(config)) == []
    assert code_files(config, Path(__file__)) == {"test_provenance.py": Path(__file__)}
    monkeypatch.setitem(spdf.RULES, "rigl", spdf.Rule(gradient_share=1.0, drop_score=lambda w, g: abs(w)))
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.sparsity.rule = "rigl"
    assert list(own_rules(spdf.resolve(c))) == ["rigl"], "no more what it is in the library"
    assert code_files(spdf.resolve(c), None) == {"test_provenance.py": Path(__file__)}
    assert OWN_RULES["rigl"] is not spdf.RULES["rigl"]


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_rule_of_its_name(experiment, tmp_path):
    run = ["--config", str(experiment), "--workdir", str(tmp_path / "run")]
    result = command(*run)
    assert (result.returncode, result.stderr) == (0, "")
    kept = tmp_path / "run" / "code" / "mine.py"
    assert kept.read_text() == experiment.read_text()
    experiment.write_text(experiment.read_text().replace("How much a weight matters.", "Its worth."))
    result = command(*run)
    assert "this run is finished" in result.stdout
    assert "has changed" not in result.stdout

    experiment.write_text(experiment.read_text().replace("weights * grads", "weights + grads"))
    result = command(*run)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert (
        f"mine.py: has changed since this run began, and rule 'mine' of it is the run's; put it back as {kept}"
        in result.stderr
    )

    # What needs no rule's code is told how to get the settings.
    result = command("--job", "evaluate", "--workdir", str(tmp_path / "run"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "'mine' is not one of" in result.stderr
    assert f"if an experiment file defines it ({kept.parent}), name that by --config, too" in result.stderr
    result = command("--job", "evaluate", *run)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.slow
def test_of_a_file_whose_code_the_run_does_not_use_it_is_only_said(experiment, tmp_path):
    run = ["--config", f"{experiment}:theirs", "--workdir", str(tmp_path / "run")]
    assert command(*run).returncode == 0
    experiment.write_text(experiment.read_text().replace("weights * grads", "weights + grads"))
    result = command(*run)
    assert (result.returncode, result.stderr) == (0, "")
    assert "mine.py: has changed since this run began (it was " in result.stdout
    assert "this run is finished" in result.stdout
