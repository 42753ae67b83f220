"""The dispatcher, one poll at a time, against a scheduler that is told what to answer."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.records import bench as matrix
from xdimo.files import write_json
from xdimo.scheduler import job_outcome
from xdimo.scheduler.admission import Limits
from xdimo.scheduler.dialects import DIALECTS, Dialect
from xdimo.scheduler.dispatcher import Spool
from xdimo.scheduler.job_outcome import Ending
from xdimo.scheduler.site import Answer, Silent, Site
from xdimo.scheduler.submissions import Ledger
from xdimo.scheduler.task import Rules, Work


@dataclass
class Fake(Site):
    """A scheduler of a few lines: it accepts, and knows what it is told."""

    dialect: Dialect = field(default_factory=lambda: DIALECTS["jh"])
    timeout_s: float = 1
    states: dict[str, str] = field(default_factory=dict)
    silent: bool = False
    killed: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    cut: bool = False  # the next submission arrives, but its answer does not

    def ask(self, command: Sequence[str], **options: Any) -> Answer:
        self.commands += 1
        name = command[0]
        if name == "jsub":
            job = str(1 + len(self.states))
            self.states[job] = "PEND"
            self.names[job] = command[command.index("-J") + 1]
            if self.cut:
                self.cut = False
                raise Silent("jsub: no answer in 1 s")
            return Answer(0, f"Job <{job}> is submitted")
        if name == "jctrl":
            self.killed += command[2:]
            self.states |= dict.fromkeys(command[2:], "EXIT")
            return Answer(0, "")
        if self.silent:
            raise Silent("jjobs: no answer in 1 s")
        if name == "jjobs":
            wanted = command[command.index("-J") + 1] if "-J" in command else None
            rows = [
                f"{job};{state};q;-"
                for job, state in self.states.items()
                if wanted in (None, self.names[job])
            ]
            return Answer(0, "\n".join(["JOBID;STAT;QUEUE;EXEC_HOST", *rows]))
        return Answer(0, "")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def spool(folder: Path, site: Site, clock: Clock, **changes: Any) -> Spool:
    rules = {
        "targets": matrix(folder).targets,
        "limits": Limits(1, "queue"),
        "cpus_per_gpu": 8,
        "poll_s": 10,
        "latency_s": 5,
        "grace_s": 60,
        "closed_s": 60,
        **changes,
    }
    made = Spool(site, Ledger(folder / "queue"), Rules(**rules), lambda _: None, clock)
    made.open()
    return made


def work(folder: Path, name: str = "gpu_h200-bs1-r1", content: str = "sha256:00") -> Work:
    return Work(name, content, "gpu_h200", 4, 32, "true", folder, folder / name / "run.json")


def test_a_submission_whose_answer_was_cut_is_found_by_its_name(
    tmp_path: Path, clock: Clock
) -> None:
    site = Fake(cut=True)
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    one.poll()
    assert one.live["gpu_h200-bs1-r1"].entry.job is None
    one.poll()
    assert one.live["gpu_h200-bs1-r1"].entry.job == "1"
    assert len(site.states) == 1


def test_a_submission_that_never_arrived_is_made_again(tmp_path: Path, clock: Clock) -> None:
    site = Fake()
    one = spool(tmp_path, site, clock)
    entry = one.ledger.begin("gpu_h200-bs1-r1", "sha256:00", "gpu_h200", 4, False)
    one.add(work(tmp_path))
    clock.now = entry.since + 0.5  # perhaps still under way
    one.poll()
    assert not site.states
    clock.now = entry.since + 2
    one.poll()
    one.poll()
    assert [name.rpartition(".")[0] for name in site.names.values()] == ["gpu_h200-bs1-r1.2"]


def test_other_content_ends_the_live_job_first(tmp_path: Path, clock: Clock) -> None:
    site = Fake()
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    one.poll()
    one.shut()
    site.states["1"] = "RUN"
    again = spool(tmp_path, site, clock)
    again.add(work(tmp_path, content="sha256:ff"))
    again.poll()
    assert site.killed == ["1"]
    assert site.names["2"].startswith("gpu_h200-bs1-r1.2.")


def test_two_folders_with_the_same_spec_have_jobs_of_their_own(
    tmp_path: Path, clock: Clock
) -> None:
    site = Fake()
    one = spool(tmp_path / "one", site, clock)
    one.add(work(tmp_path / "one"))
    one.poll()
    other = spool(tmp_path / "other", site, clock)
    entry = other.ledger.begin("gpu_h200-bs1-r1", "sha256:00", "gpu_h200", 4, False)
    other.add(work(tmp_path / "other"))
    clock.now = entry.since + 2
    other.poll()
    assert entry.job_name not in site.names.values()
    assert other.ledger.newest("gpu_h200-bs1-r1") != one.ledger.newest("gpu_h200-bs1-r1")
    assert "gpu_h200-bs1-r1" in other.waiting  # its submission never arrived


def test_what_was_cancelled_runs_afresh_when_asked_for_again(tmp_path: Path, clock: Clock) -> None:
    site = Fake()
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    one.poll()
    one.end(one.submitted())
    one.shut()
    again = spool(tmp_path, site, clock)
    again.add(work(tmp_path))
    assert again.poll() == []
    assert len(site.states) == 2


def test_silence_concludes_nothing_and_asks_less_and_less(tmp_path: Path, clock: Clock) -> None:
    site = Fake()
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    one.poll()
    site.silent = True
    asked = []
    for _ in range(200):
        clock.now += 10
        before = site.commands
        assert one.poll() == []
        asked.append(site.commands - before)
    assert sum(asked) < 20
    site.silent = False
    site.states["1"] = "RUN"
    clock.now += 400
    assert one.poll() == []
    assert one.live["gpu_h200-bs1-r1"].ending is None


def test_a_vanished_job_is_lost_only_after_the_grace_period(tmp_path: Path, clock: Clock) -> None:
    site = Fake()
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    one.poll()
    site.states = {}
    assert one.poll() == []
    clock.now += 59
    assert one.poll() == []
    clock.now += 2
    [ended] = one.poll()
    assert (ended.ending.outcome, ended.retry) == ("lost", True)
    assert site.killed == ["1"]  # should it live after all
    assert job_outcome.of_run(tmp_path / "gpu_h200-bs1-r1/run.json", "1")


def test_a_finished_answer_is_taken_up_only_where_the_workflow_was_interrupted(
    tmp_path: Path, clock: Clock
) -> None:
    site = Fake()
    one = spool(tmp_path, site, clock)
    one.add(work(tmp_path))
    one.poll()
    one.shut()
    attempt = {"outcome": "ok", "reason": None, "job": "1", "attempt": 1, "log": None}
    write_json(tmp_path / "gpu_h200-bs1-r1/attempts/1/run.json", attempt)
    site.states["1"] = "DONE"
    again = spool(tmp_path, site, clock)
    again.add(work(tmp_path))
    [ended] = again.poll()
    assert ended.ending == Ending("ok")
    assert (tmp_path / "gpu_h200-bs1-r1/run.json").exists()  # its launcher died before this one
    assert len(site.states) == 1
    again.shut()
    forced = spool(tmp_path, site, clock)
    asked = work(tmp_path)
    forced.add(Work(**{**vars(asked), "interrupted": False}))
    forced.poll()
    assert len(site.states) == 2


def test_status_commands_are_as_many_for_a_hundred_jobs(tmp_path: Path, clock: Clock) -> None:
    counts = []
    for number in (1, 100):
        site = Fake()
        one = spool(tmp_path / str(number), site, clock, limits=Limits(1000, "queue"))
        for index in range(number):
            one.add(work(tmp_path / str(number), f"gpu_h200-bs1-r{index + 1}"))
        one.poll()
        before = site.commands
        one.poll()
        counts.append(site.commands - before)
    assert counts[0] == counts[1] == 1
