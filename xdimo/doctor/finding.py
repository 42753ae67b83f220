"""One line of `xdimo doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    ok: bool
    what: str
    mend: str | None = None

    def __str__(self) -> str:
        return f"{'ok     ' if self.ok else 'problem'}  {self.what}" + (
            f"; {self.mend}" if self.mend else ""
        )
