"""The pages that people read name what is there: files, links, experiments, variants, settings; their Python runs."""

import ast
import importlib
import importlib.util
import re
import shlex
import textwrap
from functools import cache
from pathlib import Path

import pytest

import spdf_jax as spdf
from spdf_jax.main import JOBS
from spdf_jax.optim import OptimizerConfig
from spdf_jax.sparsity.optimizers import direction

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "experiments/README.md", "experiments/benchmarks/README.md")
#: Where a file that a page names may lie.
FOLDERS = (".", "spdf_jax", "experiments", "experiments/benchmarks", "experiments/notebooks", "tests")
#: Of others, of a sweep's folder, or to be written by whoever follows a walk.
ELSEWHERE = {"data/openwebtext/prepare.py", "table.md", "compare.md", "spdf_jax/jobs/masks.py"}
every_page = pytest.mark.parametrize("page", PAGES)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text(page), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


@cache
def experiment(name: str):
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "experiments" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def runs(page: str) -> dict:
    """What is left when its Python blocks have run one after another, as somebody pastes them."""
    registries, names = (spdf.RULES, spdf.OPTIMIZERS), {}
    before = [dict(registry) for registry in registries]
    try:
        exec(compile("\n".join(blocks(page, "python")), page, "exec"), names)
        names["optimizers"] = dict(spdf.OPTIMIZERS)
    finally:
        for registry, entries in zip(registries, before, strict=True):
            registry.clear()
            registry.update(entries)
    return names


def test_the_readme_is_read_in_five_minutes():
    assert len(text("README.md").splitlines()) <= 200


@pytest.mark.slow
def test_the_python_of_the_readme_runs():
    names = runs("README.md")
    weights, mask = (names[tree]["blocks"]["mlp_up"]["kernel"] for tree in ("params", "masks"))
    assert mask.sum() == mask.size // 4
    assert not weights[~mask].any()


def test_the_rule_and_the_optimiser_of_one_s_own_are_planned(monkeypatch):
    assert "mine" not in {*spdf.RULES, *spdf.OPTIMIZERS}
    names = runs("experiments/README.md")
    assert names["get_config"]().pretrain.sparsity.rule == "mine"
    monkeypatch.setitem(spdf.OPTIMIZERS, "mine", names["optimizers"]["mine"])
    assert direction(OptimizerConfig(name="mine")).init


def test_what_the_walks_write_imports_what_is_there():
    """Fragments of other files among them do not run alone."""
    walks = [ast.parse(block) for block in blocks("CONTRIBUTING.md", "python")]
    imported = [node for walk in walks for node in ast.walk(walk) if isinstance(node, ast.ImportFrom)]
    assert len(walks) == 3
    assert imported
    for node in imported:
        assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


@every_page
def test_files_and_links_are_there(page):
    named = set(re.findall(r"`([a-z0-9_./]+\.(?:py|sh|md|ipynb|lock|toml))`", text(page))) - ELSEWHERE
    assert [name for name in named if not any((ROOT / folder / name).exists() for folder in FOLDERS)] == []
    for target in re.findall(r"\]\((?!http)([^)]*)\)", text(page)):
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        assert file.exists(), target
        titles = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@every_page
def test_commands_name_experiments_variants_jobs_and_settings_that_are_there(page):
    """`--config` of every command, in a block or a sentence, and what it overrides."""
    said = text(page).replace("\n", " ")
    for name, variant in re.findall(r"experiments/(\w+\.py)(?::(\w+))?", said):
        if name not in {"mine.py"} and variant not in ("TASK", "VARIANT", "answers"):
            experiment(name)(variant or None)
    assert set(re.findall(r"--job (\w+)", said)) <= {*JOBS, "X", "masks"}
    for line in "".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if "--config" in words:
            file, _, variant = words[words.index("--config") + 1].partition(":")
            config = experiment(Path(file).name)("restaurant" if variant == "answers" else variant or None)
            for word in words:
                if word.startswith("--config."):
                    section, key = config, word.removeprefix("--config.").split("=")[0]
                    for part in key.split("."):
                        section = section[part]
