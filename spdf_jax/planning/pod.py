"""TPU pods on paper: what their chips and links can do, how long a compiled program would take, what is the smallest that fits.

The estimate of time is a model, and this is all of it:

- what computes takes the cycles that the compiler put down for it; copies that run beside it are free;
- splash attention, for which the compiler puts down nothing, runs at `SPLASH_SHARE` of the peak on the blocks that it visits;
- a collective goes around one ring of links in both directions, or along a line of them where they do not close a ring, at
  ``link_bytes_per_second`` and `HOP_SECONDS` a hop; one at a time. Where a chip's two cores are two devices, they share its
  links, and from one to the other it is as fast as over one;
- an asynchronous collective runs beside what the program puts between its start and its end, any other beside nothing.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from spdf_jax.ops.attention_patterns import pattern_mask
from spdf_jax.planning.hlo import Collective, Instruction, Items, Loop

#: Of the peak that splash attention is taken to reach: an assumption. Heads narrower than the matrix unit reach less of it.
SPLASH_SHARE = 0.5
HOP_SECONDS = 1e-6
GIB = 1024**3
_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Matrix products of splash attention's kernels.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}


class Generation(NamedTuple):
    """A generation of TPUs.

    Attributes:
      hbm_bytes: of a device, as libtpu's compiler allows.
      peak_flops: of a device, in bfloat16 (Google Cloud's data sheets).
      link_bytes_per_second: of one link in one direction ("How to Scale Your Model", Austin et al. 2025, chapter 2; tpu7x: that
        of v5p, since a chip's links are as fast together by the data sheets).
      clock_hertz: of the compiler's cycles: the peak over the matrix units' FLOPs a cycle.
      unit_width: of a matrix unit.
      devices_per_chip: 2 where each of a chip's cores is a device of its own.
      counted: what ``v6e-256`` has 256 of, a chip: 1 of chips, 2 of cores.
      sizes: shapes to suggest, smallest first.
    """

    hbm_bytes: float
    peak_flops: float
    link_bytes_per_second: float
    clock_hertz: float
    unit_width: int
    devices_per_chip: int
    counted: int
    sizes: tuple[str, ...]

    def closes(self, sizes: Sequence[int]) -> list[bool]:
        """Whether the links of each axis close a ring: in two dimensions an axis of 16, in three all axes of whole 4x4x4 cubes.

        >>> GENERATIONS["v5e"].closes((8, 16)), GENERATIONS["v5p"].closes((4, 4, 8)), GENERATIONS["v5p"].closes((2, 4, 4))
        ([False, True], [True, True, True], [False, False, False])
        """
        if self.sizes == _2D:
            return [size == 16 for size in sizes]
        return [all(size % 4 == 0 for size in sizes)] * len(sizes)


GENERATIONS = {
    "v4": Generation(30.75 * GIB, 275e12, 45e9, 1.05e9, 128, 1, 2, _3D),
    "v5e": Generation(15.75 * GIB, 197e12, 45e9, 1.5e9, 128, 1, 1, _2D),
    "v5p": Generation(95.74 * GIB, 459e12, 90e9, 1.75e9, 128, 1, 2, _3D),
    "v6e": Generation(31.25 * GIB, 918e12, 90e9, 1.75e9, 256, 1, 1, _2D),
    "tpu7x": Generation(94.75 * GIB, 1153.5e12, 90e9, 2.2e9, 256, 2, 2, _3D),
}


def pod_name(name: str) -> str | None:
    """``generation:AxB`` or ``generation:AxBxC`` of a pod by any of its names; None of what is no name of one.

    >>> pod_name("v5e:4x4"), pod_name("v6e-256"), pod_name("v5p-128"), pod_name("v5litepod-16"), pod_name("v6e-3")
    ('v5e:4x4', 'v6e:16x16', 'v5p:4x4x4', 'v5e:4x4', None)
    """
    if by_shape := re.fullmatch(r"(\w+):\d+(x\d+){1,2}", name):
        return name if by_shape[1] in GENERATIONS else None
    by_count = re.fullmatch(r"(\w+)-(\d+)", name.replace("v5litepod", "v5e"))
    if by_count is None or by_count[1] not in GENERATIONS:
        return None
    generation, count = GENERATIONS[by_count[1]], int(by_count[2])
    return next(
        (f"{by_count[1]}:{size}" for size in generation.sizes if generation.counted * _chips(size) == count), None
    )


@dataclass(frozen=True)
class Pod:
    """Devices by the coordinates of their chips, in the mesh's flattened order."""

    name: str
    coordinates: tuple[tuple[int, ...], ...]

    @property
    def generation(self) -> Generation:
        """Of its devices."""
        return GENERATIONS[self.name.partition(":")[0]]

    def seconds(self, collective: Collective) -> float:
        """Time of a collective by itself.

        >>> pod = Pod("v5e:2x2", ((0, 0), (1, 0), (0, 1), (1, 1)))
        >>> pod.seconds(Collective("all-gather", 90_000_000, (0, 1, 2, 3), ""))  # three quarters of it over two links; hops
        0.000754
        """
        g, places = self.generation, [self.coordinates[d] for d in collective.devices] or self.coordinates
        sizes = [max(axis) + 1 for axis in zip(*self.coordinates, strict=True)]
        extents = [len(set(axis)) for axis in zip(*places, strict=True)]
        rings = [
            extent == size and closes for extent, size, closes in zip(extents, sizes, g.closes(sizes), strict=True)
        ]
        axes = [(extent, ring) for extent, ring in zip(extents, rings, strict=True) if extent > 1]
        latency = HOP_SECONDS * max(1, sum(extent for extent, _ in axes))
        # Groups of one core of each chip run beside those of the other, over the same links.
        link = g.link_bytes_per_second * len(places) / (len(set(places)) * g.devices_per_chip)
        if collective.kind == "collective-permute":
            return collective.bytes / link + HOP_SECONDS
        if collective.kind == "all-to-all":
            hops = sum(extent / (4 if closed else 3) for extent, closed in axes) or 1
            return collective.bytes * hops / (2 * max(1, len(axes)) * link) + latency
        directions = 2 if len(axes) > 1 or any(closed for _, closed in axes) else 1
        passes = (2 if collective.kind == "all-reduce" else 1) * (len(places) - 1) / len(places)
        return passes * collective.bytes / (directions * link) + latency


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
    *batch, heads, length, head_size = _queries(kernel)
    rows = next(
        shape[1] for shape in kernel.operands if len(shape) == 3
    )  # of the table that says which blocks to visit
    block = length // rows
    visited = pattern_mask(pattern, length, width).reshape(rows, block, -1, block).any((1, 3))
    return products * 2 * math.prod(batch) * heads * head_size * block**2 * int(visited.sum())


def splash_seconds(kernel: Instruction, pattern: str, width: int, generation: Generation) -> float:
    """Time of one call, at `SPLASH_SHARE` of the peak."""
    flops = splash_flops(kernel, pattern, width)
    if not flops:
        return 0.0
    head_size = _queries(kernel)[-1]
    return flops / (SPLASH_SHARE * min(1.0, head_size / generation.unit_width) * generation.peak_flops)


def _queries(kernel: Instruction) -> tuple[int, ...]:
    """Their shape: a batch of one sequence on a device has no axis."""
    return max((shape for shape in kernel.operands if len(shape) >= 3), key=math.prod)


@dataclass(frozen=True)
class Need:
    """What a step takes on a device of a pod, and how it is split there.

    Attributes:
      pod: its name.
      data, fsdp, tensor: sizes of the mesh.
      batch_size, accumulate: sequences a step, micro-batches a step.
      d_model: what `fsdp` must divide to split anything.
      split_bytes: on a device, of state and gradients, which are split by fsdp and tensor.
      device_bytes: on a device, of everything.
    """

    pod: str
    data: int
    fsdp: int
    tensor: int
    batch_size: int
    accumulate: int
    d_model: int
    split_bytes: float
    device_bytes: float

    @property
    def fits(self) -> bool:
        """As it is."""
        return self.device_bytes <= GENERATIONS[self.pod.partition(":")[0]].hbm_bytes

    def on(self, pod: str) -> tuple[int, float] | None:
        """Fewest micro-batches with which it should fit with everything split over all devices, and the bytes a device then.

        What is not split is taken to grow with the sequences of a micro-batch on a device, and to shrink with them where it
        must.
        """
        devices = _devices(pod)
        share = devices // self.tensor
        if devices % self.tensor or self.d_model % share:
            return None
        split = self.split_bytes * self.fsdp * self.tensor / devices
        sequences = self.batch_size / (self.accumulate * self.data * self.fsdp)
        for accumulate in range(1, self.batch_size // share + 1):
            if self.batch_size % (accumulate * share) == 0:
                growth = self.batch_size / (accumulate * share) / sequences
                needed = split + (self.device_bytes - self.split_bytes) * (max(1.0, growth) if self.fits else growth)
                if needed <= GENERATIONS[pod.partition(":")[0]].hbm_bytes:
                    return accumulate, needed
        return None


def suggest(need: Need, phase: str, remat: str) -> str:
    """The smallest pod of the generation that should do; where this one does not, the settings with which it should.

    >>> suggest(Need("v5e:4x4", 16, 1, 1, 32, 1, 512, 12e9, 20e9), "pretrain", "block")
    'it should fit with --config.mesh.data=1 --config.mesh.fsdp=16 --config.mesh.tensor=1 \
--config.pretrain.grad_accumulation_steps=1 (about 8.1 GiB a device)'
    """
    name, _, _ = need.pod.partition(":")
    here = _devices(need.pod)
    sizes = [f"{name}:{size}" for size in GENERATIONS[name].sizes]
    found = {
        size: best for size in sizes if (not need.fits or _devices(size) < here) and (best := need.on(size)) is not None
    }
    if not found:
        less = "--config.model.remat=block, or " if remat != "block" else ""
        more = f"no {name} pod should do: set {less}a larger --config.mesh.tensor"
        return "no smaller pod should do" if need.fits else more
    same = next((size for size in found if _devices(size) == here), None)
    chosen = same or next(iter(found))
    accumulate, device_bytes = found[chosen]
    flags = (
        f"--config.mesh.data=1 --config.mesh.fsdp={_devices(chosen) // need.tensor} --config.mesh.tensor={need.tensor} "
        f"--config.{phase}.grad_accumulation_steps={accumulate} (about {device_bytes / GIB:.1f} GiB a device)"
    )
    if same:
        return f"it should fit with {flags}"
    return f"{'the smallest that should do is' if need.fits else 'it takes'} --plan_topology={chosen} {flags}"


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _devices(pod: str) -> int:
    generation, _, shape = pod.partition(":")
    return GENERATIONS[generation].devices_per_chip * _chips(shape)
