"""Free cards of each target, from the site's own answer where it can be read."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xdimo.config.schema import Target

# These take no job until somebody acts. A full host is called closed too: closed_Full.
_OUT = ("unavail", "unreach", "unlicensed", "down", "closed_adm", "closed_lim", "closed_lock")


@dataclass(frozen=True)
class Host:
    name: str
    status: str
    slots: int | None
    slots_used: int | None
    gpus: int | None
    gpus_used: int | None

    @property
    def out(self) -> bool:
        """Whether it is down, or closed by somebody."""
        status = self.status.lower()
        full = self.slots is not None and (self.slots_used or 0) >= self.slots
        return (status == "closed" and not full) or status.startswith(_OUT)

    def free(self, cpus_per_gpu: int) -> int | None:
        """Cards not taken by anyone; None where the answer does not tell.

        Where it counts slots only, by the site's rule that a card is taken with so many.
        """
        if self.out or self.status.lower().startswith("closed"):
            return 0
        if self.gpus is not None and self.gpus_used is not None:
            return max(self.gpus - self.gpus_used, 0)
        if self.slots is not None and self.slots_used is not None:
            return max(self.slots - self.slots_used, 0) // cpus_per_gpu
        return None


def read_hosts(answer: str) -> dict[str, Host] | None:
    """The table of hosts, by name; None where there is none. Lines around it are passed over."""
    lines = answer.splitlines()
    head = re.compile(r"\bHOST_NAME\b.*\bSTATUS\b", re.IGNORECASE)
    while lines and not head.search(lines[0]):
        lines.pop(0)
    separator = ";" if lines and ";" in lines[0] else None
    columns, *rows = [[cell.strip() for cell in line.split(separator)] for line in lines or [""]]
    hosts = {}
    for row in rows:
        if len(row) != len(columns):
            continue
        cells = dict(zip((column.upper() for column in columns), row, strict=True))
        numbers = [_number(cells.get(key)) for key in ("MAX", "NJOBS", "NGPUS", "NGPUS_ALLOC")]
        hosts[cells["HOST_NAME"]] = Host(cells["HOST_NAME"], cells["STATUS"], *numbers)
    return hosts or None


def _number(cell: str | None) -> int | None:
    return int(cell) if cell is not None and cell.isdigit() else None


# Cards that one job could get, host by host (a run takes all of its cards from one host).
Free = dict[str, tuple[int, ...]]


def free_cards(
    targets: Mapping[str, Target],
    hosts: Mapping[str, Host] | None,
    running: Mapping[str, int],
    cpus_per_gpu: int,
    held: Mapping[str, int] | None = None,
) -> tuple[Free, list[str]]:
    """Free cards of each target, and what had to be taken from the config, with the reason.

    ``hosts``: the site's answer, None where there is none. ``running``: our own running cards of
    each target; the site's answer counts them already, the config does not. ``held``: cards by
    host of our suspended jobs: their processes keep them, and the site may call them free.
    """
    free: Free = {}
    said = []
    for name, target in targets.items():
        ours = running.get(name, 0)
        found = _from_hosts(target, hosts, ours, cpus_per_gpu) if hosts is not None else "no answer"
        if not isinstance(found, str) and held:
            by_host = zip(target.hosts, found, strict=True)
            found = tuple(max(cards - held.get(host, 0), 0) for host, cards in by_host)
        if isinstance(found, str):
            if target.hosts and hosts is not None:
                said.append(f"{name}: {found}; gpus_free of the config is used")
            free[name] = (max(target.gpus_free - ours, 0),)
        else:
            free[name] = found
    return free, said


def _from_hosts(
    target: Target, hosts: Mapping[str, Host], ours: int, cpus_per_gpu: int
) -> tuple[int, ...] | str:
    if not target.hosts:
        return "no hosts in the config"
    missing = [name for name in target.hosts if name not in hosts]
    if missing:
        return f"the hosts command does not list {', '.join(missing)}"
    free = [hosts[name].free(cpus_per_gpu) for name in target.hosts]
    known = tuple(cards for cards in free if cards is not None)
    if len(known) < len(free):
        return "the hosts command tells neither free cards nor free slots"
    if any(hosts[name].gpus_used is None for name in target.hosts):
        # Slots do not show a card that is broken or taken without them; the config does.
        known = tuple(min(cards, max(target.gpus_free - ours, 0)) for cards in known)
    return known


def out_of_service(
    targets: Mapping[str, Target], hosts: Mapping[str, Host] | None
) -> dict[str, str]:
    """Targets all of whose hosts are down or closed, with their states."""
    if hosts is None:
        return {}
    return {
        name: _states(hosts[host] for host in target.hosts)
        for name, target in targets.items()
        if target.hosts and all(host in hosts and hosts[host].out for host in target.hosts)
    }


def _states(hosts: Iterable[Host]) -> str:
    return ", ".join(f"{host.name} is {host.status}" for host in hosts)
