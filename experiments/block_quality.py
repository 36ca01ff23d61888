"""What zeros in blocks cost: blocks of 32, 64 and 128 beside unstructured zeros, all at 75 %.

Claim   none of its own. It shows the loss that each reaches after equal steps on one small model and corpus, settings alike and
        tuned for none; it does not show what fine-tuning, moving topologies or scale make of the difference.
Source  static random masks as in SPDF (arXiv 2303.10464); blocks as in `spdf_jax.sparsity.blocks`: every output block reads as
        many input blocks as every other, and every input block is read as often.
Command python -m spdf_jax.main --config experiments/block_quality.py

mini    2 layers x 512 (the narrowest that 75 % in blocks of 128 fits: one input block of four), context 128, vocabulary 1024:
        6.9M parameters; 240 steps x 8 x 128 tokens of the embedded corpus; three seeds, which order the data alike. Blocks are
        computed as blocks (sparse_compute "blocks"), unstructured zeros by masks. 29 minutes on 2 CPU cores beside other work.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini",)
PATTERNS = {
    "dense": "",
    "unstructured": "unstructured",
    "block 32": "block32",
    "block 64": "block64",
    "block 128": "block128",
}
COLUMNS = (
    ("validation loss", "summary.val_loss", ".3f"),
    ("training FLOPs", "summary.train_flops", ".3g", True),
)


def get_config(variant="mini"):
    cells, rows = {}, []
    for label, pattern in PATTERNS.items():
        names = [f"{label.replace(' ', '_')}_{seed}" for seed in range(3)]
        cells |= {name: run(pattern, seed) for seed, name in enumerate(names)}
        rows.append((label, tuple(("", name) for name in names)))
    return spdf.sweep_config(
        "block_quality",
        variant or "mini",
        variants=VARIANTS,
        title="Zeros in blocks and anywhere, 75 %",
        cells=cells,
        rows=rows,
        columns=COLUMNS,
    )


def run(pattern, seed):
    c = spdf.default_config("block_quality", "mini", variants=VARIANTS)
    c.seed = seed
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.context, c.model.vocab_size = 2, 8, 512, 128, 1024
    c.data.tokenizer_vocab_size = 1024
    c.pretrain.steps, c.pretrain.batch_size = 240, 8
    c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 1e-3, 30
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 60, 240
    sparsity = c.pretrain.sparsity
    sparsity.rule, sparsity.sparsity = ("static", 0.75) if pattern else ("dense", 0.0)
    if pattern:
        sparsity.pattern = pattern
        sparsity.sparse_compute = "blocks" if pattern.startswith("block") else "masked"
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
