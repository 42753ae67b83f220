"""What a run really did, seen on the objects and the operators that did it, against its spec."""

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from xdimo.errors import UserError
from xdimo.model.flops import parameters
from xdimo.model.latte import Latte
from xdimo.spec import RunSpec
from xdimo.train.instruments.step_breakdown import Event, ranges
from xdimo.train.step import EAGER_STEPS, CapturedStep, Step, autocast

DTYPES = {"c10::BFloat16": "bf16", "c10::Half": "fp16", "float": "fp32", "double": "fp64"}
# Operators that multiply matrices, and which of their arguments the two matrices are.
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::addmm": 1, "aten::baddbmm": 1}


def at_start(spec: RunSpec, model: Latte, device: torch.device) -> dict[str, Any]:
    """Settings as the objects that will do the work have them.

    Batch, data and VAE stand as the spec has them, until a batch has been seen.
    """
    counts = [p.numel() for p in model.parameters()]
    trainable = [p.numel() for p in model.parameters() if p.requires_grad]
    block: Any = model.blocks[0]
    with autocast(spec):
        probe = torch.ones(8, 8, device=device)
        dtype = (probe @ probe).dtype
    return {
        "parameters": sum(counts),
        "trainable_parameters": sum(trainable),
        "precision": "bf16" if dtype == torch.bfloat16 else _fp32(device),
        "experts": 1 if block.dense else len(block.experts),
        "top_k": block.top_k,
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "clips_per_gpu": spec.clips_per_gpu,
        "data_mode": spec.data.mode,
        "dataset": spec.data.dataset,
        "implementation": model.implementation,
        "vae": spec.vae.id,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def after_steps(
    start: dict[str, Any],
    *,
    device: torch.device,
    gpus: list[str],
    made_from: Any,
    batch: Mapping[str, Any],
    take_step: Step | CapturedStep,
    compiled_graphs: int,
    operators: list[Event],
) -> dict[str, Any]:
    """The same, and what only the steps could show.

    ``made_from``: the loader's dataset. ``compiled_graphs``: made since the run began.
    ``operators``: of one profiled step, with the shapes of their arguments; what they would show is
    None, not known, where none multiplies matrices.
    """
    found = _products(operators)
    flops = Counter[str]()
    for dtype, _, amount in found:
        flops[_fp32(device) if dtype == "fp32" else dtype] += amount
    return {
        **start,
        "clips_per_gpu": next(len(v) for v in batch.values() if isinstance(v, Tensor)),
        "data_mode": "online" if "frames" in batch else "cached",
        "dataset": made_from.content,
        "vae": made_from.vae or start["vae"],
        "gpus": gpus,
        "matmul_dtype": flops.most_common(1)[0][0] if flops else None,
        "matmul_flops": {dtype: amount / flops.total() for dtype, amount in flops.most_common()},
        "compiled": compiled_graphs > 0,
        "captured": _captured(take_step),
        "checkpointing": _recomputes(found),
    }


def declared(spec: RunSpec) -> dict[str, Any]:
    """What ``after_steps`` must find."""
    counts = parameters(
        spec.model,
        frames=spec.data.frames,
        latent_size=spec.latent_size,
        latent_channels=spec.vae.latent_channels,
    )
    return {
        "parameters": counts.total,
        "trainable_parameters": counts.trainable,
        "precision": spec.precision,
        "matmul_dtype": spec.precision,
        "experts": spec.model.experts,
        "top_k": spec.model.top_k,
        "world_size": spec.gpus,
        "clips_per_gpu": spec.clips_per_gpu,
        "data_mode": spec.data.mode,
        "dataset": spec.data.dataset,
        "implementation": spec.implementation,
        "vae": spec.vae.id,
        "deterministic": spec.deterministic,
        "compiled": spec.captured,
        "captured": spec.captured,
        "checkpointing": False,
    }


def check(spec: RunSpec, effective: Mapping[str, Any]) -> None:
    """Raises UserError with the first setting in which the run differs from its spec."""
    for key, asked in declared(spec).items():
        did = effective.get(key)
        if did is not None and did != asked:
            raise UserError(f"{key}: the spec says {asked}, the run does {did}")


def _captured(take_step: Step | CapturedStep) -> bool | None:
    """None where there were too few steps for a capture."""
    if isinstance(take_step, CapturedStep):
        return take_step.replays > 0 if take_step.taken > EAGER_STEPS else None
    return False


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _fp32(device: torch.device) -> str:
    """How products of fp32 matrices run."""
    return "tf32" if device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32 else "fp32"


def _products(operators: Iterable[Event]) -> list[tuple[str, str, int]]:
    """Type of the operands, part of the step and FLOPs of each product of matrices."""
    operators = list(operators)
    on_host = ranges(operators)
    found = []
    for event in operators:
        if event.get("cat") == "cpu_op" and event["name"] in PRODUCTS:
            place = PRODUCTS[event["name"]]
            left, right = event["args"]["Input Dims"][place : place + 2]
            kind = event["args"]["Input type"][place]
            flops = 2 * right[-1]
            for length in left:
                flops *= length
            inside = [part for begin, end, part in on_host if begin <= event["ts"] <= end]
            found.append((DTYPES.get(kind, kind), inside[0] if inside else "other", flops))
    return found


def _recomputes(found: list[tuple[str, str, int]]) -> bool | None:
    """Whether the backward pass repeats the forward's products: twice as many without, or thrice.

    None where no products were seen.
    """
    flops = Counter[str]()
    for _, part, amount in found:
        flops[part] += amount
    if not flops["forward"]:
        return None
    return flops["backward"] > 2.5 * flops["forward"]
