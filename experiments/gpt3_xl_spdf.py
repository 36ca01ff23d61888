"""SPDF at GPT-3 XL, 1.3B parameters: the headline 2.5x.

Claim   75 % sparse pre-training takes 0.401 of the dense FLOPs and, fine-tuned dense, stays within 0.8 BLEU of the dense model
        (Thangarasa et al., UAI 2023, arXiv 2303.10464, tables 1 and 2).
Source  the paper; what it leaves open as in GPT-2.
Command python -m spdf_jax.main --config experiments/gpt3_xl_spdf.py:75     (GPT-2 tokens of the Pile in data/pile)

24 layers x 2048, 16 heads, context 2048. 24,796 steps x 512 x 2048 = 26B tokens; FLOPs 236e18 dense, 142e18 at 50 %, 95e18 at
75 % (spdf_jax.main --job plan). Needs a pod; not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

SPARSITY = {"75": 0.75, "50": 0.5, "dense": 0.0}


def get_config(variant="75"):
    c = spdf.default_config("gpt3_xl_spdf", variant or "75", variants=tuple(SPARSITY))
    c.model = spdf.model_section(spdf.GPT_SIZES["1.3b"])
    c.data.source, c.data.path = "token_files", "data/pile"
    c.data.separate_documents = False  # one stream, as in the papers
    c.model.remat = "mlp"
    c.mesh.data, c.mesh.fsdp = -1, 16  # one axis of the torus of a v5e:16x16 gathers weights, the other adds gradients
    c.pretrain.steps = 24_796
    c.pretrain.batch_size = 512
    c.pretrain.sparsity.sparsity = SPARSITY[c.variant]
    c.pretrain.sparsity.rule = "static" if SPARSITY[c.variant] else "dense"
    c.pretrain.optimizer.peak_learning_rate = 2e-4
    c.pretrain.optimizer.beta2 = 0.999
    c.pretrain.optimizer.warmup_steps = 358  # 375M tokens
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps, c.loop.eval_batch_size = 1000, 500, 512
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
