"""Attention kernels of accelerators, and which of them, if any, computes a pattern.

=============  =========  ==================================================================================
backend        target     computes
=============  =========  ==================================================================================
``xla``        any        every pattern, by the tiles of `spdf_jax.ops.attention`
``cudnn``      GPU        ``causal`` and ``local`` in half precision, head sizes up to 128 in steps of 8; of packed documents
                          ``causal`` in even lengths, which takes a [B, T, T] array
``splash``     TPU        every pattern in float32 and bfloat16, lengths that are multiples of 128
=============  =========  ==================================================================================

Shape legend: B batch, T positions, H heads, D head size.

Source: splash attention is ``jax.experimental.pallas.ops.tpu.splash_attention`` in ``jax-ml/jax``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from spdf_jax.errors import InputError
from spdf_jax.ops.attention_patterns import pattern_mask

BACKENDS = ("auto", "xla", "cudnn", "splash")
#: Name of what splash attention's backward pass needs of the forward one, for `jax.checkpoint_policies`.
SPLASH_OUTPUT = "splash_output"
# Splash attention's smallest block; its larger ones, best first.
_LANES = 128
_SPLASH_BLOCKS = (512, 256, _LANES)
# Mesh axes of `spdf_jax.sharding`.
_BATCH_AXES, _HEAD_AXIS = ("data", "fsdp"), "tensor"


def target_platform() -> str:
    """Where code traced now will run: the platform of the mesh set by ``jax.set_mesh``, else JAX's default backend.

    The two differ when a program for a TPU is compiled on a machine that has none.

    Returns:
      ``cpu``, ``gpu`` or ``tpu``.

    >>> with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])):
    ...     target_platform()
    'cpu'
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def attention_backend(
    pattern: str, dtype: Any, head_size: int, platform: str, *, length: int = _LANES, segments: bool = False
) -> str:
    """The backend that ``backend="auto"`` chooses.

    Args:
      pattern: one of `spdf_jax.ops.attention_patterns.PATTERNS`.
      dtype: of queries, keys and values.
      head_size: D.
      platform: ``cpu``, ``gpu`` or ``tpu``, see `target_platform`.
      length: number of positions T.
      segments: whether documents are kept apart.

    Returns:
      ``xla``, ``cudnn`` or ``splash``.

    >>> attention_backend("local", "bfloat16", 64, "gpu"), attention_backend("causal", "bfloat16", 64, "tpu", length=100)
    ('cudnn', 'xla')
    """
    name = jnp.dtype(dtype).name
    half = name in ("bfloat16", "float16")
    by_cudnn = pattern == "causal" and length % 2 == 0 if segments else pattern in ("causal", "local")
    if platform == "gpu" and half and head_size in range(8, 129, 8) and by_cudnn:
        return "cudnn"
    if platform == "tpu" and name in ("bfloat16", "float32") and length % _LANES == 0:
        return "splash"
    return "xla"


def choose_backend(backend: str, pattern: str, q_BTHD: jax.Array, segments: bool) -> str:
    """The backend of one call: `attention_backend` for ``auto``, else what was asked for, where it can.

    Args:
      backend: one of ``BACKENDS``.
      pattern: one of `spdf_jax.ops.attention_patterns.PATTERNS`.
      q_BTHD: queries.
      segments: whether documents are kept apart.

    Returns:
      ``xla``, ``cudnn`` or ``splash``.

    Raises:
      InputError: unknown backend, or one that cannot compute this.

    >>> choose_backend("splash", "fixed", jnp.zeros((1, 100, 1, 64)), False)
    Traceback (most recent call last):
    ...
    spdf_jax.errors.InputError: attention backend is 'splash', which cannot compute fixed with length 100, float32, \
head size 64: use 'auto'
    """
    if backend not in BACKENDS:
        raise InputError(f"attention backend {backend!r} is unknown: use one of {', '.join(BACKENDS)}")
    _, length, _, head_size = q_BTHD.shape
    platform = target_platform()
    choice = functools.partial(attention_backend, pattern, q_BTHD.dtype, head_size, length=length, segments=segments)
    if backend == "auto":
        best = choice(platform)
        # Without a mesh to split it by hand, a Pallas kernel runs on one device only.
        one_device = not jax.sharding.get_abstract_mesh().empty or jax.device_count() == 1
        return best if best != "splash" or one_device else "xla"
    if backend == "cudnn" and platform != "gpu":
        raise InputError(f"attention backend is 'cudnn', which needs a GPU, and this runs on {platform}: use 'auto'")
    if backend != choice({"xla": "cpu", "cudnn": "gpu", "splash": "tpu"}[backend]):
        raise InputError(
            f"attention backend is {backend!r}, which cannot compute {pattern} with length {length}, {q_BTHD.dtype}, "
            f"head size {head_size}{', segments' if segments else ''}: use 'auto'"
        )
    return backend


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
      k_BTHD: keys, same shape and dtype.
      v_BTHD: values, same shape and dtype.
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
    if segments_BT is None:
        return attend(q_BTHD, k_BTHD, v_BTHD)

    def within(q_BTHD: jax.Array, k_BTHD: jax.Array, v_BTHD: jax.Array, segments_BT: jax.Array) -> jax.Array:
        return attend(q_BTHD, k_BTHD, v_BTHD, mask=(segments_BT[:, :, None] == segments_BT[:, None])[:, None])

    # By itself, the compiler would not split the mask, which all heads share, as it does the queries.
    batch_axes, head_axis = split_over_mesh(jax.sharding.get_abstract_mesh(), *q_BTHD.shape[::2])
    spec = PartitionSpec(batch_axes or None, None, head_axis)
    return _split(within, spec, segments=True)(q_BTHD, k_BTHD, v_BTHD, segments_BT)


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
      k_BTHD: keys, same shape and dtype.
      v_BTHD: values, same shape and dtype.
      segments_BT: document ids; positions attend within equal ids only.
      pattern: one of `spdf_jax.ops.attention_patterns.PATTERNS`.
      width: the pattern's width in positions.

    Returns:
      out_BTHD.

    >>> x_BTHD = jnp.ones((1, 128, 1, 64))
    >>> splash_attention(x_BTHD, x_BTHD, x_BTHD, pattern="local", width=2).shape
    (1, 128, 1, 64)
    """
    _, length, heads, head_size = q_BTHD.shape
    mesh = jax.sharding.get_abstract_mesh()
    batch_axes, head_axis = split_over_mesh(mesh, *q_BTHD.shape[::2])
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


def split_over_mesh(mesh: Any, batch: int, heads: int) -> tuple[tuple[str, ...], str | None]:
    """Mesh axes that split the batch and the heads, where they divide them."""
    batch_axes: tuple[str, ...] = ()
    for axis in _BATCH_AXES:
        if batch % mesh.shape.get(axis, batch + 1) == 0:
            batch_axes, batch = (*batch_axes, axis), batch // mesh.shape[axis]
    return batch_axes, _HEAD_AXIS if heads % mesh.shape.get(_HEAD_AXIS, heads + 1) == 0 else None


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
