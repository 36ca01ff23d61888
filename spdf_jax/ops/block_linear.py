"""Products with a matrix of a constant number of live blocks an output block; the others are neither stored nor computed.

A [P, Q] matrix in squares of b x b, of which K are live in each of its J columns of blocks, is ``data [J, K, b, b]``, and
``idx [J, K]`` says which input block each one reads: ``y_j = sum_k x[idx[j, k]] @ data[j, k]``. Both follow the *topology*, a
bool ``live [I, J]``, which is data like any other: moving a block compiles nothing. Topologies are made and moved by
`spdf_jax.sparsity.blocks`.

=========  ========  ======================================================================================
backend    target    computes
=========  ========  ======================================================================================
``loop``   CPU       one output block after the other: what it reads is gathered while it is in the cache
``gather`` GPU       all output blocks in one batched product, of K / I times as many copies of x as there are blocks
``mosaic`` Hopper    the kernels of `spdf_jax.ops.block_kernels_gpu`: bfloat16, blocks of a multiple of 64, tokens too
``pallas`` TPU       the kernels of `spdf_jax.ops.block_kernels`: blocks of a multiple of 128, tokens too
=========  ========  ======================================================================================

Shape legend: N tokens, P inputs in I blocks, Q outputs in J blocks, K live blocks an output block, b side of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.ops.block_kernels import LANES, pallas_input_gradient, pallas_product, pallas_weight_gradient
from spdf_jax.ops.block_kernels_gpu import (
    TILE,
    mosaic_fits,
    mosaic_input_gradient,
    mosaic_product,
    mosaic_weight_gradient,
)
from spdf_jax.sharding import split_over_mesh, target_platform

BACKENDS = ("auto", "loop", "gather", "mosaic", "pallas")
#: Name of a linear layer's output, for `jax.checkpoint_policies`.
BLOCK_OUTPUT = "block_linear_output"


def block_linear(x_BTP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array, *, backend: str = "auto") -> jax.Array:
    """``x @ W`` for a block-sparse W; forward, input gradient and weight gradient touch live blocks only.

    Under a mesh (``jax.set_mesh``) tokens are split over its batch axes and output blocks over ``tensor``, where they divide.
    Reverse-mode differentiable in `x_BTP` and `data_JKbb`.

    Args:
      x_BTP: floats.
      data_JKbb: the live blocks. Rounded to the dtype of `x_BTP` here: outside, a loop over layers would store all twice.
      idx_JK: int32, the input block that each one reads.
      backend: one of ``BACKENDS``; ``auto`` chooses by where the program will run.

    Returns:
      y_BTQ, Q = J b.

    Raises:
      InputError: unknown backend, shapes that do not fit, or a backend that cannot compute them.

    >>> x_BTP = jnp.arange(4.0)[None, None]
    >>> block_linear(x_BTP, jnp.ones((3, 1, 2, 2)), jnp.array([[0], [1], [0]])).tolist()
    [[[1.0, 1.0, 5.0, 5.0, 1.0, 1.0]]]
    """
    J, K, b, _ = data_JKbb.shape
    B, T, P = x_BTP.shape
    if P % b or idx_JK.shape != (J, K) or data_JKbb.shape[3] != b:
        raise InputError(
            f"block_linear: data {data_JKbb.shape} and idx {idx_JK.shape} do not fit inputs of width {P}: they must be "
            f"[J, K, b, b] and [J, K], with b dividing {P}"
        )
    mesh = jax.sharding.get_abstract_mesh()
    batch_axes, tensor_axis = split_over_mesh(mesh, B, J)
    tokens = B * T
    for axis in batch_axes:
        tokens //= mesh.shape[axis]
    backend = _choose(backend, tokens, b, x_BTP.dtype)
    product = functools.partial(_product, backend)
    if not mesh.empty and mesh.size > 1:
        data_JKbb = data_JKbb.astype(x_BTP.dtype)  # before they are sent
        # Left to itself the compiler would sum every block's gradient over the devices by itself, and cannot split a kernel.
        x_spec, block_spec = PartitionSpec(batch_axes or None), PartitionSpec(tensor_axis)
        y_spec = PartitionSpec(batch_axes or None, None, tensor_axis)
        product = jax.shard_map(
            product, mesh=mesh, in_specs=(x_spec, block_spec, block_spec), out_specs=y_spec, check_vma=False
        )
    return checkpoint_name(product(x_BTP, data_JKbb, idx_JK), BLOCK_OUTPUT)


def live_inputs(live_IJ: jax.Array, count: int) -> jax.Array:
    """``idx_JK``, the input blocks that each output block reads, in rising order.

    Args:
      live_IJ: bool, K True in every column.
      count: K.

    >>> live_inputs(jnp.array([[True, False], [True, True], [False, True]]), 2).tolist()
    [[0, 1], [1, 2]]
    """
    rank_IJ1 = (jnp.cumsum(live_IJ, axis=0) - 1)[:, :, None]
    found_IJK = live_IJ[:, :, None] & (rank_IJ1 == jnp.arange(count)[None, None])
    return jnp.argmax(found_IJK, axis=0).astype(jnp.int32)


def _choose(backend: str, tokens: int, side: int, dtype: Any) -> str:
    if backend not in BACKENDS:
        raise InputError(f"block_linear: backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    fits: dict[str, Callable[[], bool]] = {
        "mosaic": lambda: mosaic_fits(tokens, side, dtype),
        "pallas": lambda: side % LANES == 0 and tokens % LANES == 0,
    }
    if backend in fits and not fits[backend]():
        asked = {
            "mosaic": f"multiples of {TILE}, in bfloat16, on a Hopper GPU, by JAX 0.12 or later",
            "pallas": f"multiples of {LANES}",
        }
        raise InputError(
            f"block_linear: backend {backend!r} cannot compute blocks of {side} on {tokens} tokens a device in {dtype}, which "
            f"must be {asked[backend]}: use 'auto'"
        )
    if backend != "auto":
        return backend
    platform = target_platform()
    # Without a mesh to split it by hand, a Pallas kernel runs on one device only.
    one_device = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
    kernel = {"gpu": "mosaic", "tpu": "pallas"}.get(platform, "")
    if one_device and kernel and fits[kernel]():
        return kernel
    return "loop" if platform == "cpu" else "gather"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(backend: str, x_BTP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array) -> jax.Array:
    forward = {
        "loop": _loop_forward, "gather": _gather_forward, "mosaic": mosaic_product, "pallas": pallas_product
    }[backend]  # fmt: skip
    x_NP = x_BTP.reshape(-1, x_BTP.shape[-1])
    return forward(x_NP, data_JKbb.astype(x_BTP.dtype), idx_JK).reshape(*x_BTP.shape[:-1], -1)


def _product_forward(backend: str, x_BTP: jax.Array, *blocks: jax.Array) -> tuple[jax.Array, Any]:
    return _product(backend, x_BTP, *blocks), (x_BTP, *blocks)


def _product_backward(backend: str, saved: Any, dy_BTQ: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_BTP, parameters, idx_JK = saved
    data_JKbb = parameters.astype(x_BTP.dtype)
    x_NP, dy_NQ = x_BTP.reshape(-1, x_BTP.shape[-1]), dy_BTQ.reshape(-1, dy_BTQ.shape[-1])
    if backend == "loop":
        dx_NP, ddata_JKbb = _loop_backward(x_NP, data_JKbb, idx_JK, dy_NQ)
    elif backend == "gather":
        dx_NP, ddata_JKbb = _gather_backward(x_NP, data_JKbb, idx_JK, dy_NQ)
    elif backend == "mosaic":
        dx_NP = mosaic_input_gradient(dy_NQ, data_JKbb, idx_JK, x_NP.shape[1])
        ddata_JKbb = mosaic_weight_gradient(x_NP, dy_NQ, idx_JK, data_JKbb.shape[2])
    else:
        dx_NP = pallas_input_gradient(dy_NQ, data_JKbb, idx_JK, x_NP.shape[1])
        ddata_JKbb = pallas_weight_gradient(x_NP, dy_NQ, idx_JK, data_JKbb.shape[2])
    return dx_NP.reshape(x_BTP.shape).astype(x_BTP.dtype), ddata_JKbb.astype(parameters.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _gather_forward(x_NP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array) -> jax.Array:
    x_NJKb = x_NP.reshape(x_NP.shape[0], -1, data_JKbb.shape[2])[:, idx_JK]
    return jnp.einsum("njkb,jkbc->njc", x_NJKb, data_JKbb).reshape(x_NP.shape[0], -1)


def _gather_backward(
    x_NP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array, dy_NQ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x_NP and data_JKbb, in float32 or wider."""
    (J, _, b, _), N = data_JKbb.shape, x_NP.shape[0]
    x_NIb, dy_NJb = x_NP.reshape(N, -1, b), dy_NQ.reshape(N, J, b)
    wide = jnp.promote_types(x_NP.dtype, jnp.float32)
    dx_NJKb = jnp.einsum("njc,jkbc->njkb", dy_NJb, data_JKbb, preferred_element_type=wide)
    dx_NIb = jnp.zeros(x_NIb.shape, wide).at[:, idx_JK].add(dx_NJKb)
    ddata_JKbb = jnp.einsum("njkb,njc->jkbc", x_NIb[:, idx_JK], dy_NJb, preferred_element_type=wide)
    return dx_NIb.reshape(x_NP.shape), ddata_JKbb


def _loop_forward(x_NP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array) -> jax.Array:
    _, K, b, _ = data_JKbb.shape

    def column(block: tuple[jax.Array, jax.Array]) -> jax.Array:
        data_Kbb, idx_K = block
        # Cut one by one and joined: a gather of the same blocks takes a CPU as long as half the product.
        return jnp.concatenate([_take(x_NP, i, b) for i in idx_K], 1) @ data_Kbb.reshape(K * b, b)

    # Joined by itself: fused with what stores it for the backward pass, it takes three times as long.
    return lax.optimization_barrier(_joined(lax.map(column, (data_JKbb, idx_JK))))


def _loop_backward(
    x_NP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array, dy_NQ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x_NP, summed in float32 or wider, and of data_JKbb."""
    J, K, b, _ = data_JKbb.shape
    N, P = x_NP.shape
    x_IbN = copied_transpose(x_NP).reshape(
        -1, b, N
    )  # a sum over tokens is twice as fast from features that lie in a row
    # Transposed by themselves, as products multiply half precision natively.
    turned_JbR = lax.optimization_barrier(data_JKbb.transpose(0, 3, 1, 2).reshape(J, b, K * b))
    wide = jnp.promote_types(x_NP.dtype, jnp.float32)

    def column(dx_INb: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        j, turned_bR, idx_K = block
        dy_Nb = lax.optimization_barrier(_take(dy_NQ, j, b))
        ddata_Rb = x_IbN[idx_K].reshape(K * b, N) @ dy_Nb
        for k, i in enumerate(idx_K):
            sum_1Nb = lax.dynamic_index_in_dim(dx_INb, i, 0) + (dy_Nb @ turned_bR[:, k * b : (k + 1) * b])[None]
            dx_INb = lax.dynamic_update_index_in_dim(dx_INb, sum_1Nb, i, 0)
        return dx_INb, ddata_Rb.reshape(K, b, b)

    dx_INb = jnp.zeros((P // b, N, b), wide)
    dx_INb, ddata_JKbb = lax.scan(column, dx_INb, (jnp.arange(J), turned_JbR, idx_JK))
    return _joined(dx_INb.astype(x_NP.dtype)), ddata_JKbb


def copied_transpose(x_NP: jax.Array) -> jax.Array:
    """x_PN, by itself: fused with what makes or uses it, a CPU takes ten times as long over the transposition."""
    rows = Layout((0, 1))
    return with_layout_constraint(lax.optimization_barrier(with_layout_constraint(x_NP, rows)).T, rows)


def _joined(x_INb: jax.Array) -> jax.Array:
    """x_NP of its blocks of features."""
    return x_INb.swapaxes(0, 1).reshape(x_INb.shape[1], -1)


def _take(x_NP: jax.Array, i: jax.Array, b: int) -> jax.Array:
    """Block i of the last axis."""
    return lax.dynamic_slice_in_dim(x_NP, i * b, b, 1)
