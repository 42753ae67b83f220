"""Why a figure may be believed: steady state, ceilings, the cards under load, parts of the step."""

from typing import Any

from xdimo.analysis.step_classes import CLASSES
from xdimo.report import number_format
from xdimo.report.campaign_state import CellState, Survey
from xdimo.report.tables import Table, cell_link, run_link
from xdimo.report.words import Words
from xdimo.spec import RunSpec


def measured(view: Survey) -> list[tuple[CellState, dict[str, Any]]]:
    """Cells with figures, twins too, and those of their median run."""
    return [(cell, cell.metrics) for cell in view.cells.values() if cell.metrics]


def classes_table(view: Survey, words: Words) -> Table:
    """Where steps became steady, and what each class of step took."""
    apart = [name for name in CLASSES if name != "regular"]
    table = Table(["cell", "steady_from", "tau", "class_regular", *(f"class_{n}" for n in apart)])
    for cell, metrics in measured(view):
        tau, start = metrics["autocorrelation_steps"], metrics["steady_from_step"]
        told = metrics["step_classes"]
        table.rows.append(
            [
                cell_link(view, cell),
                words("unknown") if start is None else f"{start}",
                words("unknown") if tau is None else f"{tau:.1f}",
                *(_class(told.get(name), words) for name in ("regular", *apart)),
            ]
        )
    return table


def _class(told: dict[str, Any] | None, words: Words) -> str:
    if told is None:
        return ""
    return f"{told['steps']} × {number_format.number(1000 * told['median_s'], words)} ms"


def ceilings_table(view: Survey, words: Words) -> Table:
    """MFU against the three peaks, and what plain work reached on the same cards."""
    columns = ["cell", "mfu_declared", "mfu_tensor", "mfu_measured", "gemm", "gemm_change"]
    table = Table([*columns, "copy", "all_reduce"])
    for cell, metrics in measured(view):
        if metrics["gemm_tflops"] is None:
            continue
        table.rows.append(
            [
                cell_link(view, cell),
                _against(metrics, "declared", words),
                _against(metrics, "tensor", words),
                number_format.percent(metrics["mfu_measured"], words),
                number_format.number(metrics["gemm_tflops"], words),
                number_format.change(metrics["gemm_change"], words),
                number_format.number(metrics["copy_gb_s"], words),
                number_format.number(metrics["all_reduce_gb_s"], words),
            ]
        )
    return table


def _against(metrics: dict[str, Any], peak: str, words: Words) -> str:
    share, tflops = metrics[f"mfu_{peak}"], metrics[f"peak_{peak}_tflops"]
    if share is None:
        return words("unknown")
    return f"{number_format.percent(share, words)} ({number_format.plain(tflops)})"


def cards_table(view: Survey, words: Words) -> Table:
    """What the cards said of themselves over the timed window."""
    columns = ["cell", "sm_mhz", "memory_mhz", "power", "energy", "throttle"]
    table = Table([*columns, "others", "host_load", "links"])
    for cell, metrics in measured(view):
        if not metrics["telemetry_samples"]:
            continue
        held = (f"{name} {100 * share:.0f} %" for name, share in metrics["throttled"].items())
        others = (metrics["other_processes"], metrics["host_gpus_busy"])
        links = (metrics["pcie_gen"], metrics["pcie_width"], metrics["nvlink_active"])
        table.rows.append(
            [
                cell_link(view, cell),
                _clock(metrics, words),
                _whole(metrics["memory_mhz_median"], words),
                _whole(metrics["power_w"], words),
                number_format.number(metrics["joules_per_sample"], words, digits=3),
                ", ".join(held) or words("no"),
                " / ".join(_whole(value, words) for value in others),
                number_format.number(metrics["host_load"], words, digits=2),
                " / ".join(_whole(value, words) for value in links),
            ]
        )
    return table


def _clock(metrics: dict[str, Any], words: Words) -> str:
    """Median (lowest)."""
    if metrics["sm_mhz_median"] is None:
        return words("unknown")
    return f"{metrics['sm_mhz_median']:,.0f} ({metrics['sm_mhz_min']:,.0f})"


def drift_table(view: Survey, words: Words) -> Table:
    """From the first tenth of the window to its last, of each cell's median run; where a cell has
    none because its steps never settled, of the first such run.
    """
    table = Table(["run", "window", "step_ends", "step_change", "temperature", "sm_mhz_ends"])
    for cell in view.cells.values():
        unsteady = (run for run in cell.runs if run.state == "unsteady")
        run = cell.median or next(unsteady, None)
        if run is None or run.metrics is None or run.metrics["step_s_start"] is None:
            continue
        metrics = run.metrics
        start, end = metrics["step_s_start"], metrics["step_s_end"]
        table.rows.append(
            [
                run_link(view, run),
                number_format.number(metrics["window_s"], words, digits=3),
                " → ".join(number_format.number(1000 * value, words) for value in (start, end)),
                number_format.change(end / start - 1, words),
                _start_to_end(metrics, "temperature_c", words),
                _start_to_end(metrics, "sm_mhz", words),
            ]
        )
    return table


def _start_to_end(metrics: dict[str, Any], name: str, words: Words) -> str:
    if metrics[f"{name}_start"] is None:
        return words("unknown")
    return " → ".join(_whole(metrics[f"{name}_{end}"], words) for end in ("start", "end"))


def _whole(value: float | None, words: Words) -> str:
    return words("unknown") if value is None else f"{value:,.0f}"


PARTS = (
    "data",
    "host_to_device",
    "vae",
    "forward",
    "backward",
    "all_reduce",
    "optimizer",
    "other",
)


def shares_table(view: Survey, words: Words) -> Table:
    """Parts of the profiled step; they sum to it."""
    columns = ["cell", "profiled_ms", "profiled_change"]
    table = Table([*columns, *(f"part_{name}" for name in PARTS)])
    for cell, metrics in measured(view):
        if metrics["ledger"] is None:
            continue
        shares = metrics["ledger"]
        table.rows.append(
            [
                cell_link(view, cell),
                number_format.number(1000 * metrics["ledger_step_s"], words),
                number_format.change(
                    metrics["ledger_step_s"] / metrics["median_step_s"] - 1, words
                ),
                *(number_format.percent(shares.get(name, 0.0), words) for name in PARTS),
            ]
        )
    return table


def comparison_table(view: Survey, words: Words) -> Table:
    """What stands beside each speedup: implementation, precision, data mode and clocks."""
    columns = ["cell", "implementation", "precision", "mode", "sm_mhz", "speedup", "speedup_ci95"]
    table = Table([*columns, "speedup_reference"])
    for cell, metrics in measured(view):
        if cell.cell.name not in view.bench.cells or cell.median is None:
            continue
        record, base = cell.median.record, view.bench.baseline
        assert record is not None
        ratio, interval = (
            view.speedup(cell.cell.name, base),
            view.speedup_ci95(cell.cell.name, base),
        )
        table.rows.append(
            [
                cell_link(view, cell),
                metrics["implementation"],
                precision(record.spec, words),
                record.spec.data.mode,
                _clock(metrics, words),
                words("unknown") if ratio is None else number_format.times(ratio),
                number_format.ratios(interval, words),
                _reference(view, cell.cell.name, words),
            ]
        )
    return table


def precision(spec: RunSpec, words: Words) -> str:
    """The run's, and its VAE's where that is another."""
    if (spec.vae_precision == "bf16") == (spec.precision == "bf16"):
        return spec.precision
    return words("vae_differs", precision=spec.precision, vae=spec.vae_precision)


def _in_reference(view: Survey, name: str) -> str:
    """The cell itself where it ran so, else its twin."""
    metrics = view.cells[name].metrics
    ran = metrics["implementation"] if metrics else None
    return name if ran == "reference" else view.bench.reference_twin(name)


def _reference(view: Survey, name: str, words: Words) -> str:
    """Both cells in the reference implementation: tuned kernels favour one card."""
    ratio = view.speedup(_in_reference(view, name), _in_reference(view, view.bench.baseline))
    return words("pending") if ratio is None else number_format.times(ratio)
