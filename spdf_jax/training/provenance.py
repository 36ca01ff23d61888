"""What made a run, kept in its workdir: the code of its experiment, and with what it was started, each time."""

import ast
import contextlib
import datetime
import hashlib
import importlib.metadata
import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError
from spdf_jax.processes import device_name, is_first
from spdf_jax.sparsity.rules import OWN_RULES, RULES
from spdf_jax.workdir import CODE_FOLDER, PROVENANCE_FILE, read_json, write_atomically, write_json

PACKAGES = ("spdf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def check_same_code(config: RunConfig, workdir: Path, file: Path | None) -> None:
    """Refuses to go on with code that has changed where the run uses it, and says so where it does not.

    A run is its config, and what an experiment file sets is compared by that. What a config cannot hold is the code of a rule
    that the file defines. Comments, docstrings and layout may change.

    Args:
      config: of the command.
      workdir: with the code that the run began with, if it kept any.
      file: of the experiment; None for a run from Python.

    Raises:
      InputError: a rule of the run is from a file that has changed.
    """
    kept = {path.name: path for path in (workdir / CODE_FOLDER).glob("*.py")}
    changed = [
        (path, kept[name])
        for name, path in code_files(config, file).items()
        if name in kept and fingerprint_of_code(path) != fingerprint_of_code(kept[name])
    ]
    for path, before in changed:
        if rules := list(own_rules(config)):
            raise InputError(
                f"{path}: has changed since this run began, and rule {rules[0]!r} of it is the run's; put it back as {before} "
                f"has it, or choose another --workdir"
            )
        if is_first():
            print(f"{path}: has changed since this run began (it was {before}); the settings are the same.", flush=True)


def record_start(config: RunConfig, workdir: Path, file: Path | None, command: str, step: int) -> None:
    """Adds a start to ``provenance.json``; at the first, keeps the code, too.

    Args:
      config, workdir: of the run.
      file: of the experiment; None for a run from Python.
      command: as it was given; "" for a run from Python.
      step: after which the run goes on.
    """
    add_start(workdir, command, step)
    if is_first() and not step:
        (workdir / CODE_FOLDER).mkdir(exist_ok=True)
        for name, source in code_files(config, file).items():
            write_atomically(workdir / CODE_FOLDER / name, source.read_bytes())


def add_start(workdir: Path, command: str, step: int) -> None:
    """Adds a start to ``provenance.json``: when, after which step, with which versions."""
    if not is_first():
        return
    path = workdir / PROVENANCE_FILE
    try:
        before = read_json(path, "")["starts"] if step else []
    except (InputError, KeyError):  # a run of an older release, or damage: from here on it is known again
        before = []
    start = {
        "step": step,
        "time": now(),
        "command": command,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "device": device_name(),
    }
    write_json(path, {"starts": [*before, start]})


def record_failure(workdir: Path, step: int, why: str) -> None:
    """Adds to the last start in ``provenance.json`` that the run failed; the next start goes before it. Never raises for it.

    Args:
      workdir: of the run.
      step: at which it failed.
      why: one line.
    """
    if not is_first():
        return
    path = workdir / PROVENANCE_FILE
    with contextlib.suppress(InputError, KeyError, IndexError, TypeError, OSError):  # the failure may be the disk's
        starts = read_json(path, "")["starts"]
        starts[-1]["failure"] = {"step": step, "time": now(), "why": why}
        write_json(path, {"starts": starts})


def now() -> str:
    """The time, in UTC.

    >>> now()[-6:]
    '+00:00'
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def own_rules(config: RunConfig) -> Iterator[str]:
    """Names of the run's rules that are not this library's, or are no more what they are there."""
    for name in dict.fromkeys(phase.sparsity.rule for phase in config.phases.values()):
        if RULES.get(name) is not OWN_RULES.get(name):
            yield name


def code_files(config: RunConfig, file: Path | None) -> dict[str, Path]:
    """The experiment file, and those in which the rules of its own are, by name."""
    functions = [function for name in own_rules(config) for function in RULES[name] if callable(function)]
    defined = (getattr(inspect.unwrap(function), "__code__", None) for function in functions)
    sources = {Path(code.co_filename) for code in defined if code is not None}
    package = Path(__file__).parents[1]
    own = [path for path in sorted(sources) if path.suffix == ".py" and path.is_file() and package not in path.parents]
    return {path.name: path for path in itertools.chain(own, [file] if file else [])}


def fingerprint_of_code(path: Path) -> str:
    """Of what a file does: its comments, docstrings and layout left out; of its bytes where it is no Python."""
    content = path.read_bytes()
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return hashlib.sha256(content).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def commit() -> str:
    """Of the clone that this library runs from, with "+" where files in it were changed; "" if there is none."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    said = [_git(root, "rev-parse", "--short=12", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")]
    return said[0] and said[0] + ("+" if said[1] else "")


def _git(root: Path, *command: str) -> str:
    how: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 10, "check": False}
    try:
        done = subprocess.run(["git", "-C", str(root), *command], **how)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
