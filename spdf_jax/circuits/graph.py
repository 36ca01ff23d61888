"""A circuit as a graph: its nodes, each with the tokens that move it most, and the weights between them.

An edge is a weight that is not 0 from a node to a node. Two things join nodes without a weight: a query is multiplied by the
key of its channel, and what is written to a channel of the residual is what is read there, in every later layer.

Shape legend: L layers, B sequences, T tokens, F channels, N nodes.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spdf_jax.circuits.gates import NODE_PLACES, Places, activations
from spdf_jax.data.tokenizer import Tokenizer
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.gpt import GPT

_CONTEXTS, _TOKENS_BEFORE, _TOKENS_AFTER = 4, 10, 4


class Node(NamedTuple):
    """A channel of a place of a layer (`spdf_jax.model.places`)."""

    place: str
    layer: int
    channel: int


class Edge(NamedTuple):
    """A weight between two nodes, by their numbers."""

    source: int
    target: int
    weight: float


class Context(NamedTuple):
    """A token where a node is far from its mean, with some text around it, and what the node is there."""

    before: str
    token: str
    after: str
    value: float


def nodes_of(gates: Places) -> list[Node]:
    """The nodes that are on, in the order in which a model comes by them.

    >>> nodes_of({p: np.eye(2) * (p == "mlp_in") for p in NODE_PLACES})
    [Node(place='mlp_in', layer=0, channel=0), Node(place='mlp_in', layer=1, channel=1)]
    """
    found = [Node(place, int(layer), int(f)) for place in NODE_PLACES for layer, f in np.argwhere(gates[place])]
    return sorted(found, key=lambda node: (node.layer, NODE_PLACES.index(node.place), node.channel))


def edges_of(nodes: Sequence[Node], config: GPTConfig, params: Any) -> list[Edge]:
    """The weights between nodes that are not 0.

    Args:
      nodes: as `nodes_of` gives them.
      config: of the model.
      params: its parameters, masks applied.
    """
    weights = _weights(config, params)
    at = {node: number for number, node in enumerate(nodes)}
    found = []
    for (source, target), kernel_LFF in weights.items():
        for layer in range(config.n_layer):
            ins = [node for node in nodes if node[:2] == (source, layer)]
            outs = [node for node in nodes if node[:2] == (target, layer)]
            block = kernel_LFF[layer][np.ix_([n.channel for n in ins], [n.channel for n in outs])]
            found += [Edge(at[ins[i]], at[outs[j]], float(block[i, j])) for i, j in np.argwhere(block)]
    return sorted(found)


def _weights(config: GPTConfig, params: Any) -> dict[tuple[str, str], np.ndarray]:
    """Kernels [L, in, out] by the places that they join; where two join them, of each pair the larger weight."""
    kernels = {
        name: np.asarray(leaf["kernel"])
        for name, leaf in params["blocks"].items()
        if isinstance(leaf, Mapping) and "kernel" in leaf
    }
    groups = config.n_head // config.kv_heads
    o_LFD = kernels["attn_o"]  # a channel of the values goes on by every head of queries that shares it
    o_LHGKD = o_LFD.reshape(len(o_LFD), config.kv_heads, groups, config.head_width, -1)
    v_LFD = _larger(np.moveaxis(o_LHGKD, 2, 0)).reshape(len(o_LFD), -1, o_LFD.shape[-1])
    up = [kernels[name] for name in ("mlp_up", "mlp_gate") if name in kernels]
    return {
        ("attn_k" if config.shared_qk else "attn_in", "attn_q"): kernels["attn_q"],
        ("attn_in", "attn_k"): kernels["attn_k"],
        ("attn_in", "attn_v"): kernels["attn_v"],
        ("attn_v", "attn_out"): v_LFD,
        ("mlp_in", "mlp_neuron"): _larger(np.stack(up)),
        ("mlp_neuron", "mlp_out"): kernels["mlp_down"],
    }


def _larger(several: np.ndarray) -> np.ndarray:
    """Along the first axis, the entry of the largest magnitude."""
    return np.take_along_axis(several, np.abs(several).argmax(0)[None], 0)[0]


def joined(nodes: Sequence[Node], config: GPTConfig) -> list[tuple[int, int]]:
    """Pairs of nodes that no weight joins: a query and the key that it is multiplied by, a write and a later read of it."""
    found, groups, width = [], config.n_head // config.kv_heads, config.head_width
    for i, one in enumerate(nodes):
        for j, other in enumerate(nodes):
            if one.place == "attn_q" and other.place == "attn_k" and one.layer == other.layer:
                head, place = divmod(one.channel, width)
                if other.channel == head // groups * width + place:
                    found.append((i, j))
            reads = other.place in ("attn_in", "mlp_in") and one.place in ("attn_out", "mlp_out")
            if reads and one.channel == other.channel and i < j:
                found.append((i, j))
    return found


def to_answers(nodes: Sequence[Node], params: Any, answers: tuple[int, int]) -> list[Edge]:
    """What each write of the residual adds to the first answer's logit over the second's, by the weights of the head alone.

    Args:
      nodes: as `nodes_of` gives them.
      params: of the model.
      answers: ids of the two tokens.

    Returns:
      Edges to 0, the answers, that are not 0.
    """
    head_VD = params["head"]["kernel"].T if "head" in params else params["wte"]["embedding"]
    difference_D = np.asarray(head_VD)[answers[0]] - np.asarray(head_VD)[answers[1]]
    written = [(i, float(difference_D[n.channel])) for i, n in enumerate(nodes) if n.place in ("attn_out", "mlp_out")]
    return [Edge(i, 0, weight) for i, weight in written if weight]


def contexts(
    model: GPT, params: Any, nodes: Sequence[Node], means: Places, batches: Iterable[np.ndarray], tokenizer: Tokenizer
) -> list[list[Context]]:
    """Where in some text each node is furthest from its mean, at most once a sequence.

    Args:
      model: whose.
      params: its parameters.
      nodes: as `nodes_of` gives them.
      means: of all nodes.
      batches: token ids [B, T].
      tokenizer: the model's.

    Returns:
      `Context`s of each node, the furthest first.
    """
    at = {
        place: np.array([(n.layer, n.channel) for n in nodes if n.place == place], int).reshape(-1, 2)
        for place in NODE_PLACES
    }
    places = [place for place in NODE_PLACES if len(at[place])]
    order = {node: i for i, node in enumerate(n for place in places for n in nodes if n.place == place)}
    mean_N = np.concatenate([np.asarray(means[p])[at[p][:, 0], at[p][:, 1]] for p in places]) if places else np.zeros(0)
    found: list[list[tuple[float, float, np.ndarray, int]]] = [[] for _ in nodes]
    for tokens_BT in batches if nodes else ():
        value_NBT = np.asarray(_chosen(model, params, {p: at[p] for p in places}, tokens_BT))
        far_NBT = np.abs(value_NBT - mean_N[:, None, None])
        best_NB = far_NBT.argmax(-1)
        for number, node in enumerate(nodes):
            n = order[node]
            for b, t in enumerate(best_NB[n]):
                found[number].append((float(far_NBT[n, b, t]), float(value_NBT[n, b, t]), tokens_BT[b], int(t)))
            found[number] = sorted(found[number], key=lambda one: -one[0])[:_CONTEXTS]
    return [[_context(tokenizer, *one[1:]) for one in some] for some in found]


@partial(jax.jit, static_argnums=0)
def _chosen(model: GPT, params: Any, at: dict[str, Any], tokens_BT: jax.Array) -> jax.Array:
    """What the nodes are, [N, B, T], those of a place together in the order of `NODE_PLACES`."""
    every = activations(model, params, tokens_BT)
    some = [every[place][at[place][:, 0], :, :, at[place][:, 1]] for place in NODE_PLACES if place in at]
    return jnp.concatenate([x_NBT.astype(jnp.float32) for x_NBT in some])


def _context(tokenizer: Tokenizer, value: float, tokens_T: np.ndarray, t: int) -> Context:
    def text(start: int, end: int) -> str:
        return tokenizer.decode(tokens_T[max(start, 0) : end].tolist(), skip_special_tokens=False)

    return Context(text(t - _TOKENS_BEFORE, t), text(t, t + 1), text(t + 1, t + 1 + _TOKENS_AFTER), value)
