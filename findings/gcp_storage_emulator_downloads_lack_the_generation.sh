#!/usr/bin/env bash
# gcp-storage-emulator 2026.7.19: a download does not say its generation, so that TensorStore cannot write by what it has read.
#
# Expected: a download has the header x-goog-generation, as Cloud Storage's have; a client reads a value and writes another in its
# place on condition that it is still of that generation.
# Seen: a write on condition of the generation that an upload was given works; downloads come without the header. tensorstore
# 0.1.86 then takes what it read for generation 0, which it refuses as a condition, so that no value read can be written anew.
#
# Output seen:
#   a write by the generation of the write before: two
#   headers of a download: content-length content-type date server x-goog-hash
#   a write by the generation of a read: ValueError: Malformed StorageGeneration
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gcp-storage-emulator==2026.7.19 tensorstore==0.1.86
PATH=$folder/venv/bin:$PATH "$folder/venv/bin/python" - <<'PYTHON' | tee "$folder/seen"
import os
import socket
import subprocess
import time
import urllib.request

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
url = f"http://127.0.0.1:{port}"
os.environ.update(TENSORSTORE_GCS_HTTP_URL=url, GOOGLE_AUTH_TOKEN_FOR_TESTING="anonymous")
command = ["gcp-storage-emulator", "start", "--host=127.0.0.1", f"--port={port}", "--in-memory", "--default-bucket=bucket"]
emulator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
try:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    import tensorstore

    store = tensorstore.KvStore.open({"driver": "gcs", "bucket": "bucket"}).result()
    written = store.write("name", b"one").result()
    store.write("name", b"two", if_equal=written.generation).result(timeout=60)
    print("a write by the generation of the write before:", store["name"].decode())
    with urllib.request.urlopen(f"{url}/storage/v1/b/bucket/o/name?alt=media") as answer:
        print("headers of a download:", *sorted(name.lower() for name in answer.headers))
    read = store.read("name").result()
    try:
        store.write("name", b"three", if_equal=read.stamp.generation).result(timeout=60)
        print("a write by the generation of a read:", store["name"].decode())
    except ValueError as error:
        print(f"a write by the generation of a read: ValueError: {error}")
finally:
    emulator.kill()
    emulator.wait()
PYTHON
diff "$folder/seen" <(sed -n 's/^#   //p' "$0")
