"""What holds of GPT-2 holds of Llama's shape: counts, attention, blocks, meshes, decoding, refusals, folders."""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_attention import documents, inputs, reference, value_and_grads, within_documents
from test_blocks_run import as_masks, assert_close, batches, blocks_config, copied, first_state, steps_of
from test_model import in_steps
from tiny import set_sparsity, slow_but, tiny_config, write_text
from tokenizers import Tokenizer, decoders, models, normalizers, processors

import spdf_jax as spdf
from spdf_jax.data import DataConfig, end_of_text_id, load_tokenizer, prepare
from spdf_jax.huggingface import load_model, save_model
from spdf_jax.jobs import generate as generating
from spdf_jax.jobs import train as jobs
from spdf_jax.jobs.evaluate import evaluate_checkpoint
from spdf_jax.jobs.export import export
from spdf_jax.model.decoding import DecodeConfig, empty_cache
from spdf_jax.model.flops import linear_size, matrix_outputs, parameter_count, step_flops
from spdf_jax.model.generate import Generation, generate
from spdf_jax.model.rotary import frequencies, turned
from spdf_jax.ops.attention import attention
from spdf_jax.ops.attention_kernels import cudnn_attention
from spdf_jax.ops.attention_patterns import PATTERNS, pattern_mask
from spdf_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from spdf_jax.sparsity.distributions import MatrixGroup, target_counts
from spdf_jax.training.invariants import check_invariants
from spdf_jax.training.restore import check_same_model
from spdf_jax.training.state import state_shardings
from spdf_jax.tree import named_leaves

SLOW = pytest.mark.slow
LLAMA = {"norm": "rms_norm", "positions": "rotary", "activation": "silu", "gated": True, "use_bias": False}
TINY = spdf.GPTConfig(
    n_layer=2, n_head=4, n_kv_head=2, d_head=6, d_model=16, d_ff=24, vocab_size=31, context=24, init_std=0.3, **LLAMA
)
SHAPES = {
    "llama": {},
    "qwen2": {"attention_bias": "qkv", "tied_head": False},
    "qwen3": {"qk_norm": True, "attention_bias": "all"},
    "one key head": {"n_kv_head": 1, "d_head": 0, "use_bias": True},
    "layer norm": {"norm": "layer_norm", "use_bias": True, "gated": False},
    "learned": {"positions": "learned", "activation": "gelu"},
}


def shaped(name):
    return dataclasses.replace(TINY, **SHAPES[name])


@functools.cache
def drawn(config):
    model = spdf.GPT(config)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), int))["params"]


def tokens(config, rows=2):
    return jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (rows, config.context)))


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_parameters(name):
    config = shaped(name)
    shapes = jax.eval_shape(spdf.GPT(config).init, jax.random.key(0), jax.ShapeDtypeStruct((1, 1), "int32"))["params"]
    sizes = {leaf: array.size for leaf, array in named_leaves(shapes)}
    assert parameter_count(config) == sum(sizes.values())
    kernels = {leaf: n for leaf, n in sizes.items() if leaf.startswith("blocks/") and leaf.endswith("kernel")}
    assert linear_size(config) == sum(kernels.values())
    assert {f"blocks/{matrix}/kernel" for matrix in matrix_outputs(config)} == set(kernels)
    half = step_flops(config, seq_len=8, sequences=3, active={leaf: n // 2 for leaf, n in kernels.items()})
    whole = step_flops(config, seq_len=8, sequences=3, active={})
    assert whole - half == 3 * 8 * 6 * sum(n - n // 2 for n in kernels.values())


@pytest.mark.parametrize("name", [n if n == "qwen3" else pytest.param(n, marks=SLOW) for n in SHAPES])
def test_decoding_token_by_token_is_the_whole_sequence(name):
    config = shaped(name)
    model, params = drawn(config)
    prompts = [[1, 2, 3], [4]]
    found = generate(model, params, prompts, DecodeConfig(max_new_tokens=6), end_tokens=[])
    for prompt, mine in zip(prompts, found, strict=True):
        row = prompt + mine.tokens
        logits_TV = jax.jit(model.apply)({"params": params}, jnp.array([row]))[0]
        assert logits_TV[len(prompt) - 1 : -1].argmax(-1).tolist() == mine.tokens
    assert empty_cache(config, 1, 8)["blocks"]["kv"][0].shape == (2, 1, 8, config.kv_heads, config.head_width)


@pytest.mark.parametrize("pattern", slow_but(["local_strided"], PATTERNS))
@pytest.mark.parametrize("name", slow_but(["qwen3"], SHAPES))
def test_cached_logits_equal_those_of_the_whole_sequence(name, pattern):
    config = dataclasses.replace(shaped(name), mup_base_width=8, mup_density=0.5)
    model, params = drawn(config)
    how = {"pattern": pattern, "width": 3}
    whole_BTV = jax.jit(functools.partial(model.apply, **how))({"params": params}, tokens(config))
    cached_BTV = in_steps(model, params, tokens(config), (3, 7), length=config.context, **how)
    np.testing.assert_allclose(cached_BTV, whole_BTV, atol=1e-5, rtol=1e-5)


def test_scores_depend_on_distances_alone():
    x_BTHK = jax.random.normal(jax.random.key(0), (2, 5, 2, 6))
    places_BT = jnp.arange(5)[None].repeat(2, 0)
    scores = [
        jnp.einsum("bqhk,bshk->bhqs", *(turned(TINY, x_BTHK, places_BT + start) for _ in range(2)))
        for start in (0, 900)
    ]
    np.testing.assert_allclose(*scores, atol=1e-4)
    assert np.abs(scores[0] - jnp.einsum("bqhk,bshk->bhqs", x_BTHK, x_BTHK)).max() > 0.1


def test_the_stretch_keeps_high_frequencies_and_divides_low_ones():
    plain = dataclasses.replace(TINY, d_head=64)
    stretched = dataclasses.replace(plain, rotary_factor=8.0, rotary_context=64)
    ratio_P = frequencies(plain) / frequencies(stretched)
    assert ratio_P[0] == 1.0
    assert ratio_P[-1] == pytest.approx(8.0)
    assert (np.diff(ratio_P) >= 0).all()
    assert ((ratio_P > 1) & (ratio_P < 8)).any()


def grouped(length, heads=4, kv_heads=2, **more):
    q, k, v, dout = inputs(length, heads=heads, **more)
    return q, k[:, :, :kv_heads], v[:, :, :kv_heads], dout


def assert_grouped(x, mask, found, tolerance=1e-5):
    """Against the reference of as many keys and values as queries, its gradients summed over a group."""
    q, k, v, dout = x[:4]
    times = q.shape[2] // k.shape[2]
    out, dq, dk, dv = reference(q, np.repeat(k, times, 2), np.repeat(v, times, 2), dout, mask)
    dk, dv = (d.reshape(*k.shape[:3], times, -1).sum(3) for d in (dk, dv))
    for ours, theirs in zip(found, (out, dq, dk, dv), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_in_every_pattern(pattern, kv_heads):
    x = grouped(40, kv_heads=kv_heads)
    assert_grouped(x, pattern_mask(pattern, 40, 7), value_and_grads(*x, pattern=pattern, width=7))


def test_heads_that_do_not_divide_are_refused():
    q, k, v, _ = grouped(4, heads=4, kv_heads=3)
    with pytest.raises(spdf.InputError, match="k, v may share heads"):
        attention(q, k, v)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("tensor", [1, 2])
def test_grouped_heads_by_splash_on_a_mesh(kv_heads, tensor):
    x, segments = grouped(128, batch=4, kv_heads=kv_heads), documents(128, 50).repeat(2, 0)
    sizes, axes = (2, 2, tensor), ("data", "fsdp", "tensor")
    mesh = jax.make_mesh(sizes, axes, (AxisType.Auto,) * 3, devices=jax.devices()[: 4 * tensor])
    with jax.set_mesh(mesh):
        found = value_and_grads(*x, segments, pattern="local", width=30, backend="splash")
    assert_grouped(x, within_documents(segments, pattern_mask("local", 128, 30)), found)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads_by_cudnn_on_a_mesh(kv_heads, monkeypatch):
    # All of the call but the kernel, which only a GPU has.
    plain = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *args, implementation, **more: plain(*args, **more))
    q, k, v, dout = x = grouped(40, batch=4, kv_heads=kv_heads)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)

    @jax.jit
    def step(q, k, v, dout):
        out, pullback = jax.vjp(functools.partial(cudnn_attention, pattern="causal", width=1), q, k, v)
        return out, *pullback(dout)

    with jax.set_mesh(mesh):
        by_head = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor" if kv_heads == 2 else None))
        found = step(q, *jax.device_put((k, v), by_head), dout)
    assert_grouped(x, pattern_mask("causal", 40, 1), found)


#: Of `test_blocks_run.blocks_config`, each with other options of how it is computed; keys as wide as blocks need them.
TRAINED = {
    "llama": {"n_kv_head": 2, "d_head": 16, "remat": "dots"},
    "qwen2": {"n_kv_head": 2, "d_head": 16, "attention_bias": "qkv", "tied_head": False, "remat": "block"},
    "qwen3": {"n_kv_head": 1, "d_head": 32, "qk_norm": True, "attention_bias": "all", "remat": "mlp"},
    "biases": {"n_kv_head": 2, "d_head": 16, "use_bias": True},
    "S-muPar": {"n_kv_head": 1, "d_head": 32, "qk_norm": True, "mup_base_width": 16, "mup_density": 0.25},
}


#: Of each shape in each dtype, what goes the most ways of its own.
_NOT_NIGHTLY = {("qwen3", "float32"), ("S-muPar", "bfloat16")}


def trained_config(name, rule="static", **changes):
    return blocks_config(rule, **({"n_head": 4, "d_ff": 64} | LLAMA | TRAINED[name] | changes))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_in_blocks_is_training_under_the_same_masks(name):
    model, plan, _, state = first_state(trained_config(name))
    kernels = state.params["blocks"]
    assert {kernels[matrix]["kernel"].ndim for matrix in matrix_outputs(model.config)} == {5}
    steps = steps_of(model, plan)
    masked = as_masks(plan.tx, copied(state))
    for batch in batches(2):
        state, metrics = steps.train(state, batch, pattern="causal", width=8)
        masked, expected = steps.train(masked, batch, pattern="causal", width=8)
        assert_close(metrics, expected, 1e-5)
    assert_close(as_masks(plan.tx, state).params, masked.params, 1e-4)  # Adam's sign of a tiny gradient
    check_invariants(plan.programme, plan.filter, state, 0)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=[] if (name, dtype) in _NOT_NIGHTLY else pytest.mark.nightly)
        for name, dtype in itertools.product(TRAINED, ("float32", "bfloat16"))
    ],
)
def test_masks_are_exact_through_training_and_topology_steps_on_a_mesh_as_off_it(name, dtype):
    losses = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        c = trained_config(name, "mst", dtype=dtype)
        c.pretrain.sparsity.update({"pattern": "unstructured", "sparse_compute": "masked"})
        model, plan, mesh, state = first_state(c, make_mesh(MeshConfig(*sizes)))
        steps = steps_of(model, plan, state_shardings(mesh, plan.tx, state))
        before, nnz = (
            copied(state.masks),
            {group: np.full((2,), n, np.int32) for group, n in plan.programme.counts(0).items()},
        )
        assert nnz.keys() == {f"blocks/{matrix}/kernel" for matrix in matrix_outputs(model.config)}
        for i, (batch, pattern) in enumerate(zip(batches(3), ("causal", "local_strided", "causal"), strict=True)):
            with jax.set_mesh(mesh):
                how = {"pattern": pattern, "width": 4}
                if i == 1:
                    state, metrics = steps.topology(state, batch, nnz, np.float32(0.5), **how)
                else:
                    state, metrics = steps.train(state, batch, **how)
            check_invariants(plan.programme, plan.filter, state, 0)
            losses.append(float(metrics["loss"]))
        for group in nnz:
            old, new = (dict(named_leaves(masks))[group] for masks in (before, state.masks))
            assert bool((old != new).any()), group
    np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-4 if dtype == "float32" else 0.02)


@pytest.mark.parametrize("name", ["one key head", pytest.param("qwen2", marks=SLOW)])
def test_on_a_mesh_it_is_the_same(name):
    config = dataclasses.replace(shaped(name), d_head=8)
    model, params = drawn(config)
    tokens_BT = tokens(config, 4)

    @jax.jit
    def loss_and_grads(params):
        return jax.value_and_grad(lambda p: jnp.square(model.apply({"params": p}, tokens_BT)).mean())(params)

    expected, mesh = loss_and_grads(params), make_mesh(MeshConfig(2, 2, 2))
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(mesh, params)
        assert shardings["blocks"]["mlp_gate"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
        found = loss_and_grads(jax.device_put(params, shardings))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_half_precision_is_close():
    config = shaped("qwen3")
    _, params = drawn(config)
    whole, half = (
        jax.jit(spdf.GPT(dataclasses.replace(config, dtype=dtype)).apply)({"params": params}, tokens(config))
        for dtype in ("float32", "bfloat16")
    )
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(jnp.float32), whole, atol=0.1 * float(whole.std()))
    assert float(whole.std()) > 0.1


@pytest.mark.parametrize("remat", ["mlp", pytest.param("dots", marks=SLOW), pytest.param("block", marks=SLOW)])
def test_recomputing_changes_no_gradient(remat):
    model, params = drawn(shaped("qwen3"))

    def grads(model):
        return jax.jit(jax.grad(lambda p: jnp.square(model.apply({"params": p}, tokens(model.config))).mean()))(params)

    again = spdf.GPT(dataclasses.replace(model.config, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads(again), grads(model))


def test_qkv_of_er_qkv_are_as_wide_as_they_are():
    shapes = {"attn_q": (64, 64), "attn_k": (64, 16), "attn_v": (64, 16), "attn_o": (64, 64)}
    groups = {f"blocks/{name}/kernel": MatrixGroup(2, shape) for name, shape in shapes.items()}
    counts = target_counts(groups, 0.75, "er_qkv")
    density = {name: counts[f"blocks/{name}/kernel"] / np.prod(shape) for name, shape in shapes.items()}
    assert density["attn_q"] == pytest.approx(density["attn_k"], rel=0.01)
    assert density["attn_q"] / density["attn_o"] == pytest.approx((64 + 96) / (64 * 96) / (128 / 64**2), rel=0.01)


@pytest.mark.parametrize("how", ["d_model", "d_ff"])
def test_widened_it_has_as_many_active_weights(how):
    config = dataclasses.replace(spdf.GPT_SIZES["llama_130m"], n_kv_head=4)
    wide = spdf.widen(config, 0.75, how=how)
    matrices = matrix_outputs(wide.config)
    kept = sum(w * (0.25 if how == "d_model" or name.startswith("mlp") else 1) for name, w in matrices.items())
    assert wide.active_ratio == pytest.approx(wide.config.d_model * kept / (linear_size(config) / config.n_layer))
    assert wide.active_ratio == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_kv_head": 3}, "model.n_kv_head: 3 does not divide model.n_head 4"),
        ({"d_head": 5}, "model.positions: 'rotary' turns pairs, and heads are 5 wide; set d_head"),
        ({"rotary_factor": 8.0, "rotary_low_factor": 4.0}, "rotary_low_factor: 4.0 must be below rotary_high_factor"),
        ({"rotary_factor": 0.5}, "rotary_factor: 0.5 must be at least 1"),
        ({"dconv": True}, "model.dconv, shared_qk: for keys as wide as the model; leave n_kv_head, d_head at 0"),
        ({"norm": "batch_norm"}, "norm: 'batch_norm' is not one of 'layer_norm', 'rms_norm'"),
        ({"d_head": 0, "n_head": 3, "n_kv_head": 0}, "d_model: 16 is not divisible by model.n_head 3"),
    ],
)
def test_models_that_are_none_are_refused(changes, message):
    with pytest.raises(spdf.InputError, match=message):
        dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"positions": "learned"},
            "model.positions 'learned' cannot be said in a Llama folder, only model.positions 'rotary'",
        ),
        ({"norm": "layer_norm"}, r"model.positions 'rotary'.* cannot be said in a GPT-2 folder"),
        ({"qk_norm": True, "use_bias": True}, "model.use_bias True cannot be said in a Qwen3 folder"),
        (
            {"activation": "gelu", "gated": False},
            "activation 'gelu', model.gated False cannot be said in a Llama folder",
        ),
        ({"n_head": 3, "n_kv_head": 1}, "d_model 16 is not divisible by model.n_head 3, which transformers wants"),
    ],
)
def test_what_no_folder_can_say_is_refused(changes, message, tmp_path):
    with pytest.raises(spdf.InputError, match=message):
        save_model(tmp_path / "out", dataclasses.replace(TINY, **changes), {})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["qwen3", pytest.param("llama", marks=SLOW), pytest.param("qwen2", marks=SLOW)])
def test_a_folder_comes_back_to_the_bit(name, tmp_path):
    config = dataclasses.replace(shaped(name), init_std=0.3, rotary_factor=4.0, rotary_context=16)
    _, params = drawn(config)
    save_model(tmp_path / "out", config, params, masks=spdf.init_masks(jax.random.key(1), params, sparsity=0.5))
    found_config, found = load_model(tmp_path / "out")
    assert found_config == config
    kernels = found["blocks"]["mlp_gate"]["kernel"]
    assert int((kernels == 0).sum()) == kernels.size // 2
    kept = jax.tree.map(lambda a, b: bool((jnp.where(b == 0, 0, a) == b).all()), params, found)
    assert all(jax.tree.leaves(kept))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; only 'silu' can be read"),
        ({"use_sliding_window": True}, "use_sliding_window is True; only False"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types has others than 'full_attention'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'; give a model with 'default' or 'llama3'"),
        ({"rope_parameters": "llama3"}, "rope_parameters is 'llama3'; it must be an object"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": "8"}}, "factor is '8'; it must be a number"),
        ({"mlp_bias": True}, "mlp_bias is True without attention_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0; it must be a whole number of at least 1"),
        ({"num_key_value_heads": 3}, "n_kv_head: 3 does not divide"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only gpt2, llama, qwen2, qwen3 can be read"),
        ({"model_type": "qwen3"}, r"missing: layers\.0\.self_attn\.q_norm\.weight"),
    ],
)
def test_folders_that_are_refused(changes, message, tmp_path):
    _, params = drawn(TINY)
    save_model(tmp_path / "out", TINY, params)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(spdf.InputError, match=message) as error:
        load_model(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_the_same_model_may_say_so_in_other_words(tmp_path):
    plain = dataclasses.replace(TINY, n_kv_head=0, d_head=0)
    check_same_model(tmp_path, plain, dataclasses.replace(plain, n_kv_head=4, d_head=4, context=8))
    with pytest.raises(spdf.InputError, match="n_kv_head 2 there, 4 here"):
        check_same_model(tmp_path, dataclasses.replace(plain, n_kv_head=2), plain)


# Tokenizers whose documents end with another token.


def llama_tokenizer(end="</s>"):
    """As Llama 2's: pieces of SentencePiece's, a space before every text, bytes for what is no piece."""
    pieces = ["<unk>", "<s>", end, *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581masketdnso", "\u2581m", "as"]
    merges = [("\u2581", "m"), ("a", "s")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<unk>", "<s>", end])
    return tokenizer


@pytest.mark.parametrize("end", ["</s>", "<|end_of_text|>", "<eos>", "<\uff5cend\u2581of\u2581sentence\uff5c>"])
def test_documents_end_with_what_their_tokenizer_has_for_it(end, tmp_path):
    text, file = write_text(tmp_path / "text"), tmp_path / "tokenizer.json"
    llama_tokenizer(end).save(str(file))
    how = {"source": "text", "path": str(text), "cache_dir": str(tmp_path / "cache"), "tokenizer": str(file)}
    for _ in range(2):  # encoded, and from the cache
        data = prepare(DataConfig(**how), progress=False)
        assert end_of_text_id(data.tokenizer) == 2
        whole = load_tokenizer(file).encode((text / "train.txt").read_text(), add_special_tokens=False).ids
        assert data.train.tolist() == [*whole, 2]


def test_a_tokenizer_without_an_end_of_documents_is_refused_in_one_line(tmp_path):
    llama_tokenizer("<end>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(
        spdf.InputError, match=r"has no '<\|endoftext\|>' token, which .*, nor .*</s>.*; call the one"
    ) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.slow
def test_a_folder_with_llama_s_tokenizer_goes_through_all_jobs(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(TINY, vocab_size=300, context=32)
    _, params = drawn(config)
    save_model(tmp_path / "llama", config, params, tokenizer=llama_tokenizer())
    c = tiny_config(write_text(tmp_path / "text"), tmp_path / "cache")
    c.phases = ("finetune",)
    del c["pretrain"]
    c.model.update({key: value for key, value in vars(config).items() if key != "dtype"})
    c.finetune.steps, c.decode.max_new_tokens, c.init_from = 3, 8, str(tmp_path / "llama")
    c.data.tokenizer = str(tmp_path / "llama" / "tokenizer.json")
    set_sparsity(c.finetune, rule="static", sparsity=0.5, init="magnitude")
    run = spdf.resolve(c)
    jobs.train(run, tmp_path / "run", progress=False)
    evaluate_checkpoint(run, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert isinstance(generating.generate_text(run, tmp_path / "run", "mask mask"), str)
    word = llama_tokenizer().encode("mask", add_special_tokens=False).ids
    monkeypatch.setattr(generating, "generate", lambda *args, **how: [Generation(word, 0.0, 0.0)])
    capsys.readouterr()
    generating.generate_text(run, tmp_path / "run", "dense mask")
    assert capsys.readouterr().out == "dense mask mask\n"  # alone, the word is decoded without its space
    folder = export(run, tmp_path / "run")
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == 2
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert load_tokenizer(folder).to_str() == load_tokenizer(tmp_path / "llama").to_str()
