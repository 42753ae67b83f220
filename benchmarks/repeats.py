"""How much runs of one cell differ, and whether a neighbour on the card is noticed.

    python benchmarks/repeats.py                         # config/lent.yaml, h100_1-bs4, five runs
    python benchmarks/repeats.py --config config/demo.yaml --cell cpu_1-bs1

Trains the cell several times through the workflow (campaign `repeats`), and once more beside a
second process that multiplies matrices on the same device (campaign `beside`). Goal: a coefficient
of variation of 1 % at most, and a flag on the last run. A CPU has no telemetry, so no flag.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xdimo.config.load import load, load_hardware  # noqa: E402 -- the checkout's, installed or not
from xdimo.report.campaign_state import CellState, survey  # noqa: E402

NEIGHBOUR = """
import torch
square = torch.randn(4096, 4096, device={device!r})
print("at work", flush=True)
while True:
    square @ square
    torch.cuda.synchronize() if square.is_cuda else None
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="config/lent.yaml")
    parser.add_argument("--cell", default="h100_1-bs4")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    start = time.perf_counter()
    alone = train(options.config, options.cell, "repeats", options.repeats)
    with neighbour(alone):
        beside = train(options.config, options.cell, "beside", 1)
    spread = alone.samples_per_s
    table = [row(run) for cell in (alone, beside) for run in cell.runs]
    columns = ["campaign", "run", "state", "samples/s", "95 % interval", "notes of the run"]
    print(tabulate(table, columns, tablefmt="pipe", floatfmt=".1f", missingval="-"))
    cv = f"{100 * spread.cv:.2f} %" if spread and spread.cv is not None else "n/a"
    print(f"\ncoefficient of variation {cv}; goal 1 %; {time.perf_counter() - start:.0f} s")


def train(config: str, cell: str, campaign: str, repeats: int) -> CellState:
    """The cell as its records say, after the workflow has made what was missing."""
    override = {"campaign": campaign, "train": {"repeats": repeats}}
    values = [f"campaign={campaign}", f"train={json.dumps(override['train'])}"]
    command = [sys.executable, "-m", "snakemake", "--quiet", "--configfile", config]
    subprocess.run([*command, "--config", *values, "--", cell], cwd=ROOT, check=True)
    bench = load(ROOT / config, override)
    return survey(bench, load_hardware(bench.hardware)).cells[cell]


@contextmanager
def neighbour(cell: CellState) -> Iterator[None]:
    """A second process at work on the device of ``cell``'s runs, while inside."""
    record = cell.runs[0].record
    assert record is not None, f"{cell.cell.name}: {cell.state}"
    command = [sys.executable, "-c", NEIGHBOUR.format(device=record.spec.device)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it is at work
    try:
        yield
    finally:
        process.kill()
        process.wait()


def row(run) -> list:
    metrics = run.metrics or {}
    interval = metrics.get("samples_per_s_ci95")
    return [
        run.record.spec.campaign if run.record else None,
        run.name,
        run.state,
        metrics.get("samples_per_s"),
        " - ".join(f"{end:.1f}" for end in interval) if interval else "window too short",
        "; ".join(metrics.get("flags", [])) or run.note,
    ]


if __name__ == "__main__":
    main()
