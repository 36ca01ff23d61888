"""Which evaluation of a phase is its best, and when to wait for a better one no longer."""

from collections.abc import Mapping


def of_phase(evaluations: Mapping[tuple[str, int], float], phase: str) -> dict[int, float]:
    """Losses of one phase by step, from those of a run by phase and step: another phase's may be over other data.

    >>> of_phase({("pretrain", 2): 1.0, ("finetune", 2): 9.0, ("finetune", 4): 5.0}, "finetune")
    {2: 9.0, 4: 5.0}
    """
    return {step: loss for (name, step), loss in evaluations.items() if name == phase}


def best_evaluation(losses: Mapping[int, float]) -> int:
    """The step of the lowest loss, the earliest of equals.

    >>> best_evaluation({2: 9.0, 4: 5.0, 6: 5.0})
    4
    """
    return min(losses, key=lambda step: (losses[step], step))


def stops_early(losses: Mapping[int, float], patience: int) -> bool:
    """Whether `patience` evaluations after the best one have not been better; never where `patience` is 0.

    >>> stops_early({2: 9.0, 4: 5.0, 6: 5.0}, 1), stops_early({2: 9.0, 4: 5.0, 6: 5.0}, 2)
    (True, False)
    """
    return bool(patience and losses) and sum(step > best_evaluation(losses) for step in losses) >= patience
