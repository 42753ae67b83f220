"""What several runs of one cell say together."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

from scipy.special import stdtrit


@dataclass(frozen=True)
class Spread:
    """Of one figure over the repeats of a cell."""

    n: int
    low: float
    median: float  # a value that was measured: the lower middle one of an even number
    high: float
    mean_ci95: tuple[float, float] | None  # of the mean; None below three repeats


def spread(values: Sequence[float]) -> Spread:
    """``values``: one a repeat, at least one.

    The interval is Student's: mean +- t(0.975, n - 1) x s / sqrt(n).
    """
    ordered = sorted(values)
    n = len(ordered)
    interval = None
    if n >= 3:
        middle, half = fmean(ordered), float(stdtrit(n - 1, 0.975)) * stdev(ordered) / sqrt(n)
        interval = (middle - half, middle + half)
    return Spread(n, ordered[0], ordered[(n - 1) // 2], ordered[-1], interval)
