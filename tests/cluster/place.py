"""A site for scenarios: the scheduler's commands, a workflow's folder, controllers, a watcher."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.slurm import NODES, Slurm, shims
from tests.conftest import ROOT
from xdimo.config.load import load
from xdimo.config.schema import Bench
from xdimo.files import write_json
from xdimo.outcome import ANSWERS
from xdimo.scheduler.submissions import Ledger
from xdimo.spec import plan, resolve

CARDS = {"gpu_6000ada": 8, "gpu_h200": 5, "gpu_pro6000": 7}
HOSTS = {partition: node for node, (_, _, partition) in NODES.items()}
DATASET = "sha256:" + "0" * 64
GOOD = {"lost": 0, "doubled": 0, "false": 0}


def config(**changes: Any) -> dict[str, Any]:
    """The matrix of the first benchmark, with a queue that is looked at often."""
    value = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    value |= {
        "campaign": "test",
        "results": "results",
        "hardware": str(ROOT / "config/hardware.yaml"),
        "history": str(ROOT / "config/history.csv"),
        "queue": {
            "preflight": False,
            "poll_s": 0.4,
            "command_timeout_s": 4,
            "latency_s": 1,
            "grace_s": 5,
            "closed_s": 60,
        },
    }
    for name, target in value["targets"].items():
        target |= {"hosts": [HOSTS[name]], "walltime_min": 10}
    value["train"]["repeats"] = 1
    return merged(value, changes)


def merged(value: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``queue__poll_s=1`` sets queue.poll_s."""
    for path, new in changes.items():
        *parents, last = path.split("__")
        inside = value
        for parent in parents:
            inside = inside[parent]
        inside[last] = new
    return value


@dataclass
class Place:
    """One folder of results, seen from one dialect's login node."""

    slurm: Slurm
    dialect: str
    folder: Path
    knobs: Path
    bench: Bench
    before: int  # the last job id of earlier tests
    started: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(shims(self.knobs, self.dialect)), str(Path(sys.executable).parent)]
        return {
            **os.environ,
            **self.slurm.environment,
            "XDIMO_SHIM": str(self.knobs),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "PATH": os.pathsep.join([*paths, os.environ["PATH"]]),
        }

    def set(self, **knobs: Any) -> None:
        """Settings and faults of the scheduler; None takes one away."""
        for name, value in knobs.items():
            path = self.knobs / name.replace("_", "-")
            path.unlink(missing_ok=True) if value is None else path.write_text(str(value))

    def behave(self, **runs: dict[str, Any]) -> None:
        """What runs do; ``default`` stands for all, and _ for - in their names."""
        named = {"*" if name == "default" else name: value for name, value in runs.items()}
        write_json(self.folder / "behave.json", named)

    def release(self) -> None:
        """Held runs go on to their ends, those too that are yet to begin."""
        (self.folder / "released").touch()

    def snakemake(self, *arguments: str, **options: Any) -> "subprocess.Popen[bytes]":
        """A controller; its output goes to <n>.out."""
        command = [sys.executable, "-m", "snakemake", "--snakefile"]
        command += [str(ROOT / "tests/cluster/Snakefile"), "--configfile", "bench.yaml"]
        command += ["--profile", str(ROOT / "profiles/lsf"), *arguments]
        return self.start(command, **options)

    def start(self, command: list[str], **options: Any) -> "subprocess.Popen[bytes]":
        with open(self.folder / f"{len(self.started)}.out", "wb") as out:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self.environment,
                **{
                    "stdin": subprocess.DEVNULL,
                    "stdout": out,
                    "stderr": subprocess.STDOUT,
                    "start_new_session": True,
                    **options,
                },
            )
        self.started.append(process)
        return process

    def xdimo(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "xdimo", *arguments]
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )

    def said(self, number: int = -1) -> str:
        number = number % len(self.started)
        return (self.folder / f"{number}.out").read_text(errors="replace")

    def finish(self, process: "subprocess.Popen[bytes]", timeout_s: float = 240) -> int:
        try:
            return process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout_s} s:\n{self.said()}") from None

    # -- what the files and the scheduler say ------------------------------------------------------

    @property
    def runs(self) -> list[str]:
        return self.bench.runs(self.bench.in_service)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / self.bench.queue_folder)

    def run_folder(self, run: str) -> Path:
        return self.folder / self.bench.runs_folder / run

    def attempts(self, run: str) -> list[dict[str, Any]]:
        paths = self.run_folder(run).glob("attempts/*/run.json")
        return [
            json.loads(path.read_text())
            for path in sorted(paths, key=lambda path: int(path.parent.name))
        ]

    def outcomes(self, run: str) -> list[str]:
        return [attempt["outcome"] for attempt in self.attempts(run)]

    def answer(self, run: str) -> str | None:
        path = self.run_folder(run) / "run.json"
        return json.loads(path.read_text())["outcome"] if path.exists() else None

    def jobs(self, *states: str) -> list[dict[str, str]]:
        """Our jobs in the scheduler, of the states where any are given."""
        found = [
            job for job in self.slurm.jobs() if "." in job["name"] and int(job["id"]) > self.before
        ]
        return [job for job in found if not states or job["state"] in states]

    def live(self) -> list[str]:
        """Names of runs that have a live job."""
        states = ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "CONFIGURING")
        return [job["name"].split(".")[0] for job in self.jobs(*states)]

    def requeue(self, job: str) -> None:
        """As `brequeue` does; returns when it may start again."""
        if self.dialect == "lsf":
            path = self.knobs / "requeued"
            before = path.read_text() if path.exists() else ""
            path.write_text(f"{before}{job} {time.time()}\n")
        self.slurm.run("scontrol", "requeue", job, check=False)
        until(lambda: job in [each["id"] for each in self.jobs("PENDING")])
        # Slurm holds it back for a while, and would revoke what starts in the same second.
        time.sleep(2)
        self.slurm.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
                process.wait()


Make = Callable[..., Place]  # the fixture `site`: a folder, and changes of its config


def place(slurm: Slurm, dialect: str, folder: Path, **changes: Any) -> Place:
    """A folder with a config, a spec a run, and a scheduler without faults."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.yaml").write_text(yaml.safe_dump(config(**changes), sort_keys=False))
    bench = load(folder / "bench.yaml")
    for run in bench.runs(bench.cells):
        spec = resolve(plan(bench, run), DATASET, None)
        write_json(folder / bench.runs_folder / run / "spec.json", spec.to_json())
    knobs = Path(tempfile.mkdtemp(dir=folder.parent, prefix="knobs-"))
    before = max((int(job["id"]) for job in slurm.jobs()), default=0)
    made = Place(slurm, dialect, folder, knobs, bench, before)
    made.behave()
    return made


class Watch:
    """Samples the scheduler every 0.2 s: cards in use, pending jobs, runs with two live jobs."""

    def __init__(self, site: Place, requeued: bool = False) -> None:
        self.site = site
        self.requeued = requeued  # jobs may be, whatever the limit
        self.most_cards: Counter[str] = Counter()
        self.most_pending = 0
        self.doubled: set[str] = set()
        self.samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            try:
                jobs = self.site.slurm.jobs()
            except RuntimeError:
                continue  # the controller is stopped
            self.samples += 1
            cards: Counter[str] = Counter()
            runs: Counter[str] = Counter()
            pending = 0
            for job in jobs:
                if job["state"] in ("RUNNING", "COMPLETING", "SUSPENDED"):
                    cards[job["partition"]] += int(job["gres"].rpartition(":")[2])
                if "." in job["name"]:
                    pending += job["state"] == "PENDING"
                    if job["state"] in ("PENDING", "RUNNING", "SUSPENDED"):
                        runs[job["name"].split(".")[0]] += 1
            self.most_cards |= cards
            self.most_pending = max(self.most_pending, pending)
            self.doubled |= {run for run, count in runs.items() if count > 1}

    def check(self) -> None:
        """Raises AssertionError where a limit was passed or a run had two jobs at once."""
        assert self.samples > 0
        assert not self.doubled, f"two live jobs at once: {self.doubled}"
        assert self.requeued or self.most_pending <= int(self.site.bench.pending_limit)
        for partition, cards in self.most_cards.items():
            assert cards <= CARDS[partition], f"{partition}: {cards} cards"


def until(what: Any, timeout_s: float = 120) -> Any:
    """Waits for ``what()`` to be true; returns it."""
    deadline = time.monotonic() + timeout_s
    while not (value := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)
    return value


def tally(site: Place) -> dict[str, int]:
    """Jobs lost, doubled, and false outcomes, at the end of a scenario in which all runs are ok."""
    per_run = Counter(job["name"].split(".")[0] for job in site.jobs())
    ok_attempts = {run: site.outcomes(run).count("ok") for run in site.runs}
    return {
        "lost": sum(site.answer(run) not in ANSWERS for run in site.runs),
        "doubled": sum(count > 1 for count in ok_attempts.values()),
        "false": sum(site.answer(run) not in (None, "ok") for run in site.runs),
        "jobs": sum(per_run.values()),
    }


def assert_good(site: Place) -> None:
    """Raises AssertionError where a job was lost or doubled, or an outcome is false."""
    found = tally(site)
    assert {key: found[key] for key in GOOD} == GOOD, site.said()
