"""The house keeps its floors: a module imports only from lower ones, and heavy libraries stay in their rooms."""

import ast
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "spdf_jax"
FLOORS = [
    ["errors", "tree", "fields", "early_stopping"],
    [
        "sparsity.select",
        "sparsity.patterns",
        "sparsity.distributions",
        "sparsity.schedules",
        "sharding",
        "hlo",
        "losses",
        "attention_patterns",
        "attention_backends",
        "attention_cached",
        "attention",
        "primer",
    ],
    [
        "sparsity.masks",
        "sparsity.inside",
        "sparsity.rules",
        "sparsity.transforms",
        "sparsity.regrowth",
        "sparsity.topkast",
        "sparsity.mupar",
        "sparsity.scaling",
        "pod",
        "processes",
        "block_kernels",
        "block_linear",
        "layer_norm",
        "sparsity.blocks",
    ],
    ["workdir"],
    ["sparsity.programme", "gpt_config", "model", "flops", "optim", "data"],
    ["huggingface", "generate", "evals"],
    ["state"],
    ["step", "checkpoint", "tracking"],
    ["config"],
    ["plan", "report", "recipes"],
    ["feed", "restore", "pod_plan"],
    ["train"],
    ["jobs", "watch"],
    ["use"],
    ["sweep"],
    ["main"],
]
BEHIND_MASKS = ("inside", "rules", "transforms", "regrowth", "topkast", "blocks")
# Within a floor that lists both, the left may be used by the right.
SAME_FLOOR = {
    ("errors", "tree"),
    ("errors", "fields"),
    ("attention_patterns", "attention_backends"),
    ("attention_patterns", "attention_cached"),
    ("attention_patterns", "attention"),
    ("attention_backends", "attention"),
    ("sparsity.select", "sparsity.patterns"),
    ("sparsity.patterns", "sparsity.distributions"),
    ("sparsity.distributions", "sparsity.schedules"),
    ("block_kernels", "block_linear"),
    ("block_linear", "sparsity.blocks"),
    ("sparsity.regrowth", "sparsity.blocks"),
    ("sparsity.rules", "sparsity.blocks"),
    ("gpt_config", "model"),
    ("gpt_config", "flops"),
    ("generate", "evals"),
    ("sparsity.transforms", "sparsity.rules"),
    ("sparsity.regrowth", "sparsity.rules"),
    ("sparsity.transforms", "sparsity.topkast"),
    ("sparsity.rules", "sparsity.topkast"),
    ("sparsity.inside", "sparsity.transforms"),
    ("sparsity.inside", "sparsity.regrowth"),
} | {("sparsity.masks", f"sparsity.{other}") for other in BEHIND_MASKS}
ROOMS = {
    "grain": {"data"},
    "tensorflow_datasets": {"data"},
    "tokenizers": {"data", "huggingface"},
    "pyarrow": {"data"},
    "orbax": {"checkpoint"},
    "ml_collections": {"config", "main", "recipes"},
    "absl": {"main"},
    "safetensors": {"sparsity.masks", "huggingface"},
    "matplotlib": {"report"},
    "tensorboard": {"tracking"},
    "tensorflow": set(),
    "torch": set(),
}
# Files that a reader walks through to follow one training step, batch to new state.
ONE_STEP = [
    "train",
    "feed",
    "step",
    "data/pipeline",
    "state",
    "model",
    "attention",
    "losses",
    "optim",
    "sparsity/transforms",
]


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts[0] in ("data", "evals", "report") else ".".join(parts)


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


MODULES = [p for p in sorted(PACKAGE.rglob("*.py")) if p.name != "__init__.py"]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_module_imports_only_from_lower_floors(path):
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    me = module_name(path)
    assert me in floor, f"{me} has no floor: give it one"
    for name in imports(path):
        if not name.startswith("spdf_jax."):
            room = ROOMS.get(name.split(".")[0])
            assert room is None or me in room, f"{me} imports {name}"
            continue
        parts = name.split(".")[1:]
        other = next((n for n in (".".join(parts[:2]), parts[0]) if n in floor), None)
        if other and other != me:
            assert floor[other] < floor[me] or (other, me) in SAME_FLOOR, f"{me} imports {other}"


def test_one_training_step_is_followed_through_ten_files_and_1500_lines():
    files = [PACKAGE / f"{name}.py" for name in ONE_STEP]
    assert len(files) <= 10
    assert sum(len(f.read_text().splitlines()) for f in files) <= 1500


def test_experiments_import_the_public_interface_only():
    for path in (PACKAGE.parent / "experiments").glob("*.py"):
        ours = {n for n in imports(path) if n and n.startswith("spdf_jax")}
        assert ours <= {"spdf_jax"}, path


def test_no_library_module_imports_tensorflow():
    import spdf_jax.jobs

    assert spdf_jax.jobs
    assert "tensorflow" not in sys.modules
