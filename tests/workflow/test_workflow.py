"""The same workflow, small: real video, real training, and what reruns when something changes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.videos import write_video
from tests.workflow.place import edit, planned, runs, snakemake
from xdimo.report import PLOTS, TABLES


def test_everything_is_made_and_the_second_call_makes_nothing(copy: Path) -> None:
    results = copy / "results"
    for name in ("summary.md", "summary.zh.md", "summary.csv", "summary.json"):
        assert (results / name).stat().st_size > 0
    linked = re.findall(r"\]\((plots/\S+)\)", (results / "summary.md").read_text())
    assert linked
    assert all((results / path).exists() for path in linked)
    assert sorted(path.name for path in runs(copy).iterdir()) == [
        "cpu_1-bs1-r1",
        "cpu_1-bs2-r1",
        "cpu_2-bs1-r1",
    ]
    for folder in runs(copy).iterdir():
        run = json.loads((folder / "run.json").read_text())
        assert run["outcome"] == "ok"
        assert (folder / run["log"]).parent == folder / "attempts/1"
    assert planned(copy) == Counter()


def test_names_are_targets(copy: Path) -> None:
    shutil.rmtree(runs(copy))
    assert planned(copy, "cpu_1")["train_cpu_1"] == 2
    assert planned(copy, "cpu_1-bs2")["train_cpu_1"] == 1
    assert planned(copy, "cpu_2") == {"spec": 1, "train_cpu_2": 1, "metrics": 1}
    assert planned(copy, "cpu_2-bs1-online")["train_cpu_2"] == 1
    assert planned(copy, "-R", "train_cpu_2", "--", "cpu_2")["train_cpu_2"] == 1


def test_editing_one_cell_reruns_its_chain_alone(copy: Path) -> None:
    edit(copy, targets__cpu_2__environment={"OMP_NUM_THREADS": "1"})
    assert planned(copy) == {"spec": 1, "train_cpu_2": 1, "metrics": 1, "plot": 1, "report": 1}


def test_editing_steps_reruns_all_cells_and_no_data(copy: Path) -> None:
    edit(copy, train__timed_steps=5)
    rules = planned(copy)
    assert (rules["train_cpu_1"], rules["train_cpu_2"], rules["spec"]) == (2, 1, 3)
    assert not {"manifest", "latents"} & set(rules)


def test_title_queue_and_hosts_rerun_no_training(copy: Path) -> None:
    edit(copy, title="Another title", targets__cpu_2__queue="other", pending_limit=2)
    edit(copy, targets__cpu_2__hosts=["node7"], targets__cpu_2__setup=["true"])
    edit(copy, targets__cpu_2__walltime_min=5)
    assert planned(copy) == {"plot": 1, "report": 1}


def test_content_that_is_the_same_reruns_no_training(copy: Path) -> None:
    for spec in runs(copy).glob("*/spec.json"):
        spec.write_text(spec.read_text())
    assert not {"train_cpu_1", "train_cpu_2"} & set(planned(copy))
    assert not {"train_cpu_1", "train_cpu_2"} & set(planned(copy, "-R", "spec"))
    # A pull or copy: no records of Snakemake's, and times in any order.
    shutil.rmtree(copy / ".snakemake")
    for spec in runs(copy).glob("*/spec.json"):
        os.utime(spec)
    assert not {"train_cpu_1", "train_cpu_2"} & set(planned(copy))


def test_a_manifest_made_again_trains_nothing(copy: Path) -> None:
    for video in (copy / "videos").iterdir():
        os.utime(video)
    # Small files Snakemake compares by content; for large ones new times alone mean this:
    rules = planned(copy, "-R", "manifest")
    assert (rules["manifest"], rules["latents"]) == (1, 1)
    assert not {"train_cpu_1", "train_cpu_2", "spec"} & set(rules)


def test_a_campaign_trains_at_once_also_where_its_data_is_made_again(copy: Path) -> None:
    rules = planned(copy, "-R", "manifest", "--config", "campaign=next", "--", "cpu_1-bs1")
    assert (rules["manifest"], rules["latents"]) == (1, 1)
    assert (rules["spec"], rules["train_cpu_1"], rules["metrics"]) == (1, 1, 1)


def test_another_video_is_measured_by_the_next_command(copy: Path) -> None:
    write_video(copy / "videos/new.mp4", 25, width=32, height=32)
    assert snakemake(copy, "results/data/latents/index.json").returncode == 0
    rules = planned(copy)
    assert (rules["spec"], rules["train_cpu_1"], rules["train_cpu_2"]) == (3, 2, 1)


def test_auto_times_the_candidates_once_and_pins_the_fastest(copy: Path) -> None:
    edit(copy, campaign="auto", train__implementation="auto", targets__cpu_1__variants=[1])
    assert planned(copy, "cpu_2") == {"choose_cpu_2": 1, "spec": 1, "train_cpu_2": 1, "metrics": 1}
    done = snakemake(copy, "cpu_1")
    assert done.returncode == 0, done.stdout + done.stderr
    campaign = copy / "results/runs/auto"
    path, folder = campaign / "choice-cpu_1.json", campaign / "cpu_1-bs1-r1"
    choice = json.loads(path.read_text())
    variant = choice["variants"]["1"]
    rates = {
        name: found["clips_per_s"]
        for name, found in variant["candidates"].items()
        if "error" not in found
    }
    assert set(rates) == {"reference", "dense"}
    assert variant["candidates"]["fused"] == {"error": "fused runs on cuda only, not on cpu"}
    assert variant["chosen"] == max(rates, key=lambda name: rates[name])
    assert json.loads((folder / "spec.json").read_text())["implementation"] == variant["chosen"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["implementation"] == variant["chosen"]

    # Made again with the same answer it reruns nothing; a seed does not make it again.
    assert planned(copy, "cpu_1") == Counter()
    path.write_text(json.dumps({**choice, "host": "another", "code": {}}))
    assert planned(copy, "cpu_1") == Counter()
    edit(copy, train__seed=1)
    assert planned(copy, "cpu_1") == {"spec": 1, "train_cpu_1": 1, "metrics": 1}
    edit(copy, train__seed=3407, train__precision="bf16")
    assert planned(copy, "cpu_1")["choose_cpu_1"] == 1
    edit(copy, train__precision="fp32")

    # Another choice is another run.
    (other,) = set(rates) - {variant["chosen"]}
    variant["chosen"] = other
    path.write_text(json.dumps(choice))
    assert planned(copy, "cpu_1") == {"spec": 1, "train_cpu_1": 1, "metrics": 1}
    assert snakemake(copy, "cpu_1").returncode == 0
    assert json.loads((folder / "run.json").read_text())["attempt"] == 2
    assert json.loads((folder / "metrics.json").read_text())["implementation"] == other
    assert planned(copy, "cpu_1-bs1-reference") == {"spec": 1, "train_cpu_1": 1, "metrics": 1}


def test_a_value_on_the_command_line_reaches_the_run(copy: Path) -> None:
    edit(copy, targets__cpu_2__setup=["cd .", "touch 'the set-up ran'"])
    override = ["--config", "train={timed_steps: 7}"]
    done = snakemake(copy, *override, "--", "cpu_2-bs1")
    assert done.returncode == 0, done.stderr
    assert (copy / "the set-up ran").exists()
    folder = runs(copy) / "cpu_2-bs1-r1"
    assert json.loads((folder / "spec.json").read_text())["steps"]["timed"] == 7
    run = json.loads((folder / "run.json").read_text())
    assert run["attempt"] == 2  # the first is kept
    assert (folder / "attempts/1/log.jsonl").exists()
    steps = (folder / run["log"]).read_text().count('"phase": "timed", "data_wait_s"')
    assert steps == 7


def test_a_crashing_target_is_retried_and_the_others_are_shown(copy: Path) -> None:
    # Python of this target's processes cannot start.
    edit(copy, targets__cpu_2__environment={"PYTHONHOME": "/nowhere"})
    done = snakemake(copy)
    assert done.returncode != 0
    folder = runs(copy) / "cpu_2-bs1-r1"
    outcomes = [
        json.loads(path.read_text())["outcome"]
        for path in sorted(folder.glob("attempts/*/run.json"))
    ]
    assert outcomes == ["ok", "crash", "crash", "crash"]
    assert not (folder / "run.json").exists()
    summary = (copy / "results/summary.md").read_text()
    assert re.search(r"`cpu_2-bs1`.*\bcrash", summary, re.IGNORECASE)
    assert re.search(r"`cpu_1-bs1`.*samples/s", summary)
    # The table that was rendered all the same does not pass for the finished one.
    edit(copy, targets__cpu_2__environment={})
    for target in ("all", "results/summary.md"):
        assert planned(copy, target)["train_cpu_2"] == 1


def test_a_summary_rendered_by_hand_does_not_stop_the_workflow(copy: Path) -> None:
    shutil.rmtree(runs(copy) / "cpu_1-bs2-r1")
    report = [sys.executable, "-m", "xdimo", "report", "--config", "small.yaml"]
    subprocess.run(report, cwd=copy, check=True)
    assert planned(copy, "results/summary.md")["train_cpu_1"] == 1
    assert snakemake(copy, "results/summary.md").returncode == 0
    assert planned(copy) == Counter()


def test_changed_latents_are_an_answer(copy: Path) -> None:
    shard = next((copy / "results/data/latents").glob("*/*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    done = snakemake(copy, "-R", "train_cpu_1", "--", "cpu_1-bs1")
    assert done.returncode == 0, done.stderr
    run = json.loads((runs(copy) / "cpu_1-bs1-r1/run.json").read_text())
    assert run["outcome"] == "data"
    assert shard.name in run["reason"]
    assert "but the index says" in (copy / "results/summary.md").read_text()


def test_missing_gpus_name_the_profile_to_use(copy: Path) -> None:
    edit(copy, targets__cpu_2__device="cuda", targets__cpu_2__card="h200")
    done = snakemake(copy, "cpu_2")
    if re.search(r"NVIDIA H200", done.stdout + done.stderr):
        pytest.skip("this machine has the cards")
    assert done.returncode != 0
    assert "Trying to restart" not in done.stdout + done.stderr  # they will not come
    log = next((copy / "results/logs").rglob("cpu_2-bs1-r1.train.log")).read_text()
    assert "cpu_2-bs1-r1 needs 2 x H200 SXM; this machine has 0 GPUs" in log
    assert "snakemake --profile profiles/lsf" in log
    summary = (copy / "results/summary.md").read_text()
    assert "`cpu_1-bs1`" in summary


def test_a_disabled_target_is_left_out_with_its_reason(copy: Path) -> None:
    shutil.rmtree(runs(copy) / "cpu_2-bs1-r1")
    edit(copy, targets__cpu_2__enabled=False, targets__cpu_2__reason="fans being replaced")
    assert not planned(copy)["train_cpu_2"]
    assert snakemake(copy).returncode == 0
    assert "out of service: fans being replaced" in (copy / "results/summary.md").read_text()
    assert "fans being replaced" in (copy / "results/summary.zh.md").read_text()
    refused = snakemake(copy, "cpu_2")
    assert refused.returncode != 0
    assert "cpu_2 is out of service: fans being replaced" in refused.stdout + refused.stderr


def test_a_wrong_config_stops_before_any_job(copy: Path) -> None:
    edit(copy, train__timed_step=5)
    done = snakemake(copy)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "unknown key" in line]
    assert said == [line for line in said if line.startswith("small.yaml: train.timed_step: ")]
    assert len(said) == 1
    assert "Traceback" not in done.stderr


def test_the_matrix_plans_without_gpu_or_videos(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "snakemake", "-n", "--config", f"results={tmp_path}"]
    command += ["dataset={videos: absent}", "--", f"{tmp_path}/summary.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Counter(re.findall(r"^(?:local)?rule (train_\S+):$", done.stdout + done.stderr, re.M))
    assert found == {"train_gpu_6000ada": 6, "train_gpu_h200": 6, "train_gpu_pro6000": 6}


def test_repeats_are_interleaved(copy: Path) -> None:
    edit(copy, train__repeats=2, train__timed_steps=1, train__warmup_steps=1)
    shutil.rmtree(runs(copy))
    done = snakemake(copy, "cpu_1")
    assert done.returncode == 0, done.stderr
    ran = re.findall(r"output: \S*/(cpu_1\S+)/run\.json", done.stdout + done.stderr)
    assert [run[-2:] for run in ran] == ["r1", "r1", "r2", "r2"]


def test_report_of_snakemake_works_offline(copy: Path) -> None:
    done = snakemake(copy, "--report", "report.html")
    assert done.returncode == 0, done.stderr
    page = (copy / "report.html").read_text()
    embedded = set(re.findall(r"data:[\w/]+;\S{,30}?filename=([\w.]+)", page))
    assert embedded == {f"{name}.png" for name in PLOTS} | set(TABLES)
