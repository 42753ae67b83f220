"""Every wrong config is refused before any job, in one line that names the key."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, SMALL
from xdimo.config.load import load, load_hardware
from xdimo.config.schema import Bench, reference_table
from xdimo.errors import UserError
from xdimo.report.campaign_state import survey


def test_matrix_is_the_one_of_the_first_benchmark() -> None:
    bench = load(ROOT / "config/config.yaml", HERE)
    assert list(bench.cells) == [
        "gpu_6000ada-bs1",
        "gpu_6000ada-bs2",
        "gpu_h200-bs1",
        "gpu_h200-bs4",
        "gpu_pro6000-bs1",
        "gpu_pro6000-bs2",
    ]
    assert {name: target.gpus for name, target in bench.targets.items()} == {
        "gpu_6000ada": 4,
        "gpu_h200": 4,
        "gpu_pro6000": 4,
    }
    assert [target.gpus_free for target in bench.targets.values()] == [8, 5, 7]
    assert [target.queue for target in bench.targets.values()] == list(bench.targets)
    assert (bench.cpus_per_gpu, bench.pending_limit) == (8, 1)
    assert bench.dataset.expected_videos == 704
    assert (bench.clips.frames, bench.clips.interval, bench.clips.size) == (16, 3, 256)
    assert (bench.model.size, bench.model.experts, bench.model.top_k) == ("S/2", 4, 2)


def test_legacy_rows_are_cells_as_they_were_run() -> None:
    bench = load(ROOT / "config/legacy.yaml", HERE)
    runs = [(bench.targets[c.target].gpus, c.clips_per_gpu, c.mode) for c in bench.cells.values()]
    assert runs == [(8, 1, "online"), (2, 1, "online")]
    assert bench.train.precision == "tf32"
    assert bench.train.implementation == "reference"


def test_the_historical_step_goes_over_the_lent_cards() -> None:
    theirs = load(ROOT / "config/legacy.yaml", HERE)
    ours = load([ROOT / "config/lent.yaml", ROOT / "config/lent_legacy.yaml"], HERE)
    step = {"train": {"implementation", "precision", "deterministic"}, "model": True, "vae": True}
    assert ours.model_dump(include=step) == theirs.model_dump(include=step)
    row = theirs.targets["gpu_h200_x2"]
    assert {target.gpus for target in ours.targets.values()} == {row.gpus}
    assert "h200" in {target.card for target in ours.targets.values()}
    cells = {(cell.mode, cell.clips_per_gpu) for cell in ours.cells.values()}
    assert cells == {("online", clips) for clips in row.variants}


def test_a_target_set_to_null_is_left_out(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("targets: {h200_2: null}\n", encoding="utf-8")
    lent = load(ROOT / "config/lent.yaml", HERE)
    fewer = load([ROOT / "config/lent.yaml", over], HERE)
    assert list(fewer.targets) == [name for name in lent.targets if name != "h200_2"]
    over.write_text("targets: {h20_2: null}\n", encoding="utf-8")
    told = (
        r"over\.yaml: targets\.h20_2: null leaves out a target of the file below; allowed: h100_1"
    )
    with pytest.raises(UserError, match=told):
        load([ROOT / "config/lent.yaml", over], HERE)
    with pytest.raises(UserError, match=r"h20_2: null .*; allowed: none"):
        load(over, HERE)
    over.write_text("targets: {h100_1: null}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"latents\.target: 'h100_1' is no target; allowed: h100_2"):
        load([ROOT / "config/lent.yaml", over], HERE)


def test_what_a_site_need_not_say_has_a_default(tmp_path: Path) -> None:
    config = copy.deepcopy(SMALL)
    for key in ("gpus_total", "gpus_free", "baseline_variant"):
        del config["targets"]["cpu_2"][key]
    hardware = yaml.safe_load((ROOT / "config/hardware.yaml").read_text())
    del hardware["cards"]["cpu"]["sources"]
    config["hardware"] = str(tmp_path / "hardware.yaml")
    (tmp_path / "hardware.yaml").write_text(yaml.safe_dump(hardware))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    target = load(tmp_path / "small.yaml").targets["cpu_2"]
    assert (target.gpus_total, target.gpus_free, target.baseline_variant) == (2, 2, 1)
    wrong = {"targets": {"cpu_2": {"gpus": "two", "variants": []}}}
    with pytest.raises(UserError, match=r"cpu_2\.gpus: .*not 'two' \(and 1 more: \S+variants\)"):
        load(tmp_path / "small.yaml", wrong)


def test_title_and_demo_are_of_the_last_file_alone(tmp_path: Path) -> None:
    demo, mine = ROOT / "config/demo.yaml", tmp_path / "mine.yaml"
    mine.write_text("campaign: mine\nmodel: {depth: 6}\n")
    assert load(demo, HERE).demo
    assert not load([demo, mine], HERE).demo
    assert load([demo, ROOT / "config/faces.yaml"], HERE).demo
    lent = ROOT / "config/lent.yaml"
    assert load(lent, HERE).title is not None
    mine.write_text("campaign: mine\nmodel: {size: L/2}\n")
    bench = load([lent, mine], HERE)
    assert bench.title is None
    heading = survey(bench, load_hardware(bench.hardware), tmp_path).heading
    assert heading == f"XDiMo: Latte-L/2 with 4 experts (top-2) on {bench.dataset.name}"


def test_the_dense_model_goes_over_the_lent_cards() -> None:
    lent = load(ROOT / "config/lent.yaml", HERE)
    assert {target.gpus for target in lent.targets.values()} == {1, 2, 4}
    assert {target.card for target in lent.targets.values()} == {"h100", "h200"}
    dense = load([ROOT / "config/lent.yaml", ROOT / "config/dense.yaml"], HERE)
    assert (dense.model.experts, dense.model.top_k, dense.cells) == (1, 1, lent.cells)
    assert dense.results != lent.results


def test_repeats_are_interleaved(small_bench: Bench) -> None:
    assert small_bench.runs(small_bench.cells) == [
        *(f"{cell}-r1" for cell in small_bench.cells),
        *(f"{cell}-r2" for cell in small_bench.cells),
    ]


# key, value put there, what the one line must say
REFUSED = [
    ("train.warmup_step", 3, "train.warmup_step: unknown key; allowed: calibrate, "),
    ("targets.cpu_1.gpu", 3, "targets.cpu_1.gpu: unknown key; allowed: baseline_variant, "),
    ("campaign", None, "campaign: missing"),
    ("targets.cpu_1.gpus", "4", "targets.cpu_1.gpus: Input should be a valid integer, not '4'"),
    ("campaign", 2026, "campaign: Input should be a valid string, not 2026 (quote it)"),
    ("targets.cpu_1.gpus", 0, "targets.cpu_1.gpus: Input should be greater than or equal to 1"),
    ("train.precision", "fp8", "train.precision: Input should be 'fp32', 'tf32' or 'bf16'"),
    ("model.heads", 3, "model.heads: 3 does not divide model.width 16; allowed: 1, 2, 4, 8, 16"),
    ("model.depth", 3, "model.depth: 3 is odd"),
    ("model.top_k", 5, "model.top_k: 5 is more than model.experts; allowed: 1 to 4"),
    ("model.size", "S/2", "model.size: S/2 fixes depth, width and heads"),
    ("model.size", "M/2", "model.size: Input should be 'S/2', 'B/2', 'L/2' or 'XL/2'"),
    ("clips.size", 18, "clips.size: 18 pixels; must be a multiple of 4"),
    ("clips.frames", 0, "clips.frames: Input should be greater than or equal to 1"),
    ("vae.norm_num_groups", 3, "vae.norm_num_groups: 3 does not divide 4"),
    ("train.implementation", "fast", "train.implementation: Input should be 'auto'"),
    (
        "train.implementation",
        "fused",
        "train.implementation: fused runs on cuda only, not on cpu (targets.cpu_1); allowed: "
        "reference, dense, auto",
    ),
    ("targets.cpu_1.card", "h300", "targets.cpu_1.card: 'h300' is not in hardware.yaml; allowed: "),
    ("targets.cpu_1.variants", [1, 1], "targets.cpu_1.variants: [1, 1] names one cell twice"),
    ("targets.cpu_1.baseline_variant", 3, "targets.cpu_1.baseline_variant: 3 is none of its"),
    ("baseline", "cpu_3-bs1", "baseline: 'cpu_3-bs1' is no cell; allowed: cpu_1-bs1, "),
    ("latents.target", "gpu", "latents.target: 'gpu' is no target; allowed: cpu_1, cpu_2"),
    ("targets.cpu_2.gpus_free", 1, "targets.cpu_2.gpus_free: 1, but a run takes 2"),
    ("targets.cpu_2.gpus_free", 3, "targets.cpu_2.gpus_free: 3 is more than gpus_total 2"),
    ("targets.cpu_2.enabled", False, "targets.cpu_2.reason: missing"),
    ("targets.cpu_2.environment", {"A": 1}, "targets.cpu_2.environment.A: Input should be a valid"),
]


@pytest.mark.parametrize(("key", "value", "says"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refused(key: str, value: Any, says: str, tmp_path: Path) -> None:
    config = copy.deepcopy(SMALL)
    *parents, last = key.split(".")
    inside = config
    for parent in parents:
        inside = inside[parent]
    inside.pop(last, None)
    if value is not None:
        inside[last] = value
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(UserError) as refusal:
        load(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: {says}")
    assert "\n" not in message


def test_a_name_that_stands_twice_is_refused(small_config: Path) -> None:
    text = small_config.read_text()
    small_config.write_text(text.replace("  cpu_2:", "  cpu_1:"))
    with pytest.raises(UserError, match=r"line \d+: key 'cpu_1' stands twice"):
        load(small_config)


def test_a_misspelt_key_is_named_before_the_one_it_leaves_missing(small_config: Path) -> None:
    small_config.write_text(small_config.read_text().replace("campaign:", "campagne:"))
    with pytest.raises(UserError, match="campagne: unknown key; allowed: baseline, campaign, "):
        load(small_config)


def test_every_missing_key_is_named() -> None:
    with pytest.raises(
        UserError, match=r"baseline: missing; it has no default \(and 3 more: "
    ) as e:
        load(ROOT / "config/long.yaml")
    assert {"dataset", "targets"} <= set(str(e.value).split("more: ")[1].rstrip(")").split(", "))


@pytest.mark.parametrize("name", ["plot", "all", "train_one"])
def test_a_target_may_not_be_called_like_a_step(name: str, small_config: Path) -> None:
    small_config.write_text(small_config.read_text().replace("cpu_2", name))
    with pytest.raises(UserError, match=f"targets.{name}: the name of a step"):
        load(small_config)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", ""])
def test_a_file_that_is_no_config_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"^\S*odd\.yaml( line 1)?: "):
        load(path)
    with pytest.raises(UserError, match=r"absent\.yaml: no such file"):
        load(tmp_path / "absent.yaml")


def test_later_files_and_overrides_replace_single_values(
    small_config: Path, tmp_path: Path
) -> None:
    more = tmp_path / "more.yaml"
    more.write_text("train: {repeats: 5, timed_steps: 7}\n")
    bench = load([small_config, more], {"train": {"timed_steps": 9}})
    train = bench.train
    assert (train.repeats, train.timed_steps, train.warmup_steps) == (5, 9, 2)


def test_peaks_have_sources_and_an_unknown_device_has_none() -> None:
    hardware = load_hardware(ROOT / "config/hardware.yaml")
    for name, card in hardware.cards.items():
        stated = {
            key
            for key in ("declared_peak_tflops", "memory_gb", "bandwidth_gb_s", "devices")
            if getattr(card, key)
        }
        assert stated <= set(card.sources), name
    assert hardware.tensor_peak_tflops("NVIDIA H200") == 989
    assert hardware.tensor_peak_tflops("NVIDIA H200 NVL") is None


def test_documented_keys_are_the_types_keys() -> None:
    """config/README.md holds the table that the types give: key, default, meaning with unit."""
    assert reference_table() in (ROOT / "config/README.md").read_text()


def test_every_key_has_a_meaning() -> None:
    assert "| None |" not in reference_table()


# The paths in config files are relative to the checkout.
HERE = {
    "hardware": str(ROOT / "config/hardware.yaml"),
    "history": str(ROOT / "config/history.csv"),
}


def test_each_precision_has_its_implementations() -> None:
    with pytest.raises(UserError, match=r"fused has fp32 and bf16, not tf32 .*reference, dense"):
        load(ROOT / "config/legacy.yaml", {**HERE, "train": {"implementation": "fused"}})
    assert load(ROOT / "config/legacy.yaml", {**HERE, "train": {"implementation": "auto"}}).twins


def test_a_file_that_is_no_yaml_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("a: [1\nb: 2\n")
    with pytest.raises(UserError, match=r"^\S*bad\.yaml line 2: not YAML: expected"):
        load(tmp_path / "bad.yaml")
