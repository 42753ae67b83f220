"""What stands between two layers of a block, in one pass: residual, LayerNorm, modulation.

    x' = x + gate branch (+ a table of frames)
    h  = LayerNorm(x') (1 + scale) + shift

x stays in float32; h has the steering vectors' type. A branch is a tensor, or the rows that a
mixture of experts left, which are weighed and added here, in float32. The backward pass normalises
again and leaves sums of a few tokens for gate, shift and scale, added afterwards in a fixed order.

Shapes: x, branch, h [b, n, d], contiguous; gate, shift, scale [b, d]; table [f, d], of which frame
i holds for n / f tokens.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-6
PROGRAMS = 1024  # enough for every card to be busy; more tokens make longer ones


class Choices(NamedTuple):
    """A branch in parts: the sum over each token's choices of weight x row."""

    y_RD: Tensor
    weight_TK: Tensor  # float32
    row_TK: Tensor  # int32


@triton.jit
def _branch(branch, weight_TK, row_TK, token, at, d, ok, width: tl.constexpr, top_k: tl.constexpr):
    """A tile of the branch; ``top_k`` 0: it is a tensor."""
    if top_k == 0:
        total = tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
    else:
        total = tl.zeros(at.shape, tl.float32)
        for j in tl.static_range(top_k):
            row = tl.load(row_TK + token * top_k + j).to(tl.int64)
            weight = tl.load(weight_TK + token * top_k + j)
            place = branch + row[:, None] * width + d[None, :]
            total += weight[:, None] * tl.load(place, mask=ok, other=0.0).to(tl.float32)
    return total


@triton.jit
def residual_norm_forward(
    x, branch, weight_TK, row_TK, gate, table, shift, scale, out, h,
    tokens, tokens_a_frame, stride_gate, stride_shift,
    eps: tl.constexpr, width: tl.constexpr, adds: tl.constexpr, top_k: tl.constexpr,
    has_table: tl.constexpr,
    tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(1)
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    d = tl.arange(0, tile_d)
    d_ok = d < width
    ok = (t < tokens)[:, None] & d_ok[None, :]
    # Tokens past the end read the last one's rows and write nothing.
    token = clip.to(tl.int64) * tokens + tl.minimum(t, tokens - 1)
    at = token[:, None] * width + d[None, :]
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if adds:
        g = tl.load(gate + clip * stride_gate + d, mask=d_ok, other=0.0).to(tl.float32)
        value += g[None, :] * _branch(branch, weight_TK, row_TK, token, at, d, ok, width, top_k)
        if has_table:
            place = table + (t // tokens_a_frame)[:, None] * width + d[None, :]
            value += tl.load(place, mask=ok, other=0.0)
        tl.store(out + at, value, mask=ok)
    mean = tl.sum(value, axis=1) / width
    centred = tl.where(ok, value - mean[:, None], 0.0)
    normal = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)[:, None]
    s = tl.load(scale + clip * stride_shift + d, mask=d_ok, other=0.0).to(tl.float32)
    b = tl.load(shift + clip * stride_shift + d, mask=d_ok, other=0.0).to(tl.float32)
    result = normal * (1.0 + s)[None, :] + b[None, :]
    tl.store(h + at, result.to(h.dtype.element_ty), mask=ok)


@triton.jit
def residual_norm_backward(
    grad_out, grad_h, x, branch, weight_TK, row_TK, gate, scale, grad_x, grad_branch, sums,
    tokens, stride_gate, stride_scale, rounds,
    eps: tl.constexpr, width: tl.constexpr, adds: tl.constexpr, top_k: tl.constexpr,
    passes: tl.constexpr,
    tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    """``passes``: x' is used further on, so it has a gradient of its own."""
    clip = tl.program_id(1)
    d = tl.arange(0, tile_d)
    d_ok = d < width
    s = tl.load(scale + clip * stride_scale + d, mask=d_ok, other=0.0).to(tl.float32)
    if adds:
        g = tl.load(gate + clip * stride_gate + d, mask=d_ok, other=0.0).to(tl.float32)
    sum_shift = tl.zeros((tile_d,), tl.float32)
    sum_scale = tl.zeros((tile_d,), tl.float32)
    sum_gate = tl.zeros((tile_d,), tl.float32)
    for i in range(rounds):
        t = (tl.program_id(0) * rounds + i) * tile_t + tl.arange(0, tile_t)
        ok = (t < tokens)[:, None] & d_ok[None, :]
        token = clip.to(tl.int64) * tokens + tl.minimum(t, tokens - 1)
        at = token[:, None] * width + d[None, :]
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        up = tl.load(grad_h + at, mask=ok, other=0.0).to(tl.float32)
        mean = tl.sum(value, axis=1) / width
        centred = tl.where(ok, value - mean[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
        normal = centred * inverse[:, None]
        sum_shift += tl.sum(up, axis=0)
        sum_scale += tl.sum(up * normal, axis=0)
        up *= (1.0 + s)[None, :]
        along = tl.sum(up * normal, axis=1) / width
        total = (up - (tl.sum(up, axis=1) / width)[:, None] - normal * along[:, None]) * (
            inverse[:, None]
        )
        if passes:
            total += tl.load(grad_out + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(grad_x + at, total, mask=ok)
        if adds:
            added = _branch(branch, weight_TK, row_TK, token, at, d, ok, width, top_k)
            sum_gate += tl.sum(tl.where(ok, total * added, 0.0), axis=0)
            product = total * g[None, :]
            tl.store(grad_branch + at, product.to(grad_branch.dtype.element_ty), mask=ok)
    place = sums + (clip * tl.num_programs(0) + tl.program_id(0)) * 3 * width + d
    tl.store(place, sum_shift, mask=d_ok)
    tl.store(place + width, sum_scale, mask=d_ok)
    tl.store(place + 2 * width, sum_gate, mask=d_ok)


def _shape(width: int) -> dict[str, int]:
    """A tile of 4,096 numbers in two warps, whatever the width."""
    tile_d = triton.next_power_of_2(width)
    return {"tile_t": max(1, 4096 // tile_d), "tile_d": tile_d, "num_warps": 2}


def _parts(branch: Tensor | Choices | None, x: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    if isinstance(branch, Choices):
        return *branch, branch.row_TK.shape[1]
    tensor = branch if branch is not None else x
    return tensor, x, x, 0


def forward(
    x: Tensor,
    branch: Tensor | Choices | None,
    gate: Tensor | None,
    table: Tensor | None,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """x' (empty without a branch) and h."""
    b, n, d = x.shape
    out = torch.empty_like(x) if branch is not None else x.new_empty(0)
    h = x.new_empty(x.shape, dtype=shift.dtype)
    tensor, weight_TK, row_TK, top_k = _parts(branch, x)
    shape = _shape(d)
    residual_norm_forward[(triton.cdiv(n, shape["tile_t"]), b)](
        x,
        tensor,
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
        top_k=top_k,
        has_table=table is not None,
        **shape,
    )
    return out, h


def backward(
    grad_out: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    branch: Tensor | Choices | None,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and the branch [b, n, d], and sums [b, 3, d] for shift, scale and gate.

    ``x``: the sum x' where there is a branch. ``grad_out``: None where x' is not used further on.
    """
    b, n, d = x.shape
    shape = _shape(d)
    rounds = max(1, b * n // (shape["tile_t"] * PROGRAMS))
    programs = triton.cdiv(n, shape["tile_t"] * rounds)
    sums = x.new_empty(b, programs, 3, d, dtype=torch.float32)
    tensor, weight_TK, row_TK, top_k = _parts(branch, x)
    grad_x = torch.empty_like(x)
    grad_branch = x.new_empty(x.shape if branch is not None else 0, dtype=tensor.dtype)
    residual_norm_backward[(programs, b)](
        grad_out.contiguous() if grad_out is not None else grad_h,
        grad_h.contiguous(),
        x,
        tensor,
        weight_TK,
        row_TK,
        gate if gate is not None else x,
        scale,
        grad_x,
        grad_branch,
        sums,
        n,
        gate.stride(0) if gate is not None else 0,
        scale.stride(0),
        rounds,
        EPSILON,
        d,
        adds=branch is not None,
        top_k=top_k,
        passes=grad_out is not None,
        **shape,
    )
    return grad_x, grad_branch, sums.sum(1)


@torch.library.custom_op("xdimo::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    table: Tensor | None,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    return forward(x, branch, gate, table, shift, scale)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, branch, gate, _, _, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if branch is not None else x, branch, gate, scale)


def _gradients(ctx, grad_out, grad_h):  # type: ignore[no-untyped-def]
    x, branch, gate, scale = ctx.saved_tensors
    if branch is None:
        grad_out = None
    grad_x, grad_branch, sums = backward(grad_out, grad_h, x, branch, gate, scale)
    shift, scales, gates = sums.to(scale.dtype).unbind(1)
    if branch is None:
        return grad_x, None, None, None, shift, scales
    return grad_x, grad_branch, gates, None, shift, scales


_residual_norm.register_autograd(_gradients, setup_context=_save)


def norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift."""
    return _residual_norm(x, None, None, None, shift, scale)[1]


def residual_norm(
    x: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x' and h, as the module's docstring has them."""
    return _residual_norm(x, branch, gate, table, shift, scale)
