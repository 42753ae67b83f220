"""Records of runs: read whole, or refused with the file and line at fault."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError
from pydantic_core import from_json

from xdimo.errors import UserError
from xdimo.files import read_bytes
from xdimo.outcome import ANSWERS
from xdimo.records.events import (
    EVENT,
    Calibration,
    Checkpoint,
    Ending,
    Event,
    Footer,
    Header,
    Ledger,
    Memory,
    Step,
    Telemetry,
    Window,
)
from xdimo.records.rules import Case, Finding, findings
from xdimo.records.writer import SCHEMA
from xdimo.spec import RunSpec, read_spec

READABLE = "every line is a known event"
READABLE_FILES = "spec.json and run.json can be read"

_COLUMNS = ("step", "phase", "step_s", "data_wait_s", "loss", "grad_norm", "lr", "epoch", "kind")


@dataclass(frozen=True)
class Log:
    """log.jsonl. What a run that died did not come to write is None or empty."""

    path: Path
    header: Header | None
    steps: pd.DataFrame  # a row a step, columns as Step
    window: Window | None  # the timed one
    memory: tuple[Memory, ...]
    footer: Footer | None
    checkpoints: tuple[Checkpoint, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    telemetry: tuple[Telemetry, ...] = ()
    ledger: Ledger | None = None
    schema: int = SCHEMA


@dataclass(frozen=True)
class Record:
    """One run: what was asked, how it ended, what it measured."""

    folder: Path
    spec: RunSpec
    run: Ending
    log: Log | None  # None: no line was written
    path: Path  # the run.json that counts
    instead: str | None = None  # why that is an attempt's, where the run's own cannot be read


@dataclass(frozen=True)
class Attempt:
    number: int
    folder: Path
    outcome: Ending | None  # None: begun, and no outcome yet


def attempts(folder: Path) -> list[Attempt]:
    """Every attempt of the run in ``folder``, in order. Raises UserError on a garbled run.json."""
    numbered = sorted(
        (int(path.name), path) for path in folder.glob("attempts/*") if path.name.isdigit()
    )
    return [
        Attempt(
            number, path, read_outcome(path / "run.json") if (path / "run.json").exists() else None
        )
        for number, path in numbered
    ]


def outcome_path(folder: Path, spec: str) -> Path | None:
    """The run.json that counts for ``spec``; None where nothing has ended yet.

    The run's own; where it is missing (a rerun removes it first) that of the newest attempt that
    is an answer, else of the newest that ended. Of a run whose own cannot be read, that of the
    newest attempt that is an answer: the same was written there before.
    """
    own = folder / "run.json"
    unreadable = _unreadable(own) if os.path.lexists(own) else None
    if os.path.lexists(own) and unreadable is None:
        return own
    ended = [a for a in attempts(folder) if a.outcome is not None and a.outcome.spec == spec]
    answers = [a for a in ended if a.outcome is not None and a.outcome.outcome in ANSWERS]
    if unreadable:
        return answers[-1].folder / "run.json" if answers else own
    newest = (answers or ended)[-1:]
    return newest[0].folder / "run.json" if newest else None


def read_outcome(path: Path) -> Ending:
    """Raises UserError that names the file and the wrong key."""
    raw = read_bytes(path)
    try:
        return Ending.model_validate_json(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def _unreadable(path: Path) -> str | None:
    """Why a run.json says nothing (cut off, a folder, a fault of the disk); None where it says
    something, right or wrong.
    """
    try:
        from_json(read_bytes(path))
    except UserError as error:
        return str(error)
    except ValueError as error:
        return f"{path}: not JSON ({error})"
    return None


def read_run(folder: Path) -> Record:
    """The record of the run in ``folder`` (which holds its spec.json).

    Raises UserError where nothing has ended yet, and with the first rule (xdimo.records.rules)
    that the record breaks.
    """
    case, torn = _case(folder)
    broken = next(iter([*torn, *findings(case)]), None)
    if broken:
        raise UserError(str(broken))
    log = _gather(case) if case.log_path else None
    own, instead = folder / "run.json", None
    if case.run_path != own and os.path.lexists(own):
        taken = case.run_path.relative_to(folder)
        instead = f"{_unreadable(own)}; taken from {taken}".replace(f"{folder}/", "")
    return Record(folder, case.spec, case.run, log, case.run_path, instead)


def check_run(folder: Path) -> list[Finding]:
    """Every rule that the run in ``folder`` breaks; none of one that has not ended."""
    own = folder / "run.json"
    found = []
    try:
        if outcome_path(folder, read_spec(folder / "spec.json").hash) is None:
            return []
        if os.path.lexists(own) and (why := _unreadable(own)):
            found.append(Finding(READABLE_FILES, own, None, why.removeprefix(f"{own}: ")))
        case, torn = _case(folder)
    except UserError as error:
        said = str(error).removeprefix(f"{folder}/")
        return found or [Finding(READABLE_FILES, folder, None, said)]
    return [*found, *torn, *findings(case)]


def _case(folder: Path) -> tuple[Case, list[Finding]]:
    """The record as it lies there, and the lines of its log that cannot be read.

    A run that died may have ended in the middle of a line: it is read up to there.
    """
    spec = read_spec(folder / "spec.json")
    path = outcome_path(folder, spec.hash)
    if path is None:
        raise UserError(f"{folder}: no attempt has ended yet")
    run = read_outcome(path)
    there = path.parent / run.log if run.log else folder / "attempts" / str(run.attempt) / "-"
    twin = there.parent / "run.json"
    own = read_outcome(twin) if path != twin and os.path.lexists(twin) else None
    log_path = path.parent / run.log if run.log else None
    if log_path is None or (run.outcome != "ok" and not os.path.lexists(log_path)):
        return Case(spec, run, path, attempt=own), []
    try:
        raw = log_path.read_bytes()
    except OSError as error:
        torn = [Finding(READABLE, log_path, None, f"{error.strerror}")]
        return Case(spec, run, path, attempt=own), torn
    lines: list[tuple[int, Event]] = []
    torn = list[Finding]()
    for number, event in _events(raw):
        if isinstance(event, str):
            if run.outcome != "ok":
                break
            torn.append(Finding(READABLE, log_path, number, event))
        else:
            lines.append((number, event))
    return Case(spec, run, path, log_path, raw, lines, own), torn


def _events(raw: bytes) -> Iterator[tuple[int, Event | str]]:
    """Number of each line, and its event or why it is none."""
    lines = raw.split(b"\n")
    rest = lines.pop()  # what follows the last newline: nothing, in a whole log
    for number, line in enumerate(lines, start=1):
        try:
            yield number, EVENT.validate_json(line)
        except ValidationError as error:
            yield number, _explain(error)
    if rest:
        yield len(lines) + 1, "cut off"


def _gather(case: Case) -> Log:
    assert case.log_path is not None
    steps = [step for _, step in case.of(Step)]
    table = pd.DataFrame({name: [getattr(step, name) for step in steps] for name in _COLUMNS})
    header = case.last(Header)
    return Log(
        path=case.log_path,
        header=header,
        steps=table,
        window=case.last(Window),
        memory=tuple(memory for _, memory in case.of(Memory)),
        footer=case.last(Footer),
        checkpoints=tuple(checkpoint for _, checkpoint in case.of(Checkpoint)),
        calibrations=tuple(calibration for _, calibration in case.of(Calibration)),
        telemetry=tuple(sample for _, sample in case.of(Telemetry)),
        ledger=case.last(Ledger),
        schema=header.schema_version if header else SCHEMA,
    )


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "cut off" if "EOF" in first["msg"] else f"not JSON ({first['msg']})"
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
