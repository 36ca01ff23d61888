"""SPDF's fine-tuning on the embedded restaurant task: attributes to text.

Claim   a model pre-trained sparse and fine-tuned dense on the embedded restaurant task writes fluent, mostly correct sentences
        at a scale that runs anywhere; experiments/spdf_table.py compares it with dense and sparse alternatives.
Source  settings: spdf_jax/config/recipes.py. Data: generated, see spdf_jax/data/restaurant.py.
Command python -m spdf_jax.main --config experiments/finetune_restaurant.py
        then the same with --job evaluate: decodes the test set and scores it.

mini    3 layers x 128: 1200 steps of pre-training at 75 % on the embedded corpus, then dense fine-tuning; 100 inputs, 5 epochs.
        About 5 minutes on 2 CPU cores.
125m    goes on from runs/gpt2_spdf-125m_75. Not run here.
gpt2    goes on from the Hugging Face GPT-2 in data/gpt2 (config.json, model.safetensors, tokenizer.json). Not run here.
"""

import spdf_jax as spdf


def get_config(variant="mini"):
    return spdf.finetuning_experiment("finetune_restaurant", variant, "restaurant")
