"""`xdimo doctor --here TARGET`: what a job finds on the machine it was given, in two minutes.

Run by a queued job with the target's set-up, queue and cards, which `xdimo doctor --on TARGET`
submits.
Each check that fails says how to mend it; the others are still made.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xdimo.config.schema import Bench, Card, Hardware, Target
from xdimo.data.vae import locate
from xdimo.doctor.finding import Finding
from xdimo.errors import UserError
from xdimo.files import read_json, write_json
from xdimo.spec import dataset_in, plan, resolve
from xdimo.train import identity
from xdimo.train.launch import launch

# Seconds; all of it fits into the job's two minutes.
TORCH_S, RANKS_S, STEP_S = 30, 40, 45
# A step that is captured is so before the timed ones, after xdimo.train.step.EAGER_STEPS.
STEPS = {"warmup": 4, "timed": 2, "checkpoint_every": None, "profiled": 0}
MEMORY_SHARE = 0.9  # of the nominal size: the driver keeps a little for itself

_CARDS = """
import json, torch
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda,
    "cards": [[card.name, card.total_memory / 1e9] for card in cards]}))
"""

# One process a card: a product, and a sum over all of them, both checked.
_RANKS = """
import os, sys, torch, torch.distributed as dist
rank, world, cuda = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sys.argv[1] == "cuda"
device = torch.device("cuda", rank) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
ones = torch.ones(256, 256, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
assert (ones @ ones == 256).all(), "matmul: wrong result"
total = torch.full((1 << 20,), rank + 1.0, device=device)
dist.all_reduce(total)
assert (total == world * (world + 1) / 2).all(), "all-reduce: wrong result"
dist.destroy_process_group()
"""


def check(bench: Bench, hardware: Hardware, name: str) -> Iterator[Finding]:
    """Line by line, as each is found."""
    target = bench.targets[name]
    yield Finding(True, f"{socket.gethostname()}, python {sys.executable}")
    yield _shared(bench)
    yield from _cards(target, hardware.cards[target.card])
    yield _ranks(target)
    yield from _step(bench, hardware, name)


def _shared(bench: Bench) -> Finding:
    """Whether this machine sees the folder of results that the login node writes to."""
    folder = Path(bench.queue_folder)
    if not folder.is_dir():
        return Finding(False, f"{folder.absolute()}: not seen here", "put results on a shared disk")
    if not os.access(folder, os.W_OK):
        return Finding(False, f"{folder.absolute()}: not writable here", "ask for write access")
    return Finding(True, f"{folder.absolute()}: shared and writable")


def _python(*arguments: str, timeout_s: int) -> tuple[bool, str]:
    """Whether a child succeeded, and its last words."""
    command = [sys.executable, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return False, f"no answer in {timeout_s} s"
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if re.search(r"Error: *\S", line)]
        return False, (errors or done.stderr.splitlines() or ["no word"])[-1]
    return True, done.stdout.strip()


def _cards(target: Target, card: Card) -> Iterator[Finding]:
    if target.device == "cpu":
        yield Finding(True, "device cpu: no cards asked for")
        return
    driver = identity.driver() or "none"
    good, said = _python("-c", _CARDS, timeout_s=TORCH_S)
    if not good:
        yield Finding(False, f"torch: {said}", "mend targets.<name>.setup")
        return
    found = json.loads(said.splitlines()[-1])
    cards = found["cards"]
    versions = f"torch {found['torch']} for CUDA {found['cuda']}, driver {driver}"
    if not cards:
        yield Finding(
            False, f"{versions}: no card", "a driver too old for this torch, or no GPU job"
        )
        return
    yield Finding(True, versions)
    names = sorted({name for name, _ in cards})
    what = f"{len(cards)} x {', '.join(names)}"
    if len(cards) < target.gpus:
        yield Finding(False, f"{what}; a run takes {target.gpus}", "the queue gave fewer cards")
    elif others := [name for name in names if name not in card.devices]:
        known = ", ".join(card.devices)
        yield Finding(
            False,
            f"{what}; expected {known}",
            f"another queue, or list {others[0]} in hardware.yaml",
        )
    else:
        yield Finding(True, what)
    least_gb = min(memory for _, memory in cards)
    short = card.memory_gb is not None and least_gb < MEMORY_SHARE * card.memory_gb
    mend = f"hardware.yaml says {card.memory_gb:g} GB" if short else None
    yield Finding(not short, f"{least_gb:.1f} GB a card", mend)


def _ranks(target: Target) -> Finding:
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={target.gpus}"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as program:
        program.write(_RANKS)
        program.flush()
        command = [*torchrun, program.name, target.device]
        good, said = _python(*command, timeout_s=RANKS_S)
    what = f"matmul, and a sum over {target.gpus} processes"
    return Finding(good, what if good else f"{what}: {said}", None if good else "the cards or NCCL")


def _step(bench: Bench, hardware: Hardware, name: str) -> Iterator[Finding]:
    """A run of two timed steps of the target's baseline, with its latents (or VAE) and model."""
    cell = bench.baseline_cell(name)
    manifest = Path(bench.results) / "data/manifest.json"
    index = Path(bench.results) / "data/latents/index.json"
    cached = cell.mode == "cached"
    missing = [str(path) for path in (manifest, *([index] if cached else [])) if not path.exists()]
    if missing:
        yield Finding(True, f"no training step tried: {', '.join(missing)} not made yet")
        return
    what = f"{cell.name}: reads its {'latents' if cached else 'videos'} and trains a step"
    try:
        with tempfile.TemporaryDirectory() as folder:
            ending = _train(bench, hardware, f"{cell.name}-r1", manifest, index, Path(folder))
    except (OSError, UserError) as error:
        yield Finding(False, f"{what}: {error}", "the set-up, or paths that this machine sees")
        return
    good = ending["outcome"] == "ok"
    said = "" if good else f": {ending['outcome']}, {ending['reason']}"
    yield Finding(good, what + said, None if good else f"log of the job {identity.job()}")


def _train(
    bench: Bench, hardware: Hardware, run: str, manifest: Path, index: Path, folder: Path
) -> Any:
    weights = None if bench.vae.random else locate(Path(bench.vae.weights))[1]
    planned = {**plan(bench, run), "steps": STEPS, "calibrate": False}
    spec = resolve(planned, str(dataset_in(manifest)), weights)
    write_json(folder / "spec.json", spec.to_json())
    online = spec.data.mode == "online"
    launch(
        folder / "spec.json",
        data=manifest if online else index,
        videos=Path(bench.dataset.videos) if online else None,
        vae=Path(bench.vae.weights) if online and not bench.vae.random else None,
        output=folder / "run.json",
        hardware=hardware,
        walltime_min=STEP_S / 60,
    )
    return read_json(folder / "attempts/1/run.json")
