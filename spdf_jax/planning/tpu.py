"""TPU slices on paper: what their chips and links can do, and the compiler for them, libtpu, which is the extra ``tpu``.

The estimate of time is a model, and this and `spdf_jax.planning.pod` are all of it:

- what computes takes the cycles that the compiler put down for it;
- splash attention runs at `SPLASH_SHARE` of the peak on the blocks that it visits;
- a collective goes around one ring of links in both directions, or along a line of them where they do not close a ring, at
  ``link_bytes_per_second`` and `HOP_SECONDS` a hop. Where a chip's two cores are two devices, they share its links, and from
  one to the other it is as fast as over one.
"""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import jax
from jax.sharding import Mesh

from spdf_jax.ops.attention_patterns import pattern_mask
from spdf_jax.planning.hlo import Collective, Instruction
from spdf_jax.planning.pod import GIB, Kind, Pod, installed

#: Of the peak that splash attention is taken to reach: an assumption. Heads narrower than the matrix unit reach less of it.
SPLASH_SHARE = 0.5
HOP_SECONDS = 1e-6
_2D = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16")
# Matrix products of splash attention's kernels.
_SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# libtpu is to look for no TPU, to say nothing of finding none, and to let other processes compile, too.
_ONLY_COMPILING = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Generation(Kind):
    """A generation of TPUs. What a device holds is what libtpu's compiler allows, its peak is by Google Cloud's data sheets.

    Attributes:
      link_bytes_per_second: of one link in one direction ("How to Scale Your Model", Austin et al. 2025, chapter 2; tpu7x: that
        of v5p, since a chip's links are as fast together by the data sheets).
      clock_hertz: of the compiler's cycles: the peak over the matrix units' FLOPs a cycle.
      unit_width: of a matrix unit.
      counted: what ``v6e-256`` has 256 of, a chip: 1 of chips, 2 of cores.
    """

    link_bytes_per_second: float
    clock_hertz: float
    unit_width: int
    counted: int

    def closes(self, sizes: Sequence[int]) -> list[bool]:
        """Whether the links of each axis close a ring: in two dimensions an axis of 16, in three all axes of whole 4x4x4 cubes.

        >>> GENERATIONS["v5e"].closes((8, 16)), GENERATIONS["v5p"].closes((4, 4, 8)), GENERATIONS["v5p"].closes((2, 4, 4))
        ([False, True], [True, True, True], [False, False, False])
        """
        if self.sizes == _2D:
            return [size == 16 for size in sizes]
        return [all(size % 4 == 0 for size in sizes)] * len(sizes)


GENERATIONS = {
    "v4": Generation(30.75 * GIB, 275e12, 1, _3D, 45e9, 1.05e9, 128, 2),
    "v5e": Generation(15.75 * GIB, 197e12, 1, _2D, 45e9, 1.5e9, 128, 1),
    "v5p": Generation(95.74 * GIB, 459e12, 1, _3D, 90e9, 1.75e9, 128, 2),
    "v6e": Generation(31.25 * GIB, 918e12, 1, _2D, 90e9, 1.75e9, 256, 1),
    "tpu7x": Generation(94.75 * GIB, 1153.5e12, 2, _3D, 90e9, 2.2e9, 256, 2),
}


def tpu_name(name: str) -> str | None:
    """``generation:AxB`` or ``generation:AxBxC`` of a slice by any of its names; None of what is no name of one.

    >>> tpu_name("v5e:4x4"), tpu_name("v6e-256"), tpu_name("v5p-128"), tpu_name("v5litepod-16"), tpu_name("v6e-3")
    ('v5e:4x4', 'v6e:16x16', 'v5p:4x4x4', 'v5e:4x4', None)
    """
    if by_shape := re.fullmatch(r"(\w+):\d+(x\d+){1,2}", name):
        return name if by_shape[1] in GENERATIONS else None
    by_count = re.fullmatch(r"(\w+)-(\d+)", name.replace("v5litepod", "v5e"))
    if by_count is None or by_count[1] not in GENERATIONS:
        return None
    generation, count = GENERATIONS[by_count[1]], int(by_count[2])
    return next(
        (
            f"{by_count[1]}:{size}"
            for size in generation.sizes
            if generation.counted * math.prod(map(int, size.split("x"))) == count
        ),
        None,
    )


@dataclass(frozen=True)
class TpuPod(Pod):
    """A TPU slice.

    Attributes:
      coordinates: of its devices' chips, in the mesh's flattened order.
    """

    coordinates: tuple[tuple[int, ...], ...] = ()
    attention: ClassVar[str] = "splash attention"

    @property
    def kind(self) -> Generation:
        """Of its devices."""
        return GENERATIONS[self.name.partition(":")[0]]

    @property
    def about_times(self) -> str:
        """See `Pod.about_times`."""
        return (
            f"by the compiler's cycles, attention at {SPLASH_SHARE:.0%} of the peak, links at their full speed: "
            "held against no TPU yet"
        )

    def devices(self) -> Sequence[jax.Device]:
        """See `Pod.devices`."""
        installed("TPU", "tpu", "libtpu")
        for variable, value in _ONLY_COMPILING.items():
            os.environ.setdefault(variable, value)
        from jax.experimental import topologies  # brings libtpu

        # The two cores of a v4 chip are one device on a pod; those of a v5p chip are without asking.
        one_device = {"chip_config_name": "megacore"} if self.name.startswith("v4:") else {}
        return topologies.get_topology_desc(self.name, "tpu", **one_device).devices

    def over(self, mesh: Mesh) -> "TpuPod":
        """See `Pod.over`."""
        return replace(self, coordinates=tuple(tuple(device.coords) for device in mesh.devices.flat))

    def seconds(self, collective: Collective) -> float:
        """See `Pod.seconds`.

        >>> pod = TpuPod("v5e:2x2", ((0, 0), (1, 0), (0, 1), (1, 1)))
        >>> pod.seconds(Collective("all-gather", 90_000_000, (0, 1, 2, 3), ""))  # three quarters of it over two links; hops
        0.000754
        """
        g, places = self.kind, [self.coordinates[d] for d in collective.devices] or self.coordinates
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

    def compute_seconds(self, instruction: Instruction) -> float:
        """See `Pod.compute_seconds`."""
        return instruction.cycles / self.kind.clock_hertz

    def attention_flops(self, kernel: Instruction, pattern: str, width: int) -> int:
        """See `Pod.attention_flops`: on the blocks that it visits."""
        products = next((n for name, n in _SPLASH.items() if kernel.kernel.startswith(name)), 0)
        if not products:
            return 0
        *batch, heads, length, head_size = _queries(kernel)
        # Of the table that says which blocks to visit.
        rows = next(shape[1] for shape in kernel.operands if len(shape) == 3)
        block = length // rows
        visited = pattern_mask(pattern, length, width).reshape(rows, block, -1, block).any((1, 3))
        return products * 2 * math.prod(batch) * heads * head_size * block**2 * int(visited.sum())

    def attention_seconds(self, kernel: Instruction, pattern: str, width: int) -> float:
        """See `Pod.attention_seconds`."""
        flops = self.attention_flops(kernel, pattern, width)
        share = SPLASH_SHARE * min(1.0, _queries(kernel)[-1] / self.kind.unit_width) if flops else 1.0
        return flops / (share * self.kind.peak_flops)


def tpu_pod(name: str) -> TpuPod | None:
    """The slice of this name, as `tpu_name` knows it; None of what is no name of one."""
    known_as = tpu_name(name)
    return TpuPod(known_as) if known_as else None


def _queries(kernel: Instruction) -> tuple[int, ...]:
    """Their shape: a batch of one sequence on a device has no axis."""
    return max((shape for shape in kernel.operands if len(shape) >= 3), key=math.prod)
