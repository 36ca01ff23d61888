"""Tasks as arrays: pairs whose wanted tokens are single ones of a run's tokenizer.

Shape legend: P pairs, T tokens; the axis of 2 is that of a pair's prompts.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from spdf_jax.circuits.pairs import TASKS, Pair, library_pairs, template_pairs
from spdf_jax.data.tokenizer import Tokenizer, encode_plain, end_of_text_id
from spdf_jax.errors import InputError

_TRIES = 20  # times as many templates are drawn as are wanted, at most


class Prompts(NamedTuple):
    """A task's prompts, in the order drawn: each begins with the end of text, as documents do, and is padded on the right.

    Attributes:
      tokens_P2T: ids.
      last_P2: the place of the last of them, after which the wanted one comes.
      right_P2, wrong_P2: the id that is wanted there, and the one that is wanted after the other prompt of the pair.
      pairs: as text.
      left_out: how many were, since what is wanted is no single token there.
    """

    tokens_P2T: np.ndarray
    last_P2: np.ndarray
    right_P2: np.ndarray
    wrong_P2: np.ndarray
    pairs: Sequence[Pair] = ()
    left_out: int = 0

    def part(self, which: slice | np.ndarray) -> "Prompts":
        """The arrays of some of the pairs."""
        return Prompts(self.tokens_P2T[which], self.last_P2[which], self.right_P2[which], self.wrong_P2[which])


def prompts(name: str, tokenizer: Tokenizer, texts: Sequence[str], *, count: int, longest: int, seed: int) -> Prompts:
    """A task's pairs: up to half of them held-out code, the others from templates.

    Args:
      name: of `spdf_jax.circuits.pairs.TASKS`.
      tokenizer: the model's.
      texts: files of code that the model was not trained on.
      count: of pairs.
      longest: most tokens of a prompt; a longer one loses its beginning.
      seed: of what is drawn.

    Returns:
      `Prompts`.

    Raises:
      InputError: the tokenizer has too few.

    >>> from spdf_jax.data.tokenizer import train_tokenizer
    >>> tokenizer = train_tokenizer(["to be or not to be"], vocab_size=260, progress=False)
    >>> found = prompts("bracket", tokenizer, ["size = len(name)"], count=4, longest=64, seed=0)
    >>> found.tokens_P2T.shape[:2], found.pairs[0].answers
    ((4, 2), (')', ']'))
    """
    rng = np.random.default_rng(seed)
    library = library_pairs(name, iter(texts))
    kept, left_out = _encoded([library[i] for i in rng.permutation(len(library))], tokenizer, longest)
    kept = kept[: count // 2]
    drawn = itertools.islice(template_pairs(name, seed), _TRIES * count)
    candidates = iter(dict.fromkeys(drawn))
    while len(kept) < count and (some := list(itertools.islice(candidates, count - len(kept)))):
        more, lost = _encoded(some, tokenizer, longest)
        kept, left_out = kept + more, left_out + lost
    if len(kept) < count:
        wanted = " and ".join(map(repr, TASKS[name].answers))
        raise InputError(
            f"circuit task {name!r}: {wanted} are single tokens of the run's tokenizer in {len(kept):,} of "
            f"{len(kept) + left_out:,} pairs, and config.circuit.pairs is {count:,}; leave it out of config.circuit.tasks, or "
            f"train with a larger config.data.tokenizer_vocab_size"
        )
    kept = [kept[i] for i in rng.permutation(count)]
    tokens_P2T = np.zeros((count, 2, max(len(ids) for _, both, _ in kept for ids in both)), np.int32)
    for place, (_, both, _) in enumerate(kept):
        for side, ids in enumerate(both):
            tokens_P2T[place, side, : len(ids)] = ids
    last_P2 = np.array([[len(ids) - 1 for ids in both] for _, both, _ in kept], np.int32)
    right_P2 = np.array([wanted for *_, wanted in kept], np.int32)
    return Prompts(tokens_P2T, last_P2, right_P2, right_P2[:, ::-1], [pair for pair, *_ in kept], left_out)


def _encoded(
    pairs: Sequence[Pair], tokenizer: Tokenizer, longest: int
) -> tuple[list[tuple[Pair, list[list[int]], list[int]]], int]:
    """Ids of both prompts and of what each wants, and how many pairs are left out."""
    end, found = end_of_text_id(tokenizer), []
    before = encode_plain(tokenizer, [prompt for pair in pairs for prompt in pair.prompts])
    after = encode_plain(tokenizer, [p + a for pair in pairs for p, a in zip(pair.prompts, pair.answers, strict=True)])
    for i, pair in enumerate(pairs):
        both, whole = before[2 * i : 2 * i + 2], after[2 * i : 2 * i + 2]
        single = all(w[:-1] == ids for ids, w in zip(both, whole, strict=True))
        cut = [[end, *ids[-(longest - 1) :]] for ids in both]
        if single and cut[0] != cut[1]:
            found.append((pair, cut, [w[-1] for w in whole]))
    return found, len(pairs) - len(found)
