"""Time and memory, read without making the loop wait for the device."""

import resource
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GIB = 1024**3


class Clock:
    """Marks on the device's own timeline; on a CPU, the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Any, end: Any) -> float:
        """Seconds from one mark to another; both must have been reached."""
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start

    def reached(self, mark: Any) -> bool:
        return mark.query() if self.cuda else True

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def together(self) -> None:
        """Returns on every rank at once, its device idle. Collective."""
        self.synchronize()
        if dist.is_initialized():
            dist.barrier()
            self.synchronize()


@dataclass
class _Step:
    fields: dict[str, Any]  # known on the host
    start: Any
    end: Any
    values: Tensor  # on its way from the device to the host
    copied: Any


class StepMeter:
    """Collects each step's time and scalars; hands them out once the device has passed them."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._pending: deque[_Step] = deque()
        self.last: Any = None  # where the last step ended and the next one begins

    def start(self) -> None:
        """The next step begins here (not where the one before ended)."""
        self.last = self.clock.mark()

    def step(self, fields: dict[str, Any], loss: Tensor, grad_norm: Tensor) -> None:
        """A step ended: it lasted from the mark before to this one."""
        end = self.clock.mark()
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        values = values.to("cpu", non_blocking=self.clock.cuda)
        self._pending.append(_Step(fields, self.last, end, values, self.clock.mark()))
        self.last = end

    def finished(self, wait: bool = False) -> list[dict[str, Any]]:
        """Steps the device has completed since the last call, in order; ``wait`` for all."""
        if wait:
            self.clock.synchronize()
        done = []
        while self._pending and self.clock.reached(self._pending[0].copied):
            step = self._pending.popleft()
            loss, grad_norm = step.values.tolist()
            seconds = self.clock.seconds(step.start, step.end)
            done.append({**step.fields, "step_s": seconds, "loss": loss, "grad_norm": grad_norm})
        return done


def memory(device: torch.device) -> dict[str, float | None]:
    """GiB of this rank. Device figures are None on a CPU; ``host_peak_gib`` is resident memory."""
    fields: dict[str, float | None] = {
        "allocated_gib": None,
        "reserved_gib": None,
        "peak_allocated_gib": None,
        "peak_reserved_gib": None,
        "device_gib": None,
        # Linux counts ru_maxrss in KiB.
        "host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
    }
    if device.type == "cuda":
        fields |= {
            "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "reserved_gib": torch.cuda.memory_reserved(device) / GIB,
            "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
            "device_gib": torch.cuda.get_device_properties(device).total_memory / GIB,
        }
    return fields
