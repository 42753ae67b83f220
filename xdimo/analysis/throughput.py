"""Samples a second over the timed window, whether the window is steady, and how far to trust it.

Throughput = samples / wall time of the window: whatever happened in it counts. The interval is of
what varies by chance, the regular steps; checkpoints, epoch edges, captures, stalls and the time
between steps are part of this window as they were measured, and of its interval's both ends.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from xdimo.analysis import steady
from xdimo.analysis.confidence import mean
from xdimo.analysis.step_classes import CLASSES, classes
from xdimo.records.reader import Log

Floats = NDArray[np.float64]
Numbers = NDArray[np.int64]


def throughput(log: Log, global_batch: int, tokens_per_clip: int) -> dict[str, Any]:
    """Part of metrics.json. A window that is not steady has no rate, only why."""
    assert log.window is not None and log.footer is not None
    window = log.window
    kinds = classes(log.steps, [checkpoint.step for checkpoint in log.checkpoints])
    number, step_s = log.steps["step"].to_numpy(), log.steps["step_s"].to_numpy()
    timed = (log.steps["phase"] == "timed").to_numpy()
    regular = kinds == "regular"
    rules = steady.RULES[log.schema]
    change = steady.change(step_s[regular], rules)
    figures: dict[str, Any] = {
        "timed_steps": window.steps,
        "window_s": window.wall_s,
        "total_s": log.footer.wall_s,
        "global_batch": global_batch,
        "unsteady": change and _unsteady(change, rules, number[regular], step_s[regular]),
        "steady_from_step": None if change else _warm_from(number, step_s, timed, kinds),
        "steps_per_s": None,
        "samples_per_s": None,
        "samples_per_s_ci95": None,
        "autocorrelation_steps": None,
        "window_too_short": None,
        "tokens_per_s": None,
        "median_step_s": float(np.median(step_s[timed])),
        **_ends(step_s[regular]),
        "data_wait_share": float(log.steps["data_wait_s"].to_numpy()[timed].sum()) / window.wall_s,
        "step_classes": _classes(kinds, step_s, timed),
        "between_steps_s": window.wall_s - float(step_s[timed].sum()),
    }
    if change is None:
        figures |= _rate(window.steps, window.wall_s, step_s[regular], global_batch)
        figures["tokens_per_s"] = figures["samples_per_s"] * tokens_per_clip
    return figures


def _rate(n: int, wall_s: float, regular: Floats, global_batch: int) -> dict[str, Any]:
    """Wall time of the window +- regular steps x the half interval of their mean."""
    found = mean(regular)
    rate = n / wall_s
    interval = None
    if found.half is not None:
        half_s = len(regular) * found.half
        interval = [global_batch * n / (wall_s + sign * half_s) for sign in (1, -1)]
    return {
        "steps_per_s": rate,
        "samples_per_s": rate * global_batch,
        "samples_per_s_ci95": interval,
        "autocorrelation_steps": found.tau,
        "window_too_short": None
        if interval
        else {"n": found.n, "tau": found.tau, **_long(regular)},
    }


def _long(regular: Floats) -> dict[str, Any]:
    """The few slow steps (2 %, or 2) without which there would be an interval: how many they are,
    and their share of the time.
    """
    slowest = np.argsort(regular)[::-1]
    for count in range(1, max(2, len(regular) // 50) + 1):
        others = regular.copy()
        others[slowest[:count]] = np.median(regular)
        if not mean(others).too_short:
            share = float(regular[slowest[:count]].sum() / regular.sum())
            return {"long_steps": count, "long_share": share}
    return {}


def _unsteady(
    change: steady.Change, rules: steady.Rules, number: Numbers, step_s: Floats
) -> dict[str, Any]:
    """What changed, from which step, and how many of the regular steps are steady at the end, after
    a shift at the earliest.
    """
    after = change.at or 0
    found = steady.steady_from(step_s[after:], rules)
    start = None if found is None else after + found
    return {
        "change": change.what,
        "share": change.share,
        "at_step": None if change.at is None else int(number[change.at]),
        "steady_from_step": None if start is None else int(number[start]),
        "steady_steps": 0 if start is None else len(number) - start,
    }


def unsteady_text(figures: dict[str, Any]) -> str:
    """``shift of +5.1 % at step 120; 230 of 300 steps are steady``."""
    told = figures["unsteady"]
    at = f" at step {told['at_step']}" if told["at_step"] is not None else ""
    steady_steps, asked = told["steady_steps"], figures["timed_steps"]
    return (
        f"{told['change']} of {100 * told['share']:+.1f} %{at}; "
        f"{steady_steps} of {asked} steps are steady"
    )


def _ends(regular: Floats) -> dict[str, float | None]:
    """Medians of the first and the last tenth of the regular steps."""
    tenth = max(1, len(regular) // 10)
    ends = {"step_s_start": regular[:tenth], "step_s_end": regular[-tenth:]}
    return {name: float(np.median(part)) if len(part) else None for name, part in ends.items()}


def _warm_from(
    number: Numbers, step_s: Floats, timed: NDArray[np.bool_], kinds: NDArray[np.object_]
) -> int | None:
    """The first step whose time is already that of the window."""
    usual = np.isin(kinds, ["warmup", "regular"])
    if not (kinds == "regular").any():
        return None
    first = int(np.argmax(timed[usual]))
    return int(number[usual][steady.warm_from(step_s[usual], first)])


def _classes(
    kinds: NDArray[np.object_], step_s: Floats, timed: NDArray[np.bool_]
) -> dict[str, Any]:
    """Of each class that occurs: steps and their median; of the timed ones number and sum."""
    told = {}
    for name in CLASSES:
        of = kinds == name
        if of.any():
            told[name] = {
                "steps": int(of.sum()),
                "median_s": float(np.median(step_s[of])),
                "timed_steps": int((of & timed).sum()),
                "timed_s": float(step_s[of & timed].sum()),
            }
    return told
