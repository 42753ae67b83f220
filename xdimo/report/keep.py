"""`xdimo keep`: a campaign's records and summary copied to where git keeps them."""

import shutil
from contextlib import suppress
from pathlib import Path

from xdimo.analysis.metrics import write as write_metrics
from xdimo.config.load import read_yaml
from xdimo.config.schema import Bench, Hardware
from xdimo.errors import UserError
from xdimo.files import whole, write_json
from xdimo.report.plots.draw import draw
from xdimo.report.sources import RECORD
from xdimo.report.summary import render, write


def keep(bench: Bench, hardware: Hardware, folder: Path) -> list[Path]:
    """Copy the campaign to ``folder`` (results/records/<campaign>) and render it from there.

    Their metrics.json are derived anew, as the summary's figures are, for every record that can be
    read. Beside the runs lie config.json (the whole config as it is now; the summary's commands
    name it, so that they run what was run), manifest.json, what was chosen between implementations,
    the summary and its plots. Returns the copied runs. Raises UserError where the campaign has
    none, or the folder keeps those of other results.
    """
    source, kept = Path(bench.runs_folder), folder / "config.json"
    if kept.exists() and (results := read_yaml(kept).get("results")) != bench.results:
        raise UserError(
            f"{kept}: keeps campaign {bench.campaign!r} of results {results!r}, and this config's "
            f"are {bench.results!r}; expected a campaign of another name"
        )
    begun = (path.parent for path in source.glob("*/spec.json"))
    runs = sorted(run for run in begun if any(run.glob("attempts/*/run.json")))
    if not runs:
        raise UserError(f"{source}: no run that has ended to keep")
    for run in runs:
        kept_run = folder / run.name
        for pattern in RECORD:  # checkpoints and console output stay behind
            for path in run.glob(pattern):
                _copy(path, folder / path.relative_to(source))
        with suppress(UserError):  # a record that breaks a rule: the summary says which
            write_metrics(kept_run / "run.json", hardware, kept_run / "metrics.json")
    for choice in source.glob("choice-*.json"):
        _copy(choice, folder / choice.name)
    manifest = Path(bench.results) / "data" / "manifest.json"
    if manifest.exists():
        _copy(manifest, folder / "manifest.json")
    write_json(kept, bench.model_dump(mode="json"))
    draw(bench, hardware, folder / "plots", records=folder)
    write(render(bench, hardware, str(kept), records=folder), folder)
    return [folder / run.name for run in runs]


def _copy(source: Path, target: Path) -> None:
    with whole(target) as partial:
        shutil.copyfile(source, partial)
