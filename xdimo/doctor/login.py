"""`xdimo doctor`: what can be seen before anything is submitted. Each line: ok, or what to mend."""

import importlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xdimo.config.schema import Bench, Hardware
from xdimo.data.vae import locate
from xdimo.data.videos import list_videos
from xdimo.doctor.finding import Finding
from xdimo.errors import UserError
from xdimo.files import read_json
from xdimo.scheduler.admission import Limits, admit
from xdimo.scheduler.dialects import Job
from xdimo.scheduler.hosts import Host, free_cards, out_of_service
from xdimo.scheduler.queue_session import open_spool, preflight, site_of
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import Ledger
from xdimo.train.machine import cards_here

DISK_GIB = 20  # FaceForensics' latents are near 10 GB


@dataclass(frozen=True)
class _Wanted:
    name: str
    target: str
    cards: int
    alone: bool


def look(bench: Bench, hardware: Hardware, transcript: Path | None) -> Iterator[Finding]:
    """Line by line, as each is found."""
    if any(target.queue for target in bench.targets.values()):
        try:
            site = site_of(bench, transcript)
        except UserError as error:
            yield Finding(False, str(error), "profiles/default runs on this machine alone")
        else:
            yield from _queue(bench, site)
    else:
        yield Finding(True, "no target has a queue: runs are on this machine")
    yield from _data(bench)
    yield from _disk(bench)
    yield from memory_claims(bench, hardware)
    yield from _cards(bench, hardware)


def look_on(
    bench: Bench, name: str, configs: Sequence[str], override: Mapping[str, Any]
) -> Iterator[Finding]:
    """Submits the job that looks at a target, waits for it, and gives what it found.

    Raises UserError where the scheduler does not answer before it is submitted.
    """
    spool = open_spool(bench, configs, override, say=lambda message: print(message, flush=True))
    work = preflight(bench, name, configs, override)
    try:
        spool.add(work)
        while work.name in spool.waiting or work.name in spool.live:
            spool.poll()
            if spool.silent and work.name in spool.waiting:
                raise UserError("the scheduler does not answer; nothing was submitted")
            time.sleep(bench.queue.poll_s)
    finally:
        spool.shut()
    if not work.answer.exists():
        entry = spool.ledger.newest(work.name)
        folder = entry.folder if entry else spool.ledger.folder
        yield Finding(False, f"the job ended without a word; {folder} has its output")
        return
    for line in read_json(work.answer)["lines"]:
        yield Finding(**line)


def _queue(bench: Bench, site: Site) -> Iterator[Finding]:
    dialect = site.dialect
    yield Finding(True, f"scheduler: {dialect.name} ({shutil.which(dialect.submit)})")
    jobs: dict[str, Job] = {}
    try:
        jobs = site.jobs()
        pending = sum(job.state == "pending" for job in jobs.values())
        running = sum(job.alive for job in jobs.values()) - pending
        yield Finding(True, f"jobs of yours: {running} running, {pending} pending")
    except Silent as silent:
        yield Finding(False, str(silent), "nothing is submitted while it does not answer")
        return
    if dialect.limits:
        try:
            yield Finding(True, f"limits: {' / '.join(site.ask(dialect.limits).text.split())}")
        except Silent as silent:
            yield Finding(False, str(silent), "pending_limit of the config is used")
    hosts: dict[str, Host] | None = None
    try:
        hosts = site.hosts()
        names = ", ".join(f"{host.name} {host.status}" for host in hosts.values())
        yield Finding(True, f"hosts: {names}")
    except Silent as silent:
        yield Finding(False, str(silent), "gpus_free of the config is used; keep --transcript DIR")
    entries = [entry for entry in Ledger(Path(bench.queue_folder)).entries() if entry.open]
    taken: dict[str, int] = {}
    for entry in entries:
        taken[entry.target] = taken.get(entry.target, 0) + entry.cards
    free, said = free_cards(bench.targets, hosts, taken, bench.cpus_per_gpu)
    for message in said:
        yield Finding(False, message, "list the nodes under targets.<name>.hosts as they are named")
    out = out_of_service(bench.targets, hosts)
    for name, target in bench.targets.items():
        if not target.enabled:
            yield Finding(True, f"{name}: out of service: {target.reason}")
        elif name in out:
            yield Finding(False, f"{name}: {out[name]}", "its cells will end as unavailable")
        else:
            source = "hosts command" if hosts and target.hosts else "config"
            cards = sum(free[name])
            yield Finding(True, f"{name}: {cards} of {target.gpus_total} cards free ({source})")
    live = {entry.work for entry in entries}
    ready = [
        _Wanted(run, cell.target, bench.targets[cell.target].gpus, cell.name == bench.baseline)
        for run in bench.runs(bench.in_service)
        for cell in [bench.cells[run.rpartition("-r")[0]]]
        if run not in live
        and cell.target not in out
        and not (Path(bench.runs_folder) / run / "run.json").exists()
    ]
    limits = Limits(bench.pending_limit, bench.queue.admission)
    now = admit(ready, entries, free, pending, limits)
    yield Finding(True, f"would submit now: {', '.join(one.name for one in now) or 'nothing'}")


def _data(bench: Bench) -> Iterator[Finding]:
    folder = Path(bench.dataset.videos)
    expected = bench.dataset.expected_videos
    if not folder.is_dir() and bench.dataset.fetched:
        yield Finding(True, f"{folder}: not there yet, will be fetched")
    elif not folder.is_dir():
        fetched = ", `fetched` for those of dataset.fetch" if bench.dataset.fetch else ""
        yield Finding(False, f"{folder}: no such folder", f"set dataset.videos{fetched}")
    else:
        count = len(list_videos(bench.dataset.videos))
        enough = count >= (expected or 1)
        missing = "set dataset.expected_videos, or bring the missing ones"
        mend = None if enough else missing if expected else "bring videos, or set dataset.videos"
        yield Finding(enough, f"{folder}: {count} files, {expected or 'any number'} expected", mend)
    yield from _imports()
    weights = bench.vae.weights
    if bench.vae.random:
        yield Finding(True, "VAE: random weights (changes no speed; every report says so)")
    else:
        yield _try(lambda: f"VAE: {locate(Path(weights))[1]}", "set vae.weights")


def _imports() -> Iterator[Finding]:
    for name in ("av", "decord"):
        yield _try(partial(_version, name), f"pip install {name}")


def _version(name: str) -> str:
    return f"decoder: {name} {importlib.import_module(name).__version__}"


def _try(what: Callable[[], str], mend: str) -> Finding:
    try:
        return Finding(True, what())
    except (ImportError, OSError, UserError) as error:
        return Finding(False, str(error), mend)


def _disk(bench: Bench) -> Iterator[Finding]:
    folder = Path(bench.results)
    while not folder.exists():
        folder = folder.parent
    free_gib = shutil.disk_usage(folder).free / 1024**3
    mend = None if free_gib >= DISK_GIB else f"latents and records want {DISK_GIB} GiB"
    yield Finding(mend is None, f"{bench.results}: {free_gib:.0f} GiB free", mend)


def memory_claims(bench: Bench, hardware: Hardware) -> Iterator[Finding]:
    """Cards of the config with their memory; a site's own page has been wrong about it."""
    for name, target in bench.targets.items():
        card = hardware.cards[target.card]
        if target.device == "cuda":
            memory = "no memory_gb" if card.memory_gb is None else f"{card.memory_gb:g} GB a card"
            yield Finding(True, f"{name}: {card.label}, {memory} (hardware.yaml)")


def _cards(bench: Bench, hardware: Hardware) -> Iterator[Finding]:
    """Whether this machine has the cards of targets that run on it."""
    targets = {
        name: target
        for name, target in bench.targets.items()
        if target.enabled and target.queue is None and target.device == "cuda"
    }
    if not targets:
        return
    try:
        found = [device for device, _ in cards_here()]
    except UserError as error:
        yield Finding(False, str(error), "runs of targets without a queue need them here")
        return
    for name, target in targets.items():
        card = hardware.cards[target.card]
        here = sum(device in card.devices for device in found)
        enough = here >= target.gpus
        text = f"{name}: this machine has {here} of the {target.gpus} x {card.label} of a run"
        yield Finding(enough, text, None if enough else "run its cells where the cards are")
