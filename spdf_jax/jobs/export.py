"""``--job export``: a run's result as a folder for ``transformers``."""

import sys
from pathlib import Path

from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError
from spdf_jax.huggingface import save_gpt2
from spdf_jax.jobs import Request
from spdf_jax.sharding import make_mesh
from spdf_jax.training.feed import NAME_TOKENIZER, run_tokenizer
from spdf_jax.training.restore import saved_run
from spdf_jax.workdir import check_writable, sweep


def run(config: RunConfig, request: Request) -> None:
    """`export`."""
    export(config, request.workdir, request.output)


def export(config: RunConfig, workdir: Path, output: Path | None = None) -> Path:
    """Writes a GPT-2 folder for ``transformers``, masks folded in, and prints its path.

    Args:
      config: the run's own, but for what may change after it.
      workdir: the run's folder.
      output: what to write, by default ``WORKDIR/huggingface``.

    Returns:
      The folder.

    Raises:
      InputError: no checkpoint there, a run of another config, a folder that is there already or cannot be written, or what
        GPT-2 cannot express.
    """
    sweep(workdir)
    folder = output or workdir / "huggingface"
    if folder.exists():
        raise InputError(f"{folder}: is there already; move or delete it, or choose another by --output")
    saved = saved_run(workdir, make_mesh(config.mesh), config)
    check_writable(folder.parent)
    if saved.model.pattern != "causal":
        raise InputError(
            f"--job export: the run ends in {saved.model.pattern!r} attention of width {saved.model.width}, which GPT-2 cannot "
            f"express; train a further phase, or a run with init_from={str(workdir)!r}, whose attention is causal at its end"
        )
    tokenizer = run_tokenizer(config, workdir)
    save_gpt2(folder, config.model, saved.state.params, masks=saved.state.masks, tokenizer=tokenizer)
    if tokenizer is None:
        print(f"{folder}: without a tokenizer, since token files came without one; {NAME_TOKENIZER}", file=sys.stderr)
    print(folder)
    return folder
