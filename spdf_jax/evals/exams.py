"""Professional exams: multiple-choice certifications, each passed at over 70 % correct.

Source: "Evaluating AI Vocational Skills Through Professional Testing" (2023), whose 1,149 certifications GPT-3 passed 39 % of.
A set of our own questions ships with the package so that the suite runs anywhere; nobody sat it, so it has no human scores, and
shares passed on it compare between our runs only. Real sets come by path, see `spdf_jax.evals.exam_questions`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh

from spdf_jax.data import end_of_text_id
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.evals.exam_questions import LETTERS, Question
from spdf_jax.evals.likelihood import log_likelihoods
from spdf_jax.evals.markdown import markdown_table
from spdf_jax.model.gpt import GPT

PASS_OVER_PERCENT = 70
MODES = ("length", "letter")

#: (context, continuation) pairs -> for each the sum of the continuation's log-probabilities in nats, and its tokens.
LogLikelihoods = Callable[[Sequence[tuple[str, str]]], Sequence[tuple[float, int]]]


@dataclasses.dataclass(frozen=True)
class CertificationResult:
    """How one certification went.

    >>> CertificationResult("Baker", "food", questions=10, correct=7, guess_score=0.25).passed  # 70 % is not over 70 %
    False

    Attributes:
      certification: its name.
      field: its field of work.
      questions: how many it has.
      correct: how many were answered right.
      guess_score: score to expect from answering at random.
      human_score: the score of people, if known.
    """

    certification: str
    field: str
    questions: int
    correct: int
    guess_score: float
    human_score: float | None = None

    @property
    def score(self) -> float:
        """Share of questions answered right."""
        return self.correct / self.questions

    @property
    def passed(self) -> bool:
        """Whether over 70 % were right, compared in whole numbers so that rounding decides no exam."""
        return 100 * self.correct > PASS_OVER_PERCENT * self.questions

    def as_dict(self) -> dict[str, Any]:
        """The result as plain values, `score` and `passed` among them."""
        return dataclasses.asdict(self) | {"score": self.score, "passed": self.passed}


@dataclasses.dataclass(frozen=True)
class Summary:
    """Several certifications together; every mean counts each certification once, whatever its number of questions.

    Attributes:
      certifications: how many.
      passed: how many of them were passed.
      passed_share: the same as a share.
      score: mean score.
      guess_score: mean score to expect from answering at random.
      human_compared: how many of them have a human score.
      human_compared_score: mean score over those, None if there are none.
      human_score: mean human score over those, None if there are none.
    """

    certifications: int
    passed: int
    passed_share: float
    score: float
    guess_score: float
    human_compared: int
    human_compared_score: float | None
    human_score: float | None


@dataclasses.dataclass(frozen=True)
class ExamResults:
    """What came out of all exams.

    Attributes:
      mode: how choices were scored, one of `MODES`.
      certifications: results in the order of the questions.
    """

    mode: str
    certifications: tuple[CertificationResult, ...]

    @property
    def overall(self) -> Summary:
        """All certifications together."""
        return _summary(self.certifications)

    @property
    def by_field(self) -> dict[str, Summary]:
        """The certifications of each field together, in the order of the questions."""
        fields = dict.fromkeys(result.field for result in self.certifications)
        return {field: _summary([r for r in self.certifications if r.field == field]) for field in fields}

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON and for a chart.

        Returns:
          `mode`; `overall`, a `Summary`; `fields`, a list of summaries, each with its `field`; `certifications`, a list of
          `CertificationResult` with `score` and `passed`.
        """
        return {
            "mode": self.mode,
            "overall": dataclasses.asdict(self.overall),
            "fields": [{"field": field} | dataclasses.asdict(summary) for field, summary in self.by_field.items()],
            "certifications": [result.as_dict() for result in self.certifications],
        }

    def table(self) -> str:
        """The results as Markdown: a row a certification, a row a field, and a closing sentence.

        >>> results = ExamResults("letter", (CertificationResult("Baker", "food", 8, 6, 0.25, human_score=0.7),))
        >>> print(results.table())
        | certification | field | questions | correct | score | passed | human score |
        | --- | --- | ---: | ---: | ---: | --- | ---: |
        | Baker | food | 8 | 6 | 75.0 % | yes | 70.0 % |
        <BLANKLINE>
        | field | certifications | passed | share passed | score |
        | --- | ---: | ---: | ---: | ---: |
        | food | 1 | 1 | 100.0 % | 75.0 % |
        <BLANKLINE>
        Passed 1 of 1 certifications (100.0 %) at over 70 % correct; mean score 75.0 %, guessing gives 25.0 % (letter mode).
        On the 1 with a human score: 75.0 %, people 70.0 %.
        """
        per_certification = markdown_table(
            ("certification", "field", "questions", "correct", "score", "passed", "human score"),
            "llrrrlr",
            [
                (r.certification, r.field, r.questions, r.correct, _percent(r.score), verdict, _percent(r.human_score))
                for r in self.certifications
                for verdict in ["yes" if r.passed else "no"]
            ],
        )
        per_field = markdown_table(
            ("field", "certifications", "passed", "share passed", "score"),
            "lrrrr",
            [
                (field, s.certifications, s.passed, _percent(s.passed_share), _percent(s.score))
                for field, s in self.by_field.items()
            ],
        )
        return f"{per_certification}\n\n{per_field}\n\n{self._closing_sentence()}"

    def _closing_sentence(self) -> str:
        s = self.overall
        text = (
            f"Passed {s.passed} of {s.certifications} certifications ({_percent(s.passed_share)}) at over "
            f"{PASS_OVER_PERCENT} % correct; mean score {_percent(s.score)}, guessing gives {_percent(s.guess_score)} "
            f"({self.mode} mode)."
        )
        if s.human_compared:
            scores = f"{_percent(s.human_compared_score)}, people {_percent(s.human_score)}"
            text += f"\nOn the {s.human_compared} with a human score: {scores}."
        return text


def exam_results(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    mode: str = "length",
    *,
    batch_size: int,
    mesh: Mesh | None = None,
) -> ExamResults:
    """Sits the exams with a model: `take_exams`, scored by `spdf_jax.evals.likelihood.log_likelihoods`.

    Args:
      model: `spdf_jax.GPT`.
      params: its parameters, masks applied.
      tokenizer: the model's.
      questions: the exams, as `read_questions` gives them.
      mode: ``length`` or ``letter``.
      batch_size: most choices scored at once; changes no result but for rounding.
      mesh: `spdf_jax.sharding.make_mesh`; None: wherever `params` are.

    Returns:
      The marks.

    Raises:
      InputError: as `take_exams` and `log_likelihoods` do.
    """

    def score(pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        end = end_of_text_id(tokenizer)
        found = log_likelihoods(model, params, tokenizer, pairs, batch_size=batch_size, end_of_text=end, mesh=mesh)
        return [(total, tokens) for total, tokens, _ in found]

    return take_exams(questions, score, mode)


def take_exams(questions: Sequence[Question], log_likelihoods: LogLikelihoods, mode: str = "length") -> ExamResults:
    """Answers every question with the choice that the scorer finds likeliest, and marks the exams.

    In mode ``length`` the scorer sees the question alone and a choice scores its mean log-probability **a token**. That is how
    the models of the source paper were evaluated by their makers (GPT-3, arXiv 2005.14165, section 2.4) and it undoes exactly
    what grows with length, the number of factors. It depends on the tokenizer, unlike the mean a byte or character of
    EleutherAI's harness (``acc_bytes``, ``acc_norm``): compare models of one tokenizer. In mode ``letter`` the scorer sees all
    choices with their letters, and a choice scores the log-probability of its letter.

    Args:
      questions: the exams, as `read_questions` gives them.
      log_likelihoods: for (context, continuation) pairs, the sum of the continuation's log-probabilities in nats and its
        number of tokens, in order. It is called once, with all pairs. A continuation begins with its blank.
      mode: ``length`` or ``letter``.

    Returns:
      The marks. Of choices that score the same the first counts as given.

    Raises:
      InputError: an unknown mode, or no questions.
      ValueError: the scorer returned another number of scores than asked for, a NaN, or a continuation without tokens.

    >>> question = Question("Baker", "food", "What makes dough rise?", ("salt", "yeast"), answer=1)
    >>> take_exams([question], lambda pairs: [(-2.0, 1) if "yeast" in c else (-3.0, 1) for _, c in pairs]).overall.passed
    1
    """
    if mode not in MODES:
        raise InputError(f"exams: mode {mode!r} is not one of {', '.join(MODES)}; choose one of them")
    if not questions:
        raise InputError("exams: no questions were given; read some with read_questions")
    pairs = [pair for question in questions for pair in _pairs(question, mode)]
    answers = log_likelihoods(pairs)
    if len(answers) != len(pairs):
        raise ValueError(f"log_likelihoods returned {len(answers)} scores for {len(pairs)} pairs")
    scores = iter([_score(*answer, mode) for answer in answers])
    marks: dict[str, list[tuple[Question, bool]]] = {}
    for question in questions:
        choice_scores = [next(scores) for _ in question.choices]
        chosen = choice_scores.index(max(choice_scores))
        marks.setdefault(question.certification, []).append((question, chosen == question.answer))
    return ExamResults(mode, tuple(_mark(exam) for exam in marks.values()))


def _pairs(question: Question, mode: str) -> list[tuple[str, str]]:
    """The (context, continuation) of each choice."""
    asked = f"Question: {question.question}\n"
    if mode == "length":
        return [(f"{asked}Answer:", f" {choice}") for choice in question.choices]
    letters = LETTERS[: len(question.choices)]
    listed = "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, question.choices, strict=True))
    return [(f"{asked}{listed}Answer:", f" {letter}") for letter in letters]


def _score(log_likelihood: float, tokens: int, mode: str) -> float:
    """What is compared between the choices of a question."""
    if math.isnan(log_likelihood) or tokens < 1:
        raise ValueError(f"log_likelihoods returned {log_likelihood} over {tokens} tokens: expected a number over >= 1")
    return float(log_likelihood) / tokens if mode == "length" else float(log_likelihood)


def _mark(exam: Sequence[tuple[Question, bool]]) -> CertificationResult:
    """The result of one certification from its questions and whether each was answered right."""
    first, _ = exam[0]
    return CertificationResult(
        certification=first.certification,
        field=first.field,
        questions=len(exam),
        correct=sum(right for _, right in exam),
        guess_score=_mean(1 / len(question.choices) for question, _ in exam),
        human_score=next((q.human_score for q, _ in exam if q.human_score is not None), None),
    )


def _summary(results: Sequence[CertificationResult]) -> Summary:
    people = [r.human_score for r in results if r.human_score is not None]
    passed = sum(r.passed for r in results)
    return Summary(
        certifications=len(results),
        passed=passed,
        passed_share=passed / len(results),
        score=_mean(r.score for r in results),
        guess_score=_mean(r.guess_score for r in results),
        human_compared=len(people),
        human_compared_score=_mean(r.score for r in results if r.human_score is not None) if people else None,
        human_score=_mean(people) if people else None,
    )


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
