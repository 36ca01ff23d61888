"""Every method beside dense training, at equal tokens and at equal training FLOPs.

Claim   none of its own. It shows which loss each method reaches on one small model and one corpus, with settings alike and
        tuned for none, and what that costs by the FLOP counter; it does not show how they compare at the papers' scale or
        after tuning, nor any saving of time, since masks simulate sparsity.
Source  SPDF (arXiv 2303.10464), MST (2408.11746), RigL (1911.11134), SET (Mocanu et al. 2018), sparse wide: Sparse-IFT
        (2303.11525), for which the model is widened until its active weights are as many as the dense model has weights.
Command python -m spdf_jax.main --config experiments/compare.py
        python -m spdf_jax.main --config experiments/compare.py --job report   (the page again)

mini    3 layers x 128, context 128, vocabulary 1024: 0.7M parameters, embedded corpus, two seeds, which order the data alike.
        At equal tokens all take 300 steps x 16 x 128 = 0.6M tokens. At equal FLOPs each takes as many steps as the FLOPs of the
        dense run allow, counted exactly (topology steps and a wider model's head included), on a learning-rate schedule of its
        own; "to the dense loss" is read from those runs. Resumable cell by cell.
seeds   the same with five seeds; cells of the first two may be copied from mini, to spare the time.

Static, SET, RigL and SPDF's first phase hold 75 % zeros in every matrix of the layers; MST goes to 90 %, with a sparse head and
sparse attention, and returns to dense; the smaller dense model has the FLOPs of the static one. One learning rate for all: 50
steps up to 3e-3, then a cosine down to 3e-4.
"""

import dataclasses
import itertools

import spdf_jax as spdf
from spdf_jax.config import recipes

SEEDS = {"mini": 2, "seeds": 5}  # of each variant
STEPS, BATCH, SPARSITY = 300, 16, 0.75
TOKENS, FLOPS = "equal tokens", "equal FLOPs"
MODEL = spdf.GPTConfig(n_layer=3, n_head=4, d_model=128, vocab_size=1024, context=128)
METHODS = ("dense", "smaller dense", "static", "SET", "RigL", "MST", "SPDF", "wide sparse")
COLUMNS = (
    ("loss at equal tokens", "summary.val_loss", ".3f", True, TOKENS),
    ("their FLOPs", "summary.train_flops", ".3g", True, TOKENS),
    ("loss at equal FLOPs", "summary.val_loss", ".3f", True, FLOPS),
    ("their tokens", "summary.tokens", ".3g", True, FLOPS),
    ("FLOPs to the dense loss", "train_flops@val_loss=summary.val_loss", ".3g", True, FLOPS),
    ("seconds to the dense loss", "seconds@val_loss=summary.val_loss", ".0f", True, FLOPS),
)
REMARK = (
    "-: not every seed gets there. Seconds are of training, compiling included. This shows which loss each method reaches on "
    "one small model and corpus, with settings alike and tuned for none; it does not show how they compare at scale or after "
    "tuning, nor any saving of time, since masks simulate sparsity."
)


def get_config(variant="mini"):
    variant = variant or "mini"
    cells, rows = {}, []
    budget = flops("dense", STEPS)
    for method in METHODS:
        choices = []
        lengths = {TOKENS: STEPS, FLOPS: steps_for(method, budget)}
        for (choice, steps), seed in itertools.product(lengths.items(), range(SEEDS.get(variant, 0))):
            same = steps == STEPS  # one run is both
            name = f"{method.lower().replace(' ', '_')}{'' if same else '_flops'}_{seed}"
            cells.setdefault(name, run(method, steps, seed))
            choices.append((choice, name))
        rows.append((f"{method}, 75 %" if method in ("static", "SET", "RigL") else method, tuple(choices)))
    return spdf.sweep_config(
        "compare",
        variant,
        variants=tuple(SEEDS),
        title="Every method beside dense training",
        cells=cells,
        rows=rows,
        columns=COLUMNS,
        remark=REMARK,
    )


def run(method, steps, seed=0):
    """A run of `steps` steps."""
    # Named mini in every variant: cells of one may be copied into another, to spare the time.
    phases = ("pretrain", "finetune") if method == "SPDF" else ("pretrain",)
    c = spdf.default_config("compare", "mini", variants=tuple(SEEDS), phases=phases)
    c.seed, c.model = seed, spdf.model_section(model(method))
    c.data.tokenizer_vocab_size, c.data.validation_fraction = MODEL.vocab_size, 0.01
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 50, 400
    c.pretrain.steps, c.pretrain.batch_size = steps, BATCH
    c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 3e-3, 50
    sparsity = c.pretrain.sparsity
    if method in ("dense", "smaller dense"):
        sparsity.rule = "dense"
        return c
    sparsity.rule, sparsity.sparsity = "static", SPARSITY
    if method in ("SET", "RigL"):
        sparsity.rule, sparsity.update_every_steps, sparsity.stop_fraction = method.lower(), 20, 0.75
    elif method == "MST":
        sparsity.rule, sparsity.schedule, sparsity.sparsity = "mst", "three_phases", 0.9
        sparsity.update_every_steps, sparsity.sparsify_head = 10, True
        sparsity.ramp_end, sparsity.ultra_end, sparsity.restoration_end = 0.1, 0.75, 0.9
        sparsity.attention_pattern, sparsity.attention_width = "local_strided", 32
        sparsity.attention_start, sparsity.attention_end = sparsity.ramp_end, sparsity.ultra_end
    elif method == "SPDF":
        c.pretrain.steps = round(0.8 * steps)
        c.finetune.steps, c.finetune.batch_size = steps - c.pretrain.steps, BATCH
        c.finetune.optimizer.peak_learning_rate, c.finetune.optimizer.final_fraction = 1e-3, 0.3
        c.finetune.optimizer.warmup_steps = 10
    return c


def model(method):
    """The dense model, a narrower one of the static one's FLOPs, or a wider one with as many active weights."""
    if method == "smaller dense":
        budget = spdf.train_flops(MODEL, sparsity=SPARSITY)
        narrower = [dataclasses.replace(MODEL, d_model=width) for width in range(8, MODEL.d_model, 8)]
        return min(narrower, key=lambda narrow: abs(spdf.train_flops(narrow) - budget))
    return spdf.widen(MODEL, SPARSITY).config if method == "wide sparse" else MODEL


def flops(method, steps):
    """Counted training FLOPs of a whole run."""
    return spdf.run_cost(spdf.resolve(run(method, steps))).train_flops


def steps_for(method, budget):
    """As many steps as come nearest to a budget of FLOPs."""
    steps = STEPS
    for _ in range(2):  # what a step costs may depend on their number
        steps = round(steps * budget / flops(method, steps))
    return steps


if __name__ == "__main__":
    recipes.how_to_run(__file__)
