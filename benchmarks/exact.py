"""How exact the fused implementation is on this machine's GPU, beside the reference.

    python benchmarks/exact.py

First each part in bfloat16 against float64, as relative errors of output and gradients; then the
loss curves of both implementations over 200 steps on the same clips and noise.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from step import batch_of, parts, spec_of
from tabulate import tabulate
from torch import Tensor, nn

from xdimo.model import latte, moe
from xdimo.model.fused import latte as fused
from xdimo.model.fused.temporal import temporal_attention
from xdimo.train import loop

STEPS = 200
CLIPS = 4
WIDTH, HEADS, FRAMES, POSITIONS = 384, 6, 16, 64


def errors(
    run: Callable[[Any, Tensor], Tensor],
    module: Any,
    x: Tensor,
    upstream: Tensor,
    exact: list[Tensor],
) -> tuple[list[Tensor], list[float]]:
    """Output and gradients of x and all parameters, and their relative errors."""
    inputs = x.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=x.dtype == torch.float32):
        out = run(module, inputs)
    parameters = list(module.parameters()) if module is not None else []
    found = [out, *torch.autograd.grad(out, [inputs, *parameters], upstream.to(out.dtype))]
    relative = [
        float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=False)
    ]
    return found, relative


def compare(
    name: str, module: Any, reference: Any, candidate: Any, x: Tensor, upstream: Tensor
) -> list[Any]:
    """The largest ratio of errors over output and gradients, and both errors there."""
    double = copy.deepcopy(module).double() if module is not None else None
    exact, _ = errors(reference, double, x.double(), upstream.double(), [])
    _, theirs = errors(reference, module, x, upstream, exact)
    _, ours = errors(candidate, module, x, upstream, exact)
    names = ["output", "input", *(n for n, _ in module.named_parameters())] if module else []
    rows = zip(ours, theirs, names or ["output", "input"], strict=True)
    ratio, ours_there, theirs_there, where = max((a / b, a, b, c) for a, b, c in rows)
    return [f"{name}: {where}", f"{theirs_there:.2e}", f"{ours_there:.2e}", f"{ratio:.2f}"]


class Experts(nn.Module):
    """A block's mixture alone; its router routes as float64 does, so that no choice differs."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = 2
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(latte.mlp(WIDTH) for _ in range(4))


def mixture(block: Any, x: Tensor) -> Tensor:
    """The fused mixture alone: added to zeros, with a gate of one."""
    ones = torch.ones(1, WIDTH, device=x.device, dtype=torch.bfloat16)
    h, zeros = x.bfloat16()[None], torch.zeros_like(ones)
    chosen = fused.dispatch(block, h)
    x = torch.zeros_like(x)[None]
    return fused.mixture_residual_norm(x, h, *chosen, ones, zeros, zeros)[0][0]


def attention(qkv: Tensor) -> Tensor:
    b, f, t, _ = qkv.shape
    split = qkv.view(b, f, t, 3, HEADS, WIDTH // HEADS).permute(3, 0, 2, 4, 1, 5)
    return latte.attention(*split).permute(0, 3, 1, 2, 4).reshape(b, f, t, WIDTH)


def separated(x: Tensor, gate: nn.Linear) -> Tensor:
    """Tokens whose second and third logit differ by far more than bfloat16 rounds."""
    logits = gate(x).sort(descending=True).values
    return x[(logits[:, 1] - logits[:, 2]) > 0.05]


def curves(device: torch.device) -> list[list[Any]]:
    losses = {}
    for implementation in ("reference", "fused"):
        spec = spec_of(CLIPS, implementation, 1)
        step = loop.stepper(spec, *parts(spec, device))
        torch.manual_seed(1)
        batches = [batch_of(spec, device) for _ in range(2)]
        taken = [step(batches[i % 2], False)[0].clone() for i in range(STEPS)]
        losses[implementation] = torch.stack(taken).cpu()
    rows = []
    for first in range(0, STEPS, 40):
        part = slice(first, first + 40)
        a, b = losses["reference"][part], losses["fused"][part]
        rows.append([f"{first + 1} to {first + 40}", a.mean(), b.mean(), (a - b).abs().max()])
    return rows


def main() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    experts = Experts().to(device)
    x = separated(torch.randn(5000, WIDTH, device=device), experts.gate)
    qkv = torch.randn(2, FRAMES, POSITIONS, 3 * WIDTH, device=device)
    rows = [
        compare(
            f"experts, {len(x)} tokens",
            experts,
            lambda m, x: moe.mixture(x, m.gate, m.experts, m.top_k),
            mixture,
            x,
            torch.randn_like(x),
        ),
        compare(
            "temporal attention",
            None,
            lambda _, x: attention(x.bfloat16() if x.dtype == torch.float32 else x),
            lambda _, x: temporal_attention(x.bfloat16().contiguous(), HEADS),
            qkv,
            torch.randn(2, FRAMES, POSITIONS, WIDTH, device=device),
        ),
    ]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; relative errors in bfloat16")
    print(tabulate(rows, ["part (worst of output, gradients)", "reference", "fused", "ratio"]))
    print(f"\nloss of S/2 4E2A, {CLIPS} clips, same clips, steps and noise")
    heads = ["steps", "reference", "fused", "largest difference of a step"]
    print(tabulate(curves(device), heads, floatfmt=".4f"))


if __name__ == "__main__":
    main()
