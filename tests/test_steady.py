"""Throughput against series whose truth is known (tests/series.py says what it is)."""

import re

import numpy as np
import pytest
import records
import series

from xdimo.measure import steady
from xdimo.measure.classes import classes
from xdimo.measure.interval import mean
from xdimo.measure.metrics import derive
from xdimo.measure.records import read_run
from xdimo.measure.throughput import throughput
from xdimo.report.summary import render

RUNS = 200  # benchmarks/coverage.py takes 1,000


def figures(one: series.Series) -> dict:
    return throughput(series.log_of(one), 1, 1)


def many(kind) -> list[tuple[series.Series, dict]]:
    random = np.random.default_rng(3)
    made = [kind(random) for _ in range(RUNS)]
    return [(one, figures(one)) for one in made]


UNSETTLED = [series.drift, series.shift, series.shift_alike]
SETTLED = [kind for kind in series.KINDS if kind not in (*UNSETTLED, series.few_steps)]


@pytest.mark.parametrize("kind", SETTLED, ids=lambda kind: kind.__name__)
def test_the_interval_holds_the_truth_95_times_of_100(kind):
    known = [(one, found) for one, found in many(kind) if one.truth_s is not None]
    intervals = [(one, f["samples_per_s_ci95"]) for one, f in known if f["samples_per_s_ci95"]]
    held = sum(low <= 1 / one.truth_s <= high for one, (low, high) in intervals)
    # Three standard errors of a share of 95 %.
    slack = 3 * (0.95 * 0.05 / len(intervals)) ** 0.5
    assert held / len(intervals) == pytest.approx(0.95, abs=slack)
    refused = sum(found["samples_per_s"] is None for _, found in known)
    assert refused <= 0.1 * len(known)


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
    assert found.half == pytest.approx(0, abs=1e-9)
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
