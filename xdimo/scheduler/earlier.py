"""Jobs of the ledger that no work here follows: not asked for here, or thought to be over."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from xdimo.scheduler.dialects import Job
from xdimo.scheduler.follow import Live
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import Entry, Ledger
from xdimo.scheduler.task import Work


@dataclass
class Earlier:
    site: Site
    grace_s: float
    once: Callable[[str], None]  # says what has not been said before
    others: dict[str, Entry] = field(default_factory=dict)  # alive, by name, and not asked for here
    held: set[str] = field(default_factory=set)  # work whose earlier job has yet to end
    _past: dict[str, Entry] = field(default_factory=dict)  # all there were, by their jobs' ids
    _ours: set[str] = field(default_factory=set)  # of those, ids that are alive and ours
    _missing: dict[str, float] = field(default_factory=dict)  # of the others, since when

    def open(self, ledger: Ledger) -> None:
        self.others = {entry.work: entry for entry in ledger.entries() if entry.open}
        self._past = ledger.by_job()

    def add(self, entry: Entry) -> None:
        """Takes note of a submission that is over."""
        if entry.job:
            self._past[entry.job] = entry

    def look(
        self,
        jobs: Mapping[str, Job],
        waiting: Mapping[str, Work],
        live: Mapping[str, Live],
        now: float,
    ) -> Iterator[tuple[Entry, Job, bool]]:
        """Jobs that are alive although their end was taken: requeued, seen again, or dying yet.

        Each with whether ``waiting`` work can take it up, which the caller does before the next;
        else it is to be ended, for its work is live elsewhere or has changed.
        """
        self._forget(jobs, now)
        self.held = set()
        for job in jobs.values():
            entry = self._past.get(job.id)
            if entry is None or job.state in ("unknown", "other", "done", "exit"):
                continue
            known = live.get(entry.work), self.others.get(entry.work)
            if job.id in (known[0] and known[0].entry.job, known[1] and known[1].job):
                continue
            try:
                if not self._is_ours(job.id, entry):
                    del self._past[job.id]
                    continue
            except Silent:
                self.held.add(entry.work)
                continue
            work = waiting.get(entry.work)
            if work and work.content == entry.content and not entry.cancelled:
                self.once(f"{entry.work}: {entry.label} is alive again, and taken up")
                yield entry, job, True
            elif work or entry.work in live:
                self.held.add(entry.work)
                self.once(f"{entry.work}: {entry.label} of an earlier submission is alive; ended")
                yield entry, job, False
            else:
                self.others[entry.work] = entry
                self.once(f"{entry.work}: {entry.label} is alive again, after its end was taken")

    def _is_ours(self, job: str, entry: Entry) -> bool:
        """Ids come round again; names do not. Raises Silent."""
        if job not in self._ours and job in self.site.jobs(entry.job_name):
            self._ours.add(job)
        return job in self._ours

    def _forget(self, jobs: Mapping[str, Job], now: float) -> None:
        """Others that are over; one that is missing only after the grace period."""
        for name, entry in list(self.others.items()):
            job = jobs.get(entry.job or "")
            if job is not None and job.alive:
                self._missing.pop(name, None)
                continue
            missing_s = now - self._missing.setdefault(name, now)
            if job is not None or missing_s > self.grace_s:
                del self.others[name]
