"""Task batches: the loss counts target tokens only, every pair comes once an epoch, restarts and processes see the same."""

from collections import Counter
from itertools import islice

import jax
import numpy as np
import pytest

from spdf_jax.data import (
    END_OF_TEXT,
    Example,
    Pair,
    Task,
    decode_texts,
    encode_prompts,
    encode_task,
    length_buckets,
    steps_per_epoch,
    task_batches,
    task_validation_batches,
)
from spdf_jax.data.restaurant import restaurant_task
from spdf_jax.data.tokenizer import train_tokenizer
from spdf_jax.errors import InputError

END = 0  # the id of end of text in a tokenizer trained here


@pytest.fixture(scope="module")
def task() -> Task:
    return restaurant_task(train_examples=150, validation_examples=20, test_examples=20, seed=3)


@pytest.fixture(scope="module")
def tokenizer(task):
    texts = [text for example in task.train for text in (example.context, *example.references)]
    return train_tokenizer(texts, vocab_size=400, progress=False)


@pytest.fixture(scope="module")
def encoded(task, tokenizer):
    return encode_task(task, tokenizer, 256)


def one_example(context, *references) -> Task:
    return Task(*[(Example(context, references),)] * 3, style="e2e")


def make_pairs(count, seed=0, longest=200) -> list[Pair]:
    """Pairs whose first token is their number, from 1."""
    lengths = np.random.default_rng(seed).integers(4, longest + 1, count)
    return [Pair(np.full(length, n, np.int32), int(length) // 2) for n, length in enumerate(lengths, start=1)]


def numbers(batch) -> list[int]:
    """The pairs of a batch."""
    return [int(row[0]) for row, weights in zip(batch.tokens_BT, batch.weights_BT, strict=True) if weights.any()]


def assert_equal(batches, others):
    for batch, other in zip(batches, others, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)


# --- encoding ---


def test_every_pair_spells_context_end_target_end(task, tokenizer, encoded):
    pairs = iter(encoded.train)
    for example in task.train:
        for reference in example.references:
            tokens, start = next(pairs)
            assert tokens.dtype == np.int32
            assert tokenizer.decode(tokens[: start - 1].tolist()) == example.context
            assert tokens[start - 1] == tokens[-1] == END
            assert tokenizer.decode(tokens[start:-1].tolist()) == f" {reference}"
            assert np.count_nonzero(tokens == END) == 2
    assert next(pairs, None) is None
    assert (encoded.cut_contexts, encoded.cut_targets) == (0, 0)
    assert [len(split) for split in encoded[:3]] == [
        sum(len(example.references) for example in split) for split in task[:3]
    ]


def test_a_spelled_end_of_text_is_text_and_the_tokenizer_stays_as_it_was(tokenizer):
    spelled = one_example(f"a {END_OF_TEXT} b", f"c{END_OF_TEXT}")
    assert tokenizer.encode_special_tokens is False
    tokens, start = encode_task(spelled, tokenizer, 64).train[0]
    assert np.flatnonzero(tokens == END).tolist() == [start - 1, len(tokens) - 1]
    assert encode_prompts(spelled.test, tokenizer, max_tokens=64)[0] == tokens[:start].tolist()
    assert tokenizer.encode(END_OF_TEXT).ids == [END]


@pytest.mark.parametrize(
    ("seq_len", "expected", "start", "cut"),
    [
        (8, "abcd| xy|", 5, (0, 0)),
        (7, "abc| xy|", 4, (1, 0)),
        (5, "a| xy|", 2, (1, 0)),
        (4, "| xy|", 1, (1, 0)),
        (3, "| xy", 1, (1, 1)),
        (1, "| ", 1, (1, 1)),
    ],
)
def test_a_long_context_loses_its_end_then_the_target_does(seq_len, expected, start, cut):
    letters = train_tokenizer([], vocab_size=257, progress=False)
    encoded = encode_task(one_example("abcd", "xy"), letters, seq_len)
    (pair,) = encoded.train
    assert letters.decode(pair.tokens.tolist(), skip_special_tokens=False).replace(END_OF_TEXT, "|") == expected
    assert pair.target_start == start
    assert len(pair.tokens) <= seq_len + 1
    assert (encoded.cut_contexts, encoded.cut_targets) == (3 * cut[0], 3 * cut[1])


def test_prompts_are_the_context_part_of_pairs_and_decoding_inverts(task, tokenizer, encoded):
    prompts = encode_prompts(task.test, tokenizer, max_tokens=200)
    pairs = iter(encoded.test)
    for example, prompt in zip(task.test, prompts, strict=True):
        of_example = [next(pairs) for _ in example.references]
        assert all(pair.tokens[: pair.target_start].tolist() == prompt for pair in of_example)
        targets = [pair.tokens[pair.target_start :].tolist() for pair in of_example]
        assert decode_texts(targets, tokenizer) == list(example.references)
    shorter = encode_prompts(task.test, tokenizer, max_tokens=5)
    assert shorter == [[*prompt[:4], END] for prompt in prompts]
    assert decode_texts([[], [END]], tokenizer) == ["", ""]


# --- one batch ---


def test_weights_are_one_exactly_on_target_tokens_and_the_last_end_of_text(tokenizer, encoded):
    pair = encoded.train[0]
    n_context, n_target = pair.target_start, len(pair.tokens) - pair.target_start
    (batch,) = task_validation_batches([pair], seq_len=256, batch_size=2)
    assert [part.dtype for part in batch[:3]] == [np.int32, np.int32, np.float32]
    scored = batch.targets_BT[0][batch.weights_BT[0] == 1]
    np.testing.assert_array_equal(scored, pair.tokens[pair.target_start :])
    assert scored[-1] == END
    assert batch.weights_BT[0].tolist()[: n_context - 1 + n_target] == [0] * (n_context - 1) + [1] * n_target
    assert batch.weights_BT.sum() == n_target
    np.testing.assert_array_equal(batch.tokens_BT[0][: len(pair.tokens) - 1], pair.tokens[:-1])
    assert not batch.tokens_BT[1].any()


def test_a_batch_has_the_smallest_bucket_that_fits_its_longest_row():
    assert length_buckets(512) == (64, 96, 128, 256, 512)
    assert length_buckets(100) == (16, 24, 32, 56, 100)
    assert length_buckets(5) == (5,)
    for n_tokens, length in ((2, 16), (17, 16), (18, 24), (33, 32), (34, 56), (57, 56), (58, 100), (101, 100)):
        (batch,) = task_validation_batches(
            [Pair(np.ones(3, np.int32), 1), Pair(np.ones(n_tokens, np.int32), 1)], seq_len=100, batch_size=2
        )
        assert batch.tokens_BT.shape == batch.targets_BT.shape == batch.weights_BT.shape == (2, length), n_tokens


# --- epochs ---


@pytest.mark.parametrize(("count", "batch_size"), [(100, 8), (96, 8), (3, 8), (1, 1), (1000, 2)])
def test_every_pair_comes_once_an_epoch_and_each_epoch_in_another_order(count, batch_size):
    pairs = make_pairs(count)
    n_steps = steps_per_epoch(count, batch_size)
    assert n_steps == int(np.ceil(count / batch_size))
    batches = task_batches(pairs, seq_len=256, batch_size=batch_size, seed=5)
    orders = []
    for _ in range(3):
        epoch = [numbers(batch) for batch in islice(batches, n_steps)]
        assert Counter(number for batch in epoch for number in batch) == Counter(range(1, count + 1))
        assert sorted(map(len, epoch))[1:] == [batch_size] * (n_steps - 1)
        orders.append(epoch)
    if count > 8:
        assert orders[0] != orders[1] != orders[2] != orders[0]
        # Other batches, not only another order of them.
        assert len({frozenset(batch) for epoch in orders for batch in epoch}) >= 2.9 * n_steps


def test_rows_carry_their_pair_whole(encoded):
    wanted = Counter((pair.tokens.tobytes(), pair.target_start) for pair in encoded.train)
    found = Counter()
    n_steps = steps_per_epoch(len(encoded.train), 16)
    for batch in islice(task_batches(encoded.train, seq_len=256, batch_size=16, seed=0), n_steps):
        for tokens, targets, weights in zip(*batch[:3], strict=True):
            if weights.any():
                scored = np.flatnonzero(weights)
                row = np.append(tokens[: scored[-1] + 1], targets[scored[-1]])
                found[row.tobytes(), int(scored[0]) + 1] += 1
    assert found == wanted


def test_padding_is_small_and_batches_are_not_in_order_of_length():
    pairs = make_pairs(4000, longest=120)
    n_steps = steps_per_epoch(4000, 16)
    batches = list(islice(task_batches(pairs, seq_len=256, batch_size=16, seed=0), n_steps))
    used = sum(len(pair.tokens) - 1 for pair in pairs)
    assert used / sum(batch.tokens_BT.size for batch in batches) > 0.7
    lengths = [batch.tokens_BT.shape[1] for batch in batches]
    assert set(lengths) <= set(length_buckets(256))
    assert abs(np.corrcoef(np.arange(n_steps), lengths)[0, 1]) < 0.2


def test_seeds_give_other_orders_which_stay_as_they_are():
    pairs = make_pairs(10)
    first = {seed: numbers(next(task_batches(pairs, seq_len=256, batch_size=4, seed=seed))) for seed in (0, 1)}
    assert first == {0: [4, 5, 9, 7], 1: [6, 7]}  # frozen: a change here breaks every resumed run


@pytest.mark.parametrize("start_batch", [1, 12, 13, 14, 40])
def test_starting_anywhere_goes_on_as_iterating_there_does(start_batch):
    pairs = make_pairs(100)  # 13 batches an epoch

    def read(start, stop):
        batches = task_batches(pairs, seq_len=256, batch_size=8, seed=2, start_batch=start)
        return list(islice(batches, stop - start))

    assert_equal(read(start_batch, 45), read(0, 45)[start_batch:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_share_the_same_batches(process_count):
    pairs = make_pairs(30)
    share = {"seq_len": 256, "batch_size": 8}
    for read in (lambda **of: islice(task_batches(pairs, seed=2, **share, **of), 9), None):
        read = read or (lambda **of: task_validation_batches(pairs, **share, **of))
        whole = list(read())
        shares = [list(read(process_index=n, process_count=process_count)) for n in range(process_count)]
        joined = [jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in zip(*shares, strict=True)]
        assert_equal(joined, whole)


def test_validation_scores_every_target_token_once(encoded):
    batches = list(task_validation_batches(encoded.validation, seq_len=256, batch_size=8))
    assert len(batches) == steps_per_epoch(len(encoded.validation), 8)
    found = sorted(tuple(t[w == 1].tolist()) for batch in batches for t, w in zip(*batch[1:3], strict=True) if w.any())
    assert found == sorted(tuple(pair.tokens[pair.target_start :].tolist()) for pair in encoded.validation)
    again = task_validation_batches(encoded.validation, seq_len=256, batch_size=8)
    assert_equal(batches, again)


# --- numbers that do not fit ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pairs": []}, "no pair of a context and a target"),
        ({"seq_len": 100}, r"a pair of 1\d\d tokens is over seq_len=100"),
        ({"batch_size": 0}, "both must be at least 1"),
        ({"process_count": 3}, "batch_size=8 is not divisible by process_count=3"),
        ({"seed": -1}, "neither may be negative"),
        ({"start_batch": -1}, "neither may be negative"),
    ],
)
def test_arguments_that_do_not_fit(overrides, message):
    given = {"pairs": make_pairs(50), "seq_len": 256, "batch_size": 8, "seed": 0} | overrides
    with pytest.raises(InputError, match=message):
        task_batches(given.pop("pairs"), **given)
    if not {"seed", "start_batch"} & overrides.keys():
        given = {"pairs": make_pairs(50), "seq_len": 256, "batch_size": 8} | overrides
        with pytest.raises(InputError, match=message):
            task_validation_batches(given.pop("pairs"), **given)


def test_no_room(task, tokenizer):
    with pytest.raises(InputError, match="seq_len=0: must be at least 1"):
        encode_task(task, tokenizer, 0)
    with pytest.raises(InputError, match="max_tokens=0: no room for a prompt"):
        encode_prompts(task.test, tokenizer, max_tokens=0)
