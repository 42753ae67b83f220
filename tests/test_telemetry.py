"""What the sampler makes of NVML, played by a stand-in: there is no GPU here."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from xdimo.train.instruments import gpu_telemetry

OURS, OTHER = "GPU-ours", "GPU-other"


def unsupported(*arguments: Any) -> Any:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Two cards, one of them ours; an entry that a test changes is what NVML answers next."""
    processes = [SimpleNamespace(pid=os.getpid()), SimpleNamespace(pid=1)]
    answers: dict[str, Any] = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetHandleByIndex": lambda index: [OURS, OTHER][index],
        "nvmlDeviceGetUUID": lambda card: card,
        "nvmlDeviceGetClockInfo": lambda card, kind: {
            pynvml.NVML_CLOCK_SM: 1980,
            pynvml.NVML_CLOCK_MEM: 2619,
        }[kind],
        "nvmlDeviceGetPowerUsage": lambda card: 650_500,  # mW
        "nvmlDeviceGetTemperature": lambda card, sensor: 61,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda card: 0x1 | 0x4 | 0x40,
        "nvmlDeviceGetTotalEccErrors": unsupported,
        "nvmlDeviceGetComputeRunningProcesses": lambda card: processes if card == OURS else [],
        "nvmlDeviceGetUtilizationRates": lambda card: SimpleNamespace(gpu=37),
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda card: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda card: 16,
        "nvmlDeviceGetMemoryInfo": lambda card, version: SimpleNamespace(used=3 * 2**29),
        "nvmlDeviceGetNvLinkState": lambda card, link: 1 if link < 18 else unsupported(),
    }
    for name in answers:
        monkeypatch.setattr(pynvml, name, lambda *a, name=name: answers[name](*a))
    return answers


def sampled(path: Path, samples: int = 1) -> list[dict[str, Any]]:
    with gpu_telemetry.sampling([OURS], path):
        while not path.exists() or path.read_text().count("\n") < samples:
            time.sleep(0.01)
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sample_has_every_figure_in_its_unit(nvml: dict[str, Any], tmp_path: Path) -> None:
    sample = sampled(tmp_path / "telemetry.jsonl")[0]
    assert sample.pop("monotonic_s") <= time.monotonic()
    assert sample.pop("host_load") >= 0
    assert sample == {
        "gpu": 0,
        "sm_mhz": 1980,
        "memory_mhz": 2619,
        "power_w": 650.5,
        "temperature_c": 61,
        "throttle": ["sw_power_cap", "hw_thermal_slowdown"],  # idle is no throttle
        "ecc_errors": None,
        "other_processes": 1,
        "host_gpus_busy": 1,
        "pcie_gen": 5,
        "pcie_width": 16,
        "nvlink_active": 18,
        "memory_before_gib": 1.5,
    }


def test_memory_in_use_is_that_before_the_run_all_along(
    nvml: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used = (SimpleNamespace(used=gib * 2**30) for gib in (1, 5, 9))  # the run's own come later
    nvml["nvmlDeviceGetMemoryInfo"] = lambda card, version: next(used)
    monkeypatch.setattr(gpu_telemetry, "PERIOD_S", 0.01)
    samples = sampled(tmp_path / "t", 3)
    assert {sample["memory_before_gib"] for sample in samples} == {1}


def test_samples_go_on_until_the_run_ends(
    nvml: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 0.5 <= gpu_telemetry.PERIOD_S <= 1  # one to two a second
    monkeypatch.setattr(gpu_telemetry, "PERIOD_S", 0.01)
    times = [sample["monotonic_s"] for sample in sampled(tmp_path / "t", 3)]
    assert times == sorted(set(times))
    assert len(times) >= 3


def test_what_nvml_keeps_to_itself_is_not_known(nvml: dict[str, Any], tmp_path: Path) -> None:
    set_up = {"nvmlInit", "nvmlShutdown", "nvmlDeviceGetCount", "nvmlDeviceGetUUID"}
    for name in nvml:
        if name not in set_up and "Handle" not in name:
            nvml[name] = unsupported
    sample = sampled(tmp_path / "telemetry.jsonl")[0]
    known = {key for key, value in sample.items() if value is not None}
    assert known == {"monotonic_s", "gpu", "host_gpus_busy", "host_load"}
    assert sample["host_gpus_busy"] == 0


@pytest.mark.parametrize("missing", ["nvmlInit", "nvmlDeviceGetHandleByUUID"])
def test_without_nvml_there_is_no_file_and_one_line_says_so(
    nvml: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture, missing: str
) -> None:
    nvml[missing] = unsupported
    with gpu_telemetry.sampling([OURS], tmp_path / "telemetry.jsonl"):
        pass
    assert capfd.readouterr().out == "no telemetry: NVML says: Not Supported\n"
    assert not (tmp_path / "telemetry.jsonl").exists()


def test_a_cpu_run_says_so_once(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    with gpu_telemetry.sampling([], tmp_path / "telemetry.jsonl"):
        pass
    assert capfd.readouterr().out == "no telemetry: the run uses no GPU\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("pids", "ours", "others"),
    [
        ([10], {10}, 0),
        ([10, 11], {10}, 1),
        ([10, 11, 12], {10, 11}, 1),  # two of ours on one card
        ([70_001], set(), 0),  # a container: our rank under the host's number
        ([70_001, 70_002], set(), 1),
        ([], set(), None),  # a container that hides them all
    ],
)
def test_strangers_are_those_that_are_not_ours(
    pids: list[int], ours: set[int], others: int | None
) -> None:
    assert gpu_telemetry.strangers(pids, lambda pid: pid in ours) == others


def test_children_are_ours_also_in_a_session_of_their_own() -> None:
    command = [sys.executable, "-c", "input()"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        assert gpu_telemetry._is_ours(child.pid)
        assert gpu_telemetry._is_ours(os.getpid())
        assert not gpu_telemetry._is_ours(1)
        assert not gpu_telemetry._is_ours(os.getppid())
    finally:
        child.communicate(b"\n")
    assert not gpu_telemetry._is_ours(child.pid)


def test_the_window_takes_its_own_samples(tmp_path: Path) -> None:
    path = tmp_path / "telemetry.jsonl"
    lines = [json.dumps({"monotonic_s": t, "gpu": 0, "power_w": t}) for t in (9.5, 10.0, 10.5, 11)]
    path.write_text("\n".join(lines) + '\n{"monotonic_s": 10.9, "gp')  # one is being written
    assert list(gpu_telemetry.within(path, 9.9, 10.9)) == [
        {"t_s": pytest.approx(0.1), "gpu": 0, "power_w": 10.0},
        {"t_s": pytest.approx(0.6), "gpu": 0, "power_w": 10.5},
    ]
    assert list(gpu_telemetry.within(tmp_path / "absent", 0, 1)) == []
