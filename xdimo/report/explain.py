"""`xdimo audit`: claims of tables, records and text logs, each with what it should be and why."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from os.path import lexists
from pathlib import Path
from typing import Any

from tabulate import tabulate

from xdimo.analysis.metrics import derive, other_card
from xdimo.audit import claims, text_log
from xdimo.audit.claims import Sample
from xdimo.audit.figure import Figure
from xdimo.audit.mistakes import Claim, Explanation, batch_in_speedup, explain, of_row
from xdimo.config.load import naming, parse
from xdimo.config.schema import Hardware
from xdimo.errors import UserError
from xdimo.files import read_json
from xdimo.records.reader import check_run, outcome_path, read_run
from xdimo.records.rules import DECLARED_IS_EFFECTIVE, Finding
from xdimo.report.campaign_state import Part
from xdimo.spec import read_spec


class _Told(Part):
    """What metrics.json claims."""

    steps_per_s: float
    model_tflops_per_s: float
    mfu_tensor: float | None = None


def collect(
    paths: Iterable[Path],
    hardware: Hardware,
    *,
    card: str | None = None,
    gpus: int | None = None,
    global_batch: int | None = None,
    model: str = "S/2 4 experts top-2",
) -> list[Claim]:
    """Every claim under ``paths``: tables (.csv), folders of runs, anything else a text log.

    The rest is what a text log does not say. Raises UserError where one cannot be read.
    """
    found: list[Claim] = []
    for path in paths:
        if path.suffix == ".csv":
            found += [_with_series(of_row(row, hardware), row) for row in claims.read(path)]
        elif path.is_dir():
            found += [claim for folder in runs(path) for claim in _of_run(folder, hardware)]
        else:
            sample = claims.sample_of(model)
            if sample is None:
                raise UserError(f"--model: {model!r}; expected such as 'S/2 4 experts top-2'")
            found.append(_of_text(path, card, gpus, global_batch, sample))
    return found


def runs(folder: Path) -> list[Path]:
    """Folders of runs in ``folder``, or itself."""
    # By name, not by pattern: a link to nothing is a spec that cannot be read.
    found = sorted(path.parent for path in folder.rglob("*") if path.name == "spec.json")
    if not found:
        raise UserError(f"{folder}: no spec.json in it or below")
    return found


def broken(paths: Iterable[Path], hardware: Hardware) -> Iterator[Finding]:
    """Every rule that a record under the folders of ``paths`` breaks."""
    for path in paths:
        if path.is_dir():
            for folder in runs(path):
                yield from check_run(folder) or _other_card(folder, hardware)


def _other_card(folder: Path, hardware: Hardware) -> Iterator[Finding]:
    if outcome_path(folder, read_spec(folder / "spec.json").hash) is None:
        return
    record = read_run(folder)
    if (device := other_card(record, hardware)) and record.log:
        detail = f"devices: {device}; the spec says {record.spec.card}"
        yield Finding(DECLARED_IS_EFFECTIVE, record.log.path, 1, detail)


def _with_series(claim: Claim, row: claims.Row) -> Claim:
    """The claim with the rates of the record that its row names, where that is at hand."""
    record = Path(row.text["record"])
    if not row.text["record"] or not record.is_file():
        return claim
    if record.suffix == ".jsonl":
        return claim  # its own folder is audited as a run
    told = text_log.metrics(record, int(row.value["global_batch"] or 0) or None)
    return replace(
        claim,
        steady_steps_per_s=told["steps_per_s"],
        all_steps_per_s=told["all_steps_per_s"],
        remarks=_remarks(told, claim.global_batch),
    )


def _remarks(told: dict[str, Any], batch: float | None) -> tuple[str, ...]:
    """What a reader must know of a text log; ``batch``: what was given for it."""
    found = []
    if batch is not None and told["global_batch"] != batch:
        says = told["global_batch"] or "another"
        found.append(
            f"global batch {batch:g} was given; the log's samples/s and steps/s say {says}"
        )
    if change := told["unsteady"]:
        at = "" if change["at_step"] is None else f" at step {change['at_step']}"
        found.append(
            f"the log never settles: {change['change']} of {100 * change['share']:+.1f} %{at}"
        )
    return tuple(found)


def _of_run(folder: Path, hardware: Hardware) -> Iterator[Claim]:
    """What metrics.json claims of a run, or what its record gives now where there is none."""
    try:
        record = read_run(folder)
    except UserError:
        return  # `--strict` says why
    derived = derive(record, hardware)
    if derived.get("samples_per_s") is None or record.log is None:
        return
    path = folder / "metrics.json"
    told = derived
    if lexists(path):
        with naming(path):
            told = parse(_Told, read_json(path)).model_dump()
    steps = record.log.steps
    spec = record.spec
    device = derived["device"]
    card = next((name for name, c in hardware.cards.items() if device in c.devices), None)
    mfu = told.get("mfu_tensor")
    yield Claim(
        name=spec.run,
        where=str(path if path.exists() else record.log.path),
        source="record",
        card=card,
        device=device,
        gpus=spec.gpus,
        global_batch=spec.global_batch,
        steps_per_s=Figure.exact(told["steps_per_s"]),
        sample=Sample(spec.model, spec.data.frames, spec.latent_size, spec.vae.latent_channels),
        tflops=Figure.exact(told["model_tflops_per_s"]),
        mfu=None if mfu is None else Figure.exact(mfu),
        steady_steps_per_s=derived["steps_per_s"],
        all_steps_per_s=len(steps) / float(steps["step_s"].sum()),
    )


def _of_text(
    path: Path, card: str | None, gpus: int | None, batch: int | None, sample: Sample
) -> Claim:
    """The last line that claims what most lines claim, with the steps/s of that line."""
    told, windows = text_log.metrics(path, batch), text_log.read(path)
    lines = [window for window in windows if window.steps_per_s]
    if not lines:
        raise UserError(f"{path}: no line has Steps/Sec")
    line, contradictions = _typical(lines)
    where = f"{path} line {line.line}"
    if line.per_gpu and gpus is None:
        raise UserError(f"{where}: Achieved is per GPU; give --gpus")
    steps, flops, mfu = (line.figure(name) for name in ("steps_per_s", "tflops", "mfu_percent"))
    assert steps is not None
    return Claim(
        name=path.stem,
        where=where,
        source=text_log.SOURCE,
        card=card,
        device=None,
        gpus=gpus,
        global_batch=told["global_batch"],
        steps_per_s=steps,
        sample=sample,
        tflops=flops.times(gpus or 1) if flops and line.per_gpu else flops,
        mfu=mfu.times(0.01) if mfu else None,
        steady_steps_per_s=told["steps_per_s"],
        of_first_window=line is windows[0],
        remarks=_remarks(told, batch),
        contradictions=contradictions,
    )


def _typical(lines: list[text_log.Window]) -> tuple[text_log.Window, tuple[str, ...]]:
    """The last line whose claims are to its steps/s as they are in the median line; and what is
    claimed by lines of which that is not so.
    """
    typical, odd = lines, []
    for name, unit in (("tflops", "TFLOP/s"), ("mfu_percent", "% MFU")):
        ratios = {
            line.line: Figure(claimed.value / steps.value, claimed.slack + steps.slack)
            for line in lines
            if (claimed := line.figure(name)) and (steps := line.figure("steps_per_s"))
        }
        if not ratios:
            continue
        usual = sorted(ratios.values(), key=lambda one: one.value)[len(ratios) // 2]
        alike = {line for line, ratio in ratios.items() if ratio.matches(usual.value, usual.slack)}
        typical = [line for line in typical if line.line in alike] or typical
        odd += [
            f"line {line}: its {unit} are {ratio.value / usual.value:.3g} times what the other "
            "lines claim at its steps/s"
            for line, ratio in ratios.items()
            if line not in alike
        ]
    return typical[-1], tuple(odd)


def as_text(found: list[Claim], hardware: Hardware) -> str:
    return "\n\n".join(_text(explain(claim, hardware), found) for claim in found)


def as_json(found: list[Claim], hardware: Hardware) -> str:
    told = []
    for claim in found:
        explanation = asdict(explain(claim, hardware))
        explanation["batch_in_speedup"] = _speedup(claim, found)
        told.append(explanation)
    return json.dumps(told, indent=1, ensure_ascii=False, default=lambda one: one.model_dump())


def _speedup(claim: Claim, found: list[Claim]) -> str | None:
    base = next((other for other in found if other.name == claim.over), None)
    return batch_in_speedup(claim, base) if base else None


def _text(told: Explanation, found: list[Claim]) -> str:
    claim = told.claim
    cards = f"{_n(claim.gpus)} GPU{'s' * (claim.gpus != 1)}"
    title = f"{claim.name}: {cards}, global batch {_n(claim.global_batch)}, "
    lines = [f"{title}{claim.steps_per_s.value:g} steps/s ({claim.source}, {claim.where})"]
    claimed = [f"{claim.tflops.value:g} TFLOP/s"] if claim.tflops else []
    claimed += [f"MFU {100 * claim.mfu.value:.4g} %"] if claim.mfu else []
    lines.append(f"  claimed    {', '.join(claimed) or 'nothing'}")
    should = [f"{told.tflops:.6g} TFLOP/s"] if told.tflops is not None else []
    should += [
        f"MFU {100 * share:.2f} % ({name} {told.peaks[name]:g})" for name, share in told.mfu.items()
    ]
    lines.append(f"  should be  {', '.join(should) or 'n/a'}")
    if not told.mfu:
        lines.append(f"             MFU n/a: {_missing(claim)}")
    mistakes = list(told.mistakes)
    notes = list(told.notes)
    if mixed := _speedup(claim, found):
        mistakes.append("batch mixed into speedup")
        notes.append(mixed)
    lines.append(f"  mistakes   {', '.join(mistakes) or 'none found'}")
    lines += [f"             {note}" for note in notes]
    lines += [f"  unexplained: {what}" for what in told.unexplained]
    if told.peak and claim.mfu:
        value = f"{claim.tflops.value:g}" if claim.tflops else "TFLOP/s"
        name = told.peak.name
        what = f"the peak {name}" if name.startswith("of ") else f"the {name} peak"
        over = f"{cards} x {told.peak.tflops:g}, {what}"
        lines.append(f"  its MFU    {100 * claim.mfu.value:.4g} % = {value} / ({over})")
    if len(told.chain) > 1:
        title = "From the claim to what it should be, one mistake mended a row:"
        lines += ["", f"  {title}", "", *_chain(told)]
    return "\n".join(lines)


def _missing(claim: Claim) -> str:
    """Why a claim has no MFU."""
    if claim.source == text_log.SOURCE:
        options = {
            "--card": claim.card,
            "--gpus": claim.gpus,
            "--global-batch": claim.global_batch,
        }
        if absent := [option for option, value in options.items() if value is None]:
            return f"the log does not say; give {', '.join(absent)}"
    if claim.sample is None:
        return "its model has no known FLOPs"
    return "its card has no known peak"


def _chain(told: Explanation) -> list[str]:
    peaks = list(told.grid[0][2]) if told.grid else []
    rates = {name: (tflops, shares) for name, tflops, shares in told.grid}
    rows, last = [], None
    for link in told.chain:
        tflops, shares = rates.get(link.mistake or "as claimed", (None, {}))
        rows.append(
            [
                f"{link.flops / 1e12:.4f}",
                None if last is None else f"x {link.flops / last:.4g}",
                link.mistake or "as claimed",
                link.what,
                None if tflops is None else f"{tflops:.1f}",
                *(f"{100 * shares[name]:.2f} %" for name in peaks if name in shares),
            ]
        )
        last = link.flops
    columns = ["TFLOP a sample", "ratio", "mistake mended", "what is so", "TFLOP/s"]
    columns += [f"MFU ({peak} {told.peaks[peak]:g})" for peak in peaks]
    table = tabulate(rows, columns, tablefmt="simple", disable_numparse=True, missingval="")
    return [f"  {line}" for line in table.splitlines()]


def _n(value: float | None) -> str:
    return "n/a" if value is None else f"{value:g}"
