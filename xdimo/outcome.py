"""How a run can end."""

from typing import Literal

Outcome = Literal[
    # said by `launch`
    "ok",
    "oom",
    "nan",
    "timeout",
    "config",
    "data",
    "comm",
    "crash",
    "killed",
    # said by the queue side: the host's memory limit; vanished; refused; no machine in service
    "oom_host",
    "lost",
    "rejected",
    "unavailable",
]

# These are the answer: trying again would give it again.
ANSWERS = frozenset({"ok", "oom", "nan", "timeout", "config", "data", "oom_host"})
# These are tried again by the same command; the rest when a person says so.
RETRIED = frozenset({"comm", "crash", "killed", "lost"})
