"""How often the 95 % interval of a run holds the truth: `python benchmarks/coverage.py`.

1,000 synthetic runs with a truth of each kind of tests/series.py, whose docstrings say what it is.
Goal: 93 to 97 % of the intervals that are printed; where nothing settles, no throughput. Beside it
what batch means (20 batches) of the same windows would have covered. docs/measurement.md has the
table.
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

from xdimo.measure.throughput import throughput  # noqa: E402

RUNS = 1000
BATCHES = 20


def main() -> None:
    start = time.perf_counter()
    rows = [row(kind) for kind in series.KINDS]
    columns = ["kind", "runs with a truth", "refused", "too short", "intervals"]
    columns += ["hold the truth, %", "half width, %", "tau, steps"]
    columns += ["runs without", "of these refused", "batch means would, %"]
    print(tabulate(rows, columns, tablefmt="pipe", floatfmt=".1f", missingval="-"))
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


def bounds(intervals) -> list:
    return [(one, *figures["samples_per_s_ci95"]) for one, figures in intervals]


def batch_means(one: series.Series) -> bool:
    timed = one.step_s[one.warmup :]
    batches = timed[: len(timed) // BATCHES * BATCHES].reshape(BATCHES, -1).mean(axis=1)
    half = student.ppf(0.975, BATCHES - 1) * batches.std(ddof=1) / BATCHES**0.5
    return abs(timed.mean() - one.truth_s) <= half


if __name__ == "__main__":
    main()
