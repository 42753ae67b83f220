"""How a run ends is a result: outcomes, exit codes, and where they are written."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.conftest import ROOT, spec_of
from xdimo.config.load import load_hardware
from xdimo.config.schema import Bench, Hardware
from xdimo.errors import UserError
from xdimo.files import file_hash, write_json
from xdimo.train import launch as launching

HARDWARE = load_hardware(ROOT / "config/hardware.yaml")


COMMAND = launching._command


def faulty(fault: str) -> Any:
    """As the real command has it, but for what a rank does."""

    def command(*arguments: Any) -> list[str]:
        real, spec_path, folder = COMMAND(*arguments), arguments[1], arguments[-1]
        torchrun = real[: real.index("xdimo") - 1]
        return [*torchrun, str(ROOT / "tests/faulty_rank.py"), fault, str(spec_path), str(folder)]

    return command


def program(text: str) -> Any:
    """In torchrun's place, for what launch itself makes of an end."""
    return lambda *arguments: [sys.executable, "-c", f"import os, sys, time; {text}"]


def launch(
    folder: Path, bench: Bench, cell: str = "cpu_1-bs1", walltime_min: float = 1, tries: int = 1
) -> tuple[int, dict[str, Any]]:
    """Exit code, and the newest attempt's run.json."""
    spec = spec_of(bench, f"{cell}-r1")
    write_json(folder / "spec.json", spec.to_json())
    code = launching.launch(
        folder / "spec.json",
        data=folder / "index.json",
        videos=None,
        vae=None,
        output=folder / "run.json",
        hardware=HARDWARE,
        walltime_min=walltime_min,
        tries=tries,
    )
    newest = max((folder / "attempts").iterdir(), key=lambda path: int(path.name))
    return code, json.loads((newest / "run.json").read_text())


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


# fault, outcome, exit code, the reason begins so
ENDS = [
    ("nan", "nan", 0, "step 7: loss nan"),
    ("data", "data", 0, "shard x.safetensors"),
    ("config", "config", 0, "top_k: the spec says 2"),
    ("comm", "comm", 1, "NCCL error"),
    ("crash", "crash", 1, "deep down"),
    ("sigkill", "killed", 1, "SIGKILL from outside"),
    ("silent", "crash", 1, "exited 0 without the footer"),
]


@pytest.mark.parametrize(("fault", "outcome", "code", "reason"), ENDS, ids=[e[0] for e in ENDS])
def test_outcome(
    fault: str,
    outcome: str,
    code: int,
    reason: str,
    tmp_path: Path,
    small_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "_command", faulty(fault))
    exit_code, run = launch(tmp_path, small_bench)
    assert (exit_code, run["outcome"]) == (code, outcome)
    assert run["reason"].startswith(reason)
    assert len(run["cause"]) <= 40
    # An answer is the run's own run.json; anything else stays with its attempt and is retried.
    assert (tmp_path / "run.json").exists() == (code == 0)


def test_out_of_memory_in_one_rank_ends_all(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_command", faulty("oom"))
    started = time.monotonic()
    code, run = launch(tmp_path, small_bench, "cpu_2-bs1")
    assert (code, run["outcome"]) == (0, "oom")
    assert time.monotonic() - started < 60  # rank 0 would have slept for 120 s
    assert "CUDA out of memory" in run["cause"][-1]
    top = json.loads((tmp_path / "run.json").read_text())
    assert top["log"] == "attempts/1/log.jsonl"
    assert top["log_sha256"] == file_hash(tmp_path / top["log"])
    assert top["spec"] == spec_of(small_bench, "cpu_2-bs1-r1").hash


def test_wall_time_is_a_result(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_command", faulty("hang"))
    code, run = launch(tmp_path, small_bench, walltime_min=0.02)
    assert (code, run["outcome"], run["reason"]) == (0, "timeout", "its wall time is over")


@pytest.mark.parametrize(
    ("number", "outcome", "code"),
    [(signal.SIGUSR2, "timeout", 0), (signal.SIGTERM, "killed", 1)],
)
def test_signals_end_the_run(
    number: signal.Signals, outcome: str, code: int, tmp_path: Path, small_bench: Bench
) -> None:
    process = _hanging(tmp_path, small_bench, "cpu_1-bs1")
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    run = json.loads((tmp_path / "attempts/1/run.json").read_text())
    assert run["outcome"] == outcome
    assert number.name in run["reason"]
    assert not list(_processes_with(str(tmp_path)))  # no rank is left behind


def test_a_killed_launch_leaves_no_rank_behind(tmp_path: Path, small_bench: Bench) -> None:
    process = _hanging(tmp_path, small_bench, "cpu_2-bs1")
    ours = list(_processes_with("faulty_rank.py", str(tmp_path)))
    assert len(ours) == 3  # torchrun, two ranks
    for path in ours:  # they can do nothing themselves any more
        os.kill(int(path.parent.name), signal.SIGSTOP)
    process.kill()
    process.wait(timeout=30)
    deadline = time.monotonic() + 30
    while left := list(_processes_with(str(tmp_path))):
        assert time.monotonic() < deadline, [path.read_text() for path in left]
        time.sleep(0.1)


def test_a_rank_that_will_not_end_is_ended(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_command", faulty("deaf"))
    monkeypatch.setattr(launching, "GRACE_S", 1)
    Thread(target=_warn_once_begun, args=(tmp_path,), daemon=True).start()
    code, run = launch(tmp_path, small_bench, "cpu_2-bs1", walltime_min=2)
    assert (code, run["outcome"], run["reason"][:7]) == (0, "timeout", "SIGUSR2")
    assert not list(_processes_with("faulty_rank.py", str(tmp_path)))


def _warn_once_begun(folder: Path) -> None:
    """As a scheduler warns this process, which launches the run."""
    while not (folder / "attempts/1/log.jsonl").exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGUSR2)


def _hanging(folder: Path, bench: Bench, cell: str) -> "subprocess.Popen[bytes]":
    """`launch` of a run whose ranks have begun and would go on for minutes."""
    write_json(folder / "spec.json", spec_of(bench, f"{cell}-r1").to_json())
    program = f"""
import sys
from pathlib import Path
from tests.test_launch import HARDWARE, faulty
from xdimo.train import launch as launching
launching._command = faulty("hang")
folder = Path({str(folder)!r})
sys.exit(launching.launch(folder / "spec.json", data=folder, videos=None, vae=None,
    output=folder / "run.json", hardware=HARDWARE, walltime_min=2, queued=False))
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    ranks = bench.targets[bench.cells[cell].target].gpus
    begun = [folder / f"attempts/1/begun-{rank}" for rank in range(ranks)]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in begun):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    return process


def _processes_with(*texts: str) -> Any:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text()
            if all(text in line for text in texts) and int(path.parent.name) != os.getpid():
                yield path
        except OSError:
            continue


def test_attempts_are_kept(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_command", faulty("nan"))
    launch(tmp_path, small_bench)
    (tmp_path / "metrics.json").write_text("{}")
    (tmp_path / "run.json").unlink()  # as Snakemake does before it runs the rule again
    launch(tmp_path, small_bench)
    assert sorted(p.name for p in (tmp_path / "attempts").iterdir()) == ["1", "2"]
    assert json.loads((tmp_path / "run.json").read_text())["attempt"] == 2
    assert json.loads((tmp_path / "attempts/1/run.json").read_text())["attempt"] == 1


def test_thread_counts_are_the_specs_alone(
    small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MKL_NUM_THREADS", "8")  # as Snakemake does in a rule of 8 threads
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    monkeypatch.setenv("UNTOUCHED", "yes")
    spec = spec_of(small_bench, "cpu_1-bs1-r1")
    for environment, counts in (
        ({}, {"OMP_NUM_THREADS": "1"}),
        ({"OMP_NUM_THREADS": "3"}, {"OMP_NUM_THREADS": "3"}),
    ):
        child = launching.environment(spec.model_copy(update={"environment": environment}))
        assert {key: child[key] for key in child if key.endswith("_NUM_THREADS")} == counts
        assert child["UNTOUCHED"] == "yes"


def test_missing_or_other_gpus_are_said_before_anything_starts(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = small_bench.targets["cpu_1"].model_copy(
        update={"device": "cuda", "card": "h200", "gpus": 4}
    )
    bench = small_bench.model_copy(update={"targets": {"cpu_1": target}})
    found = json.dumps([["NVIDIA A100", "0123"]] * 2)

    def seen(*arguments: Any, **options: Any) -> Any:
        return subprocess.CompletedProcess(arguments, 0, stdout=found + "\n", stderr="")

    monkeypatch.setattr(launching.subprocess, "run", seen)
    with pytest.raises(
        UserError, match=r"needs 4 x H200 SXM; this machine has 2 GPUs; .*--profile"
    ):
        launch(tmp_path, bench)
    found = json.dumps([["NVIDIA A100", "0123"]] * 4)
    with pytest.raises(UserError, match=r"needs 4 x H200 SXM \(NVIDIA H200\).* has NVIDIA A100"):
        launch(tmp_path, bench)
    assert not (tmp_path / "attempts").exists()
    assert isinstance(HARDWARE, Hardware)


def test_a_new_attempt_withdraws_the_answer_and_what_was_derived_from_it(
    monkeypatch: pytest.MonkeyPatch, small_bench: Bench, tmp_path: Path
) -> None:
    monkeypatch.setattr(launching, "_command", faulty("data"))
    launch(tmp_path, small_bench)
    (tmp_path / "metrics.json").write_text("{}")
    monkeypatch.setattr(launching, "_command", faulty("crash"))
    code, run = launch(tmp_path, small_bench)
    assert (code, run["outcome"]) == (1, "crash")
    assert not (tmp_path / "run.json").exists() and not (tmp_path / "metrics.json").exists()
    assert (tmp_path / "attempts/1/run.json").exists()
