"""The processes of one run, found by the word that launch put into their environment."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def members(word: str) -> dict[int, str]:
    """Living processes of the run: pid, and whose it is."""
    found = {}
    for process in PROC.glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if any(value.endswith(word.encode()) for value in environment):
            rank = next((v[5:].decode() for v in environment if v.startswith(b"RANK=")), None)
            found[int(process.name)] = "torchrun" if rank is None else f"rank {rank}"
    return found


def stopped(word: str) -> list[str]:
    """Those that a signal has stopped, in words."""
    return [f"{whose} (pid {pid})" for pid, whose in members(word).items() if _state(pid) in "tT"]


def end_all(word: str, wait_s: float) -> list[str]:
    """Kills every process of the run. Returns those still there after ``wait_s``, in words."""
    known: dict[int, str] = {}
    deadline = time.monotonic() + wait_s
    while True:
        known |= members(word)  # one that is dying has no environment any more
        known = {pid: whose for pid, whose in known.items() if _state(pid) not in "ZX"}
        if not known or time.monotonic() > deadline:
            return [f"{whose} (pid {pid})" for pid, whose in known.items()]
        for pid in known:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _state(pid: int) -> str:
    """The letter of proc(5): T stopped, Z dead and not waited for; X where it is gone."""
    try:
        stat = (PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "X"
    return stat.rpartition(")")[2].split()[0]
