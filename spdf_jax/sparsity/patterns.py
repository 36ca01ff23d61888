"""Patterns inside a weight matrix: single weights, N of every M, or square blocks.

A pattern says what is counted and where there is room, never how the largest are found:

* ``unstructured``: every weight by itself;
* ``N:M`` (``2:4``): of M neighbours along the contraction axis (axis -2 of a kernel ``[in, out]``; of a whole leaf, see
  `contraction_axis`) exactly N are active, so the density of every matrix is N/M, or 1 while it is dense (Mishra et al.
  2021, arXiv 2104.08378);
* ``blockB`` (``block32``): squares of B x B over the last two axes come and go together; the score of a block is the sum
  of the squares of its scores.
"""

import math
import re
from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spdf_jax.errors import InputError
from spdf_jax.sparsity.select import order_keys, select_top_k

#: The usual ones; any ``N:M`` with N < M <= 32 and any ``blockB`` are understood.
PATTERNS = ("unstructured", "2:4", "1:4", "block32", "block64", "block128")


#: Where the contraction axis of a leaf is not that of ``[in, out]``, by its name; the first that fits counts. A model of
#: another layout adds its own at the front.
CONTRACTION_AXES: list[tuple[str, int]] = [
    (r"(^|/)embedding$", -1),  # a tied head: logits are x @ embedding.T
    (r"(^|/)weight$", -1),  # Equinox, PyTorch: [out, in]
    (r"(^|/)(query|key|value)/kernel$", -3),  # Flax's attention: [in, heads, width]
    (r"(^|/)out/kernel$", -2),  # its output: [heads, width, out]
]


def contraction_axis(name: str, shape: tuple[int, ...]) -> int:
    """The axis of a weight matrix that a product sums over, counted from the last: where N:M has its groups.

    Args:
      name: of the leaf.
      shape: of one of its matrices, the axis that counts layers left out.

    Returns:
      A negative axis; -2 unless `CONTRACTION_AXES` has another one for the name.

    Raises:
      InputError: more than two axes, and no entry that says which one it is.

    >>> contraction_axis("head/kernel", (768, 50257)), contraction_axis("wte/embedding", (50257, 768))
    (-2, -1)
    """
    found = next((axis for pattern, axis in CONTRACTION_AXES if re.search(pattern, name) and -axis <= len(shape)), None)
    if found is None and math.prod(shape[:-2]) > 1:
        raise InputError(
            f"pattern: N:M of {name} with shape {shape}: which axis is summed over? Say it by an entry at the front of "
            f"spdf_jax.sparsity.patterns.CONTRACTION_AXES, such as ({name!r}, -2), or leave it dense by the filter"
        )
    return found or -2


class Pattern(NamedTuple):
    """A parsed pattern; *units* are what it selects: weights, or blocks.

    Attributes:
      block: side of a block, 1 for single weights.
      n, m: n of every m along axis -2; m = 1 sets no limit.
    """

    block: int = 1
    n: int = 1
    m: int = 1

    @property
    def unit_size(self) -> int:
        """Weights in one unit."""
        return self.block**2

    def axis(self, name: str, shape: tuple[int, ...]) -> int:
        """The axis of a leaf's matrices to bring to -2 for the other methods; blocks and single weights stay as they are."""
        return contraction_axis(name, shape) if self.m > 1 else -2

    def check_shape(self, shape: tuple[int, ...], where: str, axis: int = -2) -> None:
        """Raises `InputError` unless matrices of `shape` divide into whole blocks, or groups along `axis`."""
        sides = {axis: self.m} if self.m > 1 else {-2: self.block, -1: self.block} if self.block > 1 else {}
        if sides and (len(shape) < 2 or any(shape[i] % side for i, side in sides.items())):
            wanted = " and ".join(f"axis {i} must be a multiple of {side}" for i, side in sides.items())
            raise InputError(
                f"pattern: {where} of shape {tuple(shape)} does not divide into {self}; {wanted}. Leave it dense by the "
                f"filter, or use another pattern"
            )

    def check_sparsity(self, sparsity: float) -> None:
        """Raises `InputError` if N:M cannot have this sparsity."""
        own = 1 - self.n / self.m
        if self.m > 1 and sparsity != 0 and not math.isclose(sparsity, own):
            raise InputError(f"pattern: {self} has sparsity {own:g} (or 0 while dense), not {sparsity:g}")

    def check_count(self, count: int, size: int) -> None:
        """Raises `InputError` if a matrix of `size` weights cannot have `count` active ones."""
        possible = count % self.unit_size == 0 if self.m == 1 else count in (size, size // self.m * self.n)
        if not (0 <= count <= size and possible):
            raise InputError(f"pattern: {self} cannot have {count} active of {size} weights")

    def pool(self, scores: jax.Array) -> jax.Array:
        """Scores of units from scores of weights. A block that holds a NaN is NaN."""
        if self.block == 1:
            return scores
        return jnp.sum(jnp.square(self._in_blocks(scores.astype(jnp.float32))), axis=(-3, -1))

    def pool_mask(self, mask: jax.Array) -> jax.Array:
        """Units with any active weight."""
        return mask if self.block == 1 else jnp.any(self._in_blocks(mask), axis=(-3, -1))

    def expand(self, units: jax.Array) -> jax.Array:
        """The mask of weights from a mask of units."""
        if self.block == 1:
            return units
        *lead, rows, columns = units.shape
        blocks = jnp.broadcast_to(units[..., :, None, :, None], (*lead, rows, self.block, columns, self.block))
        return blocks.reshape(*lead, rows * self.block, columns * self.block)

    def unit_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a matrix in units."""
        return shape if self.block == 1 else (*shape[:-2], shape[-2] // self.block, shape[-1] // self.block)

    def select(
        self, scores: jax.Array, k: jax.Array | int, target: jax.Array | int, *, among: jax.Array, taken: jax.Array
    ) -> jax.Array:
        """The k units of largest score that fit beside `taken`, ties by lowest index.

        Args:
          scores: of units.
          k: how many.
          target: active units in the end; at N:M, more than its share means that the matrix is dense.
          among: candidates.
          taken: units that are active already.

        Returns:
          bool of the shape of `scores`. Greedy over groups with room is the best choice of k: the groups are disjoint.
        """
        if self.m > 1:
            limit = jnp.where(jnp.asarray(target) > scores.size // self.m * self.n, self.m, self.n)
            room = limit - jnp.sum(self._in_groups(taken), axis=-2, keepdims=True, dtype=jnp.int32)
            among = among & (self._rank_in_group(scores, among) < room).reshape(among.shape)
        return select_top_k(scores, k, among)

    def _rank_in_group(self, scores: jax.Array, among: jax.Array) -> jax.Array:
        """How many candidates of its group go before each unit, by comparing all pairs: M is small."""
        keys = order_keys(scores)
        keys = self._in_groups(jnp.where(among, keys, jnp.iinfo(keys.dtype).min))
        rank = jnp.zeros(keys.shape, jnp.int32)
        for i in range(self.m):
            other, later = keys[..., i : i + 1, :], jnp.arange(self.m)[:, None] > i
            later = later.reshape((1,) * (keys.ndim - 2) + later.shape)
            rank += (other > keys) | ((other == keys) & later)
        return rank

    def _in_groups(self, units: jax.Array) -> jax.Array:
        *lead, rows, columns = units.shape
        return units.reshape(*lead, rows // self.m, self.m, columns)

    def _in_blocks(self, weights: jax.Array) -> jax.Array:
        *lead, rows, columns = weights.shape
        return weights.reshape(*lead, rows // self.block, self.block, columns // self.block, self.block)

    def __str__(self) -> str:
        return f"block{self.block}" if self.block > 1 else f"{self.n}:{self.m}" if self.m > 1 else "unstructured"


@cache
def parse_pattern(name: str) -> Pattern:
    """The pattern of a name.

    Raises:
      InputError: a name that is none.

    >>> parse_pattern("2:4").n, parse_pattern("block64").unit_size
    (2, 4096)
    """
    if name == "unstructured":
        return Pattern()
    if found := re.fullmatch(r"(\d+):(\d+)", name):
        n, m = map(int, found.groups())
        if 0 < n < m <= 32:
            return Pattern(n=n, m=m)
    elif (found := re.fullmatch(r"block(\d+)", name)) and int(found[1]) > 1:
        return Pattern(block=int(found[1]))
    raise InputError(f"pattern: {name!r} is not 'unstructured', 'N:M' with 0 < N < M <= 32, or 'blockB' with B > 1")
