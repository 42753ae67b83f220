"""Which files below a folder are asked whether they are videos."""

import os
from pathlib import Path

from xdimo.errors import UserError


def list_videos(folder: str | Path) -> list[str]:
    """Paths of all files below ``folder``, sorted; empty where the folder is absent.

    Any file may be a video: its content decides, not its name. Left out are names that begin with a
    dot and names that end in ``.part`` (copies and downloads under way). Links are followed, each
    folder once. Raises UserError where a folder below cannot be listed: what it holds is not known.
    """
    if not os.path.lexists(folder):
        return []
    return sorted(_below(str(folder), set()))


def _below(folder: str, seen: set[tuple[int, int]]) -> list[str]:
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            return []
        seen.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            shown = [entry for entry in entries if not _left_out(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot list this folder of videos: {error.strerror}") from None
    files = [entry.path for entry in shown if entry.is_file()]
    for entry in shown:
        if entry.is_dir():
            files += _below(entry.path, seen)
    return files


def _left_out(name: str) -> bool:
    return name.startswith(".") or name.endswith(".part")
