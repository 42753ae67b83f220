"""The parent of one run: starts the process group, waits for it, and says how it ended.

It writes ``attempts/N/run.json`` last and whole. Where the outcome is an answer (ok, or an error
that would come again) it writes the run's own ``run.json`` too and exits 0; otherwise it exits 1.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from xdimo.config.schema import Hardware
from xdimo.echo import following, say
from xdimo.errors import UserError
from xdimo.files import alone, clean, file_hash, locked, read_json, write_json
from xdimo.outcome import ANSWERS, NAMED, RETRIED, Outcome, withdraw
from xdimo.spec import RunSpec, read_spec
from xdimo.train import identity, processes
from xdimo.train.failure import CAUSE_LINES, complete, judge
from xdimo.train.instruments import gpu_telemetry
from xdimo.train.machine import require_devices, require_shared_memory
from xdimo.train.worker import LAUNCHED, end_with_parent

SCHEMA = 1
GRACE_S = 10  # from asking the group to end until it is killed
OUTPUT = "output.log"
SAID_BYTES = 1 << 20  # the end of a run's output, in which torchrun says how its ranks ended

# A scheduler's warning before the run limit; the others are somebody's or the system's will.
_WARNING = signal.SIGUSR2
_STOPS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGXCPU,
    signal.SIGALRM,
    signal.SIGVTALRM,
    signal.SIGPROF,
    signal.SIGIO,
    signal.SIGPWR,
    signal.SIGSTKFLT,
)

# What a rank does not inherit: thread counts, what torchrun reads or sets, another's repository or
# plots. All else reaches it: a site's settings of NCCL, torch or NVSHMEM, and of its modules.
_NOT_INHERITED = re.compile(
    r".*_NUM_THREADS|PET_.*|TORCHELASTIC_.*|LOGLEVEL|MASTER_(ADDR|PORT)|ROLE_NAME"
    r"|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|GIT_.*|MPLBACKEND"
)


@dataclass
class _End:
    """Why the group is to end before it does by itself, if it is."""

    outcome: Outcome | None = None
    reason: str | None = None


@dataclass
class _Group:
    """torchrun and its ranks: it in a process group of its own, each of them in another."""

    command: list[str]
    environment: dict[str, str]
    folder: Path  # of the attempt
    uuids: list[str]  # of its GPUs

    def run(self, deadline: float, end: _End) -> tuple[int, _End, list[str]]:
        """torchrun's exit code, why it was to end by then, and which processes nothing ends."""
        word = secrets.token_hex(16)
        # Straight into a file: what becomes of launch's own output must not hold up a rank.
        with open(self.folder / OUTPUT, "ab") as output:
            process = subprocess.Popen(
                self.command,
                env={**self.environment, LAUNCHED: word},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        try:
            with (
                following(self.folder / OUTPUT),
                gpu_telemetry.sampling(self.uuids, self.folder / gpu_telemetry.FILE),
            ):
                self._wait(process, word, deadline, end)
                asked = replace(end)  # what comes later has not ended it
        finally:
            left = processes.end_all(word, GRACE_S)
        code = process.poll()
        return -signal.SIGKILL if code is None else code, asked, left

    def _wait(
        self, process: "subprocess.Popen[bytes]", word: str, deadline: float, end: _End
    ) -> None:
        """Until torchrun has ended, or has not done so GRACE_S after it was asked to."""
        asked: float | None = None
        while process.poll() is None and (asked is None or time.monotonic() < asked + GRACE_S):
            if end.outcome is None and time.monotonic() > deadline:
                end.outcome, end.reason = "timeout", "its wall time is over"
                if stopped := processes.stopped(word):
                    names = ", ".join(stopped)
                    end.outcome = "killed"
                    end.reason = f"stopped by a signal (SIGSTOP) until its wall time: {names}"
            if end.outcome and asked is None:
                asked = time.monotonic()
                if not complete(self.folder / "log.jsonl"):  # else it is ending by itself
                    process.terminate()
            time.sleep(0.1)


def launch(
    spec_path: Path,
    *,
    data: Path,
    videos: Path | None,
    vae: Path | None,
    output: Path,
    hardware: Hardware,
    walltime_min: float,
    queued: bool = True,
    tries: int = 1,
) -> int:
    """Runs ``spec_path``; returns the exit code (0 = ``output`` holds the answer).

    ``data``: index of cached latents, or the manifest in online mode (then with ``videos``).
    ``queued``: a queue keeps other runs away from this machine; else a lock does.
    ``tries``: how often it is run at most, where it ends so that it need not come again; the wall
    time is of each.
    An attempt that has ended, and whose end nobody has used, is taken and nothing is run.
    Raises UserError before anything starts where the spec cannot be read, the run is under way
    already, or this machine has not the devices or the memory it asks for.
    """
    spec = read_spec(spec_path)
    with locked(output.with_name("lock"), spec.run, wait=False):
        for folder in (output.parent, *output.parent.glob("attempts/*/")):
            clean(folder)
        if _taken(spec, output):
            return 0
        end = _End()
        with alone(spec.run, queued), _signals(end):
            for _ in range(tries):
                command = spec_path, data, videos, vae
                outcome = _attempt(spec, command, output, hardware, walltime_min, end)
                if end.outcome or outcome not in RETRIED:
                    break
    return 0 if outcome in ANSWERS else 1


def _taken(spec: RunSpec, output: Path) -> bool:
    """Whether the newest attempt is an answer that nobody has used, put in its place now.

    Its Snakemake was killed while it ran. One that metrics were made of is measured again.
    """
    numbers = [int(p.name) for p in output.parent.glob("attempts/*") if p.name.isdigit()]
    folder = output.parent / "attempts" / str(max(numbers, default=0))
    if (folder / NAMED).exists() or output.with_name("metrics.json").exists():
        return False
    try:
        run = read_json(folder / "run.json")
        if run["spec"] != spec.hash or run["outcome"] not in ANSWERS:
            return False
    except (UserError, LookupError, TypeError):  # none, or damaged
        return False
    place(output, folder, run)
    say(f"{spec.run}: {run['outcome']}, as attempts/{folder.name} ended: it is taken")
    return True


def place(output: Path, folder: Path, run: dict[str, Any]) -> None:
    """Writes the run's own run.json from that of the attempt in ``folder``."""
    log = f"attempts/{folder.name}/{run['log']}" if run["log"] else None
    write_json(output, {**run, "log": log})


def _attempt(
    spec: RunSpec,
    command: tuple[Path, Path, Path | None, Path | None],
    output: Path,
    hardware: Hardware,
    walltime_min: float,
    end: _End,
) -> Outcome:
    """Its outcome. An answer is put in its place, and only then said."""
    started, began = time.time(), time.monotonic()
    uuids = []
    try:
        uuids = require_devices(spec, hardware)
        require_shared_memory(spec)
    except UserError as error:
        if not end.outcome:  # else the signal may have ended the probe
            if identity.job():  # the queue's side has nothing else that says why
                folder = _new_attempt(output.parent)
                _write(spec, folder, "unavailable", str(error), [], started, began)
            raise
    folder = _new_attempt(output.parent)
    withdraw(output)
    outcome: Outcome
    reason: str | None
    if end.outcome:  # no time limit either has been measured
        outcome, reason, cause = "killed", f"{end.reason}, before it began", []
    else:
        group = _Group(_command(spec, *command, folder), environment(spec), folder, uuids)
        code, asked, left = group.run(began + walltime_min * 60, end)
        said = _end_of(folder / OUTPUT)
        outcome, reason, cause = judge(folder, code, said)
        if asked.outcome and outcome != "ok":  # a run that is whole is, whoever wanted its end
            outcome, reason, cause = asked.outcome, asked.reason, said.splitlines()[-CAUSE_LINES:]
        if left:
            reason = f"{reason or 'ended'}; cannot be killed, and still there: {', '.join(left)}"
    run = _write(spec, folder, outcome, reason, cause, started, began)
    if outcome in ANSWERS:
        place(output, folder, run)
    say(f"{spec.run}: {outcome}" + (f" ({reason})" if reason else ""))
    return outcome


def _write(
    spec: RunSpec,
    folder: Path,
    outcome: Outcome,
    reason: str | None,
    cause: list[str],
    started: float,
    began: float,
) -> dict[str, Any]:
    """run.json of the attempt in ``folder``; ``began``: time.monotonic when it ``started``."""
    log = folder / "log.jsonl"
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "run": spec.run,
        "spec": spec.hash,
        "outcome": outcome,
        "reason": reason,
        "attempt": int(folder.name),
        "job": identity.job(),
        "host": identity.host(),
        "started": _utc(started),
        # Not the wall clock's: it may have been set in between.
        "ended": _utc(started + time.monotonic() - began),
        "log": log.name if log.exists() else None,
        "log_sha256": file_hash(log) if log.exists() else None,
        "code": identity.code_identity(),
        "cause": cause,
    }
    write_json(folder / "run.json", run)
    return run


def environment(spec: RunSpec) -> dict[str, str]:
    """The caller's but for `_NOT_INHERITED`, with the spec's variables.

    No thread counts but the spec's: Snakemake sets them to the rule's threads; in every rank, that
    many threads would fight over the cores (seen on two cores: MKL's two threads in each of two
    ranks, steps 10 times slower). Unless the spec says otherwise a process has one thread:
    torchrun's own default where there are several processes, and then one process alone must not
    have all the cores.
    """
    kept = {key: value for key, value in os.environ.items() if not _NOT_INHERITED.fullmatch(key)}
    quiet = {"KINETO_LOG_LEVEL": "99"}  # the profiler's own lines, which say nothing of the run
    return {**quiet, **kept, "OMP_NUM_THREADS": "1", **spec.environment}


def _new_attempt(run: Path) -> Path:
    """The folder of the next attempt; earlier ones are kept."""
    attempts = run / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    number = 1 + max((int(p.name) for p in attempts.iterdir() if p.name.isdigit()), default=0)
    folder = attempts / str(number)
    folder.mkdir()
    return folder


def _command(
    spec: RunSpec,
    spec_path: Path,
    data: Path,
    videos: Path | None,
    vae: Path | None,
    folder: Path,
) -> list[str]:
    # --standalone but for its names: this machine's own may not resolve.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--rdzv-backend=c10d"]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--rdzv-id=xdimo"]
    torchrun += [f"--nproc-per-node={spec.gpus}", "--max-restarts=0"]
    train = ["-m", "xdimo", "train", str(spec_path), "--data", str(data), "--folder", str(folder)]
    if videos:
        train += ["--videos", str(videos)]
    if vae:
        train += ["--vae", str(vae)]
    return torchrun + train


@contextmanager
def _signals(end: _End) -> Iterator[None]:
    """While inside, signals become the reason for the end of what runs, and nothing else."""

    def stop(number: int, frame: FrameType | None) -> None:
        if end.outcome is None:
            name = signal.Signals(number).name
            warned = number == _WARNING
            end.outcome = "timeout" if warned else "killed"
            end.reason = f"{name}: its run limit is near" if warned else name

    previous = {number: signal.signal(number, stop) for number in (*_STOPS, _WARNING)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end_of(output: Path) -> str:
    with open(output, "rb") as file:
        file.seek(max(0, output.stat().st_size - SAID_BYTES))
        return file.read().decode(errors="replace")


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
