"""Throughput against series whose truth is known (tests/series.py says what it is)."""

import functools
import re
from typing import get_args

import numpy as np
import pytest
import records
import series

from xdimo.analysis import steady
from xdimo.analysis.confidence import mean
from xdimo.analysis.metrics import derive
from xdimo.analysis.step_classes import classes
from xdimo.analysis.throughput import throughput, unsteady_text
from xdimo.records.events import Header
from xdimo.records.reader import read_run
from xdimo.records.writer import SCHEMA
from xdimo.report.summary import render
from xdimo.report.tables import _interval as run_interval
from xdimo.report.words import Words

RUNS = 200  # benchmarks/coverage.py takes 1,000


def figures(one: series.Series, schema: int = SCHEMA) -> dict:
    return throughput(series.log_of(one, schema), 1, 1)


@functools.cache
def many(kind) -> list[tuple[series.Series, dict]]:
    random = np.random.default_rng(3)
    made = [kind(random) for _ in range(RUNS)]
    return [(one, figures(one)) for one in made]


UNSETTLED = [series.drift, series.shift, series.shift_alike]
# The slow step near an end is in the truth and in the scatter: its intervals hold it always.
OTHERS = (*UNSETTLED, series.few_steps, series.slow_near_an_end)
SETTLED = [kind for kind in series.KINDS if kind not in OTHERS]


def held(kind) -> tuple[int, int]:
    """How many intervals hold the truth, of how many."""
    known = [(one, found["samples_per_s_ci95"]) for one, found in many(kind) if one.truth_s]
    intervals = [(one, interval) for one, interval in known if interval]
    return sum(low <= 1 / one.truth_s <= high for one, (low, high) in intervals), len(intervals)


@pytest.mark.parametrize("kind", SETTLED, ids=lambda kind: kind.__name__)
def test_the_interval_holds_the_truth_95_times_of_100(kind):
    hold, intervals = held(kind)
    # Three standard errors of a share of 95 %.
    slack = 3 * (0.95 * 0.05 / intervals) ** 0.5
    assert hold / intervals == pytest.approx(0.95, abs=slack)
    known = [found for one, found in many(kind) if one.truth_s]
    refused = sum(found["samples_per_s"] is None for found in known)
    assert refused <= 0.1 * len(known)


@pytest.mark.parametrize("kind", [*SETTLED, *series.RARE], ids=lambda kind: kind.__name__)
def test_the_documented_coverage_is_that_of_each_kind(kind):
    """docs/measurement.md has what 1,000 runs gave; 200 here, three standard errors."""
    table = (records.ROOT / "docs/measurement.md").read_text(encoding="utf-8")
    name = kind.__name__.replace("_", " ")
    row = re.search(rf"^\| {name} \|(.*)\|$", table, re.MULTILINE)
    documented = float(row[1].split("|")[4]) / 100
    hold, intervals = held(kind)
    slack = 3 * (documented * (1 - documented) * (1 / intervals + 1 / 1000)) ** 0.5
    assert hold / intervals == pytest.approx(documented, abs=slack)


@pytest.mark.parametrize("kind", [*UNSETTLED, series.warm_up, series.run_in])
def test_what_does_not_settle_has_no_throughput(kind):
    without = [found for one, found in many(kind) if one.truth_s is None]
    refused = [found for found in without if found["samples_per_s"] is None]
    assert len(refused) >= 0.9 * len(without) > 0
    assert all(found["samples_per_s_ci95"] is found["tokens_per_s"] is None for found in refused)
    assert all(found["unsteady"] for found in refused)


def test_few_steps_have_a_throughput_and_no_interval():
    for one, found in many(series.few_steps)[:20]:
        assert found["samples_per_s"] == pytest.approx(1 / one.truth_s, rel=0.02)
        assert found["samples_per_s_ci95"] is None
        assert found["window_too_short"]["n"] == 40 and found["window_too_short"]["tau"] > 0


def test_a_stall_counts_and_is_told_apart():
    step_s = series.plain(np.random.default_rng(1))
    step_s[200] += 1.5
    found = figures(series.Series(step_s, None))
    assert found["samples_per_s"] == pytest.approx(300 / step_s[50:].sum())
    assert found["step_classes"]["stall"]["steps"] == 1
    low, high = found["samples_per_s_ci95"]
    assert high - low < 0.01 * low  # the interval is that of the regular steps


def test_where_the_warm_up_ends_is_found_not_counted():
    for length in (7, 23, 41):
        step_s = series.plain(np.random.default_rng(length))
        step_s[:length] *= 1.3
        found = figures(series.Series(step_s, None))["steady_from_step"]
        assert found == pytest.approx(length + 1, abs=3)  # medians of five blur the edge


def test_a_shift_is_named_with_its_step_and_what_is_left():
    step_s = series.plain(np.random.default_rng(1))
    step_s[150:] *= 1.08
    told = figures(series.Series(step_s, None))["unsteady"]
    assert told["change"] == "shift" and told["at_step"] == pytest.approx(151, abs=3)
    assert told["share"] == pytest.approx(0.08, rel=0.1)
    assert told["steady_steps"] == pytest.approx(200, abs=5)


@pytest.mark.parametrize("left", [12, 15, 60])
def test_no_step_before_a_shift_counts_as_steady(left):
    """Between noise and few steps behind it a shift may not show in a part of the window."""
    step_s = series.plain(np.random.default_rng(left))
    step_s[-left:] *= 1.6
    told = figures(series.Series(step_s, None))["unsteady"]
    assert told["at_step"] == pytest.approx(len(step_s) - left + 1, abs=3)
    assert told["steady_steps"] <= left + 3
    assert (told["steady_from_step"] is None) == (left < 20)


def test_one_slow_step_at_the_begin_is_no_run_in():
    step_s = series.plain(np.random.default_rng(5), timed=60)
    step_s[50] *= 1.45  # not enough for a stall
    assert figures(series.Series(step_s, None))["unsteady"] is None
    step_s[50:55] *= 1.2
    assert figures(series.Series(step_s, None))["unsteady"]


NOISES = [0.0005, 0.002, 0.01]


@pytest.mark.parametrize("noise", NOISES)
def test_one_slow_step_near_an_end_refuses_no_window(noise):
    random = np.random.default_rng(7)
    made = [series.slow_near_an_end(random, noise, timed) for timed in (60, 200, 300) * 30]
    assert not [one for one in made if figures(one)["unsteady"]]
    # A kept record keeps its verdict: under the rules of its schema most of these were refused.
    assert sum(figures(one, schema=1)["unsteady"] is not None for one in made) >= 50


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("places", [(0, 7), (-1, -8), (3, 9)])
def test_two_slow_steps_near_one_end_refuse_no_window(places, noise):
    random = np.random.default_rng(3)
    for timed in (60, 200, 300) * 10:
        step_s = series.STEP_S * (1 + noise * random.normal(size=series.WARMUP + timed))
        step_s[[series.WARMUP + place % timed for place in places]] *= 1.3
        assert figures(series.Series(step_s, None))["unsteady"] is None


@pytest.mark.parametrize("left", [10, 20, 150])
@pytest.mark.parametrize("begin", [True, False])
def test_a_shift_of_ten_steps_or_more_is_still_found(left, begin):
    for seed in range(50):
        step_s = series.plain(np.random.default_rng(seed))
        step_s[slice(50, 50 + left) if begin else slice(-left, None)] *= 1.05
        assert figures(series.Series(step_s, None))["unsteady"]["change"] == "shift"


@pytest.mark.parametrize("noise", [0.002, 0.01])
@pytest.mark.parametrize(("what", "size"), [("drift", 0.02), ("shift", 0.02), ("hump", 0.04)])
def test_where_noise_is_low_what_passes_has_an_interval_that_holds_both_levels(what, size, noise):
    random = np.random.default_rng(11)
    made = [series.changing(random, what, size, noise) for _ in range(60)]
    passed = [(one, found["samples_per_s_ci95"]) for one in made if (found := figures(one))]
    widths = [(high - low) / 2 * one.truth_s for one, (low, high) in filter(lambda p: p[1], passed)]
    off = max(made[0].truth_s / series.STEP_S - 1, 1 + size - made[0].truth_s / series.STEP_S)
    assert len(widths) >= 10 and np.median(widths) > off


def test_two_busy_cores_refuse_hardly_a_window():
    refused = [found for _, found in many(series.busy) if found["unsteady"]]
    assert len(refused) <= 1


def test_the_rules_belong_to_the_schema_of_the_log():
    schemas = get_args(Header.model_fields["schema_version"].annotation)
    assert set(schemas) == set(steady.RULES) and steady.NEWEST == SCHEMA


def test_a_share_of_a_shift_is_of_the_level_before_it():
    step_s = series.plain(np.random.default_rng(2))
    step_s[50:62] *= 600
    told = figures(series.Series(step_s, None))
    assert told["unsteady"]["share"] == pytest.approx(1 / 600 - 1, rel=0.01)
    assert unsteady_text(told).startswith("shift of -99.8 % at step 63")


def test_few_long_steps_and_not_the_windows_length_are_why_there_is_no_interval():
    step_s = series.plain(np.random.default_rng(2), timed=60)
    step_s[[70, 90]] += 3.0
    found = figures(series.Series(step_s, None))
    assert found["samples_per_s"] == pytest.approx(60 / step_s[50:].sum())
    assert run_interval(found, Words("en")) == "no interval: 2 of 60 steps take 67.80 % of the time"
    short = figures(series.few_steps(np.random.default_rng(2)))
    assert run_interval(short, Words("en")).startswith("window too short: n = 40")


def test_every_class_of_step_is_told_apart():
    steps = series.log_of(series.Series(series.plain(np.random.default_rng(1)), None)).steps
    steps.loc[12, "kind"] = "capture"
    steps.loc[100:, "epoch"] = 1
    steps.loc[220, "step_s"] = 1.0
    found = classes(steps, [180])
    places = {name: np.flatnonzero(found == name).tolist() for name in set(found)}
    assert places["first"] == [0] and places["capture"] == [12]
    assert places["epoch"] == [100] and places["checkpoint"] == [180] and places["stall"] == [220]
    assert len(places["warmup"]) == 48 and len(places["regular"]) == 297


def test_epochs_of_three_steps_are_what_steps_are_made_of():
    steps = series.log_of(series.Series(series.plain(np.random.default_rng(1)), None)).steps
    steps["epoch"] = steps["step"] // 3
    assert set(classes(steps, [])) == {"first", "warmup", "regular"}


def test_slow_steps_that_are_not_rare_are_no_stalls():
    steps = series.log_of(series.Series(series.plain(np.random.default_rng(1)), None)).steps
    steps.loc[50::20, "step_s"] = 0.5
    assert "stall" not in set(classes(steps, []))


def test_equal_steps_have_an_interval_of_nothing():
    found = mean(np.full(100, 0.05))
    assert (found.half, found.tau) == (0, 1)
    assert steady.change(np.full(100, 0.05)) is None
    assert steady.change(np.array([0.05] * 50 + [0.06] * 50)).what == "shift"


def test_a_row_without_a_steady_window_says_so_and_has_no_throughput(tmp_path):
    bench = records.bench(tmp_path / "results", train={"timed_steps": 100})
    factor = [1.0] * 62 + [1.2] * 40
    records.write_run(bench, "gpu_h200-bs1-r1", factors=factor)
    metrics = derive(
        read_run(tmp_path / "results/runs/2026-11/gpu_h200-bs1-r1"), records.hardware()
    )
    assert (
        metrics["samples_per_s"] is metrics["mfu_tensor"] is metrics["model_tflops_per_s"] is None
    )
    assert metrics["memory_reserved_gib"] > 0
    document = render(bench, records.hardware(), "c")
    row = document.en.split("baseline variant\n")[1].splitlines()[4]
    assert re.search(r"no steady window: shift of \+\d+\.\d % at step 63; \d+ of 100 steps", row)
    assert "samples/s" not in row and "%" not in row.split("steady |")[1]
    assert "没有稳态窗口" in document.zh
