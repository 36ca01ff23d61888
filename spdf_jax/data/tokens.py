"""From a config to tokens: find the corpus, train or load the tokenizer, encode once, keep the result in a cache.

The cache is `<cache_dir>/<key>/` with `tokenizer.json`, `train.bin`, `val.bin` and `meta.json`; `key` is a hash of the
documents and the tokenizer. A folder appears there whole, by one rename after all is on the disk, or not at all: a run
killed half-way leaves only an `unfinished-*` folder, which is safe to delete. Every start checks each file against its
hash in `meta.json`, a large one by samples, and builds a folder that is not sound anew. Of runs and processes at once, one
builds and the others wait for it.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from spdf_jax.data.corpus import Corpus, Split, embedded_corpus, text_corpus, tfds_corpus
from spdf_jax.data.token_files import TOKEN_DTYPES, TokenData, combined_fingerprint, content_hash, open_token_files
from spdf_jax.data.tokenizer import (
    SMALLEST_VOCAB,
    encode_texts,
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from spdf_jax.errors import InputError
from spdf_jax.fields import LARGEST, FilePath, Line, OneOf, Range, Used, check_fields, used_with

_FORMAT_VERSION = 1  # raise it when the same documents and tokenizer give other files
_FILES: dict[Split, str] = {"train": "train.bin", "validation": "val.bin"}
_GPT2_END_OF_TEXT = 50256
_SOURCES = ("embedded", "text", "token_files", "tfds")
_STREAM = Used(lambda c: c.source == "token_files" and c.separate_documents, "token files kept apart by document")


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      source: `embedded` (the Python standard library's text), `text`, `token_files` or `tfds`.
      path: text: a file or a folder of files; token_files: a folder of `train.bin` and `val.bin`, see there;
        tfds: the data folder, "" for the TFDS default.
      tfds_name: The dataset, as `name/config:version`.
      text_key: Key or column of the text in JSON, CSV, Parquet or a dataset example.
      train_files: text: which files of the folder to train on, where their names do not say it right: patterns with
        commas between, of paths in the folder, in which `*` is any part of a path (`*.parquet`, `train/*`). "" beside
        validation_files: all others.
      validation_files: text: which files of the folder to hold out, by patterns as in train_files. "" beside
        train_files: documents of those are held out.
      split_by: What a document is held out by, where files do not say it: `text`, a hash of itself, or `name`, one of
        its file and line (as before this setting).
      tokenizer: A local Hugging Face `tokenizer.json`, or a folder with one or with `vocab.json` and `merges.txt`; "" takes
        that of `init_from`, or trains a byte-level BPE on the training documents.
      tokenizer_vocab_size: Ids of the tokenizer to train, where none is given.
      validation_fraction: Share of the documents held out where the source has no validation split of its own.
      token_dtype: token_files: of ids in files that do not say it themselves; "" is uint16.
      separate_documents: Whether nothing passes between documents that share a sequence; False, as most papers have it,
        makes them one stream, in which a document sees those before it.
      end_of_text_id: token_files: the id that stands between documents; -1 is the tokenizer's, and without one GPT-2's
        where it is the largest id.
      cache_dir: Where encoded tokens and compiled programs are kept; "" is `$XDG_CACHE_HOME/spdf_jax`, or
        `~/.cache/spdf_jax`.
    """

    source: Annotated[str, OneOf(_SOURCES)] = "embedded"
    path: Annotated[FilePath, used_with("source", "text", "token_files", "tfds")] = ""
    tfds_name: Annotated[Line, used_with("source", "tfds")] = ""
    text_key: Annotated[Line, used_with("source", "text", "tfds")] = "text"
    train_files: Annotated[Line, used_with("source", "text")] = ""
    validation_files: Annotated[Line, used_with("source", "text")] = ""
    split_by: Annotated[str, OneOf(("text", "name")), used_with("source", "text", "tfds")] = "text"
    token_dtype: Annotated[str, OneOf(("", *TOKEN_DTYPES)), used_with("source", "token_files")] = ""
    tokenizer: FilePath = ""
    tokenizer_vocab_size: Annotated[int, Range(least=SMALLEST_VOCAB, most=LARGEST)] = 4096
    validation_fraction: Annotated[float, Range(above=0, below=1), used_with("source", "embedded", "text", "tfds")] = (
        0.02
    )
    separate_documents: bool = True
    end_of_text_id: Annotated[int, Range(least=-1, most=LARGEST), _STREAM] = -1
    cache_dir: FilePath = ""

    def __post_init__(self) -> None:
        check_fields(self, "data")


def prepare(config: DataConfig, *, progress: bool = True) -> TokenData:
    """Tokens of the configured data: from the cache, or tokenized now and cached.

    Args:
      config: What to train on.
      progress: Show bars on standard error, where that is a terminal.

    Returns:
      Memory-mapped tokens and their tokenizer.

    Raises:
      InputError: The config, the data, the tokenizer or the cache folder cannot be used.
    """
    _check(config)
    if config.source == "token_files":
        return open_token_files(config.path, config.tokenizer, config.token_dtype)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    corpus = _corpus(config)
    if corpus.remark and progress:
        print(corpus.remark, flush=True)

    def folder(recipe: str | int) -> Path:
        key = hashlib.sha256(json.dumps([_FORMAT_VERSION, corpus.identity, recipe]).encode()).hexdigest()[:32]
        return cache_folder(config) / key

    place = trained = folder(config.tokenizer_vocab_size)
    if tokenizer is not None:
        # A run's own tokenizer is most often the one that was trained on these documents: they are encoded already.
        data = _open(trained, trained.name)
        if data and data.tokenizer and data.tokenizer.to_str() == tokenizer.to_str():
            return data
        place = folder(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
    bars = progress and sys.stderr.isatty()
    return _open(place, place.name) or _build(place, corpus, tokenizer, config, bars)


def _check(config: DataConfig) -> None:
    if config.source in ("text", "token_files") and not config.path:
        raise InputError(f"data.path is empty: data.source={config.source!r} needs the place of its files there")
    if config.source == "tfds" and not config.tfds_name:
        raise InputError("data.tfds_name is empty: data.source='tfds' needs a dataset, such as 'wikipedia/20230601.en'")
    for name in ("train_files", "validation_files"):
        if (value := getattr(config, name)) and config.source != "text":
            raise InputError(f"data.{name}={value!r}: is for data.source='text', not {config.source!r}; set it to ''")
    if config.token_dtype and config.source != "token_files":
        raise InputError(
            f"data.token_dtype={config.token_dtype!r}: is for data.source='token_files', not {config.source!r}; set it to ''"
        )
    if config.end_of_text_id >= 0 and config.source != "token_files":
        raise InputError(
            f"data.end_of_text_id={config.end_of_text_id}: is for data.source='token_files', text has its tokenizer's; use -1"
        )


def _corpus(config: DataConfig) -> Corpus:
    held_out = config.validation_fraction
    if config.source == "embedded":
        return embedded_corpus(held_out)
    how: dict[str, Any] = {"text_key": config.text_key, "validation_fraction": held_out, "split_by": config.split_by}
    if config.source == "text":
        return text_corpus(config.path, train_files=config.train_files, validation_files=config.validation_files, **how)
    return tfds_corpus(config.tfds_name, data_dir=config.path, **how)


def document_end(config: DataConfig, data: TokenData) -> int | None:
    """The id by which documents are kept apart, see `spdf_jax.data.tokenizer.document_ids`.

    Args:
      config: What to train on.
      data: What `prepare` made of it.

    Returns:
      The id, or None where the config makes the documents one stream.

    Raises:
      InputError: Token files whose id is not known, or does not occur.
    """
    if not config.separate_documents:
        return None
    if config.end_of_text_id >= data.vocab_size:
        raise InputError(
            f"data.end_of_text_id={config.end_of_text_id}: data.path={config.path!r} holds no such id, the largest is "
            f"{data.vocab_size - 1}; give the id that stands between its documents"
        )
    if config.end_of_text_id >= 0:
        return config.end_of_text_id
    if data.tokenizer:
        return end_of_text_id(data.tokenizer)
    if data.vocab_size == _GPT2_END_OF_TEXT + 1:
        return _GPT2_END_OF_TEXT
    raise InputError(
        f"data.end_of_text_id: nothing says which id stands between the documents of data.path={config.path!r}; set it, give "
        f"data.tokenizer, or set data.separate_documents to False if they are one stream"
    )


def cache_folder(config: DataConfig) -> Path:
    """Where a machine keeps what it need not make again, see `DataConfig.cache_dir`.

    Raises:
      InputError: It is to be in a home folder, and there is none.
    """
    if config.cache_dir:
        return Path(config.cache_dir)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spdf_jax"
    except RuntimeError:  # no HOME, and a user that the machine does not know
        raise InputError("data.cache_dir: this user has no home folder; set config.data.cache_dir, or HOME") from None


def _open(folder: Path, key: str) -> TokenData | None:
    """What the cache holds at `folder` for `key`, or None where that is missing or damaged in any way."""
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError):
        return None


def _seal(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _build(folder: Path, corpus: Corpus, tokenizer: Tokenizer | None, config: DataConfig, progress: bool) -> TokenData:
    """Tokenizes into a temporary folder beside `folder`, then renames it to `folder`."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            _turn_to_build(folder),
            tempfile.TemporaryDirectory(
                prefix="unfinished-", dir=folder.parent, ignore_cleanup_errors=True
            ) as temporary,
        ):
            if built := _open(folder, folder.name):  # by another process, while this one waited for its turn
                return built
            if tokenizer is None:
                vocab_size = config.tokenizer_vocab_size
                tokenizer = train_tokenizer(corpus.read("train"), vocab_size=vocab_size, progress=progress)
            draft = Path(temporary, "data")
            draft.mkdir()
            _write(draft, folder.name, corpus, tokenizer, progress)
            # Mapped before the rename: should another run move `folder` right after it, these maps stay valid.
            data = _open(draft, folder.name)
            if data is None:
                raise InputError(f"{folder.parent}: tokens just written do not read back; check that disk")
            _publish(draft, folder)
            return _open(folder, folder.name) or data
    except OSError as error:
        message = f"{folder.parent}: cannot keep tokens there ({error}); free space or set data.cache_dir elsewhere"
        raise InputError(message) from error


@contextlib.contextmanager
def _turn_to_build(folder: Path) -> Iterator[None]:
    """Of all processes that want to build a folder, on this machine or on a disk that they share, one builds at a time."""
    with Path(f"{folder}.lock").open("w") as file:
        with contextlib.suppress(OSError):  # a file system without locks: several build, and one result stays
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(draft: Path, key: str, corpus: Corpus, tokenizer: Tokenizer, progress: bool) -> None:
    """Writes all files of one cache folder."""
    tokenizer.save(str(draft / "tokenizer.json"))
    # A document that spells the end-of-text token is text about it, not the end of a document.
    tokenizer.encode_special_tokens = True
    vocab_size = vocabulary_size(tokenizer)
    dtype = "<u2" if vocab_size <= 2**16 else "<u4"
    text_bytes, tokens, sha256 = {}, {}, {}
    with tqdm(total=corpus.total_bytes, unit="B", unit_scale=True, desc="tokenize", disable=not progress) as bar:
        for split, name in _FILES.items():
            text_bytes[split], tokens[split] = 0, 0
            with (draft / name).open("wb") as stream:
                for ids, n_bytes in encode_texts(tokenizer, corpus.read(split)):
                    stream.write(ids.astype(dtype).tobytes())
                    text_bytes[split] += n_bytes
                    tokens[split] += len(ids)
                    bar.update(n_bytes)
            if not tokens[split]:
                raise InputError(
                    f"{corpus.where}: no document fell into the {split} split; give more documents, change "
                    "data.validation_fraction, or name files train.* and validation.*"
                )
            with (draft / name).open("rb") as stream:
                sha256[split] = hashlib.file_digest(stream, "sha256").hexdigest()
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
    if folder.exists() and _open(folder, folder.name) is None:
        os.replace(folder, draft.with_name("damaged"))
    try:
        os.replace(draft, folder)
    except OSError:
        if not folder.exists():
            raise
    _sync(folder.parent)
