"""A whole run as data: its phases, and how it reports."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from spdf_jax.circuits.config import CircuitConfig
from spdf_jax.data import DataConfig, TaskConfig
from spdf_jax.errors import InputError, closest
from spdf_jax.evals.config import EvaluationConfig
from spdf_jax.fields import (
    Count,
    CountOrZero,
    FilePath,
    Line,
    OneOf,
    Range,
    Share,
    Text,
    Used,
    check_fields,
)
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.optim import OptimizerConfig
from spdf_jax.sharding import MeshConfig
from spdf_jax.sparsity.programme import SparsityConfig

_TAUGHT = Used(lambda distill: bool(distill.teacher), "phases with a distill.teacher")


@dataclass(frozen=True)
class DistillConfig:
    """A model that a phase learns from beside its data (Hinton et al. 2015, arXiv 1503.02531), of the same vocabulary.

    Attributes:
      teacher: the workdir of a run, a Hugging Face folder, or ``cell:NAME``, as `init_from` takes them; "" for none. It is held
        in memory once, laid out as the model is, and neither trained nor saved; a run that resumes needs it as it was.
      weight: share of the teacher in the loss of a target, ``(1 - weight) L + weight T^2 KL(teacher || model)``, of which L is
        the loss without one; 0: the phase is as without one, and no teacher is read.
      temperature: T, by which the logits of both are divided in KL.
    """

    teacher: FilePath = ""
    weight: Annotated[Share, _TAUGHT] = 0.5
    temperature: Annotated[float, Range(above=0), _TAUGHT] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "distill")

    @property
    def teaches(self) -> bool:
        """Whether there is a teacher that counts."""
        return bool(self.teacher) and self.weight > 0


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a run.

    Attributes:
      steps: length, topology steps included.
      batch_size: sequences a step, over all devices and micro-batches.
      seq_len: tokens a sequence; 0 means the model's context.
      task: what to fine-tune on; without a name, the text of ``config.data`` is modelled.
      epochs: passes over the task's training pairs, in place of `steps`; evaluation is then at the end of each.
      patience_evaluations: stop when as many evaluations have not beaten the best, whose state is kept in ``best/`` and is
        the run's result; 0 trains to the end. In the last phase only.
      grad_accumulation_steps: micro-batches a step.
      reset_optimizer: start with fresh optimiser state; False carries it over from the phase before.
      ema_decay: the result of the phase, which is evaluated, exported and gone on from, is an average of its parameters over
        steps: that of a step weighs this much of that of the step after it, and nothing of the values at the start is in it.
        A weight that grows back starts from 0 in it, as in the model. 0.999, for one; 0 is no average.
      optimizer, sparsity, distill: see there.
    """

    steps: Annotated[Count, Used(lambda phase: not phase.epochs, "phases without epochs")] = 600
    batch_size: Count = 16
    seq_len: CountOrZero = 0
    grad_accumulation_steps: Count = 1
    reset_optimizer: bool = True
    task: TaskConfig = field(default_factory=TaskConfig)
    epochs: CountOrZero = 0
    patience_evaluations: CountOrZero = 0
    ema_decay: Annotated[float, Range(least=0, below=1)] = 0.0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sparsity: SparsityConfig = field(default_factory=SparsityConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)

    def __post_init__(self) -> None:
        check_fields(self, "phase")


@dataclass(frozen=True)
class LoopConfig:
    """How often a run reports and saves. May change between restarts, see `spdf_jax.training.restore.check_same_run`.

    Attributes:
      log_every_steps: steps from one row of ``metrics.jsonl`` to the next.
      eval_every_steps: steps from one evaluation to the next; every phase ends with one, too.
      checkpoint_every_steps: steps from one checkpoint to the next; every phase ends with one, too.
      eval_batch_size: sequences a validation batch.
      keep_checkpoints: how many of the newest stay.
      keep_every_steps: beside those, every checkpoint at a multiple of this stays; 0: none.
      trackers: ``wandb``, ``mlflow``, ``trackio``, or several with commas between, which follow ``metrics.jsonl``. Each is an
        extra of that name (``pip install -e '.[wandb]'``) and is set up by its own environment variables.
      watchdog_seconds: a command whose step, evaluation or save does not move for so long ends with 75, to be given again;
        compilation counts, too. 0: never.
      profile_steps: ``A:B`` leaves a profile of the steps after step A, up to step B, in ``profile/``; "" does not.
    """

    log_every_steps: Count = 10
    eval_every_steps: Count = 100
    checkpoint_every_steps: Count = 200
    eval_batch_size: Count = 32
    keep_checkpoints: Count = 2
    keep_every_steps: CountOrZero = 0
    trackers: Line = ""
    watchdog_seconds: CountOrZero = 600
    profile_steps: Line = ""

    def __post_init__(self) -> None:
        check_fields(self, "loop")
        first, _, last = self.profile_steps.partition(":")
        if self.profile_steps and not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise InputError(
                f"loop.profile_steps: {self.profile_steps!r} must be A:B with 0 <= A < B, for example 100:105"
            )
        if self.keep_every_steps % self.checkpoint_every_steps:
            raise InputError(
                f"loop.keep_every_steps: {self.keep_every_steps} must be a multiple of loop.checkpoint_every_steps, "
                f"{self.checkpoint_every_steps}, as only what is saved can stay"
            )

    @property
    def tracker_names(self) -> list[str]:
        """Of `trackers`."""
        return [name.strip() for name in self.trackers.split(",") if name.strip()]

    @property
    def profiled_steps(self) -> range:
        """Steps, counted from 0, that are profiled."""
        first, _, last = self.profile_steps.partition(":")
        return range(int(first), int(last)) if last else range(0)


@dataclass(frozen=True)
class RunConfig:
    """A whole run.

    Attributes:
      experiment: name that the experiment file gives itself, and that pages and the default workdir are called by.
      variant: name of these settings, one of `variants`; chosen as ``--config FILE:VARIANT``.
      variants: names of all settings that the file has.
      seed: of everything drawn.
      init_from: where the parameters (and masks) come from: the workdir of another run, a folder of Hugging Face's (GPT-2,
        Llama, Qwen), or ``cell:NAME``, the workdir NAME beside this run's; "" draws them.
      init_what: ``parameters``: those and the masks, at step 0; ``state``: all of that run, optimiser state (whatever
        `reset_optimizer` of the first phase says), random state and count of steps too, and its data goes on where it was.
      init_step: of which checkpoint the ``state``; 0: the newest.
      phases: names to configs, in the order in which they run.
      model, data, mesh, loop, decode, evaluation, circuit: see there.
    """

    experiment: Line
    variant: Line
    variants: Annotated[tuple[str, ...], Text()]
    seed: CountOrZero
    init_from: FilePath
    init_what: Annotated[str, OneOf(("parameters", "state"))]
    init_step: CountOrZero
    model: GPTConfig
    data: DataConfig
    mesh: MeshConfig
    loop: LoopConfig
    decode: DecodeConfig
    evaluation: EvaluationConfig
    circuit: CircuitConfig
    phases: Mapping[str, PhaseConfig]

    def __post_init__(self) -> None:
        check_fields(self, "config")

    def seq_len(self, phase: PhaseConfig) -> int:
        """Tokens a sequence in `phase`."""
        return phase.seq_len or self.model.context

    def separates_documents(self, phase: PhaseConfig) -> bool:
        """Whether documents share a sequence in `phase` and nothing passes between them; a task's pairs share none."""
        return self.data.separate_documents and not phase.task.name

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready, in the layout of the experiment files: phase names under ``phases``, each phase by its name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "phases"}
        values = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in fields.items()}  # type: ignore[arg-type]
        phases = {name: dataclasses.asdict(phase) for name, phase in self.phases.items()}
        return json.loads(json.dumps(values | {"phases": list(self.phases)} | phases))


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one dict by dotted keys.

    >>> flat({"model": {"n_layer": 2}, "seed": 0})
    {'model.n_layer': 2, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def place_of(key: str, values: Mapping[str, Any], *, within: str = "config", head: str = "config") -> str:
    """``; did you mean config.A.B?`` of a key whose sections are others or left out; "" where no key is like it.

    Args:
      key: as it was given, with its section or without.
      values: the whole config.
      within: the section that it was looked for in; places below it come first.
      head: what to write before a place.

    >>> place_of("steps", {"seed": 0, "pretrain": {"steps": 3}})
    '; did you mean config.pretrain.steps?'
    """
    last_words = {f"config.{place}": place.rpartition(".")[2] for place in flat(values)}
    like = closest(key.rpartition(".")[2], last_words.values())
    places = [place for place, last in last_words.items() if like and last == like]
    places = [place for place in places if place.startswith(f"{within}.")] or places
    places = [place for place in places if place.endswith(f".{key}")] or places
    least = min((place.count(".") for place in places), default=0)
    places = [head + place.removeprefix("config") for place in places if place.count(".") == least]
    return f"; did you mean {' or '.join(places[:3])}?" if places else ""


SECTIONS: dict[str, type] = {
    "model": GPTConfig,
    "data": DataConfig,
    "mesh": MeshConfig,
    "loop": LoopConfig,
    "decode": DecodeConfig,
    "evaluation": EvaluationConfig,
    "circuit": CircuitConfig,
}

SCALARS: dict[str, Any] = {
    "experiment": "",
    "variant": "",
    "variants": (),
    "seed": 0,
    "init_from": "",
    "init_what": "parameters",
    "init_step": 0,
}
