"""Claim: text is encoded in memory that does not grow with it: 10 GB take as much as 200 MB.

Writes synthetic text of each size (documents of about 2 KB, of words as frequent as in language), as JSON lines or Parquet, and
encodes it by `spdf_jax.data.prepare` in a process of its own, from an empty cache. Twenty times a second the memory of that
process and of those that it starts is summed (what is theirs alone: pages of files, which the system takes back, left out).
Seconds are of the whole: hashing the text, encoding it, checking what was written.

Command: ``python experiments/benchmarks/encode_text.py --megabytes 50 200 800 --json encode_text.json``.
Hardware: Linux, any. Time: 5 minutes on 2 CPU cores; disk: 1.7 times the largest size.
Expected there: the peaks of all sizes within 10 % of each other.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import pyarrow
from pyarrow import parquet
from runner import announce, arguments, print_head, print_row, write_json

from spdf_jax.data.encoding import processes_for
from spdf_jax.data.tokenizer import train_tokenizer

_ENCODE = """
import sys
from spdf_jax.data import DataConfig, prepare
path, tokenizer, cache, processes = sys.argv[1:]
data = prepare(DataConfig(source="text", path=path, tokenizer=tokenizer, cache_dir=cache, processes=int(processes)))
print(len(data.train) + len(data.validation))
"""


def documents(n_bytes: int) -> Iterator[str]:
    """Documents of so many bytes together."""
    rng = np.random.default_rng(0)
    letters = np.array([*"etaoinshrdlucmfwypvbgk"])
    words = ["".join(rng.choice(letters, size)) for size in rng.integers(2, 11, 50_000)]
    ranks = np.minimum(rng.zipf(1.2, 8192 * 20), len(words)) - 1
    sentences = [" ".join(words[i] for i in row).capitalize() + ".\n" for row in ranks.reshape(-1, 20)]
    while n_bytes > 0:
        text = "".join(sentences[i] for i in rng.integers(len(sentences), size=rng.integers(5, 30)))
        n_bytes -= len(text)
        yield text


def write_text(folder: pathlib.Path, megabytes: int, kind: str) -> None:
    """A folder of one file."""
    folder.mkdir()
    if kind == "jsonl":
        with (folder / "all.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in documents(megabytes * 10**6))
        return
    rows: list[str] = []
    with parquet.ParquetWriter(folder / "all.parquet", pyarrow.schema({"text": pyarrow.string()})) as file:
        for text in documents(megabytes * 10**6):
            rows.append(text)
            if len(rows) == 20_000:
                file.write_table(pyarrow.table({"text": rows}))
                rows.clear()
        file.write_table(pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())}))


def memory_of(process: int) -> int:
    """Bytes of a process and all that it started, pages of files left out."""
    total, left = 0, [process]
    while left:
        place = pathlib.Path("/proc", str(left.pop()))
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = place.joinpath("status").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
            for task in place.joinpath("task").iterdir():
                left += map(int, task.joinpath("children").read_text().split())
    return total


def encode(text: pathlib.Path, tokenizer: pathlib.Path, cache: pathlib.Path, processes: int) -> tuple[int, float, int]:
    """Tokens, seconds and the peak of memory."""
    start, peak = time.perf_counter(), 0
    command = [sys.executable, "-c", _ENCODE, str(text), str(tokenizer), str(cache), str(processes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            peak = max(peak, memory_of(process.pid))
            time.sleep(0.05)
        assert process.stdout
        tokens = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return int(tokens), time.perf_counter() - start, peak


def options() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 200, 800], help="sizes of text")
    parser.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--processes", type=int, nargs="+", default=[0], help="that encode at once; 0 is one a core")
    parser.add_argument("--folder", default=None, help="where to write; by default among temporary files")
    return parser.parse_args()


def main() -> None:
    """Prints the table and writes the JSON."""
    args = options()
    announce(f"{args.format}, a byte-level BPE of 32,768 ids")
    print_head("MB of text", "processes", "MB/s", "M tokens", "peak MiB", left=0)
    results = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        root = pathlib.Path(folder)
        tokenizer = root / "tokenizer.json"
        train_tokenizer(documents(5 * 10**6), vocab_size=32_768, progress=False).save(str(tokenizer))
        for megabytes in args.megabytes:
            write_text(root / "text", megabytes, args.format)
            for wanted in args.processes:
                tokens, seconds, peak = encode(root / "text", tokenizer, root / "cache", wanted)
                processes = processes_for(wanted, megabytes * 10**6)
                results.append(
                    {"mb": megabytes, "processes": processes, "tokens": tokens, "seconds": seconds, "peak": peak}
                )
                rate, peak_mib = megabytes / seconds, peak / 2**20
                print_row(f"{megabytes:,}", f"{processes}", f"{rate:.1f}", f"{tokens / 1e6:.1f}", f"{peak_mib:.0f}")
                for place in (root / "cache").iterdir():
                    subprocess.run(["rm", "-r", str(place)], check=True)
            for file in (root / "text").iterdir():
                os.unlink(file)
            (root / "text").rmdir()
    write_json(args, results=results)


if __name__ == "__main__":
    main()
