"""Whose code ran, as git tells it."""

import subprocess
from pathlib import Path

import pytest

from xdimo.train import identity


def test_the_commit_is_this_checkout_s_whatever_git_s_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = identity.code_identity()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    author = ["-c", "user.name=x", "-c", "user.email=x@x"]
    commit = ["commit", "-q", "--allow-empty", "-m", "another's"]
    subprocess.run(["git", "-C", str(tmp_path), *author, *commit], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert identity.code_identity() == ours


@pytest.mark.parametrize("git", ["refuses", "is not there"])
def test_a_checkout_whose_commit_git_does_not_tell_is_said(
    git: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(identity, "PACKAGE", tmp_path / "xdimo")
    monkeypatch.setenv("PATH", str(tmp_path))
    expected = "No such file or directory: 'git'"
    if git == "refuses":
        expected = "detected dubious ownership in repository at '/x'"
        (tmp_path / "git").write_text(f'#!/bin/sh\necho "fatal: {expected}" >&2\nexit 128\n')
        (tmp_path / "git").chmod(0o755)
    code = identity.code_identity()
    assert code["commit"] is None and code["dirty"] is None and expected in code["unknown"]
    (tmp_path / ".git").rmdir()
    assert identity.code_identity()["unknown"] is None
