"""Files written whole: what a writer that was killed leaves behind."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT
from xdimo import files


def test_what_a_killed_writer_left_goes_and_a_living_one_s_stays(tmp_path: Path) -> None:
    program = f"""
import os, signal, sys
from xdimo.files import whole
with whole({str(tmp_path / "a.json")!r}) as partial:
    partial.write_text("half")
    print(partial, flush=True)
    sys.stdin.read()
"""
    command = [sys.executable, "-c", program]
    writers = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for _ in range(2)
    ]
    parts = [Path(writer.stdout.readline().strip()) for writer in writers if writer.stdout]
    foreign = tmp_path / "download.mp4.part"
    foreign.write_text("a download under way")
    assert all(part.exists() for part in parts)
    writers[0].kill()
    writers[0].wait()
    files.write_text(tmp_path / "b.json", "{}")
    assert [part.exists() for part in parts] == [False, True] and foreign.exists()
    writers[1].communicate("")
    assert (tmp_path / "a.json").read_text() == "half"
