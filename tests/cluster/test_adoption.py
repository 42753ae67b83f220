"""A controller takes up the jobs that an earlier version submitted, and submits none twice.

tests/data/upgrade/submissions.json holds two entries of the queue's ledger as commit 7fdcbf1 wrote
them: a running job and a pending one, whose controller was then killed.
"""

import json
import shlex

from tests.cluster.place import Make, Place, Watch, until
from tests.conftest import ROOT
from xdimo.files import write_json

ENTRIES = json.loads((ROOT / "tests/data/upgrade/submissions.json").read_text())
PENDING, RUNNING = "gpu_h200-bs1-r1", "gpu_pro6000-bs1-r1"


def submit(here: Place, entry: dict) -> str:
    """The entry's job in the scheduler; returns its id."""
    run, partition = entry["work"], entry["target"]
    launch = ROOT / "tests/cluster/launch.py"
    folder = here.run_folder(run)
    command = ["/usr/bin/python3", "-SE", launch, folder / "spec.json", folder / "run.json"]
    name = f"{run}.{entry['number']}.{entry['token']}"
    job = ["sbatch", "--parsable", "-J", name, "-p", partition, "--gres=gpu:4"]
    job += ["-D", str(here.folder), "-o", "/dev/null", "--wrap", shlex.join(map(str, command))]
    return here.slurm.run(*job).strip()


def test_jobs_of_an_earlier_version_are_adopted(site: Make) -> None:
    here = site()
    here.behave(default={"held": True})
    here.slurm.hold("h01", 4)
    for run in (RUNNING, PENDING):
        entry = ENTRIES[run]
        job = submit(here, entry)
        write_json(here.ledger.folder / run / "1/job.json", {**entry, "job": job})
    until(lambda: len(here.jobs("RUNNING")) == len(here.jobs("PENDING")) == 1)
    with Watch(here) as watch:
        process = here.snakemake("gpu_h200-bs1", "gpu_pro6000-bs1")
        until(lambda: "adopted" in here.said() or process.poll() is not None, 60)
        here.slurm.run("scancel", *[job["id"] for job in here.slurm.jobs("-u", "nobody")])
        here.release()
        assert here.finish(process) == 0, here.said()
    watch.check()
    assert len(here.jobs()) == 2
    assert [here.outcomes(run) for run in (RUNNING, PENDING)] == [["ok"], ["ok"]]
