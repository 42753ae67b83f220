"""What the cards said of themselves over the timed window, in a few figures."""

from collections import Counter
from collections.abc import Iterable, Sequence
from statistics import fmean, median
from typing import Any

from xdimo.records.events import Telemetry

# A process that has so much as opened a card takes more of its memory.
CARD_IN_USE_GIB = 0.25
# Power is the mean of the second before a reading (nvmlDeviceGetPowerUsage, since Ampere): earlier
# ones hold what the card did before the window.
POWER_MEAN_S = 1.0


def telemetry(samples: Sequence[Telemetry], samples_per_s: float | None) -> dict[str, Any]:
    """Part of metrics.json; None: no card said so (a CPU has none).

    Medians and means are over all cards and moments; power is of all cards together. Start and end:
    the hottest card at the first and the last reading, clocks over a tenth of the window.
    """
    throttled = [sample.throttle for sample in samples if sample.throttle is not None]
    reasons = Counter(reason for held in throttled for reason in held)
    power = _power_w(samples)
    ends, in_order = _ends(samples), sorted(samples, key=lambda sample: sample.t_s)
    return {
        "telemetry_samples": len(samples),
        "sm_mhz_median": _of(median, (s.sm_mhz for s in samples)),
        "sm_mhz_min": _of(min, (s.sm_mhz for s in samples)),
        "memory_mhz_median": _of(median, (s.memory_mhz for s in samples)),
        "temperature_c_start": _of(max, (s.temperature_c for s in _first_of_each(in_order))),
        "temperature_c_end": _of(max, (s.temperature_c for s in _first_of_each(in_order[::-1]))),
        "sm_mhz_start": _of(fmean, (s.sm_mhz for s in ends[0])),
        "sm_mhz_end": _of(fmean, (s.sm_mhz for s in ends[1])),
        "power_w": power,
        "joules_per_sample": power / samples_per_s if power and samples_per_s else None,
        "throttled": {name: n / len(throttled) for name, n in reasons.most_common()},
        "ecc_errors": _of(max, (s.ecc_errors for s in samples)),
        "other_processes": _of(max, (s.other_processes for s in samples)),
        "host_gpus_busy": _of(max, (s.host_gpus_busy for s in samples)),
        "host_load": _of(fmean, (s.host_load for s in samples)),
        "pcie_gen": _of(min, (s.pcie_gen for s in samples)),
        "pcie_width": _of(min, (s.pcie_width for s in samples)),
        "nvlink_active": _of(min, (s.nvlink_active for s in samples)),
        "memory_before_gib": _of(max, (s.memory_before_gib for s in samples)),
    }


def flags(figures: dict[str, Any], own_load: int) -> list[str]:
    """``what: detail``, of what may have slowed the run or was not its own.

    ``own_load``: the most that the run's own threads add to the host's load.
    """
    found = []
    if figures["throttled"]:
        held = (f"{name} {100 * share:.0f} %" for name, share in figures["throttled"].items())
        found.append(f"throttled: {', '.join(held)}")
    if figures["other_processes"]:
        found.append(f"other processes: {figures['other_processes']}")
    # Where a container hides other processes, their memory still shows.
    before = figures["memory_before_gib"]
    if before is not None and before > CARD_IN_USE_GIB:
        found.append(f"card in use: {before:.2f} GiB")
    if figures["host_gpus_busy"]:
        found.append(f"shared host: {figures['host_gpus_busy']}")
    if figures["host_load"] is not None and figures["host_load"] > own_load:
        found.append(f"host load: {figures['host_load']:.1f} / {own_load}")
    if figures["ecc_errors"]:
        found.append(f"ECC errors: {figures['ecc_errors']}")
    return found


def _of(summary: Any, values: Iterable[float | None]) -> Any:
    known = [value for value in values if value is not None]
    return summary(known) if known else None


def _power_w(samples: Sequence[Telemetry]) -> float | None:
    """Sum over the cards of each one's mean; None where one card's is not known."""
    cards = {sample.gpu for sample in samples}
    inside = [sample for sample in samples if sample.t_s >= POWER_MEAN_S]
    means = [_of(fmean, (s.power_w for s in inside if s.gpu == card)) for card in cards]
    return sum(means) if means and None not in means else None


def _first_of_each(samples: Iterable[Telemetry]) -> Iterable[Telemetry]:
    """The first sample of each card."""
    first: dict[int, Telemetry] = {}
    for sample in samples:
        first.setdefault(sample.gpu, sample)
    return first.values()


def _ends(samples: Sequence[Telemetry]) -> tuple[list[Telemetry], list[Telemetry]]:
    """The first and the last tenth of the window's time."""
    if not samples:
        return [], []
    first, last = min(s.t_s for s in samples), max(s.t_s for s in samples)
    edge = (last - first) / 10
    return (
        [sample for sample in samples if sample.t_s <= first + edge],
        [sample for sample in samples if sample.t_s >= last - edge],
    )
