"""Which error of a training process means which outcome."""

from xdimo.errors import DataError, UserError
from xdimo.outcome import Outcome

# When several ranks fail, the first of these is the cause: a rank that dies takes the others'
# connections with it, so `comm` comes last of the named ones.
CAUSES = ("oom", "nan", "data", "config", "crash", "comm")

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
_CONNECTION = ("NCCL", "gloo", "Connection closed by peer", "Connection reset by peer")


class LossNotFinite(Exception):
    """The loss or the gradient norm became NaN or infinite."""


def classify(error: BaseException) -> Outcome:
    """The outcome that an exception of the training process stands for."""
    text = str(error)
    if isinstance(error, LossNotFinite):
        return "nan"
    if isinstance(error, DataError):
        return "data"
    if isinstance(error, UserError):
        return "config"
    if isinstance(error, MemoryError):
        return "oom"
    if isinstance(error, RuntimeError):  # torch's errors are RuntimeErrors
        if any(mark in text for mark in _OUT_OF_MEMORY):
            return "oom"
        if type(error).__name__.startswith("Dist") or any(mark in text for mark in _CONNECTION):
            return "comm"
    return "crash"
