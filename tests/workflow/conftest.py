"""A small campaign that has run, once for all processes that test."""

import shutil
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from tests.conftest import SMALL
from tests.videos import write_video
from tests.workflow.place import edit, snakemake


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder in which everything has run: one repeat of three cells, one of two processes.

    The first process that asks makes it and the others wait; all of them read it at once, so no
    test writes in it.
    """
    mine = tmp_path_factory.getbasetemp()
    folder = (mine if worker_id == "master" else mine.parent) / "measured"
    with FileLock(f"{folder}.lock"):
        if not (folder / "videos").exists():
            _measure(folder)
    done = (folder / "done.txt").read_text()
    assert done == "0", done
    return folder


def _measure(folder: Path) -> None:
    folder.mkdir()
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    edit(folder, train__repeats=1, targets__cpu_2__variants=[1])
    for number, frames in enumerate((20, 31, 5)):
        write_video(folder / f"videos/{number}.mp4", frames, width=32, height=32)
    done = snakemake(folder)
    told = f"{done.returncode}\n{done.stdout}{done.stderr}" if done.returncode else "0"
    (folder / "done.txt").write_text(told)


@pytest.fixture
def copy(measured: Path, tmp_path: Path) -> Path:
    """A copy that keeps the files' times, Snakemake's own records included."""
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    return folder
