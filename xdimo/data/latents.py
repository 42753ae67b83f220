"""Cached latents: the VAE's posterior of every frame, a shard a video, named by content."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from xdimo.config.load import parse
from xdimo.config.schema import Strict
from xdimo.data.manifest import Video
from xdimo.data.manifest import read as read_manifest
from xdimo.data.progress import progress
from xdimo.data.video_reader import open_video
from xdimo.errors import DataError, UserError
from xdimo.files import file_hash, read_json, whole, write_json
from xdimo.spec import TRANSFORM, Part, VaeSpec, dataset_of, latents_name

if TYPE_CHECKING:  # the index can be read without torch
    import torch


# Frames: compiling takes half a minute and makes an H100 encode 1,500 a second instead of 500.
WORTH_COMPILING = 25_000


class Shard(Strict):
    """Tensors ``mean`` and ``std``, float16 [flips, frames, c, h, w]; flip 1 is mirrored."""

    video: str  # "sha256:<hex>" of the video
    file: str
    sha256: str  # "sha256:<hex>" of the shard
    frames: int


class LatentsIndex(Part):
    schema_version: Literal[1] = Field(alias="schema")
    name: str  # content: dataset, VAE and transform
    dataset: str
    vae: VaeSpec
    size: int  # pixels
    flip: bool  # both flips are there
    dtype: Literal["float16"]
    folder: str  # of the shards, beside the index
    shards: list[Shard]  # in the dataset's order
    transform: int = 1
    precision: str | None = None  # what the VAE computed in; None: made before it was recorded


def build(
    manifest: Path,
    videos: Path,
    vae: VaeSpec,
    weights: Path | None,
    output: Path,
    *,
    size: int,
    flip: bool,
    batch_frames: int,
    device: str | None,
) -> LatentsIndex:
    """Encodes every frame of every usable video and writes the index ``output``.

    ``weights``: the VAE's weights file, None for a random VAE. ``size``: pixels, a multiple of the
    VAE's factor. ``device``: None for a GPU where there is one. Shards of an interrupted run whose
    bytes are whole are kept. Raises UserError (a full disk too) and DataError.
    """
    import torch

    from xdimo.data.vae import load

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "latents are encoded on a GPU (device: cuda) and this machine has none that torch can "
            "use; where the queue has them: snakemake --profile profiles/lsf ..."
        )
    known = read_manifest(manifest)
    usable = known.clips_order()
    name = latents_name(known.dataset, vae.model_dump(), size, flip)
    folder = output.parent / name.removeprefix("sha256:")[:16]
    print(f"VAE {vae.id}, {size} pixels, on {device}: latents {name}")
    shards = {v.path: shard for v in usable if (shard := _kept(folder, v)) is not None}
    missing = [video for video in usable if video.path not in shards]
    left = sum(video.frames or 0 for video in missing) * (2 if flip else 1)
    compiled = device == "cuda" and left > WORTH_COMPILING
    model = load(vae, weights, device, compiled=compiled) if missing else None
    done = sum(shard.frames for shard in shards.values())
    total = sum(video.frames or 0 for video in usable)
    with progress(total, done, "frame", "encoding") as bar:
        for video in missing:
            tensors = _posterior(model, videos, video, size, flip, batch_frames, bar.update)
            try:
                shards[video.path] = _write(folder, video, tensors)
            except OSError as error:
                raise UserError(
                    f"{folder}: {error.strerror}; latents of {len(shards)} of {len(usable)} videos "
                    "are there, and running it again goes on from them"
                ) from None
    index = LatentsIndex(
        schema=1,
        name=name,
        dataset=known.dataset,
        vae=vae,
        size=size,
        flip=flip,
        dtype="float16",
        folder=folder.name,
        shards=[shards[video.path] for video in usable],
        transform=TRANSFORM,
        precision=vae.precision or ("bf16" if device == "cuda" else "fp32"),
    )
    write_json(output, index.model_dump(by_alias=True))
    return index


def _posterior(
    vae: Any,
    videos: Path,
    video: Video,
    size: int,
    flip: bool,
    batch_frames: int,
    advance: Callable[[int], Any],
) -> "dict[str, torch.Tensor]":
    """``mean`` and ``std``, float16 [flips, frames, c, h, w] on the CPU."""
    import torch

    from xdimo.data.transform import mirrored, resized
    from xdimo.data.vae import encode

    flips: list[list[Any]] = [[], []] if flip else [[]]
    for frames in _ahead(_batches(videos, video, batch_frames)):
        count = len(frames)
        if vae.device.type == "cuda" and count < batch_frames:
            # One batch shape for all: another one would be compiled anew.
            frames = torch.cat([frames, frames[-1:].expand(batch_frames - count, -1, -1, -1)])
        pixels = resized(frames.to(vae.device), size)
        for mirror, encoded in enumerate(flips):
            moments = torch.stack(encode(vae, mirrored(pixels) if mirror else pixels))
            encoded.append(moments[:, :count].half().cpu())
        advance(count)
    moments = torch.stack([torch.cat(encoded, dim=1) for encoded in flips], dim=1)
    if not moments.isfinite().all():
        raise DataError(f"{video.path}: its latents do not fit float16 (VAE weights damaged?)")
    mean, std = moments
    return {"mean": mean.contiguous(), "std": std.contiguous()}


def _batches(videos: Path, video: Video, batch_frames: int) -> "Iterator[torch.Tensor]":
    """All frames in order, uint8 [n, 3, height, width]. Raises DataError."""
    import torch

    path = video.file(videos)
    check_unchanged(path, video)
    assert video.decoder and video.index and video.frames
    reader = open_video(path, decoder=video.decoder, index=video.index, frames=video.frames)
    for start in range(0, video.frames, batch_frames):
        frames = reader.frames(range(start, min(start + batch_frames, video.frames)))
        yield torch.from_numpy(frames).permute(0, 3, 1, 2)


def check_unchanged(path: Path, video: Video) -> None:
    """Raises DataError where a video's bytes are not those of the manifest."""
    try:
        found = file_hash(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if found != video.sha256:
        raise DataError(
            f"{path}: its bytes changed since the manifest was made; make it again: "
            "snakemake -f manifest"
        )


def _ahead(batches: "Iterator[torch.Tensor]") -> "Iterator[torch.Tensor]":
    """The same, one batch decoded while the one before is encoded."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _write(folder: Path, video: Video, tensors: "dict[str, torch.Tensor]") -> Shard:
    from safetensors.torch import save

    assert video.sha256 and video.frames
    path = folder / _file(video)
    with whole(path) as partial:
        partial.write_bytes(save(tensors))
        shard = Shard(
            video=video.sha256, file=path.name, sha256=file_hash(partial), frames=video.frames
        )
    # Beside it, what a later run needs to trust it.
    write_json(path.with_suffix(".json"), shard.model_dump())
    return shard


def _kept(folder: Path, video: Video) -> Shard | None:
    """The shard an earlier run left, where its bytes are still those it wrote."""
    path = folder / _file(video)
    try:
        shard = parse(Shard, read_json(path.with_suffix(".json")))
        whole_still = shard.sha256 == file_hash(path)
    except (UserError, OSError):
        return None
    return shard if whole_still and shard.video == video.sha256 else None


def _file(video: Video) -> str:
    assert video.sha256
    return f"{video.sha256.removeprefix('sha256:')}.safetensors"


class LatentsReader:
    """Slices of the shards. Files are opened where they are first read: in a loader's worker."""

    def __init__(self, index: LatentsIndex, folder: Path) -> None:
        self.index, self._folder = index, folder
        self._open: dict[int, Any] = {}

    @property
    def frames(self) -> list[int]:
        """Frames of each video, in the dataset's order."""
        return [shard.frames for shard in self.index.shards]

    def read(
        self, video: int, start: int, stop: int, flip: bool
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        """Mean and std of frames [start, stop), float16 [n, c, h, w] each."""
        if video not in self._open:
            self._open[video] = self._shard(video)
        shard = self._open[video]
        mean, std = (shard.get_slice(key)[int(flip), start:stop] for key in ("mean", "std"))
        return mean, std

    def _shard(self, video: int) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self._folder / self.index.shards[video].file
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from None

    def verify(self, video: int) -> None:
        """Raises DataError where a shard's bytes or shape are not what the index says."""
        shard = self.index.shards[video]
        path = self._folder / shard.file
        try:
            found = file_hash(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if found != shard.sha256:
            raise DataError(
                f"{path}: {found}, but the index says {shard.sha256}; make it again: "
                "snakemake -f latents, and then measure again: snakemake -f and the cell's name"
            )
        vae = self.index.vae
        side = self.index.size // 2 ** (len(vae.block_out_channels) - 1)
        expected = [1 + self.index.flip, shard.frames, vae.latent_channels, side, side]
        opened = self._shard(video)
        for key in ("mean", "std"):
            shape = opened.get_slice(key).get_shape() if key in opened.keys() else "missing"  # noqa: SIM118
            if shape != expected:
                raise DataError(f"{path}: {key}: {shape}, expected {expected}")


def read_index(path: Path) -> LatentsIndex:
    """Raises UserError that names the file, and DataError where its shards are not its dataset."""
    try:
        index = parse(LatentsIndex, read_json(path))
    except UserError as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}: "
        raise UserError(f"{prefix}{error}") from None
    videos = [shard.video for shard in index.shards]
    of = dataset_of((shard.video, shard.frames) for shard in index.shards)
    if of != index.dataset or videos != sorted(videos):
        raise DataError(
            f"{path}: its {len(videos)} shards are not the videos of the dataset it names, in "
            "their order; make it again: snakemake -f latents"
        )
    return index


def open_latents(path: Path, expected_name: str, *, rank: int, world: int) -> LatentsReader:
    """Latents of the name the spec gives. Each rank verifies every ``world``-th shard's hash.

    Raises DataError that names the index or the shard, and UserError.
    """
    index = read_index(path)
    made_with = index.vae.model_dump(), index.size, index.flip, index.transform
    name = latents_name(index.dataset, *made_with)
    if index.name != expected_name or name != expected_name:
        raise DataError(f"{path}: latents {index.name}, but the spec's are {expected_name}")
    reader = LatentsReader(index, path.parent / index.folder)
    for video in range(rank, len(index.shards), world):
        reader.verify(video)
    return reader
