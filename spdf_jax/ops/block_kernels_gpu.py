"""Kernels of `spdf_jax.ops.block_linear` for Hopper GPUs, by Pallas Mosaic GPU. On a CPU they are interpreted, for tests.

All three products are sums of products of tiles, and one kernel computes them: a thread block has one tile of the result,
which it sums in registers in float32, while the tiles of the next steps are on their way to shared memory. Nothing is
gathered beforehand and nothing is added up in memory, so that the same inputs give the same bits.

Shape legend as in `spdf_jax.ops.block_linear`.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spdf_jax.sharding import target_platform

#: Sides of blocks and token counts must be multiples of the smallest tile.
TILE = 64
# Tiles on their way, so that two thread blocks share the memory of a multiprocessor: 3 x 2 x 128 x 64 x 2 bytes each.
_STAGES = 3


def mosaic_fits(tokens: int, side: int, dtype: Any) -> bool:
    """Whether these kernels can compute it where code traced now will run: on a Hopper GPU, or on a CPU, interpreted.

    Args:
      tokens: on one device.
      side: of a block.
      dtype: of inputs and blocks.

    >>> mosaic_fits(1024, 64, jnp.bfloat16), mosaic_fits(1024, 32, jnp.bfloat16), mosaic_fits(1024, 64, jnp.float32)
    (True, False, False)
    """
    # Mosaic GPU changes from one version of JAX to the next: before this one, it has been neither compiled nor interpreted.
    sizes = tokens % TILE == 0 and side % TILE == 0 and dtype == jnp.bfloat16 and jax.__version_info__ >= (0, 12)
    return sizes and (target_platform() == "cpu" or _on_hopper())


def mosaic_product(x_NP: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array) -> jax.Array:
    """y_NQ, ``y_j = sum_k x[idx[j, k]] @ data[j, k]``, summed in float32.

    Args:
      x_NP: bfloat16; N is a multiple of 64.
      data_JKbb: blocks of a multiple of 64, bfloat16.
      idx_JK: int32, the input block that each one reads.

    >>> x_NP = jnp.ones((64, 128), jnp.bfloat16)
    >>> float(mosaic_product(x_NP, jnp.ones((1, 2, 64, 64), jnp.bfloat16), jnp.array([[0, 1]]))[0, 0])
    128.0
    """
    J, K = idx_JK.shape
    order = jnp.arange(J * K, dtype=jnp.int32)
    starts = jnp.arange(J + 1, dtype=jnp.int32) * K
    return _sum_by_lists("block_product", x_NP, data_JKbb, (starts, idx_JK.reshape(-1), order), transposed=False)


def mosaic_input_gradient(dy_NQ: jax.Array, data_JKbb: jax.Array, idx_JK: jax.Array, inputs: int) -> jax.Array:
    """dx_NP, where ``dx_i`` is the sum of ``dy_j @ data[j, k]^T`` over the blocks with ``idx[j, k] = i``, in float32.

    Args:
      dy_NQ: gradient of the output, bfloat16; N is a multiple of 64.
      data_JKbb: blocks of a multiple of 64, bfloat16.
      idx_JK: int32, the input block that each one reads.
      inputs: P.

    Returns:
      The sums, rounded to bfloat16.

    >>> dy_NQ = jnp.ones((64, 64), jnp.bfloat16)
    >>> data_JKbb = jnp.ones((1, 1, 64, 64), jnp.bfloat16)
    >>> mosaic_input_gradient(dy_NQ, data_JKbb, jnp.array([[1]]), 128)[0, jnp.array([0, 64])].tolist()
    [0.0, 64.0]
    """
    K, blocks = idx_JK.shape[1], inputs // data_JKbb.shape[2]
    read = idx_JK.reshape(-1)
    # Every input block's readers, one list after the other.
    order = jnp.argsort(read).astype(jnp.int32)
    starts = jnp.sum(read[:, None] < jnp.arange(blocks + 1)[None], axis=0, dtype=jnp.int32)
    return _sum_by_lists("block_input_gradient", dy_NQ, data_JKbb, (starts, order // K, order), transposed=True)


def mosaic_weight_gradient(x_NP: jax.Array, dy_NQ: jax.Array, idx_JK: jax.Array, side: int) -> jax.Array:
    """ddata_JKbb, ``ddata[j, k] = x[idx[j, k]]^T @ dy_j``, summed in float32 and rounded to bfloat16.

    Args:
      x_NP: bfloat16; N is a multiple of 64.
      dy_NQ: gradient of the output, bfloat16.
      idx_JK: int32, the input block that each block reads.
      side: b, a multiple of 64.

    >>> x_NP, dy_NQ = jnp.ones((64, 128), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16)
    >>> float(mosaic_weight_gradient(x_NP, dy_NQ, jnp.array([[1]]), 64)[0, 0, 0, 0])
    64.0
    """
    (J, K), b, N = idx_JK.shape, side, x_NP.shape[0]
    tile = _largest_tile(b)

    def steps(at: _Place, idx_ref: Any) -> tuple[Any, int]:
        return 0, N // TILE

    def read(at: _Place, step: jax.Array, idx_ref: Any) -> tuple[Any, Any]:
        row, column, block = at
        tokens = _cut(step, TILE)
        return (
            (tokens, _cut(row, tile, idx_ref[block] * b)),
            (tokens, _cut(column, tile, lax.div(block, jnp.int32(K)) * b)),
        )

    def write(at: _Place) -> Any:
        return at[2], _cut(at[0], tile), _cut(at[1], tile)

    # The last of a grid counts to 2^31, the others to 65,535.
    plan = _Plan((b // tile, b // tile, J * K), (tile, tile), (True, False), steps, read, write)
    found = _call("block_weight_gradient", plan, (x_NP, dy_NQ), (idx_JK.reshape(-1),), (J * K, b, b))
    return found.reshape(J, K, b, b)


def _on_hopper() -> bool:
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Compute capability 9.0 by its names (H100, H200, H20, GH200 ...): a mesh says no more of devices that are not there.
    kind = device.device_kind if device else jax.devices()[0].device_kind
    return target_platform() == "gpu" and re.match(r"NVIDIA G?H\d", kind) is not None


_Place = tuple[jax.Array, ...]


class _Plan(NamedTuple):
    """What a thread block does.

    Attributes:
      grid: of thread blocks, a tile of the result each.
      tile: its rows and columns.
      transposed: whether the left and the right tile of a step are transposed as they lie.
      steps: of a place in the grid, the first step and how many there are.
      read: of a place and a step, what to cut from the left and the right operand.
      write: of a place, what to cut from the result.
    """

    grid: tuple[int, ...]
    tile: tuple[int, int]
    transposed: tuple[bool, bool]
    steps: Callable[..., tuple[Any, Any]]
    read: Callable[..., tuple[Any, Any]]
    write: Callable[[_Place], Any]


def _sum_by_lists(
    name: str, x_NP: jax.Array, data_JKbb: jax.Array, lists: tuple[jax.Array, ...], *, transposed: bool
) -> jax.Array:
    """Column of blocks c of the result is the sum of ``x[left[s]] @ data[right[s]]``, starts[c] <= s < starts[c + 1].

    `lists` are starts, left and right; right counts the blocks of data in their order. Of `transposed`, data is data^T.
    """
    N, b = x_NP.shape[0], data_JKbb.shape[2]
    rows, columns = _largest_tile(N), _largest_tile(b)
    cuts, parts = b // columns, b // TILE  # of a block, along the result and along the sum
    width = (lists[0].size - 1) * b

    def steps(at: _Place, starts_ref: Any, left_ref: Any, right_ref: Any) -> tuple[Any, Any]:
        column = lax.div(at[1], jnp.int32(cuts))
        first = starts_ref[column]
        return first * parts, (starts_ref[column + 1] - first) * parts

    def read(at: _Place, step: jax.Array, starts_ref: Any, left_ref: Any, right_ref: Any) -> tuple[Any, Any]:
        s, part = lax.div(step, jnp.int32(parts)), lax.rem(step, jnp.int32(parts))
        summed, column = _cut(part, TILE), _cut(lax.rem(at[1], jnp.int32(cuts)), columns)
        return (
            (_cut(at[0], rows), _cut(part, TILE, left_ref[s] * b)),
            (right_ref[s], *((column, summed) if transposed else (summed, column))),
        )

    def write(at: _Place) -> Any:
        return _cut(at[0], rows), _cut(at[1], columns)

    # Columns side by side run at the same time: what stays in the cache is data, and x is read once.
    plan = _Plan((N // rows, width // columns), (rows, columns), (False, transposed), steps, read, write)
    return _call(name, plan, (x_NP, data_JKbb.reshape(-1, b, b)), lists, (N, width))


def _largest_tile(size: int) -> int:
    return 2 * TILE if size % (2 * TILE) == 0 else TILE


def _cut(index: jax.Array, size: int, start: Any = 0) -> Any:
    from jax.experimental import pallas as pl

    return pl.ds(start + index * size, size)


def _call(
    name: str, plan: _Plan, operands: tuple[jax.Array, jax.Array], lists: tuple[jax.Array, ...], shape: tuple[int, ...]
) -> jax.Array:
    # Imported where they are used: it takes a moment, and most runs have no Hopper.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # to mypy, its transforms are abstract
    dtype, (rows, columns), axes = operands[0].dtype, plan.tile, ("x", "y", "z")[: len(plan.grid)]

    def shared(*sizes: int) -> Any:
        # As TMA lays 64 columns of 16 bits out so that the tensor cores read them without conflicts, transposed too.
        transforms = (plgpu.TilingTransform((8, TILE)), plgpu.SwizzleTransform(128))
        return plgpu.SMEM(sizes, dtype, transforms=transforms)

    def stages(size: int, transposed: bool, *, summed_first: bool) -> Any:
        return shared(_STAGES, *((TILE, size) if summed_first != transposed else (size, TILE)))

    def kernel(left_ref: Any, right_ref: Any, *refs: Any) -> None:
        *list_refs, out_ref, arrived = refs
        at = tuple(lax.axis_index(axis) for axis in axes)
        first, count = plan.steps(at, *list_refs)

        def multiply(left_tiles: Any, right_tiles: Any) -> jax.Array:
            def fetch(step: Any) -> None:
                stage = lax.rem(step, jnp.int32(_STAGES))
                left, right = plan.read(at, first + step, *list_refs)
                plgpu.copy_gmem_to_smem(left_ref.at[left], left_tiles.at[stage], arrived.at[stage])
                plgpu.copy_gmem_to_smem(right_ref.at[right], right_tiles.at[stage], arrived.at[stage])

            def accumulate(sum_ref: Any) -> jax.Array:
                def add(step: jax.Array, _: None) -> None:
                    stage = lax.rem(step, jnp.int32(_STAGES))
                    plgpu.barrier_wait(arrived.at[stage])
                    tiles = (left_tiles.at[stage], right_tiles.at[stage])
                    plgpu.wgmma(
                        sum_ref, *(t.transpose((1, 0)) if f else t for t, f in zip(tiles, plan.transposed, strict=True))
                    )
                    plgpu.wgmma_wait(1)  # the step before is done with its tiles, whose place is free
                    following = step + _STAGES - 1
                    pl.when(following < count)(functools.partial(fetch, following))

                lax.fori_loop(jnp.int32(0), jnp.int32(count), add, None)
                plgpu.wgmma_wait(0)
                return sum_ref[...]

            for step in range(_STAGES - 1):
                pl.when(step < count)(functools.partial(fetch, jnp.int32(step)))
            return pl.run_scoped(accumulate, plgpu.ACC(plan.tile, jnp.float32))

        # Where the operands' tiles were, the result's are on their way out.
        total = pl.run_scoped(
            multiply,
            stages(rows, plan.transposed[0], summed_first=False),
            stages(columns, plan.transposed[1], summed_first=True),
        )

        def store(tile: Any) -> None:
            tile[...] = total.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, out_ref.at[plan.write(at)])
            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(store, shared(rows, columns))

    kernel.__name__ = name
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        scratch_types=[plgpu.Barrier(num_arrivals=2, num_barriers=_STAGES)],
        grid=plan.grid,
        grid_names=axes,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=None if target_platform() == "gpu" else plgpu.InterpretGPUParams(detect_races=True),
    )(*operands, *lists)
