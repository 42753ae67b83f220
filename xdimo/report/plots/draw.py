"""The plots of a campaign: PNG and SVG, the same bytes from the same records."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from xdimo.config.schema import Bench, Hardware
from xdimo.files import whole
from xdimo.report import PLOTS
from xdimo.report.campaign_state import Survey, survey
from xdimo.report.plots.bars import bars
from xdimo.report.plots.lines import step_times
from xdimo.report.plots.roofline import roofline
from xdimo.report.plots.style import STYLE
from xdimo.report.sources import drawn_from
from xdimo.report.words import Words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 160
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans CJK JP",  # every region of it has all the characters
    "Noto Sans CJK TC",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "PingFang SC",
    "SimHei",
)


def draw(bench: Bench, hardware: Hardware, folder: Path, records: Path | None = None) -> list[Path]:
    """Every plot, with what the files say now; returns the paths.

    Chinese ones (``*.zh.png``) only where this machine has a font for them; one that an earlier
    machine drew is removed, so that no plot is older than its summary.
    """
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which matplotlib would have to know
    from matplotlib import style

    source = drawn_from(bench, records)
    view = survey(bench, hardware, records)
    font = cjk_font()
    # Latin in one font everywhere; another is asked only for what that one lacks.
    family = ["DejaVu Sans", font] if font else ["DejaVu Sans"]
    written = []
    # Not what a matplotlibrc of the user's says.
    with style.context(["default", {**STYLE, "font.family": family}]):
        for name in PLOTS:
            written += _save(_plot(view, name, Words("en")), folder / name, ("png", "svg"), source)
            chinese = folder / f"{name}.zh"
            if font:
                written += _save(_plot(view, name, Words("zh")), chinese, ("png",), source)
            else:
                folder.joinpath(f"{name}.zh.png").unlink(missing_ok=True)
    return written


def cjk_font() -> str | None:
    """A font of this machine that has Chinese, also where it came later than matplotlib's list."""
    from matplotlib.font_manager import findSystemFonts, fontManager

    def found() -> str | None:
        known = {font.name for font in fontManager.ttflist if os.path.exists(font.fname)}
        return next((name for name in CJK_FONTS if name in known), None)

    if found() is None:
        for path in set(findSystemFonts()) - {font.fname for font in fontManager.ttflist}:
            with suppress(OSError, RuntimeError):  # a font that matplotlib cannot read
                fontManager.addfont(path)
    return found()


def _plot(view: Survey, name: str, words: Words) -> "Figure":
    whole = {"steps": step_times, "roofline": roofline}
    return whole[name](view, words) if name in whole else bars(view, name, words)


def _save(figure: "Figure", stem: Path, suffixes: Sequence[str], source: str) -> list[Path]:
    # A date or a version in the file would make every drawing differ from the last.
    metadata = {
        "png": {"Software": None, "Source": source},
        "svg": {"Date": None, "Source": source},
    }
    paths = []
    for suffix in suffixes:
        path = stem.with_name(f"{stem.name}.{suffix}")
        with whole(path) as partial:
            figure.savefig(partial, dpi=DPI, metadata=metadata[suffix])
        paths.append(path)
    return paths
