"""Where a config's names of other runs point, and what model lies there: what a run starts from, and what it learns from."""

from pathlib import Path

from spdf_jax.cloud.spool import located, stored
from spdf_jax.config.read import load_config
from spdf_jax.config.run import RunConfig
from spdf_jax.errors import InputError
from spdf_jax.huggingface import load_model_config
from spdf_jax.huggingface.circuit_sparsity import CONFIG_FILE as BEEG_CONFIG_FILE
from spdf_jax.model.config import GPTConfig
from spdf_jax.workdir import BEST, CHECKPOINTS, CONFIG_FILE


def source_folder(config: RunConfig, workdir: Path | None) -> Path | None:
    """Where ``config.init_from`` points for a run in `workdir`; None for nowhere.

    Raises:
      InputError: see `named_folder`.
    """
    return named_folder("init_from", config.init_from, workdir)


def named_folder(key: str, name: str, workdir: Path | None) -> Path | None:
    """Where the name of a run, or of a folder of Hugging Face's, points for a run in `workdir`; None for nowhere.

    Args:
      key: where the config has the name.
      name: as `spdf_jax.config.run.RunConfig.init_from` takes it.
      workdir: the run's.

    Raises:
      InputError: it names a cell of a sweep, but the run has no folder among others.
    """
    if name.startswith("cell:"):
        if workdir is None:
            raise InputError(f"config.{key}: {name!r} is of a sweep; name the workdir of that cell")
        return workdir.parent / name.removeprefix("cell:")
    return located(name) if name else None


def holds_run(folder: Path, key: str = "init_from") -> bool:
    """Whether `folder`, which the config's `key` names, is the workdir of a run; else it is a Hugging Face folder.

    Raises:
      InputError: it is neither.
    """
    if any(stored(folder / name).is_dir() for name in (BEST, CHECKPOINTS)):
        return True
    if not any((folder / name).is_file() for name in (CONFIG_FILE, BEEG_CONFIG_FILE)):
        raise InputError(
            f"config.{key}: {f'{folder}'!r} is neither a run's workdir nor a Hugging Face folder; train one first"
        )
    return False


def teacher_config(config: RunConfig, phase: str, workdir: Path | None = None) -> GPTConfig:
    """The model that phase `phase` learns from; without a workdir, of a cell that teaches, the run's own.

    Raises:
      InputError: nothing there, or no such model.
    """
    name = config.phases[phase].distill.teacher
    if workdir is None and name.startswith("cell:"):
        return config.model
    key = f"{phase}.distill.teacher"
    folder = named_folder(key, name, workdir)
    assert folder is not None, "asked of a phase with a teacher"
    return load_config(folder / CONFIG_FILE).model if holds_run(folder, key) else load_model_config(folder)
