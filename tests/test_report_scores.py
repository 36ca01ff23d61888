"""The scores of a run: those of its task with how they are computed, of lm-eval, of exams; and the texts it generated."""

import re

import pytest
from report_folders import SIGNATURE, drawn, make_exam_run, make_finetuned, make_run, read, table_cells, titles

from spdf_jax.errors import InputError
from spdf_jax.evals.exams import CertificationResult, ExamResults
from spdf_jax.report import write_report
from spdf_jax.report.records import read_run
from spdf_jax.report.scores import exam_scores
from spdf_jax.workdir import write_json


def test_a_finetuned_run_shows_scores_texts_and_its_best_step(tmp_path):
    page = read(write_report(make_finetuned(tmp_path)))
    assert "Validation loss 0.80 over the target tokens of restaurant" in page
    assert "Scored: BLEU 34.2." in page
    assert titles(page)[:3] == ["Numbers", "Scores", "Loss over steps"]
    assert "at the best evaluation, step 1,080" in page
    assert "stopped early" in page
    assert "best, kept" in page
    assert "over held-out text: not to be compared with the last" in page
    assert "Points: held-out text, then the target tokens of restaurant." in page
    scores = re.findall(r"<td>([^<]*)</td>", page[page.index("<h2>Scores") :])
    assert scores[:9] == ["0.8000", "", "", "2.2255", "", "", "34.2210", "36.0000", "30.5000"]
    assert SIGNATURE in page
    assert "java &lt;is&gt; not there" in page
    assert re.findall(r"&lt;b&gt;Mill (\d+)&lt;/b&gt;", page) == [str(i) for i in range(0, 19, 2)]
    assert "token frequencies alone" not in page


def test_scores_whose_names_say_it_all_have_no_empty_columns(tmp_path):
    workdir = make_run(tmp_path, sparse=False)
    write_json(workdir / "evaluation.json", {"step": 400, "val_loss": 3.9, "perplexity": 2859.30843})
    table = table_cells(read(write_report(workdir)), "Scores")
    assert table == [["score", "value"], ["validation loss", "3.9000"], ["perplexity", "2,859.3084"]]


def test_unreadable_texts_are_refused(tmp_path):
    workdir = make_run(tmp_path, sparse=False, rows=[], last_step=0)
    (workdir / "generations.jsonl").write_text('{"text": "no context"}\n')
    with pytest.raises(InputError, match=r"generations\.jsonl: not generated texts"):
        read_run(workdir)


@pytest.fixture(scope="module")
def exam_page(tmp_path_factory) -> str:
    return read(write_report(make_exam_run(tmp_path_factory.mktemp("exams"))))


def test_exams_have_a_table_and_a_chart(exam_page):
    assert titles(exam_page)[:5] == ["Numbers", "Scores", "Zero-shot", "Exams", "Loss over steps"]
    assert table_cells(exam_page, "Exams") == [
        ["certification", "questions", "score", "people", "passed"],
        ["Baker food", "10", "70 %", "-", "no"],  # 70 % is not over 70 %
        ["Clerk office", "4", "25 %", "-", "no"],
        ["Cook &lt;b&gt; food", "10", "80 %", "60 %", "yes"],
    ]
    panel = exam_page[exam_page.index("<h2>Exams") : exam_page.index("<h2>Loss over steps")]
    assert "1 of 3 certifications passed, each at over 70 % correct." in panel
    assert "On the 1 with a human score: 80 %, people 60 %." in panel
    assert "without human scores" in panel
    assert "<details" not in panel
    chart = re.findall(r"<text [^>]*>(.*?)</text>", panel)
    assert [text for text in chart if not text.replace(".", "").isdigit()] == [
        "questions answered right (%)",
        "food: 1 of 2 passed",
        "Baker",
        "Cook &lt;b&gt;",
        "office: 0 of 1 passed",
        "Clerk",
        "guessing",
        "people",
        "passed at over 70 %",
        "passed",
        "not passed",
    ]


def test_tasks_of_lm_eval_have_a_table(exam_page):
    assert table_cells(exam_page, "Zero-shot") == [
        ["task", "score", "value", "texts", "examples given"],
        ["lambada", "perplexity", "227.3", "5,153", "0"],
        ["accuracy", "0.1250", "5,153", "0"],
        ["sst2", "accuracy", "0.5000", "5,153", "4"],
    ]
    assert "The prompts of sst2 are this project" in exam_page


def test_hundreds_of_exams_are_drawn_by_field_and_folded(tmp_path):
    many = [CertificationResult(f"exam {i}", f"field {i % 5}", 50, i % 50, 0.25) for i in range(200)]
    workdir = make_exam_run(tmp_path, ExamResults("letter", tuple(many)), questions_file="data/<mine>.jsonl")
    panel = drawn(exam_scores, read_run(workdir))
    assert "<summary>All 200 certifications</summary>" in panel
    assert len(table_cells(panel, "Exams")) == 201
    chart = panel[panel.index("<svg") :]
    assert "field 3: " in chart
    assert "exam 3" not in chart
    assert "mean score" in chart
    assert "people" not in panel
    assert "Questions: data/<mine>.jsonl." in panel
