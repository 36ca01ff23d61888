"""The exceptions that the command line turns into an exit code, and where a file from outside becomes one of them."""

import contextlib
import difflib
import os
import traceback
from collections.abc import Iterable, Iterator
from typing import NoReturn


class InputError(ValueError):
    """Something the user gave is wrong: says what, where, and what to do. The command line prints it and exits with 2.

    >>> import spdf_jax as spdf
    >>> try:
    ...     spdf.GPTConfig(d_model=10, n_head=4)
    ... except InputError as error:
    ...     print(error)
    model.d_model: 10 is not divisible by model.n_head 4
    """


class InUseError(InputError):
    """Another run holds the workdir."""


class Restart(Exception):
    """The run ends before its time, in all its processes, and the same command goes on. The command line exits with 75."""


def end_interrupted(*_: object) -> NoReturn:
    """Handler of Ctrl-C where nothing has begun: no exception, which what is being imported might lose."""
    os.write(2, b"interrupted before anything was begun\n")
    os._exit(130)


@contextlib.contextmanager
def reading(what: str, fix: str) -> Iterator[None]:
    """Where a file is read that others may have written, cut or replaced: whatever it does to the reader becomes one line.

    Parsers of other people's files raise what they like, as deep nesting a RecursionError, a size that no memory holds a
    MemoryError, or, where they are written in Rust, a panic that is no Exception at all. Only the reading itself belongs under
    this, where an error can be of nothing but the file.

    Args:
      what: the file, and what it is not: ``"summary.json: not JSON"``.
      fix: what to do.

    Raises:
      InputError: ``"WHAT (what was raised); FIX"``.

    >>> with reading("a.json: not JSON", "get the file again"):
    ...     [][0]
    Traceback (most recent call last):
    spdf_jax.errors.InputError: a.json: not JSON (list index out of range); get the file again
    """
    try:
        yield
    except (InputError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{what} ({one_line(error)}); {fix}") from error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of sensible length; its type where that says more."""
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__} {said}".rstrip() if isinstance(error, KeyError | MemoryError) or not said else said


def out_of_memory(error: BaseException) -> str:
    """What to do where an array found no room, on a device or here; "" of any other error.

    >>> out_of_memory(MemoryError("Unable to allocate 95 GiB")).partition(";")[0]
    'out of memory (MemoryError Unable to allocate 95 GiB)'
    """
    for cause in causes(error):
        # By its name, since this is read before JAX is.
        of_device = type(cause).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(cause)
        if of_device or isinstance(cause, MemoryError):
            return (
                f"out of memory ({one_line(cause).rstrip('.')}); training: raise config.PHASE.grad_accumulation_steps or lower "
                "batch_size, in another --workdir; evaluating, decoding: lower config.loop.eval_batch_size, "
                "config.decode.batch_size"
            )
    return ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of, the innermost last."""
    while error is not None:
        yield error
        error = error.__cause__ if error.__suppress_context__ else error.__context__


def line_of(error: BaseException, files: Iterable[str]) -> str:
    """Of an error that code of the user's own raised: that line of it, and what is wrong there.

    Args:
      error: what was raised.
      files: which the user has written.

    Returns:
      ``"FILE:LINE: CODE: ERROR: what it says"`` of the innermost line in one of `files`; "" where none is on the way.
    """
    own = {os.path.realpath(file) for file in files}
    for cause in reversed(list(causes(error))):
        if isinstance(cause, SyntaxError) and cause.filename:
            lines = [(cause.filename, cause.lineno or 0, (cause.text or "").strip())]
            said = cause.msg
        else:
            frames = traceback.extract_tb(cause.__traceback__)
            lines = [(frame.filename, frame.lineno or 0, frame.line or "") for frame in frames]
            said = f"{type(cause).__name__}: {' '.join(str(cause).split())[:300].rstrip('.; ')}"
        for path, number, line in reversed(lines):
            if os.path.realpath(path) in own:
                return f"{os.path.relpath(path)}:{number}: {line}: {said}"
    return ""


def closest(word: str, known: Iterable[str]) -> str:
    """The one most like a misspelt word, whatever its capitals, or that ends in words of these initials; "" where none is.

    >>> closest("RigL", ["mst", "rigl"]), closest("lr", ["steps", "peak_learning_rate"]), closest("lr", ["steps", "seed"])
    ('rigl', 'peak_learning_rate', '')
    """
    by_lower = {name.lower(): name for name in reversed(list(known))}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    if not close and len(word) > 1:
        close = [low for low in by_lower if "".join(part[:1] for part in low.split("_")).endswith(word.lower())]
    return by_lower[close[-1]] if close else ""


def unknown_key(where: str, key: str, known: list[str]) -> InputError:
    """Of a section of a config, wherever it is given."""
    return InputError(f"{where}: unknown key {key!r}{nearest(key, known)}")


def nearest(key: str, known: list[str]) -> str:
    """``; did you mean 'model'?``, or all that there are."""
    close = closest(key, known)
    return f"; did you mean {close!r}?" if close else f"; known are {', '.join(known)}"
