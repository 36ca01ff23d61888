"""What a few seeds can tell: 95 % intervals of means by Student's t, and the difference that they would find."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

LEVEL, POWER = 0.95, 0.8


class Interval(NamedTuple):
    """A mean over seeds, within `half` of which the true one lies in 95 % of such studies; infinite for one seed."""

    mean: float
    half: float
    seeds: int

    @property
    def low(self) -> float:
        """Its lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.mean + self.half


def interval(values: Sequence[float]) -> Interval | None:
    """The mean of values that are independent and about normal, by Student's t with one degree of freedom fewer; None of none.

    >>> round(interval([1.0, 2.0, 3.0]).half, 6)  # 4.302653 deviations of the mean
    2.484138
    """
    n = len(values)
    if not n:
        return None
    half = _quantile((1 + LEVEL) / 2, n) * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
    return Interval(statistics.fmean(values), half, n)


def detectable(found: Interval) -> float:
    """The difference that as many seeds, varying as these do, would tell from none in 80 % of such studies.

    Of a test at 5 %, two-sided: (t_0.975 + t_0.8) standard errors, which for few seeds is close to the exact answer.
    """
    return found.half * (1 + _quantile(POWER, found.seeds) / _quantile((1 + LEVEL) / 2, found.seeds))


def _quantile(share: float, seeds: int) -> float:
    return float(stdtrit(seeds - 1, share))


def along(costs: Sequence[float], losses: Sequence[float], cost: float, slack: float = 1e-3) -> float | None:
    """The loss at a cost, between runs of others, on the line over its logarithm; None outside of them by more than `slack`.

    >>> round(along([1.0, 4.0], [5.0, 4.0], 2.0), 9), along([1.0, 4.0], [5.0, 4.0], 8.0)
    (4.5, None)
    """
    order = np.argsort(costs)
    xs, ys = np.log(np.asarray(costs, float)[order]), np.asarray(losses, float)[order]
    x = math.log(cost)
    if not xs[0] - slack <= x <= xs[-1] + slack:
        return None
    return float(np.interp(x, xs, ys))
