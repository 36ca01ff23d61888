"""Command lines at the price of a fork: each in a process of its own, of one that has imported everything and computed nothing.

As a program it is that one: it reads requests, runs each in a fork of itself, and answers with its exit code.
"""

import atexit
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess:
    """``python -m spdf_jax.main`` with these arguments, in the project's folder."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        request = {"arguments": ["spdf_jax.main", *arguments], "streams": [f"{folder}/stdout", f"{folder}/stderr"]}
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        output, errors = (Path(stream).read_text() for stream in request["streams"])
    return subprocess.CompletedProcess(request["arguments"], code, output, errors)


@cache
def _server() -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=env, text=True, **pipes)
    atexit.register(server.communicate)  # ends its standard input, and so itself
    return server


def _serve() -> None:
    import spdf_jax.config.read
    import spdf_jax.config.sweep
    import spdf_jax.jobs.plan  # noqa: F401  whatever a command imports but `spdf_jax.main` itself

    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if not child:
            _become(**request)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(arguments: list[str], streams: list[str]) -> None:
    """The process of one command; never returns."""
    code = 1
    try:
        for descriptor, stream in enumerate(streams, 1):
            os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
