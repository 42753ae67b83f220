"""Which job stands for which work: one folder a submission, written before and after it.

<folder>/lock                    who holds the ledger
<folder>/<work>/<n>/job.json     one submission; job.sh, output.log, error.log beside it
"""

import fcntl
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from xdimo.errors import UserError
from xdimo.files import read_json, write_json

SCHEMA = 1
CANCELLED = "cancelled"  # beside job.json: somebody has asked for its end

# submitting: the command may or may not have reached the scheduler. submitted: it has an id.
# refused: it has not run and will not. closed: its end has reached the workflow.
Stage = Literal["submitting", "submitted", "refused", "closed"]


@dataclass(frozen=True)
class Entry:
    """One submission."""

    work: str  # name of a run, or of a rule
    content: str  # hash of what it does
    number: int  # 1 = the work's first submission
    target: str
    cards: int
    alone: bool
    token: str  # makes the job's name this submission's alone, whoever else runs the same spec
    folder: Path
    stage: Stage
    job: str | None
    since: float  # of the stage, seconds of the epoch
    outcome: str | None = None
    reason: str | None = None

    @property
    def open(self) -> bool:
        return self.stage in ("submitting", "submitted")

    @property
    def job_name(self) -> str:
        """Unique, and telling in a list of jobs."""
        return f"{self.work}.{self.number}.{self.token}"

    @property
    def label(self) -> str:
        """The job as people are told of it."""
        return f"job {self.job}" if self.job else f"job named {self.job_name}, id not known yet"

    @property
    def cancelled(self) -> bool:
        return (self.folder / CANCELLED).exists()


class Ledger:
    """All submissions below ``folder``. Writing needs `hold`; each entry is written whole."""

    def __init__(self, folder: Path) -> None:
        # Absolute: jobs run elsewhere.
        self.folder = Path(os.path.abspath(folder))
        self._lock: int | None = None

    def hold(self, wait_s: float = 0) -> int:
        """Takes the lock, and returns its descriptor; it is free when all copies are closed.

        A holder that died may have left a submission running, which holds it too: that one is
        waited for. Raises UserError that names a holder who is alive.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                holder = self.holder()
                if holder is None or _alive(holder) or time.monotonic() > deadline:
                    os.close(lock)
                    raise UserError(
                        f"{self.folder / 'lock'}: held by {_said(holder)}; one Snakemake at a time "
                        "submits for a folder of results"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                os.close(lock)
                raise UserError(f"{self.folder / 'lock'}: cannot lock: {error.strerror}") from None
        who = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        os.ftruncate(lock, 0)
        os.pwrite(lock, json.dumps(who).encode(), 0)
        self._lock = lock
        return lock

    def release(self) -> None:
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    def holder(self) -> dict[str, Any] | None:
        """Host, pid and time of whoever holds or held the lock; None where nobody says so."""
        try:
            return dict(json.loads((self.folder / "lock").read_text()))
        except (OSError, ValueError):
            return None

    def held(self) -> bool:
        """Whether a living process holds the lock, as far as can be told without taking it."""
        holder = self.holder()
        return holder is not None and _alive(holder)

    def entries(self) -> list[Entry]:
        """The newest submission of each work, in order of their time."""
        newest = [self.newest(path.name) for path in self.folder.glob("*/") if path.is_dir()]
        return sorted((entry for entry in newest if entry), key=lambda entry: entry.since)

    def by_job(self) -> dict[str, Entry]:
        """All submissions that have an id, the newest of each."""
        entries = []
        for path in self.folder.glob("*/*/job.json"):
            with suppress(UserError):  # of another version: its jobs are long gone
                entries.append(_read(path))
        entries.sort(key=lambda entry: entry.since)
        return {entry.job: entry for entry in entries if entry.job}

    def newest(self, work: str) -> Entry | None:
        for number in range(self._last(work), 0, -1):
            path = self.folder / work / str(number) / "job.json"
            if path.exists():
                return _read(path)
        return None

    def begin(self, work: str, content: str, target: str, cards: int, alone: bool) -> Entry:
        """A new submission, not yet made, with its folder."""
        number = self._last(work) + 1
        folder = self.folder / work / str(number)
        folder.mkdir(parents=True)
        entry = Entry(
            work=work,
            content=content,
            number=number,
            target=target,
            cards=cards,
            alone=alone,
            token=secrets.token_hex(3),
            folder=folder,
            stage="submitting",
            job=None,
            since=time.time(),
        )
        self.write(entry)
        return entry

    def change(self, entry: Entry, **changes: Any) -> Entry:
        if "stage" in changes and changes["stage"] != entry.stage:
            changes["since"] = time.time()
        entry = replace(entry, **changes)
        self.write(entry)
        return entry

    def write(self, entry: Entry) -> None:
        value = {"schema": SCHEMA, **asdict(entry)}
        del value["folder"]
        write_json(entry.folder / "job.json", value)

    def _last(self, work: str) -> int:
        folder = self.folder / work
        numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        return max(numbers, default=0)


def _read(path: Path) -> Entry:
    value = read_json(path)
    try:
        if value.pop("schema") != SCHEMA:
            raise UserError(f"{path}: of another version of xdimo")
        return Entry(folder=path.parent, **value)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a submission ({error})") from None


def _alive(holder: dict[str, Any]) -> bool:
    """On another host it counts as alive: it cannot be asked."""
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _said(holder: dict[str, Any] | None) -> str:
    if holder is None:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('since')}"
