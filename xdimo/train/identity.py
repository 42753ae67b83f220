"""What code, on what machine: the part of a record that makes its numbers comparable."""

import hashlib
import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import xdimo

PACKAGE = Path(xdimo.__file__).parent


def code_identity() -> dict[str, Any]:
    """Commit and dirty flag of the checkout (None without one), and a hash of the package.

    ``unknown``: why git does not tell them, though this is a checkout.
    """
    commit, dirty, unknown = None, None, None
    # The checkout must be this package's own, not one that happens to lie above a site-packages.
    if (PACKAGE.parent / ".git").exists():
        try:
            commit = _git("rev-parse", "HEAD")
            dirty = bool(_git("status", "--porcelain", "--", str(PACKAGE)))
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
            commit, unknown = None, said.strip().splitlines()[0].removeprefix("fatal: ")
    return {"commit": commit, "dirty": dirty, "package": _package_hash(), "unknown": unknown}


def _git(*arguments: str) -> str:
    """What git says of this package's checkout, not of one that GIT_DIR or the like names."""
    ours = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    done = subprocess.run(command, env=ours, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _package_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return "sha256:" + digest.hexdigest()


def versions() -> dict[str, str | None]:
    """Versions of what a number depends on; None where it is not there."""
    names = ("xdimo", "torch", "timm", "einops", "diffusers", "decord", "av", "numpy")
    found = {name: _version(name) for name in names}
    return {"python": platform.python_version(), **found, "cuda": _cuda(), "driver": driver()}


def _version(name: str) -> str | None:
    if name == "torch":
        import torch

        return str(torch.__version__)
    if name == "xdimo":
        return xdimo.__version__
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cuda() -> str | None:
    import torch

    return torch.version.cuda if torch.cuda.is_available() else None


def driver() -> str | None:
    """Version of the NVIDIA driver; None where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def processor() -> str:
    """The CPU's own name for itself, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def host() -> str:
    return socket.gethostname()


def job() -> str | None:
    """Id of the queue's job, where a queue runs us."""
    return next(
        (os.environ[key] for key in ("JH_JOBID", "LSB_JOBID", "SLURM_JOB_ID") if key in os.environ),
        None,
    )
