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
_LINE_END = re.compile(r"\r\n|\n|\r")
_ENTRY = re.compile(r"\(step=(?P<step>\d{1,18})(?:/epoch=(?P<epoch>\d{1,18}))?\)")
_WIDE = re.compile(r"\((\0+)s\0+t\0+e\0+p\0")  # letters of two bytes or four, read as shorter ones
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
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
_KNOWN = "|".join(sorted(_NAMES, key=len, reverse=True))
_NEXT = re.compile(rf"(?<!\s)\s+(?=(?:{_KNOWN})\s*:)", re.I)
_NO_COLON = re.compile(
    rf"(?<![\w/])(?<![a-z] )(?:{_KNOWN})\s*(?:[=\ufe13\ufe55\uff1a]|\s[-+]?[.\d])", re.I
)
_END = re.compile(r"\s*[-+]?\d*(?:[.,](?P<decimals>\d+))?(?P<unit>\D.*)?")
_VALUE = re.compile(r"(?P<number>[-+]?(?:[\d.,]+(?:e[-+]?\d+)?|nan|inf))\s*(?P<unit>\S.*)?", re.I)
_PLAIN = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d+)?")  # not "3.", which was cut off
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

    Raises UserError where the file has none, where a figure or its unit is not understood, where
    steps go back, and where the last line may have been cut off.
    """
    windows: list[Window] = []
    ending = None
    lines = _LINE_END.split(_text(path))
    for number, line in enumerate(lines, start=1):
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
        text = line[entry.end() :]
        windows.append(Window(number, step, epoch, **_fields(text, where)))
        before, ending = ending, _ending(text)
        if number == len(lines) and (ending is None or ending != before):
            raise UserError(
                f"{where}: the log ends without a newline, perhaps inside a figure; add one if the "
                "line is whole, or take the line out"
            )
    if not windows:
        raise UserError(f"{path}: no line such as '(step=0000100/epoch=0003) Loss: ...'")
    return windows


def _ending(text: str) -> tuple[list[str], int, str] | None:
    """How a line ends: its last label, the decimals after it and the unit. None: with neither of
    these, so that digits may be missing. A line that was cut off has not that of the one before.
    """
    head, _, value = text.rpartition(":")
    match = _END.fullmatch(value)
    if match is None or not (match["decimals"] or match["unit"]):
        return None
    return head.split()[-1:], len(match["decimals"] or ""), (match["unit"] or "").strip()


def _text(path: Path) -> str:
    """UTF-8, or UTF-16 with or without its mark; unpacked, and without colours.

    Raises UserError where some of it is in an encoding that is not read.
    """
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
    text = raw.decode(encoding, errors="replace")
    if wide := _WIDE.search(text):
        name = "UTF-16" if encoding == "utf-8-sig" and len(wide[1]) == 1 else "UTF-32"
        line = text.count("\n", 0, wide.start()) + 1
        raise UserError(f"{path} line {line}: it looks like {name}; save the file as UTF-8")
    return _COLOUR.sub("", text)


def _fields(text: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {"slack": {}}
    if odd := _CONTROL.search(text):
        raise UserError(f"{where}: holds the control character {odd[0]!r}")
    if bare := _NO_COLON.search(text):
        raise UserError(f"{where}: {bare[0]!r}: expected the name, a colon and the figure")
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
