"""Repeats, comparability, and what cards said of themselves."""

import re
from math import exp, log, sqrt
from statistics import stdev

import pytest
import records

from xdimo.analysis import comparability
from xdimo.analysis.comparability import differing
from xdimo.analysis.metrics import derive
from xdimo.analysis.repeats import ratio_ci95, spread
from xdimo.files import content_hash
from xdimo.records.reader import read_run
from xdimo.report.summary import render

HARDWARE = records.hardware()


@pytest.fixture
def bench(tmp_path):
    return records.bench(tmp_path / "results", train={"timed_steps": 60})


def measured(bench, run: str, **changes) -> dict:
    return derive(read_run(records.write_run(bench, run, **changes)), HARDWARE)


def test_repeats_have_a_coefficient_of_variation():
    assert spread([1.0]).cv is None
    assert spread([99.0, 100.0, 101.0]).cv == pytest.approx(0.01)
    assert not spread([99.0, 100.0, 101.0]).scattered
    assert spread([95.0, 100.0, 105.0]).scattered


def test_the_interval_of_a_speedup_is_welchs():
    # Equal scatter: t(0.975, 4) = 2.776445, of the logarithms.
    base, mine = [9.0, 10.0, 11.0], [18.0, 20.0, 22.0]
    half = 2.776445 * sqrt(2 * stdev(map(log, base)) ** 2 / 3)
    assert ratio_ci95(mine, base) == pytest.approx((2 * exp(-half), 2 * exp(half)))
    assert ratio_ci95(mine, base[:2]) is None
    assert ratio_ci95([2.0] * 3, [1.0] * 3) == pytest.approx((2.0, 2.0))


def test_a_cell_whose_repeats_scatter_is_flagged(bench):
    for repeat, step_s in ((1, 0.050), (2, 0.053), (3, 0.056)):
        records.write_run(bench, f"gpu_6000ada-bs1-r{repeat}", step_s=step_s)
        records.write_run(bench, f"gpu_h200-bs1-r{repeat}", step_s=0.02)
    document = render(bench, HARDWARE, "c")
    assert "`gpu_6000ada-bs1`: repeats differ: coefficient of variation 5." in document.en
    assert "`gpu_h200-bs1`: repeats differ" not in document.en
    cell = next(cell for cell in document.data["cells"] if cell["cell"] == "gpu_h200-bs1")
    low, high = cell["speedup_ci95"]
    assert low < cell["speedup"] < high and cell["samples_per_s_cv"] < 0.02
    assert f"{low:.2f}× – {high:.2f}×" in document.en


def test_runs_on_other_videos_have_no_speedup_and_the_cell_names_the_axis(bench):
    records.write_run(bench, "gpu_6000ada-bs1-r1")
    records.write_run(bench, "gpu_h200-bs1-r1", dataset=content_hash("other videos"))
    document = render(bench, HARDWARE, "c")
    row = next(line for line in document.en.splitlines() if "`gpu_h200-bs1`" in line)
    assert row.rstrip(" |").endswith("not comparable: Dataset")
    assert "不可比较：数据集" in document.zh
    cell = next(cell for cell in document.data["cells"] if cell["cell"] == "gpu_h200-bs1")
    assert (cell["speedup"], cell["not_comparable"]) == (None, ["dataset"])


@pytest.mark.parametrize(
    ("axis", "change"),
    [
        ("model", {"model": {"top_k": 1}}),
        ("clip", {"clips": {"frames": 8}}),
        ("precision", {"train": {"precision": "tf32"}}),
        ("data mode", {"latents": {"mode": "online"}}),
        ("dataset", {}),
    ],
)
def test_each_axis_in_which_two_runs_must_agree_is_named(tmp_path, axis, change):
    here, there = records.bench(tmp_path / "a"), records.bench(tmp_path / "b", **change)
    dataset = content_hash("other videos") if axis == "dataset" else records.DATASET
    one = read_run(records.write_run(here, "gpu_h200-bs1-r1"))
    other = read_run(records.write_run(there, "gpu_h200-bs4-r1", dataset=dataset))
    assert differing(one, other) == [axis]
    # Batch and repeat are what is compared; implementation and steps are shown beside.
    alike = {"train": {"timed_steps": 30}}
    elsewhere = records.bench(tmp_path / "c", **alike)
    assert differing(one, read_run(records.write_run(elsewhere, "gpu_6000ada-bs2-r2"))) == []


def test_records_of_another_flop_formula_cannot_be_compared(bench, monkeypatch):
    one = read_run(records.write_run(bench, "gpu_h200-bs1-r1"))
    formulas = iter(["model FLOPs 1", "model FLOPs 2"])
    monkeypatch.setitem(comparability.AXES, "FLOP formula", lambda spec: next(formulas))
    assert differing(one, one) == ["FLOP formula"]


def test_from_begin_to_end_a_run_that_slows_shows_its_heat(bench):
    slowing = [1 + 0.002 * max(0, step - 2) for step in range(62)]
    moments = [{"temperature_c": 60 + 2 * i, "sm_mhz": 1980 - 15 * i} for i in range(10)]
    events = records.telemetry_lines(4, moments)
    metrics = measured(bench, "gpu_h200-bs1-r1", factors=slowing, events=events)
    assert metrics["unsteady"] and metrics["samples_per_s"] is None
    assert metrics["step_s_end"] / metrics["step_s_start"] == pytest.approx(1.107, abs=0.02)
    table = render(bench, HARDWARE, "c").en.split("**Drift**")[1].split("**Parts")[0]
    row = next(line for line in table.splitlines() if "gpu_h200-bs1-r1" in line)
    assert "60 → 78" in row and "1,980 → 1,845" in row and re.search(r"\+(9|1[012])\.\d %", row)


def test_a_run_on_another_known_card_is_refused_with_both_names(bench):
    records.write_run(bench, "gpu_h200-bs1-r1", devices=["NVIDIA H100 80GB HBM3"] * 4)
    row = render(bench, HARDWARE, "c").en.split("baseline variant\n")[1].splitlines()[4]
    assert "refused: not the target's card: NVIDIA H100 80GB HBM3; the spec says h200" in row
    assert "samples/s" not in row


THROTTLED = [{"throttle": ["sw_power_cap"], "sm_mhz": 1500}, {}, {}, {}]


@pytest.mark.parametrize(
    ("moments", "flag"),
    [
        (THROTTLED, "throttled: sw_power_cap 25 %"),
        ([{"other_processes": 1}, {}], "other processes: 1"),
        ([{"other_processes": None, "memory_before_gib": 1.5}], "card in use: 1.50 GiB"),
        ([{"host_gpus_busy": 3}, {}], "shared host: 3"),
        ([{"host_load": 30.0}, {"host_load": 40.0}], "host load: 35.0 / 24"),
        ([{"ecc_errors": 2}], "ECC errors: 2"),
    ],
)
def test_what_may_have_slowed_a_run_flags_its_row(bench, moments, flag):
    events = records.telemetry_lines(4, moments)
    metrics = measured(bench, "gpu_h200-bs1-r1", events=events)
    assert metrics["flags"] == [flag]
    document = render(bench, HARDWARE, "c")
    detail = flag.partition(": ")[2]
    for text, notes in ((document.en, "**Notes (of"), (document.zh, "**备注（")):
        main, _, rest = text.partition(notes)
        assert "`gpu_h200-bs1` † " in main and "`gpu_6000ada-bs1` †" not in main
        note = next(line for line in rest.splitlines() if line.startswith("- `gpu_h200-bs1-r1`"))
        row = next(line for line in rest.splitlines() if line.startswith("| `gpu_h200-bs1-r1`"))
        assert detail in note and detail in row


def test_cards_at_peace_raise_no_flag_and_give_energy(bench):
    # Half a second apart: two readings of power still hold the second before the window.
    before = [{"temperature_c": 50, "power_w": 90}, {"power_w": 300}]
    events = records.telemetry_lines(4, [*before, {}, {"temperature_c": 61}])
    metrics = measured(bench, "gpu_h200-bs1-r1", events=events)
    assert metrics["flags"] == [] and metrics["sm_mhz_median"] == 1980
    assert metrics["power_w"] == 4 * 420
    assert metrics["joules_per_sample"] == pytest.approx(1680 / metrics["samples_per_s"])
    assert (metrics["temperature_c_start"], metrics["temperature_c_end"]) == (50, 61)


def test_heat_is_the_hottest_cards_at_the_first_and_the_last_reading(bench):
    moments = [{"temperature_c": 45 + min(place, 20)} for place in range(30)]
    moments[-1] = {"temperature_c": 62}  # it was 65 before
    events = records.telemetry_lines(4, moments)
    events[0]["temperature_c"] = 47
    metrics = measured(bench, "gpu_h200-bs1-r1", events=events)
    assert (metrics["temperature_c_start"], metrics["temperature_c_end"]) == (47, 62)


def test_a_window_shorter_than_a_reading_of_power_gives_no_energy(bench):
    metrics = measured(bench, "gpu_h200-bs1-r1", events=records.telemetry_lines(4, [{}, {}]))
    assert metrics["power_w"] is metrics["joules_per_sample"] is None
    assert metrics["sm_mhz_median"] == 1980


def test_what_a_card_keeps_to_itself_is_not_known(bench):
    unknown = dict.fromkeys(("power_w", "throttle", "other_processes", "ecc_errors", "sm_mhz"))
    metrics = measured(bench, "gpu_h200-bs1-r1", events=records.telemetry_lines(4, [unknown]))
    assert metrics["power_w"] is metrics["joules_per_sample"] is metrics["sm_mhz_median"] is None
    assert metrics["flags"] == []


def test_mfu_against_the_measured_ceiling(bench):
    events = records.calibration_lines(4)
    metrics = measured(bench, "gpu_h200-bs1-r1", events=events)
    assert metrics["gemm_tflops"] == 700
    assert metrics["mfu_measured"] == pytest.approx(metrics["mfu_tensor"] * 989 / 700)
    assert metrics["copy_gb_s"] == 3900 and metrics["all_reduce_gb_s"] == 320
    assert metrics["flags"] == []


def test_a_card_that_changed_while_it_ran_is_flagged(bench):
    events = records.calibration_lines(4, factor=0.9)
    assert measured(bench, "gpu_h200-bs1-r1", events=events)["flags"] == ["card changed: -10.0 %"]


def test_the_reference_implementation_has_its_own_speedup_beside(tmp_path):
    one_gpu = {name: {"gpus": 1} for name in ("gpu_6000ada", "gpu_h200", "gpu_pro6000")}
    train = {"implementation": "fused", "timed_steps": 60}
    bench = records.bench(tmp_path / "results", train=train, targets=one_gpu)
    assert [name for name in bench.twins if name.endswith("-reference")] == [
        f"{cell}-reference" for cell in bench.cells
    ]
    times = {"gpu_6000ada-bs1": 0.03, "gpu_h200-bs1": 0.01}
    times |= {"gpu_6000ada-bs1-reference": 0.08, "gpu_h200-bs1-reference": 0.04}
    for cell, step_s in times.items():
        records.write_run(bench, f"{cell}-r1", step_s=step_s)
    document = render(bench, HARDWARE, "c")
    table = document.en.split("**What stands beside each speedup**")[1].split("**")[0]
    row = next(line for line in table.splitlines() if line.startswith("| [`gpu_h200-bs1`]"))
    cells = [text.strip() for text in row.strip("|").split(" | ")]
    assert cells[1] == "fused" and re.fullmatch(r"(2\.9|3\.0)\d×", cells[5])
    assert re.fullmatch(r"(1\.9|2\.0)\d×", cells[7])


def test_a_cell_for_which_auto_chose_the_reference_is_its_own_reference(tmp_path):
    train = {"implementation": "auto", "timed_steps": 60}
    one_gpu = {name: {"gpus": 1} for name in ("gpu_6000ada", "gpu_h200", "gpu_pro6000")}
    bench = records.bench(tmp_path / "results", train=train, targets=one_gpu)
    for cell, step_s in (("gpu_6000ada-bs1", 0.03), ("gpu_h200-bs1", 0.01)):
        records.write_run(bench, f"{cell}-r1", step_s=step_s)
    table = render(bench, HARDWARE, "c").en.split("**What stands beside each speedup**")[1]
    row = next(line for line in table.splitlines() if line.startswith("| [`gpu_h200-bs1`]"))
    cells = [text.strip() for text in row.strip("|").split(" | ")]
    assert cells[1] == "reference" and cells[7] == cells[5] != "pending"
