"""RigL at 80 %: drop the smallest weights, grow where the dense gradient is largest.

Claim   dynamic topology at a constant sparsity beats a static one (Evci et al., ICML 2020, arXiv 1911.11134).
Source  RigL: drop fraction 0.3 decaying by cosine, every 100 steps, until 75 % of training, ERK over layers; the rest as in
        hupihe/Mixed-Sparsity-Training (nanoGPT).
Command python -m spdf_jax.main --config experiments/gpt2_rigl.py
        python -m spdf_jax.main --config experiments/gpt2_rigl.py:124m   (OpenWebText as nanoGPT's train.bin and val.bin)

mini    4 layers x 256, 400 steps x 16 x 256 = 1.6M tokens; about 5 minutes on 2 CPU cores.
124m    GPT-2 small without biases, vocabulary 50304; 600,000 steps x 480 x 1024 = 295B tokens. Not run here.
"""

import spdf_jax as spdf


def get_config(variant="mini"):
    c = spdf.default_config("gpt2_rigl", variant or "mini", variants=("mini", "124m"))
    c.pretrain.sparsity.rule = "rigl"
    c.pretrain.sparsity.sparsity = 0.8
    c.pretrain.sparsity.distribution = "erk"
    c.pretrain.sparsity.stop_fraction = 0.75
    if c.variant == "mini":
        c.pretrain.steps = 400
        c.pretrain.sparsity.update_every_steps = 20
        c.pretrain.optimizer.peak_learning_rate = 3e-3
        c.pretrain.optimizer.warmup_steps = 50
        return c
    c.model = spdf.model_section(spdf.GPT_SIZES["124m"])
    c.model.vocab_size = 50304
    c.model.use_bias = False
    c.data.source, c.data.path = "token_files", "data/openwebtext"
    c.data.separate_documents = False  # one stream, as in the papers
    c.pretrain.steps = 600_000
    c.pretrain.batch_size = 480
    c.pretrain.optimizer.warmup_steps = 2000
    c.loop.log_every_steps, c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 100, 2000, 2000
    return c
