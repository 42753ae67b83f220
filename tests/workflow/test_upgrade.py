"""Results of an earlier version stay measured: nothing of them is trained again.

tests/data/upgrade was made by commit 7fdcbf1: small.yaml, and what `snakemake all` had made of it
(videos, manifest, latents, six runs), without Snakemake's own records, tables and plots.
"""

import json
import tarfile
from pathlib import Path

import yaml

from tests.conftest import ROOT
from tests.workflow.place import runs, snakemake

OLD = ROOT / "tests/data/upgrade"


def test_what_an_earlier_version_measured_is_not_trained_again(tmp_path: Path) -> None:
    with tarfile.open(OLD / "measured.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    config = yaml.safe_load((OLD / "small.yaml").read_text())
    config |= {key: str(ROOT / config[key]) for key in ("hardware", "history")}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    before = {path: path.read_bytes() for path in runs(tmp_path).rglob("run.json")}
    assert len(before) == 12  # six runs, one attempt each
    done = snakemake(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.read_bytes() for path in runs(tmp_path).rglob("run.json")} == before
    summary = json.loads((tmp_path / "results/summary.json").read_text())
    measured = {cell["cell"]: cell["repeats_measured"] for cell in summary["cells"]}
    assert {cell: count for cell, count in measured.items() if count} == {
        "cpu_1-bs1": 2,
        "cpu_1-bs2": 2,
        "cpu_2-bs1": 2,
    }
    again = snakemake(tmp_path, "-n")
    assert "Nothing to be done" in again.stdout + again.stderr
