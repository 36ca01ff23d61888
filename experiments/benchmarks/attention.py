"""Claim: attention patterns skip their work, so sparser ones are faster, and dense causal beats the masked dense product.

Times forward + backward of every pattern, of ``jax.nn.dot_product_attention(is_causal=True)`` and, with ``--torch``, of
PyTorch's ``scaled_dot_product_attention(is_causal=True)``, all of them in turn in every repeat so that a busy machine slows
them alike, and prints a Markdown table of medians, ratios and the compiled programs' scratch memory.

Command: ``python experiments/benchmarks/attention.py --lengths 256 1024 4096 8192`` (``--dtype bfloat16 --torch``)
Hardware: any; the ratios below are for 2 cores of an x86-64 CPU with AVX-512. Time: 3 minutes.
Expected there, width 128, batch x length = 4096 (8192 for the longest), 4 heads of 64: causal 2.5 times as fast as
``jax.nn`` at 256 (with 12 heads, too), over 4 times at 1024 and 7 times from 4096 on; local and local_strided at least 1.2,
3 and 5 times as fast as causal at 1024, 4096 and 8192. Scratch memory is linear in the length. At 256 the two halves of
local_strided cost about what the dense triangle costs.
"""

import argparse
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from runner import announce, arguments, print_head, print_row, time_in_turn, write_json

from spdf_jax.ops.attention import attention
from spdf_jax.ops.attention_backends import attention_backend
from spdf_jax.ops.attention_patterns import PATTERNS, causal_share
from spdf_jax.sharding import target_platform

BASELINE = "jax.nn"
PYTORCH = "PyTorch"


def forward_and_backward(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """Function of (q, k, v, dout)_BTHD that returns (dq, dk, dv)_BTHD."""

    def step(q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, dout_BTHD: jax.Array) -> tuple[jax.Array, ...]:
        out_BTHD, pullback = jax.vjp(attend, q_BTHD, k_BTHD, v_BTHD)
        return out_BTHD, *pullback(dout_BTHD)

    return step


def pytorch_step(inputs: list[jax.Array]) -> Callable[[], Any]:
    """The same by PyTorch, from the same numbers; it keeps heads before positions, as its kernel wants them."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    dtype = getattr(torch, str(inputs[0].dtype))
    q, k, v, dout = (
        torch.tensor(np.asarray(x, np.float32)).to(dtype).transpose(1, 2).contiguous().requires_grad_() for x in inputs
    )

    def step() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out, (q, k, v), dout.detach())

    return step


def rows(length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Prints the table's rows for one length."""
    batch = args.batch or max(1, 4096 // length)
    shape_BTHD = (batch, length, args.heads, args.head_dim)
    inputs = [jax.random.normal(key, shape_BTHD, args.dtype) for key in jax.random.split(jax.random.key(0), 4)]
    functions = {BASELINE: functools.partial(jax.nn.dot_product_attention, is_causal=True)}
    functions |= {pattern: functools.partial(attention, pattern=pattern, width=args.width) for pattern in PATTERNS}

    backends = {
        pattern: attention_backend(pattern, args.dtype, args.head_dim, target_platform(), length=length)
        for pattern in PATTERNS
    }
    compiled, compile_seconds, scratch_mib = {}, {}, {}
    for name, attend in functions.items():
        start = time.perf_counter()
        compiled[name] = jax.jit(forward_and_backward(attend)).lower(*inputs).compile()
        compile_seconds[name] = time.perf_counter() - start
        memory = compiled[name].memory_analysis()
        scratch_mib[name] = memory.temp_size_in_bytes / 2**20 if memory else math.nan
    ready: dict[str, Callable[[], Any]] = {name: functools.partial(step, *inputs) for name, step in compiled.items()}
    if args.torch:
        ready[PYTORCH] = pytorch_step(inputs)
    timings = time_in_turn(ready, args.repeats)
    seconds = {name: statistics.median(timing.wall) for name, timing in timings.items()}
    table = []
    for name in ready:
        row = {
            "batch": batch,
            "length": length,
            "attention": name,
            "share": causal_share(name, length, args.width) if name in PATTERNS else None,
            "ms": 1e3 * seconds[name],
            f"times {BASELINE}": seconds[BASELINE] / seconds[name],
            "times causal": seconds["causal"] / seconds[name],
            "scratch_mib": scratch_mib.get(name),
            "compile_seconds": compile_seconds.get(name),
        }
        print_row(
            f"{batch} x {length}",
            f"{name} ({backends[name]})" if name in PATTERNS else name,
            f"{row['share']:.3f}" if name in PATTERNS else "",
            f"{row['ms']:.1f}",
            f"{row[f'times {BASELINE}']:.2f}",
            f"{row['times causal']:.2f}",
            f"{row['scratch_mib']:.0f}" if name in compiled else "",
            f"{row['compile_seconds']:.1f}" if name in compiled else "",
        )
        table.append(row)
    return table


def main() -> None:
    """Prints the table and writes the JSON."""
    parser = arguments(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 8192])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--batch", type=int, default=0, help="sequences; 0 keeps batch x length at 4096")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=64)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", type=jnp.dtype, default=np.dtype("float32"))
    parser.add_argument("--torch", action="store_true", help="PyTorch's kernel beside ours; needs PyTorch")
    args = parser.parse_args()

    announce(
        f"{args.dtype}, {args.heads} heads of {args.head_dim}, width {args.width}; forward + backward, "
        f"medians of {args.repeats} interleaved repeats"
    )
    header = ["batch x length", "attention", "share", "ms", f"x {BASELINE}", "x causal", "scratch MiB", "compile s"]
    print_head(*header, left=2)
    write_json(args, rows=[row for length in args.lengths for row in rows(length, args)])


if __name__ == "__main__":
    main()
