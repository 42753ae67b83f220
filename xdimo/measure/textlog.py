"""Text logs of the older training programs, into the metrics that records give.

Lines such as ``(step=0000100/epoch=0003) Loss: 0.1234 | GradNorm: 0.5 | Steps/Sec: 3.50 |
Samples/s: 28.0 | Achieved: 237.0 TFLOPs/s | MFU: 32.5%``; a field may be missing, and older lines
have commas and call some fields otherwise. Anything else in the file is passed over.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xdimo.errors import UserError
from xdimo.measure import steady
from xdimo.measure.interval import mean

SOURCE = "text log"

_LINE = re.compile(r"\(step=(?P<step>\d+)(?:/epoch=(?P<epoch>\d+))?\)\s*(?P<fields>.*)")
_FIELD = re.compile(
    r"(?P<name>[A-Za-z][A-Za-z/ ]*?):\s*(?P<value>[-+0-9.eE]+|nan|inf)\s*(?P<unit>%?)"
)
_NAMES = {
    "loss": "loss",
    "train loss": "loss",
    "gradnorm": "grad_norm",
    "grad norm": "grad_norm",
    "gradient norm": "grad_norm",
    "steps/sec": "steps_per_s",
    "train steps/sec": "steps_per_s",
    "samples/s": "samples_per_s",
    "samples/sec": "samples_per_s",
    "achieved": "tflops",
    "mfu": "mfu_percent",
}


@dataclass(frozen=True)
class Window:
    """One line: means over the steps since the line before. None: the line does not say."""

    line: int
    step: int
    epoch: int | None
    loss: float | None = None
    grad_norm: float | None = None
    steps_per_s: float | None = None
    samples_per_s: float | None = None
    tflops: float | None = None
    mfu_percent: float | None = None


def read(path: Path) -> list[Window]:
    """Every line that is one, in order.

    Raises UserError where the file has none, where a figure is no number, or where steps go back.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    windows: list[Window] = []
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.search(line)
        if not match:
            continue
        found = {"epoch": int(match["epoch"]) if match["epoch"] else None}
        step = int(match["step"])
        if windows and step <= windows[-1].step:
            raise UserError(f"{path} line {number}: step {step} after step {windows[-1].step}")
        values: dict[str, float] = {}
        for field in _FIELD.finditer(match["fields"]):
            name = _NAMES.get(field["name"].strip().lower())
            if name:
                try:
                    values[name] = float(field["value"])
                except ValueError:
                    raise UserError(
                        f"{path} line {number}: {field['name']}: {field['value']!r} is no number"
                    ) from None
        windows.append(Window(number, step, found["epoch"], **values))
    if not windows:
        raise UserError(f"{path}: no line such as '(step=0000100/epoch=0003) Loss: ...'")
    return windows


def metrics(path: Path, global_batch: int | None = None) -> dict[str, Any]:
    """What the log gives of metrics.json; None: it does not say.

    The first window holds the start of the run and is left out. ``global_batch``: needed where the
    lines have no samples/s.
    """
    windows = read(path)
    timed = [window for window in windows[1:] if window.steps_per_s]
    first = windows[0]
    everything = [w for w in windows if w.steps_per_s]
    batch = _batch(everything) or global_batch
    figures: dict[str, Any] = {
        "source": SOURCE,
        "run": path.stem,
        "windows": len(windows),
        "timed_steps": timed[-1].step - first.step if timed else 0,
        "global_batch": batch,
        "steps_per_s": None,
        "all_steps_per_s": _rate(windows, everything),
        "samples_per_s": None,
        "samples_per_s_ci95": None,
        "window_too_short": None,
        "unsteady": None,
        "loss_start": first.loss,
        "loss_end": windows[-1].loss,
        "claimed_tflops": _last(everything, "tflops"),
        "claimed_mfu_percent": _last(everything, "mfu_percent"),
    }
    if not timed:
        return figures
    step_s = np.array([1 / w.steps_per_s for w in timed if w.steps_per_s])
    change = steady.change(step_s)
    if change:
        at = None if change.at is None else timed[change.at].step
        figures["unsteady"] = {"change": change.what, "share": change.share, "at_step": at}
        return figures
    rate = _rate(windows, timed)
    figures["steps_per_s"] = rate
    if batch and rate:
        figures["samples_per_s"] = rate * batch
        found = mean(step_s)
        if found.half is None:
            figures["window_too_short"] = {"n": found.n, "tau": found.tau}
        else:
            ends = (found.mean + found.half, found.mean - found.half)
            figures["samples_per_s_ci95"] = [batch / end for end in ends]
    return figures


def _rate(windows: list[Window], chosen: list[Window]) -> float | None:
    """Steps/s over the chosen windows: their steps over their time."""
    before = dict(zip([w.step for w in windows], [0, *(w.step for w in windows)], strict=False))
    steps = [w.step - before[w.step] for w in chosen]
    seconds = [n / w.steps_per_s for n, w in zip(steps, chosen, strict=True) if w.steps_per_s]
    return sum(steps) / sum(seconds) if seconds and sum(seconds) else None


def _batch(windows: list[Window]) -> int | None:
    """Clips a step, where the lines give both rates."""
    ratios = [w.samples_per_s / w.steps_per_s for w in windows if w.samples_per_s and w.steps_per_s]
    return round(float(np.median(ratios))) if ratios else None


def _last(windows: list[Window], name: str) -> float | None:
    values = [getattr(window, name) for window in windows]
    return next((value for value in reversed(values) if value is not None), None)
