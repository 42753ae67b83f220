"""A spec's hash is over content, and a key that is added later leaves older specs theirs."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import DATASET, ROOT, spec_of
from xdimo import spec as specs
from xdimo.config.load import load, parse
from xdimo.config.schema import Bench
from xdimo.data import vae
from xdimo.report.evidence import precision
from xdimo.report.words import Words
from xdimo.spec import RunSpec, VaeSpec, latents_name, latents_plan, plan, resolve, vae_spec

# As they were before any key was added.
FIRST = {
    (
        "config.yaml",
        "gpu_h200-bs4-r1",
    ): "sha256:7d04b3caf9ab3bb3383a97c66a50fe15f27a93640c7b14ce4ba45e92347150cd",
    (
        "demo.yaml",
        "cpu_1-bs1-r1",
    ): "sha256:87cfd25c314e953a13c0523d34f16d5d000fe097bd7b8b91fcaafc0ca03f6172",
    (
        "lent.yaml",
        "h100_2-bs1-online-r1",
    ): "sha256:506ccc7ee4903a001fc76385648239ae70263063196b9b3f75e72c92652ea938",
}


@pytest.mark.parametrize(("file", "run"), FIRST)
def test_shipped_specs_keep_their_first_hash(file: str, run: str) -> None:
    assert spec_of(load(ROOT / "config" / file), run).hash == FIRST[file, run]


def test_kept_specs_have_the_hash_that_their_runs_name() -> None:
    paths = sorted((ROOT / "results/records").glob("*/*/spec.json"))
    assert len(paths) > 10
    for path in paths:
        ran = json.loads((path.parent / "run.json").read_text())["spec"]
        assert specs.read_spec(path).hash == ran, path


def test_an_added_key_counts_where_it_is_not_at_its_default(small_bench: Bench) -> None:
    plain = spec_of(small_bench, "cpu_1-bs1-r1")
    content = plain.to_json()
    assert "transform" not in content["data"] and "precision" not in content["vae"]
    changed = {**content, "vae": {**content["vae"], "precision": "bf16"}}
    other = parse(RunSpec, changed)
    assert other.hash != plain.hash and other.to_json() == changed
    same = {**content, "vae": {**content["vae"], "precision": None}}
    assert parse(RunSpec, same).hash == plain.hash


def test_latents_of_another_transform_have_another_name(
    small_bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = spec_of(small_bench, "cpu_1-bs1-r1")
    online = spec_of(small_bench, "cpu_1-bs1-online-r1")
    monkeypatch.setattr(specs, "TRANSFORM", 2)
    second = spec_of(small_bench, "cpu_1-bs1-r1")
    assert second.data.transform == 2 and second.data.latents != first.data.latents
    assert spec_of(small_bench, "cpu_1-bs1-online-r1").hash != online.hash
    made = (DATASET, first.vae.model_dump(), first.data.size, first.data.flip)
    assert latents_name(*made, 1) == first.data.latents
    assert latents_name(*made, 2) == second.data.latents


def test_the_vaes_precision_is_named_where_it_is_not_the_runs(small_config: Path) -> None:
    said = {}
    for device, run_precision, asked in (
        ("cuda", "bf16", None), ("cuda", "tf32", None), ("cuda", "tf32", "fp32"),
        ("cpu", "fp32", None), ("cpu", "fp32", "bf16"),
    ):  # fmt: skip
        file = "config.yaml" if device == "cuda" else "demo.yaml"
        over = {"vae": {"precision": asked}, "train": {"precision": run_precision}}
        bench = load(ROOT / "config" / file, over)
        ran = spec_of(bench, next(iter(bench.runs(bench.cells))))
        said[device, run_precision, asked] = precision(ran, Words("en"))
        online = spec_of(bench, next(iter(bench.runs([bench.mode_twin(bench.baseline)]))))
        follows = "bf16" if run_precision == "bf16" else "fp32"
        assert online.vae_precision == (asked or follows)
    assert list(said.values()) == [
        "bf16",
        "tf32 (latents: VAE in bf16)",
        "tf32",
        "fp32",
        "fp32 (latents: VAE in bf16)",
    ]


def test_the_vae_computes_in_what_the_config_says(small_config: Path) -> None:
    bench = load(small_config, {"vae": {"precision": "bf16"}})
    plain = load(small_config)
    made = vae_spec(latents_plan(bench).vae, None)
    assert vae.load(made, None, "cpu").dtype == torch.bfloat16
    # The run's own precision does not overrule it in online mode.
    assert vae.load(made, None, "cpu", torch.float32).dtype == torch.bfloat16
    ran = resolve(plan(bench, "cpu_1-bs1-r1"), DATASET, None)
    assert ran.vae == made
    assert ran.data.latents == latents_name(DATASET, made.model_dump(), 16, True)
    assert ran.data.latents != spec_of(plain, "cpu_1-bs1-r1").data.latents
    assert isinstance(ran.vae, VaeSpec)
