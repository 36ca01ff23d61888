"""Phases with a teacher: the loss and its gradient, what is refused, what it costs, and the same bits after a restart."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_experiments import get_config
from tiny import drawn_params, rows_without_clock, set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax import processes
from spdf_jax.config.sweep import resolve_sweep
from spdf_jax.data import Batch, prepare
from spdf_jax.data.tokenizer import train_tokenizer
from spdf_jax.errors import Restart
from spdf_jax.huggingface import load_model, save_model
from spdf_jax.jobs import prune
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.model.flops import parameter_count, step_flops
from spdf_jax.planning.describe import describe, teacher_bytes
from spdf_jax.planning.pod_plan import lower_steps, state_bytes
from spdf_jax.sharding import make_mesh
from spdf_jax.training.distill import Lesson, Taught
from spdf_jax.training.loop import make_phase_steps
from spdf_jax.training.phases import make_plan
from spdf_jax.training.restore import saved_run
from spdf_jax.training.teachers import check_teachers, first_teacher, load_teacher
from spdf_jax.training.watch import watch_training
from spdf_jax.tree import named_leaves

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("distill") / "text")


def one_phase(text, teacher="", **distill):
    c = tiny_config(text, text.parent / "cache")
    c.phases = ("pretrain",)
    del c["finetune"]
    c.model.n_layer, c.pretrain.steps, c.pretrain.optimizer.warmup_steps = 1, 2, 1
    set_sparsity(c.pretrain)
    c.pretrain.distill.update({"teacher": str(teacher)} | distill)
    return c


@pytest.fixture(scope="module")
def dense(text, tmp_path_factory):
    """Two dense steps."""
    workdir = tmp_path_factory.mktemp("dense") / "run"
    jobs.train(spdf.resolve(one_phase(text)), workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def wide(text, tmp_path_factory):
    """A teacher of another shape, as a Hugging Face folder, with the tokenizer of the runs here."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    run = spdf.resolve(one_phase(text))
    model = dataclasses.replace(run.model, n_layer=2, d_model=24, n_head=3)
    save_model(folder, model, drawn_params(model, 3), tokenizer=prepare(run.data, progress=False).tokenizer)
    return folder


# --- the loss ------------------------------------------------------------------------------------------------------------


class Answers:
    """In place of a model: logits as they are given."""

    def apply(self, variables, tokens_BT, *, segments_BT):
        return variables["params"]


def reference(logits, teacher, targets, weights, weight, temperature):
    """Loss sum and its gradient, in float64, by the formulas of a softmax's gradient."""

    def softmax(x):
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    logits, teacher = np.float64(logits), np.float64(teacher)
    hot = np.eye(logits.shape[-1])[targets]
    own = -np.log((softmax(logits) * hot).sum(-1))
    p, q = softmax(teacher / temperature), softmax(logits / temperature)
    divergence = (p * (np.log(p) - np.log(q))).sum(-1)
    loss = (weights * ((1 - weight) * own + weight * temperature**2 * divergence)).sum()
    return loss, weights[..., None] * ((1 - weight) * (softmax(logits) - hot) + weight * temperature * (q - p))


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 2.0), (0.25, 0.5)])
def test_the_loss_and_its_gradient_are_those_of_a_reference_in_float64(weight, temperature):
    rng = np.random.default_rng(0)
    logits, teacher = rng.normal(0, 3, (2, 2, 3, 7)).astype(np.float32)
    targets, weights = rng.integers(0, 7, (2, 3)), np.array([[1, 0, 1], [0.5, 1, 1]], np.float32)
    batch = Batch(targets, jnp.asarray(targets), jnp.asarray(weights), None)
    model = Taught(Answers(), Lesson(Answers(), weight, temperature), jnp.asarray(teacher))
    sums = jax.value_and_grad(lambda x: model.sums({"params": x}, batch), has_aux=True)
    (loss, total), grads = sums(jnp.asarray(logits))
    expected, expected_grads = reference(logits, teacher, targets, weights, weight, temperature)
    assert float(total) == weights.sum()
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    np.testing.assert_allclose(grads, expected_grads, atol=1e-5)


def test_of_its_own_teacher_a_model_learns_nothing_more():
    logits = jax.random.normal(jax.random.key(0), (1, 2, 5))
    batch = Batch(jnp.zeros((1, 2), int), jnp.zeros((1, 2), int), jnp.ones((1, 2)), None)
    model = Taught(Answers(), Lesson(Answers(), 1.0, 1.0), logits)
    loss, grads = jax.value_and_grad(lambda x: model.sums({"params": x}, batch)[0])(logits)
    assert abs(float(loss)) < 1e-6
    assert np.abs(grads).max() < 1e-6


def test_at_weight_0_the_program_is_that_of_a_run_without_a_teacher(text, wide):
    programs = []
    for c in (one_phase(text), one_phase(text, wide, weight=0.0), one_phase(text, wide)):
        config = spdf.resolve(c)
        (plan,), mesh = make_plan(config), make_mesh(config.mesh)
        state = next(watch_training(spdf.resolve(one_phase(text))))[0]
        steps = make_phase_steps(spdf.GPT(config.model), plan, mesh, state, load_teacher(config, None, plan, mesh))
        programs.append(steps.train)
    assert programs[0] is programs[1]
    assert programs[1] is not programs[2]


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        (
            {"weight": 0.3},
            r"config.pretrain.distill.weight: 0.3 would be ignored, since it is for phases with a distill",
        ),
        ({"temperature": 2.0}, r"config.pretrain.distill.temperature: 2.0 would be ignored"),
        ({"weight": 1.5, "teacher": "x"}, r"config.pretrain.distill.weight: 1.5 must be at least 0 and at most 1"),
        ({"temperature": 0.0, "teacher": "x"}, r"config.pretrain.distill.temperature: 0.0 must be above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(text, distill, said):
    with pytest.raises(spdf.InputError, match=said):
        spdf.resolve(one_phase(text, **distill))


def test_a_teacher_of_a_cell_comes_before_the_cells_that_it_teaches(text):
    def sweep(*order):
        cells = {"dense": one_phase(text), "taught": one_phase(text, "cell:dense")}
        return spdf.sweep_config(
            "mine",
            "test",
            variants=("test",),
            title="",
            cells={name: cells[name] for name in order},
            rows=[],
            columns=[],
        )

    assert list(resolve_sweep(sweep("dense", "taught")).cells) == ["dense", "taught"]
    with pytest.raises(
        spdf.InputError, match=r"config.cells.taught.pretrain.distill.teacher: no cell 'dense' before this one"
    ):
        resolve_sweep(sweep("taught", "dense"))


def refusal(config, tokenizer, workdir=None):
    config = spdf.resolve(config)
    with pytest.raises(spdf.InputError) as refused:
        check_teachers(config, workdir, make_plan(config), tokenizer)
    return str(refused.value)


def test_teachers_that_can_teach_nothing_are_refused(text, dense, wide, tmp_path):
    config = spdf.resolve(one_phase(text, wide))
    tokenizer = prepare(config.data, progress=False).tokenizer
    check_teachers(config, None, make_plan(config), tokenizer)

    assert "config.pretrain.distill.teacher: 'nowhere' is neither a run's workdir nor" in refusal(
        one_phase(text, "nowhere"), tokenizer
    )
    assert "config.pretrain.distill.teacher: 'cell:x' is of a sweep" in refusal(one_phase(text, "cell:x"), tokenizer)
    other = train_tokenizer(["abc abd"], vocab_size=260, progress=False)
    for teacher in (dense, wide):
        said = refusal(one_phase(text, teacher), other)
        assert f"{teacher} has another vocabulary (300 others)" in said
    c = one_phase(text, wide)
    c.model.vocab_size = 400
    assert f"{wide} has another vocabulary (300 tokens there, 400 here)" in refusal(c, tokenizer)
    c = one_phase(text, wide)
    c.model.context = 64
    assert "has a context of 32, shorter than the sequences of 64" in refusal(c, tokenizer)
    shutil.copytree(wide, tmp_path / "wide")
    said = refusal(one_phase(text, "cell:wide"), tokenizer, tmp_path / "run")
    assert "config.pretrain.distill.teacher: " in said
    assert "holds another model: n_layer 2 there, 1 here" in said


def test_a_teacher_that_cannot_be_read_leaves_nothing_behind(text, wide, tmp_path):
    shutil.copytree(wide, tmp_path / "wide")
    (tmp_path / "wide" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(spdf.InputError, match=r"model\.safetensors"):
        jobs.train(spdf.resolve(one_phase(text, tmp_path / "wide")), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_that_goes_on_asks_for_the_teacher_that_it_had(text, wide, dense):
    mesh = make_mesh(spdf.resolve(one_phase(text)).mesh)

    def resumed(teacher, teachers):
        config = spdf.resolve(one_phase(text, teacher))
        return first_teacher(config, wide, make_plan(config), mesh, None, {"phase": 0} | teachers)

    teacher, found = first_teacher(
        config := spdf.resolve(one_phase(text, wide)), wide, make_plan(config), mesh, None, {"origin": {}}
    )
    assert found == {"pretrain": teacher.fingerprint}
    assert resumed(wide, {"teachers": found})[1] == found
    for other, teachers in ((dense, {"teachers": found}), (wide, {}), ("", {"teachers": found})):
        with pytest.raises(spdf.InputError, match=r"does not hold what this run learns from \(fingerprint "):
            resumed(other, teachers)


@pytest.mark.slow
def test_every_row_of_the_experiment_is_three_chains_of_one_seed_each():
    sweep = resolve_sweep(get_config("sparse_from_dense", "mini"))
    cells = sweep.cells

    def source(cell):
        return cells[cell.init_from.removeprefix("cell:")]

    for row in sweep.rows:
        chains = {end: [cells[name] for choice, name in row.choices if choice == end] for end, _ in row.choices}
        assert {tuple(cell.seed for cell in ends) for ends in chains.values()} == {(0, 1, 2)}
        for continued, dense, sparse in zip(*chains.values(), strict=True):
            phase, start = continued.phases["pretrain"], source(continued)
            assert (start.seed, start.init_from, start.model) == (continued.seed, "", continued.model)
            assert phase.steps == cells["control_0"].phases["pretrain"].steps, (
                "the dense control is trained on for as long"
            )
            assert phase.distill.teacher == (continued.init_from if "distilled" in row.label else "")
            assert source(dense) is source(sparse) is continued
            assert dense.phases["finetune"].sparsity.dense
            assert sparse.phases["finetune"].sparsity.sparsity == phase.sparsity.sparsity
    assert {name for row in sweep.rows for _, name in row.choices} == {n for n in cells if not n.startswith("dense_")}


# --- what it costs -------------------------------------------------------------------------------------------------------


def test_the_forward_pass_of_the_teacher_is_counted(text, wide):
    config, alone = (spdf.resolve(one_phase(text, place)) for place in (wide, ""))
    teacher = dataclasses.replace(config.model, n_layer=2, d_model=24, n_head=3)
    (plan,), (without,) = make_plan(config), make_plan(alone)
    params = spdf.GPT(teacher).init(jax.random.key(0), jnp.zeros((1, 1), int))["params"]
    weights = sum(leaf.size for name, leaf in named_leaves(params) if name.endswith("kernel")) + 24 * 300
    forward = 4 * 32 * (2 * weights + 4 * 32 * 24 * 2)
    assert forward == step_flops(teacher, seq_len=32, sequences=4, active={}) // 3
    for name in ("train_flops", "dense_flops"):
        assert getattr(plan.cost(0), name) - getattr(without.cost(0), name) == forward
        assert getattr(spdf.run_cost(config), name) - getattr(spdf.run_cost(alone), name) == 2 * forward
    assert plan.cost(0).tokens == without.cost(0).tokens


def test_the_plan_has_its_memory(text, wide):
    config, alone = (spdf.resolve(one_phase(text, place)) for place in (wide, ""))
    (plan,), (without,) = make_plan(config), make_plan(alone)
    size = parameter_count(dataclasses.replace(config.model, n_layer=2, d_model=24, n_head=3))
    assert teacher_bytes(plan) == 4 * size
    table = describe(config)
    assert f"  teacher               {wide}, {size:,} parameters, 0.5 of the loss at temperature 1\n" in table
    assert f"  and of a teacher      {4 * size:,} (parameters alone)" in table
    assert "teacher" not in describe(alone)
    mesh = make_mesh(config.mesh)
    assert state_bytes(config, plan, mesh) - state_bytes(alone, without, mesh) == 4 * size


@pytest.mark.slow
def test_every_step_of_a_plan_for_a_pod_is_given_the_teacher(text, wide):
    def inputs(teacher):
        c = one_phase(text, teacher)
        set_sparsity(c.pretrain, rule="rigl", sparsity=0.5, update_every_steps=1)
        config = spdf.resolve(c)
        lowered = lower_steps(config, make_plan(config)[0], make_mesh(config.mesh))
        return {name: sum(leaf.size for leaf in jax.tree.leaves(step.in_avals)) for name, step in lowered}

    taught, alone, size = inputs(wide), inputs(""), sum(x.size for x in jax.tree.leaves(load_model(wide)[1]))
    assert {name: taught[name] - alone[name] for name in alone} == {
        "train step": size,
        "topology step": size,
        "prune and grow alone": 0,
    }


def test_a_cell_counts_as_a_model_like_the_run_s_where_its_folder_is_not_known(text):
    config = spdf.resolve(one_phase(text, "cell:dense"))
    assert make_plan(config)[0].teacher() == config.model


# --- runs ----------------------------------------------------------------------------------------------------------------


def leaves(state):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(state.params)}


def same(left, right):
    return all((left[name] == right[name]).all() for name in left)


@pytest.mark.slow
def test_a_taught_run_resumes_to_the_same_bits_and_knows_its_teacher(text, wide, tmp_path, monkeypatch):
    """With micro-batches and masks that move; the teacher moves, too, while the run rests."""
    there = shutil.copytree(wide, tmp_path / "there")
    c = one_phase(text, there)
    c.pretrain.steps, c.pretrain.grad_accumulation_steps = 6, 2
    set_sparsity(c.pretrain, rule="rigl", sparsity=0.5, update_every_steps=3)
    config = spdf.resolve(c)
    summary = jobs.train(config, tmp_path / "whole", progress=False)
    assert summary["train_flops"] == spdf.run_cost(config).train_flops
    *_, (watched, _) = watch_training(config)
    whole = saved_run(tmp_path / "whole").state
    assert same(leaves(watched), leaves(whole))
    monkeypatch.setattr(processes, "preempted", lambda step: step == 4)
    with pytest.raises(Restart):
        jobs.train(config, tmp_path / "run", progress=False)
    monkeypatch.undo()
    moved, other = there.rename(tmp_path / "moved"), tmp_path / "other"
    model = dataclasses.replace(config.model, n_layer=2, d_model=24, n_head=3)
    save_model(other, model, drawn_params(model, 4))
    for teacher in ("", str(other)):
        c.pretrain.distill.teacher = teacher
        with pytest.raises(spdf.InputError, match=r"config.pretrain.distill.*(does not hold|would be ignored)"):
            jobs.train(spdf.resolve(c), tmp_path / "run", progress=False)
    c.pretrain.distill.teacher = str(moved)
    jobs.train(spdf.resolve(c), tmp_path / "run", progress=False)
    assert same(leaves(saved_run(tmp_path / "run").state), leaves(whole))
    assert rows_without_clock(tmp_path / "run") == rows_without_clock(tmp_path / "whole")
    shutil.rmtree(moved)
    assert jobs.train(config, tmp_path / "run", progress=False)["steps"] == 6, "finished: needs it no more"
    assert evaluate_checkpoint(config, tmp_path / "run")["step"] == 6


@pytest.mark.slow
def test_what_is_taught_is_another_model_and_at_weight_0_the_same_bits(text, wide):
    def end(teacher, **how):
        *_, (state, metrics) = watch_training(spdf.resolve(one_phase(text, teacher, **how)))
        return leaves(state), metrics["val_loss"]

    alone, loss = end("")
    assert same(end(wide, weight=0.0)[0], alone)
    taught, taught_loss = end(wide)
    assert not same(taught, alone)
    assert abs(taught_loss - loss) < 0.5, "validation is of the data alone, whatever the loss trained on"


@pytest.mark.slow
def test_micro_batches_and_a_mesh_change_nothing_but_rounding(text, wide):
    def end(**settings):
        c = one_phase(text, wide)
        c.pretrain.batch_size = 8
        c.update_from_flattened_dict(settings)
        *_, (state, metrics) = watch_training(spdf.resolve(c))
        return state, metrics

    alone, metrics = end()
    for settings in ({"pretrain.grad_accumulation_steps": 2}, {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}):
        other, others = end(**settings)
        np.testing.assert_allclose(others["loss"], metrics["loss"], rtol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), other.params, alone.params)
    config = spdf.resolve(one_phase(text, wide))
    mesh = make_mesh(dataclasses.replace(config.mesh, data=1, fsdp=4, tensor=2))
    params = load_teacher(config, None, make_plan(config)[0], mesh).params
    assert not params["blocks"]["mlp_up"]["kernel"].sharding.is_fully_replicated


@pytest.mark.slow
def test_the_chain_from_a_dense_model_to_a_fine_tuned_one(text, dense, tmp_path):
    """Pruned into a folder; trained on under its masks, taught by the dense run, then dense on a task: a run of two phases."""
    c = one_phase(text)
    c.init_from = str(dense)
    set_sparsity(c.pretrain, rule="static", sparsity=0.5, init="wanda", calibration_sequences=4)
    folder = prune.prune(spdf.resolve(c), tmp_path / "pruned")

    c = tiny_config(text, text.parent / "cache")
    c.model.n_layer, c.init_from = 1, str(folder)
    c.pretrain.steps, c.pretrain.optimizer.warmup_steps, c.pretrain.distill.teacher = 4, 1, str(dense)
    set_sparsity(c.pretrain, rule="static", sparsity=0.5)
    task = c.finetune.task
    task.name, task.train_examples, task.validation_examples, task.test_examples = "restaurant", 8, 4, 2
    c.finetune.epochs, c.finetune.steps, c.finetune.seq_len, c.model.context = 1, 600, 32, 32
    config = spdf.resolve(c)
    states = {}
    for state, _ in watch_training(config):
        states[int(state.step)] = leaves(state), jax.tree.map(np.asarray, state.masks)
    (params, masks), (last, dropped) = states[4], list(states.values())[-1]
    mask = masks["blocks"]["mlp_up"]["kernel"]
    assert mask.mean() == 0.5
    assert not params["blocks/mlp_up/kernel"][~mask].any()
    assert {leaf.ndim for leaf in jax.tree.leaves(dropped)} == {0}
    assert last["blocks/mlp_up/kernel"][~mask].any(), "dense again"

    first, second = make_plan(config)
    assert (first.teacher is None, second.teacher) == (False, None)
    summary = jobs.train(config, tmp_path / "run", progress=False)
    assert same(leaves(saved_run(tmp_path / "run").state), last)
    record = json.loads(next((tmp_path / "run").glob("checkpoints/*/record/metadata")).read_text())
    assert list(record["teachers"]) == ["pretrain"]
    assert summary["steps"] == len(states) - 1
