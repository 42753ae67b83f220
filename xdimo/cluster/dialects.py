"""Dialects of the queue, as data: LSF (bsub ...) and JH UniScheduler (jsub ...).

Both take a script on standard input and options as arguments, and list jobs as a table whose
columns are asked for. Nothing passes through a shell: arguments are a list.
"""

import re
import shlex
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from xdimo.errors import UserError

SCRIPT_LIMIT_BYTES = 4096  # a longer script is refused

State = Literal["pending", "running", "suspended", "unknown", "done", "exit"]
ALIVE: frozenset[State] = frozenset({"pending", "running", "suspended", "unknown"})

# Words of the status column, both dialects.
_STATES: dict[str, State] = {
    "PEND": "pending",
    "WAIT": "pending",
    "PSUSP": "pending",
    "PROV": "running",
    "RUN": "running",
    "SSUSP": "suspended",
    "USUSP": "suspended",
    "UNKWN": "unknown",
    "ZOMBI": "unknown",
    "DONE": "done",
    "EXIT": "exit",
}


@dataclass(frozen=True)
class Request:
    """What a job asks the scheduler for."""

    name: str
    queue: str
    hosts: tuple[str, ...]  # none = any of the queue
    cpus: int
    gpus: int  # on one host
    walltime_min: int
    memory_gb: int | None  # None = as the queue has it
    output: str
    error: str
    gpu_request: str | None = None  # option for GPUs, {n} = their number; None = the dialect's


@dataclass(frozen=True)
class Job:
    """A line of the status answer."""

    id: str
    state: State
    queue: str
    host: str | None

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


@dataclass(frozen=True)
class Dialect:
    name: str
    submit: str
    gpus: str  # the option, where {n} is their number
    memory: str  # a limit of {mb} times 10^6 bytes
    memory_plain: str  # where cards are a numeric resource; {kb} times 1,024 bytes
    status: str
    kill: tuple[str, ...]
    history: str
    hosts: tuple[str, ...]
    limits: tuple[str, ...] | None  # what the user may still submit
    job_variable: str  # of a job's environment: its id

    def submit_command(self, request: Request) -> list[str]:
        command = [self.submit, "-J", request.name, "-q", request.queue, "-n", str(request.cpus)]
        template = shlex.split(request.gpu_request or self.gpus)
        gpus = [word.replace("{n}", str(request.gpus)) for word in template if request.gpus]
        numeric = template[0] == "-R"
        if numeric:  # one -R for all: not every version adds a second one to the first
            command += ["-R", " ".join([*gpus[1:], "span[hosts=1]"])]
        else:
            command += ["-R", "span[hosts=1]", *gpus]
        if request.hosts:
            command += ["-m", " ".join(request.hosts)]
        if request.memory_gb is not None:
            limit = self.memory_plain if numeric else self.memory
            mb = 1000 * request.memory_gb
            command += ["-M", limit.format(mb=mb, kb=mb * 10**6 // 1024)]
        command += ["-o", request.output, "-e", request.error]
        return [*command, "-W", str(request.walltime_min)]

    def status_command(self, name: str | None = None) -> list[str]:
        """All jobs of this user, the lately finished too; or those of one name."""
        columns = "jobid stat queue exec_host delimiter=';'"
        return [self.status, "-a", *(["-J", name] if name else []), "-o", columns]

    def pending_command(self) -> list[str]:
        return [self.status, "-p"]

    def kill_command(self, jobs: Iterable[str]) -> list[str]:
        return [*self.kill, *jobs]

    def history_command(self, job: str) -> list[str]:
        return [self.history, "-l", job]


LSF = Dialect(
    name="lsf",
    submit="bsub",
    gpus="-gpu num={n}:mode=exclusive_process",
    memory="{mb}MB",  # without a unit a site's own, LSF_UNIT_FOR_LIMITS, would hold
    memory_plain="{kb}",  # LSF 9 and OpenLava know no units
    status="bjobs",
    kill=("bkill",),
    history="bhist",
    hosts=("bhosts", "-o", "host_name status max njobs ngpus ngpus_alloc delimiter=';'"),
    limits=None,
    job_variable="LSB_JOBID",
)
JH = Dialect(
    name="jh",
    submit="jsub",
    gpus="-gpgpu {n}",
    memory="{mb}",
    memory_plain="{mb}",
    status="jjobs",
    kill=("jctrl", "kill"),
    history="jhist",
    hosts=("jhosts", "-w"),
    limits=("jlimits", "-n"),
    job_variable="JH_JOBID",
)
DIALECTS = {dialect.name: dialect for dialect in (JH, LSF)}


def choose(name: str) -> Dialect:
    """``auto`` = whose submit command is on PATH; JH where both are, for it brings LSF's names too.

    Raises UserError where neither is.
    """
    if name != "auto":
        return DIALECTS[name]
    for dialect in DIALECTS.values():
        if shutil.which(dialect.submit):
            return dialect
    wanted = " or ".join(dialect.submit for dialect in DIALECTS.values())
    raise UserError(f"no queue here: PATH has no {wanted}; expected to run on a login node")


def accepted(answer: str) -> str | None:
    """The id in the answer to a submission; None where it was refused."""
    found = re.search(r"\bJob\s*<(\d+)>", answer)
    return found[1] if found else None


def is_limit(answer: str) -> bool:
    """Whether a refusal means: not now (too many pending jobs), rather than: never."""
    if accepted(answer) or re.search(r"(RUN|MEM|CPU)_?LIMIT|hard limit", answer, re.IGNORECASE):
        return False  # accepted, or asking for more than the queue ever gives
    return bool(re.search(r"上限|limit", answer, re.IGNORECASE))


def read_jobs(answer: str) -> dict[str, Job] | None:
    """The table of jobs, by id. A header alone is an answer, of no jobs; None = no answer."""
    lines = [line for line in answer.splitlines() if line.strip()]
    if lines and re.match(r"No .*job.* found", lines[0].strip()):
        return {}
    if not lines:
        return None
    columns = [column.strip().upper() for column in lines[0].split(";")]
    if not {"JOBID", "STAT", "QUEUE"} <= set(columns):
        return None
    jobs = {}
    for line in lines[1:]:
        row = dict(zip(columns, (cell.strip() for cell in line.split(";")), strict=False))
        if not row["JOBID"].isdigit() or row.get("STAT") not in _STATES or "QUEUE" not in row:
            return None
        host = re.sub(r"^\d+\*", "", row.get("EXEC_HOST", "-").split(":")[0])
        known = host not in ("", "-")
        job = Job(row["JOBID"], _STATES[row["STAT"]], row["QUEUE"], host if known else None)
        jobs[job.id] = job
    return jobs


def read_reason(history: str) -> str | None:
    """Why the scheduler ended a job (TERM_RUNLIMIT ...); None where it says nothing of it."""
    found = re.findall(r"\bTERM_[A-Z_]+", history)
    return found[-1] if found else None
