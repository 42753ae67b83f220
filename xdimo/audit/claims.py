"""The table of earlier measurements (history.csv): what each row claims, and what follows."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from xdimo.config.schema import SIZES
from xdimo.errors import UserError
from xdimo.files import read_text
from xdimo.model.flops import TERA, model_flops
from xdimo.spec import ModelSpec

COLUMNS = [
    "hardware",
    "card",
    "gpus",
    "global_batch",
    "steps_per_s",
    "claimed_tflops",
    "claimed_mfu_percent",
    "precision",
    "data_mode",
    "declared_model",
    "effective_model",
    "tensor_peak_tflops",
    "confidence",
    "record",
    "note",
]
OPTIONAL_NUMBERS = ("claimed_tflops", "claimed_mfu_percent", "tensor_peak_tflops")
NEEDED = ("gpus", "global_batch", "steps_per_s")
WHOLE = ("gpus", "global_batch")
# A table of claims may have these besides: a speedup, and the name of the row that it is over.
EXTRA = ("claimed_speedup", "claimed_over")


@dataclass(frozen=True)
class Row:
    """One line. ``tflops`` and ``mfu`` are made again from its steps/s; None where not known."""

    text: dict[str, str]
    value: dict[str, float | None]
    where: str  # file and line
    tflops: float | None
    mfu: float | None


def read(path: Path) -> list[Row]:
    """Raises UserError that names the file, the line and the column."""
    reader = csv.DictReader(io.StringIO(read_text(path), newline=""))
    try:
        if reader.fieldnames not in (COLUMNS, [*COLUMNS, *EXTRA]):
            raise UserError(f"{path} line 1: expected the columns {','.join(COLUMNS)}")
        return [
            _row(line, len(reader.fieldnames), f"{path} line {reader.line_num}") for line in reader
        ]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not CSV: {error}") from None


def _row(line: dict[str, str], columns: int, where: str) -> Row:
    if None in line or None in line.values():
        raise UserError(f"{where}: expected {columns} values")
    value: dict[str, float | None] = {}
    for name in (*NEEDED, *OPTIONAL_NUMBERS, "claimed_speedup"):
        value[name] = _number(line[name], f"{where}: {name}", name) if line.get(name) else None
        if value[name] is None and name in NEEDED:
            raise UserError(f"{where}: {name}: missing")
    steps, batch, gpus = (value[name] for name in ("steps_per_s", "global_batch", "gpus"))
    assert steps is not None and batch is not None and gpus is not None
    flops = flops_of(line["effective_model"])
    tflops = steps * batch * flops / TERA if flops else None
    peak = value["tensor_peak_tflops"]
    return Row(line, value, where, tflops, tflops / (gpus * peak) if tflops and peak else None)


def _number(text: str, where: str, name: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise UserError(f"{where}: {text!r} is no number; expected such as 3.5")
    value = float(text)
    if name in WHOLE and not (value.is_integer() and 1 <= value <= 2**31):
        raise UserError(f"{where}: {text} is not a count; expected a whole number from 1 on")
    if not (0 < value < 1e15):
        raise UserError(f"{where}: {text} cannot be; expected more than 0")
    return value


# ASCII alone: float() takes nan, inf, 1_000 and the digits of other scripts too.
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_MODEL = re.compile(
    r"(?P<size>\w+/2) (?:dense|(?P<experts>\d+) experts top-(?P<top_k>\d+))"
    r"(?:, (?P<frames>\d+) frames of (?P<pixels>\d+) px)?"
)


@dataclass(frozen=True)
class Sample:
    """A model and the clip it is trained on."""

    model: ModelSpec
    frames: int
    latent_size: int
    latent_channels: int = 4

    @property
    def shape(self) -> dict[str, int]:
        return {
            "frames": self.frames,
            "latent_size": self.latent_size,
            "latent_channels": self.latent_channels,
        }


def sample_of(model: str) -> Sample | None:
    """``S/2 4 experts top-2``; None of a model not so named.

    Unless it says otherwise (``, 32 frames of 128 px``): 16 frames of 256 px, 8 pixels and
    4 channels to a latent position.
    """
    match = _MODEL.fullmatch(model)
    if not match or match["size"] not in SIZES:
        return None
    depth, width, heads = SIZES[match["size"]]
    spec = ModelSpec(
        size=match["size"],
        depth=depth,
        width=width,
        heads=heads,
        patch=2,
        experts=int(match["experts"] or 1),
        top_k=int(match["top_k"] or 1),
    )
    return Sample(spec, int(match["frames"] or 16), int(match["pixels"] or 256) // 8)


def flops_of(model: str) -> int | None:
    """Model FLOPs a training sample of the model so named; None where it is not known."""
    sample = sample_of(model)
    return model_flops(sample.model, **sample.shape).training if sample else None
