"""The summary for machines: what stands in summary.json and summary.csv."""

from os.path import relpath
from pathlib import Path
from typing import Any

from xdimo.audit.claims import Row
from xdimo.report.campaign_state import CellState, Run, Survey
from xdimo.report.provenance import codes, excluded_videos


def cell_data(view: Survey, cell: CellState) -> dict[str, Any]:
    name, spread = cell.cell.name, cell.samples_per_s
    speedup = view.speedup(name, view.bench.baseline)
    interval = view.speedup_ci95(name, view.bench.baseline)
    return {
        "cell": name,
        "target": cell.cell.target,
        "clips_per_gpu": cell.cell.clips_per_gpu,
        "data_mode": cell.cell.mode,
        "state": cell.state,
        "reason": cell.note,
        "repeats_measured": len(cell.measured),
        "repeats": len(cell.runs),
        "median_run": cell.median.name if cell.median else None,
        "samples_per_s_min": spread.low if spread else None,
        "samples_per_s_max": spread.high if spread else None,
        "samples_per_s_mean_ci95": list(spread.mean_ci95) if spread and spread.mean_ci95 else None,
        "samples_per_s_cv": spread.cv if spread else None,
        "speedup": speedup,
        "speedup_ci95": interval and list(interval),
        "not_comparable": view.differing(name, view.bench.baseline),
        "metrics": cell.metrics,
    }


def data(
    view: Survey, past: list[Row], cells: list[dict[str, Any]], definitions: list[str]
) -> dict[str, Any]:
    bench, manifest = view.bench, view.manifest
    return {
        "schema": 1,
        "campaign": bench.campaign,
        "title": view.heading,
        "demo": bench.demo,
        "baseline": bench.baseline,
        "definitions": definitions,
        "cells": cells,
        "runs": [_run_data(view, run) for run in view.runs],
        "history": [
            {**row.text, "recomputed_tflops": row.tflops, "recomputed_mfu": row.mfu} for row in past
        ],
        "dataset": manifest
        and {
            "name": bench.dataset.name,
            "dataset": manifest.dataset,
            "counts": manifest.counts.model_dump(),
            "excluded": [video.model_dump() for video in excluded_videos(manifest)],
        },
        "vae_random": bench.vae.random,
        "code": [
            {**code.model_dump(exclude_defaults=True), "runs": names}
            for code, names in codes(view).items()
        ],
    }


def _run_data(view: Survey, run: Run) -> dict[str, Any]:
    log = run.record.log if run.record else None
    header = log.header if log else None
    return {
        "run": run.name,
        "state": run.state,
        "reason": run.note,
        "record": Path(relpath(log.path, view.folder)).as_posix() if log else None,
        "versions": header.versions if header else None,
        "metrics": run.metrics,
    }
