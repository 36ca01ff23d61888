"""Claim: on a GPU, zero blocks skipped are seconds saved, and the dense step is as fast as nanoGPT's.

In one run, in bfloat16, on one GPU: the dense step of GPT-2 small beside nanoGPT's (``train_step.py``); a linear layer of 2048
inputs, dense and in blocks; and whole training steps of a 350M model, dense and in blocks (``block_sparse.py``: the kernels for
Hopper where they fit, one batched product elsewhere). After each, the share of the GPU's peak that it reached.

Command: ``python experiments/benchmarks/gpu.py --nanogpt DIRECTORY --json gpu.json``
Needs: an NVIDIA GPU of 40 GB, ``pip install -e '.[cuda]'``; for ``--nanogpt`` a checkout of https://github.com/karpathy/nanoGPT
and PyTorch for CUDA. Time: 8 minutes at most. Not measured yet: no such machine was at hand.
``--dry_run`` goes through all of it in small on whatever is there, in 1 minute on a CPU; its figures say nothing.
"""

import argparse
import dataclasses
from typing import Any

import block_sparse
import jax
import train_step
from runner import announce, arguments, write_json

import spdf_jax as spdf
from spdf_jax.planning.gpu import KINDS

SMALL, SMALL_BATCH = dataclasses.replace(spdf.GPT_SIZES["124m"], vocab_size=50304, remat="none"), 16
LAYERS: list[block_sparse.Layer] = [
    (8192, 2048, 2048, [(128, 4), (128, 2), (64, 8)]),
    (8192, 2048, 8192, [(128, 4), (128, 2), (64, 8)]),
]
MEDIUM: block_sparse.Shape = (
    spdf.GPTConfig(n_layer=24, n_head=16, d_model=1024, vocab_size=50304, context=1024),
    8,
    {"dense": (0.0, 0), "block128, 2 of 8": (0.75, 128), "block128, 1 of 8": (0.875, 128)},
)


def peak_flops() -> float:
    """Of the GPU, in bfloat16; 0 for what is not in `spdf_jax.planning.gpu.KINDS`."""
    kind = jax.devices()[0].device_kind.lower()
    return next((gpu.peak_flops for name, gpu in KINDS.items() if name in kind), 0.0)


def utilisation(what: str, flops: float, row: dict[str, Any]) -> None:
    """Prints, and adds to the row, which share of the peak it reached."""
    row["utilisation"] = flops / (row["ms"] / 1e3) / peak_flops() if peak_flops() else None
    share = f"{row['utilisation']:.1%} of the peak" if peak_flops() else "no peak known of this device"
    print(f"{what}, {row['name']}: {flops / row['ms'] / 1e9:.3g} TFLOP/s, {share}", flush=True)


def main() -> None:
    """Prints the tables and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--nanogpt", default="", help="directory of a checkout; none: ours alone")
    parser.add_argument("--dry_run", action="store_true", help="all of it in small, on any machine")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    if jax.default_backend() != "gpu" and not args.dry_run:
        raise SystemExit(f"no GPU: JAX found {jax.devices()[0].device_kind}; --dry_run goes through it in small")
    announce(f"bfloat16; medians of {args.repeats} interleaved repeats")
    write_json(args, **tables(args))


def tables(args: argparse.Namespace) -> dict[str, Any]:
    """Prints the three; in small with ``--dry_run``."""
    args.dtype, args.n_layer = "bfloat16", 0
    small, batch_size, layers, (medium, medium_batch, cases) = SMALL, SMALL_BATCH, LAYERS, MEDIUM
    if args.dry_run:
        tiny: Any = {"n_layer": 2, "vocab_size": 512, "context": 128}
        args.repeats, batch_size, medium_batch = 2, 2, 1
        small, medium = dataclasses.replace(small, **tiny), dataclasses.replace(medium, **tiny)
        layers = [(128, *rest) for _, *rest in layers]  # type: ignore[misc]

    dense = train_step.measure("GPT-2 small", small, batch_size, args)
    for row in dense["rows"]:
        utilisation("GPT-2 small", train_step.step_flops(small, batch_size), row)
    print()
    layer_rows = block_sparse.layer_rows(args, layers)
    for row in layer_rows:  # live blocks alone count
        flops = 6.0 * row["tokens"] * row["inputs"] * row["outputs"] / row["ideal"]
        utilisation(f"{row['inputs']} x {row['outputs']}", flops, row)
    print()
    steps = block_sparse.shape_rows("350M", (medium, medium_batch, cases), args)
    for row in steps:
        linear = 12 * medium.n_layer * medium.d_model**2
        zeros = 6.0 * linear * cases[row["name"]][0] * medium_batch * medium.context
        utilisation("350M", train_step.step_flops(medium, medium_batch) - zeros, row)
    return {"dense": dense, "layers": layer_rows, "steps": steps}


if __name__ == "__main__":
    main()
