"""Documents packed into one sequence: nothing passes between them, in a whole run, unless the config makes them one stream."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny import drawn_params, slow_but

import spdf_jax as spdf
from spdf_jax.data import DataConfig, document_end, document_ids, prepare
from spdf_jax.ops.attention_patterns import PATTERNS
from spdf_jax.planning.describe import describe
from spdf_jax.planning.pod_plan import lower_steps
from spdf_jax.sharding import make_mesh
from spdf_jax.training import programs, step
from spdf_jax.training.feed import make_feed
from spdf_jax.training.loop import device_batches
from spdf_jax.training.phases import make_plan
from spdf_jax.training.step import cross_entropy
from spdf_jax.training.watch import watch_training

SLOW = pytest.mark.slow
END, LENGTH, FIRST = 0, 8, 3  # every window is 3 tokens of one document, end of text, 4 tokens of the next


def write_windows(folder, seed):
    """Token files whose windows all begin with the end of a document, drawn by `seed`; what follows is the same for all.

    So is the first token, the last target of the window before.
    """
    folder.mkdir()
    for name, windows in (("train.bin", 12), ("val.bin", 2)):
        tokens = np.random.default_rng(9).integers(1, 20, (windows, LENGTH))
        tokens[:, 1:FIRST] = np.random.default_rng(seed).integers(1, 20, (windows, FIRST - 1))
        tokens[:, FIRST] = END
        np.append(tokens.ravel(), 1).astype(np.uint16).tofile(folder / name)
    return folder


def base(folder, separate_documents=True):
    """Whatever may carry something from one position to another: Primer's taps, sparse attention, blocks, micro-batches."""
    c = spdf.default_config("documents", "test", variants=("test",))
    c.model.n_layer, c.model.n_head, c.model.d_model, c.model.vocab_size, c.model.context = 1, 2, 16, 24, LENGTH
    c.model.init_std = 0.2
    c.model.dconv, c.model.shared_qk, c.model.activation = True, True, "squared_relu"
    c.data.source, c.data.path, c.data.cache_dir = "token_files", str(folder), str(folder)
    c.data.separate_documents, c.data.end_of_text_id = separate_documents, END if separate_documents else -1
    c.mesh.data, c.loop.eval_batch_size = 1, 2
    c.pretrain.steps, c.pretrain.batch_size, c.pretrain.grad_accumulation_steps = 2, 4, 2
    c.pretrain.optimizer.warmup_steps, c.pretrain.optimizer.peak_learning_rate = 0, 1e-2
    s = c.pretrain.sparsity
    s.rule, s.sparsity, s.pattern, s.sparse_compute = "static", 0.5, "block8", "blocks"
    s.attention_pattern, s.attention_width, s.attention_end = "local_strided", 4, 1.0
    return c


def feed_of(config):
    return make_feed(config, make_plan(config)[0], prepare(config.data), None, make_mesh(config.mesh))


def second_documents_alone(logits_BTV, targets_BT, weights_BT):
    """The loss over each window's second document, whose first token the end of text before it predicts."""
    return cross_entropy(logits_BTV, targets_BT, weights_BT.at[:, :FIRST].set(0))


def ends(folder, monkeypatch, separate_documents=True):
    """Losses and parameters that a run comes to when only second documents count, for two versions of the first ones."""
    monkeypatch.setattr(step, "cross_entropy", second_documents_alone)
    programs._kept_program.cache_clear()  # what was compiled without it
    found = []
    for seed in (1, 2):
        *_, (state, metrics) = watch_training(
            spdf.resolve(base(write_windows(folder / f"{seed}", seed), separate_documents))
        )
        found.append(jax.device_get((state.params, metrics["loss"], metrics["val_loss"])))
    programs._kept_program.cache_clear()
    return found


@pytest.mark.slow
def test_in_a_run_no_document_learns_from_the_one_before_it(tmp_path, monkeypatch):
    jax.tree.map(np.testing.assert_array_equal, *ends(tmp_path, monkeypatch))
    assert (tmp_path / "1" / "train.bin").read_bytes() != (tmp_path / "2" / "train.bin").read_bytes()


@pytest.mark.slow  # shows that the test above can fail
def test_as_one_stream_a_document_sees_those_before_it(tmp_path, monkeypatch):
    (one, *losses), (other, *other_losses) = ends(tmp_path, monkeypatch, separate_documents=False)
    assert not np.array_equal(one["wpe"]["embedding"], other["wpe"]["embedding"])
    assert np.abs(np.subtract(losses, other_losses)).min() > 1e-4


@pytest.mark.parametrize("apart", [True, False])
def test_the_planned_program_is_the_one_that_runs(apart, tmp_path):
    config = spdf.resolve(base(write_windows(tmp_path / "data", 0), apart))
    (plan,), mesh = make_plan(config), make_mesh(config.mesh)
    real = next(device_batches(feed_of(config), mesh, plan, 0))
    assert (real.segments_BT is not None) == apart
    (_, planned_batch), _ = dict(lower_steps(config, plan, mesh))["train step"].args_info
    alike = jax.tree.map(
        lambda real, planned: (real.shape, real.dtype) == (planned.shape, planned.dtype), real, planned_batch
    )
    assert jax.tree.all(alike)
    assert ("within documents" in describe(config)) == apart


# What each pattern does with documents is test_attention.py's: here the layers pass on which they are.
@pytest.mark.parametrize("pattern", slow_but(["local_strided"], PATTERNS))
def test_no_gradient_crosses_from_one_document_to_another(pattern):
    model = spdf.GPT(
        spdf.GPTConfig(n_layer=2, n_head=2, d_model=16, vocab_size=24, context=12, init_std=0.3, dconv=True), pattern, 4
    )
    tokens_BT = jnp.array([[5, 6, 7, END, 8, 9, 10, END, END, 11, 12, 13]])
    segments_BT = document_ids(np.asarray(tokens_BT), END)
    params = drawn_params(model.config)

    @jax.jit
    @jax.jacobian
    def reach(wpe_TD):
        changed = params | {"wpe": {"embedding": wpe_TD}}
        return model.apply({"params": changed}, tokens_BT, segments_BT=segments_BT)[0].sum(-1)

    reach_TT = np.abs(reach(params["wpe"]["embedding"])).sum(-1) > 0
    same_TT = segments_BT[0][:, None] == segments_BT[0]
    assert not reach_TT[~same_TT].any()
    np.testing.assert_array_equal(reach_TT, np.tri(12, dtype=bool) & same_TT)  # two layers and taps reach all before


def test_every_batch_of_a_run_says_which_document_a_token_is_of_and_counts_every_target(tmp_path):
    apart, stream = (
        feed_of(spdf.resolve(base(write_windows(tmp_path / str(apart), 0), apart))) for apart in (True, False)
    )
    for ours, plain in zip(
        [*itertools.islice(apart.train(1), 3), *apart.validation()],
        [*itertools.islice(stream.train(1), 3), *stream.validation()],
        strict=True,
    ):
        assert ours.segments_BT.tolist() == [
            [list(row[: t + 1]).count(END) for t in range(8)] for row in ours.tokens_BT
        ]
        assert ours.segments_BT.dtype == np.int32
        assert plain.segments_BT is None
        jax.tree.map(np.testing.assert_array_equal, ours[:3], plain[:3])


def test_which_id_ends_a_document(tmp_path):
    def end(largest=300, **config):
        data = DataConfig(source="token_files", path="p", **config)
        return document_end(data, prepared._replace(vocab_size=largest + 1))

    (tmp_path / "a.txt").write_text("one\n" * 50)
    data = DataConfig(source="text", path=str(tmp_path), cache_dir=str(tmp_path / "cache"), validation_fraction=0.5)
    text = prepare(dataclasses.replace(data, tokenizer_vocab_size=257), progress=False)
    assert document_end(data, text) == text.tokenizer.token_to_id("<|endoftext|>") == 0
    assert text.train[-1] == text.validation[-1] == 0
    assert document_end(dataclasses.replace(data, separate_documents=False), text) is None
    prepared = text._replace(tokenizer=None)
    assert end(50256) == 50256  # GPT-2's
    assert end(end_of_text_id=7) == 7
    assert end(separate_documents=False) is None
    with pytest.raises(
        spdf.InputError, match=r"data\.end_of_text_id: nothing says which id stands between the documents"
    ):
        end()
    with pytest.raises(
        spdf.InputError, match=r"end_of_text_id=301: data\.path='p' holds no such id, the largest is 300"
    ):
        end(end_of_text_id=301)
    with pytest.raises(spdf.InputError, match=r"end_of_text_id=0: is for data\.source='token_files', text"):
        prepare(DataConfig(end_of_text_id=0))


def test_the_pairs_of_a_task_are_not_packed(tmp_path):
    c = ConfigDict(base(tmp_path).to_dict())
    c.pretrain.task.name = "restaurant"
    config = spdf.resolve(c)
    assert not config.separates_documents(config.phases["pretrain"])
