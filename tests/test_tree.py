"""Names and filters: the first match wins; what matches nothing is an error."""

from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.gpt import GPT
from spdf_jax.tree import (
    DECISIONS,
    LINEAR_KERNELS,
    LINEAR_KERNELS_AND_HEAD,
    LINEAR_KERNELS_AND_TIED_HEAD,
    check_same_structure,
    map_named,
    match_filter,
    named_leaves,
)

MATRICES = {f"blocks/{name}/kernel" for name in ("attn_q", "attn_k", "attn_v", "attn_o", "mlp_up", "mlp_down")}


class Pair(NamedTuple):
    left: jax.Array
    right: jax.Array


class Node(flax.struct.PyTreeNode):
    kernel: jax.Array


def model_shapes(*, tied_head: bool):
    model = GPT(GPTConfig(n_layer=2, n_head=2, d_model=8, vocab_size=16, context=8, tied_head=tied_head))
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]


def test_names_run_through_every_container_in_tree_order():
    tree = {"b": Pair(np.zeros(1), np.ones(1)), "a": [np.ones(2), {"x": np.ones(3)}], "c": Node(np.ones(4))}
    assert [name for name, _ in named_leaves(tree)] == ["a/0", "a/1/x", "b/left", "b/right", "c/kernel"]
    assert [leaf.shape for _, leaf in named_leaves(tree)] == [leaf.shape for leaf in jax.tree.leaves(tree)]


def test_map_named_gives_the_name_and_the_leaves_of_every_tree():
    tree, other = {"a": 1, "b": [2, 3]}, {"a": 10, "b": [20, 30]}
    assert map_named(lambda name, x, y: f"{name}:{x + y}", tree, other) == {"a": "a:11", "b": ["b/0:22", "b/1:33"]}


def test_the_first_matching_pattern_wins():
    params = {"first": np.ones((2, 2)), "second": np.ones((2, 2, 2)), "bias": np.ones(2)}
    pairs = [("first", "dense"), ("second", "stack"), (r"first|second|bias", "matrix")]
    assert match_filter(pairs, params) == {"bias": "matrix", "first": "dense", "second": "stack"}


def test_unmatched_vectors_are_dense():
    assert match_filter([("w", "matrix")], {"w": np.ones((2, 2)), "bias": np.ones(2), "scale": np.ones(())}) == {
        "bias": "dense",
        "scale": "dense",
        "w": "matrix",
    }


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("w", "matrix"), ("kernle$", "dense"), (".*", "dense")], r"'kernle\$' matches no leaf.*b, v, w"),
        ([("w", "matrix")], r"no pattern matches leaf 'v' of shape \(3, 2\); say"),
        ([("b", "dense")], r"no pattern matches leaf 'v' of shape \(3, 2\), 'w' of shape \(2, 2\); say"),
        ([("w", "sparse"), (".*", "dense")], r"decision 'sparse' of pattern 'w'"),
        ([("b", "stack"), (".*", "dense")], r"leaf 'b' of shape \(2,\) has no layers"),
        ([("b", "matrices"), (".*", "dense")], r"leaf 'b' of shape \(2,\) has no layers"),
        ([], r"no pattern matches leaf"),
        ({"w": "matrix"}, r"filter: \{'w': 'matrix'\} is no sequence of pairs such as"),
        ("w", r"filter: 'w' is no sequence"),
        (["w", "matrix"], r"filter: \['w', 'matrix'\] is no sequence"),
        ([("w", "matrix", "dense")], r"is no sequence"),
    ],
)
def test_filters_that_say_nothing_or_nonsense_are_refused_by_name(pairs, message):
    params = {"w": np.ones((2, 2)), "v": np.ones((3, 2)), "b": np.ones(2)}
    with pytest.raises(InputError, match=message):
        match_filter(pairs, params)


def test_the_default_filter_picks_the_six_matrices_of_a_block_and_nothing_else():
    # SPDF, section 2: Q, K, V, attention output and both MLP matrices; embeddings, norms, biases and head stay dense.
    decisions = match_filter(LINEAR_KERNELS, model_shapes(tied_head=True))
    assert {name for name, d in decisions.items() if d == "stack"} == MATRICES
    assert {d for name, d in decisions.items() if name not in MATRICES} == {"dense"}


@pytest.mark.parametrize(
    ("tied_head", "filter", "head"),
    [(True, LINEAR_KERNELS_AND_TIED_HEAD, "wte/embedding"), (False, LINEAR_KERNELS_AND_HEAD, "head/kernel")],
)
def test_the_head_filters_add_the_head_as_one_matrix(tied_head, filter, head):
    decisions = match_filter(filter, model_shapes(tied_head=tied_head))
    assert {name for name, d in decisions.items() if d == "matrix"} == {head}
    assert {name for name, d in decisions.items() if d == "stack"} == MATRICES
    assert set(decisions.values()) == {*DECISIONS} - {"matrices"}


def test_the_untied_head_filter_is_refused_on_a_tied_model():
    with pytest.raises(InputError, match="head/kernel"):
        match_filter(LINEAR_KERNELS_AND_HEAD, model_shapes(tied_head=True))


def test_another_structure_is_refused_by_what_is_missing_and_extra():
    params = {"w": np.ones(2), "b": np.ones(2)}
    assert check_same_structure("masks", {"w": True, "b": True}, params) is None
    with pytest.raises(InputError, match=r"masks must.*missing \['b'\].*\['c'\]"):
        check_same_structure("masks", {"w": True, "c": True}, params)
    with pytest.raises(InputError, match=r"masks must"):
        check_same_structure("masks", {"w": None, "b": True}, params)
