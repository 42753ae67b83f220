"""log.jsonl: what a run measured, one JSON object a line, written by rank 0.

header       what ran: spec hash, code, versions, devices, declared and effective settings
calibration  when (before or after the steps), rank, TFLOP/s of a large product and of the model's
             own, GB/s of a copy (read and written) and of an all-reduce (null: one rank)
step         step, phase (warmup or timed), step_s, data_wait_s, loss, grad_norm, lr, epoch, kind
             (eager, capture or replay); loss is rank 0's own, grad_norm of the averaged gradient
checkpoint   step, seconds it took: they lie in the next step's time
window       the timed steps: first_step, last_step, wall_s from the end of the last warm-up step
             to the synchronisation after the last timed one (schema 1: between two
             synchronisations, so that the first timed step began on an idle device)
telemetry    one a card and sample of the window: t_s since its start, clocks, power, temperature,
             what holds the clock down, uncorrected ECC errors since the driver came up, processes
             that are not the run's, memory in use before it, other cards of the host at work, its
             load, links; null: NVML keeps it to itself
memory       one a rank: GiB allocated and reserved, now and at peak; the device's; host at peak
ledger       shares of the step's parts on rank 0, and step_s, under the profiler; source: steps
             after the window
effective    settings once more, with what only the steps could show: gpus, matmul_dtype (of most
             FLOPs), matmul_flops (shares by type), compiled, captured, checkpointing; null: not
             seen
footer       steps, wall_s: nothing follows

The header's schema also chooses the rules by which xdimo.analysis.steady judges the steps.
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

SCHEMA = 2


class Record:
    """Appends events to a log that did not exist before (FileExistsError otherwise).

    Without a path it takes events and keeps none: every rank runs the same loop.
    """

    def __init__(self, path: Path | None) -> None:
        # Closed by __exit__.
        self._file = open(path, "x", encoding="utf-8", buffering=1) if path else None  # noqa: SIM115

    def write(self, event: str, **fields: Any) -> None:
        """One line. NaN and infinity are written as null: JSON has neither."""
        if self._file:
            line = _finite({"event": event, **fields})
            self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    def clean(value: Any) -> Any:
        unfit = isinstance(value, float) and value - value != 0
        return None if unfit else value

    return {key: clean(value) for key, value in fields.items()}
