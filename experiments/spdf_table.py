"""SPDF's table: sparsity of pre-training x dense or sparse fine-tuning, scored on a task.

Claim   dense fine-tuning makes up for sparse pre-training: BLEU stays close to that of dense pre-training while pre-training
        FLOPs fall, and sparse fine-tuning loses more (Thangarasa et al., UAI 2023, arXiv 2303.10464, tables 1 and 2, figure 3).
Source  settings: spdf_jax/config/recipes.py.
Command python -m spdf_jax.main --config experiments/spdf_table.py            (the embedded restaurant task, any machine)
        then, of the same pre-trained models, in any order or side by side:
        python -m spdf_jax.main --config experiments/spdf_table.py:webnlg --config.task_path=DIR
        python -m spdf_jax.main --config experiments/spdf_table.py:e2e --config.task_path=DIR

mini    3 layers x 128, vocabulary 1024, on the embedded corpus: for each of three seeds 3 pre-trainings of 1200 steps x 16 x
        256 = 4.9M tokens, each fine-tuned with the same seed for 5 epochs on 100 inputs, few enough that pre-training
        matters, and tested on 200.
grid    goes on from mini's pre-trainings with the grid of learning rate x batch, three seeds each: 6 x 4 x 3 fine-tunings.
webnlg, e2e, dart   go on from mini's pre-trainings with the real task, batch 32: 150 steps (WebNLG, DART) or 2 epochs (E2E).

mini's pre-trainings are looked for in runs/spdf_table-mini; --config.pretrained=DIR names another of its workdirs.
"untrained" is fine-tuned from a random initialisation: what pre-training is worth. At 0 % there are no masks, so dense and
sparse fine-tuning are one run.
"""

import itertools

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mini", "grid", "webnlg", "e2e", "dart")
SEEDS = (0, 1, 2)
SPARSITY = {"0": 0.0, "50": 0.5, "75": 0.75}
COLUMNS = (
    ("BLEU", "evaluation.bleu", ".2f", True),
    ("NIST", "evaluation.nist", ".2f"),
    ("ROUGE-L", "evaluation.rouge_l", ".3f"),
    ("CIDEr", "evaluation.cider", ".2f"),
    ("METEOR", "evaluation.meteor", ".3f"),
    ("perplexity", "evaluation.perplexity", ".3f"),
    ("pre-training FLOPs", "summary.before.train_flops", ".3g", True),
    ("fine-tuning FLOPs", "summary.train_flops", ".3g", True),
)


def get_config(variant="mini"):
    variant = variant or "mini"
    task = variant if variant in ("webnlg", "e2e", "dart") else "restaurant"
    path = spdf.shared_value("" if task == "restaurant" else f"data/{task}")
    pretrained = spdf.shared_value("runs/spdf_table-mini")
    choices = [("", 1e-3, 16)]
    if variant == "grid":
        choices = [(f"rate {r:g}, batch {b}", r, b) for r, b in itertools.product((2e-3, 1e-3), (8, 16))]
    cells, rows = {}, {}
    if variant == "mini":
        for (name, sparsity), seed in itertools.product(SPARSITY.items(), SEEDS):
            c = spdf.default_config("spdf_table", variant, variants=VARIANTS)
            recipes.mini_pretraining(c, sparsity)
            c.seed = seed
            cells[f"pretrain_{name}_{seed}"] = c
    starts = [
        ("0", "dense"),
        ("50", "dense"),
        ("50", "sparse"),
        ("75", "dense"),
        ("75", "sparse"),
        ("untrained", "dense"),
    ]
    for (start, mode), (choice, rate, batch), seed in itertools.product(starts, choices, SEEDS):
        c = spdf.default_config("spdf_table", variant, variants=VARIANTS, phases=("finetune",))
        if start != "untrained":
            cell = f"pretrain_{start}_{seed}"
            c.init_from = f"cell:{cell}" if variant == "mini" else pretrained + f"/cells/{cell}"
        c.seed = seed
        recipes.spdf_finetuning(c, task)
        recipes.mini_finetuning(c)
        c.finetune.task.path, c.finetune.task.test_examples = path, 200
        c.finetune.optimizer.peak_learning_rate, c.finetune.batch_size = rate, batch
        if task != "restaurant":
            c.finetune.batch_size, c.finetune.epochs = 32, 2 if task == "e2e" else 0
            if not c.finetune.epochs:
                c.finetune.steps, c.loop.eval_every_steps = 150, 50
        if mode == "sparse":
            c.finetune.sparsity.rule, c.finetune.sparsity.sparsity = "static", SPARSITY[start]
        name = f"finetune_{start}_{mode}" + (f"_{rate:.0e}_{batch}" if choice else "") + f"_{seed}"
        cells[name] = c
        label = "untrained, then dense fine-tuning" if start == "untrained" else f"{start} %, {mode} fine-tuning"
        rows.setdefault(label, []).append((choice, name))
    rows = {
        "0 %, dense fine-tuning": rows["0 %, dense fine-tuning"],
        "0 %, sparse fine-tuning": rows["0 %, dense fine-tuning"],
    } | rows
    title = f"SPDF on {task}: pre-training sparsity x fine-tuning, {len(SEEDS)} seeds"
    sweep = spdf.sweep_config(
        "spdf_table", variant, variants=VARIANTS, title=title, cells=cells, rows=list(rows.items()), columns=COLUMNS
    )
    sweep.task_path, sweep.pretrained = path, pretrained
    return sweep


if __name__ == "__main__":
    recipes.how_to_run(__file__)
