"""What sparsity should buy: wider models of equal active parameters, and a published scaling law as a planner.

``python -m spdf_jax.planning.scaling --flops 1e20 --tokens 1e10`` prints the planner's table. No array leaves this module:
plain numbers before a run, never a part of one.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from spdf_jax.errors import InputError
from spdf_jax.model.config import GPTConfig
from spdf_jax.model.flops import linear_size
from spdf_jax.tree import LINEAR_KERNELS, Filter

#: The MLP matrices of `spdf_jax.GPT` alone; attention, embeddings, norms, biases and head stay dense.
MLP_KERNELS: Filter = ((r"^blocks/mlp.*kernel$", "stack"), (r".*", "dense"))


class Widening(NamedTuple):
    """A wider sparse model.

    Attributes:
      config: that of the wider model.
      filter: the leaves that the sparsity applies to, for `spdf_jax.init_masks`.
      active_ratio: active weights in the layers of `config` under that sparsity / those of the dense original.
    """

    config: GPTConfig
    filter: Filter
    active_ratio: float


def widen(config: GPTConfig, sparsity: float, how: str = "d_model") -> Widening:
    """A wider config whose layers at `sparsity` have as many active weights as the dense `config`.

    Source: Sparse-IFT (Thangarasa et al., arXiv 2303.11525), "sparse wide": ``d' = d / sqrt(1 - sparsity)``, or
    ``d_ff' = d_ff / (1 - sparsity)`` with attention left dense. Equal active weights are equal linear FLOPs a token; the
    embedding, the head and attention grow with d' all the same: compare `spdf_jax.train_flops` of both configs.

    Args:
      config: of the dense model.
      sparsity: share of zeros in the sparse matrices of the wider model, in [0, 1).
      how: ``d_model`` (all matrices in layers sparse; the number of heads stays, they get wider) or ``d_ff`` (only the MLP).

    Returns:
      `Widening`. d' is a multiple of 8 a head and d_ff' of 8, and d_ff' takes up what rounding d' left over, so the ratio is
      within 1 % of 1 for widths of 64 or more.

    Raises:
      InputError: a sparsity outside [0, 1) or an unknown `how`.

    >>> import spdf_jax as spdf
    >>> wide = widen(spdf.GPT_SIZES["124m"], 0.75)
    >>> wide.config.d_model, wide.config.mlp_width, round(wide.active_ratio, 4)
    (1536, 6144, 1.0)
    >>> widen(spdf.GPT_SIZES["124m"], 0.75, how="d_ff").config.mlp_width
    12288
    """
    if not 0 <= sparsity < 1:
        raise InputError(f"widen: sparsity {sparsity} is outside [0, 1)")
    if how not in ("d_model", "d_ff"):
        raise InputError(f"widen: how {how!r} is not 'd_model' or 'd_ff'")
    density = 1 - sparsity
    if how == "d_model" and config.d_head:
        raise InputError("widen: model.d_head fixes what d_model is to widen; set it to 0, or widen 'd_ff'")
    d, f, mlps = config.d_model, config.mlp_width, 3 if config.gated else 2
    # Attention's matrices, in units of one of d_model x d_model.
    shares = 2 + 2 * config.kv_heads / config.n_head
    original = linear_size(config) / config.n_layer
    if how == "d_ff":
        wide = dataclasses.replace(config, d_ff=_multiple(f / density, 8))
        active = original - mlps * d * f + mlps * d * wide.mlp_width * density
        return Widening(wide, MLP_KERNELS, active / original)
    d_wide = _multiple(d / math.sqrt(density), 8 * config.n_head)
    f_wide = _multiple((original / density - shares * d_wide**2) / (mlps * d_wide), 8)
    wide = dataclasses.replace(config, d_model=d_wide, d_ff=f_wide)
    return Widening(wide, LINEAR_KERNELS, density * (linear_size(wide) / wide.n_layer) / original)


def _multiple(value: float, of: int) -> int:
    return max(1, round(value / of)) * of


class Fit(NamedTuple):
    """``L = E + A (r^e + c (1 - r)^u) / (N r)^alpha + B / D^beta``: N raw parameters, r density, D tokens, L nats a token."""

    ln_a: float
    ln_b: float
    ln_e: float
    alpha: float
    beta: float
    e: float
    u: float
    c: float


#: arXiv 2606.01155.
FIT = Fit(ln_a=5.2407, ln_b=6.1030, ln_e=0.8536, alpha=0.3268, beta=0.3268, e=-0.0097, u=0.8466, c=-0.2729)
#: Nothing below is offered as "best". Frantar et al. (arXiv 2309.08520), the independent fit, trained up to 87.5 % sparsity.
LOWEST_DENSITY = 0.125


def predicted_loss(parameters: float, tokens: float, density: float = 1.0, fit: Fit = FIT) -> float:
    """Predicted loss of a model of `parameters` raw weights, the zeros included, after `tokens`.

    Source: arXiv 2606.01155. Use differences, not values: the intercept belongs to its data and tokeniser.

    Args:
      parameters: raw weights N; ``density * parameters`` are active.
      tokens: D.
      density: share of active weights, in (0, 1].
      fit: constants.

    Returns:
      Nats a token.

    Raises:
      InputError: an argument out of its range.

    >>> predicted_loss(2e9, 2e10, 0.5) < predicted_loss(1e9, 2e10)  # equal active parameters
    True
    """
    if not 0 < density <= 1:
        raise InputError(f"predicted_loss: density {density} is outside (0, 1]")
    if parameters <= 0 or tokens <= 0:
        raise InputError(f"predicted_loss: parameters {parameters} and tokens {tokens} must be positive")
    capacity = math.exp(fit.ln_a) * _factor(density, fit) / (parameters * density) ** fit.alpha
    return math.exp(fit.ln_e) + capacity + math.exp(fit.ln_b) / tokens**fit.beta


def _factor(density: float, fit: Fit) -> float:
    return density**fit.e + fit.c * (1 - density) ** fit.u


def dense_gain(density: float, fit: Fit = FIT) -> float:
    """How many times the active parameters a dense model of equal predicted loss has, at equal tokens.

    >>> round(dense_gain(0.5), 2), round(dense_gain(0.25), 2)
    (1.62, 1.98)
    """
    if not 0 < density <= 1:
        raise InputError(f"dense_gain: density {density} is outside (0, 1]")
    return _factor(density, fit) ** (-1 / fit.alpha)


class Plan(NamedTuple):
    """One density at a FLOP budget. `equal_dense` is the dense model of the same predicted loss, in parameters."""

    density: float
    active: float
    raw: float
    loss: float
    equal_dense: float


def plan(flop_budget: float, tokens: float, density: float) -> Plan:
    """The model of `density` that spends `flop_budget` on `tokens`, by ``6 * active parameters * tokens`` FLOPs.

    Raises:
      InputError: an argument out of its range.
    """
    if flop_budget <= 0 or tokens <= 0:
        raise InputError(f"plan: flops {flop_budget} and tokens {tokens} must be positive")
    active = flop_budget / (6 * tokens)
    loss = predicted_loss(active / density if density > 0 else active, tokens, density)
    return Plan(density, active, active / density, loss, active * dense_gain(density))


def best_density(flop_budget: float, tokens: float, lowest: float = LOWEST_DENSITY) -> Plan:
    """The density in [`lowest`, 1] of least predicted loss at a FLOP budget that counts active weights only.

    The fit's least loss at equal active parameters lies near density 0.04 whatever the budget, outside what was trained, so the
    answer is `lowest` for any `lowest` above that: the fit says "as sparse as you can make and afford to store", no more.

    Args:
      flop_budget: training FLOPs of a machine that skips zeros.
      tokens: of the run.
      lowest: smallest density to consider, in (0, 1].

    Returns:
      `Plan`.

    Raises:
      InputError: an argument out of its range.

    >>> best_density(1e20, 1e10).density
    0.125
    """
    if not 0 < lowest <= 1:
        raise InputError(f"best_density: lowest {lowest} is outside (0, 1]")
    steps = 400
    return min((plan(flop_budget, tokens, lowest ** (i / steps)) for i in range(steps + 1)), key=lambda p: p.loss)


def table(flop_budget: float, tokens: float, densities: Sequence[float] = (1.0, 0.5, 0.25, 0.2, 0.125)) -> str:
    """The planner's page: a Markdown table, its source and its caveats."""
    best = best_density(flop_budget, tokens)
    lines = [
        f"{flop_budget:.3g} FLOPs, {tokens:.3g} tokens ({tokens * 6 * tokens / flop_budget:.3g} tokens an active parameter)",
        "",
        "| density | active parameters | raw parameters | predicted loss | equal dense model | x active |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for p in (plan(flop_budget, tokens, density) for density in densities):
        gain = p.equal_dense / p.active
        lines.append(
            f"| {p.density:g} | {p.active:.3g} | {p.raw:.3g} | {p.loss:.4f} | {p.equal_dense:.3g} | {gain:.2f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"Best density in [{LOWEST_DENSITY:g}, 1]: {best.density:g}, predicted loss {best.loss:.4f}.",
            "",
            "Source: arXiv 2606.01155, L = E + A (r^e + c (1-r)^u) / (N r)^a + B / D^a; N raw parameters, r density.",
            "Caveats:",
            "- FLOPs are 6 x active parameters x tokens, as if every zero were skipped, without attention and head; no GPU",
            "  or TPU skips unstructured zeros today.",
            "- Equal FLOPs, not equal memory: weights, gradients and moments of a masked model take room for all raw weights.",
            "- Losses compare with each other only; the intercept belongs to the fit's own data and tokeniser.",
            f"- Densities below {LOWEST_DENSITY:g} are extrapolation; the fit's own minimum, near 0.04, is not to be believed.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m spdf_jax.planning.scaling --flops 1e20 --tokens 1e10``."""
    parser = argparse.ArgumentParser(description="Predicted best density for a FLOP budget and a number of tokens.")
    parser.add_argument("--flops", type=float, required=True, help="training FLOPs, zeros skipped")
    parser.add_argument("--tokens", type=float, required=True)
    args = parser.parse_args(argv)
    print(table(args.flops, args.tokens))


if __name__ == "__main__":
    main()
