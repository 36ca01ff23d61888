"""Pods on paper: how long a compiled program would take on one, and what is the smallest that fits.

A pod is what a plan is for: a TPU slice (`spdf_jax.planning.tpu`) or hosts of GPUs (`spdf_jax.planning.gpu`). Each says what
its devices hold, and how long they take for what a program does. The model of time that they share:

- what computes takes as long as the compiler put down for it; copies that run beside it are free;
- attention's kernels, for which the compiler puts down nothing, run at a share of the peak;
- an asynchronous collective runs beside what the program puts between its start and its end, any other beside nothing; one at
  a time.
"""

import importlib.metadata
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import jax
from jax.sharding import Mesh

from spdf_jax.errors import InputError
from spdf_jax.planning.hlo import Collective, Instruction, Items, Loop

GIB = 1024**3


@dataclass(frozen=True)
class Kind:
    """A kind of device.

    Attributes:
      hbm_bytes: of a device, that programs can have.
      peak_flops: of a device, a second, in bfloat16, nothing sparse.
      devices_per_chip: how many of them the sizes count as one.
      sizes: of pods to suggest, smallest first, as their names have them.
    """

    hbm_bytes: float
    peak_flops: float
    devices_per_chip: int
    sizes: tuple[str, ...]

    def devices(self, size: str) -> int:
        """In a pod of this size.

        >>> Kind(8e9, 1e12, 2, ("2x2",)).devices("2x2")
        8
        """
        return self.devices_per_chip * math.prod(map(int, size.split("x")))


@dataclass(frozen=True)
class Pod(ABC):
    """Devices to plan for, with what is known of their speed.

    Attributes:
      name: kind and size, ``v5e:4x4``, ``h100:2x8``.
      attention: whose kernels compute it.
    """

    name: str
    attention: ClassVar[str]

    @property
    @abstractmethod
    def kind(self) -> Kind:
        """Of its devices."""

    @property
    def size(self) -> int:
        """How many devices there are."""
        return self.kind.devices(self.name.partition(":")[2])

    @property
    @abstractmethod
    def about_times(self) -> str:
        """What they come from."""

    @property
    def about_memory(self) -> str:
        """What a device's bytes are, where they are not all it has."""
        return ""

    @property
    def timed(self) -> bool:
        """Whether the compiler puts times down."""
        return True

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """With which programs are compiled."""
        return {}

    @abstractmethod
    def devices(self) -> Sequence[jax.Device]:
        """To compile for; they need not be there.

        Raises:
          InputError: the compiler is not installed, or knows no such pod.
        """

    @abstractmethod
    def over(self, mesh: Mesh) -> Self:
        """The pod with its devices in the mesh's flattened order."""

    @abstractmethod
    def seconds(self, collective: Collective) -> float:
        """Time of a collective by itself."""

    @abstractmethod
    def compute_seconds(self, instruction: Instruction) -> float:
        """Time of what is no kernel, as the compiler put it down."""

    @abstractmethod
    def attention_flops(self, kernel: Instruction, pattern: str, width: int) -> int:
        """FLOPs of an attention kernel's matrix products; 0 of another kernel."""

    @abstractmethod
    def attention_seconds(self, kernel: Instruction, pattern: str, width: int) -> float:
        """Time of one call of an attention kernel; 0 of another kernel."""


def installed(device: str, extra: str, *packages: str) -> dict[str, str]:
    """Versions of what compiles for a device.

    Raises:
      InputError: some of the packages are missing, which the extra brings.
    """
    versions, missing = {}, []
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise InputError(
            f"--plan_topology: to compile for a {device} takes {', '.join(missing)} (and no {device}), not installed: "
            f"pip install -c requirements.lock -e '.[{extra}]'"
        )
    return versions


class Times(NamedTuple):
    """Seconds of a program.

    Attributes:
      computing: all of it outside of kernels.
      kernels: attention's.
      collectives: one after the other.
      total: with asynchronous collectives beside what they run beside.
    """

    computing: float
    kernels: float
    collectives: float
    total: float


def estimate(items: Items, pod: Pod, kernel_seconds: Callable[[Instruction], float]) -> Times:
    """Time of a program, by the model at the head of this module.

    Args:
      items: from `spdf_jax.planning.hlo.read_program`.
      pod: where it would run.
      kernel_seconds: of a kernel.
    """
    ends_at = {c.key: i for i, item in enumerate(items) if isinstance(item, Instruction) for c in item.collectives}
    ends: dict[str, float] = {}
    computing = kernels = collectives = clock = links_free = 0.0
    for i, item in enumerate(items):
        if isinstance(item, Loop):
            body = Times(*(item.times * seconds for seconds in estimate(item.body, pod, kernel_seconds)))
            computing, kernels, collectives = computing + body[0], kernels + body[1], collectives + body[2]
            clock += body.total
            continue
        for collective in item.collectives:
            if collective.key not in ends:
                seconds = pod.seconds(collective)
                links_free = ends[collective.key] = max(clock, links_free) + seconds
                collectives += seconds
        own, kernel = pod.compute_seconds(item), kernel_seconds(item)
        computing, kernels, clock = computing + own, kernels + kernel, clock + own + kernel
        clock = max([clock, *(ends[c.key] for c in item.collectives if ends_at[c.key] == i)])
    return Times(computing, kernels, collectives, max(clock, links_free))


class Layout(NamedTuple):
    """How a phase is laid out on a pod: all that its settings can choose without changing what is computed.

    Attributes:
      pod: its name.
      data, fsdp, tensor: sizes of the mesh.
      accumulate: micro-batches a step.
      remat: see `spdf_jax.model.config.GPTConfig`.
    """

    pod: str
    data: int
    fsdp: int
    tensor: int
    accumulate: int
    remat: str

    @property
    def devices(self) -> int:
        """How many it takes."""
        return self.data * self.fsdp * self.tensor

    def flags(self, phase: str) -> str:
        """To ask for it on the command line, the pod left out.

        >>> Layout("v5e:2x2", 1, 4, 1, 2, "block").flags("pretrain")
        '--config.mesh.data=1 --config.mesh.fsdp=4 --config.mesh.tensor=1 --config.model.remat=block \
--config.pretrain.grad_accumulation_steps=2'
        """
        mesh = " ".join(f"--config.mesh.{axis}={getattr(self, axis)}" for axis in ("data", "fsdp", "tensor"))
        return f"{mesh} --config.model.remat={self.remat} --config.{phase}.grad_accumulation_steps={self.accumulate}"


@dataclass(frozen=True)
class Need:
    """What a step takes on a device of a pod.

    Attributes:
      pod: where.
      layout: on it.
      batch_size: sequences a step.
      d_model: what `fsdp` must divide to split anything.
      split_bytes: on a device, of state and gradients, which are split by fsdp and tensor.
      device_bytes: on a device, of everything.
    """

    pod: Pod
    layout: Layout
    batch_size: int
    d_model: int
    split_bytes: float
    device_bytes: float

    @property
    def fits(self) -> bool:
        """As it is."""
        return self.device_bytes <= self.pod.kind.hbm_bytes

    def on(self, size: str, fsdp: int = 0) -> Layout | None:
        """With the fewest micro-batches with which it should fit a pod of this size and kind.

        What is not split is taken to grow with the sequences of a micro-batch on a device, and to shrink with them where it
        must.

        Args:
          size: as the names of pods have it.
          fsdp: 0 splits everything over all devices.
        """
        was = self.layout
        share, rest = divmod(self.pod.kind.devices(size), was.tensor)
        fsdp = fsdp or share
        if rest or share % fsdp or self.d_model % fsdp:
            return None
        split = self.split_bytes * was.fsdp / fsdp
        sequences = self.batch_size / (was.accumulate * was.data * was.fsdp)
        for accumulate in range(1, self.batch_size // share + 1):
            if self.batch_size % (accumulate * share) == 0:
                growth = self.batch_size / (accumulate * share) / sequences
                needed = split + (self.device_bytes - self.split_bytes) * (max(1.0, growth) if self.fits else growth)
                if needed <= self.pod.kind.hbm_bytes:
                    pod = f"{self.pod.name.partition(':')[0]}:{size}"
                    return was._replace(pod=pod, data=share // fsdp, fsdp=fsdp, accumulate=accumulate)
        return None


def suggest(need: Need) -> Layout | None:
    """On the smallest pod of the kind that should do; where this one does not, on this one, if that should do.

    >>> from spdf_jax.planning.tpu import TpuPod
    >>> suggest(Need(TpuPod("v5e:4x4"), Layout("v5e:4x4", 16, 1, 1, 1, "block"), 32, 512, 12e9, 20e9))
    Layout(pod='v5e:4x4', data=1, fsdp=16, tensor=1, accumulate=1, remat='block')
    """
    kind, here = need.pod.kind, need.pod.size
    sizes = [size for size in kind.sizes if not need.fits or kind.devices(size) < here]
    sizes.sort(key=lambda size: kind.devices(size) != here)  # this one first
    return next((layout for size in sizes if (layout := need.on(size)) is not None), None)
