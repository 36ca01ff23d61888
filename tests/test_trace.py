"""How much of the package one step goes through: measured by profiling its trace, and held as limits that only fall."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.planning.pod_plan import phase_state
from spdf_jax.sharding import make_mesh
from spdf_jax.training.loop import make_phase_steps, one_step
from spdf_jax.training.phases import make_plan

PACKAGE = Path(spdf.__file__).parent


def entered(trace):
    """Files of the package of which tracing enters a function, and the code objects of those functions."""
    codes = set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            codes.add(frame.f_code)

    jax.clear_caches()
    sys.setprofile(profile)
    try:
        trace()
    finally:
        sys.setprofile(None)
    return {Path(code.co_filename) for code in codes}, codes


def lines_of(codes):
    """Lines of the functions, each line once where one is inside another."""
    return len({(code.co_filename, line) for code in codes for *_, line in code.co_lines() if line})


@pytest.fixture(scope="module")
def traces():
    """What tracing a train step and a topology step of RigL enters, dispatch left out: it is done before."""
    c = spdf.default_config("trace", "test", variants=("test",))
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size, c.model.context = 2, 2, 16, 1024, 16
    c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = "rigl", 0.5
    c.mesh.data, c.loop.eval_batch_size = 1, 16
    config = spdf.resolve(c)
    (plan,), mesh, model = make_plan(config), make_mesh(config.mesh), spdf.GPT(config.model)
    tokens_ABT = np.zeros((1, 2, 16), np.int32)
    batch_ABT = Batch(tokens_ABT, tokens_ABT, np.ones((1, 2, 16), np.float32))
    found = {}
    with jax.set_mesh(mesh):
        state = phase_state(config, plan, mesh)
        steps = make_phase_steps(model, plan, mesh, state)
        moving = next(step for step in range(plan.config.steps) if plan.programme.topology(step))
        for name, step in (("train", 1), ("topology", moving)):
            call = []
            keep = steps._replace(**{name: lambda *args, call=call, **how: call.append((args, how)) or (None, None)})
            one_step(keep, plan, step, state, batch_ABT)
            ((args, how),) = call
            found[name] = entered(lambda: getattr(steps, name).trace(*args, **how))  # noqa: B023
    return found


# Measured 2026-11-30; 65a3a6c entered 19 files of 3,310 lines and 23 files of 4,181 lines. Functions are 15 and 18 lines longer
# than before the model had Llama's options: GPT-2 passes the branches to norms, biases, heads and positions in other files.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "most_files", "most_file_lines", "most_function_lines"),
    [("train", 15, 2440, 510), ("topology", 18, 3195, 593)],
)
def test_a_step_goes_through_few_files(traces, step, most_files, most_file_lines, most_function_lines):
    files, codes = traces[step]
    names = sorted(str(file.relative_to(PACKAGE)) for file in files)
    assert len(files) <= most_files, names
    assert sum(len(file.read_text().splitlines()) for file in files) <= most_file_lines, names
    assert lines_of(codes) <= most_function_lines
    assert {PACKAGE / "training/step.py", PACKAGE / "model/gpt.py", PACKAGE / "sparsity/masks.py"} <= files
