"""The queue: what to submit when, and what became of it. No Snakemake here."""
