"""The jobs that use what a run has come to: evaluate, generate, export."""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spdf_jax import processes
from spdf_jax.config import RunConfig, check_devices
from spdf_jax.data import (
    Example,
    decode_texts,
    encode_prompts,
    end_of_text_id,
    load_task,
    load_tokenizer,
    seen_categories,
)
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.evals.exams import SHIPPED_QUESTIONS, exam_results, read_questions
from spdf_jax.evals.harness import harness_table, run_harness
from spdf_jax.evals.metrics import score_texts
from spdf_jax.huggingface import save_gpt2
from spdf_jax.jobs import load_data
from spdf_jax.model.generate import generate
from spdf_jax.model.gpt import GPT
from spdf_jax.report import write_report
from spdf_jax.sharding import make_mesh
from spdf_jax.training.feed import make_feed
from spdf_jax.training.loop import evaluate
from spdf_jax.training.restore import SavedRun, saved_run, saved_run_and_record
from spdf_jax.training.step import make_steps
from spdf_jax.workdir import EVALUATION_FILE, GENERATIONS_FILE, METRICS_FILE, sweep, write_atomically, write_json


def evaluate_checkpoint(config: RunConfig, workdir: Path, output: Path | None = None) -> dict[str, Any]:
    """What a run has come to: perplexity, for a task its decoded test set, scored, and what ``config.evaluation`` asks for.

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
    check_devices(config, mesh.shape["data"] * mesh.shape["fsdp"])
    processes.agree("config", json.dumps(config.as_dict()), "start all of them with the same command and files")
    sweep(workdir)
    saved, record = saved_run_and_record(workdir, mesh, config)
    folder = output or workdir
    _check_writable(folder)
    _, plan, state = saved
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
        suites = _run_suites(saved, mesh, tokenizer)  # first: what a user may have to mend, before anything slow
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


def _check_writable(folder: Path) -> None:
    """Refuses a folder that cannot hold what is about to be computed. Process 0 writes it."""
    if not processes.is_first():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(
            f"{folder}: cannot write there ({error.strerror}); choose another folder by --output"
        ) from None


def _run_suites(saved: SavedRun, mesh: Mesh, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The tasks of lm-eval, as ``zero_shot``, and the ``exams`` that the config asks for; prints their tables."""
    config = saved.config.evaluation
    if not config.tasks and not config.exams:
        return {}
    if tokenizer is None:
        raise InputError(
            "config.data.tokenizer: token files came without one; name the one that config.evaluation needs"
        )
    scored = saved.model, saved.state.params, tokenizer
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
    texts = _decode(saved, mesh, tokenizer, task.test)
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


def _decode(saved: SavedRun, mesh: Mesh, tokenizer: Tokenizer, examples: Sequence[Example]) -> list[str]:
    model, decode = saved.model, saved.config.decode
    prompts = encode_prompts(examples, tokenizer, max_tokens=model.config.context - decode.max_new_tokens)
    end = [end_of_text_id(tokenizer)]
    found = generate(model, saved.state.params, prompts, decode, end_tokens=end, mesh=mesh)
    return decode_texts([generation.tokens for generation in found], tokenizer)


def generate_text(config: RunConfig, workdir: Path, prompt: str) -> str:
    """Continues a prompt by ``config.decode``, prints it and returns the continuation.

    Where the last phase has a task, the prompt is a context, and what follows its target.

    Raises:
      InputError: no checkpoint or tokenizer there, or a prompt too long.
    """
    mesh = make_mesh(config.mesh)
    saved = saved_run(workdir, mesh, config)
    tokenizer = load_tokenizer(workdir / "tokenizer.json")
    if saved.plan.config.task.name:
        (text,) = _decode(saved, mesh, tokenizer, [Example(prompt, ())])
        print(text)
        return text
    end = end_of_text_id(tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [end]
    if config.separates_documents(saved.plan.config):
        # The last document: in training, those before it say nothing to it.
        ids = ids[max((i for i, token in enumerate(ids) if token == end), default=0) :]
    (found,) = generate(saved.model, saved.state.params, [ids], config.decode, end_tokens=[end], mesh=mesh)
    text = tokenizer.decode(found.tokens, skip_special_tokens=True)
    print(f"{prompt}{text}")
    return text


def export(config: RunConfig, workdir: Path, output: Path | None = None) -> Path:
    """Writes a GPT-2 folder for ``transformers``, masks folded in, and prints its path.

    Args:
      config: the run's own, but for what may change after it.
      workdir: the run's folder.
      output: what to write, by default ``WORKDIR/huggingface``.

    Returns:
      The folder.

    Raises:
      InputError: no checkpoint there, a run of another config, a folder that is there already or cannot be written, or what
        GPT-2 cannot express.
    """
    sweep(workdir)
    folder = output or workdir / "huggingface"
    if folder.exists():
        raise InputError(f"{folder}: is there already; move or delete it, or choose another by --output")
    _check_writable(folder.parent)
    saved = saved_run(workdir, make_mesh(config.mesh), config)
    if saved.model.pattern != "causal":
        raise InputError(
            f"--job export: the run ends in {saved.model.pattern!r} attention of width {saved.model.width}, which GPT-2 cannot "
            f"express; train a further phase, or a run with init_from={str(workdir)!r}, whose attention is causal at its end"
        )
    tokenizer = load_tokenizer(workdir / "tokenizer.json") if (workdir / "tokenizer.json").is_file() else None
    save_gpt2(folder, config.model, saved.state.params, masks=saved.state.masks, tokenizer=tokenizer)
    print(folder)
    return folder
