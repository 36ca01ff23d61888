"""Token files: raw little-endian ids, nothing else in the file, memory-mapped and never copied whole.

The format of nanoGPT (`data/openwebtext/prepare.py`): a folder with `train.bin` and `val.bin`.
"""

import codecs
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from spdf_jax.data.tokenizer import load_tokenizer, vocabulary_size
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


class TokenData(NamedTuple):
    """Tokens ready to train on.

    Attributes:
        train: Memory-mapped ids of the training documents, 1-D, end of text after each.
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


def open_token_files(path: str, tokenizer_path: str) -> TokenData:
    """Opens a folder with `train.bin` and `val.bin`, raw uint16 ids as nanoGPT writes them.

    Args:
        path: The folder.
        tokenizer_path: The `tokenizer.json` that made the ids; "" takes the one in the folder, if there is one.

    Returns:
        The tokens, memory-mapped; `vocab_size` is the largest id in the files plus one.

    Raises:
        InputError: A file is missing, empty, truncated, of another type, or holds ids the tokenizer does not have.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"data.path={path!r}: no such folder; give the folder that holds train.bin and val.bin")
    train, validation = _open_uint16(folder / "train.bin"), _open_uint16(folder / "val.bin")
    vocab_size = 1 + max(int(chunk.max()) for tokens in (train, validation) for chunk in in_chunks(tokens))
    if not tokenizer_path and (folder / "tokenizer.json").is_file():
        tokenizer_path = str(folder / "tokenizer.json")
    tokenizer = load_tokenizer(tokenizer_path) if tokenizer_path else None
    if tokenizer and vocab_size > vocabulary_size(tokenizer):
        raise InputError(
            f"data.path={path!r}: holds token id {vocab_size - 1}, but {tokenizer_path!r} ends at "
            f"{vocabulary_size(tokenizer) - 1}; give the tokenizer these files were made with"
        )
    fingerprint = combined_fingerprint(content_hash(folder / "train.bin"), content_hash(folder / "val.bin"))
    return TokenData(train, validation, tokenizer, vocab_size, fingerprint, validation_bytes=None)


def combined_fingerprint(train_hash: str, validation_hash: str) -> str:
    """One name for two files, from the hashes of their content."""
    return hashlib.sha256(f"{train_hash} {validation_hash}".encode()).hexdigest()


def in_chunks(tokens: np.ndarray) -> Iterator[np.ndarray]:
    """The tokens in order, a few megabytes at a time."""
    return (tokens[start : start + _CHUNK_TOKENS] for start in range(0, len(tokens), _CHUNK_TOKENS))


def _open_uint16(file: Path) -> np.ndarray:
    if not file.is_file():
        raise InputError(f"{file}: missing; data.source='token_files' needs train.bin and val.bin in data.path")
    size_bytes = file.stat().st_size
    if not size_bytes:
        raise InputError(f"{file}: empty; write the tokens again as raw uint16")
    if other := _other_format(file, size_bytes):
        raise InputError(f"{file}: looks like {other}; token files are raw uint16 ids (NumPy: ids.tofile(...))")
    if size_bytes % 2:
        raise InputError(f"{file}: {size_bytes} bytes, an odd number: truncated or not uint16; write the tokens again")
    if size_bytes < 4:
        raise InputError(f"{file}: one token only; at least two are needed to predict one from another")
    return np.memmap(file, dtype="<u2", mode="r")


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
