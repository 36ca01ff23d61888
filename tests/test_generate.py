"""Decoding against the plain model: argmax loops, exhaustive search, and a beam search written with lists."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from tiny import drawn_params

import spdf_jax as spdf
from spdf_jax.model import decoding
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.model.generate import generate
from spdf_jax.sharding import MeshConfig, make_mesh

CONFIG = spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=13, context=40, init_std=0.35)
MODEL = spdf.GPT(CONFIG)
PROMPTS = [[4], [1, 2, 3], [7, 7, 5, 0, 2, 11, 6], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9]]
END = 5
MAX_NEW = 10
repeats = jax.jit(decoding._repeats, static_argnums=(3, 4))


@functools.cache  # not where every worker imports it
def parameters():
    return drawn_params(CONFIG, 8)  # what goes on from the prompts repeats little, and ends late


def decode(prompts=PROMPTS, *, ends=(END,), mesh=None, **settings):
    return generate(
        MODEL, parameters(), prompts, DecodeConfig(max_new_tokens=MAX_NEW, **settings), end_tokens=ends, mesh=mesh
    )


@functools.lru_cache(None)
def next_log_probs(row):
    """From the model without a cache."""
    return np.asarray(_plain(parameters(), np.array([[*row, *[0] * (CONFIG.context - len(row))]])))[0, len(row) - 1]


@jax.jit
def _plain(params, tokens_BT):
    return jax.nn.log_softmax(MODEL.apply({"params": params}, tokens_BT))


def log_probability(prompt, tokens):
    return sum(next_log_probs((*prompt, *tokens[:i]))[token] for i, token in enumerate(tokens))


def repeated(row, n):
    """Whether the last n tokens are in the row before."""
    grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
    return n > 0 and bool(grams) and grams[-1] in grams[:-1]


def children(row, ngram, since):
    """(log-probability, token) of all that may follow, best first; n-grams count from `since` on."""
    log_probs = enumerate(next_log_probs(row))
    found = [(float(lp), token) for token, lp in log_probs if not repeated((*row[since:], token), ngram)]
    return sorted(found, key=lambda child: -child[0])


def greedy_reference(prompt, ngram=0, counts_prompt=False):
    row, total = tuple(prompt), 0.0
    for count in range(1, MAX_NEW + 1):
        lp, token = children(row, ngram, 0 if counts_prompt else len(prompt))[0]
        total += lp
        if token == END:
            return list(row[len(prompt) :]), total, count
        row = (*row, token)
    return list(row[len(prompt) :]), total, MAX_NEW


def beam_reference(prompt, beams, penalty, ngram=0, counts_prompt=False):
    """One prompt, with lists: 2N candidates, the best N of them may finish, the best N unfinished go on."""
    live, finished, since = [(0.0, tuple(prompt))], [], 0 if counts_prompt else len(prompt)
    for count in range(1, MAX_NEW + 1):
        candidates = [(total + lp, (*row, t)) for total, row in live for lp, t in children(row, ngram, since)]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * beams]
        over = [row[-1] == END or count == MAX_NEW for _, row in candidates]
        finished += [
            (total / count**penalty, row)
            for (total, row), stop in zip(candidates[:beams], over[:beams], strict=True)
            if stop
        ]
        finished = sorted(finished, key=lambda f: -f[0])[:beams]
        live = [c for c, stop in zip(candidates, over, strict=True) if not stop][:beams]
        if not live or (len(finished) == beams and live[0][0] / count**penalty <= finished[-1][0]):
            break
    score, row = finished[0]
    tokens = list(row[len(prompt) :])
    return (tokens[:-1] if tokens[-1] == END else tokens), score


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ngram", "counts_prompt"), [(0, False), pytest.param(2, True, marks=SLOW), pytest.param(2, False, marks=SLOW)]
)
def test_greedy_is_the_argmax_loop_of_the_plain_model_and_a_beam_of_one(ngram, counts_prompt):
    settings = {"no_repeat_ngram": ngram, "no_repeat_counts_prompt": counts_prompt, "length_penalty": 0.7}
    greedy, beam = decode(**settings), decode(method="beam", beam_size=1, **settings)
    for prompt, a, b in zip(PROMPTS, greedy, beam, strict=True):
        tokens, total, count = greedy_reference(prompt, ngram, counts_prompt)
        assert a.tokens == b.tokens == tokens
        np.testing.assert_allclose([a.log_probability, b.log_probability], total, rtol=1e-5)
        np.testing.assert_allclose([a.score, b.score], total / count**0.7, rtol=1e-5)


@pytest.mark.parametrize(
    ("beams", "penalty", "ngram", "counts_prompt"),
    [
        (3, 0.8, 2, False),
        *(pytest.param(*others, marks=SLOW) for others in [(4, 2.5, 0, False), (3, 0.8, 2, True), (2, 2.5, 0, False)]),
    ],
)
def test_beam_search_equals_one_with_lists(beams, penalty, ngram, counts_prompt):
    rng = np.random.default_rng(0)
    # Enough of them that some hang on the spare candidates and some on when a prompt's search stops.
    prompts = [rng.integers(0, CONFIG.vocab_size, rng.integers(1, 15)).tolist() for _ in range(16)]
    settings = {"no_repeat_ngram": ngram, "no_repeat_counts_prompt": counts_prompt}
    found = decode(prompts, method="beam", beam_size=beams, length_penalty=penalty, **settings)
    expected = [beam_reference(prompt, beams, penalty, ngram, counts_prompt) for prompt in prompts]
    assert [g.tokens for g in found] == [tokens for tokens, _ in expected]
    np.testing.assert_allclose([g.score for g in found], [score for _, score in expected], rtol=1e-5)


@pytest.mark.parametrize("penalty", [2.0, pytest.param(0.0, marks=SLOW)])
def test_a_beam_as_wide_as_all_sequences_is_exhaustive_search(penalty):
    config = dataclasses.replace(CONFIG, vocab_size=4)
    model, limit, end, prompt = spdf.GPT(config), 4, 3, [0, 2]
    params = drawn_params(config)
    rows_RT = np.array([(*prompt, *tail) for tail in itertools.product(range(4), repeat=limit)])
    log_probs_RTV = np.asarray(
        jax.jit(lambda rows_RT: jax.nn.log_softmax(model.apply({"params": params}, rows_RT)))(rows_RT), np.float64
    )
    best = {}
    for row, log_probs_TV in zip(rows_RT, log_probs_RTV, strict=True):
        tail = row[len(prompt) :].tolist()
        tail = tail[: tail.index(end) + 1] if end in tail else tail
        total = sum(log_probs_TV[len(prompt) - 1 + i, token] for i, token in enumerate(tail))
        best[tuple(tail)] = (total / len(tail) ** penalty, total)
    assert len(best) == 121  # 1 + 3 + 9 that end before the limit, 27 * 4 at it
    tail = max(best, key=best.get)
    settings = DecodeConfig(method="beam", max_new_tokens=limit, beam_size=128, length_penalty=penalty)
    (found,) = generate(model, params, [prompt], settings, end_tokens=[end])
    assert found.tokens == [token for token in tail if token != end]
    assert (found.score, found.log_probability) == pytest.approx(best[tail], rel=1e-5)


def test_the_end_token_ends_and_is_counted_but_not_returned():
    free = decode(ends=())
    assert [len(g.tokens) for g in free] == [MAX_NEW] * 4
    end = free[0].tokens[4]
    ended = decode(ends=(end,), length_penalty=2.0)
    cuts = [g.tokens.index(end) if end in g.tokens else MAX_NEW for g in free]
    assert {0 < cuts[0] <= 4, MAX_NEW in cuts} == {True}
    for prompt, cut, a, b in zip(PROMPTS, cuts, free, ended, strict=True):
        assert b.tokens == a.tokens[:cut]
        total, count = log_probability(prompt, a.tokens[: cut + 1]), min(cut + 1, MAX_NEW)
        assert b.log_probability == pytest.approx(total, rel=1e-5)
        assert b.score == pytest.approx(total / count**2, rel=1e-5)


def test_an_end_token_that_comes_first_leaves_nothing():
    first = int(next_log_probs(tuple(PROMPTS[1])).argmax())
    found = decode(ends=(first,))[1]
    assert found.tokens == []
    assert found.log_probability == found.score
    assert found.score == pytest.approx(next_log_probs(tuple(PROMPTS[1]))[first], rel=1e-5)


def test_any_of_several_end_tokens_ends():
    tokens = decode(ends=())[0].tokens
    ends = (tokens[6], tokens[4])
    assert ends[0] != ends[1]
    assert decode(ends=ends)[0].tokens == tokens[: min(tokens.index(end) for end in ends)]


@pytest.mark.parametrize(
    ("method", "counts_prompt"),
    [
        ("beam", True),
        *(pytest.param(*others, marks=SLOW) for others in [("sample", False), ("sample", True), ("beam", False)]),
    ],
)
def test_no_ngram_comes_twice(method, counts_prompt):
    prompts = [[1], [1, 2, 1, 3], [0, 1, 2, 3, 4, 5, 6, 7, 8], [12, 12]]
    found = decode(prompts, ends=(), method=method, no_repeat_ngram=2, no_repeat_counts_prompt=counts_prompt)
    for prompt, g in zip(prompts, found, strict=True):
        pairs = list(itertools.pairwise(prompt + g.tokens if counts_prompt else g.tokens))
        assert len(g.tokens) == MAX_NEW
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize("method", ["greedy", pytest.param("beam", marks=SLOW)])
def test_a_copy_of_the_prompt_repeats_nothing(method):
    """What data-to-text is: a rule over n-grams of the prompt would forbid the names that the text must hold."""
    (free,) = decode([[1, 2, 3]], ends=(), method=method, beam_size=3)
    context = [*free.tokens, 1, 2, 3]
    (copied,) = decode([context], ends=(), method=method, beam_size=3)
    (ruled,) = decode([context], ends=(), method=method, beam_size=3, no_repeat_ngram=MAX_NEW)
    assert ruled == copied
    prompts = [list(range(13)), [2], [2], [2]]
    whole = decode(prompts, ends=(), method=method, beam_size=2, no_repeat_ngram=1)[0]
    assert len(set(whole.tokens)) == MAX_NEW, "every token is in the prompt, and may still be written once"


@pytest.mark.parametrize("method", ["beam", pytest.param("greedy", marks=SLOW)])
def test_where_every_token_would_repeat_there_is_no_continuation(method):
    prompts = [list(range(10)), [2], [2], [2]]
    settings = {"no_repeat_ngram": 1, "no_repeat_counts_prompt": True}
    stuck, free, _, _ = decode(prompts, ends=(), method=method, beam_size=2, **settings)
    assert stuck == ([], -np.inf, -np.inf)
    assert len(set(free.tokens)) == MAX_NEW


@pytest.mark.parametrize(
    ("row", "since", "n", "banned"),
    [
        ([1, 2, 3, 1, 2], 0, 1, {1, 2, 3}),
        ([1, 2, 3, 1, 2], 3, 1, {1, 2}),
        ([1, 2, 3, 1, 2], 0, 2, {3}),
        ([1, 2, 3, 1, 2], 1, 2, {3}),
        ([1, 2, 3, 1, 2], 2, 2, set()),
        ([1, 2, 3, 1, 2], 0, 3, {3}),
        ([1, 2, 3, 1, 2], 1, 3, set()),
        ([1, 2, 3, 1, 2], 0, 4, set()),
        ([1, 2, 3, 1, 2], 0, 9, set()),
        ([2, 2, 2], 0, 3, {2}),
        ([2, 2, 2], 1, 3, set()),
        ([0, 4, 0, 5, 0], 0, 2, {4, 5}),
        ([0, 4, 0, 5, 0], 2, 2, {5}),
        ([6], 0, 2, set()),
        ([6], 1, 1, set()),
    ],
)
def test_what_would_repeat_by_hand(row, since, n, banned):
    padded = np.array([[*row, *[1, 2, 3, 1, 2, 3][: 8 - len(row)]]])  # what follows the row has no say
    found_RV = repeats(padded, np.array([since]), np.array([len(row)]), n, 7)
    assert set(np.flatnonzero(found_RV[0])) == banned


def test_what_would_repeat_in_random_ragged_rows():
    rng = np.random.default_rng(0)
    tokens_RS, lengths_R = rng.integers(0, 3, (40, 12)), rng.integers(1, 13, 40)
    since_R = rng.integers(0, lengths_R + 1)
    for n in (1, 2, 3, 5):
        found_RV = repeats(tokens_RS, since_R, lengths_R, n, 3)
        rows = [tuple(row[a:b]) for row, a, b in zip(tokens_RS, since_R, lengths_R, strict=True)]
        expected = [[repeated((*row, t), n) for t in range(3)] for row in rows]
        np.testing.assert_array_equal(found_RV, expected)


@SLOW
@pytest.mark.parametrize("method", ["beam", "sample"])
def test_results_do_not_depend_on_the_batch(method):
    alone = decode(method=method, no_repeat_ngram=2)
    others = [[9, 9], PROMPTS[1], [3, 8, 8, 1], PROMPTS[3], [0] * 20, [12]]  # [0] * 20 is padded to another length
    among = decode(others, method=method, no_repeat_ngram=2, batch_size=3)
    for i in (1, 3):
        assert among[i].tokens == alone[i].tokens
        assert among[i].log_probability == pytest.approx(alone[i].log_probability, rel=1e-5)


@pytest.mark.slow
def test_results_come_in_the_order_of_the_prompts_whatever_their_lengths():
    prompts = [[1] * 20, [2], [3] * 17, [4, 4], [5] * 25, [6] * 16]
    for prompt, g in zip(prompts, decode(prompts, batch_size=2), strict=True):
        assert g.tokens == greedy_reference(prompt)[0]


def test_sampling_is_decided_by_the_seed_and_compiled_once():
    first = decode(method="sample", seed=1, no_repeat_ngram=2)
    programs = decoding.decode._cache_size()
    assert decode(method="sample", seed=1, no_repeat_ngram=2) == first
    assert [g.tokens for g in decode(method="sample", seed=2, no_repeat_ngram=2)] != [g.tokens for g in first]
    assert decoding.decode._cache_size() == programs


def test_the_same_prompt_twice_is_sampled_twice():
    found = decode([PROMPTS[1]] * 4, method="sample", no_repeat_ngram=2)
    assert len({tuple(g.tokens) for g in found}) > 1


@pytest.mark.parametrize(
    ("method", "mesh"),
    [pytest.param("sample", MeshConfig(2, 4), marks=SLOW), ("beam", MeshConfig(data=1, fsdp=2, tensor=2))],
)
def test_sharded_equals_unsharded(method, mesh):
    whole = decode(method=method, no_repeat_ngram=2)
    split = decode(method=method, no_repeat_ngram=2, mesh=make_mesh(mesh))
    assert [g.tokens for g in split] == [g.tokens for g in whole]
    np.testing.assert_allclose([g.score for g in split], [g.score for g in whole], rtol=1e-5)


def first_tokens(count, **settings):
    config = DecodeConfig(method="sample", max_new_tokens=1, batch_size=count, **settings)
    return np.array([g.tokens[0] for g in generate(MODEL, parameters(), [PROMPTS[1]] * count, config, end_tokens=())])


@pytest.mark.parametrize(("temperature", "top_p"), [pytest.param(2.0, 1.0, marks=SLOW), (1.5, 0.6)])
def test_sampling_follows_temperature_then_nucleus(temperature, top_p):
    count = 4000
    probs_V = np.exp(next_log_probs(tuple(PROMPTS[1])).astype(float) / temperature)
    probs_V /= probs_V.sum()
    order = np.argsort(-probs_V)
    size = int(np.searchsorted(np.cumsum(probs_V[order]), top_p - 1e-6)) + 1
    outside = order[size:]
    if top_p < 1:
        assert 1 < size < CONFIG.vocab_size  # the case cuts something off, and not everything
    probs_V[outside] = 0
    probs_V /= probs_V.sum()
    drawn_V = np.bincount(first_tokens(count, temperature=temperature, top_p=top_p), minlength=CONFIG.vocab_size)
    assert drawn_V[outside].sum() == 0
    sigma_V = np.sqrt(probs_V * (1 - probs_V) / count)
    np.testing.assert_array_less(np.abs(drawn_V / count - probs_V), 4.5 * sigma_V + 1e-9)


def test_hot_sampling_draws_anew_each_step_and_reports_the_models_own_log_probability():
    for prompt, g in zip(PROMPTS, decode(method="sample", temperature=1e4, ends=()), strict=True):
        assert len(set(g.tokens)) > 3  # one draw for all steps would give one token
        assert g.log_probability == pytest.approx(log_probability(prompt, g.tokens), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"temperature": 1e-4}, {"top_p": 1e-6}])
def test_cold_or_narrow_sampling_is_greedy(settings):
    assert [g.tokens for g in decode(method="sample", **settings)] == [g.tokens for g in decode()]


@pytest.mark.slow
def test_a_prompt_may_fill_the_context_but_for_the_new_tokens():
    prompt = [i % 13 for i in range(CONFIG.context - MAX_NEW)]
    (found,) = decode([prompt], ends=())
    assert len(found.tokens) == MAX_NEW
    for i, token in enumerate(found.tokens):
        assert token == next_log_probs((*prompt, *found.tokens[:i])).argmax()


def test_no_prompts_no_generations():
    assert decode([]) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "beams"}, "decode.method: 'beams' is not one of 'greedy', 'sample', 'beam'; did you mean 'beam'"),
        ({"max_new_tokens": 0}, "decode.max_new_tokens: 0 must be at least 1"),
        ({"beam_size": 0}, "decode.beam_size: 0 must be at least 1"),
        ({"no_repeat_ngram": -1}, "decode.no_repeat_ngram: -1 must be at least 0"),
        ({"batch_size": 0}, "decode.batch_size: 0 must be at least 1"),
        ({"seed": -1}, "decode.seed: -1 must be at least 0"),
        ({"length_penalty": float("nan")}, "decode.length_penalty: nan must be a finite number"),
        ({"temperature": 0.0}, "decode.temperature: 0.0 must be above 0"),
        ({"temperature": float("nan")}, "decode.temperature: nan"),
        ({"top_p": 0.0}, "decode.top_p: 0.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, "decode.top_p: 1.1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(spdf.InputError, match=message):
        DecodeConfig(**settings)


@pytest.mark.parametrize(
    ("prompts", "ends", "message"),
    [
        (
            [[1], []],
            [END],
            r"prompts\[1\]: 0 tokens, must be 1 to 30 \(model.context 40 less decode.max_new_tokens 10\)",
        ),
        ([[1] * 31], [END], r"prompts\[0\]: 31 tokens, must be 1 to 30"),
        ([[1, 13]], [END], r"prompts\[0\]: token 13 is outside the vocabulary, 0 to 12"),
        ([[-1]], [END], r"prompts\[0\]: token -1"),
        ([[1]], [13], "end_tokens: token 13"),
    ],
)
def test_impossible_prompts_are_refused(prompts, ends, message):
    with pytest.raises(spdf.InputError, match=message):
        decode(prompts, ends=ends)


def test_a_continuation_longer_than_the_context_is_refused():
    config = DecodeConfig(max_new_tokens=40)
    with pytest.raises(spdf.InputError, match=r"decode.max_new_tokens: 40 leaves no room .* use at most 39"):
        generate(MODEL, parameters(), [[1]], config, end_tokens=[])
