"""What a queue does to a campaign, in both dialects, on a real scheduler.

Each ends with every run's one true outcome: none lost, none run twice at once, none misread.
"""

import time
from pathlib import Path

import pytest

from tests.cluster.place import HOSTS, Make, Place, Watch, assert_good, place, until
from tests.cluster.slurm import Slurm


def assert_ok(site: Place, *runs: str) -> None:
    assert all(site.answer(run) == "ok" for run in runs)


def test_the_whole_matrix(site: Make) -> None:
    here = site(train__repeats=2)
    here.behave(default={"seconds": 0.5})
    with Watch(here) as watch:
        assert here.finish(here.snakemake("all")) == 0, here.said()
    watch.check()
    assert_good(here)
    assert all(here.outcomes(run) == ["ok"] for run in here.runs)
    assert not (here.ledger.folder / "waiting.json").exists()
    assert all(not entry.open for entry in here.ledger.entries())
    # Nothing is left to do, and nothing is done.
    before = len(here.jobs())
    assert here.finish(here.snakemake("all")) == 0
    assert len(here.jobs()) == before


def test_two_jobs_share_a_target_but_not_with_the_baseline(site: Make) -> None:
    here = site(train__repeats=3)
    here.behave(**{f"gpu_6000ada-bs2-r{number}": {"held": True} for number in (1, 2, 3)})
    process = here.snakemake("gpu_6000ada")
    seen: set[frozenset[str]] = set()
    while process.poll() is None:
        running = here.jobs("RUNNING")
        seen.add(frozenset(job["name"].split(".")[0] for job in running))
        if len(running) == 2:
            here.release()
        time.sleep(0.1)
    assert process.returncode == 0, here.said()
    assert any(len(runs) == 2 for runs in seen), (seen, here.said())
    assert all(len(runs) == 1 for runs in seen if any("-bs1-" in run for run in runs))


def test_another_user_holds_the_cards(site: Make, slurm: object) -> None:
    here = site()
    here.slurm.hold("h01", 4)
    until(lambda: any(job["state"] == "RUNNING" for job in here.slurm.jobs()))
    with Watch(here) as watch:
        process = here.snakemake("all")
        others = [run for run in here.runs if not run.startswith("gpu_h200")]
        until(lambda: all(here.answer(run) == "ok" for run in others))
        # Only then the oldest takes the pending slot, so that it has its turn when cards come free.
        until(lambda: [job["name"][:8] for job in here.jobs("PENDING")] == ["gpu_h200"])
        holder = next(j["id"] for j in here.slurm.jobs("-t", "R") if j["user"] == "nobody")
        here.slurm.run("scancel", holder)
        assert here.finish(process) == 0, here.said()
    watch.check()
    assert_good(here)


def test_a_storm_of_refusals_is_waited_out(site: Make) -> None:
    here = site()
    here.set(storm=8)
    assert here.finish(here.snakemake("gpu_h200", "gpu_pro6000")) == 0, here.said()
    assert here.said().count("takes no more jobs for now") == 1
    assert_ok(here, "gpu_h200-bs1-r1", "gpu_h200-bs4-r1", "gpu_pro6000-bs1-r1")


def test_another_refusal_fails_that_run_with_its_text(site: Make) -> None:
    here = site()
    here.set(refuse="gpu_h200: No such queue. Job not submitted.")
    assert here.finish(here.snakemake("gpu_h200")) == 1
    [attempt] = here.attempts("gpu_h200-bs1-r1")
    assert attempt["outcome"] == "rejected"
    assert attempt["reason"] == "gpu_h200: No such queue. Job not submitted."
    assert not here.jobs()
    here.set(refuse=None)
    assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    assert here.outcomes("gpu_h200-bs1-r1") == ["rejected", "ok"]


def test_failing_runs(site: Make) -> None:
    here = site()
    here.behave(
        **{
            "default": {"seconds": 0.3},
            "gpu_h200-bs1-r1": {"ends": ["crash"]},
            "gpu_h200-bs4-r1": {"ends": ["comm", "crash", "ok"]},
            "gpu_pro6000-bs1-r1": {"ends": ["oom"]},
            "gpu_pro6000-bs2-r1": {"ends": ["vanish", "ok"]},
        }
    )
    with Watch(here) as watch:
        assert here.finish(here.snakemake("all")) == 1
    watch.check()
    assert here.outcomes("gpu_h200-bs1-r1") == ["crash"] * 3
    assert here.answer("gpu_h200-bs1-r1") is None
    assert here.outcomes("gpu_h200-bs4-r1") == ["comm", "crash", "ok"]
    assert here.outcomes("gpu_pro6000-bs1-r1") == ["oom"]  # an answer, not tried again
    assert here.answer("gpu_pro6000-bs1-r1") == "oom"
    first, second = here.attempts("gpu_pro6000-bs2-r1")
    assert (first["outcome"], second["outcome"]) == ("crash", "ok")
    assert first["log"] == "log.jsonl"
    assert first["log_sha256"]
    assert_ok(here, "gpu_6000ada-bs1-r1", "gpu_6000ada-bs2-r1")
    # The same command tries the failed one again, and it alone.
    here.behave()
    assert here.finish(here.snakemake("all")) == 0, here.said()
    assert here.outcomes("gpu_h200-bs1-r1") == ["crash"] * 3 + ["ok"]
    assert here.outcomes("gpu_pro6000-bs1-r1") == ["oom"]


def test_asking_again_measures_again(site: Make) -> None:
    here = site()
    for _ in range(2):
        process = here.snakemake("-R", "train_gpu_h200", "--", "gpu_h200")
        assert here.finish(process) == 0, here.said()
    assert here.outcomes("gpu_h200-bs1-r1") == ["ok", "ok"]


def test_the_scheduler_is_away_for_half_a_minute(site: Make) -> None:
    here = site()
    here.behave(default={"seconds": 3})
    process = here.snakemake("gpu_h200", "gpu_pro6000")
    until(lambda: here.jobs("RUNNING"))
    here.slurm.stop_controller()
    time.sleep(30)
    here.slurm.start_controller()
    assert here.finish(process) == 0, here.said()
    for run in ("gpu_h200-bs1-r1", "gpu_h200-bs4-r1", "gpu_pro6000-bs1-r1"):
        assert here.outcomes(run) == ["ok"]
    assert here.said().count("jobs go on, asking again") >= 1


def test_a_status_command_that_says_nothing(site: Make) -> None:
    """It hangs, prints rubbish, a header alone, or fails, while a job runs."""
    here = site()
    here.behave(default={"held": True})
    with Watch(here) as watch:
        process = here.snakemake("gpu_h200-bs1")
        until(lambda: here.jobs("RUNNING"))
        for times, fault in ((0, "header"), (1, "hang"), (2, "rubbish"), (3, "fail")):
            here.set(status=fault, status_left=2)
            until(lambda: (here.knobs / "status-left").read_text() == "0")
            # A header alone is an answer.
            until(lambda times=times: here.said().count("answers again") == times)
        here.release()
        assert here.finish(process) == 0, here.said()
    watch.check()
    assert here.outcomes("gpu_h200-bs1-r1") == ["ok"]
    assert here.said().count("jobs go on, asking again") == 3


def test_finished_jobs_are_forgotten(site: Make) -> None:
    here = site(queue__grace_s=2)
    here.set(forget=1)
    here.behave(**{"gpu_h200-bs4-r1": {"ends": ["vanish", "ok"]}})
    assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    assert here.outcomes("gpu_h200-bs1-r1") == ["ok"]
    assert here.outcomes("gpu_h200-bs4-r1") == ["lost", "ok"]
    assert "vanished without a trace" in here.attempts("gpu_h200-bs4-r1")[0]["reason"]


def test_ended_by_its_owner(site: Make) -> None:
    """With its launcher's own word, and without one."""
    here = site()
    runs = {"gpu_h200-bs1-r1": {"seconds": 600}}
    runs |= {"gpu_pro6000-bs1-r1": {"seconds": 600, "deaf": True}}
    here.behave(**runs)
    process = here.snakemake("gpu_h200-bs1", "gpu_pro6000-bs1")
    until(lambda: len(here.jobs("RUNNING")) == 2)
    for run in runs:
        until(lambda run=run: (here.run_folder(run) / "attempts/1").exists())
    here.behave()
    jobs = {job["name"].split(".")[0]: job["id"] for job in here.jobs("RUNNING")}
    # `--full` reaches the job's processes, as LSF's kill does.
    here.slurm.run("scancel", "--signal=KILL", "--full", jobs["gpu_pro6000-bs1-r1"])
    here.slurm.run("scancel", *jobs.values(), check=False)
    assert here.finish(process) == 0, here.said()
    for run in runs:
        first, second = here.attempts(run)
        assert (first["outcome"], second["outcome"]) == ("killed", "ok"), first
        assert first["job"] == jobs[run]


@pytest.mark.parametrize(
    ("word", "outcome"), [("TERM_MEMLIMIT", "oom_host"), ("TERM_RUNLIMIT", "timeout")]
)
def test_a_limit_that_the_scheduler_enforced_is_an_answer(
    site: Make, word: str, outcome: str
) -> None:
    here = site()
    here.set(kill_reason=word)
    here.behave(**{"gpu_h200-bs1-r1": {"seconds": 600}})
    process = here.snakemake("gpu_h200")
    [job] = until(lambda: here.jobs("RUNNING"))
    until(lambda: (here.run_folder("gpu_h200-bs1-r1") / "attempts/1").exists())
    here.slurm.run("scancel", job["id"])
    assert here.finish(process) == 0, here.said()
    [attempt] = here.attempts("gpu_h200-bs1-r1")
    assert attempt["outcome"] == outcome == here.answer("gpu_h200-bs1-r1")
    assert word in attempt["reason"]
    assert here.outcomes("gpu_h200-bs4-r1") == ["ok"]


def test_the_warning_before_the_time_limit_becomes_a_timeout(site: Make) -> None:
    here = site(targets__gpu_h200__walltime_min=1)
    here.set(warn=58)  # seconds before the end
    here.behave(**{"gpu_h200-bs1-r1": {"seconds": 600}, "default": {"seconds": 0}})
    assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    [attempt] = here.attempts("gpu_h200-bs1-r1")
    assert (attempt["outcome"], attempt["reason"]) == ("timeout", "SIGUSR2")


def test_a_requeued_job_starts_afresh(site: Make) -> None:
    here = site()
    here.behave(**{"gpu_h200-bs1-r1": {"seconds": 600}})
    process = here.snakemake("gpu_h200")
    [job] = until(lambda: here.jobs("RUNNING"))
    until(lambda: (here.run_folder("gpu_h200-bs1-r1") / "attempts/1/log.jsonl").exists())
    here.behave()
    here.requeue(job["id"])
    assert here.finish(process) == 0, here.said()
    attempts = here.attempts("gpu_h200-bs1-r1")
    assert [a["outcome"] for a in attempts][-1] == "ok"
    assert {a["job"] for a in attempts} == {job["id"]}
    folder = here.run_folder("gpu_h200-bs1-r1") / "attempts"
    assert all(len(path.read_text().splitlines()) == 1 for path in folder.glob("*/log.jsonl"))


def test_lsf_9(slurm: Slurm, tmp_path: Path) -> None:
    """Cards are a numeric resource, `bhosts` has no `-o`, and a full host is no outage."""
    target = {"gpu_request": "-R rusage[ngpus={n}]", "memory_gb": 64}
    changes = {f"targets__gpu_h200__{key}": value for key, value in target.items()}
    here = place(slurm, "lsf", tmp_path / "work", queue__closed_s=0.5, **changes)
    here.set(old="yes", noise="LSF: a notice; of the site")
    other = slurm.hold("h01", 5)
    until(lambda: here.slurm.jobs("-t", "R"))
    process = here.snakemake("gpu_h200")
    until(lambda: here.jobs("PENDING"))
    time.sleep(1.5)
    slurm.run("scancel", other)
    assert here.finish(process) == 0, here.said()
    assert here.outcomes("gpu_h200-bs1-r1") == here.outcomes("gpu_h200-bs4-r1") == ["ok"]
    options = (here.knobs / "options").read_text()
    assert "-R rusage[ngpus=4] span[hosts=1] " in options
    assert "-M 62500000 " in options
    asked = {job["gres"] for job in here.jobs()}
    assert len(asked) == 1 and asked.pop().endswith("gpu:4")


@pytest.mark.parametrize("when", ["from the start", "while its runs wait"])
def test_a_target_whose_hosts_are_down(site: Make, when: str) -> None:
    here = site(train__repeats=2, queue__closed_s=1.5)
    here.behave(default={"seconds": 0.3})
    node = HOSTS["gpu_pro6000"]

    def down() -> None:
        here.slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=fans")

    if when == "from the start":
        down()
    process = here.snakemake("all")
    if when != "from the start":
        until(lambda: here.answer("gpu_h200-bs1-r1"))
        down()
    assert here.finish(process) == 1
    for run in here.runs:
        if not run.startswith("gpu_pro6000"):
            assert here.answer(run) == "ok"
    ended = here.attempts("gpu_pro6000-bs2-r2")
    assert [attempt["outcome"] for attempt in ended] == ["unavailable"]
    assert ended[0]["reason"] == f"{node} is {'unavail'}"
    assert (here.folder / "onerror").exists()
    assert not here.live()
    # Back in service, the same command measures them.
    here.slurm.run("scontrol", "update", f"NodeName={node}", "State=RESUME")
    until(lambda: "down" not in here.slurm.run("sinfo", "-h", "-n", node, "-o", "%T"))
    assert here.finish(here.snakemake("all")) == 0, here.said()


def test_a_failed_preflight_spends_no_long_job(site: Make) -> None:
    here = site(queue__preflight=True, targets__gpu_h200__setup=["exit 3"])
    assert here.finish(here.snakemake("gpu_h200")) == 1
    assert [job["name"].split(".")[0] for job in here.jobs()] == ["preflight-gpu_h200"]
    for run in ("gpu_h200-bs1-r1", "gpu_h200-bs4-r1"):
        [attempt] = here.attempts(run)
        assert attempt["outcome"] == "unavailable"
        assert attempt["reason"].startswith("preflight: ")
