"""``--job plan --plan_topology v5e:16x16`` or ``h100:2x8``: the real steps, compiled for a pod that is not there.

It needs the pod's compiler, the extra ``tpu`` or ``plan_gpu``, and no device. ``cost_analysis()["optimal_seconds"]`` would be
libtpu's own time, but a loop's body is in it once, and every instruction without an estimate as -1 second; for GPUs it is None.
So `spdf_jax.planning.hlo` reads the program, and `spdf_jax.planning.pod` times it from what the compiler put down in it.
"""

import math
import re
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spdf_jax.config.checks import check_devices
from spdf_jax.config.run import RunConfig
from spdf_jax.data import Batch
from spdf_jax.errors import InputError
from spdf_jax.model.flops import step_flops
from spdf_jax.model.gpt import GPT
from spdf_jax.planning.describe import describe
from spdf_jax.planning.gpu import gpu_pod
from spdf_jax.planning.hlo import Items, executed, executed_collectives, matrix_flops, read_program
from spdf_jax.planning.pod import GIB, Layout, Need, Pod, Times, estimate, suggest
from spdf_jax.planning.tpu import tpu_pod
from spdf_jax.sharding import MeshConfig, batch_devices, batch_sharding, make_mesh, parameter_shardings
from spdf_jax.training.phases import PhasePlan, make_plan
from spdf_jax.training.programs import make_steps
from spdf_jax.training.state import TrainState, abstract_params, abstract_state, state_shardings
from spdf_jax.training.step import move_topology

EXAMPLES = "v5e:4x4, v5e-256, v6e:16x16, v4:4x4x4, v5p:4x4x4, tpu7x:2x2x1, h100:8, h200:2x8"
# What libtpu says of memory, by its version; what it calls temporaries are arguments too.
_WANTED = re.compile(r"(?:total memory required[^(]*\(|Used )([\d.]+)([KMGT])")


@dataclass(frozen=True)
class Program:
    """A compiled program, read.

    Attributes:
      name: what it is.
      device_bytes: memory on each device; where that was too much for the compiler, what it wanted.
      compile_seconds: on this machine.
      items: from `spdf_jax.planning.hlo.read_program`; () where the compiler gave up.
      times: from `spdf_jax.planning.pod.estimate`; None where the compiler put nothing down.
      flops: of matrix products on each device, those of attention's kernels included.
      left_out: kernels that `times` and `flops` leave out, and how often they run.
    """

    name: str
    device_bytes: float
    compile_seconds: float
    items: Items = ()
    times: Times | None = None
    flops: int = 0
    left_out: tuple[tuple[str, int], ...] = ()


def describe_pod(config: RunConfig, name: str) -> str:
    """The table of ``--job plan --plan_topology``.

    Args:
      config: the run; its mesh must take every device.
      name: the pod's, as `spdf_jax.planning.tpu` or `spdf_jax.planning.gpu` knows it.

    Raises:
      InputError: the compiler is not there; no such pod; a mesh or batch that does not fit it.
    """
    pod, mesh = make_pod(config.mesh, name)
    check_devices(config, batch_devices(mesh))
    kind, axes = pod.kind, " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    # Attention is chosen for the pod; what `describe` computes is computed here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        table = describe(config, mesh.shape["fsdp"] * mesh.shape["tensor"])
    lines = [
        table,
        f"{pod.name:<24}{mesh.size} devices of {kind.peak_flops / 1e12:.0f} TFLOP/s and {kind.hbm_bytes / GIB:.2f} GiB"
        f"{pod.about_memory}, mesh {axes}, remat {config.model.remat}",
        f"  times                 {pod.about_times}",
    ]
    for plan in make_plan(config):
        programs, need = compile_phase(config, plan, pod, mesh)
        for program in programs:
            lines += _describe_program(program, config, plan, pod)
        lines += [
            f"  state                 {state_bytes(config, plan, mesh) / GIB:.3g} GiB a device",
            f"  suggestion            {_smallest(need, config, plan)}",
        ]
    return "\n".join(lines)


def compile_phase(config: RunConfig, plan: PhasePlan, pod: Pod, mesh: Mesh) -> tuple[list[Program], Need]:
    """The phase's steps as `lower_steps` has them, compiled for the pod, and what they need there."""
    how = plan.programme.attention(0)
    programs = [_compile(f"{plan.name}: {name}", step, pod, *how) for name, step in lower_steps(config, plan, mesh)]
    gradient_bytes = sum(map(_device_bytes, jax.tree.leaves(phase_state(config, plan, mesh).params)))
    need = Need(
        pod,
        Layout(pod.name, **mesh.shape, accumulate=plan.config.grad_accumulation_steps, remat=config.model.remat),
        batch_size=plan.config.batch_size,
        d_model=config.model.d_model,
        split_bytes=state_bytes(config, plan, mesh) + gradient_bytes,
        device_bytes=max(program.device_bytes for program in programs),
    )
    return programs, need


def compile_layout(config: RunConfig, phase: str, layout: Layout) -> tuple[list[Program], Need]:
    """`compile_phase` of a phase that is laid out so."""
    laid_out = replace(config.phases[phase], grad_accumulation_steps=layout.accumulate)
    config = replace(
        config,
        model=replace(config.model, remat=layout.remat),
        mesh=MeshConfig(layout.data, layout.fsdp, layout.tensor),
        phases={**config.phases, phase: laid_out},
    )
    plan = next(plan for plan in make_plan(config) if plan.name == phase)
    return compile_phase(config, plan, *make_pod(config.mesh, layout.pod))


def flags(config: RunConfig, phase: str, layout: Layout) -> str:
    """`Layout.flags`, and what else must change with the mesh."""
    share, at_once = layout.data * layout.fsdp, config.loop.eval_batch_size
    evaluated = f" --config.loop.eval_batch_size={-(-at_once // share) * share}" if at_once % share else ""
    return layout.flags(phase) + evaluated


def _smallest(need: Need, config: RunConfig, plan: PhasePlan) -> str:
    """What `suggest` says, compiled, and again from there until it fits."""
    first = need
    while (layout := suggest(need)) is not None and not (first.fits and layout.devices >= first.pod.size):
        _, need = compile_layout(config, plan.name, layout)
        if need.fits:
            pod = "" if layout.pod == first.pod.name else f"--plan_topology={layout.pod} "
            found = "the smallest that does is" if first.fits else "it takes" if pod else "it fits with"
            return f"{found} {pod}{flags(config, plan.name, layout)} ({need.device_bytes / GIB:.2f} GiB a device)"
    if first.fits:
        return "no smaller pod does"
    less = "--config.model.remat=block, or " if config.model.remat != "block" else ""
    return f"no {first.layout.pod.partition(':')[0]} pod does: set {less}a larger --config.mesh.tensor"


def make_pod(config: MeshConfig, name: str) -> tuple[Pod, Mesh]:
    """The pod, and the mesh over it. Raises as `describe_pod` does."""
    pod: Pod | None = tpu_pod(name) or gpu_pod(name)
    if pod is None:
        raise InputError(f"--plan_topology: {name!r} is no pod; for example {EXAMPLES}")
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", False)  # what is for devices elsewhere cannot be read back
    compilation_cache.reset_cache()  # which has been asked for, and remembers

    try:
        devices = pod.devices()
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"--plan_topology: {name!r} is no pod ({reason}); for example {EXAMPLES}") from None
    mesh = make_mesh(config, devices)
    if mesh.size < len(devices):
        raise InputError(f"config.mesh: {config} takes {mesh.size} of {len(devices)} devices; set a size to -1")
    return pod.over(mesh), mesh


def phase_state(config: RunConfig, plan: PhasePlan, mesh: Mesh) -> TrainState:
    """Shapes and shardings of a phase's state."""
    state = abstract_state(GPT(config.model), plan.tx, plan.config.sparsity, plan.filter)
    shardings = state_shardings(mesh, plan.tx, state)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def state_bytes(config: RunConfig, plan: PhasePlan, mesh: Mesh) -> int:
    """Of a phase's parameters, masks and optimiser state on a device."""
    state = phase_state(config, plan, mesh)
    return sum(map(_device_bytes, jax.tree.leaves((state.params, state.masks, state.opt_state))))


def _device_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def lower_steps(config: RunConfig, plan: PhasePlan, mesh: Mesh) -> list[tuple[str, Any]]:
    """The phase's train step and, where topology moves, its topology step and what that does after the gradient.

    Args:
      config: the run.
      plan: of the phase.
      mesh: of chips that need not be there.

    Returns:
      What it is, and the `jax.stages.Lowered`, of each.
    """
    phase, rule, regrowth = plan.config, plan.programme.config.topology_rule, plan.config.optimizer.regrowth
    state = phase_state(config, plan, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    shape_ABT = (phase.grad_accumulation_steps, phase.batch_size // phase.grad_accumulation_steps, plan.seq_len)
    array_ABT = partial(jax.ShapeDtypeStruct, shape_ABT, sharding=batch_sharding(mesh, 3))
    segments_ABT = array_ABT(jnp.int32) if config.separates_documents(phase) else None
    batch_ABT: Any = Batch(array_ABT(jnp.int32), array_ABT(jnp.int32), array_ABT(jnp.float32), segments_ABT)  # type: ignore[arg-type]
    groups = plan.programme.groups
    # As the loop gives them: numbers from the host, laid out nowhere.
    target_nnz = {name: jax.ShapeDtypeStruct((g.count,), jnp.int32) for name, g in groups.items()}
    targets = (target_nnz, jax.ShapeDtypeStruct((), jnp.float32))
    steps = make_steps(GPT(config.model), plan.tx, plan.learning_rate, rule, shardings, regrowth)
    pattern, width = plan.programme.attention(0)

    with jax.set_mesh(mesh):
        chosen = [target_nnz] if rule.choose_each_step else []
        train = steps.train.lower(state, batch_ABT, *chosen, pattern=pattern, width=width)
        if not rule.moves:
            return [("train step", train)]
        topology = steps.topology.lower(state, batch_ABT, *targets, pattern=pattern, width=width)
        alone = jax.jit(partial(move_topology, plan.tx, rule, regrowth), out_shardings=shardings)
        moved = alone.lower(state, _whole_gradients(config, plan, mesh), *targets)
        return [("train step", train), ("topology step", topology), ("prune and grow alone", moved)]


def _whole_gradients(config: RunConfig, plan: PhasePlan, mesh: Mesh) -> Any:
    """Shapes and shardings of the dense gradient, of kernels stored as blocks too."""
    params = abstract_params(GPT(config.model))
    shardings = parameter_shardings(mesh, params)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings)


def _compile(name: str, lowered: Any, pod: Pod, pattern: str, width: int) -> Program:
    started = time.perf_counter()
    try:
        compiled = lowered.compile(dict(pod.compiler_options) or None)
    except jax.errors.JaxRuntimeError as error:
        wanted = _WANTED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not wanted:
            raise
        return Program(name, float(wanted[1]) * 1024 ** (1 + "KMGT".index(wanted[2])), time.perf_counter() - started)
    seconds, memory = time.perf_counter() - started, compiled.memory_analysis()
    items = read_program(compiled.as_text())
    kernels = [(times, i, pod.attention_flops(i, pattern, width)) for times, i in executed(items) if i.kernel]
    left_out: Counter[str] = Counter()
    for times, kernel, flops in kernels:
        left_out[kernel.kernel] += 0 if flops else times
    return Program(
        name,
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes,
        seconds,
        items,
        estimate(items, pod, partial(pod.attention_seconds, pattern=pattern, width=width)) if pod.timed else None,
        matrix_flops(items) + sum(times * flops for times, _, flops in kernels),
        tuple((+left_out).items()),
    )


def _describe_program(program: Program, config: RunConfig, plan: PhasePlan, pod: Pod) -> list[str]:
    holds = pod.kind.hbm_bytes
    missing = (program.device_bytes - holds) / GIB
    fits = "fits" if missing <= 0 else f"DOES NOT FIT, by {missing:.2f} GiB"
    lines = [
        f"{program.name}, compiled in {program.compile_seconds:.0f} s",
        f"  memory a device       {program.device_bytes / GIB:.2f} GiB of {holds / GIB:.2f} GiB: {fits}",
    ]
    if not program.items:
        return lines
    lines.append(f"  matrix FLOPs a device {program.flops:.3g}")
    if program.times:
        lines += _describe_times(program.times, config, plan, pod, bool(program.flops))
    lines += [f"  left out              kernel {name}, {times} times" for name, times in program.left_out]
    return lines + collective_table(program.items)


def dense_flops(config: RunConfig, plan: PhasePlan) -> tuple[int, int]:
    """FLOPs of a step of the dense model, all of attention's square counted, and half of it: what causal attention takes."""
    sequences, length = plan.config.batch_size, plan.seq_len
    dense = step_flops(config.model, seq_len=length, sequences=sequences, active={})
    return dense, dense - 6 * sequences * length**2 * config.model.attention_width * config.model.n_layer


def _describe_times(t: Times, config: RunConfig, plan: PhasePlan, pod: Pod, multiplies: bool) -> list[str]:
    waiting = t.total - t.computing - t.kernels
    lines = [
        f"  time, estimated       {1e3 * t.total:.1f} ms: computing {1e3 * t.computing:.1f}, "
        f"{pod.attention} {1e3 * t.kernels:.1f}, waiting for collectives {1e3 * waiting:.1f} of the "
        f"{1e3 * t.collectives:.1f} that they take",
    ]
    if multiplies:
        dense, half = dense_flops(config, plan)
        peak, apart = pod.size * pod.kind.peak_flops, t.computing + t.kernels + t.collectives
        lines.append(
            f"  utilisation           {dense / peak / t.total:.1%} of the peak by the dense model's FLOPs; "
            f"{dense / peak / apart:.1%} with no collective beside anything, "
            f"{half / peak / t.total:.1%} with half of attention's FLOPs"
        )
    return lines


def collective_table(items: Items) -> list[str]:
    """A program's collectives by kind, as executed: how many, and their `spdf_jax.planning.hlo.Collective.bytes`."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for times, collective in executed_collectives(items):
        found[collective.kind].append((times, collective.bytes))
    return [
        f"  {kind:<22}{sum(n for n, _ in ran):,} times, {_amount(sum(n * b for n, b in ran))} in all, at most "
        f"{_amount(max(b for _, b in ran))}"
        for kind, ran in sorted(found.items())
    ]


def _amount(n: float) -> str:
    thousands = min(3, int(math.log10(max(1, n))) // 3)
    return f"{n / 1000**thousands:.3g} {('bytes', 'kB', 'MB', 'GB')[thousands]}"
