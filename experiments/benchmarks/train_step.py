"""Claim: our dense training step makes at least as many tokens a second as nanoGPT's, eager or compiled.

Times one whole training step (forward, backward, clip to norm 1, AdamW with decay on matrices alone) of the same GPT-2, batch,
context and precision: `spdf_jax`'s compiled step, its masks 0-d, and nanoGPT under PyTorch, eager and with ``torch.compile``,
each on its own copy of the same weights, in turn and with the order swapped in every repeat. Every step takes the weights of
the one before, as in training. nanoGPT's step is that of its ``train.py``, in bfloat16 under ``torch.autocast``; its GELU is
the exact one, ours the tanh approximation, as in GPT-2. Both use as many threads as there are cores, and keep what memory they
free (`spdf_jax.processes.keep_memory`).

Before the table, a line a shape says that both have as many parameters, and the losses of the first two steps, which agree to
1e-4 (bfloat16: 2e-3) where the weights are the same, and after one update to what the precision leaves of it. "Products alone"
is one large product of the same precision, timed in the same run: what a step would take that did its FLOPs at that speed and
nothing else. FLOPs are 6 a weight of linear layers and head and a token, and attention's causal half.

Shapes: ``4x256`` (4 layers x 256, 4 heads, context 256, batch 16, vocabulary 4096); ``124m`` (12 x 768, 12 heads, context 1024,
batch 1, vocabulary 50304).

Command: ``python experiments/benchmarks/train_step.py --nanogpt DIRECTORY --json train_step.json``
Other precision: ``--dtype bfloat16``.
Needs: a checkout of https://github.com/karpathy/nanoGPT (MIT), PyTorch (``pip install -e '.[reference]'``) and a C++ compiler;
without ``--nanogpt`` ours alone is timed. Hardware: any; 12 GB of memory. Time: 6 minutes on 2 CPU cores.
Expected there: >= 1.0 times nanoGPT's tokens a second, whichever of its two is faster.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from runner import Timing, announce, arguments, print_head, print_row, time_in_turn, times_faster, write_json
from safetensors.numpy import load_file

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.huggingface import save_model
from spdf_jax.model.flops import linear_size
from spdf_jax.optim import OptimizerConfig, make_optimizer
from spdf_jax.training.programs import make_steps

SHAPES = {
    "4x256": (spdf.GPTConfig(n_layer=4, n_head=4, d_model=256, vocab_size=4096, context=256), 16),
    "124m": (spdf.GPTConfig(n_layer=12, n_head=12, d_model=768, vocab_size=50304, context=1024), 1),
}
LEARNING_RATE = 6e-4
#: Environment variables that move the ratios.
TUNABLES = ("GLIBC_TUNABLES", "XLA_FLAGS", "OMP_NUM_THREADS")
RATIOS = {"times_faster": "x {}", "of_pairs": "of pairs", "of_fastest": "of the fastest", "processor": "processor"}
EAGER, COMPILED, PRODUCTS = "nanoGPT, eager", "nanoGPT, compiled", "products alone"
SIDE = 2048  # of the product that is timed alone

#: How far first losses may be apart.
ALLOWED = {"float32": 1e-4, "bfloat16": 2e-3}

Step = Callable[[], float]  # makes one step and returns its loss
#: From a config, parameters and tokens another's step, and how many parameters its model has.
Rival = Callable[[spdf.GPTConfig, Any, np.ndarray], tuple[Step, int]]


def ours(config: spdf.GPTConfig, params: Any, tokens: np.ndarray) -> Step:
    """Our compiled step."""
    tx = make_optimizer(OptimizerConfig())
    tokens_ABT = jnp.asarray(tokens, jnp.int32)[None]
    batch = Batch(tokens_ABT[..., :-1], tokens_ABT[..., 1:], jnp.ones(tokens_ABT[..., 1:].shape))
    step = make_steps(spdf.GPT(config), tx, optax.constant_schedule(LEARNING_RATE), spdf.RULES["static"]).train
    state = spdf.TrainState(jnp.zeros((), int), params, spdf.dense_masks(params), tx.init(params), jax.random.key(2))

    def run() -> float:
        nonlocal state
        state, metrics = jax.block_until_ready(step(state, batch, pattern="causal", width=128))
        return float(metrics["loss"])

    return run


def nanogpt(path: str, compiled: bool, config: spdf.GPTConfig, params: Any, tokens: np.ndarray) -> tuple[Step, int]:
    """nanoGPT's step, and how many parameters its model has."""
    import torch

    spec = importlib.util.spec_from_file_location("nanogpt_model", pathlib.Path(path) / "model.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    model = module.GPT(
        module.GPTConfig(
            block_size=config.context,
            vocab_size=config.vocab_size,
            n_layer=config.n_layer,
            n_head=config.n_head,
            n_embd=config.d_model,
            dropout=0.0,
            bias=True,
        )
    ).to(device)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder, config, params)
        tensors = load_file(pathlib.Path(folder) / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":  # is the embedding
            linear = ".attn.c_" in name or ".mlp.c_" in name
            tensor.copy_(torch.from_numpy(tensors[name].T if linear else tensors[name]))
    c = OptimizerConfig()
    optimizer = model.configure_optimizers(c.weight_decay, LEARNING_RATE, (c.beta1, c.beta2), device)
    forward = torch.compile(model) if compiled else model
    x_BT, y_BT = (torch.from_numpy(part.copy()).to(device) for part in (tokens[:, :-1], tokens[:, 1:]))
    half = config.dtype == "bfloat16"

    def run() -> float:
        with torch.autocast(device, torch.bfloat16) if half else contextlib.nullcontext():
            _, loss = forward(x_BT, y_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run, sum(p.numel() for p in model.parameters())


def step_flops(config: spdf.GPTConfig, batch_size: int) -> float:
    """Of the products of one training step."""
    linear = linear_size(config) + config.vocab_size * config.d_model
    attention = config.n_layer * config.attention_width * config.context  # scores and values, half of them
    return 6.0 * (linear + attention) * batch_size * config.context


def measure(
    name: str, config: spdf.GPTConfig, batch_size: int, args: argparse.Namespace, others: str, rivals: dict[str, Rival]
) -> dict[str, Any]:
    """Checks and times one shape beside others' steps of it, and prints its rows."""
    config = dataclasses.replace(config, dtype=args.dtype)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch_size, config.context + 1), np.int64)
    params = jax.jit(spdf.GPT(config).init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    sizes = {"ours": sum(p.size for p in jax.tree.leaves(params))}
    steps: dict[str, Step] = {}
    for side, build in rivals.items():
        steps[side], sizes[side] = build(config, params, tokens)
    steps["ours"] = ours(config, params, tokens)
    losses = {side: [step(), step()] for side, step in steps.items()}
    for side, (first, second) in losses.items():
        print(f"{name}, {side}: {sizes[side]:,} parameters, losses {first:.5f}, {second:.5f}", flush=True)
        if sizes[side] != sizes["ours"] or abs(first - losses["ours"][0]) > ALLOWED[args.dtype]:
            raise SystemExit(f"{name}: {side} and ours are not the same model")
    print()

    factor = jax.random.normal(jax.random.key(3), (SIDE, SIDE)).astype(config.dtype)
    product = jax.jit(lambda a, b: a @ b)
    timings = time_in_turn(steps | {PRODUCTS: lambda: product(factor, factor)}, args.repeats)
    scale = step_flops(config, batch_size) / (2.0 * SIDE**3)
    timings[PRODUCTS] = Timing(
        *([scale * x for x in times] for times in (timings[PRODUCTS].wall, timings[PRODUCTS].processor))
    )
    fastest = min(steps.keys() - {"ours"} or steps, key=lambda side: statistics.median(timings[side].wall))
    rows = [{"name": side} | times_faster(timings[side], timings[fastest]) for side in timings]
    print_head(
        f"{name}, {batch_size} x {config.context} tokens",
        "ms",
        "tokens / s",
        *(head.format(others) for head in RATIOS.values()),
    )
    for row in rows:
        row["tokens_per_second"] = tokens[:, 1:].size / row["ms"] * 1e3
        ratios = (f"{row[ratio]:.2f}" for ratio in RATIOS)
        print_row(row["name"], f"{row['ms']:.1f}", f"{row['tokens_per_second']:.0f}", *ratios)
    print(flush=True)
    return {"shape": name, "parameters": sizes, "losses": losses, "fastest": fastest, "rows": rows}


def main() -> None:
    """Prints the tables and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--nanogpt", default="", help="directory of a checkout; none: ours alone")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--dtype", default="float32", choices=list(ALLOWED))
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    versions = {"torch": importlib.metadata.version("torch")} if args.nanogpt else {}
    tunables = {name: os.environ[name] for name in TUNABLES if name in os.environ}
    text = "; ".join(f"{name} {value}" for name, value in (versions | tunables).items())
    announce(f"{text or 'ours alone'}; {args.dtype}; medians of {args.repeats} interleaved training steps")
    sides = {EAGER: False, COMPILED: True} if args.nanogpt else {}
    rivals: dict[str, Rival] = {side: functools.partial(nanogpt, args.nanogpt, how) for side, how in sides.items()}
    shapes = [measure(name, *SHAPES[name], args, "nanoGPT", rivals) for name in args.shapes]
    write_json(args, shapes=shapes, environment=versions | tunables)


if __name__ == "__main__":
    main()
