"""Every optimiser constructor of optax under masks: it works, or is refused by name before its first step.

``python tests/test_every_optimizer.py`` runs them all and writes the table of experiments/README.md.
"""

import inspect
import re
from functools import cache, partial
from pathlib import Path
from types import FunctionType

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import spdf_jax as spdf
from spdf_jax.errors import InputError
from spdf_jax.tree import along_state

README = Path(__file__).parent.parent / "experiments" / "README.md"
START, END = "<!-- optimisers: written by tests/test_every_optimizer.py -->\n", "<!-- end of optimisers -->"
RATE = 0.05
LABELS = {"w": "a", "sq": "a", "b": "s"}
FROZEN = {"w": False, "sq": False, "b": True}
# Public functions of optax without a return annotation that make no transformation.
OTHERS = {
    "bias_correction",
    "matrix_inverse_pth_root",
    "sigmoid_binary_cross_entropy",
    "update_infinity_moment",
    "update_moment",
    "update_moment_per_elem_norm",
    "contrib.schedule_free_eval_params",
}


def chained(*parts):
    return lambda: optax.chain(*(part() for part in parts), optax.sgd(RATE))


def adam():
    return optax.adam(RATE)


def normal_sgd():
    return optax.chain(contrib.normalize(), optax.sgd(RATE))


#: What is not made from a learning rate alone; the same constructor otherwise configured in brackets.
EXAMPLES = {
    "MultiSteps": lambda: optax.MultiSteps(adam(), 2).gradient_transformation(),
    "adafactor (factored)": lambda: optax.adafactor(RATE, min_dim_size_to_factor=2),
    "adaptive_grad_clip": chained(lambda: optax.adaptive_grad_clip(0.1)),
    "add_noise": chained(lambda: optax.add_noise(0.01, 0.55, jax.random.key(3))),
    "apply_every": chained(lambda: optax.apply_every(2)),
    "apply_if_finite": lambda: optax.apply_if_finite(adam(), 5),
    "chain": lambda: optax.chain(optax.clip(1.0), adam()),
    "clip": chained(lambda: optax.clip(1.0)),
    "clip_by_block_rms": chained(lambda: optax.clip_by_block_rms(1.0)),
    "clip_by_global_norm": chained(lambda: optax.clip_by_global_norm(1.0)),
    "conditionally_mask": lambda: optax.conditionally_mask(adam(), lambda step, **_: step % 2 == 0),
    "conditionally_transform": lambda: optax.conditionally_transform(adam(), lambda step, **_: step % 2 == 0),
    "ema": chained(lambda: optax.ema(0.9)),
    "flatten": lambda: optax.flatten(adam()),
    "freeze": chained(lambda: optax.freeze(FROZEN)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adamw)(learning_rate=RATE),
    "lbfgs": optax.lbfgs,
    "lookahead": lambda: optax.lookahead(optax.sgd(RATE), 5, 0.5),
    "masked": lambda: optax.masked(adam(), {"w": True, "sq": True, "b": False}),
    "measure_with_ema": lambda: optax.chain(
        adam(), optax.monitor({"norm": optax.measure_with_ema(optax.tree.norm, 0.9)})
    ),
    "monitor": lambda: optax.chain(adam(), optax.monitor({"norm": optax.tree.norm})),
    "multi_transform": lambda: optax.multi_transform({"a": adam(), "s": optax.sgd(RATE)}, LABELS),
    "named_chain": lambda: optax.named_chain(("a", adam()), ("b", optax.scale(1.0))),
    "noisy_sgd": lambda: optax.noisy_sgd(RATE, 0.01, 0.55, jax.random.key(3)),
    "partition": lambda: optax.partition({"a": adam(), "s": optax.sgd(RATE)}, LABELS),
    "rprop": lambda: optax.rprop(0.01),
    "scale": lambda: optax.scale(-RATE),
    "scale_by_backtracking_linesearch": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "scale_by_learning_rate": lambda: optax.scale_by_learning_rate(RATE),
    "scale_by_rprop": lambda: optax.chain(optax.scale_by_rprop(0.01), optax.scale(-1.0)),
    "scale_by_schedule": lambda: optax.scale_by_schedule(optax.constant_schedule(-RATE)),
    "scale_by_zoom_linesearch": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(10)),
    "selective_transform": lambda: optax.selective_transform(adam(), freeze_mask=FROZEN),
    "snapshot": lambda: optax.chain(adam(), optax.snapshot("norm", optax.tree.norm)),
    "stateless": lambda: optax.stateless(lambda u, p: jax.tree.map(lambda x: -RATE * x, u)),
    "stateless_with_tree_map": lambda: optax.stateless_with_tree_map(lambda u, p: -RATE * u),
    "trace": chained(lambda: optax.trace(0.9)),
    "with_extra_args_support": lambda: optax.with_extra_args_support(adam()),
    "contrib.adopt (use_clipping=False)": lambda: contrib.adopt(RATE, use_clipping=False),
    "contrib.differentially_private_aggregate": chained(
        lambda: contrib.differentially_private_aggregate(1.0, 0.1, key=jax.random.key(0))
    ),
    "contrib.dpsgd": lambda: contrib.dpsgd(RATE, 1.0, 0.1, 0),
    "contrib.mechanize": lambda: contrib.mechanize(adam()),
    "contrib.normalize": normal_sgd,
    "contrib.reduce_on_plateau": lambda: optax.chain(adam(), contrib.reduce_on_plateau()),
    "contrib.sam": lambda: contrib.sam(optax.sgd(RATE), normal_sgd()),
    "contrib.sam (opaque_mode)": lambda: contrib.sam(optax.sgd(RATE), normal_sgd(), opaque_mode=True),
    "contrib.scale_by_muon": lambda: optax.chain(
        optax.masked(
            contrib.scale_by_muon(
                weight_dimension_numbers=lambda p: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), p)
            ),
            {"w": True, "sq": True, "b": False},
        ),
        optax.scale(-RATE),
    ),
    "contrib.schedule_free": lambda: contrib.schedule_free(optax.sgd(RATE), RATE),
    "contrib.schedule_free (muon)": lambda: contrib.schedule_free(contrib.muon(RATE), RATE),
    "contrib.split_real_and_imaginary": lambda: contrib.split_real_and_imaginary(adam()),
}


def constructors():
    """Names of all constructors of optax and optax.contrib."""
    found = ["MultiSteps"]
    for prefix, module in (("", optax), ("contrib.", contrib)):
        for name, thing in inspect.getmembers(module, lambda x: isinstance(x, FunctionType | partial)):
            returned = inspect.signature(thing).return_annotation
            unsaid = returned is inspect.Signature.empty and prefix + name not in OTHERS
            if not name.startswith("_") and (unsaid or "GradientTransformation" in str(returned)):
                found.append(prefix + name)
    return found


def make(name):
    if name in EXAMPLES:
        return EXAMPLES[name]()
    constructor = getattr(contrib if name.startswith("contrib.") else optax, name.removeprefix("contrib."))
    wanted = inspect.signature(constructor).parameters
    if "learning_rate" in wanted:
        return constructor(learning_rate=RATE)
    made = constructor()
    return made if name.startswith("contrib.") and "scale_by" not in name else optax.chain(made, optax.scale(-RATE))


@cache
def problem():
    """Parameters (one of them square, which hides what is not element-wise), two masks of one count, and a loss."""
    rng = np.random.default_rng(0)
    shapes = {"w": (6, 8), "sq": (8, 8), "b": (8,)}
    params = {name: jnp.asarray(rng.normal(size=shape) * 0.3, jnp.float32) for name, shape in shapes.items()}
    x, y = rng.normal(size=(16, 6)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)

    def loss(p):
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["sq"] + p["b"][None] - y) ** 2)

    first = {
        name: jnp.asarray(rng.random(shape) < 0.5) if len(shape) > 1 else jnp.array(True)
        for name, shape in shapes.items()
    }
    second = {name: jnp.roll(mask, 1, -1) if mask.ndim else mask for name, mask in first.items()}
    return params, first, second, loss


def arguments(loss):
    """What to pass besides, by the words of the table; each a function of the value and the gradient."""
    return {
        "": lambda v, g: {},
        "`value=`": lambda v, g: {"value": v},
        "`obj_fn=`": lambda v, g: {"obj_fn": loss},
        "`grad_fn=`": lambda v, g: {"grad_fn": lambda p, step: jax.grad(loss)(p)},
        "`value=`, `grad=`, `value_fn=`": lambda v, g: {"value": v, "grad": g, "value_fn": loss},
    }


def train(tx, moving, extra):
    """Twelve steps; the masks move after six. All that must hold is asserted."""
    params, masks, new, loss = problem()
    params, grown = spdf.apply_masks(params, masks), {name: np.zeros(mask.shape, bool) for name, mask in masks.items()}
    state = tx.init(params)

    @jax.jit
    def step(params, state, masks):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params, masks=masks, **extra(value, grads))
        return optax.apply_updates(params, updates), state, updates

    largest = {True: 0.0, False: 0.0}  # update of weights that grew, of the others
    for i in range(12):
        if i == 6 and moving:
            stayed = jax.tree.map(jnp.logical_and, masks, new)
            before, state = state, spdf.reset_masked_state(tx, state, params, stayed)
            check_reset(tx, before, state, params, stayed)
            grown = {name: np.asarray(new[name] & ~masks[name]) for name in new}
            params, masks = spdf.apply_masks(params, new), new
        params, state, updates = step(params, state, masks)
        for name, mask in masks.items():
            assert mask.ndim == 0 or not np.asarray(params[name])[~np.asarray(mask)].any(), "a masked weight lives"
            assert np.isfinite(np.asarray(params[name])).all()
            for new_ones in (True, False) if mask.ndim and i >= 6 else ():
                there = np.asarray(mask) & (grown[name] == new_ones)
                size = np.abs(np.asarray(updates[name])[there]).max(initial=0)
                largest[new_ones] = max(largest[new_ones], float(size))
    assert largest[True] <= 100 * largest[False], f"weights that grew took updates of {largest}"


def check_reset(tx, before, after, params, stayed):
    """Element-wise state is that of init where weights are new, and as it was elsewhere."""
    fresh = tx.init(spdf.apply_masks(params, stayed))
    along = along_state(tx, after, stayed, np.True_)
    for mask, old, new, initial in zip(*map(jax.tree.leaves, (along, before, after, fresh)), strict=True):
        expected = np.where(mask, old, initial) if np.ndim(mask) and old.shape == mask.shape else old
        if not jnp.issubdtype(getattr(new, "dtype", np.float32), jax.dtypes.prng_key):
            np.testing.assert_array_equal(new, expected)


def outcome(name):
    """What the table says of a constructor; any error but a refusal in our words is a failure here."""
    refusals = []
    for moving in (True, False):
        for words, extra in arguments(problem()[-1]).items():
            try:
                with jax.numpy_rank_promotion("allow"):  # optax's own arithmetic promotes
                    train(spdf.sparse(make(name), moving=moving), moving, extra)
            except (InputError, TypeError) as error:
                if not (isinstance(error, InputError) or str(error).startswith("sparse: ")):
                    raise
                refusals.append(str(error))
                continue
            needed = [] if moving else [f"`sparse(..., moving=False)`: {reason(refusals[0])}"]
            needed += [f"{words} at its update"] if words else []
            return "needs " + " and ".join(needed) if needed else "works"
    return f"refused: {reason(refusals[0])}"


def reason(message):
    for words, short in {
        "changes its structure": "its state changes its structure at an update",
        "cannot be followed weight by weight": "its state is not one number a weight",
        "past gradients": "it divides by a second moment that weights which grow do not have",
    }.items():
        if words in message:
            return short
    if message.startswith("sparse: lookahead"):
        return message.removeprefix("sparse: lookahead ").split(";")[0]
    return re.sub(r"^sparse: .* cannot update these parameters: \w+: ", "", message).replace("|", "/")


def table(outcomes):
    rows = {}
    for name, text in outcomes.items():
        rows.setdefault(text, []).append(f"`{name}`")
    order = sorted(rows, key=lambda text: (text != "works", not text.startswith("needs"), text))
    body = "".join(f"| {text} | {', '.join(rows[text])} |\n" for text in order)
    return f"optax {optax.__version__}:\n\n| under `spdf.sparse` | constructors |\n|---|---|\n{body}"


@cache
def written():
    """The table in the documentation: ``{constructor: outcome}``."""
    text = README.read_text().split(START)[1].split(END)[0]
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", text, re.MULTILINE)
    return {name: outcome for outcome, names in rows for name in re.findall(r"`([^`]+)`", names)}


def test_every_constructor_of_optax_has_its_place_in_the_table():
    """One that a new release adds has none: run this file to place it."""
    assert set(written()) == {*constructors(), *EXAMPLES}


HARD = ["contrib.acprop", "contrib.galore", "contrib.sam", "lookahead", "sm3"]


@pytest.mark.parametrize("name", HARD)
def test_what_once_failed_or_diverged_has_the_outcome_of_the_table(name):
    assert outcome(name) == written()[name]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")  # constructors that optax is about to drop
@pytest.mark.parametrize("name", sorted({*constructors(), *EXAMPLES} - {*HARD}))
def test_every_other_constructor_has_the_outcome_of_the_table(name):
    assert outcome(name) == written()[name]


if __name__ == "__main__":
    outcomes = {}
    for name in sorted({*constructors(), *EXAMPLES}):
        outcomes[name] = outcome(name)
        print(f"{name}: {outcomes[name]}", flush=True)
    head, rest = README.read_text().split(START)
    README.write_text(head + START + table(outcomes) + END + rest.split(END)[1])
