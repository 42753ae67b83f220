"""Which clip a rank trains on at which step, and its frames or latents.

The videos are one endless stream: epoch after epoch, each in an order of its own. A step takes the
next global batch of it, and a rank its part of that. Every draw depends on (seed, epoch, index)
alone, so neither the number of workers nor that of ranks changes what a clip is.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from xdimo.data.latents import LatentsReader, open_latents
from xdimo.data.manifest import Manifest, Video
from xdimo.data.manifest import read as read_manifest
from xdimo.data.transform import mirrored, resized
from xdimo.data.vae import encode
from xdimo.data.video_reader import Reader, open_video
from xdimo.errors import DataError, UserError
from xdimo.spec import RunSpec

ORDER, CLIP = 0, 1  # separate the two kinds of draws made from one seed
OPEN_READERS = 32  # a worker, least recently used closed first


def offsets(frames: int, interval: int) -> list[int]:
    """Frames of a clip from its start: evenly over the window, both ends in it, rounded down.

    16 frames at interval 3: 0 3 6 9 12 15 18 21 25 28 31 34 37 40 43 47.
    """
    return [int(i) for i in np.linspace(0, frames * interval - 1, frames).astype(int)]


def draw(
    seed: int, epoch: int, index: int, video_frames: int, window: int, flip: bool
) -> tuple[int, bool]:
    """Start of the clip, uniform in 0..video_frames - window, and whether it is mirrored.

    The public pipeline never draws the last start, so it needs one frame more.
    """
    random = np.random.default_rng([seed, CLIP, epoch, index])
    start = int(random.integers(0, video_frames - window, endpoint=True))
    return start, flip and bool(random.random() < 0.5)


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, dataset_size: int) -> NDArray[np.int64]:
    """The videos' order in an epoch."""
    return np.random.default_rng([seed, ORDER, epoch]).permutation(dataset_size)


def batch(
    seed: int, dataset_size: int, step: int, rank: int, clips_per_gpu: int, gpus: int
) -> list[tuple[int, int]]:
    """(epoch, index of the video) of each clip that ``rank`` takes in ``step`` (from 0)."""
    first = (step * gpus + rank) * clips_per_gpu
    places = (divmod(p, dataset_size) for p in range(first, first + clips_per_gpu))
    return [(epoch, int(permutation(seed, epoch, dataset_size)[place])) for epoch, place in places]


class _Clips(Dataset[dict[str, Any]], ABC):
    """One item a step: a rank's whole batch, with the epoch of its first clip.

    ``content``: hash of the videos. ``vae``: id of what made the latents; None where none are read.
    """

    content: str
    vae: str | None = None

    def __init__(self, frames: list[int], spec: RunSpec, rank: int, first_step: int, steps: int):
        self._spec, self._rank, self._first_step, self._steps = spec, rank, first_step, steps
        self._frames = frames  # of each video, in the dataset's order
        self._window = spec.data.frames * spec.data.interval
        self._offsets = offsets(spec.data.frames, spec.data.interval)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, item: int) -> dict[str, Any]:
        if not 0 <= item < self._steps:
            raise IndexError(item)
        spec = self._spec
        places = batch(
            spec.seed,
            len(self._frames),
            self._first_step + item,
            self._rank,
            spec.clips_per_gpu,
            spec.gpus,
        )
        clips = [
            self._clip(
                index,
                *draw(spec.seed, epoch, index, self._frames[index], self._window, spec.data.flip),
            )
            for epoch, index in places
        ]
        tensors = {key: torch.stack([clip[key] for clip in clips]) for key in clips[0]}
        return {"epoch": places[0][0], **tensors}

    @abstractmethod
    def _clip(self, index: int, start: int, flip: bool) -> dict[str, Tensor]:
        """One clip of video ``index`` from frame ``start`` on, flipped or not."""


class CachedClips(_Clips):
    """``mean`` and ``std``, float16 [clips, frames, c, h, w]."""

    def __init__(self, latents: LatentsReader, *arguments: Any) -> None:
        super().__init__(latents.frames, *arguments)
        self._latents = latents
        self.content, self.vae = latents.index.dataset, latents.index.vae.id

    def _clip(self, index: int, start: int, flip: bool) -> dict[str, Tensor]:
        mean, std = self._latents.read(index, start, start + self._window, flip)
        return {"mean": mean[self._offsets], "std": std[self._offsets]}


class OnlineClips(_Clips):
    """``frames``, uint8 [clips, frames, 3, size, size]."""

    def __init__(self, folder: Path, manifest: Manifest, *arguments: Any) -> None:
        self._folder, self._videos = folder, manifest.clips_order()
        super().__init__([video.frames or 0 for video in self._videos], *arguments)
        self.content = manifest.dataset
        self._readers: OrderedDict[int, Reader] = OrderedDict()

    def _clip(self, index: int, start: int, flip: bool) -> dict[str, Tensor]:
        frames = self._reader(index).frames([start + offset for offset in self._offsets])
        pixels = resized(torch.from_numpy(frames).permute(0, 3, 1, 2), self._spec.data.size)
        return {"frames": (mirrored(pixels) if flip else pixels).contiguous()}

    def _reader(self, index: int) -> Reader:
        if index not in self._readers:
            self._readers[index] = self._open(self._videos[index])
            if len(self._readers) > OPEN_READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(index)
        return self._readers[index]

    def _open(self, video: Video) -> Reader:
        path = video.file(self._folder)
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        if size_bytes != video.size_bytes:
            raise DataError(
                f"{path}: {size_bytes} bytes, but the manifest says {video.size_bytes}; make it "
                "again: snakemake -f manifest"
            )
        assert video.decoder and video.index and video.frames
        return open_video(path, decoder=video.decoder, index=video.index, frames=video.frames)


def loader(
    spec: RunSpec, *, rank: int, first_step: int, steps: int, data: Path, videos: Path | None
) -> "DataLoader[dict[str, Any]]":
    """One dict a step: CachedClips' or OnlineClips' tensors, and ``epoch``.

    ``first_step``: steps already done. ``data``: the index of cached latents, or in online mode the
    manifest (then with ``videos``, the folder). Raises DataError where they are not the data the
    spec names, UserError where ``videos`` is missing.
    """
    dataset: _Clips
    if spec.data.mode == "cached":
        assert spec.data.latents
        latents = open_latents(data, spec.data.latents, rank=rank, world=spec.gpus)
        dataset = CachedClips(latents, spec, rank, first_step, steps)
    else:
        manifest = read_manifest(data)
        if manifest.dataset != spec.data.dataset:
            raise DataError(
                f"{data}: dataset {manifest.dataset}, but the spec's is {spec.data.dataset}"
            )
        if videos is None:
            raise UserError(f"run {spec.run}: online latents need the folder of videos")
        dataset = OnlineClips(videos, manifest, spec, rank, first_step, steps)
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=spec.workers,
        pin_memory=spec.device == "cuda",
        generator=torch.Generator(),  # its own, so that a run's draws do not move
    )


def to_latents(
    loaded: dict[str, Any], vae: Any, scaling_factor: float, generator: torch.Generator
) -> Tensor:
    """Samples the posterior anew: float32 [clips, frames, c, h, w] on the generator's device.

    ``loaded``: one item of the loader. ``vae``: encodes its frames; None for cached latents.
    """
    device = generator.device
    if "frames" in loaded:
        frames = loaded["frames"].to(device, non_blocking=True)
        clip = frames.shape[:2]
        mean, std = (x.view(*clip, *x.shape[1:]) for x in encode(vae, frames.flatten(0, 1)))
    else:
        mean, std = (loaded[key].to(device, non_blocking=True).float() for key in ("mean", "std"))
    noise = torch.randn(mean.shape, generator=generator, device=device)
    latents: Tensor = (mean + std * noise) * scaling_factor
    return latents
