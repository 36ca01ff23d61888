"""SPDF's table: sparsity of pre-training x dense or sparse fine-tuning, scored on a task.

Claim   dense fine-tuning makes up for sparse pre-training: BLEU stays close to that of dense pre-training while pre-training
        FLOPs fall, and sparse fine-tuning loses more (Thangarasa et al., UAI 2023, arXiv 2303.10464, tables 1 and 2, figure 3).
Source  settings: spdf_jax/recipes.py.
Command python -m spdf_jax.main --config experiments/spdf_table.py            (the embedded restaurant task, any machine)
        python -m spdf_jax.main --config experiments/spdf_table.py:webnlg --config.task_path=DIR
        python -m spdf_jax.main --config experiments/spdf_table.py:e2e --config.task_path=DIR

mini    3 layers x 128, vocabulary 1024, on the embedded corpus: 3 pre-trainings of 1200 steps x 16 x 256 = 4.9M tokens, 6
        fine-tunings of 5 epochs on 100 inputs: few enough that pre-training matters.
grid    the same with the learning-rate x batch grid, three seeds each: 6 x 4 x 3 fine-tunings.
webnlg, e2e, dart   the real task in the place of the embedded one, batch 32: 150 steps (WebNLG, DART) or 2 epochs (E2E).

"untrained" is fine-tuned from a random initialisation: what pre-training is worth. At 0 % there are no masks, so dense and
sparse fine-tuning are one run.
"""

import itertools

import spdf_jax as spdf

VARIANTS = ("mini", "grid", "webnlg", "e2e", "dart")
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
    choices = [("", 1e-3, 16, 0)]
    if variant == "grid":
        grid = itertools.product((2e-3, 1e-3), (8, 16), range(3))
        choices = [(f"rate {rate:g}, batch {batch}", rate, batch, seed) for rate, batch, seed in grid]
    cells, rows = {}, {}
    for name, sparsity in SPARSITY.items():
        # Named mini in every variant: cells/pretrain_* of one may be copied into another, to spare the time.
        c = spdf.default_config("spdf_table", "mini", variants=VARIANTS)
        spdf.mini_pretraining(c, sparsity)
        cells[f"pretrain_{name}"] = c
    starts = [
        ("0", "dense"),
        ("50", "dense"),
        ("50", "sparse"),
        ("75", "dense"),
        ("75", "sparse"),
        ("untrained", "dense"),
    ]
    for (start, mode), (choice, rate, batch, seed) in itertools.product(starts, choices):
        c = spdf.default_config("spdf_table", variant, variants=VARIANTS, phases=("finetune",))
        c.init_from = "" if start == "untrained" else f"cell:pretrain_{start}"
        c.seed = seed
        spdf.spdf_finetuning(c, task)
        spdf.mini_finetuning(c)
        c.finetune.task.path = path
        c.finetune.optimizer.peak_learning_rate, c.finetune.batch_size = rate, batch
        if task != "restaurant":
            c.finetune.batch_size, c.finetune.epochs, c.finetune.steps = 32, 2 if task == "e2e" else 0, 150
            c.loop.eval_every_steps = 50
        if mode == "sparse":
            c.finetune.sparsity.rule, c.finetune.sparsity.sparsity = "static", SPARSITY[start]
        name = f"finetune_{start}_{mode}" + (f"_{rate:.0e}_{batch}_{seed}" if choice else "")
        cells[name] = c
        label = "untrained, then dense fine-tuning" if start == "untrained" else f"{start} %, {mode} fine-tuning"
        rows.setdefault(label, []).append((choice, name))
    rows = {
        "0 %, dense fine-tuning": rows["0 %, dense fine-tuning"],
        "0 %, sparse fine-tuning": rows["0 %, dense fine-tuning"],
    } | rows
    title = f"SPDF on {task}: pre-training sparsity x fine-tuning"
    sweep = spdf.sweep_config(
        "spdf_table", variant, variants=VARIANTS, title=title, cells=cells, rows=list(rows.items()), columns=COLUMNS
    )
    sweep.task_path = path
    return sweep
