"""The dispatcher: takes work, submits what fits, and says how each ended. One `poll` at a time.

Each poll asks for the status of all jobs with one command, and, while something waits, for the
hosts with another, however many jobs there are. A command that fails or hangs says nothing about
the jobs: nothing is concluded or submitted until one answers.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xdimo.errors import UserError
from xdimo.files import read_json
from xdimo.scheduler import job_outcome as endings
from xdimo.scheduler import job_script
from xdimo.scheduler.admission import Wanted, admit, why_waiting
from xdimo.scheduler.controller_files import Board
from xdimo.scheduler.dialects import Job
from xdimo.scheduler.earlier import Earlier
from xdimo.scheduler.follow import Follower, Live
from xdimo.scheduler.hosts import Free, Host, free_cards
from xdimo.scheduler.job_outcome import Ending
from xdimo.scheduler.outages import Service
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import CANCELLED, Entry, Ledger
from xdimo.scheduler.submit import submit
from xdimo.scheduler.task import PREFLIGHT, Ended, Rules, Work, matches

LONGEST_BACK_OFF_S = 300
SUBMISSIONS = 3  # of work whose submissions get answers that are not understood, in a row


@dataclass
class Spool:
    site: Site
    ledger: Ledger
    rules: Rules
    say: Callable[[str], None]
    clock: Callable[[], float] = time.time
    waiting: dict[str, Work] = field(default_factory=dict)  # oldest first
    live: dict[str, Live] = field(default_factory=dict)
    _lock: int = -1
    _ended: list[Ended] = field(default_factory=list)
    _said: set[str] = field(default_factory=set)
    _unread: dict[str, int] = field(default_factory=dict)  # such answers, by name of the work
    _silences: int = 0
    _ask_again: float = 0
    _why: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._service = Service(self.rules.targets, self.rules.closed_s)
        self._board = Board(self.ledger.folder)
        self._follower = Follower(self.site, self.rules, self._once)
        self._earlier = Earlier(self.site, self.rules.grace_s, self._once)

    def open(self) -> None:
        """Takes the ledger. Raises UserError where another process holds it."""
        self._lock = self.ledger.hold(wait_s=self.site.timeout_s + 1)
        self._board.open()
        self._earlier.open(self.ledger)

    def shut(self) -> None:
        self._board.shut()
        self.ledger.release()

    # -- what the workflow asks ------------------------------------------------------------------

    def add(self, work: Work) -> None:
        """Takes work: a live job that does the same is adopted, else it waits for its turn."""
        entry = self.ledger.newest(work.name)
        if entry is None or not entry.open:
            self._wait(work)
            return
        self._earlier.others.pop(work.name, None)
        over = entry.job and endings.found(work.answer, entry.job, work.is_run)
        if entry.cancelled and not (over and over.answered):
            self._end_now(entry)
            self._close(entry, outcome="killed", reason="cancelled")
            self._wait(work)
        elif entry.content == work.content and (work.interrupted or not over):
            self.live[work.name] = Live(work, entry)
            self.say(f"{work.name}: adopted {entry.label}")
        elif over:  # asked for anew
            self._close(entry)
            self._wait(work)
        else:
            # It would write its answer where the new one belongs.
            self.say(f"{work.name}: has changed since {entry.label}, which is ended first")
            self._end_now(entry)
            self._close(entry, reason="replaced by other content")
            self._wait(work)

    def close(self, name: str) -> None:
        """The workflow has taken note of how ``name`` ended."""
        if live := self.live.pop(name, None):
            self._close(live.entry)

    def drop(self) -> list[str]:
        """Forgets what is not submitted; returns its names."""
        names = list(self.waiting)
        self.waiting.clear()
        return names

    @property
    def silent(self) -> bool:
        """Whether the scheduler gave no answer when it was last asked."""
        return self._silences > 0

    def submitted(self) -> list[Entry]:
        """What is in the queue or runs, as far as is known."""
        return [live.entry for live in self.live.values() if live.ending is None]

    def end(self, entries: Sequence[Entry]) -> str:
        """Ends jobs for good; returns the scheduler's words. Raises Silent."""
        return cancel(self.site, entries)

    # -- one poll --------------------------------------------------------------------------------

    def poll(self) -> list[Ended]:
        """Looks once, submits what fits, and returns what has ended since the last time."""
        now = self.clock()
        if now >= self._ask_again:
            try:
                jobs = self.site.jobs()
            except Silent as silent:
                self._back_off(now, silent)
            else:
                self._heard()
                self._look(jobs, now)
        ended, self._ended = self._ended, []
        return ended

    def _close(self, entry: Entry, **changes: Any) -> None:
        entry = self.ledger.change(entry, **{"stage": "closed", **changes})
        self._earlier.add(entry)

    def _look(self, jobs: Mapping[str, Job], now: float) -> None:
        for live in list(self.live.values()):
            if live.ending is None:
                self._follow(live, jobs, now)
        self._look_back(jobs, now)
        self._drop_cancelled()
        queued = any(live.job and live.job.state == "pending" for live in self.live.values())
        if self.waiting or queued:
            hosts = self._hosts()
            self._retire(hosts, jobs, now)
            self._submit(jobs, hosts, now)
        self._board.show({name: self._why.get(name, "its turn") for name in self.waiting})

    def _look_back(self, jobs: Mapping[str, Job], now: float) -> None:
        for entry, job, wanted in self._earlier.look(jobs, self.waiting, self.live, now):
            if wanted:
                work = self.waiting.pop(entry.work)
                entry = self.ledger.change(entry, stage="submitted", outcome=None, reason=None)
                self.live[work.name] = Live(work, entry, job)
            else:
                self._end_now(entry)

    def _back_off(self, now: float, silent: Silent) -> None:
        self._silences += 1
        wait_s = min(self.rules.poll_s * 2 ** (self._silences - 1), LONGEST_BACK_OFF_S)
        self._ask_again = now + wait_s
        if self._silences == 1:
            self.say(f"{silent}; jobs go on, asking again")

    def _heard(self) -> None:
        if self._silences:
            self.say(f"{self.site.dialect.status} answers again")
        self._silences = 0

    # -- following submitted work ----------------------------------------------------------------

    def _follow(self, live: Live, jobs: Mapping[str, Job], now: float) -> None:
        if live.entry.job is None and not self._recover(live, now):
            return
        ending = self._follower.look(live, jobs.get(live.entry.job or ""), now)
        if ending is None:
            return
        if ending.retried:
            self._end_now(live.entry)  # should it live after all, its work must not run twice
        self._finish(live, ending)

    def _recover(self, live: Live, now: float) -> bool:
        """A submission that was cut: whether it reached the queue, under the name we gave it."""
        entry = live.entry
        try:
            named = self.site.jobs(entry.job_name)
        except Silent as silent:
            self._once(f"{entry.work}: {silent}; it is not submitted again before that is known")
            return False
        started = entry.folder / job_script.STARTED
        job = next(iter(named), None) or (started.read_text() if started.exists() else None)
        if job:
            live.entry = self.ledger.change(entry, stage="submitted", job=job)
            self._unread.pop(entry.work, None)
            self.say(f"{entry.work}: adopted job {job}")
            return True
        # The command may still have been under way when it was cut.
        if now - entry.since > self.site.timeout_s:
            self._never_arrived(live)
        return False

    def _never_arrived(self, live: Live) -> None:
        """Submitted again; not without end where the site may refuse in words not known here."""
        name = live.work.name
        if live.unread is not None:
            self._unread[name] = self._unread.get(name, 0) + 1
            if self._unread[name] >= SUBMISSIONS:
                del self._unread[name]
                self._give_up(live, Ending("rejected", live.unread))
                return
        self.ledger.change(live.entry, stage="refused", reason="never reached the queue")
        del self.live[name]
        self._wait(live.work)

    def _finish(self, live: Live, ending: Ending) -> None:
        live.ending = ending
        retry = ending.retried and not live.entry.cancelled
        live.entry = self.ledger.change(live.entry, outcome=ending.outcome, reason=ending.reason)
        if live.work.name.startswith(PREFLIGHT):
            self._preflown(live, ending)
            return
        if not ending.answered:
            self.close(live.work.name)
        self._ended.append(Ended(live.work, ending, retry))

    def _end_now(self, entry: Entry) -> None:
        try:
            self.site.kill(ids(self.site, entry))
        except Silent as silent:
            self.say(f"{entry.work}: {silent}")

    # -- looking before a target's first run -----------------------------------------------------

    def _wait(self, work: Work) -> None:
        if self.rules.preflight and work.is_run and work.target not in self._service.out:
            look = self.rules.preflight(work.target)
            if not self._passed(look) and look.name not in {*self.waiting, *self.live}:
                self.add(look)
        self.waiting[work.name] = work

    def _passed(self, look: Work) -> bool:
        entry = self.ledger.newest(look.name)
        return entry is not None and entry.content == look.content and entry.outcome == "ok"

    def _preflown(self, live: Live, ending: Ending) -> None:
        problems = [ending.reason or ending.outcome]
        if ending.answered:
            try:
                answer = read_json(live.work.answer)
                problems = [line["what"] for line in answer["lines"] if not line["ok"]]
            except (UserError, LookupError, TypeError):
                problems = [f"{live.work.answer}: damaged; expected what the preflight has found"]
        if problems:
            self.ledger.change(live.entry, outcome="unavailable", reason="; ".join(problems))
            self._service.fail(live.target, "; ".join(problems))
        self.say(f"{live.work.name}: {self._service.out.get(live.target, 'ok')}")
        del self.live[live.work.name]
        self._close(live.entry, outcome="unavailable" if problems else "ok")

    # -- submitting ------------------------------------------------------------------------------

    def _hosts(self) -> dict[str, Host] | None:
        if not any(target.hosts for target in self.rules.targets.values()):
            return None
        try:
            return self.site.hosts(self.ledger.folder / "hosts-answer.txt")
        except Silent as silent:
            self._once(f"{silent}; gpus_free of the config is used")
            return None

    def _retire(
        self, hosts: Mapping[str, Host] | None, jobs: Mapping[str, Job], now: float
    ) -> None:
        """Ends what waits for a target that is out of service."""
        if hosts is not None:
            for message in self._service.look(hosts, now):
                self._once(message)
        out = self._service.out
        for work in [w for w in self.waiting.values() if w.target in out]:
            del self.waiting[work.name]
            self._refuse(work, Ending("unavailable", out[work.target]))
        self._service.ask_again()
        dead = self._service.dead
        for live in list(self.live.values()):
            pending = live.job is not None and live.job.state == "pending"
            if live.ending is None and pending and live.target in dead:
                self._end_now(live.entry)
                self._give_up(live, Ending("unavailable", dead[live.target]))

    def _give_up(self, live: Live, ending: Ending) -> None:
        self._close(live.entry, stage="refused", outcome=ending.outcome, reason=ending.reason)
        del self.live[live.work.name]
        self._refuse(live.work, ending)

    def _refuse(self, work: Work, ending: Ending) -> None:
        if work.name.startswith(PREFLIGHT):
            if ending.outcome == "rejected":  # an outage may pass
                self._service.fail(work.target, str(ending.reason))
            self.say(f"{work.name}: {ending}")
            return
        if work.is_run:
            endings.record(
                work.answer,
                run=work.name,
                spec=work.content,
                ending=ending,
                job=None,
                host=None,
            )
        self._ended.append(Ended(work, ending, False))

    def _submit(
        self, jobs: Mapping[str, Job], hosts: Mapping[str, Host] | None, now: float
    ) -> None:
        pending = sum(job.state == "pending" for job in jobs.values())
        pending += sum(live.entry.job is None for live in self.live.values())  # perhaps there
        looking = {name.removeprefix(PREFLIGHT) for name in {*self.waiting, *self.live}}
        # Name or target -> why it is not its turn.
        kept = dict.fromkeys(self._earlier.held, "until its earlier job has ended")
        answer = "closed"
        while answer == "closed":  # the slot that a closed queue did not take is another's
            answer = "none"
            free = self._free(jobs, hosts)
            ready = [
                work
                for work in self.waiting.values()
                if not {work.name, work.target} & kept.keys()
                and not (work.is_run and work.target in looking)
            ]
            holders: list[Wanted] = [live for live in self.live.values() if live.ending is None]
            holders += self._earlier.others.values()
            for work in admit(ready, holders, free, pending, self.rules.limits):
                answer = self._submit_one(work, now)
                pending += answer == "accepted"
                if answer == "closed":
                    kept[work.target] = f"{self.rules.targets[work.target].queue} is closed"
                if answer == "limit":
                    kept |= dict.fromkeys(self.waiting, "the queue takes no more jobs for now")
                if answer in ("closed", "limit", "unheard"):
                    break
        self._why = {
            work.name: kept.get(work.name)
            or kept.get(work.target)
            or (
                f"until {work.target} has been looked at"
                if work.is_run and work.target in looking
                else why_waiting(work, free, pending, self.rules.limits)
            )
            for work in self.waiting.values()
        }

    def _free(self, jobs: Mapping[str, Job], hosts: Mapping[str, Host] | None) -> Free:
        running: dict[str, int] = {}
        queued: dict[str, int] = {}
        held: dict[str, int] = {}
        entries = [*self.submitted(), *self._earlier.others.values()]
        for entry in entries:
            job = jobs.get(entry.job or "")
            into = running if job is not None and job.state != "pending" else queued
            into[entry.target] = into.get(entry.target, 0) + entry.cards
            if job is not None and job.host and job.state in ("suspended", "unknown"):
                held[job.host] = held.get(job.host, 0) + entry.cards
        free, said = free_cards(self.rules.targets, hosts, running, self.rules.cpus_per_gpu, held)
        for message in said:
            self._once(message)
        return {
            target: tuple(max(cards - queued.get(target, 0), 0) for cards in by_host)
            for target, by_host in free.items()
        }

    def _submit_one(self, work: Work, now: float) -> str:
        """The scheduler's answer, as `Submission` has it."""
        target = self.rules.targets[work.target]
        done = submit(self.site, self.ledger, work, target, self._lock)
        if done.answer == "limit":
            self._once(f"the queue takes no more jobs for now ({done.words}); waiting", key="limit")
            return done.answer
        if done.answer == "closed":
            self._once(f"{work.target}: {done.words} Waiting for it", key=f"closed {work.target}")
            self._service.shut(work.target, done.words, now)
            return done.answer
        del self.waiting[work.name]
        if done.answer == "refused":
            self._refuse(work, Ending("rejected", done.words))
            return done.answer
        unread = done.words if done.answer == "unread" else None
        self.live[work.name] = Live(work, done.entry, unread=unread)
        if done.answer in ("unheard", "unread"):
            self.say(f"{work.name}: {done.words}; looking for it in the queue")
            return "unheard"
        self._unread.pop(work.name, None)
        self._said -= {"limit", f"closed {work.target}"}
        self._service.opened(work.target)
        self.say(f"{work.name}: submitted as {done.entry.label} to {target.queue}")
        return done.answer

    # -- what people see -------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        """`xdimo cancel` asked for the end of what waits here."""
        names = self._board.asked_to_cancel()
        for work in [w for w in self.waiting.values() if matches(w.name, w.target, names)]:
            del self.waiting[work.name]
            self._ended.append(Ended(work, Ending("killed", "cancelled before it ran"), False))

    def _once(self, message: str, key: str | None = None) -> None:
        if (key or message) not in self._said:
            self._said.add(key or message)
            self.say(message)


def cancel(site: Site, entries: Sequence[Entry]) -> str:
    """Ends the jobs of ``entries``, which are not tried again; returns the scheduler's words.

    Raises Silent.
    """
    for entry in entries:
        (entry.folder / CANCELLED).touch()
    return site.kill([job for entry in entries for job in ids(site, entry)])


def ids(site: Site, entry: Entry) -> list[str]:
    """Of an entry's job; looked for by its name where the submission's answer was cut.

    Raises Silent.
    """
    return [entry.job] if entry.job else list(site.jobs(entry.job_name))
