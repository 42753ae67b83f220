"""Names of files are data, and a video that was replaced is noticed without reading it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, SMALL
from tests.videos import write_video
from xdimo.data import manifest as manifests
from xdimo.data import videos
from xdimo.data.latents import check_unchanged
from xdimo.data.manifest import build
from xdimo.data.videos import is_current, list_videos
from xdimo.errors import DataError, UserError
from xdimo.files import file_hash

NAMES = [
    "a{b}.mp4",
    "<lt>.mp4",
    "new\nline.mp4",
    "q\"'`$(touch x)*?[a].mp4",
    "%03d {}.mp4",
    "人脸.mp4",
]
WITH = {"window": 8, "decoder": "auto", "expected": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for number, name in enumerate(NAMES):
        write_video(folder / "plain.mp4", 12, first=20 * number).rename(folder / name)
    shutil.copy(folder / NAMES[0], os.fsencode(folder) + b"/l\xe9.mp4")
    (folder / "self.mp4").symlink_to("self.mp4")
    (folder / "dangling.mp4").symlink_to("/nowhere/at all")
    return folder


def seen(output: Path) -> Path:
    """What the manifest was made from."""
    return output.with_name("manifest.seen.json")


def make(folder: Path, output: Path):
    return build(folder, output, timeout_s=60, workers=2, **WITH)


def test_every_name_has_its_row_and_no_name_is_a_pattern(made, tmp_path):
    found = {video.path: video for video in make(made, tmp_path / "manifest.json").videos}
    for name in NAMES:
        assert (found[name].status, found[name].frames) == ("usable", 12), found[name]
    reasons = {path: found[path].reason for path in found if path not in NAMES}
    assert reasons == {
        "dangling.mp4": "cannot be read: No such file or directory",
        "self.mp4": "cannot be read: Too many levels of symbolic links",
        "./l\\xe9.mp4": "its name is not UTF-8; rename it",
    }


def test_two_names_never_share_a_path(tmp_path):
    for name in (b"a\xff.mp4", rb"a\xff.mp4", b"a\xff\\xfe", b"a\\xff\xfe"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
    assert len(videos.looks(tmp_path)) == 4
    assert videos.path_of(r"a\xff.mp4", tmp_path).exists()


def test_an_error_that_names_files_is_one_line(tmp_path):
    (tmp_path / "new\nline.mp4").touch()
    (tmp_path / os.fsdecode(b"l\xe9\n.mp4")).touch()
    with pytest.raises(UserError, match=r"new\\nline\.mp4 \(an empty file\)") as error:
        make(tmp_path, tmp_path / "results/manifest.json")
    assert str(error.value).isprintable()


def _locales() -> list[str]:
    """POSIX, and Latin-1 where this machine can make it for the test."""
    charmap = "ISO-8859-1"
    there = Path(f"/usr/share/i18n/charmaps/{charmap}.gz").exists() and shutil.which("localedef")
    return ["C", charmap] if there else ["C"]


@pytest.mark.parametrize("charmap", _locales())
def test_bytes_decide_under_any_locale(charmap, made, tmp_path):
    if charmap != "C":
        made_locale = ["localedef", "-i", "en_US", "-f", charmap, str(tmp_path / charmap)]
        subprocess.run(made_locale, check=True)
    (tmp_path / "videos").mkdir()
    shutil.copy(made / "人脸.mp4", tmp_path / "videos")
    environment = {
        **os.environ, "LC_ALL": charmap, "LOCPATH": str(tmp_path), "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    command = [sys.executable, "-m", "xdimo", "manifest", "videos", "--window", "8"]
    command += ["--output", "manifest.json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "manifest.json").read_text("utf-8"))["videos"]
    assert (row["path"], row["status"], row["decoder"]) == ("人脸.mp4", "usable", "decord")
    assert is_current(tmp_path / "manifest.json", tmp_path / "videos", **WITH)


def test_what_a_manifest_was_made_from_is_noticed(made, tmp_path):
    folder, output = tmp_path / "videos", tmp_path / "results/manifest.json"
    folder.mkdir()
    for name in NAMES[:2]:
        shutil.copy2(made / name, folder)
    assert not is_current(output, folder, **WITH)
    make(folder, output)
    assert is_current(output, folder, **WITH)
    assert not is_current(output, folder, **{**WITH, "window": 9})
    first = folder / NAMES[0]
    kept = first.stat()
    replaced = shutil.copy2(made / NAMES[2], tmp_path / "replaced")
    os.utime(replaced, ns=(kept.st_atime_ns, kept.st_mtime_ns - 10**9))  # older, as rsync -t leaves
    os.replace(replaced, first)
    assert not is_current(output, folder, **WITH)
    before = make(folder, output).dataset
    assert is_current(output, folder, **WITH)
    (folder / "link.mp4").symlink_to("/nowhere")
    assert not is_current(output, folder, **WITH)
    assert make(folder, output).dataset == before
    shutil.rmtree(folder)  # results on another machine
    assert is_current(output, folder, **WITH)


def test_a_manifest_from_before_is_current_as_long_as_it_seems_so(made, tmp_path):
    folder, output = tmp_path / "videos", tmp_path / "results/manifest.json"
    folder.mkdir()
    for name in (*NAMES[:2], "dangling.mp4"):
        shutil.copy2(made / name, folder, follow_symlinks=False)
    make(folder, output)
    seen(output).unlink()
    assert is_current(output, folder, **WITH)
    assert not is_current(output, folder, **{**WITH, "window": 9})
    assert seen(output).exists()  # from now on it is told exactly
    seen(output).unlink()
    first = folder / NAMES[0]
    content = first.read_bytes()
    for changed, mtime_ns in (
        (content[:-1] + b"!", output.stat().st_mtime_ns + 1),
        (content + b"!", 0),
    ):
        first.write_bytes(changed)
        os.utime(first, ns=(0, mtime_ns))
        assert not is_current(output, folder, **WITH)
    first.write_bytes(content)
    assert is_current(output, folder, **WITH)
    seen(output).unlink()
    (folder / "new.mp4").touch()
    os.utime(folder / "new.mp4", ns=(0, 0))
    assert not is_current(output, folder, **WITH)


@pytest.mark.parametrize(
    ("key", "value"), [("frames", 11), ("status", "short"), ("container", "avi"), ("why", "")]
)
def test_a_manifest_edited_in_a_row_is_made_again(key, value, made, tmp_path):
    folder, output = tmp_path / "videos", tmp_path / "results/manifest.json"
    folder.mkdir()
    shutil.copy2(made / NAMES[0], folder)
    make(folder, output)
    content = output.read_text()
    edited = json.loads(content)
    edited["videos"][0][key] = value
    output.write_text(json.dumps(edited))
    assert not is_current(output, folder, **WITH)
    make(folder, output)
    assert output.read_text() == content and is_current(output, folder, **WITH)
    output.write_text(content.replace('"schema": 1', '"schema": 2'))
    assert not is_current(output, folder, **WITH)


def test_a_copy_of_the_same_bytes_is_read_once_and_is_no_change(made, tmp_path, monkeypatch):
    folder, output = tmp_path / "videos", tmp_path / "results/manifest.json"
    shutil.copytree(made, folder, symlinks=True)
    os.unlink(os.fsencode(folder) + b"/l\xe9.mp4")  # is not read, so its copy is another
    make(folder, output)
    copied = Path(shutil.copytree(folder, tmp_path / "copied", symlinks=True))
    read: list[str] = []
    monkeypatch.setattr(videos, "file_hash", lambda path: read.append(path.name) or file_hash(path))
    readable = sorted(NAMES)
    for _ in range(2):
        assert is_current(output, copied, **WITH)
        assert sorted(read) == readable
    (copied / NAMES[0]).touch()
    assert is_current(output, copied, **WITH)
    assert sorted(read) == sorted([*readable, NAMES[0]])


def test_bit_rot_is_named_and_making_the_manifest_again_reads_again(made, tmp_path, monkeypatch):
    folder, output = tmp_path / "videos", tmp_path / "results/manifest.json"
    folder.mkdir()
    path = Path(shutil.copy(made / NAMES[0], folder / "video.mp4"))
    (row,) = make(folder, output).videos
    as_it_was = manifests.stamp(str(path))
    path.write_bytes(path.read_bytes() + b"\0")
    monkeypatch.setattr(manifests, "stamp", lambda _: as_it_was)
    with pytest.raises(DataError, match=r"video\.mp4: its bytes changed .* snakemake -f manifest"):
        check_unchanged(path, row)
    (again,) = make(folder, output).videos
    check_unchanged(path, again)


def test_the_order_of_a_folder_with_two_names_is_fixed(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/v.mp4").touch()
    (tmp_path / "videos").mkdir()
    for name in "cab":
        (tmp_path / f"videos/{name}").symlink_to(tmp_path / "data")
    assert list_videos(tmp_path / "videos") == [f"{tmp_path}/videos/a/v.mp4"]


def test_the_workflow_takes_names_as_data_and_sees_an_older_copy(made, tmp_path):
    """The real Snakemake, without a memory of what it made."""
    shutil.copytree(made, tmp_path / "videos", symlinks=True)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(SMALL, sort_keys=False))
    make(tmp_path / "videos", tmp_path / "results/data/manifest.json")

    def planned() -> str:
        command = [sys.executable, "-m", "snakemake", "-s", ROOT / "Snakefile", "-n"]
        command += ["--configfile", "c.yaml", "--", "results/data/manifest.json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "Nothing to be done" in planned()
    replaced = tmp_path / "replaced"
    shutil.copy2(made / NAMES[1], replaced)
    replaced.rename(tmp_path / "videos" / NAMES[0])
    assert re.search(r"^manifest +1$", planned(), re.MULTILINE)
