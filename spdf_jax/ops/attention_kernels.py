"""Attention by kernels of accelerators: cuDNN's on a GPU, splash attention on a TPU.

Shape legend: B batch, T positions, H heads, D head size.

Source: splash attention is ``jax.experimental.pallas.ops.tpu.splash_attention`` in ``jax-ml/jax``.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from spdf_jax.ops.attention_backends import _LANES, _SPLASH_BLOCKS, SPLASH_OUTPUT
from spdf_jax.ops.attention_groups import for_each_device
from spdf_jax.ops.attention_patterns import pattern_mask
from spdf_jax.sharding import split_over_mesh, target_platform


def cudnn_attention(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    pattern: str,
    width: int,
) -> jax.Array:
    """``causal`` or ``local`` attention by cuDNN.

    Args:
      q_BTHD: queries.
      k_BTHD: keys, same shape and dtype, or fewer heads.
      v_BTHD: values, as the keys.
      segments_BT: document ids; positions attend within equal ids only. For ``causal``.
      pattern: ``causal`` or ``local``.
      width: positions that ``local`` sees, its own included.

    Returns:
      out_BTHD.
    """
    window = (width - 1, 0) if pattern == "local" else None
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, local_window_size=window, implementation="cudnn"
    )

    def within(
        q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, segments_BT: jax.Array | None = None
    ) -> jax.Array:
        mask = None if segments_BT is None else (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
        return attend(q_BTHD, k_BTHD, v_BTHD, mask=mask)

    # By itself, the compiler would not split the mask, which all heads share, as it does the queries; and where weights are
    # split, too, not even the batch: every device would compute all of it.
    k_BTHD, v_BTHD = for_each_device(k_BTHD, v_BTHD, q_BTHD.shape[2])
    batch_axes, head_axis = split_over_mesh(jax.sharding.get_abstract_mesh(), *k_BTHD.shape[::2])
    spec = PartitionSpec(batch_axes or None, None, head_axis)
    args = [q_BTHD, k_BTHD, v_BTHD] + ([] if segments_BT is None else [segments_BT])
    return _split(within, spec, segments=segments_BT is not None)(*args)


def splash_attention(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    segments_BT: jax.Array | None = None,
    *,
    pattern: str,
    width: int,
) -> jax.Array:
    """Attention by the TPU's splash kernels, split over the mesh that ``jax.set_mesh`` set; interpreted elsewhere.

    ``strided``, ``local_strided`` and ``fixed`` take a [T, T] bool array on the host while they are traced.

    Args:
      q_BTHD: queries; T is a multiple of 128.
      k_BTHD: keys, same shape and dtype, or fewer heads.
      v_BTHD: values, as the keys.
      segments_BT: document ids; positions attend within equal ids only.
      pattern: one of `spdf_jax.ops.attention_patterns.PATTERNS`.
      width: the pattern's width in positions.

    Returns:
      out_BTHD.

    >>> x_BTHD = jax.numpy.ones((1, 128, 1, 64))
    >>> splash_attention(x_BTHD, x_BTHD, x_BTHD, pattern="local", width=2).shape
    (1, 128, 1, 64)
    """
    _, length, heads, head_size = q_BTHD.shape
    mesh = jax.sharding.get_abstract_mesh()
    k_BTHD, v_BTHD = for_each_device(k_BTHD, v_BTHD, heads)
    batch_axes, head_axis = split_over_mesh(mesh, *k_BTHD.shape[::2])
    heads_here = heads // (mesh.shape[head_axis] if head_axis else 1)
    kernel = _splash_kernel(pattern, length, width, heads_here, target_platform() != "tpu")
    args = [x_BTHD.swapaxes(1, 2) for x_BTHD in (q_BTHD * head_size**-0.5, k_BTHD, v_BTHD)]
    args += [] if segments_BT is None else [segments_BT]
    # By itself, the compiler cannot split a Pallas kernel.
    spec = PartitionSpec(batch_axes or None, head_axis)
    return _split(jax.vmap(kernel), spec, segments=segments_BT is not None)(*args).swapaxes(1, 2)


def _split(attend: Callable[..., jax.Array], spec: PartitionSpec, *, segments: bool) -> Callable[..., jax.Array]:
    """A function of q, k, v and maybe segments, each device's share of the mesh computed by itself; q, k, v lie by `spec`."""
    if not any(spec):
        return attend
    specs = (spec,) * 3 + (PartitionSpec(spec[0]),) * segments
    mesh = jax.sharding.get_abstract_mesh()
    return jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)


def _splash_kernel(pattern: str, length: int, width: int, heads: int, interpret: bool) -> Callable[..., jax.Array]:
    """Function of (q, k, v)_HTD and maybe segments_T."""
    # Imported where it is used: it takes a second, and most runs have no TPU.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = {
        "causal": lambda: masks.CausalMask(shape),
        "local": lambda: masks.LocalMask(shape, (width - 1, 0), 0),
    }.get(pattern, lambda: masks.NumpyMask(pattern_mask(pattern, length, width)))()
    # Blocks no larger than the window, so that those outside are skipped.
    largest = _SPLASH_BLOCKS[0] if pattern == "causal" else max(width, _LANES)
    block = next(block for block in _SPLASH_BLOCKS if length % block == 0 and block <= largest)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        residual_checkpoint_name=SPLASH_OUTPUT,
        interpret=interpret,
    )

    def attend(q_HTD: jax.Array, k_HTD: jax.Array, v_HTD: jax.Array, segments_T: jax.Array | None = None) -> jax.Array:
        return kernel(q_HTD, k_HTD, v_HTD, None if segments_T is None else splash.SegmentIds(segments_T, segments_T))

    return attend
