"""Derived numbers of one run, from its record and the table of cards alone."""

from pathlib import Path
from typing import Any

import pandas as pd

from xdimo.analysis import calibration_summary, telemetry_summary
from xdimo.analysis.throughput import throughput
from xdimo.config.schema import Hardware
from xdimo.errors import UserError
from xdimo.files import content_hash, write_json
from xdimo.model.flops import FORMULA, TERA, model_flops
from xdimo.outcome import mark_named
from xdimo.records.reader import Log, Record, read_run
from xdimo.spec import RunSpec


def derive(record: Record, hardware: Hardware) -> dict[str, Any]:
    """metrics.json: how each figure is made stands beside its key.

    A run that did not end ``ok`` has its outcome and no figures. None = not known; nothing is
    clamped: an MFU over 1 stays as it is and is flagged.
    """
    spec, run = record.spec, record.run
    metrics: dict[str, Any] = {
        "schema": 1,
        "run": run.run,
        "cell": spec.cell,
        "spec": run.spec,
        "log_sha256": run.log_sha256,
        "outcome": run.outcome,
        "reason": run.reason,
        "attempt": run.attempt,
    }
    if run.outcome == "ok" and record.log is not None:
        speed = throughput(record.log, spec.global_batch, spec.tokens_per_clip)
        metrics |= speed | _memory(record.log) | _loss(record.log)
        metrics |= calibration_summary.ceiling(
            record.log.calibrations
        ) | calibration_summary.ledger(record.log.ledger)
        metrics |= _utilisation(record.log, spec, hardware, speed["samples_per_s"])
        metrics["mfu_measured"] = _share(
            metrics["model_tflops_per_s"], spec.gpus, metrics["gemm_tflops"]
        )
        metrics |= telemetry_summary.telemetry(record.log.telemetry, speed["samples_per_s"])
        metrics["flags"] = _flags(record, hardware, metrics)
    return metrics


def write(run_json: Path, hardware: Hardware, output: Path) -> dict[str, Any]:
    """metrics.json of the run that ``run_json`` (its rule's output) ended. Raises UserError."""
    if not run_json.exists():
        raise UserError(f"{run_json}: no such file")
    mark_named(run_json)  # also one that is refused: measured again, it is not taken once more
    metrics = derive(read_run(run_json.parent), hardware)
    metrics["hardware"] = content_hash(hardware.model_dump())  # which peaks it was derived with
    write_json(output, metrics)
    return metrics


def _memory(log: Log) -> dict[str, Any]:
    """GiB; each the largest rank's."""
    return {
        "memory_reserved_gib": _largest([m.peak_reserved_gib for m in log.memory]),
        "memory_allocated_gib": _largest([m.peak_allocated_gib for m in log.memory]),
        "memory_device_gib": _largest([m.device_gib for m in log.memory]),
        "host_peak_gib": _largest([m.host_peak_gib for m in log.memory]),
    }


def _largest(values: list[float | None]) -> float | None:
    """None where one rank's is not known: it might be the largest."""
    known = [value for value in values if value is not None]
    return max(known) if known and len(known) == len(values) else None


def _loss(log: Log) -> dict[str, Any]:
    """Medians of the first and the last tenth of the timed steps, at least one step each."""
    losses = log.steps[log.steps["phase"] == "timed"]["loss"].astype(float)
    tenth = max(1, len(losses) // 10)
    start, end = losses.iloc[:tenth].median(), losses.iloc[-tenth:].median()
    return {
        "loss_start": None if pd.isna(start) else float(start),
        "loss_end": None if pd.isna(end) else float(end),
    }


def _utilisation(
    log: Log, spec: RunSpec, hardware: Hardware, samples_per_s: float | None
) -> dict[str, Any]:
    """MFU = model FLOP/s of the whole job / (devices x peak of one).

    The peaks are those of the card that the *measured* device name belongs to, whatever card the
    config meant. tf32 and fp32 runs are held against the same fp16/bf16 tensor peak.
    """
    assert log.header is not None
    names = sorted(set(log.header.devices))
    card = hardware.card_of(names[0]) if len(names) == 1 else None
    tensor = hardware.tensor_peak_tflops(names[0]) if card else None
    declared = card.declared_peak_tflops if card else None
    flops = model_flops(
        spec.model,
        frames=spec.data.frames,
        latent_size=spec.latent_size,
        latent_channels=spec.vae.latent_channels,
    )
    tflops_per_s = None if samples_per_s is None else samples_per_s * flops.training / TERA
    dtype = f"{card.tensor_dtype}, {card.tensor_accumulate} accumulate" if card and tensor else None
    return {
        "parameters": log.header.effective.parameters,
        "trainable_parameters": log.header.effective.trainable_parameters,
        "device": ", ".join(names),
        "devices": spec.gpus,
        "card": card.label if card else None,
        "peak_tensor_tflops": tensor,
        "peak_tensor_dtype": dtype,
        "peak_declared_tflops": declared,
        "implementation": log.header.effective.implementation,
        "flops_formula": FORMULA,
        "model_flops_per_sample": flops.training,
        "model_tflops_per_s": tflops_per_s,
        "mfu_tensor": _share(tflops_per_s, spec.gpus, tensor),
        "mfu_declared": _share(tflops_per_s, spec.gpus, declared),
    }


def _share(tflops_per_s: float | None, gpus: int, peak: float | None) -> float | None:
    return tflops_per_s / (gpus * peak) if tflops_per_s is not None and peak else None


# Time of the window that lies in no step, from which a reader must know of it.
OUTSIDE, OUTSIDE_S = 0.05, 0.5
OTHER_CARD = "not the target's card"


def other_card(record: Record, hardware: Hardware) -> str | None:
    """The device of a measured run on a known card that is not its target's: its row is refused.

    Only the table of cards can tell, which no record has.
    """
    header = record.log.header if record.log else None
    measured = record.run.outcome == "ok"
    if header is None or not measured or len(set(header.devices)) > 1:
        return None
    device = header.devices[0]
    card = hardware.card_of(device)
    return device if card and card != hardware.cards.get(record.spec.card) else None


def _flags(record: Record, hardware: Hardware, metrics: dict[str, Any]) -> list[str]:
    """What a reader must know of these figures: ``what`` or ``what: detail``."""
    assert record.log is not None and record.log.header is not None
    spec, devices = record.spec, set(record.log.header.devices)
    flags = [f"run.json cannot be read: {record.instead}"] if record.instead else []
    for peak in ("tensor", "declared"):
        mfu = metrics[f"mfu_{peak}"]
        if mfu is not None and mfu > 1:
            flags.append(f"MFU over 100 %: {peak}")
    if len(devices) > 1:
        flags.append(f"devices differ: {metrics['device']}")
    elif spec.device == "cuda" and metrics["card"] is None:
        flags.append(f"unknown card: {metrics['device']}")
    elif other := other_card(record, hardware):
        flags.append(f"{OTHER_CARD}: {other}")
    if metrics["timed_steps"] != spec.steps.timed:
        flags.append(f"window shorter than asked: {metrics['timed_steps']}/{spec.steps.timed}")
    outside = metrics["between_steps_s"] / metrics["window_s"]
    if outside > OUTSIDE and metrics["between_steps_s"] > OUTSIDE_S:
        flags.append(f"outside the steps: {100 * outside:.0f} %")
    # Of each rank the loop, a thread for copies or collectives, and its loaders.
    flags += telemetry_summary.flags(metrics, own_load=spec.gpus * (2 + spec.workers))
    if spec.device == "cuda":  # what a CPU gives to plain work, nobody keeps steady
        flags += calibration_summary.flags(metrics)
    if record.run.code.dirty:
        flags.append("code dirty")
    if record.run.code.unknown:
        flags.append(f"commit unknown: {record.run.code.unknown}")
    return flags
