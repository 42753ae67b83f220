"""Summaries of made-up records, and how their tables are read."""

import re

import records

from xdimo.report.summary import render

HARDWARE = records.hardware()


def summary(bench):
    return render(bench, HARDWARE, "config/config.yaml")


def rows_under(document: str, heading: str) -> list[list[str]]:
    """Body cells of the first table under a heading."""
    part = document.split(f"## {heading}\n", 1)[1]
    lines = re.search(r"(?:^\|.*\n)+", part, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def main_rows(document):
    return rows_under(document, "Results: each target at its baseline variant")


def best_rows(document):
    return rows_under(document, "Best variant of each target")


def measure(bench, cell: str, step_s: float) -> None:
    """Three repeats, none in order of speed."""
    for repeat, factor in ((1, 1.02), (2, 0.98), (3, 1.0)):
        records.write_run(bench, f"{cell}-r{repeat}", step_s=step_s * factor)
