"""Sparse from dense: a dense model pruned at once, trained on under its masks, alone or taught by the dense one, fine-tuned.

Claim   none of its own. It shows, on one small model and corpus, what pruning costs at once, how much of that continued sparse
        training makes up for, alone and distilled, and what is left of it after fine-tuning dense or sparse on a task. Sparse
        Llama (arXiv 2405.03594) reports full recovery at 70 % of Llama 2 7B by this chain, without fine-tuning sparse.
Source  magnitude; Wanda (arXiv 2306.11695); SparseGPT (arXiv 2301.00774); distillation: Hinton et al. (arXiv 1503.02531), half
        of the loss at temperature 1; fine-tuning: SPDF (arXiv 2303.10464), see spdf_jax/config/recipes.py.
Command python -m spdf_jax.main --config experiments/sparse_from_dense.py
        python -m spdf_jax.main --config experiments/sparse_from_dense.py --job report   (the page again)

mini    2 layers x 96, context 128, vocabulary 1024: 0.3M parameters; for each of three seeds 600 dense steps x 8 x 128 = 0.6M
        tokens of the embedded corpus, then from there 200 steps more: dense, which is what the same training buys without
        pruning, and at 50, 70 and 80 % of zeros by each method with and without the teacher; each of these fine-tuned on 100
        inputs of the restaurant task for up to 3 epochs, and tested on 100. 171 cells, resumable one by one: an hour on two
        cores.
"""

import itertools

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini",)
SEEDS = (0, 1, 2)
METHODS = {"magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
SPARSITY = {"50": 0.5, "70": 0.7, "80": 0.8}
DENSE_STEPS, MORE_STEPS = 600, 200
CONTINUED, DENSE, SPARSE = "continued", "dense fine-tuning", "sparse fine-tuning"
COLUMNS = (
    ("loss after training on", "summary.val_loss", ".3f", True, CONTINUED),
    ("loss after pruning", "summary.initial_val_loss", ".3f", False, CONTINUED),
    ("FLOPs up to there", "summary.before.train_flops+summary.train_flops", ".3g", True, CONTINUED),
    ("seconds up to there", "summary.before.wall_seconds+summary.wall_seconds", ".0f", False, CONTINUED),
    ("BLEU, dense fine-tuning", "evaluation.bleu", ".2f", True, DENSE),
    ("perplexity", "evaluation.perplexity", ".3f", False, DENSE),
    ("FLOPs of dense fine-tuning", "summary.train_flops", ".3g", False, DENSE),
    ("BLEU, sparse fine-tuning", "evaluation.bleu", ".2f", True, SPARSE),
    ("perplexity, sparse", "evaluation.perplexity", ".3f", False, SPARSE),
    ("FLOPs of sparse fine-tuning", "summary.train_flops", ".3g", True, SPARSE),
)


def get_config(variant="mini"):
    variant = variant or "mini"
    starts = [("control", "", 0.0, False)] + [
        (f"{method}_{share}" + ("_taught" if taught else ""), method, sparsity, taught)
        for taught, (share, sparsity), method in itertools.product((False, True), SPARSITY.items(), METHODS)
    ]
    cells = {f"dense_{seed}": trained(variant, seed) for seed in SEEDS}
    # Cells of one program after each other: it is made once.
    for (name, method, sparsity, taught), seed in itertools.product(starts, SEEDS):
        cells[f"{name}_{seed}"] = continued(variant, seed, method, sparsity, taught)
    for (name, *_), seed in itertools.product(starts, SEEDS):
        cells[f"{name}_dense_{seed}"] = finetuned(variant, seed, f"{name}_{seed}", 0.0)
    for (name, _, sparsity, _), seed in itertools.product(starts[1:], SEEDS):
        cells[f"{name}_sparse_{seed}"] = finetuned(variant, seed, f"{name}_{seed}", sparsity)
    rows = []
    for name, method, sparsity, taught in sorted(starts, key=lambda start: start[2]):
        label = f"{100 * sparsity:.0f} %, {METHODS[method]}{', distilled' if taught else ''}" if method else "dense"
        ends = {CONTINUED: "", DENSE: "_dense", SPARSE: "_sparse" if method else "_dense"}
        rows.append((label, [(end, f"{name}{cell}_{seed}") for end, cell in ends.items() for seed in SEEDS]))
    return spdf.sweep_config(
        "sparse_from_dense",
        variant,
        variants=VARIANTS,
        title=f"Pruned at once, trained on, fine-tuned: {len(SEEDS)} seeds",
        cells=cells,
        rows=rows,
        columns=COLUMNS,
        remark="Losses are nats a token of the corpus, scores of the restaurant task. FLOPs are counted, a teacher's, too; "
        "pruning itself is in the seconds alone. The dense row is trained on for as many steps and fine-tuned once.",
    )


def trained(variant, seed):
    """The dense model that all the others of a seed start from."""
    c = spdf.default_config("sparse_from_dense", variant, variants=VARIANTS)
    _common(c, seed)
    c.data.validation_fraction = 0.005
    c.pretrain.steps, c.pretrain.batch_size = DENSE_STEPS, 8
    c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 3e-3, 50
    c.loop.eval_every_steps = c.loop.checkpoint_every_steps = DENSE_STEPS
    return c


def continued(variant, seed, method, sparsity, taught):
    """Trained on, dense or under the masks that a method makes."""
    c, dense = trained(variant, seed), f"cell:dense_{seed}"
    c.init_from, c.pretrain.steps = dense, MORE_STEPS
    c.pretrain.optimizer.peak_learning_rate, c.pretrain.optimizer.warmup_steps = 1e-3, 20
    if method:
        s = c.pretrain.sparsity
        s.rule, s.sparsity, s.init = "static", sparsity, method
    if taught:
        c.pretrain.distill.teacher = dense
    return c


def finetuned(variant, seed, start, sparsity):
    """Fine-tuned on the task, dense or under the masks that are there."""
    c = spdf.default_config("sparse_from_dense", variant, variants=VARIANTS, phases=("finetune",))
    recipes.spdf_finetuning(c, "restaurant")
    recipes.mini_finetuning(c)
    _common(c, seed)
    c.init_from, c.finetune.seq_len, c.finetune.epochs = f"cell:{start}", c.model.context, 3
    if sparsity:
        c.finetune.sparsity.rule, c.finetune.sparsity.sparsity = "static", sparsity
    return c


def _common(c, seed):
    c.seed = seed
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.context, c.model.vocab_size = 2, 4, 96, 128, 1024
    c.data.tokenizer_vocab_size = c.model.vocab_size


if __name__ == "__main__":
    recipes.how_to_run(__file__)
