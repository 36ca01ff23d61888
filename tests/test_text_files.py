"""Folders of documents as they are found: every kind of file is read, each split honoured, and nothing left out unsaid."""

import bz2
import gzip
import io
import json
import lzma
import os
import random
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from spdf_jax.config.read import default_config, load_config
from spdf_jax.data import DataConfig, prepare
from spdf_jax.data.corpus import text_corpus
from spdf_jax.data.text_files import file_documents, text_file
from spdf_jax.errors import InputError


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def json_lines(texts) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def csv_file(texts, separator=",") -> bytes:
    rows = (f'{n}{separator}"{text.replace(chr(34), 2 * chr(34))}"\r\n' for n, text in enumerate(texts))
    return f"id{separator}text\r\n{''.join(rows)}".encode()


def parquet_file(texts) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), sink, row_group_size=3)
    return sink.getvalue()


def arrow_file(texts, new=ipc.new_file) -> bytes:
    table, sink = pyarrow.table({"text": texts}), io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, 3)
    return sink.getvalue()


def utf16_lines(texts) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode("utf-16")


#: How to write documents, by the end of a file's name.
ROWS = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".txt": json_lines,
    ".json": json_lines,
    ".list.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=1).encode(),
    ".long.json": lambda texts: json.dumps([{"text": text} for text in texts]).encode(),
    ".objects.json": lambda texts: b"\n".join(json.dumps({"text": text}, indent=1).encode() for text in texts),
    ".jsonl.gz": lambda texts: gzip.compress(json_lines(texts)),
    ".json.gz": lambda texts: gzip.compress(json_lines(texts)),
    ".members.jsonl.gz": lambda texts: b"".join(gzip.compress(json_lines([text])) for text in texts),
    ".jsonl.zst": lambda texts: zstd(json_lines(texts)),
    ".frames.jsonl.zst": lambda texts: b"".join(zstd(json_lines([text])) for text in texts),
    ".jsonl.bz2": lambda texts: bz2.compress(json_lines(texts)),
    ".jsonl.xz": lambda texts: lzma.compress(json_lines(texts)),
    ".csv": csv_file,
    ".csv.gz": lambda texts: gzip.compress(csv_file(texts)),
    ".tsv": lambda texts: csv_file(texts, "\t"),
    ".parquet": parquet_file,
    ".arrow": arrow_file,
    ".stream.arrow": lambda texts: arrow_file(texts, ipc.new_stream),
    ".utf16.jsonl": utf16_lines,
    ".utf16.csv": lambda texts: csv_file(texts).decode().encode("utf-16"),
}
TEXTS = {
    ".txt": str.encode,
    ".md": lambda text: text.encode("utf-16"),
    ".rst": lambda text: text.encode("utf-8-sig"),
    ".tex": lambda text: text.encode("utf-32"),
    ".txt.gz": lambda text: gzip.compress(text.encode()),
    ".zst": lambda text: zstd(text.encode()),
    "": str.encode,
}
NASTY = ["été, 漢字 \U0001f600", 'a "quoted" line\r\nand\tanother', "one\u2028two\x85three", "{", "x" * 100_000]


def read(path, **kwargs) -> dict[str, list[str]]:
    corpus = text_corpus(str(path), **{"text_key": "text", "validation_fraction": 0.4, **kwargs})
    return {split: list(corpus.read(split)) for split in ("train", "validation")}


@pytest.mark.parametrize("suffix", ROWS)
def test_every_kind_of_rows_is_read_and_never_its_syntax(suffix, tmp_path):
    texts = [f"document {n}" for n in range(20)] + NASTY
    (tmp_path / f"some{suffix}").write_bytes(ROWS[suffix](texts))
    (tmp_path / "README.md").write_text("about it")
    found = read(tmp_path)
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    assert all(found.values())
    (tmp_path / f"held{suffix}").write_bytes(ROWS[suffix](["held out"]))
    found = read(tmp_path, validation_files="held*", train_files="some*")
    assert found == {"train": texts, "validation": ["held out"]}


@pytest.mark.parametrize("suffix", TEXTS)
def test_every_kind_of_text_is_read_whole(suffix, tmp_path):
    for n, text in enumerate(NASTY):
        (tmp_path / f"{n}{suffix}").write_bytes(TEXTS[suffix](text))
    found = read(tmp_path)
    assert sorted(found["train"] + found["validation"]) == sorted(NASTY)


def test_one_plain_file_beside_packed_ones_is_not_all_that_is_read(tmp_path):
    for n in range(9):
        content = json_lines([f"document {n}"])
        (tmp_path / f"part{n}.jsonl{'.gz' if n else ''}").write_bytes(gzip.compress(content) if n else content)
    found = read(tmp_path)
    assert sorted(found["train"] + found["validation"]) == [f"document {n}" for n in range(9)]


LAYOUTS = {
    "folders": ("train/{n}{s}", "validation/{n}{s}", "test/{n}{s}"),
    "folders in data": ("data/train/a/{n}{s}", "data/valid/a/{n}{s}", "data/test/a/{n}{s}"),
    "Hugging Face's shards": (
        "data/train-0000{n}-of-00003{s}",
        "data/validation-0000{n}-of-00003{s}",
        "data/test-0000{n}-of-00003{s}",
    ),
    "the Pile's": ("train/0{n}{s}", "val{s}", "test{s}"),
    "prefixes": ("train_{n}{s}", "dev{n}{s}", "eval.{n}{s}"),
    "C4's": ("c4-train.0000{n}-of-01024{s}", "c4-validation.0000{n}-of-00008{s}", "c4-test.0000{n}{s}"),
    "WikiText's": ("wiki.train.{n}{s}", "wiki.valid.{n}{s}", "wiki.test.{n}{s}"),
    "synonyms": ("Training/{n}{s}", "DEV/{n}{s}", "evaluation/{n}{s}"),
}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(sorted(LAYOUTS)),
    suffix=st.sampled_from(sorted(s for s in ROWS if ".txt" not in s)),
    counts=st.tuples(*[st.lists(st.integers(1, 6), min_size=low, max_size=3) for low in (1, 0, 0)]),
    linked=st.booleans(),
)
def test_no_document_of_one_split_is_in_another(tmp_path_factory, layout, suffix, counts, linked):
    root, files = tmp_path_factory.mktemp("layout"), {}
    for split, pattern, shards in zip(("train", "validation", "test"), LAYOUTS[layout], counts, strict=True):
        for n, size in enumerate(shards):
            name = pattern.format(n=n, s=suffix)
            files[name] = [f"{split} document {n} {m}" for m in range(size)]
    target = root / "elsewhere" if linked else root / "set"
    for name, texts in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(ROWS[suffix](texts))
    if linked:
        (root / "set").mkdir()
        for path in target.iterdir():
            (root / "set" / path.name).symlink_to(path, target_is_directory=path.is_dir())
    (root / "set" / "README.md").write_text("train, validation and test documents")
    found = read(root / "set")
    of = {
        split: [t for texts in files.values() for t in texts if t.startswith(split)]
        for split in ("train", "validation")
    }
    if of["validation"]:
        assert {split: sorted(texts) for split, texts in found.items()} == {s: sorted(t) for s, t in of.items()}
    else:
        assert sorted(found["train"] + found["validation"]) == sorted(of["train"])
        assert not set(found["train"]) & set(found["validation"])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    texts=st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=30), suffix=st.sampled_from([".jsonl", ".parquet"])
)
def test_a_text_that_is_there_twice_is_in_one_split(tmp_path_factory, texts, suffix):
    root = tmp_path_factory.mktemp("twice")
    for n in range(2):
        (root / f"{n}{suffix}").write_bytes(ROWS[suffix](texts))
    found = read(root)
    assert sorted(found["train"] + found["validation"]) == sorted(2 * texts)
    assert not set(found["train"]) & set(found["validation"])


def test_a_file_under_two_names_is_read_once_and_refused_in_two_splits(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "two", "three"]))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    (tmp_path / "more").mkdir()
    os.link(tmp_path / "a.jsonl", tmp_path / "more/c.jsonl")
    found = read(tmp_path)
    assert sorted(found["train"] + found["validation"]) == ["one", "three", "two"]
    (tmp_path / "sets/train").mkdir(parents=True)
    (tmp_path / "sets/train/x.jsonl").write_bytes(json_lines(["x"]))
    for other in ("validation", "test"):
        (tmp_path / f"sets/{other}").symlink_to("train")
        with pytest.raises(InputError, match=rf"(train/x|{other}/x).jsonl are one file in two splits"):
            read(tmp_path / "sets")
        (tmp_path / f"sets/{other}").unlink()


def test_test_documents_alone_are_not_for_training_and_this_is_said(tmp_path, capsys):
    (tmp_path / "train.txt").write_text("".join(f"to train on {n}\n" for n in range(99)))
    (tmp_path / "test.txt").write_text("to test on")
    (tmp_path / "LICENSE").write_text("about it")
    found = read(tmp_path)
    assert "".join(found["train"] + found["validation"]) == (tmp_path / "train.txt").read_text()
    config = DataConfig("text", str(tmp_path), tokenizer_vocab_size=257, cache_dir=str(tmp_path / ".cache"))
    prepare(config)
    assert capsys.readouterr().out == f"{tmp_path}: not read: LICENSE (about the data), test.txt (for testing)\n"
    prepare(config, progress=False)
    assert not capsys.readouterr().out


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


LINES = json_lines(["a", "b", "c"])
REFUSED = {
    "no split beside splits": ({"train.jsonl": LINES, "more.jsonl": LINES}, "train.jsonl names its split, more.jsonl does"),
    "two splits in a name": ({"train/a.jsonl": LINES, "train/test.jsonl": LINES}, "train/test.jsonl names more than one split"),
    "no training": ({"test.jsonl": LINES, "val.jsonl": LINES}, "no file named train beside test.jsonl, val.jsonl"),
    "packed and not": ({"a.jsonl": LINES, "a.jsonl.gz": gzip.compress(LINES)}, "a.jsonl and a.jsonl.gz are one file packed"),
    "a picture": ({"a.txt": b"text", "b.png": b"\x89PNG\0\0"}, r"b.png: holds zero .*name what to read in data.train_files"),
    "several": ({f"{n}.bin": b"\0" for n in range(5)}, r"0.bin: .*\(5 files cannot be read: 0.bin, 1.bin, 2.bin and 2 more\)"),
    "UTF-16 without a mark": ({"a.txt": "some text".encode("utf-16-le")}, "a.txt: holds zero bytes"),
    "cut UTF-16": ({"a.txt": "some text".encode("utf-16")[:-1]}, "a.txt: not UTF-16"),
    "cut gzip": ({"a.jsonl.gz": gzip.compress(LINES * 99)[:-9]}, "a.jsonl.gz: cut or damaged"),
    "flipped gzip": ({"a.jsonl.gz": gzip.compress(LINES)[:20] + b"\xff" * 50}, "a.jsonl.gz: cut or damaged"),
    "cut zstd": ({"a.jsonl.zst": zstd(LINES * 9999)[:-9]}, "a.jsonl.zst: c"),
    "cut xz": ({"a.jsonl.xz": lzma.compress(LINES)[:-9]}, "a.jsonl.xz: cut or damaged"),
    "cut bz2": ({"a.jsonl.bz2": bz2.compress(LINES)[:-9]}, "a.jsonl.bz2: cut or damaged"),
    "cut parquet": ({"a.parquet": parquet_file(["a"] * 99)[:-9]}, "a.parquet: cut or damaged"),
    "damaged parquet": ({"a.parquet": b"PAR1" + bytes(99)}, "a.parquet: cut or damaged"),
    "packed parquet": ({"a.parquet.gz": gzip.compress(parquet_file(["a"]))}, "a packed Parquet file"),
    "no parquet": ({"a.parquet": b"just text"}, "a.parquet: no Parquet file"),
    "cut arrow": ({"a.arrow": arrow_file(["a"] * 99)[:-9]}, "a.arrow: cut or damaged"),
    "no such column": ({"a.parquet": parquet_file(["a"])}, r"a.parquet: no column .*'body', found \['id', 'text'\]"),
    "a column of numbers": ({"a.parquet": parquet_file([1, 2])}, "column data.text_key='text' holds int64, not text"),
    "no such CSV column": ({"a.csv": csv_file(["a"])}, r"a.csv:1: no column data.text_key='body', found \['id', 'text'\]"),
    "a short CSV row": ({"a.csv": b"id,text\n1\n"}, "a.csv:2: 1 fields under 2 columns"),
    "not CSV": ({"a.csv": b'id,text\n1,"x" y\n'}, "a.csv:2: not CSV"),
    "an empty file": ({"a.jsonl": LINES, "b.jsonl": b""}, "b.jsonl: holds nothing"),
    "nothing packed": ({"a.txt.gz": gzip.compress(b"")}, "a.txt.gz: holds nothing"),
    "a list of numbers": ({"a.json": b"[1, 2]"}, "a.json: item 1: no text under"),
    "a list without end": ({"a.json": b'[{"text": "a"},'}, "a.json: item 2: not JSON"),
    "more after a list": ({"a.json": b'[{"text": "a"}] x'}, "a.json: more after the end"),
    "a deep list": ({"a.json": b"[" * 100_000}, "a.json: item 1: not JSON"),
    "no such key": ({"package.json": b'{\n "name": "a"\n}'}, r"package.json: item 1: no text under .*\['name'\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_named_and_refused(case, tmp_path):
    files, message = REFUSED[case]
    write(tmp_path, files)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, text_key="body" if "'body'" in message else "text")
    assert "\n" not in str(caught.value)


SAVED = {"data-00000-of-00002.arrow": [*"abcd"], "data-00001-of-00002.arrow": [*"efgh"]}
SAVED = {name: arrow_file(texts, ipc.new_stream) for name, texts in SAVED.items()} | {
    "dataset_info.json": b'{"features": {}}',
    "state.json": b'{"_data_files": []}',
}


def test_a_saved_dataset_is_read_without_what_was_computed_from_it(tmp_path):
    write(tmp_path / "one", SAVED)
    write(tmp_path / "one", {"cache-0123456789abcdef.arrow": arrow_file([*"ABCD"])})
    found = read(tmp_path / "one")
    assert sorted(found["train"] + found["validation"]) == [*"abcdefgh"]
    assert read(tmp_path / "one", train_files="cache*", validation_files="data-00001*") == {
        "train": [*"ABCD"],
        "validation": [*"efgh"],
    }
    indices = pyarrow.table({"indices": pyarrow.array([1, 0], pyarrow.uint64())})
    for split, texts in (("train", "abc"), ("validation", "de"), ("test", "f")):
        write(tmp_path / "dict" / split, SAVED)
        (tmp_path / "dict" / split / "data-00001-of-00002.arrow").unlink()
        (tmp_path / "dict" / split / "data-00000-of-00002.arrow").write_bytes(arrow_file([*texts], ipc.new_stream))
        with ipc.new_stream(
            tmp_path / "dict" / split / "cache-fedcba9876543210_00001_of_00002.arrow", indices.schema
        ) as file:
            file.write_table(indices)
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    assert read(tmp_path / "dict") == {"train": [*"abc"], "validation": [*"de"]}


def test_a_saved_dataset_without_a_row_is_said_to_hold_no_text(tmp_path):
    write(tmp_path, {name: content for name, content in SAVED.items() if name.endswith(".json")})
    with pytest.raises(InputError, match="no text found"):
        read(tmp_path)


def test_no_more_is_held_of_a_larger_row_group(tmp_path):
    held = []
    for count in (2000, 6000):
        texts = [random.Random(n).randbytes(2500).hex() for n in range(count)]
        parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10**6)
        before, most = pyarrow.total_allocated_bytes(), 0
        for (_, text), expected in zip(file_documents(text_file(tmp_path / "a.parquet"), "text"), texts, strict=True):
            assert text == expected
            most = max(most, pyarrow.total_allocated_bytes() - before)
        held.append(most)
    assert 0 < held[1] < 1.3 * held[0]


@pytest.mark.slow
def test_what_datasets_itself_saves_is_read(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    texts = [f"row {n}" for n in range(100)]
    rows = datasets.Dataset.from_dict({"id": list(range(100)), "body": texts})
    rows.save_to_disk(tmp_path / "saved", num_shards=3)
    again = datasets.load_from_disk(str(tmp_path / "saved"))
    again.map(lambda row: {"body": row["body"].upper()})
    again.filter(lambda row: row["id"] % 2)
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 2
    found = read(tmp_path / "saved", text_key="body")
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    rows.filter(lambda row: row["id"] % 2).shuffle(seed=0).save_to_disk(tmp_path / "odd")
    found = read(tmp_path / "odd", text_key="body")
    assert sorted(found["train"] + found["validation"]) == sorted(texts[1::2])
    split = rows.train_test_split(test_size=0.2, seed=0)
    datasets.DatasetDict(train=split["train"], validation=split["test"]).save_to_disk(tmp_path / "dict")
    assert read(tmp_path / "dict", text_key="body") == {
        "train": split["train"]["body"][:],
        "validation": split["test"]["body"][:],
    }
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000-of-00001.parquet")
    found = read(tmp_path / "parquet", text_key="body")
    assert sorted(found["train"] + found["validation"]) == sorted(texts)
    for key, message in (("id", "holds int64, not text"), ("text", r"no column .*found \['id', 'body'\]")):
        with pytest.raises(InputError, match=message):
            read(tmp_path / "saved", text_key=key)
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "empty")
    with pytest.raises(InputError, match="no text found"):
        read(tmp_path / "empty")


def test_links_to_nothing_and_circles_are_refused(tmp_path):
    write(tmp_path, {"a/a.txt": b"a", "b/b.txt": b"b"})
    (tmp_path / "a/gone.txt").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"gone\.txt: no file, or a link to nothing"):
        read(tmp_path)
    (tmp_path / "a/gone.txt").unlink()
    (tmp_path / "a/to_b").symlink_to("../b")
    (tmp_path / "b/to_a").symlink_to("../a")
    with pytest.raises(InputError, match="a link to a folder that it lies in"):
        read(tmp_path)


def test_a_user_says_what_is_read_and_for_which_split(tmp_path):
    write(
        tmp_path,
        {
            "a/1.jsonl": json_lines(["a"]),
            "a/2.jsonl": json_lines(["b"]),
            "held/3.jsonl": json_lines(["c"]),
            "test.pdf": b"\0",
        },
    )
    assert read(tmp_path, train_files="a/*", validation_files="held/*") == {"train": ["a", "b"], "validation": ["c"]}
    assert read(tmp_path, train_files="a/1*, a/2*", validation_files="*3.jsonl") == {
        "train": ["a", "b"],
        "validation": ["c"],
    }
    (tmp_path / "test.pdf").unlink()
    assert read(tmp_path, validation_files="held/*") == {"train": ["a", "b"], "validation": ["c"]}
    for kwargs, message in (
        ({"train_files": "b/*"}, r"data.train_files='b/\*': no file of .* matches 'b/\*'; there are a/1.jsonl"),
        ({"train_files": "*", "validation_files": "held/*"}, "held/3.jsonl is in data.train_files, too"),
    ):
        with pytest.raises(InputError, match=message):
            read(tmp_path, **kwargs)
    with pytest.raises(InputError, match=r"data\.train_files='\*': is for data.source='text'"):
        prepare(DataConfig(train_files="*"))


def test_a_null_is_no_text_and_rows_can_be_split_by_their_place_as_once(tmp_path):
    write(
        tmp_path, {"a.jsonl": b'{"text": null}\n' + json_lines("abcdefgh"), "b.parquet": parquet_file([*"ijkl", None])}
    )
    found = read(tmp_path)
    assert sorted(found["train"] + found["validation"]) == list("abcdefghijkl")
    named = read(tmp_path, split_by="name")
    assert sorted(named["train"] + named["validation"]) == list("abcdefghijkl")
    assert named != found


def damaged(data, content: bytes) -> bytes:
    """The content cut, emptied, with zeros in it, changed by a bit, or with bytes of anything."""
    at = data.draw(st.integers(0, len(content) - 1))
    size = data.draw(st.sampled_from([1, 8, len(content)]))
    middle = data.draw(
        st.sampled_from(
            [b"", bytes(size), bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))]), b"[{" * size, b"\xff\xfe"]
        )
    )
    return content[:at] + middle + data.draw(st.sampled_from([b"", content[at + len(middle) :]]))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), suffix=st.sampled_from(sorted(ROWS)))
def test_a_damaged_file_gives_texts_or_one_line_and_stays_as_it_is(data, suffix, tmp_path_factory):
    file = tmp_path_factory.mktemp("damaged") / f"a{suffix}"
    content = damaged(data, ROWS[suffix]([f"document {n}" for n in range(12)]))
    file.write_bytes(content)
    line = f"{file}: no refusal"
    try:
        assert all(isinstance(text, str) for texts in read(file.parent).values() for text in texts)
    except InputError as error:
        line = str(error)
    assert str(file.parent) in line
    assert "\n" not in line
    assert file.read_bytes() == content


def test_a_config_from_before_there_was_a_choice_splits_by_name(tmp_path):
    config = default_config("e", "v", variants=("v",)).to_dict()
    config["data"] |= {"source": "text", "path": "texts"}
    for name in ("split_by", "train_files", "validation_files", "token_dtype"):
        del config["data"][name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_config(tmp_path / "config.json").data == DataConfig("text", "texts", split_by="name")
