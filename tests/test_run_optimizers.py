"""Every optimiser that a run may name: exact zeros, resets, decay, one program, its bytes, checkpoints and meshes; refusals.

As a program it trains a tiny run with one and dies by SIGKILL: ``python test_run_optimizers.py WORKDIR TEXT MOMENT NAME``.
"""

import contextlib
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib
from tiny import NO_WINDOW, die_at, few_matrices, rows_without_clock, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.model.gpt import GPT
from spdf_jax.optim import OptimizerConfig, make_optimizer
from spdf_jax.planning.describe import state_bytes
from spdf_jax.planning.pod_plan import state_bytes as bytes_on_device
from spdf_jax.sharding import MeshConfig, make_mesh, optimizer_shardings, parameter_shardings
from spdf_jax.sparsity.masks import apply_masks, dense_masks
from spdf_jax.sparsity.optimizers import OWN_OPTIMIZERS
from spdf_jax.sparsity.regrowth import reset_masked_state
from spdf_jax.training import loop, programs
from spdf_jax.training.checkpoint import Checkpoints
from spdf_jax.training.phases import make_plan
from spdf_jax.training.provenance import code_files, own_parts
from spdf_jax.training.restore import saved_run, saved_run_and_record
from spdf_jax.training.state import init_state, start_phase, state_shardings
from spdf_jax.tree import along_state, named_leaves
from spdf_jax.workdir import read_json

pytestmark = pytest.mark.usefixtures("no_figures")

#: Learning rates of about one effect.
RATES = {"adamw": 1e-2, "muon": 1e-2, "lion": 3e-3, "adafactor": 0.1, "sgd": 1.0, "schedule_free_adamw": 1e-2}
FREE = "schedule_free_adamw"
every_optimizer = pytest.mark.parametrize("name", RATES)
#: Of these a tensor's state is rows and columns, where two axes are as long as 128.
SHAPES = {"blocks/mlp_up/kernel": (2, 128, 160), "blocks/mlp_up/bias": (160,), "wte/embedding": (24, 128)}


def settings(name: str, **more) -> OptimizerConfig:
    return OptimizerConfig(name=name, schedule="constant", **more)


def tree(seed: int, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}


def two_masks():
    """Of one count: the second is the first, moved by one column."""
    mask = jnp.asarray(np.random.default_rng(9).random(SHAPES["blocks/mlp_up/kernel"]) < 0.5)
    return [dense_masks(tree(0)) | {"blocks/mlp_up/kernel": m} for m in (mask, jnp.roll(mask, 1, -1))]


def test_they_are_those_of_the_library():
    assert list(RATES) == list(OWN_OPTIMIZERS)


@every_optimizer
def test_zeros_are_exact_regrown_weights_start_afresh_and_one_program_does_it_all(name):
    tx, params, (masks, new) = make_optimizer(settings(name, weight_decay=0.1)), tree(0, 0.1), two_masks()
    stayed = jax.tree.map(jnp.logical_and, masks, new)
    params = apply_masks(params, masks)
    state, kernel = jax.jit(tx.init)(params), "blocks/mlp_up/kernel"

    @jax.jit
    def step(params, state, masks, grads):
        updates, state = tx.update(grads, state, params, masks=masks, learning_rate=RATES[name] / 10)
        return optax.apply_updates(params, updates), state, updates

    largest = [0.0, 0.0]  # updates of other weights, of those that grew
    grown = np.asarray(new[kernel] & ~masks[kernel])
    for i in range(6):
        if i == 3:
            before, state = state, jax.jit(partial(reset_masked_state, tx))(state, params, stayed)
            check_reset(tx, before, state, apply_masks(params, stayed), stayed)
            params, masks = apply_masks(params, new), new
        params, state, updates = step(params, state, masks, tree(i + 1, 0.01))
        active = np.asarray(masks[kernel])
        assert not np.asarray(params[kernel])[~active].any(), "a masked weight lives"
        assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves((params, state)))
        if i >= 3:
            sizes = [float(np.abs(np.asarray(updates[kernel])[active & (grown == g)]).max()) for g in (False, True)]
            largest = [max(pair) for pair in zip(largest, sizes, strict=True)]
            held = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == SHAPES[kernel]]
            assert not any(np.asarray(leaf)[~active].any() for leaf in held), "state lives under a mask"
    assert step._cache_size() == 1
    assert 0 < largest[1] < 10 * largest[0], largest
    assert len(held) == {"adamw": 2, "schedule_free_adamw": 2, "adafactor": 0}.get(name, 1)


def check_reset(tx, before, after, params, stayed):
    """State of one number a weight is that of init where weights are new, and everything else is as it was."""
    followed, fresh = along_state(tx, after, stayed, np.True_), tx.init(params)
    for mask, old, now, initial in zip(*map(jax.tree.leaves, (followed, before, after, fresh)), strict=True):
        expected = np.where(mask, old, initial) if np.ndim(mask) and old.shape == mask.shape else old
        np.testing.assert_array_equal(now, expected)


@every_optimizer
def test_weight_decay_moves_matrices_and_embeddings_alone(name):
    params, grads = tree(0), jax.tree.map(jnp.zeros_like, tree(0))
    tx = make_optimizer(settings(name, weight_decay=0.1))
    updates, _ = tx.update(grads, tx.init(params), params, masks=dense_masks(params), learning_rate=0.01)
    for leaf, update in updates.items():
        decay = 0 if leaf.endswith("bias") else -0.01 * 0.1 * params[leaf]
        np.testing.assert_allclose(update, decay, rtol=1e-2, atol=1e-6)  # schedule-free: rounded


@every_optimizer
def test_gradients_are_clipped_under_the_masks(name):
    """A gradient a thousand times as long is the same one, whatever lies under the masks."""
    params, grads, (masks, _) = tree(0), tree(1), two_masks()
    tx = make_optimizer(settings(name))
    huge = jax.tree.map(lambda g, m: jnp.where(m, 1e3 * g, 1e9), grads, masks)
    found = [tx.update(g, tx.init(params), params, masks=masks, learning_rate=0.1)[0] for g in (grads, huge)]
    for (leaf, plain), clipped in zip(found[0].items(), jax.tree.leaves(found[1]), strict=True):
        assert float(jnp.abs(plain).max()) > 1e-4, f"{leaf} does not move"
        np.testing.assert_allclose(clipped, plain, rtol=1e-3, atol=1e-5, err_msg=leaf)


#: What optax has under the same name, of the same settings; nothing decays in Adafactor's, which decays by another rule.
OPTAX = {
    "muon": lambda: contrib.muon(
        0.1,
        weight_decay=0.2,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda p: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(1, 2), p),
    ),
    "lion": lambda: optax.lion(0.1, 0.9, 0.95, weight_decay=0.2),
    "adafactor": lambda: optax.adafactor(0.1),
    "sgd": lambda: optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.2), optax.scale(-0.1)),
    FREE: lambda: contrib.schedule_free_adamw(0.1, b2=0.95, weight_decay=0.2),
}


@pytest.mark.parametrize("name", OPTAX)
def test_they_are_optaxs_own(name):
    config = settings(name, clip_norm=0.0, weight_decay=0.0 if name == "adafactor" else 0.2)
    ours, theirs = make_optimizer(config), OPTAX[name]()
    mine = other = start = {"blocks": {"mlp_up": {"kernel": tree(0)["blocks/mlp_up/kernel"]}}}
    states = [ours.init(mine), theirs.init(other)]
    for i in range(3):
        grads = jax.tree.map(lambda _, i=i: tree(i + 1)["blocks/mlp_up/kernel"], mine)
        how = {"masks": dense_masks(mine), "learning_rate": jnp.float32(0.1)}
        updates, states[0] = ours.update(grads, states[0], mine, **how)
        mine = optax.apply_updates(mine, updates)
        updates, states[1] = theirs.update(grads, states[1], other)
        other = optax.apply_updates(other, updates)
        for here, there, before in zip(*map(jax.tree.leaves, (mine, other, start)), strict=True):
            assert (here != before).all(), "a step moves every weight"
            np.testing.assert_allclose(here, there, rtol=2e-4, atol=2e-6)


def test_muon_steps_by_matrix_in_the_layers_and_by_adam_elsewhere():
    params = tree(0)
    found = [
        make_optimizer(c).update(
            tree(1), make_optimizer(c).init(params), params, masks=dense_masks(params), learning_rate=1.0
        )[0]
        for c in (settings("muon"), settings("adamw"))
    ]
    assert {k: bool((found[0][k] == found[1][k]).all()) for k in params} == {
        k: k != "blocks/mlp_up/kernel" for k in params
    }


def test_what_a_mask_makes_of_muons_update():
    """The figures of `scale_by_hidden_muon`: of an orthogonal matrix most is left, and each active weight moves farther."""
    masked, cosines = {}, {}
    kernel, momentum = "blocks/mlp_up/kernel", tree(1)["blocks/mlp_up/kernel"]
    active = jnp.asarray(np.random.default_rng(3).random(momentum.shape) < 0.25)
    for label, mask in (("dense", jnp.ones_like(active)), ("sparse", active)):
        tx, params = spdf.OPTIMIZERS["muon"](settings("muon")), {kernel: momentum}
        update = tx.update({kernel: momentum * mask}, tx.init(params), params)[0][kernel]
        kept = jnp.sum((update * mask) ** 2) / jnp.sum(update**2)
        size = jnp.sqrt(jnp.sum((update * mask) ** 2) / jnp.sum(mask))
        masked[label] = float(kept), float(size)
        cosines[label] = float(
            jnp.sum(update * momentum * mask) / jnp.linalg.norm(update * mask) / jnp.linalg.norm(momentum * mask)
        )
        values = jnp.linalg.svd(update / (0.2 * 160**0.5), compute_uv=False)
        assert float(values.max()) < 1.3, "near an orthogonal matrix before the mask"
    assert masked["dense"][0] == 1
    assert 2 / 3 < masked["sparse"][0] < 0.9
    assert 1.6 < masked["sparse"][1] / masked["dense"][1] < 2
    assert masked["dense"][1] == pytest.approx(0.2, rel=0.25)
    assert cosines["sparse"] > max(0.9, cosines["dense"])


# --- a run's state ----------------------------------------------------------------------------------------------------


def run_config(name: str, sizes=(1, 1, 1), width: int = 16, **sparsity):
    """RigL at 50 %, unless said otherwise, then dense."""
    c = tiny_config(Path("text"), Path("cache"))
    c.model.n_head, c.model.d_model, c.model.vocab_size = 4, width, 304
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = sizes
    c.pretrain.steps, c.finetune.steps = 12, 4
    set_sparsity(c.pretrain, **({"rule": "rigl", "sparsity": 0.5, "update_every_steps": 3} | sparsity))
    for phase in (c.pretrain, c.finetune):
        phase.optimizer.name, phase.optimizer.peak_learning_rate = name, RATES.get(name, 1e-2)
        phase.grad_accumulation_steps = 2
    c.loop.checkpoint_every_steps, c.loop.eval_every_steps = 5, 6
    return c


def made(config, sizes=(1, 1, 1)):
    """The first phase's plan, its mesh, and its first state there."""
    plan, mesh = make_plan(config)[0], make_mesh(MeshConfig(*sizes))
    state = init_state(GPT(config.model), plan.tx, plan.config.sparsity, plan.filter, config.seed, mesh)
    return plan, mesh, state


@pytest.mark.parametrize(
    "name", [n if n in ("muon", "adafactor") else pytest.param(n, marks=pytest.mark.nightly) for n in RATES]
)
def test_planned_bytes_are_real_ones_on_one_device_and_on_eight_and_come_back_from_a_checkpoint(name, tmp_path):
    config = spdf.resolve(run_config(name, width=128))
    plan, mesh, state = made(config, (2, 2, 2))
    parts = jax.tree.leaves((state.params, state.masks, state.opt_state))
    assert state_bytes(config, plan) == sum(leaf.nbytes for leaf in parts)
    assert bytes_on_device(config, plan, mesh) == sum(leaf.addressable_shards[0].data.nbytes for leaf in parts)
    kernel = state.params["blocks"]["mlp_up"]["kernel"]
    for leaf in jax.tree.leaves(state.opt_state):
        assert leaf.sharding == kernel.sharding if leaf.shape == kernel.shape else True
        factored = name == "adafactor" and leaf.ndim == 2 and leaf.shape[0] == 2
        assert leaf.sharding.is_fully_replicated or not factored

    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(state, {"step": 0})
    checkpoints.wait()
    alone = make_mesh(MeshConfig(1))
    found = checkpoints.restore(jax.eval_shape(lambda: state), state_shardings(alone, plan.tx, state))
    checkpoints.close()
    assert jax.tree.structure(found) == jax.tree.structure(state)
    plain = [s.replace(key=jax.random.key_data(s.key)) for s in (found, state)]
    jax.tree.map(np.testing.assert_array_equal, *plain)


@every_optimizer
def test_eight_devices_step_as_one_does(name):
    tx, params, (masks, _) = make_optimizer(settings(name)), tree(0, 0.1), two_masks()
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        mesh = make_mesh(MeshConfig(*sizes))
        layout = parameter_shardings(mesh, params)
        placed = optimizer_shardings(mesh, tx, jax.eval_shape(tx.init, params), params)
        p, m = (jax.device_put(t, parameter_shardings(mesh, t)) for t in (apply_masks(params, masks), masks))
        state = jax.jit(tx.init, out_shardings=placed)(p)
        step = jax.jit(
            lambda g, s, p, m: tx.update(g, s, p, masks=m, learning_rate=0.01), out_shardings=(layout, placed)
        )
        for i in range(2):
            updates, state = step(jax.device_put(tree(i + 1), layout), state, p, m)
            p = optax.apply_updates(p, updates)
        shared = [leaf for leaf in jax.tree.leaves((p, state)) if not leaf.is_fully_replicated]
        assert bool(shared) == (mesh.size > 1), "split where there are devices to split among"
        found.append(named_leaves(jax.device_get((p, state))))
    assert len(found[0]) > len(params)
    for (leaf, alone), (_, together) in zip(*found, strict=True):
        np.testing.assert_allclose(together, alone, rtol=2e-4, atol=2e-6, err_msg=leaf)


# --- schedule-free ----------------------------------------------------------------------------------------------------


@jax.jit  # as it is in a run: fused, which rounds otherwise
def averaged(state):
    return apply_masks(contrib.schedule_free_eval_params(state.opt_state[1], state.params), state.masks)


def test_a_schedule_free_run_is_evaluated_and_gone_on_from_by_its_average():
    config = spdf.resolve(run_config(FREE))
    _, mesh, state = made(config)
    key = "kernel"
    z = state.opt_state[1].z
    moved = jax.tree.map(lambda leaf: leaf + 1, z)  # under the masks too, as before the first step
    state = state.replace(opt_state=(state.opt_state[0], state.opt_state[1]._replace(z=moved)))
    expected = averaged(state)
    jax.tree.map(np.testing.assert_array_equal, state.variables["params"], expected)
    jax.tree.map(np.testing.assert_array_equal, state.averaged().variables["params"], expected)  # not averaged twice
    assert float(jnp.abs(expected["blocks"]["mlp_up"][key] - state.params["blocks"]["mlp_up"][key]).max()) > 0.1
    masks = state.masks["blocks"]["mlp_up"][key]
    assert not np.asarray(expected["blocks"]["mlp_up"][key])[~np.asarray(masks)].any()
    dense = make_plan(config)[1]
    how = (dense.tx, dense.config.sparsity, dense.filter, mesh)
    fresh = start_phase(state, *how, reset_optimizer=True)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), fresh.params, expected)
    jax.tree.map(np.testing.assert_array_equal, fresh.opt_state[1].z, fresh.params)
    carried = start_phase(state, *how, reset_optimizer=False)
    jax.tree.map(np.testing.assert_array_equal, carried.params, state.params)


def test_the_state_of_other_optimisers_is_its_own_average():
    _, _, state = made(spdf.resolve(run_config("sgd")))
    assert state.averaged() is state


@pytest.mark.slow
def test_a_phase_after_live_blocks_may_have_an_optimiser_of_whole_matrices():
    config = spdf.resolve(
        run_config("sgd", width=128, pattern="block64", sparse_compute="blocks", distribution="uniform")
    )
    _, mesh, state = made(config)
    assert state.topology
    for name in ("adafactor", "muon"):
        tx, dense = make_optimizer(settings(name)), make_plan(config)[1]
        after = start_phase(state, tx, dense.config.sparsity, dense.filter, mesh, reset_optimizer=True)
        expected = jax.eval_shape(tx.init, after.params)
        assert jax.tree.map(jnp.shape, after.opt_state) == jax.tree.map(jnp.shape, expected)
        assert after.params["blocks"]["mlp_up"]["kernel"].shape == (2, 128, 512)


# --- refusals ---------------------------------------------------------------------------------------------------------


REFUSED = {
    "a misspelt name": (
        "sgd",
        {"pretrain__optimizer__name": "moun"},
        r"pretrain\.optimizer\.name: 'moun' .*did you mean 'muon'",
    ),
    "SMET is Adam's": (
        "lion",
        {"pretrain__optimizer__regrowth": "smet"},
        "'smet' is Adam's and 'lion' is not; use 'reset', or name",
    ),
    "a schedule of what has none": (
        FREE,
        {"pretrain__optimizer__schedule": "cosine"},
        r"pretrain\.optimizer\.schedule: 'cosine' .*use 'constant'",
    ),
    "nothing to average": (
        FREE,
        {"pretrain__optimizer__beta1": 0.0},
        r"pretrain\.optimizer\.beta1: 0\.0 .*; use 0\.9",
    ),
    "settings of another": (
        "sgd",
        {"pretrain__optimizer__beta2": 0.9},
        r"beta2: 0\.9 would be ignored, since it is for name 'lion' or",
    ),
    "state that does not fit": (
        "muon",
        {"finetune__reset_optimizer": False, "finetune__optimizer__name": "sgd"},
        "'muon'.* with 'sgd'.* keep different state",
    ),
    "S-muPar": (
        "muon",
        {"model__mup_base_width": 8, "model__mup_density": 0.5},
        "S-muPar's learning rates are Adam's, not those of 'muon'; use 'adamw', or",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_go_together_is_refused_with_the_fix(what):
    name, changes, message = REFUSED[what]
    c = run_config(name)
    for place, value in changes.items():
        *sections, last = place.split("__")
        node = c
        for section in sections:
            node = node[section]
        node[last] = value
    with pytest.raises(spdf.InputError, match=message) as caught:
        spdf.resolve(c)
    assert "\n" not in str(caught.value)


@every_optimizer
def test_live_blocks_and_top_kast_take_an_optimiser_or_refuse_it_in_a_sentence(name):
    for sparsity, refused, message in (
        (
            {"pattern": "block8", "sparse_compute": "blocks"},
            ("muon", "adafactor"),
            "whole matrices.*'masked', or 'adamw'",
        ),
        ({"rule": "topkast", "sparsity": 0.5}, ("adafactor", FREE), "reads the parameters themselves.*use 'adamw'"),
    ):
        c = run_config(name, **sparsity)
        if "rule" in sparsity:
            c.pretrain.optimizer.regrowth = "keep"
        with pytest.raises(spdf.InputError, match=message) if name in refused else contextlib.nullcontext():
            make_plan(spdf.resolve(c))


# --- one's own --------------------------------------------------------------------------------------------------------

OWN = {
    "optax.adam(1e-3)": (lambda c: optax.adam(1e-3), "go against the gradient; give a direction, such as optax.scale_by_adam"),
    "no function": (optax.scale_by_adam(), "not a function of the phase's optimizer section; write lambda config: ..."),
    "no transformation": (lambda c: 3, "gives 3, which is no optax transformation such as optax.scale_by_adam"),
}  # fmt: skip


@pytest.mark.parametrize("what", OWN)
def test_what_is_no_direction_is_refused_before_anything_runs(what, monkeypatch):
    factory, message = OWN[what]
    monkeypatch.setitem(spdf.OPTIMIZERS, "mine", factory)
    config = spdf.resolve(run_config("mine"))
    with pytest.raises(spdf.InputError, match=rf"optimizer\.name.*{message}"):
        make_plan(config)


def test_one_of_an_experiment_file_is_known_by_its_code(tmp_path, monkeypatch):
    file = tmp_path / "mine.py"
    file.write_text("def factory(config):\n    return optax.scale_by_belief(config.beta1, config.momentum)\n")
    scope = {"optax": optax}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    with pytest.raises(spdf.InputError, match="'mine' is not one of 'adamw'"):
        spdf.resolve(run_config("mine"))
    monkeypatch.setitem(spdf.OPTIMIZERS, "mine", scope["factory"])
    c = run_config("mine")
    c.pretrain.optimizer.momentum = 0.5  # of whatever use
    config = spdf.resolve(c)
    assert code_files(config, "") == {"mine.py": file}
    assert list(own_parts(config)) == ["optimizer mine"]
    first = make_plan(config)[0].tx
    assert make_plan(config)[0].tx is first
    monkeypatch.setitem(spdf.OPTIMIZERS, "mine", lambda c: optax.scale_by_belief())
    assert make_plan(config)[0].tx is not first, "the same name, other code"


# --- whole runs -------------------------------------------------------------------------------------------------------


def whole_run(text: Path, name: str):
    if name == "mine":
        spdf.OPTIMIZERS["mine"] = lambda c: optax.scale_by_belief(c.beta1, c.beta2)
    c = run_config(name)
    c.data.path, c.data.cache_dir = str(text), str(text.parent / "cache")
    c.pretrain.sparsity.update(NO_WINDOW | {"update_every_steps": 2})
    return spdf.resolve(c)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("data") / "text")


def arrays(workdir: Path):
    """A run's last state as it was saved."""
    state = saved_run_and_record(workdir)[0].state
    return dict(named_leaves(jax.device_get(state.replace(key=jax.random.key_data(state.key)))))


@pytest.mark.nightly
@pytest.mark.usefixtures("few_matrices")  # as in the program
@pytest.mark.parametrize("name", [*RATES, "mine"])
def test_kill_9_and_resume_with_a_moving_topology_change_no_bit(name, text, tmp_path, capsys):
    try:
        config, steps = whole_run(text, name), []
        original = loop.make_steps
        programs._kept_program.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_steps", lambda *args: steps.append(original(*args)) or steps[-1])
            summary = jobs.train(config, tmp_path / "whole", progress=False)
        assert [(s.train._cache_size(), s.topology._cache_size()) for s in steps] == [(1, 1), (1, 0)]
        rows = rows_without_clock(tmp_path / "whole")
        assert sum("churn" in row for row in rows) >= 3
        assert max(max(c) for row in rows if "churn" in row for c in row["churn"].values()) > 0.05
        assert summary["val_loss"] < summary["initial_val_loss"] - 0.1
        for moment in ("topology", "phase"):  # in a save: `test_train.py`, whatever is saved
            workdir = tmp_path / moment
            ended = subprocess.run([sys.executable, __file__, workdir, text, moment, name], check=False)
            assert ended.returncode == -signal.SIGKILL
            assert not (workdir / "summary.json").exists()
            jobs.train(config, workdir, progress=False)
            ours, theirs = arrays(workdir), arrays(tmp_path / "whole")
            assert ours.keys() == theirs.keys()
            for key, array in theirs.items():
                np.testing.assert_array_equal(ours[key], array, err_msg=f"{moment} {key}")
            found = rows_without_clock(workdir)
            assert found == rows
        with capsys.disabled():
            print(f" {name}: {summary['initial_val_loss']:.3f} to {summary['val_loss']:.3f}, 2 kills ", end="")
    finally:
        spdf.OPTIMIZERS.pop("mine", None)


@pytest.mark.slow
@pytest.mark.usefixtures("few_matrices")
def test_what_a_schedule_free_run_gives_out_is_its_average(text, tmp_path):
    """Validation in the run and after it, a run's result, and the start of the run that goes on from it."""
    config, workdir = whole_run(text, FREE), tmp_path / "run"
    summary = jobs.train(config, workdir, progress=False)
    assert evaluate_checkpoint(config, workdir)["val_loss"] == summary["val_loss"]
    result, raw = saved_run(workdir).result, saved_run(workdir).state
    average = averaged(raw)
    jax.tree.map(np.testing.assert_array_equal, result.params, average)
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (average, raw.params)), strict=True))
    c = run_config(FREE)
    c.data.path, c.data.cache_dir, c.init_from, c.phases = (
        str(text),
        str(text.parent / "cache"),
        str(workdir),
        ("finetune",),
    )
    del c.pretrain
    assert jobs.train(spdf.resolve(c), tmp_path / "next", progress=False)["initial_val_loss"] == pytest.approx(
        summary["val_loss"], abs=1e-6
    )
    c.finetune.reset_optimizer, c.seed = False, 1
    first, _ = next(iter(spdf.watch_training(spdf.resolve(c))))
    jax.tree.map(np.testing.assert_array_equal, first.params, raw.params)
    assert read_json(workdir / "summary.json", "")["val_loss"] == summary["val_loss"]


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)  # as in the tests: whose compiled programs are then this process's too
    die_at(sys.argv[3])
    with few_matrices():
        jobs.train(whole_run(Path(sys.argv[2]), sys.argv[4]), Path(sys.argv[1]), progress=False)
