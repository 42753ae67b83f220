"""Seconds that `snakemake -n` takes to plan: the matrix, and a config of 1,000 cells.

python benchmarks/dry_run.py
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tabulate import tabulate

ROOT = Path(__file__).parent.parent


def thousand_cells() -> dict[str, object]:
    """The matrix with one target of 1,000 variants, one repeat."""
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    target = config["targets"]["gpu_h200"] | {"variants": list(range(1, 1001))}
    repeats = config["train"] | {"repeats": 1}
    return config | {"targets": {"gpu_h200": target}, "baseline": "gpu_h200-bs1", "train": repeats}


def seconds(config: Path, results: str) -> float:
    command = [sys.executable, "-m", "snakemake", "-n", "--quiet", "all"]
    command += ["--configfile", str(config), "--config", f"results={results}", "--", "all"]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder) / "many.yaml"
        many.write_text(yaml.safe_dump(thousand_cells(), sort_keys=False))
        rows = [
            ("the matrix", 6, seconds(ROOT / "config/config.yaml", folder), 3),
            ("one target", 1000, seconds(many, folder), 30),
        ]
    print(f"snakemake -n, {os.cpu_count()} cores")
    print(tabulate(rows, ["config", "cells", "seconds", "goal, at most"], floatfmt=".1f"))


if __name__ == "__main__":
    main()
