"""Dense GPT-2: what every sparse run is compared with.

Claim   the reference: the loss that sparse training has to reach, and the FLOPs it is allowed to undercut.
Source  set-up of hupihe/Mixed-Sparsity-Training (nanoGPT).
Command python -m spdf_jax.main --config experiments/gpt2_dense.py
        python -m spdf_jax.main --config experiments/gpt2_dense.py:124m   (OpenWebText as nanoGPT's train.bin and val.bin)

mini    4 layers x 256, 400 steps x 16 x 256 = 1.6M tokens; about 5 minutes on 2 CPU cores.
124m    GPT-2 small without biases, vocabulary 50304; 600,000 steps x 480 x 1024 = 295B tokens. Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes


def get_config(variant="mini"):
    c = spdf.default_config("gpt2_dense", variant or "mini", variants=("mini", "124m"))
    recipes.gpt2_pretraining(c)
    c.pretrain.sparsity.rule = "dense"
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
