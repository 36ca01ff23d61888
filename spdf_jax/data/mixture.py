"""Several sources in one run, each with its share of the examples: `data.mixture`.

    data/web=0.7,data/code=0.3

Which source an example is of follows from its number alone, so that any process finds it, at any start: after as many examples
as the shares sum to in whole numbers (here 10) the proportions are exact, and never an example or so from it. Each source is
read in an order of its own, every window once before any twice.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import cast

import numpy as np

from spdf_jax.data.token_files import Shards, TokenData
from spdf_jax.errors import InputError

_FORM = "write each source with its share, as in data/web=0.7,data/code=0.3"
_LARGEST_SHARE = 10**9


class Mixture(Shards):
    """The training tokens of several sources: drawn from in turn where batches are made, elsewhere one after another.

    Attributes:
      shares: of each source by its name, in whole numbers without a common divisor.
      parts: the tokens of each.
    """

    def __init__(self, parts: Sequence[np.ndarray], shares: Mapping[str, int]):
        super().__init__(parts)
        self.shares = shares

    def epochs(self, seq_len: int, examples: int) -> dict[str, float]:
        """How often so many examples, of `seq_len` positions, pass over each source."""
        total = sum(self.shares.values())
        return {
            name: examples * share / total / windows_of(part, seq_len)
            for (name, share), part in zip(self.shares.items(), self.parts, strict=True)
        }


def windows_of(tokens: np.ndarray, seq_len: int) -> int:
    """How many examples of `seq_len` positions there are in as many tokens."""
    return (len(tokens) - 1) // seq_len


def read_shares(mixture: str) -> dict[str, int]:
    """The sources that `data.mixture` names, and their shares.

    Args:
      mixture: see above. Shares need not sum to 1.

    Returns:
      Shares in whole numbers without a common divisor.

    Raises:
      InputError: what is not so written, a share that is no number above 0, or a source that is named twice.

    >>> read_shares("data/web=0.7, data/code=0.3")
    {'data/web': 7, 'data/code': 3}
    """
    found: dict[str, Fraction] = {}
    for part in mixture.split(","):
        name, _, share = (text.strip() for text in part.rpartition("="))
        try:
            value = Fraction(share) if name and "/" not in share else Fraction(0)
        except ValueError:
            value = Fraction(0)
        if not 0 < value < _LARGEST_SHARE or value.denominator > _LARGEST_SHARE:
            raise InputError(
                f"data.mixture={mixture!r}: {part.strip()!r} has no share that is a number above 0; {_FORM}"
            )
        if name in found:
            raise InputError(f"data.mixture={mixture!r}: names {name!r} twice; give it one share")
        found[name] = value
    scale = math.lcm(*(value.denominator for value in found.values()))
    whole = [int(value * scale) for value in found.values()]
    return {name: share // math.gcd(*whole) for name, share in zip(found, whole, strict=True)}


def turn(shares: Sequence[int], index: int) -> tuple[int, int]:
    """Which source an example of a mixture is of.

    Args:
      shares: of each source, in whole numbers.
      index: of the example, from 0.

    Returns:
      The source, and how many examples before this one were of it.

    >>> [turn([2, 1], index) for index in range(6)]
    [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    """
    total = sum(shares)
    # The largest of the sources that are left, against all others together: its share of the number, to the nearest.
    for source, share in sorted(enumerate(shares), key=lambda item: -item[1]):
        before, after = ((2 * n * share + total) // (2 * total) for n in (index, index + 1))
        if after > before:
            return source, before
        index, total = index - before, total - share
    raise AssertionError("the last source has all that is left")


def mixed(parts: Mapping[str, TokenData], shares: Mapping[str, int]) -> TokenData:
    """One text of several: training tokens by share, all validation tokens.

    Args:
      parts: by their names.
      shares: of each.

    Raises:
      InputError: sources of different tokenizers.
    """
    first, *others = parts
    for other in others:
        spelled = [part.tokenizer.to_str() if part.tokenizer else "" for part in (parts[first], parts[other])]
        if spelled[0] != spelled[1]:
            raise InputError(
                f"data.mixture: {first!r} and {other!r} come with different tokenizers, by which the same id means different "
                f"text; name the one that made both by data.tokenizer, or encode one of them anew"
            )
    data = list(parts.values())
    n_bytes = [part.validation_bytes for part in data]
    identity = [[part.fingerprint, shares[name]] for name, part in parts.items()]
    return TokenData(
        train=cast(np.ndarray, Mixture([part.train for part in data], shares)),
        validation=cast(np.ndarray, Shards([part.validation for part in data])),
        tokenizer=data[0].tokenizer,
        vocab_size=max(part.vocab_size for part in data),
        fingerprint=hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
        validation_bytes=None if None in n_bytes else sum(n for n in n_bytes if n is not None),
    )
