"""The cards' own account of a run, from NVML, sampled by the run's parent so that no rank pays.

The parent appends a line a card and sample to ``telemetry.jsonl`` beside the log; when the timed
window is over, rank 0 takes the samples of that window into the log. Both read the same clock of
the host (time.monotonic). A figure that a card, a driver or a container keeps to itself is None.
"""

import json
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pynvml

from xdimo.echo import say

FILE = "telemetry.jsonl"
PERIOD_S = 0.5

# What holds a clock down (bits of NVML's "clocks event reasons"); an idle card is not throttled.
THROTTLES = {
    0x2: "applications_clocks_setting",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}


@contextmanager
def sampling(uuids: list[str], path: Path) -> Iterator[None]:
    """While inside, ``path`` grows by one line a card of the run, each PERIOD_S.

    ``uuids``: of the run's cards in the order of its ranks, as NVML has them ("GPU-..."); none: a
    CPU's run, without telemetry. The run's own processes are children of this one.
    """
    if not uuids:
        say("no telemetry: the run uses no GPU")
        yield
        return
    over = Event()
    thread = Thread(target=_sample, args=(uuids, path, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=10 * PERIOD_S)


def _sample(uuids: list[str], path: Path, over: Event) -> None:
    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        others = _other_cards(uuids)
        # Ranks load their libraries for seconds before they touch a card: this is not theirs.
        before = [_memory_gib(card) for card in cards]
    except pynvml.NVMLError as error:
        say(f"no telemetry: NVML says: {error}")
        return
    try:
        with open(path, "w", encoding="utf-8") as file:
            while not over.is_set():
                began = time.monotonic()
                host = {
                    "host_gpus_busy": sum(map(busy, others)),
                    "host_load": os.getloadavg()[0],
                }
                for gpu, card in enumerate(cards):
                    said = figures(card) | {"memory_before_gib": before[gpu]}
                    line = {"monotonic_s": began, "gpu": gpu, **said, **host}
                    file.write(json.dumps(line) + "\n")
                file.flush()
                over.wait(max(0.0, began + PERIOD_S - time.monotonic()))
    finally:
        pynvml.nvmlShutdown()


def _other_cards(uuids: Collection[str]) -> list[Any]:
    cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return [card for card in cards if pynvml.nvmlDeviceGetUUID(card) not in uuids]


def figures(card: Any) -> dict[str, Any]:
    """What NVML says of one card now, as the fields of a telemetry event."""
    milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, card)
    reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, card)
    processes = _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, card)
    return {
        "sm_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, card, pynvml.NVML_CLOCK_SM),
        "memory_mhz": _ask(pynvml.nvmlDeviceGetClockInfo, card, pynvml.NVML_CLOCK_MEM),
        "power_w": None if milliwatts is None else milliwatts / 1000,
        "temperature_c": _ask(pynvml.nvmlDeviceGetTemperature, card, pynvml.NVML_TEMPERATURE_GPU),
        "throttle": None if reasons is None else throttles(reasons),
        # Uncorrected ones since the driver was loaded.
        "ecc_errors": _ask(
            pynvml.nvmlDeviceGetTotalEccErrors,
            card,
            pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED,
            pynvml.NVML_VOLATILE_ECC,
        ),
        "other_processes": None
        if processes is None
        else strangers([process.pid for process in processes], _is_ours),
        "pcie_gen": _ask(pynvml.nvmlDeviceGetCurrPcieLinkGeneration, card),
        "pcie_width": _ask(pynvml.nvmlDeviceGetCurrPcieLinkWidth, card),
        "nvlink_active": _nvlinks(card),
    }


def throttles(reasons: int) -> list[str]:
    """Names of the bits that are set."""
    return [name for bit, name in THROTTLES.items() if reasons & bit]


def strangers(pids: list[int], is_ours: Callable[[int], bool]) -> int | None:
    """How many of a card's processes are not the run's own.

    In a container NVML may number processes as the host does, so that none is known as ours: then
    one of them, our rank, is taken off. It may also list none at all, not even ours: not known.
    """
    if not pids:
        return None
    return len(pids) - max(sum(map(is_ours, pids)), 1)


def _is_ours(pid: int) -> bool:
    """Whether a process is this one or descends from it."""
    while pid > 1 and pid != os.getpid():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        except OSError:  # no such process here
            return False
        pid = int(stat.rpartition(")")[2].split()[1])  # its parent's
    return pid == os.getpid()


def busy(card: Any) -> bool:
    """Whether a card has a compute process on it, or works."""
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, card)
    at_work = rates is not None and rates.gpu > 0
    return bool(at_work or _ask(pynvml.nvmlDeviceGetComputeRunningProcesses, card))


def _memory_gib(card: Any) -> float | None:
    """In use on a card by anybody, without what the driver keeps for itself."""
    memory = _ask(pynvml.nvmlDeviceGetMemoryInfo, card, pynvml.nvmlMemory_v2)
    return None if memory is None else memory.used / 1024**3


def _nvlinks(card: Any) -> int | None:
    """NVLinks that are up; None where the card has none."""
    states = []
    for link in range(pynvml.NVML_NVLINK_MAX_LINKS):
        state = _ask(pynvml.nvmlDeviceGetNvLinkState, card, link)
        if state is None:  # no such link
            break
        states.append(state)
    return sum(states) if states else None


def _ask(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except pynvml.NVMLError:
        return None


def within(path: Path, start_s: float, end_s: float) -> Iterator[dict[str, Any]]:
    """Samples between two readings of time.monotonic; ``t_s`` is since the first."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if not line.endswith("\n"):  # it is being written
            return
        sample = json.loads(line)
        taken_s = sample.pop("monotonic_s")
        if start_s <= taken_s <= end_s:
            yield {"t_s": taken_s - start_s, **sample}
