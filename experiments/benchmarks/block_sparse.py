"""Claim: zero blocks skipped are seconds saved: layers and whole training steps that compute live blocks alone.

``--layer`` times a [P, Q] linear layer forward and backward, dense and in blocks; ``--step`` the compiled training step
(forward, backward, clip, AdamW, metrics), dense and with ``sparse_compute = blocks``, in two shapes: ``124m`` (12 layers x
768, one sequence of 1024 tokens, vocabulary 50304, blocks of 64) and ``8x1024``, where linear layers take most of the step, as
in large models (8 layers x 1024, 8 sequences of 512, vocabulary 4096, blocks of 128). All of a table run in turn in every
repeat, so that a busy machine slows them alike; every step takes the state of the one before, as in training. Beside
wall-clock time the tables give the ratio of processor time, which other work on the machine touches less.

*ideal* is what would come out if live blocks took their share of the time of dense products and nothing else changed: for a
layer 1 / density; for a step, the dense one's processor time less that of the zeros in its linear layers, timed in its turn.

``--tpu v5e:4x4`` compiles the steps of a 12 x 1024 model in blocks of 128 for that TPU topology, without a TPU (``pip install
-e '.[tpu]'``), and prints the estimate of ``spdf_jax.planning.tpu``, in which our kernels, like splash attention, run at half
the peak.

Command: ``python experiments/benchmarks/block_sparse.py --layer --step --json block_sparse.json``
Hardware: any; 8 GB of memory. Time: 5 minutes on 2 CPU cores; ``--tpu`` 5 more.
Expected there: layers of 2048 x 8192 in blocks of 128 >= 1.8 times as fast as dense at 75 %, >= 3 times at 87.5 % (2 of 16
blocks, the nearest to 90 %); steps >= 1.25 times at 75 % and >= 1.5 times at 91.7 % (1 of 12, the nearest to 90 %).
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from runner import announce, arguments, print_head, print_row, time_in_turn, times_faster, write_json

import spdf_jax as spdf
from spdf_jax.config.run import RunConfig
from spdf_jax.data import Batch
from spdf_jax.model.linear import dense_linear
from spdf_jax.ops.block_linear import block_linear, live_inputs
from spdf_jax.planning.hlo import Instruction, executed, matrix_flops, read_program
from spdf_jax.planning.pod import estimate
from spdf_jax.planning.pod_plan import lower_steps, make_pod
from spdf_jax.planning.tpu import SPLASH_SHARE, TpuPod
from spdf_jax.sharding import MeshConfig, make_mesh
from spdf_jax.sparsity.block_topology import BlockGrid, random_topology
from spdf_jax.training.phases import make_plan
from spdf_jax.training.programs import make_steps
from spdf_jax.training.state import abstract_state, init_state
from spdf_jax.tree import named_leaves

Timed = dict[str, Callable[[], Any]]
Shape = tuple[spdf.GPTConfig, int, dict[str, tuple[float, int]]]
#: Of the steps: model, sequences a batch, and sparsity with the side of a block.
STEPS: dict[str, Shape] = {
    "124m": (
        dataclasses.replace(spdf.GPT_SIZES["124m"], vocab_size=50304, remat="none"),
        1,
        {"dense": (0.0, 0), "block64, 3 of 12": (0.75, 64), "block64, 1 of 12": (11 / 12, 64)},
    ),
    "8x1024": (
        spdf.GPTConfig(n_layer=8, n_head=16, d_model=1024, vocab_size=4096, context=512),
        8,
        {"dense": (0.0, 0), "block128, 2 of 8": (0.75, 128), "block128, 1 of 8": (0.875, 128)},
    ),
}
#: Tokens, inputs, outputs, and side and number of live blocks of each case.
Layer = tuple[int, int, int, list[tuple[int, int]]]
LAYERS: list[Layer] = [
    (2048, 2048, 8192, [(128, 4), (128, 2), (64, 8), (64, 3)]),
    (1024, 768, 3072, [(64, 3), (64, 1), (32, 6)]),
    (1024, 3072, 768, [(64, 12), (64, 4), (32, 24)]),
]
TPU_STEPS = {"dense": (0.0, 0), "block128, 2 of 8": (0.75, 128), "block128, 1 of 8": (0.875, 128)}


def normal(seed: int, *shape: int) -> jax.Array:
    """Random floats."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def forward_and_backward(layer: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Function of (x_BTP, dy_BTQ, weights, *rest) that returns (y_BTQ, dx_BTP, dweights)."""

    def step(x_BTP: jax.Array, dy_BTQ: jax.Array, weights: jax.Array, *rest: jax.Array) -> tuple[jax.Array, ...]:
        y_BTQ, pullback = jax.vjp(lambda x, w: layer(x, w, *rest), x_BTP, weights)
        return y_BTQ, *pullback(dy_BTQ)

    return jax.jit(step)


def layers(tokens: int, inputs: int, outputs: int, cases: list[tuple[int, int]], dtype: str) -> Timed:
    """The dense layer, and one in blocks for every (side, live blocks a column)."""
    x_BTP, dy_BTQ = normal(0, 1, tokens, inputs).astype(dtype), normal(1, 1, tokens, outputs).astype(dtype)
    dense = forward_and_backward(dense_linear)
    ready: Timed = {"dense": partial(dense, x_BTP, dy_BTQ, normal(2, inputs, outputs).astype(dtype))}
    for side, live in cases:
        grid = BlockGrid(side, inputs // side, outputs // side, live)
        idx_JK = live_inputs(random_topology(jax.random.key(3), grid), live)
        data_JKbb = normal(4, grid.outputs, live, side, side).astype(dtype)
        blocks = forward_and_backward(block_linear)
        ready[f"block{side}, {live} of {grid.inputs}"] = partial(blocks, x_BTP, dy_BTQ, data_JKbb, idx_JK)
    return ready


def print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    """One Markdown table."""
    print_head(title, "ms", "times faster", "of pairs", "of the fastest", "processor time", "ideal")
    for row in rows:
        figures = (row[name] for name in ("times_faster", "of_pairs", "of_fastest", "processor", "ideal"))
        print_row(row["name"], f"{row['ms']:.1f}", *(f"{figure:.2f}" for figure in figures))
    print(flush=True)


def layer_rows(args: argparse.Namespace, shapes: Sequence[Layer] = LAYERS) -> list[dict[str, Any]]:
    """Prints a table for every shape."""
    rows = []
    for tokens, inputs, outputs, cases in shapes:
        seconds = time_in_turn(layers(tokens, inputs, outputs, cases, args.dtype), args.repeats)
        ideals = [1.0, *(inputs / side / live for side, live in cases)]
        shape = {"tokens": tokens, "inputs": inputs, "outputs": outputs}
        table = [
            {"name": n, "ideal": i} | shape | times_faster(seconds[n], seconds["dense"])
            for n, i in zip(seconds, ideals, strict=True)
        ]
        print_rows(f"{inputs} x {outputs}, {tokens} tokens, forward + backward", table)
        rows += table
    return rows


def step_config(model: spdf.GPTConfig, batch_size: int, sparsity: float, side: int) -> RunConfig:
    """A run of one phase: dense, or in blocks of `side`."""
    c = spdf.default_config("block_sparse", "step", variants=("step",))
    c.model, c.pretrain.batch_size = spdf.model_section(model), batch_size
    if side:
        s = c.pretrain.sparsity
        s.rule, s.sparsity, s.pattern, s.sparse_compute = "static", sparsity, f"block{side}", "blocks"
    return spdf.resolve(c)


def training(config: RunConfig) -> Callable[[], Any]:
    """A function that makes one optimiser step after the other."""
    (plan,), model, mesh = make_plan(config), spdf.GPT(config.model), make_mesh(MeshConfig(data=1))
    state = init_state(model, plan.tx, plan.config.sparsity, plan.filter, 0, mesh)
    shape_ABT = (1, plan.config.batch_size, config.model.context + 1)
    tokens_ABT = np.random.default_rng(0).integers(0, config.model.vocab_size, shape_ABT, np.int32)
    batch = Batch(tokens_ABT[..., :-1], tokens_ABT[..., 1:], np.ones(tokens_ABT[..., 1:].shape, np.float32))
    step = make_steps(model, plan.tx, plan.learning_rate, plan.programme.config.topology_rule).train

    def run() -> Any:
        nonlocal state
        state, metrics = step(state, batch, pattern="causal", width=128)
        return metrics["loss"]

    return run


def linear_layers(config: spdf.GPTConfig, batch_size: int) -> Callable[[], Any]:
    """The linear layers of one block, dense, forward and backward, as the step computes them."""
    d, f = config.d_model, config.mlp_width
    shapes = [(d, d)] * 4 + [(d, f), (f, d)]
    layer, rows = forward_and_backward(dense_linear), (batch_size, config.context)
    arrays = [(normal(0, *rows, p), normal(1, *rows, q), normal(2, p, q)) for p, q in shapes]
    arrays = [(x.astype(config.dtype), dy.astype(config.dtype), w) for x, dy, w in arrays]
    return lambda: [layer(*a) for a in arrays]


def kernel_state_bytes(config: RunConfig) -> int:
    """Bytes of the sparse leaves: parameters, masks, optimiser state, topology."""
    (plan,) = make_plan(config)
    state = abstract_state(spdf.GPT(config.model), plan.tx, plan.config.sparsity, plan.filter).replace(key=None)
    kernels = [leaf for name, leaf in named_leaves(state) if name.endswith("kernel")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kernels)


def step_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints a table of whole training steps for every shape."""
    return [row for name in args.shapes for row in shape_rows(name, STEPS[name], args)]


def shape_rows(name: str, shape: Shape, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints the table of one."""
    model, batch_size, cases = shape
    model = dataclasses.replace(model, n_layer=args.n_layer or model.n_layer, dtype=args.dtype)
    configs = {name: step_config(model, batch_size, sparsity, side) for name, (sparsity, side) in cases.items()}
    ready: Timed = {name: training(config) for name, config in configs.items()}
    seconds = time_in_turn(ready | {"linear": linear_layers(model, batch_size)}, args.repeats)
    # Shares of processor time: they hold on a busy machine too.
    dense, linear = (statistics.median(seconds[name].processor) for name in ("dense", "linear"))
    rows, title = [], name
    for name, config in configs.items():
        zeros = model.n_layer * linear * cases[name][0]
        share = kernel_state_bytes(config) / kernel_state_bytes(configs["dense"])
        rows.append(
            {"shape": title, "name": name, "ideal": dense / (dense - zeros), "state": share}
            | times_faster(seconds[name], seconds["dense"])
        )
    print_rows(f"training step, {model.n_layer} x {model.d_model}, {batch_size} x {model.context} tokens", rows)
    for row in rows[1:]:
        print(f"{row['name']}: {row['state']:.3f} of the dense state's bytes (sparse leaves)")
    print(f"linear layers take {model.n_layer * linear / dense:.0%} of the dense step\n", flush=True)
    return rows


def kernel_flops(kernel: Instruction, side: int) -> int:
    """Of one of our kernels, 0 of another: every live block meets every token once."""
    if not kernel.kernel.startswith("block_"):
        return 0
    blocks, tokens = (next(shape[0] for shape in kernel.operands if len(shape) == rank) for rank in (1, 2))
    return 2 * tokens * blocks * side**2


def kernel_seconds(kernel: Instruction, side: int, pod: TpuPod) -> float:
    """Of our kernels and of splash attention's, at the same share of the peak."""
    splash = pod.attention_seconds(kernel, "causal", 128)
    return splash + kernel_flops(kernel, side) / (SPLASH_SHARE * pod.kind.peak_flops)


def tpu_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints what the compiler and `spdf_jax.planning.tpu` say of the steps on a TPU topology."""
    model = spdf.GPTConfig(n_layer=12, n_head=16, d_model=1024, vocab_size=50304, context=1024, dtype="bfloat16")
    rows: list[dict[str, Any]] = []
    columns = ["ms, estimated", "of it our kernels", "times faster", "matrix FLOPs", "MB of state"]
    print_head(f"training step on {args.tpu}", *columns)
    for name, (sparsity, side) in TPU_STEPS.items():
        config = step_config(model, 64, sparsity, side)
        (plan,), (pod, mesh) = make_plan(config), make_pod(config.mesh, args.tpu)
        if not isinstance(pod, TpuPod):
            raise spdf.InputError(f"--tpu {args.tpu} is no TPU topology; for example v5e:4x4")
        (_, lowered), *_ = lower_steps(config, plan, mesh)
        items = read_program(lowered.compile().as_text())

        peak = SPLASH_SHARE * pod.kind.peak_flops
        flops = sum(times * kernel_flops(kernel, side) for times, kernel in executed(items))
        total = estimate(items, pod, partial(kernel_seconds, side=side, pod=pod)).total
        row = {
            "name": name,
            "ms": 1e3 * total,
            "kernels_ms": 1e3 * flops / peak,
            "times_faster": (rows[0]["ms"] / 1e3 if rows else total) / total,
            "matrix_flops": flops + matrix_flops(items),
            "state_bytes": kernel_state_bytes(config),
        }
        rows.append(row)
        print_row(
            name,
            f"{row['ms']:.2f}",
            f"{row['kernels_ms']:.2f}",
            f"{row['times_faster']:.2f}",
            f"{row['matrix_flops']:.3g}",
            f"{row['state_bytes'] / 1e6:.0f}",
        )
    return rows


def main() -> None:
    """Prints the tables and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--layer", action="store_true", help="time layers")
    parser.add_argument("--step", action="store_true", help="time whole training steps")
    parser.add_argument("--tpu", default="", help="topology to compile the steps for, such as v5e:4x4")
    parser.add_argument("--shapes", nargs="+", default=list(STEPS), choices=list(STEPS), help="of the steps")
    parser.add_argument("--n-layer", type=int, default=0, help="of the steps; 0: as their shape has")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()

    announce(f"{args.dtype}; medians of {args.repeats} interleaved repeats")
    parts = {"layer": layer_rows, "step": step_rows, "tpu": tpu_rows}
    write_json(args, **{part: rows(args) for part, rows in parts.items() if getattr(args, part)})


if __name__ == "__main__":
    main()
