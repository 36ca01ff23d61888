"""One run, one identity: every job takes the model, the tokenizer and the data of the run, wherever they lie by now."""

import errno
import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import tiny_config, write_text
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import spdf_jax as spdf
from spdf_jax import processes
from spdf_jax.data import DataConfig, load_tokenizer, prepare
from spdf_jax.data import corpus as corpora
from spdf_jax.errors import Restart
from spdf_jax.jobs import keep_compiled
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.circuit import circuits
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.jobs.generate import generate_text
from spdf_jax.training.feed import load_data
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan
from spdf_jax.workdir import lock, read_json

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def one_phase(text: Path, steps: int = 2) -> ConfigDict:
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("finetune",)
    del c["pretrain"]
    c.finetune.steps, c.model.n_layer = steps, 1
    return c


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert spdf.train(one_phase(text), str(workdir), progress=False)["steps"] == 2
    return workdir


def files(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


JOBS = {
    "circuit": circuits,
    "evaluate": evaluate_checkpoint,
    "export": export,
    "generate": lambda config, workdir: generate_text(config, workdir, "mask"),
    "train": lambda config, workdir: jobs.train(config, workdir, progress=False),
}
OTHERS = {
    "n_head": (lambda c: setattr(c.model, "n_head", 4), "model.n_head was 2, is 4"),
    "activation": (
        lambda c: setattr(c.model, "activation", "squared_relu"),
        "model.activation was 'gelu', is 'squared_relu'",
    ),
    "layer_norm_eps": (lambda c: setattr(c.model, "layer_norm_eps", 0.1), "model.layer_norm_eps was 1e-05, is 0.1"),
    "rate": (
        lambda c: setattr(c.finetune.optimizer, "peak_learning_rate", 1.0),
        "finetune.optimizer.peak_learning_rate was 0.01, is 1.0",
    ),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("other", OTHERS)
def test_every_job_refuses_another_config_in_the_same_words(job, other, text, trained):
    change, what = OTHERS[other]
    c, before = one_phase(text), files(trained)
    change(c)
    with pytest.raises(spdf.InputError) as caught:
        JOBS[job](spdf.resolve(c), trained)
    assert str(caught.value) == (
        f"workdir {trained}: holds a run of another config ({what}); choose another --workdir, or give the config of that run"
    )
    assert files(trained) == before


@pytest.mark.parametrize("job", [job for job in JOBS if job != "train"])
def test_a_job_on_a_workdir_without_a_run_is_refused_and_makes_no_folder(job, text, tmp_path):
    workdir = tmp_path / "misspelt"
    with pytest.raises(
        spdf.InputError, match="misspelt/checkpoints: no checkpoint there; train first with --job train"
    ):
        JOBS[job](spdf.resolve(one_phase(text)), workdir)
    assert not workdir.exists()


def test_the_same_settings_under_another_name_are_the_same_run(text, trained, capsys):
    c, before = one_phase(text), files(trained)
    c.experiment, c.variant, c.variants = "finetune", "e2e", ("e2e",)
    assert spdf.train(c, trained, progress=False)["variant"] == "test"
    assert "this run is finished" in capsys.readouterr().out
    c.seed = 1
    with pytest.raises(spdf.InputError, match=r"\(experiment was 'tiny', is 'finetune'; seed was 0, is 1; variant was"):
        spdf.train(c, trained, progress=False)
    assert files(trained) == before


# --- the tokenizer -------------------------------------------------------------------------------------------------------


def test_evaluate_takes_the_tokenizer_of_the_run_on_whatever_text(text, trained, tmp_path, capsys):
    own = evaluate_checkpoint(spdf.resolve(one_phase(text)), trained, tmp_path / "own")
    assert own["val_loss"] == pytest.approx(read_metrics(trained)[-1]["val_loss"], abs=1e-6)
    assert "data" not in own
    moved = tmp_path / "text"
    shutil.copytree(text, moved)
    c = one_phase(text)
    c.data.path = str(moved)
    assert evaluate_checkpoint(spdf.resolve(c), trained, tmp_path / "moved") == own
    (moved / "train.txt").write_text("quite another text, of which another tokenizer would be made " * 50)
    capsys.readouterr()
    other = evaluate_checkpoint(spdf.resolve(c), trained, tmp_path / "other")
    assert other.pop("data") == "other than the run was trained with"
    assert other == own, "it is the same validation text"
    assert "These figures are of other than the run was trained with" in capsys.readouterr().out


def test_of_a_run_of_tasks_evaluate_needs_no_text_at_all(text, trained, tmp_path):
    c = one_phase(text)
    c.init_from, c.finetune.task.name, c.model.context = str(trained), "restaurant", 32
    config = spdf.resolve(c)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(trained / "tokenizer.json", run)
    c.data.path, c.init_from = str(tmp_path / "gone"), str(tmp_path / "gone, too")
    for one in (config, spdf.resolve(c)):
        tokens, tokenizer = load_data(one, run, make_plan(one), progress=False)
        assert tokens is None
        assert tokenizer.to_str() == load_tokenizer(trained / "tokenizer.json").to_str()


def test_another_tokenizer_is_refused_wherever_it_is_given(text, trained, tmp_path):
    c = one_phase(text)
    c.data.tokenizer = str(tmp_path / "tokenizer.json")
    shutil.copy(trained / "tokenizer.json", tmp_path)
    assert evaluate_checkpoint(spdf.resolve(c), trained, tmp_path / "same")["step"] == 2
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["abc abd"], vocab_size=260, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save(c.data.tokenizer)
    with pytest.raises(spdf.InputError, match=r"config\.data\.tokenizer: '.*' is not the tokenizer of the run in "):
        evaluate_checkpoint(spdf.resolve(c), trained, tmp_path / "another")
    assert not (tmp_path / "another" / "evaluation.json").exists()


def as_vocab_and_merges(tokenizer: Path, folder: Path) -> None:
    """The files of GPT-2's own release, in the place of ``tokenizer.json``."""
    Tokenizer.from_file(str(tokenizer)).model.save(str(folder))
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").unlink(missing_ok=True)


TEXT = "mask weight\n\n sparse <|endoftext|> dense 'tis  wörld\t12345 "


def test_vocab_and_merges_are_read_as_what_they_were_written_from(trained, tmp_path):
    as_vocab_and_merges(trained / "tokenizer.json", tmp_path)
    ours, theirs = load_tokenizer(tmp_path), load_tokenizer(trained / "tokenizer.json")
    assert ours.encode(TEXT).ids == theirs.encode(TEXT).ids
    assert ours.get_vocab() == theirs.get_vocab()
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(spdf.InputError, match=r"tokenizer .*: not a Hugging Face tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.slow
def test_vocab_and_merges_are_read_as_transformers_reads_them(trained, tmp_path):
    transformers = pytest.importorskip("transformers")
    as_vocab_and_merges(trained / "tokenizer.json", tmp_path)
    assert (
        load_tokenizer(tmp_path).encode(TEXT).ids
        == transformers.GPT2Tokenizer.from_pretrained(tmp_path)(TEXT).input_ids
    )


def test_init_from_brings_its_tokenizer_or_is_refused(text, trained, tmp_path):
    config = spdf.resolve(one_phase(text))
    folder = export(config, trained, tmp_path / "gpt2")
    as_vocab_and_merges(trained / "tokenizer.json", folder)
    c = one_phase(text)
    c.init_from, c.data.tokenizer_vocab_size = str(folder), 290
    plans = make_plan(config)

    def loaded(c):
        return load_data(spdf.resolve(c), tmp_path / "new", plans, begun=False, progress=False)

    expected, _ = load_data(config, trained, plans, progress=False)
    np.testing.assert_array_equal(loaded(c)[0].train, expected.train)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    for run in (folder, tmp_path / "run"):
        (run / "checkpoints").mkdir(parents=True)  # a folder that says nothing of its tokenizer, or a run's
        c.init_from = str(run)
        with pytest.raises(
            spdf.InputError, match=r"config\.data\.tokenizer: .*, where this run starts from, holds none"
        ):
            loaded(c)
    c.data.tokenizer = str(trained / "tokenizer.json")
    np.testing.assert_array_equal(loaded(c)[0].train, expected.train)
    c.data.tokenizer, c.data.source, c.data.path = "", "token_files", str(tmp_path)
    for name in ("train.bin", "val.bin"):
        np.arange(50, dtype=np.uint16).tofile(tmp_path / name)
    assert loaded(c)[1] is None, "ids need none"


def test_tokens_of_a_trained_tokenizer_are_found_by_the_tokenizer_too(text, trained):
    cache = text.parent / "cache"
    before = {p.name for p in cache.iterdir()}
    data = spdf.resolve(one_phase(text)).data
    DataConfig(**{**vars(data), "tokenizer": str(trained)})
    found = prepare(DataConfig(**{**vars(data), "tokenizer": str(trained)}), progress=False)
    assert found.fingerprint == prepare(data, progress=False).fingerprint
    assert {p.name for p in cache.iterdir()} == before


@pytest.mark.slow
def test_a_run_on_the_library_of_another_python_is_refused_with_the_way_out(text, tmp_path, monkeypatch):
    """As Python 3.11's run is by 3.13: here a library is a share of this one's files."""
    walk, c = corpora.walk, one_phase(text, steps=4)
    c.data.source, c.data.path, c.data.validation_fraction = "embedded", "", 0.5
    monkeypatch.setattr(corpora, "walk", lambda root, skip: list(walk(root, skip=skip))[::50])
    monkeypatch.setattr(processes, "preempted", lambda step: step == 2)
    with pytest.raises(Restart):
        jobs.train(spdf.resolve(c), tmp_path, progress=False)
    monkeypatch.setattr(corpora, "walk", lambda root, skip: list(walk(root, skip=skip))[::40])
    with pytest.raises(
        spdf.InputError, match=r"fingerprint .* go on with the Python that it began with: its library is"
    ):
        jobs.train(spdf.resolve(c), tmp_path, progress=False)


# --- places --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_data_tokenizer_and_source_may_move_while_a_run_rests(text, trained, tmp_path, monkeypatch):
    """All three at once; what lies in the new places is told by its content."""
    source, moved, run = tmp_path / "source", tmp_path / "moved", tmp_path / "run"
    shutil.copytree(trained, source)
    shutil.copytree(text, moved)
    c = one_phase(moved, steps=4)
    c.data.cache_dir, c.init_from, c.data.tokenizer = str(text.parent / "cache"), str(source), str(source)
    monkeypatch.setattr(processes, "preempted", lambda step: step == 2)
    with pytest.raises(Restart):
        jobs.train(spdf.resolve(c), run, progress=False)
    monkeypatch.undo()
    source, moved = source.rename(tmp_path / "source there"), moved.rename(tmp_path / "data there")
    c.data.path, c.init_from, c.data.tokenizer = str(moved), str(source), str(source / "tokenizer.json")
    saved, before = dict(c.data), files(run)

    c.init_from = str(tmp_path / "nowhere")
    with pytest.raises(spdf.InputError, match=r"config\.init_from: '.*nowhere' is neither a run's workdir nor"):
        jobs.train(spdf.resolve(c), run, progress=False)
    c.init_from = str(run)
    with pytest.raises(spdf.InputError, match=r"config\.init_from: '.*run' does not hold what this run started from"):
        jobs.train(spdf.resolve(c), run, progress=False)
    c.init_from, c.data.path = str(source), str(write_text(tmp_path / "other"))
    (tmp_path / "other" / "train.txt").write_text("of something else")
    with pytest.raises(spdf.InputError, match=r"config\.data: the data is not what this run was trained on so far"):
        jobs.train(spdf.resolve(c), run, progress=False)
    assert {p: b for p, b in files(run).items() if p.name != ".lock"} == {
        p: b for p, b in before.items() if p.name != ".lock"
    }

    c.data.update(saved)
    shutil.rmtree(source / "checkpoints" / "2" / "record")  # nobody asks for it where the place is as it was
    shutil.rmtree(source)
    c.init_from = str(tmp_path / "source")
    summary = jobs.train(spdf.resolve(c), run, progress=False)
    assert summary["steps"] == 4
    assert summary["before"]["val_loss"] == json.loads((trained / "summary.json").read_text())["val_loss"]
    c.data.path = str(text)  # finished: the same data in a third place
    assert jobs.train(spdf.resolve(c), run, progress=False) == summary
    c.data.path = str(tmp_path / "other")
    with pytest.raises(spdf.InputError, match=r"config\.data: the data is not what this run was trained on so far"):
        jobs.train(spdf.resolve(c), run, progress=False)


def test_the_cost_of_the_run_before_is_read_before_anything_is_trained(text, trained, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    c = one_phase(text)
    c.init_from = str(source)
    for foreign in ('{"score": 1}', "", "[]", '{"train_flops": "many"}'):
        (source / "summary.json").write_text(foreign)
        with pytest.raises(spdf.InputError, match=r"summary\.json: .*; delete it, and train there"):
            jobs.train(spdf.resolve(c), tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- disks and users -----------------------------------------------------------------------------------------------------


def test_a_disk_without_locks_is_not_another_run(tmp_path, monkeypatch, capsys):
    def refused(number):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(fcntl, "flock", refused(errno.ENOSYS))
    with lock(tmp_path):
        assert capsys.readouterr().out == (
            f"workdir {tmp_path}: its disk has no locks (Function not implemented); see that no other run uses it\n"
        )
    for number in (errno.EAGAIN, errno.EWOULDBLOCK):
        monkeypatch.setattr(fcntl, "flock", refused(number))
        with pytest.raises(spdf.InputError, match="another run is using it"), lock(tmp_path):
            pass
    monkeypatch.setattr(fcntl, "flock", refused(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"), lock(tmp_path):
        pass


def test_a_user_without_a_home_needs_one_for_nothing_but_the_cache(text, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    there = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        keep_compiled(DataConfig())
        assert jax.config.values["jax_compilation_cache_dir"] is None
    finally:
        jax.config.update("jax_compilation_cache_dir", there)
    with pytest.raises(
        spdf.InputError, match=r"data\.cache_dir: this user has no home folder; set config\.data\.cache_dir"
    ):
        prepare(DataConfig(source="text", path=str(text)), progress=False)


def test_a_workdir_that_cannot_be_written_is_used_from_another_folder(text, trained, tmp_path, monkeypatch):
    make = tempfile.TemporaryFile

    def read_only(dir):
        if Path(dir).is_relative_to(trained):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return make(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    config, before = spdf.resolve(one_phase(text)), files(trained)
    with monkeypatch.context() as patch:
        patch.setattr("spdf_jax.jobs.evaluate.evaluate", lambda *_: pytest.fail("measured before it was refused"))
        for job in (evaluate_checkpoint, export):
            with pytest.raises(spdf.InputError) as caught:
                job(config, trained)
            assert str(caught.value) == (
                f"{trained}: cannot write there (Read-only file system); choose another folder by --output"
            )
    result = evaluate_checkpoint(config, trained, tmp_path / "figures")
    assert read_json(tmp_path / "figures" / "evaluation.json", "") == result
    assert (export(config, trained, tmp_path / "gpt2") / "model.safetensors").is_file()
    assert files(trained) == before


def test_output_is_for_jobs_that_write_elsewhere(capsys):
    from test_main import MST, command

    result = command("--config", MST, "--job", "train", "--output", "x")
    assert (result.returncode, result.stderr) == (
        2,
        "error: --output: --job train writes into the --workdir; leave --output out\n",
    )
