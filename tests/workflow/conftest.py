"""A small campaign that has run, once a process that tests."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.conftest import SMALL
from tests.videos import write_video
from tests.workflow.place import edit, snakemake


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which everything has run: one repeat of three cells, one of two processes."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    edit(folder, train__repeats=1, targets__cpu_2__variants=[1])
    for number, frames in enumerate((20, 31, 5)):
        write_video(folder / f"videos/{number}.mp4", frames, width=32, height=32)
    done = snakemake(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture
def copy(measured: Path, tmp_path: Path) -> Path:
    """A copy that keeps the files' times, Snakemake's own records included."""
    folder = tmp_path / "copy"
    shutil.copytree(measured, folder)
    return folder
