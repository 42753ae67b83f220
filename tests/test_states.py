"""What the summary says of cells and runs that have no figures, or figures with a note."""

import re

import pytest
import records
from summaries import main_rows, measure, rows_under, summary

from tests.conftest import spec_of
from xdimo.files import content_hash
from xdimo.spec import as_planned, plan


@pytest.fixture
def bench(tmp_path):
    return records.bench(tmp_path / "results")


def test_with_no_run_every_cell_is_pending(bench):
    document = summary(bench)
    assert [row[2] for row in main_rows(document.en)] == ["pending"] * 3
    assert [row[6] for row in main_rows(document.en)] == ["pending"] * 3
    assert main_rows(document.en)[0][3] == "91.1 declared / 364.2 tensor"
    assert "待填" in document.zh and "pending" not in document.zh
    command = "snakemake --profile profiles/lsf gpu_6000ada-bs1-online"
    assert f"| `{command}`" in document.en
    assert "no manifest yet" in document.en


def test_a_speedup_without_its_baseline_says_which_run_it_waits_for(bench):
    records.write_run(bench, "gpu_h200-bs1-r1")
    document = summary(bench)
    assert main_rows(document.en)[1][6] == "waits for gpu_6000ada-bs1"
    assert "等待 gpu_6000ada-bs1" in document.zh


def test_an_oom_cell_reads_oom_and_its_reason(bench):
    records.write_run(bench, "gpu_6000ada-bs1-r1", outcome="oom", reason="rank 2 | 47 GiB")
    records.write_run(bench, "gpu_h200-bs1-r1")
    rows = main_rows(summary(bench).en)
    assert rows[0][2:3] + rows[0][4:] == [r"OOM: rank 2 \| 47 GiB", "OOM", "OOM", "OOM"]
    assert rows[1][6] == r"waits for gpu_6000ada-bs1 (OOM: rank 2 \| 47 GiB)"


def test_a_disabled_target_is_out_of_service_with_its_reason(tmp_path):
    off = {"gpu_pro6000": {"enabled": False, "reason": "PSU replaced"}}
    bench = records.bench(tmp_path / "results", targets=off)
    records.write_run(bench, "gpu_pro6000-bs1-r1")
    document = summary(bench)
    row = main_rows(document.en)[2]
    assert row[2] == "out of service: PSU replaced" and row[6] == "out of service"
    assert "停用：PSU replaced" in document.zh


def test_a_refused_record_shows_file_and_line_and_no_figure(bench):
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    log = folder / "attempts/1/log.jsonl"
    log.write_text(log.read_text()[:-9])
    document = summary(bench)
    assert main_rows(document.en)[1][2] == "refused: attempts/1/log.jsonl line 29: cut off"
    assert "samples/s |" not in document.en.split("Best variant")[0]
    assert read_cell(document, "gpu_h200-bs1")["metrics"] is None


def read_cell(document, name):
    return next(cell for cell in document.data["cells"] if cell["cell"] == name)


def test_a_run_of_a_config_edited_since_is_pending_again(bench, tmp_path):
    records.write_run(bench, "gpu_h200-bs1-r1")
    edited = records.bench(tmp_path / "results", train={"precision": "tf32"})
    row = main_rows(summary(edited).en)[1]
    assert row[2] == "pending (config or videos changed since run: precision)"
    assert row[4] == "pending"


def test_a_run_on_other_videos_is_pending_again(bench):
    records.write_run(bench, "gpu_h200-bs1-r1")
    records.write_manifest(bench, content_hash("other videos"))
    row = main_rows(summary(bench).en)[1]
    assert row[2] == "pending (config or videos changed since run: data.dataset)"


def test_a_title_or_a_queue_changes_no_figure(bench, tmp_path):
    records.write_run(bench, "gpu_h200-bs1-r1")
    other = {"title": "Another", "targets": {"gpu_h200": {"queue": "q9", "walltime_min": 5}}}
    edited = records.bench(tmp_path / "results", **other)
    assert main_rows(summary(edited).en) == main_rows(summary(bench).en)


def test_runs_that_the_config_no_longer_has_are_listed_without_figures(bench, tmp_path):
    records.write_run(bench, "gpu_h200-bs1-r3")
    fewer = records.bench(tmp_path / "results", train={"repeats": 1})
    rows = rows_under(summary(fewer).en, "Run by run")
    assert [row[:2] for row in rows][-1] == ["`gpu_h200-bs1-r3`", "not in the config"]
    assert main_rows(summary(fewer).en)[1][2] == "pending"


def test_a_begun_attempt_and_an_earlier_failure_are_said(bench):
    records.write_run(bench, "gpu_h200-bs1-r1", outcome="crash", reason="segfault")
    records.write_run(bench, "gpu_h200-bs1-r1", attempt=2)
    begun = records.write_run(bench, "gpu_h200-bs4-r1")
    (begun / "run.json").unlink()
    (begun / "attempts/1/run.json").unlink()
    records.write_run(bench, "gpu_6000ada-bs1-r1")
    killed = records.write_run(bench, "gpu_6000ada-bs1-r1", attempt=2)
    (killed / "attempts/1/run.json").unlink()
    rows = {row[0]: row for row in rows_under(summary(bench).en, "Run by run")}
    assert rows["`gpu_h200-bs1-r1`"][1] == "ok; attempt 1: crash: segfault"
    assert rows["`gpu_h200-bs4-r1`"][1] == "pending (begun, no outcome yet: attempts/1)"
    assert rows["`gpu_6000ada-bs1-r1`"][1] == "ok; attempt 1: cut off, without an outcome"
    assert rows["`gpu_6000ada-bs1-r1`"][2] == "reference"  # what ran


def test_mixed_and_dirty_code_are_warned_of(bench):
    records.write_run(bench, "gpu_h200-bs1-r1")
    assert "Warning" not in summary(bench).en
    other = {"commit": None, "dirty": True, "package": content_hash("other")}
    records.write_run(bench, "gpu_6000ada-bs1-r1", code=other)
    document = summary(bench).en
    assert "come from 2 versions of the code" in document
    assert "uncommitted changes made `gpu_6000ada-bs1-r1`" in document


def test_flags_stand_as_notes_under_the_tables(bench):
    records.write_run(bench, "gpu_6000ada-bs1-r1", step_s=0.001)
    records.write_run(bench, "gpu_h200-bs1-r1", devices=["NVIDIA X9"] * 4)
    document = summary(bench)
    assert "`gpu_6000ada-bs1-r1`: MFU over 100 %: declared" in document.en
    assert "`gpu_h200-bs1-r1`: 未知的卡，因此没有 MFU：NVIDIA X9" in document.zh
    assert main_rows(document.en)[1][5] == "n/a"


def test_a_headline_run_without_an_interval_is_noted_under_the_tables(tmp_path):
    bench = records.bench(tmp_path / "results", train={"timed_steps": 60})
    for repeat, step_s in ((1, 0.1), (2, 0.101), (3, 0.102)):
        records.write_run(bench, f"gpu_6000ada-bs1-r{repeat}", step_s=step_s)
    assert "too short" not in summary(bench).en
    few = records.bench(tmp_path / "few")
    measure(few, "gpu_6000ada-bs1", 0.1)
    document = summary(few)
    (note,) = re.findall(r"^- `(\S+)`: window too short: n = 20, ", document.en, re.MULTILINE)
    assert note == "gpu_6000ada-bs1-r3"  # the median run alone
    assert main_rows(document.en)[0][0].endswith("†")
    assert "- `gpu_6000ada-bs1-r3`: 窗口太短：n = 20" in document.zh


def test_figures_of_random_weights_are_not_those_of_weights(bench):
    measure(bench, "gpu_h200-bs1", 0.1)
    vae = bench.vae.model_copy(update={"weights": "models/vae"})
    document = summary(bench.model_copy(update={"vae": vae}))
    assert "vae.id" in document.en
    assert "vae.id" not in summary(bench).en


def test_latents_are_held_to_the_dataset_and_vae_that_they_are_of(bench):
    ran = spec_of(bench, "gpu_h200-bs1-r1")
    other = ran.data.model_copy(update={"latents": content_hash("other latents")})
    known = ran.data.dataset, ran.implementation
    expected = as_planned(
        plan(bench, "gpu_h200-bs1-r1"), ran.model_copy(update={"data": other}), *known
    )
    assert expected == ran.to_json()
