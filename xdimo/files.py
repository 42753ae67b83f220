"""Files written whole or not at all, and content named by its hash."""

import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import isfinite
from multiprocessing import util
from pathlib import Path
from typing import Any

from xdimo.echo import say
from xdimo.errors import FileError, UserError

PARTIAL = re.compile(r"\..+\.[a-z0-9_]{8}\.part(\.\w+)?")  # what `whole` calls a file under way


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal content gives equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def content_hash(value: Any) -> str:
    """``sha256:<hex>`` of a JSON value, whatever the order of its keys."""
    return text_hash(canonical(value))


def text_hash(text: str) -> str:
    """``sha256:<hex>`` of a text, as ``file_hash`` gives it once it is written."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def file_hash(path: str | Path) -> str:
    """``sha256:<hex>`` of a file's bytes. Raises OSError where it cannot be read."""
    with open(path, "rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well.

    On any error (a full disk too) the temporary file is removed and ``path`` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    clean(path.parent)
    handle, partial = _begin(path)
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.replace(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()
        os.close(handle)


def _begin(path: Path) -> tuple[int, Path]:
    """A new temporary file, locked as long as its writer lives: open, and its path."""
    while True:
        # The suffix is kept: some writers choose their format by it.
        handle, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.stem}.", suffix=f".part{path.suffix}"
        )
        with suppress(OSError):  # a file system without locks: nobody can take it for dead
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(name):  # not taken for a dead writer's before it was locked
            return handle, Path(name)
        os.close(handle)


def clean(folder: Path) -> None:
    """Removes what writers that were killed left in ``folder``; a living writer's stays."""
    for path in folder.iterdir():
        if not PARTIAL.fullmatch(path.name):
            continue
        with suppress(OSError):
            handle = os.open(path, os.O_RDWR)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(handle)


@contextmanager
def locked(path: Path, what: str, *, wait: bool) -> Iterator[None]:
    """Holds the lock ``path`` while inside, and says in it for ``what``. It ends with its process.

    Where another has it: waits, and prints for whom, or raises UserError that says so.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Without O_CREAT where it exists: in /tmp Linux may refuse that for another user's file.
        with suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            path.chmod(0o666 if wait else 0o644)  # who waits may be another user
        lock = os.open(path, os.O_RDWR)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened as a lock: {error.strerror}") from None
    try:
        _take(lock, path, wait)
        who = f"{what}, process {os.getpid()} on {socket.gethostname()}"
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{who} since {time.strftime('%Y-%m-%d %H:%M:%S')}".encode(), 0)
        yield
    finally:
        os.close(lock)


@contextmanager
def alone(what: str, queued: bool) -> Iterator[None]:
    """While inside nothing else that measures runs on this machine: a queue or a lock sees to it.

    The lock is one for all users; the variable XDIMO_LOCKS names another folder for it.
    """
    if queued:
        yield
        return
    with locked(Path(os.environ.get("XDIMO_LOCKS", "/tmp")) / "xdimo.lock", what, wait=True):
        yield


def _take(lock: int, path: Path, wait: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 1000, 0).decode(errors="replace")
        if not wait:
            raise UserError(
                f"{path}: held by {holder}; wait for its end, then give the same command again"
            ) from None
        say(f"waiting for {holder} ({path})")
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError as error:
        say(f"{path}: cannot lock ({error.strerror}); going on without")


def write_text(path: str | Path, text: str) -> None:
    with whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Readable JSON, one trailing newline. NaN and infinity are refused (ValueError)."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_bytes(path: str | Path) -> bytes:
    """Raises FileError with the file's name and why it cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        link = os.path.islink(path)
        raise FileError(f"{path}: {'a link to nothing' if link else 'no such file'}") from None
    except IsADirectoryError:
        raise FileError(f"{path}: a folder; expected a file") from None
    except OSError as error:
        raise FileError(f"{path}: cannot be read: {error.strerror}") from None


def read_text(path: str | Path) -> str:
    """UTF-8, with or without a byte order mark. Raises FileError that names the file and line."""
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8-sig")
        wrong = raw.find(b"\0")
    except UnicodeDecodeError as error:
        wrong = error.start
    if wrong >= 0:
        line = raw.count(b"\n", 0, wrong) + 1
        raise FileError(
            f"{path} line {line}: not UTF-8 text (byte {raw[wrong]:#04x}); "
            f"{_encoding(raw)}save it as UTF-8"
        )
    return text


def _encoding(raw: bytes) -> str:
    """What bytes that are no UTF-8 look like, as the start of an advice."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or raw.count(b"\0") > len(raw) // 4:
        return "it looks like UTF-16; "
    with suppress(UnicodeDecodeError):
        raw.decode("gb18030")
        return "it looks like GB18030; "
    return ""


def read_json(path: str | Path) -> Any:
    """Raises FileError with the file's name where it cannot be read, is no JSON, or has a number
    that is not finite.
    """
    try:
        return json.loads(read_text(path), parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not JSON ({error})") from None


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{text}: not a finite number")
    return value


def read_torch(path: Path, otherwise: str) -> Any:
    """What torch.save wrote, on the CPU: tensors and plain values. Nothing in the file is run.

    Raises UserError that says ``otherwise``; torch's own words would advise to run the file.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: {otherwise}: {error.strerror or error}") from None
    except Exception as error:  # torch.load raises many kinds
        raise UserError(
            f"{path}: {otherwise} ({type(error).__name__}): damaged, of another kind, or with code "
            "in it, which is never run"
        ) from None


def shorten_sockets() -> None:
    """Lets this process's children exchange data also where TMPDIR is too long for a socket.

    multiprocessing puts its sockets into the temporary folder, and a socket's path has at most 107
    bytes: it cannot start a child there, and a loader's workers hang. It then gets another folder;
    all else stays in TMPDIR. Call it before the first child. Raises UserError.
    """
    own = tempfile.gettempdir()
    for base in (own, "/tmp", "/var/tmp", "/dev/shm"):
        if not _takes_sockets(base):
            continue
        tempfile.tempdir = base
        try:
            util.get_temp_dir()  # made once a process, and known to its children
        finally:
            tempfile.tempdir = own
        return
    raise UserError(
        f"TMPDIR: {own}: no socket can be made there ({len(os.fsencode(own))} bytes, at most 75), "
        "nor in /tmp, /var/tmp or /dev/shm; set TMPDIR to a short folder with room"
    )


def _takes_sockets(base: str) -> bool:
    try:
        with (
            tempfile.TemporaryDirectory(prefix="pymp-", dir=base) as folder,
            socket.socket(socket.AF_UNIX) as trial,
        ):
            trial.bind(f"{folder}/listener-12345678")
    except OSError:
        return False
    return True
