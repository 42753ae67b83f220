"""Records of runs: read whole, or refused with the file and line at fault."""

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from xdimo.config import Mode, Precision
from xdimo.errors import UserError
from xdimo.model.flops import parameters
from xdimo.outcome import ANSWERS, Outcome
from xdimo.spec import RunSpec, read_spec


class Fact(BaseModel):
    """Frozen and typed; a key that a later writer adds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Code(Fact):
    commit: str | None  # None: not under git
    dirty: bool | None
    package: str  # sha256 over the package's files


class Ending(Fact):
    """run.json."""

    schema_version: Literal[1] = Field(alias="schema")
    run: str
    spec: str
    outcome: Outcome
    reason: str | None
    attempt: int
    job: str | None
    host: str | None  # None: never began
    started: str
    ended: str
    log: str | None  # relative to the folder of this file; None: died before the first line
    log_sha256: str | None
    code: Code
    cause: list[str]


class Effective(Fact):
    """What the run found itself doing, to be held against its spec."""

    parameters: int
    trainable_parameters: int
    precision: Precision
    experts: int
    top_k: int
    world_size: int
    clips_per_gpu: int
    data_mode: Mode
    dataset: str
    implementation: str
    vae: str


class Header(Fact):
    event: Literal["header"]
    schema_version: Literal[1] = Field(alias="schema")
    spec: str
    run: str
    attempt: int | None  # None: a folder whose name is no number
    started: str
    host: str
    code: Code
    versions: dict[str, str | None]
    devices: list[str]  # one a rank, as the driver reports it
    declared: dict[str, Any]
    effective: Effective
    seed: int


class Step(Fact):
    event: Literal["step"]
    step: int
    phase: Literal["warmup", "timed"]
    step_s: float
    data_wait_s: float
    loss: float | None
    grad_norm: float | None
    lr: float
    epoch: int


class Window(Fact):
    event: Literal["window"]
    phase: Literal["warmup", "timed"]
    first_step: int
    last_step: int
    wall_s: float = Field(gt=0)

    @property
    def steps(self) -> int:
        return self.last_step - self.first_step + 1


class Memory(Fact):
    """GiB of one rank; device figures are None on a CPU."""

    event: Literal["memory"]
    rank: int
    allocated_gib: float | None
    reserved_gib: float | None
    peak_allocated_gib: float | None
    peak_reserved_gib: float | None
    device_gib: float | None
    host_peak_gib: float | None


class Checkpoint(Fact):
    event: Literal["checkpoint"]
    step: int
    seconds: float


class Footer(Fact):
    event: Literal["footer"]
    steps: int
    wall_s: float


Event = Header | Step | Window | Memory | Checkpoint | Footer
_EVENT: TypeAdapter[Event] = TypeAdapter(Annotated[Event, Field(discriminator="event")])
_COLUMNS = ("step", "phase", "step_s", "data_wait_s", "loss", "grad_norm", "lr", "epoch")


@dataclass(frozen=True)
class Log:
    """log.jsonl. What a run that died did not come to write is None or empty."""

    path: Path
    header: Header | None
    steps: pd.DataFrame  # a row a step, columns as Step
    window: Window | None  # the timed one
    memory: tuple[Memory, ...]
    footer: Footer | None


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

    Raises UserError where nothing has ended yet; where run.json or the log belongs to another
    spec; where the log is cut off, garbled or changed since; where a run that ended ``ok`` lacks
    part of its record, or did something else than its spec says.
    """
    spec = read_spec(folder / "spec.json")
    path = outcome_path(folder, spec.hash)
    if path is None:
        raise UserError(f"{folder}: no attempt has ended yet")
    run = read_outcome(path)
    if run.spec != spec.hash:
        raise UserError(f"{path}: of another spec ({run.spec[:15]}; spec.json is {spec.hash[:15]})")
    if run.run != spec.run:
        raise UserError(f"{path}: of run {run.run}; spec.json is of {spec.run}")
    log_path = path.parent / run.log if run.log else None
    if run.outcome != "ok":
        exists = log_path is not None and log_path.exists()
        log = read_log(log_path, run, whole=False) if log_path and exists else None
        return Record(folder, spec, run, log, path)
    if log_path is None:
        raise UserError(f"{path}: log: null, but the outcome is ok")
    log = read_log(log_path, run, whole=True)
    _check_complete(log, spec)
    return Record(folder, spec, run, log, path)


def read_log(path: Path, run: Ending, *, whole: bool) -> Log:
    """The log of ``run``. A run that died may end mid-line, so ``whole=False`` stops there."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = raw.split(b"\n")
    cut_off = lines.pop()  # what follows the last newline: nothing, in a whole log
    events: list[Event] = []
    for number, line in enumerate(lines, start=1):
        try:
            events.append(_EVENT.validate_json(line))
        except ValidationError as error:
            if not whole:
                break
            raise UserError(f"{path} line {number}: {_explain(error)}") from None
    if cut_off and whole:
        raise UserError(f"{path} line {len(lines) + 1}: cut off")
    if run.log_sha256 not in (None, "sha256:" + sha256(raw).hexdigest()):
        raise UserError(f"{path}: changed since the run ended (run.json: log_sha256)")
    header = events[0] if events and isinstance(events[0], Header) else None
    if header is not None and header.spec != run.spec:
        raise UserError(f"{path} line 1: of another spec ({header.spec[:15]})")
    return _gather(path, header, events)


def _gather(path: Path, header: Header | None, events: Iterable[Event]) -> Log:
    steps: list[Step] = []
    windows: list[Window] = []
    memory: list[Memory] = []
    footer = None
    for event in events:
        if isinstance(event, Step):
            steps.append(event)
        elif isinstance(event, Window) and event.phase == "timed":
            windows.append(event)
        elif isinstance(event, Memory):
            memory.append(event)
        elif isinstance(event, Footer):
            footer = event
    if len(windows) > 1:
        raise UserError(f"{path}: {len(windows)} timed windows; expected one")
    table = pd.DataFrame({name: [getattr(step, name) for step in steps] for name in _COLUMNS})
    return Log(path, header, table, windows[0] if windows else None, tuple(memory), footer)


def _check_complete(log: Log, spec: RunSpec) -> None:
    """Everything a figure is made from is there, and the run did what its spec says."""
    if log.header is None:
        raise UserError(f"{log.path} line 1: expected the header")
    if log.window is None:
        raise UserError(f"{log.path}: no timed window, but the outcome is ok")
    if log.footer is None:
        raise UserError(f"{log.path}: no footer, but the outcome is ok")
    timed = log.steps[log.steps["phase"] == "timed"]["step"].tolist()
    if timed != list(range(log.window.first_step, log.window.last_step + 1)):
        raise UserError(
            f"{log.path}: {len(timed)} timed steps; the window is "
            f"{log.window.first_step} to {log.window.last_step}"
        )
    ranks = sorted({memory.rank for memory in log.memory})
    if ranks != list(range(spec.gpus)):
        raise UserError(f"{log.path}: memory of ranks {ranks}; expected all {spec.gpus}")
    if len(log.header.devices) != spec.gpus:
        raise UserError(
            f"{log.path} line 1: devices: {len(log.header.devices)}; the spec says {spec.gpus}"
        )
    effective = log.header.effective
    declared = {
        "parameters": parameters(
            spec.model,
            frames=spec.data.frames,
            latent_size=spec.latent_size,
            latent_channels=spec.vae.latent_channels,
        ).total,
        "precision": spec.precision,
        "experts": spec.model.experts,
        "top_k": spec.model.top_k,
        "world_size": spec.gpus,
        "clips_per_gpu": spec.clips_per_gpu,
        "data_mode": spec.data.mode,
        "dataset": spec.data.dataset,
        "implementation": spec.implementation,
        "vae": spec.vae.id,
    }
    for key, asked in declared.items():
        did = getattr(effective, key)
        if did != asked:
            raise UserError(f"{log.path} line 1: effective.{key}: {did!r}; the spec says {asked!r}")


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return "cut off" if "EOF" in first["msg"] else f"not JSON ({first['msg']})"
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"]
