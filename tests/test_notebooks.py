"""The notebooks run from top to bottom, as they lie in the repository: without outputs or data, in kernels of their own."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import as_users

NOTEBOOKS = sorted((Path(__file__).parent.parent / "experiments" / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_without_outputs(path):
    """What it printed once, on one machine, goes stale and hides the change in a diff; the run below is the proof."""
    cells = code_cells(path)
    assert cells
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"]]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_without_an_error_or_a_warning(path, tmp_path):
    copy = shutil.copy(path, tmp_path)
    private = {"IPYTHONDIR": str(tmp_path / "ipython"), "JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter")}
    command = [Path(sys.executable).with_name("jupyter-execute"), "--timeout=300", "--inplace", copy]
    done = subprocess.run(command, env=as_users() | private, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    cells = code_cells(Path(copy))
    assert all(cell["execution_count"] for cell in cells)
    written = [output for cell in cells for output in cell["outputs"] if output.get("name") == "stderr"]
    assert not written
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
