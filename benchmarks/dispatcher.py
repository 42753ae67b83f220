"""The queue's long campaigns, and what the dispatcher costs. Starts a Slurm of its own; as root.

    python benchmarks/dispatcher.py [--seeds 20] [--dialects jh lsf]

Prints two tables; asserts nothing.
"""

import resource
import sys
import tempfile
import time
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.cluster import slurm as slurms
from tests.cluster.place import place, tally
from tests.cluster.trouble import at_random
from xdimo.config.load import load
from xdimo.scheduler.admission import Limits
from xdimo.scheduler.dialects import JH
from xdimo.scheduler.dispatcher import Spool
from xdimo.scheduler.site import Answer, Site
from xdimo.scheduler.submissions import Ledger
from xdimo.scheduler.task import Rules, Work

POLL_S = 20


def campaigns(seeds: int, dialects: Sequence[str]) -> None:
    """Full matrices, each with eight kinds of trouble at random moments."""
    cluster, daemons = slurms.start()
    troubles = []
    print("| dialect | campaigns | runs | jobs | lost | doubled | false outcomes | broken limits |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    try:
        for dialect in dialects:
            counts = dict.fromkeys(("runs", "jobs", "lost", "doubled", "false", "broken"), 0)
            done: Counter[str] = Counter()
            for seed in range(seeds):
                with tempfile.TemporaryDirectory() as folder:
                    here = place(cluster, dialect, Path(folder) / "work", train__repeats=2)
                    try:
                        done.update(at_random(here, 100 + seed))
                    except AssertionError as error:
                        counts["broken"] += 1
                        print(f"seed {100 + seed}: {str(error)[:300]}", file=sys.stderr)
                    found = tally(here)
                    here.close()
                    cluster.clean()
                counts["runs"] += len(here.runs)
                for key, value in found.items():
                    counts[key] += value
            print(
                f"| {dialect} | {seeds} | {' | '.join(str(n) for n in counts.values())} |",
                flush=True,
            )
            troubles.append(f"{dialect}: " + ", ".join(f"{n} x {t}" for t, n in done.items()))
        print("", *troubles, sep="\n")
    finally:
        slurms.stop(cluster, daemons)


class Instant(Site):
    """A scheduler in memory that runs whatever it gets and never ends it."""

    def __init__(self) -> None:
        super().__init__(JH, 60)
        self.states: list[str] = []

    def ask(self, command: Sequence[str], **options: Any) -> Answer:
        self.commands += 1
        if command[0] == "jsub":
            self.states.append("RUN")
            return Answer(0, f"Job <{len(self.states)}> is submitted")
        rows = [f"{n};{state};q;32*h01" for n, state in enumerate(self.states, start=1)]
        return Answer(0, "\n".join(["JOBID;STAT;QUEUE;EXEC_HOST", *rows]))


def dispatcher() -> None:
    """Commands and CPU time of a minute of polls while all jobs run."""
    print("\n| jobs | status commands a minute | CPU s a minute | free card to submit, polls |")
    print("| --- | --- | --- | --- |")
    for jobs in (10, 100, 1000):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            bench = load("config/config.yaml")
            site = Instant()
            rules = Rules(bench.targets, Limits(1000, "queue"), 8, POLL_S, 0, 60, 60)
            spool = Spool(site, Ledger(folder / "queue"), rules, lambda _: None)
            spool.open()
            for number in range(jobs):
                run = f"gpu_h200-bs1-r{number + 1}"
                spool.add(
                    Work(
                        run,
                        f"sha256:{number}",
                        "gpu_h200",
                        0,
                        8,
                        "true",
                        folder,
                        folder / run / "r",
                    )
                )
            spool.poll()
            polls = 60 // POLL_S
            before, start = site.commands, _cpu_s()
            for _ in range(polls):
                spool.poll()
            cost_s = _cpu_s() - start
            asked = site.commands - before
            late = Work(
                "gpu_h200-bs4-r1", "sha256:x", "gpu_h200", 0, 8, "true", folder, folder / "r"
            )
            spool.add(late)
            waited = 0
            while late.name in spool.waiting:
                spool.poll()
                waited += 1
            print(f"| {jobs} | {asked} | {cost_s:.3f} | {waited} |", flush=True)
            spool.shut()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    options = ArgumentParser(description=__doc__)
    options.add_argument("--seeds", type=int, default=20, help="campaigns a dialect (20)")
    options.add_argument("--dialects", nargs="+", choices=("jh", "lsf"), default=["jh", "lsf"])
    started = time.monotonic()
    arguments = options.parse_args()
    dispatcher()
    if arguments.seeds:
        campaigns(arguments.seeds, arguments.dialects)
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
