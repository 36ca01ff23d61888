"""Claim: masks cost nothing worth naming: a masked training step takes <= 1.03 times a dense one.

Times `spdf_jax`'s compiled training step (forward, backward, clip, AdamW, metrics) under element masks at 75 % sparsity and
under 0-d ones, the same code, in turn and with the order swapped in every repeat, so that a busy machine slows both alike.
Every step takes the state of the one before, as in training, with its buffers donated.

Sizes: ``mini`` (4 layers x 256, context 256, batch 16, vocabulary 4096) and ``124m`` (layers of 768, context 1024, batch 1).
The latter runs `--layers` of the 12 layers and a vocabulary of 4096: the same shapes a layer, and less of the unmasked head and
embedding to hide behind.

Besides wall-clock time the table gives the ratio of processor time, which other work on the machine touches less, and that of
the compiler's count of bytes read and written, which nothing touches.

Command: ``python experiments/benchmarks/mask_overhead.py --json mask_overhead.json``
Hardware: any. Time: 4 minutes on 2 CPU cores.
Expected there: both ratios below 1.03; single pairs scatter by more than that, on a machine with other work by 10 % and more.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from topology import machine

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.optim import OptimizerConfig, make_optimizer
from spdf_jax.step import make_steps

SIZES = {"mini": (spdf.GPT_SIZES["mini"], 16), "124m": (spdf.GPT_SIZES["124m"], 1)}


def prepare(config: spdf.GPTConfig, batch_size: int, sparsity: float) -> dict[str, tuple[Any, Any, Any]]:
    """``{"dense" | "masked": (compiled step, state, batch)}``."""
    model, tx = spdf.GPT(config), make_optimizer(OptimizerConfig())
    rng = np.random.default_rng(0)
    tokens_ABT = jnp.asarray(rng.integers(0, config.vocab_size, (1, batch_size, config.context + 1)), jnp.int32)
    batch = Batch(tokens_ABT[..., :-1], tokens_ABT[..., 1:], jnp.ones(tokens_ABT[..., 1:].shape))
    steps = make_steps(model, tx, optax.constant_schedule(1e-4), spdf.RULES["static"])
    ready = {}
    for name in ("dense", "masked"):
        params = jax.jit(model.init)(jax.random.key(0), batch.tokens_BT[0, :1, :1])["params"]
        masks = spdf.dense_masks(params)
        if name == "masked":
            masks = spdf.init_masks(jax.random.key(1), params, sparsity=sparsity)
        params = spdf.apply_masks(params, masks)
        state = spdf.TrainState(jnp.zeros((), jnp.int32), params, masks, tx.init(params), jax.random.key(2))
        compiled = steps.train.lower(state, batch, pattern="causal", width=128).compile()
        ready[name] = (compiled, state, batch)
    return ready


def measure(
    ready: dict[str, tuple[Any, Any, Any]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall-clock and processor seconds of every step, ``{"dense": [...], "masked": [...]}``; the first of each is left out."""
    states = {name: state for name, (_, state, _) in ready.items()}
    wall: dict[str, list[float]] = {name: [] for name in ready}
    processor: dict[str, list[float]] = {name: [] for name in ready}
    for repeat in range(repeats + 1):
        for name in sorted(ready, reverse=repeat % 2 == 1):
            compiled, _, batch = ready[name]
            start = time.perf_counter(), time.process_time()
            states[name], _ = jax.block_until_ready(compiled(states[name], batch))
            if repeat:
                wall[name].append(time.perf_counter() - start[0])
                processor[name].append(time.process_time() - start[1])
    return wall, processor


def row(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one size."""
    config, batch_size = SIZES[name]
    config = dataclasses.replace(config, dtype=args.dtype)
    if name == "124m":
        config = dataclasses.replace(config, n_layer=args.layers, vocab_size=4096)
    ready = prepare(config, batch_size, args.sparsity)
    scratch = {k: compiled.memory_analysis().temp_size_in_bytes / 2**20 for k, (compiled, _, _) in ready.items()}
    traffic = {k: compiled.cost_analysis()["bytes accessed"] for k, (compiled, _, _) in ready.items()}
    repeats = args.repeats * (4 if name == "mini" else 1)  # its steps are short
    seconds, processor = measure(ready, repeats)
    pairs = sorted(m / d for d, m in zip(seconds["dense"], seconds["masked"], strict=True))
    dense, masked = statistics.median(seconds["dense"]), statistics.median(seconds["masked"])
    return {
        "size": f"{name}: {config.n_layer} x {config.d_model}, {batch_size} x {config.context} tokens",
        "dense_ms": 1e3 * dense,
        "masked_ms": 1e3 * masked,
        "ratio_of_medians": masked / dense,
        "median_of_ratios": statistics.median(pairs),
        "quartiles": [pairs[len(pairs) // 4], pairs[(3 * len(pairs)) // 4]],
        "ratio_of_fastest": min(seconds["masked"]) / min(seconds["dense"]),
        "processor_ratio": statistics.median(processor["masked"]) / statistics.median(processor["dense"]),
        "bytes_ratio": traffic["masked"] / traffic["dense"],
        "scratch_mib": scratch,
        "repeats": repeats,
    }


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--layers", type=int, default=4, help="of the 124m size")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15, help="pairs of steps of 124m; four times as many of mini")
    parser.add_argument("--json", default="", help="file to write")
    args = parser.parse_args()

    about = machine()
    print(f"{about['processor']}, {about['cores']} cores, {about['device']};", end=" ")
    print(f"Python {about['python']}, JAX {about['jax']}, NumPy {about['numpy']};", end=" ")
    print(f"sparsity {args.sparsity:g}, {args.dtype}; interleaved pairs of training steps\n", flush=True)
    columns = [
        "pairs",
        "dense ms",
        "masked ms",
        "masked / dense",
        "of pairs (quartiles)",
        "of the fastest",
        "processor time",
        "bytes",
    ]
    print(f"| training step | {' | '.join(columns)} |")
    print("| --- |" + " ---: |" * len(columns))
    rows = []
    for name in args.sizes:
        rows.append(r := row(name, args))
        low, high = r["quartiles"]
        print(
            f"| {r['size']} | {r['repeats']} | {r['dense_ms']:.1f} | {r['masked_ms']:.1f} | {r['ratio_of_medians']:.3f} "
            f"| {r['median_of_ratios']:.3f} ({low:.3f}, {high:.3f}) | {r['ratio_of_fastest']:.3f} "
            f"| {r['processor_ratio']:.3f} | {r['bytes_ratio']:.3f} |",
            flush=True,
        )
    if args.json:
        options = {k: v for k, v in vars(args).items() if k != "json"}
        pathlib.Path(args.json).write_text(
            json.dumps({"machine": about, "options": options, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
