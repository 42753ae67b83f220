"""The history table, and records kept in git."""

from pathlib import Path

import pytest
import records

from xdimo.audit.claims import COLUMNS, flops_of, read
from xdimo.config.load import parse, read_yaml
from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.report.history import add, model_text
from xdimo.report.keep import keep
from xdimo.report.summary import render

HARDWARE = records.hardware()


@pytest.fixture
def bench(tmp_path):
    bench = records.bench(tmp_path / "results")
    for run in ("gpu_6000ada-bs1-r1", "gpu_h200-bs4-r1"):
        records.write_run(bench, run)
    records.write_run(bench, "gpu_pro6000-bs1-r1", outcome="oom")
    records.write_manifest(bench)
    return bench


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "history.csv"
    path.write_text((records.ROOT / "config/history.csv").read_text())
    return path


def test_the_claims_of_the_first_two_rows_are_recomputed():
    first, second, *_ = read(records.ROOT / "config/history.csv")
    assert first.tflops == pytest.approx(25.2, abs=0.05)
    assert first.mfu == pytest.approx(0.0087, abs=5e-5)
    assert second.tflops == pytest.approx(9.2, abs=0.05)
    assert second.mfu == pytest.approx(0.0046, abs=5e-5)


def test_measured_cells_are_appended_once(bench, table):
    before = table.read_text()
    assert add(bench, HARDWARE, table) == (2, 0)
    assert table.read_text().startswith(before)
    rows = read(table)[-2:]
    assert [row.text["hardware"] for row in rows] == ["RTX 6000 Ada", "H200 SXM"]
    assert rows[0].text["claimed_tflops"] == "" and Path(rows[0].text["record"]).exists()
    metrics = render(bench, HARDWARE, "c").data["cells"][0]["metrics"]
    assert rows[0].mfu == pytest.approx(metrics["mfu_tensor"], rel=1e-5)
    once = table.read_text()
    assert add(bench, HARDWARE, table) == (0, 0)
    assert table.read_text() == once


def test_nothing_measured_is_said(table, tmp_path):
    before = table.read_text()
    with pytest.raises(UserError, match="campaign '2026-11': no measured cell in"):
        add(records.bench(tmp_path / "none"), HARDWARE, table)
    assert table.read_text() == before


def test_more_repeats_bring_a_row_up_to_date(bench, table):
    add(bench, HARDWARE, table)
    before = table.read_text().splitlines()
    for repeat, factor in ((2, 1.25), (3, 1.5)):
        records.write_run(bench, f"gpu_h200-bs4-r{repeat}", factors=[factor] * 62)
    assert add(bench, HARDWARE, table) == (0, 1)
    after = table.read_text().splitlines()
    assert after[:-1] == before[:-1]
    old, new = read(table)[-2], read(table)[-1]
    assert (old.text["card"], new.text["card"]) == ("rtx6000ada", "h200")
    assert new.text["confidence"] == "measured, median of 3"
    assert "gpu_h200-bs4-r2" in new.text["record"] and "gpu_h200-bs4-r2" in new.text["note"]


def test_a_kept_record_is_the_same_record(bench, table, tmp_path):
    keep(bench, HARDWARE, tmp_path / "records/2026-11")
    assert add(bench, HARDWARE, table, tmp_path / "records/2026-11") == (2, 0)
    assert add(bench, HARDWARE, table) == (0, 0)


def test_a_history_table_is_begun_where_there_is_none(bench, tmp_path):
    assert add(bench, HARDWARE, tmp_path / "new.csv") == (2, 0)
    assert len(read(tmp_path / "new.csv")) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a,b,8,8,fast" + 10 * ",", "line 2: steps_per_s: 'fast' is no number"),
        ("a,b,8,,3.5" + 10 * ",", "line 2: global_batch: missing"),
        ("a,b,8", "line 2: expected 15 values"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, message):
    path = tmp_path / "history.csv"
    path.write_text(",".join(COLUMNS) + f"\n{line}\n")
    with pytest.raises(UserError, match=message):
        read(path)


def test_wrong_columns_are_named(tmp_path):
    (tmp_path / "history.csv").write_text("hardware,gpus\n")
    with pytest.raises(UserError, match=r"history.csv line 1: expected the columns hardware,card"):
        read(tmp_path / "history.csv")


def test_a_model_name_gives_the_flops_of_the_run_it_names(tmp_path):
    bench = records.bench(tmp_path, clips={"frames": 8, "size": 128}, model={"size": "B/2"})
    spec = records.spec_of(bench, "gpu_h200-bs1-r1")
    assert model_text(spec) == "B/2 4 experts top-2, 8 frames of 128 px"
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    assert folder.exists()
    metrics = render(bench, HARDWARE, "c").data["cells"][2]["metrics"]
    assert flops_of(model_text(spec)) == metrics["model_flops_per_sample"]
    custom = records.spec_of(records.bench(tmp_path / "demo", "demo.yaml"), "cpu_1-bs1-r1")
    assert model_text(custom).startswith("custom 4 x 64") and flops_of(model_text(custom)) is None


def test_the_summary_can_be_rendered_again_from_kept_records(bench, tmp_path):
    folder = tmp_path / "records" / "2026-11"
    runs = keep(bench, HARDWARE, folder)
    assert len(runs) == 3
    assert not list(folder.rglob("output.log"))
    kept = parse(Bench, read_yaml(folder / "config.json"))
    assert kept == bench
    again = render(kept, HARDWARE, str(folder / "config.json"), records=folder)
    assert again.en == (folder / "summary.md").read_text()
    live = render(bench, HARDWARE, "config/config.yaml")
    assert again.data["cells"] == live.data["cells"]
    assert again.data["dataset"] == live.data["dataset"] is not None
    assert (folder / "plots/speedup.png").exists()


def test_nothing_to_keep_is_said(tmp_path):
    bench = records.bench(tmp_path / "results")
    begun = records.write_run(bench, "gpu_h200-bs1-r1")
    (begun / "run.json").unlink()
    (begun / "attempts/1/run.json").unlink()
    with pytest.raises(UserError, match="no run that has ended to keep"):
        keep(bench, HARDWARE, tmp_path / "records")
    assert not (tmp_path / "records").exists()


def test_one_name_does_not_keep_two_campaigns(bench, tmp_path):
    keep(bench, HARDWARE, tmp_path / "records/2026-11")
    other = records.bench(tmp_path / "other")
    records.write_run(other, "gpu_h200-bs1-r1")
    with pytest.raises(UserError, match=r"config.json: keeps campaign '2026-11' of results"):
        keep(other, HARDWARE, tmp_path / "records/2026-11")
    assert not (tmp_path / "records/2026-11/gpu_h200-bs1-r1").exists()
