"""From a pre-trained run to a fine-tuned one: where it starts, when it stops, what it leaves."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny import set_sparsity, tiny_config, write_text

import spdf_jax as spdf
from spdf_jax.data import encode_task, load_task, load_tokenizer, task_batches
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.jobs.generate import generate_text
from spdf_jax.model.flops import step_flops
from spdf_jax.sharding import make_mesh
from spdf_jax.sparsity.masks import active_counts
from spdf_jax.training import loop, watch
from spdf_jax.training.metrics import read_metrics
from spdf_jax.training.phases import make_plan, total_cost
from spdf_jax.training.restore import initial_from, saved_run
from spdf_jax.training.sources import source_folder
from spdf_jax.tree import named_leaves
from spdf_jax.workdir import read_json

pytestmark = pytest.mark.usefixtures("no_figures", "all_with_few_matrices")

UP = "blocks/mlp_up/kernel"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("finetune") / "text")


def base(text, phase):
    c = tiny_config(text, text.parent / "cache")
    c.phases = (phase,)
    del c["pretrain" if phase == "finetune" else "finetune"]
    return c


@pytest.fixture(scope="module")
def pretrained(text, tmp_path_factory):
    """24 static steps at 80 %."""
    c = base(text, "pretrain")
    c.pretrain.steps = 24
    set_sparsity(c.pretrain, rule="static", sparsity=0.8, sparsify_head=True)
    workdir = tmp_path_factory.mktemp("pretrained")
    jobs.train(spdf.resolve(c), workdir, progress=False)
    return workdir


def finetuning(text, pretrained, **sparsity):
    c = base(text, "finetune")
    c.init_from = str(pretrained)
    c.finetune.steps = 6
    for name, value in sparsity.items():
        setattr(c.finetune.sparsity, name, value)
    return c


def states(config, workdir):
    """The saved states of a run by step."""
    jobs.train(spdf.resolve(config), workdir, progress=False)
    return saved_run(workdir)


def leaf(tree, name=UP):
    return np.asarray(dict(named_leaves(tree))[name])


def first_state(config, workdir):
    """The state a run starts from."""
    run = spdf.resolve(config)
    source = source_folder(run, workdir)
    mesh = make_mesh(run.mesh)
    return initial_from(source, run, make_plan(run)[0], mesh)


def test_dropping_the_masks_starts_at_the_same_loss_to_the_bit_with_revived_weights_at_zero(text, pretrained, tmp_path):
    c = finetuning(text, pretrained)
    before, first = saved_run(pretrained).state, first_state(c, tmp_path)
    mask = leaf(before.masks)
    assert 0.79 < 1 - mask.mean() < 0.81
    assert all(m.ndim == 0 for m in jax.tree.leaves(first.masks))
    jax.tree.map(np.testing.assert_array_equal, first.params, before.params)
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(first.opt_state))
    c.finetune.steps = 1
    after = states(c, tmp_path).state
    last = [row["val_loss"] for row in read_metrics(pretrained) if "val_loss" in row][-1]
    assert next(row["val_loss"] for row in read_metrics(tmp_path) if "val_loss" in row) == last
    assert (leaf(after.params)[~mask] != 0).mean() > 0.9, "all but those of dead neurons move"


def test_sparse_finetuning_keeps_the_masks_and_their_zeros(text, pretrained, tmp_path):
    before = saved_run(pretrained).state
    after = states(finetuning(text, pretrained, rule="static", sparsity=0.8, sparsify_head=True), tmp_path).state
    jax.tree.map(np.testing.assert_array_equal, after.masks, before.masks)
    mask = leaf(after.masks)
    assert (leaf(after.params)[~mask] == 0).all()
    assert (leaf(after.params)[mask] != leaf(before.params)[mask]).mean() > 0.9


@pytest.mark.slow
def test_redensifying_at_once_grows_to_the_exact_count_beside_what_was_there(text, pretrained, tmp_path):
    c = finetuning(text, pretrained, rule="static", sparsity=0.5, sparsify_head=True)
    before, first = saved_run(pretrained).state, first_state(c, tmp_path)
    plan = make_plan(spdf.resolve(c))[0]
    for name, counts in active_counts(first.masks, first.params, plan.filter).items():
        assert set(np.asarray(counts).tolist()) == {plan.programme.counts(0)[name]}
        assert leaf(first.masks, name)[leaf(before.masks, name)].all()
    jax.tree.map(np.testing.assert_array_equal, first.params, before.params)
    head_dense = first_state(finetuning(text, pretrained, rule="static", sparsity=0.8), tmp_path)
    assert leaf(head_dense.masks, "wte/embedding").shape == ()
    np.testing.assert_array_equal(leaf(head_dense.masks), leaf(before.masks))


@pytest.mark.slow
def test_redensifying_on_a_schedule_ends_dense(text, pretrained, tmp_path):
    table = ((0.0, 0.8), (0.2, 0.5), (0.6, 0.0))
    c = finetuning(
        text, pretrained, rule="set", schedule="table", table=table, sparsify_head=True, update_every_steps=2
    )
    c.finetune.steps, c.loop.eval_every_steps = 10, 10
    after = states(c, tmp_path).state
    assert leaf(after.masks).all()
    logged = {round(row["sparsity"], 2) for row in read_metrics(tmp_path) if "loss" in row}
    assert logged == {0.8, 0.5, 0.0}


def test_the_optimiser_is_carried_over_on_request(text, pretrained, tmp_path):
    c = finetuning(text, pretrained)
    c.finetune.reset_optimizer = False
    before, first = saved_run(pretrained).state, first_state(c, tmp_path)
    jax.tree.map(np.testing.assert_array_equal, first.opt_state, before.opt_state)
    assert any((np.asarray(x) != 0).any() for x in jax.tree.leaves(first.opt_state))


def test_it_goes_on_from_an_exported_gpt2(text, pretrained, tmp_path):
    folder = export(spdf.resolve(spdf_config(pretrained)), pretrained)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert export(spdf.resolve(spdf_config(pretrained)), pretrained) == folder, "what it made itself it replaces"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    for name, content in (("notes.txt", b"mine"), ("config.json", before["config.json"] + b" ")):
        (folder / name).write_bytes(content)
        with pytest.raises(spdf.InputError, match="is there already, and not as it was exported"):
            export(spdf.resolve(spdf_config(pretrained)), pretrained)
        assert (folder / name).read_bytes() == content
        if name in before:
            (folder / name).write_bytes(before[name])
        else:
            (folder / name).unlink()
    c = finetuning(text, folder)
    first = first_state(c, tmp_path)
    np.testing.assert_array_equal(leaf(first.params), leaf(saved_run(pretrained).state.params))
    c.finetune.reset_optimizer = False
    with pytest.raises(spdf.InputError, match=r"finetune.reset_optimizer: .* holds no optimiser state"):
        first_state(c, tmp_path)


def spdf_config(workdir):
    from ml_collections import ConfigDict

    values = json.loads((workdir / "config.json").read_text())
    del values["command"], values["crc32"]
    return ConfigDict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "init_from", "nowhere"), "init_from: 'nowhere' is neither a run's workdir nor"),
        (lambda c: setattr(c, "init_from", "cell:other"), "init_from: '.*other' is neither"),
        (lambda c: setattr(c.model, "n_head", 4), "holds another model: n_head 2 there, 4 here"),
        (
            lambda c: (
                setattr(c.finetune, "reset_optimizer", False),
                setattr(c.finetune.optimizer, "regrowth", "smet"),
            ),
            "finetune.reset_optimizer: False cannot carry the state over",
        ),
    ],
)
def test_what_cannot_be_gone_on_from_is_refused_and_leaves_nothing(change, message, text, pretrained, tmp_path):
    c = finetuning(text, pretrained)
    change(c)
    with pytest.raises(spdf.InputError, match=message):
        jobs.train(spdf.resolve(c), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_watched_run_starts_from_another_and_stops_early_as_the_run_itself_does(
    text, pretrained, tmp_path, monkeypatch
):
    c = finetuning(text, pretrained)
    c.finetune.steps, c.finetune.patience_evaluations, c.loop.eval_every_steps = 40, 1, 2
    config, losses = spdf.resolve(c), [5.0, 4.0, 4.5]  # at steps 0, 2, 4: the last is no better
    measured = iter(losses * 2)
    for module in (loop, watch):
        monkeypatch.setattr(module, "evaluate", lambda *_: next(measured))
    jobs.train(config, tmp_path, progress=False)
    rows = [row for row in read_metrics(tmp_path) if "loss" in row]
    watched = [(int(state.step), metrics.get("loss")) for state, metrics in spdf.watch_training(config)]
    assert watched == [(0, None), *((row["step"], row["loss"]) for row in rows)]
    assert watched[-1][0] == 4


def test_a_watched_run_has_no_cell_beside_it_to_start_from(text):
    c = base(text, "finetune")
    c.init_from = "cell:dense"
    with pytest.raises(
        spdf.InputError, match=r"^config.init_from: 'cell:dense' is of a sweep; name the workdir of that cell"
    ):
        next(spdf.watch_training(spdf.resolve(c)))


@pytest.mark.slow
def test_early_stopping_keeps_the_best_and_survives_a_restart(text, pretrained, tmp_path, monkeypatch):
    losses = iter([5.0, 4.0, 3.0, 3.5, 3.0, 9.0])  # at steps 0, 2, 4, 6, 8: two in a row no better than 3.0
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    c = finetuning(text, pretrained)
    c.finetune.steps, c.finetune.patience_evaluations, c.loop.eval_every_steps = 40, 2, 2
    c.loop.checkpoint_every_steps = 7

    save, calls = loop._save, []

    def saving(run, checkpoints, plan, state):
        save(run, checkpoints, plan, state)
        calls.append(int(state.step))
        if calls == [0, 2, 4, 7]:  # the checkpoint at 7 is on its way
            checkpoints.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save", saving)
    with pytest.raises(KeyboardInterrupt):
        jobs.train(spdf.resolve(c), tmp_path, progress=False)
    summary = jobs.train(spdf.resolve(c), tmp_path, progress=False)
    assert (summary["steps"], summary["best_step"], summary["val_loss"]) == (8, 4, 3.0)
    assert next(losses) == 9.0, "it stopped at the fourth evaluation after the first"
    assert int(saved_run(tmp_path).state.step) == 4
    rows = [row["step"] for row in read_metrics(tmp_path) if "val_loss" in row]
    assert rows == [0, 2, 4, 6, 8]


@pytest.mark.slow
def test_a_phase_stops_early_by_its_own_losses_alone(text, tmp_path, monkeypatch, capsys):
    """The losses of the text before it are lower, and over something else."""
    losses = iter([1.1, 1.0, 9.0, 5.0, 4.0, 4.5, 0.1])  # of text at steps 0 and 2; of the task from step 2 on
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    c = restaurant(text)
    c.phases, c.pretrain, c.pretrain.steps = ("pretrain", "finetune"), base(text, "pretrain").pretrain, 2
    c.finetune.epochs, c.finetune.patience_evaluations = 6, 1
    set_sparsity(c.pretrain)
    c.pretrain.optimizer.warmup_steps = 1
    config = spdf.resolve(c)
    summary = jobs.train(config, tmp_path, progress=False)
    epoch = make_plan(config)[1].epoch_steps
    assert (summary["steps"], summary["best_step"], summary["val_loss"]) == (2 + 3 * epoch, 2 + 2 * epoch, 4.0)
    assert next(losses) == 0.1, "it stopped at the third evaluation of the task after its first"
    assert "validation loss 9.000 at first, 4.000 at best" in capsys.readouterr().out
    best = saved_run(tmp_path)
    assert (best.plan.name, int(best.state.step)) == ("finetune", 2 + 2 * epoch)
    rows = [(row["phase"], row["step"], row["val_loss"]) for row in read_metrics(tmp_path) if "val_loss" in row]
    assert rows[:3] == [("pretrain", 0, 1.1), ("pretrain", 2, 1.0), ("finetune", 2, 9.0)]


def test_where_the_first_evaluation_is_the_best_its_state_is_the_result(text, pretrained, tmp_path, monkeypatch):
    losses = iter([3.0, 4.0, 3.0])
    monkeypatch.setattr(loop, "evaluate", lambda *_: next(losses))
    c = finetuning(text, pretrained)
    c.finetune.steps, c.finetune.patience_evaluations, c.loop.eval_every_steps = 40, 2, 1
    config = spdf.resolve(c)
    summary = jobs.train(config, tmp_path, progress=False)
    assert (summary["steps"], summary["best_step"], summary["val_loss"]) == (2, 0, 3.0)
    result = saved_run(tmp_path, config=config).state
    assert int(result.step) == 0
    np.testing.assert_array_equal(leaf(result.params), leaf(saved_run(pretrained).state.params))
    assert jobs.train(config, tmp_path, progress=False) == summary, "it is finished"


@pytest.mark.slow
def test_a_best_state_that_is_damaged_or_gone_is_made_again_or_said_to_be_lost(text, pretrained, tmp_path, monkeypatch):
    by_step = {0: 5.0, 2: 4.0, 4: 3.0, 6: 3.5, 8: 3.2}
    c = finetuning(text, pretrained)
    c.finetune.steps, c.finetune.patience_evaluations, c.loop.eval_every_steps = 40, 2, 2
    c.loop.checkpoint_every_steps, c.loop.keep_checkpoints = 3, 2
    config, evaluate_and_log = spdf.resolve(c), loop._evaluate_and_log

    def evaluating(run, plan, steps, state, done):
        monkeypatch.setattr(loop, "evaluate", lambda *_: by_step[done])
        evaluate_and_log(run, plan, steps, state, done)

    monkeypatch.setattr(loop, "_evaluate_and_log", evaluating)
    summary = jobs.train(config, tmp_path, progress=False)
    assert summary["best_step"] == 4
    best = saved_run(tmp_path).state
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal()) == ["3", "6"]
    for harm in (shutil.rmtree, lambda folder: (folder / "state" / "_METADATA").write_text("")):
        harm(tmp_path / "best" / "4")
        again = jobs.train(config, tmp_path, progress=False)
        assert {k: v for k, v in again.items() if "second" not in k and k != "rows"} == {
            k: v for k, v in summary.items() if "second" not in k and k != "rows"
        }
        jax.tree.map(np.testing.assert_array_equal, saved_run(tmp_path).state.params, best.params)
    shutil.rmtree(tmp_path / "best" / "4")
    shutil.rmtree(tmp_path / "checkpoints" / "3")
    with pytest.raises(
        spdf.InputError, match=r"best: the best state, at step 4, is damaged or gone, and no checkpoint is"
    ):
        jobs.train(config, tmp_path, progress=False)
    assert (tmp_path / "checkpoints" / "6").is_dir()


def test_only_the_last_phase_stops_early_and_epochs_need_a_task(text):
    c = tiny_config(text, text.parent / "cache")
    c.pretrain.patience_evaluations = 1
    with pytest.raises(spdf.InputError, match=r"pretrain.patience_evaluations: only the last phase"):
        spdf.resolve(c)
    c.pretrain.patience_evaluations, c.finetune.epochs = 0, 2
    with pytest.raises(spdf.InputError, match=r"finetune.epochs: 2 epochs of what"):
        spdf.resolve(c)


def restaurant(text, phase="finetune"):
    c = base(text, phase)
    c.finetune.task.name, c.finetune.task.train_examples = "restaurant", 12
    c.finetune.task.validation_examples, c.finetune.task.test_examples = 4, 5
    c.finetune.steps, c.finetune.epochs, c.finetune.batch_size = 600, 2, 8  # steps at their default
    c.decode.method, c.decode.beam_size, c.decode.max_new_tokens, c.decode.no_repeat_ngram = "beam", 2, 12, 4
    c.model.context = 128
    return c


def test_a_task_is_trained_by_epochs_evaluated_after_each_decoded_and_scored(text, tmp_path, capsys):
    config = spdf.resolve(restaurant(text))
    plan = make_plan(config)[0]
    summary = jobs.train(config, tmp_path, progress=False)
    steps = plan.epoch_steps
    assert summary["steps"] == 2 * steps == plan.config.steps
    rows = [row for row in read_metrics(tmp_path) if "val_loss" in row]
    assert [row["step"] for row in rows] == [0, steps, 2 * steps]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"] - 0.5
    assert "unigram_loss" not in summary
    _counts_what_its_batches_hold(config, plan, tmp_path, summary, rows[-1])
    result = evaluate_checkpoint(config, tmp_path)
    assert result == read_json(tmp_path / "evaluation.json", "")
    assert {"bleu", "nist", "rouge_l", "cider", "perplexity", "signatures", "absent"} <= result.keys()
    assert result["perplexity"] > 1
    assert "lc" in result["signatures"]["bleu"]
    lines = [json.loads(line) for line in (tmp_path / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 5
    assert all(line["references"] for line in lines)
    text = generate_text(config, tmp_path, lines[0]["context"])
    assert text == lines[0]["text"], "one context alone decodes as it did among others"


def _counts_what_its_batches_hold(config, plan, workdir, summary, last_row):
    """Tokens as in the pairs; padded ones and FLOPs as in the batches, as long as these are."""
    pairs = encode_task(load_task(plan.config.task), load_tokenizer(workdir / "tokenizer.json"), plan.seq_len).train
    assert summary["tokens"] == 2 * sum(len(pair.tokens) - 1 for pair in pairs)
    how = {"seq_len": plan.seq_len, "batch_size": plan.config.batch_size, "seed": config.seed}
    shapes = [
        batch.tokens_BT.shape for _, batch in zip(range(plan.config.steps), task_batches(pairs, **how), strict=False)
    ]
    assert summary["padded_tokens"] == sum(rows * length for rows, length in shapes)
    assert summary["tokens"] < summary["padded_tokens"] <= plan.config.steps * plan.config.batch_size * plan.seq_len
    of_batches = sum(step_flops(config.model, seq_len=t, sequences=b, active={}) for b, t in shapes)
    assert summary["train_flops"] == summary["dense_flops"] == of_batches <= total_cost([plan]).train_flops
    assert summary["topology_tokens"] == 0
    counted = ("tokens", "padded_tokens", "topology_tokens", "train_flops", "dense_flops")
    assert {name: last_row[name] for name in counted} == {name: summary[name] for name in counted}
    report = (workdir / "report.html").read_text()
    assert "Positions computed" in report
    assert f"{summary['padded_tokens']:,}" in report
    assert "Tokens of topology steps" not in report


@pytest.mark.slow
def test_a_sweep_runs_its_cells_chooses_and_tabulates_and_resumes(text, tmp_path, capsys):
    from spdf_jax.config.sweep import resolve_sweep
    from spdf_jax.jobs.sweep import train_cells

    cells = {"pretrain": base(text, "pretrain")}
    cells["pretrain"].pretrain.steps, cells["pretrain"].model.context = 6, 128
    set_sparsity(cells["pretrain"].pretrain, rule="static", sparsity=0.8)
    cells["pretrain"].pretrain.seq_len = 32
    choices = []
    for rate, seed in ((1e-2, 0), (1e-2, 1), (1e-7, 0), (1e-7, 1)):
        c = restaurant(text)
        c.init_from, c.seed, c.finetune.epochs, c.finetune.optimizer.peak_learning_rate = "cell:pretrain", seed, 1, rate
        cells[f"rate_{rate:.0e}_{seed}"] = c
        choices.append((f"rate {rate:g}", f"rate_{rate:.0e}_{seed}"))
    columns = (
        ("perplexity", "evaluation.perplexity", ".3f", True),
        ("FLOPs", "summary.train_flops+summary.before.train_flops", ".3g"),
        ("METEOR", "evaluation.seen.meteor", ".2f"),
    )
    config = resolve_sweep(
        spdf.sweep_config(
            "sweep",
            "test",
            variants=("test",),
            title="Rates",
            cells=cells,
            rows=[("fine-tuned", choices)],
            columns=columns,
        )
    )
    table = train_cells(config, tmp_path, progress=False)
    (row,) = table["rows"]
    assert row["choice"] == "rate 0.01"
    found = [json.loads((tmp_path / "cells" / c / "evaluation.json").read_text())["perplexity"] for c in row["cells"]]
    assert len(found) == 2
    value = row["values"]["perplexity"]
    assert value["mean"] == pytest.approx(np.mean(found))
    assert value["deviation"] == pytest.approx(np.std(found, ddof=1))
    flops = [s["summary"]["train_flops"] + s["summary"]["before"]["train_flops"] for s in row["cells"].values()]
    assert row["values"]["FLOPs"]["mean"] == pytest.approx(np.mean(flops))
    assert row["values"]["METEOR"]["mean"] is None
    assert "± " in (tmp_path / "table.md").read_text()
    assert not (tmp_path / "cells" / "rate_1e-07_0" / "evaluation.json").exists(), "decoded although not chosen"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").rglob("summary.json")}
    assert train_cells(config, tmp_path, progress=False) == table
    assert {p: p.stat().st_mtime_ns for p in before} == before
    cells["rate_1e-02_0"].init_from = "cell:later"
    with pytest.raises(spdf.InputError, match=r"cells.rate_1e-02_0.init_from: no cell 'later' before"):
        resolve_sweep(
            spdf.sweep_config("s", "t", variants=("t",), title="", cells=cells, rows=[("r", choices)], columns=columns)
        )
