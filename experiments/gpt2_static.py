"""A static random mask at 80 %: the baseline that any dynamic method has to beat.

Claim   keeping the first random mask throughout is worse than moving it, at the same FLOPs
        (MST, arXiv 2408.11746, baselines).
Source  set-up of hupihe/Mixed-Sparsity-Training (nanoGPT).
Command python -m spdf_jax.main --config experiments/gpt2_static.py
        python -m spdf_jax.main --config experiments/gpt2_static.py:124m   (OpenWebText as nanoGPT's train.bin and val.bin)

mini    4 layers x 256, 400 steps x 16 x 256 = 1.6M tokens; about 5 minutes on 2 CPU cores.
124m    GPT-2 small without biases, vocabulary 50304; 600,000 steps x 480 x 1024 = 295B tokens. Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes


def get_config(variant="mini"):
    c = spdf.default_config("gpt2_static", variant or "mini", variants=("mini", "124m"))
    recipes.gpt2_pretraining(c)
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "static", 0.8
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
