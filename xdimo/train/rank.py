"""One rank under torchrun: an error becomes a file that the parent reads."""

import os
import signal
import stat
import sys
import traceback
from pathlib import Path
from threading import Thread
from typing import Any

from xdimo.files import write_json
from xdimo.spec import read_spec
from xdimo.train.failure import classify

LAUNCHED = "XDIMO_LAUNCHED"  # set by launch, whose end of this process's standard input is open
STDIN = 0


def run(spec_path: Path, folder: Path, **arguments: Any) -> None:
    """Trains; on an error leaves ``rank-<n>.error.json`` in ``folder`` and exits 1 at once.

    At once, because an orderly exit would wait for the collectives of the other ranks. Started by
    launch, it ends with it, however launch ends.
    """
    if os.environ.get(LAUNCHED) and stat.S_ISFIFO(os.fstat(STDIN).st_mode):
        Thread(target=_end_with_launch, daemon=True).start()
    try:
        from xdimo.train.loop import train

        train(read_spec(spec_path), folder=folder, **arguments)
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        lines = "".join(traceback.format_exception(error)).splitlines()
        write_json(
            folder / f"rank-{rank}.error.json",
            {
                "outcome": classify(error),
                "reason": first_line(error),
                "traceback": lines,
            },
        )
        print("\n".join(lines), file=sys.stderr, flush=True)
        os._exit(1)


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _end_with_launch() -> None:
    """Else ranks of a launch that was killed would wait for each other and keep their GPUs."""
    while os.read(STDIN, 1):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
