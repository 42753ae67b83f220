"""Which files below a folder are asked whether they are videos, and whether any has changed.

A name is bytes, whatever the locale: it stands in the manifest where those bytes are UTF-8.
"""

import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from xdimo.errors import UserError
from xdimo.files import content_hash, file_hash, read_json, write_json

PROBE = 3  # raised when probing changes: rows probed before are then probed again


def list_videos(folder: str | Path) -> list[str]:
    """Paths of all files below ``folder``, sorted; empty where the folder is absent.

    Any file may be a video: its content decides, not its name. Links that lead nowhere, pipes and
    sockets are listed too. Left out are names that begin with a dot and names that end in ``.part``
    (copies and downloads under way). Links are followed, each folder once. Raises UserError where
    a folder below cannot be listed: what it holds is not known.
    """
    if not os.path.lexists(folder):
        return []
    return sorted(_below(str(folder), set()), key=os.fsencode)


def _below(folder: str, seen: set[tuple[int, int]]) -> list[str]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            shown = sorted((e for e in entries if not _left_out(e.name)), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot list this folder of videos: {error.strerror}") from None
    files = []
    for entry in shown:
        try:
            mode = entry.stat().st_mode
        except OSError:  # a link to nothing or to itself
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode):
            files += _below(entry.path, seen)
        else:
            files.append(entry.path)
    return files


def _left_out(name: str) -> bool:
    return name.startswith(".") or name.endswith(".part")


def name_of(path: str, folder: str | Path) -> str:
    """What the manifest calls a listed file.

    Bytes that are no UTF-8 stand there as \\xNN, after a ./ that no other name begins with.
    """
    name = os.fsencode(os.path.relpath(path, folder))
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return "./" + name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def path_of(name: str, folder: Path) -> Path:
    """The file that the manifest calls ``name``."""
    return folder / os.fsdecode(name.encode("utf-8"))


def stamp(path: str | Path) -> list[int] | None:
    """What tells, without reading a file, that it is another: size, times and inode."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def looks(folder: str | Path) -> dict[str, list[int] | None]:
    """Stamp of each file below ``folder`` by its name, without reading it. Raises UserError."""
    return {name_of(path, folder): stamp(path) for path in list_videos(folder)}


def remember(manifest: Path, files: Mapping[str, list[int] | None], **made_with: Any) -> None:
    """Leaves beside ``manifest`` its hash and what it was made from, for `is_current`."""
    made = content_hash(read_json(manifest))
    told = {"manifest": made, "made_with": {**made_with, "probe": PROBE}, "files": files}
    write_json(_seen(manifest), told)


def is_current(manifest: Path, folder: str | Path, **made_with: Any) -> bool:
    """Whether ``manifest`` was made from what lies in ``folder`` now, and is as it was made.

    Files whose stamps are others are read: a copy of the same bytes is no change, and is remembered
    as it looks now. True as well where there is no such folder: results on another machine. Raises
    UserError where a folder cannot be listed.
    """
    if not manifest.exists() or not os.path.lexists(folder):
        return manifest.exists()
    now, asked = looks(folder), {**made_with, "probe": PROBE}
    try:
        told = read_json(manifest)
        rows = {row["path"]: row for row in told["videos"]}
        if _seen(manifest).exists():
            seen = read_json(_seen(manifest))
        else:  # an earlier version, which compared times with the manifest's
            made_ns = manifest.stat().st_mtime_ns
            older = {n: s for n, s in now.items() if s is None or s[1] <= made_ns}
            same = {n: s for n, s in older.items() if (s and s[0]) == rows[n]["size_bytes"]}
            seen = {"made_with": {**asked, "window": told["window"]}, "files": same}
        made, found = seen.get("manifest"), content_hash(told)  # earlier versions kept no hash
        if made not in (None, found) or seen["made_with"] != asked or now.keys() != rows.keys():
            return False
        changed = [name for name in now if now[name] != seen["files"].get(name, "never seen")]
        for name in changed:
            sha256 = rows[name]["sha256"]
            if sha256 is None or sha256 != file_hash(path_of(name, Path(folder))):
                return False
    except (UserError, OSError, LookupError, TypeError, ValueError, AttributeError):
        return False
    if changed or made is None:
        with suppress(OSError):  # somebody else's results
            remember(manifest, now, **made_with)
    return True


def _seen(manifest: Path) -> Path:
    return manifest.with_name(f"{manifest.stem}.seen.json")
