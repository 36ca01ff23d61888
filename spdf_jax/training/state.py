"""Everything that a run carries from step to step, its sharded initialisation, and phase changes."""

from collections.abc import Mapping
from functools import cache, lru_cache, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spdf_jax.errors import InputError
from spdf_jax.sharding import optimizer_shardings, parameter_shardings, replicated
from spdf_jax.sparsity.block_topology import block_grid
from spdf_jax.sparsity.blocks import element_masks, init_topology, to_blocks, to_masks
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.sparsity.masks import apply_masks, dense_masks, init_masks, matrix_groups
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.sparsity.topology import fit_masks
from spdf_jax.training.average import AverageState
from spdf_jax.tree import (
    LINEAR_KERNELS,
    LINEAR_KERNELS_AND_HEAD,
    LINEAR_KERNELS_AND_TIED_HEAD,
    Filter,
    same_structure,
)

#: All of `spdf_jax.GPT` but norms and the bigram table (Gao et al. 2025, arXiv 2511.13653).
ALL_WEIGHTS: Filter = (
    (r"^blocks/(attn|mlp)_.*/(kernel|bias)$", "stack"),
    (r"^(wte|wpe)/embedding$|^head/kernel$", "matrix"),
    (r"(^|/)(bias|scale|taps|sink)$|^bigram/embedding$", "dense"),
)


class TrainState(flax.struct.PyTreeNode):
    """One pytree: saved, sharded and donated as a whole.

    Attributes:
      step: int32 scalar, steps taken since the start of the run, topology steps included.
      params: parameters; exactly 0 where `masks` is False.
      masks: mask tree of the treedef of `params`.
      opt_state: the optimiser's state; exactly 0 where `masks` is False, unless ``OptimizerConfig.regrowth`` is ``keep``.
      key: typed PRNG key of the run; step t draws from ``fold_in(key, t)``.
      topology: live blocks of the kernels of which `params` and `opt_state` hold those alone (their masks are then 0-d), see
        `spdf_jax.sparsity.blocks`; empty without.

    >>> params, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    >>> state = TrainState(jnp.zeros((), jnp.int32), params, masks, opt_state=(), key=jax.random.key(0))
    >>> int(state.replace(step=state.step + 1).step)
    1
    """

    step: jax.Array
    params: Any
    masks: Any
    opt_state: Any
    key: jax.Array
    topology: Any = flax.struct.field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the model is evaluated with: ``model.apply(state.variables, tokens_BT)``."""
        return {"params": self.averaged().params, "topology": self.topology}

    def averaged(self) -> "TrainState":
        """The state with the parameters that count: the average that ``ema_decay`` or a schedule-free optimiser keeps of them.

        Training goes on from `params` as they are, not from this: the optimiser's state, which is of those, is left out. Where
        no average is kept, the same state.

        >>> params, masks = {"w": jnp.array([4.0, 0.0])}, {"w": jnp.array([True, False])}
        >>> follows = AverageState(jnp.array(9), {"w": jnp.array([3.0, 5.0])}, ())
        >>> state = TrainState(jnp.zeros((), jnp.int32), params, masks, opt_state=follows, key=jax.random.key(0))
        >>> state.averaged().params["w"].tolist(), state.replace(opt_state=()).averaged().params is params
        ([3.0, 0.0], True)
        """
        found = [s for s in jax.tree.leaves(self.opt_state, is_leaf=_keeps_average) if _keeps_average(s)]
        if not found or not same_structure(_followed(found[0]), self.params):
            return self
        return self.replace(params=_average(found[0], self.params, self.masks), opt_state=optax.EmptyState())

    def element_masks(self) -> Any:
        """Masks as `spdf_jax.init_masks` makes them, of kernels stored as blocks too."""
        return element_masks(self.params, self.topology) if self.topology else self.masks


def _keeps_average(state: Any) -> bool:
    return isinstance(state, AverageState | optax.contrib.ScheduleFreeState)


def _followed(state: Any) -> Any:
    return state.average if isinstance(state, AverageState) else state.z


@jax.jit
def _average(state: Any, params: Any, masks: Any) -> Any:
    """Under the masks, for a schedule-free optimiser starts from parameters that are not."""
    if isinstance(state, AverageState):
        average = jax.tree.map(lambda a, p: jnp.where(state.updates > 0, a, p), state.average, params)
    else:
        average = optax.contrib.schedule_free_eval_params(state, params)
    return apply_masks(average, masks)


def sparse_filter(config: SparsityConfig, tied_head: bool) -> Filter:
    """Which leaves of `spdf_jax.GPT` are sparse."""
    if config.leaves == "all":
        return ALL_WEIGHTS
    if not config.sparsify_head:
        return LINEAR_KERNELS
    return LINEAR_KERNELS_AND_TIED_HEAD if tied_head else LINEAR_KERNELS_AND_HEAD


@cache  # an experiment file may plan many runs of one model
def abstract_params(model: nn.Module) -> Any:
    """Shapes and dtypes of the parameters, without computing them."""
    return jax.eval_shape(partial(_fresh_params, model), jax.random.key(0))


def init_state(
    model: nn.Module, tx: optax.GradientTransformation, config: SparsityConfig, filter: Filter, seed: int, mesh: Mesh
) -> TrainState:
    """The state before the first step, created sharded on `mesh`: no host copy.

    Args:
      model: the model.
      tx: the first phase's optimiser.
      config: the first phase's sparsity; its value at progress 0 makes the masks.
      filter: which leaves are sparse.
      seed: of parameters, masks and everything drawn later.
      mesh: from `spdf_jax.sharding.make_mesh`.

    Returns:
      TrainState with masked parameters exactly 0.
    """
    return _initialisation(model, tx, config, filter, mesh)(jax.random.key(seed))


@lru_cache(maxsize=4)  # as `spdf_jax.training.step.make_steps` keeps its programs
def _initialisation(model: nn.Module, tx: Any, config: SparsityConfig, filter: Filter, mesh: Mesh) -> Any:
    return jax.jit(
        partial(_fresh, model, tx, config, filter),
        out_shardings=state_shardings(mesh, tx, abstract_state(model, tx, config, filter)),
    )


@lru_cache(maxsize=4)
def abstract_state(
    model: nn.Module, tx: optax.GradientTransformation, config: SparsityConfig, filter: Filter
) -> TrainState:
    """Shapes and dtypes of the state in a phase."""
    return jax.eval_shape(partial(_fresh, model, tx, config, filter), jax.random.key(0))


def state_shardings(mesh: Mesh, tx: optax.GradientTransformation, state: TrainState) -> TrainState:
    """A sharding for every leaf of a state (arrays or shapes)."""
    return TrainState(  # a tree of shardings in the place of arrays
        step=replicated(mesh),  # type: ignore[arg-type]
        params=parameter_shardings(mesh, state.params),
        masks=parameter_shardings(mesh, state.masks),
        opt_state=optimizer_shardings(mesh, tx, state.opt_state, state.params),
        key=replicated(mesh),  # type: ignore[arg-type]
        topology=jax.tree.map(lambda _: replicated(mesh), state.topology),
    )


def start_phase(
    state: TrainState,
    tx: optax.GradientTransformation,
    config: SparsityConfig,
    filter: Filter,
    mesh: Mesh,
    *,
    reset_optimizer: bool,
) -> TrainState:
    """The state at a phase's first step, from the last state of the phase before.

    A dense phase drops the masks: revived weights start at exactly 0 (SPDF). A sparse phase goes on with the masks it finds,
    pruned by magnitude or grown at random to its own counts (at 0 as well), and makes them where there are none. The optimiser
    starts fresh, from what a schedule-free one averaged, or carries its state over.
    """

    def start(state: TrainState) -> TrainState:
        if reset_optimizer:  # of whole kernels, which an optimiser may look at as such
            state = as_masks(optax.identity(), state.averaged().replace(opt_state=optax.EmptyState()))
            state = state.replace(opt_state=tx.init(state.params))
        state = as_masks(tx, state)
        if config.dense:
            return drop_masks(state)
        key = jax.random.fold_in(state.key, state.step)
        if config.blocks:
            return as_blocks(key, tx, state, config, filter)
        # Only those that are there are fitted, and only where there are none are they made: the rest is not compiled.
        fresh = _masks(key, state.params, config, filter)
        found = jax.tree.map(lambda old, new: old if new.ndim else new, state.masks, fresh)
        groups, counts = _first_counts(state.params, config, filter)
        nnz = {name: jnp.full((group.count,), counts[name], jnp.int32) for name, group in groups.items()}
        fitted = fit_masks(state.key, state.params, found, nnz, config.pattern)
        masks = jax.tree.map(lambda old, new: old if old.ndim else new, fitted, fresh)
        if not reset_optimizer:
            state = state.replace(opt_state=reset_masked_state(tx, state.opt_state, state.params, masks))
        return state.replace(masks=masks, params=apply_masks(state.params, masks))

    # Laid out like every later state of the phase, so that its first step compiles no extra program.
    return jax.jit(start, out_shardings=state_shardings(mesh, tx, jax.eval_shape(start, state)))(state)


def drop_masks(state: TrainState) -> TrainState:
    """Dense from here on: every mask becomes a 0-d True. Values do not change, so revived weights start at exactly 0.

    Args:
      state: with masks.

    Returns:
      The state without them (SPDF, arXiv 2303.10464, section 2).

    Raises:
      InputError: kernels stored as blocks.

    >>> params, masks = {"w": jnp.array([1.0, 0.0])}, {"w": jnp.array([True, False])}
    >>> state = TrainState(jnp.zeros((), jnp.int32), params, masks, opt_state=(), key=jax.random.key(0))
    >>> drop_masks(state).masks["w"].shape
    ()
    """
    if state.topology:
        raise InputError("drop_masks: the state holds live blocks alone; use spdf_jax.as_masks(tx, state) first")
    return state.replace(masks=dense_masks(state.params))


def as_blocks(
    key: jax.Array, tx: optax.GradientTransformation, state: TrainState, config: SparsityConfig, filter: Filter
) -> TrainState:
    """The state with live blocks alone in the place of whole kernels.

    Args:
      key: for what is drawn.
      tx: the optimiser of the state.
      state: of whole kernels, dense or under masks; see `spdf_jax.sparsity.blocks.init_topology` for what stays.
      config: how many blocks, of what size, and how they are chosen.
      filter: which leaves.

    Returns:
      A state whose masks are all 0-d.
    """
    groups, counts = _first_counts(state.params, config, filter)
    grids = {name: block_grid(name, group.shape, counts[name], config.pattern) for name, group in groups.items()}
    topology = init_topology(key, state.params, grids, method=config.init, masks=state.masks)
    params, opt_state = to_blocks(tx, state.params, state.opt_state, topology, grids)
    return state.replace(params=params, masks=dense_masks(params), opt_state=opt_state, topology=topology)


def as_masks(tx: optax.GradientTransformation, state: TrainState) -> TrainState:
    """The state with whole kernels under element masks in the place of blocks, exactly 0 outside them.

    Args:
      tx: the optimiser of the state.
      state: with blocks or without.

    Returns:
      A state of the same values without blocks; the same state if there were none.

    >>> params = {"w": jnp.ones((2, 2))}
    >>> state = TrainState(jnp.zeros((), jnp.int32), params, dense_masks(params), opt_state=(), key=jax.random.key(0))
    >>> as_masks(optax.identity(), state) is state  # no blocks
    True
    """
    if not state.topology:
        return state
    params, opt_state, masks = to_masks(tx, state.params, state.opt_state, state.topology)
    return state.replace(params=params, masks=masks, opt_state=opt_state, topology={})


@partial(jax.jit, static_argnums=0)  # traced once, for shapes and for values
def _fresh_params(model: nn.Module, key: jax.Array) -> Any:
    return model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _fresh(model: nn.Module, tx: Any, config: SparsityConfig, filter: Filter, key: jax.Array) -> TrainState:
    param_key, mask_key, run_key = jax.random.split(key, 3)
    params = _fresh_params(model, param_key)
    whole = config.dense or config.blocks
    masks = dense_masks(params) if whole else _masks(mask_key, params, config, filter)
    opt_state = tx.init(params)  # Top-KAST's keeps the values of masked weights; moments start at 0 in any case
    state = TrainState(jnp.zeros((), jnp.int32), apply_masks(params, masks), masks, opt_state, run_key)
    return as_blocks(mask_key, tx, state, config, filter) if config.blocks else state


def _first_counts(
    params: Any, config: SparsityConfig, filter: Filter
) -> tuple[dict[str, MatrixGroup], Mapping[str, int]]:
    """The sparse leaves, and the active weights of one matrix of each at the start of a phase: what `_masks` hold."""
    groups = matrix_groups(params, filter)
    return groups, target_counts(groups, config.curve(0.0), config.distribution, config.pattern)


def _masks(key: jax.Array, params: Any, config: SparsityConfig, filter: Filter) -> Any:
    return init_masks(
        key,
        params,
        sparsity=config.curve(0.0),
        distribution=config.distribution,
        filter=filter,
        method="random" if config.init == "random" else "magnitude",
        pattern=config.pattern,
    )
