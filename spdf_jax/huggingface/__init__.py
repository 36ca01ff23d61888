"""GPT-2 folders of Hugging Face `transformers`: write one that it opens as it is, read one that it wrote.

What is GPT-2's own, its names, layout and config, is in `gpt2`; files are written and read by `folder`, whatever the model.
"""

from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer

from spdf_jax.errors import InputError
from spdf_jax.huggingface import gpt2
from spdf_jax.huggingface.folder import (
    DTYPES,
    cast,
    check_end_of_text,
    check_shapes,
    check_stored,
    check_vacant,
    json_text,
    read_json_file,
    read_tensor,
    shapes,
    stored_tensors,
    tokenizer_files,
    write_folder,
)
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.gpt import GPT
from spdf_jax.sparsity.masks import apply_masks


def save_gpt2(
    folder: str | PathLike[str],
    config: GPTConfig,
    params: Any,
    *,
    masks: Any = None,
    tokenizer: Tokenizer | None = None,
    end_of_text_id: int | None = None,
    dtype: str = "float32",
) -> None:
    """Writes a model as a folder that transformers' ``AutoModelForCausalLM`` and ``AutoTokenizer`` open.

    The folder holds ``model.safetensors``, ``config.json``, ``generation_config.json`` and, with a tokenizer,
    ``tokenizer.json`` and ``tokenizer_config.json``. It appears whole or not at all. The model there computes the same logits
    under causal attention, the only pattern that GPT-2 has: masked weights are exact zeros, missing biases are zeros, and
    S-muPar's factors on queries and logits are multiplied into ``attn_q`` and ``ln_f``.

    Args:
      folder: must not exist yet, or be empty.
      config: of the model.
      params: its parameters, see `spdf_jax.GPT`.
      masks: mask tree to apply; None where the parameters are masked already, or dense.
      tokenizer: may have fewer ids than the model, not more.
      end_of_text_id: begins and ends a text; None takes the tokenizer's ``<|endoftext|>``, or no such id without a tokenizer.
      dtype: of the weights in the file: ``float32`` | ``float16`` | ``bfloat16``.

    Raises:
      InputError: the folder holds something or cannot be written; parameters or masks of another model, or a model that GPT-2
        cannot express; a weight that is not finite in `dtype`; a tokenizer that does not fit.

    >>> import jax, spdf_jax as spdf
    >>> config = spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=11, context=4)
    >>> params = spdf.GPT(config).init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"]
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_gpt2(folder, config, params)
    ...     loaded_config, loaded = load_gpt2(folder)
    >>> loaded_config == config, bool((loaded["wte"]["embedding"] == params["wte"]["embedding"]).all())
    (True, True)
    """
    folder = Path(folder).resolve()
    if dtype not in DTYPES.values():
        raise InputError(f"export dtype: {dtype!r} is not one of {', '.join(DTYPES.values())}")
    gpt2.check_expressible(config)
    check_vacant(folder)
    end = check_end_of_text(config.vocab_size, tokenizer, end_of_text_id)
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)["params"]
    check_shapes("export: params do not fit the model's config", shapes(params), shapes(wanted))
    if masks is not None:
        params = apply_masks(params, masks)
    ends = {"bos_token_id": end, "eos_token_id": end}
    jsons = {"config.json": gpt2.config_json(config, dtype) | ends, "generation_config.json": ends}
    texts = {name: json_text(content) for name, content in jsons.items()}
    if tokenizer is not None:
        assert end is not None, "check_end_of_text sees to it"
        texts |= tokenizer_files(tokenizer, end, config.context)
    tensors = {name: cast(name, tensor, dtype) for name, tensor in gpt2.to_tensors(config, params).items()}
    write_folder(folder, texts, {gpt2.stored_name(name): tensor for name, tensor in tensors.items()})


def load_gpt2(folder: str | PathLike[str]) -> tuple[GPTConfig, Any]:
    """Reads a GPT-2 that transformers, or `save_gpt2`, wrote.

    Args:
      folder: with ``config.json`` and ``model.safetensors``, or the parts that ``model.safetensors.index.json`` names.
        Weights may be float32, float16 or bfloat16, their names with or without ``transformer.``. Its tokenizer is read by
        `spdf_jax.data.load_tokenizer`.

    Returns:
      The config, with biases, float32 compute and the rate of GPT-2's residual dropout (ours has none on attention
      probabilities, and no rate of its own on the embedding), and float32 parameters as `spdf_jax.GPT` has them, on JAX's
      default device. To read a model that is larger than it, call this under ``jax.default_device(jax.devices("cpu")[0])``.

    Raises:
      InputError: a file is missing, damaged or a pickle; the config is of another model or asks for what our GPT does not
        compute; a tensor is missing, unknown, of another shape or type (all are named).

    >>> load_gpt2("absent")
    Traceback (most recent call last):
    spdf_jax.errors.InputError: absent/config.json: no such file; give a GPT-2 folder as transformers' save_pretrained writes it
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = gpt2.read_config(path, read_json_file(path))
    with stored_tensors(folder, gpt2.PREFIX, gpt2.CAUSAL_MASKS) as tensors:
        if config.n_layer > len(tensors):  # said before a list of names is made as long as the file demands
            raise InputError(
                f"{folder}: config.json says {config.n_layer} layers for {len(tensors)} tensors; get both again"
            )
        wanted = gpt2.tensor_shapes(config)
        head_twice = config.tied_head and "lm_head.weight" in tensors
        if head_twice:
            wanted["lm_head.weight"] = wanted["wte.weight"]
        check_stored(folder, tensors, wanted)
        read = partial(read_tensor, folder, tensors)
        if head_twice and (read("lm_head.weight") != read("wte.weight")).any():
            raise InputError(
                f"{folder}: lm_head.weight differs from wte.weight, which tie_word_embeddings in config.json says are one; "
                f"set it to false to keep both"
            )
        return config, gpt2.to_params(config, read)
