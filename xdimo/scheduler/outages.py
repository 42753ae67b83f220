"""Which targets are out of service: hosts or queue closed for too long, or a failed preflight."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from xdimo.config.schema import Target
from xdimo.scheduler.hosts import Host, out_of_service


@dataclass
class Service:
    targets: Mapping[str, Target]
    closed_s: float  # until a target whose hosts are all out is out of service
    _closed_since: dict[str, float] = field(default_factory=dict)
    _hosts: dict[str, str] = field(default_factory=dict)
    _queues: dict[str, str] = field(default_factory=dict)
    _shut_since: dict[str, float] = field(default_factory=dict)  # of their queues
    _preflight: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> dict[str, str]:
        """Target -> why it is out of service."""
        return {**self._queues, **self.dead}

    @property
    def dead(self) -> dict[str, str]:
        """Those whose pending jobs will not run. (A closed queue runs what it has.)"""
        return {**self._hosts, **self._preflight}

    def fail(self, target: str, problem: str) -> None:
        """A preflight's word, which holds until the controller ends."""
        self._preflight[target] = f"preflight: {problem}"

    def shut(self, target: str, words: str, now: float) -> None:
        """Its queue has refused a job because it is closed; `opened` where it takes one again."""
        if now - self._shut_since.setdefault(target, now) >= self.closed_s:
            self._queues[target] = words

    def ask_again(self) -> None:
        """What waited for a closed queue has been ended; what is asked of it next tries it."""
        self._queues.clear()

    def opened(self, target: str) -> None:
        self._shut_since.pop(target, None)

    def look(self, hosts: Mapping[str, Host], now: float) -> Iterator[str]:
        """Takes note of the hosts' states; gives what is worth saying. A host may come back."""
        closed = out_of_service(self.targets, hosts)
        since = self._closed_since
        self._closed_since = {target: since.get(target, now) for target in closed}
        self._hosts = {
            target: self._hosts.get(target, states)
            for target, states in closed.items()
            if now - self._closed_since[target] >= self.closed_s
        }
        for target in closed.keys() - self._hosts.keys():
            yield f"{target}: {closed[target]}; waiting for it"
