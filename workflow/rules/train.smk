"""Spec -> run -> metrics, once a repeat of each cell."""

from xdimo.files import canonical
from xdimo.spec import choice_path, choice_plan

RETRIES = 2


rule spec:
    """Write the self-contained description of one run.

    input: manifest.json, whose content hash the spec names; with `auto`, its target's choice
    output: spec.json
    """
    input:
        manifest=manifest_of,
        choice=choice_of,
    output:
        f"{RUNS}/{{cell}}-r{{repeat}}/spec.json",
    log:
        f"{LOGS}/{{cell}}-r{{repeat}}.spec.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    params:
        plan=lambda wildcards: canonical(planned(wildcards)),
        choice=lambda wildcards, input: (
            f"--choice {shlex.quote(input.choice)}" if input.choice else ""
        ),
        vae=text(BENCH.vae.weights),
    shell:
        "python -m xdimo spec {wildcards.cell}-r{wildcards.repeat}"
        " --plan {params.plan:q}"
        " --vae {params.vae:q}"
        " --manifest {input.manifest:q}"
        " {params.choice}"
        " --output {output:q}"
        " > {log:q} 2>&1"


for name, target in BENCH.targets.items():

    if BENCH.train.implementation == "auto":

        rule:
            """Time every implementation on one card of the target: once a campaign, a few minutes.

            output: clips/s of each at each batch, or why not, and the fastest
            """
            name:
                f"choose_{name}"
            input:
                timed_for(name),
            output:
                choice_path(Path(RUNS), name),
            log:
                f"{LOGS}/choose_{name}.log",
            conda:
                "../envs/xdimo.yaml"
            threads: BENCH.cpus_per_gpu
            resources:
                gpu=1 if target.device == "cuda" else 0,
                host=1,
                target=name,
                slurm_partition=target.queue or "",
                runtime=target.walltime_min,
                mem_mb=1000 * (target.memory_gb or 0),
                setup=text("".join(f"{line}\n" for line in target.setup)),
                queued="--queued" if target.queue else "",
            params:
                target=name,
                plan=text(canonical(choice_plan(BENCH, name).model_dump())),
                hardware=BENCH.hardware,
            shell:
                "{resources.setup}"
                "python -m xdimo choose {params.target} {resources.queued}"
                " --plan {params.plan:q}"
                " --hardware {params.hardware:q}"
                " --output {output:q}"
                " > {log:q} 2>&1"

    rule:
        """Train one run in a fresh process group; attempts/ beside run.json keeps every try.

        input: spec.json; the latents' index (online mode: the manifest)
        output: run.json, how it ended
        """
        name:
            f"train_{name}"
        input:
            spec=spec_of,
            data=data_of,
        output:
            f"{RUNS}/{{cell}}-r{{repeat}}/run.json",
        log:
            f"{LOGS}/{{cell}}-r{{repeat}}.train.log",
        wildcard_constraints:
            cell=rf"{name}-bs[0-9]+(-online|-cached)?(-reference)?",
        priority: lambda wildcards: -int(wildcards.repeat)
        retries: RETRIES
        conda:
            "../envs/xdimo.yaml"
        threads: BENCH.cpus_per_gpu * target.gpus
        resources:
            gpu=target.gpus if target.device == "cuda" else 0,
            host=1,
            target=name,
            slurm_partition=target.queue or "",
            runtime=target.walltime_min,
            mem_mb=1000 * (target.memory_gb or 0),
            setup=text("".join(f"{line}\n" for line in target.setup)),
            walltime_min=target.walltime_min,
            queued="--queued" if target.queue else "",
            tries=lambda wildcards: 1 + RETRIES if on_this_machine() else 1,
        params:
            sources=sources_of,
            hardware=BENCH.hardware,
        shell:
            "{resources.setup}"
            "python -m xdimo launch {input.spec:q} {resources.queued}"
            " --data {input.data:q}"
            " {params.sources}"
            " --hardware {params.hardware:q}"
            " --walltime-min {resources.walltime_min}"
            " --tries {resources.tries}"
            " --output {output:q}"
            " > {log:q} 2>&1"

    rule:
        """All runs of one target's cells."""
        name:
            name
        input:
            asked_for([cell for cell in BENCH.cells if BENCH.cells[cell].target == name]),


for cell in CELLS:

    rule:
        """All runs of one cell."""
        name:
            cell
        input:
            asked_for([cell]),


rule metrics:
    """Derive the numbers of one run; no GPU needed.

    input: run.json, which names the log beside it; spec.json; peaks
    output: metrics.json
    """
    input:
        run=measured_by,
        spec=f"{RUNS}/{{cell}}-r{{repeat}}/spec.json",
        hardware=ancient(BENCH.hardware),
    output:
        f"{RUNS}/{{cell}}-r{{repeat}}/metrics.json",
    log:
        f"{LOGS}/{{cell}}-r{{repeat}}.metrics.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    shell:
        "python -m xdimo metrics {input.run:q}"
        " --hardware {input.hardware:q}"
        " --output {output:q}"
        " > {log:q} 2>&1"
