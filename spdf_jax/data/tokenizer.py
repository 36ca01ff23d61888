"""Text to ids, with Hugging Face `tokenizers`: train a byte-level BPE, load a `tokenizer.json`, encode documents."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from spdf_jax.data.encoding import CUT
from spdf_jax.errors import InputError, reading

END_OF_TEXT = "<|endoftext|>"
#: Tokens that end a document; the first that a tokenizer has is its own: GPT-2's and Qwen's, Llama 3's, Llama's,
#: Gemma's, DeepSeek's. Not what its folder calls ``eos_token``: of a model for chats that ends a turn.
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>")
SMALLEST_VOCAB = 257  # every byte, and end of text
_TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))

# A long document is encoded, and trained on, in pieces: that bounds memory (either takes about 100 bytes a character) and
# uses every core. After a single newline between two visible characters, before a single space between them, and between
# a letter and ASCII punctuation (but for ', which starts "'s"), byte-level BPE never joins the sides: the ids stay the same,
# but for one space more where a tokenizer puts one before every text, as Llama 2's.
_PIECE_CHARS = 1 << 16
_SAMPLE = "Any text, 1 or 2: \u00e9\u2028\U0001f600<|endoftext|>\n"
_SAFE_CUT = re.compile(CUT.pattern + r"|(?<=[^\W\d_])(?=[!-&(-/:-@\[-^`{-~])")
# Training takes a time that grows with the square of a word's length, a word being what merges never leave: letters, digits,
# white space or other characters in a row.
_LONGEST_WORD = 1024
_ROW = re.compile(r"\S*+\s*+")
_WORD_TO_CUT = re.compile(
    "|".join(rf"(?<!{c}){c}{{{_LONGEST_WORD + 1},}}" for c in (r"[^\W\d_]", r"\d", r"\s", r"(?:[^\w\s]|_)"))
)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int, progress: bool) -> Tokenizer:
    """Trains a byte-level BPE as GPT-2's; the same texts give the same tokenizer.

    Args:
      texts: The training documents; taken in pieces, so that memory does not grow with their length. A word of more
        than 1024 characters counts as several.
      vocab_size: Ids to end with, at least 257; a tiny corpus ends with fewer.
      progress: Show a bar on standard error.

    Returns:
      A tokenizer that encodes any text without loss; `<|endoftext|>` is id 0.
    """
    bpe = ByteLevelBPETokenizer()
    pieces = (part for text in texts for piece, _ in text_pieces(text) for part in _bounded_words(piece))
    bpe.train_from_iterator(pieces, vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=progress)
    return Tokenizer.from_str(bpe.to_str())


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a `tokenizer.json`, or the `vocab.json` and `merges.txt` of GPT-2."""
    return any(all((folder / name).is_file() for name in names) for names in _TOKENIZER_FILES)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads a tokenizer from the local disk.

    Args:
      path: A Hugging Face `tokenizer.json`; or a folder with one, or with the `vocab.json` and `merges.txt` of a byte-level
        BPE, as GPT-2's. They are parsed; nothing in them can run.

    Returns:
      The tokenizer, with truncation and padding off.

    Raises:
      InputError: No such file, not a tokenizer, one of BPE dropout, or it has none of the tokens `ENDS` to separate documents.
    """
    place = Path(path)
    single = place / "tokenizer.json" if place.is_dir() else place
    vocab, merges = (place / name for name in _TOKENIZER_FILES[1])
    if not single.is_file() and not holds_tokenizer(place):
        raise InputError(
            f"tokenizer {str(path)!r}: no such file; give the path of a Hugging Face tokenizer.json, or of a folder with one "
            f"or with vocab.json and merges.txt"
        )
    where = f"tokenizer {str(path)!r}"
    with reading(f"{where}: not a Hugging Face tokenizer.json", "save it with Tokenizer.save"), _rust_unheard():
        if single.is_file():
            tokenizer = Tokenizer.from_file(str(single))
        else:
            tokenizer = Tokenizer.from_str(ByteLevelBPETokenizer.from_file(str(vocab), str(merges)).to_str())
            if tokenizer.token_to_id(END_OF_TEXT) is not None:
                tokenizer.add_special_tokens([END_OF_TEXT])  # a vocab.json says of no token that it is special
        # What a file asks for that cannot be done, some of its parts say only when they are used.
        tokenizer.decode(tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)
        vocabulary_size(tokenizer)
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise InputError(
            f"{where}: its BPE drops merges at random (dropout {dropout:g}), so that a text has many encodings; set dropout to "
            f"null"
        )
    if known_end(tokenizer) is None:
        raise InputError(
            f"tokenizer {str(path)!r}: has no {END_OF_TEXT!r} token, which separates documents, nor {', '.join(ENDS[1:])}; "
            f"call the one that does so in the file, or add it with Tokenizer.add_special_tokens(['{END_OF_TEXT}']) and "
            f"save it again"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


@contextlib.contextmanager
def _rust_unheard() -> Iterator[None]:
    """Rust says of a panic on the process's own standard error that it is one, before Python gets to know and says it."""
    heard, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(heard, 2)
        os.close(heard)
        os.close(nowhere)


def known_end(tokenizer: Tokenizer) -> int | None:
    """The id that ends a document, if there is one among `ENDS`."""
    return next((i for end in ENDS if (i := tokenizer.token_to_id(end)) is not None), None)


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that ends a document."""
    end_id = known_end(tokenizer)
    assert end_id is not None, "load_tokenizer and train_tokenizer see to it"
    return end_id


def document_ids(tokens_BT: np.ndarray, end_of_text: int | None) -> np.ndarray | None:
    """Which document of its row each input belongs to. An end of text is the first input of the document after it.

    So a document's first token is predicted from the end of text alone, as in `spdf_jax.evals.likelihood`, and not from the
    document before: every target counts, the same ones as in one stream. Whether a stream has the token after documents or
    before them makes no difference. Positions go on from one document to the next: they are learned, and were they to start
    again, the later ones would be learned from long documents alone.

    Args:
      tokens_BT: inputs.
      end_of_text: its id; None keeps nothing apart.

    Returns:
      int32 ids from 0 in each row, or None.

    >>> document_ids(np.array([[5, 6, 0, 7, 0, 0, 8]]), end_of_text=0)
    array([[0, 0, 1, 1, 2, 3, 3]], dtype=int32)
    """
    return None if end_of_text is None else np.cumsum(tokens_BT == end_of_text, axis=1, dtype=np.int32)


def encode_plain(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text, a spelled end of text as ordinary text, as in training.

    Args:
      tokenizer: the model's.
      texts: any.

    Returns:
      A list of ids for each.

    >>> len(encode_plain(train_tokenizer(["a"], vocab_size=257, progress=False), ["<|endoftext|>"])[0])
    13
    """
    before, tokenizer.encode_special_tokens = tokenizer.encode_special_tokens, True
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        tokenizer.encode_special_tokens = before


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """The largest id the tokenizer can emit, plus one; ids may have gaps, so this can exceed the number of tokens."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def text_pieces(text: str) -> Iterator[tuple[str, bool]]:
    """The text in pieces of about `_PIECE_CHARS`, each with whether it is the last."""
    start = 0
    while cut := _SAFE_CUT.search(text, start + _PIECE_CHARS):
        yield text[start : cut.start()], False
        start = cut.start()
    yield text[start:], True


def _bounded_words(text: str) -> Iterator[str]:
    """The text in pieces that hold no word longer than `_LONGEST_WORD`."""
    start = 0
    rows = max(map(len, _ROW.findall(text)))  # a quick look, which nearly all texts pass
    for word in _WORD_TO_CUT.finditer(text) if rows > _LONGEST_WORD else ():
        for cut in range(word.start() + _LONGEST_WORD, word.end(), _LONGEST_WORD):
            yield text[start:cut]
            start = cut
    yield text[start:]
