"""Claim: compile time does not grow with depth: the steps of 48 layers take <= 1.3 times as long to compile as those of 12.

Traces, lowers and compiles `spdf_jax`'s train step and topology step (RigL at 80 %), from shapes alone, for both depths, in
turn and with the order swapped in every repeat, so that a busy machine slows both alike. Nothing is kept from one compilation
to the next. Besides wall-clock time the table gives the ratio of processor time, which other work on the machine touches less.

Command: ``python experiments/benchmarks/compile_time.py --json compile_time.json``; with ``--topology v5e:2x2`` for TPUs that
need not be there (the extra ``tpu``), where a repeat takes minutes.
Hardware: any. Time: 3 minutes on 2 CPU cores.
Expected there: both ratios below 1.1.
"""

import argparse
import statistics
import time

import jax
from runner import announce, arguments, print_head, print_row, write_json

import spdf_jax as spdf
from spdf_jax.config.run import RunConfig
from spdf_jax.planning.pod_plan import lower_steps, make_pod
from spdf_jax.sharding import make_mesh
from spdf_jax.training.phases import make_plan

STEPS = ("train step", "topology step")


def config_of(layers: int, args: argparse.Namespace) -> RunConfig:
    """A run of a model so deep."""
    c = spdf.default_config("compile_time", "one", variants=("one",))
    c.model.n_layer, c.model.d_model, c.model.n_head = layers, args.width, args.width // 64
    c.model.context, c.model.dtype, c.model.remat = args.context, "bfloat16", args.remat
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "rigl", 0.8
    return spdf.resolve(c)


def measure(layers: int, args: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """(wall-clock, processor) seconds: to trace and lower all steps, and to compile each."""
    config = config_of(layers, args)
    mesh = make_pod(config.mesh, args.topology)[1] if args.topology else make_mesh(config.mesh)
    (plan,) = make_plan(config)
    jax.clear_caches()
    seconds = {}
    start = time.perf_counter(), time.process_time()
    steps = dict(lower_steps(config, plan, mesh))
    seconds["trace and lower"] = time.perf_counter() - start[0], time.process_time() - start[1]
    for name in STEPS:
        start = time.perf_counter(), time.process_time()
        steps[name].compile()
        seconds[name] = time.perf_counter() - start[0], time.process_time() - start[1]
    seconds["all"] = tuple(map(sum, zip(*seconds.values(), strict=True)))
    return seconds


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--layers", type=int, nargs=2, default=[12, 48], metavar=("FEW", "MANY"))
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--remat", default="none")
    parser.add_argument("--topology", default="", help="of TPUs to compile for, such as v5e:2x2; none: this machine")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    jax.config.update("jax_enable_compilation_cache", False)

    few, many = args.layers
    announce(
        f"compiled for {args.topology or 'this machine'}; width {args.width}, context {args.context}, bfloat16, "
        f"remat {args.remat}; {args.repeats} interleaved pairs"
    )
    measure(few, args)  # imports, and what is computed once
    taken: dict[int, list[dict[str, tuple[float, float]]]] = {few: [], many: []}
    for repeat in range(args.repeats):
        for layers in sorted(taken, reverse=repeat % 2 == 1):
            taken[layers].append(measure(layers, args))

    header = [f"{few} layers s", f"{many} layers s", f"{many} / {few}", "of pairs (lowest, highest)", "processor time"]
    print_head("compiling", *header)
    rows = []
    for name in taken[few][0]:
        wall, processor = ({n: [m[name][i] for m in taken[n]] for n in taken} for i in (0, 1))
        pairs = sorted(m / f for f, m in zip(wall[few], wall[many], strict=True))
        medians = {n: statistics.median(wall[n]) for n in wall}
        row = {
            "compiling": name,
            "seconds": medians,
            "ratio_of_medians": medians[many] / medians[few],
            "median_of_ratios": statistics.median(pairs),
            "extremes": [pairs[0], pairs[-1]],
            "processor_ratio": statistics.median(processor[many]) / statistics.median(processor[few]),
        }
        rows.append(row)
        print_row(
            name,
            f"{medians[few]:.2f}",
            f"{medians[many]:.2f}",
            f"{row['ratio_of_medians']:.3f}",
            f"{row['median_of_ratios']:.3f} ({pairs[0]:.3f}, {pairs[-1]:.3f})",
            f"{row['processor_ratio']:.3f}",
        )
    write_json(args, rows=rows)


if __name__ == "__main__":
    main()
