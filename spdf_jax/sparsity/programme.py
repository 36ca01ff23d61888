"""A sparsity programme: distribution x pattern x schedule x rule (and attention window) of a phase, by functions of the step.

Everything here is integer arithmetic on the host and depends on the config alone: what the masks hold at any step, which
steps are topology steps, what they aim for, and what every step costs. A resumed run needs no schedule state but its step.
"""

import bisect
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from typing import Annotated, Any, NamedTuple

from spdf_jax.errors import InputError
from spdf_jax.fields import Count, CountOrZero, Line, OneOf, Range, Share, Used, check_fields, used_with
from spdf_jax.ops import attention_patterns
from spdf_jax.sparsity import schedules
from spdf_jax.sparsity.block_topology import block_grid
from spdf_jax.sparsity.distributions import DISTRIBUTIONS, MatrixGroup, target_counts
from spdf_jax.sparsity.one_shot import CALIBRATED_METHODS, PRUNING_METHODS
from spdf_jax.sparsity.patterns import parse_pattern
from spdf_jax.sparsity.rules import RULES, check_rule, check_score
from spdf_jax.sparsity.topk import check_floor
from spdf_jax.sparsity.topology import Rule

SCHEDULES = ("constant", "linear", "cubic", "three_phases", "table", "alternate")

# What uses which field of `SparsityConfig`.
SPARSE = Used(lambda c: not c.dense, "rules other than 'dense'")
LEVEL = Used(
    lambda c: not c.dense and c.schedule != "table", "rules other than 'dense' with schedules other than 'table'"
)
EXCHANGE = Used(lambda c: c.exchanges, "rules that exchange weights")
MOVES = Used(lambda c: c.exchanges or bool(c.curve.ramps), "rules that exchange weights and schedules with a ramp")
SHARE = Used(
    lambda c: c.topology_rule.moves and not c.topology_rule.choose_masks, "rules that exchange a share of the weights"
)
EXPLORED = Used(lambda c: not c.dense and RULES[c.rule].exploration > 0, "rules that explore, such as 'topkast'")
CHOSEN = Used(
    lambda c: not c.dense and c.topology_rule.choose_masks is None and c.curve(0.0) > 0,
    "masks that are sparse from the first step and that the rule does not choose itself",
)
CALIBRATED = Used(lambda c: c.init in CALIBRATED_METHODS, f"an init out of {', '.join(CALIBRATED_METHODS)}")
EVERY_STEP = Used(lambda c: c.topology_rule.choose_each_step is not None, "rules that choose at every step: 'topk'")
WINDOW = Used(lambda c: c.attention_end > c.attention_start, "phases with attention_end above attention_start")
ATTENTION = Used(lambda c: c.attention_pattern != "causal", "an attention_pattern other than 'causal'")


@dataclass(frozen=True)
class SparsityConfig:
    """One phase's sparsity.

    Attributes:
      rule: ``dense`` (no masks; entering the phase drops them), or a name of `spdf_jax.RULES`.
      sparsity: the constant, final or peak sparsity over the sparse matrices, in [0, 1).
      distribution: ``uniform`` | ``er`` | ``erk`` | ``er_qkv``, see `spdf_jax.sparsity.distributions`.
      pattern: ``unstructured`` | ``N:M`` | ``blockB``, see `spdf_jax.sparsity.patterns`.
      sparse_compute: ``masked``: dense products of masked weights; ``blocks``: live blocks alone are stored and computed, the
        same number in every row and column of blocks (`spdf_jax.sparsity.blocks`). For ``constant`` sparsity in ``blockB``.
      schedule: ``constant`` | ``linear`` | ``cubic`` | ``three_phases`` (MST) | ``table`` | ``alternate`` (AC/DC).
      ramp_end: progress at which ``linear`` and ``cubic`` arrive, MST's warm-up ends, or AC/DC's dense one.
      ultra_end: progress at which MST's ultra-sparse phase ends; from it on ``alternate`` stays sparse.
      restoration_end: progress at which MST's restoration has arrived at dense.
      cycles: pairs of a sparse and a dense turn of ``alternate``.
      table: ``((progress, sparsity), ...)`` for ``table``.
      update_every_steps: topology step interval. There is a topology step at every turn of the schedule besides, and at the
        quarters of a ramp that is shorter than two intervals.
      stop_fraction: no topology steps past this progress (RigL: 0.75), which the schedule's last turn must not be.
      drop_fraction: initial share exchanged; -1 takes the rule's.
      exploration: share of the weights that get gradients without being active (Top-KAST); -1 takes the rule's.
      sparsify_head: whether the output head (tied to the embedding or not) is sparse too.
      leaves: ``kernels`` of the layers, or ``all``: embeddings, head and biases of linear layers too, as in arXiv 2511.13653.
      floor_per_neuron: weights that each output of a layer's kernel keeps at least (`spdf_jax.sparsity.topk`).
      init: ``random`` or ``magnitude`` initial masks; ``wanda``, ``sparsegpt``: a dense model pruned by `spdf_jax.prune_once`.
      calibration_sequences: how many of the phase's first training sequences these look at, in whole batches.
      attention_pattern: which keys a query sees between the next two; see `spdf_jax.ops.attention_patterns`.
      attention_width: tokens of that pattern's window, or its stride.
      attention_start: progress from which `attention_pattern` is used; attention is causal before.
      attention_end: progress from which attention is causal again.
    """

    rule: Annotated[str, OneOf(RULES, ("dense",))] = "dense"
    sparsity: Annotated[float, Range(least=0, below=1), LEVEL] = 0.0
    distribution: Annotated[str, OneOf(DISTRIBUTIONS), SPARSE] = "uniform"
    pattern: Annotated[Line, SPARSE] = "unstructured"
    sparse_compute: Annotated[str, OneOf(("masked", "blocks")), SPARSE] = "masked"
    schedule: Annotated[str, OneOf(SCHEDULES), SPARSE] = "constant"
    ramp_end: Annotated[Share, used_with("schedule", "linear", "cubic", "three_phases", "alternate")] = 0.1
    ultra_end: Annotated[Share, used_with("schedule", "three_phases", "alternate")] = 0.75
    restoration_end: Annotated[Share, used_with("schedule", "three_phases")] = 0.9
    cycles: Annotated[Count, used_with("schedule", "alternate")] = 5
    table: Annotated[tuple[tuple[float, float], ...], Range(least=0, most=1), used_with("schedule", "table")] = ()
    update_every_steps: Annotated[Count, MOVES] = 100
    stop_fraction: Annotated[Share, EXCHANGE] = 1.0
    drop_fraction: Annotated[float, Range(least=0, most=1, special=-1), SHARE] = -1.0
    exploration: Annotated[float, Range(least=0, most=1, special=-1), EXPLORED] = -1.0
    sparsify_head: Annotated[bool, Used(lambda c: not c.dense and c.leaves != "all", "leaves 'kernels'")] = False
    leaves: Annotated[str, OneOf(("kernels", "all")), SPARSE] = "kernels"
    floor_per_neuron: Annotated[CountOrZero, EVERY_STEP] = 0
    init: Annotated[str, OneOf(("random", *PRUNING_METHODS)), CHOSEN] = "random"
    calibration_sequences: Annotated[Count, CALIBRATED] = 128
    attention_pattern: Annotated[str, OneOf(attention_patterns.PATTERNS), WINDOW] = "causal"
    attention_width: Annotated[Count, ATTENTION] = 128
    attention_start: Annotated[Share, ATTENTION] = 0.0
    attention_end: Annotated[Share, ATTENTION] = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "sparsity")
        if not self.dense:
            check_rule(self.rule)
        follows = self.topology_rule.schedules
        if not self.dense and follows and self.schedule not in follows:
            raise InputError(
                f"sparsity.schedule: rule {self.rule!r} cannot follow {self.schedule!r}; "
                f"use {' or '.join(map(repr, follows))}, or another rule"
            )
        if parse_pattern(self.pattern).m > 1 and self.schedule in ("linear", "cubic", "three_phases"):
            raise InputError(
                f"sparsity.schedule: pattern {self.pattern} has one sparsity besides 0 and cannot follow {self.schedule!r}; "
                f"use 'constant', 'table' or 'alternate'"
            )
        for stage in self.curve.stages:
            target_counts({}, self.curve(stage), self.distribution, self.pattern)  # refuses what cannot be
        if not self.dense and self.curve.turns and self.curve.turns[-1] > self.stop_fraction:
            raise InputError(
                f"sparsity.stop_fraction: {self.stop_fraction:g} ends the topology steps before schedule {self.schedule!r} "
                f"has arrived, at {self.curve.turns[-1]:g}; use at least that, or shorten the schedule"
            )
        for name, value in {"pattern": "unstructured", "distribution": "uniform"}.items():
            least = "leaves 'all'" if self.leaves == "all" and not self.dense else f"rule {self.rule!r}"
            if getattr(self, name) != value and (least[0] == "l" or self.topology_rule.choose_each_step):
                raise InputError(f"sparsity.{name}: {getattr(self, name)!r} does not go with {least}; use {value!r}")
        if self.blocks:
            self._check_blocks()

    @property
    def dense(self) -> bool:
        """No masks at all."""
        return self.rule == "dense"

    @property
    def density(self) -> float:
        """Share of weights that `sparsity` leaves: constant, final or lowest; 1 without masks."""
        return 1.0 if self.dense else 1 - self.sparsity

    @property
    def exchanges(self) -> bool:
        """Whether weights come and go under one sparsity too."""
        rule = self.topology_rule
        return rule.moves and (rule.drop_fraction > 0 or rule.choose_masks is not None)

    @property
    def blocks(self) -> bool:
        """Whether live blocks alone are stored and computed."""
        return not self.dense and self.sparse_compute == "blocks"

    def _check_blocks(self) -> None:
        needed = {"schedule": "constant", "distribution": "uniform", "sparsify_head": False}
        for name, value in needed.items():
            if getattr(self, name) != value:
                raise InputError(
                    f"sparsity.{name}: {getattr(self, name)!r} does not go with sparse_compute 'blocks'; use {value!r}, or "
                    f"sparse_compute 'masked'"
                )
        if parse_pattern(self.pattern).block == 1:
            raise InputError(
                f"sparsity.pattern: sparse_compute 'blocks' needs blocks such as 'block64', not {self.pattern!r}"
            )
        if self.topology_rule.choose_masks:
            raise InputError(
                f"sparsity.rule: {self.rule!r} keeps values outside its masks, for which sparse_compute 'blocks' has no room; "
                f"use another rule, or sparse_compute 'masked'"
            )

    @cached_property  # asked for at every step of a plan
    def topology_rule(self) -> Rule:
        """The rule with this config's pattern, drop fraction and exploration."""
        rule = RULES["static" if self.dense else self.rule]._replace(pattern=self.pattern, floor=self.floor_per_neuron)
        if self.drop_fraction >= 0:
            rule = rule._replace(drop_fraction=self.drop_fraction)
        return rule if self.exploration < 0 else rule._replace(exploration=self.exploration)

    @cached_property
    def curve(self) -> schedules.Curve:
        """Sparsity over progress."""
        if self.schedule == "linear":
            return schedules.linear(self.sparsity, 0.0, self.ramp_end)
        if self.schedule == "cubic":
            return schedules.cubic(self.sparsity, 0.0, self.ramp_end)
        if self.schedule == "three_phases":
            return schedules.three_phases(self.sparsity, self.ramp_end, self.ultra_end, self.restoration_end)
        if self.schedule == "table":
            return schedules.step_table(dict(self.table))
        if self.schedule == "alternate":
            return schedules.alternate(self.sparsity, self.ramp_end, self.ultra_end, self.cycles)
        return schedules.constant(self.sparsity)


class TopologyTarget(NamedTuple):
    """What one topology step aims for: active weights of one matrix by leaf, and the share to exchange."""

    counts: Mapping[str, int]
    drop_fraction: float


class Programme:
    """`SparsityConfig` over a phase of `total_steps` on the leaves `groups` (empty for a dense phase).

    Step t of the phase, counted from 0, starts from the masks that `counts(t)` describes; if `topology(t)` is not None it
    is a topology step, and step t + 1 starts from its target. After the last step the sparsity is what the schedule ends with.

    Raises:
      InputError: a phase too short for the turns of its schedule, or for any topology step of a rule that lives by them; a
        matrix that does not divide into the pattern.

    >>> config = SparsityConfig("gmp", 0.8, schedule="cubic", ramp_end=0.5, update_every_steps=100)
    >>> programme = Programme(config, {"w": MatrixGroup(1, (10, 100))}, total_steps=250)
    >>> {step: programme.counts(step + 1)["w"] for step in range(250) if programme.topology(step)}
    {31: 540, 62: 302, 93: 213, 100: 206, 125: 200}
    """

    def __init__(self, config: SparsityConfig, groups: Mapping[str, MatrixGroup], total_steps: int) -> None:
        self.config = config
        self.groups = {} if config.dense else dict(groups)
        self.total_steps = total_steps
        # Counts depend on the sparsity aimed at alone, and a run of 600,000 steps aims at a few thousand values.
        self.counts_for = lru_cache(maxsize=None)(self._solve)
        self.alike = lru_cache(maxsize=None)(self._alike)
        every, name = config.update_every_steps, config.schedule
        self.turning_steps = [] if config.dense else schedules.turning_steps(config.curve, total_steps, every, name)
        self._turning = frozenset(self.turning_steps)
        self._aim = lru_cache(maxsize=None)(lambda step: config.curve(self._progress(step)))
        stop = round(config.stop_fraction * total_steps)
        self.last_step = stop - (stop / total_steps > config.stop_fraction)  # of those at intervals
        if config.topology_rule.moves:
            self._check_moves()
        counts = self.counts(0)  # raises where a matrix does not divide into the pattern
        if config.floor_per_neuron:
            sparsest = self.counts_for(max(config.curve(turn) for turn in (0.0, *config.curve.turns)))
            check_floor(config.floor_per_neuron, {n: (self.groups[n].shape, k) for n, k in sparsest.items()})
        check_score(config.rule, config.topology_rule, [self._scored(name, counts[name]) for name in self.groups])

    def level(self, step: int) -> float:
        """The sparsity last aimed at before `step`: that of the last topology step, or of the initial masks."""
        if self.config.topology_rule.choose_each_step:
            return self._aim(step)
        if not self.config.topology_rule.moves or step <= 0:
            return self.config.curve(0.0)
        last = min(step - 1, self.last_step)
        last -= last % self.config.update_every_steps
        turns = bisect.bisect_left(self.turning_steps, step)
        return self._aim(max(last, self.turning_steps[turns - 1] if turns else 0))

    def counts(self, step: int) -> Mapping[str, int]:
        """Active weights of one matrix of every sparse leaf at the start of `step`."""
        return self.counts_for(self.level(step))

    def topology(self, step: int) -> TopologyTarget | None:
        """The target if `step` is a topology step. Masks that would not change by it (dense, or no exchange) need none."""
        config, rule = self.config, self.config.topology_rule
        own = rule.choose_masks is not None
        if not rule.moves or not self._due(step) or (step == 0 and not own):
            return None
        target, progress = self.counts_for(self._aim(step)), self._progress(step)
        dense = all(n == self.groups[name].size for name, n in target.items())
        if target == self.counts(step) and (dense or (rule.drop_fraction == 0 and not own)):
            return None
        start, end = config.curve.stage(progress)
        zeta = schedules.cosine_drop_fraction(rule.drop_fraction, progress, start, min(end, config.stop_fraction))
        return TopologyTarget(target, zeta)

    def gradient_counts(self, step: int) -> Mapping[str, int]:
        """Weights of one matrix of every sparse leaf whose gradient `step` needs: all where topology moves by it."""
        rule, target, needed = self.config.topology_rule, self.topology(step), {}
        for name, active in self.counts(step).items():
            size = self.groups[name].size
            all_of_them = target and rule.grows_by_gradient(active, target.counts[name], size, target.drop_fraction)
            needed[name] = size if all_of_them or rule.choose_each_step else rule.explored_count(active, size)
        return needed

    def attention(self, step: int) -> tuple[str, int]:
        """Attention pattern and width of `step`."""
        c, progress = self.config, step / self.total_steps
        return c.attention_pattern if c.attention_start <= progress < c.attention_end else "causal", c.attention_width

    def sparsity(self, step: int) -> float:
        """Share of zeros over all sparse leaves at the start of `step`."""
        total = sum(g.count * g.size for g in self.groups.values())
        return 1 - sum(self.active(step).values()) / total if total else 0.0

    def active(self, step: int) -> dict[str, int]:
        """Active weights by leaf, all its matrices together, at the start of `step`."""
        return {name: n * self.groups[name].count for name, n in self.counts(step).items()}

    def _scored(self, name: str, active: int) -> tuple[int, ...]:
        """The shape in which a topology step gives the rule a matrix of a leaf."""
        shape, pattern = self.groups[name].shape, parse_pattern(self.config.pattern)
        if self.config.blocks:
            side, _, outputs, live = block_grid(name, shape, active, self.config.pattern)
            return (outputs, live, side, side)
        axis, laid_out = pattern.axis(name, shape), list(shape)
        if axis != -2:
            laid_out[axis], laid_out[-2] = shape[-2], shape[axis]
        return tuple(laid_out)

    def _due(self, step: int) -> bool:
        on_interval = step % self.config.update_every_steps == 0 and step <= self.last_step
        return on_interval or step in self._turning

    def _progress(self, step: int) -> float:
        # A turn after the last step is made at it.
        beyond = step == self.total_steps - 1 and any(
            turn > step / self.total_steps for turn in self.config.curve.turns
        )
        return 1.0 if beyond else step / self.total_steps

    def _check_moves(self) -> None:
        """Raises `InputError` where no topology step would change a mask."""
        config, rule = self.config, self.config.topology_rule
        every = config.update_every_steps
        for step in chain(self.turning_steps, range(every, self.total_steps, every)):
            level = self._aim(step)
            if self._due(step) and (level != self.level(step) or (config.exchanges and level > 0)):
                return
        most = max(config.curve(turn) for turn in (0.0, *config.curve.turns))
        raise InputError(
            f"sparsity.rule: {config.rule!r} would never change a mask in {self.total_steps} steps with update_every_steps "
            f"{every}, stop_fraction {config.stop_fraction:g}, drop_fraction {rule.drop_fraction:g} and at most {most:g} "
            f"sparsity; change these, or use rule 'static' or 'dense'"
        )

    def _solve(self, sparsity: float) -> Mapping[str, int]:
        how = sparsity, self.config.distribution, self.config.pattern
        return target_counts(self.groups, *how) if self.groups else {}

    def _alike(self, steps: int) -> dict[int, int]:
        """The first `steps` steps by what they cost: ``{the first of its kind: how many there are}``."""
        first: dict[Any, int] = {}  # by kind

        def kind(t: int) -> Any:
            moves = None if self.topology(t) is None else tuple(self.gradient_counts(t).values())
            return self.level(t), moves, self.attention(t)

        return Counter(first.setdefault(kind(t), t) for t in range(steps))
