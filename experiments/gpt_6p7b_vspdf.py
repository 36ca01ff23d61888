"""Variable SPDF at 6.7B: 90 % static sparse, then dense pre-training.

Claim   64 % fewer FLOPs than dense pre-training on the first phase's 133.2B tokens; 65.7 % by the formula of `spdf_jax.flops`.
Source  the Cerebras model zoo's configuration.
Command python -m spdf_jax.main --config experiments/gpt_6p7b_vspdf.py      (GPT-2 tokens of the Pile in data/pile)

32 layers x 4096, 32 heads, context 2048. Sparse: 62,523 steps x 1040 x 2048 = 133.2B tokens. Dense: 9,379 steps x 1040 x 2048 =
20.0B tokens. Needs a pod; not run here.
"""

import spdf_jax as spdf


def get_config(variant="90"):
    c = spdf.default_config("gpt_6p7b_vspdf", variant or "90", variants=("90",), phases=("sparse", "dense"))
    c.model = spdf.model_section(spdf.GPT_SIZES["6.7b"])
    c.data.source, c.data.path = "token_files", "data/pile"
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.sparse.steps, c.sparse.optimizer.warmup_steps = 62_523, 177
    c.dense.steps, c.dense.optimizer.warmup_steps = 9_379, 938
    c.sparse.sparsity.rule, c.sparse.sparsity.sparsity = "static", 0.9
    for phase in (c.sparse, c.dense):
        phase.batch_size = 1040
        phase.optimizer.peak_learning_rate = 3.6e-4
        phase.optimizer.final_fraction = 1.2e-5 / 3.6e-4
        phase.optimizer.schedule = "linear"
        phase.optimizer.eps = 1e-9
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps, c.loop.eval_batch_size = 1000, 500, 520
    return c
