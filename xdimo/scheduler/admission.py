"""What to submit now. A pure function of what is ready, what is there, and what is free."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from xdimo.scheduler.hosts import Free


class Wanted(Protocol):
    """Work as admission sees it."""

    @property
    def target(self) -> str: ...
    @property
    def cards(self) -> int: ...  # of one host
    @property
    def alone(self) -> bool: ...  # no other job of ours on its target meanwhile


Work = TypeVar("Work", bound=Wanted)


@dataclass(frozen=True)
class Limits:
    pending: int  # jobs that may wait in the queue at once, whoever of ours submitted them
    mode: Literal["queue", "hold"]  # when nothing fits: the oldest waits there, or here


def admit(
    ready: Sequence[Work], live: Sequence[Wanted], free: Free, pending: int, limits: Limits
) -> list[Work]:
    """Which of ``ready`` (oldest first) to submit now.

    ``live``: our submitted jobs. ``free``: cards by target and host, without what our own pending
    jobs will take. ``pending``: all our pending jobs in the queue system, others' work included.
    """
    slots = limits.pending - pending
    if slots <= 0:
        return []
    allowed = _allowed(ready, live)
    left = {target: list(cards) for target, cards in free.items()}
    chosen = [work for work in allowed if _take(left[work.target], work.cards)][:slots]
    if chosen or not allowed or pending > 0 or limits.mode == "hold":
        return chosen
    # A job of ours that ends may let others in, which the pending slot, once taken, would hold up.
    busy = {job.target for job in live}
    if any(work.target in busy for work in ready):
        return []
    return [allowed[0]]  # else a busy site would starve us


def why_waiting(work: Wanted, free: Free, pending: int, limits: Limits) -> str:
    """Why ``work`` was not admitted, for people; ``free`` and ``pending`` as for `admit`."""
    most = max(free[work.target], default=0)
    if most < work.cards:
        return f"needs {work.cards} cards, {most} free"
    if pending >= limits.pending:
        return f"the queue holds {pending} of our jobs already"
    if work.alone:
        return f"until no other job of ours is on {work.target}"
    return "its turn"


def _allowed(ready: Sequence[Work], live: Sequence[Wanted]) -> list[Work]:
    """Those that no `alone` keeps back, its own or another's.

    Younger work overtakes one that waits to be alone: the runs of a campaign come to an end, and
    cards that nobody uses would be the price.
    """
    busy = {job.target for job in live}
    closed = {job.target for job in live if job.alone}
    allowed = []
    for work in ready:
        if work.target in (busy if work.alone else closed):
            continue
        if work.alone:
            closed.add(work.target)
        busy.add(work.target)
        allowed.append(work)
    return allowed


def _take(hosts: list[int], wanted: int) -> bool:
    """Takes ``wanted`` cards of the fullest host that has them."""
    enough = [cards for cards in hosts if cards >= wanted]
    if not enough:
        return False
    hosts[hosts.index(min(enough))] -= wanted
    return True
