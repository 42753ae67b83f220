"""What a card gives to plain work, before and after it trains: products, copies, all-reduces.

Each figure is the mean rate over a fraction of a second, of the large square over a whole one: over
less it scatters by several percent. All of it takes seconds, and leaves no memory behind.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from tabulate import tabulate

from xdimo.config.schema import Clips, Hardware, Vae
from xdimo.implementations import Precision
from xdimo.model.flops import MLP_RATIO, tokens_per_frame
from xdimo.spec import ModelSpec
from xdimo.train import distributed
from xdimo.train.instruments.step_timer import Clock

MIB = 1024**2
CALLS = 10_000  # launches at most, of one kind of work
AT_ONCE = 20  # products a launch on a GPU, which makes small ones faster than a host launches them


@dataclass(frozen=True)
class Effort:
    """How much work: a large square product, two buffers to copy between, one to reduce."""

    square: int
    copy_mib: int
    reduce_mib: int
    reduces: int  # the same on each rank, whatever its speed
    seconds: float  # of each kind of work but reducing and the square
    square_s: float  # at the power limit, where a card takes a while to settle


# Buffers are larger than any card's cache. A CPU shows that the code runs, no more.
EFFORT = {"cuda": Effort(8192, 512, 256, 20, 0.2, 1.0), "cpu": Effort(256, 8, 1, 3, 0.005, 0.005)}


def model_products(model: ModelSpec, rows: int) -> list[tuple[int, int, int]]:
    """Rows, inner and outer width of a block's products over ``rows`` tokens: MLP or expert up and
    down, qkv, proj. An expert sees its part of the rows only; here all shapes have the same.
    """
    d = model.width
    widths = [(d, MLP_RATIO * d), (MLP_RATIO * d, d), (d, 3 * d), (d, d)]
    return [(rows, inner, outer) for inner, outer in widths]


@torch.inference_mode()
def measure(
    device: torch.device, precision: Precision, products: list[tuple[int, int, int]]
) -> dict[str, Any]:
    """The fields of one rank's calibration event. Collective: all ranks measure at once.

    TFLOP/s count 2 a multiply-add; copied bytes count as read and as written; an all-reduce of n
    bytes over r ranks as 2 (r - 1) / r x n, what each rank's link carries at best. Products run in
    ``precision``; whether fp32 ones may use TF32 is torch's own setting.
    """
    _forget(device)  # of what was there before, what is not used any more
    effort, clock = EFFORT[device.type], Clock(device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)  # its own: the run's draws do not move
    clock.together()

    def rate(rows: int, inner: int, outer: int, enough_s: float = effort.seconds) -> float:
        # Random numbers: a product of zeros draws less power, and so runs at a higher clock.
        left = torch.randn(rows, inner, generator=generator, device=device).to(dtype)
        right = torch.randn(inner, outer, generator=generator, device=device).to(dtype)
        out = torch.empty(rows, outer, device=device, dtype=dtype)

        def product() -> object:
            return torch.mm(left, right, out=out)

        launch, products = (_together(product), AT_ONCE) if clock.cuda else (product, 1)
        seconds = _seconds(launch, clock, enough_s) / products
        return 2 * rows * inner * outer / seconds / 1e12

    square = (effort.square,) * 3
    found = {
        "gemm_tflops": rate(*square, effort.square_s),
        "gemm_shape": list(square),
        "gemm_s": effort.square_s,
        "model_gemm_tflops": {"x".join(map(str, product)): rate(*product) for product in products},
        "copy_gb_s": _copy_gb_s(device, clock, effort),
        "all_reduce_gb_s": _all_reduce_gb_s(device, clock, effort),
    }
    _forget(device)
    return found


def _copy_gb_s(device: torch.device, clock: Clock, effort: Effort) -> float:
    source = torch.ones(effort.copy_mib * MIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _seconds(lambda: target.copy_(source), clock, effort.seconds)
    return 2 * source.nbytes / seconds / 1e9


def _all_reduce_gb_s(device: torch.device, clock: Clock, effort: Effort) -> float | None:
    if not dist.is_initialized():
        return None
    buffer = torch.zeros(effort.reduce_mib * MIB // 4, device=device)  # float32, as gradients are
    for _ in range(2):
        dist.all_reduce(buffer)
    seconds = _timed(lambda: dist.all_reduce(buffer), clock, effort.reduces)
    ranks = dist.get_world_size()
    return 2 * (ranks - 1) / ranks * buffer.nbytes / seconds / 1e9


def _seconds(work: Callable[[], object], clock: Clock, enough_s: float) -> float:
    """Of one call: the mean of as many as take ``enough_s``, after some that do not count."""
    _timed(work, clock, 2)
    once = _timed(work, clock, 2)
    return _timed(work, clock, max(2, min(math.ceil(enough_s / once), CALLS)))


def _together(work: Callable[[], object]) -> Callable[[], object]:
    """``AT_ONCE`` calls in one launch."""
    work()  # what it makes only once is no part of the graph
    graph = torch.cuda.CUDAGraph()
    # Other threads (NCCL's watchdog) go on using the device meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(AT_ONCE):
            work()
    return graph.replay


def _timed(work: Callable[[], object], clock: Clock, calls: int) -> float:
    clock.synchronize()
    start = clock.mark()
    for _ in range(calls):
        work()
    end = clock.mark()
    clock.synchronize()
    return clock.seconds(start, end) / calls


def _forget(device: torch.device) -> None:
    """As if nothing had been allocated that is not in use: a run's memory figures are its own."""
    if device.type == "cuda":
        gc.collect()
        # cuBLAS keeps its workspaces among torch's allocations.
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def by_hand(
    model: ModelSpec, clips: list[int], precision: Precision, kind: Literal["cuda", "cpu"] | None
) -> tuple[list[dict[str, Any]], list[str]] | None:
    """Each rank's rates and device; None on ranks other than the first.

    ``clips``: of 16 frames and 256 pixels, a rank. ``kind``: None for a GPU where there is one.
    """
    tokens = Clips().frames * tokens_per_frame(model, Clips().size // Vae().factor)
    products = [shape for n in clips for shape in model_products(model, n * tokens)]
    rank, device = distributed.join(kind or ("cuda" if torch.cuda.is_available() else "cpu"))
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    rates = distributed.everyone(measure(device, precision, products))
    devices = distributed.everyone(distributed.device_name(device))
    distributed.leave()
    return (rates, devices) if rank == 0 else None


def text(
    rates: list[dict[str, Any]], devices: list[str], hardware: Hardware, precision: Precision
) -> str:
    """Each rank's rates beside the card's peaks, where hardware.yaml knows the card.

    The tensor peak is that of 16-bit operands, so other precisions stand without one.
    """
    rows = []
    for rank, (found, device) in enumerate(zip(rates, devices, strict=True)):
        card = hardware.card_of(device)
        tensor_peak = hardware.tensor_peak_tflops(device) if precision == "bf16" else None
        products = {"x".join(map(str, found["gemm_shape"])): found["gemm_tflops"]}
        products |= found["model_gemm_tflops"]
        for shape, tflops in products.items():
            rows.append([rank, f"GEMM {shape}", "TFLOP/s", tflops, tensor_peak])
        bandwidth = card.bandwidth_gb_s if card else None
        rows.append([rank, "copy, read and write", "GB/s", found["copy_gb_s"], bandwidth])
        rows.append([rank, "all-reduce", "GB/s", found["all_reduce_gb_s"], None])
    rows = [[*row, 100 * row[3] / row[4] if row[3] and row[4] else None] for row in rows]
    heads = ["rank", "work", "unit", "measured", "peak", "% of peak"]
    table = tabulate(rows, heads, floatfmt=("", "", "", ".4g", ".4g", ".1f"), missingval="n/a")
    return f"{', '.join(sorted(set(devices)))}, {precision}\n{table}"
