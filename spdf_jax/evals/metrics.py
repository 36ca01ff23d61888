"""Scores of generated text against references: BLEU, NIST, ROUGE-L, CIDEr, METEOR, TER.

    scores = score_texts(["The Mill is cheap ."], [["The Mill is a cheap pub.", "The Mill is cheap."]], style="e2e")
    scores["bleu"].value, scores["bleu"].signature

Which definition of each, and why, is in `score_texts`; every `Score` carries what it depends on.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import zip_longest
from typing import NamedTuple, TypeVar

import sacrebleu
from sacrebleu.metrics import BLEU, TER
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from spdf_jax.errors import InputError
from spdf_jax.evals.metric_meteor import MeteorAbsent, meteor_score
from spdf_jax.evals.metric_overlap import cider_d, nist, rouge_l
from spdf_jax.evals.ptb import ptb_tokens

A = TypeVar("A")
B = TypeVar("B")

STYLES = ("e2e", "webnlg", "dart")
_MOST_REFERENCES = 6  # that WebNLG and DART are scored with
_TOKENIZER_13A = Tokenizer13a()
_WORD = re.compile(r"\w+|[^\w\s]")


class Score(NamedTuple):
    """One corpus score.

    Attributes:
      value: the score, on the scale that its signature names; None where it could not be computed.
      signature: what it depends on: references an instance, case, tokens, parameters, version, scale.
      absent_because: why `value` is None.
    """

    value: float | None
    signature: str
    absent_because: str = ""


def score_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]], *, style: str) -> dict[str, Score]:
    """Scores texts as a data-to-text task does.

    | score | scale | tokens, all lower-cased | equal to |
    |---|---|---|---|
    | ``bleu`` | 0-100 | 13a; words in ``webnlg`` and ``dart`` | sacrebleu |
    | ``ter`` (``webnlg``, ``dart``) | 0-100 and above; lower is better | words | sacrebleu |
    | ``nist`` | bits, from 0 | 13a | mteval-v13a |
    | ``rouge_l`` | 0-1 | Penn Treebank | pycocoevalcap 1.2 |
    | ``cider`` (CIDEr-D) | 0-10 | Penn Treebank | pycocoevalcap 1.2 |
    | ``meteor`` | 0-1 | Penn Treebank; words in ``webnlg`` and ``dart`` | METEOR 1.5 ``-l en -norm`` |

    "Words" are runs of letters and digits; every other visible character stands by itself. Sources: the E2E challenge's scorer
    (tuetschek/e2e-metrics) for ``e2e``; LoRA's protocol (Hu et al., 2022; microsoft/LoRA, examples/NLG) for the others, which
    reads the first six references of an instance.

    Args:
      hypotheses: one text an instance.
      references: one or more texts an instance, as many as there are.
      style: ``e2e``, ``webnlg`` or ``dart``.

    Returns:
      ``{name: score}``. METEOR is absent, with the reason, where Java or its jar is missing.

    Raises:
      InputError: unknown style, no instances, lengths that differ, an instance without references.

    >>> score_texts(["It is cheap."], ["It is cheap."], style="e2e")
    Traceback (most recent call last):
      ...
    spdf_jax.errors.InputError: score_texts: references[0] is one text; give a list of texts, such as ['It is cheap.']
    """
    _check(hypotheses, references, style)
    if style != "e2e":
        references = [refs[:_MOST_REFERENCES] for refs in references]
    counts = {len(refs) for refs in references}
    sign = partial(_signature, nrefs=str(counts.pop()) if len(counts) == 1 else "var")
    ptb = _each(ptb_tokens, hypotheses, references)
    if style == "e2e":
        bleu = _sacrebleu(BLEU(lowercase=True, tokenize="13a", force=True), "", hypotheses, references)
        meteor = _meteor(sign(tok="ptb", version="meteor-1.5", scale="0-1"), *_each(" ".join, *ptb))
    else:
        words = _each(" ".join, *_each(_words, hypotheses, references))
        bleu = _sacrebleu(BLEU(lowercase=True, tokenize="none", force=True), "on:words|", *words)
        meteor = _meteor(sign(tok="words", version="meteor-1.5", scale="0-1"), *words)
    scores = {
        "bleu": bleu,
        "nist": Score(
            nist(*_each(_tokens_13a, hypotheses, references)),
            sign(tok="13a", ngrams="5", version=f"mteval-v13a+sacrebleu-{sacrebleu.__version__}", scale="bits"),
        ),
        "rouge_l": Score(rouge_l(*ptb), sign(tok="ptb", beta="1.2", version="pycocoevalcap-1.2", scale="0-1")),
        "cider": Score(cider_d(*ptb), sign(tok="ptb", sigma="6", version="pycocoevalcap-1.2", scale="0-10")),
        "meteor": meteor,
    }
    if style != "e2e":
        scores["ter"] = _sacrebleu(TER(), "on:words|", *words)
    return scores


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]], style: str) -> None:
    if style not in STYLES:
        raise InputError(f"score_texts: style {style!r} is not one of {STYLES}")
    if not hypotheses:
        raise InputError("score_texts: no hypotheses; give at least one text")
    if len(references) != len(hypotheses):
        raise InputError(
            f"score_texts: {len(references)} lists of references for {len(hypotheses)} hypotheses; give one list for each"
        )
    for i, refs in enumerate(references):
        if isinstance(refs, str):
            raise InputError(f"score_texts: references[{i}] is one text; give a list of texts, such as [{refs[:20]!r}]")
        if not refs:
            raise InputError(f"score_texts: references[{i}] is empty; give a reference, or leave the instance out")


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _tokens_13a(text: str) -> list[str]:
    return _TOKENIZER_13A(text.lower()).split()


def _each(
    f: Callable[[A], B], hypotheses: Sequence[A], references: Sequence[Sequence[A]]
) -> tuple[list[B], list[list[B]]]:
    return [f(hypothesis) for hypothesis in hypotheses], [[f(ref) for ref in refs] for refs in references]


def _signature(nrefs: str, **parts: str) -> str:
    return "|".join([f"nrefs:{nrefs}", "case:lc", *(f"{name}:{value}" for name, value in parts.items())])


def _sacrebleu(metric: BLEU | TER, note: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """`references` turned into sacrebleu's streams, the i-th of every instance, short lists padded with None."""
    value = metric.corpus_score(hypotheses, list(zip_longest(*references))).score
    return Score(float(value), f"{metric.get_signature()}|{note}scale:0-100")


def _meteor(signature: str, hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    try:
        return Score(meteor_score(hypotheses, references), signature)
    except MeteorAbsent as absent:
        return Score(None, signature, str(absent))
