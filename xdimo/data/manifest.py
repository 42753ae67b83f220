"""The manifest: one row a file, with what it is, who reads it exactly, or why it is not used."""

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from xdimo.config.load import parse
from xdimo.config.schema import Strict
from xdimo.data import probe
from xdimo.data.guard import ChildFailed, guarded, preload
from xdimo.data.progress import progress
from xdimo.data.video_reader import Decoder, Index
from xdimo.data.videos import PROBE, list_videos, looks, name_of, path_of, remember, stamp
from xdimo.errors import DataError, UserError
from xdimo.files import file_hash, read_json, write_json
from xdimo.spec import dataset_of

Status = Literal["usable", "short", "duplicate", "unreadable"]


class Probe(Strict):
    """What a file is, wherever it lies and whatever clips are made of it. None = not known."""

    sha256: str | None = None  # "sha256:<hex>"
    size_bytes: int | None = None
    container: str | None = None
    codec: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    frames: int | None = None  # presented
    fps: float | None = None  # average
    duration_s: float | None = None  # frames / fps
    rotation: int | None = None  # degrees that a player would turn it by; used as it is stored
    decoder: Decoder | None = None
    index: Index | None = None  # how PyAV finds its frames
    why: str | None = None  # why PyAV reads it
    unreadable: str | None = None  # why nothing does


class Video(Probe):
    path: str  # below the folder, with /
    status: Status
    reason: str | None = None  # why it is not used

    def file(self, folder: Path) -> Path:
        return path_of(self.path, folder)


class Counts(Strict):
    files: int
    readable: int  # usable, short and duplicates
    usable: int
    short: int
    duplicate: int
    unreadable: int


class Manifest(Strict):
    schema_version: Literal[1] = Field(alias="schema")
    folder: str
    dataset: str  # names the content: hash over (sha256, frames) of the usable videos
    window: int  # frames of a clip, from first to last
    counts: Counts
    videos: list[Video]  # by path

    def clips_order(self) -> list[Video]:
        """Usable videos by sha256: the dataset's order everywhere, whatever the paths."""
        usable = [video for video in self.videos if video.status == "usable"]
        return sorted(usable, key=lambda video: video.sha256 or "")


def read(path: str | Path) -> Manifest:
    """Raises UserError that names the file, and DataError where its rows are not its dataset."""
    try:
        manifest = parse(Manifest, read_json(path))
    except UserError as error:
        prefix = "" if str(error).startswith(str(path)) else f"{path}: "
        raise UserError(f"{prefix}{error}") from None
    if _dataset(manifest.videos) != manifest.dataset:
        raise DataError(
            f"{path}: edited: its videos are not the dataset it names; make it again: "
            "snakemake -f manifest"
        )
    return manifest


def build(
    folder: str | Path,
    output: str | Path,
    *,
    window: int,
    expected: int | None,
    decoder: Literal["auto", "pyav"],
    timeout_s: float,
    workers: int,
) -> Manifest:
    """Probes every file below ``folder`` and writes ``output``.

    ``window``: frames a usable video must have. ``expected``: readable videos that must be found
    (short ones and duplicates are readable), None for any number. ``timeout_s``: seconds one
    decoder may take on one video. Probes are kept beside ``output``: files of unchanged bytes are
    not decoded again, after an interruption and after an error either. Raises UserError.
    """
    folder, output = Path(folder), Path(output)
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "no such folder"
        raise UserError(f"dataset.videos: {folder}: {what} of videos")
    files = looks(folder)  # before they are read: what changes meanwhile is noticed
    paths = list_videos(folder)
    if not paths:
        raise UserError(f"dataset.videos: {folder}: an empty folder; put the videos there")
    probes = _probe_all(folder, paths, output, decoder, timeout_s, workers)
    videos = list(_judge(folder, probes, window))
    found = Counter[str](video.status for video in videos)
    counts = Counts(
        files=len(videos),
        readable=len(videos) - found["unreadable"],
        usable=found["usable"],
        short=found["short"],
        duplicate=found["duplicate"],
        unreadable=found["unreadable"],
    )
    _check(folder, videos, counts, window, expected)
    manifest = Manifest(
        schema=1,
        folder=str(folder),
        dataset=_dataset(videos),
        window=window,
        counts=counts,
        videos=videos,
    )
    write_json(output, manifest.model_dump(by_alias=True))
    remember(output, files, window=window, decoder=decoder, expected=expected)
    return manifest


def _judge(folder: Path, probes: dict[str, Probe], window: int) -> Iterator[Video]:
    first: dict[str, str] = {}
    named = [(name_of(path, folder), found) for path, found in probes.items()]
    for path, found in sorted(named, key=lambda pair: pair[0]):
        status: Status = "usable"
        reason = None
        if found.frames is None or found.sha256 is None:
            status, reason = "unreadable", found.unreadable
        elif found.sha256 in first:
            status, reason = "duplicate", f"the same bytes as {first[found.sha256]}"
        elif found.frames < window:
            status, reason = "short", f"{found.frames} frames, a clip spans {window}"
        if found.sha256 is not None:
            first.setdefault(found.sha256, path)
        yield Video(path=path, status=status, reason=reason, **found.model_dump())


def _dataset(videos: list[Video]) -> str:
    return dataset_of((v.sha256, v.frames) for v in videos if v.status == "usable")


def _check(
    folder: Path, videos: list[Video], counts: Counts, window: int, expected: int | None
) -> None:
    bad = [f"{v.path} ({v.reason})" for v in videos if v.status == "unreadable"]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    listed = f"; unreadable: {', '.join(bad[:3])}{more}" if bad else ""
    if not counts.readable:
        raise UserError(f"dataset.videos: {folder}: no video that FFmpeg can read{listed}")
    if expected is not None and counts.readable != expected:
        raise UserError(
            f"dataset.expected_videos: {expected}, but {counts.readable} readable videos lie in "
            f"{folder}{listed}; to go on with these set dataset.expected_videos: "
            f"{counts.readable}, or null for any number"
        )
    if not counts.usable:
        raise UserError(
            f"dataset.videos: {folder}: none of {counts.readable} videos has the {window} frames "
            f"of a clip{listed}"
        )


def _probe_all(
    folder: Path,
    paths: list[str],
    output: Path,
    decoder: Literal["auto", "pyav"],
    timeout_s: float,
    workers: int,
) -> dict[str, Probe]:
    kept_in = output.with_name(f"{output.stem}.probes.jsonl")
    tools = [PROBE, decoder, _version("av"), _version("decord")]
    kept = _kept(kept_in)
    keys = {path: [name_of(path, folder), stamp(path), *tools] for path in paths}
    old = {path: kept[json.dumps(key)] for path, key in keys.items() if json.dumps(key) in kept}
    preload(["av", "numpy", "xdimo.data.probe"])
    kept_in.parent.mkdir(parents=True, exist_ok=True)
    with open(kept_in, "a", encoding="utf-8") as file, ThreadPoolExecutor(workers) as pool:
        # Read, not believed: bytes can change while size, times and inode stay.
        same = pool.map(lambda path: _hash(path) == old[path].sha256, old)
        probes = {path: old[path] for path, is_same in zip(old, same, strict=True) if is_same}
        missing = [path for path in paths if path not in probes]
        waiting = {
            pool.submit(_probe, path, keys[path][0], decoder, timeout_s): path for path in missing
        }
        try:
            with progress(len(paths), len(probes), "video", "probing videos") as bar:
                for future in as_completed(waiting):
                    path = waiting[future]
                    probes[path] = future.result()
                    # What could not be read may be readable the next time (rights, a busy disk).
                    if probes[path].unreadable is None:
                        row = {"key": keys[path], "probe": probes[path].model_dump()}
                        # The line's end comes first: a line that was cut off stays apart.
                        file.write("\n" + json.dumps(row))
                        file.flush()
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return probes


def _kept(path: Path) -> dict[str, Probe]:
    """Probes of earlier runs by their key; blank and cut-off lines are passed over."""
    kept = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            kept[json.dumps(row["key"])] = Probe.model_validate(row["probe"])
        except (ValueError, KeyError, TypeError, ValidationError):
            continue
    return kept


def _hash(path: str) -> str | None:
    try:
        return file_hash(path)
    except OSError:
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _probe(path: str, name: str, decoder: Literal["auto", "pyav"], timeout_s: float) -> Probe:
    """One file. Nothing in a file stops the run: what goes wrong becomes its reason."""
    if not path.endswith(os.fsdecode(name.encode("utf-8"))):
        return Probe(unreadable="its name is not UTF-8; rename it")
    if os.path.exists(path) and not os.path.isfile(path):
        return Probe(unreadable="no file but a pipe, a socket or a device")
    try:
        file: probe.Examined = guarded(probe.examine, path, timeout_s=timeout_s)
    except (OSError, ChildFailed) as error:
        return Probe(unreadable=f"cannot be read: {getattr(error, 'strerror', None) or error}")
    known: dict[str, Any] = {"sha256": file.sha256, "size_bytes": file.size_bytes}
    found = file.video
    if isinstance(found, str):
        return Probe(**known, unreadable=found)
    why = "dataset.decoder: pyav" if decoder == "pyav" else _why_pyav(path, found, timeout_s)
    return Probe(
        **known,
        container=found.container,
        codec=found.codec,
        width=found.width,
        height=found.height,
        frames=found.frames,
        fps=found.fps,
        duration_s=found.frames / found.fps if found.fps else None,
        rotation=found.rotation,
        decoder="decord" if why is None else "pyav",
        index=found.index,
        why=why,
    )


def _why_pyav(path: str, found: probe.Measured, timeout_s: float) -> str | None:
    """None where decord is proved exact."""
    arguments = (path, found.frames, found.clips, found.checksums)
    try:
        why: str | None = guarded(probe.why_not_decord, *arguments, timeout_s=timeout_s)
    except ChildFailed as error:
        return f"decord: {error}"
    return why
