"""Metrics -> plots and tables."""

# report.html shows params: the config, which may hold what is nobody's business, is a resource.


rule plot:
    """Draw speedup, throughput, MFU, memory and step times.

    input: metrics of every run of the targets in service
    output: PNG and SVG files
    """
    input:
        shown,
    output:
        # `snakemake --report` shows pictures, and has the tables to open beside them.
        [report(path, category="Plots") for path in PLOTTED if path.endswith(".png")],
        [path for path in PLOTTED if path.endswith(".svg")],
    log:
        f"{LOGS}/plot.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    resources:
        config=text(FROM_CONFIG),
    shell:
        "python -m xdimo plot {resources.config} > {log:q} 2>&1"


rule report:
    """Render the summary in both languages, and its data as CSV and JSON.

    input: metrics of every run of the targets in service, history, peaks, the plots it links, the
        manifest
    output: summary files, of which summary.json lists the content that they are made from
    """
    input:
        shown,
        history=ancient(BENCH.history),
        hardware=ancient(BENCH.hardware),
        plots=rules.plot.output,
    output:
        [report(path, category="Tables") for path in SUMMARY],
    log:
        f"{LOGS}/report.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    resources:
        config=text(FROM_CONFIG),
    shell:
        "python -m xdimo report {resources.config} > {log:q} 2>&1"
