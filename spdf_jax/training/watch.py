"""A run looked at from inside: its states one by one, in memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from spdf_jax.config.checks import check_devices
from spdf_jax.config.run import RunConfig
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import batch_devices, make_mesh
from spdf_jax.training.branch import branch, check_same_order
from spdf_jax.training.feed import Feed, load_data, make_feed
from spdf_jax.training.loop import evaluate, make_phase_steps, starts_anew, take_steps
from spdf_jax.training.phases import PhasePlan, make_plan
from spdf_jax.training.pruning import pruner
from spdf_jax.training.restore import enter_phase, first_state
from spdf_jax.training.sources import source_folder
from spdf_jax.training.state import TrainState
from spdf_jax.training.teachers import check_teachers, load_teacher


def watch_training(config: RunConfig) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """The steps of the run that ``spdf_jax.main`` would make of `config`, bit for bit, but leaving no files.

    It starts from ``init_from`` and stops early as that run does; the last state is then the newest one, not the best.

    Args:
      config: from `spdf_jax.resolve`.

    Yields:
      ``(state, metrics)``: at first the initial state with no metrics, then after every step the new state and that step's
      metrics, with ``val_loss`` every ``loop.eval_every_steps`` and at the end of a phase, and ``churn`` after topology
      steps. The next step reuses the state's memory: copy what you keep (`jax.device_get`) before going on.

    Raises:
      InputError: a config that does not fit the devices or the data.

    >>> import pathlib, tempfile, spdf_jax as spdf
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "text.txt").write_text("to be or not to be\\n" * 99)
    >>> c = spdf.default_config("mine", "mini", variants=("mini",))
    >>> c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size, c.model.context = 1, 1, 8, 280, 8
    >>> c.data.source, c.data.path, c.data.cache_dir, c.data.tokenizer_vocab_size = "text", str(folder), str(folder), 280
    >>> c.mesh.data, c.pretrain.sparsity.rule, c.pretrain.sparsity.sparsity = 1, "static", 0.75
    >>> state, metrics = next(watch_training(spdf.resolve(c)))
    >>> int(state.masks["blocks"]["mlp_up"]["kernel"].sum()), metrics
    (64, {})
    """
    mesh, model, plans = make_mesh(config.mesh), GPT(config.model), make_plan(config)
    check_devices(config, batch_devices(mesh))
    with jax.set_mesh(mesh):  # never around a yield: it would leak to whoever looks on
        parent, plans = branch(config, None, plans, mesh)
    tokens, tokenizer = load_data(config, None, plans, begun=False, progress=False)
    feeds = [make_feed(config, plan, tokens, tokenizer, mesh) for plan in plans]
    if parent:
        check_same_order(parent, feeds[0].fingerprint)
    check_teachers(config, None, plans, tokenizer)
    with jax.set_mesh(mesh):
        prune = pruner(config.model, plans[0], feeds[0].train, mesh)
        state = parent.state if parent else first_state(config, plans[0], mesh, source_folder(config, None), prune)
    parent = None  # whose state the first step may be the last to use
    yield state, {}
    for plan in plans:
        taken = _watch_phase(config, model, plan, feeds, mesh, state)
        for state, metrics in taken:
            yield state, metrics


def _watch_phase(
    config: RunConfig, model: GPT, plan: PhasePlan, feeds: Sequence[Feed], mesh: Mesh, state: TrainState
) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    feed, evaluations = feeds[plan.index], dict[tuple[str, int], float]()

    def measure(state: TrainState, done: int) -> float:
        loss = evaluate(feed.validation(), mesh, steps, state.variables, *plan.attention_after(done))
        evaluations[plan.name, done] = loss
        return loss

    with jax.set_mesh(mesh):
        if plan.index:
            state = enter_phase(state, plan, mesh, pruner(model.config, plan, feed.train, mesh))
        steps = make_phase_steps(model, plan, mesh, state, load_teacher(config, None, plan, mesh))
        if plan.config.patience_evaluations and starts_anew(feeds, plan):
            measure(state, plan.start)
    taken = take_steps(plan, feed, mesh, steps, state, range(plan.start, plan.end), evaluations)
    while True:
        with jax.set_mesh(mesh):
            if (after := next(taken, None)) is None:
                return
            step, state, device_metrics, _ = after
            metrics = jax.device_get(device_metrics)
            if plan.evaluates_after(step + 1):
                metrics["val_loss"] = measure(state, step + 1)
        yield state, metrics
