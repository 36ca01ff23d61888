"""Data: what reaches the model is all of the text, in an order that restarts and process counts cannot change."""

import contextlib
import dataclasses
import email
import itertools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from spdf_jax.data import (
    END_OF_TEXT,
    Batch,
    DataConfig,
    TokenData,
    load_tokenizer,
    prepare,
    train_batches,
    unigram_loss,
    validation_batches,
)
from spdf_jax.data import corpus as corpora
from spdf_jax.data.corpus import LIBRARIES, embedded_corpus, library_corpus, split_of, text_corpus
from spdf_jax.data.encoding import CUT, _WordIds, encode_parts, in_parts
from spdf_jax.data.tokenizer import (
    _PIECE_CHARS,
    _bounded_words,
    end_of_text_id,
    text_pieces,
    train_tokenizer,
    vocabulary_size,
)
from spdf_jax.errors import InputError

VOCAB_SIZE = 300
HELD_OUT = 0.1


@contextlib.contextmanager
def every_eighth_file():
    """A library of one file in eight: all of it takes seconds to tokenize."""
    walk = corpora.walk
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "walk", lambda root, skip: list(walk(root, skip=skip))[::8])
        yield


@pytest.fixture(scope="module")
def embedded(tmp_path_factory) -> TokenData:
    cache_dir = str(tmp_path_factory.mktemp("cache"))
    with every_eighth_file():
        return prepare(
            DataConfig(tokenizer_vocab_size=VOCAB_SIZE, validation_fraction=HELD_OUT, cache_dir=cache_dir),
            progress=False,
        )


@pytest.fixture
def text_folder(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(40):
        (folder / f"{n}.txt").write_text(f"Document {n} says hello.\nIt has number {n * n}, été and 漢字 too.\n")
    return folder


def config_of(path, tmp_path, /, **overrides) -> DataConfig:
    return DataConfig(
        **{
            "source": "text",
            "path": str(path),
            "tokenizer_vocab_size": VOCAB_SIZE,
            "validation_fraction": 0.3,
            "cache_dir": str(tmp_path / "cache"),
            **overrides,
        }
    )


def documents(tokens, tokenizer) -> list[str]:
    """The texts that the tokens spell, cut at end of text."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    assert tokens[-1] == end
    cuts = np.flatnonzero(tokens == end)
    starts = [0, *(cuts[:-1] + 1)]
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in zip(starts, cuts, strict=True)]


def encoded(tokenizer, texts, processes=1, file=Path("unread")) -> np.ndarray:
    """All ids of some documents."""
    parts = in_parts(itertools.chain.from_iterable(map(text_pieces, texts)))
    how = {"end_id": end_of_text_id(tokenizer), "dtype": "<u4", "processes": processes, "file": file}
    return np.concatenate([ids for _, ids in encode_parts(tokenizer, parts, **how)])


# --- corpora and their splits ---


def test_embedded_corpus_is_split_by_file_with_the_language_reference_in_train():
    corpus = embedded_corpus(0.05)
    train, validation = list(corpus.read("train")), list(corpus.read("validation"))
    assert len(train) + len(validation) > 300
    assert 0.01 < len(validation) / len(train) < 0.15
    assert len({*train, *validation}) > 0.95 * (len(train) + len(validation))
    assert split_of("pydoc_data/topics.py", 0.05) == "train"
    assert any("The standard type hierarchy" in text for text in train)
    assert not set(train) & set(validation)


LOCK = Path(__file__).parent.parent / "requirements.lock"


def test_libraries_are_pinned_to_the_versions_of_the_lock_file_for_every_python():
    locked = {line.split(" ;")[0] for line in LOCK.read_text().splitlines()}
    alone = [line for line in locked if line.partition("==")[0] in LIBRARIES]
    assert sorted(alone) == sorted(f"{name}=={version}" for name, (version, _) in LIBRARIES.items())


def test_the_text_of_libraries_is_their_release_s_in_an_order_of_hashes(monkeypatch):
    monkeypatch.setattr(corpora, "LIBRARIES", {"optax": LIBRARIES["optax"]})
    corpus = library_corpus(0.1)
    train, validation = (list(corpus.read(split)) for split in ("train", "validation"))
    assert 0.02 < len(validation) / len(train) < 0.3
    assert not set(train) & set(validation), "a text is in one split, however often it is there"
    assert any("def adamw(" in text for text in train + validation)
    assert corpus.identity == library_corpus(0.1).identity != library_corpus(0.2).identity


@pytest.mark.parametrize(
    ("pin", "message"),
    [
        ({"no-such-thing": ("1.0", "")}, "no-such-thing is not installed; pip install .* no-such-thing==1.0"),
        ({"optax": ("0.0.1", "")}, r"optax is 0\.2\.8, and its text is 0\.0\.1's; pip install .* optax==0.0.1"),
        ({"optax": (LIBRARIES["optax"][0], "0" * 16)}, r"optax 0\.2\.8 here is not as it was released; pip install"),
    ],
)
def test_other_libraries_than_the_pinned_ones_are_refused(pin, message, monkeypatch, tmp_path):
    monkeypatch.setattr(corpora, "LIBRARIES", pin)
    with pytest.raises(InputError, match=f"data.source='libraries': {message}"):
        prepare(DataConfig(source="libraries", cache_dir=str(tmp_path / "cache")), progress=False)
    assert not (tmp_path / "cache").exists()


def test_few_unique_tokens_are_the_first_and_are_seen_again(embedded, text_folder, tmp_path):
    config = DataConfig(source="text", path=str(text_folder), cache_dir=str(tmp_path), tokenizer_vocab_size=VOCAB_SIZE)
    config = dataclasses.replace(config, validation_fraction=0.5)
    whole = prepare(config, progress=False)
    few = prepare(dataclasses.replace(config, unique_tokens=33), progress=False)
    np.testing.assert_array_equal(few.train, whole.train[:33])
    np.testing.assert_array_equal(few.validation, whole.validation)
    assert few.tokenizer.to_str() == whole.tokenizer.to_str()
    assert few.fingerprint != whole.fingerprint
    seen = [tuple(batch.tokens_BT[0]) for batch in take(8, few.train, seq_len=16, batch_size=1, seed=0)]
    assert len(set(seen)) == 2
    assert [seen.count(window) for window in set(seen)] == [4, 4], "four epochs of two windows"
    most = len(whole.train)
    with pytest.raises(
        InputError, match=rf"data\.unique_tokens={most + 1}: there are {most} training tokens; give fewer"
    ):
        prepare(dataclasses.replace(config, unique_tokens=most + 1), progress=False)


def test_embedded_tokens_decode_to_the_corpus(embedded):
    with every_eighth_file():
        texts = list(embedded_corpus(HELD_OUT).read("validation"))
    assert documents(embedded.validation, embedded.tokenizer) == texts
    assert embedded.validation_bytes == sum(len(text.encode()) for text in texts)
    assert isinstance(embedded.train, np.memmap)
    assert embedded.train.dtype == np.uint16
    assert embedded.vocab_size == VOCAB_SIZE == 1 + max(embedded.tokenizer.get_vocab().values())
    assert embedded.train.max() < VOCAB_SIZE


def test_text_folder_round_trips_every_document_into_one_split(text_folder, tmp_path):
    data = prepare(config_of(text_folder, tmp_path), progress=False)
    train, validation = documents(data.train, data.tokenizer), documents(data.validation, data.tokenizer)
    assert sorted(train + validation) == sorted(file.read_text() for file in text_folder.iterdir())
    assert train
    assert validation
    assert not set(train) & set(validation)


def test_adding_a_document_moves_no_other(text_folder):
    def read():
        return set(text_corpus(str(text_folder), text_key="text", validation_fraction=0.3).read("validation"))

    before = read()
    (text_folder / "new.md").write_text("new")
    assert read() - {"new"} == before


def test_named_files_are_the_splits_and_others_are_not_read(tmp_path):
    (tmp_path / "train.txt").write_text("to train on")
    (tmp_path / "val.jsonl").write_text('{"text": "to validate on"}\n\n{"text": "and on"}\n')
    (tmp_path / "README.md").write_text("not data")
    corpus = text_corpus(str(tmp_path), text_key="text", validation_fraction=0.5)
    assert list(corpus.read("train")) == ["to train on"]
    assert list(corpus.read("validation")) == ["to validate on", "and on"]


def test_jsonl_lines_are_documents_of_another_key(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"body": f"row {n}"}) + "\n" for n in range(50)))
    corpus = text_corpus(str(file), text_key="body", validation_fraction=0.3)
    train, validation = set(corpus.read("train")), set(corpus.read("validation"))
    assert train | validation == {f"row {n}" for n in range(50)}
    assert not train & validation


def test_the_tail_of_a_single_file_validates(tmp_path):
    text = "".join(f"line {n}\n" for n in range(100))
    (tmp_path / "book").write_text(text)
    corpus = text_corpus(str(tmp_path / "book"), text_key="text", validation_fraction=0.1)
    (train,), (validation,) = corpus.read("train"), corpus.read("validation")
    assert train + validation == text
    assert validation.startswith("line ")
    assert 0.05 < len(validation) / len(text) < 0.15


def test_hidden_files_and_byte_order_marks_are_left_out(tmp_path):
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "a.rst").write_bytes(b"\xef\xbb\xbfkept\r\n")
    (tmp_path / "other.txt").write_text("kept too")
    corpus = text_corpus(str(tmp_path), text_key="text", validation_fraction=0.5)
    assert {*corpus.read("train"), *corpus.read("validation")} == {"kept\r\n", "kept too"}


# --- tokenizer ---


def test_a_spelled_end_of_text_inside_a_document_does_not_end_it(text_folder, tmp_path):
    (text_folder / "spelled.txt").write_text(f"one {END_OF_TEXT} document")
    data = prepare(config_of(text_folder, tmp_path), progress=False)
    both = documents(data.train, data.tokenizer) + documents(data.validation, data.tokenizer)
    assert f"one {END_OF_TEXT} document" in both


def test_a_long_document_encodes_as_if_in_one_piece(embedded):
    text = "".join(embedded_corpus(0.05).read("validation"))[: 4 * _PIECE_CHARS]
    assert len(text) > 3 * _PIECE_CHARS
    whole = embedded.tokenizer.encode(text).ids
    np.testing.assert_array_equal(
        encoded(embedded.tokenizer, [text]), [*whole, embedded.tokenizer.token_to_id(END_OF_TEXT)]
    )


def test_cuts_change_no_id(embedded, monkeypatch):
    monkeypatch.setattr("spdf_jax.data.tokenizer._PIECE_CHARS", 1)
    by_hand = ["it's, don't; 'twas I'll\n(a's!'s) ½; é́;漢字。x", "a  b   c \n d\n\n e\t f ,g ,  h"]
    for text in (*by_hand, Path(email.__file__).read_text()):
        pieces = list(text_pieces(text))
        assert len(pieces) > 2
        assert "".join(piece for piece, _ in pieces) == text
        ids = [i for piece, _ in pieces for i in embedded.tokenizer.encode(piece).ids]
        assert ids == embedded.tokenizer.encode(text).ids


ODD_SPACE = "\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f \x85\xa0\u1680\u180e\u2000\u200a\u200b\u2028\u2029\u202f\u205f\u3000\ufeff"


def test_ids_that_are_looked_up_are_those_of_the_whole_text(embedded, monkeypatch):
    """Words that come back, among every kind of white space; and however few are kept."""
    tokenizer = tokenizers.Tokenizer.from_str(embedded.tokenizer.to_str())
    tokenizer.encode_special_tokens = True  # as where text is encoded to be kept
    rng = np.random.default_rng(0)
    words = ["it's", "It", "don't;", "7", "½", "e\u0301", "漢字", "__", "...", "'", "\U0001f600"]
    parts = [*words, *ODD_SPACE, *" " * 15, *"\n" * 9]
    texts = ["".join(rng.choice(parts, 200)) for _ in range(60)] + ["", " ", "\n", Path(email.__file__).read_text()]
    end = end_of_text_id(tokenizer)
    wanted = [i for text in texts for i in [*tokenizer.encode(text).ids, end]]
    assert encoded(tokenizer, texts).tolist() == wanted
    learned, learn = [], _WordIds._learn
    monkeypatch.setattr(_WordIds, "_learn", lambda self, words: learned.extend(words) or learn(self, words))
    assert encoded(tokenizer, texts * 2).tolist() == wanted * 2
    assert len(learned) == len(set(learned)), "none is encoded twice"
    monkeypatch.setattr("spdf_jax.data.encoding._KNOWN_BYTES", 1000)
    learned.clear()
    assert encoded(tokenizer, texts * 2).tolist() == wanted * 2
    assert len(learned) > len(set(learned))


def with_a_space_before(said):
    said["pre_tokenizer"]["add_prefix_space"] = True


def lower_case(said):
    said["normalizer"] = {"type": "Lowercase"}


def of_one_word_a_text(said):
    said["pre_tokenizer"]["use_regex"] = False


def with_a_token_of_two_words(said):
    said["added_tokens"].append(
        said["added_tokens"][0] | {"id": len(said["model"]["vocab"]), "content": "two words", "special": False}
    )


def without_words(said):
    said["pre_tokenizer"] = None


OTHER_WORDS = [with_a_space_before, lower_case, of_one_word_a_text, with_a_token_of_two_words, without_words]


@pytest.mark.parametrize("change", OTHER_WORDS)
def test_other_words_than_gpt2_s_are_not_looked_up(change, embedded):
    said = json.loads(embedded.tokenizer.to_str())
    text = "Say two words\nand two words more, Then\nsay them again"
    change(said)
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(said))
    tokenizer.encode_special_tokens = True
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert encoded(tokenizer, [text] * 3).tolist() == [*ids, end_of_text_id(tokenizer)] * 3
    assert not _WordIds(tokenizer)._by_words
    if change is with_a_space_before or change is with_a_token_of_two_words:
        apart = [i for word in CUT.split(text) for i in tokenizer.encode(word, add_special_tokens=False).ids]
        assert apart != ids, "a text in which it matters"


def test_training_in_pieces_gives_the_tokenizer_of_the_whole_text():
    text = "".join(itertools.islice(embedded_corpus(0.05).read("train"), 30))
    assert len(text) > 3 * _PIECE_CHARS
    whole = tokenizers.ByteLevelBPETokenizer()
    whole.train_from_iterator([text], vocab_size=1000, special_tokens=[END_OF_TEXT], show_progress=False)
    assert train_tokenizer([text], vocab_size=1000, progress=False).to_str() == whole.to_str()


@pytest.mark.slow
def test_memory_of_training_does_not_grow_with_a_text():
    """As one text these 6 MB take 100 times as much."""
    program = """
import resource, sys
from spdf_jax.data.tokenizer import train_tokenizer
def peak_bytes(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
text = "words and lines, one after another, 12 of them; " * 120_000
before = peak_bytes()
train_tokenizer([text], vocab_size=300, progress=False)
print((peak_bytes() - before) / len(text))
"""
    # On Linux a program's peak starts at that of whoever starts it: at a small shell's, which a second command keeps from
    # becoming the program, and not at that of the tests, which would hide what is less.
    command = ["sh", "-c", '"$0" -c "$1"; exit', sys.executable, program]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert 0 < float(result.stdout) < 20


@pytest.mark.parametrize("word", [" ", "a", "7", "_", "=", "漢"])
def test_a_word_without_end_is_trained_on_in_a_moment_and_kept_whole(word):
    text = f"before{word * 300_000}after"
    tokenizer = train_tokenizer([text], vocab_size=300, progress=False)  # as one word it takes minutes
    ids = encoded(tokenizer, [text])
    assert tokenizer.decode(ids.tolist()) == text
    assert max(map(len, _bounded_words(text))) <= 1024 + len("before")


def test_gpt2_format_with_a_last_special_id(embedded, text_folder, tmp_path):
    """GPT-2's own file: old fields, merges as strings, `<|endoftext|>` as the last id, here 1000 to leave a gap."""
    parsed = json.loads(embedded.tokenizer.to_str())
    parsed["model"]["merges"] = [" ".join(pair) for pair in parsed["model"]["merges"]]
    parsed["model"]["vocab"][END_OF_TEXT] = parsed["added_tokens"][0]["id"] = 1000
    parsed["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    del parsed["model"]["type"], parsed["model"]["byte_fallback"], parsed["model"]["ignore_merges"]
    parsed["added_tokens"][0]["normalized"] = True
    parsed["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    parsed["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    parsed["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(parsed))
    assert vocabulary_size(load_tokenizer(file)) == 1001
    data = prepare(config_of(text_folder, tmp_path, tokenizer=str(file)), progress=False)
    assert data.vocab_size == 1001
    assert data.train[-1] == 1000
    expected = sorted(file.read_text() for file in text_folder.iterdir())
    assert sorted(documents(data.train, data.tokenizer) + documents(data.validation, data.tokenizer)) == expected


def test_over_65536_ids_are_stored_as_uint32(embedded, text_folder, tmp_path):
    parsed = json.loads(embedded.tokenizer.to_str())
    parsed["model"]["vocab"][END_OF_TEXT] = parsed["added_tokens"][0]["id"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(parsed))
    config = config_of(text_folder, tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    for _ in ("built", "cached"):
        data = prepare(config, progress=False)
        assert data.train.dtype == np.uint32
        assert data.train[-1] == 70_000


# --- cache ---


def cached_files(cache_dir) -> dict[str, bytes]:
    return {file.relative_to(cache_dir).as_posix(): file.read_bytes() for file in Path(cache_dir).glob("*/*")}


def test_two_caches_get_the_same_bytes(tmp_path):
    source = Path(email.__file__).parent
    configs = [
        config_of(source, tmp_path, tokenizer_vocab_size=1000, cache_dir=str(tmp_path / name)) for name in ("a", "b")
    ]
    assert len({prepare(config, progress=False).fingerprint for config in configs}) == 1
    first, second = (cached_files(config.cache_dir) for config in configs)
    assert first == second
    assert {name.split("/")[1] for name in first} == {"meta.json", "tokenizer.json", "train.bin", "val.bin"}


def test_a_second_start_reads_the_cache_and_changed_text_does_not(text_folder, tmp_path, monkeypatch):
    config = config_of(text_folder, tmp_path)
    first = prepare(config, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr("spdf_jax.data.tokens.build", lambda *_, **__: pytest.fail("tokenized again"))
        assert prepare(config, progress=False).fingerprint == first.fingerprint
    (text_folder / "0.txt").write_text("changed")
    assert prepare(config, progress=False).fingerprint != first.fingerprint


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def more_vocabulary(file: Path) -> None:
    file.write_text(file.read_text().replace('"vocab_size": ', '"vocab_size": 1'))


CACHED = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
DAMAGES = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-2]),
    "cut to an odd length": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "emptied": lambda file: file.write_bytes(b""),
    "a bit": flip,
    "gone": Path.unlink,
    "another's": lambda file: shutil.copy(next(file.parents[2].glob(f"other/*/{file.name}")), file),
    "deep": lambda file: file.write_text("[" * 100_000),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[DataConfig, TokenData]:
    """A cache that was built, and beside it, as `other`, one of another text."""
    root = tmp_path_factory.mktemp("built")
    (root / "text").mkdir()
    configs = config_of(root / "text", root, cache_dir=str(root / "other")), config_of(root / "text", root)
    for config, word in zip(configs, ("ab", "cdefg"), strict=True):
        for n in range(10):
            (root / f"text/{n}.txt").write_text(f"{word} and {n} more")
        data = prepare(config, progress=False)
    return configs[1], data


@pytest.mark.parametrize(
    ("name", "damage"),
    [*itertools.product(CACHED, DAMAGES), ("meta.json", "vocabulary"), ("", "empty folder"), ("", "another's folder")],
)
def test_a_damaged_cache_is_built_again(name, damage, built):
    config, first = built
    expected = cached_files(config.cache_dir)
    folder = Path(config.cache_dir, next(iter(expected))).parent
    if name:
        (DAMAGES | {"vocabulary": more_vocabulary})[damage](folder / name)
    else:
        shutil.rmtree(folder)
        folder.mkdir()
        if damage == "another's folder":
            shutil.copytree(next(folder.parents[1].glob("other/*/")), folder, dirs_exist_ok=True)
    assert cached_files(config.cache_dir) != expected
    again = prepare(config, progress=False)
    np.testing.assert_array_equal(again.train, first.train)
    np.testing.assert_array_equal(again.validation, first.validation)
    assert (again.vocab_size, again.fingerprint) == (first.vocab_size, first.fingerprint)
    assert again.tokenizer.to_str() == first.tokenizer.to_str()
    assert cached_files(config.cache_dir) == expected


def test_of_a_large_cache_file_samples_are_checked(text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("spdf_jax.data.token_files._FULL_HASH_BYTES", 100)
    first = prepare(config_of(text_folder, tmp_path), progress=False)
    file = next(Path(tmp_path).glob("cache/*/train.bin"))
    expected = file.read_bytes()
    file.write_bytes(bytes(len(expected)))
    assert prepare(config_of(text_folder, tmp_path), progress=False).fingerprint == first.fingerprint
    assert file.read_bytes() == expected


def test_what_is_published_is_on_the_disk_before(text_folder, tmp_path, monkeypatch):
    synced, fsync, replace = set(), os.fsync, os.replace

    def recording(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def publish(draft, folder):
        assert {path.stat().st_ino for path in (draft, *draft.iterdir())} <= synced
        assert len(list(draft.iterdir())) == len(CACHED)
        replace(draft, folder)
        synced.clear()

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "replace", publish)
    config = config_of(text_folder, tmp_path)
    prepare(config, progress=False)
    assert synced == {Path(config.cache_dir).stat().st_ino}


def _prepare_slowly(config, started):
    """A run that hangs while it writes the validation tokens."""
    import spdf_jax.data.token_cache as cache

    encode = cache.encode_parts
    calls = []

    def slow(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            started.set()
            time.sleep(60)
        return encode(*args, **kwargs)

    cache.encode_parts = slow
    prepare(config, progress=False)


@pytest.mark.slow
def test_a_run_killed_half_way_leaves_nothing_to_read(text_folder, tmp_path):
    config = config_of(text_folder, tmp_path)
    spawn = multiprocessing.get_context("spawn")
    started = spawn.Event()
    process = spawn.Process(target=_prepare_slowly, args=(config, started))
    process.start()
    assert started.wait(30)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sum(path.name.startswith("unfinished-") for path in Path(config.cache_dir).iterdir()) == 1
    data = prepare(config, progress=False)
    assert len(documents(data.train, data.tokenizer)) + len(documents(data.validation, data.tokenizer)) == 40


@pytest.fixture
def small_parts(monkeypatch) -> None:
    """Parts of a few documents, so that a small text has many of them; many processes for few."""
    monkeypatch.setattr("spdf_jax.data.encoding.PART_BYTES", 200)
    monkeypatch.setattr("spdf_jax.data.encoding._PARTS_A_PROCESS", 1)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(processes, text_folder, tmp_path, small_parts):
    (text_folder / "spelled.txt").write_text(f"one {END_OF_TEXT} document")
    alone, many = (
        config_of(text_folder, tmp_path, cache_dir=str(tmp_path / str(count)), processes=count)
        for count in (1, processes)
    )
    prepare(alone, progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spdf_jax.data.encoding._WordIds.of", lambda *_: pytest.fail("encoded here"))
        prepare(many, progress=False)
    assert cached_files(many.cache_dir) == cached_files(alone.cache_dir)


@pytest.mark.slow
def test_a_process_that_ends_is_said_and_what_is_encoded_stays(text_folder, tmp_path, small_parts, monkeypatch):
    import spdf_jax.data.encoding as encoding

    config = config_of(text_folder, tmp_path, processes=2)
    answer, asked = encoding._answer, itertools.count()

    def killed(encoder, part, dtype):
        if next(asked) == 6:
            encoder.kill()
        return answer(encoder, part, dtype)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_answer", killed)
        with pytest.raises(InputError, match=r"^data\.processes: one of the processes .* ended with -9, .* stays$"):
            prepare(config, progress=False)
    (journal,) = Path(config.cache_dir).glob("unfinished-*/train.bin.done")
    assert 3 <= len(journal.read_text().splitlines()) <= 6
    data = prepare(config, progress=False)
    assert len(documents(data.train, data.tokenizer)) + len(documents(data.validation, data.tokenizer)) == 40


class Killed(BaseException):
    """No error that anything would answer."""


def killed_after(config: DataConfig, parts: int) -> Path:
    """A build that ends when it has encoded so many parts, without a word; its folder."""
    import spdf_jax.data.token_cache as cache

    encode, count = cache.encode_parts, itertools.count()

    def some(*args, **kwargs):
        for part in encode(*args, **kwargs):
            if next(count) == parts:
                raise Killed
            yield part

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "encode_parts", some)
        with pytest.raises(Killed):
            prepare(config, progress=False)
    (place,) = Path(config.cache_dir).glob("unfinished-*/")
    return place


def append(file: Path, more: bytes) -> None:
    with file.open("ab") as stream:
        stream.write(more)


LEFT = {
    "as it was": lambda place: None,
    "a torn line": lambda place: (place / "train.bin.done").write_text((place / "train.bin.done").read_text()[:-9]),
    "half a part more": lambda place: append(place / "data/train.bin", b"half"),
    "a part lost": lambda place: os.truncate(place / "data/train.bin", 64),
    "a bit": lambda place: flip(place / "data/train.bin"),
    "no line": lambda place: (place / "train.bin.done").write_text(""),
    "no journal": lambda place: (place / "train.bin.done").write_text("[" * 10_000),
    "no list": lambda place: (place / "train.bin.done").write_text("3\nnull\n"),
    "its tokenizer": lambda place: flip(place / "tokenizer.json"),
    "lines of more": lambda place: append(place / "train.bin.done", b'["x", 1, "y"]\n' * 99),
    "no text": lambda place: append(place / "train.bin.done", b"\xff\n"),
}


@pytest.mark.parametrize("left", LEFT)
def test_a_build_goes_on_where_it_was_killed_to_the_same_bytes(left, text_folder, tmp_path, small_parts, monkeypatch):
    whole, config = (
        config_of(text_folder, tmp_path, cache_dir=str(tmp_path / name), processes=1) for name in ("whole", "cache")
    )
    prepare(whole, progress=False)
    place = killed_after(config, parts=7)
    assert len((place / "train.bin.done").read_text().splitlines()) == 7
    LEFT[left](place)
    import spdf_jax.data.encoding as encoding

    encode, again = encoding._WordIds.of, []
    monkeypatch.setattr(encoding._WordIds, "of", lambda *args: again.append(args) or encode(*args))
    if left == "as it was":
        monkeypatch.setattr("spdf_jax.data.token_cache.train_tokenizer", lambda *_, **__: pytest.fail("trained again"))
    prepare(config, progress=False)
    assert cached_files(config.cache_dir) == cached_files(whole.cache_dir)
    assert not list(Path(config.cache_dir).glob("unfinished-*"))
    total = len(list(in_parts(itertools.chain.from_iterable(map(text_pieces, read_all(config))))))
    kept = {"a torn line": 6, "a part lost": 0, "no line": 0, "no journal": 0, "no list": 0}.get(left, 7)
    if left != "a bit":
        assert abs(len(again) - (total - kept)) <= 1  # of two splits, each ends with a part that is not full


def read_all(config: DataConfig) -> list[str]:
    corpus = text_corpus(config.path, text_key="text", validation_fraction=config.validation_fraction)
    return [*corpus.read("train"), *corpus.read("validation")]


@pytest.mark.slow
def test_a_run_killed_by_the_system_goes_on_and_its_processes_end_with_it(text_folder, tmp_path):
    """By a real kill -9, while two processes encode for it."""
    for n in range(60):
        (text_folder / f"long-{n}.txt").write_text(f"{n} words, one after another; " * 3000)
    program = """
import sys
import spdf_jax.data.encoding as encoding
from spdf_jax.data import DataConfig, prepare
encoding.PART_BYTES = 100_000
prepare(DataConfig(source="text", path=sys.argv[1], cache_dir=sys.argv[2], tokenizer_vocab_size=300,
                   validation_fraction=0.3, processes=2))
"""
    command = [sys.executable, "-c", program, str(text_folder)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    cache = tmp_path / "cache"
    process = subprocess.Popen([*command, str(cache)])
    while not (done := list(cache.glob("unfinished-*/train.bin.done"))) or done[0].read_text().count("\n") < 5:
        assert process.poll() is None, "ended before it was killed"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(str(cache) in Path(place, "cmdline").read_text() for place in processes_here()):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.1)
    subprocess.run([*command, str(cache)], check=True)
    assert cached_files(cache) == cached_files(tmp_path / "whole")


def processes_here() -> list[Path]:
    return [place for place in Path("/proc").iterdir() if place.name.isdecimal() and (place / "cmdline").exists()]


def test_two_runs_at_once_both_get_their_tokens(text_folder, tmp_path, monkeypatch):
    """Where the file system has no locks, the other run may finish between our last look at the cache and our rename."""
    import spdf_jax.data.token_cache as cache

    numbers = itertools.count()
    own = lambda folder: contextlib.nullcontext(folder.with_name(f"unfinished-{next(numbers)}"))  # noqa: E731
    monkeypatch.setattr(cache, "turn_to_build", own)
    config = config_of(text_folder, tmp_path)
    publish, others = cache._publish, []

    def publish_second(draft, folder):
        monkeypatch.setattr(cache, "_publish", publish)
        others.append(prepare(config, progress=False))
        publish(draft, folder)

    monkeypatch.setattr(cache, "_publish", publish_second)
    ours = prepare(config, progress=False)
    np.testing.assert_array_equal(ours.train, others[0].train)
    assert len(list(Path(config.cache_dir).iterdir())) == 1


def test_a_cache_folder_that_cannot_be_written(text_folder, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(InputError, match=r"cannot keep tokens there.*data\.cache_dir"):
        prepare(config_of(text_folder, tmp_path), progress=False)


# --- TensorFlow Datasets ---


def build_tfds(data_dir, *, with_validation) -> None:
    import tensorflow_datasets as tfds

    class TinyText(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"body": tfds.features.Text(), "n": tfds.features.Scalar(np.int32)})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            validation = {"validation": self._generate_examples(5)} if with_validation else {}
            return {"train": self._generate_examples(30), **validation}

        def _generate_examples(self, count):
            for n in range(count):
                yield n, {"body": f"example {n} of {count}, été", "n": n}

    TinyText(data_dir=data_dir, file_format="array_record").download_and_prepare()


@pytest.mark.parametrize("with_validation", [True, False])
def test_tfds_through_array_record(with_validation, tmp_path):
    build_tfds(str(tmp_path / "tfds"), with_validation=with_validation)
    config = config_of(tmp_path / "tfds", tmp_path, source="tfds", tfds_name="tiny_text", text_key="body")
    data = prepare(config, progress=False)
    train, validation = documents(data.train, data.tokenizer), documents(data.validation, data.tokenizer)
    of_train, of_validation = ({f"example {n} of {count}, été" for n in range(count)} for count in (30, 5))
    if with_validation:
        assert (set(train), set(validation)) == (of_train, of_validation)
    else:
        assert {*train, *validation} == of_train
        assert len(train) + len(validation) == 30
    assert prepare(config, progress=False).fingerprint == data.fingerprint
    for text_key, message in (("text", "no feature data.text_key='text'.*body"), ("n", "not UTF-8 text")):
        with pytest.raises(InputError, match=message):
            prepare(config_of(config.path, tmp_path, source="tfds", tfds_name="tiny_text", text_key=text_key))


def test_tfds_that_is_read_in_order_only_is_refused(tmp_path):
    build_tfds(str(tmp_path / "tfds"), with_validation=True)
    (info,) = (tmp_path / "tfds").rglob("dataset_info.json")
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        InputError, match=r"not readable by random access; prepare it once .* file_format='array_record'"
    ):
        prepare(config_of(tmp_path / "tfds", tmp_path, source="tfds", tfds_name="tiny_text", text_key="body"))


def test_tfds_that_names_code_of_its_own_is_refused_before_anything_is_imported(tmp_path):
    build_tfds(str(tmp_path / "tfds"), with_validation=True)
    (features,) = (tmp_path / "tfds").rglob("features.json")
    features.write_text(
        features.read_text().replace("tensorflow_datasets.core.features.text_feature.Text", "antigravity.Text")
    )
    with pytest.raises(InputError, match=r"features.json: names code of its own, antigravity.Text"):
        prepare(config_of(tmp_path / "tfds", tmp_path, source="tfds", tfds_name="tiny_text", text_key="body"))
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["mnist", "no_such_thing", "kubric:movi", "not a name"])
def test_tfds_that_is_not_prepared(name, tmp_path):
    with pytest.raises(InputError, match=r"no prepared dataset found; .*download_and_prepare"):
        prepare(config_of(tmp_path, tmp_path, source="tfds", tfds_name=name))


# --- token files ---


def write_token_files(folder, train=range(500), validation=range(40)) -> DataConfig:
    folder.mkdir(exist_ok=True)
    np.array(train, dtype="<u2").tofile(folder / "train.bin")
    np.array(validation, dtype="<u2").tofile(folder / "val.bin")
    return DataConfig(source="token_files", path=str(folder))


def test_token_files_are_mapped_as_they_are(embedded, tmp_path):
    config = write_token_files(tmp_path / "tokens", train=[*range(250), 299, 0], validation=[1, 2, 65])
    data = prepare(config)
    assert isinstance(data.train, np.memmap)
    assert data.train.tolist() == [*range(250), 299, 0]
    assert (data.vocab_size, data.tokenizer, data.validation_bytes) == (300, None, None)
    embedded.tokenizer.save(str(tmp_path / "tokens/tokenizer.json"))
    assert prepare(config).tokenizer.to_str() == embedded.tokenizer.to_str()
    assert prepare(config).fingerprint == data.fingerprint
    write_token_files(tmp_path / "tokens", train=[*range(250), 298, 0], validation=[1, 2, 65])
    assert prepare(config).fingerprint != data.fingerprint
    write_token_files(tmp_path / "tokens", train=[300, 1], validation=[1, 2])
    with pytest.raises(InputError, match=r"token id 300, but .*tokens' ends at 299"):
        prepare(config)


def test_the_fingerprint_of_a_large_file_samples_it_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("spdf_jax.data.token_files._FULL_HASH_BYTES", 100)
    fingerprints = {
        prepare(write_token_files(tmp_path / "tokens", train=train)).fingerprint
        for train in ([1] * 9000, [1] * 9002, [*[1] * 8999, 2], [2, *[1] * 8999])
    }
    assert len(fingerprints) == 4


NPY = b"\x93NUMPY\x01\x00" + bytes(120)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "missing"),
        (b"", "empty"),
        (b"\1\0\2", "3 bytes, an odd number"),
        (b"\1\0", "one token only"),
        (b"just some text\n" * 1000, "looks like text"),
        ("é漢".encode() * 2000, "looks like text"),
        (NPY, "looks like a NumPy array"),
        (b"PK\x03\x04" + bytes(100), "looks like a zip archive"),
        *[(pickle.dumps(list(range(99)), protocol), "looks like a pickle") for protocol in (2, 3, 4, 5)],
    ],
)
@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_token_files_of_the_wrong_kind(name, content, message, tmp_path):
    config = write_token_files(tmp_path / "tokens")
    file = tmp_path / "tokens" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}.*{message}"):
        prepare(config)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("vocab_size", [256, 4096, 50257, 65536])
def test_real_ids_are_not_taken_for_another_type(vocab_size, seed, tmp_path):
    ids = np.random.default_rng(seed).integers(vocab_size, size=5000)
    assert prepare(write_token_files(tmp_path / "tokens", train=ids)).train.tolist() == ids.tolist()


# --- bad input ---


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"source": "web"}, "data.source: 'web' is not one of 'embedded', 'text'"),
        ({"path": ""}, r"data\.path is empty"),
        ({"source": "token_files", "path": ""}, r"data\.path is empty"),
        ({"source": "token_files", "path": "nowhere"}, "no such folder"),
        ({"source": "tfds"}, r"data\.tfds_name is empty"),
        ({"path": "nowhere"}, "'nowhere': no such file or folder"),
        ({"validation_fraction": 0.0}, "validation_fraction"),
        ({"validation_fraction": 1.0}, "validation_fraction"),
        ({"tokenizer_vocab_size": 256}, "at least 257"),
        ({"tokenizer": "nowhere.json"}, r"'nowhere\.json': no such file"),
        ({"validation_fraction": 1e-9}, "no document fell into the validation split"),
        ({"validation_fraction": 1 - 1e-9}, "no document fell into the train split"),
    ],
)
def test_configs_that_cannot_work(overrides, message, text_folder, tmp_path):
    with pytest.raises(InputError, match=message):
        prepare(config_of(text_folder, tmp_path, **overrides), progress=False)
    assert not list(tmp_path.glob("cache/*/*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "no text found"),
        ("a.txt", b" \n\n", "no text found"),
        ("a.txt", b"latin \xe9t\xe9", r"a\.txt: not UTF-8 \(byte 6\)"),
        ("train.bin", b"\1\0\2\0", r"train\.bin: holds zero bytes"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', r"a\.jsonl:2: no text under data\.text_key='text'.*body"),
        ("a.jsonl", b'{"text": "x"}\n\n["text"]\n', r"a\.jsonl:3: no text under"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: no text under"),
        ("a.jsonl", b'{"text": "x"\n', r"a\.jsonl:1: not a line of JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not a line of JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl:1: not UTF-8"),
    ],
)
def test_texts_that_cannot_be_read(name, content, message, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare(config_of(folder, tmp_path), progress=False)


def test_an_empty_folder_and_a_binary_file(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no text found"):
        prepare(config_of(tmp_path / "empty", tmp_path))
    (tmp_path / "file.txt").write_bytes(b"a\0b")
    with pytest.raises(InputError, match=r"file\.txt: holds zero bytes"):
        prepare(config_of(tmp_path / "file.txt", tmp_path))


def test_half_a_surrogate_pair_in_json_becomes_a_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b \\ud83d\\ude00"}\n' * 2)
    corpus = text_corpus(str(tmp_path), text_key="text", validation_fraction=0.5)
    assert {*corpus.read("train"), *corpus.read("validation")} == {"a\ufffdb \U0001f600"}


def test_tokenizers_that_cannot_be_used(tmp_path):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(pickle.dumps("not JSON"))
    with pytest.raises(InputError, match=r"not a Hugging Face tokenizer\.json"):
        load_tokenizer(file)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(file))
    with pytest.raises(InputError, match=r"has no '<\|endoftext\|>'"):
        load_tokenizer(file)


# --- batches ---


def take(count, tokens, **kwargs) -> list[Batch]:
    return list(islice(train_batches(tokens, **kwargs), count))


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


def joined(shares: list[list[Batch]]) -> list[Batch]:
    """Global batches from what each process got."""
    return [jax.tree.map(lambda *x: np.concatenate(x), *parts) for parts in zip(*shares, strict=True)]


def test_batches_have_their_types_and_targets_are_the_next_tokens(embedded):
    (batch,) = take(1, embedded.train, seq_len=32, batch_size=4, seed=0)
    assert [array.shape for array in batch[:3]] == [(4, 32)] * 3
    assert [array.dtype for array in batch[:3]] == [np.int32, np.int32, np.float32]
    np.testing.assert_array_equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])
    assert batch.weights_BT.all()


@pytest.mark.parametrize("n_tokens", [41, 43, 44])
def test_an_epoch_has_each_window_once_and_the_next_another_order(n_tokens):
    tokens = np.arange(n_tokens, dtype=np.uint16)  # 10 windows of 4, and up to 3 tokens over
    batches = take(10, tokens, seq_len=4, batch_size=2, seed=7)
    starts = np.concatenate([batch.tokens_BT[:, 0] for batch in batches])
    first, second = starts[:10].tolist(), starts[10:].tolist()
    assert sorted(first) == sorted(second) == list(range(0, 40, 4))
    assert first != second
    assert first != sorted(first)
    for batch in batches:
        np.testing.assert_array_equal(batch.targets_BT, batch.tokens_BT + 1)


def test_the_order_is_the_seeds_and_neighbouring_seeds_share_none():
    tokens = np.arange(401)
    orders = [
        np.concatenate([batch.tokens_BT[:, 0] for batch in take(20, tokens, seq_len=4, batch_size=10, seed=seed)])
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(orders[0], orders[1])
    assert (orders[0][:100] != orders[2][:100]).any()
    assert (orders[0][100:] != orders[2][:100]).any()


@pytest.mark.parametrize("start_batch", [1, 3, 12])
def test_starting_at_a_batch_equals_skipping_to_it(start_batch):
    kwargs = {"seq_len": 4, "batch_size": 6, "seed": 3}  # 10 windows: batches span epochs
    tokens = np.arange(41)
    assert_same(
        take(9, tokens, **kwargs, start_batch=start_batch), take(9 + start_batch, tokens, **kwargs)[start_batch:]
    )
    shares = [take(4, tokens, **kwargs, start_batch=start_batch, process_index=p, process_count=2) for p in range(2)]
    assert_same(joined(shares), take(4, tokens, **kwargs, start_batch=start_batch))


@pytest.mark.parametrize("process_count", [2, 4, 8])
def test_any_number_of_processes_shares_the_same_global_batches(process_count):
    tokens = np.arange(101)
    kwargs = {"seq_len": 4, "batch_size": 8}
    shares = [
        take(7, tokens, **kwargs, seed=5, process_index=p, process_count=process_count) for p in range(process_count)
    ]
    assert shares[0][0].tokens_BT.shape == (8 // process_count, 4)
    assert_same(joined(shares), take(7, tokens, **kwargs, seed=5))
    shares = [
        list(validation_batches(tokens[:75], **kwargs, process_index=p, process_count=process_count))
        for p in range(process_count)
    ]
    assert_same(joined(shares), list(validation_batches(tokens[:75], **kwargs)))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_one_window_fills_any_batch(batch_size):
    for batch in take(3, np.arange(5), seq_len=4, batch_size=batch_size, seed=0):
        assert batch.tokens_BT.tolist() == [[0, 1, 2, 3]] * batch_size


@pytest.mark.parametrize("n_tokens", [2, 4, 5, 6, 33, 34, 40, 65, 66])
def test_validation_scores_every_target_once(n_tokens):
    tokens = np.arange(1, n_tokens + 1, dtype=np.uint16)
    batches = list(validation_batches(tokens, seq_len=4, batch_size=8))
    assert all(array.shape == (8, 4) for array in jax.tree.leaves(batches))
    real = np.concatenate([batch.weights_BT.ravel() for batch in batches]) == 1
    inputs, targets = (np.concatenate([batch[i].ravel() for batch in batches]) for i in (0, 1))
    np.testing.assert_array_equal(inputs[real], tokens[:-1])
    np.testing.assert_array_equal(targets[real], tokens[1:])
    assert not inputs[~real].any()
    assert not targets[~real].any()
    assert sum(batch.weights_BT.sum() for batch in batches) == n_tokens - 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"seq_len": 10}, "10 tokens is shorter than one example of seq_len=10"),
        ({"batch_size": 3, "process_count": 2}, "batch_size=3 is not divisible by process_count=2"),
        ({"process_index": 1}, "process_index=1"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"start_batch": -1}, "start_batch=-1"),
    ],
)
def test_batches_that_cannot_be_made(kwargs, message):
    with pytest.raises(InputError, match=message):
        train_batches(np.arange(10), **{"seq_len": 4, "batch_size": 2, "seed": 0, **kwargs})


def test_validation_batches_that_cannot_be_made():
    with pytest.raises(InputError, match="1 tokens has no target"):
        validation_batches(np.arange(1), seq_len=4, batch_size=2)
    with pytest.raises(InputError, match="not divisible"):
        validation_batches(np.arange(9), seq_len=4, batch_size=3, process_count=2)


# --- the unigram baseline ---


def test_unigram_loss_by_hand(monkeypatch):
    monkeypatch.setattr("spdf_jax.data.token_files._CHUNK_TOKENS", 2)
    # Train counts 3, 1, 0 with one added: 4/7, 2/7, 1/7. Targets: 0, 2, 1 (the first token is none).
    loss = unigram_loss(np.array([0, 0, 1, 0]), np.array([2, 0, 2, 1], dtype=np.uint16), 3)
    assert loss == pytest.approx(-np.log([4 / 7, 1 / 7, 2 / 7]).mean())
    with pytest.raises(InputError, match="token id 3 is not under vocab_size=3"):
        unigram_loss(np.array([0, 3]), np.array([0, 1]), 3)


def test_unigram_loss_of_the_embedded_corpus_beats_uniform(embedded):
    assert 0 < unigram_loss(embedded.train, embedded.validation, VOCAB_SIZE) < np.log(VOCAB_SIZE)
