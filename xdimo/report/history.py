"""`xdimo history add`: a campaign's measured cells in the table of earlier measurements."""

import csv
import io
from os.path import lexists
from pathlib import Path

from xdimo.audit.claims import read
from xdimo.config.schema import SIZES, Bench, Hardware
from xdimo.errors import UserError
from xdimo.files import write_text
from xdimo.records.reader import Record
from xdimo.report.campaign_state import CellState, survey
from xdimo.spec import RunSpec


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


def add(
    bench: Bench, hardware: Hardware, path: Path, records: Path | None = None
) -> tuple[int, int]:
    """One row for each measured cell of the campaign, after the others; its row of earlier, fewer
    repeats gives way to it where it stands.

    ``records``: a folder that ``xdimo keep`` wrote. Returns how many rows are new, and how many
    changed. Raises UserError where the table cannot be read, or nothing was measured.
    """
    view = survey(bench, hardware, records)
    rows = [row.text for row in read(path)] if lexists(path) else []
    places = {_cell(row["record"]): place for place, row in enumerate(rows) if row["record"]}
    new = changed = 0
    cells = [(c, c.median.record) for c in view.cells.values() if c.median and c.median.record]
    if not cells:
        raise UserError(f"campaign {bench.campaign!r}: no measured cell in {view.runs_folder}")
    for cell, record in cells:
        row = _measured(cell, record, hardware, bench.campaign)
        place = places.get(_cell(row["record"]))
        if place is None:
            rows.append(row)
            new += 1
        elif not _same(rows[place], row):
            rows[place] = {**rows[place], **row}
            changed += 1
    if new or changed:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(path, text.getvalue())
    return new, changed


def _cell(record: str) -> tuple[str, str]:
    """Campaign and cell of <campaign>/<cell>-r<repeat>/attempts/N/log.jsonl, wherever it lies."""
    campaign, run = Path(record).parts[-5:-3]
    return campaign, run.rpartition("-r")[0]


def _same(old: dict[str, str], new: dict[str, str]) -> bool:
    """But for where the record lies: in results/runs, or in results/records."""
    return all(old[key] == value for key, value in new.items() if key != "record")


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
