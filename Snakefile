"""XDiMo: from a folder of videos to a table of training speeds, one GPU type a row.

    snakemake                                    everything of config/config.yaml
    snakemake --configfile config/demo.yaml      another matrix, under its own results folder
    snakemake gpu_h200                           one target; gpu_h200-bs4: one cell
    snakemake -f gpu_h200                        measure a target again; earlier attempts are kept

inputs.smk   what rules read, as functions of their wildcards
data.smk     videos -> manifest -> latents
train.smk    spec -> run -> metrics, once a repeat
report.smk   metrics -> plots, tables
"""

import json
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, workflow.basedir)

from xdimo.config.load import load, typed
from xdimo.errors import UserError

# Files given with --configfile, later ones replacing single values, and then --config.
CONFIGS = [os.path.relpath(path) for path in workflow.configfiles] or ["config/config.yaml"]
OVERRIDE = typed(workflow.config_settings.config)

try:
    BENCH = load(CONFIGS, OVERRIDE)
    os.fsencode(BENCH.model_dump_json())
except UserError as error:
    sys.exit(str(error))
except UnicodeEncodeError:
    sys.exit(
        f"This Python writes file names in {sys.getfilesystemencoding()} (LC_ALL, PYTHONUTF8), and "
        "the config has other letters; set PYTHONUTF8=1 and run the same command"
    )

# `python` in a rule is the one that runs this, activated or not; a conda environment of the rule's
# own comes before it.
os.environ.update(PATH=os.pathsep.join([str(Path(sys.executable).parent), *os.get_exec_path()]))

# How a verb reads the same config.
FROM_CONFIG = f"--config {shlex.join(CONFIGS)}"
if OVERRIDE:
    FROM_CONFIG += f" --override {shlex.quote(json.dumps(OVERRIDE))}"

RESULTS = BENCH.results
RUNS = BENCH.runs_folder
LOGS = f"{RESULTS}/logs/{BENCH.campaign}"
MANIFEST = f"{RESULTS}/data/manifest.json"
LATENTS = f"{RESULTS}/data/latents/index.json"


wildcard_constraints:
    repeat=r"[1-9][0-9]*",


localrules:
    all,


include: "workflow/rules/inputs.smk"


rule all:
    """The summary of every target that is in service."""
    default_target: True
    input:
        f"{RESULTS}/summary.md",
        all_of,


include: "workflow/rules/data.smk"
include: "workflow/rules/train.smk"
include: "workflow/rules/report.smk"


rule unknown:
    """What is typed and no name of a target, cell or step: refused, with what was meant."""
    input:
        of_no_rule,
    output:
        "{name,[^/.]+}",


# A queue may give another host the next time. Here `launch` itself tries again what may end better,
# and what it refuses is refused once.
onstart:
    if on_this_machine():
        for name in BENCH.targets:
            workflow.get_rule(f"train_{name}").restart_times = 0


# What was measured is always shown, also after a failure or when one target alone was asked for;
# plots first, which the tables link, and the tables in any case.
SHOW = (
    f"python -m xdimo plot {FROM_CONFIG} > /dev/null || true; python -m xdimo report {FROM_CONFIG}"
)


onsuccess:
    if not (plots_are_current() and summary_is_current()):
        shell("{SHOW}")


onerror:
    shell("{SHOW}")
