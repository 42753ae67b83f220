"""One rank under torchrun: an error becomes a file that the parent reads."""

import ctypes
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from xdimo.files import shorten_sockets, write_json
from xdimo.spec import read_spec
from xdimo.train.failure import classify

LAUNCHED = "XDIMO_LAUNCHED"  # set by launch to a word of its own, in every process of the run
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(spec_path: Path, folder: Path, **arguments: Any) -> None:
    """Trains; on an error leaves ``rank-<n>.error.json`` in ``folder`` and exits 1 at once.

    At once, because an orderly exit would wait for the collectives of the other ranks. Started by
    launch, it ends with it, however launch ends.
    """
    if word := os.environ.get(LAUNCHED):
        end_with_parent()
        _require_parent(word)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a KeyboardInterrupt's exit would be orderly
    try:
        shorten_sockets()
        from xdimo.train.loop import train

        train(read_spec(spec_path), folder=folder, **arguments)
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        lines = "".join(traceback.format_exception(error)).splitlines()
        outcome, reason = classify(error)
        write_json(
            folder / f"rank-{rank}.error.json",
            {"outcome": outcome, "reason": reason, "traceback": lines},
        )
        print("\n".join(lines), file=sys.stderr, flush=True)
        os._exit(1)


def end_with_parent() -> None:
    """From now on the kernel kills this process when its parent dies, even if it is stopped.

    Else ranks of a launch that was killed would wait for each other and keep their GPUs.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _require_parent(word: str) -> None:
    """Ends this process where torchrun died before it could be followed."""
    try:
        alive = word.encode() in Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        alive = False
    if not alive:
        os.kill(os.getpid(), signal.SIGKILL)
