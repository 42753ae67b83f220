"""Synthetic runs, true to the format on disk, for tests and benchmarks of measure and report."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

from xdimo.config.load import load, load_hardware
from xdimo.config.schema import Bench, Hardware
from xdimo.files import content_hash, write_json
from xdimo.model.flops import parameters
from xdimo.outcome import ANSWERS
from xdimo.spec import RunSpec, plan, resolve

ROOT = Path(__file__).resolve().parent.parent
DATASET = content_hash("the test's videos")
DEVICES = {
    "rtx6000ada": "NVIDIA RTX 6000 Ada Generation",
    "h200": "NVIDIA H200",
    "rtx_pro6000": "NVIDIA RTX PRO 6000 Blackwell Server Edition",
    "cpu": "AMD EPYC 9554",
}
MEMORY_GIB = {"rtx6000ada": 47.4, "h200": 139.8, "rtx_pro6000": 95.0}
CODE = {"commit": "b65cc40" + 33 * "0", "dirty": False, "package": content_hash("package")}


def hardware() -> Hardware:
    return load_hardware(ROOT / "config/hardware.yaml")


def bench(results: Path, config: str = "config.yaml", **changes: Any) -> Bench:
    """A config of the project with its results in ``results``, and few steps."""
    steps = {"train": {"warmup_steps": 2, "timed_steps": 20, **changes.pop("train", {})}}
    places = {
        "results": str(results),
        "hardware": str(ROOT / "config/hardware.yaml"),
        "history": str(ROOT / "config/history.csv"),
    }
    return load(ROOT / "config" / config, {**places, **steps, **changes})


def spec_of(bench: Bench, run: str, dataset: str = DATASET) -> RunSpec:
    return resolve(plan(bench, run), dataset, None)


def write_run(
    bench: Bench,
    run: str,
    *,
    step_s: float = 0.05,
    outcome: str = "ok",
    reason: str | None = None,
    attempt: int = 1,
    devices: list[str] | None = None,
    code: dict[str, Any] = CODE,
    effective: dict[str, Any] | None = None,
    factors: list[float] | None = None,
    events: list[dict[str, Any]] | None = None,
    dataset: str = DATASET,
) -> Path:
    """One ended attempt, and the run's own run.json where the outcome is an answer.

    ``factors``: of each step's time. ``events``: stand before the footer.
    """
    spec = spec_of(bench, run, dataset)
    folder = Path(bench.runs_folder) / run
    write_json(folder / "spec.json", spec.to_json())
    inside = folder / "attempts" / str(attempt)
    inside.mkdir(parents=True)
    lines = log_lines(spec, step_s, devices, code, effective or {}, factors)
    lines[-1:-1] = events or []
    if outcome != "ok":
        lines = lines[:6]
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (inside / "log.jsonl").write_text(log, encoding="utf-8")
    (inside / "output.log").write_text("console\n", encoding="utf-8")
    facts = {
        "schema": 1,
        "run": run,
        "spec": spec.hash,
        "outcome": outcome,
        "reason": reason,
        "attempt": attempt,
        "job": None,
        "host": "node1",
        "started": "2026-11-24T10:00:00Z",
        "ended": "2026-11-24T10:01:00Z",
        "log": "log.jsonl",
        "log_sha256": "sha256:" + hashlib.sha256(log.encode()).hexdigest(),
        "code": code,
        "cause": [],
    }
    write_json(inside / "run.json", facts)
    if outcome in ANSWERS:
        write_json(folder / "run.json", {**facts, "log": f"attempts/{attempt}/log.jsonl"})
    return folder


def log_lines(
    spec: RunSpec,
    step_s: float,
    devices: list[str] | None,
    code: dict[str, Any],
    effective: dict[str, Any],
    factors: list[float] | None = None,
) -> list[dict[str, Any]]:
    noise = random.Random(spec.run)
    counts = parameters(
        spec.model,
        frames=spec.data.frames,
        latent_size=spec.latent_size,
        latent_channels=spec.vae.latent_channels,
    )
    header = {
        "event": "header",
        "schema": 2,
        "spec": spec.hash,
        "run": spec.run,
        "attempt": 1,
        "started": "2026-11-24T10:00:00Z",
        "host": "node1",
        "code": code,
        "versions": {"python": "3.11.9", "torch": "2.14.1", "cuda": "13.0", "driver": None},
        "devices": devices or [DEVICES[spec.card]] * spec.gpus,
        "declared": {"precision": spec.precision},
        "effective": {
            "parameters": counts.total,
            "trainable_parameters": counts.trainable,
            "precision": spec.precision,
            "experts": spec.model.experts,
            "top_k": spec.model.top_k,
            "world_size": spec.gpus,
            "clips_per_gpu": spec.clips_per_gpu,
            "data_mode": spec.data.mode,
            "dataset": spec.data.dataset,
            "implementation": spec.implementation,
            "vae": spec.vae.id,
            **effective,
        },
        "seed": spec.seed,
    }
    warmup, last = spec.steps.warmup, spec.steps.warmup + spec.steps.timed
    steps = [
        {
            "event": "step",
            "step": step,
            "phase": "warmup" if step <= warmup else "timed",
            "step_s": step_s * noise.uniform(0.98, 1.03) * (8 if step == 1 else 1),
            "data_wait_s": step_s * noise.uniform(0, 0.01),
            "loss": 1 / step + noise.uniform(0, 0.05),
            "grad_norm": 0.4,
            "lr": 1e-4,
            "epoch": 0,
            "kind": "eager",
        }
        for step in range(1, last + 1)
    ]
    for step, factor in zip(steps, factors or [], strict=False):
        step["step_s"] *= factor
    wall_s = 1.01 * sum(step["step_s"] for step in steps[warmup:])
    window = {
        "event": "window",
        "phase": "timed",
        "first_step": warmup + 1,
        "last_step": last,
        "wall_s": wall_s,
    }
    memory = [_memory(spec, rank) for rank in range(spec.gpus)]
    return [header, *steps, window, *memory, {"event": "footer", "steps": last, "wall_s": 60.0}]


def _memory(spec: RunSpec, rank: int) -> dict[str, Any]:
    names = ("allocated_gib", "reserved_gib", "peak_allocated_gib", "peak_reserved_gib")
    figures: dict[str, Any] = dict.fromkeys((*names, "device_gib"))
    if spec.device == "cuda":
        used = 2.5 + 1.2 * spec.clips_per_gpu + 0.1 * rank
        figures = {name: used + 0.3 * index for index, name in enumerate(names)}
        figures["device_gib"] = MEMORY_GIB[spec.card]
    return {"event": "memory", "rank": rank, **figures, "host_peak_gib": 1.5 + 0.01 * rank}


def calibration_lines(ranks: int, factor: float = 1.0) -> list[dict[str, Any]]:
    """Before and after, with rates an H200 may have; ``factor``: of those after."""
    return [
        {
            "event": "calibration",
            "when": when,
            "rank": rank,
            "gemm_tflops": 700.0 * scale,
            "gemm_shape": [8192, 8192, 8192],
            "model_gemm_tflops": {"16384x384x1536": 410.0, "16384x1536x384": 520.0},
            "copy_gb_s": 3900.0,
            "all_reduce_gb_s": 320.0 if ranks > 1 else None,
        }
        for when, scale in (("before", 1.0), ("after", factor))
        for rank in range(ranks)
    ]


def telemetry_lines(gpus: int, moments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line a card and moment; each moment names what differs from a card at peace."""
    peace = {
        "sm_mhz": 1980,
        "memory_mhz": 3201,
        "power_w": 420.0,
        "temperature_c": 55,
        "throttle": [],
        "ecc_errors": 0,
        "other_processes": 0,
        "host_gpus_busy": 0,
        "host_load": 4.5,
        "pcie_gen": 5,
        "pcie_width": 16,
        "nvlink_active": 18,
        "memory_before_gib": 0.01,
    }
    return [
        {"event": "telemetry", "t_s": 0.5 * place, "gpu": gpu, **peace, **moment}
        for place, moment in enumerate(moments)
        for gpu in range(gpus)
    ]


def ledger_line(**shares: float) -> dict[str, Any]:
    return {
        "event": "ledger",
        "shares": {**shares, "other": 1 - sum(shares.values())},
        "step_s": 0.05,
        "source": "profiled window",
    }


def write_manifest(bench: Bench, dataset: str = DATASET) -> None:
    videos = [
        {"path": "faces/一.avi", "sha256": 64 * "1", "status": "usable", "reason": None},
        {"path": "b|ar.mp4", "sha256": 64 * "2", "status": "short", "reason": "17 frames < 48"},
        {"path": "empty.mp4", "sha256": 64 * "3", "status": "unreadable", "reason": "0 bytes"},
    ]
    counts = {
        "files": 3,
        "readable": 2,
        "usable": 1,
        "short": 1,
        "duplicate": 0,
        "unreadable": 1,
    }
    manifest = {
        "schema": 1,
        "folder": "videos",
        "dataset": dataset,
        "window": 48,
        "counts": counts,
        "videos": videos,
    }
    write_json(Path(bench.results) / "data" / "manifest.json", manifest)
