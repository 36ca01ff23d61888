"""MST of Llama's shape: warm-up, ultra-sparsification, restoration, with sparse attention while ultra-sparse.

Claim   none published of this shape; MST's is about 4x fewer training FLOPs than dense GPT-2 small (arXiv 2408.11746).
Source  method and phase boundaries as in gpt2_mst.py, with a dense head; shapes and steps as in llama_spdf.py.
Command python -m spdf_jax.main --config experiments/llama_mst.py          (mini, any machine, no data)
        python -m spdf_jax.main --config experiments/llama_mst.py:1b       (data/c4: token files, vocabulary 32,000)

mini    4 layers x 256, as in llama_spdf.py; 400 steps x 16 x 256 = 1.6M tokens. Minutes on 2 CPU cores; not timed alone yet.
130m, 350m, 1b   as in llama_spdf.py; 1b: 2.8e19 FLOPs, 3.66x fewer than dense. Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini", "130m", "350m", "1b")


def get_config(variant="mini"):
    c = spdf.default_config("llama_mst", variant or "mini", variants=VARIANTS)
    recipes.llama_pretraining(c)
    sparsity = c.pretrain.sparsity
    sparsity.rule, sparsity.schedule, sparsity.sparsity = "mst", "three_phases", 0.9
    sparsity.attention_pattern = "local_strided"
    if c.variant == "mini":
        sparsity.ramp_end, sparsity.ultra_end, sparsity.restoration_end = 0.1, 0.75, 0.9
        sparsity.update_every_steps, sparsity.attention_width = 10, 32
    else:
        sparsity.ramp_end, sparsity.ultra_end, sparsity.restoration_end = 0.05, 0.80, 0.906
    sparsity.attention_start, sparsity.attention_end = sparsity.ramp_end, sparsity.ultra_end
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
