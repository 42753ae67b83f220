"""What one video is, and which reader shows it exactly. Runs in guarded children.

The truth is a full sequential decode by PyAV. Each way to reach frames out of order is compared
with it on the frames of a few clips, read as training reads them.
"""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from xdimo.data.intact import (
    NotAVideo,
    messages,
    read_packets,
    require_all_bytes,
    require_all_frames,
    require_all_time,
    require_moving,
    require_one_file,
    require_pictures,
    require_uncut,
)
from xdimo.data.video_reader import (
    DecordReader,
    Index,
    PyavReader,
    Reader,
    Timeline,
    open_stream,
    read_timeline,
    rgb,
)
from xdimo.errors import DataError
from xdimo.files import file_hash

PROVED_CLIPS = 4  # random clips a reader must show exactly, of
CLIP_FRAMES, CLIP_STEP = 16, 3
PROVED_KEYS = 256  # keyframes around which it must show frames exactly


@dataclass(frozen=True)
class Measured:
    """One decodable video."""

    container: str
    codec: str
    width: int
    height: int
    frames: int  # presented
    fps: float | None
    rotation: int  # degrees that a player would turn it by; it is used as it is stored
    index: Index
    clips: list[list[int]]  # frames that prove a reader, and
    checksums: dict[int, int]  # the crc32 of each one's rgb bytes


@dataclass(frozen=True)
class Examined:
    """One file."""

    sha256: str  # "sha256:<hex>"
    size_bytes: int
    video: Measured | str  # or why it is none that can be used


def examine(path: str) -> Examined:
    """Raises OSError where the file's bytes cannot be read."""
    sha256, size_bytes = file_hash(path), os.stat(path).st_size
    if not size_bytes:
        return Examined(sha256, size_bytes, "an empty file")
    try:
        return Examined(sha256, size_bytes, measure(path))
    except (NotAVideo, DataError) as error:
        return Examined(sha256, size_bytes, str(error).removeprefix(f"{path}: "))
    except (av.error.FFmpegError, MemoryError) as error:
        why = getattr(error, "strerror", None) or "it takes more memory than there is"
        return Examined(sha256, size_bytes, f"cannot be read: {why} (damaged or cut off?)")
    except Exception as error:  # whatever a file does to a decoder is said of that file
        return Examined(sha256, size_bytes, f"PyAV: {type(error).__name__}: {error}")


def measure(path: str) -> Measured:
    """Decodes the whole video. Raises DataError or NotAVideo: it is none, damaged or cut off."""
    require_one_file(path)
    container, stream = open_stream(path)
    with container:
        if stream is None:
            raise NotAVideo("no video stream")
        require_pictures(container)
        timeline = read_timeline(container, stream)
        require_uncut(timeline, stream)
        with messages() as read:
            packets = read_packets(path, stream.index)
        require_all_bytes(path, container, packets)
        require_all_time(container, stream, packets)
        kind, brand = container.format.name, container.metadata.get("major_brand", "")
        index, codec, fps = stream.index, stream.codec_context.name, stream.average_rate
    with messages() as said:
        timestamps, checksums, first, interlaced = _decode_all(path, index, said)
    require_moving(kind, brand, len(timestamps))
    # An ASF's demuxer passes over what is damaged, and says so as it reads, before any frame.
    complaints = [*read, *said] if kind == "asf" else said
    require_all_frames(packets, len(timestamps), interlaced, complaints)
    frames = len(timestamps)
    clips = clips_to_prove(frames, [key.before for key in timeline.keys])
    proving = {i: checksums[i] for clip in clips for i in clip}
    return Measured(
        container=kind,
        codec=codec,
        width=first.width,
        height=first.height,
        frames=frames,
        fps=float(fps) if fps else None,
        rotation=first.rotation,
        index=_choose_index(path, timeline, timestamps, clips, proving),
        clips=clips,
        checksums=proving,
    )


def _decode_all(
    path: str, index: int, said: list[Any]
) -> tuple[list[int | None], list[int], av.VideoFrame, bool]:
    """Timestamp and checksum of each frame, the first frame, and whether one is interlaced.

    ``said`` is left with what the decoder said after the first frame: what is before it in the
    file (a cut at its start) may be missed.
    """
    timestamps: list[int | None] = []
    checksums: list[int] = []
    first: av.VideoFrame | None = None
    interlaced = False
    converter = VideoReformatter()
    container, stream = open_stream(path, index)
    with container:
        assert stream is not None
        stream.codec_context.thread_count = 1
        try:
            for frame in container.decode(stream):
                if first is None:
                    first = frame
                    said.clear()
                if frame.is_corrupt:
                    raise NotAVideo(f"frame {len(checksums)} is damaged (a cut-off copy?)")
                if (frame.width, frame.height) != (first.width, first.height):
                    raise NotAVideo(f"frame {len(checksums)} has another size than the first")
                interlaced |= frame.interlaced_frame
                timestamps.append(frame.pts)
                checksums.append(_checksum(rgb(frame, converter)))
        except av.error.FFmpegError as error:
            raise NotAVideo(
                f"frame {len(checksums)} cannot be decoded: {error.strerror} (a cut-off copy?)"
            ) from None
    if first is None:
        raise NotAVideo("no frame")
    return timestamps, checksums, first, interlaced


def clips_to_prove(frames: int, keys: Sequence[int]) -> list[list[int]]:
    """Random clips, both ends of the video, and the surroundings of keyframes (spread evenly)."""
    draw = np.random.default_rng(frames)
    last_start = max(frames - CLIP_FRAMES * CLIP_STEP, 0)
    starts = draw.integers(0, last_start, PROVED_CLIPS, endpoint=True)
    clips = [list(range(s, min(s + CLIP_FRAMES * CLIP_STEP, frames), CLIP_STEP)) for s in starts]
    clips.append([frames - 1, 0])
    spread = sorted(set(keys))[:: len(set(keys)) // PROVED_KEYS + 1]
    for key in reversed(spread):  # backwards: each is reached by a seek
        clips.append([i for i in (key, key + 1, key - 1) if 0 <= i < frames])
    return [[int(i) for i in clip] for clip in clips if clip]


def _choose_index(
    path: str,
    timeline: Timeline,
    timestamps: list[int | None],
    clips: list[list[int]],
    checksums: dict[int, int],
) -> Index:
    """The quickest way to frames that shows what the sequential decode shows."""
    # Frames in any other order than their timestamps' are not found by them.
    if timestamps == timeline.presented and len(set(timestamps)) == len(timestamps):
        candidates: list[Index] = ["timestamps", "order"]
    else:
        candidates = ["order"]
    for index in candidates:
        try:
            reader = PyavReader(path, index, len(timestamps))
            if first_difference(reader, clips, checksums) is None:
                return index
        except DataError:
            continue
    return "start"


def first_difference(
    reader: Reader, clips: list[list[int]], checksums: dict[int, int]
) -> int | None:
    """The first frame that a reader shows otherwise; None where it shows all exactly.

    Exactly means bit for bit. Measured with decord 0.6.0 and PyAV 18 on 19 real files (h264, hevc,
    vp8; 176x144 to 1280x720): where decord showed the right frame the difference was 0, while
    neighbouring frames of a talking head differed by as little as 0.02 grey levels on average. So
    a tolerance would buy nothing and could let a wrong frame pass.
    """
    for clip in clips:
        for i, picture in zip(clip, reader.frames(clip), strict=True):
            if _checksum(picture) != checksums[i]:
                return i
    return None


def _checksum(picture: NDArray[np.uint8]) -> int:
    return zlib.crc32(picture.data)


def why_not_decord(
    path: str | Path, frames: int, clips: list[list[int]], checksums: dict[int, int]
) -> str | None:
    """None where decord shows the video exactly, else what it does otherwise."""
    try:
        different = first_difference(DecordReader(path, frames), clips, checksums)
    except ImportError:
        return "decord is not installed"
    except DataError as error:
        return str(error).removeprefix(f"{path}: ")
    return None if different is None else f"decord shows another picture as frame {different}"
