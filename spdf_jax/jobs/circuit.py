"""``--job circuit``: the fewest nodes of a run's result that do each task, as ``circuit.json`` and a page that draws them."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spdf_jax.circuits.gates import Circuit, Measured, Places, find_circuit, mean_activations
from spdf_jax.circuits.graph import contexts, edges_of, joined, nodes_of, to_answers
from spdf_jax.circuits.pairs import TASKS
from spdf_jax.circuits.tasks import Prompts, prompts
from spdf_jax.config.run import RunConfig
from spdf_jax.data.corpus import embedded_corpus
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.errors import InputError
from spdf_jax.jobs import Request, keep_compiled
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import make_mesh
from spdf_jax.training.feed import NAME_TOKENIZER, load_data, make_feed
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import saved_run
from spdf_jax.workdir import CIRCUIT_FILE, CIRCUIT_PAIRS_FILE, check_writable, sweep, write_atomically, write_json

_LONGEST_PROMPT_TOKENS = 40
_TEXT_SEQUENCES, _SEQUENCES_AT_ONCE = 64, 8
#: Of the library, where the run was trained on other text: none of it was seen, and some files will do.
_SHARE_OF_LIBRARY = 0.05


def run(config: RunConfig, request: Request) -> None:
    """`circuits`."""
    keep_compiled(config.data)
    circuits(config, request.workdir, request.output)


def circuits(config: RunConfig, workdir: Path, output: Path | None = None) -> dict[str, Any]:
    """Looks for a circuit of each task of ``config.circuit`` in a run's result.

    Writes ``circuit.json``, ``circuit_pairs.jsonl`` (the prompts) and ``circuit.html``, and prints a line a task.

    Args:
      config: the run's own, but for what may change after it.
      workdir: the run's folder.
      output: where to write, by default `workdir`.

    Returns:
      The content of ``circuit.json``.

    Raises:
      InputError: no checkpoint there, a run of another config, a run without a tokenizer, or one whose tokenizer has not the
        tokens of a task that was asked for, or of any; a folder that cannot be written.
    """
    sweep(workdir)
    mesh = make_mesh(config.mesh)
    saved, folder = saved_run(workdir, mesh, config), output or workdir
    check_writable(folder)
    plans = make_plan(config)
    plan = next((plan for plan in plans if not plan.config.task.name), plans[-1])  # what it was pre-trained on
    tokens, tokenizer = load_data(config, workdir, [plan], progress=True)
    if tokenizer is None:
        raise InputError(
            f"--job circuit: needs the run's tokenizer, and token files came without one; {NAME_TOKENIZER}"
        )
    tasks = _tasks(config, tokenizer)
    batches = _some(make_feed(config, plan, tokens, tokenizer, mesh).train(0))
    params = jax.device_put(jax.device_get(saved.result.params))  # whatever mesh it was trained on
    means = mean_activations(saved.model, params, batches)
    found = {}
    for name, task in tasks.items():
        circuit = find_circuit(saved.model, params, means, task, config.circuit, config.seed)
        record = task_record(name, task, circuit, config.circuit.target_loss)
        if circuit.gates is not None:
            record["circuit"] = graph_record(saved.model, params, means, batches, tokenizer, task, circuit)
        found[name] = record
        print(f"{name}: {said(found[name])}", flush=True)
    nodes = int(sum(np.size(mean_LF) for mean_LF in means.values()))
    result = {"name": f"{config.experiment}: {config.variant}", "step": int(saved.state.step), "nodes": nodes}
    result |= {"target_loss": config.circuit.target_loss, "tasks": found}
    lines = (json.dumps({"task": name, **pair._asdict()}) for name, task in tasks.items() for pair in task.pairs)
    write_atomically(folder / CIRCUIT_PAIRS_FILE, ("\n".join(lines) + "\n").encode())
    write_json(folder / CIRCUIT_FILE, result)
    from spdf_jax.report.circuit import write_circuits  # brings matplotlib

    print(f"{write_circuits(folder)}")
    return result


def said(task: Mapping[str, Any]) -> str:
    """The result of a task in a line."""
    if not task["found"]:
        return f"not found: {task['why']}"
    alone, without = (task["measured"][which] for which in ("alone", "without"))
    nodes, edges = (len(task["circuit"][part]) for part in ("nodes", "edges"))
    return f"{nodes:,} nodes, {edges:,} weights; loss {alone['loss']:.3f} by these alone, {without['loss']:.3f} by all others"


def _tasks(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Prompts]:
    """The prompts of each task; those for which the tokenizer lacks tokens are said, where none was asked for by name."""
    asked = config.circuit.tasks
    fraction = config.data.validation_fraction if config.data.source == "embedded" else _SHARE_OF_LIBRARY
    texts = list(embedded_corpus(fraction).read("validation"))
    longest = min(_LONGEST_PROMPT_TOKENS, config.model.context)
    how: dict[str, Any] = {"count": config.circuit.pairs, "longest": longest, "seed": config.seed}
    found = {}
    for name in asked or TASKS:
        try:
            found[name] = prompts(name, tokenizer, texts, **how)
        except InputError as error:
            if asked:
                raise
            print(f"left out: {error}", flush=True)
    if not found:
        raise InputError(
            "--job circuit: the run's tokenizer has the tokens of no task; train with a larger config.data.tokenizer_vocab_size"
        )
    return found


def _some(batches: Any) -> list[np.ndarray]:
    """Token ids of the first sequences of a feed, few at a time."""
    rows = itertools.chain.from_iterable(np.asarray(batch.tokens_BT) for batch in batches)
    longest = list(itertools.islice(rows, _TEXT_SEQUENCES))
    width = max(map(len, longest))
    same = [row for row in longest if len(row) == width]
    return [np.stack(same[i : i + _SEQUENCES_AT_ONCE]) for i in range(0, len(same), _SEQUENCES_AT_ONCE)]


def task_record(name: str, task: Prompts, circuit: Circuit, target_loss: float) -> dict[str, Any]:
    """A task's entry in ``circuit.json``, but for the graph. Where no circuit was found it has no figure of one."""
    found, whole = circuit.gates is not None, circuit.measured["whole"].loss
    why = f"the whole model does not do it: its loss is {whole:.3f} nats, and {target_loss:g} is wanted"
    return {
        "about": TASKS[name].about,
        "answers": TASKS[name].answers,
        "pairs": {
            "used": len(task.pairs),
            "from_library": sum(pair.source == "library" for pair in task.pairs),
            "left_out": task.left_out,
        },
        "example": next((p for p in task.pairs if p.source == "template"), task.pairs[0]).prompts,
        "found": found,
        "why": "" if found else why,
        "measured": {which: _rounded(one) for which, one in circuit.measured.items()},
        "curve": smallest(circuit.curve),
    }


def graph_record(
    model: GPT,
    params: Any,
    means: Places,
    batches: Sequence[np.ndarray],
    tokenizer: Tokenizer,
    task: Prompts,
    circuit: Circuit,
) -> dict[str, Any]:
    """A circuit as ``circuit.json`` has it: its nodes with their contexts, and what joins them."""
    assert circuit.gates is not None, "there is one"
    assert circuit.effects is not None, "as above"
    nodes = nodes_of(circuit.gates)
    texts = contexts(model, params, nodes, means, batches, tokenizer)
    return {
        "nodes": [
            {
                **node._asdict(),
                "effect": float(circuit.effects[node.place][node[1:]]),
                "mean": float(means[node.place][node[1:]]),
                "contexts": [context._asdict() for context in some],
            }
            for node, some in zip(nodes, texts, strict=True)
        ],
        "edges": edges_of(nodes, model.config, params),
        "joined": joined(nodes, model.config),
        "to_answers": to_answers(nodes, params, (int(task.right_P2[0, 0]), int(task.right_P2[0, 1]))),
    }


def sizes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``circuit.json`` the figures of each task that a sweep compares, without the graphs.

    >>> sizes({"tasks": {"quote": {"measured": {"whole": {"loss": 0.7}}, "curve": []}}, "target_loss": 0.15})
    {'quote': {'whole': 0.7, 'curve': [], 'target_loss': 0.15}}
    """
    return {
        name: {part: len(task["circuit"][part]) for part in ("nodes", "edges") if "circuit" in task}
        | {which: one["loss"] for which, one in task["measured"].items()}
        | {"curve": task["curve"], "target_loss": record["target_loss"]}
        for name, task in record["tasks"].items()
    }


def _rounded(one: Measured) -> dict[str, float]:
    return {"loss": round(one.loss, 6), "accuracy": round(one.accuracy, 6)}


def smallest(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The circuits of a curve that none with as few nodes beats, the smallest first.

    >>> smallest([(9, 0.1), (4, 0.5), (6, 0.6), (2, 0.7)])
    [(2, 0.7), (4, 0.5), (9, 0.1)]
    """
    found: list[tuple[int, float]] = []
    for nodes, loss in sorted(curve):
        if not found or loss < found[-1][1]:
            found.append((nodes, round(loss, 6)))
    return found
