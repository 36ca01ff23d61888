"""lm-eval on local files, without torch and without network; and what its tasks read."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import drawn_params

import spdf_jax as spdf
from spdf_jax.data.tokenizer import encode_plain, train_tokenizer
from spdf_jax.evals import harness as module
from spdf_jax.evals.harness import HarnessModel, run_harness
from spdf_jax.evals.likelihood import log_likelihoods, perplexity, rolling_log_likelihoods
from spdf_jax.evals.task_data import TASKS, write_task
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.model.generate import generate

TEXT = "to be or not to be, that is the question: whether it is nobler to bear the slings and arrows of fortune\n" * 3
REVIEWS = [("a fine film", "positive"), ("dull and long", "negative"), ("not to be missed", "1"), ("no arrows", 0)]
CLAIMS = [("it is the question", "it is", "entailment"), ("to be", "not to be", "not_entailment")]


def make(vocab_size=290):
    tokenizer = train_tokenizer([TEXT], vocab_size=vocab_size, progress=False)
    config = spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=vocab_size, context=64, init_std=0.3)
    return spdf.GPT(config), drawn_params(config, 1), tokenizer


def write_data(folder: Path) -> Path:
    """Every task's files, in each of the formats somewhere."""
    (folder / "lambada.jsonl").write_text(
        "".join(json.dumps({"text": f"{line} be"}) + "\n" for line in ("to", "not to"))
    )
    (folder / "ptb.txt").write_text(TEXT)
    (folder / "wikitext.jsonl").write_text(json.dumps({"text": TEXT[:90]}) + "\n" + json.dumps({"text": "é to be"}))
    (folder / "one_billion_words.txt").write_text("to be or not\n\nit is the question\n")
    for name in ("sst2", "rte"):
        (folder / name).mkdir()
    for split in ("train", "dev"):
        rows = [json.dumps({"sentence": s, "label": label}) for s, label in REVIEWS]
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(rows))
        rows = ["\t".join(map(str, (i, *row))) for i, row in enumerate(CLAIMS)]
        (folder / "rte" / f"{split}.tsv").write_text("\n".join(["index\tsentence1\tsentence2\tlabel", *rows]))
    return folder


def written(folder: Path, name: str, split: str) -> list:
    return [json.loads(line) for line in (folder / name / f"{split}.jsonl").read_text().splitlines()]


def test_files_of_every_format_become_the_rows_that_tasks_read(tmp_path):
    data, out = write_data(tmp_path), tmp_path / "out"
    for name in TASKS:
        write_task(name, data, out)
    assert written(out, "lambada", "test") == [{"text": "to be"}, {"text": "not to be"}]
    assert written(out, "ptb", "test") == [{"text": TEXT}]
    assert written(out, "wikitext", "test") == [{"text": TEXT[:90]}, {"text": "é to be"}]
    assert [row["text"] for row in written(out, "one_billion_words", "test")] == ["to be or not", "it is the question"]
    assert [row["label"] for row in written(out, "sst2", "dev")] == [1, 0, 1, 0]
    assert written(out, "rte", "train")[1] == {"sentence1": "to be", "sentence2": "not to be", "label": 1}


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        (
            "lambada",
            "lambada.jsonl",
            None,
            "neither lambada.jsonl nor lambada.txt is there; task lambada reads one of them",
        ),
        ("ptb", "ptb.txt", b" \n", "holds nothing"),
        ("ptb", "ptb.txt", b"a\xff", "not UTF-8 at byte 1"),
        ("wikitext", "wikitext.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("wikitext", "wikitext.jsonl", b'{"page": "a"}', "line 1: must be an object or a row with text"),
        ("lambada", "lambada.txt", b"a b\nalone\n", "line 2: text 'alone' has one word"),
        (
            "sst2",
            "sst2/train.jsonl",
            b'{"sentence": "a", "label": "good"}',
            "label 'good' must be one of 0, 1, negative",
        ),
        (
            "rte",
            "rte/train.tsv",
            b"sentence1\tsentence2\tlabel\na\t\tentailment",
            "line 2: sentence2 '' must be a text",
        ),
        ("mnli", "x", None, "tasks: 'mnli' is unknown: use some of lambada, ptb"),
    ],
)
def test_bad_files_are_refused_with_the_place(tmp_path, name, file, content, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(spdf.InputError, match=message) as error:
        write_task(name, tmp_path, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_without_lm_eval_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "LM", object)
    with pytest.raises(spdf.InputError, match="not installed: pip install"):
        run_harness(*make(), ["ptb"], tmp_path)


@pytest.fixture(scope="module")
def lm():
    pytest.importorskip("lm_eval")
    return HarnessModel(*make(), batch_size=2)


def request(*args):
    return SimpleNamespace(args=args)


def test_continuations_are_the_decoders_cut_at_the_first_stop(lm):
    model, params, tokenizer = make()
    settings = {"max_gen_toks": 8, "do_sample": False, "temperature": 0.0}
    prompt = encode_plain(tokenizer, ["to be or"])
    (found,) = generate(model, params, prompt, DecodeConfig(max_new_tokens=8), end_tokens=[0])
    whole = tokenizer.decode(found.tokens)
    assert lm.generate_until([request("to be or", settings)]) == [whole]
    stop = whole[3]
    cut = whole[: whole.index(stop)]
    other = {**settings, "max_gen_toks": 3}
    texts = lm.generate_until(
        [
            request("to be or", {**settings, "until": [whole[-1] + "~", stop]}),
            request("to be or", other),
            request("to be or", {**settings, "until": stop}),
        ]
    )
    assert texts == [cut, tokenizer.decode(found.tokens[:3]), cut]


def test_contexts_too_long_or_empty_are_continued(lm):
    settings = {"max_gen_toks": 4}
    long, cut, empty = lm.generate_until([request(t, settings) for t in ("zz" + TEXT * 2, TEXT * 2, "")])
    assert long == cut
    assert isinstance(empty, str)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 5}, "generation_kwargs: top_k unknown: use some of do_sample"),
        ({"max_gen_toks": 64}, "decode.max_new_tokens: 64 leaves no room for a prompt"),
        ({"do_sample": True, "top_p": 2.0}, "decode.top_p: 2.0 must be above 0 and at most 1"),
    ],
)
def test_impossible_generation_settings_are_refused(lm, settings, message):
    with pytest.raises(spdf.InputError, match=message):
        lm.generate_until([request("to be", settings)])


def test_our_tokens_and_windows_are_lm_evals():
    pytest.importorskip("lm_eval")
    from lm_eval.utils import get_rolling_token_windows

    from spdf_jax.evals.likelihood import rolling_windows

    for count in (0, 1, 4, 5, 6, 23):
        for stride in (1, 3, 5):
            tokens = list(range(1, count + 1))
            theirs = get_rolling_token_windows(tokens, prefix_token=0, max_seq_len=5, context_len=5 - stride + 1)
            expected = [([*seen, scored[-1]], len(scored)) for seen, scored in theirs]
            ours = rolling_windows(tokens, end_of_text=0, seq_len=5, stride_tokens=stride)
            assert [(w.tokens.tolist(), w.scored_tokens) for w in ours] == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # lm-eval's and datasets' own
def test_every_task_runs_and_its_figures_are_ours(tmp_path):
    pytest.importorskip("lm_eval")
    model, params, tokenizer = make()
    scored = {"batch_size": 8, "end_of_text": 0}
    result = run_harness(model, params, tokenizer, TASKS, write_data(tmp_path), batch_size=4, num_fewshot=1)
    assert json.loads(json.dumps(result)) == result
    tasks = result["tasks"]

    texts = [TEXT]
    ours = perplexity(texts, rolling_log_likelihoods(model, params, tokenizer, texts, **scored))
    assert tasks["ptb"]["metrics"]["byte_perplexity"] == pytest.approx(ours.per_byte, rel=1e-4)
    assert tasks["ptb"]["metrics"]["bits_per_byte"] == pytest.approx(math.log2(ours.per_byte), rel=1e-4)

    pairs = [("to", " be"), ("not to", " be")]
    found = log_likelihoods(model, params, tokenizer, pairs, **scored)
    mean = sum(total for total, _, _ in found) / 2
    assert tasks["lambada"]["metrics"]["perplexity"] == pytest.approx(math.exp(-mean), rel=1e-4)
    assert tasks["lambada"]["metrics"]["acc"] == sum(greedy for _, _, greedy in found) / 2

    assert {name: task["samples"] for name, task in tasks.items()} == {
        "lambada": 2, "ptb": 1, "wikitext": 2, "one_billion_words": 2, "sst2": 4, "rte": 2,
    }  # fmt: skip
    assert {name for name, task in tasks.items() if task["num_fewshot"] == 1} == {"sst2", "rte"}


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_zero_shot_classification_is_the_likelier_label(tmp_path):
    pytest.importorskip("lm_eval")
    model, params, tokenizer = make()
    result = run_harness(model, params, tokenizer, ["sst2"], write_data(tmp_path), num_fewshot=0, limit=3)["tasks"][
        "sst2"
    ]
    right = 0
    for sentence, label in [(REVIEWS[0][0], 1), (REVIEWS[1][0], 0), (REVIEWS[2][0], 1)]:
        pairs = [(f"Review: {sentence}\nSentiment:", f" {word}") for word in ("negative", "positive")]
        found = log_likelihoods(model, params, tokenizer, pairs, batch_size=2, end_of_text=0)
        right += (found[1][0] > found[0][0]) == bool(label)
    assert (result["metrics"]["acc"], result["samples"], result["num_fewshot"]) == (pytest.approx(right / 3), 3, 0)


_ALONE = """
import importlib.machinery, socket, sys
from pathlib import Path

class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        absent = name.split(".")[0] in ("torch", "transformers", "tensorflow")
        return None if absent else super().find_spec(name, path, target)

sys.meta_path = [Finder if f is importlib.machinery.PathFinder else f for f in sys.meta_path]
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise AssertionError("the test itself does not hold torch back")

def refuse(*_, **__):
    raise AssertionError("the network was asked")

socket.socket.connect = socket.getaddrinfo = refuse
sys.path.insert(0, sys.argv[1])
from test_harness import make, run_harness
print(run_harness(*make(), ["ptb", "lambada"], Path(sys.argv[2]))["tasks"]["ptb"]["metrics"]["byte_perplexity"])
"""


@pytest.mark.slow
def test_it_needs_neither_torch_nor_network(tmp_path):
    pytest.importorskip("lm_eval")
    (data := tmp_path / "data").mkdir()
    command = [sys.executable, "-c", _ALONE, str(Path(__file__).parent), str(write_data(data))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model, params, tokenizer = make()
    found = rolling_log_likelihoods(model, params, tokenizer, [TEXT], batch_size=8, end_of_text=0)
    assert float(done.stdout.split()[-1]) == pytest.approx(perplexity([TEXT], found).per_byte, rel=1e-4)
