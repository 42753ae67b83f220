"""A call in a process of its own, with a time limit: native code may hang or crash there."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from threading import Lock
from typing import Any

from xdimo.errors import UserError
from xdimo.files import shorten_sockets

# A clean server forks the children: no thread or lock of this process is copied into them.
_CONTEXT = multiprocessing.get_context("forkserver")
_STARTING = Lock()


class ChildFailed(Exception):
    """The child gave no answer; the message says how it ended."""


def preload(modules: list[str]) -> None:
    """Modules that children find imported. No effect once the first child has run."""
    _CONTEXT.set_forkserver_preload(modules)


def guarded(function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
    """``function(*arguments)`` from a child process; all of them must pickle.

    Raises what the function raised, ChildFailed after ``timeout_s`` seconds or a crash, or
    UserError where no child can be started: that says nothing of what it was to look at.
    """
    child, ours = _started(timeout_s, function, arguments)
    try:
        if not ours.poll(timeout_s):
            raise ChildFailed(f"no answer within {timeout_s:g} s")
        ok, value = ours.recv()
    except EOFError:
        child.join()
        raise ChildFailed(_ending(child.exitcode)) from None
    finally:
        child.kill()
        child.join()
        ours.close()
    if not ok:
        raise value
    return value


def _started(timeout_s: float, *call: Any) -> tuple[ForkServerProcess, Connection]:
    try:
        with _STARTING:
            shorten_sockets()
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            child = _CONTEXT.Process(target=_answer, args=(theirs, timeout_s, *call), daemon=True)
            child.start()
    except (OSError, EOFError) as error:
        raise UserError(f"cannot start a child process: {error or 'its server ended'}") from None
    theirs.close()
    return child, ours


def _answer(
    pipe: Connection, timeout_s: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    # If the parent is gone, nobody kills a child that hangs: the kernel then ends it by this alarm,
    # even where native code holds the interpreter's lock.
    signal.setitimer(signal.ITIMER_REAL, timeout_s + 5)
    # Native libraries write their complaints here; what matters comes back through the pipe.
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        answer = (True, function(*arguments))
    except Exception as error:
        answer = (False, error)
    pipe.send(answer)


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"the decoder crashed ({signal.Signals(-exitcode).name})"
    return f"the decoder's process ended (exit code {exitcode})"
