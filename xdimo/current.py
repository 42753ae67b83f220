"""Whether what lies there is what the config asks for now, by content: files' times say nothing.

The workflow asks this of each file, and makes again what is not current.
"""

import os
from functools import cache
from pathlib import Path

from safetensors import SafetensorError, safe_open

from xdimo.config.load import parse
from xdimo.config.schema import Bench, Dataset, Hardware
from xdimo.data import videos
from xdimo.data.vae import locate
from xdimo.errors import UserError
from xdimo.files import content_hash, file_hash, read_json
from xdimo.spec import (
    RunSpec,
    choice_path,
    choice_plan,
    chosen_in,
    dataset_in,
    dataset_of,
    filled,
    latents_name,
    plan,
    read_spec,
    shape,
    weights_like,
)

# What metrics.json repeats of the run.json it was derived from.
_REPEATED = ("spec", "outcome", "reason", "attempt", "log_sha256")
_UNREADABLE = (UserError, AttributeError, KeyError, TypeError, ValueError, OSError)


def receipt(dataset: Dataset) -> Path:
    """Beside fetched videos: hash and stamp of each as it was put there."""
    return Path(dataset.videos) / ".fetched"


def fetched(dataset: Dataset) -> bool:
    """Whether the fetched videos are there with the bytes that the receipt tells.

    True where nothing tells: without a receipt, and with one of an earlier version, which names
    what asked for them alone.
    """
    there, folder = receipt(dataset), Path(dataset.videos)
    if not there.exists():
        return True
    asked = content_hash(dataset.model_dump(include={"fetch"}))
    try:
        if there.read_text(encoding="utf-8") == asked:
            return all((folder / name).exists() for name in dataset.fetched)
        told = read_json(there)
        return all(_as_told(folder / name, **told[name]) for name in dataset.fetched)
    except _UNREADABLE:
        return False


def _as_told(path: Path, *, sha256: str, stamp: list[int]) -> bool:
    return path.is_file() and (videos.stamp(path) == stamp or file_hash(path) == sha256)


def latents(bench: Bench, index: Path, manifest: Path) -> bool:
    """Whether the index names latents of this dataset, VAE and transform, and its shards are all
    there and of the sizes that they tell; what is read of them is their headers.

    What is not known here, a dataset without manifest or a VAE without weights, counts as the same.
    """
    try:
        found = read_json(index)
        dataset = _dataset(manifest) or found["dataset"]
        vae = {"id": _vae_id(bench) or weights_like(found["vae"]["id"]), **shape(bench.vae)}
        asked = latents_name(dataset, vae, bench.clips.size, bench.clips.flip)
        of = dataset_of((shard["video"], shard["frames"]) for shard in found["shards"])
        shards = [index.parent / found["folder"] / shard["file"] for shard in found["shards"]]
    except _UNREADABLE:
        return False
    return bool(found["name"] == asked and of == found["dataset"] and all(map(_whole, shards)))


def _whole(shard: Path) -> bool:
    try:
        safe_open(shard, framework="np")
    except (SafetensorError, OSError):
        return False
    return True


def choice(bench: Bench, target: str) -> bool:
    """Whether what was chosen for a target was timed as the config says, at all its batches."""
    asked = choice_plan(bench, target)
    try:
        found = read_json(choice_path(Path(bench.runs_folder), target))
        timed = {int(clips) for clips in found["variants"]}
        # Choices of earlier versions do not name their plan.
        alike = [found[key] == asked.run[key] for key in ("campaign", "target", "precision")]
        alike += [found.get("plan", asked.hash) == asked.hash]
    except _UNREADABLE:
        return False
    return all(alike) and timed >= set(asked.clips_per_gpu)


def spec_hash(bench: Bench, run: str, manifest: Path) -> str | None:
    """Of the spec that config and data ask for. None: a part of it is not known here.

    A dataset without manifest, a VAE whose weights lie elsewhere and an implementation that has not
    been chosen yet are those of the spec that lies there.
    """
    planned, folder = plan(bench, run), Path(bench.runs_folder)
    own = _spec(folder / run)
    implementation = planned["implementation"]
    target, clips = planned["target"], planned["clips_per_gpu"]
    if implementation is None and choice(bench, target):
        implementation = chosen_in(choice_path(folder, target), clips)
    parts = (
        _dataset(manifest) or (own and own.data.dataset),
        _vae_id(bench) or (own and weights_like(own.vae.id)),
        implementation or (own and own.implementation),
    )
    if None in parts:
        return None
    return parse(RunSpec, filled(planned, *parts)).hash  # type: ignore[arg-type]


def spec(bench: Bench, run: str, manifest: Path) -> bool:
    """Whether the spec that lies there is the one that is asked for."""
    own = _spec(Path(bench.runs_folder) / run)
    return own is not None and own.hash == spec_hash(bench, run, manifest)


def measured(bench: Bench, run: str, manifest: Path) -> bool:
    """Whether a run has ended that is of the spec asked for, as far as that is known, and its log
    is there.
    """
    folder = Path(bench.runs_folder) / run
    if not (folder / "run.json").exists():
        return False
    asked = spec_hash(bench, run, manifest)
    try:
        ran = read_json(folder / "run.json")
        return asked in (None, ran["spec"]) and (folder / (ran["log"] or "")).exists()
    except _UNREADABLE:
        # It cannot be read, which its row says; the spec beside it tells what it was of.
        return spec(bench, run, manifest)


def metrics(folder: Path, hardware: Hardware) -> bool:
    """Whether metrics.json was derived from the run.json beside it, with these peaks."""
    try:
        run, found = read_json(folder / "run.json"), read_json(folder / "metrics.json")
        same = all(run[key] == found[key] for key in _REPEATED)
        return same and found.get("hardware") == content_hash(hardware.model_dump())
    except _UNREADABLE:
        return False


def other_videos(bench: Bench, manifest: Path) -> str | None:
    """What is wrong where the folder of videos is not here, and the manifest is of another one."""
    videos = bench.dataset.videos
    try:
        folder = read_json(manifest)["folder"]
    except _UNREADABLE:
        return None
    if bench.dataset.fetched or os.path.lexists(videos) or Path(folder) == Path(videos):
        return None
    return f"dataset.videos: {videos}: no such folder; {manifest} is of {folder}"


def require_sources(bench: Bench, manifest: Path) -> None:
    """Raises UserError where runs cannot be of the videos or the weights that the config names."""
    if wrong := other_videos(bench, manifest):
        raise UserError(f"{wrong}; nothing is trained on that instead")
    if not bench.vae.random:
        locate(Path(bench.vae.weights))


def _spec(folder: Path) -> RunSpec | None:
    try:
        return read_spec(folder / "spec.json")
    except _UNREADABLE:
        return None


def _dataset(manifest: Path) -> str | None:
    try:
        return dataset_in(manifest)
    except _UNREADABLE:
        return None


def _vae_id(bench: Bench) -> str | None:
    if bench.vae.random:
        return f"random:{bench.vae.seed}"
    return _weights_hash(bench.vae.weights)


@cache
def _weights_hash(folder: str) -> str | None:
    """None where the weights do not lie on this machine. A third of a second for 335 MB."""
    try:
        return file_hash(locate(Path(folder))[1])
    except _UNREADABLE:
        return None
