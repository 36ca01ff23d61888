"""The lease that a run holds on its workdir in object storage, which has no locks that end with their owner.

It is the object ``.lock``, with the owner's name in it, written again every quarter of `LEASE_SECONDS`. It is made, and taken
over, on the condition that the object is as it was read, so that of two runs never both have it. One that is older may be
taken, and an owner that could not renew it has ended before that.
"""

import contextlib
import datetime
import functools
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from spdf_jax.cloud.spool import (
    address,
    answering,
    before_publishing,
    bucket_named,
    exceptions,
    fill,
    forgiving_absence,
    publish,
)
from spdf_jax.errors import InputError
from spdf_jax.processes import RESTART_CODE, is_first, stop, wait_for_first

#: How old a lease is that anyone may take, and how often what a run leaves is published.
LEASE_SECONDS, PUBLISH_SECONDS = 60.0, 30.0
_LOCK = ".lock"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds the lease on a folder of the spool, which is filled anew and published as the run goes on and at its end.

    Raises:
      InputError: another run has it.
    """
    with contextlib.ExitStack() as stack:
        if is_first():
            stack.enter_context(_Lease(folder).kept())
        wait_for_first()
        fill(folder)
        stack.enter_context(_again_and_again(PUBLISH_SECONDS, functools.partial(_publish_if_it_answers, folder)))
        try:
            yield
        except BaseException:
            _publish_if_it_answers(folder)  # why it ends is worth more
            raise
        publish(folder)


def lease_of(folder: Path) -> dict[str, Any] | None:
    """Who holds a folder of the spool: ``owner`` and ``age_seconds``, by this machine's clock; None where nobody does."""
    bucket, prefix = address(folder)
    with answering(folder):
        blob = bucket_named(bucket).get_blob(f"{prefix}/{_LOCK}")
    if blob is None:
        return None
    owner = _said_in(blob)["owner"]
    age = (datetime.datetime.now(datetime.UTC) - blob.updated).total_seconds()
    return {"owner": owner, "age_seconds": age} if owner and age < LEASE_SECONDS else None


class _Lease:
    """What a run writes again and again into its workdir's ``.lock``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._owner = f"process {os.getpid()} on {socket.gethostname()}"
        self._token, self._generation, self._renewed = uuid.uuid4().hex, 0, 0.0

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Takes it, renews it in a thread of its own, and lets go of it."""
        with answering(self.folder):
            self._take()
        before_publishing.append(self.check)
        try:
            with _again_and_again(LEASE_SECONDS / 4, self._renew):
                yield
        finally:
            before_publishing.remove(self.check)
            with contextlib.suppress(Exception):  # it ages by itself
                self._let_go()

    def check(self) -> None:
        """Ends the process where the lease may be another's by now. Not when it is: its writes could not be told from ours."""
        if time.monotonic() - self._renewed > 0.75 * LEASE_SECONDS:
            _end_without(self.folder, f"it could not be renewed for {time.monotonic() - self._renewed:.0f} s")

    def _object(self, name: str = _LOCK) -> Any:
        bucket, prefix = address(self.folder)
        return bucket_named(bucket).blob(f"{prefix}/{name}")

    def _write(self, owner: str, generation: int, **how: Any) -> None:
        """Writes the object if it is as it was."""
        said, blob = {"owner": owner, "token": self._token}, self._object()
        began = time.monotonic()
        try:
            blob.upload_from_string(json.dumps(said).encode(), if_generation_match=generation, **how)
        except exceptions().PreconditionFailed:  # also where an answer was lost, and the request made again
            blob = blob.bucket.get_blob(blob.name)
            if blob is None or _said_in(blob) != said:
                raise
        self._generation, self._renewed = blob.generation, began

    def _take(self) -> None:
        first: Any = None
        since, age = time.monotonic(), 0.0
        while True:
            found = self._object().bucket.get_blob(self._object().name)
            holder = _said_in(found)["owner"] if found is not None else ""
            if first is None and holder:
                first, since, age = found, time.monotonic(), (self._bucket_time() - found.updated).total_seconds()
            if holder and found.generation == first.generation and age + time.monotonic() - since >= LEASE_SECONDS:
                holder = ""
            if not holder:
                try:
                    return self._write(self._owner, found.generation if found is not None else 0)
                except exceptions().PreconditionFailed:  # another was first
                    continue
            if found.generation != first.generation:  # it was renewed while we looked
                raise InputError(
                    f"workdir {self.folder}: another run is using it ({holder}); wait for it to end, or choose another "
                    f"--workdir"
                )
            if found is first:
                print(
                    f"workdir {self.folder}: {holder} had it {age:.0f} s ago; looking whether that still lives, for at most "
                    f"{max(LEASE_SECONDS - age, 0):.0f} s",
                    flush=True,
                )
            time.sleep(LEASE_SECONDS / 60)

    def _bucket_time(self) -> datetime.datetime:
        """By the bucket's clock, which says when a lease was written: that of a machine may be wrong."""
        asked = self._object(f"{_LOCK}.{self._token}")
        asked.upload_from_string(b"")
        forgiving_absence(asked.delete)
        return asked.updated

    def _renew(self) -> None:
        while True:
            try:
                return self._write(self._owner, self._generation, retry=None, timeout=LEASE_SECONDS / 8)
            except exceptions().PreconditionFailed:
                _end_without(self.folder, "another run has taken it")
            except Exception:  # as long as there is time
                self.check()
                time.sleep(LEASE_SECONDS / 60)

    def _let_go(self) -> None:
        _, prefix = address(self.folder)
        self._write("", self._generation, timeout=LEASE_SECONDS / 8)
        blob = self._object()
        if len(list(blob.bucket.list_blobs(prefix=f"{prefix}/", max_results=2))) == 1:  # a run that was refused
            blob.delete(if_generation_match=self._generation)


def _end_without(folder: Path, why: str) -> None:
    message = (
        f"workdir {folder}: its lease is lost ({why}), and another run may be writing there: nothing more is written; the same "
        f"command goes on from the last checkpoint, if no other run has it"
    )
    os._exit(stop(RESTART_CODE, message))


@contextlib.contextmanager
def _again_and_again(seconds: float, do: Callable[[], None]) -> Iterator[None]:
    """Does something every so often in a thread."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(seconds):
            do()

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _publish_if_it_answers(folder: Path) -> None:
    with contextlib.suppress(Exception):  # at the next checkpoint it is said
        publish(folder)


def _said_in(blob: Any) -> dict[str, Any]:
    """Who holds a lease; one that is gone meanwhile, or is none of ours, has no owner."""
    try:
        said = json.loads(blob.download_as_bytes())
        return {"owner": str(said["owner"]), "token": str(said["token"])}
    except (exceptions().NotFound, ValueError, KeyError, TypeError):
        return {"owner": "", "token": ""}
