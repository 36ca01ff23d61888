"""Command line: ``python -m spdf_jax.main ...``. ``--help`` says what is to be typed, and what each flag is for."""

import importlib
import importlib.metadata
import io
import os
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from spdf_jax import processes
from spdf_jax.cloud import spool
from spdf_jax.config import saved
from spdf_jax.config.read import in_our_words, no_number
from spdf_jax.config.run import place_of
from spdf_jax.errors import InputError, Restart, causes, closest, end_interrupted, line_of, nearest, out_of_memory

_USAGE = """\
python -m spdf_jax.main --config FILE[:VARIANT] [flags] [--config.section.key=value ...]
python -m spdf_jax.main --workdir RUN [flags] [--config.section.key=value ...]      of a run that is there
python -m spdf_jax.main --job compare RUN1 RUN2 ... [--output DIR]"""
#: Each is a module of `spdf_jax.jobs`; those that a sweep has, with theirs.
JOBS = ("train", "evaluate", "generate", "export", "prune", "plan", "circuit", "report", "compare")
SWEEP_JOBS = {"train": "sweep", "plan": "plan", "report": "report"}

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment file, with its variant after a colon: experiments/gpt2_mst.py:124m."
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run leaves everything; default runs/<experiment>-<variant>. Without --config, that of a run to go on with.",
)
_JOB = flags.DEFINE_enum("job", "train", JOBS, "What to do; train resumes a run that has begun.")
_TOPOLOGY = flags.DEFINE_string(
    "plan_topology", "", "TPUs or GPUs for which --job plan compiles the steps: v5e:16x16, v6e-256, h100:8, h200:2x8."
)
_SEARCH = flags.DEFINE_bool("plan_search", False, "Compile for --plan_topology in every mesh, micro-batch and remat.")
_PROMPT = flags.DEFINE_string("prompt", "", "What --job generate continues.")
_OUTPUT = flags.DEFINE_string(
    "output",
    "",
    "Where evaluate, export, prune, circuit and report write, and not into the workdir; compare: runs/compare.",
)
_QUIET = flags.DEFINE_bool("quiet", False, "Print errors only, and what jobs other than train are for.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Be one of many processes; see spdf_jax/processes.py.")
_PROFILE_STEPS = flags.DEFINE_string("profile_steps", "", "A:B leaves a profile of the steps after A up to B.")
_TO_DO = (_CONFIG, _WORKDIR, _JOB, _TOPOLOGY, _SEARCH, _PROMPT, _OUTPUT, _QUIET, _DISTRIBUTED, _PROFILE_STEPS)
# Answered whatever else is said, right or wrong, and so read by themselves.
_QUESTIONS = flags.FlagValues()
_HELP = flags.DEFINE_bool("help", False, "Print this.", short_name="h", flag_values=_QUESTIONS)
_HELP_CONFIG = flags.DEFINE_string(
    "help_config",
    None,
    "Print every key of a config, or of its section (model, phase, sparsity, ...).",
    flag_values=_QUESTIONS,
)
_VERSION = flags.DEFINE_bool("version", False, "Print versions: ours, JAX's, Python's.", flag_values=_QUESTIONS)


@processes.one_for_all()
def main(argv: Sequence[str]) -> int:
    """Runs a job and returns the exit code, other than 0 with one message on standard error.

    0 is done, 2 something the user can fix, 75 (`processes.RESTART_CODE`) an end before its time: the same command goes on, 130
    a Ctrl-C that ended it at once.
    """
    if signal.getsignal(signal.SIGINT) is end_interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if asked := _asked(argv):
            print(asked)
            return 0
        code = _run(argv, _parse(argv))
        spool.publish_all()
        return code
    except InputError as error:
        return _fail(str(error))
    except Restart as notice:
        if processes.is_first():
            print(notice, file=sys.stderr)
        return processes.RESTART_CODE
    except OSError as error:  # a disk that is full, gone, over its quota, read-only now
        if isinstance(error, ConnectionError | TimeoutError):
            raise
        return _fail(f"{error.filename or 'workdir'}: {error.strerror or error}; what was saved before is intact")
    except KeyboardInterrupt:
        said = "interrupted; the same command goes on from the last checkpoint, if the run has saved one"
        return processes.stop(130, said)
    except Exception as error:
        own = importlib.import_module("spdf_jax.sparsity.optimizers").own_files()
        if said := out_of_memory(error) or line_of(error, own):
            return _fail(said)
        raise


def _fail(message: str) -> int:
    # On one line, and nothing in it that a terminal obeys: a message may quote a file.
    said = re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", message)
    return processes.stop(2, f"error: {said}")


def _asked(argv: Sequence[str]) -> str:
    """What ``--help``, ``--help_config`` or ``--version`` prints; "" where none is asked for."""
    for i, argument in enumerate(argv[1:], 1):
        if found := re.fullmatch(r"--?help_config(?:=(.*))?", argument):
            section = found[1] if found[1] is not None else next((a for a in argv[i + 1 : i + 2] if a[:1] != "-"), "")
            return importlib.import_module("spdf_jax.config.reference").reference(section)
    _QUESTIONS(list(argv), known_only=True)
    if _HELP.value:
        told = {flag.name: flags.FLAGS[flag.name].help for flag in _TO_DO}
        told |= {flag.name: _QUESTIONS[flag.name].help for flag in (_HELP, _HELP_CONFIG, _VERSION)}
        told["config.A.B=value"] = "sets B in section A; a key that is not there is answered with the nearest one"
        example = (
            "python -m spdf_jax.main --config experiments/gpt2_mst.py --config.pretrain.steps=100 --workdir runs/short"
        )
        lines = [f"  --{name:<18}{text}" for name, text in told.items()]
        return "\n".join([_USAGE, "", *lines, "", f"For example: {example}"])
    if _VERSION.value:
        others = ("jax", "flax", "optax", "orbax-checkpoint")
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in others)
        ours = importlib.import_module("spdf_jax").__version__
        return f"spdf_jax {ours} ({versions}, Python {sys.version.split()[0]})"
    return ""


def _parse(argv: Sequence[str]) -> list[str]:
    """Reads the flags, and returns the runs to compare. A bad one is the user's to fix, however ml_collections raises it."""
    try:
        argv = _of_its_run(argv)
        rest = flags.FLAGS(argv)[1:]
    except (InputError, flags.Error) as error:
        refused = _said_by_the_file(error) or _in_the_file(error, argv) or no_number(str(error))
        refused = refused or _misspelt(error, argv)
        raise refused or InputError(f"command line: {_one_line(error)}") from error
    except (KeyError, AttributeError) as error:  # ml_collections: an override of a key that is not there
        refused = _in_the_file(error, argv) or _unknown_key(argv)
        raise refused or InputError(f"--config: unknown key {_one_line(error)}") from error
    except (TypeError, ValueError, IndexError) as error:
        raise _in_the_file(error, argv) or InputError(f"--config: {_one_line(error)}") from error
    except Exception as error:  # whatever else the file does; what is not of it is no fault of the user's
        if refused := _in_the_file(error, argv):
            raise refused from error
        raise
    if _JOB.value == "compare":
        for flag in (_CONFIG, _WORKDIR):
            if flag.present:
                raise InputError(
                    f"--{flag.name}: --job compare takes the workdirs of runs: --job compare runs/a runs/b"
                )
        return rest
    if rest:
        job = closest(rest[0], JOBS)
        way_out = f"did you mean --job {job}?" if job else "overrides are spelled --config.section.key=value"
        raise InputError(f"command line: {rest[0]!r} is no flag; {way_out}")
    if _CONFIG.value is None:
        if _JOB.value == "report" and _WORKDIR.value:  # of what the folder holds, and of nothing else
            return []
        raise InputError(
            "command line: --config FILE[:VARIANT] is needed, for example --config experiments/gpt2_mst.py; of a run that is "
            "there, its --workdir will do"
        )
    for name in config_flags.get_override_values(flags.FLAGS["config"]):
        if name.rpartition(".")[2] in ("experiment", "variant", "variants"):
            raise InputError(
                f"--config.{name}: says what the settings are, and sets none of them; a variant is chosen as "
                f"--config {_config_file()}:VARIANT"
            )
    if not isinstance(_CONFIG.value, ConfigDict):  # ml_collections' stand-in for a file that it could not read
        file = Path(_config_file())
        there = [path for folder in (file.parent, Path("experiments")) for path in folder.glob("*.py")]
        other = closest(file.stem, (path.stem for path in there))
        meant = next((f"; did you mean {path}?" for path in there if path.stem == other), "")
        raise InputError(f"--config: {file} is not there{meant}")
    return []


def _of_its_run(argv: Sequence[str]) -> list[str]:
    """The arguments, and `spdf_jax.config.saved` as ``--config`` where the workdir of a run says it all."""
    given = flags.FlagValues()
    for name in ("workdir", "job"):
        given[name] = flags.FLAGS[name]
    given(list(argv), known_only=True)
    workdir, job = given["workdir"].value, given["job"].value
    if not workdir or job == "compare" or any(re.match("--?config(=|$)", text) for text in argv):
        return list(argv)
    # What a page is of may have no config that could be read: a sweep, a run of `spdf_jax.fit` or by a rule of one's own.
    if job == "report" and not any(re.match(r"--?(no)?config\.", text) for text in argv):
        return list(argv)
    return [*argv[:1], f"--config={saved.__file__}:{workdir}", *argv[1:]]


def _without_overrides(argv: Sequence[str]) -> dict[str, Any]:
    """The config as its file has it; empty where none is given, or could be read."""
    alone = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, flag_values=alone, sys_argv=argv[:1])
    alone(list(argv), known_only=True)
    return config.value.to_dict() if isinstance(config.value, ConfigDict) else {}


def _unknown_key(argv: Sequence[str]) -> InputError | None:
    """The first override of a key that is not there, in the words of `spdf_jax.config.read`."""
    config = _without_overrides(argv)
    for argument in argv[1:]:
        section, where = config, "config"
        override = re.match(r"--?(?:no)?config\.([\w.]+)", argument)
        for key in override[1].split(".") if override else ():
            if not isinstance(section, dict):
                return InputError(f"{where}: is a value, and has no {key!r}")
            if key not in section:
                other = "" if closest(key, section) else place_of(key, config, within=where)
                return InputError(f"{where}: unknown key {key!r}{other or nearest(key, list(section))}")
            section, where = section[key], f"{where}.{key}"
    return None


def _misspelt(error: Exception, argv: Sequence[str]) -> InputError | None:
    """Of a flag that is not there, a job that is none, an answer that is neither yes nor no."""
    if found := re.fullmatch("flag --job=(.*): value should be one of .*", str(error), re.DOTALL):
        return InputError(f"--job: {found[1]!r} is no job{nearest(found[1], list(JOBS))}")
    if found := re.match("flag --(.+?)=(.*): .*[Nn]on-boolean argument", str(error), re.DOTALL):
        return InputError(f"--{found[1]}: {found[2]!r} is neither true nor false")
    if not isinstance(error, flags.UnrecognizedFlagError):
        return None
    names = [flag.name for flag in (*_TO_DO, _HELP, _HELP_CONFIG, _VERSION)]
    names += [f"no{flag.name}" for flag in _TO_DO if flags.FLAGS[flag.name].boolean]
    head, dot, key = error.flagname.partition(".")
    close = closest(head, ["config"] if dot else names)
    way_out = f"; did you mean --{close}{dot}{key}?" if close else ""
    way_out = way_out or place_of(error.flagname, _without_overrides(argv), head="--config")
    way_out = way_out or "; a setting is --config.section.key=value, and --help has all flags"
    return InputError(f"command line: unknown flag --{error.flagname}{way_out}")


def _said_by_the_file(error: BaseException | None) -> InputError | None:
    """The innermost InputError, which an experiment file raised; ml_collections and absl wrap it with a traceback."""
    said = [cause for cause in causes(error) if isinstance(cause, InputError)]
    return said[-1] if said else None


def _in_the_file(error: BaseException, argv: Sequence[str]) -> InputError | None:
    """An error of the experiment file's own code; a value of a wrong type in the words of `spdf_jax.config.read`."""
    said = line_of(error, (word.removeprefix("--config=").split(":")[0] for word in argv[1:]))
    return InputError(in_our_words(said)) if said else None


def _one_line(error: BaseException) -> str:
    said = error.args[0] if error.args else error
    if isinstance(said, Exception):  # ml_collections wraps a KeyError in another, whose own text is quoted and escaped
        return _one_line(said)
    return "; ".join(str(said).split("\n")).rstrip(".; ")


def _config_file() -> str:
    flag: Any = flags.FLAGS["config"]
    return flag.config_filename.split(":")[0]  # without the variant


def _run(argv: Sequence[str], runs: Sequence[str]) -> int:
    logging.set_verbosity(logging.FATAL)  # orbax and grain narrate; what matters they raise
    if _DISTRIBUTED.value:
        if _JOB.value not in ("train", "evaluate"):
            raise InputError(f"--distributed: --job {_JOB.value} is the work of one process; leave --distributed out")
        processes.initialise()
    if _OUTPUT.value and _JOB.value not in ("evaluate", "export", "prune", "circuit", "report", "compare"):
        raise InputError(f"--output: --job {_JOB.value} writes into the --workdir; leave --output out")
    if _SEARCH.value and not _TOPOLOGY.value:
        raise InputError("--plan_search: searches for a pod; name it by --plan_topology")
    output = spool.located(_OUTPUT.value) if _OUTPUT.value else None
    if _JOB.value == "compare":
        from spdf_jax.jobs import Request, compare

        compare.run(Request(Path(), output=output, runs=tuple(map(spool.located, runs))))
        return 0
    if _CONFIG.value is None:  # `_parse` has seen to the workdir
        from spdf_jax.jobs import Request, report

        report.run_recorded(Request(spool.located(_WORKDIR.value or ""), output=output))
        return 0
    sweep = "cells" in _CONFIG.value
    if sweep and _JOB.value not in SWEEP_JOBS:
        raise InputError(f"--job {_JOB.value}: a sweep has many runs; its jobs are {', '.join(SWEEP_JOBS)}")
    if sweep and _PROFILE_STEPS.value:
        raise InputError("--profile_steps: a sweep has many runs; set --config.cells.NAME.loop.profile_steps")
    if _PROFILE_STEPS.value:
        _CONFIG.value.loop.profile_steps = _PROFILE_STEPS.value
    # Imported here so that a mistyped command answers at once.
    from spdf_jax.config.read import resolve
    from spdf_jax.config.sweep import resolve_sweep
    from spdf_jax.jobs import Request

    request = Request(
        workdir=spool.located(_WORKDIR.value or f"runs/{_CONFIG.value.experiment}-{_CONFIG.value.variant}"),
        file=_config_file(),
        command=shlex.join(["python", "-m", "spdf_jax.main", *argv[1:]]),
        quiet=_QUIET.value,
        prompt=_PROMPT.value,
        output=output,
        plan_topology=_TOPOLOGY.value,
        plan_search=_SEARCH.value,
    )
    if sweep:
        job = importlib.import_module(f"spdf_jax.jobs.{SWEEP_JOBS[_JOB.value]}")
        job.run_sweep(resolve_sweep(_CONFIG.value), request)
    else:
        job = importlib.import_module(f"spdf_jax.jobs.{_JOB.value}")
        job.run(resolve(_CONFIG.value), request)
    return 0


class _MayClose(io.FileIO):
    """Standard output whose reader may leave, as ``| head -1`` does: the run goes on unheard."""

    def write(self, content: Any) -> Any:
        try:
            return super().write(content)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(content)


def keep_standard_streams() -> None:
    """Neither a standard stream that is closed nor one whose reader leaves ends a run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        else:
            raw = io.BufferedWriter(_MayClose(stream.fileno(), "w", closefd=False))
            how: dict[str, Any] = {"encoding": stream.encoding, "errors": stream.errors}
            setattr(sys, name, io.TextIOWrapper(raw, **how, line_buffering=stream.line_buffering))


if __name__ == "__main__":
    keep_standard_streams()
    processes.keep_memory()
    processes.end(main(sys.argv))
