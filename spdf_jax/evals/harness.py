"""EleutherAI's lm-eval harness on our models, offline and without torch: ``pip install -e '.[eval]'``.

The files of its tasks come from a folder of the user's, see `spdf_jax.evals.task_data`. World size is 1: the devices are shared
inside the model, by the mesh.
"""

import importlib.metadata
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from spdf_jax.data import end_of_text_id
from spdf_jax.data.tokenizer import Tokenizer, encode_plain
from spdf_jax.errors import InputError
from spdf_jax.evals.likelihood import log_likelihoods, rolling_log_likelihoods
from spdf_jax.evals.markdown import markdown_table
from spdf_jax.evals.task_data import write_task
from spdf_jax.model.decoding import DecodeConfig
from spdf_jax.model.generate import generate
from spdf_jax.model.gpt import GPT

if TYPE_CHECKING:
    LM: Any
else:
    try:
        from lm_eval.api.model import LM
    except ModuleNotFoundError:  # an extra; `run_harness` says how to get it
        LM = object

_MAX_NEW_TOKENS = 256


class HarnessModel(LM):
    """A model as lm-eval asks for it.

    Log-likelihoods are those of `spdf_jax.evals.likelihood`, at its longest stride.

    Args:
      model: `spdf_jax.GPT`.
      params: its parameters, masks applied.
      tokenizer: the model's.
      batch_size: most sequences at once; changes no result but for rounding.
      mesh: `spdf_jax.sharding.make_mesh`; None: wherever `params` are.
    """

    def __init__(
        self, model: GPT, params: Any, tokenizer: Tokenizer, *, batch_size: int = 16, mesh: Mesh | None = None
    ) -> None:
        super().__init__()
        self._scored = (model, params, tokenizer)
        self._end = end_of_text_id(tokenizer)
        self._how: dict[str, Any] = {"batch_size": batch_size, "end_of_text": self._end, "mesh": mesh}

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, and whether greedy decoding gives it."""
        found = log_likelihoods(*self._scored, [request.args for request in requests], **self._how)
        return [(total, greedy) for total, _, greedy in found]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """For each (text,): its log-likelihood in nats."""
        texts = [request.args[0] for request in requests]
        return [total for total, _ in rolling_log_likelihoods(*self._scored, texts, **self._how)]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """For each (context, settings): a continuation, cut before the first of the settings' ``until``.

        Settings: ``until``, ``max_gen_toks``, ``do_sample``, ``temperature``, ``top_p``. A context too long loses
        its beginning.

        Raises:
          InputError: another setting, or values that cannot be.
        """
        together: dict[DecodeConfig, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            together[self._decode_config(request.args[1])].append(index)
        texts: dict[int, str] = {}
        for config, indices in together.items():
            for index, text in zip(
                indices, self._continue(config, [requests[i].args[0] for i in indices]), strict=True
            ):
                texts[index] = _cut(text, requests[index].args[1].get("until"))
        return [texts[index] for index in range(len(requests))]

    def _decode_config(self, settings: dict[str, Any]) -> DecodeConfig:
        known = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}
        if unknown := sorted(set(settings) - known):
            raise InputError(f"generation_kwargs: {', '.join(unknown)} unknown: use some of {', '.join(sorted(known))}")
        longest = min(_MAX_NEW_TOKENS, self._scored[0].config.context // 2)
        sampled: dict[str, Any] = {key: float(settings[key]) for key in ("temperature", "top_p") if key in settings}
        # The harness writes greedy decoding as do_sample=False or as temperature=0.
        sample = settings.get("do_sample", False) and sampled.get("temperature", 1.0) > 0
        return DecodeConfig(
            method="sample" if sample else "greedy",
            max_new_tokens=settings.get("max_gen_toks", longest),
            batch_size=self._how["batch_size"],
            **(sampled if sample else {}),
        )

    def _continue(self, config: DecodeConfig, contexts: Sequence[str]) -> list[str]:
        model, params, tokenizer = self._scored
        # At least 1, so that `generate` says what is wrong where nothing is left.
        room = max(1, model.config.context - config.max_new_tokens)
        prompts = [(ids or [self._end])[-room:] for ids in encode_plain(tokenizer, contexts)]
        found = generate(model, params, prompts, config, end_tokens=[self._end], mesh=self._how["mesh"])
        return [tokenizer.decode(generation.tokens, skip_special_tokens=True) for generation in found]


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first stop string."""
    for stop in [until] if isinstance(until, str) else until or []:
        text = text.split(stop, 1)[0] if stop else text
    return text


def run_harness(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    data_dir: str | Path,
    *,
    batch_size: int = 16,
    num_fewshot: int | None = None,
    limit: int | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Runs tasks of lm-eval on local files; nothing is downloaded.

    Args:
      model: `spdf_jax.GPT`.
      params: its parameters, masks applied.
      tokenizer: the model's.
      tasks: some of `spdf_jax.evals.task_data.TASKS`. Prompts of ``sst2`` and ``rte`` are ours: compare between our runs.
      data_dir: the folder of their files, see `spdf_jax.evals.task_data`.
      batch_size: most sequences at once; changes no result but for rounding.
      num_fewshot: labelled examples before each question, for tasks that take some; None: as each task says.
      limit: only that many of each task's first questions.
      mesh: `spdf_jax.sharding.make_mesh`; None: wherever `params` are.

    Returns:
      For JSON: ``lm_eval_version``, and ``tasks``, for each its ``metrics``, ``samples``, ``num_fewshot`` and ``version``.

    Raises:
      InputError: lm-eval is not installed, no or unknown tasks, or a folder or file that is missing or malformed.
    """
    if LM is object:
        raise InputError("tasks: they run on lm-eval, which is not installed: pip install -e '.[eval]'")
    if not tasks or len(set(tasks)) < len(tasks):
        raise InputError(f"tasks: {list(tasks)} must name at least one task, and none twice")
    if limit is not None and limit < 1:
        raise InputError(f"limit: {limit} must be at least 1; leave it out for all questions")
    if not Path(data_dir).is_dir():
        raise InputError(f"data_dir {data_dir}: is not a folder; name the one with the files of {', '.join(tasks)}")
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    with tempfile.TemporaryDirectory() as folder:
        for name in tasks:
            write_task(name, Path(data_dir), Path(folder), num_fewshot)
        loaded = TaskManager(include_path=folder, include_defaults=False).load(list(tasks))
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=0)
        harness_model = HarnessModel(model, params, tokenizer, batch_size=batch_size, mesh=mesh)
        # Its standard errors come from forked processes, which JAX's threads do not survive: 0 turns them off.
        found = evaluate(harness_model, loaded, limit=limit, bootstrap_iters=0, log_samples=False)
    return {
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "tasks": {name: _task_result(name, found) for name in tasks},
    }


def _task_result(name: str, found: Any) -> dict[str, Any]:
    """The figures of a task; their names without that of the filter, of which there is one."""
    figures = {key.split(",")[0]: float(v) for key, v in found["results"][name].items() if isinstance(v, float | int)}
    figures = {key: value for key, value in figures.items() if key != "sample_len"}
    about = {"samples": found["n-samples"][name]["effective"], "num_fewshot": found["n-shot"][name]}
    return {"metrics": figures} | about | {"version": found["versions"][name]}


def harness_table(result: dict[str, Any]) -> str:
    """What `run_harness` found as Markdown: a row a metric.

    >>> task = {"metrics": {"acc": 0.25}, "samples": 8, "num_fewshot": 4, "version": 1}
    >>> print(harness_table({"lm_eval_version": "0.4.13", "tasks": {"sst2": task}}))
    | task | metric | value | texts | examples given |
    | --- | --- | ---: | ---: | ---: |
    | sst2 | acc | 0.2500 | 8 | 4 |
    """
    rows = [
        (name, metric, f"{value:.4f}", task["samples"], task["num_fewshot"])
        for name, task in result["tasks"].items()
        for metric, value in task["metrics"].items()
    ]
    return markdown_table(("task", "metric", "value", "texts", "examples given"), "llrrr", rows)
