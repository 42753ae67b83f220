"""The plots: what stands in them, and that the same records draw the same bytes."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import records
from matplotlib import font_manager
from matplotlib.colors import to_rgba

from tests.conftest import ROOT
from xdimo.config.load import load
from xdimo.report.campaign_state import survey
from xdimo.report.plots import draw
from xdimo.report.plots.bars import bars
from xdimo.report.plots.lines import step_times
from xdimo.report.plots.roofline import roofline
from xdimo.report.plots.style import DASHES, GREY, HATCHES, LIGHT_GREY, MARKERS, look
from xdimo.report.words import Words

HARDWARE = records.hardware()
EN = Words("en")


@pytest.fixture
def bench(tmp_path):
    bench = records.bench(tmp_path / "results")
    for repeat, factor in ((1, 1.0), (2, 1.1), (3, 1.2)):
        records.write_run(bench, f"gpu_6000ada-bs1-r{repeat}", step_s=0.1 * factor)
    records.write_run(bench, "gpu_h200-bs1-r1", step_s=0.05)
    records.write_run(bench, "gpu_h200-bs4-r1", outcome="oom", reason="rank 0")
    return bench


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_bars_are_the_measured_cells_and_gaps_are_labelled(bench):
    view = survey(bench, HARDWARE)
    axes = bars(view, "throughput", EN).axes[0]
    expected = [
        view.cells[name].samples_per_s.median for name in ("gpu_6000ada-bs1", "gpu_h200-bs1")
    ]
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(expected)
    assert texts(axes).count("pending") == 3 and "OOM: rank 0" in texts(axes)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == list(bench.cells)


def test_a_batch_has_one_look_on_every_target(bench):
    view = survey(bench, HARDWARE)
    looks = {name: look(view, cell)[1] for name, cell in view.cells.items()}
    batches = {name: cell.clips_per_gpu for name, cell in bench.cells.items()}
    pairs = {(batches[name], looks[name]) for name in bench.cells}
    assert len(pairs) == len(set(batches.values())) == len({each for _, each in pairs}) == 3


def test_whiskers_span_the_repeats(bench):
    view = survey(bench, HARDWARE)
    axes = bars(view, "throughput", EN).axes[0]
    spread = view.cells["gpu_6000ada-bs1"].samples_per_s
    (whisker,) = axes.containers[1].lines[2] if axes.containers[1].has_xerr else ()
    (segment,) = whisker.get_segments()
    assert [segment[0][0], segment[1][0]] == pytest.approx([spread.low, spread.high])


def test_the_baseline_is_marked_and_both_peaks_are_shown(bench):
    view = survey(bench, HARDWARE)
    assert "1.00× (baseline)" in texts(bars(view, "speedup", EN).axes[0])
    axes = bars(view, "mfu", EN).axes[0]
    marks = [line for line in axes.lines if line.get_marker() == "D"]
    metrics = view.cells["gpu_6000ada-bs1"].metrics
    assert [mark.get_xdata()[0] for mark in marks] == [100 * metrics["mfu_declared"]]
    memory = bars(view, "memory", EN).axes[0]
    assert max(bar.get_width() for bar in memory.patches) == 139.8  # the card's own
    assert "frame: what the card has" in memory.get_xlabel()


def test_five_batches_look_five_ways(bench):
    lent = load(ROOT / "config/lent.yaml")
    view = survey(lent.model_copy(update={"results": bench.results}), HARDWARE)
    places = [look(view, cell)[1] for cell in view.variants("h100_1")]
    for looks in (HATCHES, DASHES, MARKERS):
        assert len({looks[place % len(looks)] for place in places}) == 5


def test_without_the_baseline_a_speedup_waits(bench):
    view = survey(bench.model_copy(update={"baseline": "gpu_pro6000-bs1"}), HARDWARE)
    axes = bars(view, "speedup", EN).axes[0]
    assert not axes.patches and texts(axes).count("waits for gpu_pro6000-bs1") == 2


def test_a_measured_twin_is_drawn_after_its_target_s_cells(bench):
    fast = bench.model_copy(
        update={"train": bench.train.model_copy(update={"implementation": "dense"})}
    )
    records.write_run(fast, "gpu_h200-bs1-online-r1", step_s=0.2)
    records.write_run(fast, "gpu_h200-bs4-reference-r1", step_s=0.3)
    view = survey(fast, HARDWARE)
    axes = bars(view, "throughput", EN).axes[0]
    names = [tick.get_text() for tick in axes.get_yticklabels()]
    twins = ["gpu_h200-bs1-online", "gpu_h200-bs4-reference"]
    place = names.index("gpu_h200-bs4") + 1
    assert names[place : place + 2] == twins and len(names) == len(fast.cells) + 2
    greys = [to_rgba(LIGHT_GREY), to_rgba(GREY)]
    assert [bar.get_facecolor() for bar in axes.patches][-2:] == greys
    assert legend(step_times(view, EN).axes[1]) == ["bs4-reference", "bs1-online", "bs1"]


def test_step_times_are_the_median_runs(bench):
    records.write_run(bench, "gpu_6000ada-bs2-r1", step_s=0.12)
    first, second, third = step_times(survey(bench, HARDWARE), EN).axes
    assert len(first.lines[0].get_xdata()) == 22
    assert legend(first) == ["bs2", "bs1"] and legend(second) == ["bs1"]
    assert texts(third) == ["pending"] and third.get_legend() is None


def test_the_roofline_has_peaks_products_and_steps(bench):
    records.write_run(bench, "gpu_h200-bs1-r2", step_s=0.05, events=records.calibration_lines(4))
    records.write_run(bench, "gpu_h200-bs1-r3", step_s=0.05, events=records.calibration_lines(4))
    shutil.rmtree(f"{bench.runs_folder}/gpu_h200-bs1-r1")  # it was not calibrated
    view = survey(bench, HARDWARE)
    first, second, third = roofline(view, EN).axes
    assert texts(first) == ["not calibrated"] and texts(third) == ["pending"]
    assert {axes.get_xscale() for axes in (first, second, third)} == {"log"}  # as the axis says
    assert texts(second) == ["tensor 989"]  # declared is the same
    labels = legend(second)
    assert labels[:3] == [
        "4,800 GB/s (stated)",
        "3,900 GB/s (measured)",
        "8192 × 8192 × 8192: 700 TFLOP/s",
    ]
    metrics = view.cells["gpu_h200-bs1"].metrics
    step = next(line for line in second.lines if str(line.get_label()).startswith("step of"))
    assert step.get_ydata()[0] == pytest.approx(metrics["model_tflops_per_s"] / 4)
    points = [line for line in second.lines if line.get_marker() in ("o", "s", "^")]
    assert [line.get_ydata()[0] for line in points] == [700, 410, 520]
    # 2 n^3 FLOPs on 3 n^2 numbers of 2 bytes.
    assert points[0].get_xdata()[0] == pytest.approx(8192 / 3)


def test_without_a_stated_peak_the_measured_product_is_the_roof(tmp_path):
    bench = records.bench(tmp_path / "results", "demo.yaml")
    for cell in ("cpu_1-bs1", "cpu_1-bs2"):
        events = records.calibration_lines(1) if cell == "cpu_1-bs1" else []
        records.write_run(bench, f"{cell}-r1", events=events)
    view = survey(bench, HARDWARE)
    first = roofline(view, EN).axes[0]
    roof = first.lines[1]
    assert texts(first) == ["measured product 700"] and list(roof.get_ydata()) == [700, 700]
    share = 100 * view.cells["cpu_1-bs1"].metrics["mfu_measured"]
    axes = bars(view, "mfu", EN).axes[0]
    said = f"no known peak; {share:.2f} % of the measured product"
    assert not axes.patches and texts(axes) == [said, "no known peak", "pending", "pending"]
    assert "frame" not in bars(view, "memory", EN).axes[0].get_xlabel()


def test_no_data_says_so(tmp_path):
    view = survey(records.bench(tmp_path / "results"), HARDWARE)
    axes = bars(view, "mfu", EN).axes[0]
    assert not axes.patches and "no measurement yet" in axes.get_xlabel()


def test_the_same_records_draw_the_same_bytes(bench, tmp_path):
    first = draw.draw(bench, HARDWARE, tmp_path / "one")
    second = draw.draw(bench, HARDWARE, tmp_path / "two")
    assert {path.name for path in first} >= {"speedup.png", "speedup.svg", "steps.png"}
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
    assert not re.search(rb"<dc:date>", (tmp_path / "one/mfu.svg").read_bytes())


def test_without_a_chinese_font_an_old_chinese_plot_is_removed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "cjk_font", lambda: None)
    monkeypatch.setattr(draw, "PLOTS", ("speedup",))
    (tmp_path / "speedup.zh.png").write_bytes(b"old")
    draw.draw(bench, HARDWARE, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("speedup*")) == ["speedup.png", "speedup.svg"]


@pytest.mark.parametrize("place", ["title", "reason"])
def test_dollars_are_text(place, bench):
    priced = r"$\nothing$ to pay"
    if place == "title":
        bench = bench.model_copy(update={"title": priced})
    else:
        for repeat in (1, 2, 3):
            run = f"gpu_pro6000-bs1-r{repeat}"
            records.write_run(bench, run, outcome="data", reason=priced)
    for figure in (bars, step_times, roofline):
        arguments = ["speedup"] if figure is bars else []
        drawn = figure(survey(bench, HARDWARE), *arguments, EN)
        drawn.canvas.draw()
        said = [drawn.get_suptitle(), *(t for axes in drawn.axes for t in texts(axes))]
        assert any(priced in text for text in said)


def test_the_plots_are_ours_whatever_a_notebook_or_matplotlibrc_says(bench, tmp_path):
    """In a process of its own: matplotlib reads both when it is imported."""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 40\nsavefig.dpi: 20\n")
    drawn = []
    for name, environment in {
        "plain": {},
        "theirs": {"MPLBACKEND": "a-notebook", "MATPLOTLIBRC": str(tmp_path)},
    }.items():
        program = f"""
import records
from xdimo.report.plots import draw
draw.PLOTS = ("speedup",)
bench = records.bench({bench.results!r})
draw.draw(bench, records.hardware(), records.Path({str(tmp_path / name)!r}))
"""
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONPATH": paths, **environment},
            check=True,
        )
        drawn.append((tmp_path / name / "speedup.png").read_bytes())
    assert drawn[0] == drawn[1]


def test_a_font_that_came_after_matplotlib_s_list_is_found(monkeypatch):
    listed, added = [font_manager.FontEntry(fname="/gone.ttf", name=draw.CJK_FONTS[0])], []
    monkeypatch.setattr(font_manager.fontManager, "ttflist", listed)
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: ["/new.ttf", "/broken.ttf"])
    assert draw.cjk_font() is None  # neither can be read, and one is gone

    def add(path):
        if "broken" in path:
            raise RuntimeError("no font")
        added.append(path)
        listed.append(font_manager.FontEntry(fname=__file__, name=draw.CJK_FONTS[-1]))

    monkeypatch.setattr(font_manager.fontManager, "addfont", add)
    assert draw.cjk_font() == draw.CJK_FONTS[-1]
    assert draw.cjk_font() == draw.CJK_FONTS[-1] and added == ["/new.ttf"]
