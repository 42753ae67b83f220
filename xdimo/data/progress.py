"""Progress with the time left, for a person at a terminal and for a log file."""

import sys

from tqdm import tqdm


def progress(total: int, done: int, unit: str, what: str) -> tqdm:
    """A bar on stderr; in a log file a line now and then, not one a second."""
    every_s = 1 if sys.stderr.isatty() else 30
    return tqdm(
        total=total, initial=done, unit=unit, desc=what, mininterval=every_s, maxinterval=every_s
    )
