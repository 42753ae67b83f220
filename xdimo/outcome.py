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
# These are tried again by the same command; the rest when a person says so. A machine that refuses
# a run is one of those of its queue, which may give another.
RETRIED = frozenset({"comm", "crash", "killed", "lost", "unavailable"})


# In an attempt's folder: a metrics.json has named it, or an older attempt, as the run's result.
NAMED = "named"


def mark_named(answer: Path) -> None:
    """Notes, where it outlives metrics.json, that the run's attempts so far have been used.

    A rerun that is asked for finds the same files as one after a kill, but for this.
    """
    for ended in answer.parent.glob("attempts/*/run.json"):
        ended.with_name(NAMED).touch()


def withdraw(answer: Path) -> None:
    """Takes a run's answer away before it is tried again, and what was derived from it.

    Snakemake takes away the first only; metrics left without it would pass for done.
    """
    metrics = answer.with_name("metrics.json")
    if metrics.exists():
        mark_named(answer)
    answer.unlink(missing_ok=True)
    metrics.unlink(missing_ok=True)
