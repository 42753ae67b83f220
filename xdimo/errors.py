"""What a person did wrong, said in one line."""


class UserError(Exception):
    """Bad input. The message names the file, key or value, and what was expected."""


class DataError(UserError):
    """Videos or latents that are missing, changed, or not what the spec names."""
