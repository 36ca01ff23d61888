"""SPDF of Llama's shape: static random masks in pre-training, dropped for dense training.

Claim   none published of this shape; SPDF's, of GPT (arXiv 2303.10464), is what it would be held against. SMET
        (arXiv 2606.00888) trains these shapes sparse from the start to the end.
Source  shapes: jiaweizzhao/GaLore, configs (arXiv 2403.03507), as SMET has them; steps, sequences and warm-up: its
        scripts/benchmark_c4, where a sequence is one document, cut or padded to 256, so that not all of them are tokens of
        text: ours are packed, and full; method: SPDF.
Command python -m spdf_jax.main --config experiments/llama_spdf.py            (mini: 75 %, any machine, no data)
        python -m spdf_jax.main --config experiments/llama_spdf.py:mini_blocks   (zeros in blocks, neither stored nor computed)
        python -m spdf_jax.main --config experiments/llama_spdf.py:1b         (data/c4: token files, vocabulary 32,000)

mini    4 layers x 256, 4 heads of queries over 2 of keys and values, gated MLP of 768, tied head; 320 sparse steps and 80 dense
        ones x 16 x 256 = 1.6M tokens. Minutes on 2 CPU cores; not timed alone yet.
mini_blocks   the same in blocks of 32, with sparse_compute "blocks": in larger ones, keys and values are too narrow for it.
130m, 350m, 1b   12 x 768, 24 x 1024, 24 x 2048, a head of its own, context 1024, trained at 256: 20,000, 60,000 and 100,000
        steps x 512 x 256 = 2.6B, 7.9B and 13.1B tokens, all sparse at 75 %. 1b: 3.1e19 FLOPs, 3.31x fewer than dense
        (spdf_jax.main --job plan). Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini", "mini_blocks", "130m", "350m", "1b")


def get_config(variant="mini"):
    variant = variant or "mini"
    mini = variant.startswith("mini")
    phases = ("pretrain", "finetune") if mini else ("pretrain",)
    c = spdf.default_config("llama_spdf", variant, variants=VARIANTS, phases=phases)
    recipes.llama_pretraining(c)
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "static", 0.75
    c.pretrain.optimizer.beta2 = 0.999
    if variant == "mini_blocks":
        c.pretrain.sparsity.pattern, c.pretrain.sparsity.sparse_compute = "block32", "blocks"
    if mini:
        recipes.mini_dense_end(c)
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
