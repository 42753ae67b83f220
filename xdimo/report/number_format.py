"""Numbers as text, the same in every table and both languages."""

from math import floor, log10
from typing import Any

from xdimo.config.schema import Card
from xdimo.report.words import Words


def number(value: float | None, words: Words, digits: int = 4) -> str:
    """``digits`` significant ones at least, whole thousands separated: 5,325,619 and 0.01230."""
    if value is None:
        return words("unknown")
    places = digits - 1 - floor(log10(abs(value))) if value else 0
    return f"{value:,.{max(0, places)}f}"


def interval(low: float, high: float, words: Words) -> str:
    return f"{number(low, words)} – {number(high, words)}"


def percent(share: float | None, words: Words) -> str:
    return words("unknown") if share is None else f"{100 * share:.2f} %"


def change(share: float | None, words: Words) -> str:
    """Signed, of what was before."""
    return words("unknown") if share is None else f"{100 * share:+.1f} %"


def plain(value: float) -> str:
    """A figure of hardware.yaml or history.csv as it stands there."""
    return f"{value:,.10g}"


def parameters(value: int) -> str:
    return f"{value:,}"


def gib(value: float) -> str:
    return f"{value:,.2f}"


def memory(metrics: dict[str, Any], words: Words) -> str:
    """GiB a card; of a run without a card, the host's."""
    if metrics["memory_reserved_gib"] is not None:
        return f"{gib(metrics['memory_reserved_gib'])} GiB"
    if metrics["host_peak_gib"] is not None:
        return words("host_memory", value=gib(metrics["host_peak_gib"]))
    return words("unknown")


def peak(declared: float | None, tensors: list[float], words: Words) -> str:
    """``91.1 declared / 364.2 tensor``; several devices of one card give a range of tensor."""
    ends = sorted({min(tensors), max(tensors)}) if tensors else []
    low_to_high = " – ".join(plain(value) for value in ends)
    if declared is None and not tensors:
        return words("unknown")
    if declared is None:
        return f"{low_to_high} {words('tensor')}"
    if not tensors:
        return f"{plain(declared)} {words('declared')}"
    if {declared} == set(tensors):
        return plain(declared)
    return f"{plain(declared)} {words('declared')} / {low_to_high} {words('tensor')}"


def card_peak(card: Card, words: Words) -> str:
    """Of a card that is not measured yet: of every device it may turn out to be."""
    known = [value for value in card.devices.values() if value is not None]
    return peak(card.declared_peak_tflops, known, words)


def measured_peak(metrics: dict[str, Any], words: Words) -> str:
    tensor = metrics["peak_tensor_tflops"]
    return peak(metrics["peak_declared_tflops"], [tensor] if tensor else [], words)


def mfu(metrics: dict[str, Any], words: Words) -> str:
    """``x % (tensor 364.2) / y % (declared 91.1)``, one figure where both peaks agree."""
    shown = {}
    for name in ("tensor", "declared"):
        share, against = metrics[f"mfu_{name}"], metrics[f"peak_{name}_tflops"]
        if share is not None and against not in shown:
            shown[against] = f"{percent(share, words)} ({words(name)} {plain(against)})"
    if len(shown) == 1 and metrics["mfu_declared"] == metrics["mfu_tensor"]:
        return percent(metrics["mfu_tensor"], words)
    return " / ".join(shown.values()) or words("unknown")


def throughput(metrics: dict[str, Any], words: Words) -> str:
    return words(
        "rates",
        tokens=f"{metrics['tokens_per_s']:,.0f}",
        samples=number(metrics["samples_per_s"], words),
    )


def times(ratio: float) -> str:
    return f"{ratio:.2f}×"


def ratios(interval: tuple[float, float] | None, words: Words) -> str:
    if interval is None:
        return words("unknown")
    return " – ".join(times(end) for end in interval)
