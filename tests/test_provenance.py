"""A run keeps the code and versions that made it, and does not go on with other code where it uses it."""

import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from forks import command
from tiny import tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.config import saved
from spdf_jax.config.sweep import resolve_sweep
from spdf_jax.jobs import Request, sweep
from spdf_jax.jobs import train as jobs
from spdf_jax.report import write_report
from spdf_jax.sparsity.rules import OWN_RULES
from spdf_jax.training import provenance
from spdf_jax.training.provenance import (
    add_start,
    code_files,
    fingerprint_of_code,
    fingerprint_of_rule,
    own_rules,
    read_code,
    record_start,
)
from spdf_jax.workdir import write_json

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


def unresolved(text: Path):
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.steps, c.phases = 8, ("pretrain",)
    del c.finetune
    c.pretrain.sparsity.update(
        {"rule": "dense", **dict.fromkeys(("sparsity", "attention_start", "attention_end"), 0.0)}
    )
    c.pretrain.sparsity.update({"schedule": "constant", "attention_pattern": "causal", "attention_width": 128})
    c.pretrain.sparsity.update({"ramp_end": 0.1, "ultra_end": 0.75, "sparsify_head": False, "update_every_steps": 100})
    return c


def short(text: Path):
    return spdf.resolve(unresolved(text))


def starts(workdir: Path) -> list[dict]:
    return json.loads((workdir / "provenance.json").read_text())["starts"]


def test_every_start_is_kept_and_told(text, tmp_path, monkeypatch):
    config = short(text)
    jobs.train(config, tmp_path, command="first", progress=False)
    (first,) = starts(tmp_path)
    assert (first["step"], first["command"]) == (0, "first")
    assert first["packages"]["spdf_jax"] == spdf.__version__
    monkeypatch.setattr(provenance, "commit", lambda: "abc+")
    record_start(config, tmp_path, {}, "second", 4)
    assert [start["step"] for start in starts(tmp_path)] == [0, 4]
    page = write_report(tmp_path).read_text()
    assert re.search(r"Begun</th><td>20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC</td><td>spdf_jax ", page)
    assert re.search(r"Resumed once</th><td>[^<]+ UTC, after step 4</td><td>spdf_jax \S+ at commit abc\+, JAX ", page)


@pytest.mark.parametrize("harm", [None, b"{", b'{"other": 1}'])
def test_a_list_of_starts_that_is_gone_or_damaged_begins_anew(harm, text, tmp_path):
    if harm is not None:
        (tmp_path / "provenance.json").write_bytes(harm)
    record_start(short(text), tmp_path, {}, "again", 4)
    assert [start["step"] for start in starts(tmp_path)] == [4]


def test_a_rule_that_has_changed_since_the_last_start_is_said(tmp_path, capsys):
    for step, code, said in ((0, "a", 0), (4, "a", 0), (8, "b", 1), (9, "b", 0), (0, "c", 0)):
        add_start(tmp_path, "", step, {"mine": code})
        assert capsys.readouterr().out.count("the code of rule 'mine' has changed since the last start") == said


def test_code_is_the_same_whatever_its_comments_and_layout():
    same, too, other, broken, broken_otherwise = map(fingerprint_of_code, (
        b'def f(x):\n    """A."""\n    return x + 1\n', b"def f(x):  # b\n\n    return (x + 1)\n",
        b"def f(x):\n    return x + 2\n", b"def f(", b"def f(x",
    ))  # fmt: skip
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
    assert code_files(spdf.resolve(c), "") == {"test_provenance.py": Path(__file__)}
    assert OWN_RULES["rigl"] is not spdf.RULES["rigl"]


RULE = """import jax.numpy as jnp
import spdf_jax as spdf

def score(weights, grads):
    return jnp.abs(weights * grads)
"""


def with_rule(config, file: Path, content: str, monkeypatch):
    """The config with the rule that `content` defines, executed and left in `file`."""
    file.write_text(content)
    scope: dict = {}
    exec(compile(content, str(file), "exec"), scope)
    monkeypatch.setitem(spdf.RULES, "mine", spdf.Rule(gradient_share=0.5, drop_score=scope["score"]))
    c = config.copy_and_resolve_references()
    c.pretrain.sparsity.update({"rule": "mine", "sparsity": 0.5, "update_every_steps": 2})
    return spdf.resolve(c)


@pytest.fixture
def nothing_saved(monkeypatch):
    """Runs that end before they have taken a step."""
    monkeypatch.setattr(jobs, "run_phase", lambda run, plan, state: state)
    monkeypatch.setattr(jobs, "_finish", lambda *_: {})


def test_what_is_refused_is_refused_before_the_plan_is_said(text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs.processes, "guard", lambda: None)
    monkeypatch.setattr(jobs, "keep_compiled", lambda data: None)
    config = with_rule(unresolved(text), tmp_path / "rule.py", RULE, monkeypatch)

    def said(config, workdir):
        with pytest.raises(spdf.InputError) as caught:
            jobs.run(config, Request(workdir))
        assert re.fullmatch(r"Running tiny, variant test, on .*\n", capsys.readouterr().out)
        return str(caught.value)

    used = tmp_path / "used"
    (used / "checkpoints" / "4").mkdir(parents=True)
    (used / "code").mkdir()
    write_json(used / "config.json", config.as_dict())
    (used / "code" / "rule.py").write_text(RULE.replace("*", "+"))
    assert "rule.py: has changed since this run began" in said(config, used)
    other, elsewhere, narrow = (unresolved(text) for _ in range(3))
    other.seed, elsewhere.data.path, narrow.model.vocab_size = 1, str(tmp_path / "none"), 200
    assert "holds a run of another config" in said(spdf.resolve(other), used)
    assert "none" in said(spdf.resolve(elsewhere), tmp_path / "new")
    assert "at or over config.model.vocab_size 200" in said(spdf.resolve(narrow), tmp_path / "new")


def test_the_code_that_is_kept_is_what_ran_and_nothing_of_it_holds_a_run_that_saved_nothing(
    text, tmp_path, monkeypatch, nothing_saved
):
    workdir, file, load = tmp_path / "run", tmp_path / "rule.py", jobs.load_data
    config = with_rule(unresolved(text), file, RULE, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(
            jobs, "load_data", lambda *a, **k: file.write_text("edited while data was read") and load(*a, **k)
        )
        jobs.train(config, workdir, progress=False)
    assert (workdir / "code" / "rule.py").read_text() == RULE
    (first,) = starts(workdir)[0]["rules"].values()

    corrected = RULE.replace("*", "+")
    file = tmp_path / "corrected.py"
    config = with_rule(unresolved(text), file, corrected, monkeypatch)
    jobs.train(config, workdir, progress=False)
    assert {path.name: path.read_text() for path in (workdir / "code").iterdir()} == {"corrected.py": corrected}
    assert starts(workdir)[0]["rules"].keys() == {"mine"}
    assert first not in starts(workdir)[0]["rules"].values()

    (workdir / "checkpoints" / "4").mkdir(parents=True)
    for name in ("corrected.py", "of_another_name.py"):
        config = with_rule(unresolved(text), tmp_path / name, RULE, monkeypatch)
        with pytest.raises(spdf.InputError, match=f"{name}: has changed since this run began, and rule 'mine' of it"):
            jobs.train(config, workdir, progress=False)


def test_a_run_that_goes_on_by_its_workdir_alone_keeps_its_code_and_its_command(
    text, tmp_path, monkeypatch, nothing_saved, capsys
):
    monkeypatch.setattr(jobs.processes, "guard", lambda: None)
    monkeypatch.setattr(jobs, "keep_compiled", lambda data: None)
    file, workdir = tmp_path / "mine.py", tmp_path / "run"
    file.write_text("as it began\n")
    config = short(text)
    alone = Request(workdir, file=saved.__file__, command="main --workdir run")
    jobs.train(config, workdir, command="main --config mine.py", file=file, progress=False)
    file.write_text("as it is now\n")
    jobs.run(config, alone)
    assert {path.name: path.read_text() for path in (workdir / "code").iterdir()} == {"mine.py": "as it began\n"}
    assert json.loads((workdir / "config.json").read_text())["command"] == "main --config mine.py"
    assert [start["command"] for start in starts(workdir)] == ["main --config mine.py"]
    assert "has changed" not in capsys.readouterr().out

    # Kept code is compared, not executed: a rule of the run's own is not to be taken for the library's of its name.
    kept = (workdir / "provenance.json").read_bytes()
    write_json(workdir / "provenance.json", {"starts": [{"rules": {"rigl": "a hash"}}]})
    with pytest.raises(
        spdf.InputError, match="rule 'rigl' of this run is of a file of its own; give what began it: main "
    ):
        jobs.run(config, alone)
    for harmed in (b"", kept.replace(b"mine.py", b"your.py"), None):
        (workdir / "provenance.json").unlink()
        if harmed is not None:
            (workdir / "provenance.json").write_bytes(harmed)
        with pytest.raises(spdf.InputError, match="give what began it: main --config "):
            jobs.run(config, alone)
        (workdir / "provenance.json").touch()


def test_cells_of_a_sweep_keep_the_code_that_it_began_with(text, tmp_path, monkeypatch):
    file = tmp_path / "sweep.py"
    file.write_text("before = 1\n")
    cells, seen = {}, []
    for name in "ab":
        cells[name] = unresolved(text)
    table = {"rows": [("row", [("", "a"), ("", "b")])], "columns": [("loss", "summary.val_loss", ".3f", False, "")]}
    config = spdf.sweep_config("s", "v", variants=("v",), title="t", cells=cells, **table)

    def train_with(cell, folder, code, **_):
        seen.append(code["sweep.py"].content)
        file.write_text("after = 2\n")
        return {"val_loss": 1.0}

    monkeypatch.setattr(sweep, "train_with", train_with)
    monkeypatch.setattr(sweep, "write_table", lambda *_: None)
    monkeypatch.setattr(sweep, "_row", lambda *_: {})
    sweep.train_cells(resolve_sweep(config), tmp_path / "w", file=str(file), progress=False)
    assert seen == [b"before = 1\n"] * 2


def test_an_experiment_file_that_is_not_there_is_refused_before_anything_is_left(text, tmp_path):
    with pytest.raises(spdf.InputError, match=r"none\.py: the experiment's file cannot be read"):
        spdf.train(short(text), tmp_path / "run", file=tmp_path / "none.py")
    assert not (tmp_path / "run").exists()


def test_a_rules_fingerprint_is_of_its_numbers_and_its_code(tmp_path, text, monkeypatch):
    found = []
    for content, how in (
        (RULE, {}),
        (RULE + "\n# more\n", {}),
        (RULE.replace("*", "+"), {}),
        (RULE, {"drop_fraction": 0.1}),
    ):
        config = with_rule(unresolved(text), tmp_path / "rule.py", content, monkeypatch)
        monkeypatch.setitem(spdf.RULES, "mine", spdf.RULES["mine"]._replace(**how))
        found.append(fingerprint_of_rule("mine", read_code(config, "")))
        assert found[-1] == fingerprint_of_rule("mine", {})  # as `spdf_jax.fit` takes it
    assert found[0] == found[1]
    assert len(set(found)) == 3


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


@pytest.mark.slow
def test_a_run_goes_on_by_its_workdir_alone_and_ends_with_the_same_bits(experiment, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    began = ["--config", f"{experiment}:theirs", "--config.loop.checkpoint_every_steps=4"]
    assert command(*began, "--workdir", str(whole)).returncode == 0
    shutil.copytree(whole, cut)
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "8")
    experiment.unlink()  # it is kept

    result = command("--workdir", str(cut))
    assert (result.returncode, result.stderr) == (0, "")
    assert "resuming after step 4 of 8" in result.stdout
    assert "VARIANT" not in result.stdout
    ours, theirs = (jax.tree.leaves(spdf.saved_run(workdir).state.params) for workdir in (cut, whole))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    for name in ("code/mine.py", "config.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    assert [start["step"] for start in starts(cut)] == [0, 4]
    result = command("--workdir", str(cut))
    assert (result.returncode, result.stderr) == (0, "")
    assert "this run is finished" in result.stdout
