"""Documents to ids in parts of a few megabytes, by one process or many: the same ids by any number of them.

Run as a program, this file is one of the many, which imports neither JAX nor the rest of this package.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

PART_BYTES = 8 << 20
_PARTS_A_PROCESS = 4  # for fewer, starting one costs more than it saves
# Encoding takes about 100 bytes a character, and pieces have 2**16: of many processes each takes few at a time.
_PIECES, _PIECES_OF_MANY = 64, 8
# Where GPT-2's pattern of words never joins the sides: text comes back in few words, whose ids are looked up.
CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")
_KNOWN_BYTES = 32 << 20


class Part(NamedTuple):
    """Pieces of documents one after another, in UTF-8, and whether each is the last of its document."""

    pieces: list[bytes]
    ends: list[bool]

    @property
    def n_bytes(self) -> int:
        """Of text."""
        return sum(map(len, self.pieces))

    def digest(self) -> str:
        """Of all that its ids depend on, but for the tokenizer."""
        digest = hashlib.sha256(json.dumps([list(map(len, self.pieces)), self.ends]).encode())
        for piece in self.pieces:
            digest.update(piece)
        return digest.hexdigest()


def in_parts(pieces: Iterable[tuple[str, bool]]) -> Iterator[Part]:
    """Parts of at least `PART_BYTES`, but for the last; each piece comes with whether it ends its document."""
    part, n_bytes = Part([], []), 0
    for piece, ends in pieces:
        part.pieces.append(piece.encode())
        part.ends.append(ends)
        n_bytes += len(part.pieces[-1])
        if n_bytes >= PART_BYTES:
            yield part
            part, n_bytes = Part([], []), 0
    if part.pieces:
        yield part


def processes_for(wanted: int, total_bytes: int | None) -> int:
    """How many processes are to encode so much text.

    Args:
      wanted: at most as many; 0: one a core.
      total_bytes: of text; None: not known, and much.

    >>> processes_for(8, 1 << 20), processes_for(8, 128 << 20), processes_for(2, None)
    (1, 4, 2)
    """
    most = wanted or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))
    return most if total_bytes is None else max(1, min(most, total_bytes // (_PARTS_A_PROCESS * PART_BYTES)))


def encode_parts(
    tokenizer: Tokenizer, parts: Iterable[Part], *, end_id: int, dtype: str, processes: int, file: Path
) -> Iterator[tuple[Part, np.ndarray]]:
    """Each part and its ids in order, `end_id` after each document.

    Memory is that of a part a process and two more, whatever there is to encode.

    Args:
      tokenizer: spelled special tokens count as text where it is so set.
      parts: see `in_parts`.
      end_id: ends a document.
      dtype: of the ids.
      processes: 1 encodes here, on all cores.
      file: where the tokenizer is saved, for other processes.
    """
    if processes == 1:
        word_ids = _WordIds(tokenizer)
        for part in parts:
            yield part, word_ids.of(part.pieces, part.ends, end_id, _PIECES).astype(dtype)
        return
    command = [str(file), str(end_id), dtype, str(int(tokenizer.encode_special_tokens))]
    with ThreadPoolExecutor(processes) as threads, ExitStack() as stack:
        idle: SimpleQueue[Any] = SimpleQueue()
        for _ in range(processes):
            idle.put(stack.enter_context(_encoder(command)))

        def ask(part: Part) -> np.ndarray:
            encoder = idle.get()
            try:
                return _answer(encoder, part, dtype)
            finally:
                idle.put(encoder)

        asked: deque[tuple[Part, Future[np.ndarray]]] = deque()
        for part in parts:
            asked.append((part, threads.submit(ask, part)))
            if len(asked) > processes:
                first, ids = asked.popleft()
                yield first, ids.result()
        for first, ids in asked:
            yield first, ids.result()


@contextmanager
def _encoder(command: list[str]) -> Iterator[subprocess.Popen]:
    """Another process, which ends with this one, however that ends: its input is then at its end."""
    process = subprocess.Popen(
        [sys.executable, "-P", __file__, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with suppress(OSError):  # of what it did not read any more
                stream.close()  # type: ignore[union-attr]


def _answer(encoder: subprocess.Popen, part: Part, dtype: str) -> np.ndarray:
    """The ids of a part."""
    assert encoder.stdin
    assert encoder.stdout
    ids, size = b"", 1
    with suppress(BrokenPipeError):
        encoder.stdin.write(json.dumps([list(map(len, part.pieces)), part.ends]).encode() + b"\n")
        encoder.stdin.writelines(part.pieces)
        encoder.stdin.flush()
        size = int(encoder.stdout.readline() or 1)
        ids = encoder.stdout.read(size)
    if len(ids) < size:
        from spdf_jax.errors import InputError  # here, not above: see there

        raise InputError(
            f"data.processes: one of the processes that encode text ended with {encoder.wait()}, perhaps for want of memory; "
            f"give the command again, with fewer if so: what is encoded stays"
        )
    return np.frombuffer(ids, dtype)


class _WordIds:
    """Ids by a tokenizer, which is asked once for each word where its words are GPT-2's, and for every text where not."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._known, self._known_bytes = tokenizer, dict[str, bytes](), 0
        said = json.loads(tokenizer.to_str())
        words = said["pre_tokenizer"] or {}
        self._by_words = (
            words.get("type") == "ByteLevel"
            and words.get("use_regex", True)
            and not words["add_prefix_space"]
            and said["normalizer"] is None
            and tokenizer.encode_special_tokens
            and all(token["special"] for token in said["added_tokens"])
        )

    def of(self, pieces: list[bytes], ends: list[bool], end_id: int, at_once: int) -> np.ndarray:
        """uint32 ids of pieces of documents, `end_id` after each that is the last of its own."""
        found, end = bytearray(), np.uint32(end_id).tobytes()
        for start in range(0, len(pieces), at_once):
            texts = [piece.decode() for piece in pieces[start : start + at_once]]
            words = [CUT.split(text) if self._by_words else [text] for text in texts]
            self._learn([word for word in set().union(*words) if word not in self._known])
            for row, is_last in zip(words, ends[start:], strict=False):
                found += b"".join(map(self._known.__getitem__, row))
                if is_last:
                    found += end
            if not self._by_words or self._known_bytes > _KNOWN_BYTES:
                self._known, self._known_bytes = {}, 0
        return np.frombuffer(found, np.uint32)

    def _learn(self, words: list[str]) -> None:
        for word, encoding in zip(
            words, self._tokenizer.encode_batch_fast(words, add_special_tokens=False), strict=True
        ):
            self._known[word] = np.array(encoding.ids, np.uint32).tobytes()
            self._known_bytes += 4 * len(word) + len(self._known[word]) + 200  # of two objects and their place


def _serve(file: str, end_id: str, dtype: str, special_is_text: str) -> None:
    """Encodes parts from standard input until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the process that asks
    tokenizer = Tokenizer.from_file(file)
    tokenizer.encode_special_tokens = bool(int(special_is_text))
    word_ids = _WordIds(tokenizer)
    read, write = sys.stdin.buffer, sys.stdout.buffer
    while line := read.readline():
        lengths, ends = json.loads(line)
        pieces = [read.read(length) for length in lengths]
        ids = word_ids.of(pieces, ends, int(end_id), _PIECES_OF_MANY).astype(dtype).tobytes()
        write.write(f"{len(ids)}\n".encode() + ids)
        write.flush()


if __name__ == "__main__":
    _serve(*sys.argv[1:])
