"""Token files: ids as they lie on the disk, memory-mapped and never copied whole.

A folder with one file a split, or shards of it, whose names say the split as in `layout`:

- raw ids, nothing else in the file, `train.bin` and `val.bin` of nanoGPT (`data/openwebtext/prepare.py`);
- shards of llm.c (`dev/data/data_common.py`) and modded-nanogpt, `NAME_train_000001.bin`: 256 int32 before the ids;
- Megatron's `NAME.bin`, whose `NAME.idx` says their type;
- one-dimensional NumPy arrays, `train.npy`.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
from tokenizers import Tokenizer

from spdf_jax.data.layout import split_words
from spdf_jax.data.tokenizer import holds_tokenizer, load_tokenizer, vocabulary_size
from spdf_jax.errors import InputError

_CHUNK_TOKENS = 1 << 24
_FULL_HASH_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 1024, 4096

_OTHER_FORMATS = {
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b\x08": "a gzip file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x89HDF": "an HDF5 file",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
_TEXT_CONTROLS = b"\t\n\f\r"

#: Types that ids can be given in, little-endian.
TOKEN_DTYPES = ("uint8", "uint16", "uint32", "int32", "uint64", "int64")
_HEADER_BYTES = 256 * 4
_SHARDS = {(20240520, 1): "uint16", (20240801, 7): "uint32"}  # llm.c: magic and version
_MEGATRON_MAGIC, _MEGATRON_DTYPES = b"MMIDIDX\0\0", {1: "uint8", 4: "int32", 5: "int64", 8: "uint16"}
_LARGEST_ID = 2**24  # no vocabulary has as many
_LOOKED_AT = 1 << 16


class TokenData(NamedTuple):
    """Tokens ready to train on.

    Attributes:
      train: Memory-mapped ids of the training documents, 1-D, end of text after each; of several files, what can be
        sliced as if they were one.
      validation: The same of the validation documents.
      tokenizer: What turned text into these ids, or None where token files came without one.
      vocab_size: Largest id that can occur, plus one.
      fingerprint: Changes when the tokens change.
      validation_bytes: UTF-8 bytes of the validation text, for perplexity per byte; None where it is not known.
    """

    train: np.ndarray
    validation: np.ndarray
    tokenizer: Tokenizer | None
    vocab_size: int
    fingerprint: str
    validation_bytes: int | None


class Shards:
    """Files of ids one after another, to be sliced like the array that they are parts of."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self._starts = np.cumsum([0, *map(len, parts)])
        self.shape, self.ndim = (int(self._starts[-1]),), 1
        self.dtype = np.result_type(*parts)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> np.ndarray:
        if not isinstance(index, slice):
            return self[index : index + 1 or None][0]
        start, stop, step = index.indices(len(self))
        assert step == 1, "read in order"
        first, last = np.searchsorted(self._starts, [start, max(start, stop - 1)], side="right") - 1
        found = [
            part[max(0, start - offset) : max(0, stop - offset)]
            for part, offset in zip(self.parts[first : last + 1], self._starts[first:], strict=False)
        ]
        return np.concatenate(found) if found else np.empty(0, self.dtype)


def open_token_files(path: str, tokenizer_path: str, token_dtype: str = "") -> TokenData:
    """Opens a folder of token files, see above.

    Args:
      path: The folder.
      tokenizer_path: Of the tokenizer that made the ids; "" takes the one in the folder, if there is one.
      token_dtype: One of `TOKEN_DTYPES`, for raw ids; "" is uint16.

    Returns:
      The tokens, memory-mapped; `vocab_size` is the largest id in the files plus one.

    Raises:
      InputError: A file is missing, empty, truncated, of another type, or holds ids the tokenizer does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"data.path={path!r}: no such folder; give the folder that holds train.bin and val.bin")
    files = _files_of_splits(folder)
    opened = {split: [_open(file, token_dtype) for file in files[split]] for split in files}
    train, validation = (
        parts[0] if len(parts) == 1 else cast(np.ndarray, Shards(parts))
        for parts in (opened["train"], opened["validation"])
    )
    for tokens, split in ((train, "train"), (validation, "validation")):
        if len(tokens) < 2:
            raise InputError(f"{files[split][0]}: one token only; at least two are needed to predict one from another")
    vocab_size = 1 + max(
        _largest_id(file, part) for split in files for file, part in zip(files[split], opened[split], strict=True)
    )
    if not tokenizer_path and holds_tokenizer(folder):
        tokenizer_path = str(folder)
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    if tokenizer and vocab_size > vocabulary_size(tokenizer):
        raise InputError(
            f"data.path={path!r}: holds token id {vocab_size - 1}, but {tokenizer_path!r} ends at "
            f"{vocabulary_size(tokenizer) - 1}; give the tokenizer these files were made with, or set data.token_dtype if "
            f"they are not {train.dtype} ids"
        )
    fingerprint = combined_fingerprint(*(_hash_of(files[split], opened[split]) for split in ("train", "validation")))
    return TokenData(train, validation, tokenizer, vocab_size, fingerprint, validation_bytes=None)


def _files_of_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of both splits, in order of their names."""
    files: dict[str, list[Path]] = {"train": [], "validation": [], "test": []}
    for file in sorted(folder.iterdir()):
        if file.suffix in (".bin", ".npy") and not file.name.startswith("."):
            splits = split_words(file.stem)
            if len(splits) != 1:
                raise InputError(
                    f"{file}: its name does not say one split; name it as train.bin and val.bin, or NAME_train_000001.bin "
                    "and NAME_val_000000.bin, or move it away"
                )
            files[splits.pop()].append(file)
    del files["test"]
    for split, name in (("train", "train"), ("validation", "val")):
        whole = [file for file in files[split] if file.stem == name]
        if not files[split]:
            raise InputError(
                f"{folder / name}.bin: missing; data.source='token_files' needs train.bin and val.bin in data.path, or shards "
                f"such as NAME_{name}_000001.bin"
            )
        if whole and len(files[split]) > 1:
            other = next(file.name for file in files[split] if file != whole[0])
            raise InputError(f"{whole[0]}: stands beside {other}, of the same split; keep one or the other")
    return files


def _hash_of(files: list[Path], opened: list[np.ndarray]) -> str:
    hashes = [content_hash(file) for file in files]
    if [tokens.dtype for tokens in opened] == [np.dtype("<u2")] and files[0].suffix == ".bin":
        return hashes[0]
    return hashlib.sha256(json.dumps([[t.dtype.str for t in opened], hashes]).encode()).hexdigest()


def combined_fingerprint(train_hash: str, validation_hash: str) -> str:
    """One name for two files, from the hashes of their content."""
    return hashlib.sha256(f"{train_hash} {validation_hash}".encode()).hexdigest()


def in_chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in order, a few megabytes at a time."""
    return (tokens[start : start + _CHUNK_TOKENS] for start in range(0, len(tokens), _CHUNK_TOKENS))


def _open(file: Path, token_dtype: str) -> np.ndarray:
    """The ids of one file, mapped."""
    if not file.is_file():
        raise InputError(f"{file}: no file, or a link to nothing; write the tokens again")
    size_bytes = file.stat().st_size
    if not size_bytes:
        raise InputError(f"{file}: empty; write the tokens again")
    if file.suffix == ".npy":
        return _open_npy(file, token_dtype)
    shard_dtype, offset = _shard_header(file, size_bytes)
    said = shard_dtype or _megatron_dtype(file)
    if said and token_dtype not in ("", said):
        raise InputError(f"data.token_dtype={token_dtype!r}: {file} says itself that it holds {said}; set it to ''")
    if not said and (other := _other_format(file, size_bytes)):
        raise InputError(
            f"{file}: looks like {other}; token files are raw ids (NumPy: ids.astype('uint16').tofile(...))"
        )
    dtype = np.dtype(said or token_dtype or "uint16").newbyteorder("<")
    if (size_bytes - offset) % dtype.itemsize:
        odd = "an odd number: " if dtype.itemsize == 2 else ""
        raise InputError(
            f"{file}: {size_bytes} bytes, {odd}truncated or not {dtype.name} (data.token_dtype); write the tokens again"
        )
    tokens = np.memmap(file, dtype=dtype, mode="r", offset=offset)
    if not said:
        _check_dtype(file, tokens)
    return tokens


def _shard_header(file: Path, size_bytes: int) -> tuple[str, int]:
    """The type of the ids and where they start, of a shard that says so; else "" and 0."""
    header = np.fromfile(file, dtype="<i4", count=min(256, size_bytes // 4))
    magics = {magic for magic, _ in _SHARDS}
    if not len(header) or header[0] not in magics:
        return "", 0
    version = int(header[1]) if len(header) > 1 else 0
    dtype = _SHARDS.get((int(header[0]), version))
    if dtype is None:
        known = ", ".join(f"{v} of magic {m}" for m, v in _SHARDS)
        raise InputError(f"{file}: a shard of llm.c of version {version}; known are {known}; write the tokens again")
    expected = _HEADER_BYTES + int(header[2]) * np.dtype(dtype).itemsize if len(header) == 256 else -1
    if size_bytes != expected or expected <= _HEADER_BYTES:
        raise InputError(
            f"{file}: {size_bytes} bytes where its header says {expected}: truncated; fetch or write it again"
        )
    return dtype, _HEADER_BYTES


def _megatron_dtype(file: Path) -> str:
    """What the index beside a file says of its ids; "" where there is none."""
    try:
        with file.with_suffix(".idx").open("rb") as stream:
            head = stream.read(18)
    except FileNotFoundError:
        return ""
    code = head[17] if len(head) == 18 and head.startswith(_MEGATRON_MAGIC) else 0
    if code not in _MEGATRON_DTYPES:
        raise InputError(
            f"{file.with_suffix('.idx')}: no index of Megatron's for integer ids; fetch it again or move it away"
        )
    return _MEGATRON_DTYPES[code]


def _open_npy(file: Path, token_dtype: str) -> np.ndarray:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # its header goes through Python's tokenizer and parser, which raise errors of their own
        reason = str(error).partition("\n")[0]
        raise InputError(f"{file}: not a whole NumPy array ({reason}); write it again") from error
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"{file}: not one row of integers; save the ids as a one-dimensional array of integers")
    if token_dtype not in ("", tokens.dtype.name):
        raise InputError(
            f"data.token_dtype={token_dtype!r}: {file} says itself that it holds {tokens.dtype}; set it to ''"
        )
    return tokens


def _check_dtype(file: Path, tokens: np.ndarray) -> None:
    """Refuses raw ids of a wider type than they are read as: the halves of a number are an id and, nearly always, 0."""
    sample = np.asarray(tokens[:_LOOKED_AT])
    for width in (4, 2):
        numbers = sample[: len(sample) // width * width].reshape(-1, width)
        low, high = numbers[:, 0], numbers[:, 1:]
        # Of vocabularies over 65,536 the upper half is a small number now and then.
        few = high.max(initial=0) == 0 or (tokens.itemsize == 2 and high.max() < 16 and low.max() > 4096)
        if len(low) >= 8 and low.any() and few:
            wider = tokens.itemsize * width
            names = [name for name in TOKEN_DTYPES if np.dtype(name).itemsize == wider]
            raise InputError(
                f"{file}: read as {tokens.dtype.name}, {width - 1} of every {width} numbers is 0 or nearly: they are wider; "
                f"set data.token_dtype to {' or '.join(names) or 'a wider type'}"
            )


def _largest_id(file: Path, tokens: np.ndarray) -> int:
    least, most = 0, 0
    for chunk in in_chunks(tokens):
        least, most = min(least, int(chunk.min())), max(most, int(chunk.max()))
    if least < 0 or most >= _LARGEST_ID:
        raise InputError(
            f"{file}: read as {tokens.dtype.name}, it holds id {least if least < 0 else most}, which no vocabulary has; set "
            "data.token_dtype to what it was written as"
        )
    return most


def _other_format(file: Path, size_bytes: int) -> str | None:
    """The type of a file that is surely not raw ids, from its bytes; None for what may be ids."""
    with file.open("rb") as stream:
        head = stream.read(4096)
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
    for magic, name in _OTHER_FORMATS.items():
        if head.startswith(magic):
            return name
    # 0x80 and a protocol number could be a first id; that with the final "." of every pickle is no chance.
    if head[0] == 0x80 and head[1:2] in (b"\2", b"\3", b"\4", b"\5") and last == b".":
        return "a pickle, which is never opened"
    try:
        # Incrementally, because the head may end inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(head, final=size_bytes <= len(head))
    except UnicodeDecodeError:
        return None
    return None if any(byte < 32 and byte not in _TEXT_CONTROLS for byte in head) else "text"


def content_hash(file: Path) -> str:
    """SHA-256 of a file's size and content; of a large file, of evenly spaced samples."""
    size_bytes = file.stat().st_size
    digest = hashlib.sha256(str(size_bytes).encode())
    with file.open("rb") as stream:
        if size_bytes <= _FULL_HASH_BYTES:
            digest.update(stream.read())
        else:
            for sample in range(_SAMPLES):
                stream.seek(max(0, sample * (size_bytes - _SAMPLE_BYTES) // (_SAMPLES - 1)))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()
