"""Eight simulated CPU devices for every test, and errors where JAX would silently broadcast ranks."""

import gc
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile the same small programs again and again, in many processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads where a test's operations come from

import jax
import pytest
from matplotlib.figure import Figure
from tiny import QUICKLY, empty_figure, few_matrices

# Nor do they run for long: what they compile, in whatever process, need not be fast.
os.environ.update(QUICKLY)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


collect_ignore = ["recorded"]  # how its files were made, by others' code that no test needs


def pytest_collection_finish():
    """Tracing makes objects by the million: the collector need not walk through JAX and all tests again for each lot."""
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture
def transformers(torch):
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def no_figures():
    """Reports of tiny runs whose figures are empty: drawing them takes longer than such a run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", empty_figure)
        patch.setattr("spdf_jax.report.closer._lines", lambda axes: [])
        yield


@pytest.fixture(name="few_matrices")
def a_test_with_few_matrices():
    """See `tiny.few_matrices`."""
    with few_matrices():
        yield


@pytest.fixture(scope="module", name="all_with_few_matrices")
def a_module_with_few_matrices():
    """In a whole module, and the runs that its tests share."""
    with few_matrices():
        yield
