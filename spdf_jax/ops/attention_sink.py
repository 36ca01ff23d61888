"""Attention with a sink: one more slot in the softmax's denominator, of a logit of its own and no value.

It is one more part to merge, of output 0 and the sink as log-sum-exp, so the backward pass is that of `spdf_jax.ops.attention`
from the log-sum-exp with it. By our own tiles on every platform: accelerators' kernels keep to themselves what it needs.

Shape legend: B batch, T positions, S cached positions, H heads, D head size.

Source: ``openai/circuit_sparsity``, ``circuit_sparsity/inference/gpt.py`` (`SDPAWithSink`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from spdf_jax.ops.attention import _attention_backward, _attention_forward, _check
from spdf_jax.ops.attention_groups import for_each_head
from spdf_jax.ops.attention_patterns import check_pattern


def attention_with_sink(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    sink_H: jax.Array,
    *,
    pattern: str = "causal",
    width: int = 128,
    segments_BT: jax.Array | None = None,
) -> jax.Array:
    """`spdf_jax.ops.attention.attention` with ``exp(sink)`` added to the denominator of each head's softmax.

    Args:
      q_BTHD, k_BTHD, v_BTHD, pattern, width, segments_BT: as there.
      sink_H: logits, one a head of queries.

    Returns:
      out_BTHD in the dtype of the inputs.

    Raises:
      InputError: as there.

    >>> x_BTHD = jnp.ones((1, 1, 1, 4))
    >>> attention_with_sink(x_BTHD, x_BTHD, x_BTHD, jnp.array([2.0]))[0, 0, 0].tolist()  # a score of 2 beside a sink of 2
    [0.5, 0.5, 0.5, 0.5]
    """
    _check(q_BTHD, k_BTHD, v_BTHD, segments_BT)
    check_pattern(pattern, q_BTHD.shape[1], width)
    k_BTHD, v_BTHD = for_each_head(k_BTHD, v_BTHD, q_BTHD.shape[2])
    return _with_sink(q_BTHD, k_BTHD, v_BTHD, segments_BT, sink_H, pattern, width)


def sink_slot(
    k_BSHD: jax.Array, v_BSHD: jax.Array, sees_B1TS: jax.Array, sink_H: jax.Array, dtype: Any
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Keys, values and mask with the sink as a last slot of them, and the bias that gives it its logit, for decoding.

    >>> k, v, sees, bias = sink_slot(*[jnp.ones((1, 3, 1, 4))] * 2, jnp.ones((1, 1, 1, 3), bool), jnp.array([2.0]), "float32")
    >>> k.shape, sees.shape, bias[0, 0, 0].tolist()
    ((1, 4, 1, 4), (1, 1, 1, 4), [0.0, 0.0, 0.0, 2.0])
    """
    pad = ((0, 0), (0, 1), (0, 0), (0, 0))
    bias_1H1S = (
        jnp.zeros((1, sink_H.shape[0], 1, k_BSHD.shape[1] + 1), dtype).at[..., -1].set(sink_H.astype(dtype)[:, None])
    )
    sees = jnp.pad(sees_B1TS, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
    return jnp.pad(k_BSHD, pad), jnp.pad(v_BSHD, pad), sees, bias_1H1S


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _with_sink(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    segments_BT: jax.Array | None,
    sink_H: jax.Array,
    pattern: str,
    width: int,
) -> jax.Array:
    return _forward(q_BTHD, k_BTHD, v_BTHD, segments_BT, sink_H, pattern, width)[0]


def _forward(
    q_BTHD: jax.Array,
    k_BTHD: jax.Array,
    v_BTHD: jax.Array,
    segments_BT: jax.Array | None,
    sink_H: jax.Array,
    pattern: str,
    width: int,
) -> tuple[jax.Array, tuple]:
    _, (*inputs, out_BTHD, lse_BTH1) = _attention_forward(q_BTHD, k_BTHD, v_BTHD, segments_BT, pattern, width)
    with_sink_BTH1 = jnp.logaddexp(lse_BTH1, sink_H.astype(lse_BTH1.dtype)[None, None, :, None])
    out_BTHD = (out_BTHD * jnp.exp(lse_BTH1 - with_sink_BTH1)).astype(q_BTHD.dtype)
    return out_BTHD, (*inputs, out_BTHD, with_sink_BTH1, sink_H)


def _backward(pattern: str, width: int, saved: tuple, dout_BTHD: jax.Array) -> tuple:
    *_, out_BTHD, lse_BTH1, sink_H = saved
    dq_dk_dv = _attention_backward(pattern, width, saved[:-1], dout_BTHD)
    delta_BTH = jnp.einsum("bthd,bthd->bth", *(x.astype(lse_BTH1.dtype) for x in (out_BTHD, dout_BTHD)))
    share_BTH = jnp.exp(sink_H.astype(lse_BTH1.dtype)[None, None] - lse_BTH1[..., 0])
    # As every score's: its probability times what its value (0) is worth more than the output.
    return *dq_dk_dv, -jnp.einsum("bth,bth->h", share_BTH, delta_BTH).astype(sink_H.dtype)


_with_sink.defvjp(_forward, _backward)
