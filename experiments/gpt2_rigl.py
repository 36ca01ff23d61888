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
from spdf_jax.config import recipes


def get_config(variant="mini"):
    c = spdf.default_config("gpt2_rigl", variant or "mini", variants=("mini", "124m"))
    recipes.gpt2_pretraining(c)
    sparsity = c.pretrain.sparsity
    sparsity.rule, sparsity.sparsity, sparsity.distribution, sparsity.stop_fraction = "rigl", 0.8, "erk", 0.75
    if c.variant == "mini":
        sparsity.update_every_steps = 20
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
