"""The linear layer: a dense kernel, or the live blocks of one.

Shape legend: B batch, T positions, P inputs, Q outputs, N tokens, J output blocks, K live blocks an output block, b side.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from spdf_jax.ops.block_linear import BLOCK_OUTPUT, block_linear, copied_transpose, live_inputs
from spdf_jax.sharding import target_platform


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def dense_linear(x_BTP: jax.Array, w: jax.Array, transposed: bool = False) -> jax.Array:
    """``x @ w`` in the dtype of `x`; the weight gradient sums over one axis of tokens.

    Over two, as JAX would sum, a CPU copies the factors into other layouts and multiplies at a quarter of its speed. Half
    precision it multiplies as such only where the sum runs along the rows of the first factor.

    Args:
      x_BTP: floats.
      w: parameters, w_PQ. Rounded here: outside, a loop over layers would store all of them rounded for its backward pass.
      transposed: `w` is w_QP, as an embedding is to the head that shares it.

    Returns:
      y_BTQ.

    >>> dense_linear(jnp.ones((1, 1, 2)), jnp.ones((2, 3))).tolist()
    [[[2.0, 2.0, 2.0]]]
    """
    w = w.astype(x_BTP.dtype)
    return x_BTP @ (w.T if transposed else w)


def _dense_backward(
    transposed: bool, saved: tuple[jax.Array, jax.Array], dy_BTQ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_BTP, w = saved
    x_NP, dy_NQ = x_BTP.reshape(-1, x_BTP.shape[-1]), dy_BTQ.reshape(-1, dy_BTQ.shape[-1])
    transpose = copied_transpose if target_platform() == "cpu" and dy_BTQ.dtype.itemsize < 4 else jnp.transpose
    dw_PQ, rounded = transpose(x_NP) @ dy_NQ, w.astype(dy_BTQ.dtype)
    dx_BTP = dy_BTQ @ (rounded if transposed else transpose(rounded))
    return dx_BTP, (transpose(dw_PQ) if transposed else dw_PQ).astype(w.dtype)


dense_linear.defvjp(lambda x_BTP, w, transposed: (dense_linear(x_BTP, w, transposed), (x_BTP, w)), _dense_backward)


@jax.custom_vjp
def add_bias(y_BTQ: jax.Array, bias_Q: jax.Array) -> jax.Array:
    """``y + bias`` in the dtype of `y`; the bias's gradient is summed in its own.

    As JAX would sum it, in the dtype of `y`, thousands of tokens in bfloat16 lose a tenth of the gradient and more.

    Args:
      y_BTQ: floats.
      bias_Q: parameters.

    Returns:
      y_BTQ.

    >>> add_bias(jnp.ones((1, 1, 2)), jnp.array([1.0, 2.0])).tolist()
    [[[2.0, 3.0]]]
    """
    return y_BTQ + bias_Q.astype(y_BTQ.dtype)[None, None]


add_bias.defvjp(
    lambda y_BTQ, bias_Q: (add_bias(y_BTQ, bias_Q), jnp.zeros((), bias_Q.dtype)),
    lambda zero, dy_BTQ: (dy_BTQ, jnp.sum(dy_BTQ, (0, 1), dtype=zero.dtype)),
)


class Linear(nn.Module):
    """``x @ kernel + bias``; by blocks where the ``topology`` collection says which blocks of the kernel are live.

    Attributes:
      features: Q.
      use_bias: whether there is one.
      dtype: compute dtype; parameters are float32.
      kernel_init: initialiser of ``kernel [P, Q]``; ``bias [Q]`` starts at 0.

    >>> Linear(3).init_with_output(jax.random.key(0), jnp.zeros((1, 1, 2)))[0].tolist()
    [[[0.0, 0.0, 0.0]]]
    """

    features: int
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x_BTP: jax.Array) -> jax.Array:
        """x_BTP to y_BTQ in the compute dtype."""
        x_BTP = x_BTP.astype(self.dtype)
        if self.has_variable("topology", "kernel"):
            data_JKbb: jax.Array = self.get_variable("params", "kernel")
            idx_JK = live_inputs(self.get_variable("topology", "kernel"), data_JKbb.shape[1])
            y_BTQ = block_linear(x_BTP, data_JKbb, idx_JK)
        else:
            w_PQ = self.param("kernel", self.kernel_init, (x_BTP.shape[-1], self.features))
            y_BTQ = checkpoint_name(dense_linear(x_BTP, w_PQ), BLOCK_OUTPUT)
        return add_bias(y_BTQ, self.param("bias", nn.initializers.zeros, (self.features,))) if self.use_bias else y_BTQ
