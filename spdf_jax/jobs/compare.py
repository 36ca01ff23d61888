"""``--job compare``: any runs beside each other, on one page and in one table."""

from pathlib import Path

from spdf_jax.errors import InputError
from spdf_jax.jobs import Request
from spdf_jax.report.compare import write_comparison
from spdf_jax.workdir import check_writable, read_json, write_json

OUTPUT = Path("runs/compare")
#: Says that the folder is a comparison's, and which files in it are.
MARK = "compare.json"


def run(request: Request) -> None:
    """Writes the page, the table and the figures of ``request.runs`` into ``--output``, and prints the page's path.

    Raises:
      InputError: see `spdf_jax.report.compare.write_comparison`; a folder that holds something else.
    """
    folder = request.output or OUTPUT
    before = _own_files(folder)
    check_writable(folder)
    files = write_comparison(request.runs, folder)
    names = [path.relative_to(folder).as_posix() for path in files]
    write_json(folder / MARK, {"runs": [str(workdir) for workdir in request.runs], "files": names})
    for name in before - set(names):  # of an earlier comparison: a figure of other runs would be taken for these
        (folder / name).unlink(missing_ok=True)
    print(files[0])


def _own_files(folder: Path) -> set[str]:
    """The files of an earlier comparison there.

    Raises:
      InputError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return set()
    if not (folder / MARK).is_file():
        raise InputError(f"{folder}: holds something else than a comparison; choose another folder by --output")
    return set(read_json(folder / MARK, "delete it with the other files of that comparison")["files"])
