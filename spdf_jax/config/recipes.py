"""Settings that several experiments share: ``from spdf_jax.config import recipes`` in their files.

They are part of the package, since an experiment file is loaded by its path, from any working directory.
"""

import dataclasses
import sys
from typing import NoReturn

from ml_collections import ConfigDict

from spdf_jax.config.read import model_section
from spdf_jax.model.sizes import GPT_SIZES


def how_to_run(file: str) -> NoReturn:
    """What ``python experiments/FILE.py`` says, in which an experiment only sets values: how it is run; exit code 2.

    Args:
      file: its ``__file__``.
    """
    print(f"error: an experiment is settings; run it by: python -m spdf_jax.main --config {file}", file=sys.stderr)
    sys.exit(2)


#: Decoding of each task: length penalty as in LoRA (Hu et al. 2022, table 11), whose decoding SPDF follows.
LENGTH_PENALTY = {"restaurant": 0.9, "e2e": 0.9, "webnlg": 0.8, "dart": 0.8, "curation": 1.0}


def gpt2_pretraining(c: ConfigDict) -> None:
    """Model, data and phase ``pretrain`` of the experiments that are compared with each other as GPT-2 small.

    Variants ``mini``, ``mini_...``: 4 layers x 256, 400 steps x 16 x 256 = 1.6M tokens of the embedded corpus. Others: GPT-2
    small without biases, vocabulary 50304, on OpenWebText as nanoGPT's ``train.bin`` and ``val.bin``; 600,000 steps x 480 x
    1024 = 295B tokens (the set-up of hupihe/Mixed-Sparsity-Training).

    Args:
      c: a config with a phase ``pretrain``; changed in place.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "124m", variants=("mini", "124m"))
    >>> gpt2_pretraining(c)
    >>> c.model.n_layer, c.model.vocab_size, c.pretrain.steps
    (12, 50304, 600000)
    """
    phase = c.pretrain
    if c.variant.startswith("mini"):
        _mini_phase(phase)
        return
    c.model = model_section(dataclasses.replace(GPT_SIZES["124m"], vocab_size=50304, use_bias=False))
    c.data.source, c.data.path = "token_files", "data/openwebtext"
    c.data.separate_documents = False  # one stream, as in the papers
    phase.steps, phase.batch_size, phase.optimizer.warmup_steps = 600_000, 480, 2000
    c.loop.log_every_steps, c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 100, 2000, 2000


def llama_pretraining(c: ConfigDict) -> None:
    """Model, data and phase ``pretrain`` of the experiments of Llama's shape.

    Variants ``mini``, ``mini_...``: 4 layers x 256 with two heads of keys and values for four of queries, 400 steps x 16 x 256
    = 1.6M tokens of the embedded corpus. ``130m``, ``350m``, ``1b``: GaLore's shapes and steps (arXiv 2403.03507), each of 512
    sequences x 256, on C4 as token files of a vocabulary of 32,000.

    Args:
      c: a config with a phase ``pretrain``; changed in place.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "130m", variants=("mini", "130m"))
    >>> llama_pretraining(c)
    >>> c.model.norm, c.model.d_ff, c.pretrain.steps
    ('rms_norm', 2048, 20000)
    """
    phase, size = c.pretrain, c.variant.split("_")[0]
    c.model = model_section(GPT_SIZES[f"llama_{size}"])
    if size == "mini":
        _mini_phase(phase)
        return
    c.data.source, c.data.path = "token_files", "data/c4"
    phase.steps = {"130m": 20_000, "350m": 60_000, "1b": 100_000}[size]
    phase.batch_size, phase.seq_len, phase.optimizer.warmup_steps = 512, 256, phase.steps // 10
    c.loop.log_every_steps, c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 100, 2000, 2000


def mini_dense_end(c: ConfigDict) -> None:
    """SPDF's two phases in a mini run of 400 steps: ``pretrain`` for 320, ``finetune`` for 80.

    Args:
      c: a config with both phases, after `gpt2_pretraining` or `llama_pretraining`; changed in place.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "mini", variants=("mini",), phases=("pretrain", "finetune"))
    >>> mini_dense_end(c)
    >>> c.pretrain.steps, c.finetune.steps
    (320, 80)
    """
    c.pretrain.steps, c.finetune.steps = 320, 80
    finetune = c.finetune.optimizer
    finetune.peak_learning_rate, finetune.warmup_steps = 1e-3, 10
    finetune.schedule, finetune.final_fraction = "linear", 0.0


def _mini_phase(phase: ConfigDict) -> None:
    phase.steps = 400
    phase.optimizer.peak_learning_rate, phase.optimizer.warmup_steps = 3e-3, 50


def spdf_finetuning(c: ConfigDict, task: str, path: str = "") -> None:
    """Sets phase ``finetune`` and ``decode`` as SPDF does (arXiv 2303.10464, section 3 and supplement).

    AdamW, linear schedule to 0, 5 epochs with early stopping on validation; beam 10, no repeated 4-gram, at most 64 new
    tokens. Warm-up is not stated: none. Of its grid (batch 8 to 64, rate 2.5e-5 to 1e-4) this takes batch 16 and rate 1e-4.

    Args:
      c: a config with a phase ``finetune``; changed in place.
      task: see `spdf_jax.data.TaskConfig`.
      path: of its files.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "mini", variants=("mini",), phases=("finetune",))
    >>> spdf_finetuning(c, "e2e", "data/e2e")
    >>> c.finetune.epochs, c.decode.beam_size, c.decode.length_penalty
    (5, 10, 0.9)
    """
    phase = c.finetune
    phase.task.name, phase.task.path = task, path
    phase.epochs, phase.patience_evaluations, phase.batch_size = 5, 1, 16
    phase.seq_len = min(512, c.model.context)
    phase.optimizer.schedule, phase.optimizer.final_fraction, phase.optimizer.warmup_steps = "linear", 0.0, 0
    phase.optimizer.peak_learning_rate, phase.optimizer.beta2 = 1e-4, 0.999
    c.decode.method, c.decode.beam_size, c.decode.no_repeat_ngram = "beam", 10, 4
    c.decode.length_penalty = LENGTH_PENALTY[task]


def mini_pretraining(c: ConfigDict, sparsity: float) -> None:
    """Phase ``pretrain`` of the mini model: 1200 steps of SPDF on the embedded corpus.

    Args:
      c: a config with a phase ``pretrain``; changed in place.
      sparsity: share of zeros in the static masks, in [0, 1); 0 is dense.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "mini", variants=("mini",))
    >>> mini_pretraining(c, 0.75)
    >>> c.pretrain.sparsity.rule, c.pretrain.steps
    ('static', 1200)
    """
    _mini_model(c)
    c.pretrain.steps = 1200
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "static" if sparsity else "dense", sparsity
    c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 3e-3, 50
    c.pretrain.optimizer.beta2 = 0.999
    c.loop.log_every_steps, c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 20, 200, 400


def mini_finetuning(c: ConfigDict) -> None:
    """Phase ``finetune`` of the mini model: few examples and beams, a third of pre-training's rate.

    Args:
      c: a config with a phase ``finetune``; changed in place. After `spdf_finetuning`, which it makes smaller.

    >>> import spdf_jax as spdf
    >>> c = spdf.default_config("mine", "mini", variants=("mini",), phases=("finetune",))
    >>> spdf_finetuning(c, "restaurant")
    >>> mini_finetuning(c)
    >>> c.finetune.task.train_examples, c.decode.beam_size
    (100, 4)
    """
    _mini_model(c)
    phase = c.finetune
    if phase.task.name == "restaurant":
        phase.task.train_examples, phase.task.validation_examples, phase.task.test_examples = 100, 50, 100
    phase.optimizer.peak_learning_rate, phase.optimizer.warmup_steps = 1e-3, 10
    c.decode.beam_size, c.decode.batch_size = 4, 64


def _mini_model(c: ConfigDict) -> None:
    """Small enough to see 5M tokens in minutes: about as many as it takes to learn to copy from the context, which every one of
    the tasks needs. Its few word pieces are shared by the corpus and the tasks.
    """
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size = 3, 4, 128, 1024
    c.data.tokenizer_vocab_size = 1024
