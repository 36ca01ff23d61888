"""Primer against GPT at equal training FLOPs.

Claim   Primer-EZ reaches a lower loss than GPT for the same training FLOPs (So et al., NeurIPS 2021, arXiv 2109.08668).
Source  the paper; its taps cost FLOPs, so Primer takes fewer steps: as many as the FLOP counter allows.
Command python -m spdf_jax.main --config experiments/primer_study.py
        python -m spdf_jax.main --config experiments/primer_study.py:full

mini    4 layers x 128, context 128, vocabulary 2048: 1.1M parameters; 1,200 steps x 16 x 128 = 2.5M tokens of the embedded
        corpus, 1,195 steps of Primer-EZ; three seeds each, which order the data alike. About 20 minutes on 2 quiet CPU cores.
full    the same with full Primer beside them: queries from the convolved keys, the MLP's norm behind it.

FLOPs are equal to within a step. Seconds are another matter: three taps a channel are bound by memory, not by FLOPs.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini", "full")
STEPS = 1200
BATCH = 16
EZ = {"activation": "squared_relu", "dconv": True}
MODELS = {"GPT": {}, "Primer-EZ": EZ, "Primer": EZ | {"shared_qk": True, "mlp_norm": "post"}}
COLUMNS = (
    ("validation loss", "summary.val_loss", ".3f", True),
    ("perplexity", "evaluation.perplexity", ".2f", True),
    ("training FLOPs", "summary.train_flops", ".4g", True),
    ("seconds", "summary.wall_seconds", ".0f", True),
)


def get_config(variant="mini"):
    variant = variant or "mini"
    cells, rows = {}, []
    for label, options in list(MODELS.items())[: 3 if variant == "full" else 2]:
        names = []
        for seed in range(3):
            # Named mini in every variant: cells of one may be copied into another, to spare the time.
            c = spdf.default_config("primer_study", "mini", variants=VARIANTS)
            c.seed = seed
            c.model.n_layer, c.model.n_head, c.model.d_model, c.model.context, c.model.vocab_size = 4, 4, 128, 128, 2048
            c.data.tokenizer_vocab_size = 2048
            budget = STEPS * spdf.train_flops(spdf.GPTConfig(**c.model))
            c.model.update(options)
            c.pretrain.steps = int(budget / spdf.train_flops(spdf.GPTConfig(**c.model)))
            c.pretrain.batch_size = BATCH
            c.pretrain.sparsity.rule = "dense"
            c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 3e-3, 50
            c.loop.eval_every_steps = 400
            names.append(f"{label.lower().replace('-', '_')}_{seed}")
            cells[names[-1]] = c
        rows.append((label, tuple(("", name) for name in names)))
    return spdf.sweep_config(
        "primer_study",
        variant,
        variants=VARIANTS,
        title="Primer and GPT at equal training FLOPs",
        cells=cells,
        rows=rows,
        columns=COLUMNS,
    )


if __name__ == "__main__":
    recipes.how_to_run(__file__)
