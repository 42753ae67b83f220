"""What is stale by content is made again, without Snakemake's records and whatever files' times."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.workflow.place import edit, planned, runs, snakemake
from xdimo.files import read_json

SHOWN = {"plot": 1, "report": 1}
RUN = {"spec": 1, "train_cpu_1": 1, "metrics": 1}


@pytest.fixture
def moved(copy: Path) -> Path:
    """As on another machine: without Snakemake's records, and every file of the same age."""
    shutil.rmtree(copy / ".snakemake")
    _settle(copy)
    return copy


def _settle(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1.7e9, 1.7e9))


def _copied_run(folder: Path) -> None:
    shutil.rmtree(runs(folder) / "cpu_1-bs2-r1")
    shutil.copytree(runs(folder) / "cpu_1-bs1-r1", runs(folder) / "cpu_1-bs2-r1")


def _replaced(path: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / path).read_text()
        assert old in text
        (folder / path).write_text(text.replace(old, new))

    return change


def _without(path: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = folder / path
        shutil.rmtree(whole) if whole.is_dir() else whole.unlink()

    return change


def _of_another_campaign(folder: Path) -> None:
    """Plots and summary are written as another campaign of the same results writes them."""
    for verb in ("plot", "report"):
        command = [sys.executable, "-m", "xdimo", verb, "--config", "small.yaml"]
        command += ["--override", '{"campaign": "two"}']
        subprocess.run(command, cwd=folder, check=True, capture_output=True)


ONE = "results/runs/test/cpu_1-bs1-r1"
CHANGES: dict[str, tuple[Callable[[Path], object], dict[str, int]]] = {
    "nothing": (lambda folder: None, {}),
    "steps": (
        lambda folder: edit(folder, train__timed_steps=5),
        {"spec": 3, "train_cpu_1": 2, "train_cpu_2": 1, "metrics": 3, **SHOWN},
    ),
    "title": (lambda folder: edit(folder, title="Another"), SHOWN),
    "spec deleted": (_without(f"{ONE}/spec.json"), {"spec": 1, "metrics": 1, **SHOWN}),
    "spec edited": (
        _replaced(f"{ONE}/spec.json", '"seed": 3407', '"seed": 1'),
        {"spec": 1, "metrics": 1, **SHOWN},
    ),
    "run copied under another name": (_copied_run, {**RUN, **SHOWN}),
    "metrics of another run": (
        _replaced(f"{ONE}/metrics.json", '"attempt": 1', '"attempt": 2'),
        {"metrics": 1, **SHOWN},
    ),
    "a log's figure": (_replaced(f"{ONE}/attempts/1/log.jsonl", '"step": 3', '"step": 4'), SHOWN),
    "plots deleted": (_without("results/plots"), SHOWN),
    "one plot empty": (lambda folder: (folder / "results/plots/mfu.png").write_bytes(b""), SHOWN),
    "figure typed into the table": (
        _replaced("results/summary.md", "samples/s", "frames/s"),
        {"report": 1},
    ),
    "csv deleted": (_without("results/summary.csv"), {"report": 1}),
    "summary of another campaign": (_of_another_campaign, SHOWN),
    "log deleted": (_without(f"{ONE}/attempts"), {"train_cpu_1": 1, "metrics": 1, **SHOWN}),
    "manifest and latents deleted": (
        _without("results/data"),
        {"manifest": 1, "spec": 3, "metrics": 3, **SHOWN},
    ),
    "a shard cut off": (
        lambda folder: os.truncate(next((folder / "results/data").rglob("*.safetensors")), 1000),
        {"latents": 1, **SHOWN},
    ),
    "latents of another dataset": (
        _replaced("results/data/latents/index.json", '"name": "sha256:', '"name": "sha256:0'),
        {"latents": 1, **SHOWN},
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_stale_by_content_is_made_again(moved: Path, change: str) -> None:
    apply, expected = CHANGES[change]
    apply(moved)
    _settle(moved)
    assert planned(moved) == expected


def test_a_deleted_spec_and_plots_come_back_without_training(moved: Path) -> None:
    spec = runs(moved) / "cpu_1-bs1-r1/spec.json"
    was = spec.read_bytes()
    spec.unlink()
    _without("results/plots")(moved)
    _settle(moved)
    done = snakemake(moved)
    assert done.returncode == 0, done.stdout + done.stderr
    assert spec.read_bytes() == was
    assert [path.name for path in (spec.parent / "attempts").iterdir()] == ["1"]
    assert "pending" not in (moved / "results/summary.md").read_text().split("## ")[1]
    assert (moved / "results/plots/throughput.png").exists()
    assert planned(moved) == Counter()


def test_copied_results_of_another_config_are_trained_once(moved: Path) -> None:
    edit(moved, train__timed_steps=5, targets__cpu_1__variants=[1])
    config = yaml.safe_load((moved / "small.yaml").read_text())
    del config["targets"]["cpu_2"]
    (moved / "small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    _settle(moved)
    done = snakemake(moved)
    assert done.returncode == 0, done.stdout + done.stderr
    run = read_json(runs(moved) / "cpu_1-bs1-r1/run.json")
    assert (run["outcome"], run["attempt"]) == ("ok", 2)
    assert planned(moved) == Counter()
    # It says what it was made from.
    made_from = read_json(moved / "results/summary.json")["made_from"]["files"]
    assert "runs/test/cpu_1-bs1-r1/run.json" in made_from


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("-f cpu_1", {"train_cpu_1": 2, "metrics": 2}),
        ("-f cpu_1-bs2", {"train_cpu_1": 1, "metrics": 1}),
        ("-R cpu_1-bs2 -- cpu_1", {"train_cpu_1": 1, "metrics": 1}),
        ("-R cpu_2 -- all", {"train_cpu_2": 1, "metrics": 1, **SHOWN}),
    ],
)
def test_a_name_that_is_forced_is_measured_again(
    moved: Path, typed: str, expected: dict[str, int]
) -> None:
    assert planned(moved, *typed.split()) == expected


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("vae__weights", "models/typo", "vae.weights: models/typo: no such folder; expected an"),
        (
            "dataset__videos",
            "vidoes",
            "dataset.videos: vidoes: no such folder; results/data/manifest.json is of videos",
        ),
    ],
)
def test_nothing_is_trained_on_what_is_not_here(
    moved: Path, key: str, value: str, line: str
) -> None:
    edit(moved, targets__cpu_1__variants=[1, 2, 3], **{key: value})
    done = snakemake(moved, "-n")
    assert done.returncode == 1
    assert (done.stdout + done.stderr).splitlines()[-1].startswith(line)


def test_videos_that_are_not_here_are_said(moved: Path) -> None:
    edit(moved, dataset__videos="vidoes")
    done = snakemake(moved, "-n")
    assert done.returncode == 0
    assert "dataset.videos: vidoes: no such folder" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("-f", "such as: snakemake -f cpu_1-bs1 --configfile small.yaml"),
        ("cpu_3", "no target cpu_3; did you mean cpu_2 or cpu_1?"),
        ("results", "results: no step makes it. no target results; targets: cpu_1, cpu_2"),
        ("./cpu_1", "./cpu_1: a path; type the name alone: cpu_1"),
        ("cpu_1/", "cpu_1/: a path; type the name alone: cpu_1"),
        ("-R train_cpu3 -- all", "no target train_cpu3; did you mean train_cpu_2 or train_cpu_1?"),
        (
            "cpu_1-bs1-reference",
            "no target cpu_1-bs1-reference; the config's implementation is the reference",
        ),
        ("results/runs/test/cpu_1-bs8-r1/run.json", "no target cpu_1-bs8; did you mean cpu_1-bs2"),
    ],
)
def test_what_cannot_be_meant_is_one_line(moved: Path, typed: str, line: str) -> None:
    done = snakemake(moved, "-n", *typed.split())
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert line in said
    assert "Exception" not in said
    assert "Traceback" not in said
