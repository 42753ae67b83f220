"""The manifest: what it says of every kind of file, and that it reads each of them once."""

import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path

import pytest

from tests.videos import cut, write_video
from xdimo.data import manifest as module
from xdimo.data.manifest import build, read
from xdimo.data.videos import list_videos
from xdimo.errors import DataError, UserError

WINDOW = 48


def make(folder: Path, output: Path, **changes):
    arguments = {"expected": None, "decoder": "auto", "timeout_s": 60, "workers": 2}
    return build(folder, output, window=WINDOW, **{**arguments, **changes})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Five readable videos (a short one and a copy among them) and six files that are none."""
    folder = tmp_path_factory.mktemp("made")
    clip = write_video(folder / "b.mp4", 60)
    write_video(folder / "nested/人脸 видео.avi", 60, first=100)
    write_video(folder / "edge.avi", 48, "mpeg4")
    write_video(folder / "short.mp4", 47)
    shutil.copy(clip, folder / "nested/copy.mp4")
    cut(folder / "edge.avi", 0.6)
    cut(folder / "b.mp4", 0.6)
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("not a video\n" * 200)
    (folder / "notes.txt").write_text("not a video either\n" * 200)
    (folder / ".hidden.mp4").write_bytes(clip.read_bytes())
    (folder / "under-way.mp4.part").write_bytes(clip.read_bytes()[:100])
    with open(os.fsencode(folder) + b"/latin-\xe9.mp4", "wb") as file:
        file.write(clip.read_bytes())
    return folder


@pytest.fixture(scope="module")
def probed(made, tmp_path_factory):
    output = tmp_path_factory.mktemp("probed") / "manifest.json"
    return make(made, output), output


def test_every_file_is_listed_with_what_it_is_or_why_it_is_not_used(probed):
    result, output = probed
    assert read(output) == result
    rows = {video.path: video for video in result.videos}
    assert list(rows) == sorted(rows)
    assert result.counts.model_dump() == {
        "files": 11, "readable": 5, "usable": 3, "short": 1, "duplicate": 1, "unreadable": 6,
    }  # fmt: skip
    said = {path: (video.status, video.reason) for path, video in rows.items()}
    assert said["b.mp4"] == said["edge.avi"] == said["nested/人脸 видео.avi"] == ("usable", None)
    assert said["short.mp4"] == ("short", "47 frames, a clip spans 48")
    assert said["nested/copy.mp4"] == ("duplicate", "the same bytes as b.mp4")
    for path, reason in {
        "cut-b.mp4": "cannot be opened",
        "cut-edge.avi": "cut-off copy",
        "zero.mp4": "an empty file",
        "text.mp4": "cannot be opened: Invalid data",
        "notes.txt": "no video but text",
        "./latin-\\xe9.mp4": "its name is not UTF-8",
    }.items():
        assert said[path][0] == "unreadable" and reason in said[path][1], said[path]
    avi = rows["nested/人脸 видео.avi"]
    assert (avi.codec, avi.container, avi.frames, avi.fps) == ("h264", "avi", 60, 25.0)
    assert (avi.width, avi.height, avi.duration_s) == (64, 64, 2.4)
    assert (avi.decoder, avi.index) == ("pyav", "order") and "decord" in avi.why
    assert (rows["b.mp4"].decoder, rows["b.mp4"].why) == ("decord", None)


def test_the_dataset_is_named_by_content_not_by_paths_times_or_decoder(probed, made, tmp_path):
    copied = tmp_path / "elsewhere"
    (copied / "x").mkdir(parents=True)
    for number, path in enumerate(("edge.avi", "nested/人脸 видео.avi", "b.mp4")):
        shutil.copyfile(made / path, copied / f"x/{number}.bin")
    result = make(copied, tmp_path / "manifest.json", decoder="pyav")
    assert result.dataset == probed[0].dataset
    assert {video.why for video in result.videos} == {"dataset.decoder: pyav"}
    order = [video.sha256 for video in probed[0].clips_order()]
    assert [video.sha256 for video in result.clips_order()] == order == sorted(order)
    (copied / "x/0.bin").unlink()
    assert make(copied, tmp_path / "manifest.json").dataset != result.dataset


def test_unchanged_files_are_not_read_again(probed, made, tmp_path, monkeypatch):
    folder, output = tmp_path / "videos", tmp_path / "manifest.json"
    folder.mkdir()
    for name in ("b.mp4", "edge.avi", "short.mp4"):
        shutil.copy2(made / name, folder / name)
    asked = []

    def interrupted(function, path, *rest, timeout_s):
        if function is module.probe.examine:
            asked.append(Path(path).name)
            if len(asked) == 3:
                raise KeyboardInterrupt
        return guarded(function, path, *rest, timeout_s=timeout_s)

    guarded = module.guarded
    monkeypatch.setattr(module, "guarded", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(folder, output, decoder="pyav", workers=1)
    assert len(asked) == 3 and not output.exists()
    kept = tmp_path / "manifest.probes.jsonl"
    assert len(kept.read_text().strip().splitlines()) == 2
    with open(kept, "a") as file:
        file.write('\n{"key": ["cut')  # a line that the interruption cut off
    make(folder, output, decoder="pyav", workers=1)
    assert len(asked) == 4 and asked[3] == asked[2]
    first = output.read_bytes()
    make(folder, output, decoder="pyav", workers=1)
    assert len(asked) == 4 and output.read_bytes() == first
    os.utime(folder / "edge.avi", ns=(1, 1))
    make(folder, output, decoder="pyav", workers=1)
    assert asked[4:] == ["edge.avi"]
    make(folder, output, decoder="auto")  # its rows say whether decord is exact: other probes
    assert len(asked) == 8


def test_another_number_of_videos_than_expected(probed, made, monkeypatch):
    _, output = probed
    before = output.read_bytes()

    def only_the_unreadable(function, path, *rest, timeout_s):
        assert Path(path).name in ("cut-b.mp4", "cut-edge.avi", "zero.mp4", "text.mp4", "notes.txt")
        return guarded(function, path, *rest, timeout_s=timeout_s)

    guarded = module.guarded
    monkeypatch.setattr(module, "guarded", only_the_unreadable)  # the probes are kept
    with pytest.raises(UserError) as error:
        make(made, output, expected=704)
    message = str(error.value)
    assert "dataset.expected_videos: 704, but 5 readable videos" in message
    assert "set dataset.expected_videos: 5, or null" in message and "\n" not in message
    assert "cut-b.mp4 (" in message and "and 3 more" in message
    assert output.read_bytes() == before
    assert make(made, output, expected=5).counts.usable == 3


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("while True: pass", "no answer within 4 s"),  # holds the interpreter's lock
        ("import os; os.abort()", "crashed (SIGABRT)"),
        ("raise ImportError('no decord')", "decord is not installed"),
    ],
)
def test_a_decoder_that_hangs_or_crashes_is_not_used(made, tmp_path, monkeypatch, body, why):
    fake = tmp_path / "fake/decord.py"
    fake.parent.mkdir()
    fake.write_text(body)
    monkeypatch.syspath_prepend(fake.parent)
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(made / "edge.avi", folder)
    result = make(folder, tmp_path / "manifest.json", timeout_s=4)
    (video,) = result.videos
    assert (video.status, video.decoder, video.frames) == ("usable", "pyav", 48)
    assert why in video.why


def test_a_file_that_hangs_pyav_becomes_a_row(made, tmp_path, monkeypatch):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(made / "edge.avi", folder)
    os.mkfifo(folder / "pipe.mp4")  # no file: reading it would wait for ever
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(folder)  # a socket's path is short
        listener.bind("socket.mp4")
    shutil.copy(made / "b.mp4", folder / "slow.mp4")

    def slow(function, path, *rest, timeout_s):
        if path.endswith("slow.mp4"):
            raise module.ChildFailed("no answer within 60 s")
        return guarded(function, path, *rest, timeout_s=timeout_s)

    guarded = module.guarded
    monkeypatch.setattr(module, "guarded", slow)
    result = make(folder, tmp_path / "manifest.json")
    assert [(v.path, v.status) for v in result.videos] == [
        ("edge.avi", "usable"), ("pipe.mp4", "unreadable"), ("slow.mp4", "unreadable"),
        ("socket.mp4", "unreadable"),
    ]  # fmt: skip
    no_file = "no file but a pipe, a socket or a device"
    reasons = [no_file, "cannot be read: no answer within 60 s", no_file]
    assert [video.reason for video in result.videos[1:]] == reasons


def test_folders_that_hold_no_dataset(tmp_path, made):
    output = tmp_path / "manifest.json"
    with pytest.raises(UserError, match=r"dataset\.videos: .*absent: no such folder"):
        make(tmp_path / "absent", output)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"dataset\.videos: .*file: not a folder"):
        make(tmp_path / "file", output)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"dataset\.videos: .*empty: an empty folder"):
        make(tmp_path / "empty", output)
    (tmp_path / "empty/zero.mp4").touch()
    with pytest.raises(UserError, match=r"no video that FFmpeg can read; unreadable: zero\.mp4"):
        make(tmp_path / "empty", output)
    shutil.copy(made / "short.mp4", tmp_path / "empty")
    with pytest.raises(UserError, match=r"none of 1 videos has the 48 frames"):
        make(tmp_path / "empty", output)
    assert not output.exists()


def test_a_folder_without_rights_is_named():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "open").mkdir()
        (folder / "open/video.mp4").touch()
        assert list_videos(folder) == [f"{folder}/open/video.mp4"]
        (folder / "locked").mkdir(mode=0)
        message = _as_nobody(lambda: list_videos(folder))
        (folder / "locked").chmod(stat.S_IRWXU)
    assert message == f"{folder}/locked: cannot list this folder of videos: Permission denied"


def _as_nobody(call) -> str:
    """What UserError ``call`` raises for a user whom file rights bind, which root is not."""
    if os.getuid():
        with pytest.raises(UserError) as error:
            call()
        return str(error.value)
    ours, theirs = os.pipe()
    if not (child := os.fork()):
        os.setuid(65534)
        try:
            call()
        except UserError as error:
            os.write(theirs, str(error).encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with open(ours, encoding="utf-8") as answer:
        return answer.read()


def test_links_are_followed_and_loops_end(tmp_path):
    (tmp_path / "data/deep").mkdir(parents=True)
    (tmp_path / "data/deep/a.mp4").touch()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/link").symlink_to(tmp_path / "data")
    (tmp_path / "data/deep/loop").symlink_to(tmp_path / "videos")
    assert list_videos(tmp_path / "videos") == [f"{tmp_path}/videos/link/deep/a.mp4"]
    assert list_videos(tmp_path / "absent") == []


def test_an_edited_manifest_is_refused(probed, tmp_path):
    edited = tmp_path / "edited.json"
    edited.write_text(probed[1].read_text().replace('"frames": 60', '"frames": 59'))
    with pytest.raises(DataError, match=r"edited\.json: edited.* snakemake -f manifest$"):
        read(edited)
    edited.write_text("{}")
    with pytest.raises(UserError, match=r"edited\.json: schema: missing"):
        read(edited)
