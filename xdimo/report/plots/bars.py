"""Plots of one figure a cell: speedup, throughput, MFU, memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xdimo.report import number_format
from xdimo.report.campaign_state import CellState, Survey
from xdimo.report.plots.style import GREY, HATCHES, absent, canvas, headline, look
from xdimo.report.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEIGHT = 0.72  # of a bar; bars are 1 apart


@dataclass(frozen=True)
class Bar:
    value: float
    low: float  # of the repeats
    high: float
    label: str
    mark: float | None = None  # the same against another peak
    frame: float | None = None  # what the card has

    @property
    def end(self) -> float:
        return max(self.high, self.mark or 0.0, self.frame or 0.0)


def speedup(view: Survey, cell: CellState, words: Words) -> Bar | None:
    base = view.cells[view.bench.baseline].samples_per_s
    ratio = view.speedup(cell.cell.name, view.bench.baseline)
    if cell.samples_per_s is None or base is None or ratio is None:
        return None
    label = number_format.times(ratio)
    if cell.cell.name == view.bench.baseline:
        label += f" ({words('baseline')})"
    return _scaled(cell, 1 / base.median, label)


def throughput(view: Survey, cell: CellState, words: Words) -> Bar | None:
    if cell.samples_per_s is None:
        return None
    return _scaled(cell, 1.0, number_format.number(cell.samples_per_s.median, words))


def mfu(view: Survey, cell: CellState, words: Words) -> Bar | None:
    metrics, spread = cell.metrics, cell.samples_per_s
    if metrics is None or spread is None or metrics["mfu_tensor"] is None:
        return None
    declared, tensor = metrics["mfu_declared"], metrics["mfu_tensor"]
    mark = None if declared is None or declared == tensor else 100 * declared
    label = number_format.mfu(metrics, words)
    return _scaled(cell, 100 * tensor / spread.median, label, mark)


def memory(view: Survey, cell: CellState, words: Words) -> Bar | None:
    """Reserved on the card; of a run without one, the host's."""
    metrics = cell.metrics
    if metrics is None:
        return None
    used, card = metrics["memory_reserved_gib"], metrics["memory_device_gib"]
    if used is None:
        used, card = metrics["host_peak_gib"], None
    if used is None:
        return None
    label = number_format.gib(used)
    if card is not None:
        label += f" / {number_format.gib(card)} ({words('card')})"
    return Bar(used, used, used, label, frame=card)


def _scaled(cell: CellState, scale: float, label: str, mark: float | None = None) -> Bar:
    """The cell's samples/s times ``scale``, with the range of its repeats."""
    spread = cell.samples_per_s
    assert spread is not None
    return Bar(scale * spread.median, scale * spread.low, scale * spread.high, label, mark)


def bars(view: Survey, name: str, words: Words) -> "Figure":
    """A horizontal bar a cell, grouped by target; a cell without a figure is a labelled gap."""
    of = {"speedup": speedup, "throughput": throughput, "mfu": mfu, "memory": memory}[name]
    cells = [cell for target in view.bench.targets for cell in view.drawn(target)]
    places = _places(cells)
    shown = [of(view, cell, words) for cell in cells]
    widest = max((bar.end for bar in shown if bar), default=1.0)
    figure = canvas(1.7 + 0.38 * (places[-1] + 1))
    axes = figure.subplots()
    for cell, place, bar in zip(cells, places, shown, strict=True):
        if bar is not None:
            colour, variant = look(view, cell)
            _draw(axes, place, bar, colour, HATCHES[variant % len(HATCHES)])
        else:
            _gap(axes, place, _why_not(view, cell, name, words))
    axes.set_yticks(places, [cell.cell.name for cell in cells])
    axes.set_ylim(places[-1] + 0.7, -0.7)
    # Room right of the longest bar for its label.
    axes.set_xlim(0, widest * {"mfu": 2.0, "memory": 1.35}.get(name, 1.25))
    axes.tick_params(axis="y", length=0)
    measured = any(cell.metrics for cell in cells)
    note = _legend(name, shown, words) if measured else words("no_data")
    axes.set_xlabel(f"{_axis(view, name, words)}\n{note}", fontsize=9)
    headline(figure, view, words(f"title_{name}"))
    if name == "speedup" and any(shown):
        axes.axvline(1.0, color=GREY, linewidth=0.9, linestyle="--", zorder=0)
    if not any(shown):
        axes.set_xticks([])
    return figure


def _places(cells: Sequence[CellState]) -> list[float]:
    """Heights of the bars: 1 apart, and half as much again before the next target."""
    places, place = [], 0.0
    for index, cell in enumerate(cells):
        if index:
            place += 1.0 if cell.cell.target == cells[index - 1].cell.target else 1.5
        places.append(place)
    return places


def _draw(axes: "Axes", place: float, bar: Bar, colour: str, hatch: str) -> None:
    if bar.frame is not None:
        axes.barh(place, bar.frame, HEIGHT, facecolor="none", edgecolor=GREY, linewidth=1.0)
    axes.barh(
        place, bar.value, HEIGHT, facecolor=colour, edgecolor="black", linewidth=0.8, hatch=hatch
    )
    if bar.high > bar.low:
        ends = [[bar.value - bar.low], [bar.high - bar.value]]
        axes.errorbar(bar.value, place, xerr=ends, color="black", capsize=4, linewidth=1.4)
    if bar.mark is not None:
        axes.plot(bar.mark, place, "D", markersize=7, color="white", markeredgecolor="black")
    axes.annotate(bar.label, (bar.end, place), (7, 0), textcoords="offset points", va="center")


def _why_not(view: Survey, cell: CellState, name: str, words: Words) -> str:
    """Why a cell has no bar here: it is not measured, or what the figure needs is not."""
    if cell.metrics is None:
        return absent(cell, words)
    if name == "speedup" and (axes := view.differing(cell.cell.name, view.bench.baseline)):
        return words("not_comparable", axes=", ".join(words(axis) for axis in axes))
    if name == "speedup":
        return words("waits", cell=view.bench.baseline)
    if name != "mfu":
        return words("unknown")
    reached = cell.metrics["mfu_measured"]
    if reached is None:
        return words("no_peak")
    return words("no_peak_measured", share=number_format.percent(reached, words))


def _gap(axes: "Axes", place: float, text: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(
        text,
        (0, place),
        (6, 0),
        textcoords="offset points",
        va="center",
        color=GREY,
        style="italic",
        bbox=box,
        parse_math=False,
    )


def _axis(view: Survey, name: str, words: Words) -> str:
    return words(f"axis_{name}", baseline=view.bench.baseline)


def _legend(name: str, shown: Sequence[Bar | None], words: Words) -> str:
    """What bar, whisker, frame and diamond are, where the plot has them."""
    drawn = [bar for bar in shown if bar]
    notes = []
    if any(bar.high > bar.low for bar in drawn):
        notes.append(words("whiskers"))
    if any(bar.mark is not None for bar in drawn):
        notes.append(f"◇ {words('against_declared')}")
    if any(bar.frame is not None for bar in drawn):
        notes.append(words("card_frame"))
    if name == "memory" and any(bar.frame is None for bar in drawn):
        notes.append(words("host_process"))
    return "; ".join(notes)
