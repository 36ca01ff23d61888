"""Primer-EZ: GPT-2 with a squared ReLU and three-position convolutions of queries, keys and values.

Claim   lower loss at equal training FLOPs; at 500M parameters on C4 the loss of T5 at a quarter of the training cost
        (So et al., NeurIPS 2021, arXiv 2109.08668).
Source  the paper and its authors' code, google-research/google-research, primer/; set-up otherwise that of gpt2_dense.py,
        which is what to compare with. Its taps add 0.2 % to the FLOPs of a token in mini and 0.06 % in 124m.
Command python -m spdf_jax.main --config experiments/gpt2_primer.py
        python -m spdf_jax.main --config experiments/gpt2_primer.py:124m   (OpenWebText as nanoGPT's train.bin and val.bin)
        python -m spdf_jax.main --config experiments/gpt2_primer.py --config.model.shared_qk=True \\
            --config.model.mlp_norm=post --workdir runs/primer_full        (full Primer)

mini    4 layers x 256, 400 steps x 16 x 256 = 1.6M tokens; about 6 minutes on 2 CPU cores.
124m    GPT-2 small without biases, vocabulary 50304; 600,000 steps x 480 x 1024 = 295B tokens. Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes


def get_config(variant="mini"):
    c = spdf.default_config("gpt2_primer", variant or "mini", variants=("mini", "124m"))
    recipes.gpt2_pretraining(c)
    c.pretrain.sparsity.rule = "dense"
    c.model.activation, c.model.dconv = "squared_relu", True
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
