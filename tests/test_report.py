"""The summary: its two languages, and every figure traced back to a log line."""

import json
import re
from pathlib import Path

import pytest
import records
from summaries import HARDWARE, best_rows, main_rows, measure, rows_under, summary

from tests.conftest import ROOT
from xdimo.analysis.metrics import derive
from xdimo.config.load import load_hardware, parse
from xdimo.config.schema import SIZES, Bench
from xdimo.files import read_json, write_json
from xdimo.records.reader import read_run
from xdimo.report.definitions import DEFINITIONS
from xdimo.report.sources import drawn_from
from xdimo.report.summary import render, write
from xdimo.report.tables import escaped
from xdimo.report.words import WORDS

KEPT = sorted((ROOT / "results/records").glob("*/config.json"))
MODES = "Data modes: each target's baseline, and cells measured in both"
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


@pytest.mark.parametrize("config", KEPT, ids=lambda path: path.parent.name)
def test_what_git_keeps_is_what_its_records_say(config, monkeypatch):
    monkeypatch.chdir(ROOT)
    bench = parse(Bench, read_json(config))
    path = config.relative_to(ROOT)
    made = render(bench, load_hardware(bench.hardware), str(path), records=config.parent)
    assert made.en == (config.parent / "summary.md").read_text()
    assert made.zh == (config.parent / "summary.zh.md").read_text()
    assert made.csv == (config.parent / "summary.csv").read_text()
    kept = read_json(config.parent / "summary.json")
    # Hashes of what a campaign's summary is made from, and of its files, stand beside.
    assert made.data == {key: kept[key] for key in kept if key not in ("made_from", "tables")}
    kept = sorted(config.parent.glob("*/metrics.json"))
    assert kept
    for path in kept:
        metrics = read_json(path)
        metrics.pop("hardware", None)  # which peaks it was derived with; older ones do not say
        assert derive(read_run(path.parent), load_hardware(bench.hardware)) == metrics


def test_the_readmes_figures_are_those_of_a_kept_summary():
    kept = "results/records/lent/"
    shown = (ROOT / "README.md").read_text().split("## Measured\n")[1].split("\n## ")[0]
    rows, known = (
        [_cells(line) for line in text.splitlines() if re.match(r"\|.*\d", line)]
        for text in (shown, (ROOT / kept / "summary.md").read_text())
    )
    assert len(rows) >= 10
    assert not [row for row in rows if not any(_among(row, other) for other in known)]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def _among(row: list[str], other: list[str]) -> bool:
    """Whether all cells are those of another row, in its order; that one may have more."""
    rest = iter(other)
    return all(cell in rest for cell in row)


@pytest.fixture
def bench(tmp_path):
    return records.bench(tmp_path / "results")


def recomputed(bench, cell: str) -> dict[str, float]:
    """Figures of a cell's median run, from the raw lines alone."""
    target = bench.targets[bench.cells[cell].target]
    found = []
    for repeat in (1, 2, 3):
        folder = Path(bench.runs_folder) / f"{cell}-r{repeat}"
        lines = [json.loads(line) for line in (folder / "attempts/1/log.jsonl").open()]
        window = next(line for line in lines if line["event"] == "window")
        steps = window["last_step"] - window["first_step"] + 1
        clips = target.gpus * bench.cells[cell].clips_per_gpu
        reserved = max(line["peak_reserved_gib"] for line in lines if line["event"] == "memory")
        found.append(
            {
                "samples": steps * clips / window["wall_s"],
                "memory": reserved,
                "parameters": lines[0]["effective"]["parameters"],
                "device": lines[0]["devices"][0],
            }
        )
    return sorted(found, key=lambda figures: figures["samples"])[1]


def flops_a_sample() -> float:
    """docs/mfu.md's sum for S/2, 4 experts, top-2, written out again."""
    depth, d, _ = SIZES["S/2"]
    tokens = 16 * 256
    layer = 8 * d * d + 2 * 16 * d * d + 2 * d * 4
    attention = depth // 2 * tokens * 4 * d * (256 + 16)
    ends = tokens * 2 * d * (16 + 32)
    once = 2 * (256 * d + d * d + depth * 6 * d * d + 2 * d * d)
    return 3 * (depth * tokens * layer + attention + ends + once)


def shown(text: str) -> list[str]:
    return NUMBER.findall(text.replace("`", " "))


@pytest.mark.parametrize("table", ["main", "best"])
def test_every_numeral_of_the_two_tables_is_made_again_from_the_logs(bench, table):
    pace = {"gpu_6000ada": (0.12, 0.17), "gpu_h200": (0.06, 0.09), "gpu_pro6000": (0.08, 0.15)}
    for target, times in pace.items():
        for clips, step_s in zip(bench.targets[target].variants, times, strict=True):
            measure(bench, f"{target}-bs{clips}", step_s)
    cells = {
        "main": ["gpu_6000ada-bs1", "gpu_h200-bs1", "gpu_pro6000-bs1"],
        "best": ["gpu_6000ada-bs2", "gpu_h200-bs4", "gpu_pro6000-bs2"],
    }[table]
    like_for_like = {
        "gpu_6000ada-bs2": ("gpu_6000ada-bs2", "gpu_6000ada-bs2", []),
        "gpu_h200-bs4": ("gpu_h200-bs1", "gpu_6000ada-bs1", ["1"]),
        "gpu_pro6000-bs2": ("gpu_pro6000-bs2", "gpu_6000ada-bs2", []),
    }
    document = summary(bench).en
    rows = main_rows(document) if table == "main" else best_rows(document)
    base = recomputed(bench, "gpu_6000ada-bs1")["samples"]
    for cell, row in zip(cells, rows, strict=True):
        figures = recomputed(bench, cell)
        card = HARDWARE.card_of(figures["device"])
        tensor, declared = card.devices[figures["device"]], card.declared_peak_tflops
        achieved = figures["samples"] * flops_a_sample() / 1e12 / 4
        shares = [(tensor, 100 * achieved / tensor), (declared, 100 * achieved / declared)]
        both = tensor != declared
        peak = [f"{declared:g}", f"{tensor:g}"] if both else [f"{tensor:g}"]
        mfu = [text for against, share in shares for text in (f"{share:.2f}", f"{against:g}")]
        samples = figures["samples"]
        expected = [
            shown(f"4 {card.label} {cell}"),
            [f"{figures['parameters']:,}"],
            [f"{figures['memory']:.2f}"],
            peak,
            [f"{samples * 4096:,.0f}", f"{samples:.2f}" if samples < 100 else f"{samples:.1f}"],
            mfu if both else mfu[:1],
            [f"{samples / base:.2f}"],
        ]
        if table == "best":
            mine, theirs, named = like_for_like[cell]
            ratio = recomputed(bench, mine)["samples"] / recomputed(bench, theirs)["samples"]
            expected.append([f"{ratio:.2f}", *named])
        assert [shown(text) for text in row] == expected


def test_rows_name_the_median_run(bench):
    measure(bench, "gpu_6000ada-bs1", 0.1)
    link = re.search(r"Rows from runs: \[`gpu_6000ada-bs1-r3`\]\((.*?)\)\.", summary(bench).en)
    assert (Path(bench.results) / link[1]).read_text().startswith('{"event": "header"')


def test_the_main_table_has_the_seven_columns_in_both_languages(bench):
    document = summary(bench)
    header = "硬件 模型参数 显存占用 硬件浮点峰值(FP16) token/样本吞吐量 MFU(浮点利用率) 加速比"
    chinese = document.zh.split("## 结果：各硬件的基线变体\n\n", 1)[1].splitlines()[0]
    assert chinese.replace("|", " ").split() == header.split()
    english = document.en.split("baseline variant\n\n", 1)[1].splitlines()[0]
    assert [cell.strip() for cell in english.strip("|").split("|")] == [
        "Hardware",
        "Parameters",
        "Memory",
        "FP16 peak",
        "Throughput (tokens, samples)",
        "MFU",
        "Speedup",
    ]


@pytest.mark.parametrize("change", ["nothing", "everything"])
def test_both_languages_say_the_same_numbers_in_the_same_order(bench, change):
    if change == "everything":
        measure(bench, "gpu_6000ada-bs1", 0.001)
        records.write_run(bench, "gpu_h200-bs1-r1", devices=["NVIDIA X9"] * 4)
        records.write_run(bench, "gpu_h200-bs4-r1", outcome="oom", reason="2 GiB short")
        records.write_run(
            bench, "gpu_pro6000-bs1-r1", code={**records.CODE, "dirty": True}, attempt=2
        )
        records.write_manifest(bench)
    document = summary(bench)

    def numbers(text):
        # The link to the other language is the one line that differs by intent.
        return NUMBER.findall(text.replace("plots/", ""))

    assert numbers(document.en) == numbers(document.zh)
    assert len(numbers(document.en)) > 100


def test_words_have_the_same_placeholders_in_both_languages():
    for english, chinese in [*WORDS.values(), *DEFINITIONS]:
        assert re.findall(r"{\w+}", english) == re.findall(r"{\w+}", chinese)
        assert english and chinese


def test_results_stand_before_their_definitions(bench):
    headings = re.findall(r"^## (.*)", summary(bench).en, re.MULTILINE)
    assert headings[:3] == [
        "Results: each target at its baseline variant",
        "Best variant of each target",
        "How each number is made",
    ]


def test_dataset_exclusions_and_a_random_vae_are_said(bench):
    records.write_manifest(bench)
    document = summary(bench).en
    assert "3 files, 2 readable, 1 usable, 1 shorter than 48 frames" in document
    assert rows_under(document, "Dataset")[0][1:] == ["short", "17 frames < 48"]
    assert rows_under(summary(bench).zh, "数据集")[0][1:] == ["过短", "17 frames < 48"]
    assert "**random VAE** (seed 0)" in document


def test_the_demo_says_so_on_its_first_line(tmp_path, bench):
    demo = records.bench(tmp_path / "demo", "demo.yaml")
    for repeat in (1, 2, 3):
        records.write_run(demo, f"cpu_2-bs1-r{repeat}")
    document = render(demo, HARDWARE, "config/demo.yaml")
    assert document.en.splitlines()[0].startswith("**This is the demo**")
    assert document.zh.splitlines()[0].startswith("**这是演示**")
    assert "`snakemake --configfile config/demo.yaml -- cpu_1-bs1`" in document.en
    assert main_rows(document.en)[1][2] == "1.51 GiB host"
    assert not summary(bench).en.startswith("**")


def test_the_historical_rows_show_claims_and_what_is_so(bench):
    rows = rows_under(summary(bench).en, "Earlier measurements")
    assert [row[4:8] for row in rows[:2]] == [
        ["235", "25.2", "32 %", "0.87 %"],
        ["86", "9.20", "4.3 %", "0.46 %"],
    ]


def test_the_four_files_hold_the_same_figures(bench, tmp_path):
    measure(bench, "gpu_6000ada-bs1", 0.1)
    write(summary(bench), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["summary.csv", "summary.json", "summary.md", "summary.zh.md"]
    data = read_json(tmp_path / "out/summary.json")
    metrics = data["cells"][0]["metrics"]
    assert metrics["run"] == data["cells"][0]["median_run"] == "gpu_6000ada-bs1-r3"
    lines = (tmp_path / "out/summary.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 + 6  # matrix and twins
    assert str(metrics["samples_per_s"]) in lines[1]


def test_record_links_lead_to_the_logs(bench):
    records.write_run(bench, "gpu_h200-bs1-r1")
    link = re.search(r"\[log.jsonl\]\((.*?)\)", summary(bench).en)[1]
    assert (Path(bench.results) / link).read_text().startswith('{"event": "header"')


def test_every_row_that_was_measured_is_one_hop_from_its_record(bench):
    for target, clips in (("gpu_6000ada", 2), ("gpu_h200", 4), ("gpu_pro6000", 2)):
        measure(bench, f"{target}-bs1", 0.1)
        measure(bench, f"{target}-bs{clips}", 0.15)
    refused = Path(bench.runs_folder) / "gpu_h200-bs4-r2"
    (refused / "attempts/1/log.jsonl").write_text("")
    for document in (summary(bench).en, summary(bench).zh):
        lines = document.splitlines()
        links = [link for line in lines for link in re.findall(r"\]\(([^)]+)\)", line)]
        assert all((Path(bench.results) / link).exists() for link in links if "summary" not in link)
        # Tables of figures; the first two name their records under them.
        rows = [line for line in lines if re.match(r"\| \[?`gpu_\w+-bs\d(-r\d)?`", line)]
        assert len(rows) == 3 + 6 * 5 + 18  # modes; classes, beside, drift, hours, cells; runs
        assert all("](runs/2026-11/gpu_" in row for row in rows)
        main, best = (line for line in lines if "`header.effective`" in line)
        assert len(re.findall(r"\]\(runs/", main)) == 3
        # The best variants, the baseline, and what is compared at one batch.
        assert len(re.findall(r"\]\(runs/", best)) == 5
        assert "× H200 SXM, `gpu_h200-bs4` † " in document  # one of its runs is left out
        assert "- `gpu_h200-bs4-r2`: " in document
    row = next(row for row in rows if "`gpu_h200-bs4-r2`" in row)
    assert "[gpu_h200-bs4-r2/](runs/2026-11/gpu_h200-bs4-r2/)" in row


def test_a_table_cell_cannot_be_broken_by_its_text():
    assert escaped("a|b\nc") == r"a\|b c"


def test_a_manifest_with_nothing_excluded_has_no_table_of_exclusions(bench):
    records.write_manifest(bench)
    path = Path(bench.results) / "data/manifest.json"
    manifest = read_json(path)
    write_json(path, {**manifest, "videos": manifest["videos"][:1]})
    assert "not replaced by another video" not in summary(bench).en


def test_like_for_like_is_at_the_largest_shared_batch_where_the_own_is_not_shared(tmp_path):
    more = {"gpu_h200": {"variants": [1, 2, 8]}}
    bench = records.bench(tmp_path / "results", targets=more)
    for cell, step_s in {"gpu_6000ada-bs2": 0.2, "gpu_h200-bs2": 0.1, "gpu_h200-bs8": 0.1}.items():
        measure(bench, cell, step_s)
    row = best_rows(summary(bench).en)[1]
    assert row[0] == "4 × H200 SXM, `gpu_h200-bs8` † (2 of 3 variants measured)"
    assert re.fullmatch(r"(1\.9|2\.0)\d× at bs2", row[7])
    assert row[6] == "waits for gpu_6000ada-bs1"


def test_any_cell_measured_in_the_other_data_mode_stands_among_the_modes(bench):
    records.write_run(bench, "gpu_h200-bs4-r1")
    assert "asked for by name" not in summary(bench).en
    records.write_run(bench, "gpu_h200-bs4-online-r1", step_s=0.4)
    document = summary(bench).en
    assert (
        ": 1 of 18 runs measured.\n\nRuns outside the matrix, of cells asked for by name: 1."
        in document
    )
    rows = rows_under(document, MODES)
    assert [re.search(r"`(.*?)`", row[0])[1] for row in rows] == [
        "gpu_6000ada-bs1",
        "gpu_6000ada-bs1-online",
        "gpu_h200-bs1",
        "gpu_h200-bs1-online",
        "gpu_h200-bs4",
        "gpu_h200-bs4-online",
        "gpu_pro6000-bs1",
        "gpu_pro6000-bs1-online",
    ]


def test_cards_of_one_type_show_what_further_ones_bring(tmp_path):
    targets = {"gpu_pro6000": {"card": "h200", "gpus": 2}}
    bench = records.bench(tmp_path / "results", targets=targets)
    measure(bench, "gpu_pro6000-bs1", 0.1)
    measure(bench, "gpu_6000ada-bs1", 0.1)
    assert "Scaling over GPUs" not in summary(bench).en
    measure(bench, "gpu_h200-bs1", 0.125)
    measure(bench, "gpu_h200-bs4", 0.125)
    document = summary(bench)
    few, many = rows_under(document.en, "Scaling over GPUs of one card")
    assert (few[1], few[3], few[4]) == ("2", "1.00×", "100.0 %")
    ratio = (
        recomputed(bench, "gpu_h200-bs1")["samples"]
        / recomputed(bench, "gpu_pro6000-bs1")["samples"]
    )
    assert (many[1], many[3], many[4]) == ("4", f"{ratio:.2f}×", f"{50 * ratio:.1f} %")
    assert 0.78 < ratio / 2 < 0.82
    assert "## 同种卡的多卡扩展" in document.zh


def test_a_picture_of_another_campaign_is_not_linked(bench):
    picture = Path(bench.results) / "plots/throughput.png"
    picture.parent.mkdir(parents=True)
    other = bench.model_copy(update={"campaign": "another"})
    picture.write_bytes(b"PNG " + drawn_from(other).encode())
    assert "plots/throughput.png" not in summary(bench).en
    assert "Not drawn yet: `xdimo plot` draws them." in summary(bench).en
    picture.write_bytes(b"PNG " + drawn_from(bench).encode())
    assert "(plots/throughput.png)" in summary(bench).en
