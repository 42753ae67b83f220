"""What became of a job: from what its run wrote, else from what the scheduler says."""

import json
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from xdimo.errors import UserError
from xdimo.files import file_hash, read_json, write_json
from xdimo.outcome import ANSWERS, RETRIED, Outcome
from xdimo.scheduler.dialects import KILLED_CODES, LIMIT_CODES
from xdimo.train import identity
from xdimo.train.launch import place

SCHEMA = 1  # of run.json

# The scheduler's reasons that mean more than "it ended".
_MEANING: dict[str, Outcome] = {
    "TERM_RUNLIMIT": "timeout",
    # All that some versions say of it.
    **dict.fromkeys((f"exit code {code}" for code in KILLED_CODES), "killed"),
    **dict.fromkeys((f"exit code {code}" for code in LIMIT_CODES), "timeout"),
    "TERM_CPULIMIT": "timeout",
    "TERM_DEADLINE": "timeout",
    "TERM_MEMLIMIT": "oom_host",
    "TERM_SWAP": "oom_host",
}


@dataclass(frozen=True)
class Ending:
    outcome: Outcome
    reason: str | None = None

    @property
    def answered(self) -> bool:
        """Whether it is the answer, and stands in the workflow's output."""
        return self.outcome in ANSWERS

    @property
    def retried(self) -> bool:
        return self.outcome in RETRIED

    def __str__(self) -> str:
        return self.outcome + (f" ({self.reason})" if self.reason else "")


def meaning(reason: str | None) -> Outcome | None:
    """What a scheduler's reason says of a run; None where it says nothing."""
    if reason is None:
        return None
    return _MEANING.get(reason, "killed" if reason.startswith("TERM_") else None)


def attempts(run: Path) -> list[Path]:
    """Folders of a run's attempts, the newest first."""
    found = [path for path in run.glob("attempts/*") if path.name.isdigit()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def begun_by(attempt: Path) -> str | None:
    """The job that began it; None where its log does not tell."""
    try:
        with open(attempt / "log.jsonl", encoding="utf-8") as log:
            return str(json.loads(log.readline())["job"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def read(path: Path) -> dict[str, Any] | None:
    """A run.json; None where there is none, or a damaged one."""
    with suppress(UserError, LookupError, TypeError):
        run: dict[str, Any] = read_json(path)
        kinds = {"job": str | None, "reason": str | None, "log": str | None, "attempt": int}
        if run["outcome"] in get_args(Outcome) and all(
            isinstance(run[key], kind) for key, kind in kinds.items()
        ):
            return run
    return None


def damaged(answer: Path) -> list[Path]:
    """The run.json of attempts that are there and cannot be read."""
    paths = (attempt / "run.json" for attempt in attempts(answer.parent))
    return [path for path in paths if path.exists() and read(path) is None]


def of_run(answer: Path, job: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest attempt that ``job`` has ended: its folder and its run.json."""
    for attempt in attempts(answer.parent):
        run = read(attempt / "run.json")
        if run is None and begun_by(attempt) == job:
            return None  # begun anew, and not ended: the job was requeued; or damaged
        if run is not None and run["job"] == job:
            return attempt, run
    return None


def sign_of_life(answer: Path) -> float:
    """When a run last wrote into its log; 0 where there is none."""
    logs = (attempt / "log.jsonl" for attempt in attempts(answer.parent))
    return max((log.stat().st_mtime for log in logs if log.exists()), default=0)


def found(answer: Path, job: str, is_run: bool) -> Ending | None:
    """How ``job`` ended by its own word. Puts the answer in place where it had no time to."""
    if not is_run:
        return Ending("ok") if answer.exists() else None
    attempt = of_run(answer, job)
    if attempt is None:
        return _taken(answer)
    folder, run = attempt
    ending = Ending(run["outcome"], run["reason"])
    if ending.answered and not _stands(answer, run):
        place(answer, folder, run)
    return ending


def _taken(answer: Path) -> Ending | None:
    """The answer, withdrawn when the job was submitted, is there: of an attempt before the job."""
    run = read(answer)
    return None if run is None else Ending(run["outcome"], run["reason"])


def _stands(answer: Path, run: dict[str, Any]) -> bool:
    top = read(answer)
    return top is not None and top["attempt"] == run["attempt"]


def by_scheduler(own: Ending | None, reason: str | None, fallback: Ending) -> Ending:
    """The ending, once the scheduler has been asked.

    A limit that it enforced says more than the launcher's own word, which saw a signal only.
    """
    word = meaning(reason)
    if own is not None and (own.answered or word is None or word == own.outcome):
        return Ending(own.outcome, _both(own.reason, reason))
    if word is not None:
        return Ending(word, _both(own.reason if own else None, reason))
    return fallback


def _both(one: str | None, other: str | None) -> str | None:
    return ", ".join(part for part in (one, other) if part) or None


def record(
    answer: Path, *, run: str, spec: str, ending: Ending, job: str | None, host: str | None
) -> None:
    """Writes an ending that the launcher did not, as an attempt of the run.

    It goes to the attempt that ``job`` ended or had begun, else to a new one.
    """
    folder = _attempt(answer, job, ending)
    path = folder / "run.json"
    log = folder / "log.jsonl"
    known: dict[str, Any] = (read(path) if job is not None else None) or {}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    facts = {
        "schema": SCHEMA,
        "run": run,
        "spec": spec,
        "outcome": ending.outcome,
        "reason": ending.reason,
        "attempt": int(folder.name),
        "job": job,
        "host": host,
        "started": now,
        "ended": now,
        "log": log.name if log.exists() else None,
        "log_sha256": file_hash(log) if log.exists() else None,
        "code": identity.code_identity(),
        "cause": [],
    }
    kept: dict[str, Any] = {
        key: known[key] for key in ("host", "started", "ended", "code", "cause") if key in known
    }
    write_json(path, {**facts, **kept})
    if ending.answered:
        place(answer, folder, {**facts, **kept})


def _attempt(answer: Path, job: str | None, ending: Ending) -> Path:
    if job is not None and (mine := of_run(answer, job)):
        return mine[0]
    newest = next(iter(attempts(answer.parent)), None)
    if newest and _takes(newest, job, ending):
        return newest
    folder = answer.parent / "attempts" / str(1 + int(newest.name) if newest else 1)
    folder.mkdir(parents=True)
    return folder


def _takes(newest: Path, job: str | None, ending: Ending) -> bool:
    """Begun by this job; or the same thing said again, of no job."""
    if not (newest / "run.json").exists():
        return job is not None
    run = read(newest / "run.json")  # a damaged one is left as it is
    return bool(run and job is None and run["job"] is None and run["outcome"] == ending.outcome)
