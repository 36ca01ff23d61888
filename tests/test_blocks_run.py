"""Block-sparse compute through the whole system: steps, phases, checkpoints, meshes, export, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import rows_without_clock, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.huggingface import load_model
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.export import export
from spdf_jax.sharding import MeshConfig, make_mesh
from spdf_jax.sparsity.blocks import compress_tree
from spdf_jax.sparsity.programme import SparsityConfig
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.invariants import check_invariants
from spdf_jax.training.phases import make_plan
from spdf_jax.training.programs import make_steps
from spdf_jax.training.restore import saved_run
from spdf_jax.training.state import abstract_state, init_state, start_phase, state_shardings
from spdf_jax.tree import named_leaves

pytestmark = pytest.mark.usefixtures("no_figures")

# One program each: op by op they would be dozens.
as_masks, compress_tree = jax.jit(spdf.as_masks, static_argnums=0), jax.jit(compress_tree)
BLOCKS = {"sparsity": 0.75, "pattern": "block8", "sparse_compute": "blocks"}


def blocks_config(rule="static", phases=("pretrain",), **model):
    """A GPT of 2 layers x 32 in blocks of 8: 4 x 4 and 4 x 16 of them, 1 of 4 live."""
    c = spdf.default_config("blocks", "test", variants=("test",), phases=phases)
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size, c.model.context = 2, 2, 32, 300, 16
    c.mesh.data = 1
    for name, value in model.items():
        setattr(c.model, name, value)
    c.pretrain.steps, c.pretrain.batch_size, c.pretrain.optimizer.warmup_steps = 12, 4, 2
    c.pretrain.sparsity.rule = rule
    if rule not in ("static", "dense"):
        c.pretrain.sparsity.update_every_steps = 3
    if rule != "dense":
        c.pretrain.sparsity.update(BLOCKS)
    return c


def batches(count, rows=4, vocab=300, seq=16):
    rng = np.random.default_rng(0)
    for _ in range(count):
        tokens = rng.integers(0, vocab, (1, rows, seq + 1)).astype(np.int32)
        yield Batch(tokens[..., :-1], tokens[..., 1:], np.ones((1, rows, seq), np.float32))


def first_state(c, mesh=None):
    config = spdf.resolve(c)
    (plan, *_), mesh = make_plan(config), mesh or make_mesh(config.mesh)
    model = spdf.GPT(config.model)
    return model, plan, mesh, init_state(model, plan.tx, plan.config.sparsity, plan.filter, 0, mesh)


def steps_of(model, plan, shardings=None):
    return make_steps(model, plan.tx, plan.learning_rate, plan.programme.config.topology_rule, shardings)


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def assert_close(ours, reference, tolerance=2e-5):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance, err_msg=str(path))


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.slow)])
@pytest.mark.usefixtures("few_matrices")
def test_training_in_blocks_is_training_under_the_same_masks(remat):
    model, plan, _, state = first_state(blocks_config(remat=remat))
    assert state.params["blocks"]["mlp_up"]["kernel"].shape == (2, 16, 1, 8, 8)
    assert {m.ndim for m in jax.tree.leaves(state.masks)} == {0}
    steps = steps_of(model, plan)
    masked = as_masks(plan.tx, copied(state))
    for batch in batches(3):
        state, metrics = steps.train(state, batch, pattern="causal", width=8)
        masked, expected = steps.train(masked, batch, pattern="causal", width=8)
        assert_close(metrics, expected)
    assert_close(as_masks(plan.tx, state).params, masked.params, 1e-4)  # Adam's sign of a tiny gradient
    check_invariants(plan.programme, plan.filter, state, 0)


@pytest.mark.usefixtures("few_matrices")
def test_a_topology_step_moves_blocks_and_keeps_the_programme():
    model, plan, mesh, state = first_state(blocks_config("mst"))
    steps = steps_of(model, plan, state_shardings(mesh, plan.tx, state))
    nnz = {name: np.full((2,), n, np.int32) for name, n in plan.programme.counts(0).items()}
    before = copied(state.topology)
    for i, batch in enumerate(batches(5)):
        if i % 2:
            old = np.asarray(state.topology["blocks"]["mlp_up"]["kernel"])
            state, metrics = steps.topology(state, batch, nnz, np.float32(0.5), pattern="causal", width=8)
            assert metrics["churn"].keys() == nnz.keys()
            new = np.asarray(state.topology["blocks"]["mlp_up"]["kernel"])
            np.testing.assert_allclose(metrics["churn"]["blocks/mlp_up/kernel"], (new & ~old).sum((1, 2)) / 16)
            check_invariants(plan.programme, plan.filter, state, 0)
        else:
            state, _ = steps.train(state, batch, pattern="causal", width=8)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (before, state.topology)), strict=True))
    assert steps.train._cache_size() == steps.topology._cache_size() == 1  # another topology compiles nothing


@pytest.mark.usefixtures("few_matrices")
def test_a_broken_topology_is_not_saved():
    _, plan, _, state = first_state(blocks_config())
    broken = copied(state.topology)
    broken["blocks"]["mlp_up"]["kernel"] = broken["blocks"]["mlp_up"]["kernel"].at[0].set(True)
    with pytest.raises(RuntimeError, match="blocks/mlp_up/kernel: its live blocks are not the same number"):
        check_invariants(plan.programme, plan.filter, state.replace(topology=broken), 0)


def kernel_bytes(config, plan):
    """Of the sparse leaves: parameters, masks, moments and topology."""
    state = abstract_state(spdf.GPT(config.model), plan.tx, plan.config.sparsity, plan.filter).replace(key=None)
    kernels = [leaf for name, leaf in named_leaves(state) if name.endswith("kernel")]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kernels)


def test_the_state_of_the_sparse_leaves_is_a_quarter_of_the_dense_one():
    bytes_of = {}
    for rule in ("dense", "static"):
        config = spdf.resolve(blocks_config(rule))
        bytes_of[rule] = kernel_bytes(config, make_plan(config)[0])
    assert bytes_of["dense"] == 3 * 4 * 2 * 12 * 32**2 + 6  # 0-d masks
    assert bytes_of["static"] == bytes_of["dense"] // 4 + 5 + 2 * 12 * 32**2 // 8**2  # 0.40 was asked


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_on_a_mesh_it_is_the_same():
    c = blocks_config("rigl")
    model, plan, _, alone = first_state(c)
    many, batch = make_mesh(MeshConfig(2, 2, 2)), next(batches(1, rows=8))
    with jax.set_mesh(many):
        _, plan, _, state = first_state(c, many)
        shardings = state_shardings(many, plan.tx, state)
        spec = shardings.params["blocks"]["mlp_up"]["kernel"].spec
        assert tuple(spec) == (None, "tensor", None, "fsdp", None)
        steps, own = steps_of(model, plan, shardings), steps_of(model, plan)
        nnz = {name: np.full((2,), n, np.int32) for name, n in plan.programme.counts(0).items()}
        state, metrics = steps.train(state, batch, pattern="causal", width=8)
        state, moved = steps.topology(state, batch, nnz, np.float32(0.5), pattern="causal", width=8)
        assert state.params["blocks"]["mlp_up"]["kernel"].sharding.spec == spec
    alone, expected = own.train(alone, batch, pattern="causal", width=8)
    alone, expected_moved = own.topology(alone, batch, nnz, np.float32(0.5), pattern="causal", width=8)
    assert_close(
        (metrics["loss"], moved["loss"], moved["churn"]),
        (*(m["loss"] for m in (expected, expected_moved)), expected_moved["churn"]),
    )
    assert_close(jax.device_get(state.params), alone.params, 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_phases_go_from_dense_to_blocks_to_masks_to_dense_and_carry_the_optimiser():
    model, plan, mesh, state = first_state(blocks_config())
    tx, blocks = plan.tx, SparsityConfig(rule="static", **BLOCKS)
    start = lambda state, config: start_phase(state, tx, config, plan.filter, mesh, reset_optimizer=False)  # noqa: E731
    state, _ = steps_of(model, plan).train(state, next(batches(1)), pattern="causal", width=8)
    whole = as_masks(tx, state)

    same = start(copied(state), blocks)
    for a, b in zip(*(jax.tree.leaves(s.replace(key=None)) for s in (same, state)), strict=True):
        np.testing.assert_array_equal(a, b)

    masked = start(copied(state), dataclasses.replace(blocks, sparse_compute="masked"))
    for a, b in zip(*(jax.tree.leaves(s.replace(key=None)) for s in (masked, whole)), strict=True):
        np.testing.assert_array_equal(a, b)

    dense = start(copied(state), SparsityConfig())
    assert not dense.topology
    assert {m.ndim for m in jax.tree.leaves(dense.masks)} == {0}
    for a, b in zip(*(jax.tree.leaves((s.params, s.opt_state)) for s in (dense, whole)), strict=True):
        np.testing.assert_array_equal(a, b)

    again = start(dense, dataclasses.replace(blocks, init="magnitude"))
    kept = compress_tree(whole.params, again.topology, again.params)
    for a, b in zip(*map(jax.tree.leaves, (again.params, kept)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_masks_are_not_dropped_from_blocks_by_hand():
    *_, state = first_state(blocks_config())
    with pytest.raises(spdf.InputError, match=r"use spdf_jax.as_masks\(tx, state\) first"):
        spdf.drop_masks(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sparse_compute": "sparse"}, "sparsity.sparse_compute: 'sparse' is not one of 'masked', 'blocks'"),
        ({"pattern": "unstructured"}, "sparsity.pattern: sparse_compute 'blocks' needs blocks such as 'block64'"),
        (
            {"distribution": "erk"},
            "sparsity.distribution: 'erk' does not go with sparse_compute 'blocks'; use 'uniform'",
        ),
        ({"sparsify_head": True}, "sparsity.sparsify_head: True does not go with sparse_compute 'blocks'; use False"),
        ({"rule": "gmp", "schedule": "cubic"}, "sparsity.schedule: 'cubic' does not go with sparse_compute 'blocks'"),
        ({"rule": "topkast"}, "sparsity.rule: 'topkast' keeps values outside its masks"),
    ],
)
def test_a_programme_that_blocks_cannot_follow_is_refused(change, message):
    with pytest.raises(spdf.InputError, match=message):
        SparsityConfig(**{"rule": "static"} | BLOCKS | change)


def test_sizes_and_optimisers_that_do_not_fit_are_refused_before_anything_runs():
    c = blocks_config()
    c.pretrain.sparsity.sparsity = 0.9
    with pytest.raises(
        spdf.InputError, match=r"blocks/attn_k/kernel in 4 x 4 blocks of 8 would keep 0.5 .* 0.75 \(1 of 4\)"
    ):
        make_plan(spdf.resolve(c))
    for name, value in (("regrowth", "smet"), ("density_exponent", 0.5)):
        c = blocks_config("rigl")
        setattr(c.pretrain.optimizer, name, value)
        with pytest.raises(
            spdf.InputError, match=r"config\.pretrain\.optimizer: sparse_compute 'blocks' keeps nothing"
        ):
            spdf.resolve(c)


def run_config(tmp_path):
    """MST in blocks, then dense."""
    c = tiny_config(write_text(tmp_path / "text"), tmp_path / "cache")
    set_sparsity(c.pretrain, **BLOCKS | {"rule": "mst", "update_every_steps": 6, "pattern": "block4"})
    c.pretrain.steps, c.finetune.steps = 24, 6
    c.loop.eval_every_steps, c.loop.checkpoint_every_steps = 12, 6
    return c


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_a_run_resumes_to_the_same_bits_and_exports_the_weights_it_computes_with(tmp_path, monkeypatch):
    config = spdf.resolve(run_config(tmp_path))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    summary = jobs.train(config, whole, progress=False)
    assert summary["status"] == "finished"

    save = Checkpoints.save

    def stop_at_18(self, state, record):
        save(self, state, record)
        self.wait()
        if int(state.step) == 18:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", stop_at_18)
    with pytest.raises(KeyboardInterrupt):
        jobs.train(config, cut, progress=False)
    monkeypatch.setattr(Checkpoints, "save", save)
    stopped = saved_run(cut)
    assert int(stopped.state.step) == 18
    assert not stopped.state.topology  # as masks, for whoever evaluates, generates or goes on from it
    report = spdf.mask_report(stopped.state.masks)
    assert report.sparsity == 0.75
    assert {(row.dead_rows, row.dead_columns) for row in report.rows} == {(0, 0)}
    export(config, cut)
    _, exported = load_model(cut / "huggingface")
    np.testing.assert_array_equal(
        exported["blocks"]["mlp_up"]["kernel"], stopped.state.params["blocks"]["mlp_up"]["kernel"]
    )

    assert jobs.train(config, cut, progress=False)["val_loss"] == summary["val_loss"]
    assert rows_without_clock(cut) == rows_without_clock(whole)
    for a, b in zip(*(jax.tree.leaves(saved_run(w).state.params) for w in (whole, cut)), strict=True):
        np.testing.assert_array_equal(a, b)
    with np.load(whole / "mask_pictures" / "step_00000000.npz") as pictures:
        assert pictures["blocks/mlp_up/kernel/0"].mean() == 0.25
