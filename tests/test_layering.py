"""The package is in layers: a folder imports only from those above it in one list, and heavy libraries stay in their own."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spdf_jax"
#: Modules and folders; each imports from those before it alone, and the files of a folder from each other without a circle.
LAYERS = (
    "errors",
    "fields",
    "tree",
    "sharding",
    "processes",
    "cloud",
    "workdir",
    "ops",
    "sparsity",
    "model",
    "optim",
    "data",
    "huggingface",
    "evals",
    "circuits",
    "config",
    "training",
    "planning",
    "report",
    "jobs",
    "main",
    "__main__",
)
#: Where a library may be imported; nowhere, or in the modules and folders named.
LIBRARIES = {
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "tokenizers": {"data", "huggingface"},
    "pyarrow": {"data"},
    "orbax": {"training.checkpoint"},
    "ml_collections": {"config", "main"},
    "absl": {"main"},
    "safetensors": {"sparsity.mask_files", "huggingface.folder"},
    "matplotlib": {"report"},
    "bokeh": {"report.closer"},
    "tensorboard": {"training.events"},
    "etils": {"cloud.spool"},
    "gcsfs": {"cloud.spool"},
    "google": {"cloud.spool"},
    "wandb": {"training.trackers"},
    "mlflow": {"training.trackers"},
    "trackio": {"training.trackers"},
    "tensorflow": set(),
    "torch": set(),
}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.name != "__init__.py"
}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(name: str) -> str:
    """The module of ours that `name` is, or is found in."""
    name = name.removeprefix("spdf_jax.")
    while name not in MODULES:
        assert "." in name, f"{name}: import what the module defines, not what the package hands on"
        name = name.rpartition(".")[0]
    return name


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_layers_above_its_own(module):
    layer = module.split(".")[0]
    for name in imports(MODULES[module]):
        if name.startswith("spdf_jax"):
            other = module_of(name).split(".")[0]
            assert LAYERS.index(other) <= LAYERS.index(layer), f"{module} imports {name}"
        else:
            allowed = LIBRARIES.get(name.split(".")[0])
            assert allowed is None or {layer, module} & allowed, f"{module} imports {name}"


def test_no_circle_of_imports():
    ours = {
        module: {module_of(name) for name in imports(path) if name.startswith("spdf_jax")} - {module}
        for module, path in MODULES.items()
    }
    assert list(graphlib.TopologicalSorter(ours).static_order())


def test_rooms_are_small_enough_to_be_read():
    assert len([path for path in PACKAGE.glob("*.py") if not path.name.startswith("__")]) <= 8
    for module, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 350, f"{module}: split it"


def test_experiments_import_the_public_interface_only():
    for path in (PACKAGE.parent / "experiments").glob("*.py"):
        ours = {name for name in imports(path) if name.startswith("spdf_jax")}
        assert ours <= {"spdf_jax", "spdf_jax.config.recipes"}, path


def test_no_library_module_imports_tensorflow():
    import spdf_jax.jobs.train

    assert spdf_jax.jobs.train
    assert "tensorflow" not in sys.modules
