"""Whether step times are steady, and from which step on.

Steady: no change of level, no trend and no run-in that is both more than chance (p < 10^-4, with
the noise's autocorrelation) and more than 2 % of the mean step. Smaller ones are let through, and
larger ones that the noise hides; benchmarks/coverage.py counts how many.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from xdimo.analysis.confidence import scatter

FEWEST_STEPS = 20  # below, nothing can be said
CHANCE = 1e-4
# So few steps are no shift, where the shorter side has no more than so many.
FEW, SHORT = 2, 15
TOLERANCE = 0.02
# In a short window tau is so uncertain that Student's t, left with one degree of freedom or two,
# would hold a jump of 25 standard errors for chance. With 4 it takes 13 to be a change.
FEWEST_DEGREES = 4.0


@dataclass(frozen=True)
class Rules:
    """How a shift is judged."""

    lone_step: bool  # one step far from the others may make a shift
    of_mean: bool  # its share is of the mean step; otherwise of the level before it


# By the schema of the log: a record keeps the verdict that it had when it was measured.
RULES = {
    1: Rules(lone_step=True, of_mean=True),
    2: Rules(lone_step=False, of_mean=False),
}
NEWEST = max(RULES)


@dataclass(frozen=True)
class Change:
    what: str  # shift, trend or run-in
    share: float  # of the level before a shift, else of the mean step; signed
    at: int | None  # index of the first value after a shift


def change(series: NDArray[np.float64], rules: Rules = RULES[NEWEST]) -> Change | None:
    """The first of the three kinds of change that ``series`` (step times in order) shows."""
    if len(series) < FEWEST_STEPS:
        return None
    return _shift(series, rules) or _trend(series) or _run_in(series)


def steady_from(series: NDArray[np.float64], rules: Rules = RULES[NEWEST]) -> int | None:
    """Index from which ``series`` is steady to its end; None where its last quarter is not, or too
    few values are left to tell.

    Looked for in steps of a twentieth, and within the one before by halving.
    """
    n = len(series)
    stride = max(1, n // 20)
    starts = range(0, min(3 * n // 4, n - FEWEST_STEPS) + 1, stride)
    start = next((first for first in starts if change(series[first:], rules) is None), None)
    if not start:
        return start
    unsteady = start - stride
    while start - unsteady > 1:
        middle = (unsteady + start) // 2
        if change(series[middle:], rules) is None:
            start = middle
        else:
            unsteady = middle
    return start


def warm_from(series: NDArray[np.float64], first: int) -> int:
    """Index from which the values before ``first`` are already like those after it.

    Medians of five are compared, so that one slow step does not begin the warm-up again.
    """
    level = float(np.median(series[first:]))
    fives = np.lib.stride_tricks.sliding_window_view(series, min(5, len(series)))
    off = np.abs(np.median(fives, axis=1) - level)
    usual = float(off[first:].max(initial=0.0))
    unlike = np.flatnonzero(off[:first] > max(usual, TOLERANCE * level))
    return int(unlike[-1]) + 1 if len(unlike) else 0


def _shift(series: NDArray[np.float64], rules: Rules) -> Change | None:
    """One change of level, wherever it explains most.

    It must be there without the farthest step of its shorter side too (the FEW farthest of a SHORT
    one): so few are no shift.
    """
    n = len(series)
    edge = max(5, n // 30)
    count = np.arange(edge, n - edge + 1)
    total = np.cumsum(series)
    before = total[count - 1] / count
    after = (total[-1] - total[count - 1]) / (n - count)
    at = int(count[np.argmax(count * (n - count) * (after - before) ** 2)])
    found = _split(series, at, rules)
    if found is None or rules.lone_step:
        return found
    shorter, longer = sorted((range(at), range(at, n)), key=len)
    level = series[longer].mean()
    farthest = sorted(shorter, key=lambda place: -abs(series[place] - level))
    far = farthest[: FEW if len(shorter) <= SHORT else 1]
    left = at - sum(place < at for place in far)
    return found if _split(np.delete(series, far), left, rules) else None


def _split(series: NDArray[np.float64], at: int, rules: Rules) -> Change | None:
    """A shift whose first value is ``series[at]``."""
    n, total = len(series), np.cumsum(series)
    before, after = float(total[at - 1] / at), float((total[-1] - total[at - 1]) / (n - at))
    residual = series - np.where(np.arange(n) < at, before, after)
    level = float(series.mean()) if rules.of_mean else before
    return _judged("shift", level, after - before, residual, 1 / at + 1 / (n - at), at)


def _trend(series: NDArray[np.float64]) -> Change | None:
    """A straight line; its rise over the whole series."""
    n = len(series)
    place = (np.arange(n) - (n - 1) / 2) / n
    rise = float(place @ series / (place @ place))
    residual = series - series.mean() - rise * place
    return _judged("trend", float(series.mean()), rise, residual, 1 / float(place @ place), None)


def _run_in(series: NDArray[np.float64]) -> Change | None:
    """The first tenth against the last half, whose scatter alone is used (J. Geweke, 1992).

    The slowest step of that tenth is left out: one alone is no run-in.
    """
    n = len(series)
    first, last = np.sort(series[: n // 10])[:-1], series[n // 2 :]
    excess = float(first.mean() - last.mean())
    per_value = 1 / len(first) + 1 / len(last)
    return _judged("run-in", float(series.mean()), excess, last - last.mean(), per_value, None)


def _judged(
    what: str,
    level: float,
    difference: float,
    residual: NDArray[np.float64],
    per_value: float,
    at: int | None,
) -> Change | None:
    share = difference / level
    if abs(share) <= TOLERANCE:
        return None
    noise = scatter(residual)
    error = noise.standard_error(per_value)
    if error == 0:
        return Change(what, share, at)
    freedom = max(FEWEST_DEGREES, noise.freedom - 1)
    chance = 2 * float(stdtr(freedom, -abs(difference) / error))
    return Change(what, share, at) if chance < CHANCE else None
