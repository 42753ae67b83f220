"""What several runs of one cell say together, and two cells beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from statistics import fmean, stdev, variance

from scipy.special import stdtrit

SCATTERED = 0.02  # a coefficient of variation above it is flagged
FEWEST_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Spread:
    """Of one figure over the repeats of a cell."""

    n: int
    low: float
    median: float  # a value that was measured: the lower middle one of an even number
    high: float
    mean_ci95: tuple[float, float] | None  # of the mean; None below three repeats
    cv: float | None  # standard deviation / mean; None of one repeat

    @property
    def scattered(self) -> bool:
        return self.cv is not None and self.cv > SCATTERED


def spread(values: Sequence[float]) -> Spread:
    """``values``: one a repeat, at least one.

    The interval is Student's: mean +- t(0.975, n - 1) x s / sqrt(n).
    """
    ordered = sorted(values)
    n, middle = len(ordered), fmean(ordered)
    deviation = stdev(ordered) if n > 1 else None
    interval = None
    if deviation is not None and n >= FEWEST_FOR_INTERVAL:
        half = _t(n - 1) * deviation / sqrt(n)
        interval = (middle - half, middle + half)
    cv = None if deviation is None else deviation / middle
    return Spread(n, ordered[0], ordered[(n - 1) // 2], ordered[-1], interval, cv)


def ratio_ci95(values: Sequence[float], base: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of mean(values) / mean(base), from both cells' runs; None below three of each.

    Welch's of the difference of mean logarithms: runs scatter by a share of themselves.
    """
    if min(len(values), len(base)) < FEWEST_FOR_INTERVAL:
        return None
    logs = [[log(value) for value in group] for group in (values, base)]
    difference = fmean(logs[0]) - fmean(logs[1])
    parts = [variance(group) / len(group) for group in logs]
    if sum(parts) == 0:
        return exp(difference), exp(difference)
    degrees = [part**2 / (len(group) - 1) for part, group in zip(parts, logs, strict=True)]
    half = _t(sum(parts) ** 2 / sum(degrees)) * sqrt(sum(parts))
    return exp(difference - half), exp(difference + half)


def _t(freedom: float) -> float:
    return float(stdtrit(freedom, 0.975))
