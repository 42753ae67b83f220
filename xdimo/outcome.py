"""How a run can end."""

from typing import Literal

Outcome = Literal["ok", "oom", "nan", "timeout", "config", "data", "comm", "crash", "killed"]

# These are the answer: trying again would give it again. The others are tried again.
ANSWERS = frozenset({"ok", "oom", "nan", "timeout", "config", "data"})
