"""The choice between implementations: the fastest that runs, and why the others do not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import DATASET, ROOT
from xdimo.cli import parser
from xdimo.config.load import load, load_hardware
from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.files import write_json
from xdimo.spec import choice_path, choice_plan, chosen_in, implementation_of, plan, resolve
from xdimo.train import choose

HARDWARE = load_hardware(ROOT / "config/hardware.yaml")


@pytest.fixture
def auto(small_config: Path) -> Bench:
    return load(small_config, {"train": {"implementation": "auto"}})


def rates(monkeypatch: pytest.MonkeyPatch, found: dict[tuple[str, int], float | str]) -> None:
    """What timing a candidate at a batch gives: clips/s, or an error."""

    def timed(spec: Any) -> dict[str, Any]:
        one = found[spec.implementation, spec.clips_per_gpu]
        if isinstance(one, str):
            return {"error": one}
        return {"clips_per_s": one, "device": "A CPU", "torch": "2.14.1"}

    monkeypatch.setattr(choose, "timed", timed)


def test_the_fastest_of_each_batch(
    auto: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = "OutOfMemoryError: CUDA out of memory"
    rates(
        monkeypatch,
        {("reference", 1): 5.0, ("dense", 1): 7.0, ("reference", 2): memory, ("dense", 2): memory},
    )
    path = choice_path(tmp_path, "cpu_1")
    choice = choose.choose(choice_plan(auto, "cpu_1"), HARDWARE, path)
    assert (chosen_in(path, 1), chosen_in(path, 4)) == ("dense", None)
    assert chosen_in(path, 2) == "reference"  # its run will say so too
    assert choice["variants"]["2"]["candidates"]["dense"] == {"error": memory}
    assert choice["device"] == "A CPU"
    said = choose.text(choice).splitlines()
    assert "1 clips a GPU, dense: 7.0 clips/s  <- chosen" in said
    assert f"2 clips a GPU, dense: - {memory}" in said

    planned = plan(auto, "cpu_1-bs1-r1")
    assert planned["implementation"] is None
    assert implementation_of(planned, tmp_path) == "dense"
    assert resolve(planned, DATASET, None, "dense").implementation == "dense"
    # A look at the target (`xdimo doctor`) comes before there is a choice.
    assert resolve(planned, DATASET, None).implementation == "reference"
    twin = plan(auto, "cpu_1-bs1-reference-r1")
    assert implementation_of(twin, tmp_path) == "reference"
    assert implementation_of(plan(auto, "cpu_2-bs1-r1"), tmp_path) is None  # not chosen yet


def test_no_choice_where_nothing_runs(
    auto: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates(monkeypatch, {(n, b): "no driver" for n in ("reference", "dense") for b in (1, 2)})
    with pytest.raises(UserError, match="cpu_1: no implementation runs; reference: no driver"):
        choose.choose(choice_plan(auto, "cpu_1"), HARDWARE, tmp_path / "choice.json")
    assert not (tmp_path / "choice.json").exists()


def test_a_candidate_that_fails_says_why(auto: Bench) -> None:
    spec = choice_plan(auto, "cpu_1").spec("dense", 1)
    if not torch.cuda.is_available():
        elsewhere = spec.model_copy(update={"device": "cuda"})
        assert choose.timed(elsewhere) == {"error": "UserError: rank 0 has no GPU: there are 0"}
    broken = spec.model_copy(update={"environment": {"PYTHONHOME": "/nowhere"}})
    assert choose.timed(broken) == {"error": "ended with exit code 1"}
    diverging = spec.optimizer.model_copy(update={"learning_rate": 1e30})
    error = choose.timed(spec.model_copy(update={"optimizer": diverging}))["error"]
    assert error.startswith("FloatingPointError: loss nan after ")


def test_only_what_changes_a_step_s_speed_makes_a_choice_anew(
    auto: Bench, small_config: Path
) -> None:
    def same(**train: Any) -> bool:
        other = load(small_config, {"train": {"implementation": "auto", **train}})
        return choice_plan(other, "cpu_1") == choice_plan(auto, "cpu_1")

    assert same(seed=1, learning_rate=1e-3, timed_steps=9, repeats=5)
    assert not same(precision="bf16")
    assert not same(deterministic=True)


def test_a_spec_wants_the_choice(auto: Bench, small_config: Path, tmp_path: Path) -> None:
    manifest = {"schema": 1, "folder": "v", "dataset": DATASET, "window": 8, "counts": {}}
    write_json(tmp_path / "manifest.json", {**manifest, "videos": []})
    write_json(tmp_path / "choice.json", {"variants": {"1": {"chosen": "dense"}}})
    planned = json.dumps(plan(auto, "cpu_1-bs2-r1"))
    command = ["spec", "cpu_1-bs2-r1", "--plan", planned, "--output", str(tmp_path / "spec.json")]
    command += ["--manifest", str(tmp_path / "manifest.json")]
    for more, says in (
        ([], "train.implementation: auto; give --choice"),
        (["--choice", str(tmp_path / "choice.json")], "nothing of 2 clips a GPU; choose again"),
    ):
        arguments = parser().parse_args([*command, *more])
        with pytest.raises(UserError, match=says):
            arguments.run(arguments)


def test_a_choice_on_another_card_is_refused(auto: Bench, tmp_path: Path) -> None:
    elsewhere = choice_plan(auto, "cpu_1")
    run = {**elsewhere.run, "device": "cuda", "card": "h200"}
    with pytest.raises(UserError, match="cpu_1-bs1-r1 needs 1 x H200 SXM; this machine has"):
        choose.choose(elsewhere.model_copy(update={"run": run}), HARDWARE, tmp_path / "c.json")
