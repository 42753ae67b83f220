"""Files by which a controller and people talk: why each run waits, and what shall be cancelled."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from xdimo.files import read_json, write_json


class Board:
    def __init__(self, folder: Path) -> None:
        self._waiting, self._cancel = folder / "waiting.json", folder / "cancel.json"
        self._shown: dict[str, str] | None = None

    def open(self) -> None:
        """What was asked of an earlier controller is over."""
        self._cancel.unlink(missing_ok=True)

    def shut(self) -> None:
        self._waiting.unlink(missing_ok=True)

    def show(self, why: Mapping[str, str]) -> None:
        """Name -> why it waits, of all that does; written where it has changed."""
        if why != self._shown:
            self._shown = dict(why)
            write_json(self._waiting, self._shown)

    def shown(self) -> dict[str, str]:
        """What the controller showed last; empty where it showed nothing, or has ended well."""
        return dict(read_json(self._waiting)) if self._waiting.exists() else {}

    def ask_to_cancel(self, names: Sequence[str]) -> None:
        """Targets, cells or runs that a controller shall no longer hold."""
        write_json(self._cancel, list(names))

    def asked_to_cancel(self) -> list[str]:
        """Names asked for since the last time."""
        if not self._cancel.exists():
            return []
        names = list(read_json(self._cancel))
        self._cancel.unlink()
        return names
