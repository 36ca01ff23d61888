"""A run looked at from inside: its states one by one, in memory."""

from collections.abc import Iterator
from typing import Any

import jax

from spdf_jax.config.checks import check_devices
from spdf_jax.config.run import RunConfig
from spdf_jax.data import prepare
from spdf_jax.model.gpt import GPT
from spdf_jax.sharding import make_mesh
from spdf_jax.training.feed import make_feed
from spdf_jax.training.loop import device_batches, evaluate, one_step
from spdf_jax.training.phases import make_plan
from spdf_jax.training.state import TrainState, init_state, start_phase, state_shardings
from spdf_jax.training.step import make_steps


def watch_training(config: RunConfig) -> Iterator[tuple[TrainState, dict[str, Any]]]:
    """The steps of the run that ``spdf_jax.main`` would make of `config`, bit for bit, but leaving no files.

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
    check_devices(config, mesh.shape["data"] * mesh.shape["fsdp"])
    data = prepare(config.data, progress=False)
    state = init_state(model, plans[0].tx, plans[0].config.sparsity, plans[0].filter, config.seed, mesh)
    yield state, {}
    for plan in plans:
        phase, programme = plan.config, plan.programme
        if plan.index:
            reset = phase.reset_optimizer
            state = start_phase(state, plan.tx, phase.sparsity, plan.filter, mesh, reset_optimizer=reset)
        shardings, rule = state_shardings(mesh, plan.tx, state), programme.config.topology_rule
        steps = make_steps(model, plan.tx, plan.learning_rate, rule, shardings, phase.optimizer.regrowth)
        feed = make_feed(config, plan, data, data.tokenizer, mesh)
        batches = device_batches(feed, mesh, plan, 0)
        for local in range(phase.steps):
            with jax.set_mesh(mesh):  # not around the yield: it would leak to whoever looks on
                state, metrics = one_step(steps, plan, local, state, next(batches))
            metrics = jax.device_get(metrics)
            done = plan.start + local + 1
            if plan.evaluates_after(done):
                with jax.set_mesh(mesh):
                    attention = plan.attention_after(done)
                    metrics["val_loss"] = evaluate(feed.validation(), mesh, steps, state.variables, *attention)
            yield state, metrics
