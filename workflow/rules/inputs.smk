"""What rules read, as functions of their wildcards, and what is to be made again.

Content decides (xdimo.current), not files' times and not what Snakemake remembers: what is stale is
forced, and to what is current its inputs are `ancient`. Behind an ancient input that is being made
again Snakemake looks for nothing else to do: what must be looked at has another input that is not.
"""

from functools import wraps

from xdimo import current
from xdimo.config.load import load_hardware
from xdimo.data.videos import is_current as manifest_is_current
from xdimo.report import TABLES, sources
from xdimo.spec import choice_path, no_target, plan, require_in_service
from xdimo.verbs import named

CELLS = BENCH.cells | BENCH.twins
HARDWARE = load_hardware(BENCH.hardware)
PLOTTED = [f"{RESULTS}/plots/{name}" for name in sources.PICTURES]
SUMMARY = [f"{RESULTS}/{name}" for name in TABLES]

if workflow.is_main_process and (wrong := current.other_videos(BENCH, Path(MANIFEST))):
    print(f"{wrong}, and so is what is shown", file=sys.stderr)


def text(value):
    """A value of the config as it is: as plain text, Snakemake would look for wildcards in it."""
    return lambda wildcards: value


def again(*files):
    """Has files made again as --force would, for whatever asks for them."""
    workflow.dag.forcefiles.update(files)


def named_to_run(*names):
    """Whether -f, -F or -R names one of these rules."""
    return not {rule.name for rule in workflow.dag.forcerules}.isdisjoint(names)


def in_one_line(function):
    """An input function whose refusal is one line, not a traceback of the workflow."""

    @wraps(function)
    def inputs(wildcards):
        try:
            return function(wildcards)
        except UserError as error:
            sys.exit(str(error))

    return inputs


def run_of(wildcards):
    return f"{wildcards.cell}-r{wildcards.repeat}"


@in_one_line
def videos_seen(wildcards):
    """Nothing: Snakemake would take the videos' names for patterns, and compare their times."""
    made_with = {
        "window": BENCH.clips.window,
        "decoder": BENCH.dataset.decoder,
        "expected": BENCH.dataset.expected_videos,
    }
    if not manifest_is_current(Path(MANIFEST), BENCH.dataset.videos, **made_with):
        again(MANIFEST)
    return []


def planned(wildcards):
    """What the config says of this run."""
    return plan(BENCH, run_of(wildcards))


def fetched_by(wildcards):
    """Nothing: packages are pinned."""
    if not current.fetched(BENCH.dataset):
        again(*RECEIPT)
    return []


def latents_of(wildcards):
    """The manifest they are made from."""
    if os.path.exists(LATENTS) and not current.latents(BENCH, Path(LATENTS), Path(MANIFEST)):
        again(LATENTS)
    return MANIFEST


def timed_for(target):
    """Input function of a choice between implementations: it reads nothing."""

    def inputs(wildcards):
        path = choice_path(Path(RUNS), target)
        if path.exists() and not current.choice(BENCH, target):
            again(str(path))
        return []

    return inputs


@in_one_line
def manifest_of(wildcards):
    """The manifest, whose content the spec names."""
    planned(wildcards)
    if current.spec(BENCH, run_of(wildcards), Path(MANIFEST)):
        return ancient(MANIFEST)
    again(f"{RUNS}/{run_of(wildcards)}/spec.json")
    return MANIFEST


@in_one_line
def choice_of(wildcards):
    """Where the implementation is to be chosen: what was found for the run's target."""
    planned(wildcards)
    cell = CELLS[wildcards.cell]
    path = str(choice_path(Path(RUNS), cell.target))
    if cell.implementation != "auto":
        return []
    return ancient(path) if current.choice(BENCH, cell.target) else path


def to_measure(wildcards):
    """Whether this run is to be trained; one asked for again by its cell or target is forced."""
    answer, target = f"{RUNS}/{run_of(wildcards)}/run.json", CELLS[wildcards.cell].target
    asked = not workflow.dag_settings.forceall and named_to_run(wildcards.cell, target)
    stale = not current.measured(BENCH, run_of(wildcards), Path(MANIFEST))
    if asked or stale:
        again(answer)
    if not (asked or stale or named_to_run(f"train_{target}")):
        return answer in workflow.dag.forcefiles
    current.require_sources(BENCH, Path(MANIFEST))
    return True


def read_by(wildcards, file):
    """An input of this run's training. Where that is done the file's age says nothing, and it may
    be missing: behind a missing one that is made again Snakemake would train.
    """
    planned(wildcards)  # refuses what is no run
    if to_measure(wildcards):
        return file
    return ancient(file) if os.path.exists(file) else []


@in_one_line
def spec_of(wildcards):
    return read_by(wildcards, f"{RUNS}/{run_of(wildcards)}/spec.json")


@in_one_line
def data_of(wildcards):
    """The latents' index, or the manifest in online mode. The spec carries their content."""
    cached = wildcards.cell not in CELLS or CELLS[wildcards.cell].mode == "cached"
    return read_by(wildcards, LATENTS if cached else MANIFEST)


def data_here():
    """Manifest and latents that lie here, the manifest also where the videos do."""
    manifest = os.path.exists(MANIFEST) or os.path.isdir(BENCH.dataset.videos)
    return [MANIFEST] * manifest + [LATENTS] * os.path.exists(LATENTS)


def sources_of(wildcards):
    """What online mode reads besides."""
    if CELLS[wildcards.cell].mode == "cached":
        return ""
    vae = "" if BENCH.vae.random else f" --vae {shlex.quote(BENCH.vae.weights)}"
    return f"--videos {shlex.quote(BENCH.dataset.videos)}{vae}"


@in_one_line
def measured_by(wildcards):
    """run.json."""
    planned(wildcards)
    folder = f"{RUNS}/{run_of(wildcards)}"
    if os.path.exists(f"{folder}/metrics.json") and not current.metrics(Path(folder), HARDWARE):
        again(f"{folder}/metrics.json")
    return f"{folder}/run.json"


def metrics_of(cells):
    return [f"{RUNS}/{run}/metrics.json" for run in BENCH.runs(cells)]


def on_this_machine():
    """Whether jobs run here, and not in a queue."""
    return workflow.is_main_process and workflow.local_exec


def plots_are_current():
    return sources.plots_are_current(BENCH)


def summary_is_current():
    return sources.summary_is_current(BENCH, named(CONFIGS))


def shown(wildcards):
    """Metrics of every run of the targets in service; what shows less is made again."""
    measured = metrics_of(BENCH.in_service)
    whole = all(map(os.path.exists, measured))
    if not (whole and plots_are_current()):
        again(*PLOTTED)
    if not (whole and summary_is_current()):
        again(*SUMMARY)
    return measured + data_here()


@in_one_line
def all_of(wildcards):
    """Metrics of every run of the targets in service."""
    if named_to_run("all") and not workflow.dag_settings.forceall:
        cell = BENCH.baseline
        raise UserError(
            "`all` measures nothing itself, and forcing it measures nothing again. Measure again "
            f"a target with -f {CELLS[cell].target}, a cell with -f {cell}, everything (videos and "
            f"latents too) with -F, such as: snakemake -f {cell} --configfile {shlex.join(CONFIGS)}"
        )
    return metrics_of(BENCH.in_service) + data_here()


def asked_for(cells):
    """Input function of a name on the command line: refuses a target out of service."""

    @in_one_line
    def inputs(wildcards):
        for cell in cells:
            require_in_service(BENCH, CELLS[cell].target)
        return metrics_of(cells) + data_here()

    return inputs


@in_one_line
def of_no_rule(wildcards):
    """What is asked for and made by nothing, whether a file of that name or a slip."""
    name, settings = wildcards.name, workflow.dag_settings
    asked = [*settings.targets, *settings.forcerun]
    typed = [word for word in asked if os.path.relpath(word) == name]
    if os.path.exists(name) and not typed:  # a file that a rule reads
        return f"{name}.made by nothing"
    if workflow.is_rule(name):
        raise UserError(f"{min(typed)}: a path; type the name alone: {name}")
    if os.path.exists(name):
        raise UserError(f"{name}: no step makes it. {no_target(BENCH, name)}")
    raise UserError(no_target(BENCH, name))
