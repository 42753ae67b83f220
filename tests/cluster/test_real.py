"""The workflow itself through the queue: preflight, latents, real training, tables."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml

from tests.cluster.place import HOSTS, place
from tests.cluster.slurm import Slurm, shims
from tests.conftest import ROOT, SMALL
from tests.videos import write_video
from xdimo.config.load import load


def test_videos_to_tables_through_the_queue(slurm: Slurm, tmp_path: Path) -> None:
    here = place(slurm, "jh", tmp_path / "work")
    config = {**SMALL, "campaign": "queue", "cpus_per_gpu": 1}
    config["train"] = {**SMALL["train"], "repeats": 1}
    config["queue"] = {"poll_s": 0.5, "latency_s": 5, "grace_s": 30}
    config["targets"] = {
        name: {**target, "queue": queue, "hosts": [HOSTS[queue]], "variants": [1]}
        for (name, target), queue in zip(
            SMALL["targets"].items(), ("gpu_h200", "gpu_pro6000"), strict=True
        )
    }
    (here.folder / "small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    for number, frames in enumerate((20, 31)):
        write_video(here.folder / f"videos/{number}.mp4", frames, width=32, height=32)
    here.bench = load(here.folder / "small.yaml")
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--profile", str(ROOT / "profiles/lsf")]
    command += ["--workflow-profile", str(ROOT / "profiles/default")]
    process = here.start([*command, "all", "--configfile", "small.yaml"])
    assert here.finish(process, 300) == 0, here.said()
    looked = {"latents", "preflight-cpu_1", "preflight-cpu_2"}
    assert {job["name"].split(".")[0] for job in here.jobs()} == {*looked, *here.runs}
    for run in here.runs:
        [attempt] = here.attempts(run)
        assert attempt["outcome"] == "ok"
        assert attempt["job"] in {job["id"] for job in here.jobs()}
    summary = (here.folder / "results/summary.md").read_text()
    assert "`cpu_2-bs1`" in summary
    done = here.xdimo("doctor", "--on", "cpu_1", "--config", "small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trains a step" in done.stdout


def test_the_slurm_profile(slurm: Slurm, tmp_path: Path) -> None:
    """Through Slurm's own plugin: four cards a run, in the partition of its target."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    here = place(slurm, "jh", tmp_path / "work")
    # The plugin keeps SLURM_CONF from srun, which finds a site's own without it.
    srun = shims(here.knobs, "jh") / "srun"
    set_up = f"export SLURM_CONF={slurm.folder}/slurm.conf"
    srun.write_text(f'#!/bin/sh\n{set_up}\nexec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o755)
    command = [sys.executable, "-m", "snakemake", "--snakefile"]
    command += [str(ROOT / "tests/cluster/Snakefile"), "--configfile", "bench.yaml"]
    command += ["--profile", str(ROOT / "profiles/slurm"), "--latency-wait", "5"]
    command += ["--slurm-init-seconds-before-status-checks", "1", "gpu_h200"]
    assert here.finish(here.start(command), 200) == 0, here.said()
    jobs = [job for job in slurm.jobs() if int(job["id"]) > here.before]
    for job in jobs:
        asked = slurm.run("scontrol", "show", "job", job["id"])
        assert "Partition=gpu_h200 " in asked and "TresPerJob=gres:gpu:4" in asked, asked
    assert len(jobs) == 2
    for run in ("gpu_h200-bs1-r1", "gpu_h200-bs4-r1"):
        [attempt] = here.attempts(run)
        assert attempt["job"] in {job["id"] for job in jobs}
