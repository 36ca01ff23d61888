"""Many processes that make one run, and how a process of a run ends before its time.

On a pod the same program runs on every host. What the processes share beside their devices is JAX's coordination service,
which lives in process 0: through it a process that has to stop tells the others why, so that none waits for it in vain.

A process ends with `RESTART_CODE` where the same command goes on from the last checkpoint: after SIGTERM, where a step hangs,
where another process is gone.
"""

import contextlib
import ctypes
import faulthandler
import hashlib
import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the key-value store of the coordination service has no public name
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from spdf_jax.errors import InputError
from spdf_jax.sharding import batch_devices, batch_sharding

#: BSD's EX_TEMPFAIL: nothing is wrong with the command; give it again.
RESTART_CODE = 75

_THREADS = "NPROC"  # the threads that XLA computes with on a CPU: it has no option in JAX
_HEARTBEAT_SECONDS = 30  # a process that has been silent for so long is gone
_FAREWELL_SECONDS = 3  # process 0 stays so long for the others to hear why it ends
_STOPPED = "spdf_jax/stopped"
_questions = itertools.count()
_terminated = threading.Event()
_progress: tuple[float, int, float] | None = None  # since when, at which step, seconds allowed; 0: any


def device_name() -> str:
    """The devices at hand, in words, and the cores that this process may use where they are what computes."""
    device = jax.devices()[0]
    found = f"{jax.device_count()} x {device.device_kind}"
    if device.platform != "cpu":
        return found
    # Linux alone can keep a process to some of them.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (threads := os.environ.get(_THREADS, "")).isdigit():
        cores = min(cores, int(threads)) or cores
    return f"{found}, {cores} {'core' if cores == 1 else 'cores'}"


def keep_memory() -> None:
    """Memory that is freed stays with the process. Before any other use of JAX; without glibc, nothing.

    A compiled step on a CPU allocates its scratch memory anew every time. By itself glibc takes large blocks from the kernel
    and gives them back: an eighth of a small model's step goes into the kernel's zeroing of pages.
    """
    with contextlib.suppress(OSError, ValueError):  # confstr knows the name with glibc alone
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            libc = ctypes.CDLL(None)
            # mallopt(3): M_ARENA_MAX, as other arenas hold no large block; M_MMAP_MAX; M_TRIM_THRESHOLD.
            for option, value in ((-8, 1), (-4, 0), (-1, 2**31 - 1)):
                libc.mallopt(option, value)


def one_thread() -> None:
    """A CPU computes with one thread from here on: its sums have one order on any number of cores. Before any use of JAX."""
    os.environ[_THREADS] = "1"


def initialise() -> None:
    """Joins the processes of a run. Before any other use of JAX.

    Cloud TPU, GKE and SLURM say by themselves who is there. Elsewhere the environment does: ``JAX_COORDINATOR_ADDRESS``
    (host:port of process 0), ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``. From here on only process 0 writes to standard
    output.

    Raises:
      InputError: nothing says who is there, or they cannot be reached.
    """
    try:
        jax.distributed.initialize(
            num_processes=_number("JAX_NUM_PROCESSES"),
            process_id=_number("JAX_PROCESS_ID"),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise InputError(
            f"--distributed: cannot join the other processes ({' '.join(str(error).split())}); on plain hosts set "
            f"JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or leave --distributed out"
        ) from None
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if jax.default_backend() == "cpu":
        # Programs of several processes that come from the cache mix up their collectives: gloo aborts (JAX 0.10.2).
        jax.config.update("jax_enable_compilation_cache", False)
    _catch_abort()
    agree("code", code_version(), "install the same version of spdf_jax and of what it stands on in all of them")
    threading.Thread(target=_stop_with_the_others, daemon=True).start()
    # Devices connect now, all at the same point: on CPU they wait 30 s for each other, and compilation may take longer.
    multihost_utils.sync_global_devices("spdf_jax")


def code_version() -> str:
    """A hash of the library's source and of the versions of what compiles it: what differs in it compiles to other programs.

    >>> len(code_version())
    64
    """
    source = Path(__file__).parent
    digest = hashlib.sha256(
        " ".join([sys.version, *map(version, ("jax", "jaxlib", "flax", "optax", "numpy"))]).encode()
    )
    for file in sorted(source.rglob("*.py")):
        digest.update(f"{file.relative_to(source)} ".encode() + file.read_bytes())
    return digest.hexdigest()


def is_first() -> bool:
    """Whether this process is the one that writes files and talks; true where there is only one."""
    return jax.process_index() == 0


def from_first(make: Callable[[], str]) -> str:
    """What `make` returns in process 0, in every process. All of them call it; `make` may take its time."""
    if not jax.distributed.is_initialized():
        return make()
    key = f"spdf_jax/{next(_questions)}"
    if is_first():
        _store().key_value_set(key, make())
    return _wait_for(key)


def wait_for_first() -> None:
    """Until process 0 has come here too: what it wrote before is there to be read."""
    from_first(str)


def agree(what: str, value: str, fix: str) -> None:
    """Raises `InputError` in a process whose `value` is not that of process 0."""
    if value != from_first(lambda: value):
        raise InputError(f"{what}: process {jax.process_index()} has another than process 0; {fix}")


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of every batch this process loads, and how many shares there are.

    Processes whose devices hold the same rows, as with a tensor axis that spans them, load the same share.

    Raises:
      InputError: a mesh that leaves a process out, or gives processes rows that overlap in part.
    """
    n_rows = batch_devices(mesh)
    rows: dict[int, set[int]] = {process: set() for process in range(jax.process_count())}
    placed: Any = batch_sharding(mesh, rank=2).devices_indices_map((n_rows, 1))
    for device, (row, _) in placed.items():
        rows[device.process_index].add(row.start or 0)
    shares = sorted({tuple(sorted(held)) for held in rows.values()})
    if len({len(share) for share in shares}) > 1 or sum(map(len, shares)) != n_rows:
        raise InputError(
            f"config.mesh: data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']} and tensor {mesh.shape['tensor']} do not share "
            f"out {jax.device_count()} devices of {jax.process_count()} processes evenly; use all devices, and powers of two"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def guard() -> None:
    """Makes this process the run's own, and ends a loop that hangs.

    SIGTERM asks the loop to save and end (`preempted`), and so does the first Ctrl-C once there is something to save; the next
    one ends at once.
    """
    if not jax.distributed.is_initialized():  # else JAX has its own handler, and tells the other processes
        signal.signal(signal.SIGTERM, lambda *_: _terminated.set())
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a shell has it ignored
        signal.signal(signal.SIGINT, _interrupt)
    threading.Thread(target=_end_what_hangs, daemon=True).start()


def _interrupt(*_: Any) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if _progress is None:
        raise KeyboardInterrupt
    os.write(2, b"interrupted: saving after this step; once more ends at once\n")
    signal.raise_signal(signal.SIGTERM)


def preempted(step: int) -> bool:
    """Whether to save after `step` and end: all processes get the same answer. To be asked after every step."""
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return _terminated.is_set()


def beat(step: int, limit_seconds: float) -> None:
    """Something moves. A guarded process that is silent for `limit_seconds` after it ends (0: never)."""
    global _progress
    _progress = (time.monotonic(), step, limit_seconds)


def stop(code: int, message: str) -> int:
    """Says `message` and returns `code`. In a run of many processes it does not return: all end with `code`, told why."""
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        last = threading.Timer(10, os._exit, [code])  # should the coordinator not answer
        last.daemon = True
        last.start()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first to say why
            _store().key_value_set(_STOPPED, f"{code} {_name()} stopped: {message.splitlines()[-1]}")
        _leave(code)
    return code


def end(code: int) -> NoReturn:
    """Ends this process. One of many leaves at once: the interpreter's own end would abort the thread that listens in JAX.

    So does one that a second Ctrl-C ends: the interpreter would wait for threads, which may be reading a batch for minutes.
    """
    if jax.distributed.is_initialized() or code == 130:
        sys.stdout.flush()
        sys.stderr.flush()
        if code != 130:
            jax.distributed.shutdown()  # waits for the others
        os._exit(code)
    sys.exit(code)


@contextlib.contextmanager
def one_for_all() -> Iterator[None]:
    """An exception that nothing handled ends all processes of the run, and not only its own."""
    try:
        yield
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(_HEARTBEAT_SECONDS + 10)  # most likely another process is gone: that takes time to be known
        stop(1, traceback.format_exc())


def _name() -> str:
    return f"process {jax.process_index()} of {jax.process_count()}"


def _store() -> Any:
    return distributed.global_state.client


def _number(name: str) -> int | None:
    try:
        return int(os.environ[name]) if name in os.environ else None
    except ValueError:
        raise InputError(f"{name}={os.environ[name]!r}: must be a whole number") from None


def _wait_for(key: str) -> str:
    while True:
        try:
            return _store().blocking_key_value_get(key, 60_000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _stop_with_the_others() -> None:
    try:
        code, _, reason = _wait_for(_STOPPED).partition(" ")
    except jax.errors.JaxRuntimeError:  # the service is gone: with the run, or `_catch_abort` sees to it
        return
    if not reason.startswith(f"{_name()} "):
        os.write(2, f"{reason}\n".encode())
        _leave(int(code))


def _leave(code: int) -> NoReturn:
    if is_first():
        time.sleep(_FAREWELL_SECONDS)
    os._exit(code)


def _catch_abort() -> None:
    """JAX's runtime aborts a process when it has lost another. Its callback for that cannot be had from Python (0.10.2)."""
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(_: int) -> None:
    os.write(2, b"another process of this run is gone; the same command resumes from the last checkpoint\n")
    os._exit(RESTART_CODE)


def _end_what_hangs() -> None:
    while True:
        time.sleep(1)
        if _progress is not None:
            since, step, limit_seconds = _progress
            if limit_seconds and time.monotonic() - since > limit_seconds:
                faulthandler.dump_traceback()
                message = (
                    f"step {step}: nothing has moved for {limit_seconds:g} s (config.loop.watchdog_seconds); where each thread "
                    f"was is above; the same command resumes from the last checkpoint"
                )
                os._exit(stop(RESTART_CODE, message))
