"""What plain work reached on the same cards, and where the time of a step goes."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from xdimo.records.events import Calibration, Ledger

# A card whose plain products differ by more from before to after was not the same card.
DRIFTED = 0.05


def ceiling(calibrations: Sequence[Calibration]) -> dict[str, Any]:
    """Part of metrics.json: means over ranks, before and after; None without a calibration."""
    before, after = (
        [one.gemm_tflops for one in calibrations if one.when == when]
        for when in ("before", "after")
    )
    shapes = dict.fromkeys(name for one in calibrations for name in one.model_gemm_tflops)
    reduced = [one.all_reduce_gb_s for one in calibrations if one.all_reduce_gb_s is not None]
    return {
        "gemm_tflops": _mean([*before, *after]),
        "gemm_shape": list(calibrations[0].gemm_shape) if calibrations else None,
        "gemm_s": calibrations[0].gemm_s if calibrations else None,
        "gemm_tflops_slowest": min([*before, *after], default=None),
        "gemm_change": fmean(after) / fmean(before) - 1 if before and after else None,
        "model_gemm_tflops": {
            name: fmean(
                one.model_gemm_tflops[name] for one in calibrations if name in one.model_gemm_tflops
            )
            for name in shapes
        },
        "copy_gb_s": _mean([one.copy_gb_s for one in calibrations]),
        "all_reduce_gb_s": _mean(reduced),
    }


def ledger(told: Ledger | None) -> dict[str, Any]:
    return {
        "ledger": told.shares if told else None,
        "ledger_step_s": told.step_s if told else None,
    }


def flags(figures: dict[str, Any]) -> list[str]:
    change = figures["gemm_change"]
    if change is not None and abs(change) > DRIFTED:
        return [f"card changed: {100 * change:+.1f} %"]
    return []


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
