"""What ``--job evaluate`` measures besides perplexity: tasks of lm-eval and professional exams, as the config says."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from test_harness import write_data
from tiny import tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.config.read import load_config
from spdf_jax.data import load_tokenizer
from spdf_jax.evals import harness
from spdf_jax.evals.exam_questions import read_questions
from spdf_jax.evals.exams import exam_results, take_exams
from spdf_jax.evals.harness import run_harness
from spdf_jax.evals.likelihood import log_likelihoods
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.jobs.generate import generate_text
from spdf_jax.model.generate import Generation
from spdf_jax.training.feed import load_data
from spdf_jax.training.restore import saved_run
from spdf_jax.workdir import read_json, write_json

pytestmark = pytest.mark.usefixtures("no_figures")

QUESTIONS = [
    ("Weigher", "physics", "Which is it?", ["weight", "mask"], "A"),
    ("Weigher", "physics", "Which is not?", ["loss", "grow dense prune"], "B"),
    ("Reader", "language", "What comes next?", ["token", "step layer", "sparse"], 2),
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of two steps, its config, and the folder of both. It ends in sparse attention."""
    folder = tmp_path_factory.mktemp("evaluate")
    c = tiny_config(write_text(folder / "text"), folder / "cache")
    c.phases = ("finetune",)
    del c["pretrain"]
    c.finetune.steps, c.model.context, c.finetune.seq_len, c.model.init_std = 2, 64, 32, 0.3
    s = c.finetune.sparsity
    s.attention_pattern, s.attention_width, s.attention_start, s.attention_end = "local", 4, 0.5, 1.0
    jobs.train(spdf.resolve(c), folder / "run", progress=False)
    return c, folder / "run"


def asked(config, **evaluation):
    """The config with other values in its section ``evaluation``."""
    c = ConfigDict(config.to_dict())
    c.evaluation.update(evaluation)
    return spdf.resolve(c)


def write_questions(path: Path) -> Path:
    keys = ("certification", "field", "question", "choices", "answer")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in QUESTIONS))
    return path


def test_exams_of_a_file_are_sat_recorded_printed_and_shown(trained, tmp_path, capsys):
    config, workdir = trained
    path = write_questions(tmp_path / "exams.jsonl")
    plain = evaluate_checkpoint(spdf.resolve(config), workdir)
    assert not {"exams", "zero_shot"} & plain.keys()
    result = evaluate_checkpoint(asked(config, exams=True, exam_questions=str(path)), workdir)
    assert read_json(workdir / "evaluation.json", "") == result

    saved, tokenizer = saved_run(workdir), load_tokenizer(workdir / "tokenizer.json")
    state, model = saved.state, saved.model
    expected = exam_results(model, state.params, tokenizer, read_questions(path), batch_size=3)
    assert result == plain | {"exams": expected.as_dict() | {"questions_file": str(path)}}
    assert expected.table() in capsys.readouterr().out
    assert "<h2>Exams</h2>" in (workdir / "report.html").read_text()

    # The same run, whatever it is evaluated on.
    assert jobs.train(asked(config, exams=True), workdir, progress=False)["status"] == "finished"


def test_the_exams_are_our_own_by_default_in_the_mode_asked_for(trained, monkeypatch):
    sat = []

    def sit(model, params, tokenizer, questions, mode, **_):
        sat.append((questions, mode))
        return take_exams(questions, lambda pairs: [(0.0, 1)] * len(pairs), mode)  # always the first choice

    monkeypatch.setattr("spdf_jax.jobs.evaluate.exam_results", sit)
    config, workdir = trained
    result = evaluate_checkpoint(asked(config, exams=True, exam_mode="letter"), workdir)
    assert sat == [(read_questions(), "letter")]
    assert result["exams"]["overall"]["certifications"] == 12
    assert result["exams"]["questions_file"] == ""


@pytest.mark.slow
def test_a_run_is_used_with_the_attention_of_its_last_step(trained):
    config, workdir = trained
    saved, tokenizer = saved_run(workdir), load_tokenizer(workdir / "tokenizer.json")
    model, params = saved.model, saved.state.params
    assert (model.pattern, model.width) == ("local", 4)
    assert saved.plan.attention_after(1) == saved.plan.attention_after(0) == ("causal", 4)
    validation = json.loads((workdir / "summary.json").read_text())["val_loss"]
    assert evaluate_checkpoint(spdf.resolve(config), workdir)["val_loss"] == pytest.approx(validation, rel=1e-6)

    @functools.partial(jax.jit, static_argnames="pattern")
    def log_probs(ids, *, pattern):
        logits_BTV = spdf.GPT(model.config).apply({"params": params}, ids[None], pattern=pattern, width=4)
        return jax.nn.log_softmax(logits_BTV)[0]

    def by_hand(ids, pattern="local"):
        """Log-probabilities [T, V] of what follows each id."""
        return np.asarray(log_probs(np.array(ids + [0] * (48 - len(ids))), pattern=pattern))[: len(ids)]

    ids = tokenizer.encode("mask weight sparse dense grow prune step layer").ids
    ((total, count, _),) = log_likelihoods(
        model, params, tokenizer, [("mask weight sparse", " dense grow prune step layer")], batch_size=1, end_of_text=0
    )
    scored = range(len(ids) - 1 - count, len(ids) - 1)
    sparse, dense = (sum(by_hand(ids, pattern)[i, ids[i + 1]] for i in scored) for pattern in ("local", "causal"))
    assert total == pytest.approx(sparse, rel=1e-5)
    assert abs(total - dense) > 1e-2

    c = ConfigDict(config.to_dict())
    c.decode.method, c.decode.max_new_tokens = "greedy", 5
    text = generate_text(spdf.resolve(c), workdir, "mask weight sparse dense")
    row = tokenizer.encode("mask weight sparse dense").ids
    prompt = len(row)
    for _ in range(5):
        row.append(int(by_hand(row)[-1].argmax()))
    continuation = row[prompt:]
    assert text == tokenizer.decode(continuation[: [*continuation, 0].index(0)])

    with pytest.raises(
        spdf.InputError, match=r"ends in 'local' attention of width 4, which no exported model has; train a"
    ):
        export(spdf.resolve(config), workdir)
    assert not (workdir / "huggingface").exists()


def test_a_prompt_of_several_documents_is_continued_from_its_last(trained, monkeypatch):
    config, workdir = trained
    prompts = []

    def decode(model, params, given, *_, **__):
        prompts.extend(given)
        return [Generation((), 0.0, 0.0)]

    monkeypatch.setattr("spdf_jax.jobs.generate.generate", decode)
    generate_text(spdf.resolve(config), workdir, "mask<|endoftext|>weight")
    generate_text(spdf.resolve(config), workdir, "weight")
    first, second = prompts
    assert first == [0, *second]


BAD = {
    "unknown task": (
        {"tasks": ("lambda",), "data_dir": "."},
        r"config\.evaluation\.tasks: 'lambda' is not one of .*; did you mean 'lambada'",
    ),
    "tasks of nowhere": ({"tasks": ("ptb",)}, r"config\.evaluation\.data_dir: '' must name the folder with .* ptb"),
    "examples": ({"num_fewshot": -2}, r"config\.evaluation\.num_fewshot: -2 must be -1, or at least 0"),
    "mode": ({"exam_mode": "word"}, r"config\.evaluation\.exam_mode: 'word' is not one of 'length', 'letter'"),
    "no folder": ({"tasks": ("ptb",), "data_dir": "{tmp}/none"}, r"data_dir .*none: is not a folder"),
    "no file": ({"tasks": ("ptb",), "data_dir": "{tmp}"}, r"neither ptb\.jsonl nor ptb\.txt is there"),
    "no exams": ({"exams": True, "exam_questions": "{tmp}/none"}, r"exams .*none: cannot be read"),
    "bad line": ({"exams": True, "exam_questions": "{tmp}/bad.jsonl"}, r"exams .*bad\.jsonl: line 2: not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_before_anything_is_measured(case, trained, tmp_path, monkeypatch):
    values, message = BAD[case]
    if "tasks" in values and message.startswith(("data_dir", "neither")):
        pytest.importorskip("lm_eval")
    config, workdir = trained
    write_questions(tmp_path / "bad.jsonl")
    lines = (tmp_path / "bad.jsonl").read_text().splitlines()
    (tmp_path / "bad.jsonl").write_text("\n".join([lines[0], lines[1][:-1]]))
    before = {p: p.read_bytes() for p in workdir.glob("*.*") if p.is_file()}
    monkeypatch.setattr("spdf_jax.jobs.evaluate.evaluate", lambda *_: pytest.fail("measured before it was refused"))
    filled = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in values.items()}
    with pytest.raises(spdf.InputError, match=message):
        evaluate_checkpoint(asked(config, **filled), workdir)
    assert {p: p.read_bytes() for p in before} == before


def test_without_lm_eval_its_tasks_say_how_to_install_it(trained, tmp_path, monkeypatch):
    config, workdir = trained
    monkeypatch.setattr(harness, "LM", object)
    with pytest.raises(spdf.InputError, match=r"lm-eval, which is not installed: pip install -e '\.\[eval\]'"):
        evaluate_checkpoint(asked(config, tasks=("ptb",), data_dir=str(tmp_path)), workdir)


def test_token_files_without_a_tokenizer_cannot_be_examined(trained, monkeypatch):
    config, workdir = trained
    load = load_data
    monkeypatch.setattr("spdf_jax.jobs.evaluate.load_data", lambda *args, **options: (load(*args, **options)[0], None))
    with pytest.raises(
        spdf.InputError, match=r"config\.evaluation: needs the tokenizer, and token files came without one"
    ):
        evaluate_checkpoint(asked(config, exams=True), workdir)


def test_runs_from_before_there_was_the_section_stay_usable(trained, tmp_path):
    _, workdir = trained
    values = json.loads((workdir / "config.json").read_text())
    del values["evaluation"]
    write_json(tmp_path / "config.json", values)
    assert load_config(tmp_path / "config.json") == load_config(workdir / "config.json")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # lm-eval's and datasets' own
@pytest.mark.parametrize("num_fewshot", [-1, 1])
def test_tasks_of_lm_eval_are_run_recorded_printed_and_shown(num_fewshot, trained, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    config, workdir = trained
    c = asked(config, tasks=("ptb", "sst2"), data_dir=str(write_data(tmp_path)), num_fewshot=num_fewshot)
    c = dataclasses.replace(c, mesh=dataclasses.replace(c.mesh, data=2, fsdp=2))
    result = evaluate_checkpoint(c, workdir)
    assert read_json(workdir / "evaluation.json", "") == result
    assert list(result["zero_shot"]["tasks"]) == ["ptb", "sst2"]
    assert result["zero_shot"]["tasks"]["sst2"]["num_fewshot"] == (4 if num_fewshot < 0 else num_fewshot)

    saved, tokenizer = saved_run(workdir), load_tokenizer(workdir / "tokenizer.json")
    state, model = saved.state, saved.model
    alone = run_harness(model, state.params, tokenizer, ["ptb"], tmp_path)["tasks"]["ptb"]["metrics"]
    assert result["zero_shot"]["tasks"]["ptb"]["metrics"] == pytest.approx(alone, rel=1e-5)
    assert "| sst2 | acc | " in capsys.readouterr().out
    assert "<h2>Zero-shot</h2>" in (workdir / "report.html").read_text()
