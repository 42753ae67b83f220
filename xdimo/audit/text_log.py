"""Text logs of the older training programs, into the metrics that records give.

Lines such as ``(step=0000100/epoch=0003) Loss: 0.1234 | GradNorm: 0.5 | Steps/Sec: 3.50 |
Samples/s: 28.0 | Achieved: 237.0 TFLOPs/s | MFU: 32.5%``; a field may be missing, and older lines
have commas and call some fields otherwise. Other lines and other fields are passed over; a known
field that cannot be read is refused. A figure is as precise as its digits.
"""

import gzip
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, floor, inf
from pathlib import Path
from typing import Any

import numpy as np

from xdimo.analysis import steady
from xdimo.analysis.confidence import mean
from xdimo.audit.figure import Figure
from xdimo.errors import UserError

SOURCE = "text log"

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_ENTRY = re.compile(r"\(step=(?P<step>\d+)(?:/epoch=(?P<epoch>\d+))?\)")
_NAMES = {
    "loss": "loss",
    "train loss": "loss",
    "gradnorm": "grad_norm",
    "grad norm": "grad_norm",
    "gradient norm": "grad_norm",
    "steps/sec": "steps_per_s",
    "steps/s": "steps_per_s",
    "train steps/sec": "steps_per_s",
    "samples/s": "samples_per_s",
    "samples/sec": "samples_per_s",
    "achieved": "tflops",
    "mfu": "mfu_percent",
}
# Fields stand between separators, or one behind the other.
_SEPARATOR = re.compile(r"\||;|,(?=\s|$)")
_NEXT = re.compile(rf"\s+(?=(?:{'|'.join(sorted(_NAMES, key=len, reverse=True))})\s*:)", re.I)
_VALUE = re.compile(r"(?P<number>[-+]?(?:[\d.,]+(?:e[-+]?\d+)?|nan|inf))\s*(?P<unit>\S.*)?", re.I)
_PLAIN = re.compile(r"[-+]?\d*\.?\d+(?:e[-+]?\d+)?")  # not "3.", which was cut off
_EITHER = re.compile(r"[-+]?[1-9]\d{0,2},\d{3}")
_COMMA = re.compile(r"[-+]?(?:\d+|\d{1,3}(?:\.\d{3})+),\d+")
_GROUPED = re.compile(r"[-+]?\d{1,3}(?:(?:,\d{3})+\.\d+|(?:,\d{3}){2,})")
_FLOPS = r"flop(?:s?/s(?:ec)?|s)(?:(?:/| per )(?:gpu|card))?"
# What a field's unit may be, in words; and the factor from each to what Window has.
_UNITS: dict[str, tuple[str, dict[str, float]]] = {
    "loss": ("no unit", {"": 1.0}),
    "grad_norm": ("no unit", {"": 1.0}),
    "steps_per_s": ("steps/s or no unit", {r"(?:(?:steps|it)/s(?:ec)?)?": 1.0}),
    "samples_per_s": ("samples/s or no unit", {r"(?:(?:samples|clips)/s(?:ec)?)?": 1.0}),
    "tflops": (
        "GFLOPs/s, TFLOPs/s or PFLOPs/s, or these per GPU",
        {f"g{_FLOPS}": 1e-3, f"t{_FLOPS}": 1.0, f"p{_FLOPS}": 1e3},
    ),
    "mfu_percent": ("per cent, such as 32.5%, or a share of at most 1", {"%": 1.0, "": 100.0}),
}


@dataclass(frozen=True)
class Window:
    """One line: means over the steps since the line before. None: the line does not say."""

    line: int
    step: int
    epoch: int | None
    loss: float | None = None  # it may be NaN
    grad_norm: float | None = None
    steps_per_s: float | None = None
    samples_per_s: float | None = None
    tflops: float | None = None
    mfu_percent: float | None = None
    per_gpu: bool = False  # tflops are those of one GPU
    slack: Mapping[str, float] = field(default_factory=dict)  # of each rate, relative

    def figure(self, name: str) -> Figure | None:
        value = getattr(self, name)
        return None if value is None else Figure(value, self.slack[name])


def read(path: Path) -> list[Window]:
    """Every line that is one, in order.

    Raises UserError where the file has none, where a figure or its unit is not understood, and
    where steps go back.
    """
    windows: list[Window] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        where = f"{path} line {number}"
        if "(step=" not in line:
            continue
        entry = _ENTRY.search(line)
        if entry is None or line.count("(step=") > 1:
            raise UserError(f"{where}: expected one '(step=...)' with a whole number")
        step = int(entry["step"])
        if windows and step <= windows[-1].step:
            raise UserError(f"{where}: step {step} after step {windows[-1].step}")
        epoch = int(entry["epoch"]) if entry["epoch"] else None
        windows.append(Window(number, step, epoch, **_fields(line[entry.end() :], where)))
    if not windows:
        raise UserError(f"{path}: no line such as '(step=0000100/epoch=0003) Loss: ...'")
    return windows


def _text(path: Path) -> str:
    """UTF-8, or UTF-16 with or without its mark; unpacked, and without colours."""
    try:
        raw = path.read_bytes()
        raw = gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    encoding = "utf-8-sig"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif b"\0" in raw[:2]:
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    return _COLOUR.sub("", raw.decode(encoding, errors="replace"))


def _fields(text: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {"slack": {}}
    for part in _SEPARATOR.split(text):
        label, _, rest = part.partition(":")
        value, *others = _NEXT.split(rest)
        for one in (f"{label}:{value}", *others):
            label, _, written = (side.strip() for side in one.partition(":"))
            name = _NAMES.get(label.lower())
            if name is None:
                continue
            if name in found:
                raise UserError(f"{where}: {label} twice")
            try:
                _read(name, written, found)
            except ValueError as error:
                raise UserError(f"{where}: {label}: {written!r} {error}") from None
    return found


def _read(name: str, written: str, found: dict[str, Any]) -> None:
    """Puts a field into ``found``, as Window has it. Raises ValueError that says what is wrong."""
    match = _VALUE.fullmatch(written)
    if not match:
        raise ValueError("is no number")
    number, unit = match["number"].lower(), (match["unit"] or "").lower()
    expected, factors = _UNITS[name]
    factor = next((factors[known] for known in factors if re.fullmatch(known, unit)), None)
    finite = number[-1] not in "nf"
    if factor is None or (factor == 100 and finite and float(_point(number)) > 1):
        raise ValueError(f"expected {expected}")
    if name in ("loss", "grad_norm"):
        found[name] = float(_point(number) if finite else number)
        return
    if not finite or number.startswith("-"):
        raise ValueError("is no rate")
    figure = Figure.written(_point(number)).times(factor)
    if figure.value:
        found[name], found["slack"][name] = figure.value, figure.slack
    elif name in ("steps_per_s", "samples_per_s"):  # a claim of 0.0 says nothing, breaks nothing
        raise ValueError("has too few decimals to be a rate")
    if name == "tflops":
        found["per_gpu"] = unit.endswith(("gpu", "card"))


def _point(number: str) -> str:
    """``number`` with a decimal point and without thousands separators.

    Raises ValueError where a comma may be either.
    """
    if _EITHER.fullmatch(number):
        raise ValueError("has a comma that may part thousands or decimals: write it without")
    if _COMMA.fullmatch(number):
        return number.replace(".", "").replace(",", ".")
    if _GROUPED.fullmatch(number):
        return number.replace(",", "")
    if not _PLAIN.fullmatch(number):
        raise ValueError("is no number")
    return number


def metrics(path: Path, global_batch: int | None = None) -> dict[str, Any]:
    """What the log gives of metrics.json; None: it does not say.

    The first window holds the start of the run and is left out. ``global_batch``: needed where the
    lines have no samples/s, or too few digits; where they give another one, theirs counts.
    """
    windows = read(path)
    first = windows[0]
    everything = [window for window in windows if window.steps_per_s]
    timed = [window for window in everything if window is not first]
    batch = _batch(everything, global_batch, path)
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
            rounding = found.mean * max(w.slack["steps_per_s"] for w in timed)
            half = found.half + rounding
            figures["samples_per_s_ci95"] = [batch / (found.mean + s * half) for s in (1, -1)]
    return figures


def _rate(windows: list[Window], chosen: list[Window]) -> float | None:
    """Steps/s over the chosen windows: their steps over their time."""
    before = dict(zip([w.step for w in windows], [0, *(w.step for w in windows)], strict=False))
    steps = [w.step - before[w.step] for w in chosen]
    seconds = [n / w.steps_per_s for n, w in zip(steps, chosen, strict=True) if w.steps_per_s]
    return sum(steps) / sum(seconds) if seconds and sum(seconds) else None


def _batch(windows: list[Window], given: int | None, path: Path) -> int | None:
    """Clips a step: the whole number that both rates of every line allow; ``given`` where they
    allow that too. None: several, and none given.

    Raises UserError where they allow none.
    """
    low, high = 1.0, inf
    for window in windows:
        samples, steps = window.figure("samples_per_s"), window.figure("steps_per_s")
        if samples and steps:
            ratio, slack = samples.value / steps.value, samples.slack + steps.slack
            low, high = max(low, ceil(ratio * (1 - slack))), min(high, floor(ratio * (1 + slack)))
            if low > high:
                raise UserError(
                    f"{path} line {window.line}: {samples.value:g} samples/s over "
                    f"{steps.value:g} steps/s are {ratio:.4g} clips a step: no whole number, or "
                    "not that of the lines before"
                )
    if given is not None and low <= given <= high:
        return given
    return int(low) if low == high else None


def _last(windows: list[Window], name: str) -> float | None:
    values = [getattr(window, name) for window in windows]
    return next((value for value in reversed(values) if value is not None), None)
