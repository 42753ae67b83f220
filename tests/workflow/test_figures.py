"""Every figure of a real campaign's summary, made again from the lines of its logs."""

import json
import re
import statistics
from collections import Counter
from pathlib import Path

from tests.workflow.place import runs

# Columns of the summary that hold estimates of a series, not a run's own figures.
ESTIMATES = ("Steady from step", "Autocorrelation time, steps", "95 % interval")


def test_every_figure_of_the_summary_is_made_again_from_the_logs(measured: Path) -> None:
    figures = {folder.name[: -len("-r1")]: _figures(folder) for folder in runs(measured).iterdir()}
    samples = {cell: values["samples_per_s"] for cell, values in figures.items()}
    # Speedups of any pair; the summary says which.
    ratios = [mine / base for mine in samples.values() for base in samples.values()]
    ratios += [100 * ratio / processes for ratio in ratios for processes in (1, 2)]  # efficiency
    summary = (measured / "results/summary.md").read_text()
    checked = Counter[str]()
    for section in re.split(r"^## ", summary, flags=re.MULTILINE)[1:]:
        for table in re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE):
            heading, _, *rows = (
                [cell.strip() for cell in row.split("|")] for row in table.split("\n")
            )
            for row in rows:
                cell = re.search(r"`(cpu_\d-bs\d)(-r1)?`", "|".join(row))
                if cell is None:  # a table that is not of runs
                    continue
                # Estimates of a series are held by test_steady.py.
                shown = [c for name, c in zip(heading, row, strict=False) if name not in ESTIMATES]
                # Names, commands and links are no figures.
                told = re.sub(r"`[^`]*`|\[[^]]*\]\([^)]*\)", "", "|".join(shown))
                for text in re.findall(r"(?<![a-z])\d[\d,]*\.?\d*", told):
                    known = [*figures[cell[1]].values(), *ratios, 1, 2]  # 1, 2: processes, repeats
                    assert any(_rounds_to(value, text) for value in known), f"{text} in {row}"
                    checked[section.splitlines()[0]] += 1
    assert set(checked) == {
        "Results: each target at its baseline variant",
        "Best variant of each target",
        "Scaling over GPUs of one card",
        "Data modes: each target's baseline, and cells measured in both",
        "Why these figures may be believed",
        "Hours of training",
        "Cells and their commands",
        "Run by run",
    }


def test_each_rank_is_calibrated_and_an_all_reduce_shows(measured: Path) -> None:
    for folder in runs(measured).iterdir():
        events = [json.loads(line) for line in (folder / "attempts/1/log.jsonl").open()]
        processes = events[0]["declared"]["gpus"]
        for when in ("before", "after"):
            found = [e for e in events if e["event"] == "calibration" and e["when"] == when]
            assert [e["rank"] for e in found] == list(range(processes))
            assert all((e["all_reduce_gb_s"] is None) == (processes == 1) for e in found)
        (ledger,) = (e for e in events if e["event"] == "ledger")
        assert (ledger["shares"]["all_reduce"] > 0) == (processes > 1)


def _figures(folder: Path) -> dict[str, float]:
    """What the tables show of a run, from the raw lines of its log alone."""
    events = [json.loads(line) for line in (folder / "attempts/1/log.jsonl").open()]
    header, window = events[0], next(e for e in events if e["event"] == "window")
    timed = [e for e in events if e["event"] == "step" and e["phase"] == "timed"]
    spec = header["declared"]
    warmup = [e["step_s"] for e in events if e["event"] == "step" and e["phase"] == "warmup"]
    (ledger,) = (e for e in events if e["event"] == "ledger")
    calibrations = [e for e in events if e["event"] == "calibration"]
    gemm = {
        when: [e["gemm_tflops"] for e in calibrations if e["when"] == when]
        for when in ("before", "after")
    }
    gemm_tflops = statistics.fmean(gemm["before"] + gemm["after"])
    reduced = [e["all_reduce_gb_s"] for e in calibrations if spec["gpus"] > 1]
    model_tflops_per_sample = 4.5696e-6  # the summary's definitions have it as 0.000004570
    # From begin to end of four steps, one of which may be a stall and then is none of the ends.
    ends = [(a["step_s"], b["step_s"]) for a in timed[:2] for b in timed[-2:]]
    steps_per_s = len(timed) / window["wall_s"]
    samples_per_s = steps_per_s * spec["gpus"] * spec["clips_per_gpu"]
    return {
        "parameters": header["effective"]["parameters"],
        "host_gib": max(e["host_peak_gib"] for e in events if e["event"] == "memory"),
        "steps_per_s": steps_per_s,
        "samples_per_s": samples_per_s,
        "tokens_per_s": samples_per_s * 4 * 4 * 4,  # frames x (16 pixels / VAE 2 / patch 2)^2
        "step_ms": 1e3 * statistics.median(e["step_s"] for e in timed),
        "data_wait_percent": 100 * sum(e["data_wait_s"] for e in timed) / window["wall_s"],
        "loss_start": timed[0]["loss"],  # a tenth of four steps, at least one
        "loss_end": timed[-1]["loss"],
        "hours_10k": 1e4 / steps_per_s / 3600,
        "hours_1m": 1e6 / steps_per_s / 3600,
        "attempt": header["attempt"],
        "first_ms": 1e3 * warmup[0],
        "warmup_ms": 1e3 * statistics.median(warmup[1:]),
        "timed_steps": len(timed),
        "window_s": window["wall_s"],
        **{f"{number}_ms": 1e3 * step["step_s"] for number, step in enumerate(timed)},
        **{f"{place}_change": abs(100 * (b / a - 1)) for place, (a, b) in enumerate(ends)},
        "gemm_tflops": gemm_tflops,
        "gemm_change_percent": abs(
            100 * (statistics.fmean(gemm["after"]) / statistics.fmean(gemm["before"]) - 1)
        ),
        "mfu_measured_percent": 100
        * samples_per_s
        * model_tflops_per_sample
        / (spec["gpus"] * gemm_tflops),
        "copy_gb_s": statistics.fmean(e["copy_gb_s"] for e in calibrations),
        "all_reduce_gb_s": statistics.fmean(reduced) if reduced else 0,
        "profiled_ms": 1e3 * ledger["step_s"],
        "profiled_change_percent": abs(
            100 * (ledger["step_s"] / statistics.median(e["step_s"] for e in timed) - 1)
        ),
        **{f"{part}_percent": 100 * share for part, share in ledger["shares"].items()},
    }


def _rounds_to(value: float, text: str) -> bool:
    """Whether ``text`` is ``value`` rounded to the digits it has."""
    shown = text.replace(",", "").rstrip(".")
    decimals = len(shown.partition(".")[2])
    return abs(value - float(shown)) <= 0.5000001 * 10**-decimals
