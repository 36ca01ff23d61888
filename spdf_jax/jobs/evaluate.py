"""``--job evaluate``: the perplexity of a run's result, a task's scores, and the exams and tasks that the config asks for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spdf_jax import processes
from spdf_jax.config.checks import check_devices
from spdf_jax.config.run import RunConfig
from spdf_jax.data import (
    load_task,
    seen_categories,
)
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.evals.exam_questions import SHIPPED_QUESTIONS, read_questions
from spdf_jax.evals.exams import exam_results
from spdf_jax.evals.harness import harness_table, run_harness
from spdf_jax.evals.metrics import score_texts
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.jobs.generate import decode_examples
from spdf_jax.model.gpt import GPT
from spdf_jax.report import write_report
from spdf_jax.sharding import batch_devices, make_mesh
from spdf_jax.training.feed import NAME_TOKENIZER, load_data, make_feed
from spdf_jax.training.loop import evaluate
from spdf_jax.training.programs import make_steps
from spdf_jax.training.restore import SavedRun, saved_run_and_record
from spdf_jax.workdir import (
    EVALUATION_FILE,
    GENERATIONS_FILE,
    METRICS_FILE,
    check_writable,
    sweep,
    write_atomically,
    write_json,
)


def run(config: RunConfig, request: Request) -> None:
    """`evaluate_checkpoint`."""
    keep_compiled(config.data)
    evaluate_checkpoint(config, request.workdir, request.output)


def evaluate_checkpoint(config: RunConfig, workdir: Path, output: Path | None = None) -> dict[str, Any]:
    """The result of a run: its perplexity, for a task its decoded test set, scored, and what ``config.evaluation`` asks for.

    Perplexity is over the whole validation set, per token and, of text, per UTF-8 byte; a task's is over the target tokens of
    its test set. Prints the figures and writes ``evaluation.json``, for a task ``generations.jsonl`` too.

    Args:
      config: the run's own, but for what may change after it. Where other text lies in ``data.path`` than the run was trained
        on, that is measured, with the run's tokenizer, and said.
      workdir: the run's folder.
      output: where to write, by default `workdir`, whose report is then written again.

    Raises:
      InputError: no checkpoint there, a run of another config, a folder that cannot be written; lm-eval not installed, or a
        file of its tasks or of the exams that is missing or malformed.
    """
    mesh = make_mesh(config.mesh)
    check_devices(config, batch_devices(mesh))
    processes.agree("config", json.dumps(config.as_dict()), "start all of them with the same command and files")
    sweep(workdir)
    saved, record = saved_run_and_record(workdir, mesh, config)
    folder = output or workdir
    check_writable(folder)
    plan, state = saved.plan, saved.result
    tokens, tokenizer = load_data(config, workdir, [plan], progress=True)
    steps = make_steps(GPT(config.model), plan.tx, plan.learning_rate, plan.programme.config.topology_rule)
    attention = plan.attention_after(int(state.step))
    feed = make_feed(config, plan, tokens, tokenizer, mesh)
    same_data = feed.fingerprint == record["data_fingerprint"]
    if not same_data and config.data.source != "token_files" and not (workdir / "tokenizer.json").is_file():
        raise InputError(
            f"{workdir / 'tokenizer.json'}: missing, and config.data is not what the run was trained with, so that it "
            f"cannot be made again; restore the file, or the data"
        )
    with jax.set_mesh(mesh):
        suites = _run_suites(saved, mesh, tokenizer)  # first: what a user may have to fix, before anything slow
        loss = evaluate(feed.validation(), mesh, steps, state.variables, *attention)
        test_loss = evaluate(feed.test(), mesh, steps, state.variables, *attention) if feed.test else loss
    result: dict[str, Any] = {"step": int(state.step), "val_loss": loss, "perplexity": math.exp(test_loss)}
    if feed.test is not None and tokenizer is not None:
        result |= _score_task(saved, mesh, tokenizer, folder)
    elif tokens is not None and tokens.validation_bytes:
        targets = tokens.validation.shape[0] - 1
        result["perplexity_per_byte"] = math.exp(loss * targets / tokens.validation_bytes)
    result |= suites
    if not same_data:
        result["data"] = "other than the run was trained with"
        print(f"These figures are of {result['data']}: its own losses are of other text.")
    write_json(folder / EVALUATION_FILE, result)
    if folder == workdir and (workdir / METRICS_FILE).is_file():
        write_report(workdir)
    figures = {name: value for name, value in result.items() if isinstance(value, int | float)}
    print(
        ", ".join(
            f"{name} {value:.4f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
    )
    return result


def _run_suites(saved: SavedRun, mesh: Mesh, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The tasks of lm-eval, as ``zero_shot``, and the ``exams`` that the config asks for; prints their tables."""
    config = saved.config.evaluation
    if not config.tasks and not config.exams:
        return {}
    if tokenizer is None:
        raise InputError(f"config.evaluation: needs the tokenizer, and token files came without one; {NAME_TOKENIZER}")
    scored = saved.model, saved.result.params, tokenizer
    how: dict[str, Any] = {"batch_size": saved.config.loop.eval_batch_size, "mesh": mesh}
    found: dict[str, Any] = {}
    questions = read_questions(config.exam_questions or SHIPPED_QUESTIONS) if config.exams else ()
    if config.tasks:
        num_fewshot = None if config.num_fewshot < 0 else config.num_fewshot
        found["zero_shot"] = run_harness(*scored, config.tasks, config.data_dir, num_fewshot=num_fewshot, **how)
        print(harness_table(found["zero_shot"]) + "\n", flush=True)
    if config.exams:
        results = exam_results(*scored, questions, config.exam_mode, **how)
        found["exams"] = results.as_dict() | {"questions_file": config.exam_questions}
        print(results.table() + "\n", flush=True)
    return found


def _score_task(saved: SavedRun, mesh: Mesh, tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """Scores over the whole test set, their signatures, and the same over seen and unseen categories where there are both."""
    task = load_task(saved.plan.config.task)
    if task.style == "perplexity":
        return {}
    texts = decode_examples(saved, mesh, tokenizer, task.test)
    lines = (
        json.dumps({"context": e.context, "text": text, "references": e.references}, ensure_ascii=False)
        for e, text in zip(task.test, texts, strict=True)
    )
    write_atomically(folder / GENERATIONS_FILE, ("\n".join(lines) + "\n").encode())

    def scores(chosen: Sequence[int]) -> dict[str, Any]:
        return score_texts([texts[i] for i in chosen], [task.test[i].references for i in chosen], style=task.style)

    every = scores(range(len(texts)))
    result: dict[str, Any] = {name: score.value for name, score in every.items() if score.value is not None}
    result["signatures"] = {name: score.signature for name, score in every.items() if score.value is not None}
    result["absent"] = {name: score.absent_because for name, score in every.items() if score.value is None}
    seen = seen_categories(task)
    parts = {
        "seen": [i for i, e in enumerate(task.test) if e.category in seen],
        "unseen": [i for i, e in enumerate(task.test) if e.category not in seen],
    }
    if any(e.category for e in task.test) and all(parts.values()):
        result |= {name: {k: s.value for k, s in scores(chosen).items()} for name, chosen in parts.items()}
    return result
