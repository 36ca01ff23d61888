"""SPDF: static random masks in pre-training, dropped for dense fine-tuning.

Claim   GPT-2 small pre-trained at 75 % sparsity and fine-tuned dense loses little on E2E, WebNLG and DART, with 0.601 of the
        pre-training FLOPs (Thangarasa et al., UAI 2023, arXiv 2303.10464, tables 1 and 2).
Source  the paper; what it leaves open (vocabulary, positions, tied embeddings, initialisation) as in GPT-2.
Command python -m spdf_jax.main --config experiments/gpt2_spdf.py           (mini: 75 %, any machine, no data)
        python -m spdf_jax.main --config experiments/gpt2_spdf.py:mini_blocks   (zeros in blocks, neither stored nor computed)
        python -m spdf_jax.main --config experiments/gpt2_spdf.py:125m_75   (data/pile: its GPT-2 tokens, and tokenizer.json)

mini, mini_50   4 layers x 256; 320 sparse steps and 80 dense ones, x 16 x 256 = 1.6M tokens. The second phase goes on
                with the same corpus, to show the mask drop. About 5 minutes on 2 CPU cores.
mini_blocks     the same at 75 % in blocks of 64, with sparse_compute "blocks": of every 4 input blocks an output block reads
                1, and the sparse phase takes fewer seconds too.
125m_*          12 x 768, context 2048. 4768 steps x 256 x 2048 = 2.5B tokens. FLOPs 2.43e18 dense, 1.79e18 at 50 %, 1.46e18
                at 75 % (spdf_jax.main --job plan). Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

SPARSITY = {"mini": 0.75, "mini_50": 0.5, "mini_blocks": 0.75, "125m_75": 0.75, "125m_50": 0.5, "125m_dense": 0.0}


def get_config(variant="mini"):
    variant = variant or "mini"
    mini = variant.startswith("mini")
    phases = ("pretrain", "finetune") if mini else ("pretrain",)
    c = spdf.default_config("gpt2_spdf", variant, variants=tuple(SPARSITY), phases=phases)
    c.pretrain.sparsity.rule = "static" if SPARSITY[variant] else "dense"
    c.pretrain.sparsity.sparsity = SPARSITY[variant]
    c.pretrain.optimizer.beta2 = 0.999
    if variant == "mini_blocks":
        c.pretrain.sparsity.pattern, c.pretrain.sparsity.sparse_compute = "block64", "blocks"
    if mini:
        recipes.gpt2_pretraining(c)
        recipes.mini_dense_end(c)
        return c
    c.model = spdf.model_section(spdf.GPT_SIZES["125m"])
    c.data.source, c.data.path = "token_files", "data/pile"
    c.data.separate_documents = False  # one stream, as in the papers
    c.pretrain.steps = 4768
    c.pretrain.batch_size = 256
    c.pretrain.optimizer.warmup_steps = 715  # 375M tokens
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
