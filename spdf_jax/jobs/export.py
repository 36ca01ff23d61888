"""``--job export``: a run's result as a folder for ``transformers``."""

import sys
import zlib
from pathlib import Path

import jax

from spdf_jax.config.run import RunConfig
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.huggingface import save_model
from spdf_jax.jobs import Request
from spdf_jax.model.config import GPTConfig
from spdf_jax.sharding import make_mesh
from spdf_jax.sparsity.mask_files import MASK_FILE, save_masks
from spdf_jax.training.feed import NAME_TOKENIZER, run_tokenizer
from spdf_jax.training.restore import saved_run
from spdf_jax.training.state import TrainState
from spdf_jax.workdir import check_writable, make_durable, read_json, sweep, temporary_beside, write_json

#: In an exported folder: of what it is, and the CRC-32 of each of its files.
_RECORD = "spdf_jax.json"


def run(config: RunConfig, request: Request) -> None:
    """`export`."""
    export(config, request.workdir, request.output)


def export(config: RunConfig, workdir: Path, output: Path | None = None) -> Path:
    """Writes a folder for ``transformers``, masks folded in and in a file beside, and prints its path.

    Args:
      config: the run's own, but for what may change after it.
      workdir: the run's folder.
      output: what to write, by default ``WORKDIR/huggingface``.

    Returns:
      The folder.

    Raises:
      InputError: no checkpoint there, a run of another config, a folder that cannot be written or is there and is not an export
        as it was made, or what no exported model can express.
    """
    sweep(workdir)
    folder = output or workdir / "huggingface"
    check_replaceable(folder)
    saved = saved_run(workdir, make_mesh(config.mesh), config)
    check_writable(folder.parent)
    if saved.model.pattern != "causal":
        raise InputError(
            f"--job export: the run ends in {saved.model.pattern!r} attention of width {saved.model.width}, which no "
            f"exported model has; train a further phase, or a run with init_from={f'{workdir}'!r}, whose attention is causal "
            f"at its end"
        )
    tokenizer = run_tokenizer(config, workdir)
    write_export(folder, config.model, saved.result, tokenizer)
    return folder


def check_replaceable(folder: Path) -> None:
    """Raises `InputError` where anything but an untouched export would be lost."""
    if folder.exists() and not _as_exported(folder):
        raise InputError(
            f"{folder}: is there already, and not as it was exported; move it, or choose another by --output"
        )


def write_export(folder: Path, model: GPTConfig, state: TrainState, tokenizer: Tokenizer | None) -> None:
    """Writes a folder, with the masks in a file of their own where there are any, and prints its path."""
    with temporary_beside(folder) as staged:
        save_model(staged, model, state.params, masks=state.masks, tokenizer=tokenizer)
        if any(mask.ndim for mask in jax.tree.leaves(state.masks)):
            save_masks(staged / MASK_FILE, state.masks)
        write_json(staged / _RECORD, {"step": int(state.step), "files": _checksums(staged)})
        if folder.exists():
            folder.rename(staged.with_name("before"))
        staged.rename(folder)
        make_durable(folder.parent)
    if tokenizer is None:
        print(f"{folder}: without a tokenizer, since token files came without one; {NAME_TOKENIZER}", file=sys.stderr)
    print(f"{folder}")


def _as_exported(folder: Path) -> bool:
    """Whether all that is in a folder was written by `export`, and nobody has touched it since."""
    try:
        return read_json(folder / _RECORD, "")["files"] == _checksums(folder)
    except (InputError, KeyError, OSError):
        return False


def _checksums(folder: Path) -> dict[str, int]:
    return {path.name: _checksum(path) for path in sorted(folder.iterdir()) if path.name != _RECORD}


def _checksum(file: Path) -> int:
    value = 0
    with file.open("rb") as content:
        while part := content.read(1 << 24):
            value = zlib.crc32(part, value)
    return value
