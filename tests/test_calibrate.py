"""What plain work gives: the arithmetic of the rates, and that every rank measures."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from xdimo.config.load import load_hardware
from xdimo.config.schema import Model
from xdimo.spec import model_spec
from xdimo.train.instruments import calibration
from xdimo.train.instruments.step_timer import Clock

HARDWARE = load_hardware(ROOT / "config/hardware.yaml")


def test_products_are_those_of_a_block() -> None:
    assert calibration.model_products(model_spec(Model()), 65_536) == [
        (65_536, 384, 1536),
        (65_536, 1536, 384),
        (65_536, 384, 1152),
        (65_536, 384, 384),
    ]


def test_rates_of_known_work_in_a_known_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_seconds", lambda work, clock, enough_s: 0.5)
    found = calibration.measure(torch.device("cpu"), "fp32", [(10, 20, 30)])
    assert found == {
        "gemm_tflops": pytest.approx(2 * 256**3 / 0.5 / 1e12),
        "gemm_shape": [256, 256, 256],
        "gemm_s": 0.005,
        "model_gemm_tflops": {"10x20x30": pytest.approx(2 * 10 * 20 * 30 / 0.5 / 1e12)},
        "copy_gb_s": pytest.approx(2 * 8 * 2**20 / 0.5 / 1e9),  # read and written
        "all_reduce_gb_s": None,  # one rank
    }


def test_products_launched_together_count_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(product: Callable[[], object]) -> Callable[[], object]:
        def launch() -> None:
            for _ in range(calibration.AT_ONCE):
                product()

        return launch

    took: list[float] = []

    def seconds(launch: Callable[[], object], clock: Clock, enough_s: float) -> float:
        launch()
        took.append(enough_s)
        return 0.5

    effort = calibration.Effort(16, 1, 1, 1, 0.2, 1.0)
    monkeypatch.setattr(calibration, "EFFORT", {"cpu": effort})
    monkeypatch.setattr(calibration, "_together", together)
    monkeypatch.setattr(calibration, "_seconds", seconds)
    monkeypatch.setattr(Clock, "together", lambda clock: setattr(clock, "cuda", True))
    found = calibration.measure(torch.device("cpu"), "fp32", [(10, 20, 30)])
    assert found["gemm_tflops"] == pytest.approx(2 * 16**3 * calibration.AT_ONCE / 0.5 / 1e12)
    one = 2 * 10 * 20 * 30 / 0.5 / 1e12
    assert found["model_gemm_tflops"] == {"10x20x30": pytest.approx(one * calibration.AT_ONCE)}
    assert took == [1.0, 0.2, 0.2]  # the square, the product, the copy


def test_a_run_draws_the_same_after_a_calibration() -> None:
    def drawn(calibrated: bool) -> torch.Tensor:
        torch.manual_seed(1)
        if calibrated:
            calibration.measure(torch.device("cpu"), "bf16", [])
        return torch.randn(4)

    assert torch.equal(drawn(True), drawn(False))


@pytest.mark.parametrize("processes", [1, 2])
def test_verb_measures_on_each_rank(processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "-m", "xdimo", "calibrate", "--device", "cpu"]
    command += ["--clips", "1", "--precision", "fp32", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert len(told["ranks"]) == len(told["devices"]) == processes
    for rank in told["ranks"]:
        rates = [rank["gemm_tflops"], rank["copy_gb_s"], *rank["model_gemm_tflops"].values()]
        assert min(rates) > 0
        assert "4096x384x1536" in rank["model_gemm_tflops"]
        assert (rank["all_reduce_gb_s"] is None) == (processes == 1)
        assert processes == 1 or rank["all_reduce_gb_s"] > 0


def rates() -> dict[str, Any]:
    return {
        "gemm_tflops": 750.0,
        "gemm_shape": [8192, 8192, 8192],
        "model_gemm_tflops": {"65536x384x1536": 486.0},
        "copy_gb_s": 2900.0,
        "all_reduce_gb_s": None,
    }


def test_rates_stand_beside_the_cards_peaks() -> None:
    lines = calibration.text([rates()], ["NVIDIA H100 80GB HBM3"], HARDWARE, "bf16").splitlines()
    assert lines[0] == "NVIDIA H100 80GB HBM3, bf16"
    square = next(line.split() for line in lines if "8192x8192x8192" in line)
    assert square[-3:] == ["750", "989", "75.8"]
    assert next(line.split() for line in lines if "copy" in line)[-3:] == ["2900", "3350", "86.6"]


@pytest.mark.parametrize(
    ("device", "precision"), [("NVIDIA X9", "bf16"), ("NVIDIA H100 80GB HBM3", "fp32")]
)
def test_a_peak_that_is_not_known_is_not_guessed(device: str, precision: Any) -> None:
    text = calibration.text([rates()], [device], HARDWARE, precision)
    square = next(line.split() for line in text.splitlines() if "8192x8192x8192" in line)
    assert square[-3:] == ["750", "n/a", "n/a"]


def test_verb_refuses_what_it_cannot_do() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for arguments, says in (
        (["--device", "cuda"], "xdimo calibrate: rank 0 has no GPU: there are 0"),
        (["--clips", "0"], "xdimo calibrate: --clips: 0; expected 1 or more"),
    ):
        command = [sys.executable, "-m", "xdimo", "calibrate", *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr.strip()) == (2, says)
