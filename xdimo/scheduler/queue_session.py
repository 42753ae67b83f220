"""A config's campaign in the queue: its ledger, its rules, and its work."""

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xdimo.config.schema import Bench
from xdimo.errors import UserError
from xdimo.files import content_hash, file_hash
from xdimo.scheduler.admission import Limits
from xdimo.scheduler.controller_files import Board
from xdimo.scheduler.dialects import choose
from xdimo.scheduler.dispatcher import Spool
from xdimo.scheduler.dispatcher import cancel as end
from xdimo.scheduler.site import Silent, Site
from xdimo.scheduler.submissions import Ledger
from xdimo.scheduler.task import PREFLIGHT, Rules, Work, matches, require_known
from xdimo.spec import read_spec

PREFLIGHT_MIN = 2


def site_of(bench: Bench, transcript: Path | None = None) -> Site:
    """Raises UserError where no scheduler is on PATH."""
    return Site(choose(bench.queue.dialect), bench.queue.command_timeout_s, transcript)


def open_spool(
    bench: Bench,
    configs: Sequence[str],
    override: Mapping[str, Any],
    say: Callable[[str], None],
) -> Spool:
    """The dispatcher of a campaign, which holds its ledger until it is shut.

    ``configs`` and ``override``: how a job reads the same config. Raises UserError where a target
    in service has no queue, or another process holds the ledger.
    """
    queue = bench.queue
    for name, target in bench.targets.items():
        if target.enabled and target.queue is None:
            raise UserError(f"targets.{name}.queue: null; expected the queue that takes its jobs")

    def look(target: str) -> Work:
        return preflight(bench, target, configs, override)

    rules = Rules(
        targets=bench.targets,
        limits=Limits(bench.pending_limit, queue.admission),
        cpus_per_gpu=bench.cpus_per_gpu,
        poll_s=queue.poll_s,
        latency_s=queue.latency_s,
        grace_s=queue.grace_s,
        closed_s=queue.closed_s,
        preflight=look if queue.preflight else None,
    )
    spool = Spool(site_of(bench), Ledger(Path(bench.queue_folder)), rules, say)
    spool.open()
    return spool


def work_of(
    bench: Bench,
    *,
    target: str,
    rule: str,
    command: str,
    inputs: Sequence[Path],
    answer: Path,
    spec: Path | None,
    interrupted: bool,
) -> Work:
    """One job of the workflow: a run where it has a spec, else a rule that needs one GPU.

    Raises UserError where the spec cannot be read.
    """
    if spec is not None:
        run = read_spec(spec)
        name, content, cards = run.run, run.hash, bench.targets[target].gpus
        alone = bench.queue.alone and run.cell == bench.baseline
    else:
        files = {str(path): file_hash(path) for path in inputs}
        name, content, cards = rule, content_hash({"command": command, "inputs": files}), 1
        alone = False
    return Work(
        name=name,
        content=content,
        target=target,
        cards=cards,
        cpus=bench.cpus_per_gpu * cards,
        command=command,
        workdir=Path.cwd(),
        answer=answer.absolute(),
        is_run=spec is not None,
        alone=alone,
        walltime_min=bench.targets[target].walltime_min,
        interrupted=interrupted,
    )


def preflight(bench: Bench, name: str, configs: Sequence[str], override: Mapping[str, Any]) -> Work:
    """The job that looks at a target: its real set-up, queue and cards, two minutes at most."""
    target = bench.targets[name]
    answer = (Path(bench.queue_folder) / f"{PREFLIGHT}{name}.json").absolute()
    command = ["python", "-m", "xdimo", "doctor", "--here", name, "--config", *configs]
    command += ["--override", json.dumps(override), "--output", str(answer)]
    setup = "".join(f"{line}\n" for line in target.setup)
    return Work(
        name=f"{PREFLIGHT}{name}",
        content=content_hash({"campaign": bench.campaign, "target": target.model_dump()}),
        target=name,
        cards=target.gpus,
        cpus=bench.cpus_per_gpu * target.gpus,
        command=setup + shlex.join(command),
        workdir=Path.cwd(),
        answer=answer,
        is_run=False,
        walltime_min=min(PREFLIGHT_MIN, target.walltime_min),
    )


def cancel(bench: Bench, names: Sequence[str]) -> str:
    """Ends the jobs of targets, cells or runs (none named = all); returns what was done.

    Raises UserError on an unknown name, or where the scheduler does not answer.
    """
    runs = bench.runs([*bench.cells, *bench.twins])
    known = [*bench.targets, *bench.cells, *bench.twins, *runs]
    require_known(names, known)
    asked = list(names) or list(bench.targets)
    ledger, site = Ledger(Path(bench.queue_folder)), site_of(bench)
    entries = [
        entry
        for entry in ledger.entries()
        if entry.open and entry.outcome is None and matches(entry.work, entry.target, asked)
    ]
    if ledger.folder.exists():
        Board(ledger.folder).ask_to_cancel(asked)  # a controller may hold more of them
    try:
        said = end(site, entries)
    except Silent as silent:
        raise UserError(f"{silent}; nothing is known to have ended, ask again") from None
    ended = ", ".join(f"{entry.work} ({entry.label})" for entry in entries)
    return f"ended: {ended or 'no job'}" + (f"\n{said}" if said else "")
