"""One submission: its folder, its script, the command, and what the scheduler answered."""

import shutil
from dataclasses import dataclass
from typing import Literal

from xdimo.config.schema import Target
from xdimo.outcome import withdraw
from xdimo.scheduler import job_script
from xdimo.scheduler.dialects import Request, accepted, is_away, is_closed, is_limit, is_refusal
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import Entry, Ledger
from xdimo.scheduler.task import Work


@dataclass(frozen=True)
class Submission:
    """``limit``, ``closed``: not now. ``refused``: never.

    ``unheard``: it may have arrived; ``unread``: so it may, and the answer is not understood.
    """

    answer: Literal["accepted", "unheard", "unread", "limit", "closed", "refused"]
    entry: Entry
    words: str  # of the scheduler, on one line


def submit(site: Site, ledger: Ledger, work: Work, target: Target, lock: int) -> Submission:
    """Submits ``work`` once. ``lock``: the ledger's, which the command holds too; -1 = none."""
    assert target.queue is not None, "open_spool refuses such targets"
    entry = ledger.begin(work.name, work.content, work.target, work.cards, work.alone)
    request = Request(
        name=entry.job_name,
        queue=target.queue,
        hosts=tuple(target.hosts),
        cpus=work.cpus,
        gpus=work.cards if target.device == "cuda" else 0,
        walltime_min=work.walltime_min,
        memory_gb=target.memory_gb,
        gpu_request=target.gpu_request,
        output="output.log",
        error="error.log",
    )
    path = job_script.write(entry.folder, work.command, work.workdir, site.dialect)
    text = job_script.stub(path)
    withdraw(work.answer)
    work.answer.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = site.ask(
            site.dialect.submit_command(request),
            stdin=text,
            folder=entry.folder,
            keep_open=[lock] if lock >= 0 else [],
        )
    except Silent as silent:
        return Submission("unheard", entry, str(silent))
    answer = done.text
    words = " ".join(answer.split()) or f"no answer, exit code {done.code}"
    job = accepted(answer)
    if job is not None:
        return Submission("accepted", ledger.change(entry, stage="submitted", job=job), words)
    if is_closed(answer) or is_limit(answer):
        shutil.rmtree(entry.folder)
        return Submission("closed" if is_closed(answer) else "limit", entry, words)
    if is_away(answer):
        return Submission("unheard", entry, words)
    if not is_refusal(answer):
        return Submission("unread", entry, words)
    entry = ledger.change(entry, stage="refused", outcome="rejected", reason=words)
    return Submission("refused", entry, words)
