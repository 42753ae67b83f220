"""Parse and render 1,000 synthetic runs of 350 steps: `python benchmarks/report.py`. Goal: 20 s."""

import sys
import tempfile
import time
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import records  # noqa: E402 -- the tests' writer of synthetic runs

from xdimo.report.campaign_state import survey  # noqa: E402
from xdimo.report.plots.draw import draw  # noqa: E402
from xdimo.report.summary import render, write  # noqa: E402

RUNS = 1000
GOAL_S = 20


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder)
        variants = list(range(1, 126))  # 2 targets x 125 variants x 4 repeats
        shape = {"variants": variants, "baseline_variant": 1}
        off = {"variants": [1], "enabled": False, "reason": "not in this benchmark"}
        bench = records.bench(
            results,
            train={"warmup_steps": 50, "timed_steps": 300, "repeats": RUNS // 250},
            targets={"gpu_6000ada": shape, "gpu_h200": shape, "gpu_pro6000": off},
        )
        names = [name for name in bench.cells if not name.startswith("gpu_pro6000")]
        for run in bench.runs(names):
            records.write_run(bench, run)
        hardware = records.hardware()
        size = sum(path.stat().st_size for path in results.rglob("*.jsonl")) / 1e6
        rows = [
            timed("parse alone (survey)", lambda: survey(bench, hardware)),
            timed(
                "parse and render, both languages, csv, json",
                lambda: write(render(bench, hardware, "config/config.yaml"), results),
            ),
            timed("parse and draw the plots", lambda: draw(bench, hardware, results / "plots")),
        ]
    print(f"{len(bench.runs(names)):,} runs, {size:.0f} MB of logs; goal {GOAL_S} s\n")
    print(tabulate(rows, headers=["what", "seconds"], tablefmt="pipe", floatfmt=".1f"))


def timed(what: str, do) -> list:
    start = time.perf_counter()
    do()
    return [what, time.perf_counter() - start]


if __name__ == "__main__":
    main()
