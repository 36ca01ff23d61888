"""Time to the dense loss: blocks at 75 % and 87.5 %, static or moved, beside dense, where linear layers are most of a step.

Claim   blocks that are neither stored nor computed reach the loss of the dense model in fewer seconds, though they may need
        more tokens. Goal: half of dense's seconds at 75 %.
Source  block topologies as in `spdf_jax.sparsity.blocks`; static masks as in SPDF (arXiv 2303.10464), RigL (1911.11134),
        MST's mixed growing (2408.11746). Learning rates tuned for each on one grid, as no comparison is sound without.
Command python -m spdf_jax.main --config experiments/time_to_loss.py           (the grid, seed 0)
        python -m spdf_jax.main --config experiments/time_to_loss.py:seeds     (three seeds at the rates that the grid chose)

mini    2 layers x 1024, context 128, vocabulary 1024: 26M parameters, in bfloat16; 16 x 128 tokens a step of the embedded
        corpus, 150 steps dense and 225 sparse. The rate is constant after its warm-up: so when a loss is reached does not
        depend on how long the run would have been. Seconds are of a quiet machine: run it alone.
"""

import itertools

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini", "seeds")
RATES = {"mini": (3e-4, 1e-3, 3e-3)}
STEPS = {"dense": 150, "sparse": 225}
#: Rule and sparsity of each row.
METHODS = {
    "dense": ("dense", 0.0),
    "static, 75 %": ("static", 0.75),
    "RigL, 75 %": ("rigl", 0.75),
    "MST's growing, 75 %": ("mst", 0.75),
    "static, 87.5 %": ("static", 0.875),
    "RigL, 87.5 %": ("rigl", 0.875),
}
COLUMNS = (
    ("validation loss", "summary.val_loss", ".3f"),
    ("seconds to the dense loss", "seconds@val_loss=summary.val_loss", ".0f", True),
    ("tokens", "tokens@val_loss=summary.val_loss", ".3g", True),
    ("training FLOPs", "train_flops@val_loss=summary.val_loss", ".3g", True),
)


def get_config(variant="mini"):
    variant = variant or "mini"
    cells, rows = {}, []
    for label, (rule, sparsity) in METHODS.items():
        choices = []
        for rate, seed in itertools.product(RATES.get(variant, ()), range(1 if variant == "mini" else 3)):
            name = f"{rule}_{sparsity:g}_{rate:g}_{seed}".replace(".", "p").replace("-", "m")
            cells[name] = run(rule, sparsity, rate, seed)
            choices.append((f"{rate:g}", name))
        rows.append((label, tuple(choices)))
    return spdf.sweep_config(
        "time_to_loss",
        variant,
        variants=VARIANTS,
        title="Time to the dense loss, in blocks of 128",
        cells=cells,
        rows=rows,
        columns=COLUMNS,
        remark="-: the dense loss is not reached. Seconds are of training, compiling included.",
    )


def run(rule, sparsity, rate, seed):
    # Named mini in both variants: cells of one may be copied into the other, to spare the time.
    c = spdf.default_config("time_to_loss", "mini", variants=VARIANTS)
    c.seed = seed
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.context, c.model.vocab_size = 2, 16, 1024, 128, 1024
    c.model.dtype = "bfloat16"
    c.data.tokenizer_vocab_size, c.data.validation_fraction = c.model.vocab_size, 0.01
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 15, 225
    phase = c.pretrain
    phase.steps, phase.batch_size = STEPS["sparse" if sparsity else "dense"], 16
    phase.optimizer.schedule = "constant"
    phase.optimizer.peak_learning_rate, phase.optimizer.warmup_steps = rate, 20
    phase.sparsity.rule, phase.sparsity.sparsity = rule, sparsity
    if sparsity:
        phase.sparsity.pattern, phase.sparsity.sparse_compute = "block128", "blocks"
    if rule in ("rigl", "mst"):
        phase.sparsity.update_every_steps = 15
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
