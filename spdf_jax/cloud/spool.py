"""Workdirs in object storage: ``gs://bucket/run`` is a folder on this machine that is kept as the bucket has it.

The bucket is the truth. A process begins with a folder of its own (its spool), filled from there, in which it reads and writes
as on any disk; what it has written is published in the order in which it was written, so that what a kill leaves in the bucket
is what one would have left on a disk a little earlier. It is published before a checkpoint counts on it, every half minute, and
at the end. Checkpoints are no part of the spool: orbax writes them to the bucket itself, from all processes.

Nothing in object storage can be appended to: a file that grows is written again, from `_APPEND_BYTES` on by its new end, which
the bucket puts behind what it has (`compose`).

That two runs never publish into one folder, `spdf_jax.cloud.lease` sees to.
"""

import atexit
import contextlib
import fcntl
import functools
import mimetypes
import os
import re
import shutil
import tempfile
import threading
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PosixPath
from typing import Any, NamedTuple

import jax

from spdf_jax.errors import InputError, Restart, causes, one_line
from spdf_jax.processes import RESTART_CODE, is_first, stop

#: Folders that are not of the spool: orbax writes them itself, or nobody reads them again.
_ONLY_THERE, _ONLY_SENT = {"checkpoints", "best"}, {"profile"}
_APPEND_BYTES, _IN_MEMORY_BYTES = 1 << 20, 1 << 26
_SCHEME = "gs://"

_spool: Path | None = None
_publishing = threading.RLock()


class CloudPath(PosixPath):
    """A path in the spool; in messages it says where it is published."""

    def __format__(self, spec: str) -> str:
        return format(url(self), spec)


class _Known(NamedTuple):
    """What was last sent or fetched of a file: the object's generation, the file's signature, size and checksum."""

    generation: int
    signature: tuple[int, int, int]
    size: int
    crc32: int


_known: dict[Path, _Known] = {}
_filled: set[Path] = set()
#: Asked before anything is published.
before_publishing: list[Callable[[], None]] = []


def located(place: Path | str) -> Path:
    """The folder that a user has named: of ``gs://bucket/run`` its place in the spool, filled from the bucket.

    Raises:
      InputError: another kind of storage, a bucket that is not there or not ours to read, or packages that are missing.

    >>> located("runs/mine")
    PosixPath('runs/mine')
    >>> located("s3://bucket/run")
    Traceback (most recent call last):
    spdf_jax.errors.InputError: s3://bucket/run: of object storage, a workdir can be in gs:// only; copy it there or to a disk
    """
    text = os.fspath(place)
    found = re.match(r"(gs(?=:/)|\w+(?=://)):/+(.*)", text)  # a Path has one slash of the two
    if not found:
        return Path(place).expanduser() if isinstance(place, str) else place.expanduser()
    if found[1] != "gs":
        raise InputError(f"{text}: of object storage, a workdir can be in gs:// only; copy it there or to a disk")
    bucket, _, name = found[2].partition("/")
    parts = [part for part in name.split("/") if part]
    if not bucket or not parts or {".", ".."} & {bucket, *parts}:
        raise InputError(f"{text}: names no folder of a bucket; write gs://BUCKET/FOLDER")
    try:
        import gcsfs  # noqa: F401  # orbax reaches the bucket by it
        from google.cloud import storage  # noqa: F401
    except ImportError:
        raise InputError(f"{text}: needs packages for it; pip install 'spdf_jax[gcs]'") from None
    path = CloudPath(_made_spool().joinpath(bucket, *parts))
    if path not in _filled:
        fill(path)
    return path


def url(path: Path) -> str:
    """Where a path in the spool is published; "" of any other path."""
    if _spool is None or not path.is_relative_to(_spool):
        return ""
    return _SCHEME + path.relative_to(_spool).as_posix()


def stored(path: Path) -> Path:
    """Where a folder of checkpoints lies: itself, or of one in the spool its place in the bucket, an `etils.epath.Path`."""
    if not url(path):
        return path
    from etils import epath

    return epath.Path(url(path))  # as good as one


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder. In a bucket, which renames nothing, one is whole that has orbax's last object."""
    found = [path for path in stored(folder).glob("*") if path.name.isdecimal()]
    return sorted(int(path.name) for path in found if not url(folder) or is_whole(path))


def is_whole(checkpoint: Path) -> bool:
    """Whether orbax has finished a `stored` checkpoint in a bucket."""
    return (checkpoint / "commit_success.txt").exists()


def sizes(folder: Path) -> Iterator[tuple[str, int]]:
    """Names and bytes of all files below a folder, a `stored` one too."""
    if not os.fspath(folder).startswith(_SCHEME):
        yield from ((path.name, path.stat().st_size) for path in folder.rglob("*"))
        return
    bucket, _, prefix = os.fspath(folder).removeprefix(_SCHEME).partition("/")
    with answering(folder):
        for blob in bucket_named(bucket).list_blobs(prefix=f"{prefix}/"):
            yield blob.name.rpartition("/")[2], blob.size


def fill(folder: Path) -> None:
    """Makes a folder of the spool as the bucket has it; what was written here and not yet published stays."""
    bucket, prefix = address(folder)
    with _publishing, answering(folder):
        there = {
            folder.joinpath(*blob.name.removeprefix(f"{prefix}/").split("/")): blob
            for blob in bucket_named(bucket).list_blobs(prefix=f"{prefix}/")
            if _is_of_spool(blob.name.removeprefix(f"{prefix}/"), _ONLY_THERE | _ONLY_SENT)
        }
        new = [(p, b) for p, b in there.items() if p not in _known or _known[p].generation != b.generation]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_fetch, *zip(*new, strict=True)) if new else ())
        for path in [path for path in _known if path.is_relative_to(folder) and path not in there]:
            if not _ONLY_SENT & set(path.relative_to(folder).parts):
                path.unlink(missing_ok=True)
                del _known[path]
    _filled.add(folder)


def publish(folder: Path) -> None:
    """Sends what has changed below a folder since it was last sent, oldest first, and then removes what is gone here.

    Does nothing for a folder of a disk, and in processes that write nothing.

    Raises:
      Restart: the bucket does not answer.
      InputError: it refuses.
    """
    if not url(folder) or not is_first():
        return
    with _publishing, answering(folder):
        for check in before_publishing:
            check()
        here = dict(_files(folder))
        for path in sorted(here, key=lambda path: here[path]):
            if path not in _known or _known[path].signature != here[path]:
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    _send(path, here[path])
        for path in [path for path in _known if path.is_relative_to(folder) and path not in here]:
            bucket, name = address(path)
            forgiving_absence(bucket_named(bucket).delete_blob, name)
            del _known[path]


def publish_all() -> None:
    """`publish` of every folder that this process has asked for."""
    for folder in sorted(_filled):
        publish(folder)


def _made_spool() -> Path:
    """A folder of this process, locked as long as it lives; those of killed ones are removed."""
    global _spool
    if _spool is None:
        home = Path(tempfile.gettempdir(), f"spdf_jax-{os.getuid()}")
        home.mkdir(mode=0o700, exist_ok=True)
        lock = os.open(home, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in home.iterdir():
            descriptor = os.open(left, os.O_RDONLY)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            os.close(descriptor)
        _spool = Path(tempfile.mkdtemp(dir=home))
        fcntl.flock(os.open(_spool, os.O_RDONLY), fcntl.LOCK_EX)  # never closed
        os.close(lock)
        atexit.register(shutil.rmtree, _spool, ignore_errors=True)
    return _spool


def _is_of_spool(name: str, without: set[str]) -> bool:
    """Whether a file, by its name below a workdir, is one that is fetched or sent."""
    *folders, last = name.split("/")
    return bool(last) and not without & set(folders) and not any(part.startswith(".") for part in (*folders, last))


def _files(folder: Path) -> Iterator[tuple[Path, tuple[int, int, int]]]:
    """Files below a folder that are published, with what changes where they do: time, size, number."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if _is_of_spool(name, set()) and name not in _ONLY_THERE]
        for name in filter(lambda name: _is_of_spool(name, set()), names):
            with contextlib.suppress(FileNotFoundError):
                stat = os.stat(os.path.join(place, name))
                yield CloudPath(place, name), (stat.st_mtime_ns, stat.st_size, stat.st_ino)


def _fetch(path: Path, blob: Any) -> None:
    try:
        content = bucket_named(blob.bucket.name).blob(blob.name).download_as_bytes(if_generation_match=blob.generation)
    except (
        exceptions().NotFound,
        exceptions().PreconditionFailed,
    ):  # replaced meanwhile: not a run of ours, which has the lease
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    written_ns = int(blob.updated.timestamp() * 1e6) * 1000  # a page tells by it whether it is of before the end
    os.utime(path, ns=(written_ns, written_ns))
    stat = path.stat()
    signature = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
    _known[path] = _Known(blob.generation, signature, len(content), zlib.crc32(content))


def _send(path: Path, signature: tuple[int, int, int]) -> None:
    from google.cloud.storage.retry import DEFAULT_RETRY

    name, before = address(path)[1], _known.get(path)
    bucket = bucket_named(address(path)[0])
    blob, kind = bucket.blob(name), mimetypes.guess_type(name)[0] or "application/octet-stream"
    if signature[1] > _IN_MEMORY_BYTES and (before is None or before.size < _APPEND_BYTES):
        blob.upload_from_filename(os.fspath(path), content_type=kind, retry=DEFAULT_RETRY)
        _known[path] = _Known(blob.generation, signature, 0, 0)
        return
    content = path.read_bytes()
    if before is None or not _put_behind(blob, before, content, kind):
        blob.upload_from_string(content, content_type=kind, retry=DEFAULT_RETRY)
    _known[path] = _Known(blob.generation, signature, len(content), zlib.crc32(content))


def _put_behind(blob: Any, before: _Known, content: bytes, kind: str) -> bool:
    """Makes an object `content` by sending its end alone, where what is there is its beginning; False: it did not."""
    if not _APPEND_BYTES <= before.size < len(content) or zlib.crc32(content[: before.size]) != before.crc32:
        return False
    folder, _, name = blob.name.rpartition("/")
    end = blob.bucket.blob(f"{folder}/.{name}.end")
    blob.content_type = kind
    try:
        end.upload_from_string(content[before.size :], content_type=kind)
        # Never asked again: where the answer was lost, the end is there already.
        blob.compose([blob, end], if_generation_match=before.generation, retry=None)
        forgiving_absence(end.delete)
    except (exceptions().GoogleAPICallError, OSError):
        return False
    return True


def address(path: Path) -> tuple[str, str]:
    """The bucket of a path in the spool, and its name there."""
    bucket, _, name = url(path).removeprefix(_SCHEME).partition("/")
    return bucket, name


@functools.cache
def bucket_named(name: str) -> Any:
    """As an object of google-cloud-storage, whose own transfer manager shares it among threads too."""
    from google.cloud import storage

    return storage.Client().bucket(name)


def exceptions() -> Any:
    from google.api_core import exceptions

    return exceptions


def forgiving_absence(do: Callable[..., None], *what: Any) -> None:
    with contextlib.suppress(exceptions().NotFound):
        do(*what)


def check_writable(folder: Path) -> None:
    """Refuses a folder of the spool that cannot be published."""
    bucket, name = address(folder)
    with answering(folder):
        probe = bucket_named(bucket).blob(f"{name}/.probe")
        probe.upload_from_string(b"")
        forgiving_absence(probe.delete)


@contextlib.contextmanager
def answering(folder: Path) -> Iterator[None]:
    """What a bucket refuses is the user's to fix; where it does not answer, the same command goes on later."""
    from google.auth.exceptions import DefaultCredentialsError

    try:
        yield
    except (InputError, Restart, FileNotFoundError):
        raise
    except Exception as error:
        found = exceptions()
        refused = (found.NotFound, found.Forbidden, found.Unauthorized, found.BadRequest, DefaultCredentialsError)
        if isinstance(error, refused):
            raise InputError(
                f"{folder}: the bucket refuses ({one_line(error)}); see that it is there and that you may write to it (gcloud "
                f"auth application-default login), or choose another --workdir"
            ) from error
        if not any(isinstance(cause, OSError | found.GoogleAPICallError | found.RetryError) for cause in causes(error)):
            raise
        unanswered(f"{folder}: the bucket does not answer ({one_line(error)})", error)


def unanswered(what: str, error: Exception) -> None:
    """Ends a run, in all its processes, to be started again.

    Raises:
      Restart: always, in a run of one process.
    """
    message = f"{what}; the same command goes on from the last checkpoint"
    if jax.process_count() > 1:
        stop(RESTART_CODE, message)
    raise Restart(message) from error
