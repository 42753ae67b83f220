"""How often the 95 % interval of a run holds the truth: `python benchmarks/coverage.py`.

1,000 synthetic runs with a truth of each kind of tests/series.py, whose docstrings say what it is.
Goal: 93 to 97 % of the intervals that are printed; where nothing settles, no throughput. Beside it
what batch means (20 batches) of the same windows would have covered. A second table has changes of
several sizes: how many are refused, and how wide the intervals of the others are; a third has few
slow steps at an end, under the rules of each schema of the log. docs/measurement.md has them.
"""

import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import t as student
from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import series  # noqa: E402 -- the tests' kinds of runs

from xdimo.analysis import steady  # noqa: E402
from xdimo.analysis.throughput import throughput  # noqa: E402

RUNS = 1000
BATCHES = 20
NOISES = (0.002, 0.01, 0.05)


def main() -> None:
    start = time.perf_counter()
    rows = [row(kind) for kind in (*series.KINDS, *series.RARE)]
    columns = ["kind", "runs with a truth", "refused", "too short", "intervals"]
    columns += ["hold the truth, %", "half width, %", "tau, steps"]
    columns += ["runs without", "of these refused", "batch means would, %"]
    print(tabulate(rows, columns, tablefmt="pipe", floatfmt=".1f", missingval="-"))
    rows = [
        changed(what, size) for what in ("drift", "shift", "hump") for size in (0.02, 0.04, 0.08)
    ]
    columns = ["change", "size, %", "the mean is off an end by, %"]
    for noise in NOISES:
        columns += [f"noise {100 * noise:g} %: refused, %", "half width of the others, %"]
    print()
    print(tabulate(rows, columns, tablefmt="pipe", floatfmt=".1f", missingval="-"))
    rows = [at_the_end(1, 0.3, noise) for noise in (0.0005, *NOISES)]
    rows += [at_the_end(2, 0.3, noise) for noise in (0.0005, *NOISES)]
    rows += [at_the_end(steps, 0.05, 0.01) for steps in (5, 10, 20)]
    columns = ["slow steps", "slower by, %", "noise, %"]
    columns += [f"schema {schema}: refused, %" for schema in steady.RULES]
    print()
    print(tabulate(rows, columns, tablefmt="pipe"))
    print(f"\n{time.perf_counter() - start:.0f} s")


def row(kind) -> list:
    random = np.random.default_rng(sum(map(ord, kind.__name__)))
    known, without = [], []
    # Until there are RUNS with a truth, or as many without one where the kind has none.
    while len(known) < RUNS and (known or len(without) < RUNS):
        one = kind(random)
        found = throughput(series.log_of(one), 1, 1)
        (without if one.truth_s is None else known).append((one, found))
    printed = [(one, f) for one, f in known if f["samples_per_s"] is not None]
    intervals = [(one, f) for one, f in printed if f["samples_per_s_ci95"]]
    held = [low <= 1 / one.truth_s <= high for one, low, high in bounds(intervals)]
    widths = [(high - low) / 2 * one.truth_s for one, low, high in bounds(intervals)]
    return [
        kind.__name__.replace("_", " "),
        len(known),
        len(known) - len(printed),
        len(printed) - len(intervals),
        len(intervals),
        100 * np.mean(held) if held else None,
        100 * float(np.median(widths)) if widths else None,
        float(np.median([f["autocorrelation_steps"] for _, f in printed])) if printed else None,
        len(without),
        sum(f["samples_per_s"] is None for _, f in without) if without else None,
        100 * np.mean([batch_means(one) for one, _ in printed]) if printed else None,
    ]


def changed(what: str, size: float) -> list:
    found: list = []
    for noise in NOISES:
        random = np.random.default_rng(round(1000 * (size + noise)))
        runs = [series.changing(random, what, size, noise) for _ in range(RUNS // 2)]
        told = [(one, throughput(series.log_of(one), 1, 1)) for one in runs]
        intervals = [(one, f) for one, f in told if f["samples_per_s_ci95"]]
        widths = [(high - low) / 2 * one.truth_s for one, low, high in bounds(intervals)]
        found.append(100 * np.mean([f["samples_per_s"] is None for _, f in told]))
        found.append(100 * float(np.median(widths)) if widths else None)
    level = runs[0].truth_s / series.STEP_S
    return [what, 100 * size, 100 * max(level - 1, 1 + size - level) / level, *found]


def at_the_end(steps: int, size: float, noise: float) -> list:
    """One or two are any of the last ten steps; more are the last."""
    random = np.random.default_rng(steps)
    refused = dict.fromkeys(steady.RULES, 0)
    for _ in range(RUNS):
        step_s = 1 + noise * random.normal(size=series.TIMED)
        slow = random.choice(10, steps, replace=False) if steps <= 2 else np.arange(steps)
        step_s[-1 - slow] *= 1 + size
        for schema, rules in steady.RULES.items():
            refused[schema] += steady.change(step_s, rules) is not None
    return [steps, 100 * size, 100 * noise, *(100 * count / RUNS for count in refused.values())]


def bounds(intervals) -> list:
    return [(one, *figures["samples_per_s_ci95"]) for one, figures in intervals]


def batch_means(one: series.Series) -> bool:
    timed = one.step_s[one.warmup :]
    batches = timed[: len(timed) // BATCHES * BATCHES].reshape(BATCHES, -1).mean(axis=1)
    half = student.ppf(0.975, BATCHES - 1) * batches.std(ddof=1) / BATCHES**0.5
    return abs(timed.mean() - one.truth_s) <= half


if __name__ == "__main__":
    main()
