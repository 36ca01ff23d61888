"""GPT-2 folders without transformers: what is in the files, both ways bit for bit, and what is refused."""

import dataclasses
import json
import shutil
import stat
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny import as_users
from tokenizers import ByteLevelBPETokenizer, Tokenizer

import spdf_jax as spdf
from spdf_jax.data import END_OF_TEXT, load_tokenizer
from spdf_jax.data.tokenizer import train_tokenizer
from spdf_jax.errors import InputError
from spdf_jax.huggingface import folder as huggingface_folder
from spdf_jax.huggingface import load_model, save_model
from spdf_jax.sharding import MeshConfig, make_mesh, parameter_shardings
from spdf_jax.training.state import abstract_params
from spdf_jax.tree import named_leaves

TINY = spdf.GPTConfig(n_layer=2, n_head=2, d_model=8, d_ff=12, vocab_size=11, context=6, dropout=0.1)
TEXTS = ["sparse weights, dense weights", "masks are data\nnaïve ünïcode"] * 4


def random_params(config, seed=0):
    """Every leaf random, so that nothing passes because it is 0 or 1."""
    rng, shapes = np.random.default_rng(seed), abstract_params(spdf.GPT(config))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)


def logits_of(config, params):
    tokens_BT = np.arange(2 * config.context).reshape(2, -1) * 7 % config.vocab_size
    return np.asarray(_logits(spdf.GPT(config), params, tokens_BT))


@partial(jax.jit, static_argnums=0)
def _logits(model, params, tokens_BT):
    return model.apply({"params": params}, tokens_BT)


def assert_same_bits(tree, other):
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (name, leaf), (_, twin) in zip(named_leaves(tree), named_leaves(other), strict=True):
        assert (leaf.dtype, leaf.shape) == (jnp.float32, twin.shape), name
        assert np.asarray(leaf).tobytes() == np.asarray(twin).tobytes(), name


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "gpt2"
    save_model(folder, TINY, random_params(TINY))
    return folder


@pytest.fixture
def folder(export, tmp_path):
    """A good export to spoil."""
    return shutil.copytree(export, tmp_path / "gpt2")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=270, progress=False)


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_head": False}, {"d_ff": 0, "activation": "gelu_exact"}, {"layer_norm_eps": 1e-6, "init_std": 0.01}],
)
def test_there_and_back_gives_the_same_config_and_bits(tmp_path, changes):
    config = dataclasses.replace(TINY, **changes)
    params = random_params(config)
    save_model(tmp_path / "gpt2", config, params)
    loaded_config, loaded = load_model(tmp_path / "gpt2")
    assert loaded_config == config
    assert_same_bits(loaded, params)


def test_the_file_holds_gpt2s_tensors_in_gpt2s_layout(tmp_path):
    config = dataclasses.replace(TINY, tied_head=False)
    params = random_params(config)
    save_model(tmp_path, config, params)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = {
        "ln_1.weight": (8,),
        "ln_1.bias": (8,),
        "attn.c_attn.weight": (8, 24),
        "attn.c_attn.bias": (24,),
        "attn.c_proj.weight": (8, 8),
        "attn.c_proj.bias": (8,),
        "ln_2.weight": (8,),
        "ln_2.bias": (8,),
        "mlp.c_fc.weight": (8, 12),
        "mlp.c_fc.bias": (12,),
        "mlp.c_proj.weight": (12, 8),
        "mlp.c_proj.bias": (8,),
    }
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "transformer.wte.weight": (11, 8),
        "transformer.wpe.weight": (6, 8),
        **{f"transformer.h.{i}.{name}": shape for i in (0, 1) for name, shape in layer.items()},
        "transformer.ln_f.weight": (8,),
        "transformer.ln_f.bias": (8,),
        "lm_head.weight": (11, 8),
    }
    blocks = params["blocks"]
    for i in (0, 1):
        at = f"transformer.h.{i}"
        for part, name in enumerate(("attn_q", "attn_k", "attn_v")):
            columns = slice(8 * part, 8 * part + 8)
            np.testing.assert_array_equal(tensors[f"{at}.attn.c_attn.weight"][:, columns], blocks[name]["kernel"][i])
            np.testing.assert_array_equal(tensors[f"{at}.attn.c_attn.bias"][columns], blocks[name]["bias"][i])
        np.testing.assert_array_equal(tensors[f"{at}.attn.c_proj.weight"], blocks["attn_o"]["kernel"][i])
        np.testing.assert_array_equal(tensors[f"{at}.mlp.c_fc.weight"], blocks["mlp_up"]["kernel"][i])
        np.testing.assert_array_equal(tensors[f"{at}.mlp.c_proj.weight"], blocks["mlp_down"]["kernel"][i])
        np.testing.assert_array_equal(tensors[f"{at}.ln_2.weight"], blocks["ln_2"]["scale"][i])
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["head"]["kernel"].T)


def test_dropout_on_the_embedding_alone_changes_nothing_that_is_read(folder):
    edit_config(folder, {"embd_pdrop": 0.0, "resid_pdrop": 0.3})
    config, params = load_model(folder)
    assert config == dataclasses.replace(TINY, dropout=0.3)
    assert_same_bits(params, random_params(TINY))


def test_config_json_says_what_gpt2_needs_to_know(folder):
    assert json.loads((folder / "config.json").read_text()) == {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "dtype": "float32",
        "n_layer": 2,
        "n_head": 2,
        "n_embd": 8,
        "n_inner": 12,
        "n_positions": 6,
        "n_ctx": 6,
        "vocab_size": 11,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.0,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    assert json.loads((folder / "generation_config.json").read_text()) == {"bos_token_id": None, "eos_token_id": None}
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "generation_config.json", "model.safetensors"]


def test_a_model_without_biases_gets_zero_biases_and_the_same_logits(tmp_path):
    config = dataclasses.replace(TINY, use_bias=False)
    params = random_params(config)
    save_model(tmp_path, config, params)
    loaded_config, loaded = load_model(tmp_path)
    assert loaded_config == TINY
    biases = [leaf for name, leaf in named_leaves(loaded) if name.endswith("bias")]
    assert len(biases) == 9  # six linear layers, three norms
    assert not any(np.asarray(bias).any() for bias in biases)
    np.testing.assert_array_equal(logits_of(loaded_config, loaded), logits_of(config, params))


def test_masks_are_folded_in_as_exact_zeros(tmp_path):
    params = random_params(TINY)
    masks = spdf.init_masks(jax.random.key(1), params, sparsity=0.75)
    save_model(tmp_path, TINY, params, masks=masks)
    _, loaded = load_model(tmp_path)
    assert_same_bits(loaded, spdf.apply_masks(params, masks))
    tensors = load_file(tmp_path / "model.safetensors")
    assert [np.count_nonzero(tensors[f"transformer.h.{i}.attn.c_attn.weight"]) for i in (0, 1)] == [3 * 16, 3 * 16]


def test_mupar_becomes_part_of_the_weights(tmp_path):
    config = dataclasses.replace(TINY, mup_base_width=4, mup_density=0.5, mup_alpha=3.0)
    params = random_params(config)
    save_model(tmp_path, config, params)
    loaded_config, loaded = load_model(tmp_path)
    assert loaded_config == TINY
    ours, plain, read = logits_of(config, params), logits_of(TINY, params), logits_of(loaded_config, loaded)
    np.testing.assert_allclose(read, ours, atol=1e-5)
    assert np.abs(plain - ours).max() > 0.1
    np.testing.assert_array_equal(loaded["wte"]["embedding"], params["wte"]["embedding"])
    np.testing.assert_allclose(loaded["blocks"]["attn_q"]["bias"], params["blocks"]["attn_q"]["bias"] / 2, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_half_precision(tmp_path, dtype):
    params = random_params(TINY)
    save_model(tmp_path, TINY, params, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    assert {str(t.dtype) for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert_same_bits(load_model(tmp_path)[1], jax.tree.map(lambda x: x.astype(dtype).astype(jnp.float32), params))


def test_split_over_devices_it_is_written_and_read_as_it_is_whole(tmp_path):
    mesh, params = make_mesh(MeshConfig(1, 2, 2)), random_params(TINY)
    masks = spdf.init_masks(jax.random.key(1), params, sparsity=0.5)
    split = [jax.device_put(tree, parameter_shardings(mesh, tree)) for tree in (params, masks)]
    save_model(tmp_path / "whole", TINY, params, masks=masks)
    save_model(tmp_path / "split", TINY, split[0], masks=split[1])
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("split", "whole"))
    assert ours.read_bytes() == theirs.read_bytes()
    _, found = load_model(tmp_path / "split", mesh=mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == parameter_shardings(mesh, params)
    assert not found["blocks"]["attn_q"]["kernel"].is_fully_replicated
    assert_same_bits(found, load_model(tmp_path / "whole")[1])


def test_tokenizer_files(tmp_path, tokenizer):
    config = dataclasses.replace(TINY, vocab_size=300)
    save_model(tmp_path, config, random_params(config), tokenizer=tokenizer)
    read = load_tokenizer(tmp_path / "tokenizer.json")
    assert [read.encode(text).ids for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": 6,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    end = {"bos_token_id": 0, "eos_token_id": 0}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == end
    assert json.loads((tmp_path / "config.json").read_text()).items() >= end.items()


def test_end_of_text_id_is_the_one_given(tmp_path, tokenizer):
    config = dataclasses.replace(TINY, vocab_size=300)
    save_model(tmp_path / "ids", config, random_params(config), end_of_text_id=299)
    assert json.loads((tmp_path / "ids" / "config.json").read_text())["eos_token_id"] == 299
    save_model(tmp_path / "text", config, random_params(config), tokenizer=tokenizer, end_of_text_id=5)
    written = json.loads((tmp_path / "text" / "tokenizer_config.json").read_text())
    assert written["eos_token"] == tokenizer.id_to_token(5) != END_OF_TEXT


# Saving: what is refused, and that nothing is left of it.


def without_end_of_text():
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(TEXTS, vocab_size=270, show_progress=False)
    return Tokenizer.from_str(bpe.to_str())


@pytest.mark.slow
def test_refused_exports_leave_nothing(tmp_path, tokenizer):
    params, wide = random_params(TINY), dataclasses.replace(TINY, vocab_size=300)
    wide_params = random_params(wide)
    masks = spdf.init_masks(jax.random.key(1), params, sparsity=0.75)
    small_masks = spdf.init_masks(jax.random.key(1), random_params(dataclasses.replace(TINY, d_ff=6)), sparsity=0.75)
    infinite = params | {"wpe": {"embedding": params["wpe"]["embedding"].at[0, 0].set(1e6)}}
    refused = [
        ((TINY, params), {"dtype": "int8"}, "dtype: 'int8' is not one of float32, float16, bfloat16"),
        ((TINY, params), {"masks": {"wte": masks["wte"]}}, "masks must have the tree structure"),
        ((TINY, params), {"masks": small_masks}, r"has a mask of shape \(2, 6, 8\), its weight shape \(2, 12, 8\)"),
        ((TINY, params | {"wpe": {}, "more": jnp.ones(3)}), {}, "missing: wpe/embedding; not expected: more"),
        ((wide, params), {}, r"of another shape: wte/embedding \(11, 8\) instead of \(300, 8\)"),
        ((TINY, infinite), {"dtype": "float16"}, "export: transformer.wpe.weight is not finite in float16"),
        ((TINY, params), {"end_of_text_id": 11}, r"end_of_text_id 11 is outside \[0, model.vocab_size 11\)"),
        ((TINY, params), {"tokenizer": tokenizer}, "ids end at 269, over model.vocab_size 11"),
        ((wide, wide_params), {"tokenizer": tokenizer, "end_of_text_id": 280}, "no token of end_of_text_id 280"),
        ((wide, wide_params), {"tokenizer": without_end_of_text()}, r"the tokenizer has no '<\|endoftext\|>'"),
    ]
    for args, options, message in refused:
        with pytest.raises(InputError, match=message) as error:
            save_model(tmp_path / "gpt2", *args, **options)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.iterdir()), message


def test_a_folder_in_use_is_left_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(InputError, match="holds something already; choose a folder that is new or empty"):
            save_model(target, TINY, random_params(TINY))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("notes.txt", "mine")]


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    tensors = []

    def fail(name, tensor, dtype):
        tensors.append(name)
        if len(tensors) > 3:
            raise OSError(28, "No space left on device")
        return tensor

    monkeypatch.setattr(huggingface_folder, "cast", fail)
    with pytest.raises(InputError, match=r"cannot be written \(.*No space left on device\); make room"):
        save_model(tmp_path / "gpt2", TINY, random_params(TINY))
    assert not list(tmp_path.iterdir())


def test_others_may_read_what_the_umask_lets_them(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.iterdir())}
    assert len({mode & 0o666 for mode in modes.values()}) == 1, modes


# Loading: what transformers may have written.


def rewrite(folder, change):
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def test_names_without_prefix_and_saved_causal_masks(folder):
    def change(tensors):
        bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        return bare | {"h.0.attn.bias": np.tri(6, dtype=bool)[None, None], "h.1.attn.masked_bias": np.float32([-1e4])}

    rewrite(folder, change)
    assert_same_bits(load_model(folder)[1], random_params(TINY))


def test_a_tied_head_saved_twice_is_one(folder):
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    config, params = load_model(folder)
    assert config == TINY
    assert_same_bits(params, random_params(TINY))


def split(folder):
    """The weights in two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for part in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == part}, folder / part)
    (folder / "model.safetensors").unlink()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index, weight_map


def test_weights_in_several_files(folder):
    split(folder)
    assert_same_bits(load_model(folder)[1], random_params(TINY))


def test_keys_a_config_leaves_out_are_transformers_defaults(folder):
    edit_config(folder, {}, drop=("tie_word_embeddings", "activation_function", "resid_pdrop", "embd_pdrop"))
    assert load_model(folder)[0] == TINY


def test_a_config_may_say_more_than_concerns_us(folder):
    extra = {"reorder_and_upcast_attn": True, "attn_pdrop": 0.1, "auto_map": {"AutoModel": "evil.Model"}, "n_ctx": 6}
    edit_config(folder, extra)
    assert load_model(folder)[0] == TINY


# Loading: what is refused.


def edit_config(folder, changes, drop=()):
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k not in drop}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt_neo"}, "model_type is 'gpt_neo'; only gpt2, llama, qwen2, qwen3 can be read"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; give a model with one of gelu_new, gelu"),
        ({"activation_function": ["gelu"]}, r"activation_function is \['gelu'\]; give a model"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True; only False"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False; only True"),
        ({"add_cross_attention": True}, "add_cross_attention is True; only False"),
        ({"n_embd": "8"}, "n_embd is '8'; it must be a whole number of at least 1"),
        ({"n_head": True}, "n_head is True; it must be a whole number"),
        ({"n_layer": 0}, "n_layer is 0; it must be a whole number of at least 1"),
        ({"n_inner": 12.5}, "n_inner is 12.5; it must be a whole number"),
        ({"n_head": 3}, "model.d_model: 8 is not divisible by model.n_head 3"),
        ({"resid_pdrop": "0.1"}, "resid_pdrop is '0.1'; it must be a number from 0 to 1"),
        ({"layer_norm_epsilon": 10**400}, "layer_norm_epsilon is 1000.*; it must be a number from 0 to 1"),
        ({"initializer_range": float("nan")}, "initializer_range is nan; it must be a number from 0 to 1"),
        ({"resid_pdrop": 1.0, "embd_pdrop": 1.0}, "dropout: 1.0 must be at least 0 and below 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false"),
        ({"n_layer": 10**9}, "config.json says 1000000000 layers for 28 tensors"),
        ({"n_embd": 10**9, "n_head": 1}, r"wte.weight \(11, 8\) instead of \(11, 1000000000\)"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
        ({"n_layer": 1}, "not expected: h.1.attn.c_attn.bias, .*h.1.mlp.c_proj.weight"),
    ],
)
def test_configs_that_are_refused(folder, changes, message):
    edit_config(folder, changes)
    with pytest.raises(InputError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["n_layer", "n_head", "n_embd", "vocab_size", "n_positions"])
def test_a_size_left_out_is_named(folder, key):
    edit_config(folder, {}, drop=(key,))
    with pytest.raises(InputError, match=f"{key} is None; it must be a whole number"):
        load_model(folder)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_damaged_json(folder, text):
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"config\.json: (not readable JSON|holds a list, not an object)"):
        load_model(folder)


def test_every_tensor_that_does_not_fit_is_named(folder):
    def change(tensors):
        del tensors["transformer.wpe.weight"], tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = np.zeros((12, 8), np.float32)
        return tensors | {"score.weight": np.zeros((2, 8), np.float32)}

    rewrite(folder, change)
    message = (
        r"missing: wpe.weight, h.1.ln_2.bias; not expected: score.weight; "
        r"of another shape: h.0.mlp.c_fc.weight \(12, 8\) instead of \(8, 12\)"
    )
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"wte.weight": t["transformer.wte.weight"]}, "a tensor is there twice"),
        (
            lambda t: t | {"transformer.ln_f.bias": np.zeros(8, np.int8), "transformer.ln_f.weight": np.zeros(8)},
            "stored as no float: ln_f.bias I8, ln_f.weight F64; save them as float32, float16, bfloat16",
        ),
        (lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1}, "lm_head.weight differs from wte.weight"),
    ],
)
def test_weights_that_are_refused(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize("bytes_left", [0, 5, 100, -1])
def test_a_truncated_file(folder, bytes_left):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:bytes_left])
    with pytest.raises(
        InputError, match=r"model\.safetensors: not a readable safetensors file \(.*\); get the file again"
    ):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/{}/outside.safetensors", "sub/outside.safetensors", ".."])
def test_an_index_may_not_leave_its_folder(folder, name):
    index, weight_map = split(folder)
    part = weight_map["transformer.wte.weight"]
    (folder / "sub").mkdir()
    for outside in (folder.parent, folder / "sub"):  # there, and good, so that only the name can be at fault
        shutil.copy(folder / part, outside / "outside.safetensors")
    name = name.format(folder.parent)
    weight_map = {key: name if value == part else value for key, value in weight_map.items()}
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(InputError, match="only safetensors files in the same folder are read"):
        load_model(folder)


@pytest.mark.parametrize("content", [{}, {"weight_map": ["a"]}, {"weight_map": {"wte.weight": 3}}])
def test_an_index_without_names(folder, content):
    index, _ = split(folder)
    index.write_text(json.dumps(content))
    with pytest.raises(InputError, match="weight_map must say for every tensor"):
        load_model(folder)


def test_a_part_that_is_not_there(folder):
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors: not a readable safetensors file"):
        load_model(folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_with_the_way_out(folder, name):
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(InputError, match=r"a pickle, which can run code and is never opened; .*save_pretrained"):
        load_model(folder)


def test_folders_that_are_none(folder, tmp_path):
    with pytest.raises(InputError, match=r"absent/config\.json: no such file; give a folder"):
        load_model(tmp_path / "absent")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors: no such file; give a folder"):
        load_model(folder)


# Memory.

MEASURED = """
import sys
from pathlib import Path

import jax
import numpy as np

from spdf_jax.huggingface import load_model, save_model


def kilobytes(of):
    return next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines() if row.startswith(of))


def peak_bytes(before, doing):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there
    result = doing()
    return 1024 * (kilobytes("VmHWM") - before), result


tiny, folder, written, dtype = sys.argv[1:]
save_model(tiny + "-again", *load_model(tiny), dtype=dtype)  # imports and programs are there before
before = kilobytes("VmRSS")
read, (config, params) = peak_bytes(before, lambda: jax.block_until_ready(load_model(folder)))
wrote, _ = peak_bytes(before, lambda: save_model(written, config, params, dtype=dtype))
twice, copy = peak_bytes(before, lambda: jax.tree.map(np.array, params))
print(sum(leaf.nbytes for leaf in jax.tree.leaves(params)), read, wrote, twice)
"""


def in_two_files(folder):
    """As transformers splits a large model."""
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = [[name for i, name in enumerate(sorted(tensors)) if i % 2 == half] for half in (0, 1)]
    for half, some in enumerate(names):
        save_file({name: tensors[name] for name in some}, folder / f"part-{half}.safetensors")
    places = {name: f"part-{half}.safetensors" for half, some in enumerate(names) for name in some}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    whole.unlink()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory as Linux has it")
@pytest.mark.parametrize(("dtype", "files"), [("float32", 1), ("bfloat16", 2)])
def test_reading_and_writing_a_model_take_little_more_memory_than_it_has(tmp_path, dtype, files):
    """Parameters are float32: of a file of half precision the bound is on them, twice its bytes."""
    shape = {"norm": "rms_norm", "positions": "rotary", "activation": "silu", "gated": True, "use_bias": False}
    shape |= {"n_head": 8, "n_kv_head": 2, "context": 64, "tied_head": False}
    for name, sizes in (
        ("tiny", {"n_layer": 1, "d_model": 16, "d_ff": 16, "vocab_size": 16}),
        (
            "large",
            {"n_layer": 6, "d_model": 512, "d_ff": 7168, "vocab_size": 4096},
        ),  # three matrices are nearly all of it
    ):
        config = spdf.GPTConfig(**shape, **sizes)
        params = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), abstract_params(spdf.GPT(config)))
        save_model(tmp_path / name, config, params, dtype=dtype)
        if files > 1:
            in_two_files(tmp_path / name)
    command = [sys.executable, "-c", MEASURED, *(str(tmp_path / name) for name in ("tiny", "large", "out")), dtype]
    done = subprocess.run(command, env=as_users(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    params, read, wrote, twice = map(int, done.stdout.split())
    assert params > 280e6
    print(f"{read / params:.3f} {wrote / params:.3f} of {params / 1e6:.0f} MB")  # shown by pytest -rP
    assert max(read, wrote) <= 1.2 * params
    assert twice > 1.9 * params  # what holds two copies is seen
