"""GPT-2 folders of Hugging Face `transformers`: write one that it opens as it is, read one that it wrote.

Names and layout are those of transformers' ``models/gpt2/modeling_gpt2.py``: one tensor a layer where ours are stacked,
queries, keys and values side by side in ``c_attn``, linear weights (in, out) as ours; only an untied head is (out, in).
A folder is data: JSON and safetensors are read, a pickle never.
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from spdf_jax.data.tokenizer import END_OF_TEXT, vocabulary_size
from spdf_jax.errors import InputError, reading
from spdf_jax.model.config import GPTConfig, mup_scales
from spdf_jax.model.gpt import GPT
from spdf_jax.sparsity.masks import apply_masks
from spdf_jax.tree import named_leaves
from spdf_jax.workdir import make_durable, read_json, temporary_beside

#: Modules of one GPT-2 layer, and ours whose outputs stand side by side in them.
_MODULES = {
    "ln_1": ("ln_1",),
    "attn.c_attn": ("attn_q", "attn_k", "attn_v"),
    "attn.c_proj": ("attn_o",),
    "ln_2": ("ln_2",),
    "mlp.c_fc": ("mlp_up",),
    "mlp.c_proj": ("mlp_down",),
}
_KINDS = ("weight", "bias")

#: Fields of `GPTConfig` and their keys in config.json.
_COUNTS = {
    "n_layer": "n_layer",
    "n_head": "n_head",
    "d_model": "n_embd",
    "vocab_size": "vocab_size",
    "context": "n_positions",
}
_RATES = {"dropout": "resid_pdrop", "layer_norm_eps": "layer_norm_epsilon", "init_std": "initializer_range"}

#: Transformers' names for our activations: the first is written, all are read.
_ACTIVATIONS = {
    "gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    "gelu_exact": ("gelu", "gelu_python"),
}

#: What a config.json may leave out, with transformers' defaults, and what our GPT computes, which must be so.
_DEFAULTS = {
    "n_inner": None,
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
}
_COMPUTED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}  # reorder_and_upcast_attn may be either: it asks for a float32 softmax, and ours always is

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CAUSAL_MASKS = re.compile(r"^h\.\d+\.attn\.(bias|masked_bias)$")  # constants that older transformers saved


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
    if dtype not in _DTYPES.values():
        raise InputError(f"export dtype: {dtype!r} is not one of {', '.join(_DTYPES.values())}")
    _check_expressible(config)
    _check_vacant(folder)
    end_of_text_id = _end_of_text_id(config, tokenizer, end_of_text_id)
    tokens_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    wanted = jax.eval_shape(GPT(config).init, jax.random.key(0), tokens_BT)["params"]
    _check_tensors("export: params do not fit the model's config", _shapes(params), _shapes(wanted))
    if masks is not None:
        params = apply_masks(params, masks)
    tensors = {name: _cast(name, tensor, dtype) for name, tensor in _gpt2_tensors(config, params).items()}
    _write_folder(folder, _json_files(config, tokenizer, end_of_text_id, dtype), tensors)


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
    config = _read_config(folder / "config.json")
    with ExitStack() as stack:
        files = [_open(path, stack) for path in _weight_paths(folder)]
        # Slices read nothing until asked: what does not fit is refused before memory is taken for it.
        stored = [(name, file.get_slice(name)) for file in files for name in file.keys()]  # noqa: SIM118 - no mapping
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in stored}
        if len(tensors) < len(stored):
            raise InputError(
                f"{folder}: a tensor is there twice, in two files or with and without 'transformer.'; save it again"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if not _CAUSAL_MASKS.match(name)}
        if config.n_layer > len(tensors):  # said before a list of names is made as long as the file demands
            raise InputError(
                f"{folder}: config.json says {config.n_layer} layers for {len(tensors)} tensors; get both again"
            )
        wanted = _gpt2_shapes(config)
        if config.tied_head and "lm_head.weight" in tensors:
            wanted["lm_head.weight"] = wanted["wte.weight"]
        shapes = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
        _check_tensors(f"{folder}: the weights do not fit config.json", shapes, wanted)
        odd = [f"{name} {tensor.get_dtype()}" for name, tensor in tensors.items() if tensor.get_dtype() not in _DTYPES]
        if odd:
            raise InputError(
                f"{folder}: stored as no float: {', '.join(odd)}; save them as {', '.join(_DTYPES.values())}"
            )

        def read(name: str) -> np.ndarray:
            with reading(f"{folder}: {name} cannot be read", "get the file again"):
                array: np.ndarray = tensors[name][:].astype(np.float32)
            if not np.isfinite(array).all():
                raise InputError(f"{folder}: {name} holds numbers that are not finite; get the files again")
            return array

        if config.tied_head and "lm_head.weight" in tensors and (read("lm_head.weight") != read("wte.weight")).any():
            raise InputError(
                f"{folder}: lm_head.weight differs from wte.weight, which tie_word_embeddings in config.json says are one; "
                f"set it to false to keep both"
            )
        return config, _params(config, read)


def _check_expressible(config: GPTConfig) -> None:
    plain = GPTConfig()
    other = [n for n in ("dconv", "shared_qk", "mlp_norm") if getattr(config, n) != getattr(plain, n)]
    other += ["activation"] if config.activation not in _ACTIVATIONS else []
    if other:
        found, needed = (", ".join(f"model.{n} {getattr(c, n)!r}" for n in other) for c in (config, plain))
        raise InputError(f"export: {found} cannot be said in a GPT-2 folder, only {needed}; export a model trained so")


def _check_vacant(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"export to {folder}: it holds something already; choose a folder that is new or empty")


def _write_folder(folder: Path, texts: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> None:
    """All of it beside the folder, then one rename."""
    prefixed = {n if n.startswith("lm_head.") else f"transformer.{n}": tensor for n, tensor in tensors.items()}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder) as staged:
            staged.mkdir()
            for name, text in texts.items():
                (staged / name).write_text(text, encoding="utf-8")
            save_file(prefixed, staged / "model.safetensors", metadata={"format": "pt"})
            shutil.copymode(staged / "config.json", staged / "model.safetensors")  # safetensors too leaves it private
            for file in staged.iterdir():
                make_durable(file)
            make_durable(staged)
            staged.rename(folder)
            make_durable(folder.parent)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"export to {folder}: cannot be written ({error}); make room, or choose another folder"
        ) from error


def _end_of_text_id(config: GPTConfig, tokenizer: Tokenizer | None, given: int | None) -> int | None:
    """The id that ends a text, checked together with the tokenizer."""
    if tokenizer is not None:
        if vocabulary_size(tokenizer) > config.vocab_size:
            raise InputError(
                f"export: the tokenizer's ids end at {vocabulary_size(tokenizer) - 1}, over model.vocab_size "
                f"{config.vocab_size}; give the tokenizer that the model was trained with"
            )
        given = tokenizer.token_to_id(END_OF_TEXT) if given is None else given
        if given is None or tokenizer.id_to_token(given) is None:
            what = f"no {END_OF_TEXT!r}" if given is None else f"no token of end_of_text_id {given}"
            raise InputError(f"export: the tokenizer has {what}; give the end_of_text_id that it has")
    if given is not None and not 0 <= given < config.vocab_size:
        raise InputError(f"export: end_of_text_id {given} is outside [0, model.vocab_size {config.vocab_size})")
    return given


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(params)}


def _check_tensors(problem: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Names everything that is missing, not expected or of another shape, in one line."""
    differing = [n for n in wanted if n in found and found[n] != wanted[n]]
    parts = {
        "missing": [n for n in wanted if n not in found],
        "not expected": [n for n in found if n not in wanted],
        "of another shape": [f"{n} {found[n]} instead of {wanted[n]}" for n in differing],
    }
    if any(parts.values()):
        listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in parts.items() if names)
        raise InputError(f"{problem}; {listed}. Give both of one model")


def _leaf(module: str, kind: str) -> str:
    """Our name of a module's ``weight`` or ``bias``."""
    if kind == "bias":
        return "bias"
    return "scale" if module.startswith("ln_") else "kernel"


def _gpt2_shapes(c: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the GPT-2 that `c` describes."""
    d, f = c.d_model, c.mlp_width
    weights = dict(zip(_MODULES, [(d,), (d, 3 * d), (d, d), (d,), (d, f), (f, d)], strict=True))
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (c.vocab_size, d), "wpe.weight": (c.context, d)}
    for i in range(c.n_layer):
        for module, shape in weights.items():
            shapes |= {f"h.{i}.{module}.weight": shape, f"h.{i}.{module}.bias": shape[-1:]}
    shapes |= {"ln_f.weight": (d,), "ln_f.bias": (d,)}
    return shapes if c.tied_head else shapes | {"lm_head.weight": (c.vocab_size, d)}


def _gpt2_tensors(config: GPTConfig, params: Any) -> dict[str, np.ndarray]:
    """Our parameters by GPT-2's names."""
    leaves = {name: np.asarray(leaf) for name, leaf in named_leaves(jax.device_get(params))}
    scales = mup_scales(config)
    for prefix, factor in (("blocks/attn_q/", scales.query), ("ln_f/", scales.logits)):
        leaves |= {name: leaf * np.float32(factor) for name, leaf in leaves.items() if name.startswith(prefix)}
    shapes, tensors = _gpt2_shapes(config), {}
    for name, leaf in (("wte", "wte/embedding"), ("wpe", "wpe/embedding"), ("ln_f", "ln_f/scale")):
        tensors[f"{name}.weight"] = leaves[leaf]
    tensors["ln_f.bias"] = leaves.get("ln_f/bias", np.zeros(config.d_model, np.float32))
    if not config.tied_head:
        tensors["lm_head.weight"] = leaves["head/kernel"].T
    for module, ours in _MODULES.items():
        for kind in _KINDS:
            names = [f"blocks/{name}/{_leaf(module, kind)}" for name in ours]
            if names[0] in leaves:
                stacked = np.concatenate([leaves[n] for n in names], axis=-1)
            else:
                stacked = np.zeros((config.n_layer, *shapes[f"h.0.{module}.bias"]), np.float32)
            tensors |= {f"h.{i}.{module}.{kind}": stacked[i] for i in range(config.n_layer)}
    return tensors


def _cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below
        cast = tensor.astype(jnp.dtype(dtype))
    if not np.isfinite(cast).all():
        raise InputError(f"export: {name} is not finite in {dtype}; give another dtype, or parameters that are finite")
    return np.ascontiguousarray(cast)  # safetensors writes memory as it lies


def _json_files(
    config: GPTConfig, tokenizer: Tokenizer | None, end_of_text_id: int | None, dtype: str
) -> dict[str, str]:
    """The folder's JSON texts by file name."""
    ends = {"bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id}
    model: dict[str, Any] = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "dtype": dtype}
    model |= {key: getattr(config, field) for field, key in (_COUNTS | _RATES).items()}
    model |= {"n_ctx": config.context, "n_inner": config.d_ff or None}  # n_ctx: of older readers, llama.cpp among them
    model |= {"activation_function": _ACTIVATIONS[config.activation][0], "tie_word_embeddings": config.tied_head}
    model |= {"embd_pdrop": config.dropout, "attn_pdrop": 0.0} | _COMPUTED | ends
    files: dict[str, Any] = {"config.json": model, "generation_config.json": ends}
    texts = {}
    if tokenizer is not None:
        assert end_of_text_id is not None, "_end_of_text_id sees to it"
        end = tokenizer.id_to_token(end_of_text_id)
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; GPT2Tokenizer rebuilds it
            "bos_token": end,
            "eos_token": end,
            "model_max_length": config.context,
            "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add an embedding for token_type_ids
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": getattr(tokenizer.pre_tokenizer, "add_prefix_space", False),
        }
        texts["tokenizer.json"] = tokenizer.to_str(pretty=True)
    return texts | {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: no such file; give a GPT-2 folder as transformers' save_pretrained writes it")
    return read_json(path, "get the file again")


def _read_config(path: Path) -> GPTConfig:
    content = _DEFAULTS | _COMPUTED | _read_json(path)
    for key, needed in ({"model_type": "gpt2"} | _COMPUTED).items():
        if content.get(key) != needed:
            raise InputError(f"{path}: {key} is {content.get(key)!r}; only {needed!r} can be read, give such a model")
    fields: dict[str, Any] = {field: _count(path, key, content.get(key)) for field, key in _COUNTS.items()}
    fields |= {field: _rate(path, key, content[key]) for field, key in _RATES.items()}
    ours = {theirs: name for name, names in _ACTIVATIONS.items() for theirs in names}
    activation = content["activation_function"]
    if not isinstance(activation, str) or activation not in ours:
        raise InputError(f"{path}: activation_function is {activation!r}; give a model with one of {', '.join(ours)}")
    fields["activation"] = ours[activation]
    if not isinstance(content["tie_word_embeddings"], bool):
        raise InputError(f"{path}: tie_word_embeddings is {content['tie_word_embeddings']!r}; it must be true or false")
    fields["tied_head"] = content["tie_word_embeddings"]
    fields["d_ff"] = 0 if content["n_inner"] is None else _count(path, "n_inner", content["n_inner"])
    try:
        return GPTConfig(**fields)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _count(path: Path, key: str, value: Any) -> int:
    if type(value) is not int or value < 1:  # a bool is an int too
        raise InputError(f"{path}: {key} is {value!r}; it must be a whole number of at least 1")
    return value


def _rate(path: Path, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise InputError(f"{path}: {key} is {value!r}; it must be a number from 0 to 1")
    return float(value)


def _weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or the parts that an index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        parts = _read_json(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise InputError(f"{index}: weight_map must say for every tensor the name of its file; get the file again")
        for part in parts.values():
            if Path(part).name != part or not part.endswith(".safetensors"):
                raise InputError(f"{index}: names {part!r}; only safetensors files in the same folder are read")
        return [folder / part for part in sorted(set(parts.values()))]
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder}: has its weights in pytorch_model.bin only, a pickle, which can run code and is never opened; where you "
            f"trust it, write safetensors with transformers: GPT2LMHeadModel.from_pretrained(...).save_pretrained(...)"
        )
    raise InputError(f"{whole}: no such file; give a GPT-2 folder as transformers' save_pretrained writes it")


def _open(path: Path, stack: ExitStack) -> Any:
    with reading(f"{path}: not a readable safetensors file", "get the file again"):
        return stack.enter_context(safe_open(path, framework="numpy"))


def _params(config: GPTConfig, read: Callable[[str], np.ndarray]) -> dict[str, Any]:
    """Our parameters from a reader of GPT-2's tensors."""
    params: dict[str, Any] = {name: {"embedding": jnp.asarray(read(f"{name}.weight"))} for name in ("wte", "wpe")}
    params["ln_f"] = {_leaf("ln_f", kind): jnp.asarray(read(f"ln_f.{kind}")) for kind in _KINDS}
    params["blocks"] = {name: {} for ours in _MODULES.values() for name in ours}
    for module, ours in _MODULES.items():
        for kind in _KINDS:
            stacked = np.stack([read(f"h.{i}.{module}.{kind}") for i in range(config.n_layer)])
            for name, part in zip(ours, np.split(stacked, len(ours), axis=-1), strict=True):
                params["blocks"][name][_leaf(module, kind)] = jnp.asarray(part)
    if not config.tied_head:
        params["head"] = {"kernel": jnp.asarray(read("lm_head.weight").T)}
    return params
