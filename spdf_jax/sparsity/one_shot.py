"""Pruning once, one weight matrix at a time: what to keep by which score, and how what is kept makes up for what goes.

Magnitude; Wanda (Sun et al. 2023, arXiv 2306.11695; ``locuslab/wanda``); SparseGPT (Frantar and Alistarh 2023, arXiv
2301.00774; ``IST-DASLab/sparsegpt``), whose matrices are [out, in] where ours are [in, out].

Shape legend: P inputs of a matrix, Q its outputs, N tokens, U, J input and output units of a pattern, K inputs at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from spdf_jax.errors import InputError
from spdf_jax.sparsity.patterns import Pattern, parse_pattern
from spdf_jax.sparsity.select import order_keys, select_top_k

#: Those that look at the inputs of a matrix, and all.
CALIBRATED_METHODS = ("wanda", "sparsegpt")
PRUNING_METHODS = ("magnitude", *CALIBRATED_METHODS)
#: What is added to the diagonal of a Hessian, as a share of its mean (SparseGPT).
DAMPING = 0.01
# Inputs whose masks are chosen together (SparseGPT's), and those whose corrections stay in a processor's cache.
_CHOSEN, _SOLVED = 128, 16
# On a GPU a product of float32 is rounded to fewer bits otherwise.
_dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def gram(x_NP: jax.Array) -> jax.Array:
    """``x^T x`` in float32: SparseGPT's Hessian but for a factor that nothing depends on; its diagonal has Wanda's norms.

    It is symmetric, and `sparsegpt` reads its upper triangle: each of eight panels of columns is multiplied by itself and by
    those after it alone. Below its diagonal the result says nothing.

    >>> gram(jnp.array([[1.0, 2.0], [0.0, 3.0]])).tolist()
    [[1.0, 2.0], [0.0, 13.0]]
    """
    x_NP = x_NP.astype(jnp.float32)
    inputs = x_NP.shape[1]
    starts = range(0, inputs, -(-inputs // 8))
    rows = [_dot(x_NP[:, i : i + starts.step].T, x_NP[:, i:]) for i in starts]
    return jnp.concatenate([jnp.pad(row, ((0, 0), (i, 0))) for i, row in zip(starts, rows, strict=True)])


def wanda_scores(w: jax.Array, input_norm: jax.Array) -> jax.Array:
    """What Wanda keeps weights by: ``|w_ij| * ||x_i||_2``, to be compared within each output.

    Args:
      w: weights [in, out].
      input_norm: Euclidean norm of each input over the calibration tokens, [in]; any common factor will do.

    Returns:
      Scores [in, out] in float32; ``spdf_jax.keep_largest(scores, target, by_output=True)`` makes Wanda's mask of them.

    Raises:
      InputError: norms that are not one an input.

    >>> w, x = jnp.array([[3.0, -1.0], [2.0, 2.0]]), jnp.array([[1.0, 2.0], [0.0, 2.0]])
    >>> scores = wanda_scores(w, jnp.linalg.norm(x, axis=0))
    >>> keep_largest(scores, 2, by_output=True).tolist()
    [[False, False], [True, True]]
    """
    if input_norm.shape != w.shape[:1]:
        raise InputError(f"wanda_scores: input_norm of shape {input_norm.shape}; {w.shape[:1]} is one an input of w")
    return jnp.abs(w.astype(jnp.float32)) * input_norm.astype(jnp.float32)[:, None]


def keep_largest(
    scores: jax.Array, target: jax.Array | int, *, pattern: str = "unstructured", by_output: bool = False
) -> jax.Array:
    """A mask of the weights of largest score, ties by lowest index.

    Args:
      scores: of one matrix, [in, out]; a block is scored by the sum of their squares.
      target: active weights, such as the pattern can have; may be traced.
      pattern: ``unstructured`` | ``N:M`` (groups along the inputs) | ``blockB``, see `spdf_jax.sparsity.patterns`.
      by_output: compare within each output (Wanda), or column of blocks, all of which keep as many; where `target` leaves a
        rest, those keep one more whose next score is largest. Else in the whole matrix.

    Returns:
      bool [in, out] with exactly `target` True.

    Raises:
      InputError: an unknown pattern, or a matrix that does not divide into it.

    >>> scores = jnp.array([[4.0, 1.0], [3.0, 2.0]])
    >>> keep_largest(scores, 2).tolist(), keep_largest(scores, 2, by_output=True).tolist()
    ([[True, False], [True, False]], [[True, False], [False, True]])
    """
    p = parse_pattern(pattern)
    p.check_shape(scores.shape, "scores")
    return _keep_largest(scores, target, p, by_output)


@partial(jax.jit, static_argnums=(2, 3))
def _keep_largest(scores: jax.Array, target: jax.Array | int, p: Pattern, by_output: bool) -> jax.Array:
    units, target = p.pool(scores), jnp.asarray(target) // p.unit_size
    if by_output and p.m == 1:
        return p.expand(_of_every_output(units, target))
    everything = jnp.ones(units.shape, bool)
    return p.expand(p.select(units, target, target, among=everything, taken=~everything))


def _of_every_output(scores_UJ: jax.Array, target: jax.Array) -> jax.Array:
    units, outputs = scores_UJ.shape
    kept_UJ = jax.vmap(select_top_k, (1, None), 1)(scores_UJ, target // outputs)
    keys_UJ = order_keys(scores_UJ)
    next_J = jnp.argmax(jnp.where(kept_UJ, jnp.iinfo(keys_UJ.dtype).min, keys_UJ), axis=0)
    more_J = select_top_k(jnp.take_along_axis(scores_UJ, next_J[None], 0)[0], target % outputs)
    return kept_UJ | ((jnp.arange(units)[:, None] == next_J[None]) & more_J[None])


class _Sizes(NamedTuple):
    """How many inputs are chosen together (whole groups or blocks), solved together, and step by step."""

    chosen: int
    solved: int
    group: int

    @classmethod
    def of(cls, p: Pattern) -> "_Sizes":
        unit = max(p.m, p.block)
        chosen = unit * max(1, _CHOSEN // unit)
        groups = chosen // p.m
        together = max(k for k in range(1, max(1, _SOLVED // p.m) + 1) if groups % k == 0)
        return cls(chosen, p.m * together, p.m)


def sparsegpt(
    w: jax.Array,
    hessian: jax.Array,
    target: jax.Array | int,
    *,
    pattern: str = "unstructured",
    damping: jax.Array | float = DAMPING,
) -> tuple[jax.Array, jax.Array]:
    """SparseGPT: prunes inputs in turn, and lets the weights of later inputs make up for what each output loses.

    Inputs are taken 128 at a time; of these the weights of smallest ``(w / U_qq)^2`` go, the same share each time. U is the
    upper Cholesky factor of the inverse of the Hessian.

    Args:
      w: weights [in, out].
      hessian: ``x^T x`` over calibration tokens x [tokens, in], [in, in], of which the upper triangle is read; any common
        factor will do.
      target: active weights, such as the pattern can have; may be traced.
      pattern: ``unstructured`` | ``N:M`` (groups along the inputs) | ``blockB``, see `spdf_jax.sparsity.patterns`.
      damping: added to the diagonal of `hessian`, as a share of its mean.

    Returns:
      ``(w, mask)``: corrected weights in the dtype of `w`, exactly 0 outside the mask; bool [in, out] with exactly `target`
      True.

    Raises:
      InputError: an unknown pattern, a matrix that does not divide into it, or a Hessian that is not of its inputs.

    >>> x = jax.random.normal(jax.random.key(0), (64, 8))
    >>> x = x.at[:, 1].set(x[:, 0])  # two inputs alike: one does for both
    >>> w, mask = sparsegpt(jnp.ones((8, 1)), x.T @ x, 7)
    >>> mask[:2, 0].tolist(), round(float(w[1, 0]), 1)
    ([False, True], 2.0)
    """
    p, inputs = parse_pattern(pattern), w.shape[0]
    p.check_shape(w.shape, "w")
    if hessian.shape != (inputs, inputs):
        raise InputError(
            f"sparsegpt: a Hessian of shape {hessian.shape}; ({inputs}, {inputs}) is that of the inputs of w"
        )
    return _sparsegpt(w, hessian, target, p, damping)


@partial(jax.jit, static_argnums=3)
def _sparsegpt(
    w: jax.Array, hessian: jax.Array, target: jax.Array | int, p: Pattern, damping: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    inputs = w.shape[0]
    sizes, rows = _Sizes.of(p), inputs // p.block
    dead_P = jnp.diagonal(hessian) == 0  # inputs that are always 0, whose weights do nothing
    kept = jnp.where(dead_P[:, None], 0, w.astype(jnp.float32))
    padding = -inputs % sizes.chosen
    w_PQ = jnp.pad(kept, ((0, padding), (0, 0)))
    factor_PP = jnp.pad(_inverse_factor(hessian.astype(jnp.float32), dead_P, damping), ((0, padding), (0, padding)))
    factor_PP += jnp.diag((jnp.arange(inputs + padding) >= inputs).astype(jnp.float32))
    target = jnp.asarray(target, jnp.int32) // p.unit_size
    dense = target > w.size // p.m * p.n

    def active_before(row: jax.Array) -> jax.Array:
        # target * row // rows, of numbers that may be too large to multiply
        row = jnp.minimum(row, rows)
        return target // rows * row + target % rows * row // rows

    def prune(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        w_PQ, mask_PQ = found
        start = i * sizes.chosen
        w_KQ = lax.dynamic_slice_in_dim(w_PQ, start, sizes.chosen)
        factor_KP = lax.dynamic_slice_in_dim(factor_PP, start, sizes.chosen)
        factor_KK = lax.dynamic_slice_in_dim(factor_KP, start, sizes.chosen, 1)
        mask_KQ = jnp.ones(w_KQ.shape, bool)
        if p.m == 1:
            row = start // p.block + jnp.arange(sizes.chosen // p.block)
            units = p.pool(jnp.abs(w_KQ) / jnp.diagonal(factor_KK)[:, None])
            k = active_before(row[-1] + 1) - active_before(row[0])
            mask_KQ = p.expand(select_top_k(units, k, jnp.broadcast_to(row[:, None] < rows, units.shape)))
        w_KQ, mask_KQ, error_KQ = _solve(w_KQ, mask_KQ, factor_KK, p, sizes, dense)
        later = jnp.arange(factor_KP.shape[1]) >= start + sizes.chosen
        w_PQ -= _dot(jnp.where(later[None], factor_KP, 0).T, error_KQ)
        w_PQ = lax.dynamic_update_slice_in_dim(w_PQ, w_KQ, start, 0)
        return w_PQ, lax.dynamic_update_slice_in_dim(mask_PQ, mask_KQ, start, 0)

    steps = w_PQ.shape[0] // sizes.chosen
    w_PQ, mask_PQ = lax.fori_loop(0, steps, prune, (w_PQ, jnp.zeros(w_PQ.shape, bool)))
    return w_PQ[:inputs].astype(w.dtype), mask_PQ[:inputs]


def _inverse_factor(hessian_PP: jax.Array, dead_P: jax.Array, damping: jax.Array | float) -> jax.Array:
    """Upper triangular U with ``U^T U`` the inverse of the damped Hessian.

    With all axes reversed, U's inverse is the Hessian's Cholesky factor: one factorisation, and no inverse of the whole.
    """
    diagonal_P = jnp.where(dead_P, 1, jnp.diagonal(hessian_PP))
    diagonal_P += damping * jnp.mean(diagonal_P)
    whole = jnp.where(jnp.eye(len(dead_P), dtype=bool), diagonal_P[:, None], hessian_PP)
    lower = lax.linalg.cholesky(whole[::-1, ::-1], symmetrize_input=False)
    return lax.linalg.triangular_solve(lower, jnp.eye(len(dead_P)), left_side=True, lower=True)[::-1, ::-1]


def _solve(
    w_KQ: jax.Array, mask_KQ: jax.Array, factor_KK: jax.Array, p: Pattern, sizes: _Sizes, dense: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The weights of K inputs, corrected one after the other, their mask, and the error that the inputs after them bear.

    Few at a time, so that all they touch stays in the cache, and then all after these by one product. The mask is given, but
    for N:M, whose groups are chosen as their inputs are reached; `dense`: all of every group.
    """

    def few(i: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        w_KQ, mask_KQ, error_KQ = found
        start = i * sizes.solved
        take = partial(lax.dynamic_slice_in_dim, start_index=start, slice_size=sizes.solved)
        put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
        factor_SK, few_w = take(factor_KK), take(w_KQ)
        solve = partial(_solve_group, take(factor_SK, axis=1), p, dense)
        solved = (few_w, take(mask_KQ), jnp.zeros_like(few_w))
        w_SQ, mask_SQ, error_SQ = lax.fori_loop(0, sizes.solved // sizes.group, solve, solved)
        later = jnp.arange(sizes.chosen) >= start + sizes.solved
        w_KQ -= _dot(jnp.where(later[None], factor_SK, 0).T, error_SQ)
        return put(w_KQ, w_SQ), put(mask_KQ, mask_SQ), put(error_KQ, error_SQ)

    return lax.fori_loop(0, sizes.chosen // sizes.solved, few, (w_KQ, mask_KQ, jnp.zeros_like(w_KQ)))


def _solve_group(
    factor_SS: jax.Array, p: Pattern, dense: jax.Array, i: jax.Array, found: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """The next group of N:M, or the next input."""
    w_SQ, mask_SQ, error_SQ = found
    start = i * p.m
    factor_SG = lax.dynamic_slice_in_dim(factor_SS, start, p.m, 1)
    factor_GG = lax.dynamic_slice_in_dim(factor_SG, start, p.m)
    w_GQ = lax.dynamic_slice_in_dim(w_SQ, start, p.m) - _dot(factor_SG.T, error_SQ)  # errors to come are still 0
    mask_GQ = lax.dynamic_slice_in_dim(mask_SQ, start, p.m)
    if p.m > 1:
        scores, everything = jnp.abs(w_GQ) / jnp.diagonal(factor_GG)[:, None], jnp.ones_like(mask_GQ)
        target = jnp.where(dense, p.m, p.n) * w_GQ.shape[1]
        mask_GQ = p.select(scores, target, target, among=everything, taken=~everything)
    weights: list[jax.Array] = []
    errors: list[jax.Array] = []
    for n in range(p.m):
        w_Q = w_GQ[n] - sum((factor_GG[k, n] * error for k, error in enumerate(errors)), jnp.zeros(()))
        weights.append(jnp.where(mask_GQ[n], w_Q, 0))
        errors.append(jnp.where(mask_GQ[n], 0, w_Q / factor_GG[n, n]))
    put = partial(lax.dynamic_update_slice_in_dim, start_index=start, axis=0)
    return put(w_SQ, jnp.stack(weights)), put(mask_SQ, mask_GQ), put(error_SQ, jnp.stack(errors))
