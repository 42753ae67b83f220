"""What a record must be to be believed: rules as data, each with the file and line it is broken in.

A run that died is held to the rules marked ``always``: what it wrote before must still be right.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from xdimo.model.flops import parameters
from xdimo.records.events import (
    Calibration,
    Checkpoint,
    Ending,
    Event,
    Footer,
    Header,
    Ledger,
    Memory,
    Seen,
    Step,
    Telemetry,
    Window,
)
from xdimo.spec import RunSpec

# Steps are timed on the device, the window on the host: two clocks.
CLOCKS_AGREE = 0.02
CLOCKS_APART_S = 1e-3
# A window of which more than half lies in none of its steps was not what they say.
LONGEST = 2


@dataclass(frozen=True)
class Finding:
    """One broken rule."""

    rule: str
    path: Path
    line: int | None
    detail: str

    def __str__(self) -> str:
        line = "" if self.line is None else f" line {self.line}"
        return f"{self.path}{line}: {self.detail}"


@dataclass(frozen=True)
class Case:
    """A record as it lies on disk; ``lines``: number and event of each line of its log."""

    spec: RunSpec
    run: Ending
    run_path: Path
    log_path: Path | None = None
    raw: bytes = b""
    lines: list[tuple[int, Event]] = field(default_factory=list)
    attempt: Ending | None = None  # what the attempt that run.json names says itself

    def of(self, *kinds: type[Any]) -> list[tuple[int, Any]]:
        return [(number, event) for number, event in self.lines if isinstance(event, kinds)]

    def last(self, kind: type[Any]) -> Any:
        found = self.of(kind)
        return found[-1][1] if found else None


# A rule yields line (None: the file as a whole) and what is wrong there.
Broken = Iterator[tuple[int | None, str]]


@dataclass(frozen=True)
class Rule:
    name: str
    check: Callable[[Case], Broken]
    always: bool = False  # also of a run that did not end ok
    file: str = "log.jsonl"


@dataclass(frozen=True)
class Count:
    """How often an event stands in the log of a run that ended ok, and where it must."""

    kind: type[Any]
    name: str
    fewest: int
    most: int | None
    place: str | None = None


COUNTS = (
    Count(Header, "header", 1, 1, "first"),
    Count(Window, "timed window", 1, 1),
    Count(Ledger, "ledger", 0, 1),
    Count(Seen, "effective settings", 0, 1),
    Count(Footer, "footer", 1, 1, "last"),
)

# Figures that only grow, in the order of the lines; of Telemetry and Memory for each card or rank.
MONOTONE: tuple[tuple[type[Any], str, str | None], ...] = (
    (Step, "step", None),
    (Checkpoint, "step", None),
    (Telemetry, "t_s", "gpu"),
    (Memory, "rank", None),
)

# Setting in the log -> what the spec says. A setting that the log leaves open (None) is not held.
DECLARED: dict[str, Callable[[RunSpec], Any]] = {
    "parameters": lambda spec: _parameters(spec).total,
    "trainable_parameters": lambda spec: _parameters(spec).trainable,
    "precision": lambda spec: spec.precision,
    "matmul_dtype": lambda spec: spec.precision,
    "experts": lambda spec: spec.model.experts,
    "top_k": lambda spec: spec.model.top_k,
    "world_size": lambda spec: spec.gpus,
    "clips_per_gpu": lambda spec: spec.clips_per_gpu,
    "data_mode": lambda spec: spec.data.mode,
    "dataset": lambda spec: spec.data.dataset,
    "implementation": lambda spec: spec.implementation,
    "vae": lambda spec: spec.vae.id,
    "deterministic": lambda spec: spec.deterministic,
    "compiled": lambda spec: spec.captured,
    "captured": lambda spec: spec.captured,
    "checkpointing": lambda spec: False,
}


def _parameters(spec: RunSpec) -> Any:
    return parameters(
        spec.model,
        frames=spec.data.frames,
        latent_size=spec.latent_size,
        latent_channels=spec.vae.latent_channels,
    )


def _of_this_spec(case: Case) -> Broken:
    if case.run.spec != case.spec.hash:
        yield (
            None,
            f"of another spec ({case.run.spec[:15]}; spec.json is {case.spec.hash[:15]})",
        )
    if case.run.run != case.spec.run:
        yield None, f"of run {case.run.run}; spec.json is of {case.spec.run}"


def _ended_after_it_started(case: Case) -> Broken:
    if case.run.ended < case.run.started:  # ISO 8601 in UTC sorts as text
        yield None, f"ended {case.run.ended}, before it started {case.run.started}"


def _says_what_its_attempt_says(case: Case) -> Broken:
    if case.attempt is None:
        return
    for name in Ending.model_fields:
        said, there = getattr(case.run, name), getattr(case.attempt, name)
        left_open = name == "log_sha256" and said is None
        if name != "log" and said != there and not left_open:
            yield None, f"{name}: {said!r}; its attempt's run.json says {there!r}"


def _has_a_log(case: Case) -> Broken:
    if case.run.log is None:
        yield None, "log: null, but the outcome is ok"


def _log_is_what_it_was(case: Case) -> Broken:
    if case.log_path and case.run.log_sha256 not in (
        None,
        "sha256:" + sha256(case.raw).hexdigest(),
    ):
        yield None, "changed since the run ended (run.json: log_sha256)"


def _log_is_of_this_run(case: Case) -> Broken:
    for number, header in case.of(Header):
        if header.spec != case.run.spec:
            yield number, f"of another spec ({header.spec[:15]})"
        elif header.run != case.run.run:
            yield number, f"of run {header.run}; run.json is of {case.run.run}"


def _header_first(case: Case) -> Broken:
    if case.lines and not isinstance(case.lines[0][1], Header):
        yield 1, "expected the header"


def _grows(case: Case) -> Broken:
    for kind, name, apart in MONOTONE:
        last: dict[Any, Any] = {}
        for number, event in case.of(kind):
            key = getattr(event, apart) if apart else None
            value = getattr(event, name)
            if key in last and value <= last[key]:
                yield number, f"{event.event}.{name}: {value} after {last[key]}"
            last[key] = value


def _counts(case: Case) -> Broken:
    for count in COUNTS:
        lines = [number for number, _ in case.of(count.kind)]
        if len(lines) < count.fewest:
            yield None, f"no {count.name}, but the outcome is ok"
        elif count.most is not None and len(lines) > count.most:
            yield lines[count.most], f"{len(lines)} of {count.name}; expected {count.most}"
        elif lines and count.place == "last" and lines[0] != case.lines[-1][0]:
            yield lines[0], f"{count.name} is not the last line"


def _window_holds_its_steps(case: Case) -> Broken:
    window = case.last(Window)
    if window is None:
        return
    timed = [step.step for _, step in case.of(Step) if step.phase == "timed"]
    if timed != list(range(window.first_step, window.last_step + 1)):
        yield (
            None,
            f"{len(timed)} timed steps; the window is {window.first_step} to {window.last_step}",
        )


def _steps_have_no_gap(case: Case) -> Broken:
    steps = case.of(Step)
    for (_, before), (number, step) in pairwise(steps):
        if step.step > before.step + 1:
            yield number, f"step {step.step} after step {before.step}"


def _steps_fit_into_the_window(case: Case) -> Broken:
    for number, window in case.of(Window):
        total = sum(step.step_s for _, step in case.of(Step) if step.phase == window.phase)
        if total > (1 + CLOCKS_AGREE) * window.wall_s:
            yield number, f"window.wall_s: {window.wall_s:g}; its steps take {total:g}"
        elif window.wall_s > LONGEST * (total + _checkpoints_s(case)) + 1:
            yield number, f"window.wall_s: {window.wall_s:g}; its steps take {total:g} alone"


def _checkpoints_s(case: Case) -> float:
    """One after the last step lies in the window and in no step."""
    return float(sum(checkpoint.seconds for _, checkpoint in case.of(Checkpoint)))


def _memory_fits(case: Case) -> Broken:
    for number, memory in case.of(Memory):
        sizes = [
            ("peak_allocated_gib", memory.peak_allocated_gib),
            ("peak_reserved_gib", memory.peak_reserved_gib),
            ("device_gib", memory.device_gib),
        ]
        known = [(name, size) for name, size in sizes if size is not None]
        if known and case.spec.device == "cpu":
            yield number, f"{known[0][0]}: {known[0][1]:g} of a run on the CPU"
        for (name, size), (above, most) in pairwise(known):
            if size > most:
                yield number, f"{name}: {size:g}, more than {above} {most:g}"


def _footer_sums_up(case: Case) -> Broken:
    steps, windows = len(case.of(Step)), case.of(Window)
    for number, footer in case.of(Footer):
        if footer.steps != steps:
            yield number, f"footer.steps: {footer.steps}; the log has {steps}"
        if windows and footer.wall_s < windows[-1][1].wall_s:
            yield (
                number,
                f"footer.wall_s: {footer.wall_s:g}; the window alone took "
                f"{windows[-1][1].wall_s:g}",
            )


def _ledger_sums_to_the_step(case: Case) -> Broken:
    for number, ledger in case.of(Ledger):
        total = sum(ledger.shares.values())
        if abs(total - 1) > 1e-3 or min(ledger.shares.values(), default=0) < 0:
            yield number, f"ledger.shares: sum to {total:g}; expected 1, none below 0"


def _times_are_times(case: Case) -> Broken:
    for number, step in case.of(Step):
        if not (step.step_s > 0 and step.data_wait_s >= 0):
            yield number, f"step_s {step.step_s:g}, data_wait_s {step.data_wait_s:g}"


def _waits_lie_in_their_steps(case: Case) -> Broken:
    """From where host and device began together: no step ends before its data is there. A single
    wait may be longer than its step, which the device begins later than the host.
    """
    header = case.last(Header)
    if header is None or header.schema_version < 2:  # its device may still be at earlier steps
        return
    waited = taken = 0.0
    for number, step in case.of(Step):
        if step.step >= case.spec.steps.warmup:
            waited, taken = waited + step.data_wait_s, taken + step.step_s
            if waited > (1 + CLOCKS_AGREE) * taken + CLOCKS_APART_S:
                yield number, f"data_wait_s: {waited:g} in all so far; the steps took {taken:g}"
                return


def _losses_are_finite(case: Case) -> Broken:
    for number, step in case.of(Step):
        if step.loss is None or step.grad_norm is None:
            yield number, f"step {step.step}: loss or gradient norm is not finite, and outcome ok"


def _are_all(ranks: list[int], gpus: int) -> bool:
    return len(ranks) == gpus and ranks == list(range(gpus))


def _every_rank_spoke(case: Case) -> Broken:
    gpus = case.spec.gpus
    ranks = sorted({memory.rank for _, memory in case.of(Memory)})
    if not _are_all(ranks, gpus):
        yield None, f"memory of ranks {ranks}; expected all {gpus}"
    for when in ("before", "after"):
        found = sorted(c.rank for _, c in case.of(Calibration) if c.when == when)
        if found and not _are_all(found, gpus):
            yield None, f"calibration {when} of ranks {found}; expected all {gpus}"
    cards = sorted({sample.gpu for _, sample in case.of(Telemetry)})
    if cards and not _are_all(cards, gpus):
        yield None, f"telemetry of cards {cards}; expected all {gpus}"
    for number, header in case.of(Header):
        if len(header.devices) != gpus:
            yield number, f"devices: {len(header.devices)}; the spec says {gpus}"


def _did_what_it_was_asked(case: Case) -> Broken:
    settings = [(number, header.effective) for number, header in case.of(Header)]
    for number, seen in [*settings, *case.of(Seen)]:
        for key, of in DECLARED.items():
            did, asked = getattr(seen, key, None), of(case.spec)
            if did is not None and did != asked:
                yield number, f"effective.{key}: {did!r}; the spec says {asked!r}"
    for number, header in case.of(Header):
        if header.seed != case.spec.seed:
            yield number, f"seed: {header.seed}; the spec says {case.spec.seed}"
    rate = case.spec.optimizer.learning_rate
    for number, step in case.of(Step):
        if step.lr != rate:
            yield number, f"step {step.step}: lr {step.lr:g}; the spec says {rate:g}"
            break


DECLARED_IS_EFFECTIVE = "declared is effective"

RULES = (
    Rule("run.json is of this spec and run", _of_this_spec, always=True, file="run.json"),
    Rule("a run ends after it starts", _ended_after_it_started, always=True, file="run.json"),
    Rule("a run that ended ok has a log", _has_a_log, file="run.json"),
    Rule("the log is what it was when the run ended", _log_is_what_it_was, always=True),
    Rule("the log is of this spec and run", _log_is_of_this_run, always=True),
    Rule("the header comes first", _header_first, always=True),
    Rule("steps, samples and ranks come in order", _grows, always=True),
    Rule("one header, one timed window, one footer, which is last", _counts),
    Rule("the window holds exactly its steps", _window_holds_its_steps),
    Rule("no step is missing", _steps_have_no_gap),
    Rule("the window is as long as its steps", _steps_fit_into_the_window),
    Rule("the footer sums up", _footer_sums_up),
    Rule("memory fits into its card", _memory_fits),
    Rule("the ledger sums to the step", _ledger_sums_to_the_step),
    Rule("times are positive", _times_are_times),
    Rule("no step ends before its data is there", _waits_lie_in_their_steps),
    Rule("losses are finite", _losses_are_finite),
    Rule("every rank is there", _every_rank_spoke),
    Rule(DECLARED_IS_EFFECTIVE, _did_what_it_was_asked),
    Rule("run.json is its attempt's", _says_what_its_attempt_says, always=True, file="run.json"),
)


def findings(case: Case, rules: Iterable[Rule] = RULES) -> Iterator[Finding]:
    """Every rule that ``case`` breaks, in the order of the rules."""
    whole = case.run.outcome == "ok"
    for rule in rules:
        if whole or rule.always:
            path = case.run_path if rule.file == "run.json" else case.log_path
            for line, detail in rule.check(case):
                yield Finding(rule.name, path or case.run_path, line, detail)
