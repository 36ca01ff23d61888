"""SPDF's fine-tuning: a model pre-trained sparse goes on dense, on one task.

Claim   pre-trained at 75 % and fine-tuned dense, GPT-2 small loses little to the same pre-trained dense (Thangarasa et al., UAI
        2023, arXiv 2303.10464, table 1):
        e2e       BLEU 66.50, dense 67.49     meaning representations of restaurants to text
        webnlg    BLEU 62.64, dense 63.42     triples to text; seen categories
        dart      BLEU 44.97, dense 46.30     triples from tables to text
        curation  perplexity 17.14, dense 13.38     articles to summaries
        On restaurant, which is ours, it writes fluent, mostly correct sentences at a scale that runs anywhere; spdf_table.py
        compares that with dense and sparse alternatives.
Source  settings: spdf_jax/config/recipes.py. Data: restaurant is generated, see spdf_jax/data/restaurant.py. The others as
        released, in data/TASK or where --config.finetune.task.path says:
        e2e       E2E NLG challenge (Novikova et al. 2017), trainset.csv and the like, or cleaned (train-fixed.no-ol.csv); a
                  folder with devset.csv alone is split by input
        webnlg    a folder with train, dev and test, such as release_v3.0/en, or train.xml, dev.xml, test.xml
        dart      DART (Nan et al. 2021): train, dev and test JSON
        curation  Curation Corpus: a CSV with columns article and summary
Command python -m spdf_jax.main --config experiments/finetune.py               (restaurant, any machine, no data)
        python -m spdf_jax.main --config experiments/finetune.py:e2e --config.finetune.task.path=DIR
        then the same with --job evaluate: decodes the test set and scores it.

TASK        3 layers x 128: 1200 steps of pre-training at 75 % on the embedded corpus, then dense fine-tuning, 5 epochs: of
            restaurant on 100 inputs, about 5 minutes on 2 CPU cores; of the others on all, 10 to 40.
TASK_125m   goes on from runs/gpt2_spdf-125m_75. Not run here.
TASK_gpt2   goes on from the Hugging Face GPT-2 in data/gpt2 (config.json, model.safetensors, tokenizer.json). Not run here.
"""

import spdf_jax as spdf
from spdf_jax.config import recipes

VARIANTS = tuple(task + start for start in ("", "_125m", "_gpt2") for task in recipes.LENGTH_PENALTY)


def get_config(variant="restaurant"):
    variant = variant or "restaurant"
    task = variant.removesuffix("_125m").removesuffix("_gpt2")
    mini = variant == task
    phases = ("pretrain", "finetune") if mini else ("finetune",)
    c = spdf.default_config("finetune", variant, variants=VARIANTS, phases=phases)
    if mini:
        recipes.mini_pretraining(c, 0.75)
    elif variant.endswith("_125m"):
        c.model, c.init_from = spdf.model_section(spdf.GPT_SIZES["125m"]), "runs/gpt2_spdf-125m_75"
    else:
        c.model, c.init_from = spdf.model_section(spdf.GPT_SIZES["124m"]), "data/gpt2"
    recipes.spdf_finetuning(c, task, "" if task == "restaurant" else f"data/{task}")
    if mini:
        recipes.mini_finetuning(c)
    return c


if __name__ == "__main__":
    recipes.how_to_run(__file__)
