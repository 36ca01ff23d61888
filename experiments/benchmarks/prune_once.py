"""Claim: SparseGPT prunes a layer of a 1B model on a CPU at least twice as fast as its PyTorch reference.

One linear layer of 2048 inputs and 8192 outputs, 128 calibration sequences of 512 tokens, 50 % of the weights to go: the
Hessian of all sequences, one after the other, and then masks and corrected weights. Beside `spdf_jax.sparsegpt` the same by the
equations, as the authors lay them out (IST-DASLab/sparsegpt): columns in blocks of 128, one column after the other, in PyTorch.
Both get the same arrays, in turn, and all cores. The inputs say something of each other.

Each has a process of its own, so that what that takes at most is its own memory.

Command: ``python experiments/benchmarks/prune_once.py --json prune_once.json``
Needs: PyTorch (``pip install -e '.[reference]'``)
Hardware: CPU. Time: 3 minutes on 2 cores.
Expected there: 2.4 times as fast.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from runner import announce, arguments, print_head, print_row, write_json

import spdf_jax as spdf
from spdf_jax.sparsity.one_shot import DAMPING, gram


def layer(inputs: int, outputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Weights [in, out], and what mixes independent numbers into inputs, in float32."""
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.02, (inputs, outputs)).astype(np.float32)
    return w, rng.normal(0, inputs**-0.5, (inputs, inputs)).astype(np.float32)


def sequences(mix: np.ndarray, count: int, length: int) -> list[np.ndarray]:
    """Calibration inputs, [tokens, in] each; four different ones, to be made at once."""
    rng = np.random.default_rng(1)
    different = [rng.normal(size=(length, len(mix))).astype(np.float32) @ mix for _ in range(4)]
    return [different[i % 4] for i in range(count)]


@functools.partial(jax.jit, donate_argnums=0)
def _add_gram(total: jax.Array, x_NP: jax.Array) -> jax.Array:
    return total + gram(x_NP)


def by_jax(w: np.ndarray, xs: list[np.ndarray], sparsity: float) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The Hessian, and what is made of it."""
    target = w.size - round(sparsity * w.size)
    w_PQ = jnp.asarray(w)

    def hessian() -> jax.Array:
        total = jnp.zeros((len(w), len(w)))
        for x in xs:
            total = _add_gram(total, x)
        return total.block_until_ready()

    return hessian, lambda total: np.asarray(jax.block_until_ready(spdf.sparsegpt(w_PQ, total, target))[0])


def by_torch(w: np.ndarray, xs: list[np.ndarray], sparsity: float) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """The same in PyTorch."""
    import torch

    def hessian() -> Any:
        total = torch.zeros(len(w), len(w))
        for i, x in enumerate(xs):
            total *= i / (i + 1)
            scaled = (2 / (i + 1)) ** 0.5 * torch.from_numpy(x).t()
            total += scaled @ scaled.t()
        return total

    def prune(total: Any) -> np.ndarray:
        w_QP, inputs = torch.from_numpy(w.T.copy()), len(w)
        diagonal = torch.arange(inputs)
        total[diagonal, diagonal] += DAMPING * total.diagonal().mean()
        factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(total)), upper=True)
        for start in range(0, inputs, 128):
            end = min(start + 128, inputs)
            block, inner = w_QP[:, start:end].clone(), factor[start:end, start:end]
            scores = block**2 / inner.diagonal()[None] ** 2
            gone = scores <= scores.flatten().sort()[0][int(scores.numel() * sparsity)]
            kept, errors = torch.zeros_like(block), torch.zeros_like(block)
            for i in range(end - start):
                column = block[:, i]
                kept[:, i] = column.masked_fill(gone[:, i], 0)
                errors[:, i] = (column - kept[:, i]) / inner[i, i]
                block[:, i:] -= errors[:, i : i + 1] @ inner[i : i + 1, i:]
            w_QP[:, start:end] = kept
            w_QP[:, end:] -= errors @ factor[start:end, end:]
        return w_QP.T.numpy()

    return hessian, prune


METHODS = {"spdf_jax": by_jax, "PyTorch": by_torch}


def prepare(name: str, args: argparse.Namespace) -> None:
    """In a process of its own: compiles, and keeps what `measure` runs."""
    w, mix = layer(args.inputs, args.outputs)
    xs = sequences(mix, args.sequences, args.length)
    ready.extend(METHODS[name](w, xs, args.sparsity))
    ready.append(xs)
    small = METHODS[name](w, xs[:1], args.sparsity)
    small[1](small[0]())


ready: list[Any] = []


def measure() -> tuple[float, float, float, np.ndarray]:
    """Seconds for the Hessian and for the rest, MiB of this process at most, and the weights."""
    hessian, prune, _ = ready
    start = time.perf_counter()
    total = hessian()
    between = time.perf_counter()
    weights = prune(total)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return between - start, time.perf_counter() - between, most, weights


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--inputs", type=int, default=2048)
    parser.add_argument("--outputs", type=int, default=8192)
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=512, help="tokens a sequence")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    shape = f"{args.inputs} x {args.outputs}, {args.sequences} x {args.length} tokens"
    announce(f"SparseGPT of a layer of {shape}, {args.sparsity:g} of its weights; in turn, {args.repeats} times")
    alone = functools.partial(concurrent.futures.ProcessPoolExecutor, 1, multiprocessing.get_context("spawn"))
    found: dict[str, list[Any]] = {name: [] for name in METHODS}
    with alone() as first, alone() as second:
        processes = dict(zip(METHODS, (first, second), strict=True))
        for name, process in processes.items():
            process.submit(prepare, name, args).result()
        for repeat in range(args.repeats):
            for name in list(METHODS)[:: -1 if repeat % 2 else 1]:
                found[name].append(processes[name].submit(measure).result())
    ours, theirs = (found[name][0][3] for name in METHODS)
    same = np.mean((ours != 0) == (theirs != 0))
    seconds = {name: [a + b for a, b, *_ in runs] for name, runs in found.items()}
    print_head("SparseGPT", "Hessian s", "pruning s", "both s", "most memory, MiB")
    for name, runs in found.items():
        parts = [statistics.median(run[i] for run in runs) for i in (0, 1)]
        print_row(name, *(f"{part:.2f}" for part in (*parts, statistics.median(seconds[name]))), f"{runs[-1][2]:.0f}")
    pairs = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print(f"\n{statistics.median(pairs):.2f} times as fast, of pairs ({min(pairs):.2f} to {max(pairs):.2f});", end=" ")
    print(f"{same:.4%} of the masks are the same (the reference removes one weight more in every 128 columns)")
    memory = {name: runs[-1][2] for name, runs in found.items()}
    write_json(args, seconds=seconds, times_faster=pairs, mib=memory, same_masks=float(same))


if __name__ == "__main__":
    main()
