"""Where the time of a step goes: shares of its parts, from the events of a profiler's trace.

Each instant of the profiled window belongs to one part: to that of the kernel that runs; where none
runs, to an all-reduce that does (it is exposed: nothing hides it); else to what the host does then.
On a CPU the operators take the kernels' place. So the shares sum to 1 by themselves.

Events are those of a Chrome trace, as torch.profiler writes it: ``cat``, ``name``, ``ts`` and
``dur`` in microseconds, ``args``. The step's own ranges are annotations named PREFIX + part.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

Event = Mapping[str, Any]

PARTS = (
    "data",  # waiting for the loader
    "host_to_device",
    "vae",
    "forward",
    "backward",
    "all_reduce",
    "optimizer",  # gradient norm, clipping, optimizer, average of the weights
    "other",
)
PREFIX = "xdimo."
WINDOW = PREFIX + "window"

# Kernels by the kind of their work; the first that fits.
KERNELS = {
    "all-reduce": r"nccl|^gloo:",
    "optimizer + EMA": r"(?i)adam|lerp|multi_tensor",
    "experts": r"^(matmul_rows|weight_gradient|sum_parts|sum_tiles|\w+_(choices|chunks))$",
    "attention": r"flash|fmha|^temporal_|^spatial_|softmax|cudnn::fusion",
    "adaLN": r"^residual_norm_",
    "matrix products": r"gemm|nvjet|cutlass|xmma|splitK",
    "other elementwise": r"",
}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
# Of what goes on at once, the first has the instant: work hides copies, both hide all-reduces, and
# the host's doings count where the device has nothing to do.
_WORK = ("data", "vae", "forward", "backward", "optimizer", "other")
_PRECEDENCE = [
    *((True, part) for part in (*_WORK, "host_to_device", "all_reduce")),
    *((False, part) for part in PARTS),
]


def kernel_kind(name: str) -> str:
    """The key of KERNELS that a kernel belongs to."""
    return next(kind for kind, mark in KERNELS.items() if re.search(mark, name))


def shares(
    events: Iterable[Event], labels: Mapping[str, list[str]] | None = None
) -> tuple[dict[str, float], float]:
    """Share of each part in the window, and the window's seconds.

    ``labels``: the parts of a step's kernels by their name, for a window of replayed graphs: a
    graph is launched at once, so its kernels have their part from a step that was run as it stands.
    """
    events = list(events)
    window = next(e for e in events if e["name"] == WINDOW and _annotates(e))
    first, last = window["ts"], window["ts"] + window["dur"]
    device = [
        (event["ts"], event["ts"] + event["dur"], part)
        for part, event in _device_parts(events, labels or {})
    ]
    edges: list[tuple[float, int, tuple[bool, str]]] = []
    for on_device, spans in ((True, device), (False, ranges(events))):
        for begin, end, part in spans:
            begin, end = max(begin, first), min(end, last)
            if begin < end:
                edges += [(begin, 1, (on_device, part)), (end, -1, (on_device, part))]
    total_us: Counter[str] = Counter()
    going_on: Counter[tuple[bool, str]] = Counter()
    now = first
    for time, change, what in [*sorted(edges), (last, 0, (False, "other"))]:
        part = next((part for where, part in _PRECEDENCE if going_on[where, part]), "other")
        total_us[part] += time - now
        going_on[what] += change
        now = time
    return {part: total_us[part] / (last - first) for part in PARTS}, (last - first) / 1e6


def labels(events: Iterable[Event]) -> dict[str, list[str]]:
    """Parts of the kernels of one step that was run as it stands: name -> in their order."""
    found = defaultdict(list)
    for part, event in sorted(_device_parts(list(events), {}), key=lambda pair: pair[1]["ts"]):
        found[event["name"]].append(part)
    return dict(found)


def _device_parts(events: list[Event], labels: Mapping[str, list[str]]) -> list[tuple[str, Event]]:
    """Part of each kernel and copy; on a CPU, of each operator and all-reduce."""
    on_host = ranges(events)
    starts = [begin for begin, _, _ in on_host]

    def host_part(at: float) -> str:
        place = bisect_right(starts, at) - 1
        return on_host[place][2] if place >= 0 and at <= on_host[place][1] else "other"

    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in _LAUNCHES and "correlation" in e.get("args", {})
    }
    met: Counter[str] = Counter()
    parts = []
    for event in sorted(_work(events), key=lambda e: float(e["ts"])):
        name = event["name"]
        if re.search(KERNELS["all-reduce"], name):
            part = "all_reduce"
        elif "HtoD" in name:
            part = "host_to_device"
        elif name in labels:
            part = labels[name][met[name] % len(labels[name])]
            met[name] += 1
        else:
            # What the host was doing when it launched it, on whichever thread that was.
            launch = event.get("args", {}).get("correlation")
            part = host_part(launched[launch] if launch in launched else event["ts"])
        parts.append((part, event))
    return parts


def _work(events: list[Event]) -> list[Event]:
    on_device = [e for e in events if e.get("cat") in _ON_DEVICE]
    return on_device or [e for e in events if _is_operator(e) or e["name"].startswith("gloo:")]


def _is_operator(event: Event) -> bool:
    return bool(event.get("cat") == "cpu_op" and event["name"].startswith(("aten::", "xdimo::")))


def ranges(events: Iterable[Event]) -> list[tuple[float, float, str]]:
    """Begin, end and part of the step's own ranges on the host, in order; none holds another."""
    return sorted(
        (e["ts"], e["ts"] + e["dur"], e["name"].removeprefix(PREFIX))
        for e in events
        if _annotates(e) and e["name"] != WINDOW
    )


def _annotates(event: Event) -> bool:
    return event.get("cat") == "user_annotation" and event["name"].startswith(PREFIX)


def has_kernels(events: Iterable[Event]) -> bool:
    return any(e.get("cat") == "kernel" for e in events)
