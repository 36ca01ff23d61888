"""Token files of others: their types and headers are known, and what is read as it was not written is refused."""

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdf_jax.data import DataConfig, TokenData, prepare, train_batches, validation_batches
from spdf_jax.data.token_files import TOKEN_DTYPES, Shards
from spdf_jax.errors import InputError

IDS = {
    "train": np.random.default_rng(0).integers(50_257, size=3000),
    "val": np.random.default_rng(1).integers(50_257, size=100),
}
LARGE = {split: ids * 3 for split, ids in IDS.items()}  # of a vocabulary of 150,771


def read(folder: Path, **kwargs) -> TokenData:
    return prepare(DataConfig(source="token_files", path=str(folder), **kwargs))


def write_raw(folder: Path, ids, dtype: str) -> Path:
    for split in ids:
        ids[split].astype(np.dtype(dtype).newbyteorder("<")).tofile(folder / f"{split}.bin")
    return folder


def shard(ids, magic=20240520, version=1, dtype="<u2", count=None) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    return header.tobytes() + np.asarray(ids).astype(dtype).tobytes()


def assert_holds(data: TokenData, ids) -> None:
    for tokens, expected in ((data.train, ids["train"]), (data.validation, ids["val"])):
        assert len(tokens) == tokens.shape[0] == len(expected)
        np.testing.assert_array_equal(tokens[:], expected)
    assert data.vocab_size == 1 + max(int(ids[split].max()) for split in ids)


@pytest.mark.parametrize("dtype", TOKEN_DTYPES)
def test_every_type_is_read_as_it_is_said(dtype, tmp_path):
    ids = {"uint8": {split: ids % 256 for split, ids in IDS.items()}, "uint16": IDS}.get(dtype, LARGE)
    data = read(write_raw(tmp_path, ids, dtype), token_dtype=dtype)
    assert_holds(data, ids)
    assert data.train.dtype == dtype
    assert isinstance(data.train, np.memmap)
    batch = next(train_batches(data.train, seq_len=8, batch_size=2, seed=0))
    assert batch.tokens_BT.dtype == np.int32
    np.testing.assert_array_equal(batch.tokens_BT[:, 1:], batch.targets_BT[:, :-1])


@pytest.mark.parametrize(
    ("written", "read_as", "ids", "right"),
    [
        ("uint32", "", IDS, "uint32 or int32"),
        ("int32", "", LARGE, "uint32 or int32"),
        ("int64", "", IDS, "uint64 or int64"),
        ("uint64", "uint16", LARGE, "uint64 or int64"),
        ("int64", "uint32", LARGE, "uint64 or int64"),
        ("int64", "int32", IDS, "uint64 or int64"),
    ],
)
def test_a_wider_type_is_noticed_and_named(written, read_as, ids, right, tmp_path):
    with pytest.raises(InputError, match=rf"train\.bin: read as .*they are wider; set data\.token_dtype to {right}$"):
        read(write_raw(tmp_path, ids, written), token_dtype=read_as)


@pytest.mark.parametrize(("written", "read_as"), [("uint16", "uint32"), ("uint16", "int32"), ("uint32", "int64")])
def test_a_narrower_type_is_noticed(written, read_as, tmp_path):
    with pytest.raises(
        InputError, match=rf"read as {read_as}, it holds id -?\d+, which no vocabulary has; set data.token_d"
    ):
        read(write_raw(tmp_path, IDS, written), token_dtype=read_as)


def test_the_fingerprint_covers_the_type(tmp_path):
    ids = {split: ids % 65_536 for split, ids in IDS.items()}
    wide = read(write_raw(tmp_path, ids, "uint32"), token_dtype="uint32").fingerprint
    assert wide != read(tmp_path, token_dtype="int32").fingerprint
    assert read(write_raw(tmp_path, ids, "uint16")).fingerprint == read(tmp_path, token_dtype="uint16").fingerprint


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, "<u2"), (20240801, 7, "<u4")])
def test_shards_of_llm_c_are_one_stream_without_their_headers(magic, version, dtype, tmp_path):
    ids = IDS if dtype == "<u2" else LARGE
    for n, part in enumerate(np.split(ids["train"], [700, 701, 1500])):
        (tmp_path / f"fineweb_train_{n + 1:06d}.bin").write_bytes(shard(part, magic, version, dtype))
    (tmp_path / "fineweb_val_000000.bin").write_bytes(shard(ids["val"], magic, version, dtype))
    data = read(tmp_path)
    assert_holds(data, ids)
    batches = train_batches(data.train, seq_len=64, batch_size=4, seed=0)
    whole = train_batches(ids["train"], seq_len=64, batch_size=4, seed=0)
    for _ in range(15):
        np.testing.assert_array_equal(next(batches).targets_BT, next(whole).targets_BT)
    for ours, theirs in zip(
        validation_batches(data.validation, seq_len=10, batch_size=4),
        validation_batches(ids["val"], seq_len=10, batch_size=4),
        strict=True,
    ):
        np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT)
    before = data.fingerprint
    second = tmp_path / "fineweb_train_000002.bin"
    second.unlink()  # batches are read ahead, and what is mapped must not shrink
    second.write_bytes(shard([1], magic, version, dtype))
    assert read(tmp_path).fingerprint != before


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=6), start=st.integers(0, 40), length=st.integers(0, 40))
def test_shards_are_sliced_as_one_array(sizes, start, length):
    whole = np.arange(sum(sizes), dtype=np.uint16)
    shards = Shards(np.split(whole, np.cumsum(sizes)[:-1]))
    np.testing.assert_array_equal(shards[start : start + length], whole[start : start + length])
    assert shards[:].dtype == whole.dtype
    if start < len(whole):
        assert shards[start] == whole[start]
        assert shards[-1] == whole[-1]


def test_arrays_and_megatrons_index_say_their_type(tmp_path):
    np.save(tmp_path / "train.npy", LARGE["train"])
    np.save(tmp_path / "val.npy", LARGE["val"].astype(np.int32))
    assert_holds(read(tmp_path), LARGE)
    for file in tmp_path.iterdir():
        file.unlink()
    write_raw(tmp_path, LARGE, "int32")
    for split in LARGE:
        (tmp_path / f"{split}.bin").rename(tmp_path / f"pile_{split}_text_document.bin")
        (tmp_path / f"pile_{split}_text_document.idx").write_bytes(
            b"MMIDIDX\0\0" + struct.pack("<QB", 1, 4) + bytes(16)
        )
    assert_holds(read(tmp_path), LARGE)
    with pytest.raises(InputError, match=r"token_dtype='uint16': .* says itself that it holds int32"):
        read(tmp_path, token_dtype="uint16")


BAD = {
    "cut": ({"train.bin": shard(range(100))[:-2]}, r"1222 bytes where its header says 1224: truncated"),
    "cut header": ({"train.bin": shard(range(100))[:400]}, "truncated"),
    "another version": ({"train.bin": shard(range(100), version=3)}, "a shard of llm.c of version 3"),
    "nothing in it": ({"train.bin": shard([])}, "truncated"),
    "a type beside a header": ({"train.bin": shard(range(100))}, "token_dtype='int64': .* says itself that it holds uint16"),
    "no split in a name": ({"train.bin": shard(range(9)), "other.bin": bytes(9)}, r"other\.bin: its name does not say"),
    "whole and shards": ({"train.bin": shard(range(9)), "x_train_1.bin": shard(range(9))}, r"train\.bin: stands beside x_t"),
    "half a number": ({"train.bin": bytes(range(1, 10))}, r"9 bytes, truncated or not int64"),
    "floats": ({"train.npy": b"\x93NUMPY\x01\x00" + bytes(99)}, r"train\.npy: not a whole NumPy array"),
    "not Megatron's": ({"train.bin": bytes(range(1, 9)), "train.idx": b"nothing"}, r"train\.idx: no index of Megatron's"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_files_that_are_not_what_they_say_are_refused(case, tmp_path):
    files, message = BAD[case]
    (tmp_path / "val.bin").write_bytes(shard(range(9)))
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(tmp_path, token_dtype="int64" if re.search("int64", message) else "")
    assert "\n" not in str(caught.value)


def test_a_type_that_no_file_has_and_a_source_without_types(tmp_path):
    with pytest.raises(InputError, match=r"token_dtype: 'float32' is not one of"):
        DataConfig(token_dtype="float32")
    with pytest.raises(InputError, match=r"token_dtype='uint32': is for data.source='token_files'"):
        prepare(DataConfig(source="text", path=str(tmp_path), token_dtype="uint32"))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["raw", "shard", "array"]),
    at=st.integers(0, 2**20),
    middle=st.binary(max_size=8) | st.integers(1, 400).map(bytes),
    cut=st.booleans(),
)
def test_a_damaged_file_gives_ids_or_one_line_and_stays_as_it_is(kind, at, middle, cut, tmp_path_factory):
    folder, ids = tmp_path_factory.mktemp("damaged"), IDS["train"][:500].astype("<u2")
    file = folder / ("train.npy" if kind == "array" else "train.bin")
    if kind == "array":
        np.save(file, ids)
    else:
        file.write_bytes(ids.tobytes() if kind == "raw" else shard(ids))
    content = file.read_bytes()
    at %= len(content)
    content = content[:at] + middle + (b"" if cut else content[at + len(middle) :])
    file.write_bytes(content)
    (folder / "val.bin").write_bytes(shard(range(9)))
    line = f"{file}: no refusal"
    try:
        data = read(folder)
        assert 0 <= data.train[:].min() <= data.train[:].max() < data.vocab_size
    except InputError as error:
        line = str(error)
    assert str(file) in line
    assert "\n" not in line
    assert file.read_bytes() == content
