"""A Slurm for the session, and a site for each test."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import slurm as slurms
from tests.cluster.place import Make, Place, place


@pytest.fixture(scope="session")
def slurm() -> Iterator[slurms.Slurm]:
    if reason := slurms.missing():
        pytest.skip(reason)
    # Controllers are to mind signals, whatever started these tests (a shell's background, nohup).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    cluster, daemons = slurms.start()
    yield cluster
    slurms.stop(cluster, daemons)


@pytest.fixture(params=["jh", "lsf"])
def site(request: pytest.FixtureRequest, slurm: slurms.Slurm, tmp_path: Path) -> Iterator[Make]:
    """Makes the test's place, in either dialect; ends what it left."""
    made: list[Place] = []

    def make(folder: str = "work", **changes: Any) -> Place:
        made.append(place(slurm, request.param, tmp_path / folder, **changes))
        return made[-1]

    yield make
    for one in made:
        one.close()
    slurm.clean()
