"""A few steps more under the profiler, after the timed ones: nothing of it touches their times."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from xdimo.spec import RunSpec
from xdimo.train.instruments.step_breakdown import (
    PREFIX,
    WINDOW,
    Event,
    has_kernels,
    labels,
    shares,
)
from xdimo.train.instruments.step_timer import Clock
from xdimo.train.step import CapturedStep, Step

TakeStep = Callable[[dict[str, Any], bool], Any]


def batches(spec: RunSpec) -> int:
    """How many batches ``window`` takes from the loader."""
    return spec.steps.profiled + 1 if spec.steps.profiled else 0


def window(
    take_step: Step | CapturedStep,
    loaded: Iterator[dict[str, Any]],
    steps: int,
    clips_norm: bool,
    clock: Clock,
    *,
    keep: bool,
) -> tuple[dict[str, Any] | None, list[Event]]:
    """Runs ``steps`` steps as the timed ones ran, then one as it stands with its shapes.

    Returns the fields of the ledger (None where the profiler saw no kernels) and that one's events.
    ``keep``: whether this rank's events are wanted; the others only take part, as the profiler
    slows all of them alike. A captured step is captured no more after it. Collective.
    """
    step = take_step.step if isinstance(take_step, CapturedStep) else take_step
    step.part = lambda name: record_function(PREFIX + name)
    events = _trace(take_step, loaded, steps, clips_norm, clock, keep, shapes=False)
    plain = take_step.uncaptured if isinstance(take_step, CapturedStep) else take_step
    operators = _trace(plain, loaded, 1, clips_norm, clock, keep, shapes=True)
    step.part = lambda name: nullcontext()
    ledger = None
    if keep and (has_kernels(events) or not clock.cuda):
        known = labels(operators) if take_step is not step else None
        parts, seconds = shares(events, known)
        ledger = {"shares": parts, "step_s": seconds / steps, "source": "profiled window"}
    return ledger, operators


def _trace(
    take_step: TakeStep,
    loaded: Iterator[dict[str, Any]],
    steps: int,
    clips_norm: bool,
    clock: Clock,
    keep: bool,
    *,
    shapes: bool,
) -> list[Event]:
    """Events of these steps, which all ranks begin together."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if clock.cuda else [])]
    clock.together()
    with (
        profile(activities=activities, record_shapes=shapes) as profiler,
        record_function(WINDOW),
    ):
        for _ in range(steps):
            with record_function(PREFIX + "data"):
                batch = next(loaded)
            take_step(batch, clips_norm)
        clock.synchronize()
    if not keep:
        return []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    return [event for event in events if event.get("ph") == "X"]
