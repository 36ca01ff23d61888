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
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from runner import announce, arguments, print_head, print_row, time_in_turn, times_faster, write_json

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.optim import OptimizerConfig, make_optimizer
from spdf_jax.training.programs import make_steps

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


def training(compiled: Any, state: Any, batch: Batch) -> Callable[[], Any]:
    """A function that makes one step after the other."""

    def run() -> Any:
        nonlocal state
        state, metrics = compiled(state, batch)
        return state.params, metrics

    return run


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
    seconds = time_in_turn({k: training(*prepared) for k, prepared in ready.items()}, repeats)
    ratios = times_faster(seconds["dense"], seconds["masked"])  # the dense step's: masked / dense
    return {
        "size": f"{name}: {config.n_layer} x {config.d_model}, {batch_size} x {config.context} tokens",
        "dense_ms": ratios["ms"],
        "masked_ms": 1e3 * statistics.median(seconds["masked"].wall),
        "ratio_of_medians": ratios["times_faster"],
        "median_of_ratios": ratios["of_pairs"],
        "quartiles": ratios["quartiles"],
        "ratio_of_fastest": ratios["of_fastest"],
        "processor_ratio": ratios["processor"],
        "bytes_ratio": traffic["masked"] / traffic["dense"],
        "scratch_mib": scratch,
        "repeats": repeats,
    }


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--layers", type=int, default=4, help="of the 124m size")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=15, help="pairs of steps of 124m; four times as many of mini")
    args = parser.parse_args()

    announce(f"sparsity {args.sparsity:g}, {args.dtype}; interleaved pairs of training steps")
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
    print_head("training step", *columns)
    rows = []
    for name in args.sizes:
        rows.append(r := row(name, args))
        low, high = r["quartiles"]
        print_row(
            r["size"],
            f"{r['repeats']}",
            f"{r['dense_ms']:.1f}",
            f"{r['masked_ms']:.1f}",
            f"{r['ratio_of_medians']:.3f}",
            f"{r['median_of_ratios']:.3f} ({low:.3f}, {high:.3f})",
            f"{r['ratio_of_fastest']:.3f}",
            f"{r['processor_ratio']:.3f}",
            f"{r['bytes_ratio']:.3f}",
        )
    write_json(args, rows=rows)


if __name__ == "__main__":
    main()
