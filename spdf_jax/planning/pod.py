"""TPU pods on paper: what their chips and links can do, how long a compiled program would take, what is the smallest that fits.

The estimate of time is a model, and this is all of it:

- what computes takes the cycles that the compiler put down for it; copies that run beside it are free;
- splash attention, for which the compiler puts down nothing, runs at `SPLASH_SHARE` of the peak on the blocks that it visits;
- a collective goes around one ring of links in both directions, or along a line of them where they do not close a ring, at
  ``link_bytes_per_second`` and `HOP_SECONDS` a hop; one at a time;
- an asynchronous collective runs beside what the program puts between its start and its end, any other beside nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from spdf_jax.ops.attention_patterns import pattern_mask
from spdf_jax.planning.hlo import Collective, Instruction, Items, Loop

#: Of the peak that splash attention is taken to reach: an assumption. Heads narrower than the matrix unit reach less of it.
SPLASH_SHARE = 0.5
HOP_SECONDS = 1e-6
_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Matrix products of splash attention's kernels.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Generation(NamedTuple):
    """A generation of TPUs.

    Attributes:
      hbm_bytes, peak_flops: of a chip, in bfloat16 (Google Cloud's data sheets).
      link_bytes_per_second: of one link in one direction ("How to Scale Your Model", Austin et al. 2025, chapter 2).
      clock_hertz: of the compiler's cycles: the peak over the matrix units' FLOPs a cycle.
      unit_width: of a matrix unit.
      ring: length of an axis from which its links close a ring.
      sizes: shapes to suggest, smallest first.
    """

    hbm_bytes: float
    peak_flops: float
    link_bytes_per_second: float
    clock_hertz: float
    unit_width: int
    ring: int
    sizes: tuple[str, ...]


GENERATIONS = {
    "v4": Generation(32e9, 275e12, 45e9, 1.05e9, 128, 4, _3D),
    "v5e": Generation(16e9, 197e12, 45e9, 1.5e9, 128, 16, _2D),
    "v5p": Generation(95e9, 459e12, 90e9, 1.75e9, 128, 4, _3D),
    "v6e": Generation(32e9, 918e12, 90e9, 1.75e9, 256, 16, _2D),
}


@dataclass(frozen=True)
class Pod:
    """Chips by their coordinates, in the mesh's flattened order."""

    name: str
    coordinates: tuple[tuple[int, ...], ...]

    @property
    def generation(self) -> Generation:
        """Of its chips."""
        return GENERATIONS[self.name.partition(":")[0]]

    def seconds(self, collective: Collective) -> float:
        """Time of a collective by itself.

        >>> pod = Pod("v5e:2x2", ((0, 0), (1, 0), (0, 1), (1, 1)))
        >>> pod.seconds(Collective("all-gather", 90_000_000, (0, 1, 2, 3), ""))  # three quarters of it over two links; hops
        0.000754
        """
        g, places = self.generation, [self.coordinates[d] for d in collective.devices] or self.coordinates
        sizes = [max(axis) + 1 for axis in zip(*self.coordinates, strict=True)]
        extents = [(len(set(axis)), size) for axis, size in zip(zip(*places, strict=True), sizes, strict=True)]
        axes = [(extent, extent == size and size >= g.ring) for extent, size in extents if extent > 1]
        latency = HOP_SECONDS * sum(extent for extent, _ in axes)
        if collective.kind == "collective-permute":
            return collective.bytes / g.link_bytes_per_second + HOP_SECONDS
        if collective.kind == "all-to-all":
            hops = sum(extent / (4 if closed else 3) for extent, closed in axes)
            return collective.bytes * hops / (2 * max(1, len(axes)) * g.link_bytes_per_second) + latency
        directions = 2 if len(axes) > 1 or any(closed for _, closed in axes) else 1
        passes = (2 if collective.kind == "all-reduce" else 1) * (len(places) - 1) / len(places)
        return passes * collective.bytes / (directions * g.link_bytes_per_second) + latency


class Times(NamedTuple):
    """Seconds of a program.

    Attributes:
      computing: all of it outside of kernels.
      kernels: splash attention.
      collectives: one after the other.
      total: with asynchronous collectives beside what they run beside.
    """

    computing: float
    kernels: float
    collectives: float
    total: float


def estimate(items: Items, pod: Pod, splash: Callable[[Instruction], float]) -> Times:
    """Time of a program, by the model at the head of this module.

    Args:
      items: from `spdf_jax.planning.hlo.read_program`.
      pod: where it would run.
      splash: seconds of a kernel.
    """
    ends_at = {c.key: i for i, item in enumerate(items) if isinstance(item, Instruction) for c in item.collectives}
    ends: dict[str, float] = {}
    computing = kernels = collectives = clock = links_free = 0.0
    for i, item in enumerate(items):
        if isinstance(item, Loop):
            body = Times(*(item.times * seconds for seconds in estimate(item.body, pod, splash)))
            computing, kernels, collectives = computing + body[0], kernels + body[1], collectives + body[2]
            clock += body.total
            continue
        for collective in item.collectives:
            if collective.key not in ends:
                seconds = pod.seconds(collective)
                links_free = ends[collective.key] = max(clock, links_free) + seconds
                collectives += seconds
        own, kernel = item.cycles / pod.generation.clock_hertz, splash(item)
        computing, kernels, clock = computing + own, kernels + kernel, clock + own + kernel
        clock = max([clock, *(ends[c.key] for c in item.collectives if ends_at[c.key] == i)])
    return Times(computing, kernels, collectives, max(clock, links_free))


def splash_flops(kernel: Instruction, pattern: str, width: int) -> int:
    """FLOPs of a splash attention kernel's matrix products on the blocks that it visits; 0 of another kernel."""
    products = next((n for name, n in _SPLASH.items() if kernel.kernel.startswith(name)), 0)
    if not products:
        return 0
    batch, heads, length, head_size = next(shape for shape in kernel.operands if len(shape) == 4)
    rows = next(
        shape[1] for shape in kernel.operands if len(shape) == 3
    )  # of the table that says which blocks to visit
    block = length // rows
    visited = pattern_mask(pattern, length, width).reshape(rows, block, -1, block).any((1, 3))
    return products * 2 * batch * heads * head_size * block**2 * int(visited.sum())


def splash_seconds(kernel: Instruction, pattern: str, width: int, generation: Generation) -> float:
    """Time of one call, at `SPLASH_SHARE` of the peak."""
    flops = splash_flops(kernel, pattern, width)
    if not flops:
        return 0.0
    head_size = next(shape for shape in kernel.operands if len(shape) == 4)[3]
    return flops / (SPLASH_SHARE * min(1.0, head_size / generation.unit_width) * generation.peak_flops)


@dataclass(frozen=True)
class Need:
    """What a step takes on a chip of a pod, and how it is split there.

    Attributes:
      pod: its name.
      data, fsdp, tensor: sizes of the mesh.
      batch_size, accumulate: sequences a step, micro-batches a step.
      d_model: what `fsdp` must divide to split anything.
      split_bytes: on a chip, of state and gradients, which are split by fsdp and tensor.
      chip_bytes: on a chip, of everything.
    """

    pod: str
    data: int
    fsdp: int
    tensor: int
    batch_size: int
    accumulate: int
    d_model: int
    split_bytes: float
    chip_bytes: float

    @property
    def fits(self) -> bool:
        """As it is."""
        return self.chip_bytes <= GENERATIONS[self.pod.partition(":")[0]].hbm_bytes

    def on(self, pod: str) -> tuple[int, float] | None:
        """Fewest micro-batches with which it should fit with everything split over all chips, and the bytes a chip then.

        What is not split is taken to grow with the sequences of a micro-batch on a chip, and to shrink with them where it must.
        """
        chips = _chips(pod)
        share = chips // self.tensor
        if chips % self.tensor or self.d_model % share:
            return None
        split = self.split_bytes * self.fsdp * self.tensor / chips
        sequences = self.batch_size / (self.accumulate * self.data * self.fsdp)
        for accumulate in range(1, self.batch_size // share + 1):
            if self.batch_size % (accumulate * share) == 0:
                growth = self.batch_size / (accumulate * share) / sequences
                needed = split + (self.chip_bytes - self.split_bytes) * (max(1.0, growth) if self.fits else growth)
                if needed <= GENERATIONS[pod.partition(":")[0]].hbm_bytes:
                    return accumulate, needed
        return None


def suggest(need: Need, phase: str, remat: str) -> str:
    """The smallest pod of the generation that should do; where this one does not, the settings with which it should.

    >>> suggest(Need("v5e:4x4", 16, 1, 1, 32, 1, 512, 12e9, 20e9), "pretrain", "block")
    'it should fit with --config.mesh.data=1 --config.mesh.fsdp=16 --config.mesh.tensor=1 \
--config.pretrain.grad_accumulation_steps=1 (about 8.8 GB a chip)'
    """
    name, _, _ = need.pod.partition(":")
    here = _chips(need.pod)
    sizes = [f"{name}:{size}" for size in GENERATIONS[name].sizes]
    found = {
        size: best for size in sizes if (not need.fits or _chips(size) < here) and (best := need.on(size)) is not None
    }
    if not found:
        less = "--config.model.remat=block, or " if remat != "block" else ""
        more = f"no {name} pod should do: set {less}a larger --config.mesh.tensor"
        return "no smaller pod should do" if need.fits else more
    same = next((size for size in found if _chips(size) == here), None)
    chosen = same or next(iter(found))
    accumulate, chip_bytes = found[chosen]
    flags = (
        f"--config.mesh.data=1 --config.mesh.fsdp={_chips(chosen) // need.tensor} --config.mesh.tensor={need.tensor} "
        f"--config.{phase}.grad_accumulation_steps={accumulate} (about {chip_bytes / 1e9:.1f} GB a chip)"
    )
    if same:
        return f"it should fit with {flags}"
    return f"{'the smallest that should do is' if need.fits else 'it takes'} --plan_topology={chosen} {flags}"


def _chips(pod: str) -> int:
    return math.prod(map(int, pod.partition(":")[2].split("x")))
