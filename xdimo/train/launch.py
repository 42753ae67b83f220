"""The parent of one run: starts the process group, waits for it, and says how it ended.

It writes ``attempts/N/run.json`` last and whole. Where the outcome is an answer (ok, or an error
that would come again) it writes the run's own ``run.json`` too and exits 0; otherwise it exits 1.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from xdimo.config import Hardware
from xdimo.errors import UserError
from xdimo.files import file_hash, read_json, write_json
from xdimo.outcome import ANSWERS, Outcome, withdraw
from xdimo.spec import RunSpec, read_spec
from xdimo.train import identity, telemetry
from xdimo.train.failure import CAUSES
from xdimo.train.rank import LAUNCHED

SCHEMA = 1
CAUSE_LINES = 40
GRACE_S = 10  # from asking the group to end until it is killed

# A scheduler's warning before the run limit; the others are somebody's or the system's will.
_WARNING = signal.SIGUSR2
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass
class _End:
    """Why the parent ended the group, if it did."""

    outcome: Outcome | None = None
    reason: str | None = None


@dataclass
class _Group:
    """torchrun and its ranks: it in a process group of its own, each of them in another."""

    command: list[str]
    environment: dict[str, str]
    folder: Path  # of the attempt
    uuids: list[str]  # of its GPUs
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=CAUSE_LINES))

    def run(self, deadline: float, end: _End) -> int:
        """torchrun's exit code, with every rank told to end (rank.py)."""
        process = subprocess.Popen(
            self.command,
            env={**self.environment, LAUNCHED: "1"},
            stdin=subprocess.PIPE,  # nothing is written: it ends when this process does
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reader = Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        with telemetry.sampling(self.uuids, self.folder / telemetry.FILE):
            self._wait(process, deadline, end)
        assert process.stdin is not None
        process.stdin.close()  # ends a rank that outlived torchrun
        _signal_group(process, signal.SIGKILL)
        reader.join(timeout=GRACE_S)
        return process.returncode

    def _wait(self, process: "subprocess.Popen[bytes]", deadline: float, end: _End) -> None:
        asked: float | None = None
        while process.poll() is None:
            if end.outcome is None and time.monotonic() > deadline:
                end.outcome, end.reason = "timeout", "its wall time is over"
            if end.outcome and asked is None:
                asked = time.monotonic()
                _signal_group(process, signal.SIGTERM)
            elif asked is not None and time.monotonic() > asked + GRACE_S:
                _signal_group(process, signal.SIGKILL)
            time.sleep(0.1)

    def _read(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with open(self.folder / "output.log", "wb") as log:
            while chunk := process.stdout.read1(1 << 16):  # type: ignore[attr-defined]
                log.write(chunk)
                log.flush()
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
                self.tail.extend(_lines(chunk))


def _lines(chunk: bytes) -> Iterator[str]:
    for line in chunk.decode(errors="replace").splitlines():
        if line.strip():
            yield line.rstrip()


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def launch(
    spec_path: Path,
    *,
    data: Path,
    videos: Path | None,
    vae: Path | None,
    output: Path,
    hardware: Hardware,
    walltime_min: float,
) -> int:
    """Runs ``spec_path`` once; returns the exit code (0 = ``output`` holds the answer).

    ``data``: index of cached latents, or the manifest in online mode (then with ``videos``).
    Raises UserError before anything starts where the spec cannot be read or this machine has
    not the devices it asks for.
    """
    started, deadline = _now(), time.monotonic() + walltime_min * 60
    spec = read_spec(spec_path)
    uuids = require_devices(spec, hardware)
    folder = _new_attempt(output.parent)
    withdraw(output)
    group = _Group(
        _command(spec, spec_path, data, videos, vae, folder),
        environment(spec),
        folder,
        uuids,
    )
    end = _End()
    with _signals(end):
        code = group.run(deadline, end)
    outcome, reason, cause = _judge(spec, folder, code, end, list(group.tail))
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
        "started": started,
        "ended": _now(),
        "log": log.name if log.exists() else None,
        "log_sha256": file_hash(log) if log.exists() else None,
        "code": identity.code_identity(),
        "cause": cause,
    }
    write_json(folder / "run.json", run)
    print(f"{spec.run}: {outcome}" + (f" ({reason})" if reason else ""), flush=True)
    if outcome not in ANSWERS:
        return 1
    if run["log"]:
        run["log"] = str((folder / run["log"]).relative_to(output.parent))
    write_json(output, run)
    return 0


def cards_here() -> list[tuple[str, str]]:
    """Name and UUID of each GPU that torch sees. Raises UserError where it cannot tell."""
    # Asked of torch in a child: what it sees is what the run would get.
    probe = "import json, torch; cuda = torch.cuda; "
    probe += "found = [cuda.get_device_properties(i) for i in range(cuda.device_count())]; "
    probe += "print(json.dumps([[card.name, str(card.uuid)] for card in found]))"
    answer = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if answer.returncode != 0:
        raise UserError(f"torch cannot list this machine's GPUs: {answer.stderr.strip()[-300:]}")
    return [(name, uuid) for name, uuid in json.loads(answer.stdout.splitlines()[-1])]


def require_devices(spec: RunSpec, hardware: Hardware) -> list[str]:
    """NVML's names of the GPUs that the ranks will use, in their order; none on a CPU.

    Raises UserError where this machine has fewer or other GPUs than the spec names.
    """
    if spec.device == "cpu":
        return []
    cards = cards_here()
    found = [name for name, _ in cards]
    card = hardware.cards.get(spec.card)
    if card is None:
        raise UserError(f"{spec.run}: its card {spec.card!r} is not in hardware.yaml")
    wanted = f"{spec.run} needs {spec.gpus} x {card.label}"
    elsewhere = f"where the queue has them: snakemake --profile profiles/lsf {spec.cell}"
    if len(found) < spec.gpus:
        raise UserError(f"{wanted}; this machine has {len(found)} GPUs; {elsewhere}")
    others = sorted({name for name in found[: spec.gpus] if name not in card.devices})
    if others:
        raise UserError(
            f"{wanted} ({', '.join(card.devices)}); this machine has {', '.join(others)}; "
            f"{elsewhere}, or list the name under cards.{spec.card}.devices in hardware.yaml"
        )
    return ["GPU-" + uuid.removeprefix("GPU-") for _, uuid in cards[: spec.gpus]]


def environment(spec: RunSpec) -> dict[str, str]:
    """The caller's, with the spec's variables, and no thread counts but the spec's.

    Snakemake sets them to the rule's threads; in every rank, that many threads would fight over the
    cores (seen on two cores: MKL's two threads in each of two ranks, steps 10 times slower). Unless
    the spec says otherwise a process has one thread: torchrun's own default where there are several
    processes, and then one process alone must not have all the cores.
    """
    kept = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
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
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += [f"--nproc-per-node={spec.gpus}", "--max-restarts=0"]
    train = ["-m", "xdimo", "train", str(spec_path), "--data", str(data), "--folder", str(folder)]
    if videos:
        train += ["--videos", str(videos)]
    if vae:
        train += ["--vae", str(vae)]
    return torchrun + train


@contextmanager
def _signals(end: _End) -> Iterator[None]:
    """While the group runs, signals become the reason for its end."""

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


def _judge(
    spec: RunSpec, folder: Path, code: int, end: _End, tail: list[str]
) -> tuple[Outcome, str | None, list[str]]:
    """Outcome, reason, and the last lines of the cause."""
    if end.outcome:
        return end.outcome, end.reason, tail
    errors = [read_json(path) for path in sorted(folder.glob("rank-*.error.json"))]
    if errors:
        first = min(errors, key=lambda error: CAUSES.index(error["outcome"]))
        return first["outcome"], first["reason"], first["traceback"][-CAUSE_LINES:]
    if code != 0:
        killed = next((line for line in tail if "Signal 9 (SIGKILL)" in line), None)
        if code == -signal.SIGKILL or killed:
            return "killed", "SIGKILL from outside, often the host's memory limit", tail
        return "crash", f"torchrun exited with {code}", tail
    if not _complete(folder / "log.jsonl"):
        return "crash", "exited 0 without the footer of its log", tail
    return "ok", None, []


def _complete(log: Path) -> bool:
    try:
        *_, last = log.read_text(encoding="utf-8").splitlines()
        return bool(json.loads(last)["event"] == "footer")
    except (OSError, ValueError, KeyError):
        return False


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
