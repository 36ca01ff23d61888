"""Text metrics against numbers that the reference libraries gave for the same texts, and against hand computation."""

# ruff: noqa: RUF001  (the look-alikes of quotes and dashes are the subject)
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from spdf_jax.errors import InputError
from spdf_jax.evals import metric_meteor
from spdf_jax.evals.metric_overlap import cider_d, nist, rouge_l
from spdf_jax.evals.metrics import score_texts
from spdf_jax.evals.ptb import ptb_tokens

HYPOTHESES = [
    "The Copper Kettle is a cheap coffee shop near the river.",
    "Blue Heron isn't family-friendly; it serves Thai food for £20-25.",
    "Mill Lane Inn has a rating of 3.5 out of 5 , and it is a pub",
    "",
    "It's the oldest bridge in the U.K. (built in 1779) (built in 1779).",
]
REFERENCES = [
    [
        "The Copper Kettle is a coffee shop by the river, and it is cheap.",
        "A cheap coffee shop near the river is The Copper Kettle.",
    ],
    ["Blue Heron is not family-friendly. It serves Thai food in the £20-25 range."],
    [
        "Mill Lane Inn is a pub rated 3.5 out of 5.",
        "The Mill Lane Inn pub has a rating of 3.5 out of 5.",
        "Rated 3.5 of 5, Mill Lane Inn is a pub.",
    ],
    ["There is nothing to say."],
    ["Built in 1779, it is the oldest bridge in the U.K.", "The oldest bridge of the UK was built in 1779."],
]

FAKE_JAVA = """#!{python}
import sys
if {dies}:
    sys.exit("line one\\nno memory")
assert sys.argv[1:3] == ["-Xmx2G", "-Dfile.encoding=UTF-8"] and sys.argv[-6:] == "- - -stdio -l en -norm".split()
for line in sys.stdin:
    kind, *fields = line.rstrip("\\n").split(" ||| ")
    if kind == "SCORE":
        print(len(fields) - 1, "of", fields[-1])
    else:
        assert fields == ["2 of how cheap is it", "1 of \u00e9"]
        print(0.25, 0.5, 0.375, sep="\\n")
    sys.stdout.flush()
"""


@pytest.fixture(autouse=True)
def jar(monkeypatch, tmp_path):
    """METEOR's jar installed, and no Java: whatever this machine has."""
    (tmp_path / "meteor-1.5.jar").touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(metric_meteor.importlib.util, "find_spec", lambda name: found)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "meteor-1.5.jar"


def install_java(folder: Path, *, dies: bool) -> None:
    java = folder / "java"
    java.write_text(FAKE_JAVA.format(python=sys.executable, dies=dies), encoding="utf-8")
    java.chmod(0o755)


def values(scores):
    return {name: score.value for name, score in scores.items()}


def test_e2e_scores_equal_the_reference_libraries():
    """BLEU: sacrebleu 2.6.0. ROUGE-L, CIDEr: pycocoevalcap 1.2 with its own tokenizer. NIST: see the tests by hand."""
    scores = values(score_texts(HYPOTHESES, REFERENCES, style="e2e"))
    assert list(scores) == ["bleu", "nist", "rouge_l", "cider", "meteor"]
    assert scores["bleu"] == pytest.approx(53.82349617689168, abs=1e-6)
    assert scores["rouge_l"] == pytest.approx(0.5527316230437936, abs=1e-9)
    assert scores["cider"] == pytest.approx(3.081832237924611, abs=1e-9)
    assert scores["nist"] == pytest.approx(4.883796031478935, abs=1e-9)


@pytest.mark.parametrize("style", ["webnlg", "dart"])
def test_webnlg_and_dart_scores_equal_sacrebleu_on_lower_cased_words(style):
    scores = values(score_texts(HYPOTHESES, REFERENCES, style=style))
    assert list(scores) == ["bleu", "nist", "rouge_l", "cider", "meteor", "ter"]
    assert scores["bleu"] == pytest.approx(53.11244800054077, abs=1e-6)
    assert scores["ter"] == pytest.approx(50.24630541871922, abs=1e-6)


def test_webnlg_reads_six_references_and_e2e_all():
    hypothesis, wrong = ["it is the only pub there"], [f"wrong {i} answer" for i in range(6)]
    seventh = [[*wrong, hypothesis[0]]]
    assert score_texts(hypothesis, seventh, style="webnlg") == score_texts(hypothesis, [wrong], style="webnlg")
    assert score_texts(hypothesis, seventh, style="webnlg")["bleu"].value < 50
    assert score_texts(hypothesis, seventh, style="e2e")["bleu"].value == pytest.approx(100)


def test_case_does_not_count():
    lower = [text.lower() for text in HYPOTHESES]
    assert values(score_texts(lower, REFERENCES, style="e2e")) == values(
        score_texts(HYPOTHESES, REFERENCES, style="e2e")
    )


def test_every_score_is_signed():
    e2e = score_texts(HYPOTHESES, REFERENCES, style="e2e")
    assert e2e["bleu"].signature.startswith("nrefs:var|case:lc|eff:no|tok:13a|smooth:exp|version:2.")
    assert e2e["bleu"].signature.endswith("|scale:0-100")
    assert e2e["rouge_l"].signature == "nrefs:var|case:lc|tok:ptb|beta:1.2|version:pycocoevalcap-1.2|scale:0-1"
    dart = score_texts(["a"], [["a", "b"]], style="dart")
    assert "nrefs:2|case:lc|tok:tercom" in dart["ter"].signature
    assert "|on:words|" in dart["bleu"].signature
    assert dart["meteor"].signature == "nrefs:2|case:lc|tok:words|version:meteor-1.5|scale:0-1"


@pytest.mark.parametrize(
    ("hypotheses", "references", "style", "message"),
    [
        (["a"], [["a"]], "rouge", "style 'rouge' is not one of"),
        ([], [], "e2e", "no hypotheses"),
        (["a", "b"], [["a"]], "e2e", "1 lists of references for 2 hypotheses"),
        (["a", "b"], [["a"], []], "dart", r"references\[1\] is empty"),
        (["a"], ["a"], "webnlg", r"references\[0\] is one text"),
    ],
)
def test_what_cannot_be_scored_is_refused(hypotheses, references, style, message):
    with pytest.raises(InputError, match=message):
        score_texts(hypotheses, references, style=style)


def test_nist_by_hand():
    """7 reference words: a 3, b 2, c 2; "a b" 2, "c a" 1. The second b of the first hypothesis is in no reference."""
    score = nist([["a", "b", "b"], ["c", "a"]], [[["a", "b", "c"], ["a", "b"]], [["c", "a"]]])
    one_word = (2 * math.log2(7 / 3) + 2 * math.log2(7 / 2)) / 5
    two_words = (math.log2(3 / 2) + math.log2(2 / 1)) / 3
    assert score == pytest.approx(one_word + two_words, rel=1e-12)


def test_nist_merges_the_counts_of_all_references():
    """Four words of 1 bit, two of three pairs of 1 bit; the best single reference alone would match half of that."""
    assert nist([["a", "a", "b", "b"]], [[["a", "a"], ["b", "b"]]]) == pytest.approx(1 + 2 / 3, rel=1e-12)


def test_nist_brevity_penalty_is_a_half_at_two_thirds_of_the_mean_length():
    assert nist([["a", "b"]], [[["a", "b", "c"]]]) == pytest.approx(0.5 * math.log2(3), rel=1e-12)
    two = [[["a", "b"], ["a", "b", "c", "d"]]]  # mean length 3, 6 words in all
    assert nist([["a", "b"]], two) == pytest.approx(0.5 * math.log2(6 / 2), rel=1e-12)
    assert nist([[]], [[["a", "b", "c"]]]) == 0
    assert nist([["a"]], [[[]]]) == 0


@pytest.mark.parametrize(
    ("hypotheses", "references", "score"),
    [
        pytest.param(
            ["the mill is a cheap pub by the river", "it serves french food"],
            [
                [
                    "the mill is a cheap pub by water",
                    "the mill pub by the river is cheap",
                    "a cheap pub by the river called mill",
                ],
                ["it serves french food of high quality and is rated five out of five there"],
            ],
            2.6548,
            id="three short references and a long one",
        ),
        pytest.param(
            ["the mill", "a pub by the river", "food"],
            [
                ["the mill is cheap"],
                ["a pub by the river side", "by the river there is a pub"],
                ["french food", "it serves food", "there is food in the pub by the river"],
            ],
            0.7145,
            id="one, two and three references",
        ),
        pytest.param(
            ["the mill is a cheap pub", "", "it serves french food"],
            [
                ["the mill is a cheap pub", "the mill is cheap"],
                ["nothing to say"],
                ["it serves french food", "french food is served", "food from france"],
            ],
            4.0052,
            id="an empty hypothesis",
        ),
        pytest.param(
            ["the mill is a cheap pub", "it serves food"],
            [
                ["the mill is a cheap pub by the river", "the mill pub is cheap"],
                ["it serves french food", "french food is served here"],
            ],
            3.5105,
            id="equal counts",
        ),
        pytest.param(
            ["mill", "it"],
            [
                ["the mill is a cheap pub by the river"],
                ["it serves french food", "french food is what it serves", "food"],
            ],
            0.0001,
            id="short hypotheses",
        ),
        pytest.param(
            ["the mill is a cheap pub by the river and it is cheap", "it serves french food and french food"],
            [["the mill is a cheap pub"], ["it serves french food", "french food is what it serves"]],
            1.9236,
            id="long hypotheses",
        ),
        pytest.param(["the mill"], [["the mill is", ""]], 0.7925, id="an empty reference"),
        pytest.param(
            ["it is 0 point 5 and 0 more", "it is 1"], [["it is 0 point 5", "0 more or less"], ["1"]], 2.7613, id="a 0"
        ),
        pytest.param(HYPOTHESES, REFERENCES, 4.8838, id="the texts above"),
    ],
)
def test_nist_equals_mteval(hypotheses, references, score):
    """As printed, to four digits, by the E2E challenge's Perl script: in tuetschek/e2e-metrics at 1b9c4d8, on files as its
    ``create_mteval_file`` writes them, ``perl mteval/mteval-v13a-sig.pl -r ref.sgm -s src.sgm -t sys.sgm -f log``.
    """
    assert score_texts(hypotheses, references, style="e2e")["nist"].value == pytest.approx(score, abs=6e-5)


def test_rouge_l_by_hand():
    """Precision 2/2 from the second reference, recall 1/1 from the first; and 2/3 with 2/4, beta 1.2."""
    assert rouge_l([["a", "b"]], [[["a"], ["x", "a", "y", "b"]]]) == pytest.approx(1)
    f = (1 + 1.44) * (2 / 3) * (2 / 4) / (2 / 4 + 1.44 * 2 / 3)
    assert rouge_l([["a", "b", "c"], ["z"]], [[["b", "a", "x", "c"]], [["y"]]]) == pytest.approx(f / 2)
    assert rouge_l([[], []], [[["a"]], [[]]]) == 0.5  # as pycocoevalcap: two empty texts are equal


def test_cider_by_hand():
    """ln 2 each word, so it cancels: 2 a against a b is 1 / (2 sqrt 2); 1 a against 3 a is 1, two tokens shorter."""
    clipped = cider_d([["a", "a"], ["c"]], [[["a", "b"]], [["c"]]], longest=1)
    assert clipped == pytest.approx(10 * (1 / math.sqrt(8) + 1) / 2, rel=1e-12)
    shorter = cider_d([["a"], ["c"]], [[["a", "a", "a"]], [["c"]]], longest=1)
    assert shorter == pytest.approx(10 * (math.exp(-4 / 72) + 1) / 2, rel=1e-12)
    assert cider_d([["a"]], [[["a"]]]) == 0  # one document: no word tells anything


PTB_TOKENS = [
    ("It costs £20-25 or €30, i.e. 10% less.", "it costs # 20-25 or $ 30 i.e. 10 % less"),
    ("I can't, won't; they'll've gone.", "i ca n't wo n't they 'll 've gone"),
    ("It’s John's and the boys' car — “new”…", "it 's john 's and the boys car new"),
    ("You cannot, 'tis gonna rain", "you can not 't is gon na rain"),
    ("(in [the] {box})", "-lrb- in -lsb- the -rsb- -lcb- box -rcb- -rrb-"),
    ("14L/32R, 1/2/2012, 1½ and 2,386.5", "14l/32r 1/2/2012 1 1/2 and 2,386.5"),
    ("Madrid–Barajas, a state-of-the-art x--y -5", "madrid barajas a state-of-the-art x y -5"),
    ("The U.S.-based Inc. of Mr. A. Smith, at 5 p.m.", "the u.s.-based inc. of mr. a. smith at 5 p.m."),
    ("No. 5 said no. Plan B. It won.", "no. 5 said no plan b it won"),
    ("Pa. is not a pa.", "pa. is not a pa"),
    ("Madrid.The end, Sc.D., 1.8g and 10:30pm", "madrid.the end sc.d. 1.8 g and 10:30 pm"),
    ("AT&amp;T, B&B and a&b", "at&t b&b and a & b"),
    ("O'Neil's o'clock, L'Engle, Hawai'i, y'all, '90s", "o'neil 's o'clock l'engle hawai'i y' all '90s"),
    ("me@x.org #tag C++ https://x.org/a?b=1, US$5 ?!", "me@x.org #tag c++ https://x.org/a?b=1 us$ 5 ?!"),
    ("naïve Suárez பாஞ்", "naïve suárez பாஞ்"),
    (" ... - ' `` ", ""),
]


@pytest.mark.parametrize(("text", "tokens"), PTB_TOKENS)
def test_ptb_tokens(text, tokens):
    """What pycocoevalcap 1.2 gives; `test_metrics_reference.py` asks it again."""
    assert ptb_tokens(text) == tokens.split()


def test_meteor_is_absent_without_java():
    score = score_texts(["a"], [["a"]], style="e2e")["meteor"]
    assert score.value is None
    assert "no java on the PATH" in score.absent_because


@pytest.mark.parametrize("missing", ["package", "jar"])
def test_meteor_is_absent_without_its_jar(monkeypatch, jar, missing):
    install_java(jar.parent, dies=False)
    if missing == "package":

        def find_spec(name):
            raise ModuleNotFoundError(name)

        monkeypatch.setattr(metric_meteor.importlib.util, "find_spec", find_spec)
    else:
        jar.unlink()
    score = score_texts(["a"], [["a"]], style="e2e")["meteor"]
    assert score.value is None
    assert "pip install pycocoevalcap" in score.absent_because


def test_meteor_asks_java_and_takes_the_corpus_score(jar):
    install_java(jar.parent, dies=False)
    score = score_texts(["How cheap is it?", "é"], [["Cheap.", "It |||is"], ["e"]], style="e2e")["meteor"]
    assert score == (0.375, "nrefs:var|case:lc|tok:ptb|version:meteor-1.5|scale:0-1", "")


def test_meteor_that_fails_is_absent_with_its_last_words(jar):
    install_java(jar.parent, dies=True)
    score = score_texts(["a"], [["a"]], style="e2e")["meteor"]
    assert score.value is None
    assert score.absent_because == "METEOR's Java program failed: no memory"
