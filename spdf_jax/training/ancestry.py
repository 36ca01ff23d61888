"""The runs that a run goes on from, kept in its own folder when it begins: theirs may be gone when its page is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from spdf_jax.cloud.spool import saved_steps, stored
from spdf_jax.config.read import load_config
from spdf_jax.config.run import RunConfig, flat
from spdf_jax.training.branch import Parent, check_same_order
from spdf_jax.training.metrics import check_rows, read_rows
from spdf_jax.training.sources import holds_run, source_folder
from spdf_jax.workdir import ANCESTORS_FILE, BEST, CHECKPOINTS, CONFIG_FILE, METRICS_FILE, read_json, write_json

#: Of a row, what is drawn.
_COLUMNS = ("step", "phase", "loss", "val_loss")
#: No setting of these makes a run another.
_SAYS_NOTHING = ("loop", "mesh", "decode", "evaluation", "experiment", "variant", "variants", "phases")


def ancestors(config: RunConfig, workdir: Path, parent: Parent | None, fingerprint: str) -> list[dict[str, Any]]:
    """The runs before one that begins, the oldest first; none of one that starts from no run.

    Args:
      config: of the run that begins.
      workdir: its folder.
      parent: where it goes on from a whole state.
      fingerprint: of its data.

    Returns:
      A dict a run: ``workdir``, ``experiment``, ``variant``; ``step`` at which it was gone on from, and with ``what`` of it;
      ``changed``: settings, as they were there and in the run after it; ``rows``, the losses up to there, of
      those whose count of steps the new run goes on with.

    Raises:
      InputError: data that is not what the parent was reading; rows of it that are not what it wrote, or a file like this one
        that is damaged.
    """
    folder = source_folder(config, workdir)
    if folder is None or not holds_run(folder):
        return []
    if parent:
        check_same_order(parent, fingerprint)
    there = parent.config if parent else load_config(folder / CONFIG_FILE)
    step = parent.record["step"] if parent else _result_step(folder)
    phase = parent.plan.name if parent else list(there.phases)[-1]
    rows: list[dict[str, Any]] = []
    if parent and (folder / METRICS_FILE).is_file():
        if "rows" in parent.record:
            check_rows(folder / METRICS_FILE, parent.record["rows"], f"its checkpoint at step {step} counts on")
        losses = (row for row in read_rows(folder / METRICS_FILE) if row["step"] <= step and "density" not in row)
        rows = [{key: row[key] for key in _COLUMNS if key in row} for row in losses]
    path = folder / ANCESTORS_FILE
    earlier = read_json(path, "move it away to go on without it")["ancestors"] if path.is_file() else []
    if not parent:
        earlier = [one | {"rows": []} for one in earlier]
    return [
        *earlier,
        {
            "workdir": f"{folder.absolute()}",
            "experiment": there.experiment,
            "variant": there.variant,
            "step": step,
            "what": config.init_what,
            "changed": _changed(there, phase, config),
            "rows": rows,
        },
    ]


def keep_lineage(workdir: Path, lineage: list[dict[str, Any]]) -> None:
    """Writes `ancestors` into the folder of the run that begins, if there are any."""
    if lineage:
        write_json(workdir / ANCESTORS_FILE, {"ancestors": lineage})


def _result_step(folder: Path) -> int:
    kept = folder / (BEST if any(stored(folder / BEST).glob("[0-9]*")) else CHECKPOINTS)
    return max(saved_steps(kept), default=0)


def _changed(there: RunConfig, phase: str, here: RunConfig) -> dict[str, list[Any]]:
    """Settings of the phase gone on from and of the first one after it, under its name, and of all that is no phase's."""
    name = next(iter(here.phases))

    def settings(config: RunConfig, phase: str) -> dict[str, Any]:
        values = config.as_dict()
        kept = {
            k: v for k, v in values.items() if k not in (*_SAYS_NOTHING, *config.phases) and not k.startswith("init_")
        }
        return flat(kept | {name: json.loads(json.dumps(dataclasses.asdict(config.phases[phase])))})

    was, now = settings(there, phase), settings(here, name)
    return {key: [was.get(key), now.get(key)] for key in now if was.get(key) != now.get(key)}
