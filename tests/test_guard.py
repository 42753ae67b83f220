"""Children of this process start wherever TMPDIR lies; where none can, that is what is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PROGRAM = """
import multiprocessing, resource, sys
from multiprocessing.reduction import DupFd
from xdimo.data.guard import guarded
from xdimo.errors import UserError

def give(pipe):  # as a loader's worker gives a tensor
    pipe.send(DupFd(pipe.fileno()))
    pipe.recv()

if __name__ == "__main__":
    if sys.argv[1:]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (6, 6))
    try:
        print(guarded(len, "four", timeout_s=30))
    except UserError as error:
        sys.exit(f"said: {error}")
    ours, theirs = multiprocessing.Pipe()
    worker = multiprocessing.get_context("fork").Process(target=give, args=(theirs,))
    worker.start()
    ours.poll(20)
    print(ours.recv().detach() > 0)
    worker.kill()
"""


def ran(folder: Path, tmpdir: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    program = folder / "program.py"
    program.write_text(PROGRAM)
    return subprocess.run(
        [sys.executable, program, *arguments], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "TMPDIR": str(tmpdir), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("length", [75, 76, 200])  # bytes
def test_children_answer_however_long_tmpdir_is(tmp_path, length):
    tmpdir = Path(str(tmp_path).ljust(length, "x")[:length])
    tmpdir.mkdir(exist_ok=True)
    done = ran(tmp_path, tmpdir)
    assert done.stdout.split() == ["4", "True"], done.stderr
    assert list(tmpdir.glob("pymp-*")) == []


def test_where_no_child_can_start_no_file_is_blamed(tmp_path):
    done = ran(tmp_path, tmp_path, "few descriptors")
    assert done.returncode == 1
    assert done.stderr.startswith("said: cannot start a child process:"), done.stderr
    assert "Too many open files" in done.stderr and len(done.stderr.splitlines()) == 1
