"""Figures of the kept records, frozen: code may change, what was measured may not.

tests/data/kept_figures.json was written by `python -m tests.test_kept_figures` at commit 7fdcbf1.
A campaign that is kept later is added to it by the same command; a frozen figure is never edited.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from xdimo.analysis.metrics import derive
from xdimo.config.load import load_hardware, parse
from xdimo.config.schema import Bench
from xdimo.files import read_json
from xdimo.records.reader import read_run
from xdimo.report.summary import render

FROZEN = Path(__file__).parent / "data/kept_figures.json"
CONFIGS = sorted((ROOT / "results/records").glob("*/config.json"))
NUMERAL = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def campaign(config: Path) -> dict[str, Any]:
    """Every derived number of each run, every number of each measured cell, and the numerals of
    the summary's table rows that show a measured cell.
    """
    bench = parse(Bench, read_json(config))
    hardware = load_hardware(bench.hardware)
    folder = config.parent
    summary = render(bench, hardware, str(config.relative_to(ROOT)), records=folder)
    runs = {path.parent.name: path.parent for path in sorted(folder.glob("*/spec.json"))}
    cells = {c["cell"]: c for c in summary.data["cells"] if c["repeats_measured"]}
    return {
        "metrics": {name: derive(read_run(run), hardware) for name, run in runs.items()},
        "cells": {name: {k: c[k] for k in c if k != "metrics"} for name, c in cells.items()},
        "numerals": dict(Counter(numeral for row in _rows(summary.en, cells) for numeral in row)),
    }


def _rows(markdown: str, cells: dict[str, Any]) -> list[list[str]]:
    named = re.compile("|".join(rf"`{re.escape(cell)}(?:-r\d+)?`" for cell in cells))
    rows = (row for row in markdown.splitlines() if row.startswith("|") and named.search(row))
    # Names, commands and links are no figures.
    return [NUMERAL.findall(re.sub(r"`[^`]*`|\([^)]*/[^)]*\)", "", row)) for row in rows]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.parent.name)
def test_no_figure_of_a_kept_record_moves(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    frozen = json.loads(FROZEN.read_text())[config.parent.name]
    now = json.loads(json.dumps(campaign(config)))
    assert frozen["metrics"].keys() == now["metrics"].keys()
    for part in ("metrics", "cells"):
        assert frozen[part]
        for name, figures in frozen[part].items():
            # A key may be added; a figure may not move.
            assert figures == {key: now[part][name].get(key) for key in figures}, name
    lost = Counter(frozen["numerals"]) - Counter(now["numerals"])
    assert frozen["numerals"] and not lost


def test_every_kept_campaign_is_frozen():
    assert {config.parent.name for config in CONFIGS} == set(json.loads(FROZEN.read_text()))


if __name__ == "__main__":
    frozen = json.loads(FROZEN.read_text()) if FROZEN.exists() else {}
    new = {c.parent.name: campaign(c) for c in CONFIGS if c.parent.name not in frozen}
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(figures, ensure_ascii=False)}"
        for name, figures in sorted((frozen | new).items())
    )
    FROZEN.write_text(f"{{\n{lines}\n}}\n")
    print(f"{FROZEN.name}: {len(new)} added", file=sys.stderr)
