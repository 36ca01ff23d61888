"""From a config to tokens: find the corpus, train or load the tokenizer, encode once, keep the result in a cache.

The cache is `<cache_dir>/<key>/`, see `spdf_jax.data.token_cache`; `key` is a hash of the documents and the tokenizer. A run
killed half-way leaves an `unfinished-<key>` folder, from which the next goes on; it is safe to delete.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tokenizers import Tokenizer

from spdf_jax.data.corpus import Corpus, embedded_corpus, library_corpus, text_corpus, tfds_corpus
from spdf_jax.data.mixture import mixed, read_shares
from spdf_jax.data.token_cache import build, keeping, kept_tokenizer, open_cached, turn_to_build
from spdf_jax.data.token_files import TOKEN_DTYPES, TokenData, open_token_files
from spdf_jax.data.tokenizer import SMALLEST_VOCAB, end_of_text_id, load_tokenizer
from spdf_jax.errors import InputError
from spdf_jax.fields import LARGEST, CountOrZero, FilePath, Line, OneOf, Range, Used, check_fields, used_with

_FORMAT_VERSION = 1  # raise it when the same documents and tokenizer give other files
_GPT2_END_OF_TEXT = 50256
_SOURCES = ("embedded", "text", "token_files", "tfds", "libraries")
_PLACE = Used(
    lambda c: c.source not in ("embedded", "libraries") and (not c.mixture or c.source == "tfds"),
    "a source of files, not a mixture",
)
_STREAM = Used(lambda c: c.source == "token_files" and c.separate_documents, "token files kept apart by document")


@dataclass(frozen=True)
class DataConfig:
    """What to train on.

    Attributes:
      source: `embedded` (the Python standard library's text), `libraries` (that of installed libraries, of pinned versions:
        `spdf_jax.data.corpus.LIBRARIES`), `text`, `token_files` or `tfds`.
      path: text: a file or a folder of files; token_files: a folder of `train.bin` and `val.bin`, see there;
        tfds: the data folder, "" for the TFDS default.
      tfds_name: The dataset, as `name/config:version`.
      mixture: Several sources in place of one, each a `path` (tfds: a `tfds_name`) with its share of the examples:
        `data/web=0.7,data/code=0.3`. Each has epochs of its own; all validation data counts, by its size.
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
      unique_tokens: How many of the training tokens are there, the first ones; a longer run passes over them again. 0: all.
      token_dtype: token_files: of ids in files that do not say it themselves; "" is uint16.
      separate_documents: Whether nothing passes between documents that share a sequence; False, as most papers have it,
        makes them one stream, in which a document sees those before it.
      end_of_text_id: token_files: the id that stands between documents; -1 is the tokenizer's, and without one GPT-2's
        where it is the largest id.
      cache_dir: Where encoded tokens and compiled programs are kept; "" is `$XDG_CACHE_HOME/spdf_jax`, or
        `~/.cache/spdf_jax`.
      processes: That encode text at once, at most; 0 is one a core. By any number of them the ids are the same.
    """

    source: Annotated[str, OneOf(_SOURCES)] = "embedded"
    path: Annotated[FilePath, _PLACE] = ""
    tfds_name: Annotated[Line, Used(lambda c: c.source == "tfds" and not c.mixture, "source 'tfds', not a mixture")] = (
        ""
    )
    mixture: Annotated[Line, used_with("source", "text", "token_files", "tfds")] = ""
    text_key: Annotated[Line, used_with("source", "text", "tfds")] = "text"
    train_files: Annotated[Line, used_with("source", "text")] = ""
    validation_files: Annotated[Line, used_with("source", "text")] = ""
    split_by: Annotated[str, OneOf(("text", "name")), used_with("source", "text", "tfds")] = "text"
    token_dtype: Annotated[str, OneOf(("", *TOKEN_DTYPES)), used_with("source", "token_files")] = ""
    tokenizer: FilePath = ""
    tokenizer_vocab_size: Annotated[int, Range(least=SMALLEST_VOCAB, most=LARGEST)] = 4096
    validation_fraction: Annotated[
        float, Range(above=0, below=1), used_with("source", "embedded", "libraries", "text", "tfds")
    ] = 0.02
    unique_tokens: Annotated[CountOrZero, Used(lambda c: not c.mixture, "one source, not a mixture")] = 0
    separate_documents: bool = True
    end_of_text_id: Annotated[int, Range(least=-1, most=LARGEST), _STREAM] = -1
    cache_dir: FilePath = ""
    processes: CountOrZero = 0

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
    bars, parts = progress and sys.stderr.isatty(), parts_of(config)
    if config.source == "token_files":
        data = {name: open_token_files(part.path, part.tokenizer, part.token_dtype) for name, part in parts.items()}
    else:
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
        corpora = {name: _corpus(part) for name, part in parts.items()}
        for corpus in corpora.values():
            if corpus.remark and progress:
                print(corpus.remark, flush=True)
        if config.mixture and tokenizer is None:
            tokenizer = _tokenizer_of_all(config, list(corpora.values()), bars)
        data = {name: _encoded(config, corpus, tokenizer, bars) for name, corpus in corpora.items()}
    return mixed(data, read_shares(config.mixture)) if config.mixture else _first(data[""], config.unique_tokens)


def _first(data: TokenData, count: int) -> TokenData:
    """The same with the first `count` training tokens alone, see `DataConfig.unique_tokens`."""
    if not count:
        return data
    if count > len(data.train):
        raise InputError(
            f"data.unique_tokens={count}: there are {len(data.train)} training tokens; give fewer, or 0 for all"
        )
    cut = hashlib.sha256(f"{data.fingerprint} {count}".encode()).hexdigest()
    return data._replace(train=data.train[:count], fingerprint=cut)


def parts_of(config: DataConfig) -> dict[str, DataConfig]:
    """The sources of a mixture by their names, each as data of its own; without a mixture the config alone.

    Raises:
      InputError: `data.mixture` is not what it must be.
    """
    if not config.mixture:
        return {"": config}
    alone, names = dataclasses.replace(config, mixture=""), read_shares(config.mixture)
    if config.source == "tfds":
        return {name: dataclasses.replace(alone, tfds_name=name) for name in names}
    return {name: dataclasses.replace(alone, path=os.path.expanduser(name)) for name in names}


def _encoded(config: DataConfig, corpus: Corpus, tokenizer: Tokenizer | None, bars: bool) -> TokenData:
    """A corpus by a tokenizer, or by one of its own: from the cache, or now."""

    def folder(recipe: str | int) -> Path:
        return cache_folder(config) / _key(corpus.identity, recipe)

    place = trained = folder(config.tokenizer_vocab_size)
    if tokenizer is not None:
        # A run's own tokenizer is most often the one that was trained on these documents: they are encoded already.
        data = open_cached(trained)
        if data and data.tokenizer and data.tokenizer.to_str() == tokenizer.to_str():
            return data
        place = folder(hashlib.sha256(tokenizer.to_str().encode()).hexdigest())
    size = config.tokenizer_vocab_size
    return open_cached(place) or build(
        place, corpus, tokenizer, vocab_size=size, processes=config.processes, progress=bars
    )


def _tokenizer_of_all(config: DataConfig, corpora: list[Corpus], bars: bool) -> Tokenizer:
    """One tokenizer for the sources of a mixture, whatever their order and shares: from the cache, or trained now."""
    corpora = sorted(corpora, key=lambda corpus: corpus.identity)
    identities = " ".join(corpus.identity for corpus in corpora)
    file = cache_folder(config) / f"tokenizer-{_key(identities, config.tokenizer_vocab_size)}.json"
    texts = itertools.chain.from_iterable(corpus.read("train") for corpus in corpora)
    with keeping(file.parent), turn_to_build(file):
        return kept_tokenizer(file, texts, vocab_size=config.tokenizer_vocab_size, progress=bars)


def _key(identity: str, recipe: str | int) -> str:
    return hashlib.sha256(json.dumps([_FORMAT_VERSION, identity, recipe]).encode()).hexdigest()[:32]


def _check(config: DataConfig) -> None:
    if config.mixture and config.source in ("embedded", "libraries"):
        raise InputError(
            f"data.mixture={config.mixture!r}: is of sources by their paths; set data.source to 'text' or 'token_files'"
        )
    if config.mixture and (unused := config.tfds_name if config.source == "tfds" else config.path):
        raise InputError(f"data.mixture={config.mixture!r}: stands beside {unused!r}; set one of them to ''")
    if config.source in ("text", "token_files") and not (config.path or config.mixture):
        raise InputError(f"data.path is empty: data.source={config.source!r} needs the place of its files there")
    if config.source == "tfds" and not (config.tfds_name or config.mixture):
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
    if config.source == "libraries":
        return library_corpus(held_out)
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
