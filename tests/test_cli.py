"""Verbs that only compute, and how verbs end."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def xdimo(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "xdimo", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_describe() -> None:
    done = xdimo("describe", "S/2", "--experts", "4", "--top-k", "2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["parameters"]["total"] == 75_140_000
    dense = json.loads(xdimo("describe", "S/2", "--experts", "1", "--json").stdout)
    assert dense["parameters"]["total"] == dense["parameters"]["active"] == 32_585_120


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["S/3"], "xdimo describe: size: Input should be 'S/2', 'B/2', 'L/2' or 'XL/2'"),
        (["S/2", "--top-k", "5"], "xdimo describe: model.top_k: 5 is more than model.experts"),
        (["S/2", "--frames", "0"], "xdimo describe: --frames: 0; expected 1 or more"),
        (["S/2", "--pixels", "100"], "xdimo describe: --pixels: 100; expected a multiple of 16"),
    ],
)
def test_a_model_that_cannot_be_is_refused_in_one_line(arguments: list[str], says: str) -> None:
    done = xdimo("describe", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(says)
    assert done.stderr.count("\n") == 1


def test_the_demo_makes_no_history() -> None:
    before = (ROOT / "config/history.csv").read_text()
    done = xdimo("history", "add", "demo", "--config", "config/demo.yaml")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no history of it" in done.stderr
    assert (ROOT / "config/history.csv").read_text() == before


def test_a_reader_that_leaves_is_no_error_of_ours() -> None:
    command = f"{sys.executable} -m xdimo describe S/2 --json | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
