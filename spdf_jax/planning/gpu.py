"""Hosts of GPUs on paper: their public figures, and NVIDIA's compiler for them, which is the extra ``plan_gpu``.

A GPU that is not there is described to XLA by a `GpuTargetConfigProto` in text (openxla/xla,
``xla/stream_executor/device_description.proto``), written here from `KINDS`. What is not here is tuning: on a GPU, XLA tries
which tiles and libraries are fastest, and takes them. So memory may differ a little, and XLA's own times of matrix products,
which are those of its first tiles, do not count. The estimate of time is a model, and this and `spdf_jax.planning.pod` are all
of it:

- what computes takes the time in XLA's statistics, mostly that of the bytes that it moves; matrix products run at
  `PRODUCT_SHARE` of the peak, if moving their bytes takes no longer, those of live blocks by our kernels without that
  condition. To start a kernel takes no time;
- cuDNN's attention runs at `CUDNN_SHARE` of the peak on the positions that it visits;
- a collective takes `START_SECONDS`, and sends as NCCL's rings do: within a host at the links' full speed, between hosts at
  that of one network card for each of a host's GPUs that takes part.

Nothing of this has been held against a GPU: how far off a time is, is not known. It is more likely too short than too long.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from spdf_jax.ops.attention_patterns import pattern_mask
from spdf_jax.planning.hlo import Collective, Instruction
from spdf_jax.planning.pod import Kind, Pod, installed

#: Of the peak that matrix products are taken to reach: an assumption. It is of bfloat16; those in float32 are slower.
PRODUCT_SHARE = 0.6
#: Of the peak that cuDNN's attention is taken to reach, forward and backward: an assumption.
CUDNN_SHARE = 0.4
START_SECONDS = 20e-6
#: Of a GPU's memory that JAX takes at its start, if ``XLA_PYTHON_CLIENT_MEM_FRACTION`` does not say otherwise.
MEMORY_SHARE = 0.75
_SIZES = ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8", "64x8")
_PACKAGES = ("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13")


@dataclass(frozen=True)
class Gpu(Kind):
    """A kind of GPU, eight to a host: the peak, links and network cards by NVIDIA's data sheets of the SXM form and of the DGX
    that has it, memory and caches as its driver reports them (openxla/xla, ``xla/backends/gpu/target_config/specs``): an
    H100's 80 GB are 84.94e9 bytes.

    Attributes:
      memory_bytes_per_second: to its own memory.
      link_bytes_per_second: to the host's other GPUs, in one direction.
      network_bytes_per_second: of the host's network card for it, in one direction.
      capability: CUDA's compute capability.
      cores: streaming multiprocessors.
      core_flops: of the peak, of one of them in a cycle: what the clock follows from.
      l2_bytes: of its second cache.
      links: how many it has.
    """

    memory_bytes_per_second: float
    link_bytes_per_second: float
    network_bytes_per_second: float
    capability: int
    cores: int
    core_flops: int
    l2_bytes: int
    links: int


KINDS = {
    "a100": Gpu(MEMORY_SHARE * 85.1e9, 312e12, 1, _SIZES, 2.039e12, 300e9, 25e9, 8, 108, 2048, 40 * 2**20, 12),
    "h100": Gpu(MEMORY_SHARE * 84.94e9, 989e12, 1, _SIZES, 3.352e12, 450e9, 50e9, 9, 132, 4096, 50 * 2**20, 18),
    "h200": Gpu(MEMORY_SHARE * 151.4e9, 989e12, 1, _SIZES, 4.8e12, 450e9, 50e9, 9, 132, 4096, 50 * 2**20, 18),
    "b200": Gpu(MEMORY_SHARE * 191.5e9, 2250e12, 1, _SIZES, 7.672e12, 900e9, 50e9, 10, 148, 8192, 126 * 2**20, 18),
}
# By compute capability: shared memory of a multiprocessor and of a block of threads that asks for more than 48 KiB, and
# arithmetic units in float32 (CUDA C++ Programming Guide, "Compute Capabilities").
_CORES = {8: (164, 163, 64), 9: (228, 227, 128), 10: (228, 227, 128)}


def target_config(name: str, cudnn: str) -> str:
    """The GPU in the words of XLA's compiler.

    Args:
      name: of `KINDS`.
      cudnn: its version, from which its kernels are chosen: ``9.12.0``.

    Returns:
      A whole `GpuTargetConfigProto` in text format. All it holds that is not in `KINDS` is the same for all of these GPUs.
    """
    gpu = KINDS[name]
    shared, shared_optin, units = _CORES[gpu.capability]
    major, minor, patch = map(int, cudnn.split(".")[:3])
    # Instructions that one generation alone has, such as Hopper's asynchronous products.
    feature = "ACCELERATED_FEATURES" if gpu.capability >= 9 else "NONE"
    return f"""
gpu_device_info {{
  name: "NVIDIA {name.upper()}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {gpu.capability} feature_extension: {feature} }}
  core_count: {gpu.cores}
  fpus_per_core: {units}
  clock_rate_ghz: {gpu.peak_flops / gpu.cores / gpu.core_flops / 1e9:.3f}
  device_memory_size: {gpu.hbm_bytes / MEMORY_SHARE:.0f}
  memory_bandwidth: {gpu.memory_bytes_per_second:.0f}
  l2_cache_size: {gpu.l2_bytes}
  shared_memory_per_core: {shared * 1024}
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {shared_optin * 1024}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_address_bits: 64
  device_interconnect_info {{ active_links: {gpu.links} }}
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "{major}.{minor}.{patch}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {major} minor: {minor} patch: {patch} }}
device_description_str: "NVIDIA {name.upper()}"
"""


@dataclass(frozen=True)
class GpuPod(Pod):
    """GPUs of one host, or of several alike.

    Attributes:
      hosts: of its devices, in the mesh's flattened order.
    """

    hosts: tuple[int, ...] = ()
    attention: ClassVar[str] = "cuDNN's attention"

    @property
    def kind(self) -> Gpu:
        """Of its devices."""
        return KINDS[self.name.partition(":")[0]]

    @property
    def about_memory(self) -> str:
        """See `Pod.about_memory`."""
        return f" ({MEMORY_SHARE:.0%} of a GPU's, as JAX takes by itself)"

    @property
    def timed(self) -> bool:
        """See `Pod.timed`. XLA's statistics ask for a table that it does not have of an A100."""
        return self.kind.capability >= 9

    @property
    def about_times(self) -> str:
        """See `Pod.about_times`."""
        if not self.timed:
            return "none: XLA makes no statistics for this GPU"
        return (
            f"by XLA's statistics, products at {PRODUCT_SHARE:.0%} of the peak, attention at {CUDNN_SHARE:.0%}, links at "
            "their full speed: held against no GPU yet, how far off is unknown"
        )

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        """See `Pod.compiler_options`."""
        return {"xla_gpu_collect_cost_model_stats": True} if self.timed else {}

    def devices(self) -> Sequence[jax.Device]:
        """See `Pod.devices`."""
        versions = installed("GPU", "plan_gpu", *_PACKAGES)
        # Compiling takes fewer of NVIDIA's libraries than running; jax would miss the others where JAX_PLATFORMS is not cpu.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":  # as JAX sets it
            # The compiler logs each computation that does not fit as an error, and goes on. What does not fit, the plan says.
            os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
        from jax.experimental import topologies  # brings the compiler

        kind, _, size = self.name.partition(":")
        hosts, each = size.split("x") if "x" in size else ("1", size)
        # Partitions x hosts x GPUs: to JAX, a partition is what shares fast links, here a host.
        return topologies.get_topology_desc(
            "", "cuda", topology=f"{hosts}x1x{each}", target_config=target_config(kind, versions["nvidia-cudnn-cu13"])
        ).devices

    def over(self, mesh: Mesh) -> "GpuPod":
        """See `Pod.over`."""
        return replace(self, hosts=tuple(device.process_index for device in mesh.devices.flat))

    def seconds(self, collective: Collective) -> float:
        """See `Pod.seconds`.

        >>> pod = GpuPod("h100:2x2", (0, 0, 1, 1))
        >>> round(pod.seconds(Collective("all-gather", 90_000_000, (0, 1), "")), 6)  # half of it over the links
        0.00012
        >>> round(pod.seconds(Collective("all-gather", 90_000_000, (0, 2), "")), 6)  # and over one network card
        0.00092
        """
        kind, hosts = self.kind, [self.hosts[d] for d in collective.devices] or list(self.hosts)
        speed = kind.link_bytes_per_second
        if len(set(hosts)) > 1:
            cards = 1 if collective.kind == "collective-permute" else len(hosts) / len(set(hosts))
            speed = min(speed, cards * kind.network_bytes_per_second)
        passes = (2 if collective.kind == "all-reduce" else 1) * (len(hosts) - 1) / len(hosts)
        if collective.kind == "collective-permute":
            passes = 1
        return passes * collective.bytes / speed + START_SECONDS

    def compute_seconds(self, instruction: Instruction) -> float:
        """See `Pod.compute_seconds`."""
        return max(instruction.seconds, instruction.flops / (PRODUCT_SHARE * self.kind.peak_flops))

    def attention_flops(self, kernel: Instruction, pattern: str, width: int) -> int:
        """See `Pod.attention_flops`."""
        if not kernel.kernel.startswith("__cudnn$fmha"):
            return 0
        products = 5 if kernel.kernel.endswith("Backward") else 2
        batch, length, heads, head_size = kernel.operands[0]
        return products * 2 * batch * heads * head_size * int(pattern_mask(pattern, length, width).sum())

    def attention_seconds(self, kernel: Instruction, pattern: str, width: int) -> float:
        """See `Pod.attention_seconds`."""
        return self.attention_flops(kernel, pattern, width) / (CUDNN_SHARE * self.kind.peak_flops)


def gpu_pod(name: str) -> GpuPod | None:
    """``kind:GPUs`` or ``kind:HOSTSxGPUs``, up to 8 GPUs a host; None of what is no name of one.

    >>> gpu_pod("h100:8").name, gpu_pod("h200:1x8").name, gpu_pod("b200:2x4").size, gpu_pod("h100:16"), gpu_pod("k80:8")
    ('h100:8', 'h200:8', 8, None, None)
    """
    found = re.fullmatch(r"(\w+):(?:([1-9]\d{0,3})x)?([1-8])", name)
    if found is None or found[1] not in KINDS:
        return None
    kind, hosts, each = found.groups()
    return GpuPod(f"{kind}:{each}" if hosts in (None, "1") else name)
