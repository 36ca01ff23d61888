"""The experiment file of a run that was: ``--config`` where only its ``--workdir`` is given."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from spdf_jax.cloud.spool import located
from spdf_jax.config.read import load_config
from spdf_jax.errors import InputError
from spdf_jax.workdir import CODE_FOLDER, CONFIG_FILE, read_json


def get_config(workdir: str) -> ConfigDict:
    """The settings of the run in a folder, to be overridden as those of any experiment file.

    Args:
      workdir: the run's folder.

    Raises:
      InputError: no run is there, or its ``config.json`` is none.
    """
    file = located(workdir) / CONFIG_FILE
    if not file.exists():
        cell = next(file.parent.glob(f"cells/*/{CONFIG_FILE}"), None)
        if cell and (command := read_json(cell, "give the sweep's --config").get("command")):
            raise InputError(f"--workdir {workdir}: holds a sweep, which goes on by what began it: {command}")
        raise InputError(f"--workdir {workdir}: no run is there; give the folder of one, or --config FILE[:VARIANT]")
    try:
        return ConfigDict(_with_tuples(load_config(file).as_dict()))
    except InputError as error:
        code = file.with_name(CODE_FOLDER)
        command = read_json(file, "restore it, or give the workdir of a run").get("command")
        if not any(code.glob("*.py")):
            raise
        raise InputError(
            f"{error}; if an experiment file defines it ({code}), name that by --config, too"
            + (f", as the run began: {command}" if command else "")
        ) from None


def _with_tuples(value: Any) -> Any:
    """As experiment files have them: flags override a tuple, and JSON has lists."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(part) for key, part in value.items()}
    return tuple(_with_tuples(part) for part in value) if isinstance(value, list) else value
