"""What a person does to a controller, in both dialects, on a real scheduler: ends it, asks it.

However it ends, its jobs go on, and the next one takes them up.
"""

import fcntl
import json
import os
import pty
import signal
import subprocess
import termios
import time
from pathlib import Path

import pytest

from tests.cluster.place import HOSTS, Make, Place, Watch, until
from tests.cluster.trouble import at_random
from xdimo.files import read_json


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("submitting", signal.SIGINT),
        ("submitting", signal.SIGKILL),
        ("pending", signal.SIGINT),
        ("running", signal.SIGINT),
        ("running", signal.SIGTERM),
    ],
)
def test_a_controller_that_ends_leaves_its_jobs(
    site: Make, moment: str, number: signal.Signals
) -> None:
    here = site()
    here.behave(default={"held": True})
    if moment == "submitting":
        here.set(slow=1.5)
    if moment == "pending":
        here.slurm.hold("h01", 4)
        until(lambda: here.slurm.jobs("-t", "R"))
    with Watch(here) as watch:
        process = here.snakemake("gpu_h200")
        if moment == "submitting":
            until(lambda: (here.ledger.folder / "gpu_h200-bs1-r1/1/job.json").exists())
            time.sleep(0.3)
        else:
            until(lambda: here.jobs(moment.upper()))
        process.send_signal(number)
        here.finish(process)
        if number != signal.SIGKILL:
            assert process.returncode in (1, 130), here.said()
            assert "left in the queue: gpu_h200-bs1-r1" in here.said()
            assert (here.folder / "onerror").exists()  # where the workflow renders its tables
        if moment == "pending":
            here.slurm.run("scancel", *[j["id"] for j in here.slurm.jobs("-u", "nobody")])
        here.set(slow=None)
        here.release()
        assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    watch.check()
    assert "gpu_h200-bs1-r1: adopted job" in here.said()
    for run in ("gpu_h200-bs1-r1", "gpu_h200-bs4-r1"):
        assert here.outcomes(run) == ["ok"]
        assert len([job for job in here.jobs() if job["name"].startswith(run)]) >= 1


@pytest.mark.parametrize("trouble", ["kills", "all"])
def test_trouble_at_random(site: Make, trouble: str) -> None:
    here = site()
    at_random(here, 1, ["kill"] * 4 if trouble == "kills" else None)
    if trouble == "kills":
        assert all(here.outcomes(run) == ["ok"] for run in here.runs)


def test_two_controllers(site: Make) -> None:
    here = site()
    here.behave(default={"held": True})
    first = here.snakemake("gpu_h200-bs1")
    until(lambda: here.jobs("RUNNING"))
    assert here.finish(here.snakemake("gpu_h200-bs1")) == 1
    assert f"held by process {first.pid} on {os.uname().nodename} since" in here.said()
    here.release()
    assert here.finish(first) == 0, here.said(0)
    assert here.outcomes("gpu_h200-bs1-r1") == ["ok"]


def test_a_controller_whose_terminal_goes_away(site: Make) -> None:
    here = site()
    here.behave(default={"held": True})
    with Watch(here) as watch:
        process, terminal = in_terminal(here)
        until(lambda: here.jobs("RUNNING"))
        os.close(terminal)  # the kernel sends SIGHUP, and writing fails from now on
        here.finish(process)
        here.release()
        assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    watch.check()
    assert here.outcomes("gpu_h200-bs1-r1") == here.outcomes("gpu_h200-bs4-r1") == ["ok"]


@pytest.mark.parametrize("answer", ["y", "n"])
def test_interrupted_at_a_terminal_it_asks(site: Make, answer: str) -> None:
    here = site()
    here.behave(default={"held": True})
    process, terminal = in_terminal(here)
    until(lambda: here.jobs("RUNNING"))
    os.write(terminal, b"\x03")
    said = b""
    while b"End them? [y/N]" not in said:
        said += os.read(terminal, 4096)
    os.write(terminal, answer.encode() + b"\n")
    drain(terminal)
    here.finish(process)
    if answer == "y":
        until(lambda: not here.live())
        assert here.answer("gpu_h200-bs1-r1") is None
    else:
        assert "gpu_h200-bs1-r1" in here.live()
    here.release()
    assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    assert here.answer("gpu_h200-bs1-r1") == "ok"


def in_terminal(here: Place) -> "tuple[subprocess.Popen[bytes], int]":
    """A controller that a terminal of its own controls, and the terminal's other end."""
    ours, theirs = pty.openpty()
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    process = here.snakemake("gpu_h200", preexec_fn=take_terminal, **options)
    os.close(theirs)
    return process, ours


def take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def drain(terminal: int) -> None:
    try:
        while os.read(terminal, 4096):
            pass
    except OSError:
        pass  # closed at the other end


def test_cancel(site: Make) -> None:
    here = site()
    here.behave(default={"seconds": 600})
    process = here.snakemake("gpu_h200", "gpu_pro6000")
    until(lambda: len(here.jobs("RUNNING")) == 2)
    done = here.xdimo("cancel", "gpu_h200", "--config", "bench.yaml")
    assert done.returncode == 0, done.stderr
    until(lambda: [name[:11] for name in here.live()] == ["gpu_pro6000"])
    done = here.xdimo("cancel", "--config", "bench.yaml")
    assert done.returncode == 0, done.stderr
    assert here.finish(process) == 1
    assert not here.live()
    assert all(not entry.open for entry in here.ledger.entries())
    assert here.outcomes("gpu_h200-bs1-r1") == ["killed"]  # not tried again
    assert here.outcomes("gpu_h200-bs4-r1") in ([], ["killed"])  # it may have been pending
    bad = here.xdimo("cancel", "gpu_h201", "--config", "bench.yaml")
    assert bad.returncode == 2
    assert "gpu_h201: no target, cell or run" in bad.stderr


def test_status(site: Make) -> None:
    here = site()
    here.slurm.hold("pro01", 7)
    here.behave(**{"gpu_h200-bs1-r1": {"seconds": 600}, "default": {"seconds": 0.2}})
    process = here.snakemake("gpu_6000ada", "gpu_h200-bs1", "gpu_pro6000")
    waits = here.ledger.folder / "waiting.json"
    until(lambda: here.jobs("PENDING") and here.answer("gpu_6000ada-bs2-r1"))
    until(lambda: waits.exists() and list(read_json(waits)) == ["gpu_pro6000-bs2-r1"])
    done = here.xdimo("status", "--config", "bench.yaml")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "ok" in rows["gpu_6000ada-bs1-r1"]
    assert "running" in rows["gpu_h200-bs1-r1"]
    assert HOSTS["gpu_h200"] in rows["gpu_h200-bs1-r1"]
    assert "pending" in rows["gpu_pro6000-bs1-r1"]  # the oldest that waits, in the queue
    assert "waiting" in rows["gpu_pro6000-bs2-r1"]  # the other, here
    here.xdimo("cancel", "--config", "bench.yaml")
    here.finish(process)


def test_names_reach_no_shell(site: Make) -> None:
    """Folders with quotes, spaces, a substitution and a line break."""
    name = 'it\'s "a" $(touch pwned) `touch pwned`; touch pwned &\nfolder'
    here = site(name, results="my $(touch pwned) results")
    assert here.finish(here.snakemake("gpu_h200")) == 0, here.said()
    assert here.outcomes("gpu_h200-bs1-r1") == ["ok"]
    assert not list(here.folder.parent.rglob("pwned"))


def test_doctor_shows_hosts_limits_and_what_would_be_submitted(site: Make, tmp_path: Path) -> None:
    here = site()
    here.slurm.hold("h01", 4)
    until(lambda: here.slurm.jobs("-t", "R"))
    done = here.xdimo("doctor", "--config", "bench.yaml", "--transcript", "kept")
    assert "gpu_h200: 1 of 5 cards free" in done.stdout, done.stdout + done.stderr
    assert "would submit now: gpu_6000ada-bs1-r1" in done.stdout
    kept = [read_json(path) for path in sorted((here.folder / "kept").glob("*.json"))]
    assert {line["command"][0][1:] for line in kept} >= {"hosts", "jobs"}
    assert "root" not in json.dumps(kept)
