"""Claims explained: the two historical rows, and one planted mistake of each kind."""

import contextlib
import gzip
import json
import time
from pathlib import Path

import pytest
import records

from xdimo.analysis.metrics import write
from xdimo.audit import claims, text_log
from xdimo.audit.formulas import miscounts, training_flops
from xdimo.audit.mistakes import Claim, Figure, batch_in_speedup, explain, of_row
from xdimo.cli import parser
from xdimo.errors import UserError
from xdimo.files import read_json, write_json
from xdimo.model.flops import model_flops
from xdimo.report.explain import as_text, collect

HARDWARE = records.hardware()
MOE = claims.sample_of("S/2 4 experts top-2")
HISTORY = records.ROOT / "config/history.csv"


def claim(**changes) -> Claim:
    """A right claim of an H200: 4 GPUs x 4 clips at 20 steps/s."""
    fields = {
        "name": "row",
        "where": "claims.csv line 2",
        "source": "history",
        "card": "h200",
        "device": "NVIDIA H200",
        "gpus": 4,
        "global_batch": 16,
        "steps_per_s": Figure.written("20.00"),
        "sample": MOE,
    }
    return Claim(**{**fields, **changes})


def tflops(*mistakes: str, rate: float = 320.0) -> float:
    return rate * training_flops(MOE.model, mistakes, **MOE.shape) / 1e12


def claimed(value: float, peak: float = 989.0, **changes) -> Claim:
    """What someone writes down who has these TFLOP/s and divides by this peak."""
    mfu = 100 * value / (4 * peak)
    return claim(
        tflops=Figure.written(f"{value:.1f}"),
        mfu=Figure(float(f"{mfu:.1f}") / 100, 0.05 / mfu),
        **changes,
    )


@pytest.mark.parametrize(("line", "peak"), [(0, ("declared", 91.1)), (1, ("tensor", 989.0))])
def test_a_historical_row_is_explained_as_a_chain_of_named_mistakes(line, peak):
    told = explain(of_row(claims.read(HISTORY)[line], HARDWARE), HARDWARE)
    chain = [(round(link.flops / 1e12, 4), link.mistake) for link in told.chain]
    assert chain == [
        (8.4654, None),
        (16.9308, "multiply-adds for FLOPs"),
        (1.4496, "forgotten patchify"),
        (0.5526, "joint attention"),
        (0.9005, "top-k ignored"),
        (0.9015, "layers alone"),
    ]
    assert (told.peak.name, told.peak.tflops) == peak
    assert told.unexplained == []
    expected = [(25.2, 0.0087), (9.2, 0.0046)][line]
    assert (told.tflops, told.mfu["tensor"]) == (
        pytest.approx(expected[0], abs=0.05),
        pytest.approx(expected[1], abs=5e-5),
    )
    assert ("wrong peak kind" in told.mistakes) == (line == 0)


def test_the_historical_formula_is_the_closed_form_it_was():
    n, d = 16 * 32 * 32, 384
    closed = 3 * 12 * (4 * n * d**2 + 2 * n**2 * d + 8 * n * d**2)
    worst = ("multiply-adds for FLOPs", "forgotten patchify", "joint attention", "top-k ignored")
    assert training_flops(MOE.model, (*worst, "layers alone"), **MOE.shape) == closed


def test_no_mistake_is_the_models_own_count():
    right = model_flops(MOE.model, **MOE.shape).training
    assert training_flops(MOE.model, (), **MOE.shape) == right
    assert next(iter(miscounts(MOE.model))) == ()


def test_a_right_claim_has_nothing_to_explain():
    told = explain(claimed(tflops()), HARDWARE)
    assert (told.mistakes, told.unexplained) == ([], [])
    assert told.peak.name == "tensor"


PLANTED = [
    ("multiply-adds for FLOPs",),
    ("forgotten patchify",),
    ("joint attention",),
    ("all experts counted",),
    ("top-k ignored",),
    ("forgotten patchify", "all experts counted"),
]


@pytest.mark.parametrize("mistakes", PLANTED, ids=lambda made: " + ".join(made))
def test_a_planted_miscount_is_named(mistakes):
    told = explain(claimed(tflops(*mistakes, "layers alone")), HARDWARE)
    assert sorted(told.mistakes) == sorted([*mistakes, "layers alone"])
    assert told.unexplained == []
    assert told.tflops == pytest.approx(tflops(), rel=1e-6)


def test_a_wrong_kind_of_peak_is_named():
    declared = explain(
        claimed(tflops(), 91.1, card="rtx6000ada", device="NVIDIA RTX 6000 Ada Generation"),
        HARDWARE,
    )
    assert declared.mistakes == ["wrong peak kind"] and "FP32 shader rate" in declared.notes[0]
    sparse = explain(claimed(tflops(), 2 * 989), HARDWARE)
    assert sparse.mistakes == ["wrong peak kind"] and sparse.peak.name == "sparse"
    other = explain(claimed(tflops(), 312), HARDWARE)
    assert other.mistakes == ["wrong peak kind"] and other.peak.name == "of A100"


def test_an_unknown_card_gets_no_mfu_whatever_it_claimed():
    told = explain(claimed(tflops(), 312, card=None, device="X9"), HARDWARE)
    assert told.mistakes == ["unknown card"] and told.mfu == {}
    odd = explain(claimed(tflops(), 123.4, card=None, device="X9"), HARDWARE)
    assert odd.mistakes == ["unknown card"] and odd.unexplained


def test_a_clamped_value_is_named():
    fast = claim(
        card="rtx6000ada",
        device="NVIDIA RTX 6000 Ada Generation",
        tflops=Figure.written(f"{tflops(rate=480):.1f}"),
        steps_per_s=Figure.written("30.0"),
        mfu=Figure(1.0, 0.005),
    )
    told = explain(fast, HARDWARE)
    assert told.mistakes == ["clamped value"] and "118.7 % (declared)" in told.notes[0]


def test_the_first_window_counted_is_named():
    slow = claim(
        steps_per_s=Figure.written("17.3"), steady_steps_per_s=20.01, all_steps_per_s=17.31
    )
    told = explain(slow, HARDWARE)
    assert told.mistakes == ["first window counted"]
    assert told.tflops == pytest.approx(tflops(rate=20.01 * 16))


def test_a_batch_mixed_into_a_speedup_is_named():
    base = claim(name="base", global_batch=4, steps_per_s=Figure.written("10.0"))
    mine = claim(speedup=Figure.written("8.0"), over="base")
    assert "2 times in steps/s at 4 against 1 clips a GPU" in batch_in_speedup(mine, base)
    fair = claim(name="base", steps_per_s=Figure.written("2.5"))
    assert batch_in_speedup(mine, fair) is None


def test_what_nothing_explains_stays_unexplained():
    told = explain(claimed(3.21 * tflops()), HARDWARE)
    assert told.mistakes == [] and "3.21 times" in told.unexplained[0]


LOG = """\
[2026-03-01 10:00:00] Starting
(step=0000100/epoch=0000) Loss: 0.9000 | GradNorm: 0.5 | Steps/Sec: 2.00 | Samples/s: 16.0 | Achieved: 135.4 TFLOPs/s | MFU: 18.6%
(step=0000200/epoch=0001) Loss: 0.5000 | GradNorm: 0.5 | Steps/Sec: 3.50 | Samples/s: 28.0 | Achieved: 237.0 TFLOPs/s | MFU: 32.5%
(step=0000300/epoch=0003) Loss: 0.1234 | GradNorm: 0.5 | Steps/Sec: 3.50 | Samples/s: 28.0 | Achieved: 237.0 TFLOPs/s | MFU: 32.5%
"""  # noqa: E501 -- as the older programs wrote it


@pytest.fixture
def old_log(tmp_path) -> Path:
    path = tmp_path / "latte.log"
    path.write_text(LOG)
    return path


def test_a_text_log_gives_the_same_metrics(old_log):
    told = text_log.metrics(old_log)
    assert told["source"] == "text log"
    assert (told["global_batch"], told["steps_per_s"], told["samples_per_s"]) == (8, 3.5, 28.0)
    assert told["all_steps_per_s"] == pytest.approx(300 / (50 + 200 / 3.5))  # 50 s of start in it
    assert (told["loss_start"], told["loss_end"]) == (0.9, 0.1234)
    assert told["samples_per_s_ci95"] is None and told["window_too_short"]["n"] == 2


def test_a_text_log_is_explained_like_a_row(old_log):
    (found,) = collect([old_log], HARDWARE, card="rtx6000ada", gpus=8)
    told = explain(found, HARDWARE)
    assert told.mistakes[:4] == [
        "multiply-adds for FLOPs",
        "forgotten patchify",
        "joint attention",
        "top-k ignored",
    ]
    assert told.peak.name == "declared" and told.unexplained == []
    assert "text log, " in as_text([found], HARDWARE) and "line 4" in found.where


def test_older_lines_lack_fields_and_name_them_otherwise(tmp_path):
    path = tmp_path / "old.log"
    path.write_text(
        "(step=0000100) Train Loss: 0.1500, Train Steps/Sec: 1.25\n"
        "(step=0000200) Train Loss: 0.1400, Gradient Norm: 0.2, Train Steps/Sec: 1.30\n"
    )
    first, second = text_log.read(path)
    assert (first.loss, first.steps_per_s, first.epoch, first.tflops) == (0.15, 1.25, None, None)
    assert second.grad_norm == 0.2
    told = text_log.metrics(path)
    assert (told["steps_per_s"], told["samples_per_s"], told["claimed_tflops"]) == (1.3, None, None)
    assert text_log.metrics(path, global_batch=8)["samples_per_s"] == pytest.approx(10.4)


RATES = "(step=100) Steps/Sec: 3.50 | Samples/s: 28.0 | "


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ("Steps/Sec: 3,50 | Loss: 0,1234", {"steps_per_s": 3.5, "loss": 0.1234}),
        ("Loss: 0,1500, Steps/Sec: 1,25", {"loss": 0.15, "steps_per_s": 1.25}),
        ("Train Loss: 0.15 Train Steps/Sec: 1.25", {"loss": 0.15, "steps_per_s": 1.25}),
        ("Loss: 0.1 | LR: 1e-4 | Val Loss: 0.2 | ETA: 1:02:03", {"loss": 0.1}),
        ("Loss: 1.5e-3 | GradNorm: inf", {"loss": 0.0015, "grad_norm": float("inf")}),
        ("Achieved: 1,038.52 TFLOPs/s", {"tflops": 1038.52}),
        ("Achieved: 1.038,52 TFLOP/s", {"tflops": 1038.52}),
        ("Achieved: 237000.0 GFLOPs/s", {"tflops": 237.0}),
        ("Achieved: 0.2370 PFLOPs/s", {"tflops": 237.0}),
        ("Achieved: 29.6 TFLOPs/s/GPU", {"tflops": 29.6, "per_gpu": True}),
        ("Achieved: 29.6 TFLOPs/s per GPU", {"tflops": 29.6, "per_gpu": True}),
        ("MFU: 0.2042", {"mfu_percent": 20.42}),
        ("MFU: 20.42 %", {"mfu_percent": 20.42}),
        ("MFU: 0.00% | Achieved: 0.0 TFLOPs/s", {"mfu_percent": None, "tflops": None}),
        ("Steps/Sec: 0.034", {"steps_per_s": 0.034}),
    ],
)
def test_fields_are_read_as_they_are_written(tmp_path, fields, read):
    path = tmp_path / "old.log"
    path.write_text(f"(step=100) {fields}\n")
    (window,) = text_log.read(path)
    for key, value in read.items():
        assert getattr(window, key) == (value if value is None else pytest.approx(value, rel=1e-12))


@pytest.mark.parametrize(
    "packed",
    [
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-16-le"),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: gzip.compress(text.encode()),
        lambda text: text.replace("Steps/Sec: ", "Steps/Sec: \x1b[1;32m").encode(),
    ],
    ids=["utf-16", "utf-16 without its mark", "byte order mark", "gz", "colours"],
)
def test_a_text_log_is_read_whatever_it_is_packed_in(tmp_path, packed):
    path = tmp_path / "latte.log"
    path.write_bytes(packed(LOG.replace("[2026", "(2026")))
    assert [window.steps_per_s for window in text_log.read(path)] == [2.0, 3.5, 3.5]


def test_the_digits_of_the_log_are_its_precision(tmp_path):
    path = tmp_path / "slow.log"
    rate = 0.034 * 8 * training_flops(MOE.model, (), **MOE.shape) / 1e12
    mfu = 100 * rate / 364.2  # 0.067 %
    line = f"Steps/Sec: 0.034 | Samples/s: 0.27 | Achieved: {rate:.3f} TFLOPs/s | MFU: {mfu:.2f}%"
    path.write_text(f"(step=100) {line}\n(step=200) {line}\n(step=300) {line}\n")
    (found,) = collect([path], HARDWARE, card="rtx6000ada", gpus=1)
    assert (found.steps_per_s.value, found.global_batch) == (0.034, 8)
    told = explain(found, HARDWARE)
    assert (told.mistakes, told.unexplained, told.peak.name) == ([], [], "tensor")
    assert "claimed    0.245 TFLOP/s, MFU 0.07 %" in as_text([found], HARDWARE)


@pytest.mark.parametrize(
    ("text", "half"), [("3.50", 0.005), ("235", 0.5), ("~32", 0.5), ("1.5e-3", 5e-5), ("2e2", 50)]
)
def test_half_a_unit_of_the_last_digit_may_be_rounding(text, half):
    figure = Figure.written(text)
    assert figure.slack * figure.value == pytest.approx(half)


def test_digits_that_allow_several_batches_need_the_option(tmp_path):
    path = tmp_path / "coarse.log"
    path.write_text("(step=1) Loss: 1\n(step=100) Steps/Sec: 0.03 | Samples/s: 0.27\n")
    assert text_log.metrics(path)["global_batch"] is None
    assert text_log.metrics(path, 8)["global_batch"] == 8


def log_of(path: Path, rates: list[float], tera: float = 8.4654, claims: int = -1) -> Path:
    """Lines of 100 steps at these rates; ``claims``: the one whose TFLOP/s are 3 times too many."""
    lines = [
        f"(step={100 * n}) Steps/Sec: {rate:.2f} | Samples/s: {8 * rate:.1f} | "
        f"Achieved: {rate * 8 * tera * (3 if n == claims else 1):.1f} TFLOPs/s\n"
        for n, rate in enumerate(rates, start=1)
    ]
    path.write_text("".join(lines))
    return path


def test_a_claim_is_held_against_its_own_line_and_the_record_against_its_steady_part(tmp_path):
    path = log_of(tmp_path / "latte.log", [2.0, 3.5, 3.4, 3.6, 3.5, 3.3])
    (found,) = collect([path], HARDWARE, card="rtx6000ada", gpus=8)
    assert found.steps_per_s.value == 3.3 and "line 6" in found.where
    told = explain(found, HARDWARE)
    assert told.unexplained == [] and "top-k ignored" in told.mistakes
    steady = 5 / (1 / 3.5 + 1 / 3.4 + 1 / 3.6 + 1 / 3.5 + 1 / 3.3)
    assert told.tflops == pytest.approx(tflops(rate=8 * steady))


def test_the_last_line_alone_decides_nothing(tmp_path):
    path = log_of(tmp_path / "latte.log", [2.0, 3.5, 3.5, 3.5, 3.5], claims=5)
    (found,) = collect([path], HARDWARE, card="rtx6000ada", gpus=8)
    told = explain(found, HARDWARE)
    assert "line 4" in found.where and "top-k ignored" in told.mistakes
    assert told.unexplained == [
        "line 5: its TFLOP/s are 3 times what the other lines claim at its steps/s"
    ]


def test_a_first_window_that_is_claimed_is_found(tmp_path):
    path = log_of(tmp_path / "latte.log", [2.0, 3.5, 3.5, 3.5])
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([first, *(line.partition(" | Achieved")[0] for line in others)]))
    (found,) = collect([path], HARDWARE, card="rtx6000ada", gpus=8)
    told = explain(found, HARDWARE)
    assert told.mistakes[0] == "first window counted"
    assert told.tflops == pytest.approx(tflops(rate=8 * 3.5))


def test_a_log_that_never_settles_says_so(tmp_path):
    path = log_of(tmp_path / "latte.log", [2.0, *[3.5] * 15, *[2.8] * 15])
    (found,) = collect([path], HARDWARE, card="rtx6000ada", gpus=8)
    assert "the log never settles: shift of +25.0 % at step 1700" in explain(found, HARDWARE).notes


def test_rounding_is_in_the_interval_of_a_text_log(tmp_path):
    told = text_log.metrics(log_of(tmp_path / "latte.log", [2.0, *[3.5] * 60]))
    assert told["samples_per_s_ci95"] == pytest.approx([8 * 3.495, 8 * 3.505], rel=1e-4)


def test_a_batch_that_the_log_contradicts_is_said(old_log):
    (found,) = collect([old_log], HARDWARE, card="rtx6000ada", gpus=8, global_batch=16)
    says = "global batch 16 was given; the log's samples/s and steps/s say 8"
    assert found.global_batch == 8 and says in as_text([found], HARDWARE)
    (right,) = collect([old_log], HARDWARE, card="rtx6000ada", gpus=8, global_batch=8)
    assert right.remarks == ()


def test_figures_of_one_gpu_are_taken_times_the_gpus(tmp_path):
    path = tmp_path / "each.log"
    path.write_text(RATES + "Achieved: 29.6 TFLOPs/s/GPU | MFU: 32.5%\n")
    (found,) = collect([path], HARDWARE, card="rtx6000ada", gpus=8)
    assert found.tflops.value == pytest.approx(8 * 29.6)
    assert explain(found, HARDWARE).peak.name == "declared"
    with pytest.raises(UserError, match=r"line 1: Achieved is per GPU; give --gpus"):
        collect([path], HARDWARE)


@pytest.mark.parametrize("mistake", ["top-k ignored", "all experts counted"])
def test_one_mistake_is_named_where_one_explains(mistake):
    told = explain(claimed(tflops(mistake)), HARDWARE)
    assert (told.mistakes, told.unexplained) == ([mistake], [])
    assert told.chain[-1].flops == training_flops(MOE.model, (), **MOE.shape)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (RATES + "Achieved: 237.0\n", "line 1: Achieved: '237.0' expected GFLOPs/s, TFLOPs/s"),
        (RATES + "Achieved: 237.0 MFLOPs/s\n", "'237.0 MFLOPs/s' expected GFLOPs/s"),
        (RATES + "MFU: 32.5\n", "MFU: '32.5' expected per cent, such as 32.5%, or a share"),
        (RATES + "MFU: nan%\n", "MFU: 'nan%' is no rate"),
        ("(step=1) Steps/Sec: nan\n", "Steps/Sec: 'nan' is no rate"),
        ("(step=1) Steps/Sec: 0.00\n", "Steps/Sec: '0.00' has too few decimals"),
        ("(step=1) Loss: 1 | Steps/Sec: 3.", "Steps/Sec: '3.' is no number"),
        ("(step=1) Steps/Sec: -3.5\n", "Steps/Sec: '-3.5' is no rate"),
        ("(step=1) Steps/Sec: 1,038\n", "Steps/Sec: '1,038' has a comma that may part"),
        ("(step=1) Steps/Sec: 3.5 min\n", "Steps/Sec: '3.5 min' expected steps/s"),
        (
            "(step=1) Loss: 1\n(step=2) Loss: 1 (step=3) Loss: 1\n",
            "line 2: expected one '(step=...)'",
        ),
        (
            "(step=1) Loss: 1\n(step=1e2) Loss: 1\n",
            "line 2: expected one '(step=...)' with a whole",
        ),
        ("(step=1) Loss: 1 | Loss: 2\n", "line 1: Loss twice"),
        (
            RATES + "MFU: 3%\n(step=200) Steps/Sec: 3.50 | Samples/s: 56.0\n",
            "line 2: 56 samples/s over 3.5 steps/s are 16 clips a step",
        ),
        ("nothing here\n", "no line such as"),
        ("(step=2) Loss: 1\n(step=1) Loss: 1\n", "line 2: step 1 after step 2"),
        ("(step=2) Loss: 1.2.3\n", "line 1: Loss: '1.2.3' is no number"),
        (f"(step={'9' * 5000}) Loss: 1\n", "line 1: expected one '(step=...)' with a whole"),
        (RATES + "MFU:\f3%\n", r"line 1: holds the control character '\x0c'"),
        (RATES + "\x85MFU: 3%\n", r"line 1: holds the control character '\x85'"),
        ("(step=1) Steps/Sec\uff1a3.5\n", "line 1: 'Steps/Sec\uff1a': expected the name, a colon"),
        ("(step=1) Loss: 1 | Steps/Sec=3.5\n", "line 1: 'Steps/Sec=': expected the name, a colon"),
        ("(step=1) Lr: 1 Steps/Sec 3.5\n", "line 1: 'Steps/Sec 3': expected the name, a colon"),
    ],
)
def test_a_text_log_that_cannot_be_read_is_named(tmp_path, text, says):
    path = tmp_path / "bad.log"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.log") as error:
        text_log.metrics(path)
    assert says in str(error.value)


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_last_line_that_may_be_cut_is_no_window(tmp_path, cut):
    lines = [f"(step={100 * n}) Loss: 0.1 Steps/Sec: 3.50 | MFU: 0.32%" for n in range(1, 10)]
    path = tmp_path / "cut.log"
    path.write_text("\n".join(lines))
    assert len(text_log.read(path)) == 9  # it ends as the line before
    path.write_text("\n".join(lines)[:-cut])
    with pytest.raises(UserError, match=r"cut\.log line 9: "):
        text_log.read(path)


@pytest.mark.parametrize(
    "line", [f"Loss: {' ' * 100_000}x", f"Steps/Sec: {'1' * 100_000},", "Loss " * 50_000]
)
def test_a_long_line_takes_no_longer_than_its_length(tmp_path, line):
    path = tmp_path / "long.log"
    path.write_text(f"(step=1) {line}\n(step=2) {line}!\n")
    began = time.monotonic()
    with contextlib.suppress(UserError):
        text_log.read(path)
    assert time.monotonic() - began < 5  # at 16,000 spaces it was 20 s


@pytest.mark.parametrize(
    ("encoding", "name"), [("utf-16-le", "UTF-16"), ("utf-32", "UTF-32"), ("utf-32-be", "UTF-32")]
)
def test_an_encoding_that_is_not_read_is_named(tmp_path, encoding, name):
    path = tmp_path / "wide.log"
    path.write_bytes(f"\u8bad\u7ec3\n{RATES}MFU: 3%\n".encode(encoding))
    with pytest.raises(UserError, match=f"looks like {name}; save the file as UTF-8"):
        text_log.read(path)
    path.write_bytes(b"(step=1) Loss: 1\n(step=2) Loss: 1\n" + "(step=3) Loss: 1".encode(encoding))
    with pytest.raises(UserError, match=f"line 3: it looks like {name}"):
        text_log.read(path)


def test_a_text_log_that_says_less_names_the_options_that_say_the_rest(tmp_path):
    path = tmp_path / "old.log"
    lines = [f"(step=000{n}00) Train Loss: 0.{n}, Train Steps/Sec: 3.50\n" for n in (1, 2, 3)]
    path.write_text("".join(lines))
    (bare,) = collect([path], HARDWARE)
    assert "the log does not say; give --card, --gpus, --global-batch" in as_text([bare], HARDWARE)
    (found,) = collect([path], HARDWARE, card="h200", gpus=2, global_batch=2)
    told = explain(found, HARDWARE)
    assert told.mfu == {"tensor": pytest.approx(3.5 * 2 * 0.9015 / (2 * 989), rel=1e-3)}
    # Its three devices have three peaks: which one it was, a text log does not say.
    (found,) = collect([path], HARDWARE, card="rtx_pro6000", gpus=2, global_batch=2)
    assert list(explain(found, HARDWARE).mfu) == ["declared"]


def test_the_text_shows_each_link_with_its_ratio_and_which_model_ran():
    text = as_text(collect([HISTORY], HARDWARE), HARDWARE).split("\n\nH200")[0]
    assert "its MFU    32 % = 235 / (8 GPUs x 91.1, the declared peak)" in text
    assert "the config asked for S/2 2 experts top-1; what ran was S/2 4 experts top-2" in text
    rows = [line.split() for line in text.splitlines() if line.split()[1:2] == ["x"]]
    assert [row[2] for row in rows] == ["2", "0.08562", "0.3812", "1.63", "1.001"]


def test_a_batch_mixed_into_a_speedup_is_found_in_a_table_of_claims(tmp_path):
    header = ",".join([*claims.COLUMNS, *claims.EXTRA])
    base = HISTORY.read_text().splitlines()[1] + ",,"
    model = "S/2 4 experts top-2"
    mine = f"H200,h200,2,16,4.0,,,bf16,cached,{model},{model},989,,,,2.3,6000ada"
    table = tmp_path / "claims.csv"
    table.write_text(f"{header}\n{base}\n{mine}\n")
    text = as_text(collect([table], HARDWARE), HARDWARE).split("\n\nH200")[1]
    assert "mistakes   batch mixed into speedup" in text
    assert "2.3 times in samples/s is 1.14 times in steps/s at 8 against 1 clips a GPU" in text


def test_a_row_that_counted_the_first_window_is_found_out_by_its_log(old_log, tmp_path):
    rate = text_log.metrics(old_log)["all_steps_per_s"]
    row = HISTORY.read_text().splitlines()[1].replace(",3.5,235,32,", f",{rate:.2f},,,")
    row = row.replace("rounded by hand,,", f"rounded by hand,{old_log},")
    table = tmp_path / "claims.csv"
    table.write_text(",".join(claims.COLUMNS) + f"\n{row}\n")
    (found,) = collect([table], HARDWARE)
    assert explain(found, HARDWARE).mistakes == ["first window counted"]


@pytest.fixture
def run(tmp_path) -> Path:
    bench = records.bench(tmp_path / "results", train={"timed_steps": 60})
    return records.write_run(bench, "gpu_h200-bs4-r1")


def audit(*arguments) -> int:
    parsed = parser().parse_args(["audit", *map(str, arguments)])
    return parsed.run(parsed)


def test_records_are_re_derived_and_a_changed_metrics_file_is_found_out(run, capsys):
    assert audit("--strict", run.parent) == 0
    said = capsys.readouterr().out
    assert "mistakes   none found" in said
    assert said.endswith("\n1 with figures; rules broken: 0\n")
    metrics = write(run / "run.json", HARDWARE, run / "metrics.json")
    wrong = {"mfu_tensor": metrics["mfu_tensor"] / 2}  # a peak with sparsity
    write_json(run / "metrics.json", {**metrics, **wrong})
    audit(run, "--json")
    (told,) = json.loads(capsys.readouterr().out)
    assert told["mistakes"] == ["wrong peak kind"] and told["peak"]["name"] == "sparse"
    log = [json.loads(line) for line in (run / "attempts/1/log.jsonl").open()]
    step_s = [line["step_s"] for line in log if line["event"] == "step"]
    scale = len(step_s) / sum(step_s) / metrics["steps_per_s"]
    wrong = {key: metrics[key] * scale for key in ("steps_per_s", "model_tflops_per_s")}
    wrong["mfu_tensor"] = metrics["mfu_tensor"] * scale
    write_json(run / "metrics.json", {**metrics, **wrong})
    audit(run, "--json")
    (told,) = json.loads(capsys.readouterr().out)
    assert told["mistakes"] == ["first window counted"]


def test_strict_names_every_broken_rule_with_file_and_line(run, capsys):
    log = run / "attempts/1/log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    lines[0] = lines[0].replace('"top_k": 2', '"top_k": 1')
    lines[8], lines[9] = lines[9], lines[8]
    lines.append(lines[-1])
    log.write_text("".join(lines))
    facts = read_json(run / "run.json")
    write_json(run / "run.json", {**facts, "log_sha256": None, "ended": "2020-01-01T00:00:00Z"})
    assert audit("--strict", run.parent) == 1
    out = capsys.readouterr().out
    assert "run.json: ended 2020-01-01T00:00:00Z, before it started" in out
    assert "log.jsonl line 1: effective.top_k: 1; the spec says 2 [declared is effective]" in out
    assert "log.jsonl line 10: step.step: 8 after 9 " in out
    assert f"log.jsonl line {len(lines)}: 2 of footer; expected 1" in out


def test_strict_names_a_card_that_is_not_the_specs(tmp_path, capsys):
    bench = records.bench(tmp_path / "results")
    folder = records.write_run(bench, "gpu_h200-bs4-r1", devices=["NVIDIA H100 80GB HBM3"] * 4)
    (tmp_path / "results/runs/2026-11/gpu_h200-bs1-r1").mkdir()
    spec = records.spec_of(bench, "gpu_h200-bs1-r1").to_json()
    write_json(tmp_path / "results/runs/2026-11/gpu_h200-bs1-r1/spec.json", spec)  # not begun
    assert audit("--strict", folder.parent) == 1
    says = "log.jsonl line 1: devices: NVIDIA H100 80GB HBM3; the spec says h200"
    assert f"{says} [declared is effective]" in capsys.readouterr().out


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no spec.json in it or below"):
        audit(tmp_path)
