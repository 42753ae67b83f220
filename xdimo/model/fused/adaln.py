"""What stands between two layers of a block, in one pass: residual, LayerNorm, modulation.

    x' = x + gate branch (+ a table of frames)
    h  = LayerNorm(x') (1 + scale) + shift

x stays in float32; h and the branch have the steering vectors' type. The backward pass normalises
again and leaves sums of a few tokens for gate, shift and scale, added afterwards in a fixed order.

Shapes: x, branch, h [b, n, d], contiguous; gate, shift, scale [b, d]; table [f, d], of which frame
i holds for n / f tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

EPSILON = 1e-6
PROGRAMS = 1024  # enough for every card to be busy; more tokens make longer ones


@triton.jit
def _forward(
    x, branch, gate, table, shift, scale, out, h, tokens, tokens_a_frame, stride_gate, stride_shift,
    eps: tl.constexpr, width: tl.constexpr, adds: tl.constexpr, has_table: tl.constexpr,
    tile_t: tl.constexpr, tile_d: tl.constexpr,
):  # fmt: skip
    clip = tl.program_id(1)
    t = tl.program_id(0) * tile_t + tl.arange(0, tile_t)
    d = tl.arange(0, tile_d)
    d_ok = d < width
    ok = (t < tokens)[:, None] & d_ok[None, :]
    at = (clip.to(tl.int64) * tokens + t)[:, None] * width + d[None, :]
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    if adds:
        g = tl.load(gate + clip * stride_gate + d, mask=d_ok, other=0.0).to(tl.float32)
        value += g[None, :] * tl.load(branch + at, mask=ok, other=0.0).to(tl.float32)
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
def _backward(
    grad_out, grad_h, x, branch, gate, scale, grad_x, grad_branch, sums,
    tokens, stride_gate, stride_scale, rounds,
    eps: tl.constexpr, width: tl.constexpr, adds: tl.constexpr, passes: tl.constexpr,
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
        at = (clip.to(tl.int64) * tokens + t)[:, None] * width + d[None, :]
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
            sum_gate += tl.sum(tl.where(ok, total, 0.0) * tl.load(
                branch + at, mask=ok, other=0.0
            ).to(tl.float32), axis=0)  # fmt: skip
            product = total * g[None, :]
            tl.store(grad_branch + at, product.to(grad_branch.dtype.element_ty), mask=ok)
    place = sums + (clip * tl.num_programs(0) + tl.program_id(0)) * 3 * width + d
    tl.store(place, sum_shift, mask=d_ok)
    tl.store(place + width, sum_scale, mask=d_ok)
    tl.store(place + 2 * width, sum_gate, mask=d_ok)


def _tile(width: int) -> dict[str, int]:
    """A tile of 2,048 numbers, whatever the width."""
    tile_d = triton.next_power_of_2(width)
    return {"tile_t": max(1, 2048 // tile_d), "tile_d": tile_d}


@torch.library.custom_op("xdimo::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    table: Tensor | None,
    shift: Tensor,
    scale: Tensor,
) -> tuple[Tensor, Tensor]:
    b, n, d = x.shape
    out = torch.empty_like(x) if branch is not None else x.new_empty(0)
    h = x.new_empty(x.shape, dtype=shift.dtype)
    tile = _tile(d)
    _forward[(triton.cdiv(n, tile["tile_t"]), b)](
        x,
        branch if branch is not None else x,
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
        has_table=table is not None,
        **tile,
    )
    return out, h


@_residual_norm.register_fake
def _(x, branch, gate, table, shift, scale):  # type: ignore[no-untyped-def]
    out = torch.empty_like(x) if branch is not None else x.new_empty(0)
    return out, x.new_empty(x.shape, dtype=shift.dtype)


@torch.library.custom_op("xdimo::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    grad_out: Tensor | None,
    grad_h: Tensor,
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and the branch, and sums [b, 3, d] for shift, scale and gate.

    ``x``: the sum x' where there is a branch.
    """
    b, n, d = x.shape
    tile = _tile(d)
    rounds = max(1, b * n // (tile["tile_t"] * PROGRAMS))
    programs = triton.cdiv(n, tile["tile_t"] * rounds)
    sums = x.new_empty(b, programs, 3, d, dtype=torch.float32)
    grad_x = torch.empty_like(x)
    grad_branch = torch.empty_like(branch) if branch is not None else x.new_empty(0)
    _backward[(programs, b)](
        grad_out if grad_out is not None else grad_h,
        grad_h,
        x,
        branch if branch is not None else x,
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
        passes=grad_out is not None,
        **tile,
    )
    return grad_x, grad_branch, sums.sum(1)


@_residual_norm_backward.register_fake
def _(grad_out, grad_h, x, branch, gate, scale):  # type: ignore[no-untyped-def]
    grad_branch = torch.empty_like(branch) if branch is not None else x.new_empty(0)
    return torch.empty_like(x), grad_branch, x.new_empty(len(x), 3, x.shape[2])


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, branch, gate, _, _, scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0] if branch is not None else x, branch, gate, scale)


def _gradients(ctx, grad_out, grad_h):  # type: ignore[no-untyped-def]
    x, branch, gate, scale = ctx.saved_tensors
    if branch is None:
        grad_out = None
    grad_out = grad_out.contiguous() if grad_out is not None else None
    grad_x, grad_branch, sums = _residual_norm_backward(
        grad_out, grad_h.contiguous(), x, branch, gate, scale
    )
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
