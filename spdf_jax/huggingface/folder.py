"""Folders of Hugging Face `transformers`, whatever the model: written whole or not at all; read as data, a pickle never."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from tokenizers import Tokenizer

from spdf_jax.data.tokenizer import END_OF_TEXT, known_end, vocabulary_size
from spdf_jax.errors import InputError, reading
from spdf_jax.tree import named_leaves
from spdf_jax.workdir import make_durable, read_json, temporary_beside

#: At most, of a tensor and of a file, while a model is read or written: it is in memory once, and little else is.
_COPIED_BYTES, _MAPPED_BYTES = 1 << 23, 1 << 25
#: Safetensors' names of what weights may be stored as, and ours.
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Place(NamedTuple):
    """A tensor of a file, and where it is among our parameters.

    Attributes:
      shape: as it is stored.
      leaves: names of ours that stand side by side in it, along ours' last axis; GPT-2 has queries, keys and values so.
      layer: which of the layers that are stacked in ours, None where none are.
      transposed: stored (out, in), as `torch.nn.Linear` has it.
    """

    shape: tuple[int, ...]
    leaves: tuple[str, ...]
    layer: int | None = None
    transposed: bool = False


def check_vacant(folder: Path) -> None:
    """Raises `InputError` where something is in the way."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"export to {folder}: it holds something already; choose a folder that is new or empty")


def write_folder(
    folder: Path, texts: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable
) -> None:
    """Writes ``config.json`` and other texts and ``model.safetensors``: all of it beside the folder, then one rename.

    Args:
      folder: what to make.
      texts: of files, by name.
      shapes: of the tensors, by name.
      dtype: of the tensors.
      read: makes a tensor, by name. One at a time, so that a model needs no second room in memory.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with temporary_beside(folder) as staged:
            staged.mkdir()
            for name, text in texts.items():
                (staged / name).write_text(text, encoding="utf-8")
            _write_tensors(staged / "model.safetensors", shapes, dtype, read)
            for file in staged.iterdir():
                make_durable(file)
            make_durable(staged)
            staged.rename(folder)
            make_durable(folder.parent)
    except OSError as error:
        raise InputError(
            f"export to {folder}: cannot be written ({error}); make room, or choose another folder"
        ) from error


def _write_tensors(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str, read: Callable) -> None:
    """A safetensors file: the length of a header, the header, the tensors (``README.md`` of ``huggingface/safetensors``)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    kind, end = next(theirs for theirs, ours in DTYPES.items() if ours == dtype), 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            assert tensor.shape == shape, f"{name}: {tensor.shape}, not {shape}"
            for rows in row_parts(shape):
                file.write(cast(name, tensor[rows], dtype).tobytes())


def check_end_of_text(vocab_size: int, tokenizer: Tokenizer | None, given: int | None) -> int | None:
    """The id that ends a text, checked together with the tokenizer."""
    if tokenizer is not None:
        if vocabulary_size(tokenizer) > vocab_size:
            raise InputError(
                f"export: the tokenizer's ids end at {vocabulary_size(tokenizer) - 1}, over model.vocab_size "
                f"{vocab_size}; give the tokenizer that the model was trained with"
            )
        given = known_end(tokenizer) if given is None else given
        if given is None or tokenizer.id_to_token(given) is None:
            what = f"no {END_OF_TEXT!r}" if given is None else f"no token of end_of_text_id {given}"
            raise InputError(f"export: the tokenizer has {what}; give the end_of_text_id that it has")
    if given is not None and not 0 <= given < vocab_size:
        raise InputError(f"export: end_of_text_id {given} is outside [0, model.vocab_size {vocab_size})")
    return given


def tokenizer_files(tokenizer: Tokenizer, end_of_text_id: int, context: int) -> dict[str, str]:
    """Texts of the files from which ``AutoTokenizer`` makes the same tokenizer, by name."""
    end = tokenizer.id_to_token(end_of_text_id)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is; GPT2Tokenizer rebuilds it
        "bos_token": end,
        "eos_token": end,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add an embedding for token_type_ids
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": getattr(tokenizer.pre_tokenizer, "add_prefix_space", False),
    }
    return {"tokenizer.json": tokenizer.to_str(pretty=True), "tokenizer_config.json": json_text(config)}


def json_text(content: dict[str, Any]) -> str:
    """As transformers writes it."""
    return json.dumps(content, indent=2) + "\n"


def shapes(params: Any) -> dict[str, tuple[int, ...]]:
    """``{leaf name: shape}``."""
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(params)}


def check_shapes(problem: str, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
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


def cast(name: str, tensor: np.ndarray, dtype: str) -> np.ndarray:
    """A tensor as it is written; raises `InputError` where `dtype` has no room for a number."""
    with np.errstate(over="ignore"):  # said below
        cast = tensor.astype(jnp.dtype(dtype), copy=False)
    if not np.isfinite(cast).all():
        raise InputError(f"export: {name} is not finite in {dtype}; give another dtype, or parameters that are finite")
    return cast


def read_json_file(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    if not path.exists():
        raise InputError(f"{path}: no such file; give a folder as transformers' save_pretrained writes it")
    return read_json(path, "get the file again")


def _weight_paths(folder: Path) -> list[Path]:
    """The safetensors files of a folder, one or the parts that an index names."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        parts = read_json_file(index).get("weight_map")
        if not isinstance(parts, dict) or not all(isinstance(part, str) for part in parts.values()):
            raise InputError(f"{index}: weight_map must say for every tensor the name of its file; get the file again")
        for part in parts.values():
            if Path(part).name != part or not part.endswith(".safetensors"):
                raise InputError(f"{index}: names {part!r}; only safetensors files in the same folder are read")
        return [folder / part for part in sorted(set(parts.values()))]
    if any(folder.glob("pytorch_model*.bin")):
        raise InputError(
            f"{folder}: has its weights in pytorch_model.bin only, a pickle, which can run code and is never opened; where you "
            f"trust it, write safetensors with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if pickles := sorted(folder.glob("*.pt")):
        raise InputError(
            f"{folder}: has its weights in {pickles[0].name} only, a pickle, which can run code and is never opened; where you "
            f"trust it, write safetensors with PyTorch: safetensors.torch.save_file({{k: v.clone() for k, v in torch.load("
            f"{pickles[0].name!r}, map_location='cpu', weights_only=True).items()}}, 'model.safetensors')"
        )
    raise InputError(f"{whole}: no such file; give a folder as transformers' save_pretrained writes it")


@contextmanager
def stored_tensors(folder: Path, prefix: str, left_out: re.Pattern[str]) -> Iterator[dict[str, Any]]:
    """The tensors of a folder as slices, which read nothing until asked: what does not fit is refused before.

    Args:
      folder: with ``model.safetensors``, or the parts that ``model.safetensors.index.json`` names.
      prefix: that names may begin with; the slices are named without it.
      left_out: names, without the prefix, of what is no weight.

    Yields:
      ``{name: slice}``, while the files are open.
    """
    with ExitStack() as stack:
        stored = []
        for path in _weight_paths(folder):
            with reading(f"{path}: not a readable safetensors file", "get the file again"):
                file = stack.enter_context(safe_open(path, framework="numpy"))
            stored += [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118 - no mapping
        tensors = {name.removeprefix(prefix): tensor for name, tensor in stored}
        if len(tensors) < len(stored):
            raise InputError(
                f"{folder}: a tensor is there twice, in two files or with and without {prefix!r}; save it again"
            )
        yield {name: tensor for name, tensor in tensors.items() if not left_out.match(name)}


def check_stored(folder: Path, tensors: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `InputError` unless the tensors are floats of these names and shapes."""
    found = {name: tuple(tensor.get_shape()) for name, tensor in tensors.items()}
    check_shapes(f"{folder}: the weights do not fit config.json", found, wanted)
    odd = [f"{name} {tensor.get_dtype()}" for name, tensor in tensors.items() if tensor.get_dtype() not in DTYPES]
    if odd:
        raise InputError(f"{folder}: stored as no float: {', '.join(odd)}; save them as {', '.join(DTYPES.values())}")


def row_parts(shape: Sequence[int]) -> list[slice]:
    """Rows of a tensor that are copied at once; all of a vector."""
    if len(shape) < 2:
        return [slice(None)]
    rows = max(1, _COPIED_BYTES // (4 * math.prod(shape[1:])))
    return [slice(at, min(at + rows, shape[0])) for at in range(0, shape[0], rows)]


def read_parts(folder: Path, stored: Callable, parts: Iterable[tuple[str, tuple[slice, ...]]]) -> Iterator[np.ndarray]:
    """Parts of tensors, one after the other, as floats of the width that they are stored in.

    Args:
      folder: which they are from.
      stored: `stored_tensors` of it.
      parts: their names, and which part.
    """
    with ExitStack() as stack:
        left = 0
        for name, part in parts:
            if left <= 0:  # opened anew, since what was read of a mapped file stays in memory until it is closed
                stack.close()
                tensors, left = stack.enter_context(stored()), _MAPPED_BYTES
            with reading(f"{folder}: {name} cannot be read", "get the file again"):
                array: np.ndarray = tensors[name][part]
            if not np.isfinite(array).all():
                raise InputError(f"{folder}: {name} holds numbers that are not finite; get the files again")
            left -= array.nbytes
            yield array
