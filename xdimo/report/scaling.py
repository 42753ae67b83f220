"""One card, several, at the same clips a GPU: what each further one brings."""

from xdimo.report import number_format
from xdimo.report.campaign_state import CellState, Survey
from xdimo.report.tables import Table, cell_link
from xdimo.report.words import Words


def scaling_table(view: Survey, words: Words) -> Table:
    """Efficiency: samples/s over those of the fewest GPUs of that card, over the ratio of GPUs.

    A row a measured cell whose card was measured with another number of GPUs at its batch.
    """
    table = Table(["cell", "gpus", "samples_per_s", "speedup", "efficiency"])
    for cells in _groups(view):
        base = cells[0]
        fewest = view.bench.targets[base.cell.target].gpus
        for cell in cells:
            gpus = view.bench.targets[cell.cell.target].gpus
            ratio = view.speedup(cell.cell.name, base.cell.name)
            if cell.metrics is None or ratio is None:
                continue
            table.rows.append(
                [
                    cell_link(view, cell),
                    f"{gpus}",
                    number_format.number(cell.metrics["samples_per_s"], words),
                    number_format.times(ratio),
                    f"{100 * ratio * fewest / gpus:.1f} %",
                ]
            )
    return table


def _groups(view: Survey) -> list[list[CellState]]:
    """Measured cells of one card and batch and several numbers of GPUs, the fewest first."""
    targets = view.bench.targets
    found: dict[tuple[str, int], dict[int, CellState]] = {}
    for name in view.bench.cells:
        cell = view.cells[name]
        target = targets[cell.cell.target]
        if cell.metrics is not None:
            group = found.setdefault((target.card, cell.cell.clips_per_gpu), {})
            group.setdefault(target.gpus, cell)
    return [[group[gpus] for gpus in sorted(group)] for group in found.values() if len(group) > 1]
