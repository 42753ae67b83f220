"""Work for the queue: what is asked of it, by what rules, and how it ended."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from xdimo.config.schema import Target
from xdimo.errors import UserError
from xdimo.scheduler.admission import Limits
from xdimo.scheduler.job_outcome import Ending

PREFLIGHT = "preflight-"  # and the target: the work that looks before a target's first run


@dataclass(frozen=True)
class Work:
    """Something to be run in the queue once."""

    name: str  # of a run, or of a rule
    content: str  # hash of what it does
    target: str
    cards: int
    cpus: int
    command: str  # shell text
    workdir: Path
    answer: Path  # the file that holds its end
    is_run: bool = True  # a training: `launch` writes how it ends, and content is its spec's hash
    alone: bool = False
    walltime_min: int = 120
    interrupted: bool = True  # False: the answer that lies there is not one to be taken up


@dataclass(frozen=True)
class Rules:
    """What the config says of the queue. Seconds."""

    targets: Mapping[str, Target]
    limits: Limits
    cpus_per_gpu: int
    poll_s: float  # from one poll to the next
    latency_s: float  # until what a job wrote is seen here
    grace_s: float  # until a job that vanished without a trace is lost
    closed_s: float  # until a target whose hosts are all out is out of service
    preflight: Callable[[str], Work] | None = None  # by target; None: none is made


@dataclass(frozen=True)
class Ended:
    work: Work
    ending: Ending
    retry: bool


def matches(name: str, target: str, names: Iterable[str]) -> bool:
    """Whether a run is named by its target, its cell or itself."""
    return any(name == asked or target == asked or name.startswith(f"{asked}-r") for asked in names)


def require_known(names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError on a name that is no target, cell or run."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise UserError(
            f"{', '.join(unknown)}: no target, cell or run; allowed: {', '.join(known)}"
        )
