"""One file a ``--job``: its `run` does the job for a run, its `run_sweep` for a sweep, where a sweep has that job.

`compare` is of many runs, and of no config. `pages` is no job: it keeps the pages of those that train. `fit` is none either: it
trains the model of a caller in Python.
"""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax

from spdf_jax.config import saved
from spdf_jax.config.run import RunConfig
from spdf_jax.config.sweep import SweepConfig
from spdf_jax.data import DataConfig, cache_folder
from spdf_jax.errors import InputError
from spdf_jax.processes import device_name


class Request(NamedTuple):
    """What the command line says besides the config; see the flags in `spdf_jax.main`.

    Attributes:
      workdir: the folder of the run or sweep.
      file: of the experiment.
      command: as it was given, for the report.
      quiet: print errors only, and what a job other than ``train`` is for.
      prompt: what ``generate`` continues.
      output: where ``evaluate``, ``export``, ``circuit`` and ``report`` write and not into the workdir, and ``compare`` too.
      runs: the workdirs that ``compare`` is of.
      plan_topology: the pod for which ``plan`` compiles.
      plan_search: compile for it in every layout.
    """

    workdir: Path
    file: str = ""
    command: str = ""
    quiet: bool = False
    prompt: str = ""
    output: Path | None = None
    runs: tuple[Path, ...] = ()
    plan_topology: str = ""
    plan_search: bool = False

    @property
    def alone(self) -> bool:
        """Whether the workdir alone says which run it is."""
        return self.file == saved.__file__

    @contextlib.contextmanager
    def training(self, config: RunConfig | SweepConfig) -> Iterator[None]:
        """What is said before training, and, where all is to be quiet, nothing of what it prints."""
        others = ", ".join(variant for variant in config.variants if variant != config.variant)
        with contextlib.redirect_stdout(io.StringIO()) if self.quiet else contextlib.nullcontext():
            print(
                f"Running {config.experiment}, variant {config.variant}, on {device_name()}."
                + (f" Others, by --config {self.file}:VARIANT: {others}." if others and not self.alone else ""),
                flush=True,
            )
            yield


def keep_compiled(data: DataConfig) -> None:
    """A run that starts again compiles nothing again, nor does a sweep's next seed. `JAX_COMPILATION_CACHE_DIR` goes before."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        with contextlib.suppress(OSError, InputError):  # no room of its own: nothing is kept
            folder = cache_folder(data) / "compiled"
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))
