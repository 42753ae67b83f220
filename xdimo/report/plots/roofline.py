"""Roofline: what plain work reaches on each target's card, and where the training step stands."""

from math import prod
from typing import TYPE_CHECKING, Any

from xdimo.report import number_format
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

BYTES = {"bf16": 2, "tf32": 4, "fp32": 4}
SPAN = (1.0, 1e4)  # FLOPs a byte


def roofline(view: Survey, words: Words) -> "Figure":
    """A panel a target. The step's own bytes are not known, so it is a line across."""
    targets = list(view.bench.targets)
    figure = canvas(1.3 + 2.6 * len(targets))
    panels = figure.subplots(len(targets), 1, sharex=True, squeeze=False)[:, 0]
    for target, axes in zip(targets, panels, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylabel(words("axis_tflops"))
        cells = [cell for cell in view.drawn(target) if _calibrated(cell)]
        # Its products of most rows; in older records a host launched smaller ones too slowly.
        roof = max(cells, key=lambda cell: cell.cell.clips_per_gpu, default=None)
        title = words("roofs_of", target=target, cell=roof.cell.name) if roof else target
        axes.set_title(title, loc="left", fontsize=10)
        if roof is None:
            base = view.cells[view.bench.baseline_cell(target).name]
            text = words("not_calibrated") if base.metrics else absent(base, words)
            in_place_of_a_plot(axes, text)
            axes.tick_params(axis="y", which="both", left=False, labelleft=False)
            continue
        _roofs(axes, view, roof, words)
        for cell in cells:
            _step(axes, view, cell, words)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * 1.6)  # room for the roofs' labels
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    panels[-1].set_xlim(*SPAN)
    panels[-1].set_xlabel(f"{words('axis_intensity')}\n{words('products')}", fontsize=9)
    headline(figure, view, words("title_roofline"))
    return figure


def _calibrated(cell: CellState) -> bool:
    return cell.metrics is not None and cell.metrics["gemm_tflops"] is not None


def _roofs(axes: "Axes", view: Survey, cell: CellState, words: Words) -> None:
    """Peaks that are stated as lines, what was measured as points; of a card whose peak nobody
    states the measured product is the roof.
    """
    assert cell.median is not None and cell.median.record is not None
    metrics, record = cell.median.metrics, cell.median.record
    assert metrics is not None
    size = BYTES[record.spec.precision]
    card = view.hardware.card_of(metrics["device"])
    stated = card.bandwidth_gb_s if card else None
    for name, rate, style in (("stated", stated, "-"), ("measured", metrics["copy_gb_s"], ":")):
        if rate is not None:
            label = f"{number_format.plain(round(rate))} GB/s ({words(name)})"
            ends = [flops * rate / 1e3 for flops in SPAN]
            top = metrics["peak_tensor_tflops"] or metrics["gemm_tflops"]
            stop = min(SPAN[1], 1e3 * top / rate)
            axes.plot(
                [SPAN[0], stop], [ends[0], min(ends[1], top)], style, color="black", label=label
            )
    tensor, declared = metrics["peak_tensor_tflops"], metrics["peak_declared_tflops"]
    if tensor is not None:
        _roof(axes, tensor, f"{words('tensor')} {number_format.plain(tensor)}", "-")
    if declared is not None and declared != tensor:
        _roof(axes, declared, f"{words('declared')} {number_format.plain(declared)}", "--")
    if tensor is None and declared is None:
        product = metrics["gemm_tflops"]
        reached = number_format.number(product, words, digits=3)
        _roof(axes, product, words("measured_product", tflops=reached), ":")
    shapes = {"x".join(map(str, metrics["gemm_shape"])): metrics["gemm_tflops"]}
    for number, (shape, rate) in enumerate({**shapes, **metrics["model_gemm_tflops"]}.items()):
        axes.plot(
            intensity(shape, size),
            rate,
            MARKERS[number % len(MARKERS)],
            color="white",
            markeredgecolor="black",
            markersize=8,
            linestyle="none",
            label=f"{shape.replace('x', ' × ')}: {_tflops(rate, words)}",
        )


def _roof(axes: "Axes", tflops: float, text: str, style: str) -> None:
    axes.axhline(tflops, color="black", linestyle=style, linewidth=1)
    axes.annotate(
        text,
        (1, tflops),
        (-2, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        fontsize=8,
    )


def _tflops(rate: float, words: Words) -> str:
    return f"{number_format.number(rate, words, digits=3)} TFLOP/s"


def intensity(shape: str, size: int) -> float:
    """FLOPs a byte of a product ``rows x inner x outer`` that touches each operand once."""
    rows, inner, outer = map(int, shape.split("x"))
    touched = rows * inner + inner * outer + rows * outer
    return 2 * prod((rows, inner, outer)) / (size * touched)


def _step(axes: "Axes", view: Survey, cell: CellState, words: Words) -> None:
    """Model FLOP/s of the training step, a card."""
    metrics: dict[str, Any] | None = cell.metrics
    assert metrics is not None
    colour, variant = look(view, cell)
    rate = metrics["model_tflops_per_s"] / metrics["devices"]
    axes.axhline(
        rate,
        color=colour,
        linestyle=DASHES[variant % len(DASHES)],
        linewidth=1.6,
        label=f"{words('step_of', cell=cell.cell.name)}: {_tflops(rate, words)}",
    )
