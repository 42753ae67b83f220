"""Synthetic runs whose true throughput is known, for the tests and the coverage table.

Every kind says what its truth is. Where it has none (None) no throughput may be printed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import lfilter

from xdimo.analysis.steady import NEWEST
from xdimo.records.events import Checkpoint, Footer, Window
from xdimo.records.reader import Log

STEP_S = 0.05
NOISE = 0.01  # of a step
WARMUP, TIMED = 50, 300
Random = np.random.Generator


@dataclass(frozen=True)
class Series:
    """``truth_s``: what a step of the timed window takes in the long run; None: nothing settles."""

    step_s: np.ndarray  # warm-up, then timed
    truth_s: float | None
    warmup: int = WARMUP
    checkpoints: tuple[int, ...] = ()


def noise(random: Random, n: int, rho: float = 0.0) -> np.ndarray:
    """Of standard deviation 1, correlated rho^lag; it has run long before it begins."""
    lead_in = 500
    drawn = random.normal(size=n + lead_in) * np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], drawn)[lead_in:]


def plain(random: Random, rho: float = 0.0, timed: int = TIMED) -> np.ndarray:
    return STEP_S * (1 + NOISE * noise(random, WARMUP + timed, rho))


def independent(random: Random) -> Series:
    """Truth: the mean step."""
    return Series(plain(random), STEP_S)


def alike(random: Random) -> Series:
    """Neighbours alike (AR(1), 0.5). Truth: the mean step."""
    return Series(plain(random, 0.5), STEP_S)


def very_alike(random: Random) -> Series:
    """AR(1), 0.9: 300 steps are worth 16. Truth: the mean step."""
    return Series(plain(random, 0.9), STEP_S)


def wandering(random: Random) -> Series:
    """AR(1), 0.98: 300 steps are worth 3. Truth: the mean step; the interval must be wide."""
    return Series(plain(random, 0.98), STEP_S)


def two_modes(random: Random) -> Series:
    """A tenth of the steps, at random, takes 30 % longer. Truth: the mixture's mean."""
    steps = plain(random)
    return Series(steps + 0.3 * STEP_S * (random.random(len(steps)) < 0.1), STEP_S * 1.03)


def two_moods(random: Random) -> Series:
    """Fast for 20 steps on average, slow by 30 % for 10. Truth: the mixture's mean."""
    steps, slow = plain(random), random.random() < 1 / 3
    for place in range(len(steps)):
        slow ^= random.random() < (0.1 if slow else 0.05)
        steps[place] += 0.3 * STEP_S * slow
    return Series(steps, STEP_S * 1.1)


def one_stall(random: Random) -> Series:
    """One timed step takes 0.2 to 3 s more. Truth: the stall is in, as this run had it.

    How many stalls another run would have, one window cannot know: that is for the repeats.
    """
    steps, stall = plain(random), random.uniform(0.2, 3)
    steps[WARMUP + random.integers(TIMED)] += stall
    return Series(steps, STEP_S + stall / TIMED)


def slow_near_an_end(random: Random, noise: float = 0.002, timed: int = TIMED) -> Series:
    """One of the first or last ten steps takes 30 % longer; noise 0.2 %. Truth: it is in."""
    steps = STEP_S * (1 + noise * random.normal(size=WARMUP + timed))
    steps[WARMUP + random.integers(-10, 10) % timed] *= 1.3
    return Series(steps, STEP_S * (1 + 0.3 / timed))


def busy(random: Random) -> Series:
    """Two cores that others use too, 60 steps: noise 10 %, lognormal, neighbours alike (0.3), and
    one step in twenty up to twice as long. Truth: the mean of all that.
    """
    n = WARMUP + 60
    steps = STEP_S * np.exp(0.1 * noise(random, n, 0.3))
    steps *= np.where(random.random(n) < 0.05, random.uniform(1, 2, n), 1)
    return Series(steps, STEP_S * float(np.exp(0.1**2 / 2)) * (1 + 0.05 * 0.5))


def checkpoints(random: Random) -> Series:
    """After every 100 steps 1 s of writing, in the next step's time. Truth: they are in."""
    steps, written = plain(random), (100, 200, 300)
    steps[list(written)] += 1.0
    return Series(steps, STEP_S + 3 * 1.0 / TIMED, checkpoints=written)


def warm_up(random: Random) -> Series:
    """The first steps, 1 to 120 of them, take 20 % longer; 50 are left out.

    Truth: the steady step. Where the warm-up reaches into the window, nothing may be printed; up to
    5 steps of it (0.3 % of the window) are in, as all that happened in the window is.
    """
    steps, length = plain(random), random.integers(1, 121)
    steps[:length] *= 1.2
    inside = max(0, length - WARMUP)
    return Series(steps, STEP_S * (1 + 0.2 * inside / TIMED) if inside <= 5 else None)


def run_in(random: Random) -> Series:
    """30 % too slow at first, decaying within 2 to 40 steps; 50 are left out.

    Truth: the steady step. Where the window's first tenth is more than 2 % too slow, nothing may be
    printed; what is less (0.3 % of the window at most) is in.
    """
    steps, length = plain(random), random.uniform(2, 40)
    excess = 0.3 * np.exp(-np.arange(len(steps)) / length)
    first_tenth = float(excess[WARMUP : WARMUP + TIMED // 10].mean())
    inside = float(excess[WARMUP:].mean())
    return Series(steps * (1 + excess), STEP_S * (1 + inside) if first_tenth < 0.02 else None)


def drift(random: Random) -> Series:
    """5 % slower from the window's begin to its end. Truth: none."""
    steps = plain(random)
    place = np.clip(np.arange(-WARMUP, TIMED) / TIMED, 0, 1)
    return Series(steps * (1 + 0.05 * place), None)


def shift(random: Random) -> Series:
    """5 % slower from some step of the middle on. Truth: none."""
    steps = plain(random)
    steps[WARMUP + random.integers(TIMED // 10, TIMED - TIMED // 10) :] *= 1.05
    return Series(steps, None)


def shift_alike(random: Random) -> Series:
    """20 % slower from some step on; neighbours alike (AR(1), 0.8), 60 or 300 steps. No truth."""
    timed = int(random.choice([60, 300]))
    steps = plain(random, 0.8, timed)
    steps[WARMUP + random.integers(timed // 10, timed - timed // 10) :] *= 1.2
    return Series(steps, None)


def few_steps(random: Random) -> Series:
    """40 timed steps. Truth: the mean step; too few for an interval."""
    return Series(plain(random, timed=40), STEP_S)


def rarely_slow(random: Random, share: float) -> Series:
    """This share of the steps takes 3 times as long. Truth: the mean in the long run."""
    steps = plain(random)
    return Series(
        np.where(random.random(len(steps)) < share, 3, 1) * steps, STEP_S * (1 + 2 * share)
    )


def slow_once_in_50(random: Random) -> Series:
    return rarely_slow(random, 0.02)


def slow_once_in_100(random: Random) -> Series:
    return rarely_slow(random, 0.01)


def slow_once_in_300(random: Random) -> Series:
    return rarely_slow(random, 1 / 300)


def lognormal(random: Random) -> Series:
    """The logarithm of a step has the standard deviation 1. Truth: the mean in the long run."""
    return Series(
        STEP_S * random.lognormal(sigma=1, size=WARMUP + TIMED), STEP_S * float(np.exp(0.5))
    )


def pareto(random: Random) -> Series:
    """Longer than s with probability s^-2.5. Truth: the mean in the long run."""
    return Series(STEP_S * (1 + random.pareto(2.5, size=WARMUP + TIMED)), STEP_S * 2.5 / 1.5)


def changing(random: Random, what: str, size: float, noise: float) -> Series:
    """Slower by ``size``: ``drift`` over the window, ``shift`` in its second half, ``hump`` in its
    middle third. Truth: the mean of this window, which is neither of its ends.
    """
    place = (np.arange(-WARMUP, TIMED) + 0.5) / TIMED
    parts = {
        "drift": np.clip(place, 0, 1),
        "shift": place > 1 / 2,
        "hump": abs(place - 1 / 2) < 1 / 6,
    }
    levels = STEP_S * (1 + size * parts[what])
    steps = levels * (1 + noise * random.normal(size=len(levels)))
    return Series(steps, float(levels[WARMUP:].mean()))


KINDS: tuple[Callable[[Random], Series], ...] = (
    independent,
    alike,
    very_alike,
    wandering,
    two_modes,
    two_moods,
    one_stall,
    slow_near_an_end,
    busy,
    checkpoints,
    warm_up,
    run_in,
    drift,
    shift,
    shift_alike,
    few_steps,
)


# What one window cannot tell of the long run: their intervals hold it less often.
RARE: tuple[Callable[[Random], Series], ...] = (
    slow_once_in_50,
    slow_once_in_100,
    slow_once_in_300,
    lognormal,
    pareto,
)


def log_of(series: Series, schema: int = NEWEST) -> Log:
    """The log of a run that had these step times and nothing between them."""
    n, warmup = len(series.step_s), series.warmup
    steps = pd.DataFrame(
        {
            "step": np.arange(1, n + 1),
            "phase": ["warmup"] * warmup + ["timed"] * (n - warmup),
            "step_s": series.step_s,
            "data_wait_s": 0.0,
            "loss": 1.0,
            "grad_norm": 1.0,
            "lr": 1e-4,
            "epoch": 0,
            "kind": "eager",
        }
    )
    wall_s = float(series.step_s[warmup:].sum())
    return Log(
        path=Path("log.jsonl"),
        header=None,
        steps=steps,
        window=Window(
            event="window", phase="timed", first_step=warmup + 1, last_step=n, wall_s=wall_s
        ),
        memory=(),
        footer=Footer(event="footer", steps=n, wall_s=wall_s + 10),
        checkpoints=tuple(
            Checkpoint(event="checkpoint", step=step, seconds=1.0) for step in series.checkpoints
        ),
        schema=schema,
    )
