"""Claim: to choose the largest weights anew after every step costs <= 10 % of it, and is >= 10 times faster than sorting.

Times a training step of rule ``topk`` in float32 (forward, backward, clip, AdamW, choosing, masks applied), the choosing alone,
and with ``--torch`` that by ``torch.topk`` and a scatter of ones over the same tensors, all in turn with the order swapped in
every repeat. The share is of a step without the choosing: what the whole takes, less what the choosing alone takes.

Shapes: ``8x512`` (8 layers x 512, context 512, batch 4, vocabulary 4096; embeddings, head and biases sparse too), ``2x64``.

Command: ``python experiments/benchmarks/topk.py --torch --json topk.json``
Hardware: any. Time: 3 minutes on 2 CPU cores.
Expected there: a share <= 0.10 (the goal is 0.05) at a density of 1/100, and >= 10 times ``torch.topk``.
"""

import argparse
import functools
import importlib.metadata
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from runner import announce, arguments, print_head, print_row, time_in_turn, write_json

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.optim import OptimizerConfig, make_optimizer
from spdf_jax.sparsity.distributions import target_counts
from spdf_jax.sparsity.masks import matrix_groups
from spdf_jax.training.programs import make_steps
from spdf_jax.training.state import ALL_WEIGHTS
from spdf_jax.tree import named_leaves

SHAPES = {
    "8x512": (spdf.GPTConfig(n_layer=8, n_head=8, d_model=512, vocab_size=4096, context=512, tied_head=False), 4),
    "2x64": (spdf.GPTConfig(n_layer=2, n_head=4, d_model=64, vocab_size=512, context=64, tied_head=False), 2),
}


def prepare(config: spdf.GPTConfig, batch_size: int, density: float, floor: int) -> tuple[dict[str, Any], Any, Any]:
    """``{name: function}`` of the step and of the choosing alone; the weights that it chooses of, and how many of each."""
    model, rule = spdf.GPT(config), spdf.RULES["topk"]._replace(floor=floor)
    tx = make_optimizer(OptimizerConfig(), wrap=rule.optimizer)
    rng = np.random.default_rng(0)
    tokens_ABT = jnp.asarray(rng.integers(0, config.vocab_size, (1, batch_size, config.context + 1)), jnp.int32)
    batch = Batch(tokens_ABT[..., :-1], tokens_ABT[..., 1:], jnp.ones(tokens_ABT[..., 1:].shape))
    params = jax.jit(model.init)(jax.random.key(0), batch.tokens_BT[0, :1, :1])["params"]
    groups = matrix_groups(params, ALL_WEIGHTS)
    counts = target_counts(groups, 1 - density)
    targets = {name: np.full((group.count,), counts[name], np.int32) for name, group in groups.items()}
    assert rule.choose_each_step is not None, "this rule does"
    choose = jax.jit(functools.partial(rule.choose_each_step, rule=rule))
    masks = spdf.init_masks(jax.random.key(1), params, sparsity=0.0, filter=ALL_WEIGHTS)
    key, zero = jax.random.key(2), jnp.zeros((), jnp.int32)
    sparse, sparse_masks = choose(params, masks, targets)
    state = spdf.TrainState(zero, sparse, sparse_masks, tx.init(params), key)
    steps = make_steps(model, tx, optax.constant_schedule(1e-3), rule)

    def one() -> Any:
        nonlocal state
        state, metrics = steps.train(state, batch, targets, pattern="causal", width=128)
        return state.params, metrics

    # As the optimiser leaves them: most are its small steps away from 0.
    moved = jax.tree.map(lambda w: w + 1e-3 * jax.random.normal(key, w.shape), jax.tree.map(jnp.copy, sparse))
    ready = {"step": one, "choosing": lambda: choose(moved, masks, targets)}
    return ready, {name: leaf for name, leaf in named_leaves(moved) if name in groups}, targets


def by_torch(weights: dict[str, Any], targets: dict[str, Any]) -> Callable[[], Any]:
    """The same masks by ``torch.topk``, and the weights under them."""
    import torch

    tensors = {name: torch.from_numpy(np.array(leaf)) for name, leaf in weights.items()}

    def run() -> list[Any]:
        kept = []
        for name, tensor in tensors.items():
            rows = tensor.reshape(len(targets[name]), -1)
            for row, k in zip(rows, targets[name].tolist(), strict=True):
                mask = torch.zeros_like(row).scatter_(0, torch.topk(row.abs(), k, sorted=False).indices, 1.0)
                kept.append(row * mask)
        return [kept[-1].sum().item()]

    return run


def row(name: str, floor: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measures one shape."""
    ready, weights, targets = prepare(*SHAPES[name], args.density, floor)
    if args.torch:
        ready["torch.topk"] = by_torch(weights, targets)
    timings = {key: timing.wall for key, timing in time_in_turn(ready, args.repeats).items()}
    medians = {key: statistics.median(seconds) for key, seconds in timings.items()}
    found = {"shape": name, "floor": floor, "weights": sum(leaf.size for leaf in weights.values()), "seconds": timings}
    found["share"] = medians["choosing"] / (medians["step"] - medians["choosing"])
    found["times_torch"] = medians["torch.topk"] / medians["choosing"] if args.torch else None
    return found | {"median_seconds": medians}


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--torch", action="store_true", help="time torch.topk too")
    parser.add_argument("--shapes", nargs="+", default=["8x512"], choices=list(SHAPES))
    parser.add_argument("--floors", nargs="+", type=int, default=[0, 4], help="weights that each output keeps at least")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    versions = {"torch": importlib.metadata.version("torch")} if args.torch else {}
    text = f"torch {versions['torch']}" if versions else "ours alone"
    announce(f"{text}; density {args.density:g}, float32; medians of {args.repeats} interleaved repeats")
    print_head("shape", "floor", "weights", "step s", "choosing s", "share of a step", "x torch.topk")
    rows = []
    for name in args.shapes:
        for floor in args.floors:
            found = row(name, floor, args)
            rows.append(found)
            medians, times = found["median_seconds"], found["times_torch"]
            print_row(
                name,
                str(floor),
                f"{found['weights']:,}",
                f"{medians['step']:.3f}",
                f"{medians['choosing']:.4f}",
                f"{found['share']:.3f}",
                f"{times:.1f}" if times else "",
            )
    write_json(args, rows=rows, environment=versions)


if __name__ == "__main__":
    main()
