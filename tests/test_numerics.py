"""Numbers that nothing else would catch: what low precision does to gradients, and how parameters start."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import needs_mosaic

import spdf_jax as spdf
from spdf_jax.data import Batch
from spdf_jax.ops.block_linear import block_linear
from spdf_jax.training.step import loss_and_grads
from spdf_jax.tree import named_leaves

# Every kind of leaf: embeddings, kernels, biases, norms, taps.
WHOLE = spdf.GPTConfig(n_layer=1, n_head=1, d_model=16, d_ff=32, vocab_size=32, context=128, dconv=True)
# Short ones: the keys' bias moves nothing but through the convolution, at the first positions, and of long ones too little is
# left of its gradient to tell a wrong sum from rounding.
SEQUENCES, MICRO_BATCHES = 128, 2


def gradients(config, dtype, params, tokens_BT):
    """Of the mean loss over 128 x 128 tokens, by leaf, as a training step computes them."""
    config = dataclasses.replace(config)
    object.__setattr__(config, "dtype", dtype)  # float64 is no choice of a run
    micro_ABT = tokens_BT.reshape(MICRO_BATCHES, -1, tokens_BT.shape[1])
    batch_ABT = Batch(micro_ABT[..., :-1], micro_ABT[..., 1:], np.ones(micro_ABT[..., 1:].shape, np.float32))
    parameter_dtype = np.float64 if dtype == "float64" else np.float32
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, parameter_dtype), params)
    state = spdf.TrainState(jnp.zeros((), jnp.int32), params, spdf.dense_masks(params), (), jax.random.key(0))

    @jax.jit
    def compute(state, batch_ABT):
        return loss_and_grads(spdf.GPT(config), state, batch_ABT, pattern="local", width=32)[1]

    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(compute(state, batch_ABT))}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        pytest.param(
            {"tied_head": False, "shared_qk": True, "mlp_norm": "post", "activation": "squared_relu", "remat": "block"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_in_bfloat16_are_those_in_float64_whatever_number_of_tokens_they_sum(changes):
    config = dataclasses.replace(WHOLE, **changes)
    rng = np.random.default_rng(0)
    share_V = 1 / np.arange(1, config.vocab_size + 1)  # as words are: the first is every fourth token
    tokens_BT = rng.choice(config.vocab_size, (SEQUENCES, config.context + 1), p=share_V / share_V.sum())
    tokens_BT = tokens_BT.astype(np.int32)
    shapes = jax.eval_shape(spdf.GPT(config).init, jax.random.key(0), tokens_BT[:1, :1])["params"]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape), shapes)
    found = gradients(config, "bfloat16", params, tokens_BT)
    with jax.enable_x64(True):
        wanted = gradients(config, "float64", params, tokens_BT)

    def error(of_one, axis=None):
        found_, wanted_ = found[of_one], wanted[of_one]
        return np.max(np.linalg.norm(found_ - wanted_, axis=axis) / np.linalg.norm(wanted_, axis=axis))

    # Rounding each token's own share costs less than 1 %. The sum of a frequent token's, in bfloat16, would cost 10 to 50.
    errors = {name: error(name) for name in wanted} | {"frequent tokens": error("wte/embedding", -1)}
    assert {name: round(e, 4) for name, e in errors.items() if e > 0.02} == {}


@pytest.mark.parametrize(
    ("backend", "side"),
    [
        ("loop", 16),
        ("gather", 16),
        pytest.param("mosaic", 64, marks=[pytest.mark.slow, needs_mosaic]),
        pytest.param("pallas", 128, marks=pytest.mark.slow),
    ],
)
def test_gradients_of_live_blocks_in_bfloat16_are_sums_in_float32(backend, side):
    rng = np.random.default_rng(0)
    x_BTP, dy_BTQ = (jnp.asarray(rng.normal(1, 1, (16, 1024, 2 * side)), jnp.bfloat16) for _ in range(2))
    data_JKbb, idx_JK = jnp.zeros((2, 1, side, side), jnp.bfloat16), jnp.array([[1], [0]])
    _, backward = jax.vjp(lambda data_JKbb: block_linear(x_BTP, data_JKbb, idx_JK, backend=backend), data_JKbb)
    (found_JKbb,) = backward(dy_BTQ)
    x_NIb, dy_NJb = (np.asarray(a, np.float64).reshape(-1, 2, side) for a in (x_BTP, dy_BTQ))
    wanted_Jbb = np.einsum("njb,njc->jbc", x_NIb[:, [1, 0]], dy_NJb)
    np.testing.assert_allclose(np.asarray(found_JKbb[:, 0], np.float64), wanted_Jbb, rtol=2**-8)


def test_every_initial_standard_deviation_is_the_one_that_is_meant():
    c = spdf.GPTConfig(n_layer=2, n_head=2, d_model=128, vocab_size=300, context=256, tied_head=False, dconv=True)
    c = dataclasses.replace(c, mup_base_width=32, mup_density=0.5)
    params = jax.jit(spdf.GPT(c).init)(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    hidden = 0.02 / (128 / 32 * 0.5) ** 0.5
    residual = hidden / (2 * 2) ** 0.5
    stds = {"head/kernel": 0.02, "wte/embedding": 0.02, "wpe/embedding": 0.02}
    stds |= {f"blocks/{name}/kernel": hidden for name in ("attn_q", "attn_k", "attn_v", "mlp_up")}
    stds |= {f"blocks/{name}/kernel": residual for name in ("attn_o", "mlp_down")}
    for name, leaf in named_leaves(params):
        if name in stds:
            assert float(leaf.std()) == pytest.approx(stds[name], rel=0.02), name
            assert float(jnp.abs(leaf).max()) > 3 * stds[name], f"{name}: no tail is cut off"
        elif name.endswith("taps"):  # as in Primer's code
            np.testing.assert_allclose(leaf, np.array([1 / 2, 1 / 6, 1 / 6])[None, :, None] * np.ones((2, 3, 128)))
        else:
            assert (leaf == (1 if name.endswith("scale") else 0)).all(), name
    assert set(stds) == {name for name, _ in named_leaves(params) if name.endswith(("kernel", "embedding"))}
