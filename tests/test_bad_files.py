"""One bad file never takes the table down; records are the same on every machine."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import records
import yaml
from summaries import main_rows

from tests.conftest import ROOT, SMALL
from tests.test_metrics import edit
from xdimo.audit.claims import read
from xdimo.config.load import load, load_hardware
from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.files import read_json
from xdimo.records.reader import check_run
from xdimo.report.campaign_state import survey
from xdimo.report.explain import broken
from xdimo.report.keep import keep
from xdimo.report.summary import render
from xdimo.spec import chosen_in, dataset_in

HARDWARE = records.hardware()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return records.bench(tmp_path / "results")


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_link_to_nothing(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


def a_link_to_itself(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


def other_bytes(path: Path) -> None:
    path.write_bytes(b"\xb0\xa1{}")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def a_list(path: Path) -> None:
    path.write_text("[]")


def nothing_in_it(path: Path) -> None:
    path.write_text("{}")


SPOILT = [a_folder, a_link_to_nothing, a_link_to_itself, other_bytes, cut_off, empty, a_list]
SPOILT += [nothing_in_it]


def cell(bench: Bench, name: str) -> dict[str, Any]:
    data = render(bench, HARDWARE, "c").data
    return next(one for one in data["cells"] if one["cell"] == name)


def spoilt(bench: Bench, file: str, spoils: list[Callable[[Path], None]]) -> dict[str, Any]:
    """What the summary says of runs that are each spoilt in one way, by that way."""
    records.write_run(bench, "gpu_6000ada-bs1-r1")
    runs = [run for run in bench.runs(bench.cells) if not run.startswith("gpu_6000ada")]
    by_run = dict(zip(runs, spoils, strict=False))
    for run, spoil in by_run.items():
        spoil(records.write_run(bench, run) / file)
    told = {run["run"]: run for run in render(bench, HARDWARE, "c").data["runs"]}
    assert told["gpu_6000ada-bs1-r1"]["state"] == "ok" and len(by_run) == len(spoils)
    return {spoil.__name__: told[run] for run, spoil in by_run.items()}


@pytest.mark.parametrize("file", ["spec.json", "attempts/1/run.json", "attempts/1/log.jsonl"])
def test_a_bad_file_of_a_run_refuses_its_row_alone(bench: Bench, file: str) -> None:
    for how, run in spoilt(bench, file, SPOILT).items():
        assert run["state"] == "refused", how
        assert run["reason"].startswith(file) and "\n" not in run["reason"], how
    found = {
        finding.path.relative_to(bench.runs_folder).parts[0]
        for finding in broken([Path(bench.runs_folder)], HARDWARE)
    }
    assert len(found) == len(SPOILT)


def test_a_run_json_that_says_nothing_is_taken_from_its_attempt_and_said(bench: Bench) -> None:
    spoils = [a_folder, a_link_to_nothing, other_bytes, cut_off, empty]
    for how, run in spoilt(bench, "run.json", spoils).items():
        assert run["state"] == "ok" and run["metrics"]["samples_per_s"] > 0, how
        (flag,) = run["metrics"]["flags"]
        assert flag.startswith("run.json cannot be read: run.json"), how
        assert flag.endswith("; taken from attempts/1/run.json"), how
        (finding,) = check_run(Path(bench.runs_folder) / run["run"])
        assert finding.rule == "spec.json and run.json can be read"
    document = render(bench, HARDWARE, "c")
    assert ": run.json cannot be read: run.json: a folder; expected a file; taken" in document.en
    assert "run.json 无法读取" in document.zh


def test_an_answer_without_figures_is_taken_from_its_attempt_too(bench: Bench) -> None:
    folder = records.write_run(bench, "gpu_h200-bs1-r1", outcome="oom", reason="rank 2")
    cut_off(folder / "run.json")
    found = cell(bench, "gpu_h200-bs1")
    assert found["state"] == "oom" and found["reason"].startswith("rank 2; run.json: not JSON")
    crashed = records.write_run(bench, "gpu_h200-bs4-r1", outcome="crash")
    (crashed / "run.json").write_text("{")
    found = cell(bench, "gpu_h200-bs4")
    assert found["state"] == "refused" and found["reason"].startswith("run.json: cut off")


@pytest.mark.parametrize(
    ("key", "value"), [("outcome", "oom"), ("host", "other"), ("attempt", 2), ("reason", "x")]
)
def test_a_run_json_that_is_not_its_attempts_breaks_a_rule(
    bench: Bench, key: str, value: Any
) -> None:
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    edit(folder / "run.json", **{key: value})
    (finding,) = check_run(folder)
    assert finding.rule == "run.json is its attempt's"
    assert f"{key}: {value!r}; its attempt's run.json says" in str(finding)
    assert cell(bench, "gpu_h200-bs1")["state"] == "refused"


def test_a_disk_that_fails_refuses_the_row(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write_run(bench, "gpu_6000ada-bs1-r1")
    folder = records.write_run(bench, "gpu_h200-bs1-r1")
    whole, listing = Path.read_bytes, Path.glob

    def failing(path: Path, *pattern: str) -> Any:
        if folder in (path, *path.parents):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return listing(path, *pattern) if pattern else whole(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    found = cell(bench, "gpu_h200-bs1")
    assert found["reason"] == "spec.json: cannot be read: Input/output error"
    monkeypatch.setattr(Path, "read_bytes", whole)
    monkeypatch.setattr(Path, "glob", failing)
    found = cell(bench, "gpu_h200-bs1")
    assert found["state"] == "refused" and found["reason"].endswith("Input/output error")
    assert cell(bench, "gpu_6000ada-bs1")["state"] == "ok"


def test_a_bad_manifest_is_said_and_the_table_stands(bench: Bench) -> None:
    records.write_run(bench, "gpu_h200-bs1-r1")
    path = Path(bench.results) / "data/manifest.json"
    for spoil in SPOILT:
        shutil.rmtree(path.parent, ignore_errors=True)
        records.write_manifest(bench)
        spoil(path)
        with pytest.raises(UserError, match=r"manifest\.json"):
            dataset_in(path)
        view = survey(bench, HARDWARE)
        assert view.bad_manifest and view.cells["gpu_h200-bs1"].state == "ok"
    document = render(bench, HARDWARE, "c").en
    assert "samples/s" in main_rows(document)[1][4]
    part = document.split("## Dataset\n")[1].split("\n## ")[0]
    assert "`FFS`: its manifest cannot be read" in part and "manifest.json: dataset: miss" in part


def test_a_bad_history_is_said_and_the_table_stands(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    for spoil in SPOILT:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        shutil.copy(ROOT / "config/history.csv", path)
        spoil(path)
        with pytest.raises(UserError, match=r"history\.csv"):
            read(path)
    bench = records.bench(tmp_path / "results", history=str(path))
    records.write_run(bench, "gpu_h200-bs1-r1")
    document = render(bench, HARDWARE, "c")
    assert "samples/s" in main_rows(document.en)[1][4]
    part = document.en.split("## Earlier measurements\n")[1].split("\n## ")[0]
    assert f"**Not shown**: {path} line 1: expected" in part and "|" not in part
    assert document.data["history"] == []


def test_a_bad_choice_refuses_the_rows_that_need_it(tmp_path: Path) -> None:
    bench = records.bench(tmp_path / "results", train={"implementation": "auto"})
    records.write_run(bench, "gpu_h200-bs1-r1")
    records.write_run(bench, "gpu_6000ada-bs1-r1")
    path = Path(bench.runs_folder) / "choice-gpu_h200.json"
    path.write_text('{"variants": {"1": {"chosen": "reference"}}}')
    assert chosen_in(path, 1) == "reference" and chosen_in(path, 2) is None
    for spoil in SPOILT:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_text('{"variants": {"1": {"chosen": "reference"}}}')
        spoil(path)
        cells = survey(bench, HARDWARE).cells
        gone = spoil in (a_link_to_nothing, a_link_to_itself)  # as if it had not been made yet
        assert cells["gpu_h200-bs1"].state == ("ok" if gone else "refused")
        assert cells["gpu_6000ada-bs1"].state == "ok"


@pytest.mark.parametrize("spoil", SPOILT)
@pytest.mark.parametrize("file", ["config.yaml", "hardware.yaml"])
def test_a_bad_file_of_the_config_is_one_line(
    tmp_path: Path, file: str, spoil: Callable[[Path], None]
) -> None:
    path = tmp_path / file
    shutil.copy(ROOT / "config" / file, path)
    over = {"hardware": str(tmp_path / "hardware.yaml")} if file == "hardware.yaml" else {}
    config = ROOT / "config/config.yaml" if over else path
    spoil(path)
    with pytest.raises(UserError) as refusal:
        load(config, over)
    assert str(refusal.value).count(str(path)) == 1 and "\n" not in str(refusal.value)
    if over:
        with pytest.raises(UserError):
            load_hardware(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 2026-13-45\n? [b, c]\n: d\n", "line 2: a key must be a word"),
        ("a: !!int x\n", "line 1: 'x' is no int"),
        ("a: !!map x\n", "not YAML: "),
        ("a: " + 500 * "[" + 500 * "]", "not YAML: maximum recursion depth"),
    ],
)
def test_no_yaml_ends_in_a_traceback(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"odd\.yaml: {says}"):
        load(tmp_path / "odd.yaml")


def test_a_kept_config_that_is_none_is_named(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: expected keys and values"):
        keep(bench, HARDWARE, tmp_path)


def xdimo(folder: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "xdimo", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_a_locale_without_its_letters_does_not_stop_a_report(tmp_path: Path) -> None:
    config = {**SMALL, "results": "结果", "title": "测试"}
    (tmp_path / "配置.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8")
    done = xdimo(tmp_path, "report", "--config", "配置.yaml", LC_ALL="POSIX", PYTHONUTF8="0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "结果/summary.md\n", "")
    assert "--configfile '配置.yaml'" in (tmp_path / "结果/summary.md").read_text("utf-8")


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**SMALL, "results": "r"}))
    (tmp_path / "r/summary.md").mkdir(parents=True)
    done = xdimo(tmp_path, "report", "--config", "c.yaml")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Is a directory" in done.stderr


def test_records_keep_their_bytes_in_a_clone_with_other_line_ends(tmp_path: Path) -> None:
    kept = "results/records/lent/h200_1-bs1-r1"
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    shutil.copytree(ROOT / kept, origin / kept)
    for name in (".gitattributes", "Snakefile"):
        shutil.copy(ROOT / name, origin / name)

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", *who, *arguments], cwd=origin, check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "records")
    git("clone", "-q", "-c", "core.autocrlf=true", str(origin), str(clone))
    for path in sorted(path for path in (ROOT / kept).rglob("*") if path.is_file()):
        assert (clone / path.relative_to(ROOT)).read_bytes() == path.read_bytes()
    assert b"\r" not in (clone / "Snakefile").read_bytes()
    run = read_json(clone / kept / "run.json")
    log = (clone / kept / run["log"]).read_bytes()
    assert run["log_sha256"] == "sha256:" + hashlib.sha256(log).hexdigest()
    assert check_run(clone / kept) == []
