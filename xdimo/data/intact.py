"""What is no video, and what is a damaged one: each reason why a file is not used."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
from av.container import InputContainer

from xdimo.data.video_reader import FILES_ONLY, Timeline, open_container

# Their demuxers read files or addresses other than the one that was opened.
LISTS = frozenset(["concat", "dash", "hls", "imf", "mlv", "rtp", "rtsp", "sap", "sdp", "vobsub"])
TEXTS = frozenset(["adf", "bin", "idf", "tty", "xbin"])  # which FFmpeg draws as a terminal would
# A picture in one of these, or in a file of these brands, is a still image.
IMAGES = frozenset(["apng", "fits", "gif", "ico", "jpegxl_anim", "mjpeg", "msp", "webp"])
IMAGE_BRANDS = frozenset(["avif", "avis", "heic", "heix", "mif1", "msf1"])
# Containers whose header tells the time at which their last packet ends.
TIMED = frozenset(["flv", "matroska,webm", "mxf"])
# An ASF file's header object that tells how many bytes the file has.
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
# The first partition of an MXF file, whose header tells where the last one begins.
MXF_PARTITION = bytes.fromhex("060e2b34020501010d0102010102")
# Of these codecs each packet shows one frame, but for what `_shown` leaves out.
ONE_FRAME_A_PACKET = frozenset(
    ["av1", "ffv1", "h264", "hevc", "mjpeg", "mpeg1video", "mpeg2video", "mpeg4", "vp8", "vp9"]
)


class NotAVideo(Exception):
    """The message says why the file cannot be used."""


@contextmanager
def messages() -> Iterator[list[tuple[int, str, str]]]:
    """FFmpeg's errors: level, who says it, and what."""
    before, repeats = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture() as said:
            yield said
    finally:
        av.logging.set_level(before)
        av.logging.set_skip_repeated(repeats)


def require_one_file(path: str) -> None:
    """Raises NotAVideo for a playlist, a list or a sequence of files, before any other is read."""
    opened: list[str] = []

    def open_once(address: str, *_: Any) -> Any:
        opened.append(address)
        if len(opened) > 1:
            raise FileNotFoundError(address)
        return open(path, "rb")

    options = {**FILES_ONLY, "format_whitelist": ",".join(av.formats_available - LISTS)}
    why = None
    with messages() as said:
        try:
            av.open(path, metadata_errors="replace", options=options, io_open=open_once).close()
        except (OSError, av.error.FFmpegError) as error:
            why = error.strerror
    listing = [name for _, name, message in said if "whitelist" in message]
    if listing or len(opened) > 1:
        raise NotAVideo(f"no video but a list of other files ({[*listing, *opened[1:]][0]})")
    if why is not None:
        raise NotAVideo(f"cannot be opened: {why}")


def require_pictures(container: InputContainer) -> None:
    kind = container.format.name
    if kind in TEXTS or kind.startswith("image2") or kind.endswith("_pipe"):
        raise NotAVideo(f"no video but {'text' if kind in TEXTS else 'an image'} ({kind})")


def require_moving(container: str, brand: str, frames: int) -> None:
    brand = brand.strip()
    if frames == 1 and (container in IMAGES or brand in IMAGE_BRANDS):
        raise NotAVideo(f"no video but an image ({container if container in IMAGES else brand})")


def require_all_bytes(path: str, container: InputContainer, packets: "Packets") -> None:
    """Raises NotAVideo for an ASF (.wmv) or MXF file of fewer bytes than its header says, and for a
    Y4M file whose last frame is not whole.
    """
    kind, announced = container.format.name, 0
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        there = file.seek(0, os.SEEK_END)
    if kind == "asf":
        _, _, properties = start.partition(ASF_PROPERTIES)
        broadcast = int.from_bytes(properties[72:76], "little") & 1  # its size was not known yet
        announced = 0 if broadcast else int.from_bytes(properties[24:32], "little")
    elif kind == "mxf":
        before, _, pack = start.partition(MXF_PARTITION)
        length = pack[2:3]  # in so many bytes, where it is above 128
        value = pack[3 + (length[0] & 127 if length > b"\x80" else 0) :]
        footer = int.from_bytes(value[24:32], "big")  # 0: not known
        announced = len(before) + footer + 1 if footer else 0
    if there < announced:
        raise NotAVideo(f"{there} of {announced} bytes lie in it (a cut-off copy?)")
    if kind == "yuv4mpegpipe" and packets.end_byte < there:
        raise NotAVideo("its last frame is not whole (a cut-off copy?)")


def require_uncut(timeline: Timeline, stream: Any) -> None:
    """Raises NotAVideo where fewer frames lie in the file than its header announces.

    An AVI's header counts frames that were dropped too; its timestamps step over those, so the time
    its packets span is counted as well.
    """
    if timeline.damaged:
        raise NotAVideo("its last data are cut off (a cut-off copy?)")
    spanned = 0
    if timeline.dts_span is not None and stream.average_rate:
        spanned = round(timeline.dts_span * stream.time_base * stream.average_rate) + 1
    present = max(timeline.packets, spanned)
    if present < stream.frames:
        raise NotAVideo(f"{present} of {stream.frames} frames lie in it (a cut-off copy?)")


@dataclass(frozen=True)
class Packets:
    """What one pass over all streams tells."""

    expected: int | None  # frames that the video's packets show; None where that is not known
    end_s: float | None  # of the last packet
    end_byte: int  # of the last packet whose place is known, in the file


def read_packets(path: str | Path, index: int) -> Packets:
    with open_container(path) as container:
        stream: Any = container.streams[index]
        codec = stream.codec_context.codec.canonical_name
        interval_s = float(1 / stream.average_rate) if stream.average_rate else math.inf
        ends, first_key, expected, before_s, end_byte = [], None, 0, -1.0, 0
        for packet in container.demux():
            end_byte = max(end_byte, (packet.pos or 0) + packet.size)
            time = packet.dts if packet.pts is None else packet.pts
            if not packet.size or time is None:
                continue
            time_s = float(time * packet.time_base)
            ends.append(time_s + float((packet.duration or 0) * packet.time_base))
            if packet.stream_index != index:
                continue
            beside = time_s - before_s < interval_s / 2
            before_s = time_s
            if packet.is_keyframe and first_key is None:
                first_key = time
            # What comes before the first keyframe, in the file or in time, cannot be decoded.
            if first_key is not None and time >= first_key and not packet.is_discard:
                expected += _shown(packet, codec, beside)
    known = codec in ONE_FRAME_A_PACKET and first_key is not None
    return Packets(expected if known else None, max(ends, default=None), end_byte)


def _shown(packet: Any, codec: str, beside: bool) -> bool:
    """Not a VP8 frame that others only refer to, nor an MPEG-4 one that repeats the one before.

    ``beside``: it has almost the time of the packet before, as such VP8 frames have.
    """
    if codec == "vp8" and beside:
        return bool(bytes(packet)[0] >> 4 & 1)
    return codec != "mpeg4" or bool(packet.size > 16)


def require_all_time(container: InputContainer, stream: Any, packets: Packets) -> None:
    """Raises NotAVideo where the header announces a later end than the last packet's."""
    announced = container.duration  # microseconds
    kind = container.format.name
    timed = kind in TIMED or (kind.startswith("mov,") and not stream.frames)  # in fragments
    if not timed or announced is None or packets.end_s is None:
        return
    frame_s = float(1 / stream.average_rate) if stream.average_rate else 0
    slack_s = max(2.5 * frame_s, 0.1) + announced / 2e8  # some count the last frame, some do not
    if announced / 1e6 - packets.end_s > slack_s:
        raise NotAVideo(
            f"its header says {announced / 1e6:.1f} s, and it ends after {packets.end_s:.1f} s "
            "(a cut-off copy?)"
        )


def require_all_frames(
    packets: Packets, frames: int, interlaced: bool, said: Sequence[tuple[int, str, str]]
) -> None:
    """Raises NotAVideo where packets showed no frame, or FFmpeg complained of them.

    ``interlaced``: two packets may hold a frame's two fields. ``said``: FFmpeg's errors while it
    read and decoded.
    """
    errors = [f"{name}: {text.strip()}".lstrip(": ") for _, name, text in said]
    why = f": {errors[0]}" if errors else ""
    if packets.expected is not None and frames < packets.expected and (errors or not interlaced):
        raise NotAVideo(f"{frames} of {packets.expected} frames can be decoded (damaged?){why}")
    if errors:
        raise NotAVideo(f"FFmpeg complains (damaged or cut off?){why}")
