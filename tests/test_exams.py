"""Professional exams: what is read, which choice counts as given, who passes, and what our own set promises."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest

from spdf_jax.errors import InputError
from spdf_jax.evals.exam_questions import SHIPPED_QUESTIONS, Question, read_questions
from spdf_jax.evals.exams import CertificationResult, ExamResults, take_exams

ROW = {
    "certification": "Baker",
    "field": "food",
    "question": "What makes dough rise?",
    "choices": ["salt", "yeast", "sand"],
    "answer": "B",
}


def write(path: Path, *rows: dict | str) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def exam(certification: str, n: int, *, field: str = "food", human_score: float | None = None) -> list[Question]:
    """`n` questions of two choices; the answer is the second."""
    return [Question(certification, field, f"{certification} {i}?", ("no", "yes"), 1, human_score) for i in range(n)]


def right_on_first(n_by_certification: dict[str, int]):
    """A scorer that prefers the answer of `exam` on the first so many questions of each certification."""

    def log_likelihoods(pairs):
        scores = []
        for context, continuation in pairs:
            certification, number = context.removeprefix("Question: ").split("?")[0].split()
            wanted = " yes" if int(number) < n_by_certification[certification] else " no"
            scores.append((-1.0 if continuation == wanted else -2.0, 1))
        return scores

    return log_likelihoods


class Table:
    """A scorer that looks (sum of log-probabilities, tokens) up by the continuation, and remembers what it was asked."""

    def __init__(self, scores):
        self.scores = scores
        self.calls = []

    def __call__(self, pairs):
        self.calls.append(list(pairs))
        return [self.scores[continuation] for _, continuation in pairs]


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_a_choice_scores_its_mean_log_probability_a_token():
    """Sums -4, -6, -9 prefer the first; means -2, -1.5, -3 the second."""
    question = Question("Baker", "food", "What makes dough rise?", ("salt", "dry yeast", "sand"), 1)
    scorer = Table({" salt": (-4.0, 2), " dry yeast": (-6.0, 4), " sand": (-9.0, 3)})
    assert take_exams([question], scorer).certifications[0].correct == 1
    context = "Question: What makes dough rise?\nAnswer:"
    assert scorer.calls == [[(context, " salt"), (context, " dry yeast"), (context, " sand")]]


def test_letter_mode_lists_the_choices_and_compares_the_sums_of_the_letters():
    """Sums -3, -2.5, -4 prefer B; means would prefer A."""
    question = Question("Baker", "food", "What makes dough rise?", ("salt", "yeast", "sand"), 1)
    scorer = Table({" A": (-3.0, 3), " B": (-2.5, 1), " C": (-4.0, 1)})
    results = take_exams([question], scorer, "letter")
    assert (results.mode, results.certifications[0].correct) == ("letter", 1)
    context = "Question: What makes dough rise?\nA. salt\nB. yeast\nC. sand\nAnswer:"
    assert scorer.calls == [[(context, " A"), (context, " B"), (context, " C")]]


@pytest.mark.parametrize("mode", ["length", "letter"])
@pytest.mark.parametrize(("answer", "correct"), [(0, 0), (1, 1), (2, 0)])
def test_of_equal_scores_the_first_choice_counts(mode, answer, correct):
    question = Question("Baker", "food", "Which?", ("A", "B", "C"), answer)
    scorer = Table({" A": (-3.0, 1), " B": (-2.0, 1), " C": (-2.0, 1)})
    assert take_exams([question], scorer, mode).certifications[0].correct == correct


def test_a_choice_of_probability_zero_can_be_compared():
    question = Question("Baker", "food", "Which?", ("A", "B"), 1)
    assert take_exams([question], Table({" A": (-float("inf"), 1), " B": (-50.0, 1)})).certifications[0].correct == 1


def test_questions_of_a_certification_need_not_stand_together():
    questions = [q for pair in zip(exam("Baker", 3), exam("Cook", 3), strict=True) for q in pair]
    results = take_exams(questions, right_on_first({"Baker": 3, "Cook": 1}))
    assert [(r.certification, r.questions, r.correct) for r in results.certifications] == [
        ("Baker", 3, 3),
        ("Cook", 3, 1),
    ]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([(-1.0, 1)], "1 scores for 2 pairs"),
        ([(-1.0, 1), (float("nan"), 1)], "nan over 1 tokens"),
        ([(-1.0, 1), (0.0, 0)], "0 tokens"),
    ],
)
def test_a_scorer_that_breaks_its_contract_is_named(scores, message):
    with pytest.raises(ValueError, match=message):
        take_exams(exam("Baker", 1), lambda pairs: scores)


def test_an_unknown_mode_and_no_questions_are_refused():
    with pytest.raises(InputError, match="mode 'longest' is not one of length, letter"):
        take_exams(exam("Baker", 1), right_on_first({"Baker": 1}), "longest")
    with pytest.raises(InputError, match="no questions"):
        take_exams([], right_on_first({}))


# --- marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "right", "passed"), [(10, 7, False), (10, 8, True), (100, 70, False), (100, 71, True)])
def test_exactly_70_percent_fails_and_more_passes(n, right, passed):
    (result,) = take_exams(exam("Baker", n), right_on_first({"Baker": right})).certifications
    assert (result.questions, result.correct, result.score, result.passed) == (n, right, right / n, passed)


def test_no_number_of_questions_passes_by_rounding():
    for n in range(10, 10_000, 10):
        assert not CertificationResult("Baker", "food", n, n * 7 // 10, 0.25).passed
        assert CertificationResult("Baker", "food", n, n * 7 // 10 + 1, 0.25).passed


@pytest.fixture
def results() -> ExamResults:
    """Baker 8/10 (people 0.7), Cook 2/4 (people unknown), Nurse 3/4 (people 0.9)."""
    questions = [
        *exam("Baker", 10, human_score=0.7),
        *exam("Cook", 4),
        *exam("Nurse", 4, field="health", human_score=0.9),
    ]
    return take_exams(questions, right_on_first({"Baker": 8, "Cook": 2, "Nurse": 3}))


def test_marks_by_hand(results):
    overall = results.overall
    assert (overall.certifications, overall.passed, overall.passed_share) == (3, 2, 2 / 3)
    assert overall.score == pytest.approx((0.8 + 0.5 + 0.75) / 3)
    assert overall.guess_score == 0.5
    assert overall.human_compared == 2
    assert overall.human_compared_score == pytest.approx((0.8 + 0.75) / 2)
    assert overall.human_score == pytest.approx(0.8)
    assert list(results.by_field) == ["food", "health"]
    food, health = results.by_field["food"], results.by_field["health"]
    assert (food.certifications, food.passed, food.passed_share, food.human_compared) == (2, 1, 0.5, 1)
    assert food.score == pytest.approx(0.65)
    assert (food.human_compared_score, food.human_score) == (0.8, 0.7)
    assert (health.passed_share, health.score, health.human_score) == (1.0, 0.75, 0.9)


def test_marks_without_any_human_score():
    overall = take_exams(exam("Baker", 4), right_on_first({"Baker": 1})).overall
    assert (overall.human_compared, overall.human_compared_score, overall.human_score) == (0, None, None)


def test_as_dict_is_plain_and_complete(results):
    plain = json.loads(json.dumps(results.as_dict(), allow_nan=False))
    assert plain["mode"] == "length"
    assert plain["overall"] == dataclasses.asdict(results.overall)
    assert [row["field"] for row in plain["fields"]] == ["food", "health"]
    assert plain["fields"][1]["passed_share"] == 1.0
    assert plain["certifications"][1] == {
        "certification": "Cook",
        "field": "food",
        "questions": 4,
        "correct": 2,
        "guess_score": 0.5,
        "human_score": None,
        "score": 0.5,
        "passed": False,
    }


def test_the_table_says_it_all(results):
    lines = results.table().split("\n")
    assert "| Baker | food | 10 | 8 | 80.0 % | yes | 70.0 % |" in lines
    assert "| Cook | food | 4 | 2 | 50.0 % | no |  |" in lines
    assert "| food | 2 | 1 | 50.0 % | 65.0 % |" in lines
    assert lines[-2].startswith("Passed 2 of 3 certifications (66.7 %) at over 70 % correct; mean score 68.3 %")
    assert lines[-1] == "On the 2 with a human score: 77.5 %, people 80.0 %."


def test_a_name_cannot_break_the_table():
    result = CertificationResult("A|B\nC", "food", 1, 1, 0.5)
    assert r"| A\|B C | food | 1 | 1 | 100.0 % | yes |  |" in ExamResults("length", (result,)).table().split("\n")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_says(tmp_path):
    rows = [
        {**ROW, "answer": " b ", "human_score": 1},
        "",
        {**ROW, "question": "  What is é?  ", "answer": 2},
        {**ROW, "certification": "Cook", "answer": "A", "human_score": None},
    ]
    choices = ("salt", "yeast", "sand")
    assert read_questions(write(tmp_path / "q.jsonl", *rows)) == (
        Question("Baker", "food", "What makes dough rise?", choices, 1, 1.0),
        Question("Baker", "food", "What is é?", choices, 2, None),
        Question("Cook", "food", "What makes dough rise?", choices, 0, None),
    )


def test_a_human_score_given_in_any_line_is_the_certification_s(tmp_path):
    rows = [ROW, {**ROW, "question": "And now?", "human_score": 0.6}]
    questions = read_questions(write(tmp_path / "q.jsonl", *rows))
    (result,) = take_exams(questions, lambda pairs: [(-1.0, 1)] * len(pairs)).certifications
    assert (result.human_score, result.guess_score) == (0.6, pytest.approx(1 / 3))


def test_the_same_wording_with_other_choices_is_another_question(tmp_path):
    rows = [ROW, {**ROW, "choices": ["rye", "wheat", "oats"]}]
    assert len(read_questions(write(tmp_path / "q.jsonl", *rows))) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"certification": ', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "a JSON list, not an object"),
        ({k: v for k, v in ROW.items() if k not in ("field", "answer")}, "no field, answer; the keys are"),
        ({**ROW, "human_scores": 0.5}, "unknown human_scores; the keys are"),
        ({**ROW, "question": "  "}, "question '  ' must be a text"),
        ({**ROW, "certification": 7}, "certification 7 must be a text"),
        ({**ROW, "question": "half \ud83d"}, "surrogate"),
        ({**ROW, "choices": ["yeast"], "answer": "A"}, r"choices \['yeast'\] must be a list of 2 to 26"),
        ({**ROW, "choices": [str(i) for i in range(27)]}, "must be a list of 2 to 26"),
        ({**ROW, "choices": "abc"}, "choices 'abc' must be a list"),
        ({**ROW, "choices": ["a", 2, "c"]}, r"choices\[1\] 2 must be a text"),
        ({**ROW, "choices": ["a", "b", " a"]}, r"choices\[2\] 'a' comes twice"),
        ({**ROW, "answer": "D"}, "answer 'D' is none of the 3 choices; give a letter from A to C or .* 0 to 2"),
        ({**ROW, "answer": 3}, "answer 3 is none of the 3 choices"),
        ({**ROW, "answer": -1}, "answer -1 is none"),
        ({**ROW, "answer": True}, "answer True is none"),
        ({**ROW, "answer": 1.0}, "answer 1.0 is none"),
        ({**ROW, "answer": "yeast"}, "answer 'yeast' is none"),
        ({**ROW, "answer": ""}, "answer '' is none"),
        ({**ROW, "answer": "1"}, "answer '1' is none"),
        ({**ROW, "human_score": 70}, "human_score 70 must be a share from 0 to 1"),
        ({**ROW, "human_score": float("nan")}, "human_score nan must be a share"),
        ({**ROW, "human_score": "0.7"}, "human_score '0.7' must be a share"),
        ({**ROW, "human_score": True}, "human_score True must be a share"),
        ({**ROW, "question": "Why?", "human_score": 0.6}, r"human_score 0.6 of 'Baker' was 0.5 in line 1"),
        ({**ROW, "question": "Why?", "field": "health"}, "field 'health' of 'Baker' was 'food' in line 1"),
        ({**ROW, "question": "What  makes dough rise? "}, "already in line 1"),
        ({**ROW, "choices": ["sand", "salt", "yeast"]}, "already in line 1"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, line, message):
    path = write(tmp_path / "mine.jsonl", {**ROW, "human_score": 0.5}, "", line)
    with pytest.raises(InputError, match=rf"mine\.jsonl: line 3: .*{message}") as error:
        read_questions(path)
    assert "\n" not in str(error.value)


def test_files_that_hold_no_questions_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.jsonl: cannot be read \(No such file"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="cannot be read"):
        read_questions(tmp_path)
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no question"):
        read_questions(write(tmp_path / "empty.jsonl", "", "  "))
    (tmp_path / "latin.jsonl").write_bytes(json.dumps(ROW).encode() + b'\n{"question": "\xe9"}\n')
    with pytest.raises(InputError, match=r"latin\.jsonl: line 2: not UTF-8 at byte 14"):
        read_questions(tmp_path / "latin.jsonl")


# --- our own set -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped() -> tuple[Question, ...]:
    return read_questions()


def test_the_shipped_set_is_as_large_as_promised(shipped):
    counts = Counter(q.certification for q in shipped)
    assert len(shipped) == 144
    assert len(counts) == 12
    assert set(counts.values()) == {12}
    assert len({q.field for q in shipped}) >= 6
    assert {len(q.choices) for q in shipped} == {4}
    assert {q.human_score for q in shipped} == {None}, "nobody sat them"
    assert len({q.question for q in shipped}) == len(shipped), "unique over all certifications"


def test_shipped_questions_can_be_answered_without_seeing_the_choices(shipped):
    for q in shipped:
        assert q.question[-1] == "?"
        assert not {"following", "these", "below"} & set(q.question.lower().replace("?", "").split()), q.question
        assert not any(choice.lower().startswith(("all of", "none of")) for choice in q.choices)


def test_shipped_answers_are_spread_evenly_over_the_letters(shipped):
    assert Counter(q.answer for q in shipped) == dict.fromkeys(range(4), 36)
    assert set(Counter((q.certification, q.answer) for q in shipped).values()) == {3}


@pytest.mark.parametrize("preferred", [max, min])
def test_the_length_of_a_choice_gives_no_shipped_answer_away(shipped, preferred):
    """Choosing by length alone, at random among equals, does no better than guessing and passes nothing."""
    scores: Counter[str] = Counter()
    for q in shipped:
        lengths = [len(choice) for choice in q.choices]
        if lengths[q.answer] == preferred(lengths):
            scores[q.certification] += 1 / lengths.count(preferred(lengths))
    assert sum(scores.values()) <= 0.28 * len(shipped)
    assert max(scores.values()) <= 0.7 * 12


def test_the_shipped_file_marks_an_oracle_and_a_guesser_as_they_deserve(shipped):
    answers = {(q.question, f" {q.choices[q.answer]}") for q in shipped}

    def oracle(pairs):
        asked = [(context.removeprefix("Question: ").removesuffix("\nAnswer:"), choice) for context, choice in pairs]
        return [(-1.0 if pair in answers else -2.0, 1) for pair in asked]

    assert take_exams(shipped, oracle).overall.passed_share == 1.0
    always_first = take_exams(shipped, lambda pairs: [(-1.0, 1)] * len(pairs)).overall
    assert (always_first.passed, always_first.score, always_first.guess_score) == (0, 0.25, 0.25)


def test_the_shipped_file_is_plain_ascii_beside_the_module():
    assert SHIPPED_QUESTIONS.parent.name == "evals"
    assert SHIPPED_QUESTIONS.read_bytes().isascii()
