"""How the plots look: canvas, colours, hatches, dashes; what stands for a missing figure."""

from typing import TYPE_CHECKING, Any

from xdimo.report.campaign_state import CellState, Survey
from xdimo.report.tables import state_text
from xdimo.report.words import Words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart by colour-blind readers. A target has a colour, a batch a hatch or a dash; a
# twin is grey, darker in the reference implementation.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (1, 4)))
MARKERS = ("o", "s", "^", "D", "v", "P")
GREY, LIGHT_GREY = "#5A5A5A", "#BBBBBB"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "xdimo",
}
WIDTH_INCHES = 8.0
TALLEST_INCHES = 60.0


def canvas(height: float) -> "Figure":
    """A figure that no window or global state knows; ``height`` in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_INCHES, min(height, TALLEST_INCHES)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def headline(figure: "Figure", view: Survey, text: str) -> None:
    """The campaign's title, as it is written, and what the plot shows."""
    title = f"{view.heading}\n{text}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, parse_math=False)


def in_place_of_a_plot(axes: "Axes", text: str) -> None:
    axes.annotate(
        text,
        (0.5, 0.5),
        xycoords="axes fraction",
        ha="center",
        color=GREY,
        style="italic",
        parse_math=False,
    )


def look(view: Survey, cell: CellState) -> tuple[str, int]:
    """Colour of the cell's target or twin, index of its variant among those of all targets."""
    target, name = cell.cell.target, cell.cell.name
    colour = COLOURS[list(view.bench.targets).index(target) % len(COLOURS)]
    if name in view.bench.twins:
        colour = LIGHT_GREY if cell.cell.mode != view.bench.latents.mode else GREY
    batches = {each for target in view.bench.targets.values() for each in target.variants}
    return colour, sorted(batches).index(cell.cell.clips_per_gpu)


def absent(cell: CellState, words: Words) -> str:
    """What stands where a cell has no figure: its state, and why, in one short line."""
    text = state_text(cell.state, cell.note, words)
    return text if len(text) <= 70 else text[:69] + "…"
