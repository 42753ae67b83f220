"""Submitted work, and what became of it: from its own files first, then from the scheduler."""

from collections.abc import Callable
from dataclasses import dataclass

from xdimo.cluster import ending as endings
from xdimo.cluster.dialects import Job
from xdimo.cluster.ending import Ending
from xdimo.cluster.ledger import Entry
from xdimo.cluster.site import Silent, Site
from xdimo.cluster.work import Rules, Work


@dataclass
class Live:
    """Submitted work."""

    work: Work
    entry: Entry
    job: Job | None = None
    gone: float | None = None  # when it was first seen to be over, or missing
    ending: Ending | None = None  # over, and not yet handed on

    @property
    def target(self) -> str:
        return self.entry.target

    @property
    def cards(self) -> int:
        return self.entry.cards

    @property
    def alone(self) -> bool:
        return self.entry.alone


@dataclass
class Follower:
    site: Site
    rules: Rules
    once: Callable[[str], None]  # says what has not been said before

    def look(self, live: Live, job: Job | None, now: float) -> Ending | None:
        """How it ended; None while it goes on, or while that cannot be told.

        ``job``: its line of the status answer; None where it is missing there.
        """
        if job is not None:
            live.job = job
        if job is not None and job.alive:
            live.gone = None
            return None
        live.gone = live.gone or now
        return self._conclude(live, job, now - live.gone)

    def _conclude(self, live: Live, job: Job | None, since_s: float) -> Ending | None:
        work, entry = live.work, live.entry
        assert entry.job is not None
        own = endings.found(work.answer, entry.job, work.is_run)
        if own is not None and own.answered:
            return own
        patience_s = self.rules.latency_s if job is not None else self.rules.grace_s
        if own is None and since_s < patience_s:
            return None
        try:
            reason = self.site.reason(entry.job)
        except Silent as silent:
            reason = None
            if since_s < max(self.rules.grace_s, self.rules.latency_s):
                self.once(f"{work.name}: {silent}; asking again")
                return None
        if job is None:
            fallback = Ending("lost", f"job {entry.job} vanished without a trace")
        else:
            fallback = Ending("crash", f"job {entry.job} ended as {job.state}, without its answer")
        ending = endings.by_scheduler(own, reason, fallback)
        if work.is_run and ending != own:
            host = live.job.host if live.job else None
            endings.record(
                work.answer,
                run=work.name,
                spec=work.content,
                ending=ending,
                job=entry.job,
                host=host,
            )
        return ending
