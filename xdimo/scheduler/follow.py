"""Submitted work, and what became of it: from its own files first, then from the scheduler."""

from collections.abc import Callable
from dataclasses import dataclass

from xdimo.scheduler import job_outcome as endings
from xdimo.scheduler.dialects import History, Job
from xdimo.scheduler.job_outcome import Ending
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import Entry
from xdimo.scheduler.task import Rules, Work


@dataclass
class Live:
    """Submitted work."""

    work: Work
    entry: Entry
    job: Job | None = None
    gone: float | None = None  # when it was first seen to be over, or missing
    unseen: float | None = None  # since when the scheduler does not see it, nor its log grow
    sign: float = 0  # when its log last grew
    ending: Ending | None = None  # over, and not yet handed on
    unread: str | None = None  # the answer to its submission, where that is not understood

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
        if job is not None and job.state == "unknown":
            return self._unseen(live, job, now)
        live.unseen = None
        if job is not None and job.alive:
            live.gone = None
            return self._of_another_word(live, job) if job.state == "other" else None
        if live.gone is None or (job is None and self._grows(live)):
            live.gone = now
        return self._conclude(live, job, now - live.gone)

    def _grows(self, live: Live) -> bool:
        """Whether its log has grown since the last time; work that is no run has none."""
        before, live.sign = live.sign, 0.0
        if live.work.is_run:
            live.sign = endings.sign_of_life(live.work.answer)
        return live.sign != before

    def _of_another_word(self, live: Live, job: Job) -> Ending | None:
        """Alive, as long as its run does not say otherwise."""
        work = live.work
        self.once(f"{work.name}: job {job.id} has the state {job.word!r}, not known; it goes on")
        own = endings.found(work.answer, job.id, work.is_run)
        return own if own is not None and own.answered else None

    def _unseen(self, live: Live, job: Job, now: float) -> Ending | None:
        """A job whose host the scheduler has lost sight of may go on, and may be long over."""
        work = live.work
        own = endings.found(work.answer, job.id, work.is_run)
        if own is not None and own.answered:
            return own
        if self._grows(live) or live.unseen is None:
            live.unseen = now
        # What writes no log has its whole time limit.
        patience_s = self.rules.grace_s + (0 if work.is_run else 60 * work.walltime_min)
        where = f"job {job.id} on {job.host or '?'} has an unknown state"
        self.once(f"{work.name}: {where}; lost after {patience_s:g} s without a sign of life")
        if now - live.unseen <= patience_s:
            return None
        lost = own or Ending("lost", f"{where}, no sign of life for {now - live.unseen:.0f} s")
        return self._record(live, own, lost)

    def _conclude(self, live: Live, job: Job | None, since_s: float) -> Ending | None:
        work, entry = live.work, live.entry
        assert entry.job is not None
        own = endings.found(work.answer, entry.job, work.is_run)
        if own is not None and own.answered:
            return own
        for path in endings.damaged(work.answer):
            self.once(f"{path}: damaged; expected how the attempt ended. It counts as not written")
        # A requeued job is shown as ended first, and its launcher has said so.
        missing = job is None and own is None
        if since_s < (self.rules.grace_s if missing else self.rules.latency_s):
            return None
        # One that is missing may run yet, as long as its time limit lets it, while no history says
        # otherwise.
        whole_s = self.rules.grace_s + 60 * work.walltime_min
        patient = since_s < max(self.rules.grace_s, self.rules.latency_s)
        try:
            history = self.site.history(entry.job)
        except Silent as silent:
            history = History(known=False)
            if patient or (missing and since_s <= whole_s):
                self.once(f"{work.name}: {silent}; asking again")
                return None
        if missing and history.running and since_s <= whole_s:
            self.once(
                f"{work.name}: job {entry.job} is missing in the list, but its history shows a "
                "start and no end; waiting for it"
            )
            return None
        if history.requeued and patient:
            self.once(f"{work.name}: job {entry.job} has been requeued; waiting for it")
            return None
        how = f"as {job.state}" if job is not None else "in the history"
        if history.code is not None:
            how = f"with exit code {history.code}"
        if job is not None or history.code is not None:
            fallback = Ending("crash", f"job {entry.job} ended {how}, without its answer")
        elif history.known:
            fallback = Ending("lost", f"job {entry.job} vanished; its history shows no end")
        else:
            fallback = Ending("lost", f"job {entry.job} vanished without a trace")
        return self._record(live, own, endings.by_scheduler(own, history.reason, fallback))

    def _record(self, live: Live, own: Ending | None, ending: Ending) -> Ending:
        work, entry = live.work, live.entry
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
