"""What rules read, as functions of their wildcards."""

import time

from xdimo.data.videos import is_current as manifest_is_current
from xdimo.spec import choice_path, is_current, plan, require_in_service

CELLS = BENCH.cells | BENCH.twins


def text(value):
    """A value of the config as it is: as plain text, Snakemake would look for wildcards in it."""
    return lambda wildcards: value


def videos_seen(wildcards):
    """A file that counts as new where the videos are not those that the manifest was made from.

    They themselves are no inputs: Snakemake would take their names for patterns and compare times.
    """
    stamp = Path(f"{RESULTS}/data/videos.stamp")
    made_with = {
        "window": BENCH.clips.window,
        "decoder": BENCH.dataset.decoder,
        "expected": BENCH.dataset.expected_videos,
    }
    try:
        current = manifest_is_current(Path(MANIFEST), BENCH.dataset.videos, **made_with)
    except UserError as error:
        sys.exit(str(error))
    if not current or not stamp.exists():
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(f"{time.time_ns()}\n")  # Snakemake compares content too, if it can
    return ancient(stamp) if current else stamp


def planned(wildcards):
    """What the config says of this run."""
    return plan(BENCH, f"{wildcards.cell}-r{wildcards.repeat}")


def spec_of(wildcards):
    """spec.json; its age counts only where the run beside it is of other content."""
    folder = Path(f"{RUNS}/{wildcards.cell}-r{wildcards.repeat}")
    spec = f"{folder}/spec.json"
    current = is_current(planned(wildcards), folder, Path(MANIFEST))
    return ancient(spec) if current else spec


def choice_of(wildcards):
    """Where the implementation is to be chosen: what was found for the run's target."""
    cell = CELLS[wildcards.cell]
    auto = cell.implementation == "auto"
    return ancient(choice_path(Path(RUNS), cell.target)) if auto else []


def data_of(wildcards):
    """The latents' index, or the manifest in online mode. The spec carries their content.

    Of a run that is yet to come they are plain inputs: Snakemake does not look for what is missing
    behind an ancient one that is being made again, and would train with the next command only.
    """
    data = LATENTS if CELLS[wildcards.cell].mode == "cached" else MANIFEST
    there = os.path.exists(f"{RUNS}/{wildcards.cell}-r{wildcards.repeat}/run.json")
    return ancient(data) if there else data


def sources(wildcards):
    """What online mode reads besides."""
    if CELLS[wildcards.cell].mode == "cached":
        return ""
    vae = "" if BENCH.vae.random else f" --vae {shlex.quote(BENCH.vae.weights)}"
    return f"--videos {shlex.quote(BENCH.dataset.videos)}{vae}"


def metrics_of(cells):
    return [f"{RUNS}/{run}/metrics.json" for run in BENCH.runs(cells)]


def on_this_machine():
    """Whether jobs run here, and not in a queue."""
    return workflow.is_main_process and workflow.local_exec


def missing(files):
    return [file for file in files if not os.path.exists(file)]


def asked_for(cells):
    """Input function of a name on the command line: refuses a target out of service."""

    def inputs(wildcards):
        for cell in cells:
            require_in_service(BENCH, CELLS[cell].target)
        return metrics_of(cells)

    return inputs
