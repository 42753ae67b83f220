"""Why a run failed: errors of its ranks, signals that torchrun saw, and which is the cause."""

import errno
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

from xdimo.errors import DataError, UserError
from xdimo.files import read_json
from xdimo.outcome import Outcome
from xdimo.train.machine import MORE_SHM, SHM, shared_memory_bytes

# When several ranks fail, the first of these is the cause: a rank that dies takes the others'
# connections with it, so `comm` comes last of the named ones.
CAUSES = ("oom", "nan", "data", "config", "killed", "crash", "comm")
CAUSE_LINES = 40

SHM_FULL_BYTES = 1 << 20  # less than this free is none

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
_CONNECTION = ("NCCL", "gloo", "Connection closed by peer", "Connection reset by peer")
# torch's words for a batch that found no room there
_SHM_FULL = re.compile(rf"</torch_[^>]*>.*{os.strerror(errno.ENOSPC)}|out of shared memory")
_LOADER = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]+)\.")
_NUMBERS = {signal.strsignal(number): int(number) for number in signal.Signals}
# Signals that a process raises by its own mistake; any other was sent.
_FAULTS = {
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGILL,
    signal.SIGFPE,
    signal.SIGSYS,
    signal.SIGTRAP,
    signal.SIGABRT,
}
_RANK_DIED = re.compile(r"rank +: (\d+) \(local_rank: \d+\)\s+exitcode +: -(\d+) \(pid: (\d+)\)")
_ENDED_BY_TORCHRUN = re.compile(r"Sending process (\d+) closing signal")
_TORCHRUN_ENDED = re.compile(r"SignalException: Process (\d+) got signal: (\d+)")


class LossNotFinite(Exception):
    """The loss or the gradient norm became NaN or infinite."""


def classify(error: BaseException) -> tuple[Outcome, str]:
    """The outcome that an exception of the training process stands for, and the reason to give."""
    text, reason = str(error), first_line(error)
    if isinstance(error, LossNotFinite):
        return "nan", reason
    if isinstance(error, DataError):
        return "data", reason
    if isinstance(error, UserError):
        return "config", reason
    if isinstance(error, MemoryError):
        return "oom", reason
    if _SHM_FULL.search(f"{text} {error.__cause__}"):  # and free again since its process ended
        return "config", f"{SHM} was full: {reason}; {MORE_SHM}"
    if os.strerror(errno.ENOSPC) in text and (free := shared_memory_bytes()) < SHM_FULL_BYTES:
        return "config", f"{SHM} is full ({free} bytes free): {reason}; {MORE_SHM}"
    if isinstance(error, RuntimeError):  # torch's errors are RuntimeErrors
        if any(mark in text for mark in _OUT_OF_MEMORY):
            return "oom", reason
        if loader := _LOADER.search(f"{text} {error.__cause__}"):
            return of_signal(_NUMBERS.get(loader[2], 0), f"a loader's process (pid {loader[1]})")
        if type(error).__name__.startswith("Dist") or any(mark in text for mark in _CONNECTION):
            return "comm", reason
    return "crash", reason


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def of_signal(number: int, whom: str) -> tuple[Outcome, str]:
    """What it means that a signal ended ``whom``."""
    name = signal.Signals(number).name if number in _NUMBERS.values() else f"signal {number}"
    if number in _FAULTS:
        return "crash", f"{name} in {whom}"
    often = ", often the host's memory limit" if number == signal.SIGKILL else ""
    return "killed", f"{name} from outside{often}: {whom}"


def judge(folder: Path, code: int, said: str) -> tuple[Outcome, str | None, list[str]]:
    """Outcome, reason and last lines of the cause, of an attempt that ended by itself.

    ``code``: torchrun's exit code; ``said``: what it and the ranks wrote. Torchrun's own word
    decides which rank a signal ended: the others only lose their connections.
    """
    tail = [line for line in said.splitlines() if line.strip()][-CAUSE_LINES:]
    # An abort comes after errors with words: a rank that lost another may end so too.
    causes = [(*ended, tail, "SIGABRT" in ended[1]) for ended in _signalled(code, said)]
    for path in sorted(folder.glob("rank-*.error.json")):
        error = read_json(path)
        lines = error["traceback"][-CAUSE_LINES:]
        causes.append((error["outcome"], error["reason"], lines, False))
    if causes:
        outcome, reason, lines, _ = min(causes, key=lambda c: (CAUSES.index(c[0]), c[3]))
        return outcome, reason, lines
    if code != 0:
        return "crash", f"torchrun exited with {code}", tail
    if not complete(folder / "log.jsonl"):
        return "crash", "exited 0 without the footer of its log", tail
    return "ok", None, []


def _signalled(code: int, said: str) -> Iterator[tuple[Outcome, str]]:
    """What signals ended torchrun, or ranks that it did not end itself."""
    if code < 0:
        yield of_signal(-code, "torchrun")
    for pid, number in _TORCHRUN_ENDED.findall(said):
        yield of_signal(int(number), f"torchrun (pid {pid})")
    ended = set(_ENDED_BY_TORCHRUN.findall(said))
    for rank, number, pid in _RANK_DIED.findall(said):
        if pid not in ended:
            yield of_signal(int(number), f"rank {rank} (pid {pid})")


def complete(log: Path) -> bool:
    """Whether a run has written its log to the end."""
    try:
        *_, last = log.read_text(encoding="utf-8").splitlines()
        return bool(json.loads(last)["event"] == "footer")
    except (OSError, ValueError, KeyError):
        return False
