"""Circuits: found exactly in a model made by hand, not found where there is none, and put on a page."""

import csv
import itertools
import json
from difflib import SequenceMatcher

import jax
import numpy as np
import pytest
from report_folders import make_circuit_sweep
from tiny import drawn_params, tiny_config, write_text
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import spdf_jax as spdf
from spdf_jax.circuits.config import CircuitConfig
from spdf_jax.circuits.gates import NODE_PLACES, Measured, activations, find_circuit, mean_activations
from spdf_jax.circuits.graph import edges_of, joined, nodes_of, to_answers
from spdf_jax.circuits.pairs import TASKS, library_pairs, template_pairs
from spdf_jax.circuits.tasks import Prompts, prompts
from spdf_jax.data.corpus import Corpus
from spdf_jax.data.tokenizer import train_tokenizer
from spdf_jax.jobs import Request, report
from spdf_jax.jobs import circuit as job
from spdf_jax.jobs.circuit import graph_record, task_record
from spdf_jax.report import write_sweep_report
from spdf_jax.report.circuit import write_circuits
from spdf_jax.report.circuit_graph import name_of
from spdf_jax.workdir import read_json, write_json

#: Tokens of the model made by hand: the end of text, two quotes, words.
END, DOUBLE, SINGLE, WORD = 0, 1, 2, 3
SHAPE = spdf.GPTConfig(
    n_layer=2,
    n_head=2,
    d_model=8,
    d_ff=4,
    vocab_size=8,
    context=8,
    use_bias=False,
    norm="rms_norm",
    tied_head=False,
    activation="relu",
)
#: What it was made of, by place, layer and channel.
KNOWN = [
    ("attn_in", 0, 0),
    ("attn_v", 0, 5),
    ("attn_out", 0, 1),
    ("mlp_in", 1, 1),
    ("mlp_neuron", 1, 0),
    ("mlp_neuron", 1, 3),
    ("mlp_out", 1, 2),
]


def hand_made():
    """Layer 0 copies which quote there was from channel 0 of the residual to 1, layer 1 makes an answer of it in channel 2.

    Channel 7 is large, so that norms divide by nearly the same everywhere. All else computes, and moves no answer.
    """
    rng = np.random.default_rng(0)
    params = jax.tree.map(np.array, drawn_params(SHAPE))
    blocks = params["blocks"]
    for name in ("attn_q", "attn_k", "attn_v", "attn_o", "mlp_up", "mlp_down"):
        blocks[name]["kernel"] = np.zeros_like(blocks[name]["kernel"])
    wte = params["wte"]["embedding"] = np.zeros((8, 8), np.float32)
    params["wpe"]["embedding"] = np.zeros_like(params["wpe"]["embedding"])
    wte[:, 4] = rng.normal(size=8)  # what the words are, which nobody needs
    wte[:, 7] = 8
    wte[DOUBLE, 0], wte[SINGLE, 0] = 3, -3
    blocks["attn_v"]["kernel"][0, 0, 5] = 1
    blocks["attn_o"]["kernel"][0, 5, 1] = 8
    blocks["mlp_up"]["kernel"][1, 1, 0], blocks["mlp_up"]["kernel"][1, 1, 3] = 4, -4
    blocks["mlp_down"]["kernel"][1, 0, 2], blocks["mlp_down"]["kernel"][1, 3, 2] = 4, -4
    # Idle: from the words to channels that no answer is in.
    blocks["attn_v"]["kernel"][0, 4, 1], blocks["attn_o"]["kernel"][0, 1, 5] = 1, 1
    blocks["mlp_up"]["kernel"][0, 4, 2], blocks["mlp_down"]["kernel"][0, 2, 6] = 1, 1
    blocks["attn_q"]["kernel"][1, 4, 3] = blocks["attn_k"]["kernel"][1, 4, 3] = 0.1
    head = params["head"]["kernel"] = np.zeros((8, 8), np.float32)
    head[2, DOUBLE], head[2, SINGLE], head[7, WORD] = 4, -4, 1
    return params


def quotes(count=40, seed=0):
    """Pairs of an end of text, words with a quote among them; whatever of it was first wants to come again."""
    rng = np.random.default_rng(seed)
    tokens_P2T = np.full((count, 2, 6), END, np.int32)
    last_P2 = np.full((count, 2), 4, np.int32)
    for pair in tokens_P2T:
        pair[:, 1:5] = rng.integers(WORD, 8, 4)
        pair[:, rng.integers(1, 4)] = DOUBLE, SINGLE
    right_P2 = np.tile(np.array([DOUBLE, SINGLE], np.int32), (count, 1))
    return Prompts(tokens_P2T, last_P2, right_P2, right_P2[:, ::-1])


def text(seed=1):
    """Words, among which quotes are rare."""
    tokens_BT = np.random.default_rng(seed).integers(WORD, 8, (8, 8)).astype(np.int32)
    tokens_BT[0, 5], tokens_BT[1, 5] = DOUBLE, SINGLE
    return [tokens_BT]


HOW = CircuitConfig(search_steps=60, searches=1)


@pytest.fixture(scope="module")
def made():
    model, params = spdf.GPT(SHAPE), hand_made()
    means = mean_activations(model, params, text())
    return model, params, means, find_circuit(model, params, means, quotes(), HOW)


def test_the_known_circuit_of_a_model_made_by_hand_is_found_exactly(made):
    _, params, _, circuit = made
    nodes = nodes_of(circuit.gates)
    assert nodes == KNOWN
    assert [tuple(edge) for edge in edges_of(nodes, SHAPE, params)] == [
        (0, 1, 1),
        (1, 2, 8),
        (3, 4, 4),
        (3, 5, -4),
        (4, 6, 4),
        (5, 6, -4),
    ]
    assert joined(nodes, SHAPE) == [(2, 3)]
    assert [tuple(edge) for edge in to_answers(nodes, params, (DOUBLE, SINGLE))] == [(6, 0, 8)]
    losses = {which: one.loss for which, one in circuit.measured.items()}
    assert losses["whole"] < 0.01
    assert losses["alone"] < 0.01
    assert losses["without"] == pytest.approx(np.log(2), abs=1e-3), "as a coin"
    assert losses["nothing"] == pytest.approx(np.log(2), abs=1e-3)
    effects = [circuit.effects[place][layer, channel] for place, layer, channel in nodes]
    assert min(effects) > HOW.target_loss - losses["alone"], "it lacks none of them"


def test_it_is_the_same_again(made):
    model, params, means, circuit = made
    again = find_circuit(model, params, means, quotes(), HOW)
    assert again.curve == circuit.curve
    jax.tree.map(np.testing.assert_array_equal, again.gates, circuit.gates)


def test_a_node_that_is_off_is_its_mean_and_not_zero(made):
    model, params, means, _ = made
    (tokens_BT,) = text()
    channels = {place: mean_LF.shape for place, mean_LF in means.items()}
    assert channels["mlp_neuron"] == (2, 4)
    gates = {place: np.ones(shape, np.float32) for place, shape in channels.items()}
    gates["mlp_out"][1, 6] = 0
    blocks = {place: {"gate": gates[place], "mean": means[place]} for place in NODE_PLACES}
    _, seen = model.apply({"params": params, "circuit": {"blocks": blocks}}, tokens_BT, mutable=["places"])
    after_LBTF = seen["places"]["blocks"]["mlp_out"]
    before_LBTF = activations(model, params, tokens_BT)["mlp_out"]
    np.testing.assert_allclose(means["mlp_out"], before_LBTF.mean((1, 2)), rtol=1e-5, atol=1e-6)
    assert np.ptp(before_LBTF[0, ..., 6]) > 0.1
    np.testing.assert_allclose(after_LBTF[1, ..., 6], means["mlp_out"][1, 6], rtol=1e-6)
    np.testing.assert_array_equal(after_LBTF[0], before_LBTF[0])


def test_in_a_random_model_none_is_found_and_no_figure_looks_as_if(made):
    model, params = made[0], drawn_params(SHAPE, seed=3)
    task = quotes()._replace(pairs=[template("quote")] * 40)
    circuit = find_circuit(model, params, mean_activations(model, params, text()), task, HOW)
    assert circuit.gates is None
    record = task_record("quote", task, circuit, HOW.target_loss)
    assert not record["found"]
    assert "the whole model does not do it: its loss is 0.6" in record["why"]
    assert set(record["measured"]) == {"whole", "nothing"}
    assert "circuit" not in record
    assert min(loss for _, loss in record["curve"]) > 0.6


# --- prompts -------------------------------------------------------------------------------------------------------------


def template(name):
    return next(template_pairs(name, seed=0))


@pytest.mark.parametrize("name", TASKS)
def test_the_prompts_of_a_template_differ_in_one_place(name):
    for pair in itertools.islice(template_pairs(name, seed=1), 50):
        one, other = pair.prompts
        same = [a for a, *others in SequenceMatcher(None, one, other, autojunk=False).get_opcodes() if a == "equal"]
        assert len(same) == 2, "before and after"
        assert one != other
        assert pair.answers[0] != pair.answers[1]


LIBRARY = {
    "quote": ("def f(x):\n    y = 'some words'\n", 'def f(x):\n    y = "some words'),
    "bracket": ("y = f(x, 1)\nz = f(g(x))\n", "y = f(x, 1"),
    "call_depth": ("y = f(x, 1)\n", "y = f(x, 1"),
    "list_depth": ("y = [x, 1]\nz = y[1]\n", "y = [x, 1"),
    "set_or_string": ("  seen = ''\n  for x in y:\n    seen += x\n", "  seen = set()\n  for x in y:\n    seen"),
}


@pytest.mark.parametrize("name", TASKS)
def test_pairs_are_found_in_code(name):
    code, prompt = LIBRARY[name]
    (pair,) = library_pairs(name, iter([code, "not = python ("]))
    assert pair.prompts[0] == prompt
    assert pair.source == "library"


def test_what_is_no_single_token_is_left_out_and_too_few_are_refused():
    tokenizer = train_tokenizer(["a b c"] * 3, vocab_size=257, progress=False)
    code = ["x = f(abc)\n"]
    found = prompts("bracket", tokenizer, code, count=20, longest=24, seed=0)
    assert sorted({pair.source for pair in found.pairs}) == ["library", "template"]
    assert found.tokens_P2T.shape[:2] == (20, 2)
    assert found.tokens_P2T.shape[2] <= 24
    for row, pair in enumerate(found.pairs):
        for side in (0, 1):
            last = found.last_P2[row, side]
            ids = found.tokens_P2T[row, side, : last + 1]
            assert ids[0] == tokenizer.token_to_id("<|endoftext|>")
            assert pair.prompts[side].endswith(tokenizer.decode(ids[1:].tolist()))
            assert tokenizer.decode([found.right_P2[row, side]]) == pair.answers[side]
            assert found.wrong_P2[row, side] == found.right_P2[row, 1 - side]
    with pytest.raises(
        spdf.InputError, match=r"'call_depth': '\)' and '\)\)' are single tokens .* in 0 of .*; leave it out of"
    ):
        prompts("call_depth", tokenizer, code, count=20, longest=24, seed=0)


def test_an_unknown_task_is_answered_with_those_there_are():
    with pytest.raises(spdf.InputError, match=r"circuit.tasks: .*'quotes'.* 'set_or_string'; did you mean 'quote'"):
        CircuitConfig(tasks=("quotes",))


# --- the page ------------------------------------------------------------------------------------------------------------


def words():
    vocabulary = {"<|endoftext|>": 0, '"': 1, "'": 2} | {f"word{i}": i for i in range(3, 8)}
    return Tokenizer(WordLevel(vocabulary, unk_token="<|endoftext|>"))


def record_of(made):
    """As `circuit.json` has it: one task that is done, one that is not."""
    model, params, means, circuit = made
    task = quotes()._replace(pairs=[template("quote")] * 40)
    done = task_record("quote", task, circuit, HOW.target_loss)
    done["circuit"] = graph_record(model, params, means, text(), words(), task, circuit)
    failed = circuit._replace(
        gates=None, measured={w: Measured(0.7, 0.5) for w in ("whole", "nothing")}, curve=[(0, 0.7)]
    )
    tasks = {"quote": done, "bracket": task_record("bracket", task, failed, HOW.target_loss)}
    return {"name": "made: by hand", "step": 3, "nodes": 96, "target_loss": HOW.target_loss, "tasks": tasks}


def test_the_page_says_what_is_in_the_record_and_no_more(made, tmp_path, no_figures):
    record = record_of(made)
    write_json(tmp_path / "circuit.json", record)
    html = write_circuits(tmp_path).read_text()
    assert "7 of 96 nodes close a string with the quote that opened it." in html
    assert "bracket: not found, since the whole model does not do it: its loss is 0.700" in html
    for node in record["tasks"]["quote"]["circuit"]["nodes"]:
        assert f"<h3>{name_of(node)}</h3>" in html
        assert node["contexts"]
    assert record["tasks"]["quote"]["circuit"]["nodes"][0]["contexts"][0]["token"] in "\"'"
    assert "+8.00 value 5, layer 0" not in html.split("value 5, layer 0</h3>")[0].split("read by attention 0")[0]
    assert "From +8.00 value 5, layer 0." in html
    assert "To the first answer over the second: +8.00." in html
    assert html.count("<h2>bracket: ") == 2, "figures and curve, no drawing"
    assert (tmp_path / "figures" / "quote_the_circuit.csv").read_text().splitlines()[:2] == [
        "from,to,weight",
        '"read by attention 0, layer 0","value 5, layer 0",1.0',
    ]


@pytest.mark.parametrize("harm", ["{}", "[", '{"name": 1}'])
def test_a_record_that_was_harmed_is_refused(tmp_path, harm):
    (tmp_path / "circuit.json").write_text(harm)
    with pytest.raises(spdf.InputError, match=r"circuit.json: .*; make it again by --job circuit"):
        write_circuits(tmp_path)


def test_a_sweep_puts_sparse_circuits_beside_those_of_the_nearest_dense_run(tmp_path, no_figures):
    write_sweep_report(make_circuit_sweep(tmp_path))
    table = list(csv.DictReader((tmp_path / "figures" / "circuits_quote.csv").read_text().splitlines()))
    assert [(row["row"], row["nodes"], row["dense of nearest loss"], row["times as many"]) for row in table] == [
        ("1/2", "40", "dense", "3.0"),
        ("1/4", "10", "dense", "12.0"),
        ("dense", "120", "", ""),
    ]
    table = list(csv.DictReader((tmp_path / "figures" / "circuits_bracket.csv").read_text().splitlines()))
    assert [(row["its nodes"], row["times as many"]) for row in table] == [("", ""), ("", ""), ("", "")]
    assert table[2]["nodes"] == "", "it does not do the task"
    page = (tmp_path / "report.html").read_text()
    nearest = "“dense”, whose validation loss is nearest"
    assert f"Quote: 10 nodes do it in “1/4”, and 120, 12.0 times as many, in {nearest}. bracket: 10 nodes" in page
    assert f" in “1/4”; the whole of {nearest}, does not." in page
    assert "<td>40<small></small></td>" in page, "a count has no decimals"


def test_a_task_that_no_run_does_has_no_figure(tmp_path, no_figures):
    folder = make_circuit_sweep(tmp_path)
    table = json.loads((folder / "table.json").read_text())
    for row in table["rows"]:
        (cell,) = row["cells"].values()
        cell["circuit"] = {
            "bracket": {"whole": 0.6, "nothing": 0.7, "target_loss": 0.15, "curve": [[0, 0.7], [1000, 0.6]]}
        }
    write_json(folder / "table.json", table)
    write_sweep_report(folder)
    page = (tmp_path / "report.html").read_text()
    assert "Bracket: no weight-sparse run does it." in page
    assert (tmp_path / "figures" / "circuits_bracket.csv").exists()
    assert "nodes and task loss" not in page


# --- the job -------------------------------------------------------------------------------------------------------------


def one_phase(text):
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("finetune",)
    del c["pretrain"]
    c.finetune.steps, c.model.n_layer, c.circuit.pairs = 2, 1, 20
    return c


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, and a library of a few lines."""
    text = write_text(tmp_path_factory.mktemp("data") / "text")
    c, workdir = one_phase(text), tmp_path_factory.mktemp("run") / "run"
    spdf.train(c, str(workdir), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        few = Corpus("here", "", None, lambda split: iter(["x = 'abc'\n"] if split == "validation" else []))
        patch.setattr("spdf_jax.jobs.circuit.embedded_corpus", lambda fraction: few)
        yield c, workdir


@pytest.mark.slow
def test_the_job_looks_for_every_task_that_the_vocabulary_has(run, capsys, no_figures):
    c, workdir = run
    job.run(spdf.resolve(c), Request(workdir))
    said = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[1].split("'")[1] for line in said if line.startswith("left out: ")] == [
        "call_depth",
        "list_depth",
        "set_or_string",
    ]
    assert said[-1] == f"{workdir / 'circuit.html'}"
    record = read_json(workdir / "circuit.json", "")
    assert {name: task["found"] for name, task in record["tasks"].items()} == {"quote": False, "bracket": False}
    pairs = [json.loads(line) for line in (workdir / "circuit_pairs.jsonl").read_text().splitlines()]
    assert [pair["task"] for pair in pairs] == ["quote"] * 20 + ["bracket"] * 20
    assert [pair["source"] for pair in pairs].count("library") == 1
    (workdir / "circuit.html").unlink()
    report.run_recorded(Request(workdir))
    assert "No circuit was found" in (workdir / "circuit.html").read_text()


@pytest.mark.slow
def test_a_task_that_was_asked_for_and_cannot_be_is_refused_and_nothing_is_left(run, tmp_path):
    c, workdir = run
    with c.unlocked():
        asked = c.copy_and_resolve_references()
    asked.circuit.tasks = ("quote", "call_depth")
    with pytest.raises(spdf.InputError, match=r"circuit task 'call_depth': .* leave it out of config.circuit.tasks"):
        job.run(spdf.resolve(asked), Request(workdir, output=tmp_path / "there"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
