"""The state of every run and cell of a campaign, from the files alone."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from xdimo.analysis.comparability import differing
from xdimo.analysis.metrics import OTHER_CARD, derive, other_card
from xdimo.analysis.repeats import Spread, ratio_ci95, spread
from xdimo.analysis.throughput import unsteady_text
from xdimo.config.load import naming, parse
from xdimo.config.schema import Bench, Cell, Hardware, dimensions
from xdimo.errors import UserError
from xdimo.files import read_json
from xdimo.records.reader import Attempt, Record, attempts, outcome_path, read_run
from xdimo.spec import as_planned, implementation_of, plan, read_spec


class Part(BaseModel):
    """Of a file with more keys than tables show; summary.json has them."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)


class Video(Part):
    path: str
    status: Literal["usable", "short", "duplicate", "unreadable"]
    reason: str | None = None


class Counts(Part):
    files: int
    readable: int
    usable: int
    short: int
    duplicate: int
    unreadable: int


class Manifest(Part):
    """What the tables say of manifest.json."""

    dataset: str
    window: int
    counts: Counts
    videos: list[Video]


@dataclass(frozen=True)
class Run:
    """``state``: an outcome of run.json, or pending, started, changed (the config is another
    since), unplanned (the config has no such run), refused (its record cannot be trusted) or
    unsteady (its steps never settled, so it has no throughput).

    Only a run in state ``ok`` has figures that tables use.
    """

    name: str
    folder: Path
    state: str
    note: str | None = None
    record: Record | None = None
    metrics: dict[str, Any] | None = None
    attempts: tuple[Attempt, ...] = ()


@dataclass(frozen=True)
class CellState:
    """``state``: ``ok`` where at least one repeat is, else what stands in the figures' place."""

    cell: Cell
    state: str
    note: str | None
    runs: tuple[Run, ...]

    @cached_property
    def measured(self) -> list[Run]:
        return [run for run in self.runs if run.state == "ok"]

    @property
    def rates(self) -> list[float]:
        """Samples/s of each measured repeat."""
        return [run.metrics["samples_per_s"] for run in self.measured if run.metrics]

    @cached_property
    def samples_per_s(self) -> Spread | None:
        return spread(self.rates) if self.state == "ok" else None

    @cached_property
    def median(self) -> Run | None:
        """The run whose figures stand for the cell: the median one by samples/s."""
        if self.samples_per_s is None:
            return None
        middle = self.samples_per_s.median
        return next(r for r in self.measured if r.metrics and r.metrics["samples_per_s"] == middle)

    @property
    def metrics(self) -> dict[str, Any] | None:
        return self.median.metrics if self.median else None


@dataclass(frozen=True)
class Survey:
    """A campaign as its files stand now."""

    bench: Bench
    hardware: Hardware
    folder: Path  # where its summary lies
    runs_folder: Path
    manifest: Manifest | None
    cells: dict[str, CellState]  # the matrix, then the baselines in the other data mode
    unplanned: tuple[Run, ...]
    bad_manifest: str | None = None  # why it cannot be read

    @property
    def runs(self) -> list[Run]:
        return [run for cell in self.cells.values() for run in cell.runs] + list(self.unplanned)

    @property
    def heading(self) -> str:
        """The config's title, or what model and dataset are."""
        bench, model = self.bench, self.bench.model
        depth, width, _ = dimensions(model)
        name = f"Latte-{model.size}" if model.size else f"Latte of {depth} blocks, width {width},"
        experts = (
            f"{model.experts} experts (top-{model.top_k})" if model.experts > 1 else "no experts"
        )
        return bench.title or f"XDiMo: {name} with {experts} on {bench.dataset.name}"

    def variants(self, target: str) -> list[CellState]:
        """The target's cells in the matrix, twins apart."""
        return [self.cells[c.name] for c in self.bench.cells.values() if c.target == target]

    def drawn(self, target: str) -> list[CellState]:
        """The target's cells in the matrix, then its measured twins: what a plot has."""
        twins = [self.cells[c.name] for c in self.bench.twins.values() if c.target == target]
        return self.variants(target) + [cell for cell in twins if cell.metrics]

    def best(self, target: str) -> CellState | None:
        """The variant with the most samples/s among those measured."""
        measured = [cell for cell in self.variants(target) if cell.metrics]
        return max(measured, key=lambda cell: _rate(cell) or 0.0, default=None)

    def differing(self, name: str, over: str) -> list[str]:
        """Axes in which two measured cells differ so that no speedup may be said."""
        mine, base = self.cells[name].median, self.cells[over].median
        if mine is None or base is None or mine.record is None or base.record is None:
            return []
        return differing(mine.record, base.record)

    def speedup(self, name: str, over: str) -> float | None:
        """Ratio of samples/s; None where either cell has none, or they cannot be compared."""
        mine, base = _rate(self.cells[name]), _rate(self.cells[over])
        if mine is None or base is None or self.differing(name, over):
            return None
        return mine / base

    def speedup_ci95(self, name: str, over: str) -> tuple[float, float] | None:
        """From the runs of both cells."""
        if name == over or self.speedup(name, over) is None:
            return None
        return ratio_ci95(self.cells[name].rates, self.cells[over].rates)

    def same_batch(self, name: str) -> tuple[str, str] | None:
        """Like for like: this target's cell and the baseline target's, at one batch a device.

        The batch is the named cell's own, or else the largest that both targets have.
        """
        cell, base = self.bench.cells[name], self.bench.cells[self.bench.baseline]
        mine = {c.cell.clips_per_gpu: c.cell.name for c in self.variants(cell.target)}
        theirs = {c.cell.clips_per_gpu: c.cell.name for c in self.variants(base.target)}
        both = mine.keys() & theirs.keys()
        if not both:
            return None
        batch = cell.clips_per_gpu if cell.clips_per_gpu in both else max(both)
        return mine[batch], theirs[batch]


def _rate(cell: CellState) -> float | None:
    return cell.samples_per_s.median if cell.samples_per_s else None


def survey(bench: Bench, hardware: Hardware, records: Path | None = None) -> Survey:
    """``records``: a folder that ``xdimo keep`` wrote, read instead of the config's own runs."""
    folder = records or Path(bench.results)
    runs = records or Path(bench.runs_folder)
    manifest, bad_manifest = None, None
    try:
        manifest = _manifest((records or folder / "data") / "manifest.json")
    except UserError as error:
        bad_manifest = str(error)
    dataset = manifest.dataset if manifest else None
    cells = {
        cell.name: _cell(bench, hardware, runs, cell, dataset)
        for cell in [*bench.cells.values(), *bench.twins.values()]
    }
    planned = {run.name for cell in cells.values() for run in cell.runs}
    found = sorted(path.parent for path in runs.glob("*/spec.json"))
    unplanned = tuple(
        Run(path.name, path, "unplanned") for path in found if path.name not in planned
    )
    return Survey(bench, hardware, folder, runs, manifest, cells, unplanned, bad_manifest)


def _manifest(path: Path) -> Manifest | None:
    if not os.path.lexists(path):
        return None
    with naming(path):
        return parse(Manifest, read_json(path))


def _cell(
    bench: Bench, hardware: Hardware, folder: Path, cell: Cell, dataset: str | None
) -> CellState:
    runs = tuple(
        _run(bench, hardware, folder / name, name, dataset) for name in bench.runs([cell.name])
    )
    target = bench.targets[cell.target]
    if not target.enabled:
        return CellState(cell, "disabled", target.reason, runs)
    ranked = sorted(runs, key=lambda run: _RANK.get(run.state, _ENDED))  # stable: first repeat wins
    return CellState(cell, ranked[0].state, ranked[0].note, runs)


# Which run speaks for a cell: a measured one, else how one ended, else what keeps it from that.
_ENDED = 1
_RANK = {"ok": 0, "refused": 2, "started": 3, "changed": 4, "pending": 5}


def _run(bench: Bench, hardware: Hardware, folder: Path, name: str, dataset: str | None) -> Run:
    """Its row says why where a file of it cannot be read: the other rows stand."""
    if not os.path.lexists(folder / "spec.json"):
        return Run(name, folder, "pending")
    try:
        return _read(bench, hardware, folder, name, dataset)
    except UserError as error:
        return Run(name, folder, "refused", _shorter(str(error), folder))
    except OSError as error:
        return Run(name, folder, "refused", _shorter(f"{error.filename}: {error.strerror}", folder))


def _read(bench: Bench, hardware: Hardware, folder: Path, name: str, dataset: str | None) -> Run:
    spec = read_spec(folder / "spec.json")
    tried = tuple(attempts(folder))
    if outcome_path(folder, spec.hash) is None:
        begun = [a for a in tried if a.outcome is None]
        state = "started" if begun else "pending"
        note = f"attempts/{begun[-1].number}" if begun else None
        return Run(name, folder, state, note, attempts=tried)
    record = read_run(folder)
    planned = plan(bench, name)
    implementation = implementation_of(planned, folder.parent)
    changed = _changes(planned, record, dataset, implementation)
    if changed:
        return Run(name, folder, "changed", changed, record, attempts=tried)
    if other := other_card(record, hardware):
        note = f"{OTHER_CARD}: {other}; the spec says {record.spec.card}"
        return Run(name, folder, "refused", note, record)
    metrics = derive(record, hardware)
    if metrics.get("unsteady"):
        note = unsteady_text(metrics)
        return Run(name, folder, "unsteady", note, record, metrics, tried)
    said = [text for text in (record.run.reason, record.instead) if text]
    # Where there are figures, their flags say the second.
    note = record.run.reason if record.run.outcome == "ok" else "; ".join(said) or None
    return Run(name, folder, record.run.outcome, note, record, metrics, tried)


def _shorter(message: str, folder: Path) -> str:
    """Paths inside the run's folder as a reader of its row sees them."""
    return message.replace(f"{folder}/", "")


def _changes(
    planned: dict[str, Any], record: Record, dataset: str | None, implementation: str | None
) -> str | None:
    """Dotted keys in which the config or the videos differ from what ran; None where none does."""
    ran = record.spec
    known = dataset or ran.data.dataset, implementation or ran.implementation
    expected = as_planned(planned, ran, *known)
    differing = list(_differing(expected, ran.to_json()))
    # The name of the latents follows from the others.
    return (
        ", ".join(key for key in differing if key != "data.latents" or differing == [key]) or None
    )


def _differing(one: dict[str, Any], other: dict[str, Any], path: str = "") -> Iterable[str]:
    for key in sorted(one.keys() | other.keys()):
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, dict) and isinstance(theirs, dict):
            yield from _differing(mine, theirs, f"{path}{key}.")
        elif mine != theirs:
            yield path + key
