"""SPDF's table: three seeds of everything, and one pre-training for all of its tasks."""

import importlib.util
from pathlib import Path

import pytest

from spdf_jax.config.sweep import resolve_sweep

EXPERIMENT = Path(__file__).parent.parent / "experiments" / "spdf_table.py"


@pytest.fixture(scope="module")
def table():
    spec = importlib.util.spec_from_file_location("spdf_table", EXPERIMENT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "variant", ["mini", *(pytest.param(task, marks=pytest.mark.slow) for task in ("webnlg", "e2e"))]
)
def test_every_row_is_of_three_seeds_each_with_a_pretraining_of_its_own(table, variant):
    sweep = resolve_sweep(table.get_config(variant))
    for row in sweep.rows:
        cells = [sweep.cells[name] for _, name in row.choices]
        assert [cell.seed for cell in cells] == [0, 1, 2]
        sources = [cell.init_from for cell in cells]
        assert set(sources) == {""} if "untrained" in row.label else len(set(sources)) == 3
        for cell in filter(lambda cell: cell.init_from, cells):
            source = cell.init_from.rsplit("/", 1)[-1].removeprefix("cell:")
            assert resolve_sweep(table.get_config("mini")).cells[source].seed == cell.seed


def test_the_other_tasks_go_on_from_the_pretrainings_of_mini(table):
    mini = resolve_sweep(table.get_config("mini"))
    pretrained = {name for name in mini.cells if name.startswith("pretrain")}
    assert len(pretrained) == 9
    for variant in ("grid", "webnlg", "e2e", "dart"):
        config = table.get_config(variant)
        sweep = resolve_sweep(config)
        sources = {cell.init_from for cell in sweep.cells.values()} - {""}
        assert sources == {f"runs/spdf_table-mini/cells/{name}" for name in pretrained}
        assert all(cell.model == mini.cells["pretrain_0_0"].model for cell in sweep.cells.values())
        config.pretrained = "elsewhere"
        moved = {cell.init_from for cell in resolve_sweep(config).cells.values()} - {""}
        assert moved == {f"elsewhere/cells/{name}" for name in pretrained}
