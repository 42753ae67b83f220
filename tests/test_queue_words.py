"""What LSF says and does, line by line: the dispatcher against its words. No scheduler here."""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from tests.records import bench as matrix
from tests.records import hardware, spec_of, write_run
from tests.test_cluster import REQUEST
from tests.test_spool import Clock, Fake, spool, work
from xdimo.doctor import login
from xdimo.errors import UserError
from xdimo.files import write_json
from xdimo.scheduler import dispatcher, queue_session, status
from xdimo.scheduler.dialects import (
    DIALECTS,
    LSF,
    Dialect,
    History,
    is_limit,
    read_history,
    read_jobs,
    read_reason,
)
from xdimo.scheduler.dispatcher import Spool
from xdimo.scheduler.hosts import free_cards, read_hosts
from xdimo.scheduler.job_outcome import Ending, by_scheduler
from xdimo.scheduler.site import Answer, Silent, Site
from xdimo.scheduler.task import Ended

HEAD = "JOBID;STAT;QUEUE;EXEC_HOST"
RUN = "gpu_h200-bs1-r1"
FULL = """HOST_NAME          STATUS          JL/U    MAX  NJOBS    RUN  SSUSP  USUSP    RSV
h01                closed_Full        -     40     40     40      0      0      0
h02                ok                 -     40      0      0      0      0      0
"""


@pytest.fixture
def clock() -> Clock:
    return Clock()


@dataclass
class Lsf(Fake):
    """Adds LSF's words to the scheduler that is told what to answer."""

    dialect: Dialect = field(default_factory=lambda: DIALECTS["lsf"])
    refusals: list[str] = field(default_factory=list)  # of the next submissions
    closed: set[str] = field(default_factory=set)  # queues
    hosts_of: dict[str, str] = field(default_factory=dict)  # job -> host
    histories: dict[str, str] = field(default_factory=dict)
    tables: dict[str, str] = field(default_factory=dict)  # of bhosts, by its option
    noise: str = ""
    garbled: list[str] = field(default_factory=list)  # answers to submissions that do arrive
    said: list[str] = field(default_factory=list)
    asked: list[list[str]] = field(default_factory=list)

    def ask(self, command: Sequence[str], **options: Any) -> Answer:
        self.asked.append(list(command))
        name = command[0]
        if name == "bsub":
            if self.refusals:
                return Answer(255, self.refusals.pop(0))
            queue = command[command.index("-q") + 1]
            if queue in self.closed:
                return Answer(255, f"{queue}: Queue has been closed. Job not submitted.\n")
            taken = super().ask(["jsub", *command[1:]], **options)
            return Answer(1, self.garbled.pop(0)) if self.garbled else taken
        if name == "bkill":
            return super().ask(["jctrl", "kill", *command[1:]])
        if name == "bhist":
            return Answer(0, self.histories.get(command[-1], "No matching job found\n"))
        if name == "bhosts":
            wrong = f"bhosts: illegal option -- {command[1][1:]}\nUsage: bhosts [-h] [-V] ...\n"
            return Answer(0, self.tables.get(command[1], wrong))
        if self.silent:
            raise Silent("bjobs: no answer in 1 s")
        wanted = command[command.index("-J") + 1] if "-J" in command else None
        rows = [
            f"{job};{state};q;{self.hosts_of.get(job, '-')}"
            for job, state in self.states.items()
            if wanted in (None, self.names[job])
        ]
        if not rows:
            return Answer(254, f"Job <{wanted}> is not found\n" if wanted else "No job found\n")
        return Answer(0, "\n".join([*self.noise.splitlines(), HEAD, *rows]))


def started(folder: Path, site: Lsf, clock: Clock, **changes: Any) -> Spool:
    """A dispatcher whose first run has job 1, which runs."""
    one = spool(folder, site, clock, **changes)
    one.say = site.said.append
    one.add(work(folder))
    one.poll()
    site.states["1"] = "RUN"
    return one


def attempt(folder: Path, number: int, outcome: str | None, job: str = "1") -> None:
    """Begun by ``job``, and ended where it has an outcome."""
    inside = folder / RUN / "attempts" / str(number)
    inside.mkdir(parents=True, exist_ok=True)
    (inside / "log.jsonl").write_text(json.dumps({"event": "header", "job": job}) + "\n")
    if outcome:
        run = {"outcome": outcome, "reason": None, "job": job, "attempt": number, "log": None}
        write_json(inside / "run.json", run)


def polls(one: Spool, clock: Clock, count: int, seconds: float) -> list[Ended]:
    ended = []
    for _ in range(count):
        clock.now += seconds
        ended += one.poll()
    return ended


# -- submissions -------------------------------------------------------------------------------


def test_a_submission_that_no_table_has_is_made_again(
    tmp_path: Path,
    clock: Clock,
) -> None:
    site = Lsf()
    one = spool(tmp_path, site, clock)
    one.ledger.begin(RUN, "sha256:00", "gpu_h200", 4, False)
    one.add(work(tmp_path))
    clock.now = one.ledger.newest(RUN).since + 2  # type: ignore[union-attr]
    polls(one, clock, 2, 1)
    assert [name.split(".")[1] for name in site.names.values()] == ["2"]
    assert not one.silent


@pytest.mark.parametrize(
    "words",
    [
        "User <u>: Pending job threshold reached. Job not submitted.",
        "Group <g>: Pending job threshold reached. Job not submitted.",
        "User <u>: Pending job slots threshold reached. Job not submitted.",
    ],
)
def test_a_threshold_is_waited_out(tmp_path: Path, clock: Clock, words: str) -> None:
    site = Lsf(refusals=[words] * 3)
    one = spool(tmp_path, site, clock)
    one.say = site.said.append
    one.add(work(tmp_path))
    assert is_limit(words)
    assert polls(one, clock, 1, 10) == []
    assert one._why[RUN] == "the queue takes no more jobs for now"
    assert polls(one, clock, 3, 10) == []
    assert [name.split(".")[1] for name in site.names.values()] == ["1"]
    assert len([said for said in site.said if "takes no more jobs for now" in said]) == 1


def test_a_submission_never_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bsub = tmp_path / "bsub"
    bsub.write_text('#!/bin/sh\n[ "$LSB_NTRIES" = 1 ] || exec sleep 60\necho "Job <7> is"\n')
    bsub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert Site(LSF, 5).ask(["bsub"]).text == "Job <7> is\n"


def test_an_absent_daemon_refuses_nothing(tmp_path: Path, clock: Clock) -> None:
    site = Lsf(refusals=["batch daemon not responding. Job not submitted."])
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    assert one.poll() == []
    clock.now = one.ledger.newest(RUN).since + 2  # type: ignore[union-attr]
    assert polls(one, clock, 3, 1) == []
    assert list(site.states) == ["1"]


UNREAD = ["", "Job <1", "Terminated", "Segmentation fault (core dumped)", "Warning: ticket expired"]


@pytest.mark.parametrize("words", UNREAD)
def test_an_answer_that_is_not_understood_is_no_refusal(
    tmp_path: Path, clock: Clock, words: str
) -> None:
    site = Lsf(garbled=[words])
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    assert polls(one, clock, 3, 10) == []
    assert list(site.states) == ["1"]
    assert one.live[RUN].entry.job == "1"


def test_a_refusal_in_unknown_words_is_not_tried_for_ever(tmp_path: Path, clock: Clock) -> None:
    site = Lsf(refusals=["esub: kein Kontingent"] * 9)
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    clock.now = time.time()
    [ended] = polls(one, clock, 9, 10)
    assert ended.ending == Ending("rejected", "esub: kein Kontingent")
    assert not ended.retry
    assert len(site.refusals) == 9 - dispatcher.SUBMISSIONS
    one.add(work(tmp_path))  # asked for anew, it has as many tries
    assert len(polls(one, clock, 9, 10)) == 1
    assert len(site.refusals) == 9 - 2 * dispatcher.SUBMISSIONS


PASSING = [
    "Batch daemon cannot fork",
    "Master batch daemon internal error",
    "System call failed: Resource temporarily unavailable",
    "Cannot allocate memory",
    "Server is not connected",
    "Batch protocol error",
    "No job Id can be used now",
]


@pytest.mark.parametrize("words", PASSING)
def test_what_passes_by_itself_refuses_nothing(tmp_path: Path, clock: Clock, words: str) -> None:
    site = Lsf(refusals=[f"{words}. Job not submitted."] * (dispatcher.SUBMISSIONS + 1))
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    clock.now = time.time()
    assert polls(one, clock, 12, 10) == []
    assert list(site.states) == ["1"]


NEVER = [
    "Bad CPU limit specification. Job not submitted.",
    "Requested run limit exceeds queue limit. Job not submitted.",
    "MEMLIMIT: Cannot exceed queue's hard limit(s). Job not submitted.",
    "提交作业失败: 超过队列的内存上限",
    "提交作业失败: 运行时间超过上限",
]


@pytest.mark.parametrize("words", NEVER)
def test_a_limit_of_something_else_is_not_waited_for(
    tmp_path: Path, clock: Clock, words: str
) -> None:
    site = Lsf(refusals=[words])
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    [ended] = one.poll()
    assert ended.ending == Ending("rejected", words)


def test_a_closed_queue_is_waited_for_and_holds_no_other_back(
    tmp_path: Path,
    clock: Clock,
) -> None:
    site = Lsf(closed={"gpu_6000ada"})
    one = spool(tmp_path, site, clock, closed_s=60)
    mine, next_one = (
        replace(work(tmp_path, f"gpu_6000ada-bs{n}-r1"), target="gpu_6000ada") for n in (1, 2)
    )
    one.add(mine)
    one.add(work(tmp_path))
    assert one.poll() == []
    assert list(one.live) == [RUN]  # the only pending slot is its
    assert one._why[mine.name] == "gpu_6000ada is closed"
    site.states["1"] = "RUN"
    assert polls(one, clock, 1, 50) == []
    site.closed = set()
    assert one.poll() == []
    assert mine.name in one.live
    # Closed for too long, its cells end as those of closed hosts do; what it has already goes on.
    site.closed = {"gpu_6000ada"}
    one.rules = replace(one.rules, limits=replace(one.rules.limits, pending=9))
    one.add(next_one)
    [ended] = polls(one, clock, 4, 40)
    assert ended.work == next_one
    assert ended.ending.outcome == "unavailable"
    assert "Queue has been closed" in str(ended.ending.reason)
    assert mine.name in one.live
    assert site.killed == []


@pytest.mark.parametrize("looked_at", [False, True])
def test_a_closed_queue_may_open_again(tmp_path: Path, clock: Clock, looked_at: bool) -> None:
    look = replace(work(tmp_path, "preflight-gpu_h200"), is_run=False)
    site = Lsf(closed={"gpu_h200"})
    changes = {"preflight": lambda target: look} if looked_at else {}
    one = spool(tmp_path, site, clock, **changes)
    for _ in range(2):
        one.add(work(tmp_path))
        [ended] = polls(one, clock, 9, 10)
        assert ended.ending.outcome == "unavailable"
        assert not (one.waiting or one.live)
    site.closed = set()
    one.add(work(tmp_path))
    assert polls(one, clock, 1, 10) == []
    assert next(iter(site.names.values())).startswith("preflight-" if looked_at else RUN)


def test_a_numeric_resource_asks_for_cards() -> None:
    asked = replace(REQUEST, gpu_request='-R "rusage[ngpus={n}]"')
    command = LSF.submit_command(asked)
    assert command.count("-R") == 1
    assert command[command.index("-R") + 1] == "rusage[ngpus=4] span[hosts=1]"
    assert "-gpu" not in command
    assert command[command.index("-M") + 1] == "250000000"  # KB, of 1,024 bytes
    asked = replace(REQUEST, gpu_request="-gpu num={n}:mode=shared")
    command = LSF.submit_command(asked)
    assert command[command.index("-gpu") + 1] == "num=4:mode=shared"
    assert command[command.index("-M") + 1] == "256000MB"
    assert "rusage" not in " ".join(LSF.submit_command(replace(asked, gpus=0)))


@pytest.mark.parametrize("text", ["", "-gpu 4", "ngpus={n}", '-R "rusage[ngpus={n}]', "-x{n}"])
def test_a_gpu_request_is_an_option_with_a_number(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"targets\.gpu_h200\.gpu_request: .*expected an option"):
        matrix(tmp_path, targets={"gpu_h200": {"gpu_request": text}})


# -- tables ------------------------------------------------------------------------------------


def test_noise_around_a_table_is_passed_over(tmp_path: Path, clock: Clock) -> None:
    noisy = f"Notice; of the site\n{HEAD}\n7;RUN;q;4*h01\n8[2];RUN;q;h\nx\n9;HM;q;h\nWarning: x\n"
    jobs = read_jobs(noisy)
    assert jobs is not None
    assert {job.id: job.state for job in jobs.values()} == {"7": "running", "9": "other"}
    assert read_jobs("Notice\n") is None
    hosts = read_hosts(f"Notice of the site\n{FULL}a row cut\nWarning: daemon\n")
    assert hosts is not None
    assert list(hosts) == ["h01", "h02"]
    site = Lsf(noise="LSF is being upgraded; jobs go on\n")
    one = started(tmp_path, site, clock)
    site.states |= {"1": "DONE", "77": "HM"}
    site.names["77"] = "of another"
    attempt(tmp_path, 1, "ok")
    [ended] = one.poll()
    assert ended.ending == Ending("ok")


def test_hosts_of_a_version_without_columns(tmp_path: Path, clock: Clock) -> None:
    targets = matrix(tmp_path).targets
    targets = {"gpu_h200": targets["gpu_h200"].model_copy(update={"hosts": ["h01"]})}
    site = Lsf(tables={"-w": FULL})
    one = spool(tmp_path, site, clock, targets=targets, closed_s=0)
    one.add(work(tmp_path))
    site.states["7"], site.names["7"] = "PEND", "by hand"
    for _ in range(3):
        assert one.poll() == []  # full, and no outage
        clock.now += 10
    options = [command[1] for command in site.asked if command[0] == "bhosts"]
    assert options == ["-o", "-w", "-w", "-w"]
    hosts = read_hosts(FULL)
    assert hosts is not None
    assert not hosts["h01"].out
    assert hosts["h01"].free(8) == 0
    plain = read_hosts("HOST_NAME STATUS MAX NJOBS\nh01 closed 40 40\nh02 closed 40 8\n")
    assert plain is not None
    assert [host.out for host in plain.values()] == [False, True]


def test_suspended_jobs_keep_their_cards(tmp_path: Path, clock: Clock) -> None:
    targets = {
        name: target.model_copy(update={"hosts": ["h01"] if name == "gpu_h200" else []})
        for name, target in matrix(tmp_path).targets.items()
    }
    table = "HOST_NAME;STATUS;MAX;NJOBS;NGPUS;NGPUS_ALLOC\nh01;ok;40;0;5;0\n"
    site = Lsf(tables={"-o": table}, hosts_of={"1": "32*h01"})
    one = started(tmp_path, site, clock, targets=targets)
    site.states["1"] = "USUSP"
    one.add(replace(work(tmp_path, "gpu_h200-bs4-r1"), content="sha256:4"))
    polls(one, clock, 3, 10)
    assert list(site.states) == ["1"]
    hosts = read_hosts(table)
    free, _ = free_cards({"t": targets["gpu_h200"]}, hosts, {}, 8, {"h01": 4})
    assert free == {"t": (1,)}


# -- requeued, unknown, gone -------------------------------------------------------------------

REQUEUED = """Job <1>, User <u>, Project <default>
Sat Nov 28 10:00:00: Starting (Pid 7);
Sat Nov 28 10:01:00: Exited with exit code 143. The CPU time used is 0.1 seconds;
Sat Nov 28 10:01:00: Pending: Job has been requeued;
"""


@pytest.mark.parametrize("history", [REQUEUED, REQUEUED[:-38] + "TERM_REQUEUE_OWNER: requeued;\n"])
def test_a_requeued_job_is_followed(
    tmp_path: Path,
    clock: Clock,
    history: str,
) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    one.poll()
    attempt(tmp_path, 1, "killed")
    site.states["1"], site.histories["1"] = "EXIT", history
    assert polls(one, clock, 3, 10) == []
    site.states["1"] = "PEND"
    assert polls(one, clock, 2, 100) == []
    site.states["1"] = "RUN"
    attempt(tmp_path, 2, None)
    site.histories["1"] += "Sat Nov 28 10:02:00: Starting (Pid 8);\n"
    assert polls(one, clock, 2, 100) == []
    # What its first start said is not the word of its second.
    site.states["1"] = "EXIT"
    site.histories["1"] += "Sat Nov 28 10:03:00: Exited with exit code 3.\n"
    [ended] = polls(one, clock, 2, 10)
    assert (ended.ending.outcome, list(site.states)) == ("crash", ["1"])


def test_an_ended_job_that_lives_again_is_taken_up(
    tmp_path: Path,
    clock: Clock,
) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    one.poll()
    attempt(tmp_path, 1, "killed")
    site.states["1"] = "EXIT"
    [ended] = polls(one, clock, 2, 10)
    assert ended.retry
    site.states["1"] = "PEND"  # requeued since
    one.add(work(tmp_path))
    polls(one, clock, 2, 10)
    assert list(site.states) == ["1"]
    assert one.live[RUN].entry.job == "1"
    one.ledger.change(one.ledger.begin(RUN, "sha256:00", "gpu_h200", 4, False), stage="refused")
    one.shut()
    one = spool(tmp_path, site, clock)  # of a controller killed since, too
    one.add(work(tmp_path))
    polls(one, clock, 2, 10)
    assert list(site.states) == ["1"]
    site.states["1"] = "DONE"
    attempt(tmp_path, 2, "ok")
    [ended] = one.poll()
    assert ended.ending == Ending("ok")


def test_of_two_jobs_of_one_run_the_earlier_is_ended(
    tmp_path: Path,
    clock: Clock,
) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    attempt(tmp_path, 1, "killed")
    site.states["1"] = "EXIT"
    polls(one, clock, 2, 10)
    one.add(work(tmp_path))
    polls(one, clock, 1, 10)
    assert list(site.states) == ["1", "2"]
    site.killed.clear()
    site.states["1"] = "RUN"
    polls(one, clock, 1, 10)
    assert site.killed == ["1"]
    assert one.live[RUN].entry.job == "2"


DAMAGED = [
    '{"outcome"',
    "[]",
    "1",
    '{"job": "1"}',
    '{"job": "1", "outcome": "ok", "reason": null, "attempt": 1}',
    '{"job": "1", "outcome": [], "reason": null, "attempt": 1, "log": null}',
    '{"job": "1", "outcome": "weird", "reason": null, "attempt": 1, "log": null}',
]


@pytest.mark.parametrize("text", DAMAGED)
@pytest.mark.parametrize("header", ['{"event": "header", "job": "1"}', "[]", ""])
def test_a_damaged_ending_is_said_and_kept(
    tmp_path: Path, clock: Clock, text: str, header: str
) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    attempt(tmp_path, 1, "ok")
    (tmp_path / RUN / "attempts/1/log.jsonl").write_text(header + "\n")
    path = tmp_path / RUN / "attempts/1/run.json"
    path.write_text(text)
    (tmp_path / RUN / "run.json").write_text(text)
    site.states["1"] = "EXIT"
    [ended] = polls(one, clock, 3, 10)
    assert (ended.ending.outcome, ended.retry) == ("crash", True)
    assert len([said for said in site.said if said.startswith(f"{path}: damaged")]) == 1
    assert path.read_text() == text
    assert status._ended(RUN, tmp_path / RUN).state == "crash"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"lines": [1]}'])
def test_a_damaged_preflight_is_said(tmp_path: Path, clock: Clock, text: str) -> None:
    name = "preflight-gpu_h200"
    look = replace(work(tmp_path, name), is_run=False)
    site = Lsf()
    one = spool(tmp_path, site, clock, preflight=lambda target: look)
    one.add(work(tmp_path))
    one.poll()
    site.states["1"] = "DONE"
    look.answer.write_text(text)
    [ended] = polls(one, clock, 2, 10)
    assert ended.ending.outcome == "unavailable"
    assert f"{look.answer}: damaged" in str(ended.ending.reason)


def test_an_id_that_came_round_again_is_nobody_of_ours(
    tmp_path: Path,
    clock: Clock,
) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    attempt(tmp_path, 1, "killed")
    site.states["1"] = "EXIT"
    polls(one, clock, 2, 10)
    site.killed.clear()
    site.states["1"], site.names["1"] = "RUN", "by hand"
    one.add(work(tmp_path))
    polls(one, clock, 3, 10)
    assert site.killed == []
    assert one.live[RUN].entry.job == "2"


def test_a_job_of_unknown_state(tmp_path: Path, clock: Clock) -> None:
    """It ends with its run's own answer, goes on while its log grows, and is lost in the end."""
    site = Lsf(hosts_of={"1": "h01"})
    one = started(tmp_path, site, clock)
    one.poll()
    attempt(tmp_path, 1, None)
    log = tmp_path / RUN / "attempts/1/log.jsonl"
    site.states["1"] = "UNKWN"
    for minute in range(1, 6):
        os.utime(log, (minute, minute))
        assert polls(one, clock, 1, 50) == []
    [ended] = polls(one, clock, 7, 10)
    assert ended.ending.outcome == "lost"
    assert "job 1 on h01 has an unknown state, no sign of life for 70 s" in ended.ending.reason  # type: ignore[operator]
    assert [said for said in site.said if "lost after 60 s without a sign of life" in said]
    assert site.killed == ["1"]
    one.add(work(tmp_path))
    polls(one, clock, 1, 10)
    assert list(site.states) == ["1", "2"]
    site.states["2"] = "UNKWN"
    attempt(tmp_path, 2, "ok", job="2")
    [ended] = one.poll()
    assert ended.ending == Ending("ok")


@pytest.mark.parametrize("word", ["HOLD", "FWD_PEND", "UNKNOWN", ""])
def test_a_state_in_a_word_that_is_not_known_is_alive(
    tmp_path: Path, clock: Clock, word: str
) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    site.states["1"] = word
    assert polls(one, clock, 20, 1000) == []
    assert site.killed == []
    assert [said for said in site.said if "state" in said] == [
        f"{RUN}: job 1 has the state {word!r}, not known; it goes on"
    ]
    attempt(tmp_path, 1, "ok")
    [ended] = polls(one, clock, 1, 10)
    assert ended.ending == Ending("ok")


HISTORIES = [
    ("Job <1>, User <u>\n: Starting (Pid 1);\n: Exited with exit code 3. The CPU", "crash"),
    ("Job <1>, User <u>\n: Starting (Pid 1);\n: Done successfully. The CPU", "crash"),
    ("Job <1>, User <u>\n: Starting (Pid 1);\n: Exited with exit code 140. The CPU", "timeout"),
    ("Job <1>, User <u>\n: Exited; TERM_RUNLI\n                     MIT: job ended", "timeout"),
    ("Job <1>, User <u>\n: Submitted from host <h>;\n", "lost"),
    ("No matching job found\n", "lost"),
]


@pytest.mark.parametrize(("history", "outcome"), HISTORIES)
def test_a_job_that_is_gone_ends_as_its_history_says(
    tmp_path: Path,
    clock: Clock,
    history: str,
    outcome: str,
) -> None:
    site = Lsf(histories={"1": history})
    one = started(tmp_path, site, clock)
    one.poll()
    del site.states["1"]
    [ended] = polls(one, clock, 2, 61)
    assert ended.ending.outcome == outcome
    trace = "vanished without a trace" in str(ended.ending.reason)
    assert trace == history.startswith("No matching")


SILENCES = [
    "Job <1>, User <u>\n: Starting (Pid 1);\n",
    "LSF is down. Please wait ...",
    "bhist: Cannot open event file",
]


@pytest.mark.parametrize("history", SILENCES)
def test_a_job_is_not_lost_while_no_history_says_its_end(
    tmp_path: Path, clock: Clock, history: str
) -> None:
    """Its time limit is the most that it is waited for."""
    site = Lsf(histories={"1": history})
    one = started(tmp_path, site, clock)
    one.poll()
    table, site.states = site.states, {}
    assert polls(one, clock, 10, 100) == []
    assert site.killed == []
    site.states = table
    assert polls(one, clock, 1, 100) == []
    site.states = {}
    [ended] = polls(one, clock, 3, 60 * 120)
    assert ended.ending.outcome == "lost"


def test_a_job_whose_log_grows_is_not_lost(tmp_path: Path, clock: Clock) -> None:
    site = Lsf()
    one = started(tmp_path, site, clock)
    one.poll()
    attempt(tmp_path, 1, None)
    site.states = {}
    for minute in range(1, 9):
        os.utime(tmp_path / RUN / "attempts/1/log.jsonl", (minute, minute))
        assert polls(one, clock, 1, 50) == []
    [ended] = polls(one, clock, 7, 10)
    assert (ended.ending.outcome, site.killed) == ("lost", ["1"])


NAMED_DONE = """Job <1>, Job Name <Done>, User <u>, Command <echo Exited with exit code 5>
Sat Nov 28 10:00:00: Submitted from host <h>, CWD </home/Done>, Output File </Exited/TERM_OWNER>;
Sat Nov 28 10:00:01: Starting (Pid 7);
Sat Nov 28 10:00:02: Running with execution home </home>, Execution CWD </home/Done>;
"""


def test_a_name_in_a_history_says_nothing_of_the_end() -> None:
    assert read_history(NAMED_DONE) == History(known=True, running=True)
    done = read_history(NAMED_DONE + "Sat Nov 28 10:01:00: Done successfully. The CPU time\n")
    assert done == History(known=True, code=0)


ENDS = [
    ("Exited with exit code 137", "killed"),
    ("Exited with exit code 130", "killed"),
    ("Exited with exit code 152", "timeout"),
    ("Exited by signal 24", "timeout"),
    ("Exited with exit code 139", "crash"),
    ("Exited with exit code 2", "crash"),
]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize(("words", "outcome"), ENDS)
def test_an_exit_code_says_what_it_can(
    tmp_path: Path, clock: Clock, words: str, outcome: str, listed: bool
) -> None:
    history = f"Job <1>, User <u>\n: Starting (Pid 1);\n: {words}. The CPU time used\n"
    site = Lsf(histories={"1": history})
    one = started(tmp_path, site, clock)
    site.states = {"1": "EXIT"} if listed else {}
    [ended] = polls(one, clock, 2, 61)
    assert ended.ending.outcome == outcome
    code = 152 if "signal" in words else int(words.split()[-1])
    assert f"exit code {code}" in str(ended.ending.reason)


def test_a_host_that_is_locked_is_out() -> None:
    hosts = read_hosts("HOST_NAME STATUS MAX NJOBS\nh01 closed_Lock 40 0\nh02 closed_Busy 40 8\n")
    assert hosts is not None
    assert [host.out for host in hosts.values()] == [True, False]


def test_a_run_limit_may_be_an_exit_code_alone() -> None:
    history = read_history("Job <7>\nExited with exit code 140. The CPU time used")
    assert history is not None
    assert by_scheduler(None, history.reason, Ending("crash")).outcome == "timeout"
    assert read_reason("Exited by signal 12. The CPU time used") == history.reason
    assert read_reason("Exited with exit code 1. The CPU") is None


# -- what people are told ----------------------------------------------------------------------


def test_status_after_a_rerun(tmp_path: Path) -> None:
    """The newest attempt, not the answer of the one before."""
    bench = matrix(tmp_path / "results")
    folder = write_run(bench, RUN)
    write_run(bench, RUN, outcome="crash", reason="again", attempt=2)
    assert (folder / "run.json").exists()
    found = {line.run: line for line in status.lines(bench, Lsf())}
    assert (found[RUN].state, found[RUN].note) == ("crash", "again")


def test_status_of_a_job_that_has_not_begun_shows_no_earlier_steps(tmp_path: Path) -> None:
    bench = matrix(tmp_path / "results")
    write_run(bench, RUN)
    site = Lsf(states={"7": "RUN"}, names={"7": "x"}, hosts_of={"7": "h01"})
    one = spool(tmp_path, site, Clock())
    one.ledger = queue_session.Ledger(Path(bench.queue_folder))
    entry = one.ledger.begin(RUN, "sha256:00", "gpu_h200", 4, False)
    one.ledger.change(entry, stage="submitted", job="7")
    found = {line.run: line for line in status.lines(bench, site)}
    assert (found[RUN].state, found[RUN].note) == ("running", "job 7, on h01")


def test_a_job_without_an_id_is_told_and_ended_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = matrix(tmp_path / "results")
    ledger = queue_session.Ledger(Path(bench.queue_folder))
    entry = ledger.begin(RUN, "sha256:00", "gpu_h200", 4, False)
    site = Lsf(states={"7": "PEND"}, names={"7": entry.job_name})
    monkeypatch.setattr(queue_session, "site_of", lambda bench: site)
    said = queue_session.cancel(bench, [])
    assert f"{RUN} (job named {entry.job_name}, id not known yet)" in said
    assert site.killed == ["7"]


def test_doctor_names_no_file_that_it_deletes_and_every_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = matrix(tmp_path / "results")
    monkeypatch.setattr(login, "site_of", lambda bench, transcript: Lsf(tables={"-w": "oops"}))
    found = [str(finding) for finding in login.look(bench, hardware(), None)]
    [hosts] = [line for line in found if "not a table of hosts" in line]
    assert "answer 'oops'" in hosts
    assert "/tmp" not in hosts
    cards = {
        name: card.model_copy(update={"memory_gb": None}) for name, card in hardware().cards.items()
    }
    bare = hardware().model_copy(update={"cards": cards})
    told = [finding.what for finding in login.memory_claims(bench, bare)]
    assert [line.split(":")[0] for line in told] == list(bench.targets)
    assert all("no memory_gb" in line for line in told)


def test_a_gpu_request_changes_no_run(tmp_path: Path) -> None:
    plain = matrix(tmp_path)
    asked = {"gpu_h200": {"gpu_request": "-R rusage[ngpus={n}]"}}
    assert spec_of(matrix(tmp_path, targets=asked), RUN).hash == spec_of(plain, RUN).hash
