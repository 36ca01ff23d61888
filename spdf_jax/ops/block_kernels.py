"""Kernels of `spdf_jax.ops.block_linear` for the TPU, by Pallas. Elsewhere they are interpreted, for tests.

Every kernel holds whole rows of x, or of its gradient, in fast memory and picks the blocks that an output block reads there, by
indices in scalar memory: x is fetched once, not once for every block that reads it, and only live weights are fetched at all.

Shape legend as in `spdf_jax.ops.block_linear`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.sharding import target_platform

#: Blocks and token counts must be multiples of a vector register's width.
LANES = 128
# Bytes of fast memory that a tile of rows, or of weight gradients, may take. Up to three, twice each, share 16 MiB.
_TILE_BYTES = 2 * 2**20


def pallas_product(x_NP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array) -> jax.Array:
    """y_NQ, ``y_j = sum_k x[idx[j, k]] @ data[j, k]``, summed in float32.

    Args:
      x_NP: floats; N is a multiple of 128.
      data_JKbb: blocks of a multiple of 128, same dtype.
      idx_JK: int32, the input block that each one reads.

    >>> x_NP = jnp.ones((128, 256))
    >>> float(pallas_product(x_NP, jnp.ones((1, 2, 128, 128)), jnp.array([[0, 1]]))[0, 0])
    256.0
    """
    from jax.experimental import pallas as pl

    J, K, b, _ = data_JKbb.shape
    N, P = x_NP.shape
    rows = _rows(N, P, x_NP.dtype)

    def kernel(idx_ref: Any, x_ref: Any, data_ref: Any, y_ref: Any) -> None:
        j = pl.program_id(1)

        def add(k: jax.Array, y_Nb: jax.Array) -> jax.Array:
            x_Nb = x_ref[:, pl.ds(pl.multiple_of(idx_ref[j * K + k] * b, b), b)]
            return y_Nb + jnp.dot(x_Nb, data_ref[0, k], preferred_element_type=jnp.float32)

        y_ref[...] = jax.lax.fori_loop(0, K, add, jnp.zeros(y_ref.shape, jnp.float32)).astype(y_ref.dtype)

    return _call(
        "block_product",
        kernel,
        idx_JK,
        (x_NP, data_JKbb),
        grid=(N // rows, J),
        in_specs=[
            pl.BlockSpec((rows, P), lambda n, j, idx: (n, 0)),
            pl.BlockSpec((1, K, b, b), lambda n, j, idx: (j, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, b), lambda n, j, idx: (n, j)),
        out_shape=jax.ShapeDtypeStruct((N, J * b), x_NP.dtype),
        flops=2 * N * data_JKbb.size,
    )


def pallas_input_gradient(dy_NQ: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array, inputs: int) -> jax.Array:
    """dx_NP in float32, where ``dx_i`` is the sum of ``dy_j @ data[j, k]^T`` over the blocks with ``idx[j, k] = i``.

    Args:
      dy_NQ: gradient of the output; N is a multiple of 128.
      data_JKbb: blocks of a multiple of 128, same dtype.
      idx_JK: int32, the input block that each one reads.
      inputs: P.

    >>> dy_NQ = jnp.ones((128, 128))
    >>> pallas_input_gradient(dy_NQ, jnp.ones((1, 1, 128, 128)), jnp.array([[1]]), 256)[0, [0, 128]].tolist()
    [0.0, 128.0]
    """
    from jax.experimental import pallas as pl

    J, K, b, _ = data_JKbb.shape
    N = dy_NQ.shape[0]
    rows = _rows(N, inputs, jnp.dtype(jnp.float32))

    def kernel(idx_ref: Any, dy_ref: Any, data_ref: Any, dx_ref: Any) -> None:
        j = pl.program_id(1)

        @pl.when(j == 0)
        def _() -> None:
            dx_ref[...] = jnp.zeros(dx_ref.shape, jnp.float32)

        def add(k: jax.Array, _: None) -> None:
            dx_Nb = jax.lax.dot_general(
                dy_ref[...], data_ref[0, k], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            dx_ref[:, pl.ds(pl.multiple_of(idx_ref[j * K + k] * b, b), b)] += dx_Nb

        jax.lax.fori_loop(0, K, add, None)

    return _call(
        "block_input_gradient",
        kernel,
        idx_JK,
        (dy_NQ, data_JKbb),
        grid=(N // rows, J),
        in_specs=[
            pl.BlockSpec((rows, b), lambda n, j, idx: (n, j)),
            pl.BlockSpec((1, K, b, b), lambda n, j, idx: (j, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((rows, inputs), lambda n, j, idx: (n, 0)),
        out_shape=jax.ShapeDtypeStruct((N, inputs), jnp.float32),
        flops=2 * N * data_JKbb.size,
    )


def pallas_weight_gradient(x_NP: jax.Array, dy_NQ: jax.Array, idx_JK: jax.Array, side: int) -> jax.Array:
    """ddata_JKbb in float32, ``ddata[j, k] = x[idx[j, k]]^T @ dy_j``.

    Args:
      x_NP: floats; N is a multiple of 128.
      dy_NQ: gradient of the output, same dtype.
      idx_JK: int32, the input block that each block reads.
      side: b, a multiple of 128.

    >>> x_NP, dy_NQ = jnp.ones((128, 256)), jnp.ones((128, 128))
    >>> float(pallas_weight_gradient(x_NP, dy_NQ, jnp.array([[1]]), 128)[0, 0, 0, 0])
    128.0
    """
    from jax.experimental import pallas as pl

    (J, K), b = idx_JK.shape, side
    N, P = x_NP.shape
    # Output blocks at a time: every tile of x is fetched once for all of them.
    most = max(1, min(_TILE_BYTES // (K * b * b * 4), P // b))
    columns = max(c for c in range(1, J + 1) if J % c == 0 and c <= most)
    rows = _rows(N, P, x_NP.dtype)

    def kernel(idx_ref: Any, x_ref: Any, dy_ref: Any, ddata_ref: Any) -> None:
        first = pl.program_id(0) * columns * K

        @pl.when(pl.program_id(1) == 0)
        def _() -> None:
            ddata_ref[...] = jnp.zeros(ddata_ref.shape, jnp.float32)

        def add(i: jax.Array, _: None) -> None:
            x_Nb = x_ref[:, pl.ds(pl.multiple_of(idx_ref[first + i] * b, b), b)]
            dy_Nb = dy_ref[:, pl.ds(pl.multiple_of(i // K * b, b), b)]
            ddata_ref[i // K, i % K] += jax.lax.dot_general(
                x_Nb, dy_Nb, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
            )

        jax.lax.fori_loop(0, columns * K, add, None)

    return _call(
        "block_weight_gradient",
        kernel,
        idx_JK,
        (x_NP, dy_NQ),
        grid=(J // columns, N // rows),
        in_specs=[
            pl.BlockSpec((rows, P), lambda j, n, idx: (n, 0)),
            pl.BlockSpec((rows, columns * b), lambda j, n, idx: (n, j)),
        ],
        out_specs=pl.BlockSpec((columns, K, b, b), lambda j, n, idx: (j, 0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((J, K, b, b), jnp.float32),
        flops=2 * N * J * K * b * b,
    )


def _rows(tokens: int, width: int, dtype: Any) -> int:
    """Rows of a tile: as many as there is room for."""
    rows = 8 * LANES
    while rows > 16 and (tokens % rows or rows * width * dtype.itemsize > _TILE_BYTES):
        rows //= 2
    return rows


def _call(
    name: str, kernel: Any, idx_JK: jax.Array, inputs: tuple[jax.Array, ...], *, flops: int, out_shape: Any, **spec: Any
) -> Any:
    # Imported where they are used: it takes a moment, and most runs have no TPU.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    size = sum(a.size * a.dtype.itemsize for a in (*inputs, out_shape))
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(num_scalar_prefetch=1, **spec),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=size, transcendentals=0),
        interpret=target_platform() != "tpu",
        name=name,
    )(idx_JK.reshape(-1), *inputs)
