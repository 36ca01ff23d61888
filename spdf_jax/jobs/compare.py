"""``--job compare``: any runs beside each other, on one page and in one table."""

from pathlib import Path

from spdf_jax.errors import InputError
from spdf_jax.jobs import Request
from spdf_jax.report.compare import read_runs, write_comparison
from spdf_jax.workdir import check_writable, read_json, write_json

OUTPUT = Path("runs/compare")
#: Says that the folder is a comparison's, and which files in it are.
MARK = "compare.json"


def run(request: Request) -> None:
    """Writes the page, the table and the figures of ``request.runs`` into ``--output``, and prints the page's path.

    Raises:
      InputError: see `spdf_jax.report.compare.read_runs`; a folder that holds something else.
    """
    folder = request.output or OUTPUT
    before = _own_files(folder)
    sweep = read_runs(request.runs, folder)
    check_writable(folder)
    runs = [f"{workdir}" for workdir in request.runs]
    write_json(folder / MARK, {"runs": runs, "files": sorted(before)})  # first: what a kill leaves is known as ours
    files = write_comparison(sweep, folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    for name in before - set(names):  # of an earlier comparison: a figure of other runs would be taken for these
        (folder / name).unlink(missing_ok=True)
    write_json(folder / MARK, {"runs": runs, "files": names})
    print(f"{files[0]}")


def _own_files(folder: Path) -> set[str]:
    """The files of an earlier comparison there.

    Raises:
      InputError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return set()
    if not (folder / MARK).is_file():
        raise InputError(f"{folder}: holds something else than a comparison; choose another folder by --output")
    listed = read_json(folder / MARK, "delete it with the other files of that comparison").get("files", [])
    return {name for name in listed if (folder / name).resolve().is_relative_to(folder.resolve())}
