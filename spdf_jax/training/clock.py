"""Where the wall-clock time of a run goes: every second since its first start is in exactly one part.

Steps are dispatched ahead of what they compute, so a part is what the loop was waiting for, and nothing is synchronised to
measure it: between the metrics of two steps lies the time of the second one, with the dispatch of the step after it. A wait for
data counts as one where at its end the devices had nothing left to do; one that computing hides is of the step.

What was spent since the last checkpoint dies with the process. The rows say when it was last alive, ``provenance.json`` when
each start began: what lies after the checkpoint is lost, and what lies between two starts is neither.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")

#: The parts, in the order of the page: what each is called there, and what is in it.
PARTS = {
    "starting": ("Start-up", "reading data, restoring, building the state"),
    "compiling": ("Compiling", "tracing included, whatever it was for"),
    "training": ("Training steps", "which update weights"),
    "topology": ("Topology steps", "which move masks"),
    "evaluation": ("Evaluation", "validation losses"),
    "saving": ("Saving", "what of it the run waited for"),
    "data": ("Waiting for data", "while nothing was computed"),
    "reporting": ("Pages and pictures", "the last page of all left out"),
    "earlier": ("Not told apart", "by an earlier release"),
    "lost": ("Lost to restarts", "after the last checkpoint before a restart, and done again"),
    "stopped": ("Between starts", "from the last row of one to the beginning of the next"),
}
#: Of these nothing is in the result.
NOT_OF_THE_RESULT = ("lost", "stopped")


class Clock:
    """The time of a run, from when this is made. In a `with` it hears what JAX compiles.

    Attributes:
      begun: when, in seconds since 1970.
      seconds: of every part so far, by the names in `PARTS`.
      computing: a `jax.Array` that is there when the newest step is done; None before the first.

    >>> with Clock() as clock:
    ...     clock.spent("starting")
    >>> abs(clock.elapsed - clock.seconds["starting"]) < 1e-6
    True
    """

    def __init__(self) -> None:
        self.begun = time.time()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.computing: Any = None
        self._since, self._compiled = time.perf_counter(), 0.0  # the latter since the former
        self._spans: list[tuple[float, float]] = []  # beginning and length of what lately compiled

    def __enter__(self) -> "Clock":
        jax.monitoring.register_event_duration_secs_listener(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: Any) -> None:
        """What is traced inside another trace is reported by itself, and with it: it is counted once."""
        if event.startswith("/jax/core/compile/"):
            begun, inside = time.perf_counter() - duration_secs, 0.0
            while self._spans and self._spans[-1][0] >= begun:
                inside += self._spans.pop()[1]
            self._spans = [*self._spans[-64:], (begun, duration_secs)]
            self._compiled += max(0.0, duration_secs - inside)

    @property
    def elapsed(self) -> float:
        """Seconds since the first start, those not yet spent on anything left out."""
        return sum(self.seconds.values())

    @property
    def of_the_result(self) -> float:
        """Of these, what went into the run's result: all but what was lost, and the time between starts."""
        return sum(seconds for part, seconds in self.seconds.items() if part not in NOT_OF_THE_RESULT)

    def spent(self, part: str) -> None:
        """All since the last call went into `part`, but for what was compiled meanwhile."""
        now = time.perf_counter()
        passed = now - self._since
        compiled = min(self._compiled, passed)
        self.seconds["compiling"] += compiled
        self.seconds[part] += passed - compiled
        self._since, self._compiled = now, 0.0

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches; waits for one that nothing was computed meanwhile are ``data``."""
        begun = time.perf_counter()
        for batch in batches:
            if self.computing is None or self.computing.is_ready():
                waited = time.perf_counter() - begun
                self.seconds["data"] += waited
                self._since += waited
            yield batch
            begun = time.perf_counter()

    def go_on(self, record: Mapping[str, Any], lives: Sequence[Sequence[float]]) -> None:
        """Adds what came before this start.

        Args:
          record: of the checkpoint; ``clock`` in it is what `recorded` returned.
          lives: when each earlier start began and when it was last alive, see `spdf_jax.training.provenance.lives`.
        """
        found = record.get("clock") or {"at": None, "seconds": {"earlier": record.get("seconds", 0.0)}}
        for part, seconds in found["seconds"].items():
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds
        since = found["at"] if found["at"] is not None else min((begun for begun, _ in lives), default=self.begun)
        lost = sum(max(0.0, end - max(begun, since)) for begun, end in lives)
        self.seconds["lost"] += lost
        self.seconds["stopped"] += max(0.0, self.begun - since - lost)

    def recorded(self) -> dict[str, Any]:
        """For the record of a checkpoint: the parts up to now, and when that is."""
        return {"at": time.time(), "seconds": dict(self.seconds)}

    def rounded(self) -> dict[str, float]:
        """The parts to the millisecond, for rows and summaries; those that were never met left out."""
        return {part: round(seconds, 3) for part, seconds in self.seconds.items() if seconds}
