"""Every pattern against dense masked attention in float64, and that it skips what it does not attend to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from spdf_jax.attention import attention
from spdf_jax.attention_patterns import PATTERNS, attended_pairs, causal_share, pattern_mask
from spdf_jax.errors import InputError

# Widths that divide the length, do not, and exceed it; with both ends of each.
LENGTHS_AND_WIDTHS = [(1, 128), (7, 3), (128, 128), (129, 16), (200, 1), (300, 128), (512, 16)]
# One of each kind of band: whole rows, window and residues, blocks and summaries.
EVERY_BAND = ("causal", "local_strided", "fixed")


def inputs(length, *, batch=2, heads=2, head_dim=8, dtype=jnp.float32):
    """q, k, v, dout."""
    keys = jax.random.split(jax.random.key(length), 4)
    return tuple(jax.random.normal(key, (batch, length, heads, head_dim), dtype) for key in keys)


def reference(q, k, v, dout, mask_TT):
    """(out, dq, dk, dv) of dense masked attention, in float64 and written out by hand."""
    q, k, v, dout = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, dout))
    scale = q.shape[-1] ** -0.5
    s = np.where(mask_TT, q @ k.swapaxes(-1, -2) * scale, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout @ v.swapaxes(-1, -2)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    return tuple(x.swapaxes(1, 2) for x in (p @ v, ds @ k, ds.swapaxes(-1, -2) @ q, p.swapaxes(-1, -2) @ dout))


@functools.partial(jax.jit, static_argnames=("pattern", "width"))
def value_and_grads(q, k, v, dout, *, pattern, width):
    out, pullback = jax.vjp(functools.partial(attention, pattern=pattern, width=width), q, k, v)
    return out, *pullback(dout)


def scratch_bytes(pattern, length, width=16):
    x = inputs(length, batch=1, heads=1)
    return value_and_grads.lower(*x, pattern=pattern, width=width).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("pattern", "length", "width"),
    [
        *[(pattern, *pair) for pattern in EVERY_BAND for pair in LENGTHS_AND_WIDTHS],
        *[(pattern, *pair) for pattern in ("local", "strided") for pair in [(7, 3), (200, 1), (300, 128)]],
    ],
)
def test_values_and_gradients_equal_dense_masked_attention(pattern, length, width):
    x = inputs(length)
    expected = reference(*x, pattern_mask(pattern, length, width))
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv"), value_and_grads(*x, pattern=pattern, width=width), expected, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def test_many_blocks_of_queries_and_keys_and_one_head():
    x = inputs(600, batch=1, heads=1, head_dim=4)
    for pattern, width in (("causal", 1), ("local", 200)):
        expected = reference(*x, pattern_mask(pattern, 600, width))
        for ours, theirs in zip(value_and_grads(*x, pattern=pattern, width=width), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", EVERY_BAND)
def test_large_scores_neither_overflow_nor_leak(pattern):
    q, k, v, dout = inputs(40)
    x = (100 * q, 100 * k, v, dout)
    expected = reference(*x, pattern_mask(pattern, 40, 8))
    # Scores of 1e4 carry float32 errors of 1e-3 into the exponent, and gradients are 100 times larger.
    for ours, theirs in zip(value_and_grads(*x, pattern=pattern, width=8), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_reach_exactly_the_keys_of_the_mask(pattern):
    length, width, query = 37, 8, 29
    q, k, v, dout = inputs(length)
    only_query = jnp.zeros_like(dout).at[:, query].set(1.0)
    _, dq, dk, dv = value_and_grads(q, k, v, only_query, pattern=pattern, width=width)
    attended = pattern_mask(pattern, length, width)[query]
    for grad in (dk, dv):
        np.testing.assert_array_equal(np.abs(grad).max((0, 2, 3)) > 0, attended)
    np.testing.assert_array_equal(np.abs(dq).max((0, 2, 3)) > 0, np.arange(length) == query)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_attended_pairs_counts_the_mask(pattern):
    for length in (1, 2, 7, 16, 31, 64, 100, 129, 257):
        for width in (1, 2, 3, 16, 64, 100, 128, 300):
            assert attended_pairs(pattern, length, width) == pattern_mask(pattern, length, width).sum(), (length, width)


def test_shares_of_the_causal_triangle_at_1024_and_128():
    shares = {pattern: round(causal_share(pattern, 1024, 128), 3) for pattern in PATTERNS}
    assert shares == {"causal": 1.0, "local": 0.234, "strided": 0.009, "local_strided": 0.241, "fixed": 0.133}


@pytest.mark.parametrize(
    ("pattern", "dtype"), [*[(pattern, jnp.bfloat16) for pattern in EVERY_BAND], ("local_strided", jnp.float16)]
)
def test_half_precision_is_close_to_float32(pattern, dtype):
    half = inputs(150, dtype=dtype)
    expected = reference(*half, pattern_mask(pattern, 150, 32))
    for ours, theirs in zip(value_and_grads(*half, pattern=pattern, width=32), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=3e-2, atol=3e-2)


def test_half_precision_softmax_is_float32():
    # 4096 equal keys: a bfloat16 sum of probabilities stops growing at 256.
    q, k, _, _ = inputs(4096, batch=1, heads=1, dtype=jnp.bfloat16)
    out = attention(jnp.zeros_like(q), k, jnp.ones_like(q))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)


@pytest.mark.parametrize("pattern", ["causal", "local_strided"])
def test_inside_scan_and_checkpoint(pattern):
    x, k, v, dout = inputs(70)

    def layer(x, scale):
        return x + scale * attention(x, k, v, pattern=pattern, width=16), None

    @functools.partial(jax.jit, static_argnums=1)
    def grad(scales, body):
        return jax.grad(lambda scales: jnp.sum(dout * jax.lax.scan(body, x, scales)[0]))(scales)

    scales = jnp.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(grad(scales, jax.checkpoint(layer)), grad(scales, layer), rtol=1e-5)

    def loss(scales):
        mask_TT, out = pattern_mask(pattern, 70, 16), np.asarray(x, np.float64)
        for scale in scales:
            out = out + scale * reference(out, k, v, dout, mask_TT)[0]
        return np.sum(np.asarray(dout, np.float64) * out)

    at, steps = np.asarray(scales, np.float64), 1e-4 * np.eye(3)
    slopes = [(loss(at + step) - loss(at - step)) / 2e-4 for step in steps]
    np.testing.assert_allclose(grad(scales, layer), slopes, rtol=1e-4)


@pytest.mark.parametrize("pattern", EVERY_BAND)
def test_sharded_over_batch_and_heads_without_communication(pattern):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x = inputs(70, batch=4, heads=2)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None, "model")))
    compiled = value_and_grads.lower(*sharded, pattern=pattern, width=16).compile()
    text = compiled.as_text()
    assert not [op for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute") if op in text]
    expected = reference(*x, pattern_mask(pattern, 70, 16))
    for ours, theirs in zip(compiled(*sharded), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pattern", ["causal", "local"])
def test_scratch_memory_is_linear_in_length(pattern):
    # From 4096 on blocks have their full size; a 4096 x 4096 array alone would take 64 MiB.
    once, twice = scratch_bytes(pattern, 4096), scratch_bytes(pattern, 8192)
    assert twice <= 2.1 * once
    assert twice < 16 * 2**20


def test_scratch_memory_of_the_other_patterns_has_no_dense_array():
    for pattern in ("strided", "local_strided", "fixed"):
        assert scratch_bytes(pattern, 4096) < 16 * 2**20, pattern


@pytest.mark.parametrize(
    ("backend", "dtype", "kernel"), [("tpu", "bfloat16", None), ("gpu", "float32", None), ("gpu", "bfloat16", "cudnn")]
)
def test_causal_on_accelerators_is_jax_own(monkeypatch, backend, dtype, kernel):
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **options: calls.append(options))
    attention(*inputs(4, dtype=dtype)[:3])
    assert calls == [{"is_causal": True, "implementation": kernel}]


def test_bad_input_says_what_to_do():
    x = jnp.ones((1, 4, 1, 2))
    with pytest.raises(InputError, match=r"pattern 'diagonal' is unknown: use one of causal, local, strided"):
        attention(x, x, x, pattern="diagonal")
    with pytest.raises(InputError, match=r"width is 0: it must be an integer of at least 1"):
        attention(x, x, x, pattern="local", width=0)
    with pytest.raises(InputError, match=r"length is 0"):
        attended_pairs("causal", 0, 1)
    with pytest.raises(InputError, match=r"width is 2.5"):
        pattern_mask("local", 4, 2.5)
    with pytest.raises(InputError, match=r"shapes \(1, 4, 1, 2\), \(1, 3, 1, 2\)"):
        attention(x, x[:, :3], x)
    with pytest.raises(InputError, match="floating-point"):
        attention(*[x.astype(jnp.int32)] * 3)
