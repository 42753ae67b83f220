"""What a person did wrong, said in one line."""

import re

# Files may have names with line ends, or with bytes that are no text.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(Exception):
    """Bad input. The message names the file, key or value, and what was expected."""

    def __init__(self, message: object) -> None:
        super().__init__(_UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], str(message)))


class FileError(UserError):
    """What is wrong with one file. The message begins with its name."""


class DataError(UserError):
    """Videos or latents that are missing, changed, or not what the spec names."""
