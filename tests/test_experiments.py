"""Every experiment of the repository, in every variant, resolves and can be planned: nothing in it is out of range or idle."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import spdf_jax as spdf
from spdf_jax.config.sweep import resolve_sweep
from spdf_jax.data import TaskConfig, load_task
from spdf_jax.training import phases as plan

FOLDER = Path(__file__).parent.parent / "experiments"


def get_config(name, variant):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant) if variant else module.get_config()


EXPERIMENTS = [
    (path.stem, variant) for path in sorted(FOLDER.glob("*.py")) for variant in get_config(path.stem, "").variants
]


@pytest.fixture(scope="module")
def task():
    return load_task(TaskConfig("restaurant"))


@pytest.mark.parametrize(("name", "variant"), EXPERIMENTS)
def test_it_resolves_and_is_planned(name, variant, task, monkeypatch):
    monkeypatch.setattr(plan, "load_task", lambda config: task)  # the files are not here
    config = get_config(name, variant)
    assert config.variant == variant
    if "cells" not in config:
        runs = [spdf.resolve(config)]
    else:
        runs = list(resolve_sweep(config).cells.values())
    for run in runs:
        assert plan.make_plan(run)[-1].end > 0
        assert spdf.resolve(ConfigDict(run.as_dict())) == run  # as a workdir says it


@pytest.mark.parametrize("name", sorted({name for name, _ in EXPERIMENTS}))
def test_a_variant_that_it_does_not_have_is_refused_with_those_it_has(name):
    with pytest.raises(spdf.InputError, match=r"no variant 'nope'.*known are"):
        get_config(name, "nope")
