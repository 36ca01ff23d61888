"""The same numbers as pycocoevalcap gives here and now, where it (and Java, for its tokenizer and METEOR) is installed."""

# ruff: noqa: RUF001  (the look-alikes of quotes and dashes are the subject)
import random
import shutil

import pytest
from test_metrics import HYPOTHESES, PTB_TOKENS, REFERENCES

from spdf_jax.evals.metric_overlap import cider_d, rouge_l
from spdf_jax.evals.metrics import score_texts
from spdf_jax.evals.ptb import ptb_tokens

pytestmark = pytest.mark.slow
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="no java on the PATH")

# What generated text looks like: made from parts, so that every kind of token meets every kind of neighbour.
PARTS = """
    the The It a in is isn't won't they're John's boys' O'Neil family-friendly state-of-the-art U.S. U.K.'s Mr. Inc. St. No. no.
    A. K. p.m. etc. e.g. Ph.D. £20-25 £30, €5 $5.50 US$ 10% 2,386 2702.0 -1.5 1990s '90s 10:30 10:30pm 14L/32R 1/2/2012 ½ 1.8g
    5 5. 5, . , ; : ! ? ... -- - – — … ( ) [ ] (UK) "quoted" 'single' “curly” don’t it’s cannot gonna 'tis AT&T B&B a&b &amp;
    naïve Suárez Madrid–Barajas and/or x.com end. next, first; Madrid.The #tag @user C# C++ * a_b 100°C km² ?! center.,
"""


def random_corpus(seed: int) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Short texts over few words, so that words repeat; some empty, some equal to a reference."""
    rng = random.Random(seed)
    instances = rng.choice([1, 2, 20])

    def text() -> list[str]:
        return rng.choices("abcdefg"[: rng.choice([2, 7])], k=rng.randrange(14))

    references = [[text() for _ in range(rng.randrange(1, 9))] for _ in range(instances)]
    return [rng.choice([text(), rng.choice(refs)]) for refs in references], references


def captions(hypotheses, references):
    """pycocoevalcap's layout: tokens joined by spaces, one key an instance."""
    joined = {i: [" ".join(ref) for ref in refs] for i, refs in enumerate(references)}
    return joined, {i: [" ".join(hypothesis)] for i, hypothesis in enumerate(hypotheses)}


@pytest.mark.parametrize("seed", range(60))
def test_rouge_l_and_cider_equal_pycocoevalcap(seed):
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge")
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    hypotheses, references = random_corpus(seed)
    truth = captions(hypotheses, references)
    assert rouge_l(hypotheses, references) == pytest.approx(rouge.Rouge().compute_score(*truth)[0], abs=1e-9)
    if any(ref for refs in references for ref in refs):  # it refuses a corpus without any word
        assert cider_d(hypotheses, references) == pytest.approx(cider.Cider().compute_score(*truth)[0], abs=1e-9)


@needs_java
def test_ptb_tokens_equal_stanfords():
    """The fast table exactly; of random strings of parts, which are far harder than text, 99 of 100."""
    module = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    rng = random.Random(0)
    known = [text for text, _ in PTB_TOKENS] + HYPOTHESES + [ref for refs in REFERENCES for ref in refs]
    drawn = [" ".join(rng.choices(PARTS.split(), k=8)) for _ in range(1000)]
    # A line of its own between the texts: whether a last period ends a sentence depends on the next line.
    lines = [line for text in known + drawn for line in (text, "and")]
    truth = module.PTBTokenizer().tokenize({i: [{"caption": line}] for i, line in enumerate(lines)})
    truth = [truth[i][0].split(" ") if truth[i][0] else [] for i in range(0, len(lines), 2)]
    ours = [ptb_tokens(text) for text in known + drawn]
    assert ours[: len(known)] == truth[: len(known)]
    wrong = [(text, a, b) for text, a, b in zip(known + drawn, ours, truth, strict=True) if a != b]
    assert len(wrong) <= 10, wrong[:5]


@needs_java
def test_meteor_equals_pycocoevalcap():
    module = pytest.importorskip("pycocoevalcap.meteor.meteor")
    ours = score_texts(HYPOTHESES, REFERENCES, style="e2e")["meteor"]
    ptb = [ptb_tokens(text) for text in HYPOTHESES], [[ptb_tokens(ref) for ref in refs] for refs in REFERENCES]
    scorer = module.Meteor()
    try:
        truth, _ = scorer.compute_score(*captions(*ptb))
    finally:
        scorer.meteor_p.stdout.close()
        scorer.meteor_p.stderr.close()
    assert ours.value == truth
    assert ours.value == pytest.approx(0.460090261075115, abs=1e-6)
