"""The queue's decisions and readings, without a scheduler."""

import json
import os
import re
import signal
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import ROOT
from tests.records import bench as matrix
from tests.records import write_run
from xdimo.config.load import load, load_hardware
from xdimo.doctor import login, node
from xdimo.errors import UserError
from xdimo.scheduler import job_outcome, job_script, status
from xdimo.scheduler.admission import Limits, admit
from xdimo.scheduler.dialects import JH, LSF, Request, accepted, is_limit, read_jobs, read_reason
from xdimo.scheduler.hosts import free_cards, out_of_service, read_hosts
from xdimo.scheduler.job_outcome import Ending
from xdimo.scheduler.site import Answer, Silent, ask, keep, mask, replay
from xdimo.scheduler.submissions import Ledger
from xdimo.train import launch
from xdimo.train.step import EAGER_STEPS

NASTY = 'it\'s "a" $(touch pwned) `touch pwned`; touch pwned &\nfolder'


@dataclass(frozen=True)
class Want:
    target: str
    cards: int = 4
    alone: bool = False


ONE = Limits(1, "queue")


def test_what_fits_goes_first_and_the_oldest_waits_in_the_queue() -> None:
    a, b = Want("a"), Want("b")
    assert admit([a, b], [], {"a": (1,), "b": (4,)}, 0, ONE) == [b]
    assert admit([a, b], [], {"a": (1,), "b": (3,)}, 0, ONE) == [a]
    assert admit([a, b], [], {"a": (1,), "b": (3,)}, 0, Limits(1, "hold")) == []
    assert admit([a, b], [], {"a": (8,), "b": (8,)}, 1, ONE) == []
    assert admit([a, a, a, b], [], {"a": (8,), "b": (4,)}, 0, Limits(9, "queue")) == [a, a, b]
    assert admit([a], [], {"a": (2, 2)}, 0, Limits(1, "hold")) == []  # not across hosts


def test_nothing_waits_in_the_queue_while_our_own_jobs_hold_others_back() -> None:
    a, b = Want("a"), Want("b")
    assert admit([a, b], [b], {"a": (1,), "b": (3,)}, 0, ONE) == []
    assert admit([a, b], [b], {"a": (1,), "b": (4,)}, 0, ONE) == [b]
    assert admit([a], [b], {"a": (1,), "b": (3,)}, 0, ONE) == [a]
    assert admit([a, Want("b", alone=True)], [b], {"a": (1,), "b": (4,)}, 0, ONE) == []


def test_the_baseline_is_alone_on_its_target() -> None:
    baseline, other, elsewhere = Want("a", alone=True), Want("a"), Want("b")
    free = {"a": (8,), "b": (8,)}
    many = Limits(9, "queue")
    assert admit([baseline, other, elsewhere], [], free, 0, many) == [baseline, elsewhere]
    assert admit([baseline, other], [other], free, 0, many) == [other]
    assert admit([other, elsewhere], [baseline], free, 0, many) == [elsewhere]


wants = st.builds(Want, st.sampled_from("abc"), st.integers(0, 5), st.booleans())


@given(
    st.lists(wants, max_size=8),
    st.lists(wants, max_size=4),
    st.fixed_dictionaries({t: st.lists(st.integers(0, 8), min_size=1, max_size=3) for t in "abc"}),
    st.integers(0, 4),
    st.integers(1, 4),
    st.sampled_from(["queue", "hold"]),
)
def test_admission_keeps_every_limit(
    ready: list[Want],
    live: list[Want],
    cards: dict[str, list[int]],
    pending: int,
    limit: int,
    mode: Any,
) -> None:
    free = {target: tuple(each) for target, each in cards.items()}
    chosen = admit(ready, live, free, pending, Limits(limit, mode))
    assert len(chosen) <= max(limit - pending, 0)
    assert all(any(one is each for each in ready) for one in chosen)
    together = [*live, *chosen]
    for one in chosen:
        if one.alone:
            assert sum(other.target == one.target for other in together) == 1
        assert not any(other.alone and other.target == one.target for other in live)
    fitting = sum(one.cards <= max(free[one.target]) for one in chosen)
    assert fitting == len(chosen) or (mode == "queue" and len(chosen) == 1 and pending == 0)


REQUEST = Request(
    name="run.1.1a2b3c",
    queue="gpu_h200",
    hosts=("h01", "h02"),
    cpus=32,
    gpus=4,
    walltime_min=120,
    memory_gb=256,
    output="output.log",
    error="error.log",
)


def test_commands() -> None:
    shared = ["-J", "run.1.1a2b3c", "-q", "gpu_h200", "-n", "32", "-R", "span[hosts=1]"]
    files = ["-o", "output.log", "-e", "error.log", "-W", "120"]
    hosts = ["-m", "h01 h02"]
    jh = ["jsub", *shared, "-gpgpu", "4", *hosts, "-M", "256000", *files]
    assert JH.submit_command(REQUEST) == jh
    gpus = ["-gpu", "num=4:mode=exclusive_process"]
    assert LSF.submit_command(REQUEST) == ["bsub", *shared, *gpus, *hosts, "-M", "256000MB", *files]
    assert "-M" not in LSF.submit_command(replace(REQUEST, memory_gb=None))
    assert JH.kill_command(["7", "8"]) == ["jctrl", "kill", "7", "8"]
    assert LSF.status_command() == ["bjobs", "-a", "-o", "jobid stat queue exec_host delimiter=';'"]
    assert JH.history_command("7") == ["jhist", "-l", "7"]


ANSWERS = [
    ("Job <12> is submitted to queue <gpu_h200>.", "12", False),
    ("<<Waiting>>\nJob <3> has been submitted", "3", False),
    ("用户待提交任务数达上限", None, True),
    ("User's pending job slot limit reached. Job not submitted.", None, True),
    ("RUNLIMIT: Cannot exceed queue's hard limit(s). Job not submitted.", None, False),
    ("gpu_x: No such queue. Job not submitted.", None, False),
    ("", None, False),
]


@pytest.mark.parametrize(("answer", "job", "limit"), ANSWERS, ids=[a[0][:12] for a in ANSWERS])
def test_answers_to_a_submission(answer: str, job: str | None, limit: bool) -> None:
    assert (accepted(answer), is_limit(answer)) == (job, limit)


def test_status_answers() -> None:
    head = "JOBID;STAT;QUEUE;EXEC_HOST\n"
    jobs = read_jobs(head + "7;PEND;q;-\n8;USUSP;q;32*h01:8*h02\n9;UNKWN;q;h01\n10;EXIT;q;h01")
    assert jobs is not None
    assert [job.alive for job in jobs.values()] == [True, True, True, False]
    assert [job.host for job in jobs.values()] == [None, "h01", "h01", "h01"]
    assert read_jobs(head) == {} == read_jobs("No unfinished job found\n")
    for rubbish in ("", "Segmentation fault", "JOBID;STAT\n"):
        assert read_jobs(rubbish) is None
    assert read_jobs(head + "seven;RUN;q;h") == {}
    assert read_jobs("Job <run.1.1a2b3c> is not found\n") == {}
    assert read_reason("... Exited; TERM_MEMLIMIT: job killed ...") == "TERM_MEMLIMIT"
    assert read_reason("Exited with exit code 1") is None


BHOSTS = "HOST_NAME;STATUS;MAX;NJOBS;NGPUS;NGPUS_ALLOC\nh01;ok;40;32;5;4\nh02;closed_Adm;40;0;5;0\n"
JHOSTS = """HOST_NAME   STATUS  JL/U MAX NJOBS RUN SSUSP USUSP RSV
h01         ok      -    40  32    32  0     0     0
h02         unavail -    40  0     0   0     0     0
"""


@pytest.mark.parametrize("answer", [BHOSTS, JHOSTS])
def test_free_cards(answer: str, tmp_path: Path) -> None:
    hosts = read_hosts(answer)
    assert hosts is not None
    targets = dict(matrix(tmp_path).targets)
    targets["gpu_h200"] = targets["gpu_h200"].model_copy(update={"hosts": ["h01"]})
    targets["gpu_pro6000"] = targets["gpu_pro6000"].model_copy(update={"hosts": ["h02"]})
    free, said = free_cards(targets, hosts, {"gpu_6000ada": 4}, 8)
    assert free == {"gpu_6000ada": (4,), "gpu_h200": (1,), "gpu_pro6000": (0,)}
    assert said == []
    assert list(out_of_service(targets, hosts)) == ["gpu_pro6000"]
    targets["gpu_h200"] = targets["gpu_h200"].model_copy(update={"hosts": ["h01", "h09"]})
    free, said = free_cards(targets, hosts, {"gpu_h200": 4}, 8)
    assert free["gpu_h200"] == (1,)  # of the config's five
    assert said == [
        "gpu_h200: the hosts command does not list h09; gpus_free of the config is used"
    ]


def test_slots_do_not_show_a_missing_card(tmp_path: Path) -> None:
    targets = {"t": matrix(tmp_path).targets["gpu_pro6000"].model_copy(update={"hosts": ["p01"]})}
    hosts = read_hosts("HOST_NAME STATUS MAX NJOBS\np01 ok 64 0\n")
    assert free_cards(targets, hosts, {}, 8)[0] == {"t": (7,)}


@pytest.mark.parametrize("rubbish", ["", "oops", "HOST_NAME STATUS\n", "HOST_NAME;STATUS\na;b;c\n"])
def test_hosts_answers_that_cannot_be_read(rubbish: str) -> None:
    assert read_hosts(rubbish) is None


def test_the_stub_is_short_and_starts_the_script_with_nothing_interpreted(tmp_path: Path) -> None:
    folder = tmp_path / NASTY
    folder.mkdir()
    path = job_script.write(folder, "printf %s \"$JH_JOBID\" > 'my answer'", folder, JH)
    text = job_script.stub(path)
    assert len(text.encode()) < 4096
    environment = {**os.environ, "JH_JOBID": "12"}
    subprocess.run(["/bin/bash"], input=text, text=True, check=True, cwd="/", env=environment)
    assert (folder / "my answer").read_text() == "12" == (folder / "started").read_text()
    assert not list(tmp_path.rglob("pwned"))
    with pytest.raises(UserError, match="too long a path"):
        job_script.stub(Path("/" + "x" * 4100))


def test_the_job_script_hands_on_exit_codes_and_signals(tmp_path: Path) -> None:
    path = job_script.write(tmp_path, "exit 3", tmp_path, LSF)
    assert (
        subprocess.run(["/bin/bash", str(path)], env={**os.environ, "LSB_JOBID": "1"}).returncode
        == 3
    )
    program = "import signal, sys, time; signal.signal(signal.SIGUSR2, lambda *_: sys.exit(7)); "
    program += "open('ready', 'w').close(); time.sleep(60)"
    path = job_script.write(tmp_path, f'python3 -c "{program}"', tmp_path, LSF)
    job = subprocess.Popen(["/bin/bash", str(path)], env={**os.environ, "LSB_JOBID": "1"})
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
    subprocess.run(
        ["kill", "-USR2", str(job.pid)], check=True
    )  # the shell alone, as some queues do
    assert job.wait(timeout=30) == 7


def test_the_job_script_hands_on_all_that_launch_answers(tmp_path: Path) -> None:
    answered = {number.name for number in (*launch._STOPS, launch._WARNING)}
    assert {f"SIG{name}" for name in job_script.SIGNALS.split()} == answered
    program = "import signal, sys, time; got = set(); wanted = set(map(int, sys.argv[1:]))\n"
    program += "for n in wanted: signal.signal(n, lambda n, _: (open(str(n), 'w'), got.add(n)))\n"
    program += "open('ready', 'w').close()\n"
    program += "while got < wanted: time.sleep(0.01)\n"
    (tmp_path / "program.py").write_text(program)
    signals = [launch._WARNING, *launch._STOPS]
    command = f"python3 program.py {' '.join(str(int(number)) for number in signals)}\nexit 7"
    path = job_script.write(tmp_path, command, tmp_path, LSF)
    job = subprocess.Popen(["/bin/bash", str(path)], env={**os.environ, "LSB_JOBID": "1"})
    while not (tmp_path / "ready").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGPIPE)
    for number in signals:
        time.sleep(0.05)
        job.send_signal(number)
        while not (tmp_path / str(int(number))).exists():
            assert job.poll() is None
    assert job.wait(timeout=30) == 7


def test_the_ledger_has_one_holder_and_names_it(tmp_path: Path) -> None:
    one, other = Ledger(tmp_path), Ledger(tmp_path)
    one.hold()
    with pytest.raises(UserError, match=f"held by process {os.getpid()} on "):
        other.hold()
    entry = one.begin("run", "sha256:0123456789", "t", 4, False)
    assert entry.job_name == f"run.1.{entry.token}"
    assert one.change(entry, stage="submitted", job="7") == other.newest("run")
    assert one.begin("run", "sha256:0", "t", 4, False).number == 2
    one.release()
    other.hold()
    (tmp_path / "run/2/job.json").write_text("{}")
    with pytest.raises(UserError, match="not a submission"):
        other.newest("run")


def test_a_command_that_hangs_or_is_missing_says_nothing() -> None:
    with pytest.raises(Silent, match=r"no answer in 0\.2 s"):
        ask(["sleep", "9"], 0.2)
    with pytest.raises(Silent, match="No such file"):
        ask(["no-such-command"], 1)
    assert ask(["cat"], 5, stdin="a $(b)\n") == Answer(0, "a $(b)\n")


def test_a_transcript_names_no_user_and_answers_again(tmp_path: Path) -> None:
    table = "JOBID USER STAT\n7 zhang RUN\n8 li PEND\n"
    keep(tmp_path, ["jjobs", "-u", "all"], Answer(0, table))
    keep(tmp_path, ["jjobs", "-u", "all"], Answer(0, "JOBID USER STAT\n"))
    answer = replay(tmp_path)
    assert answer(["jjobs", "-u", "all"]).text == "JOBID USER STAT\n7 user RUN\n8 user PEND\n"
    assert answer(["jjobs", "-u", "all"]).text == "JOBID USER STAT\n"
    assert "zhang" not in mask("Job <7>, User <zhang>, Output File <zhang/x>")
    assert "zhang" not in mask(f"a notice\n{table}")
    with pytest.raises(UserError, match=r"no .*answer to jhosts"):
        answer(["jhosts"])


ENDINGS = [
    (Ending("killed", "SIGTERM"), "TERM_RUNLIMIT", "timeout"),
    (Ending("killed", "SIGTERM"), "TERM_MEMLIMIT", "oom_host"),
    (Ending("killed", "SIGTERM"), "TERM_OWNER", "killed"),
    (Ending("oom", "8 GiB"), "TERM_OWNER", "oom"),
    (Ending("crash", "x"), None, "crash"),
    (None, "TERM_ADMIN", "killed"),
    (None, None, "lost"),
]


@pytest.mark.parametrize(("own", "reason", "outcome"), ENDINGS)
def test_endings(own: Ending | None, reason: str | None, outcome: str) -> None:
    found = job_outcome.by_scheduler(own, reason, Ending("lost", "gone"))
    assert found.outcome == outcome
    if reason:
        assert reason in (found.reason or "")


def test_the_profile_submits_all_and_only_what_needs_a_gpu() -> None:
    rules = "\n".join(path.read_text() for path in (ROOT / "workflow/rules").glob("*.smk"))
    local = rules.count("localrule: True")
    assert local == 6  # fetch, manifest, spec, metrics, plot, report


def test_the_step_of_a_preflight_is_captured_before_it_is_timed() -> None:
    assert node.STEPS["warmup"] > EAGER_STEPS


def test_status_tells_the_step_of_a_running_run_and_when_it_ends(tmp_path: Path) -> None:
    bench = matrix(tmp_path / "results")  # 2 steps of warm-up, 20 timed
    folder = write_run(bench, "gpu_h200-bs1-r1", step_s=60)
    log = folder / "attempts/1/log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    header, *steps = (line for line in lines if '"header"' in line or '"step"' in line)
    log.write_text("".join([header, *steps[:12]]) + '{"event": "st')  # being written
    now = time.time()
    since, step = status._progress(folder)
    assert since == f"since {json.loads(header)['started']}"
    found = re.fullmatch(r"step 12 of 22, until (\d\d):(\d\d):(\d\d)", step)
    assert found
    hours, minutes, seconds = map(int, found.groups())
    midnight = time.mktime((*time.localtime(now)[:3], 0, 0, 0, 0, 0, -1))
    left_s = (midnight + 3600 * hours + 60 * minutes + seconds - now) % 86400
    assert left_s == pytest.approx(600, rel=0.05)  # ten steps of a minute


def test_doctor_looks_for_the_cards_of_targets_without_a_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where nothing has been fetched
    bench = load(ROOT / "config/lent.yaml", {"hardware": str(ROOT / "config/hardware.yaml")})
    cards = [("NVIDIA H100 80GB HBM3", "GPU-1"), ("NVIDIA L4", "GPU-2")]
    monkeypatch.setattr(login, "cards_here", lambda: cards)
    hardware = load_hardware(ROOT / bench.hardware)
    found = {finding.what: finding.ok for finding in login.look(bench, hardware, None)}
    assert found["h100_1: this machine has 1 of the 1 x H100 SXM of a run"]
    assert not found["h100_2: this machine has 1 of the 2 x H100 SXM of a run"]
    assert found[f"{bench.dataset.videos}: not there yet, will be fetched"]


def test_doctor_asks_for_videos_where_a_folder_is_empty(tmp_path: Path) -> None:
    for expected, mend in (
        (None, "bring videos, or set dataset.videos"),
        (3, "set dataset.expected_videos, or bring the missing ones"),
    ):
        dataset = {"videos": str(tmp_path), "expected_videos": expected}
        bench = load(ROOT / "config/config.yaml", {"dataset": dataset})
        found = login.look(bench, load_hardware(ROOT / bench.hardware), None)
        assert mend in [finding.mend for finding in found]
