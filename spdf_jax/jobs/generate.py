"""``--job generate``: a run's result continues a prompt."""

from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from spdf_jax.config.run import RunConfig
from spdf_jax.data import (
    Example,
    decode_texts,
    encode_prompts,
    end_of_text_id,
)
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.model.generate import generate
from spdf_jax.sharding import make_mesh
from spdf_jax.training.feed import NAME_TOKENIZER, run_tokenizer
from spdf_jax.training.restore import SavedRun, saved_run


def run(config: RunConfig, request: Request) -> None:
    """`generate_text`."""
    keep_compiled(config.data)
    generate_text(config, request.workdir, request.prompt)


def decode_examples(saved: SavedRun, mesh: Mesh, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[str]:
    model, decode = saved.model, saved.config.decode
    prompts = encode_prompts(examples, tokenizer, max_tokens=model.config.context - decode.max_new_tokens)
    end = [end_of_text_id(tokenizer)]
    found = generate(model, saved.result.params, prompts, decode, end_tokens=end, mesh=mesh)
    return decode_texts([generation.tokens for generation in found], tokenizer)


def generate_text(config: RunConfig, workdir: Path, prompt: str) -> str:
    """Continues a prompt by ``config.decode``, prints it and returns the continuation.

    Where the last phase has a task, the prompt is a context, and what follows its target.

    Raises:
      InputError: no checkpoint or tokenizer there, or a prompt too long.
    """
    mesh = make_mesh(config.mesh)
    saved = saved_run(workdir, mesh, config)
    tokenizer = run_tokenizer(config, workdir)
    if tokenizer is None:
        raise InputError(f"{workdir}: has no tokenizer, since token files came without one; {NAME_TOKENIZER}")
    if saved.plan.config.task.name:
        (text,) = decode_examples(saved, mesh, tokenizer, [Example(prompt, ())])
        print(text)
        return text
    end = end_of_text_id(tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    if config.separates_documents(saved.plan.config):
        # The last document: in training, those before it say nothing to it.
        ids = ids[max((i for i, token in enumerate(ids) if token == end), default=0) :]
    (found,) = generate(saved.model, saved.result.params, [ids], config.decode, end_tokens=[end], mesh=mesh)
    before = tokenizer.decode(ids)
    # After the prompt: alone, some tokenizers' text loses the space that it begins with.
    text = tokenizer.decode([*ids, *found.tokens]).removeprefix(before)
    print(f"{prompt}{text}")
    return text
