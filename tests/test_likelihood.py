"""Log-likelihoods against the plain model, one token of one text at a time."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from tiny import drawn_params, slow_but

import spdf_jax as spdf
from spdf_jax.data import validation_batches
from spdf_jax.data.tokenizer import encode_plain, train_tokenizer
from spdf_jax.evals import likelihood as module
from spdf_jax.evals.exam_questions import Question
from spdf_jax.evals.exams import exam_results, take_exams
from spdf_jax.evals.likelihood import (
    log_likelihoods,
    perplexity,
    rolling_log_likelihoods,
    rolling_windows,
)
from spdf_jax.sharding import MeshConfig, make_mesh
from spdf_jax.training.step import eval_step

TEXT = "to be or not to be, that is the question: whether it is nobler to bear the slings and arrows of fortune\n" * 3
TOKENIZER = train_tokenizer([TEXT], vocab_size=290, progress=False)
SLOW = pytest.mark.slow
CONFIG = spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=290, context=24, init_std=0.3)
MODEL = spdf.GPT(CONFIG)
PAIRS = [
    ("to be", " or not"),
    ("", "to be"),
    ("to be ", "or not"),  # the blank moves over
    (" \n", "question"),  # nothing but blanks is an empty context
    (TEXT, " the question"),  # cut from the left
    ("arrows", " of fortune, that is"),
    ("slings and arrows", " é<|endoftext|>"),
]


@functools.cache  # not where every worker imports it
def parameters():
    return drawn_params(CONFIG)


def ids(text):
    return encode_plain(TOKENIZER, [text])[0]


@functools.lru_cache(None)
def next_log_probs(row):
    """Of the token after a row, from that row alone."""
    return np.asarray(_plain(parameters(), np.array([[*row, *[7] * (CONFIG.context - len(row))]])))[0, len(row) - 1]


@jax.jit
def _plain(params, tokens_BT):
    return jax.nn.log_softmax(MODEL.apply({"params": params}, tokens_BT))


def reference(context, continuation):
    kept = context.rstrip()
    whole, before = ids(context + continuation), ids(kept)
    stream = (0, *whole) if not kept else tuple(whole)
    total, greedy = 0.0, True
    for i in range(len(stream) - (len(whole) - len(before)), len(stream)):
        start = max(0, len(stream) - 1 - CONFIG.context)
        log_probs = next_log_probs(stream[start:i])
        total, greedy = total + float(log_probs[stream[i]]), greedy and log_probs.argmax() == stream[i]
    return total, len(whole) - len(before), greedy


def score(pairs=PAIRS, **settings):
    settings = {"batch_size": 4, "end_of_text": 0} | settings
    return log_likelihoods(MODEL, parameters(), TOKENIZER, pairs, **settings)


def rolling(texts, **settings):
    settings = {"batch_size": 4, "end_of_text": 0} | settings
    return rolling_log_likelihoods(MODEL, parameters(), TOKENIZER, texts, **settings)


def test_log_likelihoods_equal_the_plain_computation():
    found, expected = score(), [reference(*pair) for pair in PAIRS]
    np.testing.assert_allclose([f[0] for f in found], [e[0] for e in expected], rtol=1e-5)
    assert [f[1:] for f in found] == [e[1:] for e in expected]


def test_what_greedy_decoding_gives_is_greedy_and_nothing_else_is():
    row = tuple(ids("to be"))
    likeliest = int(next_log_probs(row).argmax())
    windows = [module.Window(np.array([*row, token], np.int32), 1) for token in (likeliest, (likeliest + 1) % 290)]
    assert [greedy for _, greedy in module._score_windows(MODEL, parameters(), windows, 2, None)] == [True, False]


def test_the_context_before_what_fits_has_no_say_and_the_rest_has():
    full = score([(TEXT, " the question")])[0][0]
    assert score([("XYZ" * 9 + TEXT, " the question")])[0][0] == pytest.approx(full, rel=1e-6)
    assert score([(TEXT[:-20], " the question")])[0][0] != pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("batch_size", slow_but([1], [1, 3, 64]))
def test_batch_size_changes_nothing(batch_size):
    np.testing.assert_allclose([f[0] for f in score(batch_size=batch_size)], [f[0] for f in score()], rtol=1e-5)


@pytest.mark.parametrize("mesh", [MeshConfig(data=2, fsdp=2, tensor=2), pytest.param(MeshConfig(data=8), marks=SLOW)])
def test_eight_devices_give_the_same_numbers(mesh):
    mesh = make_mesh(mesh)
    found, whole = score(mesh=mesh), score()
    np.testing.assert_allclose([f[0] for f in found], [f[0] for f in whole], rtol=1e-5)
    assert [f[1:] for f in found] == [f[1:] for f in whole]
    np.testing.assert_allclose(rolling([TEXT], mesh=mesh)[0][0], rolling([TEXT])[0][0], rtol=1e-5)


def test_few_programs():
    score([(TEXT[:n], " or") for n in range(60)])
    before = module._score._cache_size()
    score([(TEXT[:n], " not") for n in range(80)])
    assert module._score._cache_size() == before


def test_no_pairs_no_scores():
    assert score([]) == []
    assert rolling([]) == []


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("to be", ""), r"pairs\[1\]: continuation '' has 0 tokens of its own, must be 1 to model.context 24"),
        (("t", "o"), r"pairs\[1\]: continuation 'o' has 0 tokens of its own"),  # merged into the context's last
        (("to", TEXT), r"pairs\[1\]: continuation .* has \d\d+ tokens of its own, must be 1 to model.context 24"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, message):
    with pytest.raises(spdf.InputError, match=message):
        score([("to be", " or"), pair])


def test_a_tokenizer_of_another_model_is_refused():
    small = spdf.GPT(dataclasses.replace(CONFIG, vocab_size=50))
    with pytest.raises(spdf.InputError, match=r"token \d+ is outside the vocabulary, 0 to 49: use the model's own"):
        log_likelihoods(small, parameters(), TOKENIZER, PAIRS, batch_size=2, end_of_text=0)


def test_an_impossible_batch_size_or_stride_is_refused():
    with pytest.raises(spdf.InputError, match="batch_size: 0 must be at least 1"):
        score(batch_size=0)
    with pytest.raises(spdf.InputError, match="stride_tokens: 25 is outside 1 to 24"):
        rolling([TEXT], stride_tokens=25)


@pytest.mark.parametrize("stride", [0, 1, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 10, 23])
def test_windows_score_every_token_once_with_all_context_that_fits(count, stride):
    stream = list(range(100, 101 + count))
    covered = []
    for window in rolling_windows(stream[1:], end_of_text=100, seq_len=5, stride_tokens=stride):
        assert 1 <= window.scored_tokens < len(window.tokens) <= 6
        targets = window.tokens[len(window.tokens) - window.scored_tokens :].tolist()
        assert len(window.tokens) == min(6, targets[-1] - 100 + 1)  # reaches back as far as it can
        covered += targets
    assert covered == stream[1:]


def test_rolling_equals_the_plain_computation():
    tokens = ids(TEXT)
    assert len(tokens) % CONFIG.context  # the last window reaches back
    stream, total = (0, *tokens), 0.0
    for window in rolling_windows(tokens, end_of_text=0, seq_len=CONFIG.context, stride_tokens=10):
        row = tuple(window.tokens.tolist())
        total += sum(float(next_log_probs(row[:i])[row[i]]) for i in range(len(row) - window.scored_tokens, len(row)))
    assert rolling([TEXT], stride_tokens=10) == [(pytest.approx(total, rel=1e-5), len(stream) - 1)]


def test_texts_are_scored_each_by_itself():
    texts = [TEXT, "", "to be", TEXT[:100]]
    together, alone = rolling(texts), [rolling([text])[0] for text in texts]
    np.testing.assert_allclose([t for t, _ in together], [t for t, _ in alone], rtol=1e-5)
    assert [n for _, n in together] == [len(ids(text)) for text in texts]
    assert together[1] == (0.0, 0)


def test_rolling_perplexity_is_the_validation_perplexity_where_windows_coincide():
    text = next(t for n in range(100, len(TEXT)) if len(ids(t := TEXT[:n])) == 3 * CONFIG.context)
    ((total, count),) = rolling([text])
    evaluate = jax.jit(eval_step, static_argnums=0, static_argnames=("pattern", "width"))
    sums = [
        evaluate(MODEL, {"params": parameters()}, batch, pattern="causal", width=128)
        for batch in validation_batches(np.array([0, *ids(text)]), seq_len=CONFIG.context, batch_size=2)
    ]
    loss = sum(float(s) for s, _ in sums) / sum(float(w) for _, w in sums)
    assert perplexity([text], [(total, count)]).per_token == pytest.approx(math.exp(loss), rel=1e-4)


def test_perplexities_by_hand():
    found = perplexity(["a bé", " c\n"], [(-6.0, 3), (-2.0, 1)])
    assert found[3:] == (4, 3, 8)  # é takes two bytes
    assert found[:3] == (math.exp(8 / 4), math.exp(8 / 3), math.exp(8 / 8))
    assert perplexity(["x" * 500], [(-2000.0, 500)]).per_word == math.inf
    with pytest.raises(spdf.InputError, match="no word in 1 of them"):
        perplexity([" \n"], [(-1.0, 1)])


@pytest.mark.parametrize("mode", ["length", "letter"])
def test_exams_are_marked_by_the_models_likelihoods(mode):
    choices = ("to be", "the slings and arrows", "question")
    questions = [Question("Play", "stage", f"What is {word}?", choices, 0) for word in ("it", "that", "nobler")]

    def plain(pairs):
        return [reference(*pair)[:2] for pair in pairs]

    for answer in range(3):  # each answer right once, so that equal marks mean equal choices
        asked = [dataclasses.replace(q, answer=answer) for q in questions]
        found = exam_results(MODEL, parameters(), TOKENIZER, asked, mode, batch_size=4)
        assert found == take_exams(asked, plain, mode)
