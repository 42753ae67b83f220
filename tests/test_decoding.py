"""Exact frames by index, on made videos of every kind that lies and on the real awkward ones."""

import os
import signal
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.videos import cut, number_of, write_video
from xdimo.data import probe
from xdimo.data.guard import ChildFailed, guarded
from xdimo.data.video_reader import open_video
from xdimo.errors import DataError, UserError

ROOT = Path(__file__).parents[1]
FRAMES = 100
OPEN_GOP = {"x264-params": "open-gop=1:scenecut=0"}
# name -> codec, encoder options, how PyAV must find its frames
KINDS = {
    "h264-b-frames.avi": ("libx264", {"bf": "3"}, "order"),
    "h264-b-frames.mp4": ("libx264", {"bf": "3"}, "timestamps"),
    "h264-open-gop.avi": ("libx264", {"bf": "3", **OPEN_GOP}, "start"),
    "h264-open-gop.mp4": ("libx264", {"bf": "3", **OPEN_GOP}, "timestamps"),
    "mpeg4.avi": ("mpeg4", {}, "timestamps"),
    "mpeg4-b-frames.avi": ("mpeg4", {"bf": "2"}, "timestamps"),
    "mjpeg.avi": ("mjpeg", {}, "timestamps"),
    "h264.mkv": ("libx264", {"bf": "3"}, "timestamps"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, (codec, options, _) in KINDS.items():
        write_video(folder / name, FRAMES, codec, options=options)
    return folder


def numbers(reader, indices):
    return [number_of(image) for image in reader.frames(indices)]


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_is_the_one_asked_for(made, name):
    path = made / name
    measured = probe.measure(str(path))
    assert (measured.frames, measured.index) == (FRAMES, KINDS[name][2])
    assert (measured.width, measured.height, measured.fps) == (64, 64, 25)
    reader = open_video(path, decoder="pyav", index=measured.index, frames=FRAMES)
    assert len(reader) == FRAMES
    everything = list(range(FRAMES))
    assert numbers(reader, everything) == everything
    for index in reversed(everything[::7]):  # each by a seek of its own
        assert numbers(reader, [index]) == [index]
    assert numbers(reader, [99, 3, 3, 50]) == [99, 3, 3, 50]


@pytest.fixture(scope="module")
def avi_reader(made):
    return open_video(made / "h264-b-frames.avi", decoder="pyav", index="order", frames=FRAMES)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.integers(0, FRAMES - 1), min_size=1, max_size=6))
def test_any_order_of_reads_shows_the_same_frames(avi_reader, indices):
    assert numbers(avi_reader, indices) == indices


def test_rows_wider_than_a_multiple_of_the_padding(tmp_path):
    path = write_video(tmp_path / "odd.mp4", 20, width=90, height=66)
    measured = probe.measure(str(path))
    reader = open_video(path, decoder="pyav", index=measured.index, frames=20)
    assert reader.frames([4]).shape == (1, 66, 90, 3)
    assert numbers(reader, [19, 4]) == [19, 4]


def test_an_avi_that_skips_frames_is_whole_and_a_cut_one_is_not(tmp_path):
    skipping = write_video(tmp_path / "skips.avi", 60, "mpeg4", skip=(10, 11, 30))
    assert probe.measure(str(skipping)).frames == 60
    with pytest.raises(probe.NotAVideo, match="cut-off copy"):
        probe.measure(str(cut(skipping, 0.6)))
    # Cut between two frames, nothing in it is damaged; its header still announces 63.
    with av.open(str(skipping)) as container:
        end = [packet.pos for packet in container.demux(video=0) if packet.size][40] - 8
    shorter = tmp_path / "shorter.avi"
    shorter.write_bytes(skipping.read_bytes()[:end])
    with pytest.raises(probe.NotAVideo, match=r"\d+ of 63 frames lie in it"):
        probe.measure(str(shorter))


def test_decord_is_refused_exactly_where_it_shows_other_frames(made):
    decord = pytest.importorskip("decord")
    for name in KINDS:
        path = str(made / name)
        measured = probe.measure(path)
        why = probe.why_not_decord(path, measured.frames, measured.clips, measured.checksums)
        reader = decord.VideoReader(path, num_threads=1)
        order = [int(i) for i in np.random.default_rng(1).permutation(FRAMES)]
        shown = [number_of(reader[i].asnumpy()) for i in order]
        assert (why is None) == (shown == order), (name, why)
    # The site's own kind of file: as many frames as there are, in a wrong order, and no error.
    path = str(made / "h264-b-frames.avi")
    assert len(decord.VideoReader(path)) == FRAMES
    measured = probe.measure(path)
    why = probe.why_not_decord(path, measured.frames, measured.clips, measured.checksums)
    assert why is not None and "another picture" in why


def test_another_file_than_the_manifests(made, tmp_path):
    other = write_video(tmp_path / "other.mp4", 50)
    with pytest.raises(DataError, match=r"other\.mp4: 50 frames, not the 100"):
        open_video(other, decoder="pyav", index="timestamps", frames=100)
    reader = open_video(other, decoder="pyav", index="start", frames=100)
    with pytest.raises(DataError, match=r"other\.mp4: no frame 70, not the 100"):
        reader.frames([70])
    with pytest.raises(DataError, match=r"gone\.mp4: cannot be opened: No such file"):
        open_video(tmp_path / "gone.mp4", decoder="pyav", index="start", frames=1)


def _crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def _spin():
    while True:
        pass


def _fail():
    raise UserError("said by the child")


def test_a_child_that_hangs_crashes_or_fails_is_told_from_one_that_answers():
    assert guarded(len, "four", timeout_s=30) == 4
    with pytest.raises(ChildFailed, match=r"no answer within 0\.5 s"):
        guarded(_spin, timeout_s=0.5)
    with pytest.raises(ChildFailed, match=r"crashed \(SIGSEGV\)"):
        guarded(_crash, timeout_s=30)
    with pytest.raises(UserError, match="said by the child"):
        guarded(_fail, timeout_s=30)


# presented frames; what decord does instead, None where it is exact
REAL = {
    "no_face.mp4": (95, "decord counts 98 frames, not the 95 presented"),  # an edit list
    "park.mp4": (17, "decord counts 18 frames, not the 17 presented"),  # 18 nominal
    "face_noface.mov": (169, None),  # HEVC, variable frame rate
    "carphone_pristine.mp4": (120, None),
    "obama_speech.mp4": (105, None),
    "single_face.mp4": (72, None),
}


@pytest.mark.network
@pytest.mark.parametrize("name", REAL)
def test_real_videos_are_read_exactly(real, name):
    frames, decord_does = REAL[name]
    path = real / name
    measured = probe.measure(str(path))
    assert (measured.frames, measured.index) == (frames, "timestamps")
    reader = open_video(path, decoder="pyav", index="timestamps", frames=frames)
    with av.open(str(path)) as container:
        for index, frame in enumerate(container.decode(video=0)):
            if index in (0, 1, frames // 2, frames - 1):
                assert np.array_equal(reader.frames([index])[0], frame.to_ndarray(format="rgb24"))
    pytest.importorskip("decord")
    why = probe.why_not_decord(str(path), frames, measured.clips, measured.checksums)
    assert why == decord_does
