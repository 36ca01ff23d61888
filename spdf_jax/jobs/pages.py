"""The page of a run or a sweep while it goes on, as often as that is cheap, and where it ends before its time."""

import contextlib
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from spdf_jax.errors import Restart, one_line, out_of_memory
from spdf_jax.processes import is_first
from spdf_jax.training.loop import Run
from spdf_jax.training.provenance import record_failure
from spdf_jax.workdir import METRICS_FILE, SUMMARY_FILE, sweep

#: All that writing pages may take of the time since the start.
SHARE_OF_TIME = 0.05
#: What the first one is taken to cost: drawing is imported for it.
_FIRST_SECONDS = 2.0


class LivePage:
    """A page that is written again and again, and never ends what it is about."""

    def __init__(self, write: Callable[[], object], say: Callable[[str], None]) -> None:
        """The clock starts here.

        Args:
          write: writes the page.
          say: prints a line.
        """
        self._write, self._say, self._said = write, say, ""
        self._start, self._spent_seconds, self._last_seconds = time.monotonic(), 0.0, _FIRST_SECONDS

    def update(self) -> None:
        """Writes the page, unless that would take more than `SHARE_OF_TIME` of the time so far."""
        since_start = time.monotonic() - self._start
        if self._spent_seconds + self._last_seconds <= SHARE_OF_TIME * since_start:
            self.write()

    def write(self) -> None:
        """Writes the page; what keeps it from being written is said, once."""
        if not is_first():
            return
        begun = time.monotonic()
        try:
            self._write()
        except Exception as error:  # whatever is wrong with the page, what it is about is worth more
            said = f"the page is left as it was: {one_line(error)}"
            if said != self._said:
                self._say(said)
            self._said = said
        self._last_seconds = time.monotonic() - begun
        self._spent_seconds += self._last_seconds


@contextlib.contextmanager
def sweep_page(workdir: Path) -> Iterator[LivePage]:
    """Of a sweep that goes on; where it ends before its time its page says so."""
    from spdf_jax.report import write_sweep_report  # brings matplotlib, see `write_run_page`

    def page(running: bool) -> LivePage:
        return LivePage(
            partial(write_sweep_report, workdir, running=running, figures=False), partial(print, flush=True)
        )

    try:
        yield page(running=True)
    except Exception:
        if any(workdir.glob(f"cells/*/{METRICS_FILE}")):
            page(running=False).write()
        raise


@contextlib.contextmanager
def accompanied(run: Run) -> Iterator[None]:
    """Its page and its trackers follow a run, up to its end or for a moment longer; its rows are closed then."""
    run.write_page = LivePage(
        partial(write_run_page, run.workdir, running=True, figures=False), run.tracker.message
    ).update
    finished = False
    with contextlib.closing(run.tracker):
        try:
            with _last_page(run):
                yield
            finished = True
        finally:
            run.followers.close(finished)


@contextlib.contextmanager
def _last_page(run: Run) -> Iterator[None]:
    """Where the run ends before its time its page says so and, where it has failed, why."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, Restart):
            record_failure(run.workdir, run.step, out_of_memory(error) or one_line(error))
        LivePage(partial(write_run_page, run.workdir, running=False, figures=False), run.tracker.message).write()
        raise


def finished_page(workdir: Path) -> None:
    """Writes the page of a finished run again where it is missing or of before the end, since the end was killed."""
    if not is_first():
        return
    sweep(workdir)
    page = workdir / "report.html"
    # The last page is written after the summary: an older one is of a run that went on.
    if not page.is_file() or page.stat().st_mtime_ns < (workdir / SUMMARY_FILE).stat().st_mtime_ns:
        why = "is of before its end" if page.is_file() else "was missing"
        print(f"{workdir}: its report {why}, and is written again: {write_run_page(workdir)}", flush=True)


def write_run_page(workdir: Path, *, running: bool | None = None, figures: bool = True) -> Path:
    """`spdf_jax.report.write_report`; see there."""
    # Imported here, since it brings matplotlib, for a second of which `import spdf_jax` has no use.
    from spdf_jax.report import write_report

    return write_report(workdir, running=running, figures=figures)
