"""How a run can end."""

from pathlib import Path
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


def withdraw(answer: Path) -> None:
    """Takes a run's answer away before it is tried again, and what was derived from it.

    Snakemake takes away the first only; metrics left without it would pass for done.
    """
    answer.unlink(missing_ok=True)
    answer.with_name("metrics.json").unlink(missing_ok=True)
