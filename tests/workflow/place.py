"""Snakemake in a folder of its own, with this checkout's workflow."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT


def command(*arguments: str) -> list[str]:
    """Snakemake with this checkout's workflow and default profile."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    command += ["--workflow-profile", str(ROOT / "profiles/default")]
    return [*command, "--configfile", "small.yaml", "--cores", "2", *arguments]


def snakemake(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """What it did in ``folder``."""
    return subprocess.run(command(*arguments), cwd=folder, capture_output=True, text=True)


def planned(folder: Path, *arguments: str) -> Counter[str]:
    """Rules that would run, and how often, `all` and targets' names apart."""
    done = snakemake(folder, "-n", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^(?:local)?rule (\S+):$", done.stdout + done.stderr, re.MULTILINE)
    return Counter(name for name in found if name != "all" and not name.startswith("cpu_"))


def edit(folder: Path, **changes: Any) -> None:
    """``train__seed=1`` sets train.seed in small.yaml."""
    config = yaml.safe_load((folder / "small.yaml").read_text())
    for path, value in changes.items():
        *parents, last = path.split("__")
        inside = config
        for parent in parents:
            inside = inside[int(parent)] if isinstance(inside, list) else inside[parent]
        inside[last] = value
    (folder / "small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def runs(folder: Path) -> Path:
    return folder / "results/runs/test"
