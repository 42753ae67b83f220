"""What plots and summary are made from, by content: both carry it, and where it differs from what
lies there now they are stale, whatever their times.
"""

from os.path import relpath
from pathlib import Path
from typing import Any

from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.files import content_hash, file_hash, read_json
from xdimo.report import PLOTS, TABLES

# What a run's figures can be made again from.
RECORD = ("spec.json", "run.json", "attempts/*/run.json", "attempts/*/log.jsonl")
PICTURES = tuple(f"{name}.{suffix}" for name in PLOTS for suffix in ("png", "svg"))


def drawn_from(bench: Bench, records: Path | None = None) -> str:
    """One hash, which stands in every plot."""
    return content_hash([bench.model_dump(mode="json"), _hashes(bench, records)])


def made_from(bench: Bench, named: str, records: Path | None = None) -> dict[str, Any]:
    """What stands in summary.json. ``named``: the config's files as a person types them."""
    plots = (records or Path(bench.results)) / "plots"
    return {
        "config": content_hash([named, bench.model_dump(mode="json")]),
        "files": _hashes(bench, records) | _hashed({"history": Path(bench.history)}),
        "plots": sorted(path.name for path in plots.glob("*.png")),
    }


def _hashes(bench: Bench, records: Path | None) -> dict[str, str]:
    folder, runs = records or Path(bench.results), records or Path(bench.runs_folder)
    found = [
        (folder if records else folder / "data") / "manifest.json",
        *runs.glob("choice-*.json"),
    ]
    found += (path for part in RECORD for path in runs.glob(f"*/{part}"))
    inside = {Path(relpath(path, folder)).as_posix(): path for path in sorted(found)}
    return _hashed({"hardware": Path(bench.hardware), **inside})


def _hashed(files: dict[str, Path]) -> dict[str, str]:
    hashes = {name: _hash(path) for name, path in files.items()}
    return {name: found for name, found in hashes.items() if found is not None}


def _hash(path: Path) -> str | None:
    try:
        return file_hash(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"unreadable: {error.strerror}"


def plots_are_current(bench: Bench) -> bool:
    """Whether every plot, and every picture that the summary links, is of what lies there now."""
    folder, mark = Path(bench.results) / "plots", drawn_from(bench).encode()
    try:
        linked = read_json(Path(bench.results) / "summary.json")["made_from"]["plots"]
    except (UserError, KeyError, TypeError, OSError):
        linked = []
    try:
        return all(mark in (folder / name).read_bytes() for name in {*PICTURES, *linked})
    except OSError:
        return False


def summary_is_current(bench: Bench, named: str) -> bool:
    """Whether all its files are as they were written, from what lies there now."""
    folder = Path(bench.results)
    try:
        data = read_json(folder / "summary.json")
        tables = data.pop("tables")
        texts = {name: _hash(folder / name) for name in TABLES if name != "summary.json"}
        whole = tables == {**texts, "summary.json": content_hash(data)}
        return bool(whole and data["made_from"] == made_from(bench, named))
    except (UserError, AttributeError, KeyError, TypeError, OSError):
        return False
