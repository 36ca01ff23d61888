"""Claim: exact selection by counting makes a topology step cheap: >= 20 times faster than sorting every score.

Times the tree-wide topology update (weights, dense gradients and masks given, new masks out) on the kernels of GPT-2 124M, 12
layers x 768, 85M weights at 80 % sparsity, for the RigL and MST rules; with ``--jaxpruner`` also that of JaxPruner's RigL
(Lee et al. 2023, arXiv 2304.14082) on the same arrays, in turn with ours in every repeat so that a busy machine slows them
alike. Both are compiled, and run once before anything is timed.

JaxPruner ranks a stacked leaf [12, in, out] as one tensor, ours every matrix of it by itself; `--split` gives JaxPruner the
144 tensors of an unstacked model instead, which it sorts a little faster.

Command: ``python experiments/benchmarks/topology.py --jaxpruner DIRECTORY --json topology.json``, DIRECTORY a checkout of
https://github.com/google-research/jaxpruner. Without the flag ours alone is timed.
Hardware: any; 6 GB of memory. Time: 6 minutes on 2 CPU cores with JaxPruner, 1 without.
Expected there: ours >= 20 times faster and <= 2.5 s, with scratch memory <= 2.5 times the largest leaf.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from runner import announce, arguments, print_head, print_row, time_in_turn, write_json

from spdf_jax.sparsity.distributions import target_counts
from spdf_jax.sparsity.masks import init_masks, matrix_groups
from spdf_jax.sparsity.rules import RULES
from spdf_jax.sparsity.topology import prune_and_grow_tree

JAXPRUNER = "JaxPruner RigL"
FILTER = (("kernel$", "stack"),)


def kernels(layers: int, d: int) -> dict[str, Any]:
    """Random arrays in the shapes of the stacked linear kernels of `spdf_jax.GPT`."""
    shapes = {f"attn_{name}": (layers, d, d) for name in "qkvo"}
    shapes |= {"mlp_up": (layers, d, 4 * d), "mlp_down": (layers, 4 * d, d)}
    rng = np.random.default_rng(len(shapes))
    leaves = {name: {"kernel": 0.02 * rng.standard_normal(shape, np.float32)} for name, shape in shapes.items()}
    return jax.tree.map(jnp.asarray, {"blocks": leaves})


def ours(weights: Any, masks: Any, sparsity: float, rule: str) -> Callable[[Any, Any, Any], Any]:
    """Function of (weights, grads, masks) that returns new masks."""
    counts = target_counts(matrix_groups(weights, FILTER), sparsity, "uniform")
    targets = {name: jnp.full((leaf.shape[0],), counts[name]) for name, leaf in named(masks)}
    update = functools.partial(prune_and_grow_tree, drop_fraction=0.3, rule=RULES[rule])
    return lambda w, g, m: update(jax.random.key(7), w, g, m, target_nnz=targets)


def named(tree: Any) -> list[tuple[str, jax.Array]]:
    """Leaves by name."""
    return [(f"blocks/{name}/kernel", layer["kernel"]) for name, layer in tree["blocks"].items()]


def jaxpruner_rigl(path: str) -> Callable[[Any, Any, Any], Any]:
    """The same function, by JaxPruner at `path`: its RigL's mask update alone, without an optimiser's state."""
    jax.tree_map = jax.tree.map  # it was written for an older JAX
    sys.path.insert(0, path)
    import optax
    from jaxpruner.algorithms.sparse_trainers import RigL
    from jaxpruner.base_updater import SparseState

    rigl = RigL(drop_fraction_fn=lambda _: 0.3)

    def update(weights: Any, grads: Any, masks: Any) -> Any:
        state = SparseState(masks=masks, inner_state=optax.EmptyState(), count=jnp.zeros((), jnp.int32))
        return rigl.update_state(state, weights, grads).masks

    return update


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a method: median seconds, scratch memory, compile time, share of the mask that changed."""
    dense = kernels(args.layers, args.width)
    grads = jax.tree.map(lambda w: jnp.flip(w, -1), dense)
    masks = init_masks(jax.random.key(1), dense, sparsity=args.sparsity, filter=FILTER)
    weights = jax.tree.map(lambda w, m: jnp.where(m, w, 0), dense, masks)
    del dense
    largest_bytes = max(leaf.nbytes for leaf in jax.tree.leaves(weights))
    methods = {rule: (ours(weights, masks, args.sparsity, rule), (weights, grads, masks)) for rule in args.rules}
    if args.jaxpruner:
        inputs: Any = (weights, grads, jax.tree.map(lambda m: m.astype(jnp.uint8), masks))
        if args.split:
            inputs = jax.tree.map(lambda leaf: list(leaf), inputs)
        methods[JAXPRUNER] = (jaxpruner_rigl(args.jaxpruner), inputs)

    rows, compiled = {}, {}
    for name, (update, arrays) in methods.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(update).lower(*arrays).compile()
        compile_seconds = time.perf_counter() - start
        new = jax.tree.leaves(compiled[name](*arrays))
        old = jax.tree.leaves(arrays[2])
        active = [int(jnp.sum(m, dtype=jnp.int32)) for m in (*new, *old)]
        exchanged = sum(int(jnp.sum((n != 0) & (o == 0))) for n, o in zip(new, old, strict=True))
        rows[name] = {
            "method": name,
            "active": sum(active[: len(new)]),
            "exchanged": exchanged / sum(active[: len(new)]),
            "scratch_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "compile_seconds": compile_seconds,
        }
        rows[name]["scratch_per_largest_leaf"] = rows[name]["scratch_bytes"] / largest_bytes
    ready = {name: functools.partial(compiled[name], *arrays) for name, (_, arrays) in methods.items()}
    timings = time_in_turn(ready, args.repeats)
    for name, row in rows.items():
        row["seconds"] = statistics.median(timings[name].wall)
        row["all_seconds"] = timings[name].wall
        if args.jaxpruner:
            row["times_faster"] = statistics.median(timings[JAXPRUNER].wall) / row["seconds"]
    return list(rows.values())


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--jaxpruner", default="", help="directory of a checkout; none: ours alone")
    parser.add_argument("--split", action="store_true", help="give JaxPruner one tensor a layer")
    parser.add_argument("--rules", nargs="+", default=["rigl", "mst"], choices=list(RULES))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    size = args.layers * 12 * args.width**2
    announce(
        f"{size:,} weights in {args.layers} layers x {args.width}, sparsity {args.sparsity:g}, float32; "
        f"medians of {args.repeats} interleaved repeats"
    )
    rows = measure(args)
    columns = ["s", "fastest s", f"x faster than {JAXPRUNER}", "scratch / largest leaf", "exchanged", "compile s"]
    print_head("topology update", *columns)
    for row in rows:
        print_row(
            row["method"],
            f"{row['seconds']:.2f}",
            f"{min(row['all_seconds']):.2f}",
            f"{row['times_faster']:.1f}" if args.jaxpruner else "",
            f"{row['scratch_per_largest_leaf']:.2f}",
            f"{row['exchanged']:.3f}",
            f"{row['compile_seconds']:.1f}",
        )
    args.jaxpruner = bool(args.jaxpruner)  # a path says nothing elsewhere
    write_json(args, weights=size, rows=rows)


if __name__ == "__main__":
    main()
