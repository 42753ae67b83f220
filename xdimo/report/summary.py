"""The summary of a campaign: English, Chinese, CSV and JSON, all from one survey of its files."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from os.path import lexists
from pathlib import Path
from typing import Any

import pandas as pd

from xdimo.audit import claims
from xdimo.config.schema import Bench, Hardware
from xdimo.errors import UserError
from xdimo.files import content_hash, text_hash, write_json, write_text
from xdimo.model.flops import TERA, model_flops, parameters, tokens_per_frame
from xdimo.report import PLOTS, evidence, export, number_format, provenance, tables
from xdimo.report.campaign_state import CellState, Survey, survey
from xdimo.report.markdown import inline, link
from xdimo.report.scaling import scaling_table
from xdimo.report.sources import drawn_from, made_from
from xdimo.report.words import Words

HISTORY_COLUMNS = [
    "hardware",
    "gpus",
    "global_batch",
    "steps_per_s",
    "claimed_tflops",
    "recomputed_tflops",
    "claimed_mfu",
    "recomputed_mfu",
    "precision",
    "mode",
    "declared_model",
    "effective_model",
    "confidence",
    "their_note",
    "record",
]


@dataclass(frozen=True)
class Summary:
    en: str
    zh: str
    csv: str  # a row a cell, twins too
    data: dict[str, Any]  # summary.json
    made_from: dict[str, Any]  # xdimo.report.sources


def render(
    bench: Bench, hardware: Hardware, config_path: str, records: Path | None = None
) -> Summary:
    """What the files say now, with no run, some, or all of them.

    ``config_path``: as a person types it; the commands show it. ``records``: a folder that
    ``xdimo keep`` wrote, read instead of the config's own runs.
    """
    source = made_from(bench, config_path, records)
    view = survey(bench, hardware, records)
    past, bad_history = _past(Path(bench.history))
    cells = [export.cell_data(view, cell) for cell in view.cells.values()]
    return Summary(
        en=_document(view, past, bad_history, config_path, Words("en")),
        zh=_document(view, past, bad_history, config_path, Words("zh")),
        csv=pd.json_normalize(cells).to_csv(index=False, lineterminator="\n"),
        data=export.data(view, past, cells, _definitions(bench, Words("en"))),
        made_from=source,
    )


def write(summary: Summary, folder: Path) -> None:
    """summary.md, summary.zh.md, summary.csv and summary.json, each whole or not at all.

    The last has the hashes of all, so that another's file among them, or an edited one, is noticed.
    """
    texts = {"summary.zh.md": summary.zh, "summary.csv": summary.csv, "summary.md": summary.en}
    hashes = {name: text_hash(text) for name, text in texts.items()}
    whole = {**summary.data, "made_from": summary.made_from}
    data = json.loads(json.dumps(whole))  # as it will be read
    write_json(
        folder / "summary.json",
        {**data, "tables": {**hashes, "summary.json": content_hash(data)}},
    )
    for name, text in texts.items():
        write_text(folder / name, text)


def _past(history: Path) -> tuple[list[claims.Row], str | None]:
    """Its rows, or why none is shown: what was measured is shown all the same."""
    if not lexists(history):
        return [], None
    try:
        return claims.read(history), None
    except UserError as error:
        return [], str(error)


def _document(
    view: Survey, past: list[claims.Row], bad_history: str | None, config_path: str, words: Words
) -> str:
    bench = view.bench
    behind = [*(bench.baseline_cell(name).name for name in bench.targets), bench.baseline]
    baselines = [view.cells[name] for name in dict.fromkeys(behind)]
    planned = len(bench.cells) * bench.train.repeats
    done, by_name = _done(view, bench.cells), _done(view, bench.twins)
    parts = [
        *([words("demo")] if bench.demo else []),
        f"# {inline(view.heading)}",
        words("campaign", campaign=bench.campaign, done=done, runs=planned),
        *([words("campaign_twins", done=by_name)] if by_name else []),
        words("other_language"),
        f"## {words('main')}",
        tables.main_table(view, words).markdown(words),
        _rows_from(view, baselines, words),
        f"## {words('best')}",
        tables.best_table(view, words).markdown(words),
        _rows_from(view, tables.behind_best(view), words),
        *_section("notes", tables.note_lines(view, words), words),
        f"## {words('definitions')}",
        _bullets(_definitions(bench, words)),
        *_scaling(view, words),
        f"## {words('plots')}",
        *_plots(view, words),
        f"## {words('modes')}",
        words("fields"),
        tables.modes_table(view, config_path, words).markdown(words),
        f"## {words('trust')}",
        *_trust(view, words),
        f"## {words('hours')}",
        tables.hours_table(view, words).markdown(words),
        f"## {words('cells')}",
        tables.cells_table(view, config_path, words).markdown(words),
        f"## {words('runs')}",
        tables.runs_table(view, words).markdown(words),
        f"## {words('history')}",
        words("history_note", file=_history_link(view)),
        words("bad_history", why=inline(bad_history))
        if bad_history
        else _history(past, view.folder, words).markdown(words),
        f"## {words('cards')}",
        provenance.cards(view, words),
        f"## {words('dataset')}",
        *provenance.dataset(view, words),
        f"## {words('code')}",
        *provenance.versions(view, words),
    ]
    return "\n\n".join(parts) + "\n"


def _done(view: Survey, cells: Iterable[str]) -> int:
    return sum(len(view.cells[name].measured) for name in cells)


def _definitions(bench: Bench, words: Words) -> list[str]:
    model, shape = tables.model_of(bench)
    tokens = shape["frames"] * tokens_per_frame(model, shape["latent_size"])
    return words.definitions(
        parameters=f"{parameters(model, **shape).total:,}",
        tokens=f"{tokens:,}",
        frames=shape["frames"],
        flops=number_format.number(model_flops(model, **shape).training / TERA, words),
        baseline=bench.baseline,
    )


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _section(key: str, lines: list[str], words: Words) -> list[str]:
    return [f"**{words(key)}**", _bullets(lines)] if lines else []


def _scaling(view: Survey, words: Words) -> list[str]:
    table = scaling_table(view, words)
    return [f"## {words('scaling')}", table.markdown(words)] if table.rows else []


def _trust(view: Survey, words: Words) -> Iterable[str]:
    """Tables that say why the figures may be believed; those of which anything is known."""
    shown = 0
    for name, table in (
        ("classes", evidence.classes_table(view, words)),
        ("comparison", evidence.comparison_table(view, words)),
        ("ceilings", evidence.ceilings_table(view, words)),
        ("under_load", evidence.cards_table(view, words)),
        ("drift", evidence.drift_table(view, words)),
        ("shares", evidence.shares_table(view, words)),
    ):
        if table.rows:
            shown += 1
            yield words(name)
            yield table.markdown(words)
    if not shown:
        yield words("no_code")


def _rows_from(view: Survey, cells: list[CellState], words: Words) -> str:
    """The record behind each row, and the field of it behind each column."""
    names = [tables.run_link(view, cell.median) for cell in cells if cell.median]
    return words("rows_from", runs=", ".join(names) or words("none"))


def _history_link(view: Survey) -> str:
    path = Path(view.bench.history)
    return link(inline(path.name), path, view.folder)


def _plots(view: Survey, words: Words) -> Iterable[str]:
    """Pictures of what stands here, in the summary's language where they have been drawn in that.

    A picture of other runs or another campaign is left out; those of kept records lie with them.
    """
    kept = view.runs_folder == view.folder
    mark = b"" if kept else drawn_from(view.bench).encode()
    shown = 0
    for name in PLOTS:
        for path in (f"plots/{name}.{words.language}.png", f"plots/{name}.png"):
            file = view.folder / path
            if file.is_file() and mark in file.read_bytes():
                yield f"![{words(f'title_{name}')}]({path})"
                shown += 1
                break
    if not shown:
        yield words("no_plots")


def _history(past: list[claims.Row], folder: Path, words: Words) -> tables.Table:
    table = tables.Table(HISTORY_COLUMNS)
    for row in past:
        text, claimed = row.text, row.text["claimed_mfu_percent"]
        record = text["record"]
        table.rows.append(
            [
                *(text[name] for name in ("hardware", "gpus", "global_batch", "steps_per_s")),
                text["claimed_tflops"] or words("unknown"),
                number_format.number(row.tflops, words, digits=3),
                f"{claimed} %" if claimed else words("unknown"),
                number_format.percent(row.mfu, words),
                *(text[name] for name in ("precision", "data_mode", "declared_model")),
                *(text[name] for name in ("effective_model", "confidence", "note")),
                link(Path(record).name, Path(record), folder) if record else "",
            ]
        )
    return table
