"""Every pattern and backend against dense masked attention in float64, and that it skips what it does not attend to."""

import functools
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import as_users, needs_libtpu, slow_but

from spdf_jax.errors import InputError
from spdf_jax.ops.attention import attention
from spdf_jax.ops.attention_backends import attention_backend, choose_backend
from spdf_jax.ops.attention_kernels import cudnn_attention
from spdf_jax.ops.attention_patterns import PATTERNS, attended_pairs, causal_share, pattern_mask
from spdf_jax.sharding import target_platform

# Widths that divide the length, do not, and exceed it; with both ends of each. To causal attention they are nothing.
LENGTHS_AND_WIDTHS = [(1, 128), (129, 16), (200, 1), (300, 128)]
MORE = [(7, 3), (128, 128), (512, 16)]
# One of each kind of band: whole rows, window and residues, blocks and summaries.
EVERY_BAND = ("causal", "local_strided", "fixed")
SLOW = pytest.mark.slow


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


@functools.partial(jax.jit, static_argnames=("pattern", "width", "backend"))
def value_and_grads(q, k, v, dout, segments=None, *, pattern, width, backend="auto"):
    attend = functools.partial(attention, pattern=pattern, width=width, segments_BT=segments, backend=backend)
    out, pullback = jax.vjp(attend, q, k, v)
    return out, *pullback(dout)


def assert_equals_reference(x, mask, **options):
    for name, ours, theirs in zip(
        ("out", "dq", "dk", "dv"), value_and_grads(*x, **options), reference(*x[:4], mask), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


def documents(length, *boundaries):
    """segments_BT of two sequences: one document in the first, two ids that take turns in the second."""
    several = np.searchsorted(boundaries, np.arange(length), side="right") % 2
    return jnp.asarray(np.stack([np.full(length, 7), several]), jnp.int32)


def within_documents(segments, mask_TT):
    """mask_B1TT. Equal ids of separate stretches attend to each other, as by definition."""
    segments = np.asarray(segments)
    return (segments[:, :, None] == segments[:, None, :])[:, None] & mask_TT


def scratch_bytes(pattern, length, width=16):
    x = inputs(length, batch=1, heads=1)
    return value_and_grads.lower(*x, pattern=pattern, width=width).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("pattern", "length", "width"),
    [
        *[("causal", *pair) for pair in LENGTHS_AND_WIDTHS if pair[1] > 1],
        *[(pattern, *pair) for pattern in ("local_strided", "fixed") for pair in LENGTHS_AND_WIDTHS],
        *[(pattern, 300, 128) for pattern in ("local", "strided")],
        *[pytest.param(pattern, *pair, marks=SLOW) for pattern in EVERY_BAND for pair in MORE],
        *[pytest.param(pattern, *pair, marks=SLOW) for pattern in ("local", "strided") for pair in [(7, 3), (200, 1)]],
    ],
)
def test_values_and_gradients_equal_dense_masked_attention(pattern, length, width):
    assert_equals_reference(inputs(length), pattern_mask(pattern, length, width), pattern=pattern, width=width)


def test_many_blocks_of_queries_and_keys_and_one_head():
    x = inputs(600, batch=1, heads=1, head_dim=4)
    for pattern, width in (("causal", 1), ("local", 128), ("local", 500)):  # one tile a block of queries; several
        assert_equals_reference(x, pattern_mask(pattern, 600, width), pattern=pattern, width=width)


# Boundaries at no edge of a block and at an edge, at the first and the last position.
@pytest.mark.parametrize(
    ("pattern", "length", "width"),
    [
        *[(pattern, 330, 128) for pattern in ("causal", "local_strided")],
        pytest.param("fixed", 330, 128, marks=SLOW),
        *[(pattern, 70, 16) for pattern in ("local", "strided")],
        ("causal", 1, 1),
        *[pytest.param(pattern, 70, 16, marks=SLOW) for pattern in EVERY_BAND],
    ],
)
def test_documents_in_one_sequence_do_not_see_each_other(pattern, length, width):
    segments = documents(length, 1, 20, 64, length - 1)
    mask = within_documents(segments, pattern_mask(pattern, length, width))
    assert_equals_reference((*inputs(length), segments), mask, pattern=pattern, width=width)


def test_a_document_in_a_packed_sequence_is_what_it_is_alone():
    q, k, v, _ = inputs(90, batch=2)
    segments = jnp.repeat(jnp.arange(3), 30)[None].repeat(2, 0)
    packed = jax.jit(attention)(q, k, v, segments_BT=segments)
    alone = jax.jit(attention)(q[:, 30:60], k[:, 30:60], v[:, 30:60])
    np.testing.assert_allclose(packed[:, 30:60], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pattern=st.sampled_from(PATTERNS),
    length=st.integers(1, 700),
    width=st.integers(1, 300),
    heads=st.integers(1, 3),
    boundaries=st.none() | st.lists(st.integers(1, 700), max_size=5),
)
def test_random_lengths_widths_heads_and_boundaries(pattern, length, width, heads, boundaries):
    mask, x = pattern_mask(pattern, length, width), inputs(length, heads=heads)
    if boundaries is not None:
        x = (*x, documents(length, *sorted(boundaries)))
        mask = within_documents(x[4], mask)
    assert_equals_reference(x, mask, pattern=pattern, width=width)


@pytest.mark.parametrize("pattern", slow_but(["local_strided"], EVERY_BAND))
def test_short_sequences_on_one_cpu_go_a_few_at_a_time(pattern, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x, segments = inputs(70, batch=18, heads=4), documents(70, 20).repeat(9, 0)  # three times 24 rows
    mask = within_documents(segments, pattern_mask(pattern, 70, 16))
    step = jax.jit(functools.partial(value_and_grads.__wrapped__, pattern=pattern, width=16))
    assert "tensor<24x70x1x8xf32>" in step.lower(*x, segments).as_text()
    for ours, theirs in zip(step(*x, segments), reference(*x, mask), strict=True):
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
    ("pattern", "length", "width", "dtype"),
    [
        ("causal", 150, 32, jnp.bfloat16),
        ("fixed", 200, 128, jnp.bfloat16),  # windows of one block: no loop between a product and its transposition
        ("local_strided", 150, 32, jnp.float16),
        *[
            pytest.param(p, *pair, jnp.bfloat16, marks=SLOW)
            for p in EVERY_BAND
            for pair in [(9, 4), (150, 32), (300, 128)]
        ],
    ],
)
def test_half_precision_is_close_to_float32(pattern, length, width, dtype):
    half = inputs(length, dtype=dtype)
    expected = reference(*half, pattern_mask(pattern, length, width))
    for ours, theirs in zip(value_and_grads(*half, pattern=pattern, width=width), expected, strict=True):
        assert ours.dtype == dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol=3e-2, atol=3e-2)


def test_half_precision_softmax_is_float32():
    # 4096 equal keys: a bfloat16 sum of probabilities stops growing at 256.
    q, k, _, _ = inputs(4096, batch=1, heads=1, dtype=jnp.bfloat16)
    out = attention(jnp.zeros_like(q), k, jnp.ones_like(q))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1.0)


@pytest.mark.parametrize("pattern", slow_but(["local_strided"], ["causal", "local_strided"]))
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


def test_the_automatic_backend_by_platform():
    def choice(platform, pattern="causal", dtype="bfloat16", head_size=64, **options):
        return attention_backend(pattern, dtype, head_size, platform, **options)

    assert choice("cpu") == choice("cpu", "local") == "xla"
    assert choice("gpu") == choice("gpu", "local", "float16", 128) == "cudnn"
    for other in (
        {"dtype": "float32"},
        {"pattern": "fixed"},
        {"head_size": 12},
        {"head_size": 256},
        {"segments": True, "length": 1023},
        {"segments": True, "pattern": "local"},
    ):
        assert choice("gpu", **other) == "xla", other
    assert choice("gpu", segments=True, length=1024) == "cudnn"
    assert {choice("tpu", pattern, length=1024, segments=True) for pattern in PATTERNS} == {"splash"}
    assert choice("tpu", length=1000) == choice("tpu", dtype="float16") == "xla"


def test_the_target_is_the_platform_of_the_mesh(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    q = inputs(128)[0]
    assert target_platform() == "tpu"
    assert choose_backend("auto", "causal", q, False) == "xla"  # eight devices, and no mesh to split the kernel over
    with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))):
        assert target_platform() == "cpu"
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose_backend("auto", "causal", q, False) == "splash"


def test_cudnn_gets_the_causal_window(monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, **options: calls.append(options))
    q, k, v, _ = inputs(4, dtype="bfloat16")
    attention(q, k, v, width=3)
    attention(q, k, v, pattern="local", width=3)
    common = {"is_causal": True, "implementation": "cudnn", "mask": None}
    assert calls == [{**common, "local_window_size": None}, {**common, "local_window_size": (2, 0)}]


def test_packed_documents_by_cudnn_on_a_mesh(monkeypatch):
    # All of the call but the kernel, which only a GPU has.
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda *args, implementation, **options: plain(*args, **options)
    )
    q, k, v, dout = inputs(40, batch=4)
    segments = documents(40, 15).repeat(2, 0)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    @jax.jit
    def step(q, k, v, dout, segments):
        out, pullback = jax.vjp(
            functools.partial(cudnn_attention, segments_BT=segments, pattern="causal", width=1), q, k, v
        )
        return out, *pullback(dout)

    by_head = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        x = jax.device_put((q, k, v, dout), by_head)
        split = jax.device_put(segments, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))
        assert "all-" not in step.lower(*x, split).compile().as_text()
        found = step(*x, split)
    expected = reference(q, k, v, dout, within_documents(segments, pattern_mask("causal", 40, 1)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_cudnn_window_is_the_local_pattern():
    # The same call but for the kernel, which only a GPU has.
    q, k, v, dout = inputs(40)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=(6, 0), implementation="xla")
    np.testing.assert_allclose(out, reference(q, k, v, dout, pattern_mask("local", 40, 7))[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_splash_attention_interpreted(pattern, packed):
    x, mask = inputs(256), pattern_mask(pattern, 256, 100)
    if packed:
        x = (*x, documents(256, 20, 128, 255))
        mask = within_documents(x[4], mask)
    assert_equals_reference(x, mask, pattern=pattern, width=100, backend="splash")


@pytest.mark.slow
def test_splash_attention_on_a_mesh():
    x, segments = inputs(128, batch=4, heads=4), documents(128, 50).repeat(2, 0)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        options = {"pattern": "local", "width": 30, "backend": "splash"}
        assert (
            "all-"
            not in value_and_grads.lower(
                *jax.device_put(x, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor"))),
                jax.device_put(segments, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))),
                **options,
            )
            .compile()
            .as_text()
        )
        assert_equals_reference((*x, segments), within_documents(segments, pattern_mask("local", 128, 30)), **options)


TPU_PROGRAM = """
import functools, json
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from spdf_jax.ops.attention import attention
from spdf_jax.ops.attention_patterns import PATTERNS

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
mesh = Mesh(np.array(devices).reshape(2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

def step(q, k, v, dout, segments, *, pattern):
    out, pullback = jax.vjp(functools.partial(attention, pattern=pattern, segments_BT=segments), q, k, v)
    return out, *pullback(dout)

found = {}
with jax.set_mesh(mesh):
    for pattern in PATTERNS:
        for length in (1024, 1000):
            x = jax.ShapeDtypeStruct(
                (8, length, 12, 64), "bfloat16", sharding=NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
            )
            segments = jax.ShapeDtypeStruct((8, length), "int32", sharding=NamedSharding(mesh, P(("data", "fsdp"))))
            text = jax.jit(functools.partial(step, pattern=pattern)).lower(x, x, x, x, segments).compile().as_text()
            communicates = any(op in text for op in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
            found[f"{pattern} {length}"] = [text.count('custom_call_target="tpu_custom_call"'), communicates]
print(json.dumps(found))
"""


@pytest.mark.slow
@needs_libtpu
def test_compiles_for_a_tpu_that_is_not_there():
    # Its own process: libtpu writes to stderr, and stays.
    environment = as_users() | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    done = subprocess.run([sys.executable, "-c", TPU_PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kernels = {1024: 3, 1000: 0}  # forward, gradient of queries, gradient of keys and values; the tiles of XLA
    assert json.loads(done.stdout.splitlines()[-1]) == {
        f"{pattern} {length}": [count, False] for pattern in PATTERNS for length, count in kernels.items()
    }


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
    with pytest.raises(InputError, match=r"shapes \(\(1, 4, 1, 2\), \(1, 3, 1, 2\)"):
        attention(x, x[:, :3], x)
    with pytest.raises(InputError, match="floating-point"):
        attention(*[x.astype(jnp.int32)] * 3)
    with pytest.raises(InputError, match=r"segments are int32 \(4, 1\): give one integer a position, \(1, 4\)"):
        attention(x, x, x, segments_BT=jnp.ones((4, 1), jnp.int32))
    with pytest.raises(InputError, match="segments are float32"):
        attention(x, x, x, segments_BT=jnp.ones((1, 4)))
    with pytest.raises(InputError, match=r"backend 'flash' is unknown: use one of auto, xla, cudnn, splash"):
        attention(x, x, x, backend="flash")
    with pytest.raises(InputError, match=r"'cudnn', which needs a GPU, and this runs on cpu: use 'auto'"):
        attention(x, x, x, backend="cudnn")
    with pytest.raises(InputError, match=r"'splash', which cannot compute causal with length 4, float32"):
        attention(x, x, x, backend="splash")
