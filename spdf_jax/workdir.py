"""A run's folder: the names of what lies in it, and how a file there is written so that it is whole, or is seen not to be.

CONTRIBUTING.md has the table: who writes each file, from when on it survives a crash, what happens where it is gone.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import jax

from spdf_jax.cloud import lease, spool
from spdf_jax.errors import InputError, InUseError, reading
from spdf_jax.processes import from_first, is_first

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
EVALUATION_FILE = "evaluation.json"
PROVENANCE_FILE = "provenance.json"
ANCESTORS_FILE = "ancestors.json"
GENERATIONS_FILE = "generations.jsonl"
CIRCUIT_FILE = "circuit.json"
CIRCUIT_PAIRS_FILE = "circuit_pairs.jsonl"
#: The newest checkpoints, and the best one of a phase that may stop early.
CHECKPOINTS, BEST = "checkpoints", "best"
TENSORBOARD_FOLDER = "tensorboard"
TRACKERS_FOLDER = "trackers"
PICTURES_FOLDER = "mask_pictures"
FIGURES_FOLDER = "figures"
PROFILE_FOLDER = "profile"
CODE_FOLDER = "code"

#: No JSON that is read whole is as large: a file that is has been replaced, and would not fit into memory.
MAX_JSON_BYTES = 1 << 28
_CHECKSUM = "crc32"


def write_json(path: Path, obj: Mapping[str, Any]) -> None:
    """Writes `obj` as indented JSON, atomically, keys in the order given, with a checksum that `read_json` compares.

    Args:
      path: the file to write or replace.
      obj: nested dicts, lists, strings and numbers (numpy and JAX numbers too).

    Raises:
      ValueError: a number is not finite; the file is left as it was.
    """
    content = plain(obj, Path(path).name)
    content.pop(_CHECKSUM, None)
    content |= {_CHECKSUM: checksum(content)}
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False).encode() + b"\n")


def read_json(path: Path, fix: str) -> dict[str, Any]:
    """The object in a JSON file, without its checksum. A file that has none, of an older release, is taken as it is.

    Args:
      path: the file.
      fix: what to do if it cannot be read.

    Raises:
      InputError: no such file, not a JSON object, or not what `write_json` wrote.
    """
    with reading(f"{path}: not readable JSON", fix):
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path}: {path.stat().st_size:,} bytes, more than any such file has; {fix}")
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise InputError(f"{path}: holds a {type(content).__name__}, not an object; {fix}")
        if _CHECKSUM in content and content.pop(_CHECKSUM) != checksum(content):
            raise InputError(
                f"{path}: not what was written there; {fix}, or, if the change is yours, delete its line {_CHECKSUM!r}"
            )
    return content


def checksum(obj: Mapping[str, Any]) -> int:
    """CRC-32 of an object as JSON, whatever the order of its keys."""
    return zlib.crc32(json.dumps(obj, sort_keys=True).encode())


def plain(value: Any, where: str) -> Any:
    """`value` in Python's own types, refusing numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if hasattr(value, "tolist"):
        return plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}: only finite numbers are recorded; stop the run before logging it")
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a crash at any moment, sees the old content or the new and nothing between.

    In a run of many processes process 0 writes it, and the others do nothing.

    Args:
      path: the file to write or replace.
      content: its bytes.

    Raises:
      OSError: it cannot be written; the old file stays and no temporary file is left.
    """
    if not is_first():
        return
    path = Path(path)
    with temporary_beside(path) as temporary:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        make_durable(path.parent)


@contextlib.contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A path on the disk of `path`, to write to and then to rename; what is left there is removed.

    It lies in a folder of its own that is locked as long as this process lives: `sweep` knows by that what is in use.
    """
    with tempfile.TemporaryDirectory(
        dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", ignore_cleanup_errors=True
    ) as folder:
        holder = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a disk without locks, where `sweep` removes nothing
                fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield Path(folder) / path.name
        finally:
            os.close(holder)


def make_durable(path: Path) -> None:
    """Has the disk keep a file's content, or the names in a folder, as they are now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system that cannot be asked
            raise
    finally:
        os.close(descriptor)


def sweep(workdir: Path) -> None:
    """Removes what killed processes left half-written in a run's folder; what one that lives is writing stays."""
    if not is_first():
        return
    for left in itertools.chain(
        *((workdir / f).glob(p) for f in ("", PICTURES_FOLDER, FIGURES_FOLDER) for p in _TEMPORARY)
    ):
        with contextlib.suppress(OSError):  # in use, or gone meanwhile
            descriptor = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            finally:
                os.close(descriptor)


#: Of `temporary_beside`, and of releases before it.
_TEMPORARY = (".*.tmp", ".huggingface-*")


def set_aside(path: Path, why: str) -> Path:
    """Renames a file or folder to the first free one of ``NAME.WHY-1``, ``-2``, ..., and returns that."""
    free = (path.with_name(f"{path.name}.{why}-{i}") for i in itertools.count(1))
    aside = next(candidate for candidate in free if not candidate.exists())
    with contextlib.suppress(FileNotFoundError):  # another process was first
        path.rename(aside)
    return aside


def make_workdir(workdir: Path) -> None:
    """Makes the folder, and checks that all processes see the same one: each saves its part of a checkpoint there."""
    if spool.url(workdir):  # in a folder of each process's own; that the bucket can be written to, the lease shows
        workdir.mkdir(parents=True, exist_ok=True)
        return
    made = from_first(lambda: str(_made_at(workdir)))
    lock_file = workdir / ".lock"
    if not lock_file.exists() or str(lock_file.stat().st_mtime_ns) != made:
        raise InputError(
            f"workdir {workdir}: process 0 has made it, but process {jax.process_index()} does not see it; choose a --workdir "
            f"on a disk that all processes share"
        )


@contextlib.contextmanager
def made_workdir(workdir: Path) -> Iterator[None]:
    """`make_workdir`; a run that is refused before it has left anything there leaves no folder either."""
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    make_workdir(workdir)
    try:
        yield
    except InputError:
        if new and is_first() and [path.name for path in workdir.iterdir()] == [".lock"]:
            with contextlib.suppress(OSError):  # as far as they are empty
                (workdir / ".lock").unlink()
                for folder in new:
                    folder.rmdir()
        raise


def _made_at(workdir: Path) -> int:
    """When the lock file was made: nobody ever writes to it."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        (workdir / ".lock").open("a").close()
    except OSError as error:
        raise InputError(
            f"workdir {workdir}: cannot write there ({error.strerror}); choose another --workdir"
        ) from None
    return (workdir / ".lock").stat().st_mtime_ns


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Holds the workdir for this run; the kernel lets go however process 0 ends. In a bucket: `spdf_jax.cloud.lease`.

    Raises:
      InUseError: another process holds it.
    """
    if spool.url(workdir):
        with lease.held(workdir):
            yield
        return
    if not is_first():
        yield
        return
    with (workdir / ".lock").open("a") as file:
        try:
            _take(file)
        except BlockingIOError:
            raise InUseError(
                f"workdir {workdir}: another run is using it; wait for it to end, or choose another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            print(
                f"workdir {workdir}: its disk has no locks ({error.strerror}); see that no other run uses it",
                flush=True,
            )
        yield


def _take(file: IO[Any]) -> None:
    """Locks a file for this process alone; `in_use` may hold it for a moment.

    Raises:
      BlockingIOError: another process keeps it.
    """
    for is_last in (False, False, False, True):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if is_last:
                raise
            time.sleep(0.05)


def in_use(workdir: Path) -> bool | None:
    """Whether a run holds the workdir, this process's own too; None where nobody knows, as on a disk without locks."""
    if spool.url(workdir):
        return lease.lease_of(workdir) is not None
    try:
        with (workdir / ".lock").open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def check_writable(folder: Path) -> None:
    """Refuses a folder that cannot hold what is about to be computed. Process 0 writes it."""
    if not is_first():
        return
    if spool.url(folder):
        spool.check_writable(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); choose another folder by --output"
        ) from None
