"""What two runs must have in common before one's speed is divided by the other's."""

from collections.abc import Callable
from typing import Any

from xdimo.model.flops import FORMULA
from xdimo.records.reader import Record
from xdimo.spec import RunSpec

# Axis -> what must be the same. Batch, implementation, clocks and code are shown beside a speedup:
# they are what is compared, or what a reader weighs.
AXES: dict[str, Callable[[RunSpec], Any]] = {
    "model": lambda spec: spec.model,
    "clip": lambda spec: (spec.data.frames, spec.latent_size, spec.vae.latent_channels),
    "precision": lambda spec: spec.precision,
    "FLOP formula": lambda spec: FORMULA,
    "data mode": lambda spec: spec.data.mode,
    "dataset": lambda spec: spec.data.dataset,
}


def differing(one: Record, other: Record) -> list[str]:
    """The axes in which the two runs differ; none where a speedup means something."""
    return [axis for axis, of in AXES.items() if of(one.spec) != of(other.spec)]
