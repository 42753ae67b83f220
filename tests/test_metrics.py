"""Records to numbers: what is derived, and what is refused."""

import hashlib
import json
import statistics
from pathlib import Path

import pytest
import records
from hypothesis import given
from hypothesis import strategies as st

from xdimo.analysis.metrics import derive, write
from xdimo.analysis.repeats import spread
from xdimo.errors import UserError
from xdimo.files import read_json, write_json
from xdimo.records import rules
from xdimo.records.reader import attempts, read_run
from xdimo.report.summary import render
from xdimo.train.instruments import observed_settings

HARDWARE = records.hardware()


@pytest.fixture
def bench(tmp_path):
    return records.bench(tmp_path / "results")


def edit(path: Path, **changes) -> None:
    write_json(path, {**read_json(path), **changes})


def relog(folder: Path, lines: list[str]) -> None:
    """Another log in the run's folder, with run.json and its attempt's, which vouch for it."""
    log = "".join(lines)
    (folder / "attempts/1/log.jsonl").write_text(log)
    for path in (folder / "run.json", folder / "attempts/1/run.json"):
        edit(path, log_sha256="sha256:" + hashlib.sha256(log.encode()).hexdigest())


def log_of(folder: Path) -> list[str]:
    return (folder / "attempts/1/log.jsonl").read_text().splitlines(keepends=True)


def test_every_figure_follows_from_the_log_lines(bench, tmp_path):
    folder = records.write_run(bench, "gpu_h200-bs4-r1")
    metrics = write(folder / "run.json", HARDWARE, tmp_path / "metrics.json")
    assert read_json(tmp_path / "metrics.json") == metrics
    lines = [json.loads(line) for line in log_of(folder)]
    wall = next(line["wall_s"] for line in lines if line["event"] == "window")
    timed = [line for line in lines if line.get("phase") == "timed" and line["event"] == "step"]
    samples = 20 * 16 / wall  # 20 timed steps, 4 GPUs x 4 clips
    assert metrics["samples_per_s"] == pytest.approx(samples)
    assert metrics["tokens_per_s"] == pytest.approx(samples * 16 * 16 * 16)
    assert metrics["median_step_s"] == statistics.median(line["step_s"] for line in timed)
    assert metrics["data_wait_share"] == pytest.approx(
        sum(line["data_wait_s"] for line in timed) / wall
    )
    assert metrics["loss_start"] == statistics.median(line["loss"] for line in timed[:2])
    assert metrics["loss_end"] == statistics.median(line["loss"] for line in timed[-2:])
    reserved = [line["peak_reserved_gib"] for line in lines if line["event"] == "memory"]
    assert metrics["memory_reserved_gib"] == max(reserved) == reserved[-1]
    assert metrics["model_flops_per_sample"] == pytest.approx(0.9015e12, rel=1e-4)
    assert metrics["mfu_tensor"] == pytest.approx(samples * 0.9015 / (4 * 989), rel=1e-4)
    assert metrics["mfu_declared"] == metrics["mfu_tensor"]
    assert metrics["flags"] == []


def test_peaks_are_of_the_measured_device_not_of_the_configs_card(bench):
    device = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    folder = records.write_run(bench, "gpu_h200-bs1-r1", devices=[device] * 4)
    metrics = derive(read_run(folder), HARDWARE)
    assert (metrics["peak_tensor_tflops"], metrics["peak_declared_tflops"]) == (440, 200)
    assert metrics["card"] == "RTX PRO 6000"
    assert metrics["flags"] == [f"not the target's card: {device}"]


def test_an_unknown_card_has_no_mfu(bench):
    folder = records.write_run(bench, "gpu_h200-bs1-r1", devices=["NVIDIA X9"] * 4)
    metrics = derive(read_run(folder), HARDWARE)
    assert metrics["mfu_tensor"] is metrics["mfu_declared"] is metrics["card"] is None
    assert metrics["samples_per_s"] > 0
    assert metrics["flags"] == ["unknown card: NVIDIA X9"]


def test_devices_that_differ_have_no_common_peak(bench):
    devices = ["NVIDIA H200"] * 3 + ["NVIDIA H100 80GB HBM3"]
    folder = records.write_run(bench, "gpu_h200-bs1-r1", devices=devices)
    metrics = derive(read_run(folder), HARDWARE)
    assert metrics["mfu_tensor"] is None
    assert metrics["flags"] == ["devices differ: NVIDIA H100 80GB HBM3, NVIDIA H200"]


def test_mfu_over_100_percent_stays_and_is_flagged(bench):
    folder = records.write_run(bench, "gpu_6000ada-bs1-r1", step_s=0.005)
    metrics = derive(read_run(folder), HARDWARE)
    assert metrics["mfu_declared"] > 1 > metrics["mfu_tensor"]
    assert metrics["flags"] == ["MFU over 100 %: declared"]


def test_a_cpu_run_has_host_memory_and_no_mfu(tmp_path):
    bench = records.bench(tmp_path / "results", "demo.yaml")
    metrics = derive(read_run(records.write_run(bench, "cpu_2-bs1-r1")), HARDWARE)
    assert metrics["memory_reserved_gib"] is metrics["memory_device_gib"] is None
    assert metrics["host_peak_gib"] == pytest.approx(1.51)
    assert metrics["mfu_tensor"] is None and metrics["flags"] == []


def test_a_run_that_did_not_end_ok_has_no_figures(bench):
    folder = records.write_run(bench, "gpu_h200-bs4-r1", outcome="oom", reason="rank 2")
    log = folder / "attempts/1/log.jsonl"
    log.write_text(log.read_text()[:-20])  # it died while writing
    edit(folder / "run.json", log_sha256=None)
    metrics = derive(read_run(folder), HARDWARE)
    assert (metrics["outcome"], metrics["reason"]) == ("oom", "rank 2")
    assert "samples_per_s" not in metrics


def cut_off(folder):
    relog(folder, [*log_of(folder)[:-1], '{"event":"foot'])


def cut_off_line(folder):
    relog(folder, [*log_of(folder)[:16], '{"event":"step","st\n', *log_of(folder)[17:]])


def garbled(folder):
    relog(folder, [*log_of(folder)[:3], "\x00\x00\n", *log_of(folder)[4:]])


def wrong_type(folder):
    lines = log_of(folder)
    relog(folder, [*lines[:3], lines[3].replace('"lr": 0.0001', '"lr": "?"'), *lines[4:]])


def of_another_spec(folder):
    edit(folder / "run.json", spec="sha256:" + 64 * "a")


def log_of_another_spec(folder):
    header = {**json.loads(log_of(folder)[0]), "spec": "sha256:" + 64 * "b"}
    relog(folder, [json.dumps(header) + "\n", *log_of(folder)[1:]])


def changed_log(folder):
    lines = log_of(folder)
    lines[5] = lines[5].replace('"loss": ', '"loss": 1')
    (folder / "attempts/1/log.jsonl").write_text("".join(lines))


def no_window(folder):
    relog(folder, [line for line in log_of(folder) if "window" not in line])


def no_footer(folder):
    relog(folder, log_of(folder)[:-1])


def lost_step(folder):
    lines = log_of(folder)
    relog(folder, lines[:10] + lines[11:])


def lost_rank(folder):
    relog(folder, [line for line in log_of(folder) if '"rank": 1' not in line])


def no_log(folder):
    (folder / "attempts/1/log.jsonl").unlink()


def bad_outcome(folder):
    edit(folder / "run.json", outcome="fine")


def edited(change, *events):
    """A log whose lines of these events are changed, or followed by other lines."""

    def spoil(folder):
        lines = [json.loads(line) for line in log_of(folder)]
        lines = [
            new for line in lines for new in (change(line) if matches(line, events) else [line])
        ]
        relog(folder, [json.dumps(line) + "\n" for line in lines])

    def matches(line, events):
        return line["event"] in events

    return spoil


def with_(**changes):
    return lambda line: [{**line, **changes}]


def after(*more):
    return lambda line: [line, *more]


LEDGER = {"event": "ledger", "step_s": 0.05, "source": "profiled window"}
SAMPLE = records.telemetry_lines(4, [{"t_s": 1.0}, {"t_s": 0.5}])
CALIBRATION = records.calibration_lines(3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (edited(lambda line: [line, line], "header"), "line 2: 2 of header; expected 1"),
        (edited(lambda line: [line, line], "window"), "line 25: 2 of timed window; expected 1"),
        (edited(lambda line: [line, SAMPLE[0]], "footer"), "line 29: footer is not the last line"),
        (edited(with_(wall_s=0.5), "window"), "line 24: window.wall_s: 0.5; its steps take 1."),
        (edited(with_(steps=21), "footer"), "line 29: footer.steps: 21; the log has 22"),
        (edited(with_(wall_s=0.1), "footer"), "line 29: footer.wall_s: 0.1; the window alone"),
        (edited(with_(run="gpu_h200-bs1-r2"), "header"), "line 1: of run gpu_h200-bs1-r2"),
        (edited(with_(seed=1), "header"), "line 1: seed: 1; the spec says 3407"),
        (edited(with_(loss=None), "step"), "line 2: step 1: loss or gradient norm is not finite"),
        (edited(with_(data_wait_s=-1.0), "step"), "line 2: step_s "),
        (
            edited(after({**LEDGER, "shares": {"forward": 0.4, "other": 0.4}}), "window"),
            "line 25: ledger.shares: sum to 0.8",
        ),
        (edited(after(*SAMPLE), "window"), "line 29: telemetry.t_s: 0.5 after 1.0"),
        (edited(after(*CALIBRATION), "header"), "calibration before of ranks [0, 1, 2]; expected"),
        (
            edited(after({"event": "effective", "compiled": True}), "window"),
            "line 25: effective.compiled: True; the spec says False",
        ),
        (edited(lambda line: [], "header"), "log.jsonl line 1: expected the header"),
        (cut_off, "log.jsonl line 29: cut off"),
        (cut_off_line, "log.jsonl line 17: cut off"),
        (garbled, "log.jsonl line 4: not JSON"),
        (wrong_type, "log.jsonl line 4: step.lr: "),
        (of_another_spec, "run.json: of another spec (sha256:aaaaaaaa"),
        (log_of_another_spec, "log.jsonl line 1: of another spec (sha256:bbbbbbbb"),
        (changed_log, "log.jsonl: changed since the run ended"),
        (no_window, "log.jsonl: no timed window"),
        (no_footer, "log.jsonl: no footer"),
        (lost_step, "log.jsonl: 19 timed steps; the window is 3 to 22"),
        (lost_rank, "log.jsonl: memory of ranks [0, 2, 3]; expected all 4"),
        (no_log, "log.jsonl: No such file"),
        (bad_outcome, "run.json: outcome: "),
    ],
)
def test_a_record_that_cannot_be_trusted_is_refused(bench, spoil, message):
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    read_run(folder)
    spoil(folder)
    with pytest.raises(UserError) as error:
        read_run(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("key", rules.DECLARED)
def test_a_run_that_did_something_else_than_its_spec_is_refused(bench, key):
    asked = rules.DECLARED[key](records.spec_of(bench, "gpu_h200-bs1-r1"))
    did = {str: "fp32" if key == "precision" else "online" if key == "data_mode" else "x"}
    did = {**did, int: 1234, bool: not asked}[type(asked)]
    seen = {"event": "effective", key: did}
    folder = records.write_run(bench, "gpu_h200-bs1-r1", events=[seen])
    with pytest.raises(UserError, match=rf"log.jsonl line 29: effective.{key}: {did!r}; the spec"):
        read_run(folder)
    refused = next(
        run for run in render(bench, HARDWARE, "c").data["runs"] if run["run"] == folder.name
    )
    assert refused["state"] == "refused" and f"effective.{key}: {did!r}" in refused["reason"]


@pytest.mark.parametrize("implementation", ["reference", "fused"])
def test_a_run_and_its_record_are_held_to_the_same_settings(tmp_path, implementation):
    one_gpu = {name: {"gpus": 1} for name in ("gpu_6000ada", "gpu_h200", "gpu_pro6000")}
    bench = records.bench(
        tmp_path / "results", train={"implementation": implementation}, targets=one_gpu
    )
    spec = records.spec_of(bench, "gpu_h200-bs1-r1")
    assert rules.DECLARED["captured"](spec) == (implementation == "fused")
    assert {key: of(spec) for key, of in rules.DECLARED.items()} == observed_settings.declared(spec)


def test_the_newest_answer_counts_where_a_rerun_has_removed_run_json(bench):
    run = "gpu_h200-bs1-r1"
    folder = records.write_run(bench, run, attempt=1, step_s=0.05)
    records.write_run(bench, run, attempt=2, step_s=0.02)
    records.write_run(bench, run, attempt=3, outcome="crash", reason="segfault")
    (folder / "run.json").unlink()
    (folder / "attempts/4").mkdir()  # begun
    assert [a.outcome and a.outcome.outcome for a in attempts(folder)] == [
        "ok",
        "ok",
        "crash",
        None,
    ]
    record = read_run(folder)
    assert (record.run.outcome, record.run.attempt) == ("ok", 2)


def test_a_failed_attempt_speaks_where_there_is_no_answer(bench):
    folder = records.write_run(bench, "gpu_h200-bs1-r1", outcome="comm", reason="NCCL")
    assert read_run(folder).run.outcome == "comm"


@given(st.lists(st.floats(0.1, 1e4), min_size=1, max_size=9))
def test_the_spread_of_repeats(values):
    result = spread(values)
    assert result.low <= result.median <= result.high
    assert result.median in values and result.n == len(values)
    assert (result.mean_ci95 is None) == (len(values) < 3)


def test_the_interval_is_students():
    # t(0.975, 2) = 4.302653; mean 2, s = 1
    low, high = spread([1.0, 2.0, 3.0]).mean_ci95
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
