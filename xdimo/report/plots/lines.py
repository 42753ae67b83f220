"""Step time over steps: a panel a target, a line a variant."""

from typing import TYPE_CHECKING

from xdimo.report.campaign_state import CellState, Survey
from xdimo.report.plots.style import (
    DASHES,
    MARKERS,
    absent,
    canvas,
    headline,
    in_place_of_a_plot,
    look,
)
from xdimo.report.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def step_times(view: Survey, words: Words) -> "Figure":
    """Of each cell's median run, warm-up shaded."""
    from matplotlib.ticker import LogFormatter

    targets = list(view.bench.targets)
    figure = canvas(1.2 + 1.9 * len(targets))
    panels = figure.subplots(len(targets), 1, sharex=True, squeeze=False)[:, 0]
    for target, axes in zip(targets, panels, strict=True):
        drawn = [_line(view, axes, cell) for cell in view.drawn(target)]
        axes.set_title(target, loc="left", fontsize=10)
        axes.set_ylabel(words("axis_step_ms"))
        if any(drawn):
            axes.set_yscale("log")  # the first step compiles and takes seconds
            axes.yaxis.set_major_formatter(LogFormatter())
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))
            axes.axvspan(0, view.bench.train.warmup_steps + 0.5, color="#DDDDDD", zorder=0)
            axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, reverse=True)
        else:
            text = absent(view.cells[view.bench.baseline_cell(target).name], words)
            in_place_of_a_plot(axes, text)
            axes.set_yticks([])
    last = view.bench.train.warmup_steps + view.bench.train.timed_steps
    panels[-1].set_xlim(0, last + 1)
    panels[-1].set_xlabel(words("axis_steps"))
    headline(figure, view, words("title_steps"))
    return figure


def _line(view: Survey, axes: "Axes", cell: CellState) -> bool:
    if cell.median is None or cell.median.record is None or cell.median.record.log is None:
        return False
    colour, variant = look(view, cell)
    steps = cell.median.record.log.steps
    milliseconds = 1000 * steps["step_s"]
    axes.plot(
        steps["step"],
        milliseconds,
        color=colour,
        linestyle=DASHES[variant % len(DASHES)],
        linewidth=1.2,
        marker=MARKERS[variant % len(MARKERS)],
        markersize=5,
        markeredgecolor="black",
        markevery=(variant * len(steps) // 24, max(1, len(steps) // 12)),
        label=cell.cell.name.removeprefix(f"{cell.cell.target}-"),
    )
    return True
