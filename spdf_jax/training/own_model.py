"""A model of the caller's own as the one phase of a run: its plan, its feed, its first state, and what may not change of them.

The model is a `spdf_jax.training.loss_function.LossFunction`; steps, loop and checkpoints are those of the GPT.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spdf_jax.config.checks import check_used, check_zeros
from spdf_jax.config.read import build_section, of_fit
from spdf_jax.config.run import LoopConfig, PhaseConfig, flat
from spdf_jax.errors import InputError
from spdf_jax.fields import unused_fields
from spdf_jax.optim import OptimizerConfig
from spdf_jax.sparsity.distributions import MatrixGroup
from spdf_jax.sparsity.masks import active_counts, apply_masks, check_masks, matrix_groups
from spdf_jax.sparsity.programme import Programme, SparsityConfig
from spdf_jax.sparsity.topology import Rule, fit_masks
from spdf_jax.sparsity.transforms import sparse
from spdf_jax.training.extension import why_not
from spdf_jax.training.feed import Feed
from spdf_jax.training.phases import PhasePlan, StepCost
from spdf_jax.training.state import TrainState, state_shardings
from spdf_jax.training.stored_state import fingerprint
from spdf_jax.tree import LINEAR_KERNELS, Filter, named_leaves
from spdf_jax.workdir import CONFIG_FILE, read_json

#: The name of the phase in rows.
PHASE = "fit"
# Of `SparsityConfig`, what is made for `spdf_jax.GPT`, and what stands for it in any other model.
_OF_THE_GPT = {
    "sparsify_head": (False, "the filter says which leaves are sparse"),
    "sparse_compute": ("masked", "kernels of live blocks need layers that compute with them"),
    "attention_pattern": ("causal", "your loss_fn attends as it likes"),
    "init": ("random", "spdf_jax.init_masks(..., method='magnitude') makes such masks"),
}


def make_programme(params: Any, steps: int, *, filter: Filter = LINEAR_KERNELS, **sparsity: Any) -> Programme:
    """What the masks of a model hold at every step of a run, for `spdf_jax.fit`.

    Args:
      params: pytree of arrays or shapes.
      steps: length of the run, topology steps included.
      filter: which leaves are sparse, see `spdf_jax.tree`.
      sparsity: any of a phase's ``sparsity`` section, such as ``rule="rigl", sparsity=0.9, update_every_steps=100``; all are
        listed by ``python -m spdf_jax.main --help_config sparsity``.

    Returns:
      A `spdf_jax.sparsity.programme.Programme`: ``counts(step)`` are the active weights of one matrix of every sparse leaf,
      ``topology(step)`` is not None where the masks move.

    Raises:
      InputError: an unknown setting, one that would be ignored or is for `spdf_jax.GPT` alone; a filter that does not fit; too
        few steps for the schedule.

    >>> params = {"w": jnp.ones((8, 8)), "b": jnp.ones(8)}
    >>> how = {"rule": "gmp", "schedule": "cubic", "sparsity": 0.75, "ramp_end": 0.5, "update_every_steps": 10}
    >>> programme = make_programme(params, 100, filter=[("w", "matrix")], **how)
    >>> [programme.counts(step)["w"] for step in (0, 30, 100)]
    [64, 26, 16]
    """
    config: SparsityConfig = build_section("sparsity", SparsityConfig, sparsity)
    check_used(list(unused_fields("sparsity", config)))
    check_zeros("sparsity", config)
    for name, (value, instead) in _OF_THE_GPT.items():
        if getattr(config, name) != value:
            raise InputError(f"sparsity.{name}: {getattr(config, name)!r} is for spdf_jax.GPT alone; {instead}")
    if not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps: {steps!r} is no length of a run; give a whole number of at least 1")
    return Programme(config, {} if config.dense else matrix_groups(params, filter), steps)


def own_plan(tx: Any, params: Any, programme: Any, eval_every_steps: int) -> PhasePlan:
    """The one phase of the run.

    Raises:
      InputError: `tx` or `programme` are of another kind.
    """
    if not isinstance(programme, Programme):
        raise InputError(f"programme: {programme!r} is none; make it with spdf_jax.make_programme(params, steps, ...)")
    if not isinstance(tx, optax.GradientTransformation):
        raise InputError(f"tx: a {type(tx).__name__}, not an optax transformation such as optax.adam(1e-3)")
    rule, steps = programme.config.topology_rule, programme.total_steps
    regrowth = "keep" if rule.choose_masks else "reset"  # a rule of its own looks after the state itself
    return PhasePlan(
        name=PHASE,
        index=0,
        start=0,
        end=steps,
        # Of a batch nothing is known but that it is one.
        config=PhaseConfig(
            steps=steps, batch_size=1, optimizer=OptimizerConfig(regrowth=regrowth), sparsity=programme.config
        ),
        seq_len=0,
        filter=_filter_of(programme.groups, params),
        programme=programme,
        tx=_held_at_zero(tx, rule),
        learning_rate=None,
        cost=lambda step, seq_len: StepCost(),
        epoch_steps=0,
        eval_every_steps=eval_every_steps,
    )


@lru_cache(maxsize=8)  # compiled steps are known by it
def _held_at_zero(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformationExtraArgs:
    """As the rule has it. What is wrapped already may be wrapped once more: it computes the same."""
    return rule.optimizer(tx) if rule.moves or rule.choose_each_step else sparse(tx, moving=False)


def _filter_of(groups: Mapping[str, MatrixGroup], params: Any) -> Filter:
    """The filter that a programme was made with, leaf by leaf."""

    def decision(name: str, leaf: Any) -> str:
        if name not in groups:
            return "dense"
        return "stack" if len(leaf.shape) > len(groups[name].shape) else "matrix"

    return tuple((f"^{re.escape(name)}$", decision(name, leaf)) for name, leaf in named_leaves(params))


def own_state(plan: PhasePlan, params: Any, masks: Any, key: jax.Array, mesh: Mesh) -> TrainState:
    """The state before the first step, in memory of its own: steps reuse it, and what was given stays as it is.

    Raises:
      InputError: parameters that cannot learn; masks that are not theirs, or not what the programme begins with.
    """
    for name, leaf in named_leaves(params):
        if not jnp.issubdtype(getattr(leaf, "dtype", object), jnp.floating):
            raise InputError(
                f"params: {name} is {_described(leaf)}, not an array of floats; split off what does not learn, such as by "
                f"flax.nnx.split(model, nnx.Param, ...) or equinox.partition(model, equinox.is_inexact_array)"
            )
    if not jax.tree.leaves(params):
        raise InputError("params: no array is in this tree; give the parameters of the model")
    check_masks(masks, params)
    _check_first_masks(plan, params, masks)

    @jax.jit
    def first(params: Any, masks: Any, key: jax.Array) -> TrainState:
        opt_state = plan.tx.init(params)  # Top-KAST's keeps the values of masked weights
        return TrainState(jnp.zeros((), jnp.int32), apply_masks(params, masks), masks, opt_state, key)

    state = first(params, masks, key)
    return jax.device_put(state, state_shardings(mesh, plan.tx, state), may_alias=False)


def _check_first_masks(plan: PhasePlan, params: Any, masks: Any) -> None:
    programme, config, counts = plan.programme, plan.programme.config, plan.programme.counts(0)
    if programme.groups != matrix_groups(params, plan.filter):
        raise InputError(
            "programme: made for other parameters; make it with spdf_jax.make_programme(params, steps, ...) of these"
        )
    how = f"sparsity={programme.level(0):g}, distribution={config.distribution!r}, pattern={config.pattern!r}"
    again = f"make them with spdf_jax.init_masks(key, params, {how}, filter=that of the programme)"
    if config.dense:
        again = "make them with spdf_jax.dense_masks(params)"
    found = jax.device_get(active_counts(masks, params, plan.filter))
    for name, mask in named_leaves(masks):
        if (mask.ndim > 0) != (name in programme.groups):
            has, says = ("an element mask", "dense") if mask.ndim else ("no element mask", "sparse")
            raise InputError(f"masks: {name} has {has}, and the programme says that it is {says}; {again}")
        if mask.ndim and (found[name] != counts[name]).any():
            raise InputError(
                f"masks: {name} has {found[name].tolist()} active weights, and the programme begins with {counts[name]} in "
                f"each matrix; {again}"
            )
    if config.pattern != "unstructured" and programme.groups:
        nnz = {name: jnp.full((group.count,), counts[name], jnp.int32) for name, group in programme.groups.items()}
        fitted = jax.jit(fit_masks, static_argnums=4)(jax.random.key(0), params, masks, nnz, config.pattern)
        for (name, mask), fit in zip(named_leaves(masks), jax.tree.leaves(fitted), strict=True):
            if not (mask == fit).all():
                raise InputError(f"masks: {name} is not in the pattern {config.pattern!r}; {again}")


def own_feed(loss_fn: Any, params: Any, batches: Any, validation: Any, devices: int) -> Feed:
    """The batches as they are given, each held to be one; the first are tried.

    Raises:
      InputError: no functions, or not of batches; a loss that is not a scalar; batches that do not go on where they are to.
    """
    for name, given, says in (
        ("loss_fn", loss_fn, "(params, batch) -> loss"),
        ("batches", batches, "start_batch -> iterator"),
        ("validation", validation, "() -> iterator"),
    ):
        if given is not None and not callable(given):
            raise InputError(f"{name}: a {type(given).__name__}, and must be a function {says}; see help(spdf_jax.fit)")
    feed = Feed(
        lambda start: _endless(batches, start, devices),
        lambda: _checked("validation", validation(), devices),
        None,
        "",
    )
    first = next(feed.train(0))
    _check_loss(jax.eval_shape(loss_fn, params, first))
    prints = [
        _fingerprint(batch) for batch in (first, *_second(batches, 0, 1, devices), *_second(batches, 1, 0, devices))
    ]
    if len(prints) == 3 and prints[1] != prints[2]:
        raise InputError(
            "batches: batches(1) does not begin with the second batch of batches(0), so that a run that resumes would not go "
            "on where it was; batches(n) must give the batches from number n on, the same every time"
        )
    return feed._replace(fingerprint=prints[0])


def _second(batches: Any, start: int, index: int, devices: int) -> Iterator[Any]:
    """Batch number 1, asked for in one of two ways; nothing where there is none."""
    return itertools.islice(_checked("batches", batches(start), devices), index, index + 1)


def _endless(batches: Callable[[int], Iterable[Any]], start: int, devices: int) -> Iterator[Any]:
    given = 0
    for batch in _checked("batches", batches(start), devices):
        given += 1
        yield batch
    raise InputError(
        f"batches: batches({start}) ends after {given}, before the programme does; start the data over, or make a programme of "
        f"as many steps"
    )


def _checked(name: str, batches: Any, devices: int) -> Iterator[Any]:
    """Batches, each a tree of arrays whose first axis the devices can share."""
    if not isinstance(batches, Iterable):
        raise InputError(f"{name}: the function returned a {type(batches).__name__}, not an iterator over batches")
    none = True
    for batch in batches:
        arrays = jax.tree.map(lambda x: x if hasattr(x, "shape") else np.asarray(x), batch)
        if not jax.tree.leaves(arrays):
            raise InputError(f"{name}: a batch is {batch!r:.60}, which holds no array")
        for leaf, array in named_leaves(arrays):
            if array.ndim and array.shape[0] % devices:
                raise InputError(
                    f"{name}: {leaf or 'a batch'} has shape {array.shape}, and {devices} devices cannot share its first axis"
                )
        none = False
        yield arrays
    if none and name == "validation":
        raise InputError(f"{name}: no batch came; give at least one, or leave validation out")


def _check_loss(found: Any) -> None:
    parts = found if isinstance(found, tuple) else (found,)
    scalars = all(getattr(part, "shape", None) == () for part in parts)
    if not 1 <= len(parts) <= 2 or not scalars or not jnp.issubdtype(parts[0].dtype, jnp.floating):
        raise InputError(
            f"loss_fn: returned {' and '.join(map(_described, parts))}; it must return a float, the mean loss of the batch, or "
            f"two: the sum of losses and that of their weights"
        )


def _fingerprint(batch: Any) -> str:
    """A hash of every number of a batch."""
    digest = hashlib.sha256()
    for name, leaf in named_leaves(batch):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def _described(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"


def identity(plan: PhasePlan, feed: Feed, state: TrainState, loop: LoopConfig) -> dict[str, Any]:
    """What the run is, for its ``config.json``: its settings, and of what is no setting the shapes and a hash."""

    def shapes(tree: Any) -> dict[str, str]:
        return {name: _described(leaf) for name, leaf in named_leaves(tree)}

    return {
        "steps": plan.end,
        "sparsity": json.loads(json.dumps(dataclasses.asdict(plan.programme.config))),  # tuples as they are read again
        "loop": dataclasses.asdict(loop),
        "fit": {
            "first_batch": feed.fingerprint,
            "initial_values": fingerprint(state.replace(opt_state=())),
            "params": shapes(state.params),
            "optimizer_state": shapes(state.opt_state),
        },
    }


def check_same_fit(identity: Mapping[str, Any], plan: PhasePlan, workdir: Path) -> dict[str, Any]:
    """Refuses the folder of another run; what only says how a run reports may change, and a folder without a run is anyone's.

    Args:
      identity: of `identity`.
      plan: of the run.
      workdir: its folder.

    Returns:
      The steps that it was to take and takes, where those may and do differ: ``{"steps": (100, 200)}``.

    Raises:
      InputError: another run, with what differs.
    """
    path = workdir / CONFIG_FILE
    if not path.exists():
        return {}
    saved = read_json(path, "restore it, or choose another workdir")
    if not of_fit(saved):
        raise InputError(f"workdir {workdir}: holds a run of spdf_jax.GPT; choose another workdir")
    was, now = (flat({name: of[name] for name in ("steps", "sparsity", "fit")}) for of in (saved, identity))
    differing = [key for key in now | was if was.get(key) != now.get(key)]
    if not differing:
        return {}
    why = ""
    if differing == ["steps"]:
        shorter = Programme(plan.programme.config, plan.programme.groups, was["steps"])
        planned = dataclasses.replace(plan, end=was["steps"], programme=shorter)
        why = why_not(workdir, [planned], [plan])
        if not why:
            return {"steps": (was["steps"], plan.end)}
    said = "; ".join(
        f"{key} was {was.get(key, 'absent')!s:.32}, is {now.get(key, 'absent')!s:.32}" for key in differing[:4]
    )
    raise InputError(
        f"workdir {workdir}: holds another run ({said}{f', but {why}' if why else ''}); choose another workdir, or give what "
        f"that run was given (its initial values are those of params, masks and key)"
    )
