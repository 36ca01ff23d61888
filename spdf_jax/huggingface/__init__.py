"""Folders of Hugging Face `transformers`: write one that it opens as it is, read one that it wrote.

What is a family's own, its names, layout and config, is in `gpt2` and `llama`, a mapping and a config each; files are written
and read by `folder`, whatever the model. `circuit_sparsity` is read alone: transformers has no such model.
"""

import functools
import math
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from spdf_jax.errors import InputError
from spdf_jax.huggingface import circuit_sparsity, gpt2, llama
from spdf_jax.huggingface.folder import (
    DTYPES,
    Place,
    check_end_of_text,
    check_shapes,
    check_stored,
    check_vacant,
    json_text,
    read_json_file,
    read_parts,
    row_parts,
    shapes,
    stored_tensors,
    tokenizer_files,
    write_folder,
)
from spdf_jax.model.config import GPTConfig, mup_scales
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import parameter_shardings
from spdf_jax.sparsity.masks import check_masks
from spdf_jax.tree import map_named, named_leaves

_TIED = ("tie_word_embeddings", "tied_unembed")
_FAMILIES = {kind: family for family in (gpt2, llama) for kind in family.TYPES}


def save_model(
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
    ``tokenizer.json`` and ``tokenizer_config.json``. It appears whole or not at all. It is GPT-2's, or with `norm` ``rms_norm``
    that of Llama, Qwen2 or Qwen3. The model there computes the same logits under causal attention, the only pattern that these
    have: masked weights are exact zeros, missing biases of GPT-2 are zeros, and S-muPar's factors on queries and logits are
    multiplied into ``attn_q``, or its norm, and ``ln_f``. Tensors are made one at a time: a model takes no second room.

    Args:
      folder: must not exist yet, or be empty.
      config: of the model.
      params: its parameters, see `spdf_jax.GPT`.
      masks: mask tree to apply; None where the parameters are masked already, or dense.
      tokenizer: may have fewer ids than the model, not more.
      end_of_text_id: begins and ends a text; None takes the tokenizer's end of a document, or no such id without a tokenizer.
      dtype: of the weights in the file: ``float32`` | ``float16`` | ``bfloat16``.

    Raises:
      InputError: the folder holds something or cannot be written; parameters or masks of another model, or a model that no
        such family can express; a weight that is not finite in `dtype`; a tokenizer that does not fit.

    >>> import jax, spdf_jax as spdf
    >>> config = spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=11, context=4)
    >>> params = spdf.GPT(config).init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"]
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(folder, config, params)
    ...     loaded_config, loaded = load_model(folder)
    >>> loaded_config == config, bool((loaded["wte"]["embedding"] == params["wte"]["embedding"]).all())
    (True, True)
    """
    folder = Path(folder).resolve()
    if dtype not in DTYPES.values():
        raise InputError(f"export dtype: {dtype!r} is not one of {', '.join(DTYPES.values())}")
    check_expressible(config)
    family = _family(config)
    check_vacant(folder)
    end = check_end_of_text(config.vocab_size, tokenizer, end_of_text_id)
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)["params"]
    check_shapes("export: params do not fit the model's config", shapes(params), shapes(wanted))
    if masks is not None:
        check_masks(masks, params)
    ends = {"bos_token_id": end, "eos_token_id": end}
    jsons = {"config.json": family.config_json(config, dtype) | ends, "generation_config.json": ends}
    texts = {name: json_text(content) for name, content in jsons.items()}
    if tokenizer is not None:
        assert end is not None, "check_end_of_text sees to it"
        texts |= tokenizer_files(tokenizer, end, config.context)
    places = family.places(config)
    stored = {name if name.startswith("lm_head.") else family.PREFIX + name: name for name in places}
    tensors = {name: places[ours].shape for name, ours in stored.items()}
    write_folder(folder, texts, tensors, dtype, lambda name: _tensor(config, params, masks, places[stored[name]]))


def _family(config: GPTConfig) -> Any:
    return llama if config.norm == "rms_norm" else gpt2


def check_expressible(config: GPTConfig) -> None:
    """Raises `InputError` for a model that no family of transformers can be."""
    _family(config).check_expressible(config)


def _tensor(config: GPTConfig, params: Any, masks: Any, place: Place) -> np.ndarray:
    """What a place holds, masked, S-muPar's factors multiplied in; zeros where ours has no such bias."""
    scales, layer = mup_scales(config), place.layer
    factors = {"blocks/q_norm/" if config.qk_norm else "blocks/attn_q/": scales.query, "ln_f/": scales.logits}
    parts = []
    for name in place.leaves:
        *modules, leaf = name.split("/")
        found, mask = (
            functools.reduce(lambda tree, key: tree[key], modules, tree) for tree in (params, masks or params)
        )
        if leaf not in found:
            return np.zeros(place.shape, np.float32)
        part = _on_host(found[leaf], layer)
        if masks is not None and np.ndim(mask[leaf]):
            part = np.where(_on_host(mask[leaf], layer), part, 0)
        factor = next((factor for start, factor in factors.items() if name.startswith(start)), 1.0)
        parts.append(part if factor == 1 else part * np.float32(factor))
    whole = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)
    return whole.T if place.transposed else whole


def _on_host(leaf: Any, layer: int | None) -> np.ndarray:
    """An array, or a layer of it: as it lies in the memory of a CPU, and fetched from whatever devices it is split over."""
    if layer is None:
        return np.asarray(leaf)
    elsewhere = isinstance(leaf, jax.Array) and [device.platform for device in leaf.devices()] != ["cpu"]
    return np.asarray(leaf[layer]) if elsewhere else np.asarray(leaf)[layer]


def load_model(folder: str | PathLike[str], *, mesh: Mesh | None = None) -> tuple[GPTConfig, Any]:
    """Reads a GPT-2, Llama, Qwen2 or Qwen3 that transformers, or `save_model`, wrote; or one of ``openai/circuit_sparsity``.

    Args:
      folder: with ``config.json`` and ``model.safetensors``, or the parts that ``model.safetensors.index.json`` names.
        Weights may be float32, float16 or bfloat16, their names with or without the family's prefix, ``transformer.`` or
        ``model.``. With ``beeg_config.json`` in the place of ``config.json``, it is a weight-sparse transformer of Gao et al.
        2025 (arXiv 2511.13653), its released pickle written as ``model.safetensors``. A tokenizer is read by
        `spdf_jax.data.load_tokenizer`.
      mesh: to split the parameters over, as in training, each as soon as it is read; None: all on JAX's default device.

    Returns:
      The config, with float32 compute, of GPT-2 with biases and the rate of its residual dropout (ours has none on attention
      probabilities, and no rate of its own on the embedding), and float32 parameters as `spdf_jax.GPT` has them. Memory of the
      host: little more than theirs on a CPU, where a file of half precision is half as large; elsewhere, the largest one's.

    Raises:
      InputError: a file is missing, damaged or a pickle; the config is of another model or asks for what our GPT does not
        compute; a tensor is missing, unknown, of another shape or type (all are named).

    >>> load_model("absent")
    Traceback (most recent call last):
    spdf_jax.errors.InputError: absent/config.json: no such file; give a folder as transformers' save_pretrained writes it
    """
    folder = Path(folder)
    path, content, config, family = _read_config(folder)
    stored = functools.partial(stored_tensors, folder, family.PREFIX, family.LEFT_OUT)
    with stored() as tensors:
        if config.n_layer > len(tensors):  # said before a list of names is made as long as the file demands
            raise InputError(
                f"{folder}: {path.name} says {config.n_layer} layers for {len(tensors)} tensors; get both again"
            )
        places = family.places(config)
        if family is circuit_sparsity:
            places = {name: place for name, place in places.items() if not family.absent(content, name)}
            bias = tensors.pop(family.LOGITS_BIAS, None)
            if bias is not None and bias[:].any():
                raise InputError(f"{folder}: {family.LOGITS_BIAS} is not 0, and our GPT has none; give another model")
        embedding = next(name for name, place in places.items() if place.leaves == ("wte/embedding",))
        wanted = {name: place.shape for name, place in places.items()}
        head_twice = config.tied_head and "lm_head.weight" in tensors
        if head_twice:
            wanted["lm_head.weight"] = wanted[embedding]
        check_stored(folder, tensors, wanted)
        if head_twice and any((a != b).any() for a, b in _both(folder, stored, "lm_head.weight", embedding, wanted)):
            raise InputError(
                f"{folder}: lm_head.weight differs from {embedding}, which {_TIED[family is circuit_sparsity]} in {path.name} "
                f"says are one; set it to false to keep both"
            )
    return config, _read_params(config, places, folder, stored, mesh)


def load_model_config(folder: Path) -> GPTConfig:
    """The config that `load_model` gives, of which nothing but ``config.json`` is read.

    Raises:
      InputError: no such file, or the config of a model that cannot be read.
    """
    return _read_config(folder)[2]


def _read_config(folder: Path) -> tuple[Path, Any, GPTConfig, Any]:
    """Where the config lies, what is in it, as ours, and the family."""
    beeg = folder / circuit_sparsity.CONFIG_FILE
    path = beeg if beeg.exists() else folder / "config.json"
    content = read_json_file(path)
    kind = content.get("model_type")
    if path != beeg and (not isinstance(kind, str) or kind not in _FAMILIES):
        raise InputError(f"{path}: model_type is {kind!r}; only {', '.join(_FAMILIES)} can be read, give such a model")
    family: Any = circuit_sparsity if path == beeg else _FAMILIES[kind]
    return path, content, family.read_config(path, content), family


def _both(
    folder: Path, stored: Callable, one: str, other: str, wanted: dict[str, tuple[int, ...]]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same parts of two tensors."""
    parts = [(rows,) for rows in row_parts(wanted[one])]
    ones, others = (read_parts(folder, stored, zip([name] * len(parts), parts, strict=True)) for name in (one, other))
    return zip(ones, others, strict=True)


def _read_params(config: GPTConfig, places: dict[str, Place], folder: Path, stored: Callable, mesh: Mesh | None) -> Any:
    """Our parameters, the largest first, so that what is in memory twice is the least when nearly all are there."""
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)["params"]
    shardings = dict(named_leaves(parameter_shardings(mesh, wanted))) if mesh else {}
    ours, found = shapes(wanted), {}
    for leaf in sorted(ours, key=lambda leaf: -math.prod(ours[leaf])):
        array, width = _aligned(ours[leaf]), ours[leaf][-1]
        spots, parts = [], []
        for name, place in places.items():
            if leaf in place.leaves:
                target = array if place.layer is None else array[place.layer]
                for there, here in _spots(place, leaf, width):
                    parts.append((name, there))
                    spots.append((target.T if place.transposed else target)[here])
        for spot, part in zip(spots, read_parts(folder, stored, parts), strict=True):
            spot[...] = part
        sharding = shardings.get(leaf)
        found[leaf] = (
            jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            if sharding
            else jax.device_put(array)
        )
    return map_named(lambda name, _: found[name], wanted)


def _spots(place: Place, leaf: str, width: int) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Parts of a tensor that are copied at once, and where they go in `leaf`, or in its transpose where it is stored so."""
    many, at = len(place.leaves) > 1, place.leaves.index(leaf) * width
    below = many and place.transposed and len(place.shape) > 1  # one leaf below the other, not beside
    columns = slice(at, at + width) if many and not below else slice(None)
    for rows in row_parts((width, *place.shape[1:]) if below else place.shape):
        moved = slice(rows.start + at, rows.stop + at) if below else rows
        yield (moved, columns)[-len(place.shape) :], (rows,)


def _aligned(shape: tuple[int, ...]) -> np.ndarray:
    """Room that JAX on a CPU takes as it lies, without a copy."""
    size = math.prod(shape)
    room = np.zeros(size + 16, np.float32)
    start = -room.ctypes.data % 64 // 4
    return room[start : start + size].reshape(shape)
