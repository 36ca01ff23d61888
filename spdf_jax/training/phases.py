"""What a config will do, worked out before anything runs: its phases, exact sparsity targets, tokens and FLOPs."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spdf_jax.config.checks import check_length
from spdf_jax.config.run import PhaseConfig, RunConfig
from spdf_jax.data import load_task, steps_per_epoch
from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.flops import step_flops
from spdf_jax.model.gpt import GPT
from spdf_jax.model.mupar import mup_multipliers
from spdf_jax.optim import learning_rate_schedule, make_optimizer
from spdf_jax.sparsity.masks import matrix_groups
from spdf_jax.sparsity.programme import Programme
from spdf_jax.training.average import averaged
from spdf_jax.training.state import abstract_params, sparse_filter
from spdf_jax.tree import Filter


class StepCost(NamedTuple):
    """Exact counts of one step, or summed over steps.

    Attributes:
      tokens: read from the data; what fills rows up is none.
      train_flops, dense_flops: of all positions that are computed, by a machine that skips zeros and without masks.
      padded_tokens: positions that are computed, what fills rows up included.
      topology_tokens: of `tokens`, those of topology steps, which update no weight.
    """

    tokens: int = 0
    train_flops: int = 0
    dense_flops: int = 0
    padded_tokens: int = 0
    topology_tokens: int = 0

    def plus(self, other: "StepCost", count: int = 1) -> "StepCost":
        """Sum with `count` steps like `other`."""
        return StepCost(*(a + b * count for a, b in zip(self, other, strict=True)))

    def of_tokens(self, tokens: int) -> "StepCost":
        """The same step with so many tokens in its rows."""
        return self._replace(tokens=tokens, topology_tokens=tokens if self.topology_tokens else 0)


class Begin(NamedTuple):
    """Where a run begins that goes on from another's whole state.

    Attributes:
      step: of the other run, from which steps are counted on.
      example: of its data, as many as it was trained on; of a task, whose batches are cut by epoch, in batches of this run's.
      order: the number of that data's order, of those that are drawn from one seed: one a phase.
    """

    step: int = 0
    example: int = 0
    order: int = 0


_AT_ZERO = Begin()


@jax.jit
def task_tokens(weights_ABT: jax.Array) -> jax.Array:
    """Positions of a task's rows up to their last target: what comes after fills them up."""
    ends_11T = jnp.arange(1, weights_ABT.shape[-1] + 1)[None, None]
    return jnp.sum(jnp.max(jnp.where(weights_ABT > 0, ends_11T, 0), axis=-1))


@dataclass(frozen=True)
class PhasePlan:
    """A phase ready to run: steps ``start .. end`` of the run and everything static about them."""

    name: str
    index: int
    start: int
    end: int
    config: PhaseConfig
    seq_len: int  # 0 of a model of the caller's own, whose batches hold no tokens that could be counted
    filter: Filter
    programme: Programme
    tx: optax.GradientTransformationExtraArgs
    learning_rate: Callable[[jax.Array], jax.Array] | None  # None: `tx` has its own
    cost: Callable[..., StepCost]  # of a step; (step, seq_len) where its rows are shorter than the phase's
    epoch_steps: int  # 0 where the phase is counted in steps
    eval_every_steps: int  # 0 where there is nothing to evaluate on
    first_example: int = 0  # of its data's order, see `Begin`
    order: int = 0

    @property
    def begin(self) -> Begin:
        """Where the phase begins."""
        return Begin(self.start, self.first_example, self.order)

    def evaluates_after(self, step: int) -> bool:
        """Whether there is an evaluation after `step` steps of the run: at intervals or epochs, and at the end."""
        since, every = (step - self.start, self.epoch_steps) if self.epoch_steps else (step, self.eval_every_steps)
        return every > 0 and (step == self.end or since % every == 0)

    def attention_after(self, step: int) -> tuple[str, int]:
        """Attention pattern and width of the model that the run's first `step` steps made: those of the last of them.

        Whatever uses a state, be it evaluation, decoding or export, takes these.
        """
        return self.programme.attention(max(0, step - self.start - 1))

    @cached_property
    def picture_steps(self) -> set[int]:
        """Phase steps before which masks are pictured: first, first of the sparsest, end; where masks move, at eighths too."""
        if not self.programme.groups:
            return set()
        steps, every = self.config.steps, self.programme.alike(self.config.steps + 1)
        sparsest = max(every, key=lambda step: (self.programme.sparsity(step), -step))
        rule = self.programme.config.topology_rule
        moves = rule.moves or rule.choose_each_step is not None
        return {0, sparsest, steps} | {eighth * steps // 8 for eighth in range(1, 8) if moves}


def make_plan(config: RunConfig, begin: Begin = _AT_ZERO) -> list[PhasePlan]:
    """The phases of a run in order. Epochs become steps here, which reads the task's files."""
    plans: list[PhasePlan] = []
    start = begin.step
    params = abstract_params(GPT(config.model))
    for index, (name, phase) in enumerate(config.phases.items()):
        epoch_steps = 0
        if phase.epochs:
            pairs = sum(len(example.references) for example in load_task(phase.task).train)
            epoch_steps = steps_per_epoch(pairs, phase.batch_size)
            phase = dataclasses.replace(phase, steps=phase.epochs * epoch_steps)
            check_length(name, phase)
        filter = sparse_filter(phase.sparsity, config.model.tied_head)
        try:
            programme = Programme(phase.sparsity, matrix_groups(params, filter), phase.steps)
        except InputError as error:
            raise InputError(f"config.{name}: {error}") from None
        plans.append(
            PhasePlan(
                name=name,
                index=index,
                start=start,
                end=start + phase.steps,
                config=phase,
                seq_len=config.seq_len(phase),
                filter=filter,
                programme=programme,
                tx=_optimizer(config.model, phase, programme),
                learning_rate=learning_rate_schedule(phase.optimizer, phase.steps, start),
                cost=_cost(config, phase, programme),
                epoch_steps=epoch_steps,
                eval_every_steps=config.loop.eval_every_steps,
                first_example=0 if index else begin.example,
                order=begin.order + index,
            )
        )
        start += phase.steps
    return plans


def _optimizer(model: GPTConfig, phase: PhaseConfig, programme: Programme) -> optax.GradientTransformationExtraArgs:
    wrap = programme.config.topology_rule.optimizer
    tx = make_optimizer(phase.optimizer, _multipliers(model, phase.sparsity.density), wrap)
    return averaged(tx, phase.ema_decay) if phase.ema_decay else tx


@cache  # as optimisers are: what is made of equal configs is one object, which compiled steps are known by
def _multipliers(config: GPTConfig, density: float) -> Callable[[Any], Any] | None:
    """S-muPar's, at the phase's own density."""
    return partial(mup_multipliers, dataclasses.replace(config, mup_density=density)) if config.mup_base_width else None


def _cost(config: RunConfig, phase: PhaseConfig, programme: Programme) -> Callable[..., StepCost]:
    """Cost of a phase's step, of full rows unless their length is given; equal steps are computed once."""

    def totals(counts: Mapping[str, int]) -> dict[str, int]:
        return {name: n * programme.groups[name].count for name, n in counts.items()}

    @cache
    def flops(active: Any, gradient: Any, seq_len: int, pattern: str, width: int) -> int:
        return step_flops(
            config.model,
            seq_len=seq_len,
            sequences=phase.batch_size,
            active=totals(dict(active)),
            gradient=totals(dict(gradient)),
            pattern=pattern,
            width=width,
        )

    def cost(step: int, seq_len: int = 0) -> StepCost:
        length = seq_len or config.seq_len(phase)
        tokens = phase.batch_size * length
        active, gradient = (tuple(f(step).items()) for f in (programme.counts, programme.gradient_counts))
        sparse = flops(active, gradient, length, *programme.attention(step))
        dense = flops((), (), length, "causal", 1)
        return StepCost(tokens, sparse, dense, tokens, 0 if programme.topology(step) is None else tokens)

    return cost


def total_cost(plans: list[PhasePlan], steps: int | None = None) -> StepCost:
    """Tokens and FLOPs of the first `steps` steps of a run, all of them by default."""
    last = plans[-1].end if steps is None else steps  # counted as the plans are
    total = StepCost()
    for plan in plans:
        for step, count in plan.programme.alike(max(0, min(plan.end, last) - plan.start)).items():
            total = total.plus(plan.cost(step), count)
    return total


def recorded_cost(record: dict[str, Any], plans: list[PhasePlan], step: int) -> StepCost:
    """What the run has cost so far; a record of a release that counted full rows alone does not say all of it."""
    if set(StepCost._fields) <= record.keys():
        return StepCost(*(record[name] for name in StepCost._fields))
    return total_cost(plans, step)


def run_cost(config: RunConfig) -> StepCost:
    """What a run will cost, counted before it starts: the figures that its ``summary.json`` will hold.

    Args:
      config: from `spdf_jax.resolve`.

    Returns:
      ``(tokens, train_flops, dense_flops, padded_tokens, topology_tokens)`` of the whole run: FLOPs of a machine that skips
      zeros, and of the same model and tokens without masks; tokens of topology steps, which update no weight. Exact integers,
      by the formula in `spdf_jax.model.flops`; of a task, whose batches are as long as their rows, at most these.

    Raises:
      InputError: a phase counted in epochs whose task files are not there.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "mini", variants=("mini",))
    >>> c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "static", 0.75
    >>> cost = run_cost(spdf.resolve(c))
    >>> cost.tokens, round(cost.dense_flops / cost.train_flops, 2)
    (2457600, 2.0)
    """
    return total_cost(make_plan(config))
