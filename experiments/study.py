"""The claims, tested: rates chosen on one seed, losses measured on five others, at equal tokens, FLOPs and seconds.

Claim   none of its own; each study asks whether a paper's holds at small scale, and its page answers with a 95 % interval.
Source  MST (arXiv 2408.11746), SPDF (2303.10464), sparse wide (2303.11525; under repetition 2606.01155), RigL (1911.11134),
        SET (Mocanu et al. 2018), SMET (2606.00888).
Command python -m spdf_jax.main --config experiments/study.py:mst       (and :spdf, :wide, :moving; the same command goes on)
        ... study.py:wide_text --config.text_path=FILE                  (wide's eight epochs, of another text)
        ... study.py:spdf --config.webnlg=DIR --config.e2e=DIR          (what is not there is left out, and said so)
        ... study.py:mst --job report                                   (page and table, of experiments/results/mst.json)
        ... study.py:mst --config.study.only=CELL --workdir runs/again  (one cell again, its loss beside the recorded one)

Text is the source of pinned libraries (data.source "libraries"): 9M tokens by a vocabulary of 1,024, more than any run sees but
where repetition is asked for. Rates are of one grid for all, chosen for each method by the validation loss of seed 0, at the
length that each study says; seeds 1 to 5 order the data alike for all. Compared with dense at equal FLOPs and seconds is its
loss there, on the line between its runs of several lengths, each with a schedule of its own. Cells lie in runs/study-cells,
which the studies share; what a study measured is runs/study-VARIANT/study.json, to be kept in experiments/results/VARIANT.json.

mst     2 layers x 128 (0.5M parameters), 1,000, 2,000 and 4,000 steps x 4 x 128 tokens: dense (250 and 500 steps, too), four
        schedules of MST, static masks at 75 % and a dense model of their FLOPs. Rates at 1,000 steps. 150 cells, 3 hours.
spdf    the same model, context 256: 1,600 steps x 8 x 256 tokens at 0, 50 and 75 % (rates at 400 steps), then dense and sparse
        fine-tuning on restaurant, WebNLG and E2E, scored by BLEU. 138 cells, 3 hours.
wide    2 layers x 256 dense beside blocks of 64 at 50, 75 and 87.5 % with as many active weights: 1,000 steps x 4 x 128
        tokens, each seen once or eight times; dense at 250 to 1,500 steps. Rates at 500 steps. 110 cells, 3 hours.
wide_text   wide's eight epochs alone, of a text of yours. 55 cells, 90 minutes.
moving  mst's model, 1,000 steps: static, SET, RigL and MST's growing at 75, 90 and 95 %, whose regrown weights' optimiser state
        is reset, kept or SMET's. Rates with reset. 235 cells, 3 hours; those of dense and static at 75 % are mst's.

Times are estimates for one core (AMD EPYC), from the first 40 cells of mst: a cell is computed by one thread, wherever it runs,
so that anyone's sums have the same order, and two studies run beside each other on two cores. A study says itself, after its
first cells, how long it will take.
Not run yet.
"""

import dataclasses
import re
from pathlib import Path

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = ("mst", "spdf", "wide", "moving", "wide_text")
TUNED_ON, SEEDS = 0, (1, 2, 3, 4, 5)
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SMALL = spdf.GPTConfig(n_layer=2, n_head=4, d_model=128, vocab_size=1024, context=128)
LONG = dataclasses.replace(SMALL, context=256)
MIDDLE = dataclasses.replace(SMALL, d_model=256)
#: Widths at which blocks of 64 have as many active weights as MIDDLE: exactly, which `spdf.widen` comes to within 1 % of.
WIDE = {0.5: (384, 1280), 0.75: (512, 2048), 0.875: (512, 5120)}
#: MST: the ends of warm-up, ultra-sparse phase and restoration, and the peak sparsity.
MST = {
    "MST": (0.05, 0.8, 0.906, 0.9),  # as 124m is calibrated to 4.0x, see gpt2_mst.py
    "MST, shorter ultra-sparse phase": (0.05, 0.5, 0.606, 0.9),
    "MST, lower peak": (0.05, 0.8, 0.906, 0.75),
    "MST, earlier restoration": (0.05, 0.6, 0.906, 0.9),
}
LOSS = {"measure": "summary.val_loss", "unit": "nats/token", "reference": "dense"}
SCALE = "It is of small models and few tokens: it does not show what holds at the papers' scale."


def get_config(variant="mst"):
    variant = variant or "mst"
    builders = {"mst": mst, "spdf": after_pretraining, "wide": wide, "moving": moving, "wide_text": wide_text}
    study = Study(variant)
    title, about, shared = builders.get(variant, lambda study: ("", {}, {}))(study)
    sweep = spdf.sweep_config(
        "study",
        variant,
        variants=VARIANTS,
        title=title,
        cells=study.cells,
        rows=study.rows,
        remark=SCALE,
        study={"seeds": SEEDS, "record": str(Path(__file__).parent / "results" / f"{variant}.json"), **about},
    )
    sweep.update(shared)
    return sweep


class Study:
    """The cells and rows of a study as they are listed."""

    def __init__(self, variant):
        self.variant, self.cells, self.rows = variant, {}, []

    def row(self, method, steps, tuned, make, group="", decided=None):
        """A row of a method at a length; ``make(rate, steps)`` is a run.

        Its rate is chosen among runs of `tuned` steps, or where others are: `decided`. Returns its label, and what decides.
        """
        label = f"{method}, {steps:,} steps" + (f", {group}" if group else "")
        pairs = {length: self._pairs(method, length, make, group) for length in {steps, steps if decided else tuned}}
        decided = decided or pairs[tuned]
        self.rows.append((label, pairs[steps], decided, method, group))
        return label, decided

    def _pairs(self, method, steps, make, group):
        keys = {rate: key(method, group, steps, rate) for rate in RATES}
        for rate, name in keys.items():
            if name not in self.cells:
                self.cells[name] = make(rate, steps)
        return tuple((f"rate {rate:g}", name) for rate, name in keys.items())


def key(*parts):
    """The key of a cell in the config, of what tells it from the others."""
    return re.sub(r"\W+", "_", " ".join(map(str, parts))).lower()


def pretrain(rate, steps, model=SMALL, batch=4, unique=0, **sparsity):
    """A run of text; `sparsity` has fields of its section."""
    # One name for all studies, which share cells.
    c = spdf.default_config("study", "cell", variants=("cell",))
    c.seed, c.model = TUNED_ON, spdf.model_section(model)
    c.data.source, c.data.tokenizer_vocab_size, c.data.validation_fraction = "libraries", model.vocab_size, 0.004
    c.data.unique_tokens = unique
    c.loop.log_every_steps, c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 50, steps, max(steps // 2, 1)
    c.loop.keep_checkpoints = 1
    phase = c.pretrain
    phase.steps, phase.batch_size = steps, batch
    phase.optimizer.peak_learning_rate, phase.optimizer.warmup_steps = rate, max(steps // 20, 1)
    regrowth = sparsity.pop("regrowth", "reset")
    if sparsity.get("rule", "dense") != "dense":
        phase.sparsity.update(sparsity)
        phase.optimizer.regrowth = regrowth
    else:
        phase.sparsity.rule = "dense"
    return c


def mst(study):
    lengths, tuned = (1000, 2000, 4000), 1000
    budget = spdf.train_flops(SMALL, sparsity=0.75)
    narrower = [dataclasses.replace(SMALL, d_model=width) for width in range(8, SMALL.d_model, 8)]
    small = min(narrower, key=lambda model: abs(spdf.train_flops(model) - budget))
    for steps in (250, 500, *lengths):
        study.row("dense", steps, tuned, pretrain)
    for method, (ramp, ultra, restored, peak) in MST.items():
        how = {
            "rule": "mst",
            "schedule": "three_phases",
            "sparsity": peak,
            "sparsify_head": True,
            "update_every_steps": 20,
        }
        how |= {"ramp_end": ramp, "ultra_end": ultra, "restoration_end": restored}
        how |= {
            "attention_pattern": "local_strided",
            "attention_width": 32,
            "attention_start": ramp,
            "attention_end": ultra,
        }
        for steps in lengths:
            study.row(method, steps, tuned, lambda rate, steps, how=how: pretrain(rate, steps, **how))
    for steps in lengths:
        study.row("static, 75 %", steps, tuned, lambda rate, steps: pretrain(rate, steps, rule="static", sparsity=0.75))
    for steps in lengths:
        study.row("smaller dense", steps, tuned, lambda rate, steps: pretrain(rate, steps, small))
    answers = [(f"MST, {steps:,} steps", budget) for budget in ("tokens", "flops") for steps in reversed(lengths)]
    return "Does MST reach the quality of dense training?", LOSS | {"answers": tuple(answers)}, {}


def after_pretraining(study):
    tuned, steps, batch = 400, 1600, 8
    paths = {name: spdf.shared_value(f"data/{name}") for name in ("webnlg", "e2e")}
    sparsities = {"0 %": 0.0, "50 %": 0.5, "75 %": 0.75}
    for label, sparsity in sparsities.items():
        rule = {"rule": "static", "sparsity": sparsity} if sparsity else {}
        study.row(
            f"{label} pre-trained", steps, tuned, lambda rate, steps, r=rule: pretrain(rate, steps, LONG, batch, **r)
        )
    answers = []
    for task, path in {"restaurant": "", **paths}.items():
        for label, sparsity in sparsities.items():
            for mode in ("dense", "sparse") if sparsity else ("dense",):
                choices = []
                for rate in RATES:
                    source = key(f"{label} pre-trained", "", steps, rate)
                    for then in (5e-4, 2e-3):
                        name = key(task, label, mode, rate, then)
                        study.cells[name] = finetune(source, task, path, then, sparsity if mode == "sparse" else 0.0)
                        choices.append((f"rates {rate:g} and {then:g}", name))
                method = f"{label}, {mode} fine-tuning"
                study.rows.append((f"{method}, {task}", tuple(choices), (), method, task))
        answers.append((f"75 %, dense fine-tuning, {task}", "tokens"))
    title = "Does dense fine-tuning make up for pre-training at 75 %?"
    about = {
        "measure": "evaluation.bleu",
        "unit": "BLEU",
        "reference": "0 %, dense fine-tuning",
        "answers": tuple(answers),
    }
    return title, about, paths


def finetune(source, task, path, rate, sparsity):
    c = spdf.default_config("study", "cell", variants=("cell",), phases=("finetune",))
    c.seed, c.init_from, c.model = TUNED_ON, f"cell:{source}", spdf.model_section(LONG)
    c.data.source, c.data.tokenizer_vocab_size, c.data.validation_fraction = "libraries", LONG.vocab_size, 0.004
    recipes.spdf_finetuning(c, task)
    phase = c.finetune
    phase.task.path, phase.task.test_examples = path, 200
    phase.optimizer.peak_learning_rate, phase.optimizer.warmup_steps, phase.patience_evaluations = rate, 10, 0
    c.loop.log_every_steps, c.loop.keep_checkpoints, c.loop.checkpoint_every_steps = 50, 1, 1000
    if task == "restaurant":
        phase.task.train_examples, phase.task.validation_examples = 100, 50
    else:
        phase.epochs, phase.steps, c.loop.eval_every_steps = 0, 120, 60
    c.decode.method, c.decode.batch_size, c.decode.no_repeat_ngram, c.decode.length_penalty = "greedy", 64, 4, 0.9
    if sparsity:
        phase.sparsity.rule, phase.sparsity.sparsity = "static", sparsity
    return c


def wide(study, groups=None, source=None):
    steps, tuned, batch = 1000, 500, 4
    tokens = steps * batch * MIDDLE.context
    groups = groups or {"each text once": 0, "eight epochs": tokens // 8}
    answers = []
    for group, unique in groups.items():

        def run(rate, steps, model=MIDDLE, unique=unique, **sparsity):
            c = pretrain(rate, steps, model, batch, unique, **sparsity)
            if source is not None:
                c.data.source, c.data.path = "text", source
            return c

        for length in (250, 500, steps, 1500):
            study.row("dense", length, tuned, run, group)
        for sparsity, (width, hidden) in WIDE.items():
            model = dataclasses.replace(MIDDLE, d_model=width, d_ff=hidden)
            how = {"rule": "static", "sparsity": sparsity, "pattern": "block64", "sparse_compute": "blocks"}

            def wider(rate, steps, model=model, how=how, run=run):
                return run(rate, steps, model, **how)

            label, _ = study.row(f"wide, {100 * sparsity:g} %", steps, tuned, wider, group)
            answers += [(label, budget) for budget in ("flops", "seconds")]
    title = "Is a wider model with zero blocks better than a dense one at equal FLOPs, and at equal seconds?"
    return title, LOSS | {"answers": tuple(sorted(answers, key=lambda answer: "75 %" not in answer[0]))}, {}


def wide_text(study):
    path = spdf.shared_value("data/text.txt")
    title, about, _ = wide(study, {"eight epochs": 64_000}, path)
    return title, about, {"text_path": path}


def moving(study):
    steps = tuned = 1000  # dense and static at 75 % are cells of mst
    study.row("dense", steps, tuned, pretrain)
    answers = []
    for sparsity in (0.75, 0.9, 0.95):
        group = f"{100 * sparsity:g} %"
        for length in (steps, 1150):  # beyond it, since dense gradients of topology steps count
            how = {"rule": "static", "sparsity": sparsity}
            study.row("static", length, tuned, lambda rate, steps, how=how: pretrain(rate, steps, **how), group)
        for name, rule in {"SET": "set", "RigL": "rigl", "MST's growing": "mst"}.items():
            decided = None
            for regrowth in ("reset", "keep", "smet"):
                how = {"rule": rule, "sparsity": sparsity, "update_every_steps": 50, "stop_fraction": 0.75}
                how["regrowth"] = regrowth

                def run(rate, steps, how=how):
                    return pretrain(rate, steps, **how)

                label, decided = study.row(f"{name}, {regrowth}", steps, tuned, run, group, decided)
                if regrowth == "reset" and name != "SET":
                    answers.append((label, "tokens"))
    about = LOSS | {"reference": "static", "answers": tuple(answers)}
    return "Are masks that move better than static ones?", about, {}


if __name__ == "__main__":
    recipes.how_to_run(__file__)
