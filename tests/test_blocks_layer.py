"""The block-sparse layer: the same values and gradients as a dense product under a mask, by every backend, and no more work."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec, use_abstract_mesh
from tiny import needs_mosaic

from spdf_jax.errors import InputError
from spdf_jax.model.linear import Linear
from spdf_jax.ops.block_linear import _choose, block_linear, live_inputs
from spdf_jax.sparsity.blocks import expand


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def problem(seed, B, T, b, inputs, outputs, live, dtype=jnp.float32):
    """x_BTP, data_JKbb, dy_BTQ, live_IJ."""
    live_IJ = np.zeros((inputs, outputs), bool)
    rng = np.random.default_rng(seed)
    for j in range(outputs):  # no counts in the rows: the layer needs none
        live_IJ[rng.permutation(inputs)[:live], j] = True
    x_BTP, dy_BTQ = normal(seed, B, T, inputs * b, dtype=dtype), normal(seed + 1, B, T, outputs * b, dtype=dtype)
    return x_BTP, normal(seed + 2, outputs, live, b, b, dtype=dtype), dy_BTQ, jnp.asarray(live_IJ)


def dense_under_mask(x_BTP, data_JKbb, dy_BTQ, live_IJ):
    """Output, input gradient, and the weight gradient's live blocks, in float64."""
    x_NP, dy_NQ = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (x_BTP, dy_BTQ))
    b, dkernel_PQ = data_JKbb.shape[-1], x_NP.T @ dy_NQ
    kernel_PQ, ddata_JKbb = np.zeros(dkernel_PQ.shape), np.zeros(data_JKbb.shape)
    for j, column_I in enumerate(np.asarray(live_IJ).T):
        for k, i in enumerate(np.flatnonzero(column_I)):
            block = slice(i * b, i * b + b), slice(j * b, j * b + b)
            kernel_PQ[block], ddata_JKbb[j, k] = data_JKbb[j, k], dkernel_PQ[block]
    return (x_NP @ kernel_PQ).reshape(dy_BTQ.shape), (dy_NQ @ kernel_PQ.T).reshape(x_BTP.shape), ddata_JKbb


@partial(jax.jit, static_argnames="backend")  # op by op, every shape would compile some dozens of programs
def by_blocks(x_BTP, data_JKbb, dy_BTQ, live_IJ, backend="auto"):
    idx_JK = live_inputs(live_IJ, data_JKbb.shape[1])
    y_BTQ, pullback = jax.vjp(lambda x, data: block_linear(x, data, idx_JK, backend=backend), x_BTP, data_JKbb)
    return y_BTQ, *pullback(dy_BTQ)


def assert_close(ours, reference, tolerance=1e-5):
    for a, r in zip(ours, reference, strict=True):
        assert a.shape == r.shape
        np.testing.assert_allclose(np.asarray(a, np.float64), r, rtol=0, atol=tolerance * max(1, np.abs(r).max()))


shapes = st.tuples(
    st.integers(1, 2), st.integers(1, 9), st.sampled_from([1, 2, 5, 8]), st.integers(1, 5), st.integers(1, 4)
)


@settings(max_examples=5, deadline=None)
@given(shapes, st.integers(1, 5), st.sampled_from(["loop", "gather"]), st.integers(0, 99))
def test_values_and_gradients_are_those_of_the_dense_product_under_the_mask(shape, live, backend, seed):
    B, T, b, inputs, outputs = shape
    args = problem(seed, B, T, b, inputs, outputs, min(live, inputs))
    assert_close(by_blocks(*args, backend), dense_under_mask(*args))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(1, 5), st.sampled_from(["loop", "gather"]), st.integers(0, 99))
def test_values_and_gradients_over_many_shapes(shape, live, backend, seed):
    B, T, b, inputs, outputs = shape
    args = problem(seed, B, T, b, inputs, outputs, min(live, inputs))
    assert_close(by_blocks(*args, backend), dense_under_mask(*args))


@pytest.mark.parametrize(
    ("B", "T", "inputs", "outputs", "live"),
    [(1, 128, 2, 3, 1), (3, 128, 3, 2, 2), pytest.param(2, 1024, 4, 32, 3, marks=pytest.mark.slow)],
)
def test_the_tpu_kernels_interpreted(B, T, inputs, outputs, live):
    args = problem(0, B, T, 128, inputs, outputs, live)
    assert_close(by_blocks(*args, "pallas"), dense_under_mask(*args))


def test_the_tpu_kernels_in_bfloat16():
    args = problem(0, 1, 128, 128, 2, 2, 1, jnp.bfloat16)
    ours = by_blocks(*args, "pallas")
    assert {a.dtype for a in ours} == {jnp.dtype(jnp.bfloat16)}
    assert_close(ours, dense_under_mask(*args), 1e-2)


@needs_mosaic
@pytest.mark.parametrize(
    ("B", "T", "b", "inputs", "outputs", "live"),
    [
        (1, 64, 64, 3, 2, 1),  # an input block that nothing reads
        pytest.param(3, 64, 128, 2, 3, 2, marks=pytest.mark.slow),
        pytest.param(2, 64, 192, 3, 2, 2, marks=pytest.mark.slow),  # blocks of several tiles
        pytest.param(1, 384, 64, 4, 5, 3, marks=pytest.mark.slow),  # more steps than stages
    ],
)
def test_the_hopper_kernels_interpreted(B, T, b, inputs, outputs, live):
    args = problem(0, B, T, b, inputs, outputs, live, jnp.bfloat16)
    ours = by_blocks(*args, "mosaic")  # which raises where threads and copies race
    assert {a.dtype for a in ours} == {jnp.dtype(jnp.bfloat16)}
    assert_close(ours, dense_under_mask(*args), 2**-8)


@needs_mosaic
@pytest.mark.slow
def test_the_hopper_kernels_where_integers_are_wide():
    args = problem(0, 1, 64, 64, 3, 2, 1, jnp.bfloat16)
    with jax.enable_x64(True):
        assert_close(by_blocks(*args, "mosaic"), dense_under_mask(*args), 2**-8)


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("NVIDIA H100 80GB HBM3", "mosaic"),
        ("NVIDIA H200", "mosaic"),
        ("NVIDIA GH200 480GB", "mosaic"),
        ("NVIDIA A100-SXM4-80GB", "gather"),
        ("NVIDIA B200", "gather"),
        ("Hopper H100", "gather"),
    ],
)
def test_auto_takes_the_hopper_kernels_on_hopper_alone(monkeypatch, kind, backend):
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    for auto, tokens, side, dtype in (
        (backend, 128, 64, jnp.bfloat16),
        ("gather", 96, 64, jnp.bfloat16),
        ("gather", 128, 32, jnp.bfloat16),
        ("gather", 128, 64, jnp.float32),
    ):
        with use_abstract_mesh(AbstractMesh((2,), ("data",), abstract_device=AbstractDevice(kind, 132, "gpu"))):
            assert _choose("auto", tokens, side, jnp.dtype(dtype)) == auto
            if auto == "gather":
                with pytest.raises(InputError, match=f"'mosaic' cannot compute blocks of {side} on {tokens} tokens"):
                    _choose("mosaic", tokens, side, jnp.dtype(dtype))
    assert _choose("auto", 128, 64, jnp.dtype(jnp.bfloat16)) == "loop"


def test_versions_of_jax_that_the_hopper_kernels_were_not_written_for_go_without(monkeypatch):
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 9))
    mesh = AbstractMesh((2,), ("data",), abstract_device=AbstractDevice("NVIDIA H100", 132, "gpu"))
    with use_abstract_mesh(mesh):
        assert _choose("auto", 128, 64, jnp.dtype(jnp.bfloat16)) == "gather"
        with pytest.raises(InputError, match=r"in bfloat16, on a Hopper GPU, by JAX 0\.12 or later: use 'auto'"):
            _choose("mosaic", 128, 64, jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("backend", ["loop", "gather"])
def test_bfloat16_keeps_its_dtype_and_sums_wide(backend):
    args = problem(0, 1, 8, 4, 2, 16, 2, jnp.bfloat16)  # 16 output blocks add up in every input's gradient
    ours = by_blocks(*args, backend)
    assert {a.dtype for a in ours} == {jnp.dtype(jnp.bfloat16)}
    assert_close(ours, dense_under_mask(*args), 1e-2)


@pytest.mark.parametrize("backend", ["loop", "gather", pytest.param("pallas", marks=pytest.mark.slow)])
@pytest.mark.parametrize("outputs", [4, 3])  # 3 do not divide over the tensor axis
def test_split_over_a_mesh_it_is_the_same(backend, outputs):
    args = problem(1, 4, 128 if backend == "pallas" else 4, 128 if backend == "pallas" else 4, 2, outputs, 1)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        batch = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        x_BTP, data_JKbb, dy_BTQ, live_IJ = args
        sharded = (jax.device_put(x_BTP, batch), data_JKbb, jax.device_put(dy_BTQ, batch), live_IJ)
        compiled = jax.jit(by_blocks, static_argnums=4).lower(*sharded, backend).compile()
        assert_close(compiled(*sharded), dense_under_mask(*args))
    # The weight gradient is summed over the devices once, not once a block.
    loops = [body for body in compiled.as_text().split("\n\n") if "region" in body.split("(")[0]]
    assert not any("all-reduce(" in body for body in loops)


def test_another_topology_compiles_nothing():
    traced = []

    @jax.jit
    def step(*args):
        traced.append(1)
        return by_blocks(*args)

    for seed in range(3):
        args = problem(seed, 1, 4, 4, 4, 4, 2)
        assert_close(step(*args), dense_under_mask(*args))
    assert len(traced) == 1


def test_nothing_of_the_dense_matrix_is_stored():
    args = problem(0, 1, 6, 4, 7, 11, 2)
    text = jax.jit(by_blocks).lower(*args).as_text() + jax.jit(by_blocks).lower(*args).compile().as_text()
    sizes = {np.prod([int(n) for n in re.split("[x,]", shape)]) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert 11 * 2 * 4 * 4 in sizes  # the live blocks
    assert 7 * 4 * 11 * 4 not in sizes


def test_the_layer_is_flax_dense_until_a_topology_says_otherwise():
    layer, dense, x_BTP = Linear(12, dtype=jnp.float32), nn.Dense(12, dtype=jnp.float32), normal(0, 2, 3, 8)
    variables, theirs = (jax.eval_shape(a.init, jax.random.key(0), x_BTP) for a in (layer, dense))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, theirs)
    variables = jax.tree.map(lambda leaf: normal(len(leaf.shape), *leaf.shape), variables)
    apply = jax.jit(layer.apply)
    assert (apply(variables, x_BTP) == jax.jit(dense.apply)(variables, x_BTP)).all()

    live_IJ = np.ones((2, 3), bool)
    params = {"kernel": normal(1, 3, 2, 4, 4), "bias": normal(2, 12)}
    whole = {"kernel": expand(params["kernel"][None], live_IJ[None])[0], "bias": params["bias"]}
    y_BTQ = apply({"params": params, "topology": {"kernel": live_IJ}}, x_BTP)
    assert_close([y_BTQ], [np.asarray(apply({"params": whole}, x_BTP), np.float64)])


def test_live_inputs_rise_in_every_column():
    live_IJ = problem(3, 1, 1, 1, 9, 7, 4)[3]
    idx_JK = live_inputs(live_IJ, 4)
    assert [row.tolist() for row in idx_JK] == [np.flatnonzero(column).tolist() for column in np.asarray(live_IJ).T]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "cuda"}, r"backend 'cuda' is unknown: use one of auto, loop, gather, mosaic, pallas"),
        (
            {"backend": "mosaic"},
            r"backend 'mosaic' cannot compute blocks of 4 on 6 tokens a device in float32, which must be",
        ),
        ({"backend": "pallas"}, r"backend 'pallas' cannot compute blocks of 4 on 6 tokens a device"),
        ({"x_BTP": jnp.ones((1, 6, 10))}, r"do not fit inputs of width 10: they must be \[J, K, b, b\]"),
        ({"idx_JK": jnp.zeros((3, 1), int)}, r"data \(3, 2, 4, 4\) and idx \(3, 1\) do not fit"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    args = {
        "x_BTP": jnp.ones((1, 6, 8)),
        "data_JKbb": jnp.ones((3, 2, 4, 4)),
        "idx_JK": jnp.zeros((3, 2), int),
    } | change
    with pytest.raises(InputError, match=message):
        block_linear(**args)
