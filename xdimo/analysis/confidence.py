"""The mean of a series whose neighbours are alike, and how far it can be trusted.

A mean of n values that depend on each other is worth one of n / tau independent ones; tau is the
integrated autocorrelation time, in steps. It is summed up to a window W at which W >= 6 tau
(Sokal), each estimate corrected for the mean being estimated too; its own uncertainty,
(2 W + 1) / n, gives Student's t its degrees of freedom (U. Wolff, Monte Carlo errors with less
errors, 2004).
Batch means of the same series cover too little at 300 steps: benchmarks/coverage.py shows both.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

FEWEST_STEPS = 50
WIDEST = 0.5  # of the mean: a wider half interval says only that the window was too short
WINDOW_FACTOR = 6.0
# A series that alternates has tau near 0; nothing narrower than half the independent width is said.
SMALLEST_TAU = 0.5


# Where neighbours are as alike as this, a window holds too few of their ups and downs for the sum,
# which then falls short; it is averaged (geometrically) with what such neighbours alone imply,
# (1 + rho) / (1 - rho).
PERSISTENT = 0.9


@dataclass(frozen=True)
class Mean:
    """``half``: of the 95 % interval, in the series' unit; None where ``too_short``."""

    n: int
    mean: float
    tau: float  # steps
    half: float | None

    @property
    def too_short(self) -> bool:
        return self.half is None


@dataclass(frozen=True)
class Scatter:
    """Of a series around zero: what the variance of a mean of n of them is made from."""

    tau: float
    variance: float
    freedom: float  # degrees of freedom of tau x variance

    def standard_error(self, per_value: float = 1.0) -> float:
        """Of a sum of values with weights whose squares sum to ``per_value``."""
        return float(np.sqrt(self.tau * self.variance * per_value))


def mean(series: NDArray[np.float64]) -> Mean:
    """The mean of ``series`` (in the order of time), with its interval where it can have one."""
    n, middle = len(series), float(np.mean(series))
    if n < 2 or np.ptp(series) == 0:  # rounding would be taken for neighbours that are alike
        return Mean(n, middle, 1.0, None if n < FEWEST_STEPS else 0.0)
    spread = scatter(series - middle)
    half = float(stdtrit(spread.freedom, 0.975)) * spread.standard_error(1 / n)
    short = n < FEWEST_STEPS or half > WIDEST * middle
    return Mean(n, middle, spread.tau, None if short else half)


def scatter(residual: NDArray[np.float64]) -> Scatter:
    """Of at least two values whose mean (or more) has been taken away."""
    n = len(residual)
    spectrum = np.fft.rfft(residual, 2 * n)
    covariance = np.fft.irfft(spectrum * np.conj(spectrum))[:n] / n
    if covariance[0] <= 0:  # all the same
        return Scatter(1.0, 0.0, n - 1.0)
    lags = np.arange(n)
    correlation = covariance / covariance[0]
    summed = (2 * np.cumsum(correlation) - 1) * (1 + (2 * lags + 1) / n)
    window = int(np.argmax(lags >= WINDOW_FACTOR * np.maximum(summed, 0.3)))
    freedom = max(1.0, n / (2 * window + 1))
    tau = max(float(summed[window]), SMALLEST_TAU)
    # Lag one, corrected for its own bias (M. G. Kendall, 1954).
    neighbours = float(correlation[1]) + (1 + 3 * float(correlation[1])) / n
    if neighbours > PERSISTENT:
        neighbours = min(neighbours, 1 - 1 / n)
        tau = max(tau, sqrt(tau * (1 + neighbours) / (1 - neighbours)))
    return Scatter(tau, float(covariance[0]), freedom)
