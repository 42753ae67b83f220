"""Trouble for a campaign, at random moments: the controller's, the scheduler's, people's."""

import random
import time
from collections.abc import Callable

from tests.cluster.place import HOSTS, Place, Watch, assert_good


def at_random(here: Place, seed: int, troubles: list[str] | None = None) -> list[str]:
    """A campaign with trouble at random moments (eight kinds of it if none are given), then none.

    Returns what was done. Raises AssertionError where a job was lost or doubled, an outcome is
    false, or a limit was passed.
    """
    chance = random.Random(seed)
    if troubles is None:
        troubles = chance.sample(list(_TROUBLES), 8)
    here.behave(default={"seconds": 1 + 2 * ("requeue" in troubles)})
    done = []
    with Watch(here, requeued="requeue" in troubles) as watch:
        process = here.snakemake("all")
        for trouble in troubles:
            time.sleep(chance.uniform(0.8, 4))
            if process.poll() is not None:
                break
            if trouble == "kill":
                process.kill()
                process.wait()
                process = here.snakemake("all")
            elif not _TROUBLES[trouble](here, chance):
                continue
            done.append(trouble)
        assert here.finish(process) == 0, here.said()
    watch.check()
    assert_good(here)
    return done


def _knobs(chance: random.Random, here: Place, **knobs: str) -> bool:
    """For some seconds."""
    here.set(**knobs)
    time.sleep(chance.uniform(1, 4))
    here.set(**dict.fromkeys(knobs))
    return True


def _never_arrives(here: Place, chance: random.Random) -> bool:
    """What is submitted hangs, and has not arrived when it is given up."""
    before = here.said().count("looking for it in the queue")
    here.set(slow=4.5)
    deadline = time.monotonic() + 6
    while time.monotonic() < deadline and here.said().count("looking for it") == before:
        time.sleep(0.1)
    here.set(slow=None)
    return here.said().count("looking for it in the queue") > before


def _at_the_limit(here: Place, chance: random.Random) -> bool:
    words = ("User <root>: Pending job", "Group <video>: Pending job", "Pending job slots")
    here.set(threshold=f"{chance.choice(words)} threshold reached.", storm=4)
    return True


def _requeue(here: Place, chance: random.Random) -> bool:
    """A job whose run has begun just now."""
    for job in here.jobs("RUNNING"):
        logs = list(here.run_folder(job["name"].split(".")[0]).glob("attempts/*/log.jsonl"))
        if any(time.time() - log.stat().st_mtime < 1.5 for log in logs):
            here.requeue(job["id"])
            return True
    return False


def _suspend(here: Place, chance: random.Random) -> bool:
    running = here.jobs("RUNNING")
    if not running:
        return False
    job = chance.choice(running)["id"]
    here.slurm.run("scontrol", "suspend", job, check=False)
    time.sleep(chance.uniform(1, 4))
    here.slurm.run("scontrol", "resume", job, check=False)
    return True


def _closed(here: Place, chance: random.Random) -> bool:
    return here.dialect == "lsf" and _knobs(chance, here, closed=chance.choice([*HOSTS]))


def _by_hand(here: Place, chance: random.Random) -> bool:
    """A job of the same user that is none of ours, and waits in the queue."""
    job = here.slurm.hold("h01", 5, user="root")
    time.sleep(chance.uniform(1, 4))
    here.slurm.run("scancel", job)
    return True


_TROUBLES: dict[str, Callable[[Place, random.Random], bool]] = {
    "kill": lambda here, chance: True,
    "never arrives": _never_arrives,
    "limit": _at_the_limit,
    "requeue": _requeue,
    "suspend": _suspend,
    "unknown": lambda here, chance: _knobs(chance, here, unknown=chance.choice([*HOSTS.values()])),
    "closed": _closed,
    "by hand": _by_hand,
    "noise": lambda here, chance: _knobs(chance, here, noise="Notice: maintenance; on Sunday"),
    "no -o": lambda here, chance: _knobs(chance, here, hosts="bhosts: illegal option -- o"),
    "silence": lambda here, chance: _knobs(chance, here, status="fail"),
}
