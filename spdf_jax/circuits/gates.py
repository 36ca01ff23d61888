"""The fewest nodes with which a model does a task, found by gates that are learned (Gao et al. 2025, arXiv 2511.13653).

A node is a channel of a place of a layer (`spdf_jax.model.places`). One that is off is replaced by its mean over text that the
model was trained on. A gate is on where its number is above 0; the gradient goes through it as through a sigmoid. The loss is
that between the two tokens of a task, plus a price a node. Here the price rises while the loss is below the target and falls
while it is above, so that the search goes to and fro about the target; what then can go one by one, goes.

Shape legend: L layers, F channels of a place, P pairs, B prompts, T tokens, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from spdf_jax.circuits.config import CircuitConfig
from spdf_jax.circuits.tasks import Prompts
from spdf_jax.model.gpt import GPT

#: Where nodes are: what attention and MLP read, compute and write. The residual after them is the sum of what was written.
NODE_PLACES = ("attn_in", "attn_q", "attn_k", "attn_v", "attn_out", "mlp_in", "mlp_neuron", "mlp_out")
#: An array [L, F] a place: means, gates (0 or 1), or the numbers that they come of.
Places = dict[str, Any]

_RATE, _START, _NOISE, _TEMPERATURE = 0.05, 0.5, 0.05, 0.5
_FIRST_PRICE, _PRICE_RATE = 1e-6, 0.15
_PAIRS_A_STEP, _PROMPTS_AT_ONCE, _MEASURE_EVERY = 16, 128, 10
_MOST_TRIED_ALONE = 120


class Measured(NamedTuple):
    """How well a task is done.

    Attributes:
      loss: nats between the two tokens, mean over all prompts: the larger of the two halves'.
      accuracy: share of all prompts after which the wanted token is the likelier of the two.
    """

    loss: float
    accuracy: float


class Circuit(NamedTuple):
    """A search's end.

    Attributes:
      gates: 1 for the nodes of the smallest circuit found, [L, F] a place; None where there was none.
      curve: ``(nodes, loss)`` of every circuit that was measured on all pairs.
      measured: of the ``whole`` model, of ``nothing`` of it (every node off); of a circuit that was found ``alone``, and of the
        model ``without`` it.
      effects: by how many nats the loss of the circuit grows without each of its nodes, [L, F] a place; None as `gates`.
    """

    gates: Places | None
    curve: list[tuple[int, float]]
    measured: dict[str, Measured]
    effects: Places | None = None


def mean_activations(model: GPT, params: Any, batches: Iterable[np.ndarray]) -> Places:
    """The mean of every node.

    Args:
      model: whose.
      params: its parameters.
      batches: token ids [B, T], of text that it was trained on; at least one.

    Returns:
      float32 [L, F] a place.
    """
    total, count = None, 0
    for tokens_BT in batches:
        means = _means(model, params, tokens_BT)
        total = means if total is None else jax.tree.map(jnp.add, total, means)
        count += 1
    return jax.tree.map(lambda sum_LF: sum_LF / count, total)


def activations(model: GPT, params: Any, tokens_BT: jax.Array) -> Places:
    """What every node is at each token: [L, B, T, F] a place."""
    _, found = model.apply({"params": params}, tokens_BT, mutable=["places"])
    return {place: found["places"]["blocks"][place] for place in NODE_PLACES}


@partial(jax.jit, static_argnums=0)
def _means(model: GPT, params: Any, tokens_BT: jax.Array) -> Places:
    return jax.tree.map(lambda x_LBTF: x_LBTF.astype(jnp.float32).mean((1, 2)), activations(model, params, tokens_BT))


def find_circuit(
    model: GPT, params: Any, means: Places, task: Prompts, config: CircuitConfig, seed: int = 0
) -> Circuit:
    """Looks for the smallest circuit that does a task.

    Args:
      model: whose.
      params: its parameters.
      means: of its nodes, see `mean_activations`.
      task: its first half teaches the gates, its second is held against them.
      config: target, steps, searches.
      seed: of what is drawn; the same gives the same circuit.

    Returns:
      `Circuit`. None is found where the whole model does not do the task itself: gates would then make another model of it.
    """
    search = _Search(model, params, means, task, config.target_loss)
    on, off = search.all(1.0), search.all(0.0)
    measured = {"whole": search.measure(on), "nothing": search.measure(off)}
    curve = [(search.size(on), measured["whole"].loss), (search.size(off), measured["nothing"].loss)]
    if measured["whole"].loss > config.target_loss:
        return Circuit(None, curve, measured)
    best = off if measured["nothing"].loss <= config.target_loss else on
    for turn in range(config.searches):
        for gates in search.learned(config.search_steps, seed * config.searches + turn):
            loss = search.measure(gates).loss
            curve.append((search.size(gates), loss))
            if loss <= config.target_loss and search.size(gates) < search.size(best):
                best = gates
    best, effects = search.without_idle(best, curve)
    measured |= {"alone": search.measure(best), "without": search.measure({p: 1 - gate for p, gate in best.items()})}
    return Circuit(best, curve, measured, effects)


class _Search:
    """A model and a task, ready to be measured under gates."""

    def __init__(self, model: GPT, params: Any, means: Places, task: Prompts, target: float) -> None:
        self.params, self.means, self.target = params, means, target
        self.half = len(task.right_P2) // 2
        self.fit, self.whole = task.part(slice(self.half)), task
        self._losses = jax.jit(partial(_losses, model))
        self._step = jax.jit(partial(_step, model))
        self._slopes = jax.jit(jax.grad(partial(_mean_loss, model)))

    def all(self, value: float) -> Places:
        return {place: np.full(mean_LF.shape, value, np.float32) for place, mean_LF in self.means.items()}

    @staticmethod
    def size(gates: Places) -> int:
        return int(sum(gate_LF.sum() for gate_LF in gates.values()))

    def measure(self, gates: Places) -> Measured:
        pairs = len(self.whole.right_P2)
        at_once = min(_PROMPTS_AT_ONCE // 2, pairs)
        margins = []
        for start in range(0, pairs, at_once):  # the last as long as the others, for one program
            start = min(start, pairs - at_once) if start + at_once > pairs else start
            part = _arrays(self.whole.part(slice(start, start + at_once)))
            margins.append((start, np.asarray(self._losses(self.params, self.means, gates, part))))
        margin_P2 = np.zeros((pairs, 2))
        for start, some in margins:
            margin_P2[start : start + at_once] = some
        loss_P2 = np.logaddexp(0, -margin_P2)
        return Measured(
            float(max(loss_P2[: self.half].mean(), loss_P2[self.half :].mean())), float((margin_P2 > 0).mean())
        )

    def learned(self, steps: int, seed: int) -> Iterator[Places]:
        """Gates now and then on the way of one search."""
        rng = np.random.default_rng(seed)
        numbers = {p: _START + rng.normal(0, _NOISE, mean.shape).astype(np.float32) for p, mean in self.means.items()}
        state, price, smoothed = _ADAM.init(numbers), _FIRST_PRICE, None
        size = min(_PAIRS_A_STEP, self.half)
        for step in range(1, steps + 1):
            some = _arrays(self.fit.part(rng.choice(self.half, size, replace=False)))
            rate = _RATE * (1 - 0.9 * step / steps)
            numbers, state, loss = self._step(
                self.params, self.means, numbers, state, np.float32(price), np.float32(rate), some
            )
            smoothed = float(loss) if smoothed is None else 0.8 * smoothed + 0.2 * float(loss)
            # Up by so much a step while nothing is lost, down the faster the more is.
            price *= float(np.exp(_PRICE_RATE * np.clip(1 - smoothed / self.target, -3, 1)))
            price = max(price, _FIRST_PRICE)
            if step % _MEASURE_EVERY == 0 or step == steps:
                yield {place: (np.asarray(number_LF) > 0).astype(np.float32) for place, number_LF in numbers.items()}

    def without_idle(self, gates: Places, curve: list[tuple[int, float]]) -> tuple[Places, Places]:
        """Gates of fewer nodes: those that matter least go, many at once and then one by one, as the target allows."""
        for drop in (self._drop_many, self._drop_one_by_one):
            gates = drop(gates, curve)
        return gates, self._effects(gates)

    def _drop_many(self, gates: Places, curve: list[tuple[int, float]]) -> Places:
        order, low = self._by_slope(gates), 0
        high = len(order) + 1  # so many of the first are too many
        while high - low > 1:
            middle = (low + high) // 2
            fewer = _less(gates, order[:middle])
            loss = self.measure(fewer).loss
            curve.append((self.size(fewer), loss))
            low, high = (middle, high) if loss <= self.target else (low, middle)
        return _less(gates, order[:low])

    def _drop_one_by_one(self, gates: Places, curve: list[tuple[int, float]]) -> Places:
        for node in self._by_slope(gates)[:_MOST_TRIED_ALONE]:
            fewer = _less(gates, [node])
            loss = self.measure(fewer).loss
            if loss <= self.target:
                curve.append((self.size(fewer), loss))
                gates = fewer
        return gates

    def _by_slope(self, gates: Places) -> list[tuple[str, int, int]]:
        """Nodes that are on, those first whose gates change the loss least, to first order."""
        slopes = self._slopes(gates, self.params, self.means, _arrays(self.fit.part(slice(_PROMPTS_AT_ONCE // 2))))
        return sorted(_nodes(gates), key=lambda node: (float(abs(slopes[node[0]][node[1:]])), node))

    def _effects(self, gates: Places) -> Places:
        effects, loss = self.all(0.0), self.measure(gates).loss
        for node in _nodes(gates)[:_MOST_TRIED_ALONE]:
            effects[node[0]][node[1:]] = self.measure(_less(gates, [node])).loss - loss
        return effects


def _nodes(gates: Places) -> list[tuple[str, int, int]]:
    """Place, layer and channel of every node that is on."""
    return [
        (place, int(layer), int(f)) for place in NODE_PLACES for layer, f in np.argwhere(np.asarray(gates[place]) > 0)
    ]


def _less(gates: Places, nodes: Iterable[tuple[str, int, int]]) -> Places:
    fewer = {place: np.array(gate_LF) for place, gate_LF in gates.items()}
    for place, layer, channel in nodes:
        fewer[place][layer, channel] = 0
    return fewer


def _arrays(task: Prompts) -> tuple[np.ndarray, ...]:
    return tuple(task[:4])


def _losses(model: GPT, params: Any, means: Places, gates: Places, some: tuple[Any, ...]) -> jax.Array:
    """By how much the wanted token's logit is above the other's, [P, 2]."""
    tokens_P2T, last_P2, right_P2, wrong_P2 = some
    tokens_BT = tokens_P2T.reshape(-1, tokens_P2T.shape[-1])
    circuit = {place: {"gate": gates[place], "mean": means[place]} for place in gates}
    logits_BTV: Any = model.apply({"params": params, "circuit": {"blocks": circuit}}, tokens_BT)
    rows_B = jnp.arange(len(tokens_BT))
    logits_BV = logits_BTV[rows_B, last_P2.reshape(-1)].astype(jnp.float32)
    margin_B = logits_BV[rows_B, right_P2.reshape(-1)] - logits_BV[rows_B, wrong_P2.reshape(-1)]
    return margin_B.reshape(right_P2.shape)


def _mean_loss(model: GPT, gates: Places, params: Any, means: Places, some: tuple[Any, ...]) -> jax.Array:
    return jax.nn.softplus(-_losses(model, params, means, gates, some)).mean()


@jax.custom_jvp
def _step_function(x: jax.Array) -> jax.Array:
    return (x > 0).astype(x.dtype)


@_step_function.defjvp
def _as_a_sigmoid(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    soft = jax.nn.sigmoid(x / _TEMPERATURE)
    return _step_function(x), soft * (1 - soft) / _TEMPERATURE * dx


_ADAM = optax.scale_by_adam(b1=0.9, b2=0.95)


def _step(
    model: GPT, params: Any, means: Places, numbers: Places, state: Any, price: Any, rate: Any, some: tuple[Any, ...]
) -> tuple[Places, Any, jax.Array]:
    def loss(numbers: Places) -> tuple[jax.Array, jax.Array]:
        gates = jax.tree.map(_step_function, numbers)
        of_task = _mean_loss(model, gates, params, means, some)
        return of_task + price * sum(gate_LF.sum() for gate_LF in gates.values()), of_task

    (_, of_task), grads = jax.value_and_grad(loss, has_aux=True)(numbers)
    updates, state = _ADAM.update(grads, state)
    # Held near 0: what was off for long can come back within some steps.
    moved = jax.tree.map(lambda number, update: jnp.clip(number - rate * update, -1, 1), numbers, updates)
    return moved, state, of_task
