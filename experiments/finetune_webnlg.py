"""SPDF's fine-tuning on WebNLG: triples to text.

Claim   a model pre-trained sparse and fine-tuned dense on WebNLG reaches BLEU 62.64 on seen categories (GPT-2
        small at 75 %), 63.42 dense (Thangarasa et al., UAI 2023, arXiv 2303.10464, table 1).
Source  settings: spdf_jax/config/recipes.py. Data: WebNLG as released (a folder with train, dev and test, such as
        release_v3.0/en), or train.xml, dev.xml, test.xml.
Command python -m spdf_jax.main --config experiments/finetune_webnlg.py --config.finetune.task.path=DIR
        then the same with --job evaluate: decodes the test set and scores it.

mini    3 layers x 128: 1200 steps of pre-training at 75 % on the embedded corpus, then dense fine-tuning, 5 epochs.
        About 10 to 40 minutes on 2 CPU cores.
125m    goes on from runs/gpt2_spdf-125m_75. Not run here.
gpt2    goes on from the Hugging Face GPT-2 in data/gpt2 (config.json, model.safetensors, tokenizer.json). Not run here.
"""

import spdf_jax as spdf


def get_config(variant="mini"):
    return spdf.finetuning_experiment("finetune_webnlg", variant, "webnlg", "data/webnlg")
