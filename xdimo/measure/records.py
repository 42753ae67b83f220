"""Records of runs: read whole, or refused with the file and line at fault."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from pydantic import ValidationError

from xdimo.errors import UserError
from xdimo.measure.events import (
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
from xdimo.measure.rules import Case, Finding, findings
from xdimo.measure.steady import NEWEST
from xdimo.outcome import ANSWERS
from xdimo.spec import RunSpec, read_spec

READABLE = "every line is a known event"

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
    schema: int = NEWEST


@dataclass(frozen=True)
class Record:
    """One run: what was asked, how it ended, what it measured."""

    folder: Path
    spec: RunSpec
    run: Ending
    log: Log | None  # None: no line was written
    path: Path  # the run.json that counts


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
    is an answer, else of the newest that ended.
    """
    if (folder / "run.json").exists():
        return folder / "run.json"
    ended = [a for a in attempts(folder) if a.outcome is not None and a.outcome.spec == spec]
    answers = [a for a in ended if a.outcome is not None and a.outcome.outcome in ANSWERS]
    newest = (answers or ended)[-1:]
    return newest[0].folder / "run.json" if newest else None


def read_outcome(path: Path) -> Ending:
    """Raises UserError that names the file and the wrong key."""
    try:
        return Ending.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValidationError as error:
        raise UserError(f"{path}: {_explain(error)}") from None


def read_run(folder: Path) -> Record:
    """The record of the run in ``folder`` (which holds its spec.json).

    Raises UserError where nothing has ended yet, and with the first rule (xdimo.measure.rules)
    that the record breaks.
    """
    case, torn = _case(folder)
    broken = next(iter([*torn, *findings(case)]), None)
    if broken:
        raise UserError(str(broken))
    log = _gather(case) if case.log_path else None
    return Record(folder, case.spec, case.run, log, case.run_path)


def check_run(folder: Path) -> list[Finding]:
    """Every rule that the run in ``folder`` breaks; none of one that has not ended.

    Raises UserError where spec.json or run.json cannot be read at all.
    """
    if outcome_path(folder, read_spec(folder / "spec.json").hash) is None:
        return []
    case, torn = _case(folder)
    return [*torn, *findings(case)]


def _case(folder: Path) -> tuple[Case, list[Finding]]:
    """The record as it lies there, and the lines of its log that cannot be read.

    A run that died may have ended in the middle of a line: it is read up to there.
    """
    spec = read_spec(folder / "spec.json")
    path = outcome_path(folder, spec.hash)
    if path is None:
        raise UserError(f"{folder}: no attempt has ended yet")
    run = read_outcome(path)
    log_path = path.parent / run.log if run.log else None
    if log_path is None or (run.outcome != "ok" and not log_path.exists()):
        return Case(spec, run, path), []
    try:
        raw = log_path.read_bytes()
    except OSError as error:
        return Case(spec, run, path), [Finding(READABLE, log_path, None, f"{error.strerror}")]
    lines: list[tuple[int, Event]] = []
    torn: list[Finding] = []
    for number, event in _events(raw):
        if isinstance(event, str):
            if run.outcome != "ok":
                break
            torn.append(Finding(READABLE, log_path, number, event))
        else:
            lines.append((number, event))
    return Case(spec, run, path, log_path, raw, lines), torn


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
        schema=header.schema_version if header else NEWEST,
    )


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "cut off" if "EOF" in first["msg"] else f"not JSON ({first['msg']})"
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
