"""Free cards of each target, from the site's own answer where it can be read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from xdimo.config import Target

# A full host is no closed one. These take no job until somebody acts.
_OUT = ("unavail", "unreach", "unlicensed", "down", "closed_adm", "closed_lim")


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
        return status == "closed" or status.startswith(_OUT)

    def free(self, cpus_per_gpu: int) -> int | None:
        """Cards not taken by anyone; None where the answer does not tell.

        Where it counts slots only, by the site's rule that a card is taken with so many.
        """
        if self.out:
            return 0
        if self.gpus is not None and self.gpus_used is not None:
            return max(self.gpus - self.gpus_used, 0)
        if self.slots is not None and self.slots_used is not None:
            return max(self.slots - self.slots_used, 0) // cpus_per_gpu
        return None


def read_hosts(answer: str) -> dict[str, Host] | None:
    """The table of hosts, by name; None where it cannot be read."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if not lines:
        return None
    separator = ";" if ";" in lines[0] else None
    rows = [[cell.strip() for cell in line.split(separator)] for line in lines]
    columns = [column.upper() for column in rows[0]]
    if not {"HOST_NAME", "STATUS"} <= set(columns) or len(rows) < 2:
        return None
    hosts = {}
    for row in rows[1:]:
        if len(row) != len(columns):
            return None
        cells = dict(zip(columns, row, strict=True))
        numbers = [_number(cells.get(key)) for key in ("MAX", "NJOBS", "NGPUS", "NGPUS_ALLOC")]
        hosts[cells["HOST_NAME"]] = Host(cells["HOST_NAME"], cells["STATUS"], *numbers)
    return hosts


def _number(cell: str | None) -> int | None:
    return int(cell) if cell is not None and cell.isdigit() else None


# Cards that one job could get, host by host (a run takes all of its cards from one host).
Free = dict[str, tuple[int, ...]]


def free_cards(
    targets: Mapping[str, Target],
    hosts: Mapping[str, Host] | None,
    running: Mapping[str, int],
    cpus_per_gpu: int,
) -> tuple[Free, list[str]]:
    """Free cards of each target, and what had to be taken from the config, with the reason.

    ``hosts``: the site's answer, None where there is none. ``running``: our own running cards of
    each target; the site's answer counts them already, the config does not.
    """
    free: Free = {}
    said = []
    for name, target in targets.items():
        ours = running.get(name, 0)
        found = _from_hosts(target, hosts, ours, cpus_per_gpu) if hosts is not None else "no answer"
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
