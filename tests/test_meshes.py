"""The same run on every mesh and over any number of processes, and from one to another in the middle."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from many import FINETUNE_RATE, finish, start, wait_for_step
from tiny import NO_WINDOW, NO_WINDOW_FLAGS, few_matrices, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.jobs import train as jobs
from spdf_jax.planning.pod_plan import lower_steps
from spdf_jax.processes import RESTART_CODE
from spdf_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from spdf_jax.sparsity.mask_files import pack_masks, unpack_masks
from spdf_jax.sparsity.topology import move_masks
from spdf_jax.training import loop
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.loop import make_phase_steps
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import saved_run
from spdf_jax.training.state import init_state, state_shardings
from spdf_jax.tree import named_leaves

pytestmark = pytest.mark.usefixtures("no_figures")

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
STEPS = 36
SPARSEST = 18  # a step of the ultra-sparse phase


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def config(text: Path, sizes: tuple[int, int, int] = (1, 1, 1)):
    """MST through all its phases, every axis of its matrices divisible by eight."""
    c = tiny_config(text, text.parent / "cache")
    c.model.n_head, c.model.d_model, c.model.vocab_size = 8, 32, 304
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
    c.pretrain.steps, c.pretrain.batch_size, c.phases = STEPS, 8, ("pretrain",)
    c.pretrain.optimizer.peak_learning_rate = 1e-3
    del c.finetune
    c.loop.keep_checkpoints, c.loop.checkpoint_every_steps, c.loop.eval_every_steps = 2, SPARSEST, STEPS
    return spdf.resolve(c)


# --- one topology step ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def before_a_topology_step(text):
    """A phase, a state in it, a dense gradient, and what to aim for: in host memory."""
    run = config(text)
    with few_matrices():
        plan = make_plan(run)[0]
    state = init_state(
        spdf.GPT(run.model), plan.tx, plan.config.sparsity, plan.filter, run.seed, make_mesh(MeshConfig(1))
    )
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), state.params)
    local = next(step for step in range(STEPS) if plan.programme.topology(step) and plan.programme.sparsity(step) > 0.5)
    target = plan.programme.topology(local)
    nnz = {name: np.full((plan.programme.groups[name].count,), n, np.int32) for name, n in target.counts.items()}
    return plan, state, grads, nnz, np.float32(target.drop_fraction)


def topology_step(sizes, plan, state, grads, target_nnz, drop_fraction):
    """Packed masks and parameters after the step, on a mesh of these sizes."""
    mesh = make_mesh(MeshConfig(*sizes))
    placed = jax.device_put(state.replace(key=jax.random.key_data(state.key)), state_shardings(mesh, plan.tx, state))
    grads = jax.device_put(grads, parameter_shardings(mesh, grads))

    @jax.jit
    def step(state, grads):
        return move_masks(
            jax.random.wrap_key_data(state.key),
            plan.tx,
            state.params,
            grads,
            state.masks,
            state.opt_state,
            target_nnz=target_nnz,
            drop_fraction=drop_fraction,
            rule=plan.programme.config.topology_rule,
            regrowth=plan.config.optimizer.regrowth,
        )

    with jax.set_mesh(mesh):
        params, masks, _ = step(placed, grads)
    return jax.device_get((pack_masks(masks), params))


@pytest.fixture(scope="module")
def after_it(before_a_topology_step):
    """What the step gives on one device."""
    return topology_step((1, 1, 1), *before_a_topology_step)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES)
def test_a_topology_step_gives_the_same_bits_on_every_mesh(sizes, before_a_topology_step, after_it):
    before = jax.device_get(pack_masks(before_a_topology_step[1].masks))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after_it[0], before)), strict=True))
    found = topology_step(sizes, *before_a_topology_step)
    for (name, ours), (_, theirs) in zip(named_leaves(found), named_leaves(after_it), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=name)


# --- a plan -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "kernels", [{}, {"rule": "rigl", "sparsity": 0.5, "pattern": "block8", "sparse_compute": "blocks"}]
)
def test_what_is_planned_is_what_runs(kernels, text, tmp_path, monkeypatch):
    """The compiler gets the same text, the layout of every argument with it."""
    c = tiny_config(text, text.parent / "cache")
    c.model.n_head, c.model.d_model, c.model.vocab_size = 8, 32, 304
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = 2, 2, 2
    c.pretrain.steps, c.pretrain.batch_size, c.pretrain.grad_accumulation_steps, c.phases = 8, 8, 2, ("pretrain",)
    del c.finetune
    c.pretrain.sparsity.update(NO_WINDOW | {"update_every_steps": 2})
    if kernels:
        set_sparsity(c.pretrain, **kernels, update_every_steps=2)
    run, ran = spdf.resolve(c), {}

    def recorded(name, step):
        def call(*args, **kwargs):
            if name not in ran:
                ran[name] = step.lower(*args, **kwargs).as_text()
            return step(*args, **kwargs)

        return call

    def recording(*args):
        steps = make_phase_steps(*args)
        return steps._replace(
            train=recorded("train step", steps.train), topology=recorded("topology step", steps.topology)
        )

    monkeypatch.setattr(loop, "make_phase_steps", recording)
    with few_matrices():
        jobs.train(run, tmp_path, progress=False)
        (plan,) = make_plan(run)
    planned = {name: lowered.as_text() for name, lowered in lower_steps(run, plan, make_mesh(run.mesh))}
    assert {name: planned[name] for name in ("train step", "topology step")} == ran


# --- a whole run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """The run on one device."""
    workdir = tmp_path_factory.mktemp("runs") / "alone"
    jobs.train(config(text), workdir, progress=False)
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [pytest.param(s, marks=[pytest.mark.nightly] * (1 in s)) for s in MESHES])
def test_a_run_through_all_phases_is_the_same_on_every_mesh(sizes, text, alone, tmp_path):
    run = config(text, sizes)
    jobs.train(run, tmp_path, progress=False)
    ours, theirs = (read_metrics(workdir) for workdir in (tmp_path, alone))
    assert len(ours) == len(theirs) > STEPS
    for row, other in zip(ours, theirs, strict=True):
        exact = ("step", "sparsity", "density", "train_flops", "tokens")
        assert [row.get(key) for key in exact] == [other.get(key) for key in exact]
        for kind in ("loss", "val_loss"):
            assert row.get(kind) == pytest.approx(other.get(kind), abs=1e-3), row["step"]
    assert {0.0, run.phases["pretrain"].sparsity.sparsity} <= {round(row["sparsity"], 2) for row in ours}

    programme = make_plan(run)[0].programme
    assert programme.sparsity(SPARSEST) == pytest.approx(0.8, abs=1e-3)
    for step in (SPARSEST, STEPS):
        masks = [masks_as_written(workdir, step) for workdir in (tmp_path, alone)]
        differing = weights = 0
        for name, count in programme.counts(step).items():
            mask, other = (of[name] for of in masks)
            assert (mask.reshape(programme.groups[name].count, -1).sum(axis=1) == count).all()
            differing, weights = differing + (mask != other).sum(), weights + mask.size
        assert weights
        assert differing < 1e-3 * weights, (step, differing, weights)


def masks_as_written(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Masks of a checkpoint by the name of their parameter."""
    arrays = as_written(workdir, step)
    packed = {name.removeprefix("masks/"): array for name, array in arrays.items() if name.startswith("masks/")}
    return {
        name: np.asarray(unpack_masks({"x": jnp.asarray(array)}, {"x": jnp.asarray(arrays[f"params/{name}"])})["x"])
        for name, array in packed.items()
    }


def as_written(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint by name, read by orbax alone."""
    folder = (workdir / "checkpoints" / str(step) / "state").absolute()
    with ocp.PyTreeCheckpointer() as reader:
        leaves = reader.metadata(folder).item_metadata.tree  # written by devices that are not here
        how = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        tree = reader.restore(folder, ocp.args.PyTreeRestore(restore_args=how))
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}


# --- from one to another ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")  # as in the processes
def test_saved_by_two_processes_on_one_mesh_and_gone_on_from_elsewhere(text, tmp_path):
    """Saved on (2, 2, 2) by two processes; gone on from on one device, on (1, 8, 1), and as it was begun."""
    whole, arguments = tmp_path / "whole", ["--quiet"]
    changes = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "pretrain.batch_size": 8, "finetune.batch_size": 8}
    arguments += [f"--config.{name}={value}" for name, value in changes.items()]
    arguments += [
        "--config.model.n_head=4",
        "--config.model.vocab_size=304",
        "--config.pretrain.steps=18",
        "--config.finetune.steps=4",
        f"--config.finetune.optimizer.peak_learning_rate={FINETUNE_RATE}",
        "--config.loop.checkpoint_every_steps=1000",
        *NO_WINDOW_FLAGS,
    ]
    started = start(2, 4, whole, text, *arguments)
    wait_for_step(whole, 7, started)
    started[0].terminate()
    assert [end.code for end in finish(started)] == [RESTART_CODE] * 2
    (step,) = (int(p.name) for p in (whole / "checkpoints").iterdir())
    assert 7 <= step < 18
    written = as_written(whole, step)

    found = {}
    for sizes in ((1, 1, 1), (1, 8, 1)):
        workdir = tmp_path / f"{sizes}"
        shutil.copytree(whole, workdir)
        c = tiny_config(text, text.parent / "cache")
        c.model.n_head, c.model.vocab_size, c.pretrain.batch_size, c.finetune.batch_size = 4, 304, 8, 8
        c.pretrain.steps, c.finetune.steps = 18, 4
        c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
        c.finetune.optimizer.peak_learning_rate = FINETUNE_RATE
        c.pretrain.sparsity.update(NO_WINDOW)
        run = spdf.resolve(c)
        state = saved_run(workdir, make_mesh(run.mesh), run).state
        arrays = state.replace(key=jax.random.key_data(state.key), masks=pack_masks(state.masks))
        restored = dict(named_leaves(jax.device_get(arrays)))
        assert restored.keys() == written.keys()
        for name, array in written.items():
            np.testing.assert_array_equal(restored[name], array, err_msg=name)
        checkpoints = Checkpoints(workdir / "checkpoints")
        assert checkpoints.record()["next_example"] == 8 * step
        checkpoints.close()
        jobs.train(run, workdir, progress=False)
        found[sizes] = {row["step"]: row["loss"] for row in read_metrics(workdir) if "loss" in row}
    assert [end.code for end in finish(start(2, 4, whole, text, *arguments))] == [0, 0]
    found["as begun"] = {row["step"]: row["loss"] for row in read_metrics(whole) if "loss" in row}
    for losses in found.values():
        assert list(losses) == list(range(1, 23))  # no step twice, none left out
        for later in range(step + 1, 23):
            assert losses[later] == pytest.approx(found[1, 1, 1][later], abs=1e-4), later
    assert jnp.isfinite(jnp.array(list(found[1, 8, 1].values()))).all()
