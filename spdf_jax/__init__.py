"""Sparse pre-training of GPT models in JAX: train sparse, finish dense.

import spdf_jax as spdf

masks = spdf.init_masks(key, params, sparsity=0.75)
tx = spdf.sparse(optax.adamw(3e-4))
updates, opt_state = tx.update(grads, opt_state, params, masks=masks)
"""

from spdf_jax.config import default_config as default_config
from spdf_jax.config import model_section as model_section
from spdf_jax.config import resolve as resolve
from spdf_jax.config import shared_value as shared_value
from spdf_jax.config import sweep_config as sweep_config
from spdf_jax.errors import InputError as InputError
from spdf_jax.flops import train_flops as train_flops
from spdf_jax.gpt_config import GPT_SIZES as GPT_SIZES
from spdf_jax.gpt_config import GPTConfig as GPTConfig
from spdf_jax.model import GPT as GPT
from spdf_jax.model import forward as forward
from spdf_jax.recipes import finetuning_experiment as finetuning_experiment
from spdf_jax.recipes import mini_finetuning as mini_finetuning
from spdf_jax.recipes import mini_pretraining as mini_pretraining
from spdf_jax.recipes import spdf_finetuning as spdf_finetuning
from spdf_jax.sparsity.masks import apply_masks as apply_masks
from spdf_jax.sparsity.masks import dense_masks as dense_masks
from spdf_jax.sparsity.masks import init_masks as init_masks
from spdf_jax.sparsity.masks import load_masks as load_masks
from spdf_jax.sparsity.masks import mask_report as mask_report
from spdf_jax.sparsity.masks import save_masks as save_masks
from spdf_jax.sparsity.regrowth import adam_overshoot as adam_overshoot
from spdf_jax.sparsity.regrowth import reset_masked_state as reset_masked_state
from spdf_jax.sparsity.regrowth import scale_by_density as scale_by_density
from spdf_jax.sparsity.regrowth import scale_by_smet_adam as scale_by_smet_adam
from spdf_jax.sparsity.rules import RULES as RULES
from spdf_jax.sparsity.rules import Rule as Rule
from spdf_jax.sparsity.rules import prune_and_grow as prune_and_grow
from spdf_jax.sparsity.rules import prune_and_grow_tree as prune_and_grow_tree
from spdf_jax.sparsity.transforms import sparse as sparse
from spdf_jax.state import TrainState as TrainState
from spdf_jax.state import drop_masks as drop_masks
from spdf_jax.tree import LINEAR_KERNELS as LINEAR_KERNELS
from spdf_jax.tree import LINEAR_KERNELS_AND_HEAD as LINEAR_KERNELS_AND_HEAD
from spdf_jax.tree import LINEAR_KERNELS_AND_TIED_HEAD as LINEAR_KERNELS_AND_TIED_HEAD
from spdf_jax.watch import watch_training as watch_training
