"""`xdimo status`: where each run stands, from the ledger, the records and one status command."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from xdimo.config.schema import Bench
from xdimo.files import read_json
from xdimo.scheduler.controller_files import Board
from xdimo.scheduler.dialects import Job
from xdimo.scheduler.job_outcome import attempts, begun_by, read
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import Entry, Ledger


@dataclass(frozen=True)
class Line:
    run: str
    state: str
    note: str

    def __str__(self) -> str:
        return f"{self.run:24} {self.state:11} {self.note}".rstrip()


def lines(bench: Bench, site: Site) -> list[Line]:
    """One a run, and one a job of another kind; nothing is written."""
    ledger = Ledger(Path(bench.queue_folder))
    entries = {entry.work: entry for entry in ledger.entries()}
    waiting = Board(ledger.folder).shown() if ledger.held() else {}
    jobs: Mapping[str, Job] | None
    try:
        jobs, silence = site.jobs(), None
    except Silent as silent:
        jobs, silence = None, str(silent)
    runs = bench.runs(bench.cells)
    others = [name for name, entry in entries.items() if name not in runs and entry.open]
    reasons = _reasons(site) if jobs and any(j.state == "pending" for j in jobs.values()) else {}
    found = [Line("the scheduler", "silent", silence)] if silence else []
    for run in [*others, *runs]:
        entry = entries.get(run)
        cell = bench.cells.get(run.rpartition("-r")[0])
        folder = Path(bench.runs_folder) / run
        if entry is not None and entry.open and entry.outcome is None:
            found.append(_in_queue(entry, jobs, silence, reasons, folder))
        elif run in waiting:
            found.append(Line(run, "waiting", waiting[run]))
        elif cell and not bench.targets[cell.target].enabled:
            found.append(Line(run, "disabled", bench.targets[cell.target].reason or ""))
        else:
            found.append(_ended(run, folder))
    return found


def _in_queue(
    entry: Entry,
    jobs: Mapping[str, Job] | None,
    silence: str | None,
    reasons: Mapping[str, str],
    folder: Path,
) -> Line:
    if entry.job is None:
        return Line(entry.work, "submitting", entry.job_name)
    name = f"job {entry.job}"
    if jobs is None:
        return Line(entry.work, "submitted", f"{name}; {silence}")
    job = jobs.get(entry.job)
    if job is None or not job.alive:
        return Line(entry.work, "over", f"{name}, not yet looked at by a controller")
    if job.state == "pending":
        return Line(entry.work, "pending", "; ".join([name, *_one(reasons.get(entry.job))]))
    logs = [attempt for attempt in attempts(folder) if (attempt / "log.jsonl").exists()]
    notes = [name, f"on {job.host or '?'}"]
    if logs and begun_by(logs[0]) == entry.job:  # else it is of an attempt before
        notes += _progress(folder)
    return Line(entry.work, job.state, ", ".join(notes))


def _one(text: str | None) -> list[str]:
    return [text] if text else []


def _reasons(site: Site) -> dict[str, str]:
    """Why jobs are pending, in the scheduler's words: the line below each job's own."""
    try:
        answer = site.ask(site.dialect.pending_command()).text
    except Silent:
        return {}
    reasons: dict[str, str] = {}
    job = None
    for line in answer.splitlines():
        if found := re.match(r"(\d+)\s", line):
            job = found[1]
        elif job and line[:1].isspace() and line.strip():
            reasons.setdefault(job, line.strip().rstrip(";"))
    return reasons


def _progress(folder: Path) -> list[str]:
    """Since when, which step, and how long still, from the newest attempt's log."""
    logs = [log for attempt in attempts(folder) if (log := attempt / "log.jsonl").exists()]
    if not logs:
        return []
    events = []
    for line in logs[0].read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break  # being written
    notes = []
    started = events[0].get("started") if events else None
    if started:
        notes.append(f"since {started}")
    steps = [event for event in events if event["event"] == "step"]
    if steps:
        planned = read_json(folder / "spec.json")["steps"]
        last = planned["warmup"] + planned["timed"]
        pace_s = median(step["step_s"] for step in steps[-20:])  # the first step compiles
        left_s = pace_s * (last - steps[-1]["step"])
        clock = time.strftime("%H:%M:%S", time.localtime(time.time() + left_s))
        notes.append(f"step {steps[-1]['step']} of {last}, until {clock}")
    return notes


def _ended(run: str, folder: Path) -> Line:
    # The newest attempt: the answer above it may be of one before.
    paths = [attempt / "run.json" for attempt in attempts(folder)] + [folder / "run.json"]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return Line(run, "not started", "")
    ending = read(path)
    if ending is None:
        return Line(run, "damaged", f"{path}: expected how it ended")
    return Line(run, ending["outcome"], ending["reason"] or "")
