"""Every kind of file that a run reads, cut, zeroed, flipped, emptied, replaced, deep or huge: the right result, or one line.

What is refused is an `InputError` (exit 2), and no file is touched by it.
"""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_faults import ROOT, short
from tiny import drawn_params, needs_mount, write_text
from tokenizers import Tokenizer

import spdf_jax as spdf
from spdf_jax import main
from spdf_jax.config.run import RunConfig
from spdf_jax.data import load_tokenizer, prepare
from spdf_jax.errors import Restart
from spdf_jax.huggingface import load_model, save_model
from spdf_jax.jobs import train as jobs
from spdf_jax.processes import RESTART_CODE
from spdf_jax.report.records import read_run
from spdf_jax.report.study_records import read_study
from spdf_jax.report.sweep_records import read_sweep
from spdf_jax.sparsity.mask_files import load_masks, save_masks
from spdf_jax.sparsity.masks import init_masks
from spdf_jax.training.restore import saved_run
from spdf_jax.workdir import write_json

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")

HUGE_BYTES = 1 << 40


def flipped(content: bytes, foreign: bytes) -> bytes:
    rng, changed = random.Random(len(content)), bytearray(content)
    for _ in range(3):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


#: What happens to a file: its new content from the old and from the same file of another run.
HARMS: dict[str, Callable[[bytes, bytes], bytes]] = {
    "cut": lambda content, _: content[: len(content) // 2],
    "cut by one": lambda content, _: content[:-1],
    "zeroed": lambda content, _: bytes(len(content)),
    "flipped": flipped,
    "emptied": lambda _content, _foreign: b"",
    "another's": lambda _, foreign: foreign,
    "a list": lambda _content, _foreign: b"[1, 2]",
    "deep": lambda _content, _foreign: b'{"a":' * 100_000,
    "huge": lambda content, _: content,  # and then zeros, to `HUGE_BYTES` or as said, that take no room
    "gone": lambda content, _: content,
}


def harm(file: Path, how: str, foreign: bytes, huge_bytes: int = HUGE_BYTES) -> None:
    file.write_bytes(HARMS[how](file.read_bytes(), foreign))
    if how == "huge":
        os.truncate(file, huge_bytes)
    if how == "gone":
        file.unlink()


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Size and beginning of every file; what no one may change."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"]
    return {str(p.relative_to(folder)): (p.stat().st_size, beginning(p)) for p in files}


def beginning(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(1 << 20)


def digest(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(jax.device_get(tree))]


def outcome(read: Callable[[], Any], folder: Path, what: str) -> Any:
    """What is read, or None where it is refused as it should be; any other exception is a fault."""
    before = contents(folder)
    try:
        return read()
    except spdf.InputError as error:
        said = str(error)
    assert "\n" not in said, what
    assert len(said) < 1500, what
    assert contents(folder) == before, what
    return None


def assert_right_or_one_line(read: Callable[[], Any], right: Any, folder: Path, what: str) -> None:
    assert outcome(read, folder, what) in (None, right), what


# --- files of a run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="module")
def runs(text, tmp_path_factory):
    """Two finished runs, alike but for the seed, with what evaluation leaves."""
    folders = []
    for seed in (0, 1):
        c = short(text)
        c.seed, c.loop.checkpoint_every_steps = seed, 6
        folder = tmp_path_factory.mktemp("runs") / str(seed)
        jobs.train(spdf.resolve(c), folder, progress=False)
        write_json(folder / "evaluation.json", {"step": 12, "val_loss": 4.0 + seed, "bleu": 30.0 + seed})
        row = {"context": "c\u2028d", "text": f"line\x85{seed}", "references": ["r"]}
        (folder / "generations.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
        folders.append(folder)
    return folders


def recorded(folder: Path) -> str:
    """All that a report is made of, but for the checkpoints' names: copies go without."""
    return repr(dataclasses.replace(read_run(folder), saved_step=0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "evaluation.json", "config.json", "mask_pictures"])
def test_records_are_read_right_or_refused(name, runs, tmp_path):
    run, other = runs
    right = recorded(run)
    file = next(run.glob(f"{name}/*"), run / name).relative_to(run)
    for how in HARMS:
        if how in ("gone", "another's") and name != "metrics.jsonl":
            continue  # a record may be absent; and one of a run is as good as that of another
        folder = tmp_path / how.replace(" ", "_")
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
        harm(folder / file, how, (other / file).read_bytes())
        assert_right_or_one_line(lambda folder=folder: recorded(folder), right, folder, f"{name} {how}")


def test_generations_are_read_by_line_feeds_alone_or_refused(runs, tmp_path):
    run, other = runs
    assert read_run(run).generations[0]["context"] == "c\u2028d"
    assert read_run(run).generations[0]["text"] == "line\x850"
    for how in set(HARMS) - {"gone", "another's", "flipped"}:
        folder = tmp_path / how.replace(" ", "_")
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
        harm(folder / "generations.jsonl", how, (other / "generations.jsonl").read_bytes())
        found = outcome(lambda folder=folder: recorded(folder), folder, how)
        assert found in (None, recorded(run)) or how == "emptied", how


def test_a_table_is_read_right_or_refused(runs, tmp_path):
    run, _ = runs
    cells = {"a": {"summary": json.loads((run / "summary.json").read_text())}}
    row = {"row": "r", "choice": "", "groups": {"": ["a"]}, "cells": cells}
    row |= {"values": {"loss": {"mean": 1.0, "deviation": 0.0, "seeds": 1}}}
    right = None
    for how in (None, *HARMS):
        if how in ("gone", "another's"):
            continue
        folder = tmp_path / str(how).replace(" ", "_")
        shutil.copytree(run, folder / "cells" / "a", ignore=shutil.ignore_patterns("checkpoints"))
        write_json(folder / "table.json", {"title": "t", "remark": "", "rows": [row]})
        if how is None:
            right = repr(read_sweep(folder))
            continue
        harm(folder / "table.json", how, b"")
        assert_right_or_one_line(lambda folder=folder: repr(read_sweep(folder)), right, folder, f"table.json {how}")


def test_the_record_of_a_study_is_read_right_or_refused(tmp_path):
    row = {"row": "dense, 10 steps", "method": "dense", "group": "", "choice": "rate 1", "tried": {"rate 1": "a-0"}}
    row |= {"cells": ["a-1", "a-2"], "weights": 9, "sparsity": 0.0}
    cells = {
        f"a-{seed}": {"val_loss": 4.0 + seed, "tokens": 100, "train_flops": 5, "seconds": 1.0} for seed in range(3)
    }
    facts = {"measure": "summary.val_loss", "reference": "dense", "unit": "nats/token", "title": "t", "answers": []}
    right = None
    for how in (None, *HARMS):
        if how in ("gone", "another's"):
            continue
        file = tmp_path / f"{how}.json".replace(" ", "_")
        write_json(file, facts | {"rows": [row], "cells": cells})
        if how is None:
            right = repr(read_study(file))
            continue
        harm(file, how, b"")
        assert_right_or_one_line(lambda file=file: repr(read_study(file)), right, file, f"study.json {how}")


def checkpoint_files(run: Path) -> list[Path]:
    files = [p.relative_to(run) for p in sorted((run / "checkpoints" / "12").rglob("*")) if p.is_file()]
    return [*files, Path("config.json"), Path("metrics.jsonl")]


def resumed(config: RunConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[bytes]]:
    """Step and state of the run that starts again, before it takes its first step."""
    states = []
    monkeypatch.setattr(jobs, "run_phase", lambda run, plan, state: states.append(state) or state)
    monkeypatch.setattr(jobs, "_finish", lambda *_: {})
    jobs.train(config, folder, progress=False)
    monkeypatch.undo()
    (state,) = states
    return int(state.step), digest(state.replace(key=jax.random.key_data(state.key)))


@pytest.mark.slow
def test_a_run_starts_again_from_a_state_that_it_was_in_or_is_refused(runs, text, tmp_path, monkeypatch):
    """Every file that a start reads. A damaged checkpoint makes way for the one before it, and is kept."""
    run, other = runs
    c = short(text)
    c.loop.checkpoint_every_steps = 6
    config = spdf.resolve(c)
    kept = shutil.ignore_patterns("summary.json", "report.html", "tensorboard", "4")
    right = {}
    for step in (6, 12):
        folder = tmp_path / str(step)
        shutil.copytree(run, folder, ignore=kept)
        if step == 6:
            shutil.rmtree(folder / "checkpoints" / "12")
        right[step] = resumed(config, folder, monkeypatch)
        shutil.rmtree(folder)
    files, rows = checkpoint_files(run), (run / "metrics.jsonl").read_bytes()
    others = sorted(p for p in (other / "checkpoints" / "12").rglob("*") if p.is_file())
    folder = tmp_path / "harmed"
    for how in HARMS:
        for file in files:
            what = f"{file} {how}"
            shutil.copytree(run, folder, ignore=kept)
            same = [p for p in others if p.relative_to(other) == file]
            harm(
                folder / file,
                how,
                (same or [other / file.name if file.parent == Path() else others[0]])[0].read_bytes(),
                1 << 28,
            )
            before = contents(folder)
            found = outcome(lambda: resumed(config, folder, monkeypatch), folder, what)
            monkeypatch.undo()
            if found is not None:
                step, state = found
                assert (step, state) == right[step], what
                there = list(contents(folder).values())
                changed = [name for name, content in before.items() if content not in there]
                changed = [name for name in changed if name != "provenance.json"]  # has another start
                # Rows after the step are logged again, and what follows the rows that a checkpoint counts on is none.
                grown = (step, str(file), how) == (12, "metrics.jsonl", "huge")
                assert changed == [] or (changed == ["metrics.jsonl"] and (step == 6 or grown)), what
                found_rows = (folder / "metrics.jsonl").read_bytes()
                assert rows.startswith(found_rows), what
                assert found_rows == rows or step == 6 or how == "gone", what
            shutil.rmtree(folder)


# --- files of others --------------------------------------------------------------------------------------------------


def test_a_token_cache_gives_the_tokens_that_were_cached(text, tmp_path):
    config = short(text).data
    data = spdf.resolve(short(text)).data
    other = write_text(tmp_path / "other")
    (other / "train.txt").write_text("another text\n" * 200)
    spdf_data = type(data)
    made = {}
    for name, path in (("ours", text), ("theirs", other)):
        values = dict(config.items()) | {"path": str(path), "cache_dir": str(tmp_path / name)}
        made[name] = spdf_data(**values)
        prepare(made[name], progress=False)
    (ours,) = (p for p in (tmp_path / "ours").iterdir() if p.is_dir())
    (theirs,) = (p for p in (tmp_path / "theirs").iterdir() if p.is_dir())
    right = prepare(made["ours"], progress=False)
    for file in sorted(p.name for p in ours.iterdir()):
        for how in HARMS:
            harm(ours / file, how, (theirs / file).read_bytes())
            found = prepare(made["ours"], progress=False)
            np.testing.assert_array_equal(found.train, right.train, err_msg=f"{file} {how}")
            np.testing.assert_array_equal(found.validation, right.validation, err_msg=f"{file} {how}")
            assert found.tokenizer.to_str() == right.tokenizer.to_str()


def test_mask_files_are_read_right_or_refused(tmp_path):
    params = {"w": jnp.ones((16, 24)), "b": jnp.ones(3)}
    masks = [init_masks(jax.random.key(i), params, sparsity=0.5, filter=[("w", "matrix")]) for i in range(2)]
    for i in range(2):
        save_masks(tmp_path / f"{i}", masks[i])
    content, foreign = (tmp_path / "0").read_bytes(), b"{}" * 40
    file = tmp_path / "harmed" / "masks.safetensors"
    file.parent.mkdir()
    right = digest(masks[0])
    for seed in range(60):  # of many flips some hit the names, the shapes, the sizes
        rng, changed = random.Random(seed), bytearray(content)
        for _ in range(3):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        file.write_bytes(changed)
        assert_right_or_one_line(lambda: digest(load_masks(file, params)), right, file.parent, f"masks {seed}")
    for how in HARMS:
        file.write_bytes(content)
        harm(file, how, foreign)
        assert_right_or_one_line(lambda: digest(load_masks(file, params)), right, file.parent, f"masks {how}")


@pytest.mark.parametrize(
    ("leaf", "message"),
    [
        ({"shape": [4.0, 4.0], "crc32": 0}, r"whole numbers, not \(\(4.0, 4.0\), 0\)"),
        ({"shape": [4, 4], "crc32": "x"}, "whole numbers"),
        ({"shape": [4, True], "crc32": 0}, "whole numbers"),
        ({"shape": [-4, -4], "crc32": 0}, "whole numbers"),
        ({"shape": 4, "crc32": 0}, "not iterable"),
        ({"crc32": 0}, "KeyError 'shape'"),
    ],
)
def test_an_index_of_masks_that_someone_else_wrote_is_named(leaf, message, tmp_path):
    index = json.dumps({"version": 1, "leaves": {"w": leaf}})
    save_file({"w": np.zeros(2, np.uint8)}, tmp_path / "m", metadata={"spdf_jax.masks": index})
    with pytest.raises(spdf.InputError, match=rf"m: the mask file's index is damaged \(.*{message}"):
        load_masks(tmp_path / "m", {"w": jnp.ones((4, 4))})


@pytest.fixture(scope="module")
def gpt2(text, tmp_path_factory):
    """A folder as transformers writes it, and another, and their tokenizer."""
    folders = []
    data = prepare(spdf.resolve(short(text)).data, progress=False)
    for seed in (0, 1):
        config = spdf.GPTConfig(n_layer=1, n_head=2, d_model=8, vocab_size=300, context=8)
        params = drawn_params(config, seed)
        folder = tmp_path_factory.mktemp("gpt2") / str(seed)
        save_model(folder, config, params, tokenizer=data.tokenizer)
        folders.append(folder)
    return folders


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_files_of_a_hugging_face_folder_are_read_or_refused(name, gpt2, tmp_path):
    """Its format has no checksums: what is changed and still a model is read as what it says."""
    ours, other = gpt2
    for how in HARMS:
        folder = tmp_path / how.replace(" ", "_")
        shutil.copytree(ours, folder)
        harm(folder / name, how, (other / name).read_bytes())
        read = (
            (lambda f=folder: load_tokenizer(f / name))
            if name == "tokenizer.json"
            else (lambda f=folder: load_model(f))
        )
        before = contents(folder)
        outcome(read, folder, f"{name} {how}")
        assert contents(folder) == before, f"{name} {how}"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad, gpt2, tmp_path):
    shutil.copytree(gpt2[0], tmp_path / "f")
    tensors = load_file(tmp_path / "f" / "model.safetensors")
    tensors["transformer.h.0.mlp.c_fc.weight"] = np.full_like(tensors["transformer.h.0.mlp.c_fc.weight"], bad)
    save_file(tensors, tmp_path / "f" / "model.safetensors")
    with pytest.raises(spdf.InputError, match=r"h\.0\.mlp\.c_fc\.weight holds numbers that are not finite"):
        load_model(tmp_path / "f")


def changed_tokenizer(gpt2: list[Path], file: Path, path: str, value: Any) -> Path:
    content = json.loads((gpt2[0] / "tokenizer.json").read_text())
    *folders, last = path.split(".")
    found = content
    for folder in folders:
        found = found[folder]
    found[last] = value
    file.write_text(json.dumps(content))
    return file


def test_a_tokenizer_file_that_panics_or_cannot_encode_or_is_random_is_one_line(gpt2, tmp_path, capfd):
    file = tmp_path / "tokenizer.json"
    panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(BaseException, match="Precompiled") as caught:
        Tokenizer.from_file(str(changed_tokenizer(gpt2, file, "normalizer", panics)))
    assert not isinstance(caught.value, Exception)  # what the one place is for
    capfd.readouterr()
    with pytest.raises(spdf.InputError, match=r"not a Hugging Face tokenizer\.json \(Precompiled"):
        load_tokenizer(file)
    assert capfd.readouterr() == ("", "")
    changed_tokenizer(gpt2, file, "model", {"type": "Unigram", "unk_id": None, "vocab": [["", 0.0]]})
    with pytest.raises(spdf.InputError, match="unk_id"):
        load_tokenizer(file)
    changed_tokenizer(gpt2, file, "model.dropout", 0.1)
    with pytest.raises(spdf.InputError, match=r"drops merges at random \(dropout 0\.1\).*; set dropout to null"):
        load_tokenizer(file)


# --- where nothing can be written, or nobody listens ------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "Input/output error", "f"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "f"),
        OSError(errno.EROFS, "Read-only file system", "f"),
        FileNotFoundError(errno.ENOENT, "No such file", "f"),
        spdf.InputError("one\x1b[31m\u2028two\nthree"),
    ],
)
def test_every_refusal_is_one_line_and_2(error, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setattr(main, "_parse", fail)
    assert main.main(["main"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert said.rstrip("\n").isprintable()


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: jax.numpy.zeros((1 << 22, 1 << 22)).block_until_ready(),  # a device's 64 TiB
        lambda: np.ones((1 << 22, 1 << 22)),
    ],
    ids=["device", "host"],
)
def test_a_batch_that_no_memory_holds_is_one_line_and_2(allocate, monkeypatch, capsys):
    monkeypatch.setattr(main, "_parse", lambda _: allocate())
    assert main.main(["main"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory (")
    assert "raise config.PHASE.grad_accumulation_steps or lower batch_size" in said
    assert said.count("\n") == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("number", [errno.EIO, errno.EDQUOT])
def test_a_commit_that_the_disk_refuses_is_an_os_error_and_the_run_goes_on_later(number, text, tmp_path, monkeypatch):
    """Both as Python raises it while a checkpoint is renamed, and as tensorstore says it."""
    from spdf_jax.training.checkpoint import Checkpoints

    checkpoints = Checkpoints(tmp_path)
    said = f"DATA_LOSS: Error writing x: {os.strerror(number)} [os_error_code='{number}'] [source locations='...']"
    for error in (ValueError(said), OSError(number, os.strerror(number))):
        with pytest.raises(OSError, match=os.strerror(number)) as caught, checkpoints._disk_named():
            raise error
        assert (caught.value.errno, caught.value.filename) == (number, str(tmp_path))
    checkpoints.close()


def test_a_save_that_the_clock_ends_is_one_line_and_75(text, tmp_path, monkeypatch, capsys):
    def late(_manager):
        raise TimeoutError("the clock was set")

    monkeypatch.setattr("spdf_jax.training.checkpoint.ocp.CheckpointManager.wait_until_finished", late)
    monkeypatch.setattr(main, "_parse", lambda _: None)
    monkeypatch.setattr(main, "_run", lambda *_: jobs.train(spdf.resolve(short(text)), tmp_path, progress=False))
    assert main.main(["main"]) == RESTART_CODE
    said = capsys.readouterr().err
    assert said.startswith(f"{tmp_path}/checkpoints: a save took too long, or the clock was set meanwhile; ")
    assert said.endswith("; the same command resumes\n")
    assert said.count("\n") == 1


def started(text: Path, workdir: Path, shell: str) -> subprocess.CompletedProcess:
    run = f"{sys.executable} -m spdf_jax.main --config tests/tiny_experiment.py --workdir {workdir}"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "TINY_TEXT": str(text), "TINY_FEW_MATRICES": "1"}
    few = "--config.pretrain.steps=60 --config.finetune.steps=4"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", shell.format(run=f"{run} {few}")],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["{run} | head -1", "{run} >&-"])
def test_a_run_that_nobody_listens_to_runs(shell, text, tmp_path):
    result = started(text, tmp_path, shell)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "finished"


@pytest.mark.slow
@needs_mount
def test_checkpoints_that_turn_read_only_end_the_run_with_one_line(text, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    late = (
        f"(while [ ! -s {tmp_path}/metrics.jsonl ]; do sleep 0.05; done; mount -o remount,ro {tmp_path}/checkpoints) &"
    )
    shell = f"unshare -rm sh -c 'mount -t tmpfs tmpfs {tmp_path}/checkpoints; {late} exec {{run}} --quiet'"
    result = started(text, tmp_path, shell)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Read-only file system; what was saved before is intact" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(runs, text, tmp_path, monkeypatch):
    """Years ahead and back, now and then. orbax fails a save under way, which ends the run; the same command goes on."""
    import time

    rng, seconds, offset = random.Random(0), time.time, [0.0]

    def jumping() -> float:
        if rng.random() < 0.02:
            offset[0] = rng.choice([-1e8, 0, 1e8])
        return seconds() + offset[0]

    monkeypatch.setattr(time, "time", jumping)
    monkeypatch.setattr(time, "time_ns", lambda: int(jumping() * 1e9))
    c = short(text)
    c.loop.checkpoint_every_steps = 6
    for _ in range(20):
        with contextlib.suppress(Restart):
            jobs.train(spdf.resolve(c), tmp_path)
            break
    ours, theirs = (digest(saved_run(folder).state.params) for folder in (tmp_path, runs[0]))
    assert ours == theirs
