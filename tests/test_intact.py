"""What is no video, and what is a damaged one, on made files of each kind."""

import socket
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image, features

from tests.videos import number_of, picture, write_video
from xdimo.data import probe
from xdimo.data.video_reader import open_video

FRAMES = 60


def why_not(path: Path) -> str:
    with pytest.raises(probe.NotAVideo) as error:
        probe.measure(str(path))
    return str(error.value)


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2.4,\n{}\n#EXT-X-ENDLIST\n"
LISTS = {
    "list.m3u8": HLS.format("other.ts"),
    "network.m3u8": HLS.format("http://127.0.0.1:{port}/other.ts"),
    "renamed.mp4": HLS.format("other.ts"),
    "concat.txt": "ffconcat version 1.0\nfile other.ts\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_other_files_are_refused_before_any_is_read(name, tmp_path):
    write_video(tmp_path / "other.ts", 20)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        path = tmp_path / name
        path.write_text(LISTS[name].replace("{port}", str(server.getsockname()[1])))
        reason = why_not(path)  # newer FFmpegs know a list by its name too
        assert "a list of other files (" in reason or (
            name == "renamed.mp4" and "Invalid" in reason
        )
        with pytest.raises(BlockingIOError):
            server.accept()


@pytest.mark.parametrize("suffix", ["gif", "ico", "png", "avif", "webp", "bmp", "tiff", "jpg"])
def test_still_images_are_images(suffix, tmp_path):
    if suffix == "avif" and not features.check("avif"):
        suffix = "gif"
    Image.fromarray(picture(5, 48, 48)).save(tmp_path / f"still.{suffix}")
    assert why_not(tmp_path / f"still.{suffix}").startswith("no video but an image (")


@pytest.mark.parametrize(("name", "kind", "mode"), [("a.pdf", "PDF", "RGB"), ("a.msp", "MSP", "1")])
def test_still_images_that_ffmpeg_opens_as_videos(name, kind, mode, tmp_path):
    Image.fromarray(picture(5, 48, 48)).convert(mode).save(tmp_path / name, kind)
    assert why_not(tmp_path / name).startswith("no video but an image (")


@pytest.mark.parametrize(("name", "codec"), [("v.y4m", "rawvideo"), ("v.mxf", "mpeg2video")])
def test_a_copy_cut_within_its_last_frames(name, codec, tmp_path):
    path = write_video(tmp_path / name, FRAMES, codec)
    assert probe.measure(str(path)).frames == FRAMES
    content, places = path.read_bytes(), packets_at(path)
    for place in (places[len(places) // 2] + 100, places[-1] + 10):
        path.write_bytes(content[:place])
        assert "cut-off copy?" in why_not(path)


@pytest.mark.parametrize("at", [0.2, 0.4, 0.6])
def test_a_wmv_with_zeroed_bytes_loses_no_frame_unnoticed(at, tmp_path):
    path = write_video(tmp_path / "v.wmv", FRAMES, "wmv2", width=160, height=160)
    content = bytearray(path.read_bytes())
    start = int(at * len(content))
    content[start : start + 600] = bytes(600)
    path.write_bytes(content)
    assert (frames_in(path) or FRAMES) < FRAMES
    assert "damaged" in why_not(path)


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (MemoryError(), "cannot be read: it takes more memory than there is"),
        (av.error.InvalidDataError(1094995529, "Invalid data found"), "read: Invalid data found"),
    ],
)
def test_what_ffmpeg_raises_is_said_in_words(raised, said, tmp_path, monkeypatch):
    def fails(path):
        raise raised

    path = write_video(tmp_path / "v.mp4", 20)
    monkeypatch.setattr(probe, "measure", fails)
    assert f"{said} (damaged or cut off?)" in str(probe.examine(str(path)).video)


def test_a_sequence_of_images_is_one_of_other_files(tmp_path):
    for name in ("frame000.png", "frame001.png", "frame%03d.png"):
        Image.fromarray(picture(5, 48, 48)).save(tmp_path / name)
    assert "a list of other files" in why_not(tmp_path / "frame%03d.png")


def test_a_moving_gif_is_a_video(tmp_path):
    pictures = [Image.fromarray(picture(i, 48, 48)) for i in range(20)]
    pictures[0].save(tmp_path / "moving.gif", save_all=True, append_images=pictures[1:])
    assert probe.measure(str(tmp_path / "moving.gif")).frames == 20


def packets_at(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return sorted(p.pos for p in container.demux(video=0) if p.size and p.pos)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("v.webm", "libvpx"),
        ("v.mkv", "libx264"),
        ("v.flv", "flv"),
        ("h264.flv", "libx264"),
        ("v.wmv", "wmv2"),
        ("fragments.mp4", "libx264"),
    ],
)
def test_a_copy_cut_between_two_packets(name, codec, tmp_path):
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof+global_sidx"}
    made_with = {"container_options": flags} if name == "fragments.mp4" else {}
    path = write_video(tmp_path / name, FRAMES, codec, **made_with)
    assert probe.measure(str(path)).frames == FRAMES
    content, places = path.read_bytes(), packets_at(path)
    for place in (places[len(places) // 2], places[-5]):
        path.write_bytes(content[:place])
        assert "cut-off copy?" in why_not(path)


def frames_in(path: Path) -> int | None:
    """What FFmpeg shows; None where it gives an error."""
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_count = 1
            return sum(1 for _ in container.decode(video=0))
    except av.error.FFmpegError:
        return None


@pytest.mark.parametrize(
    ("name", "codec", "first"),  # where bits are changed: bytes from a packet's start
    [
        ("v.mp4", "libx265", 4),
        ("v.mkv", "libx265", 4),
        ("v.webm", "libvpx", 0),
        ("v9.webm", "libvpx-vp9", 0),
    ],
)
def test_one_bit_that_loses_frames_without_an_error(name, codec, first, tmp_path):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = write_video(tmp_path / name, FRAMES, codec, options=options)
    content, places = path.read_bytes(), packets_at(path)
    lossy = 0
    for place in places[1::3]:
        for bit in range(0, 48, 3):
            damaged = bytearray(content)
            damaged[place + first + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            left = frames_in(path)
            if left is not None and left < FRAMES - 1:
                lossy += 1
                assert why_not(path)
                break
    assert lossy


def test_the_longest_stream_is_the_video(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams: list[Any] = [container.add_stream("libx264", rate=25) for _ in range(2)]
        for stream in streams:
            stream.width = stream.height = 64
            stream.pix_fmt = "yuv420p"
        for number, stream in [(300, streams[0]), *((i, streams[1]) for i in range(50))]:
            frame = av.VideoFrame.from_ndarray(picture(number, 64, 64), format="rgb24")
            frame.pts, frame.time_base = number % 300, Fraction(1, 25)
            container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    measured = probe.measure(str(path))
    assert measured.frames == 50
    reader = open_video(path, decoder="pyav", index=measured.index, frames=50)
    assert [number_of(image) for image in reader.frames([40, 3])] == [40, 3]


def test_rotation_is_recorded_and_not_applied(tmp_path):
    path = write_video(tmp_path / "v.mp4", 20, width=96, height=64)
    assert probe.measure(str(path)).rotation == 0
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # version 0: its matrix follows 40 bytes
    one = 1 << 16
    content[matrix : matrix + 36] = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    measured = probe.measure(str(path))
    assert (abs(measured.rotation), measured.width, measured.height) == (90, 96, 64)


def test_messages_of_ffmpeg_are_as_they_were(tmp_path):
    before = av.logging.get_level()
    probe.measure(str(write_video(tmp_path / "v.mp4", 20)))
    assert av.logging.get_level() == before
