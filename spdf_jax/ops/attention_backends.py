"""Which of the kernels of accelerators, if any, computes an attention pattern.

=============  =========  ==================================================================================
backend        target     computes
=============  =========  ==================================================================================
``xla``        any        every pattern, by the tiles of `spdf_jax.ops.attention`
``cudnn``      GPU        ``causal`` and ``local`` in half precision, head sizes up to 128 in steps of 8; of packed documents
                          ``causal`` in even lengths, which takes a [B, T, T] array
``splash``     TPU        every pattern in float32 and bfloat16, lengths that are multiples of 128
=============  =========  ==================================================================================

Shape legend: B batch, T positions, H heads, D head size.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError
from spdf_jax.sharding import target_platform

BACKENDS = ("auto", "xla", "cudnn", "splash")
#: Name of what splash attention's backward pass needs of the forward one, for `jax.checkpoint_policies`.
SPLASH_OUTPUT = "splash_output"
# Splash attention's smallest block; its larger ones, best first.
_LANES = 128
_SPLASH_BLOCKS = (512, 256, _LANES)


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
