"""Snakemake is killed while a run trains, which goes on: its result is used, not made again."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.test_launch import _processes_with
from tests.workflow.place import command, edit, runs, snakemake


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _training(folder: Path) -> list[int]:
    """torchrun of attempt 2, and its ranks, as far as they have begun."""
    found = _processes_with("xdimo", "attempts/2")
    return [int(p.parent.name) for p in found if os.readlink(p.parent / "cwd") == str(folder)]


def test_a_run_that_outlives_its_snakemake_is_measured_once(copy: Path) -> None:
    edit(copy, train__timed_steps=5)
    folder = runs(copy) / "cpu_1-bs1-r1"
    attempts = folder / "attempts"
    first = subprocess.Popen(
        command("cpu_1-bs1"), cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _wait(lambda: bool(_training(copy)))
    ranks = _training(copy)
    for rank in ranks:  # it takes as long as this test needs
        os.kill(rank, signal.SIGSTOP)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert snakemake(copy, "--unlock").returncode == 0

    second = snakemake(copy, "cpu_1-bs1")  # at once
    assert second.returncode != 0
    assert "held by cpu_1-bs1-r1, process " in second.stdout + second.stderr
    assert "Trying to restart" not in second.stdout + second.stderr

    for rank in ranks:
        os.kill(rank, signal.SIGCONT)
    _wait((attempts / "2/run.json").exists)
    third = snakemake(copy, "cpu_1-bs1")
    assert third.returncode == 0, third.stderr
    assert json.loads((folder / "run.json").read_text())["attempt"] == 2
    assert json.loads((folder / "metrics.json").read_text())["attempt"] == 2
    assert sorted(os.listdir(attempts)) == ["1", "2"]

    again = snakemake(copy, "-R", "train_cpu_1", "--", "cpu_1-bs1")
    assert again.returncode == 0, again.stderr
    assert json.loads((folder / "metrics.json").read_text())["attempt"] == 3
