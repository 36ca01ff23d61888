"""N-gram and subsequence overlap of token lists: NIST, ROUGE-L, CIDEr-D.

Every function takes one hypothesis and one list of references an instance, all tokenised, and returns the corpus score.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence

Tokens = Sequence[str]
Ngram = tuple[str, ...]


def _ngrams(tokens: Tokens, longest: int) -> Iterator[Ngram]:
    for n in range(1, longest + 1):
        yield from zip(*(tokens[i:] for i in range(n)), strict=False)


def nist(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], longest: int = 5) -> float:
    """NIST: matched n-grams weighted by how much their last word says after the words before it.

    Source: Doddington, 2002, as in mteval-v13a (moses-smt/mosesdecoder, scripts/generic/mteval-v13a.pl). A hypothesis' n-gram
    counts at most as often as it is in the reference that has it most often; information is estimated from all references; the
    brevity penalty compares the mean length of the hypotheses with that of all references that are not empty, and is 0.5 at two
    thirds of it.

    Args:
      hypotheses: tokens of one text an instance.
      references: tokens of one or more texts an instance.
      longest: largest n.

    Returns:
      The score, 0 or more, in bits.

    >>> nist([["a", "b"]], [[["a", "b"]], ])  # two words of 1 bit each; "b" after "a" is no news
    1.0
    """
    counts = Counter(ngram for refs in references for ref in refs for ngram in _ngrams(ref, longest))
    counts[()] = sum(len(ref) for refs in references for ref in refs)
    bits, total = [0.0] * longest, [0] * longest
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        most: Counter[Ngram] = Counter()
        for ref in refs:
            most |= Counter(_ngrams(ref, longest))
        for ngram, count in Counter(_ngrams(hypothesis, longest)).items():
            total[len(ngram) - 1] += count
            if matches := min(count, most[ngram]):
                # To the Perl script a "0" alone before the last word is false: as if no word were before it.
                before = () if ngram[:-1] == ("0",) else ngram[:-1]
                bits[len(ngram) - 1] += matches * math.log2(counts[before] / counts[ngram])
    if not total[0] or not counts[()]:
        return 0.0
    filled = sum(bool(ref) for refs in references for ref in refs)
    short = min(1.0, total[0] / len(hypotheses) / (counts[()] / filled))
    penalty = math.exp(math.log(0.5) * (math.log(short) / math.log(1.5)) ** 2)
    return penalty * sum(b / t for b, t in zip(bits, total, strict=True) if t)


def _longest_common_subsequence(a: Tokens, b: Tokens) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2) -> float:
    """ROUGE-L: F-measure of the longest common subsequence, mean over instances.

    Source: Lin, 2004, as in pycocoevalcap 1.2 (`rouge.Rouge`): the best precision and the best recall are each taken over
    the references, so they may come from different ones; a text without tokens counts as one empty token.

    Args:
      hypotheses: tokens of one text an instance.
      references: tokens of one or more texts an instance.
      beta: weight of recall against precision.

    Returns:
      The score in [0, 1].

    >>> round(rouge_l([["a", "b"]], [[["a"], ["x", "a", "y", "b"]]]), 6)  # precision 2/2, recall 1/1
    1.0
    """
    scores = []
    for hypothesis, refs in zip(hypotheses, references, strict=True):
        hypothesis, refs = hypothesis or [""], [ref or [""] for ref in refs]
        common = [_longest_common_subsequence(hypothesis, ref) for ref in refs]
        precision = max(common) / len(hypothesis)
        recall = max(c / len(ref) for c, ref in zip(common, refs, strict=True))
        scores.append((1 + beta**2) * precision * recall / (recall + beta**2 * precision) if precision else 0.0)
    return sum(scores) / len(scores)


def cider_d(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]], longest: int = 4, sigma: float = 6.0
) -> float:
    """CIDEr-D: TF-IDF cosine of n-grams, clipped, times a Gaussian of the difference in length; mean over n, times 10.

    Source: Vedantam et al., 2015 (arXiv 1411.5726), as in pycocoevalcap 1.2 (`cider.Cider`): document frequencies come from
    `references`, one instance a document. One instance alone scores 0: every n-gram is in every document.

    Args:
      hypotheses: tokens of one text an instance.
      references: tokens of one or more texts an instance.
      longest: largest n.
      sigma: of the Gaussian, in tokens.

    Returns:
      The score in [0, 10].

    >>> cider_d([["a"], ["b"]], [[["a"]], [["b"]]], longest=1)
    10.0
    """
    frequencies = Counter(
        ngram for refs in references for ngram in {ngram for ref in refs for ngram in _ngrams(ref, longest)}
    )

    def weigh(tokens: Tokens) -> list[dict[Ngram, float]]:
        vectors: list[dict[Ngram, float]] = [{} for _ in range(longest)]
        for ngram, count in Counter(_ngrams(tokens, longest)).items():
            vectors[len(ngram) - 1][ngram] = count * math.log(len(references) / max(1, frequencies[ngram]))
        return vectors

    def norm(vector: dict[Ngram, float]) -> float:
        return math.sqrt(sum(weight**2 for weight in vector.values()))

    def similarity(hypothesis: Tokens, ref: Tokens) -> float:
        cosines = 0.0
        for ours, theirs in zip(weigh(hypothesis), weigh(ref), strict=True):
            if norms := norm(ours) * norm(theirs):
                shared = ours.keys() & theirs.keys()
                cosines += sum(min(ours[ngram], theirs[ngram]) * theirs[ngram] for ngram in shared) / norms
        difference = len(hypothesis) - len(ref)
        return cosines / longest * math.exp(-(difference**2) / (2 * sigma**2))

    scores = [
        sum(similarity(hypothesis, ref) for ref in refs) / len(refs)
        for hypothesis, refs in zip(hypotheses, references, strict=True)
    ]
    return 10 * sum(scores) / len(scores)
