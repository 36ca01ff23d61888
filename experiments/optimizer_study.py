"""AdamW and Muon, dense and 75 % sparse, each at its best learning rate of one grid.

Claim   none of its own. It shows which loss either optimiser reaches on one small model and corpus where its learning rate was
        chosen, of four, by the mean validation loss of three seeds; it does not show how they compare at scale, or in seconds.
Source  Muon: Jordan et al. 2024 (github.com/KellerJordan/Muon), its updates of AdamW's size as in Liu et al. 2025 (arXiv
        2502.16982), so that one grid is fair to both; static random masks as in SPDF (arXiv 2303.10464).
Command python -m spdf_jax.main --config experiments/optimizer_study.py
        python -m spdf_jax.main --config experiments/optimizer_study.py --job report   (the page again)

mini    3 layers x 128, context 128, vocabulary 1024: 0.7M parameters; 240 steps x 16 x 128 = 0.5M tokens of the embedded
        corpus; 2 optimisers x dense or sparse x 4 rates x 3 seeds, which order the data alike: 48 cells, resumable one by one.
        Under masks Muon's orthogonal update is masked afterwards: `scale_by_hidden_muon` in spdf_jax/sparsity/optimizers.py.
"""

import itertools

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini",)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = (0, 1, 2)
ROWS = {
    "AdamW, dense": ("adamw", 0.0),
    "AdamW, 75 %": ("adamw", 0.75),
    "Muon, dense": ("muon", 0.0),
    "Muon, 75 %": ("muon", 0.75),
}
COLUMNS = (
    ("validation loss", "summary.val_loss", ".3f", True),
    ("training FLOPs", "summary.train_flops", ".3g", True),
    ("seconds", "summary.wall_seconds", ".0f", True),
)


def get_config(variant="mini"):
    cells, rows = {}, {label: [] for label in ROWS}
    for (label, row), rate, seed in itertools.product(ROWS.items(), RATES, SEEDS):
        name = f"{row[0]}_{'sparse' if row[1] else 'dense'}_{rate:.0e}_{seed}"
        cells[name] = run(*row, rate, seed)
        rows[label].append((f"rate {rate:g}", name))
    return spdf.sweep_config(
        "optimizer_study",
        variant or "mini",
        variants=VARIANTS,
        title="AdamW and Muon, dense and 75 % sparse, three seeds",
        cells=cells,
        rows=list(rows.items()),
        columns=COLUMNS,
        remark="FLOPs are the model's: Muon's Newton-Schulz steps are not counted. Seconds count compiling.",
    )


def run(optimizer, sparsity, rate, seed):
    c = spdf.default_config("optimizer_study", "mini", variants=VARIANTS)
    c.seed = seed
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.context, c.model.vocab_size = 3, 4, 128, 128, 1024
    c.data.tokenizer_vocab_size, c.data.validation_fraction = 1024, 0.01
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 80, 240
    c.pretrain.steps, c.pretrain.batch_size = 240, 16
    c.pretrain.optimizer.name = optimizer
    c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = rate, 40
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = ("static", sparsity) if sparsity else ("dense", 0.0)
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
