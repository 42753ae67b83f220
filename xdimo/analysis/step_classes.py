"""Which class a step is of: regular work, or a step that carries a cost of its own.

first        the first step of a process: kernels are compiled, memory is allocated
capture      the step was captured into a graph
checkpoint   the step after a checkpoint: it waited for it
epoch        the first step of another epoch: the loader drew a new order
warmup       any other step before the clock starts
stall        of the timed ones, rare and far longer than the median; nobody announced it
regular      any other timed step
"""

from collections.abc import Collection

import numpy as np
import pandas as pd
from numpy.typing import NDArray

CLASSES = ("first", "capture", "checkpoint", "epoch", "warmup", "stall", "regular")

# A class apart is rare. Where every third step begins an epoch, epochs are what steps are made of.
RAREST_EDGES = 0.1
# A stall costs half a step at least, is no part of the usual scatter, and stays below one step in a
# hundred: what comes oftener belongs to the distribution of step times and widens its interval.
STALL_FACTOR = 1.5
STALL_SIGMAS = 10.0
STALL_SHARE = 0.01
SIGMA_OF_MAD = 1.4826  # of a normal distribution


def classes(steps: pd.DataFrame, checkpoints: Collection[int]) -> NDArray[np.object_]:
    """The class of each row of ``steps`` (columns as events.Step, in order; at least one).

    ``checkpoints``: numbers of the steps after which one was written.
    """
    timed = (steps["phase"] == "timed").to_numpy()
    epoch = steps["epoch"].to_numpy()
    found = np.where(timed, "regular", "warmup").astype(object)
    found[_stalls(steps["step_s"].to_numpy(), timed)] = "stall"
    edge = np.diff(epoch, prepend=epoch[0]) != 0
    if edge[timed].sum() <= RAREST_EDGES * timed.sum():
        found[edge] = "epoch"
    found[np.isin(steps["step"].to_numpy() - 1, list(checkpoints))] = "checkpoint"
    found[(steps["kind"] == "capture").to_numpy()] = "capture"
    found[0] = "first"
    return found


def _stalls(step_s: NDArray[np.float64], timed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    if not timed.any():
        return timed
    usual = step_s[timed]
    median = float(np.median(usual))
    sigma = SIGMA_OF_MAD * float(np.median(np.abs(usual - median)))
    long: NDArray[np.bool_] = step_s > max(STALL_FACTOR * median, median + STALL_SIGMAS * sigma)
    long &= timed
    return long if long.sum() <= max(1, STALL_SHARE * len(usual)) else np.zeros_like(timed)
