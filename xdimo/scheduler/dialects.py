"""Dialects of the queue, as data: LSF (bsub ...) and JH UniScheduler (jsub ...).

Both take a script on standard input and options as arguments, and list jobs as a table whose
columns are asked for. Nothing passes through a shell: arguments are a list.
"""

import re
import shlex
import shutil
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from xdimo.errors import UserError

SCRIPT_LIMIT_BYTES = 4096  # a longer script is refused

# unknown: the scheduler does not see the job's host. other: a word that is not known here.
State = Literal["pending", "running", "suspended", "unknown", "other", "done", "exit"]
ALIVE: frozenset[State] = frozenset({"pending", "running", "suspended", "unknown", "other"})

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

# What the scheduler says to a submission that it does not take.
_LIMIT = re.compile(  # too many jobs; a limit of time or memory is another thing
    r"\bpending\b.{0,40}\b(limit|threshold)|\bjob( slots?)? limit\b.{0,20}\breached"
    r"|(待提交|排队|作业数|任务数).{0,20}上限",
    re.IGNORECASE,
)
_CLOSED = re.compile(r"Queue has been closed", re.IGNORECASE)
_AWAY = re.compile(
    r"not responding|is down|please wait|try later|timed? ?out|cannot connect|not connected"
    r"|connection refused|unable to reach|cannot fork|daemon internal error|protocol error"
    r"|temporarily unavailable|cannot allocate memory|no job id can be used",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"not submitted|no such queue|提交.{0,10}失败|未能?提交|拒绝|^usage:"
    r"|(illegal|invalid|unknown|unrecogni[sz]ed) option",
    re.IGNORECASE | re.MULTILINE,
)
_NO_JOB = re.compile(r"^\s*(No .*job.* found|Job <.+> is not found)", re.IGNORECASE | re.MULTILINE)

# Exit codes of what a signal ended. Nothing but a run limit sends SIGUSR2, or a CPU limit SIGXCPU;
# the others are somebody's or the system's will. (SIGSEGV and its like are the program's fault.)
LIMIT_CODES = frozenset({128 + signal.SIGUSR2, 128 + signal.SIGXCPU})
KILLED_CODES = frozenset(
    128 + signal.Signals[f"SIG{name}"]
    for name in ("HUP", "INT", "QUIT", "KILL", "TERM", "USR1", "ALRM")
)


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
    word: str  # of the state, as the scheduler has it

    @property
    def alive(self) -> bool:
        return self.state in ALIVE


@dataclass(frozen=True)
class History:
    """What the history says of a job, since it was started last."""

    known: bool  # whether it knows the job at all
    reason: str | None = None  # TERM_RUNLIMIT, exit code 140, ...
    code: int | None = None  # exit code, 0 = done; None = no end there
    requeued: bool = False  # it will be started again, under the same id
    running: bool = False  # it has started, and not ended


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
    hosts: tuple[tuple[str, ...], ...]  # the next one where a site's version lacks the one before
    limits: tuple[str, ...] | None  # what the user may still submit
    job_variable: str  # of a job's environment: its id
    environment: Mapping[str, str] = field(default_factory=dict)  # of its commands

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
    hosts=(
        ("bhosts", "-o", "host_name status max njobs ngpus ngpus_alloc delimiter=';'"),
        ("bhosts", "-w"),  # without -w a full host is called closed
    ),
    limits=None,
    job_variable="LSB_JOBID",
    environment={"LSB_NTRIES": "1"},  # else bsub waits at the pending limit, and tries for ever
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
    hosts=(("jhosts", "-w"),),
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
    return accepted(answer) is None and bool(_LIMIT.search(answer))


def is_closed(answer: str) -> bool:
    """Whether a refusal means that the queue takes no jobs for now."""
    return bool(_CLOSED.search(answer))


def is_away(answer: str) -> bool:
    """Whether the scheduler could not be reached, or not serve: the submission may have arrived."""
    return bool(_AWAY.search(answer))


def is_refusal(answer: str) -> bool:
    """Whether the text says that the job was not taken. An answer that is cut says nothing."""
    return bool(_REFUSED.search(answer))


def read_jobs(answer: str) -> dict[str, Job] | None:
    """The table of jobs, by id. A header alone is an answer, of no jobs; None = no answer.

    Lines around the table, and rows without a job's id, are passed over. A state that is not known
    here is its job's alone.
    """
    rows = [[cell.strip() for cell in line.split(";")] for line in answer.splitlines()]
    while rows and not {"JOBID", "STAT", "QUEUE"} <= {cell.upper() for cell in rows[0]}:
        rows.pop(0)
    if not rows:
        return {} if _NO_JOB.search(answer) else None
    columns = [cell.upper() for cell in rows[0]]
    jobs = {}
    for row in rows[1:]:
        cells = dict(zip(columns, row, strict=False))
        if not cells.get("JOBID", "").isdigit():
            continue
        host = re.sub(r"^\d+\*", "", cells.get("EXEC_HOST", "-").split(":")[0])
        known = host not in ("", "-")
        word = cells.get("STAT", "")
        state = _STATES.get(word.upper(), "other")
        job = Job(cells["JOBID"], state, cells.get("QUEUE", ""), host if known else None, word)
        jobs[job.id] = job
    return jobs


# A line of the history that tells of the job: its time, then what happened. Names, paths and
# commands, which may have any word in them, are in <> and come after words of another kind.
_EVENT = re.compile(
    r"[\w\s:.,-]{0,40}?"
    r"(\b(Start(ed|ing)|Dispatched|Done|Exited|Completed|has been requeued)\b|TERM_[A-Z])"
)


def read_history(answer: str) -> History | None:
    """None = no answer: neither a job's history, nor that there is none."""
    text = re.sub(r"\n {12,}", "", answer)  # lines are wrapped, in the middle of words too
    events = "\n".join(
        re.sub(r"<[^<>]*>", "<>", line) for line in text.splitlines() if _EVENT.match(line)
    )
    if _NO_JOB.search(text):
        return History(known=False)
    if not (events or re.search(r"\bJob\s*<\d+>", text)):
        return None
    *_, last = re.split(r"has been requeued|TERM_REQUEUE_\w+", events)
    ended = re.search(r"\b(Exited|Completed|Done|TERM_\w+)\b", last)
    begun = re.search(r"\b(Start(ed|ing)|Dispatched)\b", last)
    if last != events and not (begun or ended):
        return History(True, "requeued", requeued=True)
    code = None
    for how, number in re.findall(r"(exit code|by signal)\s+(\d+)", last):
        code = int(number) + (128 if how == "by signal" else 0)
    if code is None and re.search(r"\bDone\b", last):
        code = 0
    found = re.findall(r"\bTERM_[A-Z_]+", last)
    ended_by = f"exit code {code}" if code in LIMIT_CODES | KILLED_CODES else None
    return History(True, found[-1] if found else ended_by, code, running=bool(begun) and not ended)


def read_reason(history: str) -> str | None:
    """Why the scheduler ended a job (TERM_RUNLIMIT ...); None where it says nothing of it."""
    read = read_history(history)
    return read.reason if read else None
