"""SPDF's fine-tuning on Curation Corpus: articles to summaries.

Claim   a model pre-trained sparse and fine-tuned dense on Curation Corpus reaches perplexity 17.14 (GPT-2 small at
        75 %), 13.38 dense (Thangarasa et al., UAI 2023, arXiv 2303.10464, table 1).
Source  settings: spdf_jax/config/recipes.py. Data: Curation Corpus: a CSV with columns article and summary.
Command python -m spdf_jax.main --config experiments/finetune_curation.py --config.finetune.task.path=DIR
        then the same with --job evaluate: decodes the test set and scores it.

mini    3 layers x 128: 1200 steps of pre-training at 75 % on the embedded corpus, then dense fine-tuning, 5 epochs.
        About 10 to 40 minutes on 2 CPU cores.
125m    goes on from runs/gpt2_spdf-125m_75. Not run here.
gpt2    goes on from the Hugging Face GPT-2 in data/gpt2 (config.json, model.safetensors, tokenizer.json). Not run here.
"""

import spdf_jax as spdf


def get_config(variant="mini"):
    return spdf.finetuning_experiment("finetune_curation", variant, "curation", "data/curation")
