"""Mixtures: each source has its share of the examples, exactly, in an order that restarts and process counts cannot change."""

import dataclasses
import itertools
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
from test_faults import assert_ends_as
from tiny import NO_WINDOW, tiny_config, write_text
from twice import killed_at, short_run

import spdf_jax as spdf
from spdf_jax.data import DataConfig, Mixture, prepare, train_batches, validation_batches
from spdf_jax.data.mixture import read_shares, turn
from spdf_jax.data.unigram import unigram_loss
from spdf_jax.errors import InputError
from spdf_jax.planning.describe import describe
from spdf_jax.report.records import read_run
from spdf_jax.report.run import main_numbers
from spdf_jax.training.feed import sources_read
from spdf_jax.training.phases import make_plan

#: Ids of three sources, told apart by their hundreds: 10, 7 and 30 windows of 4.
PARTS = [np.arange(100, 141), np.arange(200, 229), np.arange(300, 421)]
MIXTURE = Mixture(PARTS, {"a": 5, "b": 3, "c": 2})


def starts(batches) -> list[int]:
    return np.concatenate([batch.tokens_BT[:, 0] for batch in batches]).tolist()


def take(count, tokens=MIXTURE, **kwargs):
    return list(islice(train_batches(tokens, **{"seq_len": 4, "batch_size": 4, "seed": 3, **kwargs}), count))


@pytest.mark.parametrize("shares", [[1], [1, 1], [7, 3], [5, 3, 2], [1, 1, 1, 97], [97, 2, 1], [333_333, 666_667]])
def test_every_share_is_exact_over_a_round_and_near_at_any_number(shares):
    total = sum(shares)
    turns = [turn(shares, index) for index in range(min(2 * total, 5000))]
    seen = Counter()
    for index, (source, before) in enumerate(turns, start=1):
        assert before == seen[source]  # each source's own examples come in order, none left out
        seen[source] += 1
        assert all(abs(seen[s] - index * share / total) <= 1 for s, share in enumerate(shares))
        if index % total == 0:
            assert [seen[s] for s in range(len(shares))] == [index // total * share for share in shares]
    round_at = 10**12 * total  # no number is too far
    assert [turn(shares, round_at + index) for index in range(3)] == [
        (source, 10**12 * shares[source] + before) for source, before in turns[:3]
    ] or len(turns) < 3


def test_each_source_has_epochs_of_its_own_and_an_order_by_the_seed():
    found = starts(take(50))
    by_source = {name: [s for s in found if min(s // 100, 3) == n] for n, name in enumerate("abc", start=1)}
    assert {name: len(of) for name, of in by_source.items()} == {"a": 100, "b": 60, "c": 40}
    for of, windows in ((by_source["a"], 10), (by_source["b"], 7), (by_source["c"], 30)):
        epochs = [of[start : start + windows] for start in range(0, len(of) - windows + 1, windows)]
        assert all(len(set(epoch)) == windows for epoch in epochs)
        assert len(epochs) < 2 or epochs[0] != epochs[1]
    assert starts(take(50)) == found
    assert starts(take(50, seed=4)) != found
    assert MIXTURE.epochs(4, 200) == {"a": 10, "b": 60 / 7, "c": 40 / 30}


@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_resumed_anywhere_any_number_of_processes_sees_the_same_global_batches(process_count):
    whole = take(20)
    for start in (0, 7):
        shares = [
            take(20 - start, start_batch=start, process_index=process, process_count=process_count)
            for process in range(process_count)
        ]
        for batch, *rows in zip(whole[start:], *shares, strict=True):
            together = jax.tree.map(lambda *parts: np.concatenate(parts), *rows)
            jax.tree.map(np.testing.assert_array_equal, together, batch)
    # In batches of another size, from an example on, the same examples come.
    assert starts(take(10, batch_size=8, first_example=12)) == starts(whole + take(3, start_batch=20))[12:]


def test_all_validation_tokens_count_and_frequencies_are_those_of_all_text():
    rows = list(validation_batches(MIXTURE, seq_len=4, batch_size=8))
    assert sum(batch.weights_BT.sum() for batch in rows) == sum(map(len, PARTS)) - 1
    together = np.concatenate(PARTS)
    assert unigram_loss(MIXTURE, MIXTURE, 500) == unigram_loss(together, together, 500)


@pytest.mark.parametrize(
    ("mixture", "shares"),
    [
        ("a=1", {"a": 1}),
        ("a=0.7,b=0.3", {"a": 7, "b": 3}),
        (" a = 70 , b/c = 30 ", {"a": 7, "b/c": 3}),
        ("date=2020/x=1e-3,b=0.999", {"date=2020/x": 1, "b": 999}),
        ("a=2,b=4,c=6", {"a": 1, "b": 2, "c": 3}),
    ],
)
def test_shares_are_whole_numbers(mixture, shares):
    assert read_shares(mixture) == shares


@pytest.mark.parametrize(
    ("mixture", "said"),
    [
        (",", "'' has no share"),
        ("a", "'a' has no share that is a number above 0; write each source with its share, as in data/web=0.7"),
        ("a=", "'a=' has no share"),
        ("=1", "'=1' has no share"),
        ("a=0.5,b=x", "'b=x' has no share"),
        ("a=1,b=0", "'b=0' has no share"),
        ("a=1,b=-1", "'b=-1' has no share"),
        ("a=nan", "'a=nan' has no share"),
        ("a=inf", "'a=inf' has no share"),
        ("a=1/3", "'a=1/3' has no share"),
        ("a=1e99", "'a=1e99' has no share"),
        ("a=1,a=2", "names 'a' twice"),
    ],
)
def test_what_is_no_mixture_is_refused(mixture, said):
    with pytest.raises(InputError) as refused:
        read_shares(mixture)
    assert said in str(refused.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two folders of documents with words of their own, and two of ids."""
    root = tmp_path_factory.mktemp("mixed")
    for name, word, count in (("web", "apple", 40), ("code", "def", 20)):
        (root / name).mkdir()
        for n in range(count):
            (root / name / f"{n}.txt").write_text(f"{word} {word}s {n} {n * n}\n" * 5)
    for name, low in (("ids_a", 0), ("ids_b", 100)):
        (root / name).mkdir()
        for split in ("train", "val"):
            np.arange(low, low + 100, dtype="<u2").tofile(root / name / f"{split}.bin")
    return root


def config_of(folder: Path, mixture: str, **overrides) -> DataConfig:
    values = {"source": "text", "tokenizer_vocab_size": 300, "validation_fraction": 0.2, "cache_dir": f"{folder}/cache"}
    return DataConfig(**{**values, "mixture": mixture.replace("@", f"{folder}/"), **overrides})


def test_sources_share_a_tokenizer_and_what_is_encoded_is_used_again(folder, monkeypatch):
    data = prepare(config_of(folder, "@web=0.7,@code=0.3"), progress=False)
    web, code = data.train.parts
    assert "apple" in data.tokenizer.decode(web.tolist())
    assert "apple" not in data.tokenizer.decode(code.tolist())
    assert len(data.validation) > 0
    assert data.validation_bytes > 0
    with monkeypatch.context() as patch:
        for again in ("build", "kept_tokenizer"):
            keep = {"kept_tokenizer": lambda file, *_, **__: spdf_kept(file)}.get(again)
            patch.setattr(f"spdf_jax.data.tokens.{again}", keep or (lambda *_, **__: pytest.fail("encoded again")))
        other = prepare(config_of(folder, "@code=0.5,@web=0.5"), progress=False)
        data.tokenizer.save(str(folder / "tokenizer.json"))  # as a run keeps it, which is then resumed
        own = prepare(config_of(folder, "@web=0.7,@code=0.3", tokenizer=f"{folder}/tokenizer.json"), progress=False)
    assert own.fingerprint == data.fingerprint
    np.testing.assert_array_equal(other.train.parts[0], code)
    assert other.fingerprint != data.fingerprint
    assert prepare(config_of(folder, "@web=7,@code=3"), progress=False).fingerprint == data.fingerprint


def spdf_kept(file: Path):
    """The tokenizer that is kept, never trained."""
    import spdf_jax.data.token_cache as cache

    return cache.kept_tokenizer(file, iter(lambda: pytest.fail("trained again"), 0), vocab_size=300, progress=False)


def test_a_damaged_tokenizer_is_trained_again(folder, tmp_path):
    config = dataclasses.replace(config_of(folder, "@web=1,@code=1"), cache_dir=str(tmp_path))
    first = prepare(config, progress=False)
    (file,) = tmp_path.glob("tokenizer-*.json")
    for damage in (b"", b"{}", file.read_bytes().replace(b"apple", b"appel")):
        whole = file.read_bytes()
        file.write_bytes(damage)
        assert prepare(config, progress=False).fingerprint == first.fingerprint
        assert file.read_bytes() == whole


def test_token_files_are_mixed_too(folder):
    data = prepare(config_of(folder, "@ids_a=3,@ids_b=1", source="token_files"), progress=False)
    assert [part.tolist() for part in data.train.parts] == [[*range(100)], [*range(100, 200)]]
    assert (data.vocab_size, data.tokenizer, data.validation_bytes) == (200, None, None)
    ids = starts(islice(train_batches(data.train, seq_len=4, batch_size=8, seed=0), 5))
    assert sum(i >= 100 for i in ids) == 10


@pytest.mark.parametrize(
    ("mixture", "overrides", "said"),
    [
        ("@web=1,@nowhere=1", {}, r"nowhere': no such file or folder"),
        ("@ids_a=1,@nowhere=1", {"source": "token_files"}, "nowhere': no such folder"),
        ("@web=1", {"source": "embedded"}, "is of sources by their paths; set data.source to 'text'"),
        ("@web=1", {"path": "x"}, "stands beside 'x'; set one of them to ''"),
        ("a=1", {"source": "tfds", "tfds_name": "b"}, "stands beside 'b'"),
        ("a=1,b=1", {"source": "tfds"}, r"data.tfds_name='a' in .*: no prepared dataset found"),
    ],
)
def test_mixtures_that_cannot_be_read(mixture, overrides, said, folder, tmp_path):
    with pytest.raises(InputError, match=said):
        prepare(config_of(folder, mixture, **{"cache_dir": str(tmp_path / "cache"), **overrides}), progress=False)


def test_sources_by_different_tokenizers_are_refused(folder, tmp_path):
    for name, letters in (("one", "a"), ("two", "ab")):
        (tmp_path / name).mkdir()
        spdf_tokenizer(letters).save(str(tmp_path / name / "tokenizer.json"))
        for split in ("train", "val"):
            np.arange(100, dtype="<u2").tofile(tmp_path / name / f"{split}.bin")
    config = DataConfig(source="token_files", mixture=f"{tmp_path}/one=1,{tmp_path}/two=1")
    with pytest.raises(InputError, match=r"one' and '.*two' come with different tokenizers"):
        prepare(config, progress=False)


def spdf_tokenizer(letters: str):
    from spdf_jax.data.tokenizer import train_tokenizer

    return train_tokenizer([letters * 10], vocab_size=260, progress=False)


def test_a_source_of_less_than_an_example_is_named():
    with pytest.raises(InputError, match=r"data.mixture: the training data of 'b', of 3 tokens is shorter than one"):
        take(1, Mixture([np.arange(9), np.arange(3)], {"a": 1, "b": 1}))


def mixed_run(text: Path, cache: Path, mixture: str):
    c = tiny_config(text, cache)
    c.phases, c.pretrain.steps, c.data.path, c.data.mixture = ("pretrain",), 12, "", mixture
    c.pretrain.sparsity.update_every_steps = 3
    c.loop.checkpoint_every_steps = 6
    c.pretrain.sparsity.update(NO_WINDOW)
    del c.finetune
    return c


@pytest.mark.slow
def test_a_run_of_a_mixture_says_what_it_reads_and_is_no_other_by_its_places(tmp_path, no_figures):
    for name in ("web", "code", "moved"):
        write_text(tmp_path / name)
    mixture = f"{tmp_path}/web=0.75,{tmp_path}/code=0.25"
    config = spdf.resolve(mixed_run(tmp_path / "web", tmp_path / "cache", mixture))
    assert f"0.75 of the examples from {tmp_path}/web" in describe(config)
    spdf.train(config, tmp_path / "run", progress=False)
    sources = json.loads((tmp_path / "run/summary.json").read_text())["sources"]
    data = prepare(config.data, progress=False)
    assert sources == sources_read(make_plan(config), data)
    assert [read["share"] for read in sources.values()] == [0.75, 0.25]
    assert sources[f"{tmp_path}/web"]["epochs"] == pytest.approx(3 * sources[f"{tmp_path}/code"]["epochs"])
    page = "".join(main_numbers(read_run(tmp_path / "run")).body)
    assert f"Examples from {tmp_path}/web" in page

    moved = mixed_run(tmp_path / "web", tmp_path / "cache", f"{tmp_path}/moved=0.75,{tmp_path}/code=0.25")
    spdf.train(moved, tmp_path / "run", progress=False)  # the same lies there
    other = mixed_run(tmp_path / "web", tmp_path / "cache", f"{tmp_path}/web=0.5,{tmp_path}/code=0.5")
    with pytest.raises(InputError, match="the data is not what this run was trained on so far"):
        spdf.train(other, tmp_path / "run", progress=False)


@pytest.mark.nightly
@pytest.mark.usefixtures("few_matrices")  # as in the program
def test_kill_9_in_the_middle_of_epochs_and_resume_change_no_bit(tmp_path):
    web, code = (write_text(tmp_path / name) for name in ("web", "code"))
    (code / "train.txt").write_text((code / "train.txt").read_text()[:650])  # five examples
    how = {"data": {"path": "", "mixture": f"{web}=0.75,{code}=0.25"}}
    killed_at(tmp_path / "whole", web, tmp_path / "cache", [], **how)
    killed_at(tmp_path / "run", web, tmp_path / "cache", [5, 11], **how)
    assert_ends_as(tmp_path / "run", tmp_path / "whole")
    config = short_run(web, tmp_path / "cache", **how)
    mixture, epochs = prepare(config.data, progress=False).train, []
    for step in (3, 6, 9):  # where it can have gone on
        epochs.append(mixture.epochs(config.model.context, 4 * step))
        assert all(epoch % 1 for epoch in epochs[-1].values()), epochs
    assert [epoch[str(code)] for epoch in epochs] == [0.6, 1.2, 1.8]


def test_the_turns_of_all_shares_are_counted_once():
    for shares in itertools.product([1, 2, 5], repeat=3):
        counts = Counter(source for source, _ in (turn(shares, index) for index in range(sum(shares))))
        assert [counts[source] for source in range(3)] == list(shares)
