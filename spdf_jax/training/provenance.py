"""What made a run, kept in its workdir: the code of its experiment, and with what it was started, each time."""

import ast
import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import inspect
import itertools
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spdf_jax.config.run import RunConfig
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError, reading
from spdf_jax.processes import device_name, is_first
from spdf_jax.sparsity import optimizers
from spdf_jax.sparsity.rules import OWN_RULES, RULES, written_in
from spdf_jax.training.phases import Begin
from spdf_jax.workdir import CODE_FOLDER, CONFIG_FILE, PROVENANCE_FILE, read_json, write_atomically, write_json

PACKAGE = Path(__file__).parents[1]
PACKAGES = ("spdf_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Source(NamedTuple):
    """A file of a run's code, as it was when it was read."""

    path: Path
    content: bytes


def read_code(config: RunConfig, file: Path | str) -> dict[str, Source]:
    """The run's code, by file name. To be read once, as soon as it has been executed: who edits it then changes no run.

    Args:
      config: of the run.
      file: of the experiment; "" for a run from Python.

    Raises:
      InputError: `file` cannot be read.
    """
    code = {}
    for name, path in code_files(config, file).items():
        with reading(f"{path}: the experiment's file cannot be read", "name the one that the config is from"):
            code[name] = Source(path, path.read_bytes())
    return code


def kept_start(workdir: Path) -> tuple[dict[str, Source], str]:
    """The code and the command that a run began with, where its workdir alone says that it is to go on.

    Raises:
      InputError: a rule of the run is of that code, which is kept to be compared and not to be executed.
    """
    command = read_json(workdir / CONFIG_FILE, "restore it, or choose another --workdir").get("command")
    fix = f"give what began it: {command or 'the same call from Python'}"
    code = {path.name: Source(path, path.read_bytes()) for path in sorted((workdir / CODE_FOLDER).glob("*.py"))}
    path = workdir / PROVENANCE_FILE
    if code or path.exists():  # else of an older release
        with reading(f"{path}: no list of starts", fix):
            rules = sorted(name for start in read_json(path, fix)["starts"] for name in start.get("rules", ()))
        if rules:
            raise InputError(f"--workdir {workdir}: rule {rules[0]!r} of this run is of a file of its own; {fix}")
    return code, command or ""


def check_same_code(config: RunConfig, workdir: Path, code: Mapping[str, Source]) -> None:
    """Refuses to go on with code that has changed where the run uses it, and says so where it does not.

    A run is its config, and what an experiment file sets is compared by that. What a config cannot hold is the code of a rule
    or an optimiser that the file defines. Comments, docstrings and layout may change. Not to be asked of a run that has saved
    nothing: nothing of what other code made goes on.

    Args:
      config: of the command.
      workdir: with the code that the run began with, if it kept any.
      code: of the command.

    Raises:
      InputError: a rule or an optimiser of the run is from a file that has changed.
    """
    kept = {path.name: path for path in (workdir / CODE_FOLDER).glob("*.py")}
    before = {name: fingerprint_of_code(path.read_bytes()) for name, path in kept.items()}
    own = own_parts(config)
    written = {_file_of(part) for parts in own.values() for part in parts}
    for name, (path, content) in code.items():
        ours = fingerprint_of_code(content)
        # A rule's own file is compared whatever it is called by now.
        if own and ours not in before.values() and (name in kept or (kept and path in written)):
            put_back = f"put it back as {kept.get(name, workdir / CODE_FOLDER)} has it"
            raise InputError(
                f"{path}: has changed since this run began, and {_said(next(iter(own)))} of it is the run's; {put_back}, or "
                f"choose another --workdir"
            )
        if before.get(name, ours) != ours and is_first():
            print(
                f"{path}: has changed since this run began (it was {kept[name]}); the settings are the same.",
                flush=True,
            )


def keep_identity(
    config: RunConfig, workdir: Path, command: str, tokenizer: Tokenizer | None, begin: Begin, *, new: bool
) -> None:
    """Writes what says whose run it is: its config, and the tokenizer if it has one."""
    if new:
        write_config(config, workdir, command, begin)
    if tokenizer is not None and (new or not (workdir / "tokenizer.json").is_file()):
        write_atomically(workdir / "tokenizer.json", tokenizer.to_str(pretty=True).encode())


def write_config(config: RunConfig, workdir: Path, command: str, begin: Begin) -> None:
    """Writes ``config.json``, with the command and where the run begins if that is not at zero."""
    begins = {"begins": begin._asdict()} if begin.step else {}
    write_json(workdir / CONFIG_FILE, config.as_dict() | {"command": command} | begins)


def record_start(
    config: RunConfig,
    workdir: Path,
    code: Mapping[str, Source],
    command: str,
    step: int,
    lives: Sequence[Sequence[float]] = (),
    first_step: int = 0,
    changed: Mapping[str, Any] | None = None,
) -> None:
    """Adds a start to ``provenance.json``; where it begins the run, keeps its code, too.

    Args:
      config, workdir: of the run.
      code: of `read_code`.
      command: as it was given; "" for a run from Python.
      step: after which the run goes on.
      lives: see `lives`, with this start at their end.
      first_step: that at which it began.
      changed: settings that this start changes, as they were and are.
    """
    parts = own_parts(config)
    own = {name: _fingerprint_of_parts(parts[name], code) for name in parts}
    add_start(workdir, command, step, own, lives, first_step, changed)
    if is_first() and step == first_step:
        folder = workdir / CODE_FOLDER
        folder.mkdir(exist_ok=True)
        for name, source in code.items():
            write_atomically(folder / name, source.content)
        for path in folder.glob("*.py"):  # of a start that came to nothing
            if path.name not in code:
                path.unlink()


def add_start(
    workdir: Path,
    command: str,
    step: int,
    rules: Mapping[str, str] | None = None,
    lives: Sequence[Sequence[float]] = (),
    first_step: int = 0,
    changed: Mapping[str, Any] | None = None,
) -> None:
    """Adds a start to ``provenance.json``: when, after which step, with which versions, which code its own `rules` have,
    and its optimisers, as ``optimizer NAME``.

    Says where that code is not what it was at the start before: a run of `spdf_jax.fit` keeps none that could be put back.
    """
    if not is_first():
        return
    path = workdir / PROVENANCE_FILE
    try:
        before = read_json(path, "")["starts"] if step > first_step else []
    except (InputError, KeyError):  # a run of an older release, or damage: from here on it is known again
        before = []
    was = before[-1].get("rules", {}) if before else {}
    for name in (name for name, now_is in (rules or {}).items() if was.get(name, now_is) != now_is):
        print(
            f"{workdir}: the code of rule {name!r} has changed since the last start, and the run goes on with it as it is now; "
            f"put it back, or choose another workdir, if that is not meant",
            flush=True,
        )
    start = {
        "step": step,
        "time": now(),
        "command": command,
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "commit": commit(),
        "device": device_name(),
    }
    start |= {name: said for name, said in (("rules", rules), ("changed", changed)) if said}
    write_json(path, {"starts": [*before, start], "lives": lives})


def lives(workdir: Path, last_alive: float) -> list[list[float]]:
    """When each start so far began and when it was last alive, in seconds since 1970, those that saved nothing too.

    Args:
      workdir: of the run.
      last_alive: of the last of them, see `spdf_jax.training.metrics.last_alive`.

    Returns:
      ``[[begun, last alive], ...]``; empty where no start is known of.
    """
    try:
        found = [[float(begun), float(end)] for begun, end in read_json(workdir / PROVENANCE_FILE, "")["lives"]]
    except (InputError, KeyError, TypeError, ValueError):  # a run of an older release, or damage
        return []
    if found:
        found[-1][1] = max(found[-1][1], last_alive)
    return found


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
        content = read_json(path, "")
        content["starts"][-1]["failure"] = {"step": step, "time": now(), "why": why}
        write_json(path, content)


def now() -> str:
    """The time, in UTC.

    >>> now()[-6:]
    '+00:00'
    """
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def own_rules(config: RunConfig) -> Iterator[str]:
    """Names of the run's rules that are not this library's, or are no more what they are there."""
    yield from filter(is_own, dict.fromkeys(phase.sparsity.rule for phase in config.phases.values()))


def own_parts(config: RunConfig) -> dict[str, tuple[Any, ...]]:
    """What the run's own rules (``mine``) and its own optimisers (``optimizer mine``) consist of."""
    names = dict.fromkeys(phase.optimizer.name for phase in config.phases.values())
    own = {f"optimizer {name}": (optimizers.OPTIMIZERS[name],) for name in names if optimizers.is_own(name)}
    return {name: tuple(RULES[name]) for name in own_rules(config)} | own


def is_own(rule: str) -> bool:
    """Whether a rule is not this library's, or no more what it is there."""
    return RULES.get(rule) is not OWN_RULES.get(rule)


def code_files(config: RunConfig, file: Path | str) -> dict[str, Path]:
    """The experiment file, and those in which the rules and optimisers of its own are, by name."""
    found = (_file_of(part) for parts in own_parts(config).values() for part in parts)
    own = sorted({path for path in found if path is not None and PACKAGE not in path.parents})
    return {path.name: path for path in itertools.chain(own, [Path(file)] if file else [])}


def _file_of(part: Any) -> Path | None:
    """Where a function is written; None of what is no function, or written in no file, as in a notebook."""
    path = Path((written_in(part) or ("",))[0])
    return path if path.suffix == ".py" and path.is_file() else None


def _said(name: str) -> str:
    """A name of `own_parts` in a sentence."""
    kind, _, own = name.rpartition(" ")
    return f"{kind or 'rule'} {own!r}"


def _called(part: Any) -> str:
    if isinstance(part, functools.partial):
        return f"{_called(part.func)} {part.args} {part.keywords}"
    return str(part.__qualname__)


def fingerprint_of_rule(name: str, code: Mapping[str, Source]) -> str:
    """Of a rule's numbers and of the files that its functions are in, or of the functions alone where those are in none."""
    return _fingerprint_of_parts(RULES[name], code)


def _fingerprint_of_parts(parts: Iterable[Any], code: Mapping[str, Source]) -> str:
    def said(part: Any) -> str:
        path = _file_of(part)
        if not callable(part):
            return repr(part)
        if path is not None and PACKAGE in path.parents:
            return _called(part)
        if path is not None:
            content = code[path.name].content if path.name in code else path.read_bytes()
            return f"{_called(part)} {fingerprint_of_code(content)}"
        try:
            return fingerprint_of_code(inspect.getsource(part).encode())
        except (OSError, TypeError):
            return type(part).__qualname__

    return hashlib.sha256("\n".join(map(said, parts)).encode()).hexdigest()


def fingerprint_of_code(content: bytes) -> str:
    """Of what a file does: its comments, docstrings and layout left out; of its bytes where it is no Python."""
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
