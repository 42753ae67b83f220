"""Metrics -> plots and tables."""

from xdimo.files import content_hash
from xdimo.report import PLOTS, TABLES

# report.html shows params: the config, which may hold what is nobody's business, is a digest there,
# and what a command needs of it a resource.


rule plot:
    """Draw speedup, throughput, MFU, memory and step times.

    input: metrics of every run of the targets in service
    output: PNG and SVG files
    """
    input:
        metrics_of(BENCH.in_service),
    output:
        # `snakemake --report` shows pictures, and has the tables to open beside them.
        [report(f"{RESULTS}/plots/{name}.png", category="Plots") for name in PLOTS],
        [f"{RESULTS}/plots/{name}.svg" for name in PLOTS],
    log:
        f"{LOGS}/plot.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    resources:
        config=text(FROM_CONFIG),
    params:
        title=content_hash(BENCH.title),
    shell:
        "python -m xdimo plot {resources.config} > {log:q} 2>&1"


rule report:
    """Render the summary in both languages, and its data as CSV and JSON.

    input: metrics of every run of the targets in service, history, peaks, the plots it links
    output: summary files
    """
    input:
        metrics_of(BENCH.in_service),
        history=BENCH.history,
        hardware=BENCH.hardware,
        plots=rules.plot.output,
    output:
        [report(f"{RESULTS}/{name}", category="Tables") for name in TABLES],
    log:
        f"{LOGS}/report.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    resources:
        config=text(FROM_CONFIG),
    params:
        bench=content_hash(BENCH.model_dump()),
        # None when it runs; a summary rendered earlier, by hand or after a failure, is not the last.
        missing=lambda wildcards: missing(metrics_of(BENCH.in_service)),
    shell:
        "python -m xdimo report {resources.config} > {log:q} 2>&1"
