"""``--job plan --plan_topology v5e:4x4 --plan_search``: which mesh, micro-batches and remat a pod does best with.

Every mesh that divides the devices and the model is compiled with each remat, in the fewest micro-batches that fit: more of
them would take less memory, and longer. What comes out is the frontier: layouts that no other beats in both memory and time.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError
from spdf_jax.planning.pod import GIB, Layout, Pod
from spdf_jax.planning.pod_plan import compile_layout, dense_flops, flags, make_pod, state_bytes
from spdf_jax.sharding import MeshConfig
from spdf_jax.training.phases import PhasePlan, make_plan

#: What `spdf_jax.model.config.GPTConfig` has as ``remat``; the first takes the least memory.
REMATS = ("block", "mlp", "dots", "none")


class Found(NamedTuple):
    """A layout, compiled.

    Attributes:
      layout: the layout.
      device_bytes: on a device, the most that one of the phase's steps takes.
      fits: whether a device has as many.
      seconds: of a train step; 0 where it does not fit, or the compiler puts no times down.
    """

    layout: Layout
    device_bytes: float
    fits: bool
    seconds: float


def search(config: RunConfig, name: str) -> Iterator[str]:
    """Lines as they are known: a row for every layout compiled, then the frontier and its flags, for each phase.

    Args:
      config: the run; of its mesh, the tensor axis stays as it is.
      name: the pod's, as `spdf_jax.planning.pod_plan.describe_pod` takes it.

    Raises:
      InputError: the compiler is not there; no such pod; a phase with fewer sequences than devices, or that they do not divide.
    """
    tensor = max(1, config.mesh.tensor)
    pod, mesh = make_pod(MeshConfig(-1, 1, tensor), name)
    yield f"{pod.name}: {pod.size} devices; times {pod.about_times}"
    for plan in make_plan(replace(config, mesh=MeshConfig(-1, 1, tensor))):
        if plan.config.batch_size % mesh.shape["data"]:
            raise InputError(
                f"config.{plan.name}.batch_size: {plan.config.batch_size} sequences are not divisible by "
                f"{mesh.shape['data']} devices; use a multiple of it, or a larger --config.mesh.tensor"
            )
        yield f"{plan.name}: {plan.config.batch_size} sequences of {plan.seq_len} tokens a step"
        yield "  data x fsdp x tensor  remat  micro-batches  GiB a device  ms, estimated  utilisation"
        found = []
        for candidate in _compiled(config, plan, pod, tensor, state_bytes(config, plan, mesh)):
            found.append(candidate)
            yield _row(candidate, config, plan, pod)
        best = frontier([candidate for candidate in found if candidate.fits])
        yield "  the frontier, by time" if best else "  none fits: without --plan_search the plan says what does"
        for layout, device_bytes, _, seconds in best:
            yield f"  {1e3 * seconds:.1f} ms, {device_bytes / GIB:.2f} GiB: {flags(config, plan.name, layout)}"


def frontier(found: Sequence[Found]) -> list[Found]:
    """The layouts that no other beats, or equals, in both memory and time, the fastest first.

    >>> here = Layout("v5e:2x2", 1, 4, 1, 1, "block")
    >>> found = [Found(here, 3.0, True, 1.0), Found(here, 1.0, True, 2.0), Found(here, 2.0, True, 3.0)]
    >>> [(layout.device_bytes, layout.seconds) for layout in frontier(found)]
    [(3.0, 1.0), (1.0, 2.0)]
    """
    best: list[Found] = []
    for candidate in sorted(found, key=lambda candidate: (candidate.seconds, candidate.device_bytes)):
        if not best or candidate.device_bytes < best[-1].device_bytes:
            best.append(candidate)
    return best


def _compiled(config: RunConfig, plan: PhasePlan, pod: Pod, tensor: int, state: int) -> Iterator[Found]:
    """Every layout tried; `state` is what the phase's takes on a device if fsdp splits nothing, in bytes."""
    share, size = pod.size // tensor, pod.name.partition(":")[2]
    for fsdp in range(1, share + 1):
        if share % fsdp or config.model.d_model % fsdp or state / fsdp > pod.kind.hbm_bytes:
            continue
        accumulate = 1
        for remat in REMATS:
            layout: Layout | None = Layout(pod.name, share // fsdp, fsdp, tensor, accumulate, remat)
            while layout is not None:
                programs, need = compile_layout(config, plan.name, layout)
                times = programs[0].times
                yield Found(layout, need.device_bytes, need.fits, times.total if times and need.fits else 0.0)
                accumulate = layout.accumulate
                layout = None if need.fits else need.on(size, fsdp)
            if remat == REMATS[0] and not need.fits:
                break


def _row(found: Found, config: RunConfig, plan: PhasePlan, pod: Pod) -> str:
    layout, device_bytes, fits, seconds = found
    mesh = f"{layout.data} x {layout.fsdp} x {layout.tensor}"
    row = f"  {mesh:<20}  {layout.remat:<5}  {layout.accumulate:>13}  {device_bytes / GIB:>12.2f}"
    if not fits:
        return f"{row}  DOES NOT FIT"
    if not seconds:
        return row
    used = dense_flops(config, plan)[0] / (seconds * pod.size * pod.kind.peak_flops)
    return f"{row}  {1e3 * seconds:>13.1f}  {used:>11.1%}"
