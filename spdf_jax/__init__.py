"""Sparse pre-training of GPT models in JAX: train sparse, finish dense.

>>> import jax, jax.numpy as jnp, optax
>>> import spdf_jax as spdf
>>> params = {"w": jax.random.normal(jax.random.key(0), (8, 8)), "b": jnp.zeros(8)}
>>> masks = spdf.init_masks(jax.random.key(1), params, sparsity=0.75, filter=[("w", "matrix")])
>>> params = spdf.apply_masks(params, masks)
>>> tx = spdf.sparse(optax.adamw(3e-4))
>>> grads = jax.tree.map(jnp.ones_like, params)
>>> updates, opt_state = tx.update(grads, tx.init(params), params, masks=masks)
>>> int((optax.apply_updates(params, updates)["w"] != 0).sum())
16

Masks       `init_masks`, `apply_masks`, `dense_masks`, `mask_report`, `save_masks`, `load_masks`
Prune once  `prune_once`, `sparsegpt`, `wanda_scores`, `keep_largest`
Topology    `prune_and_grow`, `prune_and_grow_tree`, `Rule`
Optimiser   `sparse`, `reset_masked_state`, `scale_by_smet_adam`, `scale_by_density`, `adam_overshoot`
Model       `GPT`, `GPTConfig`, `forward`, `widen`, `train_flops`
Experiment  `default_config`, `model_section`, `shared_value`, `sweep_config`; what several share: `spdf_jax.config.recipes`
Run         `resolve`, `run_cost`, `train`, `watch_training`, `saved_run`, `TrainState`, `drop_masks`, `as_masks`
Any model   `fit`, `make_programme`
Refusals    `InputError`: one line that says what is wrong and how to fix it

Constants:

* `GPT_SIZES`: published architectures by name, ``{"124m": GPTConfig(...), ...}``;
* `RULES`, `OPTIMIZERS`: topology rules and optimisers by name, ``{"rigl": Rule(...), ...}``; a new one is one more entry;
* `LINEAR_KERNELS`: the filter of every linear kernel inside the layers of the GPT, the rest dense (SPDF);
* `LINEAR_KERNELS_AND_HEAD`, `LINEAR_KERNELS_AND_TIED_HEAD`: with the output head too (MST), whose weights are its own or the
  embedding's.

A filter is a sequence of ``(pattern, decision)``, see `spdf_jax.tree`. Shapes are in names: B batch, T tokens, V vocabulary.
"""

__version__ = "0.1.0"

import signal as _signal
import sys as _sys

from spdf_jax.errors import InputError as InputError
from spdf_jax.errors import end_interrupted as _end_interrupted

# Of a command, which is not there yet to answer Ctrl-C itself; a shell may have it ignored.
if _sys.argv[:1] == ["-m"] and _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _end_interrupted)

from spdf_jax.config.read import default_config as default_config
from spdf_jax.config.read import model_section as model_section
from spdf_jax.config.read import resolve as resolve
from spdf_jax.config.read import shared_value as shared_value
from spdf_jax.config.sweep import sweep_config as sweep_config
from spdf_jax.jobs.fit import fit as fit
from spdf_jax.jobs.train import train as train
from spdf_jax.model.config import GPTConfig as GPTConfig
from spdf_jax.model.flops import train_flops as train_flops
from spdf_jax.model.forward import forward as forward
from spdf_jax.model.gpt import GPT as GPT
from spdf_jax.model.prune_once import prune_once as prune_once
from spdf_jax.model.sizes import GPT_SIZES as GPT_SIZES
from spdf_jax.planning.scaling import widen as widen
from spdf_jax.sparsity.mask_files import load_masks as load_masks
from spdf_jax.sparsity.mask_files import save_masks as save_masks
from spdf_jax.sparsity.mask_report import mask_report as mask_report
from spdf_jax.sparsity.masks import apply_masks as apply_masks
from spdf_jax.sparsity.masks import dense_masks as dense_masks
from spdf_jax.sparsity.masks import init_masks as init_masks
from spdf_jax.sparsity.one_shot import keep_largest as keep_largest
from spdf_jax.sparsity.one_shot import sparsegpt as sparsegpt
from spdf_jax.sparsity.one_shot import wanda_scores as wanda_scores
from spdf_jax.sparsity.optimizers import OPTIMIZERS as OPTIMIZERS
from spdf_jax.sparsity.optimizers import scale_by_smet_adam as scale_by_smet_adam
from spdf_jax.sparsity.regrowth import adam_overshoot as adam_overshoot
from spdf_jax.sparsity.regrowth import reset_masked_state as reset_masked_state
from spdf_jax.sparsity.regrowth import scale_by_density as scale_by_density
from spdf_jax.sparsity.rules import RULES as RULES
from spdf_jax.sparsity.topology import Rule as Rule
from spdf_jax.sparsity.topology import prune_and_grow as prune_and_grow
from spdf_jax.sparsity.topology import prune_and_grow_tree as prune_and_grow_tree
from spdf_jax.sparsity.transforms import sparse as sparse
from spdf_jax.training.own_model import make_programme as make_programme
from spdf_jax.training.phases import run_cost as run_cost
from spdf_jax.training.restore import saved_run as saved_run
from spdf_jax.training.state import TrainState as TrainState
from spdf_jax.training.state import as_masks as as_masks
from spdf_jax.training.state import drop_masks as drop_masks
from spdf_jax.training.watch import watch_training as watch_training
from spdf_jax.tree import LINEAR_KERNELS as LINEAR_KERNELS
from spdf_jax.tree import LINEAR_KERNELS_AND_HEAD as LINEAR_KERNELS_AND_HEAD
from spdf_jax.tree import LINEAR_KERNELS_AND_TIED_HEAD as LINEAR_KERNELS_AND_TIED_HEAD

__all__ = [
    "GPT",
    "GPT_SIZES",
    "LINEAR_KERNELS",
    "LINEAR_KERNELS_AND_HEAD",
    "LINEAR_KERNELS_AND_TIED_HEAD",
    "OPTIMIZERS",
    "RULES",
    "GPTConfig",
    "InputError",
    "Rule",
    "TrainState",
    "adam_overshoot",
    "apply_masks",
    "as_masks",
    "default_config",
    "dense_masks",
    "drop_masks",
    "fit",
    "forward",
    "init_masks",
    "keep_largest",
    "load_masks",
    "make_programme",
    "mask_report",
    "model_section",
    "prune_and_grow",
    "prune_and_grow_tree",
    "prune_once",
    "reset_masked_state",
    "resolve",
    "run_cost",
    "save_masks",
    "saved_run",
    "scale_by_density",
    "scale_by_smet_adam",
    "shared_value",
    "sparse",
    "sparsegpt",
    "sweep_config",
    "train",
    "train_flops",
    "wanda_scores",
    "watch_training",
    "widen",
]
