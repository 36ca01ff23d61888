"""Continuations of prompts, in batches: one compiled program (`spdf_jax.model.decoding`) a prompt length bucket.

Shape legend: B prompts, S positions of prompt and continuation.
"""

import dataclasses
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from spdf_jax.errors import InputError
from spdf_jax.model.decoding import DecodeConfig, Program, decode
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import batch_devices, batch_sharding, parameter_shardings

_SHORTEST_BUCKET_TOKENS = 16


class Generation(NamedTuple):
    """One continuation.

    Attributes:
      tokens: ids, without the prompt and without the end token; none where the n-gram rule left no way to go on.
      log_probability: natural log under the model, of the tokens and of the end token if one came; then -inf.
      score: ``log_probability / n^length_penalty`` over those n tokens.
    """

    tokens: list[int]
    log_probability: float
    score: float


def generate(
    model: GPT,
    params: Any,
    prompts: Sequence[Sequence[int]],
    config: DecodeConfig,
    *,
    end_tokens: Sequence[int],
    mesh: Mesh | None = None,
) -> list[Generation]:
    """Continues prompts. A prompt's continuation depends on nothing but the prompt, its index and the seed.

    Beam search and its stopping rule are those of Hugging Face ``transformers`` with ``early_stopping=False``
    (``generation/utils.py``), so tokens are equal; with an n-gram rule where ``no_repeat_counts_prompt``
    (``generation/logits_process.py``).

    Args:
      model: `spdf_jax.GPT`.
      params: its parameters, masks applied.
      prompts: ids; 1 to ``context - max_new_tokens`` each.
      config: method and limits.
      end_tokens: ids that end a continuation; empty for none.
      mesh: `spdf_jax.sharding.make_mesh`; splits the batch over ``data`` and ``fsdp``. None: wherever `params` are.

    Returns:
      One `Generation` a prompt, in their order.

    Raises:
      InputError: a prompt that is empty or too long, or an id outside the vocabulary.

    >>> import jax.numpy as jnp
    >>> from spdf_jax.model.config import GPTConfig
    >>> model = GPT(GPTConfig(n_layer=1, n_head=1, d_model=8, vocab_size=11, context=32))
    >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), int))["params"]
    >>> [len(g.tokens) for g in generate(model, params, [[1, 2, 3], [4]], DecodeConfig(max_new_tokens=5), end_tokens=[])]
    [5, 5]
    """
    _check(model, prompts, config, end_tokens)
    devices = 1
    if mesh is not None:
        params = jax.device_put(params, parameter_shardings(mesh, params))
        devices = batch_devices(mesh)
    size = -(-min(config.batch_size, len(prompts)) // devices) * devices
    key = jax.random.key(config.seed)
    # Seed and batch size are in the arguments: another of them is not another program.
    settings = dataclasses.replace(config, seed=0, batch_size=1)
    found: dict[int, Generation] = {}
    for bucket, indices in _buckets(prompts, model.config.context - config.max_new_tokens).items():
        program = Program(model, settings, tuple(map(int, end_tokens)), bucket, mesh)
        for start in range(0, len(indices), size):
            batch = indices[start : start + size]
            inputs = _batch(program, prompts, batch, size)
            rows = jax.device_get(decode(program, params, *inputs, key))
            for index, *row in zip(batch, *rows, strict=False):  # rows beyond the batch fill it up
                found[index] = _generation(program, len(prompts[index]), *row)
    return [found[index] for index in range(len(prompts))]


def _check(model: GPT, prompts: Sequence[Sequence[int]], config: DecodeConfig, end_tokens: Sequence[int]) -> None:
    c = model.config
    longest = c.context - config.max_new_tokens
    if longest < 1:
        raise InputError(
            f"decode.max_new_tokens: {config.max_new_tokens} leaves no room for a prompt in model.context {c.context}: "
            f"use at most {c.context - 1}"
        )
    for index, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= longest:
            raise InputError(
                f"prompts[{index}]: {len(prompt)} tokens, must be 1 to {longest} (model.context {c.context} less "
                f"decode.max_new_tokens {config.max_new_tokens}): shorten it or generate fewer"
            )
    for name, ids in [("end_tokens", end_tokens), *((f"prompts[{i}]", prompt) for i, prompt in enumerate(prompts))]:
        wrong = next((i for i in ids if not 0 <= i < c.vocab_size), None)
        if wrong is not None:
            raise InputError(f"{name}: token {wrong} is outside the vocabulary, 0 to {c.vocab_size - 1}")


def _buckets(prompts: Sequence[Sequence[int]], longest: int) -> dict[int, list[int]]:
    """Indices of the prompts by padded length, a power of two: few programs, each prompt's own whatever the others."""
    buckets = defaultdict(list)
    for index, prompt in enumerate(prompts):
        padded = max(_SHORTEST_BUCKET_TOKENS, 1 << (len(prompt) - 1).bit_length())
        buckets[min(padded, longest)].append(index)
    return buckets


def _batch(p: Program, prompts: Sequence[Sequence[int]], batch: list[int], size: int) -> list[Any]:
    """Tokens, lengths and indices on the devices; the last prompt fills up."""
    full = batch + batch[-1:] * (size - len(batch))
    tokens_BS = np.zeros((size, p.bucket + p.config.max_new_tokens), np.int32)
    for row, index in enumerate(full):
        tokens_BS[row, : len(prompts[index])] = prompts[index]
    columns = [np.array([[len(prompts[index])] for index in full], np.int32), np.array(full, np.int32)[:, None]]
    return jax.device_put([tokens_BS, *columns], None if p.mesh is None else batch_sharding(p.mesh, 2))


def _generation(
    p: Program, prompt_tokens: int, tokens_S: np.ndarray, length: int, log_probability: float, score: float
) -> Generation:
    tokens = [] if log_probability == -math.inf else tokens_S[prompt_tokens:length].tolist()
    if tokens and tokens[-1] in p.ends:
        tokens.pop()
    return Generation(tokens, float(log_probability), float(score))
