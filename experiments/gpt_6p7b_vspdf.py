"""Variable SPDF at 6.7B: 90 % static sparse, then dense pre-training.

Claim   64 % fewer FLOPs than dense pre-training on the first phase's 133.2B tokens; 65.7 % by the formula of
        `spdf_jax.model.flops`.
Source  the Cerebras model zoo's configuration.
Command python -m spdf_jax.main --config experiments/gpt_6p7b_vspdf.py      (GPT-2 tokens of the Pile in data/pile)

90      32 layers x 4096, 32 heads, context 2048. Sparse: 62,523 steps x 1040 x 2048 = 133.2B tokens. Dense: 9,379 steps x
        1040 x 2048 = 20.0B tokens. 1040 sequences split 16 ways at most, so that 64 or 256 chips need tensor parallelism.
90_pod  1024 sequences in the place of 1040, in steps for the same tokens: every chip has sequences of its own.
Needs a pod; not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes


def get_config(variant="90"):
    c = spdf.default_config("gpt_6p7b_vspdf", variant or "90", variants=("90", "90_pod"), phases=("sparse", "dense"))
    c.model = spdf.model_section(spdf.GPT_SIZES["6.7b"])
    c.data.source, c.data.path = "token_files", "data/pile"
    c.data.separate_documents = False  # one stream, as in the papers
    c.sparse.steps, c.sparse.optimizer.warmup_steps = 62_523, 177
    c.dense.steps, c.dense.optimizer.warmup_steps = 9_379, 938
    batch_size, accumulate = 1040, 13
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 1, 16, -1
    if c.variant == "90_pod":
        batch_size, accumulate = 1024, 2
        c.sparse.steps, c.dense.steps = 63_500, 9_526
        c.mesh.data, c.mesh.tensor = -1, 1
    c.sparse.sparsity.rule, c.sparse.sparsity.sparsity = "static", 0.9
    for phase in (c.sparse, c.dense):
        phase.batch_size, phase.grad_accumulation_steps = batch_size, accumulate
        phase.optimizer.peak_learning_rate = 3.6e-4
        phase.optimizer.final_fraction = 1.2e-5 / 3.6e-4
        phase.optimizer.schedule = "linear"
        phase.optimizer.eps = 1e-9
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps, c.loop.eval_batch_size = 1000, 500, 512
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
