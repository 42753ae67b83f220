"""Exact frames of a video by index, as rgb arrays in the orientation they are stored in.

Where timestamps lie (H.264 with B-frames in AVI) a frame is found by its order instead; which of
the two a video needs, and whether decord may read it, is proved once per video: xdimo.data.probe.
"""

import os
import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream
from numpy.typing import NDArray

from xdimo.errors import DataError

Decoder = Literal["decord", "pyav"]
# How PyAV finds a frame: by its timestamp from the keyframe before it, by counting from that
# keyframe, or by counting from the first packet.
Index = Literal["timestamps", "order", "start"]
Frames = NDArray[np.uint8]  # [n, height, width, 3], rgb
FILES_ONLY = {"protocol_whitelist": "file"}  # FFmpeg reads nothing from a network
PacketId = tuple[int | None, int | None, int | None]  # position in the file, dts, pts


class Reader(Protocol):
    def __len__(self) -> int:
        """Presented frames."""

    def frames(self, indices: Sequence[int]) -> Frames:
        """[n, height, width, 3] rgb, in the order asked for. Raises DataError."""


def open_video(path: str | Path, *, decoder: Decoder, index: Index, frames: int) -> Reader:
    """A reader as the manifest's row says. Raises DataError where the file is another one.

    Open it in the process that reads: a reader does not survive a fork.
    """
    if decoder == "decord":
        return DecordReader(path, frames)
    return PyavReader(path, index, frames)


def open_container(path: str | Path) -> InputContainer:
    """Raises DataError where FFmpeg cannot open it."""
    try:
        # As a path from the root, no name is taken for an address.
        return av.open(os.path.abspath(path), metadata_errors="replace", options=FILES_ONLY)
    except (OSError, av.error.FFmpegError) as error:
        raise DataError(f"{path}: cannot be opened: {error.strerror}") from None


def open_stream(
    path: str | Path, index: int | None = None
) -> tuple[InputContainer, VideoStream | None]:
    """The file and its stream of moving pictures (an audio file's cover is none), or None.

    Of several it is the one of most packets, or ``index`` where that is known. Raises DataError.
    """
    container = open_container(path)
    cover = av.stream.Disposition.attached_pic
    moving = [s for s in container.streams.video if not s.disposition & cover]
    if index is None and len(moving) > 1:
        packets = Counter(packet.stream_index for packet in container.demux(moving) if packet.size)
        longest = max((stream.index for stream in moving), key=lambda i: packets[i])
        container.close()
        return open_stream(path, longest)
    return container, next((s for s in moving if index in (None, s.index)), None)


@dataclass(frozen=True)
class Key:
    """A keyframe's packet, from which decoding can start."""

    id: PacketId
    timestamp: int
    before: int  # presented packets before it in the file


@dataclass(frozen=True)
class Timeline:
    """What one pass over the packets tells, with nothing decoded. Times in the stream's units."""

    timestamps: list[int | None]  # of presented packets, in file order
    keys: list[Key]
    packets: int  # presented or not
    dts_span: int | None  # from the first packet to the last
    damaged: bool  # a packet is cut off

    @cached_property
    def presented(self) -> list[int] | None:
        """Presentation timestamps in order; None where a packet has none."""
        known = [t for t in self.timestamps if t is not None]
        return sorted(known) if len(known) == len(self.timestamps) else None


def read_timeline(container: InputContainer, stream: VideoStream) -> Timeline:
    """Demuxes the whole stream. Packets that an edit list discards are not presented."""
    timestamps: list[int | None] = []
    keys: list[Key] = []
    packets, damaged = 0, False
    decoding: list[int] = []
    for packet in container.demux(stream):
        if not packet.size:  # the flush packet at the end
            continue
        start = packet.dts if packet.pts is None else packet.pts
        # A discarded keyframe still starts decoding: frames after an edit list's start need it.
        if packet.is_keyframe and start is not None:
            keys.append(Key(_id(packet), start, len(timestamps)))
        if not packet.is_discard:
            timestamps.append(packet.pts)
        packets += 1
        if packet.dts is not None:
            decoding.append(packet.dts)
        damaged |= packet.is_corrupt
    span = decoding[-1] - decoding[0] if decoding else None
    return Timeline(timestamps, keys, packets, span, damaged)


def _id(packet: Any) -> PacketId:
    return packet.pos, packet.dts, packet.pts


def rgb(frame: av.VideoFrame, converter: VideoReformatter) -> NDArray[np.uint8]:
    """[height, width, 3]. A converter kept from frame to frame is three times as fast."""
    # One thread: more are slower at these sizes, and do not survive a fork.
    return np.ascontiguousarray(converter.reformat(frame, format="rgb24", threads=1).to_ndarray())


class PyavReader:
    """Seeks back to a keyframe, then decodes up to the frame that is wanted."""

    def __init__(self, path: str | Path, index: Index, frames: int) -> None:
        self._path, self._frames, self._converter = str(path), frames, VideoReformatter()
        self._index: int | None = None  # of the stream
        self._reopen()
        timeline = read_timeline(self._container, self._stream)
        presented = timeline.presented if index == "timestamps" else None
        if index == "timestamps" and (presented is None or len(presented) != frames):
            raise self._changed(f"{len(timeline.timestamps)} frames")
        self._positions = None if presented is None else {t: i for i, t in enumerate(presented)}
        # First frame index of each keyframe, increasing, beside the keyframes themselves.
        self._keys: list[tuple[int, Key]] = []
        if index != "start":
            self._keys = sorted(
                ((_first(key, presented), key) for key in timeline.keys), key=lambda pair: pair[0]
            )
        self._known = {key.id: first for first, key in self._keys}
        self._restart()

    def __len__(self) -> int:
        return self._frames

    def frames(self, indices: Sequence[int]) -> Frames:
        found = {i: rgb(self._frame(i), self._converter) for i in sorted(set(indices))}
        return np.stack([found[i] for i in indices])

    def _frame(self, wanted: int) -> av.VideoFrame:
        self._approach(wanted)
        frame = self._forward(wanted)
        if frame is None:  # the seek landed elsewhere than its keyframe said
            self._restart()
            frame = self._forward(wanted)
        if frame is None:
            raise self._changed(f"no frame {wanted}")
        return frame

    def _approach(self, wanted: int) -> None:
        """Leaves the walk at or before ``wanted``, as near as a keyframe allows."""
        nearest = bisect_right(self._keys, wanted, key=lambda pair: pair[0]) - 1
        first, key = self._keys[nearest] if nearest >= 0 else (0, None)
        if first <= self._next <= wanted:
            return
        if key is None or not self._seek(key, wanted):
            self._restart()

    def _seek(self, key: Key, wanted: int) -> bool:
        """Whether the file could be read from a known keyframe at or before ``wanted``."""
        try:
            self._container.seek(key.timestamp, stream=self._stream, backward=True)
            packets = self._container.demux(self._stream)
            head = next((packet for packet in packets if packet.size), None)
        except av.error.FFmpegError:
            return False
        first = None if head is None else self._known.get(_id(head))
        if head is None or first is None or first > wanted:
            return False
        self._walk = _numbered(_decoded(head, packets), first, self._positions)
        self._next = first
        return True

    def _restart(self) -> None:
        # Seeking to the start is not enough: it skips packets before an edit list's first frame.
        self._reopen()
        self._walk = _numbered(self._container.decode(self._stream), 0, self._positions)
        self._next = 0

    def _forward(self, wanted: int) -> av.VideoFrame | None:
        """The frame ``wanted``; None where the walk passes it by."""
        try:
            for position, frame in self._walk:
                self._next = position + 1
                if position >= wanted:
                    return frame if position == wanted else None
        except av.error.FFmpegError as error:
            raise self._changed(f"frame {wanted} cannot be decoded ({error.strerror})") from None
        return None

    def _reopen(self) -> None:
        self._container, stream = open_stream(self._path, self._index)
        if stream is None:
            raise self._changed("no video stream")
        self._index = stream.index
        stream.codec_context.thread_count = 1  # one process a core is faster than threads
        self._stream = stream

    def _changed(self, found: str) -> DataError:
        return DataError(
            f"{self._path}: {found}, not the {self._frames} frames of the manifest; make it again: "
            "snakemake -f manifest"
        )


def _decoded(head: Any, packets: Iterator[Any]) -> Iterator[av.VideoFrame]:
    yield from head.decode()
    for packet in packets:
        yield from packet.decode()


def _numbered(
    frames: Iterator[av.VideoFrame], first: int, positions: dict[int, int] | None
) -> Iterator[tuple[int, av.VideoFrame]]:
    """Frames with their indices: by timestamp, or counted from ``first`` where that is None."""
    for count, frame in enumerate(frames, first):
        if positions is None:
            yield count, frame
        elif frame.pts in positions:
            yield positions[frame.pts], frame


def _first(key: Key, presented: list[int] | None) -> int:
    """Index of the first frame at or after a keyframe; frames before it may need an earlier one."""
    return key.before if presented is None else bisect_left(presented, key.timestamp)


class DecordReader:
    """decord, for videos on which it was proved to show PyAV's frames."""

    def __init__(self, path: str | Path, frames: int) -> None:
        import decord

        self._path, self._error = str(path), decord.DECORDError
        try:
            # decord writes names in UTF-8, whatever the locale.
            name = os.fsencode(os.path.abspath(self._path)).decode("utf-8")
            self._reader: Any = decord.VideoReader(name, num_threads=1)
        except (self._error, RuntimeError, UnicodeDecodeError) as error:
            raise self._failed(error) from None
        if len(self._reader) != frames:
            raise DataError(
                f"{path}: decord counts {len(self._reader)} frames, not the {frames} presented"
            )

    def __len__(self) -> int:
        return len(self._reader)

    def frames(self, indices: Sequence[int]) -> Frames:
        try:
            frames: Frames = self._reader.get_batch(list(indices)).asnumpy()
        except (self._error, RuntimeError) as error:
            raise self._failed(error) from None
        return frames

    def _failed(self, error: Exception) -> DataError:
        # "[time] source.cc:line: message" once or more, then a stack trace
        message = re.split(r"\.cc:\d+: ", str(error))[-1].splitlines()[0].strip()
        return DataError(f"{self._path}: decord: {message}")
