"""The history table (history.csv): earlier measurements, with what they claimed and what is so."""

import csv
import io
import re
from dataclasses import dataclass
from pathlib import Path

from xdimo.config import SIZES, Bench, Hardware
from xdimo.errors import UserError
from xdimo.files import write_text
from xdimo.measure.metrics import TERA
from xdimo.measure.records import Record
from xdimo.model.flops import model_flops
from xdimo.report.cells import CellState, survey
from xdimo.spec import ModelSpec, RunSpec

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


@dataclass(frozen=True)
class Row:
    """One line. ``tflops`` and ``mfu`` are made again from its steps/s; None where not known."""

    text: dict[str, str]
    value: dict[str, float | None]
    tflops: float | None
    mfu: float | None


def read(path: Path) -> list[Row]:
    """Raises UserError that names the file, the line and the column."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != COLUMNS:
                raise UserError(f"{path} line 1: expected the columns {','.join(COLUMNS)}")
            return [_row(line, f"{path} line {reader.line_num}") for line in reader]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None


def _row(line: dict[str, str], where: str) -> Row:
    if None in line or None in line.values():
        raise UserError(f"{where}: expected {len(COLUMNS)} values")
    value: dict[str, float | None] = {}
    for name in (*NEEDED, *OPTIONAL_NUMBERS):
        try:
            value[name] = float(line[name]) if line[name] else None
        except ValueError:
            raise UserError(f"{where}: {name}: {line[name]!r} is no number") from None
        if value[name] is None and name in NEEDED:
            raise UserError(f"{where}: {name}: missing")
    steps, batch, gpus = (value[name] for name in ("steps_per_s", "global_batch", "gpus"))
    assert steps is not None and batch is not None and gpus is not None
    flops = flops_of(line["effective_model"])
    tflops = steps * batch * flops / TERA if flops else None
    peak = value["tensor_peak_tflops"]
    return Row(line, value, tflops, tflops / (gpus * peak) if tflops and peak else None)


_MODEL = re.compile(
    r"(?P<size>\w+/2) (?:dense|(?P<experts>\d+) experts top-(?P<top_k>\d+))"
    r"(?:, (?P<frames>\d+) frames of (?P<pixels>\d+) px)?"
)


def flops_of(model: str) -> int | None:
    """Model FLOPs a training sample of ``S/2 4 experts top-2``; None of a model not so named.

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
    frames, pixels = int(match["frames"] or 16), int(match["pixels"] or 256)
    return model_flops(spec, frames=frames, latent_size=pixels // 8, latent_channels=4).training


def model_text(spec: RunSpec) -> str:
    """The name that ``flops_of`` reads, where the model has one."""
    model, data = spec.model, spec.data
    experts = f"{model.experts} experts top-{model.top_k}" if model.experts > 1 else "dense"
    usual = (data.frames, data.size) == (16, 256)
    clip = "" if usual else f", {data.frames} frames of {data.size} px"
    named = model.size in SIZES and model.patch == 2 and spec.vae.latent_channels == 4
    if named and spec.latent_size * 8 == data.size:
        return f"{model.size} {experts}{clip}"
    return f"custom {model.depth} x {model.width} {experts}{clip}"


def add(bench: Bench, hardware: Hardware, path: Path, records: Path | None = None) -> int:
    """Append a row for each measured cell; a record that is there already is not added again.

    ``records``: a folder that ``xdimo keep`` wrote. Returns how many rows were new.
    """
    view = survey(bench, hardware, records)
    old = path.read_text(encoding="utf-8") if path.exists() else ",".join(COLUMNS) + "\n"
    known = {_identity(row.text["record"]) for row in read(path)} if path.exists() else set()
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    new = 0
    for cell in view.cells.values():
        if cell.median is None or cell.median.record is None:
            continue
        row = _measured(cell, cell.median.record, hardware, bench.campaign)
        if _identity(row["record"]) not in known:
            writer.writerow(row)
            new += 1
    if new:
        write_text(path, old.rstrip("\n") + "\n" + text.getvalue())
    return new


def _identity(record: str) -> tuple[str, ...]:
    """<campaign>/<run>/attempts/N/log.jsonl: the same in results/runs and results/records."""
    return Path(record).parts[-5:]


def _measured(cell: CellState, record: Record, hardware: Hardware, campaign: str) -> dict[str, str]:
    metrics = cell.metrics
    assert metrics is not None and record.log is not None
    spec, model = record.spec, model_text(record.spec)
    cards = [name for name, card in hardware.cards.items() if card.label == metrics["card"]]
    return {
        "hardware": metrics["card"] or metrics["device"],
        "card": cards[0] if cards else "",
        "gpus": str(spec.gpus),
        "global_batch": str(spec.global_batch),
        "steps_per_s": f"{metrics['steps_per_s']:.6g}",
        "claimed_tflops": "",
        "claimed_mfu_percent": "",
        "precision": spec.precision,
        "data_mode": spec.data.mode,
        "declared_model": model,
        "effective_model": model,
        "tensor_peak_tflops": f"{metrics['peak_tensor_tflops'] or ''}",
        "confidence": f"measured, median of {len(cell.measured)}",
        "record": record.log.path.as_posix(),
        "note": f"campaign {campaign}, {record.run.run}",
    }
