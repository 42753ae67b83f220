"""What lies there is current where its content is what the config asks for now."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import DATASET, spec_of
from xdimo import current
from xdimo.config.load import load_hardware, parse
from xdimo.config.schema import Bench, Vae
from xdimo.errors import UserError
from xdimo.files import content_hash, write_json
from xdimo.spec import RunSpec, choice_plan, dataset_of, latents_name, shape

RUN = "cpu_1-bs1-r1"
SHARD = {"file": "a.safetensors", "video": "sha256:1", "frames": 3}


@pytest.fixture
def bench(small_bench: Bench, tmp_path: Path) -> Bench:
    return small_bench.model_copy(update={"results": str(tmp_path / "results")})


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    write_json(tmp_path / "manifest.json", {"dataset": DATASET})
    return tmp_path / "manifest.json"


def _with(bench: Bench, section: str, **values: Any) -> Bench:
    changed = getattr(bench, section).model_copy(update=values)
    return bench.model_copy(update={section: changed})


def _measured(bench: Bench) -> Path:
    spec, folder = spec_of(bench, RUN), Path(bench.runs_folder) / RUN
    write_json(folder / "spec.json", spec.to_json())
    write_json(folder / "run.json", {"spec": spec.hash, "log": "log.jsonl"})
    (folder / "log.jsonl").touch()
    return folder


def test_a_run_is_of_the_content_asked_for(bench: Bench, manifest: Path) -> None:
    assert not current.measured(bench, RUN, manifest)
    folder = _measured(bench)
    assert current.spec(bench, RUN, manifest)
    assert current.measured(bench, RUN, manifest)
    assert not current.measured(_with(bench, "train", timed_steps=9), RUN, manifest)
    assert current.measured(bench.model_copy(update={"title": "Another"}), RUN, manifest)
    (folder / "spec.json").unlink()
    assert not current.spec(bench, RUN, manifest)
    assert current.measured(bench, RUN, manifest)
    (folder / "log.jsonl").rename(folder / "elsewhere")
    assert not current.measured(bench, RUN, manifest)
    (folder / "elsewhere").rename(folder / "log.jsonl")
    write_json(manifest, {"dataset": "sha256:" + "1" * 64})
    assert not current.measured(bench, RUN, manifest)


@pytest.mark.parametrize("garbled", ["", "[]", "{}", '{"dataset": 1'])
def test_what_is_not_known_is_as_it_was(bench: Bench, manifest: Path, garbled: str) -> None:
    folder = _measured(bench)
    manifest.write_text(garbled)
    assert current.measured(bench, RUN, manifest)
    # A run.json that cannot be read is refused in its row; nothing is trained over it.
    (folder / "run.json").write_text(garbled)
    assert current.measured(bench, RUN, manifest)


def test_weights_of_other_bytes_are_another_vae(
    bench: Bench, manifest: Path, tmp_path: Path
) -> None:
    for number, weights in enumerate(("one", "two")):
        folder = tmp_path / str(number)
        write_json(folder / "config.json", {"_class_name": "AutoencoderKL"})
        (folder / "diffusion_pytorch_model.safetensors").write_text(weights)
    mine = _with(bench, "vae", weights=str(tmp_path / "0"))
    hashes = {
        name: current.spec_hash(_with(bench, "vae", weights=str(tmp_path / name)), RUN, manifest)
        for name in ("0", "1", "none")
    }
    assert hashes["none"] is None  # not known on this machine
    assert len(set(hashes.values())) == 3
    assert current.spec_hash(mine, RUN, manifest) == hashes["0"]


def test_weights_that_are_not_here_are_those_that_ran_and_never_random_ones(
    bench: Bench, manifest: Path
) -> None:
    elsewhere, folder = _with(bench, "vae", weights="models/typo"), _measured(bench)
    assert not current.measured(elsewhere, RUN, manifest)
    assert not current.spec(elsewhere, RUN, manifest)
    spec = json.loads((folder / "spec.json").read_text())
    vae, data = spec["vae"] | {"id": "sha256:weights"}, spec["data"]
    latents = latents_name(DATASET, vae, data["size"], data["flip"])
    ran = parse(RunSpec, {**spec, "vae": vae, "data": data | {"latents": latents}})
    write_json(folder / "spec.json", ran.to_json())
    write_json(folder / "run.json", {"spec": ran.hash, "log": "log.jsonl"})
    assert current.measured(elsewhere, RUN, manifest)
    assert not current.measured(bench, RUN, manifest)
    with pytest.raises(UserError, match=r"vae\.weights: models/typo: no such folder"):
        current.require_sources(elsewhere, manifest)


def test_videos_that_are_not_here_are_those_of_the_manifest(
    bench: Bench, manifest: Path, tmp_path: Path
) -> None:
    asked = _with(bench, "dataset", videos="vidoes")
    current.require_sources(asked, manifest)  # this manifest names no folder
    write_json(manifest, {"dataset": DATASET, "folder": "vidoes"})
    current.require_sources(asked, manifest)
    assert current.other_videos(asked, manifest) is None
    write_json(manifest, {"dataset": DATASET, "folder": "videos"})
    said = rf"dataset\.videos: vidoes: no such folder; {manifest} is of videos"
    with pytest.raises(UserError, match=said):
        current.require_sources(asked, manifest)
    assert current.other_videos(_with(bench, "dataset", videos=str(tmp_path)), manifest) is None


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"name": "sha256:" + "0" * 64}, False),
        ({"shards": [{**SHARD, "file": "gone.safetensors"}]}, False),
        ({"shards": []}, False),
        ({"shards": [SHARD, {**SHARD, "video": "sha256:2"}]}, False),
        ({"shards": None}, False),
    ],
)
def test_latents_are_of_the_dataset_and_whole(
    bench: Bench, manifest: Path, tmp_path: Path, change: dict[str, Any], expected: bool
) -> None:
    vae = {"id": "random:0", **shape(Vae(**bench.vae.model_dump()))}
    dataset = dataset_of([("sha256:1", 3)])
    write_json(manifest, {"dataset": dataset})
    name = latents_name(dataset, vae, bench.clips.size, bench.clips.flip)
    shard = tmp_path / "shards/a.safetensors"
    shard.parent.mkdir()
    save_file({"mean": np.zeros(3, np.float16)}, shard)
    index = {"name": name, "folder": "shards", "shards": [SHARD]}
    index |= {"dataset": dataset, "vae": vae}
    write_json(tmp_path / "index.json", index | change)
    assert current.latents(bench, tmp_path / "index.json", manifest) == expected
    for other in ({"seed": 1}, {"weights": "models/typo"}):
        assert not current.latents(_with(bench, "vae", **other), tmp_path / "index.json", manifest)
    content = shard.read_bytes()
    for damaged in (b"", content[:4], content[:-1], content + b"!"):
        shard.write_bytes(damaged)
        assert not current.latents(bench, tmp_path / "index.json", manifest)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"plan": None}, False),
        ({"campaign": "another"}, False),
        ({"target": "cpu_2"}, False),
        ({"variants": {"1": {}}}, False),
        ({"variants": []}, False),
    ],
)
def test_a_choice_is_of_the_plan_asked_for(
    bench: Bench, change: dict[str, Any], expected: bool
) -> None:
    auto = _with(bench, "train", implementation="auto")
    plan = choice_plan(auto, "cpu_1")
    choice = {"plan": plan.hash, "variants": {"1": {}, "2": {}, "4": {}}}
    choice |= {key: plan.run[key] for key in ("campaign", "target", "precision")}
    path = Path(auto.runs_folder) / "choice-cpu_1.json"
    write_json(path, choice | change)
    assert current.choice(auto, "cpu_1") == expected
    assert not current.choice(_with(auto, "train", precision="bf16"), "cpu_1")
    # A seed or another baseline decides nothing; choices of earlier versions name no plan.
    assert current.choice(_with(auto, "train", seed=1), "cpu_1") == expected
    path.write_text(json.dumps({key: value for key, value in choice.items() if key != "plan"}))
    assert current.choice(auto, "cpu_1")


def test_metrics_are_of_their_run_and_of_these_peaks(bench: Bench, tmp_path: Path) -> None:
    hardware = load_hardware(bench.hardware)
    run = {"spec": "s", "outcome": "ok", "reason": None, "attempt": 1, "log_sha256": "l"}
    made = {**run, "hardware": content_hash(hardware.model_dump())}
    write_json(tmp_path / "run.json", run)
    write_json(tmp_path / "metrics.json", made)
    assert current.metrics(tmp_path, hardware)
    for change in ({"attempt": 2}, {"log_sha256": "m"}, {"hardware": "h"}):
        write_json(tmp_path / "metrics.json", made | change)
        assert not current.metrics(tmp_path, hardware)


def test_fetched_videos_are_of_the_packages_asked_for(bench: Bench, tmp_path: Path) -> None:
    dataset = bench.dataset.model_copy(update={"videos": str(tmp_path)})
    assert current.fetched(dataset)
    (tmp_path / ".fetched").write_text("sha256:another")
    assert not current.fetched(dataset)
