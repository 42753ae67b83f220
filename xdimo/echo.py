"""Standard output that may be closed, full or read by nobody: what is said there holds nothing up.

Written past Python's own buffer: a thread that is blocked in it would hold its lock to the end.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

WAIT_S = 3  # for a reader that is slow; for one that does not read, no longer
PERIOD_S = 0.1


def say(text: str) -> None:
    """Prints a line, where standard output takes it."""
    thread = Thread(target=_say, args=(f"{text}\n".encode(errors="replace"),), daemon=True)
    thread.start()
    thread.join(timeout=WAIT_S)


@contextmanager
def following(path: Path) -> Iterator[None]:
    """While inside, what is added to ``path`` is printed too, until standard output fails."""
    over = Event()
    thread = Thread(target=_follow, args=(path, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=WAIT_S)


def _say(line: bytes) -> None:
    with suppress(OSError, ValueError):
        _write(line)


def _follow(path: Path, over: Event) -> None:
    with suppress(OSError, ValueError), open(path, "rb") as file:
        ended = False
        while not ended:
            ended = over.wait(PERIOD_S)  # what was added before is still printed
            while chunk := file.read(1 << 16):
                _write(chunk)


def _write(data: bytes) -> None:
    """Raises OSError, or ValueError where standard output was closed by this process."""
    if sys.stdout is None:  # closed before it began; its number may be another file's now
        return
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]
