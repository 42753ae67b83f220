"""Texts of configs and records as parts of a Markdown document, whatever stands in them."""

import re
from os.path import relpath
from pathlib import Path
from urllib.parse import quote


def escaped(text: str) -> str:
    """Text that cannot end its Markdown cell, nor be HTML."""
    # A backslash before the one that guards a bar would undo it.
    return re.sub(r"(\\*)\|", lambda found: 2 * found[1] + r"\|", inline(text))


def inline(text: str) -> str:
    """Text on one line, in which nothing is an HTML tag or entity."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)


def code(text: str) -> str:
    """``text`` as a code span, which a backtick in it would end."""
    return "`" + text.replace("`", "'") + "`"


def link(name: str, path: Path, folder: Path) -> str:
    """A link from a document in ``folder``."""
    slash = "/" * name.endswith("/")
    return f"[{name}]({quote(Path(relpath(path, folder)).as_posix())}{slash})"
