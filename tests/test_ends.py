"""How a run ends, whatever happens to one of its processes; and what an earlier end is good for."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, spec_of
from tests.test_launch import _hanging, _processes_with, faulty, launch, program
from xdimo import files, outcome
from xdimo.analysis import metrics
from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.records import reader
from xdimo.records.rules import findings
from xdimo.train import failure, machine, processes
from xdimo.train import launch as launching

# -- the cause ---------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, ("killed", "SIGKILL from outside, often the host's memory limit: rank 1")),
        (signal.SIGINT, ("killed", "SIGINT from outside: rank 1")),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_a_signal_to_one_of_two_ranks_is_the_cause_and_not_the_lost_connection(
    number: signal.Signals,
    expected: tuple[str, str],
    tmp_path: Path,
    small_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "_command", faulty(str(int(number))))
    code, run = launch(tmp_path, small_bench, "cpu_2-bs1")
    assert (code, run["outcome"]) == (1, expected[0])
    assert run["reason"].startswith(f"{expected[1]} (pid ")
    assert not list(_processes_with(str(tmp_path)))


SAID = """Sending process 877 closing signal SIGTERM
Failures:
[1]:
  rank      : 0 (local_rank: 0)
  exitcode  : {first} (pid: 877)  (SIGTERM)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  rank      : 1 (local_rank: 1)
  exitcode  : {second} (pid: 878)  (SIGKILL)
"""
STOPPED = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 9 got signal: "


@pytest.mark.parametrize(
    ("said", "code", "error", "expected"),
    [
        (SAID.format(first=-15, second=-9), 1, "comm", ("killed", "rank 1 (pid 878)")),
        (SAID.format(first=-15, second=-15), 1, "comm", ("killed", "SIGTERM from outside: rank 1")),
        (SAID.format(first=-15, second=-11), 1, "crash", ("crash", "SIGSEGV in rank 1 (pid 878)")),
        (SAID.format(first=-15, second=-6), 1, "comm", ("crash", "SIGABRT in rank 1 (pid 878)")),
        (SAID.format(first=-15, second=-6), 1, "crash", ("crash", "of rank 0")),
        (SAID.format(first=-15, second=-9), 1, "oom", ("oom", "of rank 0")),
        (SAID.format(first=-15, second=1), 1, "comm", ("comm", "of rank 0")),
        (STOPPED + "15", 1, "comm", ("killed", "SIGTERM from outside: torchrun (pid 9)")),
        (STOPPED + "1", 1, None, ("killed", "SIGHUP from outside: torchrun (pid 9)")),
        ("", -9, None, ("killed", "SIGKILL from outside, often the host's memory limit: torchrun")),
        ("", -11, None, ("crash", "SIGSEGV in torchrun")),
        ("", -50, None, ("killed", "signal 50 from outside: torchrun")),
        ("", 3, None, ("crash", "torchrun exited with 3")),
    ],
)
def test_torchrun_s_word_decides(
    said: str, code: int, error: str | None, expected: tuple[str, str], tmp_path: Path
) -> None:
    if error:
        value = {"outcome": error, "reason": "of rank 0", "traceback": []}
        (tmp_path / "rank-0.error.json").write_text(json.dumps(value))
    found, reason, _ = failure.judge(tmp_path, code, said)
    assert found == expected[0]
    assert reason is not None and expected[1] in reason


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (signal.SIGKILL, ("killed", "SIGKILL from outside, often the host's memory limit")),
        (signal.SIGSEGV, ("crash", "SIGSEGV in")),
    ],
)
def test_a_loader_process_that_a_signal_ended_is_named(
    number: signal.Signals, expected: tuple[str, str]
) -> None:
    import torch
    from torch.utils.data import DataLoader

    class Dies(torch.utils.data.Dataset[int]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, item: int) -> int:
            os.kill(os.getpid(), number)
            return item

    with pytest.raises(RuntimeError) as raised:
        list(DataLoader(Dies(), batch_size=None, num_workers=1))
    found, reason = failure.classify(raised.value)
    assert found == expected[0] and reason.startswith(expected[1]) and "a loader's" in reason


# -- what launch says --------------------------------------------------------------------------


def test_nothing_waits_for_what_launch_prints(tmp_path: Path, small_bench: Bench) -> None:
    """Closed, full, without a reader, and with one that does not read."""
    said = 300_000
    gone, unread = os.pipe(), os.pipe()
    os.close(gone[0])
    launched = {}
    with open("/dev/full", "wb") as full:
        for name, output in {
            "full": full,
            "gone": gone[1],
            "unread": unread[1],
            "closed": None,
        }.items():
            folder = tmp_path / name
            files.write_json(folder / "spec.json", spec_of(small_bench, "cpu_1-bs1-r1").to_json())
            text = f"""
import sys
from pathlib import Path
from tests.test_launch import HARDWARE, program
from xdimo.train import launch as launching
folder = Path({str(folder)!r})
launching._command = program("print('x' * {said}); sys.exit(3)")
sys.exit(launching.launch(folder / "spec.json", data=folder, videos=None, vae=None,
    output=folder / "run.json", hardware=HARDWARE, walltime_min=0.3))
"""
            command = [sys.executable, "-c", text]
            if output is None:
                command = ["sh", "-c", 'exec "$0" "$@" >&-', *command]
            launched[name] = subprocess.Popen(command, stdout=output, cwd=ROOT)
    for name, process in launched.items():
        assert process.wait(timeout=60) == 1
        attempt = tmp_path / name / "attempts/1"
        run = json.loads((attempt / "run.json").read_text())
        assert (run["outcome"], run["reason"]) == ("crash", "torchrun exited with 3")
        assert (attempt / "output.log").stat().st_size == said + 1
    for end in (gone[1], *unread):
        os.close(end)


def test_what_a_rank_says_is_launch_s_output_too(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr(launching, "_command", program("print('first'); print('last')"))
    launch(tmp_path, small_bench)
    lines = capfd.readouterr().out.splitlines()
    assert lines[-3:-1] == ["first", "last"] and "crash" in lines[-1]


# -- nothing of ours is left -------------------------------------------------------------------


def test_a_stopped_rank_is_the_reason_and_does_not_outlive_the_run(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank = [sys.executable, "-c", "import time; time.sleep(60)", str(tmp_path)]
    rank_of = f"subprocess.Popen({rank}, start_new_session=True, env={{**os.environ, 'RANK': '1'}})"
    text = f"import subprocess; rank = {rank_of}; rank.send_signal(19); time.sleep(60)"
    monkeypatch.setattr(launching, "_command", program(text))
    code, run = launch(tmp_path, small_bench, walltime_min=0.02)
    assert (code, run["outcome"]) == (1, "killed")
    assert "SIGSTOP" in run["reason"] and "rank 1 (pid " in run["reason"]
    assert not list(_processes_with(str(tmp_path)))


def whole(then: str) -> Any:
    """In torchrun's place: a log that is whole, then ``then``."""

    def command(*arguments: Any) -> list[str]:
        write = (
            f"open({str(arguments[-1] / 'log.jsonl')!r}, 'w').write('{{\"event\": \"footer\"}}')"
        )
        return list(program(f"import signal; {write}; {then}")(*arguments))

    return command


@pytest.mark.parametrize(
    ("then", "walltime_min"),
    [
        ("os.kill(os.getppid(), signal.SIGTERM); time.sleep(1)", 1),
        ("os.kill(os.getppid(), signal.SIGUSR2); time.sleep(1)", 1),
        ("time.sleep(4)", 0.05),  # three seconds, for a program that starts on a busy machine
    ],
    ids=["SIGTERM", "SIGUSR2", "wall time"],
)
def test_a_run_that_is_whole_is_kept_whoever_wants_its_end(
    then: str,
    walltime_min: float,
    tmp_path: Path,
    small_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launching, "_command", whole(then))
    code, run = launch(tmp_path, small_bench, walltime_min=walltime_min)
    assert (code, run["outcome"], run["reason"]) == (0, "ok", None)


def test_one_that_is_whole_and_does_not_end_is_ended(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "GRACE_S", 0.5)
    monkeypatch.setattr(launching, "_command", whole("time.sleep(60)"))
    code, run = launch(tmp_path, small_bench, walltime_min=0.01)
    assert (code, run["outcome"], run["reason"]) == (0, "timeout", "its wall time is over")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("require_devices", ("killed", "SIGTERM, before it began")),
        ("require_shared_memory", ("killed", "SIGTERM, before it began")),
        ("judge", ("crash", "torchrun exited with 3")),
        ("_write", ("crash", "torchrun exited with 3")),
    ],
)
def test_a_signal_outside_the_group_ends_no_launch_without_its_answer(
    where: str,
    expected: tuple[str, str],
    tmp_path: Path,
    small_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = getattr(launching, where)

    def signalled(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    monkeypatch.setattr(launching, where, signalled)
    monkeypatch.setattr(launching, "_command", program("sys.exit(3)"))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        code, run = launch(tmp_path, small_bench, tries=3)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (code, run["outcome"], run["reason"]) == (1, *expected)
    assert _numbers(tmp_path) == ["1"]  # somebody wants an end: it is not tried again


def test_a_probe_that_a_signal_ends_is_no_machine_without_gpus(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def probe(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        raise UserError("torch cannot list this machine's GPUs")

    monkeypatch.setattr(launching, "require_devices", probe)
    code, run = launch(tmp_path, small_bench)
    assert (code, run["outcome"], run["reason"]) == (1, "killed", "SIGINT, before it began")


def test_what_goes_wrong_beside_the_group_leaves_no_rank(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stumble(*arguments: Any) -> None:
        raise MemoryError

    text = f"time.sleep(60); {str(tmp_path)!r}"
    monkeypatch.setattr(launching, "_command", program(text))
    monkeypatch.setattr(launching._Group, "_wait", stumble)
    with pytest.raises(MemoryError):
        launch(tmp_path, small_bench)
    assert not list(_processes_with(str(tmp_path)))


@pytest.mark.parametrize(
    "number",
    [
        *(signal.SIGUSR1, signal.SIGQUIT, signal.SIGXCPU),
        *(signal.SIGPROF, signal.SIGVTALRM, signal.SIGPWR, signal.SIGIO),
    ],
)
def test_signals_that_would_end_launch_without_a_word(
    number: signal.Signals,
    tmp_path: Path,
    small_bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        launching, "_command", program(f"os.kill(os.getppid(), {int(number)}); time.sleep(60)")
    )
    before = signal.signal(number, signal.SIG_IGN)  # 7fdcbf1 must not take the tests with it
    try:
        code, run = launch(tmp_path, small_bench, walltime_min=0.1)
    finally:
        signal.signal(number, before)
    assert (code, run["outcome"], run["reason"]) == (1, "killed", number.name)


def test_what_cannot_be_killed_is_named_with_its_pid(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    word = "a word of its own"
    child = subprocess.Popen(["sleep", "60"], env={"RANK": "1", "XDIMO_LAUNCHED": word})
    try:
        monkeypatch.setattr(processes.os, "kill", lambda pid, number: None)
        while not processes.members(word):  # exec is under way
            time.sleep(0.01)
        left = processes.end_all(word, 0.1)
        assert left == [f"rank 1 (pid {child.pid})"]
        monkeypatch.undo()
        assert processes.end_all(word, 10) == []
    finally:
        child.kill()
        child.wait()

    monkeypatch.setattr(launching, "_command", program("sys.exit(3)"))
    monkeypatch.setattr(processes, "end_all", lambda word, wait_s: left)
    _, run = launch(tmp_path, small_bench)
    assert run["reason"].endswith(f"cannot be killed, and still there: {left[0]}")


# -- what a run does not need ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["another's PET_NNODES", "an unknown host name", "a long TMPDIR"])
def test_a_run_of_two_ranks_meets(
    place: str, tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place.endswith("TMPDIR"):
        folder = tmp_path / ("x" * 80)
        folder.mkdir()
        monkeypatch.setenv("TMPDIR", str(folder))
    elif place.endswith("name"):
        text = "import socket\nsocket.getfqdn = socket.gethostname = lambda *a: 'no.such.invalid'\n"
        (tmp_path / "sitecustomize.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    else:
        monkeypatch.setenv("PET_NNODES", "2")
    monkeypatch.setattr(launching, "_command", faulty("met"))
    code, run = launch(tmp_path, small_bench, "cpu_2-bs1", walltime_min=0.7)
    assert (code, run["outcome"], run["reason"]) == (0, "nan", "met")


def test_a_rank_s_environment_loses_a_short_list_and_keeps_the_rest(
    small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = [
        "PET_NNODES PET_RDZV_BACKEND GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE MPLBACKEND RANK LOGLEVEL",
        "LOCAL_RANK GROUP_RANK ROLE_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_NAME",
        "ROLE_WORLD_SIZE MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID MKL_NUM_THREADS",
    ]
    kept = [
        "NCCL_DEBUG NCCL_SOCKET_IFNAME NCCL_IB_HCA TORCH_NCCL_BLOCKING_WAIT TORCH_HOME TORCH_LOGS",
        "TORCH_DISTRIBUTED_DEBUG NVSHMEM_HCA_LIST LD_LIBRARY_PATH CUDA_HOME CUDA_VISIBLE_DEVICES",
        "LOADEDMODULES _LMFILES_ MODULEPATH LMOD_CMD BASH_FUNC_module%% UCX_TLS GLOO_SOCKET_IFNAME",
        "TRITON_CACHE_DIR PYTORCH_CUDA_ALLOC_CONF LSB_JOBID SLURM_NNODES TMPDIR HOME GITHUB_TOKEN",
    ]
    for name in " ".join(lost + kept).split():
        monkeypatch.setenv(name, "site's")
    child = launching.environment(spec_of(small_bench, "cpu_1-bs1-r1"))
    assert not set(" ".join(lost).split()) & child.keys()
    assert {child.get(name) for name in " ".join(kept).split()} == {"site's"}


def test_too_little_shared_memory_is_said_before_anything_starts(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = small_bench.train.model_copy(update={"workers": 2})
    bench = small_bench.model_copy(update={"train": train})
    # Two ranks of five batches under way, each of 4 frames of 4 x 8 x 8, mean and std, 2 bytes.
    needed = 2 * 5 * 4 * 4 * 8 * 8 * 2 * 2
    monkeypatch.setattr(machine, "shared_memory_bytes", lambda: needed - 1)
    with pytest.raises(UserError, match=r"/dev/shm: 0.0 MiB free; the 2 loaders of each of 2 "):
        launch(tmp_path, bench, "cpu_2-bs1")
    assert not (tmp_path / "attempts").exists()
    machine.require_shared_memory(spec_of(small_bench, "cpu_2-bs1-r1"))  # which has no loaders
    monkeypatch.setattr(machine, "shared_memory_bytes", lambda: needed)
    machine.require_shared_memory(spec_of(bench, "cpu_2-bs1-r1"))


def test_shared_memory_that_others_fill_is_named_and_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(failure, "shared_memory_bytes", lambda: 4096)
    found, reason = failure.classify(full)
    assert found == "config" and reason.startswith("/dev/shm is full (4096 bytes free): [Errno 28]")
    monkeypatch.setattr(failure, "shared_memory_bytes", lambda: 1 << 30)
    assert failure.classify(full) == ("crash", "[Errno 28] No space left on device")


TORCH_SAYS = [
    "unable to write to file </torch_813_206_0>: No space left on device (28)",
    "unable to allocate shared memory(shm) for file </torch_9_2>: No space left on device (28)",
    "DataLoader worker (pid 812) is killed by signal: Bus error. It is possible that dataloader's "
    "workers are out of shared memory. Please try to raise your shared memory limit.",
]


@pytest.mark.parametrize("says", TORCH_SAYS, ids=["write", "allocate", "bus error"])
def test_shared_memory_that_was_full_is_an_answer_though_it_is_free_again(says: str) -> None:
    error = RuntimeError(says)
    assert failure.classify(error) == ("config", f"/dev/shm was full: {says}; {machine.MORE_SHM}")
    lost = RuntimeError("DataLoader worker (pid(s) 812) exited unexpectedly")
    lost.__cause__ = error
    assert failure.classify(lost)[0] == "config"


def test_a_clock_that_is_set_back_refuses_no_record(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "_command", program("sys.exit(3)"))
    real, now = time.gmtime, [time.time()]

    def hour_before() -> float:
        now[0] -= 3600
        return now[0]

    monkeypatch.setattr(time, "time", hour_before)
    monkeypatch.setattr(time, "gmtime", lambda s=None: real(hour_before() if s is None else s))
    launch(tmp_path, small_bench)
    case, _ = reader._case(tmp_path)
    assert not list(findings(case))


# -- tried again, or once ----------------------------------------------------------------------


def test_a_crash_is_tried_again_and_what_somebody_ends_is_not(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outcomes(folder: Path, text: str) -> list[str]:
        monkeypatch.setattr(launching, "_command", program(text))
        launch(folder, small_bench, tries=3)
        ended = sorted((folder / "attempts").glob("*/run.json"))
        return [json.loads(path.read_text())["outcome"] for path in ended]

    assert outcomes(tmp_path / "crash", "sys.exit(3)") == ["crash"] * 3
    assert outcomes(tmp_path / "end", "os.kill(os.getppid(), 15); time.sleep(60)") == ["killed"]


def test_a_machine_that_refuses_tells_its_queue_why(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> Any:
        raise UserError("this machine has 0 GPUs")

    monkeypatch.setattr(launching, "require_devices", refuse)
    monkeypatch.setenv("LSB_JOBID", "17")
    with pytest.raises(UserError):
        launch(tmp_path, small_bench)
    run = json.loads((tmp_path / "attempts/1/run.json").read_text())
    assert (run["outcome"], run["reason"]) == ("unavailable", "this machine has 0 GPUs")
    assert "unavailable" in outcome.RETRIED and not (tmp_path / "run.json").exists()


# -- an end that nobody has used ---------------------------------------------------------------


def _measured(folder: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that ended with an answer; run.json taken away, as before a job."""
    monkeypatch.setattr(launching, "_command", program("sys.exit(3)"))
    monkeypatch.setattr(launching, "judge", lambda *arguments: ("nan", "step 7", []))
    assert launch(folder, bench)[0] == 0
    (folder / "run.json").unlink()


def _numbers(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "attempts").iterdir())


def test_after_a_kill_the_attempt_that_ended_is_taken(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    _measured(tmp_path, small_bench, monkeypatch)
    assert launch(tmp_path, small_bench)[0] == 0
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["outcome"], run["attempt"]) == ("nan", 1) and _numbers(tmp_path) == ["1"]
    assert "attempts/1" in capfd.readouterr().out


@pytest.mark.parametrize("named", ["metrics", "metrics that are gone", "metrics of older versions"])
def test_one_that_metrics_have_named_is_measured_again(
    named: str, tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(tmp_path, small_bench, monkeypatch)
    if named.endswith("versions"):
        (tmp_path / "metrics.json").write_text('{"attempt": 1}')
    else:
        shutil.copy(tmp_path / "attempts/1/run.json", tmp_path / "run.json")
        metrics.write(
            tmp_path / "run.json", launching.Hardware(cards={}), tmp_path / "metrics.json"
        )
        (tmp_path / "run.json").unlink()
        if named.endswith("gone"):
            (tmp_path / "metrics.json").unlink()
    monkeypatch.setattr(launching, "judge", lambda *arguments: ("crash", "at once", []))
    assert launch(tmp_path, small_bench)[0] == 1  # -R, and it crashes
    assert launch(tmp_path, small_bench)[0] == 1  # the same command without -R
    assert _numbers(tmp_path) == ["1", "2", "3"] and not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("change", ["spec", "outcome", "damage", "newer"])
def test_only_the_newest_answer_of_this_spec_is_taken(
    change: str, tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _measured(tmp_path, small_bench, monkeypatch)
    path = tmp_path / "attempts/1/run.json"
    run = json.loads(path.read_text())
    if change == "damage":
        path.write_text(path.read_text()[:100])
    elif change == "newer":
        (tmp_path / "attempts/2").mkdir()
    else:
        path.write_text(json.dumps({**run, change: "crash"}))
    launch(tmp_path, small_bench)
    assert len(_numbers(tmp_path)) == (3 if change == "newer" else 2)


# -- locks -------------------------------------------------------------------------------------


def test_a_second_launch_of_a_run_is_refused_and_of_a_machine_waits(
    tmp_path: Path, small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDIMO_LOCKS", str(tmp_path / "locks"))
    process = _hanging(tmp_path, small_bench, "cpu_1-bs1")
    try:
        holder = f"cpu_1-bs1-r1, process {process.pid} on {socket.gethostname()} since "
        with pytest.raises(UserError, match=holder):
            launch(tmp_path, small_bench)
        assert _numbers(tmp_path) == ["1"]
        other = tmp_path / "other"
        files.write_json(other / "spec.json", spec_of(small_bench, "cpu_1-bs2-r1").to_json())
        command = [sys.executable, "-m", "xdimo", "launch", str(other / "spec.json")]
        command += ["--data", str(tmp_path), "--output", str(other / "run.json")]
        waiting = subprocess.Popen(
            [*command, "--hardware", str(ROOT / "config/hardware.yaml")],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout is not None
        assert waiting.stdout.readline().startswith(f"waiting for {holder}")
        assert not (other / "attempts").exists()
        waiting.terminate()
        waiting.communicate()
    finally:
        process.terminate()
        process.wait()
