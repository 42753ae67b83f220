"""Which files below a folder are asked whether they are videos, and whether any has changed.

A name is bytes, whatever the locale: it stands in the manifest where those bytes are UTF-8.
"""

import os
import stat
from pathlib import Path
from typing import Any

from xdimo.errors import UserError
from xdimo.files import content_hash, read_json

PROBE = 2  # raised when probing changes: rows probed before are then probed again


def list_videos(folder: str | Path) -> list[str]:
    """Paths of all files below ``folder``, sorted; empty where the folder is absent.

    Any file may be a video: its content decides, not its name. A link that leads nowhere is listed
    too. Left out are names that begin with a dot and names that end in ``.part`` (copies and
    downloads under way). Links are followed, each folder once. Raises UserError where a folder
    below cannot be listed: what it holds is not known.
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
        elif stat.S_ISREG(mode):
            files.append(entry.path)
    return files


def _left_out(name: str) -> bool:
    return name.startswith(".") or name.endswith(".part")


def name_of(path: str, folder: str | Path) -> str:
    """What the manifest calls a listed file; bytes that are no UTF-8 stand there as \\xNN."""
    name = os.fsencode(os.path.relpath(path, folder))
    return name.decode("utf-8", "backslashreplace")


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


def made_from(folder: str | Path, *, window: int, decoder: str, expected: int | None) -> str:
    """Hash over all that a manifest is made from, without reading a video. Raises UserError."""
    listed = [[name_of(path, folder), stamp(path)] for path in list_videos(folder)]
    return content_hash([PROBE, window, decoder, expected, listed])


def seen_path(manifest: Path) -> Path:
    """Holds what the manifest was made from."""
    return manifest.with_name(f"{manifest.stem}.seen.json")


def is_current(manifest: Path, folder: str | Path, **made_with: Any) -> bool:
    """Whether ``manifest`` was made from what lies in ``folder`` now, files of any age.

    True as well where there is no such folder: results that were copied to another machine. A
    manifest of an earlier version, which left nothing to compare, is taken for current where names
    and sizes are its rows' and no file is newer. Raises UserError where a folder cannot be listed.
    """
    if not manifest.exists() or not os.path.lexists(folder):
        return manifest.exists()
    seen = seen_path(manifest)
    try:
        if seen.exists():
            return bool(read_json(seen) == made_from(folder, **made_with))
        made = read_json(manifest)
        rows = {row["path"]: row["size_bytes"] for row in made["videos"]}
        same_window = made["window"] == made_with["window"]
    except (UserError, OSError, LookupError, TypeError):
        return False
    stamps = {name_of(path, folder): stamp(path) for path in list_videos(folder)}
    newest = max((times[1] for times in stamps.values() if times), default=0)
    sizes = {name: times and times[0] for name, times in stamps.items()}
    known = {name: sizes.get(name) if size is None else size for name, size in rows.items()}
    return bool(same_window and sizes == known and newest <= manifest.stat().st_mtime_ns)
