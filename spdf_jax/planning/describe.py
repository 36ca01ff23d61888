"""``--job plan``: what a config will do, as a table, before anything runs."""

from functools import partial
from typing import Any

import jax

from spdf_jax.config.run import RunConfig
from spdf_jax.data import read_shares
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.flops import head_size, linear_size, parameter_count
from spdf_jax.model.gpt import GPT
from spdf_jax.ops.attention_backends import attention_backend
from spdf_jax.sharding import target_platform
from spdf_jax.training.phases import PhasePlan, make_plan, total_cost
from spdf_jax.training.state import abstract_params, abstract_state


def flops_without_head(config: RunConfig, plans: list[PhasePlan]) -> tuple[int, int]:
    """(train, dense) FLOPs of the whole run, the trained model's output head left out of both."""
    train = dense = 0
    head_name = "wte/embedding" if config.model.tied_head else "head/kernel"
    size = head_size(config.model)
    for plan in plans:
        tokens = plan.config.batch_size * plan.seq_len
        for step, count in plan.programme.alike(plan.config.steps).items():
            cost, active = plan.cost(step), plan.programme.active(step).get(head_name, size)
            weight_gradient = plan.programme.gradient_counts(step).get(head_name, size)
            train += count * (cost.train_flops - tokens * 2 * (2 * active + weight_gradient))
            dense += count * (cost.dense_flops - tokens * 6 * size)
    return train, dense


def describe(config: RunConfig, device_count: int = 1) -> str:
    """The table of ``--job plan``: parameters, FLOPs dense and sparse, bytes a device."""
    plans = make_plan(config)
    total = total_cost(plans)
    train, dense = flops_without_head(config, plans)
    lines = [
        f"{config.experiment}:{config.variant}",
        f"parameters              {parameter_count(config.model):,} "
        f"(linear {linear_size(config.model):,}, head {head_size(config.model):,} "
        f"{'tied' if config.model.tied_head else 'untied'})",
        f"active at the sparsest  {fewest_active(config, plans):,}",
    ]
    for plan in plans:
        lines += _describe_phase(plan, config.model, config.separates_documents(plan.config))
    shares = read_shares(config.data.mixture) if config.data.mixture else {}
    lines += [
        f"data                    {share / sum(shares.values()):.4g} of the examples from {name}"
        for name, share in shares.items()
    ]
    lines += [
        f"tokens                  {total.tokens:,}"
        + (" at most: a task's rows are padded to the longest of their batch" if _has_task(config) else ""),
        f"  in topology steps     {total.topology_tokens:,} (they update no weight)",
        f"train FLOPs             {total.train_flops:.4g}",
        f"dense FLOPs             {total.dense_flops:.4g}",
        f"FLOP reduction          {total.dense_flops / total.train_flops:.3f}x ({dense / train:.3f}x without the head)",
        f"state bytes a device    {state_bytes(config, plans[0]) // device_count:,} "
        f"(parameters, masks, optimiser; activations not counted)",
    ]
    if taught := max(teacher_bytes(plan) for plan in plans):
        lines.append(f"  and of a teacher      {taught // device_count:,} (parameters alone)")
    return "\n".join(lines)


def _has_task(config: RunConfig) -> bool:
    return any(phase.task.name for phase in config.phases.values())


def fewest_active(config: RunConfig, plans: list[PhasePlan]) -> int:
    """Parameters that are not masked at the run's sparsest step."""
    masked = 0
    for plan in plans:
        sizes = sum(group.count * group.size for group in plan.programme.groups.values())
        every = plan.programme.alike(plan.config.steps)
        masked = max(masked, *(sizes - sum(plan.programme.active(step).values()) for step in every))
    return parameter_count(config.model) - masked


def state_bytes(config: RunConfig, plan: PhasePlan) -> int:
    """Bytes of parameters, masks and optimiser state together."""
    state: Any = abstract_state(GPT(config.model), plan.tx, plan.config.sparsity, plan.filter)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.replace(step=None, key=None)))


def teacher_bytes(plan: PhasePlan) -> int:
    """Bytes of the parameters of a phase's teacher; 0 without one."""
    params = abstract_params(GPT(plan.teacher())) if plan.teacher else ()
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def _describe_phase(plan: PhasePlan, model: GPTConfig, segments: bool) -> list[str]:
    sparsity, steps, c = plan.programme.sparsity, plan.config.steps, plan.config.sparsity
    most = max(map(sparsity, plan.programme.alike(steps)))
    levels = f"{sparsity(0):.3f} at first, {most:.3f} at most, {sparsity(steps - 1):.3f} at last"
    window = c.attention_end > c.attention_start
    patterns = dict.fromkeys(("causal", c.attention_pattern) if window else ("causal",))
    backend = partial(
        attention_backend,
        dtype=model.dtype,
        head_size=model.head_width,
        length=plan.seq_len,
        segments=segments,
    )
    backends = (f"{pattern} by {backend(pattern, platform=target_platform())}" for pattern in patterns)
    tokens = f"{plan.config.batch_size} x {plan.seq_len} = {plan.config.batch_size * plan.seq_len:,} tokens"
    return [
        f"phase {plan.name:<18}{plan.config.steps:,} steps of {tokens}",
        "  sparsity              "
        + ("none" if c.dense else f"{levels}; rule {c.rule}, head {'sparse' if c.sparsify_head else 'dense'}")
        + (f", in live blocks of {c.pattern.removeprefix('block')} alone" if c.blocks else ""),
        *_describe_teacher(plan),
        f"  attention             {', '.join(backends)}"
        f"{f' on [{c.attention_start:g}, {c.attention_end:g}) of the phase' if window else ''}"
        f"{', within documents' if segments else ''}",
    ]


def _describe_teacher(plan: PhasePlan) -> list[str]:
    if plan.teacher is None:
        return []
    c, size = plan.config.distill, parameter_count(plan.teacher())
    return [
        f"  teacher               {c.teacher}, {size:,} parameters, {c.weight:g} of the loss at temperature {c.temperature:g}"
    ]
