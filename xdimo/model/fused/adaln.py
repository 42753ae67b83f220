"""What stands between two layers of a block, in one pass: residual, LayerNorm, modulation.

    x' = x + gate (branch + bias) (+ a table of frames)
    h  = LayerNorm(x') (1 + scale) + shift

x stays in float32; h has the steering vectors' type. A branch is a tensor, or the rows that a
mixture of experts left, which are weighed and added here, in float32. The backward pass normalises
again and leaves sums of a few tokens for all vectors, added afterwards in a fixed order.

Shapes: x, branch, h [b, n, d], contiguous; gate, shift, scale [b, d]; bias [d]; table [f, d], of
which frame i holds for n / f tokens.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from xdimo.model.fused import adaln_kernels as kernels
from xdimo.model.fused.storage import Stack

EPSILON = 1e-6
PROGRAMS = 1024  # enough for every card to be busy; more tokens make longer ones


class Choices(NamedTuple):
    """A branch in parts: the sum over each token's choices of weight x row."""

    y_RD: Tensor
    weight_TK: Tensor  # float32
    row_TK: Tensor  # int32
    choice_R: Tensor  # int32: T x K where a row only fills up
    first_E: Tensor  # int32: first row of each expert
    last_E: Tensor  # int32: one past its last


def _shape(width: int, numbers: int, warps: int) -> dict[str, int]:
    """A tile of so many numbers, whatever the width."""
    tile_d = triton.next_power_of_2(width)
    return {"tile_t": max(1, numbers // tile_d), "tile_d": tile_d, "num_warps": warps}


def forward(
    x: Tensor,
    branch: Tensor | Choices | None,
    gate: Tensor | None,
    table: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    bias: Stack | None = None,
) -> tuple[Tensor, Tensor]:
    """x' (empty without a branch) and h."""
    b, n, d = x.shape
    out = torch.empty_like(x) if branch is not None else x.new_empty(0)
    h = x.new_empty(x.shape, dtype=shift.dtype)
    tensor, weight_TK, row_TK, *_ = _parts(branch, x)
    shape = _shape(d, 1024, 1)
    kernels.residual_norm_forward[(triton.cdiv(n, shape["tile_t"]), b)](
        x,
        tensor,
        bias.value if bias else x,
        weight_TK,
        row_TK,
        gate if gate is not None else x,
        table if table is not None else x,
        shift,
        scale,
        out,
        h,
        n,
        n // len(table) if table is not None else n,
        gate.stride(0) if gate is not None else 0,
        shift.stride(0),
        EPSILON,
        d,
        adds=branch is not None,
        has_bias=bias is not None,
        top_k=row_TK.shape[1] if isinstance(branch, Choices) else 0,
        has_table=table is not None,
        **shape,
    )
    return out, h


def _parts(branch: Tensor | Choices | None, x: Tensor) -> tuple[Tensor, ...]:
    """What the kernels want; x in the place of what they do not read."""
    if isinstance(branch, Choices):
        return branch
    return x if branch is None else branch, x, x, x, x, x


class Gradients(NamedTuple):
    """``logit_TK``: of the choices; empty where the branch is a tensor."""

    x: Tensor
    branch: Tensor  # of its rows, where it is Choices
    logit_TK: Tensor
    shift: Tensor
    scale: Tensor
    gate: Tensor


def backward(
    grad_out: Tensor | None,
    grad_h: Tensor | None,
    x: Tensor,
    branch: Tensor | Choices | None,
    gate: Tensor | None,
    scale: Tensor,
    bias: Stack | None = None,
    tile_rows: int = 1,
) -> Gradients:
    """``x``: the sum x' where there is a branch. ``grad_out``: None where x' is not used further
    on. ``tile_rows``: each expert's rows fill tiles so high. The bias's gradient goes to its place.
    """
    b, n, d = x.shape
    shape = _shape(d, 2048, 2)
    rounds = max(1, b * n // (shape["tile_t"] * PROGRAMS))
    programs = triton.cdiv(n, shape["tile_t"] * rounds)
    tensor, weight_TK, row_TK, choice_R, first_E, last_E = _parts(branch, x)
    top_k = row_TK.shape[1] if isinstance(branch, Choices) else 0
    sums = x.new_empty(b, programs, 4 if bias else 3, d)
    grad_x = torch.empty_like(x)
    grad_branch = torch.empty_like(tensor) if branch is not None else x
    grad_logit = torch.empty_like(weight_TK) if top_k else x.new_empty(0)
    if grad_h is None:
        grad_h = torch.zeros_like(x, dtype=scale.dtype)
    kernels.residual_norm_backward[(programs, b)](
        grad_out.contiguous() if grad_out is not None else grad_h,
        grad_h.contiguous(),
        x,
        tensor,
        bias.value if bias else x,
        weight_TK,
        row_TK,
        choice_R,
        first_E,
        last_E,
        gate if gate is not None else x,
        scale,
        grad_x,
        grad_branch,
        grad_logit,
        sums,
        n,
        b * n * top_k,
        gate.stride(0) if gate is not None else 0,
        scale.stride(0),
        rounds,
        EPSILON,
        d,
        adds=branch is not None,
        has_bias=bias is not None,
        top_k=top_k,
        padded_k=triton.next_power_of_2(max(1, top_k)),
        fillers=len(first_E) * tile_rows if top_k else 0,
        tile_rows=tile_rows,
        passes=grad_out is not None,
        **shape,
    )
    steering = scale.new_empty(3, b, d)
    block_n = 16
    kernels.residual_norm_sums[(triton.cdiv(3 * d, block_n), b + (bias is not None))](
        sums, steering, bias.grad if bias else sums, b, programs, d, bias is not None, 256, block_n
    )
    return Gradients(grad_x, grad_branch, grad_logit, *steering)


class _ResidualNorm(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        table: Tensor | None,
        shift: Tensor,
        scale: Tensor,
        bias: Stack | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, h = forward(x, branch, gate, table, shift, scale, bias)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(out if branch is not None else x, branch, gate, scale)
        ctx.bias = bias
        return out, h

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:  # type: ignore[override]
        grad_out, grad_h = grads
        x, branch, gate, scale = ctx.saved_tensors
        bias = ctx.bias
        if branch is None:
            found = backward(None, grad_h, x, None, None, scale)
            return found.x, None, None, None, found.shift, found.scale, None
        found = backward(grad_out, grad_h, x, branch, gate, scale, bias)
        of_steering = found.gate, None, found.shift, found.scale
        return found.x, found.branch, *of_steering, None, *(bias.grads() if bias else ())


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift."""
    h: Tensor = _ResidualNorm.apply(x, None, None, None, shift, scale, None)[1]
    return h


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    table: Tensor | None = None,
    bias: Stack | None = None,
) -> tuple[Tensor, Tensor]:
    """x' and h, as the module's docstring has them."""
    parameters = bias.parameters if bias else ()
    found: tuple[Tensor, Tensor] = _ResidualNorm.apply(
        x, branch, gate, table, shift, scale, bias, *parameters
    )
    return found
