"""Encoded text on a disk: a folder of tokens for each text and tokenizer, whole and sound or not there.

A folder has `tokenizer.json`, `train.bin`, `val.bin` and `meta.json`, and appears by one rename after all is on the disk.
Until then it is `unfinished-KEY/data`, and beside it are the parts of its files that are done, one a line: a build that was
killed goes on after them. Every opening checks each file against its hash in `meta.json`, a large one by samples. Of runs and
processes at once, one builds and the others wait for it.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from spdf_jax.data.corpus import Corpus, Split
from spdf_jax.data.encoding import Part, encode_parts, in_parts, processes_for
from spdf_jax.data.token_files import TokenData, combined_fingerprint, content_hash
from spdf_jax.data.tokenizer import end_of_text_id, load_tokenizer, text_pieces, train_tokenizer, vocabulary_size
from spdf_jax.errors import InputError

_FILES: dict[Split, str] = {"train": "train.bin", "validation": "val.bin"}
_DAMAGED = (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError)


def open_cached(folder: Path) -> TokenData | None:
    """What the cache holds at `folder`, whose name is its key, or None where that is missing or damaged in any way."""
    return _open(folder, folder.name)


def _open(folder: Path, key: str) -> TokenData | None:
    try:
        sealed = json.loads((folder / "meta.json").read_text())
        meta = sealed["meta"]
        hashes = {name: content_hash(folder / name) for name in meta["content"]}
        if sealed["sha256"] != _seal(meta) or meta["key"] != key or meta["content"] != hashes:
            return None
        tokens = {}
        for split, name in _FILES.items():
            tokens[split] = np.memmap(folder / name, dtype=meta["dtype"], mode="r")
            if len(tokens[split]) != meta["tokens"][split]:
                return None
        return TokenData(
            train=tokens["train"],
            validation=tokens["validation"],
            tokenizer=load_tokenizer(folder / "tokenizer.json"),
            vocab_size=meta["vocab_size"],
            fingerprint=combined_fingerprint(meta["sha256"]["train"], meta["sha256"]["validation"]),
            validation_bytes=meta["validation_bytes"],
        )
    except _DAMAGED:
        return None


def _seal(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def kept_tokenizer(file: Path, texts: Iterable[str], *, vocab_size: int, progress: bool) -> Tokenizer:
    """The tokenizer of `texts`: from `file`, or trained now and kept there.

    Raises:
      OSError: it cannot be kept.
    """
    with contextlib.suppress(*_DAMAGED):
        sealed = json.loads(file.read_text())
        if sealed["sha256"] == _seal(sealed["tokenizer"]):
            return Tokenizer.from_str(sealed["tokenizer"])
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, progress=progress)
    written = file.with_name(f"{file.name}.{os.getpid()}")
    written.write_text(json.dumps({"sha256": _seal(tokenizer.to_str()), "tokenizer": tokenizer.to_str()}))
    _sync(written)
    written.rename(file)
    return tokenizer


def build(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer | None, *, vocab_size: int, processes: int, progress: bool
) -> TokenData:
    """Encodes a corpus in `unfinished-KEY`, or goes on where that was left, and renames the result to `folder`.

    Args:
      folder: the key, in the folder of the cache.
      corpus: what to encode.
      tokenizer: by which; None trains one on the training documents.
      vocab_size: of that.
      processes: that encode at once, at most; 0 is one a core.
      progress: show bars on standard error.

    Returns:
      The tokens, memory-mapped.

    Raises:
      InputError: the disk, or a split without a document.
    """
    with keeping(folder.parent), turn_to_build(folder) as place:
        if built := open_cached(folder):  # by another process, while this one waited for its turn
            return built
        place.mkdir(exist_ok=True)
        if tokenizer is None:
            kept = place / "tokenizer.json"
            tokenizer = kept_tokenizer(kept, corpus.read("train"), vocab_size=vocab_size, progress=progress)
        draft = place / "data"
        _write(draft, folder.name, corpus, tokenizer, processes, progress)
        # Mapped before the rename: should another run move `folder` right after it, these maps stay valid.
        data = _open(draft, folder.name)
        if data is None:
            shutil.rmtree(place)
            raise InputError(f"{folder.parent}: tokens just written do not read back; check that disk")
        _publish(draft, folder)
        shutil.rmtree(place, ignore_errors=True)
        return open_cached(folder) or data


@contextlib.contextmanager
def keeping(cache: Path) -> Iterator[None]:
    """Makes the cache's folder; where it cannot be written, raises `InputError` that says so."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"{cache}: cannot keep tokens there ({error}); free space or set data.cache_dir elsewhere"
        ) from error


@contextlib.contextmanager
def turn_to_build(folder: Path) -> Iterator[Path]:
    """Of all processes that want to build a folder, on this machine or on a disk that they share, one builds at a time.

    Yields:
      Where to: what was left there by a build that was killed is sound as far as its journals say.
    """
    with Path(f"{folder}.lock").open("w") as file:
        place = folder.with_name(f"unfinished-{folder.name}")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: several build, each for itself, and one result stays
            place = place.with_name(f"{place.name}-{os.getpid()}")
        yield place


def _write(draft: Path, key: str, corpus: Corpus, tokenizer: Tokenizer, processes: int, progress: bool) -> None:
    """Writes all files of one cache folder, but for what is there."""
    draft.mkdir(exist_ok=True)
    tokenizer.save(str(draft / "tokenizer.json"))
    # A document that spells the end-of-text token is text about it, not the end of a document.
    tokenizer.encode_special_tokens = True
    vocab_size = vocabulary_size(tokenizer)
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    how = {
        "end_id": end_of_text_id(tokenizer),
        "dtype": dtype,
        "processes": processes_for(processes, corpus.total_bytes),
        "file": draft / "tokenizer.json",
    }
    text_bytes, tokens, sha256 = {}, {}, {}
    with tqdm(total=corpus.total_bytes, unit="B", unit_scale=True, desc="tokenize", disable=not progress) as bar:
        for split, name in _FILES.items():
            text_bytes[split], tokens[split], digest = 0, 0, hashlib.sha256()
            with contextlib.closing(_ids_of(draft / name, corpus, split, tokenizer, how)) as parts:
                for n_bytes, ids in parts:
                    digest.update(ids)
                    text_bytes[split] += n_bytes
                    tokens[split] += len(ids)
                    bar.update(n_bytes)
            if not tokens[split]:
                shutil.rmtree(draft.parent)
                raise InputError(
                    f"{corpus.where}: no document fell into the {split} split; give more documents, change "
                    "data.validation_fraction, or name files train.* and validation.*"
                )
            sha256[split] = digest.hexdigest()
    meta = {
        "key": key,
        "content": {name: content_hash(draft / name) for name in ("tokenizer.json", *_FILES.values())},
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokens": tokens,
        "sha256": sha256,
        "validation_bytes": text_bytes["validation"],
    }
    (draft / "meta.json").write_text(json.dumps({"sha256": _seal(meta), "meta": meta}, indent=1))
    for path in (*draft.iterdir(), draft):
        _sync(path)


def _ids_of(
    file: Path, corpus: Corpus, split: Split, tokenizer: Tokenizer, how: dict[str, Any]
) -> Generator[tuple[int, np.ndarray]]:
    """Bytes of text and ids of each part of a split, which are then in `file`; those that are there already as they are.

    A line of the journal is written when its part is on the disk, and has hashes of its text and of its ids.
    """
    journal = file.parent.with_name(f"{file.name}.done")
    parts = in_parts(itertools.chain.from_iterable(map(text_pieces, corpus.read(split))))
    with file.open("ab+") as stream, journal.open("ab+") as lines:
        stream.seek(0)
        lines.seek(0)
        at_ids, at_line = 0, 0
        for line in lines.read().splitlines(keepends=True):
            part = next(parts, None)
            if part is None:
                break
            ids = _done(line, part, stream, how["dtype"])
            if ids is None:
                parts = itertools.chain([part], parts)
                break
            at_ids, at_line = at_ids + ids.nbytes, at_line + len(line)
            yield part.n_bytes, ids
        stream.truncate(at_ids)
        lines.truncate(at_line)
        for part, ids in encode_parts(tokenizer, parts, **how):
            stream.write(ids.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
            lines.write(f"{json.dumps([part.digest(), len(ids), hashlib.sha256(ids).hexdigest()])}\n".encode())
            lines.flush()
            yield part.n_bytes, ids


def _done(line: bytes, part: Part, stream: Any, dtype: str) -> np.ndarray | None:
    """The ids of a part that a journal has, next in the file; None where these are not they."""
    with contextlib.suppress(*_DAMAGED):
        digest, count, of_ids = json.loads(line)
        if digest == part.digest():
            ids = np.frombuffer(stream.read(count * np.dtype(dtype).itemsize), dtype)
            if line.endswith(b"\n") and hashlib.sha256(ids).hexdigest() == of_ids:
                return ids
    return None


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems cannot do this for folders, and need not
            raise
    finally:
        os.close(descriptor)


def _publish(draft: Path, folder: Path) -> None:
    """Renames `draft` to `folder`, unless a sound one came to stand there meanwhile; a damaged one makes way."""
    if folder.exists() and open_cached(folder) is None:
        os.replace(folder, draft.with_name("damaged"))
    try:
        os.replace(draft, folder)
    except OSError:
        if not folder.exists():
            raise
    _sync(folder.parent)
