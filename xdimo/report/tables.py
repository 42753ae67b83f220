"""The tables: each a list of column keys and rows of text. xdimo.report.summary lays them out."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tabulate import tabulate

from xdimo.config.schema import Bench
from xdimo.model.flops import parameters
from xdimo.records.reader import Attempt
from xdimo.report import number_format
from xdimo.report.campaign_state import CellState, Run, Survey
from xdimo.report.markdown import code, escaped, inline, link
from xdimo.report.words import Words
from xdimo.spec import ModelSpec, model_spec

COLUMNS = ["hardware", "parameters", "memory", "peak", "throughput", "mfu", "speedup"]
# States whose own words hold the reason.
NOTED = ("started", "changed", "refused", "unsteady", "disabled")
RUNS_COLUMNS = [
    "run",
    "state",
    "implementation",
    "attempt",
    "host",
    "samples_per_s",
    "ci95_run",
    "step_ms",
    "memory",
    "data_wait",
    "loss",
    "record",
]


@dataclass
class Table:
    columns: list[str]  # keys of xdimo.report.words
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self, words: Words) -> str:
        if not self.rows:
            return words("none")
        return tabulate(
            [[escaped(text) for text in row] for row in self.rows],
            headers=[words(column) for column in self.columns],
            tablefmt="pipe",
            disable_numparse=True,
        )


def state_text(state: str, note: str | None, words: Words) -> str:
    """``OOM``, or with its reason where there is one."""
    text = words(state, note=note)
    if note is None or note in text:
        return text
    return words("with_reason", word=text, note=note)


def command(bench: Bench, cell: str, config_path: str) -> str:
    """What a person types to have this cell measured."""
    target = (bench.cells.get(cell) or bench.twins[cell]).target
    profile = " --profile profiles/lsf" if bench.targets[target].queue else ""
    # "--" ends --configfile, which takes several values.
    config = "" if config_path == "config/config.yaml" else f" --configfile {config_path} --"
    return f"snakemake{profile}{config} {cell}"


def model_of(bench: Bench) -> tuple[ModelSpec, dict[str, int]]:
    """The config's model, and the shape of its samples as xdimo.model.flops takes it."""
    shape = {
        "frames": bench.clips.frames,
        "latent_size": bench.clips.size // bench.vae.factor,
        "latent_channels": bench.vae.latent_channels,
    }
    return model_spec(bench.model), shape


def main_table(survey: Survey, words: Words) -> Table:
    """One row a target at its baseline variant; exactly the seven columns."""
    cells = [survey.cells[survey.bench.baseline_cell(name).name] for name in survey.bench.targets]
    return Table(COLUMNS, [_row(survey, cell, words) for cell in cells])


def best_table(survey: Survey, words: Words) -> Table:
    """The fastest variant of each target, and its speedup like for like beside."""
    table = Table([*COLUMNS, "same_batch"])
    for target in survey.bench.targets:
        cell = best_or_baseline(survey, target)
        row = _row(survey, cell, words)
        variants = survey.variants(target)
        done = sum(variant.state == "ok" for variant in variants)
        if 0 < done < len(variants):
            row[0] += f" ({words('some_variants', done=done, all=len(variants))})"
        table.rows.append([*row, _same_batch(survey, cell, words)])
    return table


def behind_best(survey: Survey) -> list[CellState]:
    """Every cell that a figure of the second table is made from."""
    best = [best_or_baseline(survey, target) for target in survey.bench.targets]
    pairs = [survey.same_batch(cell.cell.name) for cell in best if cell.metrics]
    names = [cell.cell.name for cell in best] + [survey.bench.baseline]
    names += [name for pair in pairs if pair for name in pair]
    return [survey.cells[name] for name in dict.fromkeys(names)]


def best_or_baseline(survey: Survey, target: str) -> CellState:
    return survey.best(target) or survey.cells[survey.bench.baseline_cell(target).name]


def _row(survey: Survey, cell: CellState, words: Words) -> list[str]:
    target = survey.bench.targets[cell.cell.target]
    card, metrics = survey.hardware.cards[target.card], cell.metrics
    label = (metrics and metrics["card"]) or card.label
    hardware = f"{target.gpus} × {label}, `{cell.cell.name}`{_mark(cell)}"
    if metrics is None:
        model, shape = model_of(survey.bench)
        count = number_format.parameters(parameters(model, **shape).total)
        state, word = _once(cell, words)
        return [hardware, count, state, number_format.card_peak(card, words), word, word, word]
    return [
        hardware,
        number_format.parameters(metrics["parameters"]),
        number_format.memory(metrics, words),
        number_format.measured_peak(metrics, words),
        number_format.throughput(metrics, words),
        number_format.mfu(metrics, words),
        _speedup(survey, cell.cell.name, survey.bench.baseline, words),
    ]


def _once(cell: CellState, words: Words) -> tuple[str, str]:
    """Why a row has no figures, for its first such column; and the bare word for the others."""
    full = state_text(cell.state, cell.note, words)
    return full, words(f"{cell.state}_word") if cell.state in NOTED else words(cell.state)


def _speedup(survey: Survey, name: str, over: str, words: Words) -> str:
    ratio = survey.speedup(name, over)
    if axes := survey.differing(name, over):
        return words("not_comparable", axes=", ".join(words(axis) for axis in axes))
    if ratio is None:
        return _waits(survey, name if survey.cells[name].metrics is None else over, words)
    suffix = f" ({words('baseline')})" if name == survey.bench.baseline else ""
    return number_format.times(ratio) + suffix


def _waits(survey: Survey, name: str, words: Words) -> str:
    cell = survey.cells[name]
    if cell.state == "pending":
        return words("waits", cell=name)
    return words("waits_state", cell=name, state=state_text(cell.state, cell.note, words))


def _same_batch(survey: Survey, cell: CellState, words: Words) -> str:
    if cell.metrics is None:
        return _once(cell, words)[1]
    pair = survey.same_batch(cell.cell.name)
    if pair is None:
        return words("no_same_batch")
    text = _speedup(survey, *pair, words)
    batch = survey.bench.cells[pair[0]].clips_per_gpu
    return text if batch == cell.cell.clips_per_gpu else words("at", value=text, batch=batch)


def run_link(survey: Survey, run: Run) -> str:
    """The run's name, leading to its log."""
    log = run.record.log if run.record else None
    return link(f"`{run.name}`", log.path, survey.folder) if log else f"`{run.name}`"


def cell_link(survey: Survey, cell: CellState) -> str:
    """The cell's name, leading to the record of its median run; marked where a note is of it."""
    name = f"`{cell.cell.name}`"
    log = cell.median.record.log if cell.median and cell.median.record else None
    return (link(name, log.path, survey.folder) if log else name) + _mark(cell)


def _mark(cell: CellState) -> str:
    """A dagger where a note is of the cell or one of its runs."""
    return " †" if any(_notes(cell)) else ""


def modes_table(survey: Survey, config_path: str, words: Words) -> Table:
    """Each target's baseline in both data modes, what is not measured with its command; and other
    cells that were measured in both.
    """
    table = Table(["cell", "mode", "samples_per_s", "step_ms", "data_wait", "mfu", "command"])
    bench = survey.bench
    baselines = {bench.baseline_cell(target).name for target in bench.targets}
    for cell in bench.cells:
        twin = bench.mode_twin(cell)
        if cell not in baselines and survey.cells[twin].metrics is None:
            continue
        for name in (cell, twin):
            state = survey.cells[name]
            table.rows.append(
                [
                    cell_link(survey, state),
                    state.cell.mode,
                    *_pace(state, words),
                    code(command(survey.bench, name, config_path)),
                ]
            )
    return table


def _pace(cell: CellState, words: Words) -> list[str]:
    metrics = cell.metrics
    if metrics is None:
        state, word = _once(cell, words)
        return [state, word, word, word]
    return [
        number_format.number(metrics["samples_per_s"], words),
        number_format.number(1000 * metrics["median_step_s"], words),
        number_format.percent(metrics["data_wait_share"], words),
        number_format.mfu(metrics, words),
    ]


def hours_table(survey: Survey, words: Words) -> Table:
    """How long 10 thousand and a million steps take at the measured pace."""
    table = Table(["cell", "steps_per_s", "hours_10k", "hours_1m"])
    for name in survey.bench.cells:
        metrics = survey.cells[name].metrics
        if metrics is not None:
            pace = metrics["steps_per_s"]
            hours = [steps / pace / 3600 for steps in (1e4, 1e6)]
            shown = [number_format.number(value, words) for value in (pace, *hours)]
            table.rows.append([cell_link(survey, survey.cells[name]), *shown])
    return table


def cells_table(survey: Survey, config_path: str, words: Words) -> Table:
    """Every cell of the matrix: state, repeats, their spread, speedup and command."""
    table = Table(
        [
            "cell",
            "state",
            "repeats",
            "samples_per_s",
            "range",
            "ci95",
            "cv",
            "speedup",
            "speedup_ci95",
            "command",
        ]
    )
    for name in survey.bench.cells:
        cell = survey.cells[name]
        spread = cell.samples_per_s
        values = [words("unknown")] * 6
        if spread is not None:
            interval = spread.mean_ci95
            values = [
                number_format.number(spread.median, words),
                number_format.interval(spread.low, spread.high, words),
                number_format.interval(*interval, words) if interval else words("unknown"),
                number_format.percent(spread.cv, words),
                _speedup(survey, name, survey.bench.baseline, words),
                number_format.ratios(survey.speedup_ci95(name, survey.bench.baseline), words),
            ]
        state = state_text(cell.state, cell.note, words)
        repeats = f"{len(cell.measured)} / {len(cell.runs)}"
        run = code(command(survey.bench, name, config_path))
        table.rows.append([cell_link(survey, cell), state, repeats, *values, run])
    return table


def runs_table(survey: Survey, words: Words) -> Table:
    """Each repeat with its record. Twins only where something was run."""
    table = Table(RUNS_COLUMNS)
    twins = {run.name for name in survey.bench.twins for run in survey.cells[name].runs}
    for run in survey.runs:
        if not (run.name in twins and run.state == "pending"):
            table.rows.append(_run_row(survey, run, words))
    return table


def _run_row(survey: Survey, run: Run, words: Words) -> list[str]:
    flags = [_flag_text(flag, words) for flag in (run.metrics or {}).get("flags", [])]
    state = "; ".join([state_text(run.state, run.note, words), *flags, *_earlier(run, words)])
    outcome = run.record.run if run.record else None
    who = [str(outcome.attempt), outcome.host or ""] if outcome else ["", ""]
    ran = run.record.spec.implementation if run.record else ""
    values = [""] * 6
    if run.state == "ok" and run.metrics:
        metrics = run.metrics
        loss = [number_format.number(metrics[key], words) for key in ("loss_start", "loss_end")]
        values = [
            number_format.number(metrics["samples_per_s"], words),
            _interval(metrics, words),
            number_format.number(1000 * metrics["median_step_s"], words),
            number_format.memory(metrics, words),
            number_format.percent(metrics["data_wait_share"], words),
            " → ".join(loss),
        ]
    return [f"`{run.name}`", state, ran, *who, *values, _link(survey.folder, run)]


def _interval(metrics: dict[str, Any], words: Words) -> str:
    """Of one run's samples/s, or why it has none."""
    interval, short = metrics["samples_per_s_ci95"], metrics["window_too_short"]
    if interval:
        return number_format.interval(interval[0], interval[1], words)
    if count := short.get("long_steps"):
        share = number_format.percent(short["long_share"], words)
        return words("long_steps", count=count, n=short["n"], share=share)
    return words("too_short", n=short["n"], tau=f"{short['tau']:.1f}")


def _earlier(run: Run, words: Words) -> Iterable[str]:
    """Attempts beside the one that counts, by how they ended."""
    counts = run.record.run.attempt if run.record else None
    for attempt in run.attempts:
        if attempt.number != counts and attempt.outcome is not None:
            yield words("earlier_attempt", number=attempt.number, state=_ended(attempt, words))
        elif counts is not None and attempt.number < counts:
            yield words("earlier_attempt", number=attempt.number, state=words("cut_off"))


def _ended(attempt: Attempt, words: Words) -> str:
    assert attempt.outcome is not None
    return state_text(attempt.outcome.outcome, attempt.outcome.reason, words)


def _link(folder: Path, run: Run) -> str:
    """To the record; where it cannot be read or is of no use here, to all there is of the run."""
    if run.record is None:
        there = run.folder.exists()
        return link(f"{run.folder.name}/", run.folder, folder) if there else ""
    path = run.record.log.path if run.record.log else run.record.path
    return link(path.name, path, folder)


def note_lines(survey: Survey, words: Words) -> list[str]:
    """What a reader must know of runs and cells, a line each; those of one text together."""
    names: dict[str, list[str]] = {}
    for cell in survey.cells.values():
        for name, text in _notes(cell):
            names.setdefault(text(words), []).append(f"`{name}`")
    return [f"{', '.join(of)}: {inline(text)}" for text, of in names.items()]


def _notes(cell: CellState) -> Iterator[tuple[str, Callable[[Words], str]]]:
    """Name of a run, or of the cell where its repeats differ, and what a reader must know of it.

    A run without an interval is noted where the cell's figures are its; one that was refused or
    never became steady where other runs gave the cell figures.
    """
    for run in cell.runs:
        for flag in (run.metrics or {}).get("flags", []):
            yield run.name, partial(_flag_text, flag)
    if cell.samples_per_s and cell.samples_per_s.scattered:
        yield cell.cell.name, partial(_scattered_text, cell.samples_per_s.cv)
    if cell.median and cell.metrics and cell.metrics["window_too_short"]:
        yield cell.median.name, partial(_interval, cell.metrics)
    for run in cell.runs:
        if cell.metrics and run.state in ("refused", "unsteady"):
            yield run.name, partial(state_text, run.state, run.note)


def _scattered_text(cv: float | None, words: Words) -> str:
    return words("scattered", cv=number_format.percent(cv, words))


def _flag_text(flag: str, words: Words) -> str:
    what, _, detail = flag.partition(": ")
    return words("with_reason", word=words(what), note=detail) if detail else words(what)
